"""The upload of one W&B run file: W&B's own ``wandb beta sync --live``, in a process of its own, and what it says.

The file is the delivery; the upload only reads it. So whatever keeps the upload (no login, no network, a server that
refuses) loses nothing: it is tried again (`Uploader`), and ``wandb sync`` finishes it on any other day.

What the server has, W&B's marker ``.synced`` alone does not say: its tool makes one too after a fatal error in the
middle. So the tool's log is read while it works: how many rows the server has confirmed, and what it refused. Once the
server has all of a file, ``.uploaded`` beside it holds the file's size.

As a module this is the process: ``python -m evsys_adapters._wandb_upload FILE…``. It ends when its stdin does, however
its parent ended, and W&B's service ends with it.
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
_LOGS: Final = ".upload-"
"""What the names of folders begin with that hold the tool's own logs while it works."""
_IDLE: Final = "waiting for more data"
"""The whole status of a live upload that has sent all."""
_FATAL: Final = "Fatal error while uploading data"
_URL: Final = re.compile(r"https?://\S+/runs/\S+")
_STATUS: Final = re.compile(r"\[[^\]]*?([^/\]]+)\] (.*)")
_MOST_CHECKPOINTS: Final = 256
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
_PASSING: Final = frozenset({408, 409, 425, 429})
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
        heard: Called with the URL of the run's page, once the server has named it; None where that is known.
    """

    def __init__(self, file: Path, run: str, events: int = 0, heard: Callable[[str], None] | None = None) -> None:
        self.file: Final = file
        self.run: Final = run
        self.heard = heard
        self.url = ""
        self.events = events
        self.marked = events
        """As many of the events as were counted at the last mark."""
        self.lines = 0
        """Rows in the file."""
        self.ended = False
        """Whether the file says that the run has ended: the tool ends then, else it waits for more."""
        self.problem: Problem | None = None
        self.finished = False
        """Whether the server has all, as far as is known here; `done` looks at the disk."""
        self.driven = False
        """Whether a task has it uploaded now."""
        self.fatal = False
        """Whether the tool gave up in the middle."""
        self.status = ""
        """What the tool printed last of this file."""
        self.sent = -1
        """Rows that the server has confirmed in this attempt."""
        self.known = False
        """Whether `lines` and `ended` are kept by whoever writes the file; else `examine` finds them out."""
        self.starting = 0.0
        """When a task was asked for that drives it, on the clock of ``time.monotonic``; 0 for none."""
        self.attempts = 0
        self.passing: Problem | None = None
        """What the tool waits for in this attempt."""
        self._refused: int | None = None
        self._sending = 0
        self._checkpoints: deque[tuple[int, int]] = deque()
        self._confirmed = 0

    # -- events -------------------------------------------------------------------------------------------------------

    def count(self) -> None:
        """One more event; to be called before its rows are added."""
        point = (self.lines, self.events)
        if len(self._checkpoints) >= _MOST_CHECKPOINTS or (
            self._checkpoints and self._checkpoints[-1][0] == self.lines
        ):
            self._checkpoints[-1] = point
        else:
            self._checkpoints.append(point)
        self.events += 1
        self.finished = False
        self._confirm_rows()

    def owed(self, *, at_mark: bool, at_end: bool) -> int:
        """Events that the server has not confirmed.

        Args:
            at_mark: Of those alone that were counted at the last mark.
            at_end: Nothing follows: a file that the server does not have whole counts.
        """
        if self.finished:
            return 0
        confirmed = self.events if 0 <= self.lines <= self.sent else self._confirmed
        counted = self.marked if at_mark else self.events
        left = max(0, counted - confirmed)
        return max(left, min(1, counted)) if at_end or self.ended or not self.driven else left

    # -- the disk -----------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the server has all that is in the file."""
        try:
            at = self.file.stat()
        except OSError:
            return True  # nothing is there that could be uploaded
        with contextlib.suppress(OSError):
            sent = load_file(self._note, int, set_aside=True)
            if sent is not None:
                return sent == at.st_size
        with contextlib.suppress(OSError):
            return self.file.with_suffix(".wandb.synced").stat().st_mtime_ns >= at.st_mtime_ns
        return False

    def confirm(self) -> None:
        """Write down that the server has all that is in the file now."""
        with contextlib.suppress(OSError):
            replace_file(self._note, str(self.file.stat().st_size).encode(), mode=0o666)

    def forget(self) -> None:
        """The file is another one than what the server has."""
        for marker in (self._note, self.file.with_suffix(".wandb.synced")):
            marker.unlink(missing_ok=True)

    def examine(self, records: Records) -> None:
        """Read in the file what is not known of it: its rows, and whether the run has ended."""
        lines, ended = 0, False
        try:
            with self.file.open("rb") as file:
                for payload, _ in records.scan(file):
                    found = records.outline(payload)
                    lines, ended = lines + (found.row >= 0), ended or found.ends
        except OSError:
            pass
        self.lines, self.ended = lines, ended

    @property
    def _note(self) -> Path:
        return self.file.with_suffix(".wandb.uploaded")

    # -- what the tool says -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A process begins with the file."""
        self.file.with_suffix(".wandb.syncstate").unlink(missing_ok=True)
        self.fatal, self.sent, self._sending, self._refused = False, -1, 0, None
        self.status, self.passing = "", None
        self.attempts += 1

    def printed(self, line: str) -> None:
        """A line that the tool printed of this file."""
        if _FATAL in line:
            self.fatal = True
        found = _URL.search(line)
        if found is not None:
            self.sent, self.url, self.problem, self.passing = max(self.sent, 0), found[0], None, None
            self._confirm_rows()
            if self.heard is not None:
                heard, self.heard = self.heard, None
                heard(found[0])
        self.status = line

    def logged(self, entry: Mapping[str, Any]) -> None:
        """An entry of the tool's log of this file."""
        match entry.get("msg"):
            case "filestream: sending request":
                if "history_lines" in entry:
                    self._sending = int(entry.get("history_offset", 0)) + int(entry["history_lines"])
            case "filestream: request sent":
                self.sent, self.problem, self.passing = max(self.sent, self._sending), None, None
                self._refused = None
                self._confirm_rows()
            case "api: retrying HTTP error":
                self.waits(Problem(f"the server answers with errors: HTTP {entry.get('status')}"))
            case "api: retrying error":
                self.waits(Problem(f"the server does not answer: {str(entry.get('error', ''))[-200:]}"))
            case "api: HTTP error":
                self._refused = int(entry.get("status", 0))
            case _:
                pass

    def waits(self, problem: Problem) -> None:
        """The tool waits for this to pass."""
        self.problem = self.passing = problem

    @property
    def idle(self) -> bool:
        """Whether the server has all rows, and the tool nothing more to do until there are more."""
        return not self.fatal and self.sent >= self.lines and self.status.endswith(f"] {_IDLE}")

    def failed(self, printed: str) -> Problem:
        """What kept a process that ended without having all sent."""
        if "No API key" in printed or "Not authenticated" in printed:
            return Problem("no login", LOGIN_FIX)
        if self._refused in _REFUSALS:
            return Problem(*_REFUSALS[self._refused])
        lines = [each.removeprefix("wandb: ").strip() for each in printed.splitlines()]
        errors = [each for each in lines if "ERROR" in each and each.removeprefix("ERROR").strip()]
        if self.passing is not None and self._refused is None and "Error initializing run" not in printed:
            return self.passing
        why = (errors or [each for each in lines if each] or ["W&B's upload ended without a word"])[-1][:300]
        return Problem(why.removeprefix("ERROR").strip(), self._fix(why, printed))

    def _fix(self, why: str, printed: str) -> str | None:
        if "AuthenticationError" in why:
            return LOGIN_FIX
        if "No such option" in printed or "No such command" in printed:
            return "this wandb is too old: run: pip install --upgrade wandb"
        refused = self._refused is not None and self._refused < 500 and self._refused not in _PASSING  # noqa: PLR2004
        if refused or "Error initializing run" in why:
            return f"check the login (wandb login), entity and project of wandb_logger, and {LOG} beside the file"
        return None

    def _confirm_rows(self) -> None:
        while self._checkpoints and self._checkpoints[0][0] <= self.sent:
            self._confirmed = self._checkpoints.popleft()[1]


