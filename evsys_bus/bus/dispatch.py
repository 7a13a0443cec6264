"""The compiled `publish` of a bus, the code of each event type, and the counters of its hooks.

There is one compiled unit per event type. It calls the hooks of that type one after another, each in a ``try`` that
costs nothing unless it catches. Callbacks that do not override the hook are not part of it. For the hot event type the
calls are inlined in `publish` itself, so that one publish is one Python frame around the hooks:

    take the token · count · call, call, call · record · run what hooks published meanwhile · return the token

The token serializes publishes (a lock costs five times as much). Counts are exact: `ticks` is an iterator that lasts
until the next call to be timed, and its remaining length gives the count. Times are sampled: the first call of a unit
and then every 64th is made by `timed`, which reads the clock between the hooks; every call while a hook is slow. The
names that the code uses are its globals, because a closure would copy each of them into every call's frame. The
watchdog and the adoption of tasks need no marker: the line number of the frame identifies the hook.
"""

import itertools
import linecache
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import length_hint
from typing import Any, Final

from evsys_bus.bus.health import HookHealth
from evsys_bus.bus.lifecycle import RUN_BOUNDARIES
from evsys_bus.callback import callback_name, can_return_value, check_return_value, find_hook
from evsys_bus.events import Event, event_tag, step_field, with_int_step
from evsys_bus.tasks import HOOK_FILENAME_PREFIX
from evsys_bus.weak_items import WeakItems

SLOW_NANOSECONDS: Final = 1_000_000
"""After a hook took this long, every call is timed, until `FAST_CALLS` calls in a row were faster."""
FAST_CALLS: Final = 256
"""One slow call may be the machine's fault, and timing every call slows a publish to many hooks down."""


class HookStats:
    """Live counters of one hook, held while its callback is attached."""

    __slots__ = (
        "blocked",
        "callback",
        "calls",
        "failures",
        "hook",
        "max_ns",
        "method",
        "owner",
        "sampled",
        "sampled_ns",
    )

    def __init__(self, callback: object, owner: str, hook: str, method: Callable[..., object]) -> None:
        self.callback = callback
        self.owner = owner
        self.hook = hook
        self.method = method
        self.calls = 0  # of retired compiled code only; the code in use has its own counter
        self.failures = 0
        self.blocked = 0
        self.sampled = 0
        self.sampled_ns = 0
        self.max_ns = 0

    def add_sample(self, nanoseconds: int) -> None:
        """Add one sampled call."""
        self.sampled += 1
        self.sampled_ns += nanoseconds
        self.max_ns = max(self.max_ns, nanoseconds)

    def health(self, current_calls: int) -> HookHealth:
        """Return the current values.

        Args:
            current_calls: Calls counted by the compiled code in use, which are not yet part of `calls`.
        """
        return HookHealth(
            callback=self.owner,
            hook=self.hook,
            calls=self.calls + current_calls,
            failures=self.failures,
            blocked=self.blocked,
            mean_seconds=self.sampled_ns / max(self.sampled, 1) / 1e9,
            max_seconds=self.max_ns / 1e9,
        )


SAMPLE_EVERY: Final = 64

FILENAME_PREFIX: Final = HOOK_FILENAME_PREFIX
"""Prefix of the filename of compiled code."""

_TEMPLATE: Final = """\
def publish(event):
    global now
    try:
        tokens.pop()
    except IndexError:
        return contended(event)
    try:
        if type(event) is hot:
            {prepare}
            {enter}
            for _ in ticks:
                {calls}
                break
            else:
                before(event)
                timed(event)
            {leave}
        else:
            dispatch_of[type(event)](event)
        if queue:
            settle()
    except BaseException as error:
        settle(error)
    finally:
        tokens.append(None)

def dispatch(event, at=None):
    global now
    {prepare_in_dispatch}
    {enter_in_dispatch}
    {before}
    for _ in ticks:
        {calls_in_dispatch}
        break
    else:
        timed(event)
    {leave}

def timed(event):
    global ticks
    ticks = renewed()
    t0 = clock()
    {timed_calls}
    sample(({times},))
"""

DispatchFunction = Callable[..., None]
"""Takes an event and optionally the time at which it was published; default: now."""

_HOOK_CALL: Final = re.compile(r"\s+try: (?:check\d+\()?h(\d+)\(")
_serial_numbers: Final = itertools.count(1)
"""Of buses and of compiled code."""


