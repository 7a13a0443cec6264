"""The upload of one W&B run file: W&B's own ``wandb beta sync --live``, in a process of its own, and what it says.

The file is the delivery; the upload only reads it. So whatever keeps the upload (no login, no network, a server that
refuses) loses nothing: it is tried again (`Uploader`), and ``wandb sync`` finishes it on any other day.

What the server has, W&B's marker ``.synced`` alone does not say: its tool makes one too after a fatal error in the
middle. So the tool's log is read while it works: how many rows the server has confirmed, and what it refused. Once the
server has all of a file, ``.uploaded`` beside it holds the file's size.

As a module this is the process: ``python -m evsys_adapters._wandb_upload_process FILE…``. It ends when its stdin does,
however its parent ended, and W&B's service ends with it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from evsys_adapters._wandb_records import Records
from evsys_bus.files import load_file, replace_file

LOG: Final = "upload.log"
"""Beside the file: what the last upload printed."""
_LOG_FOLDER_PREFIX: Final = ".upload-"
"""What the names of folders begin with that hold the tool's own logs while it works."""
_IDLE_STATUS: Final = "waiting for more data"
"""The whole status of a live upload that has sent all."""
_FATAL_MESSAGE: Final = "Fatal error while uploading data"
_URL: Final = re.compile(r"https?://\S+/runs/\S+")
_STATUS: Final = re.compile(r"\[[^\]]*?([^/\]]+)\] (.*)")
_MAX_COUNT_POINTS: Final = 256
LOGIN_FIX: Final = "run: wandb login (or set WANDB_API_KEY)"
_REFUSALS: Final = {
    401: (
        "the server refuses the API key (401)",
        "check the login: run: wandb login --relogin (or set WANDB_API_KEY to a valid key)",
    ),
    403: (
        "the server refuses access (403)",
        "check the login (run: wandb login --relogin), and entity and project of wandb_logger",
    ),
    404: (
        "the server does not know the entity or the project (404)",
        "check the login (wandb login), and entity and project of wandb_logger",
    ),
}
_TRANSIENT_STATUSES: Final = frozenset({408, 409, 425, 429})
"""Answers below 500 that may pass."""
_SETTINGS: Final = {
    "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "5",
    "WANDB_X_FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "5",
    "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "2",
}
"""W&B's own defaults, of a minute and of 15 s, would keep a server that is back waiting. The environment overrules."""


class Problem(NamedTuple):
    """What keeps the server from having all."""

    why: str
    fix: str | None = None
    """What a person has to do; None where it may pass by itself."""


