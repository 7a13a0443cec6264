"""The log of the courier process, repeated in the program's own log while it runs.

It contains three things. State changes: an adapter is stuck, with the reason and the fix, or works again; failures that
are retried are logged only if they persist, because most are temporary. Every other WARNING of the couriers' log, at
most one a second of each kind. And the output that adapters print. The couriers' own log file stays complete.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from evsys_bus.diagnostics import LOGGER_NAME, RECORD_FIELDS, log, message_shape

if TYPE_CHECKING:  # at run time they are imported where something is followed
    from evsys_bus.delivery.process_log import LogLine
    from evsys_bus.tasks import DeliveryStatus

PERSISTENT_FAILURE_SECONDS: Final = 10.0
"""A failure that is retried is logged after this time."""
_STUCK_STATES: Final = ("parked", "failed")
TIMESTAMP_GRANULARITY_SECONDS: Final = 1.0
MAX_BYTES_PER_POLL: Final = 256 << 10
"""How much of the log is read at a time; the last poll reads all of it."""
MAX_LINES_PER_POLL: Final = 100
"""WARNINGs of our own logger per poll; any more are only counted."""
MAX_KINDS: Final = 1000
"""Kinds of WARNINGs of other loggers that are distinguished."""
_REPORTED_ELSEWHERE: Final = ("sink.parked", "sink.retrying", "couriers.left")
"""Events also logged as ``delivery.parked``, ``delivery.retrying`` or ``delivery.pending``."""


class DeliveryLog:
    """Logs what happens to the adapters that a courier process delivers to.

    Args:
        directory: The journal.
        names: The adapters' names.
        every_seconds: Initial interval of reading the couriers' states; up to four times that while they do not change.
        monotonic: The clock.
    """

    def __init__(
        self,
        directory: str,
        names: Sequence[str],
        *,
        every_seconds: float = 0.5,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        from evsys_bus.delivery.process_log import LOG_NAME, LogReader
        from evsys_bus.journal import OsDisk, layout

        self._disk: Final = OsDisk()
        self._directory: Final = directory
        self._folder: Final = f"{directory}/{layout.COURIERS}"
        self._log_path: Final = f"{self._folder}/{LOG_NAME}"
        self._log: Final = LogReader(self._log_path)
        self._repeats: Final = _RepeatLimiter(monotonic)
        self._failed_lines: dict[str, LogLine] = {}
        """The last ``courier.previously_failed`` line of an adapter, until its state reports the failure."""
        self._folder_mtime_ns: int = 0
        """Modification time of the folder at the last read, in nanoseconds since the epoch."""
        self._reread_at = math.inf
        """When to read the states even if the folder has not changed; monotonic."""
        self._states: Final[dict[str, DeliveryStatus | None]] = dict.fromkeys(names)
        self._reported: Final[dict[str, str | None]] = dict.fromkeys(names)
        """The state logged last for each adapter; None if it works."""
        self._every_seconds: Final = every_seconds
        self._poll_interval = every_seconds
        self._next_poll_at = 0.0
        self._monotonic: Final = monotonic
        self._lock: Final = threading.Lock()  # the last poll runs on another thread than the watchdog's

    def poll(self, *, final: bool = False) -> None:
        """Log what has changed; do nothing if the last poll was a moment ago, unless this is the ``final`` one."""
        with self._lock:
            now = self._monotonic()
            if now < self._next_poll_at and not final:
                return
            self._poll_interval = min(self._poll_interval * 1.5, 4 * self._every_seconds)
            previously_failed = dict(self._failed_lines)
            try:
                self._forward_log(final=final)
            except Exception as error:  # isolated: no file content may end the polling thread
                log().warning("couriers.log_unreadable", log=self._log_path, exc_info=error)
            self._read_states(-math.inf if final else self._reread_at, now)
            self._next_poll_at = now + self._poll_interval
            for name, state in self._states.items():
                if state is not None:
                    self._log_state(name, state)
            for name, line in (self._failed_lines if final else previously_failed).copy().items():
                if self._failed_lines.get(name) is line:  # its state was logged before: this is a different failure
                    del self._failed_lines[name]
                    _log_own_line(line)
            if final:
                self._repeats.flush()
                self._log.close()

    def _read_states(self, reread_at: float, now: float) -> None:
        """Read the states if they may have changed.

        Most polls are one system call: each releases the GIL, which slows a loop that computes.
        """
        from evsys_bus.delivery.status_files import read_status

        try:
            changed = os.stat(self._folder).st_mtime_ns  # noqa: PTH116 # creating a Path would cost as much as the call
        except OSError:
            return
        if changed == self._folder_mtime_ns and now < reread_at:
            return
        self._states.update({name: read_status(self._disk, self._directory, name) for name in self._states})
        # File system timestamps are coarse: another replacement right after this one may have the same time.
        may_change = changed != self._folder_mtime_ns or None in self._states.values()
        self._reread_at = now + TIMESTAMP_GRANULARITY_SECONDS if may_change else math.inf
        if changed != self._folder_mtime_ns:
            self._folder_mtime_ns = changed
            self._poll_interval = self._every_seconds

    def _log_state(self, name: str, state: "DeliveryStatus") -> None:
        is_failing = state.state in _STUCK_STATES or (
            state.failing_since is not None and time.time() - state.failing_since >= PERSISTENT_FAILURE_SECONDS
        )
        previous, current = self._reported[name], state.state if is_failing else None
        if current == previous:
            return
        if current is not None:
            fix = state.fix or "it is retried; evsys-bus status shows its progress"
            facts: dict[str, object] = {"why": state.error, "safe": "its events wait on disk", "fix": fix}
            failed = self._failed_lines.pop(name, None) if current == "failed" else None
            if failed is not None and failed.traceback is not None:
                facts["traceback"] = f"\n{failed.traceback.rstrip()}"
            log().warning(f"delivery.{current}", adapter=name, **facts)
        elif state.state in {"delivering", "idle"}:
            log().info("delivery.goes_on", adapter=name)
        else:
            return
        self._reported[name] = current

    def _forward_log(self, *, final: bool) -> None:
        """Log the new lines of the couriers' log."""
        own_lines = 0
        for line in self._log.read(None if final else MAX_BYTES_PER_POLL):
            self._poll_interval = self._every_seconds
            if line.print is not None:
                _print_line(line)
            elif logging.getLevelNamesMapping().get(line.level, 0) < logging.WARNING:
                continue
            elif line.logger != LOGGER_NAME:
                self._repeats.forward(line)
            elif line.event == "courier.failed" and line.adapter is not None:
                self._failed_lines[line.adapter] = line
            elif line.event not in _REPORTED_ELSEWHERE:
                own_lines += 1
                if own_lines <= MAX_LINES_PER_POLL:
                    _log_own_line(line)
        if own_lines > MAX_LINES_PER_POLL:
            log().warning("couriers.log_shortened", count=own_lines - MAX_LINES_PER_POLL, log=self._log_path)