class CompiledDispatch:
    """The compiled code of one event type, and the counters of the hooks that it calls."""

    publish: Callable[[Event], None]
    """Used for the hot event type only."""
    dispatch: DispatchFunction
    """Calls the hooks. The caller holds the token, and passes the publish time if that was earlier."""

    def __init__(
        self,
        event_type: type[Event],
        hook_stats: Sequence[HookStats],
        *,
        hot: bool,
        prefix: str,
        record: Callable[[Event, float], None] | None = None,
        record_first: bool = False,
        failed: Callable[[HookStats, BaseException], None],
        **template_globals: Any,
    ) -> None:
        """Compile. ``template_globals`` are further globals of the template, given by the publisher."""
        self.tag = event_tag(event_type)
        self.record_first = record_first
        self.hook_stats = tuple(hook_stats)
        self.filename = f"{prefix}{next(_serial_numbers)}>: {event_type.__name__}"
        self._sample_interval = SAMPLE_EVERY
        self._fast_calls = 0  # timed calls since the last slow one
        # The event count when the ticks run out, and the ticks; one tuple, so that other threads read them together.
        self._ticks_state: tuple[int, itertools.repeat[None]] = (0, itertools.repeat(None, 0))
        # Folded into the counters a few times a second, off the publishing thread. At a million publishes a second
        # some are overwritten before that, which is fine for samples.
        self._samples: deque[tuple[int, ...]] = deque(maxlen=1024)
        checks_return = [can_return_value(stats.method) for stats in self.hook_stats]
        source = _generate_source(event_type, checks_return, recorded=record is not None, record_first=record_first)
        self.hooks_by_line = {
            number: self.hook_stats[int(call[1])]
            for number, line in enumerate(source.splitlines(), start=1)
            if (call := _HOOK_CALL.match(line))
        }
        self.lines_after_calls = _find_lines_after_calls(source)
        """Those that run when hooks are called, or after that."""
        self._namespace: dict[str, Any] = {
            "__name__": __name__,
            "__loader__": _SourceLoader(source),
            "hot": event_type if hot else None,
            "ticks": self._ticks_state[1],
            "renewed": self._restart_ticks,
            "failed": self._failure_handler(failed),
            "sample": self._samples.append,
            "clock": time.perf_counter_ns,
            "wall": time.time,
            "record": record,
            "with_whole_step": with_int_step,
            **{f"h{index}": stats.method for index, stats in enumerate(self.hook_stats)},
            **{
                f"check{index}": partial(check_return_value, stats.callback, stats.hook)
                for index, stats in enumerate(self.hook_stats)
            },
            **template_globals,
        }
        exec(compile(source, self.filename, "exec"), self._namespace)  # noqa: S102 # our own template, without outside input
        self.publish, self.dispatch = self._namespace["publish"], self._namespace["dispatch"]

    def event_time(self) -> float:
        """Return when the last dispatched event was published, in seconds since the epoch."""
        return self._namespace.get("now", 0.0)

    def count(self) -> int:
        """Return the exact number of dispatched events."""
        at_end, ticks = self._ticks_state
        return at_end - length_hint(ticks)

    def _failure_handler(
        self, on_failure: Callable[[HookStats, BaseException], None]
    ) -> Callable[[int, BaseException], None]:
        hook_stats = self.hook_stats
        return lambda index, error: on_failure(hook_stats[index], error)

    def _restart_ticks(self) -> "itertools.repeat[None]":
        """Start a new sampling interval, because a call is being timed; return its ticks."""
        ticks = itertools.repeat(None, self._sample_interval - 1)
        self._ticks_state = (self._ticks_state[0] + self._sample_interval, ticks)
        return ticks

    def flush_samples(self) -> None:
        """Move the samples into the counters."""
        while True:
            try:
                times = self._samples.popleft()
            except IndexError:
                return
            self._fast_calls += 1
            for stats, start_ns, end_ns in zip(self.hook_stats, times, times[1:], strict=False):
                stats.add_sample(end_ns - start_ns)
                if end_ns - start_ns >= SLOW_NANOSECONDS:
                    self._fast_calls = 0
                    self._sample_interval = 1
            if self._fast_calls >= FAST_CALLS:
                self._sample_interval = SAMPLE_EVERY

    def set_recorder(self, record: Callable[[Event, float], None]) -> None:
        """Replace the function that records events, if events are recorded at all."""
        if self._namespace["record"] is not None:
            self._namespace["record"] = record

    def retire(self) -> None:
        """Retire this code: move its counts into the counters; a `publish` that a caller stored uses the new code."""
        self._namespace["hot"] = None
        self.flush_samples()
        for stats in self.hook_stats:
            stats.calls += self.count()
        linecache.cache.pop(self.filename, None)  # a traceback may have added it


