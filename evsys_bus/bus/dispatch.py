"""The compiled code of a bus and the counters of its hooks: what runs for an event, and how often it did."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

from evsys_bus.bus.compiled_dispatch import FILENAME_PREFIX, CompiledDispatch, DispatchFunction
from evsys_bus.bus.hook_stats import HookHealth, HookStats
from evsys_bus.callback import callback_name, find_hook
from evsys_bus.events import Event

_serial_numbers: Final = itertools.count(1)


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
        self._all_compiled: weakref.WeakSet[CompiledDispatch] = weakref.WeakSet()

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
