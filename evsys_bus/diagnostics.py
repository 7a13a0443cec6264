"""How the project speaks of trouble: structlog over the standard logging, under the name ``evsys_bus``.

The host program's logging configuration rules; nothing here configures output. structlog is imported when the first
line is logged, not before: it would add a third to the time of ``import evsys_bus``.
"""

import contextlib
import functools
import gc
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, MutableMapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

LOGGER_NAME: Final = "evsys_bus"

_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def _to_stdlib(_: Any, __: str, facts: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """Structlog's last processor: a readable message, and every fact as an attribute of the log record.

    Any: the signature is structlog's (logger, method name, event dict).
    """
    phrase = facts.pop("event")
    passed = {key: facts.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in facts}
    shown = " ".join(f"{key}={value}" for key, value in facts.items())
    # "%" would be taken for a format directive by handlers that merge args; there are none to merge.
    message = f"{phrase} {shown}".rstrip()
    extra = {f"{key}_" if key in _RECORD_FIELDS else key: value for key, value in facts.items()}
    return (message,), {"extra": extra, **passed}


@functools.cache
def log() -> "BoundLogger":
    """The project's logger: a constant phrase, and facts as keys: ``log().warning("hook.failed", hook=…)``."""
    import structlog

    class Guarded(structlog.stdlib.BoundLogger):
        def _proxy_to_logger(self, method_name: str, event: str | None = None, *args: Any, **facts: Any) -> Any:
            """Any: as structlog has it."""
            try:
                return super()._proxy_to_logger(method_name, event, *args, **facts)
            except Exception:  # a handler or a filter of the host: its fault must not reach the loop
                if logging.raiseExceptions and sys.stderr is not None:  # as the standard library's own handlers do
                    traceback.print_exc()
                return None

    return structlog.wrap_logger(
        logging.getLogger(LOGGER_NAME),
        processors=[structlog.stdlib.filter_by_level, _to_stdlib],
        wrapper_class=Guarded,
        context_class=dict,
        cache_logger_on_first_use=True,
    )


class FaultLog:
    """WARNINGs that repeat: the first of a kind is logged at once, then at most one a second, with the exact count.

    Safe from any thread. What is still unsaid goes out with `flush`.
    """

    def __init__(self, *, every_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[Hashable, _Kind] = {}

    def warn(self, phrase: str, key: Hashable, *, error: BaseException | None = None, **facts: object) -> None:
        """Count one fault of the kind (phrase, key), and log it unless one was logged less than a second ago."""
        now = self._clock()
        with self._lock:
            kind = self._kinds.setdefault((phrase, key), _Kind())
            kind.count += 1
            if kind.count > 1 and now - kind.logged_at < self._every:
                kind.unsaid = (phrase, facts)
                return
            kind.logged_at = now
            kind.unsaid = None
            count = kind.count
        log().warning(phrase, **facts, count=count, exc_info=error)

    def flush(self) -> None:
        """Log the last count of every kind that repeated since it was last logged."""
        with self._lock:
            unsaid = [(kind.unsaid, kind.count) for kind in self._kinds.values() if kind.unsaid is not None]
            for kind in self._kinds.values():
                kind.unsaid = None
        for (phrase, facts), count in unsaid:
            log().warning(phrase, **facts, count=count)


class _Kind:
    """One kind of fault, as seen so far."""

    __slots__ = ("count", "logged_at", "unsaid")

    def __init__(self) -> None:
        self.count = 0
        self.logged_at = 0.0
        self.unsaid: tuple[str, dict[str, object]] | None = None


class _CollectorPaused:
    """While another thread's frames are walked: no automatic garbage collection, on Python 3.11.

    There, asking for a frame's ``f_back`` may start a collection while the frame object is being made; a finalizer that
    lets other threads run then leaves it dangling, and the process may crash. 3.12 collects at safe points only.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_on = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._was_on = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._was_on:
                gc.enable()


collector_paused: Final = _CollectorPaused() if sys.version_info < (3, 12) else contextlib.nullcontext()
"""``with collector_paused:`` around every walk of another thread's stack."""