def _find_lines_after_calls(source: str) -> frozenset[int]:
    found: list[int] = []
    calls = False
    for number, line in enumerate(source.splitlines(), start=1):
        calls = not line.startswith("def ") and (calls or _HOOK_CALL.match(line) is not None)
        if calls and line.strip() not in {"before(event)", "timed(event)", "settle(error)"}:
            found.append(number)
    return frozenset(found)


class _SourceLoader:
    """Shows the compiled code in tracebacks for as long as the code itself lives."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, _: str) -> str:
        """Return the source; `linecache` calls this on a module's loader."""
        return self._source


def _generate_source(
    event_type: type[Event], checks_return: Sequence[bool], *, recorded: bool, record_first: bool
) -> str:
    """Return the source code; ``checks_return``: for each hook, whether its return value must be checked."""
    fields = event_type.__struct_fields__
    local_names = {name: f"a{index}" for index, name in enumerate(fields)}
    unpack_lines = (
        ["; ".join(f"{local} = event.{name}" for name, local in local_names.items())]
        if checks_return and fields
        else []
    )
    positional = [a for name, a in local_names.items() if name not in event_type.keywords]
    keyword_arguments = [f"{name}={a}" for name, a in local_names.items() if name in event_type.keywords]
    arguments = ", ".join(positional + keyword_arguments)
    calls: list[str] = []
    timed_calls = list(unpack_lines)
    for index, checks in enumerate(checks_return):
        call = f"check{index}(h{index}({arguments}))" if checks else f"h{index}({arguments})"
        lines = [f"try: {call}", f"except BaseException as error: failed({index}, error)"]
        calls += lines
        timed_calls += [
            *(*lines, f"try: t{index + 1} = clock()"),
            f"except BaseException as error: t{index + 1} = t{index}; failed({index}, error)",  # Ctrl-C: go on
        ]
    prepare = list(unpack_lines)
    step = step_field(event_type)
    if step is not None:  # the one user value that must be exact, because files are keyed by it
        step_expression = local_names[step] if unpack_lines else f"event.{step}"
        # A recorded step must fit in 63 bits too; the shift catches every value that needs a check, also negative ones.
        range_check = f" or {step_expression} >> 62" if recorded else ""
        prepare += [
            f"if type({step_expression}) is not int{range_check}:",
            "    event = with_whole_step(event)" + (f"; {local_names[step]} = event.{step}" if unpack_lines else ""),
        ]
    enter_code = "now = {}wall(); record(event, now)" if record_first else "now = {}wall()"
    enter_code = enter_code if recorded else "pass"
    leave_code = "pass" if record_first else "record(event, now)"
    return _TEMPLATE.format(
        prepare=_indent(prepare, 12),
        prepare_in_dispatch=_indent(prepare, 4),
        enter=enter_code.format(""),
        before="before(event)" if calls or event_type in RUN_BOUNDARIES else "pass",
        enter_in_dispatch=enter_code.format("at or "),
        leave=leave_code if recorded else "pass",
        calls=_indent(calls, 16),
        calls_in_dispatch=_indent(calls, 8),
        timed_calls=_indent(timed_calls, 4),
        times=", ".join(f"t{index}" for index in range(len(checks_return) + 1)),
    )


def _indent(lines: Sequence[str], spaces: int) -> str:
    return ("\n" + " " * spaces).join(lines) if lines else "pass"


class DispatchTable(dict[type[Event], DispatchFunction]):
    """Maps event types to compiled dispatch functions; ``compile_missing`` compiles a missing one, or raises."""

    def __init__(self, compile_missing: Callable[[type[Event]], DispatchFunction]) -> None:
        super().__init__()
        self._compile_missing = compile_missing

    def __missing__(self, event_type: type[Event]) -> DispatchFunction:
        return self._compile_missing(event_type)