def _log_own_line(line: "LogLine") -> None:
    """Log a line of our own logger with the same level and facts."""
    facts = {_fact_name(key): value for key, value in line.facts.items()}
    if line.adapter is not None:
        facts = {"adapter": line.adapter, **facts}
    if line.traceback is not None:
        facts["traceback"] = f"\n{line.traceback.rstrip()}"
    log_line = {"ERROR": log().error, "CRITICAL": log().critical}.get(line.level, log().warning)
    log_line(line.event or line.message, **facts)


def _fact_name(key: str) -> str:
    """Undo the suffix that keeps facts apart from the attributes of log records."""
    return key[:-1] if key.endswith("_") and key[:-1] in RECORD_FIELDS else key


def _print_line(line: "LogLine") -> None:
    """Print what an adapter printed to this program's stream."""
    stream = sys.stderr if line.stream == "stderr" else sys.stdout
    text = line.print or ""
    try:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except Exception:  # noqa: S110  # closed, or None, or replaced by the host: there is no reader
        pass


class _RepeatLimiter:
    """Limits WARNINGs of other loggers: the first of a kind at once, then at most one a second, with the count."""

    def __init__(self, monotonic: Callable[[], float], every_seconds: float = 1.0) -> None:
        self._monotonic: Final = monotonic
        self._interval: Final = every_seconds
        self._logged_at: Final[dict[object, float]] = {}
        self._suppressed: Final[dict[object, tuple[int, LogLine]]] = {}

    def forward(self, line: "LogLine") -> None:
        kind: object = (line.adapter, line.logger, line.level, message_shape(line.message))
        now = self._monotonic()
        if kind not in self._logged_at and len(self._logged_at) >= MAX_KINDS:
            kind = None
        count = 1 + self._suppressed.get(kind, (0, line))[0]
        if now - self._logged_at.get(kind, -math.inf) < self._interval:
            self._suppressed[kind] = (count, line)
            return
        self._suppressed.pop(kind, None)
        self._logged_at[kind] = now
        _log_foreign_line(line, count)

    def flush(self) -> None:
        for count, line in self._suppressed.values():
            _log_foreign_line(line, count)
        self._suppressed.clear()


def _log_foreign_line(line: "LogLine", count: int) -> None:
    """Log a line under the name of its original logger."""
    level: Any = logging.getLevelNamesMapping().get(line.level, logging.WARNING)
    text = line.message if count == 1 else f"{line.message} ({count} times)"
    if line.traceback is not None:
        text = f"{text}\n{line.traceback.rstrip()}"
    try:
        logging.getLogger(line.logger).log(level, "%s", text, extra={"adapter": line.adapter})
    except Exception:  # noqa: S110  # a handler or a filter of the host's
        pass
