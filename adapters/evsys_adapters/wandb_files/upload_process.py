"""The upload of one W&B run file by W&B's own tool, ``wandb beta sync --live``, in a separate process.

Events are delivered once their rows are in the file; the upload only reads it. So nothing is lost if the upload fails
(no login, no network, a server that rejects it): it is retried (`Uploader`), and ``wandb sync`` can finish it later.

W&B's marker ``.synced`` does not prove that the server has the file: the tool creates it even after a fatal error. So
the tool's log is read while it runs, for the rows that the server has confirmed and the requests that it rejected. Once
the server has all of a file, ``.uploaded`` beside it contains the file's size.

Run as a module, this is the process: ``python -m evsys_adapters.wandb_files.upload_process FILE…``. It ends when its
stdin is closed, however its parent ended, and W&B's service ends with it.
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
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from evsys_adapters.wandb_files.records import Records
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
"""Temporary errors with a status below 500."""
_SETTINGS: Final = {
    "WANDB_X_GRAPHQL_RETRY_WAIT_MAX_SECONDS": "5",
    "WANDB_X_FILE_STREAM_RETRY_WAIT_MAX_SECONDS": "5",
    "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "2",
}
"""Shorter than W&B's defaults of 15 s and a minute, to resume soon after an outage. The environment has precedence."""


class Problem(NamedTuple):
    """Why the server does not have the whole file."""

    why: str
    fix: str | None = None
    """What the user has to do; None if the problem may be temporary."""