class DispatchRegistry:
    """All compiled code in use. Changed with the token held; read from any thread."""

    def __init__(self, compile_missing: Callable[[type[Event]], DispatchFunction]) -> None:
        self.prefix = f"{FILENAME_PREFIX} {next(_serial_numbers)}."
        """Prefix of the filenames of this bus's compiled code; unique per bus."""
        self.dispatch_of = DispatchTable(compile_missing)
        self.by_filename: dict[str, CompiledDispatch] = {}
        self._hook_stats: dict[tuple[int, str], HookStats] = {}
        self._removed_hooks: dict[tuple[str, str], HookHealth] = {}  # of removed callbacks, by name
        self._retired_counts: dict[str, int] = {}  # by retired code
        self._lock = threading.RLock()  # reentrant, for a signal handler that calls health()
        self._all_compiled: WeakItems[CompiledDispatch] = WeakItems()

    def compile(
        self, event_type: type[Event], callbacks: Iterable[object], *, hot: bool, **template_globals: Any
    ) -> CompiledDispatch:
        """Compile the hooks of these callbacks for one event type; ``template_globals`` go to `CompiledDispatch`."""
        hook_stats = [
            stats for callback in callbacks if (stats := self._get_hook_stats(callback, event_type)) is not None
        ]
        compiled = CompiledDispatch(event_type, hook_stats, hot=hot, prefix=self.prefix, **template_globals)
        self._all_compiled.add(compiled)
        self.by_filename[compiled.filename] = compiled
        self.dispatch_of[event_type] = compiled.dispatch
        return compiled

    def after_fork(self) -> None:
        """Replace the lock in a forked child: one held by another thread would stay locked forever."""
        self._lock = threading.RLock()

    def discard_others(self, callbacks: Iterable[object]) -> None:
        """Discard callbacks that are not among these, except for their counts."""
        remaining = {id(callback) for callback in callbacks}
        with self._lock:
            for key, stats in list(self._hook_stats.items()):
                if key[0] not in remaining:
                    del self._hook_stats[key]
                    name = (stats.owner, stats.hook)
                    self._removed_hooks[name] = stats.health(0).merge(self._removed_hooks.get(name))

    def retire_all(self) -> None:
        """Retire all compiled code; the counts stay."""
        with self._lock:
            self.dispatch_of.clear()
            for compiled in tuple(self.by_filename.values()):
                if self.by_filename.pop(compiled.filename, None) is not None:
                    compiled.retire()
                    self._retired_counts[compiled.tag] = self._retired_counts.get(compiled.tag, 0) + compiled.count()

    def find(self, filename: str) -> CompiledDispatch | None:
        """Return the unit with this filename, including retired ones that are still running."""
        return next((each for each in tuple(self._all_compiled) if each.filename == filename), None)

    def set_recorder(self, record: Callable[[Event, float], None]) -> None:
        """Replace the record function of every unit, including retired ones that are still running."""
        for compiled in tuple(self._all_compiled):
            compiled.set_recorder(record)

    def flush_samples(self) -> None:
        """Move sampled times into the counters; the watchdog does so a few times a second."""
        with self._lock:
            for compiled in tuple(self.by_filename.values()):
                compiled.flush_samples()

    def has_called(self, callback: object) -> bool:
        """Return whether a hook of this callback was called so far."""
        compiled_by_stats = {
            id(stats): compiled for compiled in tuple(self.by_filename.values()) for stats in compiled.hook_stats
        }
        return any(
            stats.calls or (id(stats) in compiled_by_stats and compiled_by_stats[id(stats)].count())
            for (owner, _), stats in tuple(self._hook_stats.items())
            if owner == id(callback)
        )

    def count_failed_close(self, callback: object) -> None:
        """Count a `close` that raised or did not return."""
        name = callback_name(callback), "close"
        failed = HookHealth(*name, calls=1, failures=1, blocked=0, mean_seconds=0.0, max_seconds=0.0)
        with self._lock:
            self._removed_hooks[name] = failed.merge(self._removed_hooks.get(name))

    def published_counts(self) -> dict[str, int]:
        """Return the exact number of dispatched events by type."""
        counts = dict(self._retired_counts)
        for compiled in tuple(self.by_filename.values()):
            counts[compiled.tag] = counts.get(compiled.tag, 0) + compiled.count()
        return {tag: count for tag, count in counts.items() if count}

    def hook_health(self) -> tuple[HookHealth, ...]:
        """Return the health of every overridden hook that could be called so far."""
        self.flush_samples()
        compiled_by_stats = {
            id(stats): compiled for compiled in tuple(self.by_filename.values()) for stats in compiled.hook_stats
        }
        present = tuple(
            stats.health(compiled_by_stats[id(stats)].count() if id(stats) in compiled_by_stats else 0)
            for stats in tuple(self._hook_stats.values())
        )
        return (*self._removed_hooks.values(), *present)

    def _get_hook_stats(self, callback: object, event_type: type[Event]) -> HookStats | None:
        method = find_hook(callback, event_type)
        if method is None:
            return None
        key = (id(callback), event_type.hook)  # the account references the callback, so its id stays unique
        if key not in self._hook_stats:
            self._hook_stats[key] = HookStats(callback, callback_name(callback), event_type.hook, method)
        return self._hook_stats[key]
