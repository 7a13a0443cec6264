"""The compiled units of a bus and the accounts of its hooks: which code runs for an event, and how often it did."""

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
    """Event type -> the compiled dispatch; ``first_of`` compiles a missing one, or raises."""

    def __init__(self, first_of: Callable[[type[Event]], Dispatch]) -> None:
        super().__init__()
        self._first_of = first_of

    def __missing__(self, event_type: type[Event]) -> Dispatch:
        return self._first_of(event_type)


class Units:
    """All units in use. Changed with the token held; read from any thread."""

    def __init__(self, first_of: Callable[[type[Event]], Dispatch]) -> None:
        self.prefix = f"{FILENAME} {next(_numbers)}."
        """What the filenames of this bus's code begin with, and of no other's."""
        self.dispatch_of = DispatchTable(first_of)
        self.by_file: dict[str, Unit] = {}
        self._accounts: dict[tuple[int, str], HookAccount] = {}
        self._gone: dict[tuple[str, str], HookHealth] = {}  # of callbacks that are gone, by name
        self._published: dict[str, int] = {}  # by units that are gone
        self._folding = threading.RLock()  # a signal handler may ask for health in the middle of it
        self._all: weakref.WeakSet[Unit] = weakref.WeakSet()

    def compile(self, event_type: type[Event], callbacks: Iterable[object], *, hot: bool, **parts: Any) -> Unit:
        """Compile the hooks of these callbacks for one event type. Any: what `Unit` takes."""
        accounts = [account for callback in callbacks if (account := self._account(callback, event_type)) is not None]
        unit = Unit(event_type, accounts, hot=hot, prefix=self.prefix, **parts)
        self._all.add(unit)
        self.by_file[unit.filename] = unit
        self.dispatch_of[event_type] = unit.dispatch
        return unit

    def after_fork(self) -> None:
        """In a forked child: a lock that another thread held would stay held for ever."""
        self._folding = threading.RLock()

    def let_go(self, callbacks: Iterable[object]) -> None:
        """Keep the counts, and nothing else, of callbacks that are not among these."""
        staying = {id(callback) for callback in callbacks}
        with self._folding:
            for key, account in list(self._accounts.items()):
                if key[0] not in staying:
                    del self._accounts[key]
                    name = (account.owner, account.hook)
                    self._gone[name] = account.health(0).plus(self._gone.get(name))

    def forget(self) -> None:
        """End all units; their counts stay."""
        with self._folding:
            self.dispatch_of.clear()
            for unit in tuple(self.by_file.values()):
                if self.by_file.pop(unit.filename, None) is not None:
                    unit.forget()
                    self._published[unit.tag] = self._published.get(unit.tag, 0) + unit.count()

    def find(self, filename: str) -> Unit | None:
        """The unit with this code, also one that is gone and still at work."""
        return next((each for each in tuple(self._all) if each.filename == filename), None)

    def record_by(self, record: Callable[[Event, float], None]) -> None:
        """Have every unit record by this function from now on, also those that are gone and still at work."""
        for unit in tuple(self._all):
            unit.record_by(record)

    def fold(self) -> None:
        """Bring sampled times into the accounts; the watchdog does so a few times a second."""
        with self._folding:
            for unit in tuple(self.by_file.values()):
                unit.fold()

    def called(self, callback: object) -> bool:
        """Whether a hook of this callback was called so far."""
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
        """How many events were dispatched, by type, exactly."""
        counts = dict(self._published)
        for unit in tuple(self.by_file.values()):
            counts[unit.tag] = counts.get(unit.tag, 0) + unit.count()
        return {tag: count for tag, count in counts.items() if count}

    def hooks(self) -> tuple[HookHealth, ...]:
        """Every hook that a callback overrides and that could be called so far."""
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
        key = (id(callback), event_type.hook)  # the account holds the callback, so the id stays its own
        if key not in self._accounts:
            self._accounts[key] = HookAccount(callback, callback_name(callback), event_type.hook, method)
        return self._accounts[key]
