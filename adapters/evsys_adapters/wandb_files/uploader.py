"""`Uploader`: uploads the run files of one callback, live and at the end, and reports what the server lacks."""

import asyncio
import configparser
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import chain, repeat
from pathlib import Path
from typing import Final

from evsys_adapters.wandb_files.upload_process import LOG, LOGIN_FIX, Problem, Upload, UploadProcess
from evsys_bus.diagnostics import FaultLog

_PAUSES: Final = (1.0, 5.0, 15.0, 60.0)
_SETTLE_PAUSES: Final = (0.5, 1.0, 2.0, 5.0)
_LOGIN_SECONDS: Final = 2.0
"""Interval of checks for a login."""
_END_SECONDS: Final = 0.3
"""Time reserved for ending a process and reporting."""
_POLL_SECONDS: Final = 0.1
_CONNECTING_STATUS: Final = "setting up run"
"""What the tool prints until the first response of the server."""
_MAX_FILES_PER_PROCESS: Final = 16
"""Maximum number of files for one process of `Uploader.upload_all`."""
_DEFAULT_HOST: Final = "https://api.wandb.ai"


class Uploader:
    """Uploads the run files of one callback, and tracks how many of their events the server has not confirmed.

    Args:
        base_url: URL of the server; None for that of the login.
        report: Receives the number of these events, and the problem with its fix, if any.
        faults: Where problems are logged.
        patience_seconds: How long the first response of the server may take before that is a problem.
        pauses: Seconds between attempts; the last one repeats.
    """

    def __init__(
        self,
        base_url: str | None,
        report: Callable[[int, str | None, str | None], None],
        faults: FaultLog,
        patience_seconds: float,
        pauses: tuple[float, ...] = _PAUSES,
    ) -> None:
        self.uploads: dict[str, Upload] = {}
        """By path of the file."""
        self.takes_marks = False
        """Whether marks are taken: events since the last one are not delivered yet."""
        self._base_url = base_url
        self._report = report
        self._last_report: tuple[int, str | None, str | None] | None = None
        self._faults = faults
        self._patience_seconds = patience_seconds
        self._pauses = pauses
        self._is_settling = False
        self.is_finished = False
        """Whether `upload_all` has ended: tasks that upload end, until one is requested again."""

    def snapshot(self) -> dict[str, tuple[str, int, str]]:
        """Return run, pending events and URL of every file that is not completely uploaded, for a mark."""
        self.takes_marks = True
        for each in self.uploads.values():
            each.events_at_mark = each.events
        return {
            path: (each.run, each.pending_events(at_mark=False, at_end=True), each.url)
            for path, each in self.uploads.items()
            if not each.finished and each.events
        }

    def report_pending(self) -> None:
        """Report the pending events if they have changed."""
        pending, worst = 0, None
        for each in list(self.uploads.values()):
            remaining = each.pending_events(
                at_mark=self.takes_marks and not self._is_settling, at_end=self._is_settling
            )
            pending += remaining
            if remaining and each.problem is not None and (worst is None or (each.problem.fix and not worst.fix)):
                worst = each.problem
        report = (pending, None, None) if worst is None else (pending, worst.why, worst.fix)
        if report != self._last_report:
            self._last_report = report
            self._report(*report)

    async def upload_live(self, upload: Upload) -> None:
        """Upload one file while it is written, until its run has ended; retries without limit."""
        upload.task_requested_at = 0.0
        if self._is_settling or upload.has_task:
            return
        upload.has_task, pauses = True, chain(self._pauses, repeat(self._pauses[-1]))
        try:
            while not (upload.done and upload.ended):
                if self.is_finished or (self._is_settling and (upload.done or upload.problem is not None)):
                    return  # `upload_all` continues with it, or has done so
                if upload.done:
                    await self._sleep(_POLL_SECONDS)
                elif self._lacks_login(upload):
                    await self._sleep(_LOGIN_SECONDS)
                elif await self._attempt([upload]) or upload.done:
                    pauses = chain(self._pauses, repeat(self._pauses[-1]))
                else:
                    if upload.problem is not None:
                        self.warn(upload, upload.problem.why, upload.problem.fix or "check network and base_url")
                    self.report_pending()
                    await self._sleep(next(pauses))
            upload.finished = True
        except asyncio.CancelledError:
            if not upload.done:
                self.warn(upload, "the program ended before all was uploaded")
            raise
        finally:
            upload.has_task = False
            self.report_pending()

    def _lacks_login(self, upload: Upload) -> bool:
        problem = self.login_problem()
        if problem is not None:
            if upload.problem != problem:
                upload.problem = problem
                self.warn(upload, *problem)
            self.report_pending()
        return problem is not None

    async def upload_all(self, deadline: float, scan_file: Callable[[Upload], None]) -> None:
        """Upload what the server does not have; see `Adapter.settle_owed`.

        Args:
            deadline: On the clock of ``time.monotonic``.
            scan_file: Determines the number of rows of a file, and whether its run has ended.
        """
        self._is_settling, self.is_finished = True, False
        attempt = 0
        try:
            async with asyncio.timeout(deadline - _END_SECONDS - time.monotonic()):
                while unfinished := self._unfinished():
                    waiting = [each for each in unfinished if not each.has_task]
                    if not waiting:
                        await asyncio.sleep(_POLL_SECONDS)
                        self.report_pending()
                    elif not await self._upload_some(waiting, scan_file):
                        if all(each.problem is not None and each.problem.fix for each in unfinished):
                            return
                        await asyncio.sleep(_SETTLE_PAUSES[min(attempt, len(_SETTLE_PAUSES) - 1)])
                        attempt += 1
        except TimeoutError:
            pass  # the rest is reported
        finally:
            for each in self._unfinished():
                problem = each.problem or Problem("the program ended before all was uploaded")
                self.warn(each, *problem)
            self.report_pending()
            self._is_settling, self.is_finished = False, True
        while any(each.has_task for each in self.uploads.values()) and time.monotonic() < deadline:  # noqa: ASYNC110 # on a loop that may be closed next
            await asyncio.sleep(_POLL_SECONDS / 5)

    async def _upload_some(self, waiting: list[Upload], scan_file: Callable[[Upload], None]) -> bool:
        """Upload some of these files with one process; returns whether one of them was completed."""
        problem = self.login_problem()
        if problem is not None:
            for each in waiting:
                each.problem = problem
            return False
        for each in waiting:
            if not each.is_tracked:
                scan_file(each)
        waiting.sort(key=lambda each: (each.attempts, not each.ended))  # files whose upload ends by itself first
        group = [each for each in waiting if each.ended == waiting[0].ended][:_MAX_FILES_PER_PROCESS]
        return await self._attempt(group, several=True) or any(each.done for each in group)

    def warn(self, upload: Upload, why: str, action: str | None = None) -> None:
        """Log why a file is not uploaded, and the fix."""
        retry_hint = f"{action}; it is tried again; then: " if action else ""
        fix = f'{retry_hint}wandb sync "{upload.file.parent}"'
        self._faults.warn("wandb.not_uploaded", why, why=why, fix=fix, file=str(upload.file))

    def login_problem(self) -> Problem | None:
        """Return a problem with the login that is known without a request; None also if only W&B can check it.

        W&B's own ``authenticate_session`` would load its settings permanently, in a process that may itself use wandb.
        """
        settings = _settings()
        host = self._base_url or os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or _DEFAULT_HOST
        key = os.environ.get("WANDB_API_KEY")
        if "api_key" in settings or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
            return None
        try:
            auth = import_module("wandb.sdk.lib.wbauth")
            invalid: type[Exception] = import_module("wandb.errors").AuthenticationError
        except (ImportError, AttributeError):  # another version of W&B; its process will check
            return None
        try:
            if key:
                auth.AuthApiKey(host=auth.HostUrl(host), api_key=key)
            elif not auth.read_netrc_auth(host=host):
                return Problem("no login", LOGIN_FIX)
        except invalid as error:
            where = "WANDB_API_KEY" if key else "the key in the netrc file"
            return Problem(f"{where} is invalid: {error}", LOGIN_FIX)
        except (AttributeError, TypeError, ValueError):  # as above
            pass
        return None

    def _unfinished(self) -> list[Upload]:
        for each in self.uploads.values():
            each.finished = each.done and not each.has_task
        return [each for each in self.uploads.values() if not each.finished and each.events]

    async def _sleep(self, seconds: float) -> None:
        """Sleep; ends early when `upload_all` is called."""
        end = time.monotonic() + seconds
        while not self._is_settling and time.monotonic() < end:  # noqa: ASYNC110 # set from another loop, so it is polled
            await asyncio.sleep(min(_POLL_SECONDS, seconds))

    async def _attempt(self, uploads: Sequence[Upload], *, several: bool = False) -> bool:
        """Run one process; returns True if it was stopped because one of the files was replaced."""
        known = {each: _identity(each.file) for each in uploads}
        output_path = None if several else uploads[0].file.parent / LOG
        environment = {"WANDB_BASE_URL": self._base_url} if self._base_url else {}
        try:
            process = UploadProcess(uploads, output_path, environment)
        except OSError as error:
            for each in uploads:
                each.problem = Problem(f"W&B's tool cannot be started: {error}")
            return False
        patience, renewed = self._patience_seconds, False
        try:
            while process.is_running and not renewed:
                await asyncio.sleep(_POLL_SECONDS)
                process.poll()
                renewed = any(_identity(each.file) != at for each, at in known.items())
                if self._is_complete(uploads) or (self.is_finished and not several):
                    break
                slow_uploads = [
                    each for each in uploads if _CONNECTING_STATUS in each.status or each.temporary_problem is not None
                ]
                if not slow_uploads:
                    patience = self._patience_seconds
                elif patience > 0:
                    patience -= _POLL_SECONDS
                    if patience <= 0:
                        slow, why = slow_uploads[0], "the server does not answer, or answers with errors"
                        if slow.temporary_problem is None:
                            slow.problem = slow.temporary_problem = Problem(why)
                        else:
                            why = f"{why} ({slow.temporary_problem.why})"
                        self.warn(slow, why, "check network and base_url")
                self.report_pending()
        finally:
            by_itself = not process.is_running
            process.stop()
            for each in uploads:
                self._finish_attempt(each, process.output if by_itself or each.fatal else None, renewed=renewed)
        return renewed

    def _is_complete(self, uploads: Iterable[Upload]) -> bool:
        """Whether the process cannot do any more."""
        is_complete = True
        for each in uploads:
            if self._is_settling and not each.ended and each.is_idle and not each.done:
                each.mark_done()
            is_complete = is_complete and (each.fatal or (self._is_settling and not each.ended and each.done))
        return is_complete

    def _finish_attempt(self, upload: Upload, output: str | None, *, renewed: bool) -> None:
        """Evaluate an attempt; ``output`` is None if the process was stopped."""
        if upload.fatal:
            upload.clear_markers()  # the tool's marker is wrong
        elif upload.file.with_suffix(".wandb.synced").exists() and not renewed and upload.ended:
            upload.mark_done()
        if upload.done:
            upload.problem = None
        elif not renewed and output is not None:
            upload.problem = upload.diagnose(output)


def _settings() -> dict[str, str]:
    """Return the settings of W&B's files; those of the current folder override those of the user."""
    home = os.environ.get("WANDB_CONFIG_DIR") or Path("~/.config/wandb").expanduser()
    found: dict[str, str] = {}
    for file in (Path(home) / "settings", Path(os.environ.get("WANDB_DIR", ".")) / "wandb" / "settings"):
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(file)
            found |= dict(parser["default"]) if "default" in parser else {}
    return found


def _identity(file: Path) -> int:
    try:
        return file.stat().st_ino
    except FileNotFoundError:
        return 0
