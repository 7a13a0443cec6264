"""The upload of a W&B run file while it is written: W&B's own ``wandb beta sync --live``, in a process of its own.

The file is the delivery; the upload only ever reads it. So whatever keeps the upload (no login, no network, a server
that refuses) loses nothing: it is tried again, and ``wandb sync`` finishes it on any other day. As a module this is the
process: ``python -m evsys_adapters._wandb_upload FILE``. It ends when its stdin does, however its parent ended, and
W&B's service ends with it.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from evsys_bus.diagnostics import FaultLog

LOG: Final = "upload.log"
"""Beside the file: what the uploads said."""
_PAUSES: Final = (1.0, 5.0, 15.0, 60.0)
_POLL_SECONDS: Final = 0.1
_ASKING: Final = "setting up run"
"""What the tool says until the server has answered for the first time."""
_URL: Final = re.compile(r"https?://\S+/runs/\S+")


class Upload:
    """Uploads one file until its run has ended.

    Args:
        file: The run file, in its folder.
        environment: What the process is told besides.
        heard: Called with the run's URL, once the server has told it.
        faults: Where troubles are said.
        patience_seconds: How long the server may take to answer for the first time before that is one.
        pauses: Seconds before it is tried again; the last one from then on.
    """

    def __init__(
        self,
        file: Path,
        environment: Mapping[str, str],
        heard: Callable[[str], None],
        faults: FaultLog,
        patience_seconds: float,
        pauses: tuple[float, ...] = _PAUSES,
    ) -> None:
        self._file = file
        self._environment = {**os.environ, **environment, "WANDB_DIR": str(file.parent)}  # for its own logs
        self._heard = heard
        self._faults = faults
        self._patience_seconds = patience_seconds
        self._pauses = pauses
        self.ended = False
        """Whether it is over, done or not."""

    @property
    def done(self) -> bool:
        """Whether the server has all, by W&B's own marker."""
        return self._file.with_suffix(".wandb.synced").exists()

    async def run(self) -> None:
        """Upload; try again without end. When cancelled, the process ends and the rest is left for ``wandb sync``."""
        attempt = 0
        try:
            while not self.done:
                renewed = await self._attempt()
                if self.done:
                    return
                if not renewed:
                    self.warn(*_trouble(self._said()))
                    await asyncio.sleep(self._pauses[min(attempt, len(self._pauses) - 1)])
                    attempt += 1
        except asyncio.CancelledError:
            if not self.done:
                self.warn("the program ended before all was uploaded")
            raise
        finally:
            self.ended = True

    def warn(self, why: str, first: str = "") -> None:
        """Say what keeps the upload, and what finishes it."""
        again = f"{first}; it is tried again; then: " if first else ""
        fix = f'{again}wandb sync "{self._file.parent}"'
        self._faults.warn("wandb.not_uploaded", why, why=why, fix=fix, file=str(self._file))

    async def _attempt(self) -> bool:
        """One process; True if it was ended because another file took the place of the one that it reads."""
        self._file.with_suffix(".wandb.syncstate").unlink(missing_ok=True)
        known = _identity(self._file)
        with (self._file.parent / LOG).open("wb") as said:
            process = subprocess.Popen(  # noqa: S603, ASYNC220 # our own command; starting takes a millisecond
                [sys.executable, "-m", __name__, str(self._file)],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                env=self._environment,
                start_new_session=True,
            )
        told, patience = False, self._patience_seconds
        try:
            while process.poll() is None:
                await asyncio.sleep(_POLL_SECONDS)
                if _identity(self._file) != known:
                    return True
                told = told or self._tell_url()
                if not told and patience > 0 and _ASKING in self._said():
                    patience -= _POLL_SECONDS
                    if patience <= 0:
                        self.warn("the server does not answer, or answers with errors", "check network and base_url")
            self._tell_url()
            return False
        finally:
            _end(process)

    def _tell_url(self) -> bool:
        found = _URL.search(self._said())
        if found is not None:
            self._heard(found[0])
        return found is not None

    def _said(self) -> str:
        try:
            return (self._file.parent / LOG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""


def _trouble(said: str) -> tuple[str, str]:
    """What kept the upload, and what to do about it first."""
    if "No API key" in said or "Not authenticated" in said:
        return "no login", "run: wandb login (or set WANDB_API_KEY)"
    lines = [line for line in said.splitlines() if "ERROR" in line] or said.strip().splitlines()[-1:]
    why = lines[-1].removeprefix("wandb: ").strip()[:300] if lines else "W&B's upload ended without a word"
    return why, f"check the login (wandb login), entity and project, and {LOG} beside the file"


def _identity(file: Path) -> int:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The process and W&B's service, which is in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # all of them have ended
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def _upload(file: str) -> None:
    def end_with_parent() -> None:
        os.read(0, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Any: W&B need not be there when this is checked.
    cli: Any = import_module("wandb.cli.cli").cli
    cli(["beta", "sync", "--live", "--no-skip-synced", "--no-skip-online", "--yes", "-n", "1", file])


if __name__ == "__main__":
    _upload(sys.argv[1])
