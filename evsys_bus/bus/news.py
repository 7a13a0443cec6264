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
    from evsys_bus.delivery.process_log import Line
    from evsys_bus.tasks import DeliveryStatus

LASTING_SECONDS: Final = 10.0
"""A failure that is retried is logged after this time."""
_STUCK: Final = ("parked", "failed")
COARSE_SECONDS: Final = 1.0
BYTES_A_LOOK: Final = 256 << 10
"""How much of the log is read at a time; the last poll reads all of it."""
LINES_A_LOOK: Final = 100
"""WARNINGs of our own logger per poll; any more are only counted."""
MOST_KINDS: Final = 1000
"""Kinds of WARNINGs of other loggers that are distinguished."""
_TOLD_ELSEWHERE: Final = ("sink.parked", "sink.retrying", "couriers.left")
"""Events also logged as ``delivery.parked``, ``delivery.retrying`` or ``delivery.pending``."""


class News:
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
        self._repeats: Final = _Repeats(monotonic)
        self._failed: dict[str, Line] = {}
        """The last ``courier.failed`` line of an adapter, until its state reports the failure."""
        self._changed: int = 0
        """Modification time of the folder at the last read, in nanoseconds since the epoch."""
        self._again_at = math.inf
        """When to read the states even if the folder has not changed; monotonic."""
        self._states: Final[dict[str, DeliveryStatus | None]] = dict.fromkeys(names)
        self._told: Final[dict[str, str | None]] = dict.fromkeys(names)
        """The state logged last for each adapter; None if it works."""
        self._every_seconds: Final = every_seconds
        self._pause = every_seconds
        self._due = 0.0
        self._monotonic: Final = monotonic
        self._lock: Final = threading.Lock()  # the last poll runs on another thread than the watchdog's

    def look(self, *, last: bool = False) -> None:
        """Log what has changed; do nothing if the last poll was a moment ago, unless this is the ``last`` one."""
        with self._lock:
            now = self._monotonic()
            if now < self._due and not last:
                return
            self._pause = min(self._pause * 1.5, 4 * self._every_seconds)
            failed = dict(self._failed)
            try:
                self._follow_log(last=last)
            except Exception as error:  # isolated: no file content may end the polling thread
                log().warning("couriers.log_unreadable", log=self._log_path, exc_info=error)
            self._read(-math.inf if last else self._again_at, now)
            self._due = now + self._pause
            for name, state in self._states.items():
                if state is not None:
                    self._tell(name, state)
            for name, line in (self._failed if last else failed).copy().items():
                if self._failed.get(name) is line:  # its state was logged before: this is a different failure
                    del self._failed[name]
                    _say_own(line)
            if last:
                self._repeats.flush()
                self._log.close()

    def _read(self, again_at: float, now: float) -> None:
        """Read the states if they may have changed.

        Most polls are one system call: each releases the GIL, which slows a loop that computes.
        """
        from evsys_bus.delivery.states import read_state

        try:
            changed = os.stat(self._folder).st_mtime_ns  # noqa: PTH116 # creating a Path would cost as much as the call
        except OSError:
            return
        if changed == self._changed and now < again_at:
            return
        self._states.update({name: read_state(self._disk, self._directory, name) for name in self._states})
        # File system timestamps are coarse: another replacement right after this one may have the same time.
        unsure = changed != self._changed or None in self._states.values()
        self._again_at = now + COARSE_SECONDS if unsure else math.inf
        if changed != self._changed:
            self._changed = changed
            self._pause = self._every_seconds

    def _tell(self, name: str, state: "DeliveryStatus") -> None:
        fails = state.state in _STUCK or (
            state.failing_since is not None and time.time() - state.failing_since >= LASTING_SECONDS
        )
        said, news = self._told[name], state.state if fails else None
        if news == said:
            return
        if news is not None:
            fix = state.fix or "it is retried; evsys-bus status shows its progress"
            facts: dict[str, object] = {"why": state.error, "safe": "its events wait on disk", "fix": fix}
            failed = self._failed.pop(name, None) if news == "failed" else None
            if failed is not None and failed.traceback is not None:
                facts["traceback"] = f"\n{failed.traceback.rstrip()}"
            log().warning(f"delivery.{news}", adapter=name, **facts)
        elif state.state in {"delivering", "idle"}:
            log().info("delivery.goes_on", adapter=name)
        else:
            return
        self._told[name] = news

    def _follow_log(self, *, last: bool) -> None:
        """Log the new lines of the couriers' log."""
        own = 0
        for line in self._log.read(None if last else BYTES_A_LOOK):
            self._pause = self._every_seconds
            if line.print is not None:
                _print(line)
            elif logging.getLevelNamesMapping().get(line.level, 0) < logging.WARNING:
                continue
            elif line.logger != LOGGER_NAME:
                self._repeats.say(line)
            elif line.event == "courier.failed" and line.adapter is not None:
                self._failed[line.adapter] = line
            elif line.event not in _TOLD_ELSEWHERE:
                own += 1
                if own <= LINES_A_LOOK:
                    _say_own(line)
        if own > LINES_A_LOOK:
            log().warning("couriers.log_shortened", count=own - LINES_A_LOOK, log=self._log_path)