class Tool:
    """One process of W&B's tool at work on some files, and what it prints and logs of each.

    Args:
        uploads: Of the files.
        printed: Where what it prints goes; None for the file in its own folder, for it is of several runs.
        environment: What it is told besides.
    """

    def __init__(self, uploads: Sequence[Upload], printed: Path | None, environment: Mapping[str, str]) -> None:
        for each in uploads:
            each.begin()
        self.text = ""
        """What it has printed."""
        beside = uploads[0].file.parent
        for left in beside.glob(f"{_LOGS}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=_LOGS, dir=beside))
        self._uploads = {each.file.stem.removeprefix("run-"): each for each in uploads}
        self._only = uploads[0] if len(uploads) == 1 else None
        self._shared = printed is None
        self._path = printed or self._folder / LOG
        fixed = {"WANDB_ERROR_REPORTING": "false", "WANDB_DIR": str(self._folder)}
        with self._path.open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603 # our own command
                [sys.executable, "-m", __name__, *(str(each.file) for each in uploads)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env={**_SETTINGS, **os.environ, **fixed, **environment},
                start_new_session=True,
            )
        self._printed = self._path.open(encoding="utf-8", errors="replace")
        self._log: TextIO | None = None
        self._rests: dict[TextIO, str] = {}

    @property
    def works(self) -> bool:
        """Whether it has not ended by itself."""
        return self._process.poll() is None

    def look(self) -> None:
        """Hand on what is new: first what the server refused, then what the tool makes of it."""
        for line in self._logged():
            with contextlib.suppress(ValueError, TypeError):
                entry = json.loads(line)
                upload = self._uploads.get(Path(str(entry.get("sync_path"))).stem.removeprefix("run-"))
                if upload is not None:
                    upload.logged(entry)
        for line in self._lines(self._printed):
            self.text = f"{self.text}{line}\n"[-100_000:]
            found = _STATUS.search(line)
            upload = self._only if found is None else self._uploads.get(found[1])
            if upload is not None:
                upload.printed(line)

    def end(self) -> None:
        """End it, and W&B's service, and leave what it printed beside the files that are not done."""
        _end(self._process)
        self.look()
        for file in (self._printed, self._log):
            if file is not None:
                file.close()
        for each in self._uploads.values():
            if self._shared and not each.done:
                with contextlib.suppress(OSError):
                    shutil.copyfile(self._path, each.file.parent / LOG)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _logged(self) -> Iterator[str]:
        if self._log is None:
            found = sorted(self._folder.glob("wandb/logs/debug-sync*.log"))
            if not found:
                return
            self._log = found[0].open(encoding="utf-8", errors="replace")
        yield from self._lines(self._log)

    def _lines(self, file: TextIO) -> list[str]:
        *whole, self._rests[file] = (self._rests.get(file, "") + file.read()).split("\n")
        return whole


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The process and W&B's service, which is in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of them have ended
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _upload(files: list[str]) -> None:
    def end_with_parent() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Any: W&B need not be there when this is checked.
    cli: Any = import_module("wandb.cli.cli").cli
    cli(["beta", "sync", "--live", "--no-skip-synced", "--no-skip-online", "--yes", "-n", str(len(files)), *files])


if __name__ == "__main__":
    _upload(sys.argv[1:])