class Upload:
    """The upload of one run file.

    Args:
        file: The run file, in its folder.
        run: Name of the run.
        events: Events in the file that the server has not confirmed.
        on_url: Receives the URL of the run's page once the server has assigned it; None if it is known.
    """

    def __init__(self, file: Path, run: str, events: int = 0, on_url: Callable[[str], None] | None = None) -> None:
        self.file: Final = file
        self.run: Final = run
        self.on_url = on_url
        self.url = ""
        self.events = events
        self.events_at_mark = events
        """Number of events at the last mark."""
        self.row_count = 0
        """Rows in the file."""
        self.ended = False
        """Whether the file contains the end of the run: the tool ends there, else it waits for more."""
        self.problem: Problem | None = None
        self.finished = False
        """Whether the server has the whole file, as of the last check; `done` checks the disk."""
        self.has_task = False
        """Whether a task is uploading it."""
        self.fatal = False
        """Whether the tool ended with a fatal error."""
        self.status = ""
        """The last line that the tool printed for this file."""
        self.confirmed_rows = -1
        """Rows that the server has confirmed in this attempt."""
        self.is_tracked = False
        """Whether the writer of the file updates `row_count` and `ended`; else `scan_file` determines them."""
        self.task_requested_at = 0.0
        """Time of the last request for a task to upload it, from ``time.monotonic``; 0 for none."""
        self.attempts = 0
        self.temporary_problem: Problem | None = None
        """The problem that the tool is retrying in this attempt."""
        self._refused_status: int | None = None
        self._rows_in_request = 0
        self._count_points: deque[tuple[int, int]] = deque()
        self._confirmed_events = 0

    def count_event(self) -> None:
        """Count one more event; call it before its rows are added."""
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
        """Return the number of events that the server has not confirmed.

        Args:
            at_mark: Count only those from before the last mark.
            at_end: No event follows: a file that is not completely uploaded counts as at least one.
        """
        if self.finished:
            return 0
        confirmed = self.events if 0 <= self.row_count <= self.confirmed_rows else self._confirmed_events
        counted = self.events_at_mark if at_mark else self.events
        remaining = max(0, counted - confirmed)
        return max(remaining, min(1, counted)) if at_end or self.ended or not self.has_task else remaining

    @property
    def done(self) -> bool:
        """Whether the server has all of the file."""
        try:
            at = self.file.stat()
        except OSError:
            return True  # there is nothing to upload
        with contextlib.suppress(OSError):
            sent = load_file(self._marker, int, quarantine=True)
            if sent is not None:
                return sent == at.st_size
        with contextlib.suppress(OSError):
            return self.file.with_suffix(".wandb.synced").stat().st_mtime_ns >= at.st_mtime_ns
        return False

    def mark_done(self) -> None:
        """Record that the server has all of the file as it is now."""
        with contextlib.suppress(OSError):
            replace_file(self._marker, str(self.file.stat().st_size).encode(), mode=0o666)

    def clear_markers(self) -> None:
        """Remove the markers: the file was replaced."""
        for marker in (self._marker, self.file.with_suffix(".wandb.synced")):
            marker.unlink(missing_ok=True)

    def scan_file(self, records: Records) -> None:
        """Determine from the file its number of rows, and whether the run has ended."""
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

    def start_attempt(self) -> None:
        """Reset the state for a new process."""
        self.file.with_suffix(".wandb.syncstate").unlink(missing_ok=True)
        self.fatal, self.confirmed_rows, self._rows_in_request, self._refused_status = False, -1, 0, None
        self.status, self.temporary_problem = "", None
        self.attempts += 1

    def handle_output(self, line: str) -> None:
        """Handle a line that the tool printed for this file."""
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
        """Handle an entry of the tool's log for this file."""
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
                why = f"the server answers with errors: HTTP {entry.get('status')}"
                self.problem = self.temporary_problem = Problem(why)
            case "api: retrying error":
                why = f"the server does not answer: {str(entry.get('error', ''))[-200:]}"
                self.problem = self.temporary_problem = Problem(why)
            case "api: HTTP error":
                self._refused_status = int(entry.get("status", 0))
            case _:
                pass

    @property
    def is_idle(self) -> bool:
        """Whether the server has all rows, and the tool waits for more."""
        return not self.fatal and self.confirmed_rows >= self.row_count and self.status.endswith(f"] {_IDLE_STATUS}")

    def diagnose(self, output: str) -> Problem:
        """Return why a process ended before everything was sent, from its output."""
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
    """A process of W&B's tool that uploads some files; its output and log are passed to their `Upload`.

    Args:
        uploads: The uploads of the files.
        output_path: File for its output; None for one in its temporary folder, if there are several runs.
        environment: Additional environment variables.
    """

    def __init__(self, uploads: Sequence[Upload], output_path: Path | None, environment: Mapping[str, str]) -> None:
        for each in uploads:
            each.start_attempt()
        self.output = ""
        """The end of its output."""
        beside = uploads[0].file.parent
        for leftover in beside.glob(f"{_LOG_FOLDER_PREFIX}*"):  # of a process that was killed
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
        """Whether it has not ended."""
        return self._process.poll() is None

    def poll(self) -> None:
        """Pass on new log entries and then new output, which refers to them."""
        if self._log is None:
            found = sorted(self._folder.glob("wandb/logs/debug-sync*.log"))
            self._log = found[0].open(encoding="utf-8", errors="replace") if found else None
        for line in [] if self._log is None else self._complete_lines(self._log):
            with contextlib.suppress(ValueError, TypeError):
                entry = json.loads(line)
                upload = self._uploads.get(Path(str(entry.get("sync_path"))).stem.removeprefix("run-"))
                if upload is not None:
                    upload.handle_log_entry(entry)
        for line in self._complete_lines(self._output_file):
            self.output = f"{self.output}{line}\n"[-100_000:]
            status = _STATUS.search(line)
            upload = self._single_upload if status is None else self._uploads.get(status[1])
            if upload is not None:
                upload.handle_output(line)

    def stop(self) -> None:
        """Kill it and W&B's service, and save its output beside the files that are not done."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # all of them have ended
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self.poll()
        for file in (self._output_file, self._log):
            if file is not None:
                file.close()
        for each in self._uploads.values():
            if self._output_is_shared and not each.done:
                with contextlib.suppress(OSError):
                    shutil.copyfile(self._path, each.file.parent / LOG)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _complete_lines(self, file: TextIO) -> list[str]:
        *complete, self._partial_lines[file] = (self._partial_lines.get(file, "") + file.read()).split("\n")
        return complete


def _main(files: list[str]) -> None:
    def end_with_parent() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # wandb need not be installed for type checking
    cli: Any = import_module("wandb.cli.cli").cli
    cli(["beta", "sync", "--live", "--no-skip-synced", "--no-skip-online", "--yes", "-n", str(len(files)), *files])


if __name__ == "__main__":
    _main(sys.argv[1:])
