"""The compiled code of a bus and the counters of its hooks: what runs for an event, and how often it did."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final

from evsys_bus.bus.account import HookAccount, HookHealth
from evsys_bus.bus.compile import FILENAME, Dispatch, Unit
from evsys_bus.callback import callback_name, hook_of
from evsys_bus.events import Event

_numbers: Final = itertools.count(1)


class DispatchTable(dict[type[Event], Dispatch]):
    """Maps event types to compiled dispatch functions; ``first_of`` compiles a missing one, or raises."""

    def __init__(self, first_of: Callable[[type[Event]], Dispatch]) -> None:
        super().__init__()
        self._first_of = first_of

    def __missing__(self, event_type: type[Event]) -> Dispatch:
        return self._first_of(event_type)


class Units:
    """All compiled code in use. Changed with the token held; read from any thread."""

    def __init__(self, first_of: Callable[[type[Event]], Dispatch]) -> None:
        self.prefix = f"{FILENAME} {next(_numbers)}."
        """Prefix of the filenames of this bus's compiled code; unique per bus."""
        self.dispatch_of = DispatchTable(first_of)
        self.by_file: dict[str, Unit] = {}
        self._accounts: dict[tuple[int, str], HookAccount] = {}
        self._gone: dict[tuple[str, str], HookHealth] = {}  # of removed callbacks, by name
        self._published: dict[str, int] = {}  # by retired code
        self._folding = threading.RLock()  # reentrant, for a signal handler that calls health()
        self._all: weakref.WeakSet[Unit] = weakref.WeakSet()

    def compile(self, event_type: type[Event], callbacks: Iterable[object], *, hot: bool, **parts: Any) -> Unit:
        """Compile the hooks of these callbacks for one event type; ``parts`` are passed to `Unit`."""
        accounts = [account for callback in callbacks if (account := self._account(callback, event_type)) is not None]
        unit = Unit(event_type, accounts, hot=hot, prefix=self.prefix, **parts)
        self._all.add(unit)
        self.by_file[unit.filename] = unit
        self.dispatch_of[event_type] = unit.dispatch
        return unit

    def after_fork(self) -> None:
        """Replace the lock in a forked child: one held by another thread would stay locked forever."""
        self._folding = threading.RLock()

    def let_go(self, callbacks: Iterable[object]) -> None:
        """Discard callbacks that are not among these, except for their counts."""
        staying = {id(callback) for callback in callbacks}
        with self._folding:
            for key, account in list(self._accounts.items()):
                if key[0] not in staying:
                    del self._accounts[key]
                    name = (account.owner, account.hook)
                    self._gone[name] = account.health(0).plus(self._gone.get(name))

    def forget(self) -> None:
        """Retire all compiled code; the counts stay."""
        with self._folding:
            self.dispatch_of.clear()
            for unit in tuple(self.by_file.values()):
                if self.by_file.pop(unit.filename, None) is not None:
                    unit.forget()
                    self._published[unit.tag] = self._published.get(unit.tag, 0) + unit.count()

    def find(self, filename: str) -> Unit | None:
        """Return the unit with this filename, including retired ones that are still running."""
        return next((each for each in tuple(self._all) if each.filename == filename), None)

    def record_by(self, record: Callable[[Event, float], None]) -> None:
        """Replace the record function of every unit, including retired ones that are still running."""
        for unit in tuple(self._all):
            unit.record_by(record)

    def fold(self) -> None:
        """Move sampled times into the counters; the watchdog does so a few times a second."""
        with self._folding:
            for unit in tuple(self.by_file.values()):
                unit.fold()

    def called(self, callback: object) -> bool:
        """Return whether a hook of this callback was called so far."""
        counting = {id(account): unit for unit in tuple(self.by_file.values()) for account in unit.accounts}
        return any(
            account.calls or (id(account) in counting and counting[id(account)].count())
            for (owner, _), account in tuple(self._accounts.items())
            if owner == id(callback)
        )

    def close_failed(self, callback: object) -> None:
        """Count a `close` that raised or did not return."""
        name = callback_name(callback), "close"
        failed = HookHealth(*name, calls=1, failures=1, blocked=0, mean_seconds=0.0, max_seconds=0.0)
        with self._folding:
            self._gone[name] = failed.plus(self._gone.get(name))

    def published(self) -> dict[str, int]:
        """Return the exact number of dispatched events by type."""
        counts = dict(self._published)
        for unit in tuple(self.by_file.values()):
            counts[unit.tag] = counts.get(unit.tag, 0) + unit.count()
        return {tag: count for tag, count in counts.items() if count}

    def hooks(self) -> tuple[HookHealth, ...]:
        """Return the health of every overridden hook that could be called so far."""
        self.fold()
        counting = {id(account): unit for unit in tuple(self.by_file.values()) for account in unit.accounts}
        present = tuple(
            account.health(counting[id(account)].count() if id(account) in counting else 0)
            for account in tuple(self._accounts.values())
        )
        return (*self._gone.values(), *present)

    def _account(self, callback: object, event_type: type[Event]) -> HookAccount | None:
        method = hook_of(callback, event_type)
        if method is None:
            return None
        key = (id(callback), event_type.hook)  # the account references the callback, so its id stays unique
        if key not in self._accounts:
            self._accounts[key] = HookAccount(callback, callback_name(callback), event_type.hook, method)
        return self._accounts[key]