class Upload:
    """One run file on its way to the server.

    Args:
        file: The run file, in its folder.
        run: How the run is called.
        events: Events in the file that the server has not confirmed.
        on_url: Called with the URL of the run's page, once the server has named it; None where that is known.
    """

    def __init__(self, file: Path, run: str, events: int = 0, on_url: Callable[[str], None] | None = None) -> None:
        self.file: Final = file
        self.run: Final = run
        self.on_url = on_url
        self.url = ""
        self.events = events
        self.events_at_mark = events
        """As many of the events as were counted at the last mark."""
        self.row_count = 0
        """Rows in the file."""
        self.ended = False
        """Whether the file says that the run has ended: the tool ends then, else it waits for more."""
        self.problem: Problem | None = None
        self.finished = False
        """Whether the server has all, as far as is known here; `done` looks at the disk."""
        self.has_task = False
        """Whether a task has it uploaded now."""
        self.fatal = False
        """Whether the tool gave up in the middle."""
        self.status = ""
        """What the tool printed last of this file."""
        self.confirmed_rows = -1
        """Rows that the server has confirmed in this attempt."""
        self.is_tracked = False
        """Whether `row_count` and `ended` are kept by whoever writes the file; else `scan_file` finds them out."""
        self.task_requested_at = 0.0
        """When a task was asked for that drives it, on the clock of ``time.monotonic``; 0 for none."""
        self.attempts = 0
        self.temporary_problem: Problem | None = None
        """What the tool waits for in this attempt."""
        self._refused_status: int | None = None
        self._rows_in_request = 0
        self._count_points: deque[tuple[int, int]] = deque()
        self._confirmed_events = 0

    # -- events -------------------------------------------------------------------------------------------------------

    def count_event(self) -> None:
        """One more event; to be called before its rows are added."""
        point = (self.row_count, self.events)
        if len(self._count_points) >= _MAX_COUNT_POINTS or (
            self._count_points and self._count_points[-1][0] == self.row_count
        ):
            self._count_points[-1] = point
        else:
            self._count_points.append(point)
        self.events += 1
        self.finished = False
        self._confirm_rows()

    def pending_events(self, *, at_mark: bool, at_end: bool) -> int:
        """Events that the server has not confirmed.

        Args:
            at_mark: Of those alone that were counted at the last mark.
            at_end: Nothing follows: a file that the server does not have whole counts.
        """
        if self.finished:
            return 0
        confirmed = self.events if 0 <= self.row_count <= self.confirmed_rows else self._confirmed_events
        counted = self.events_at_mark if at_mark else self.events
        remaining = max(0, counted - confirmed)
        return max(remaining, min(1, counted)) if at_end or self.ended or not self.has_task else remaining

    # -- the disk -----------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the server has all that is in the file."""
        try:
            at = self.file.stat()
        except OSError:
            return True  # nothing is there that could be uploaded
        with contextlib.suppress(OSError):
            sent = load_file(self._marker, int, quarantine=True)
            if sent is not None:
                return sent == at.st_size
        with contextlib.suppress(OSError):
            return self.file.with_suffix(".wandb.synced").stat().st_mtime_ns >= at.st_mtime_ns
        return False

    def mark_done(self) -> None:
        """Write down that the server has all that is in the file now."""
        with contextlib.suppress(OSError):
            replace_file(self._marker, str(self.file.stat().st_size).encode(), mode=0o666)

    def clear_markers(self) -> None:
        """The file is another one than what the server has."""
        for marker in (self._marker, self.file.with_suffix(".wandb.synced")):
            marker.unlink(missing_ok=True)

    def scan_file(self, records: Records) -> None:
        """Read in the file what is not known of it: its rows, and whether the run has ended."""
        row_count, ended = 0, False
        try:
            with self.file.open("rb") as file:
                for payload, _ in records.scan(file):
                    found = records.info(payload)
                    row_count, ended = row_count + (found.row >= 0), ended or found.is_exit
        except OSError:
            pass
        self.row_count, self.ended = row_count, ended

    @property
    def _marker(self) -> Path:
        return self.file.with_suffix(".wandb.uploaded")

    # -- what the tool says -------------------------------------------------------------------------------------------

    def start_attempt(self) -> None:
        """A process begins with the file."""
        self.file.with_suffix(".wandb.syncstate").unlink(missing_ok=True)
        self.fatal, self.confirmed_rows, self._rows_in_request, self._refused_status = False, -1, 0, None
        self.status, self.temporary_problem = "", None
        self.attempts += 1

    def handle_output(self, line: str) -> None:
        """A line that the tool printed of this file."""
        if _FATAL_MESSAGE in line:
            self.fatal = True
        found = _URL.search(line)
        if found is not None:
            self.confirmed_rows, self.url, self.problem, self.temporary_problem = (
                max(self.confirmed_rows, 0),
                found[0],
                None,
                None,
            )
            self._confirm_rows()
            if self.on_url is not None:
                on_url, self.on_url = self.on_url, None
                on_url(found[0])
        self.status = line

    def handle_log_entry(self, entry: Mapping[str, Any]) -> None:
        """An entry of the tool's log of this file."""
        match entry.get("msg"):
            case "filestream: sending request":
                if "history_lines" in entry:
                    self._rows_in_request = int(entry.get("history_offset", 0)) + int(entry["history_lines"])
            case "filestream: request sent":
                self.confirmed_rows, self.problem, self.temporary_problem = (
                    max(self.confirmed_rows, self._rows_in_request),
                    None,
                    None,
                )
                self._refused_status = None
                self._confirm_rows()
            case "api: retrying HTTP error":
                self.set_temporary_problem(Problem(f"the server answers with errors: HTTP {entry.get('status')}"))
            case "api: retrying error":
                self.set_temporary_problem(Problem(f"the server does not answer: {str(entry.get('error', ''))[-200:]}"))
            case "api: HTTP error":
                self._refused_status = int(entry.get("status", 0))
            case _:
                pass

    def set_temporary_problem(self, problem: Problem) -> None:
        """The tool waits for this to pass."""
        self.problem = self.temporary_problem = problem

    @property
    def is_idle(self) -> bool:
        """Whether the server has all rows, and the tool nothing more to do until there are more."""
        return not self.fatal and self.confirmed_rows >= self.row_count and self.status.endswith(f"] {_IDLE_STATUS}")

    def diagnose(self, output: str) -> Problem:
        """What kept a process that ended without having all sent."""
        if "No API key" in output or "Not authenticated" in output:
            return Problem("no login", LOGIN_FIX)
        if self._refused_status in _REFUSALS:
            return Problem(*_REFUSALS[self._refused_status])
        lines = [each.removeprefix("wandb: ").strip() for each in output.splitlines()]
        errors = [each for each in lines if "ERROR" in each and each.removeprefix("ERROR").strip()]
        if (
            self.temporary_problem is not None
            and self._refused_status is None
            and "Error initializing run" not in output
        ):
            return self.temporary_problem
        why = (errors or [each for each in lines if each] or ["W&B's upload ended without a word"])[-1][:300]
        return Problem(why.removeprefix("ERROR").strip(), self._fix_for(why, output))

    def _fix_for(self, why: str, output: str) -> str | None:
        if "AuthenticationError" in why:
            return LOGIN_FIX
        if "No such option" in output or "No such command" in output:
            return "this wandb is too old: run: pip install --upgrade wandb"
        status = self._refused_status
        refused = status is not None and status < 500 and status not in _TRANSIENT_STATUSES  # noqa: PLR2004
        if refused or "Error initializing run" in why:
            return f"check the login (wandb login), entity and project of wandb_logger, and {LOG} beside the file"
        return None

    def _confirm_rows(self) -> None:
        while self._count_points and self._count_points[0][0] <= self.confirmed_rows:
            self._confirmed_events = self._count_points.popleft()[1]


