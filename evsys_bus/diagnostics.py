"""Logging: structlog over the standard library's logging, with the logger ``evsys_bus``.

The host program's logging configuration applies; nothing here configures output. Only ``Logger.disabled`` is undone:
``dictConfig`` sets it on every existing logger by default, and warnings of lost events would vanish. structlog is
imported when the first line is logged, because it would add a third to the time of ``import evsys_bus``.
"""

import contextlib
import functools
import gc
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Hashable, MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from evsys_bus.printable import printable

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger

LOGGER_NAME: Final = "evsys_bus"

current_adapter: Final = ContextVar[str | None]("evsys_bus_adapter", default=None)
"""The adapter that a courier is delivering to; added to log lines as the fact ``adapter``."""

RECORD_FIELDS: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def _to_stdlib(_: Any, __: str, facts: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """Structlog's last processor: a readable message, with ``event`` and all facts as attributes of the log record."""
    from evsys_bus.codec.redact import redact_text  # above this module: only here, where a line is logged

    phrase = facts.pop("event")
    passthrough = {key: facts.pop(key) for key in ("exc_info", "stack_info", "stacklevel") if key in facts}
    adapter = current_adapter.get()
    if adapter is not None and "adapter" not in facts:
        facts["adapter"] = adapter
    for key, value in facts.items():
        text = value if type(value) is str else "" if isinstance(value, int | float) else str(value)
        redacted = redact_text(text)
        if redacted != text:
            facts[key] = redacted
    shown = " ".join(f"{key}={value}" for key, value in facts.items())
    # Return no args: handlers that merge args would interpret a "%" in the message.
    message = printable(f"{phrase} {shown}".rstrip())
    extra = {f"{key}_" if key in RECORD_FIELDS else key: value for key, value in facts.items()}
    return (message,), {"extra": {"event": phrase, **extra}, **passthrough}


def _redact_traceback(record: logging.LogRecord) -> bool:
    """Filter of the logger: replace a traceback that shows a credential, or controls a terminal, by a safe text."""
    if isinstance(record.exc_info, tuple):
        from evsys_bus.codec.redact import redact_text

        text = _formatter.formatException(record.exc_info)
        redacted = printable(redact_text(text))
        if redacted != text:
            record.exc_text, record.exc_info = redacted, None
    return True


_formatter: Final = logging.Formatter()


@functools.cache
def log() -> "BoundLogger":
    """Return the project's logger: a constant phrase, and facts as keys: ``log().warning("hook.failed", hook=…)``."""
    with _without_closed_stdout():
        import structlog

    logger = logging.getLogger(LOGGER_NAME)

    class SafeBoundLogger(structlog.stdlib.BoundLogger):
        def _proxy_to_logger(self, method_name: str, event: str | None = None, *args: Any, **facts: Any) -> Any:
            try:
                if logger.disabled:  # the default of dictConfig and fileConfig, and seldom what a program intends
                    logger.disabled = False
                    fix = (
                        f'disable_existing_loggers=False; to silence it, logging.getLogger("{LOGGER_NAME}").setLevel()'
                    )
                    super()._proxy_to_logger("warning", "logging.enabled", why="a logging config disabled it", fix=fix)
                return super()._proxy_to_logger(method_name, event, *args, **facts)
            except Exception:  # a handler or filter of the host failed, which must not affect the loop
                if logging.raiseExceptions and sys.stderr is not None:  # like the standard library's own handlers
                    traceback.print_exc()
                return None

    logger = logging.getLogger(LOGGER_NAME)
    logger.addFilter(_redact_traceback)
    return structlog.wrap_logger(
        logger,
        processors=[structlog.stdlib.filter_by_level, _to_stdlib],
        wrapper_class=SafeBoundLogger,
        context_class=dict,
        cache_logger_on_first_use=True,
    )


@contextlib.contextmanager
def _without_closed_stdout() -> Generator[None, None, None]:
    """Hide a closed stdout while structlog is imported: it calls ``isatty()``, which raises on a closed stream."""
    stdout = sys.stdout
    try:
        sys.stdout.isatty()
    except (AttributeError, OSError, ValueError):
        sys.stdout = None
    try:
        yield
    finally:
        sys.stdout = stdout


MAX_KINDS: Final = 1000
"""Kinds of fault that one `FaultLog` distinguishes; further ones are distinguished by phrase alone."""
MAX_SHAPES: Final = 20
"""Message shapes that are distinguished for one phrase and key."""


class FaultLog:
    """Logs repeated WARNINGs: the first of a kind at once, then at most one a second, with the exact count.

    A kind is a phrase, a key, and for an error its type and the shape of its message (`message_shape`). Thread-safe.
    `flush` logs what is still suppressed.
    """

    def __init__(self, *, every_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_seconds = every_seconds
        self._clock = clock
        self._lock = threading.RLock()  # reentrant, for signal handlers and finalizers
        self._kinds: dict[Hashable, _FaultKind] = {}
        self._shapes: dict[Hashable, set[Hashable]] = {}

    def warn(
        self, phrase: str, key: Hashable, *, error: BaseException | None = None, shape: str = "", **facts: object
    ) -> None:
        """Count one fault, and log it unless one of its kind was logged less than a second ago.

        Args:
            phrase: The log event.
            key: What the fault is about.
            error: Logged with its traceback.
            shape: Distinguishes kinds if there is no error.
            facts: Further facts to log.
        """
        now = self._clock()
        fault_shape = shape if error is None else (type(error), message_shape(error))
        with self._lock:
            kind = self._kind(phrase, key, fault_shape)
            kind.count += 1
            if kind.count > 1 and now - kind.logged_at < self._interval_seconds:
                kind.suppressed = (phrase, facts)
                return
            kind.logged_at = now
            kind.suppressed = None
            count = kind.count
        log().warning(phrase, **facts, count=count, exc_info=error)

    def flush(self) -> None:
        """Log the last count of every kind that repeated since it was last logged."""
        with self._lock:
            suppressed = [(kind.suppressed, kind.count) for kind in self._kinds.values() if kind.suppressed is not None]
            for kind in self._kinds.values():
                kind.suppressed = None
        for (phrase, facts), count in suppressed:
            log().warning(phrase, **facts, count=count)

    def _kind(self, phrase: str, key: Hashable, shape: Hashable) -> "_FaultKind":
        shapes = self._shapes.get((phrase, key))
        if shapes is None:
            if len(self._kinds) >= MAX_KINDS:
                return self._kinds.setdefault(phrase, _FaultKind())
            shapes = self._shapes[phrase, key] = set()
        if shape not in shapes:
            if len(shapes) >= MAX_SHAPES or len(self._kinds) >= MAX_KINDS:
                shape = None
            shapes.add(shape)
        return self._kinds.setdefault((phrase, key, shape), _FaultKind())


class _FaultKind:
    """Counters of one kind of fault."""

    __slots__ = ("count", "logged_at", "suppressed")

    def __init__(self) -> None:
        self.count = 0
        self.logged_at = 0.0
        self.suppressed: tuple[str, dict[str, object]] | None = None


def message_shape(message: object) -> str:
    """Return the start of a message without words that contain digits: numbers, addresses, ids."""
    try:
        return _WORDS.sub(lambda word: "#" if any(map(str.isdigit, word[0])) else word[0], str(message)[:200])
    except Exception:  # a foreign __str__ may raise
        return ""


_WORDS: Final = re.compile(r"[\w.+-]+")


class _PausedCollector:
    """Disables automatic garbage collection while another thread's frames are walked, on Python 3.11.

    There, reading a frame's ``f_back`` may start a collection while the frame object is being created; a finalizer that
    lets other threads run then leaves it dangling, and the process may crash. 3.12 collects at safe points only.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, as in FaultLog
        self._depth = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._was_enabled:
                gc.enable()


collector_paused: Final = _PausedCollector() if sys.version_info < (3, 12) else contextlib.nullcontext()
"""Use ``with collector_paused:`` around every walk of another thread's stack."""