def _say_own(line: "Line") -> None:
    """Log a line of our own logger with the same level and facts."""
    facts = {_fact(key): value for key, value in line.facts.items()}
    if line.adapter is not None:
        facts = {"adapter": line.adapter, **facts}
    if line.traceback is not None:
        facts["traceback"] = f"\n{line.traceback.rstrip()}"
    say = {"ERROR": log().error, "CRITICAL": log().critical}.get(line.level, log().warning)
    say(line.event or line.message, **facts)


def _fact(key: str) -> str:
    """Undo the suffix that keeps facts apart from the attributes of log records."""
    return key[:-1] if key.endswith("_") and key[:-1] in RECORD_FIELDS else key


def _print(line: "Line") -> None:
    """Print what an adapter printed to this program's stream."""
    stream = sys.stderr if line.stream == "stderr" else sys.stdout
    text = line.print or ""
    try:
        encoding = stream.encoding or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except Exception:  # noqa: S110  # closed, or None, or replaced by the host: there is no reader
        pass


class _Repeats:
    """Limits WARNINGs of other loggers: the first of a kind at once, then at most one a second, with the count."""

    def __init__(self, monotonic: Callable[[], float], every_seconds: float = 1.0) -> None:
        self._monotonic: Final = monotonic
        self._every: Final = every_seconds
        self._said: Final[dict[object, float]] = {}
        self._unsaid: Final[dict[object, tuple[int, Line]]] = {}

    def say(self, line: "Line") -> None:
        kind: object = (line.adapter, line.logger, line.level, message_shape(line.message))
        now = self._monotonic()
        if kind not in self._said and len(self._said) >= MOST_KINDS:
            kind = None
        count = 1 + self._unsaid.get(kind, (0, line))[0]
        if now - self._said.get(kind, -math.inf) < self._every:
            self._unsaid[kind] = (count, line)
            return
        self._unsaid.pop(kind, None)
        self._said[kind] = now
        _say_others(line, count)

    def flush(self) -> None:
        for count, line in self._unsaid.values():
            _say_others(line, count)
        self._unsaid.clear()


def _say_others(line: "Line", count: int) -> None:
    """Log a line under the name of its original logger."""
    level: Any = logging.getLevelNamesMapping().get(line.level, logging.WARNING)
    text = line.message if count == 1 else f"{line.message} ({count} times)"
    if line.traceback is not None:
        text = f"{text}\n{line.traceback.rstrip()}"
    try:
        logging.getLogger(line.logger).log(level, "%s", text, extra={"adapter": line.adapter})
    except Exception:  # noqa: S110  # a handler or a filter of the host's
        pass