class UploadProcess:
    """One process of W&B's tool at work on some files, and what it prints and logs of each.

    Args:
        uploads: Of the files.
        output_path: Where what it prints goes; None for the file in its own folder, for it is of several runs.
        environment: What it is told besides.
    """

    def __init__(self, uploads: Sequence[Upload], output_path: Path | None, environment: Mapping[str, str]) -> None:
        for each in uploads:
            each.start_attempt()
        self.output = ""
        """What it has printed."""
        beside = uploads[0].file.parent
        for leftover in beside.glob(f"{_LOG_FOLDER_PREFIX}*"):  # by a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=_LOG_FOLDER_PREFIX, dir=beside))
        self._uploads = {each.file.stem.removeprefix("run-"): each for each in uploads}
        self._single_upload = uploads[0] if len(uploads) == 1 else None
        self._output_is_shared = output_path is None
        self._path = output_path or self._folder / LOG
        fixed = {"WANDB_ERROR_REPORTING": "false", "WANDB_DIR": str(self._folder)}
        with self._path.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 # our own command
                [sys.executable, "-m", __name__, *(str(each.file) for each in uploads)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**_SETTINGS, **os.environ, **fixed, **environment},
                start_new_session=True,
            )
        self._output_file = self._path.open(encoding="utf-8", errors="replace")
        self._log: TextIO | None = None
        self._partial_lines: dict[TextIO, str] = {}

    @property
    def is_running(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def poll(self) -> None:
        """Hand on what is new: first what the server refused, then what the tool makes of it."""
        for line in self._log_lines():
            with contextlib.suppress(ValueError, TypeError):
                entry = json.loads(line)
                upload = self._uploads.get(Path(str(entry.get("sync_path"))).stem.removeprefix("run-"))
                if upload is not None:
                    upload.handle_log_entry(entry)
        for line in self._complete_lines(self._output_file):
            self.output = f"{self.output}{line}\n"[-100_000:]
            found = _STATUS.search(line)
            upload = self._single_upload if found is None else self._uploads.get(found[1])
            if upload is not None:
                upload.handle_output(line)

    def stop(self) -> None:
        """End it, and W&B's service, and leave what it printed beside the files that are not done."""
        _kill(self._process)
        self.poll()
        for file in (self._output_file, self._log):
            if file is not None:
                file.close()
        for each in self._uploads.values():
            if self._output_is_shared and not each.done:
                with contextlib.suppress(OSError):
                    shutil.copyfile(self._path, each.file.parent / LOG)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _log_lines(self) -> Iterator[str]:
        if self._log is None:
            found = sorted(self._folder.glob("wandb/logs/debug-sync*.log"))
            if not found:
                return
            self._log = found[0].open(encoding="utf-8", errors="replace")
        yield from self._complete_lines(self._log)

    def _complete_lines(self, file: TextIO) -> list[str]:
        *complete, self._partial_lines[file] = (self._partial_lines.get(file, "") + file.read()).split("\n")
        return complete


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """The process and W&B's service, which is in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of them have ended
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _main(files: list[str]) -> None:
    def end_with_parent() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Any: W&B need not be there when this is checked.
    cli: Any = import_module("wandb.cli.cli").cli
    cli(["beta", "sync", "--live", "--no-skip-synced", "--no-skip-online", "--yes", "-n", str(len(files)), *files])


if __name__ == "__main__":
    _main(sys.argv[1:])
