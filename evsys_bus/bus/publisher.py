"""The publishing half of a bus: the token and who waits for it, what is published meanwhile, and what a hook raises.

The fast path is compiled (`compile`); this is everything around it: the first event of a type, a publish from inside a
hook or from a signal handler, a publish from another thread, a token lost to an interrupt, callbacks added and removed.
It knows nothing of tasks and nothing of event loops.
"""

import inspect
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, Final, Literal

from evsys_bus.bus.account import HookAccount
from evsys_bus.bus.compile import FILENAME
from evsys_bus.bus.recording import BEFORE_HOOKS, Recording
from evsys_bus.bus.stack import LostToken, StackReader
from evsys_bus.bus.units import Units
from evsys_bus.callback import check_hooks, isolate
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError, EventError, ForkedBusError, PublishLoopError
from evsys_bus.events import Event, StepEnd
from evsys_bus.watchdog import Blocked, Sighting

NESTED_LIMIT: Final = 1_000
"""How many events the hooks of one publish may publish in turn, all generations together."""
HANDED_OVER_LIMIT: Final = 10_000
"""How many events of other threads may wait for the thread whose hook holds the bus."""

HOT: Final = StepEnd


class Publisher:
    """Takes events, calls hooks.

    ``expose`` is given the compiled `publish` whenever it changes; ``before`` is called with each event that is not a
    hot one, before its hooks.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        faults: FaultLog,
        *,
        patience_seconds: float,
        expose: Callable[[Callable[[Event], None]], None],
        before: Callable[[Event], None],
    ) -> None:
        for callback in callbacks:
            check_hooks(callback)
        self.callbacks = tuple(callbacks)
        self.state: Literal["new", "open", "closed", "forked"] = "new"
        self.handed_over = 0
        self.refused = 0
        self._faults = faults
        self._patience = patience_seconds
        self._expose = expose
        self._before = before
        self.recording: Recording | None = None
        self._tokens: deque[None] = deque([None])
        self._queue: deque[Event | BaseException | Callable[[], None]] = deque()
        self._nested = 0
        self.units = Units(self._first_of)
        self._stack = StackReader(
            self,
            self.units.by_file,
            self.units.prefix,
            waits=Publisher._contended.__code__,
            holds=Publisher._try_held.__code__,
        )
        self._lost_token = LostToken(self._tokens, self._stack.holders, lambda: sum(self.units.published().values()))
        self._renew()
        _alive.add(self)

    # -- the paths that are not hot -----------------------------------------------------------------------------------

    def _first_of(self, event_type: type[Event]) -> Callable[[Event], None]:
        """The first event of a type since the callbacks changed, or any event when the bus is not open."""
        self._check_open()
        if not issubclass(event_type, Event):  # pyright: ignore[reportUnnecessaryIsInstance] # what a caller really gives
            raise _no_event(event_type)
        return self.units.compile(event_type, self.callbacks, hot=False, **self._parts(event_type)).dispatch

    def _contended(self, event: Event) -> None:
        """The token is taken: by this thread, which is in a hook, or by another one, or it was lost."""
        self._check_open()
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance] # what a caller really gives
            raise _no_event(type(event))
        if self._stack.holder(inspect.currentframe()) is not None:
            self._publish_nested(event)
        elif not self._held(partial(self._dispatch, event)):
            self._hand_over(event)

    def _dispatch(self, event: Event) -> None:
        self.units.dispatch_of[type(event)](event)

    def _dispatch_late(self, event: Event) -> None:
        """An event from the queue; its publish may have returned, so nobody is left to raise an error at."""
        if self.state == "open":
            self._dispatch(event)
        else:
            self._refuse(event, "the bus was closed while it waited")

    def _refuse(self, event: Event, why: str) -> None:
        self.refused += 1
        self._faults.warn("publish.refused", type(event), event_type=type(event).__name__, why=why)

    def _publish_nested(self, event: Event) -> None:
        if self._nested >= NESTED_LIMIT:
            raise PublishLoopError(
                f"hooks published {NESTED_LIMIT} events inside one publish",
                why="a hook that publishes the event that calls it never ends",
                fix="publish another type of event, or publish it from the loop",
            )
        self._nested += 1
        self._queue.append(event)

    def _hand_over(self, event: Event) -> None:
        if len(self._queue) >= HANDED_OVER_LIMIT:
            self._refuse(event, f"{HANDED_OVER_LIMIT} events wait already for the thread whose hook holds the bus")
            return
        self.handed_over += 1
        self._queue.append(event)
        self._try_held(_nothing)  # the other thread may have finished between our last try and the append

    def _held(self, act: Callable[[], None]) -> bool:
        """Do something with the token held, waiting for it as long as patience lasts; False when it did not come."""
        deadline = time.monotonic() + self._patience
        pause = 0.0
        while not self._try_held(act):
            if time.monotonic() >= deadline:
                return False
            self._lost_token.restore()
            time.sleep(pause)
            pause = min(0.001, pause + 0.00005)
        return True

    def _try_held(self, act: Callable[[], None]) -> bool:
        try:
            self._tokens.pop()
        except IndexError:
            return False
        try:
            act()
            if self._queue:
                self._settle()
        finally:
            self._tokens.append(None)
        return True

    def _settle(self) -> None:
        """Before the token is given back: what hooks published, what they changed, and what must reach the caller."""
        leave: BaseException | None = None
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, BaseException):
                leave = leave or item
            elif isinstance(item, Event):
                self._dispatch_late(item)
            else:
                item()
        self._nested = 0
        if leave is not None:
            raise leave

    def raise_later(self, error: BaseException) -> None:
        """Raise it from the publish in progress, once its hooks have run and the token is given back."""
        self._queue.append(error)

    def _failed(self, account: HookAccount, error: BaseException) -> None:
        account.failures += 1
        leave = isolate(account.callback, account.hook, error, self._faults)
        if leave is not None:
            self.raise_later(leave)

    def _check_open(self) -> None:
        if self.state == "open":
            return
        if self.state == "forked":
            raise ForkedBusError(
                f"this bus belongs to process {os.getppid()}; process {os.getpid()} was forked from it",
                fix="publish in the parent, or enter an EventBus of its own in the child",
            )
        if self.state == "new":
            raise BusNotOpenError("publish before the bus was entered", fix="`async with EventBus(...) as bus:` first")
        raise BusNotOpenError("publish after the bus was closed", fix="publish inside the `with` block of the bus")

    # -- opening, changing, closing -----------------------------------------------------------------------------------

    def open(self, recording: Recording | None) -> None:
        """Take events from here on, and record them if there is where to."""
        self.recording = recording
        self.state = "open"
        self._renew()

    def close(self) -> None:
        """Take no more events, once what is queued has run; a hook that blocks in another thread is not waited for."""
        if self.state == "open":
            self._held(_nothing)
        self.state = "closed"
        self.units.forget()

    def change(
        self, update: Callable[[tuple[object, ...]], tuple[object, ...]], then: Callable[[], None] | None = None
    ) -> None:
        """Change the callbacks, from the next publish on; ``then`` is called with it."""

        def renew() -> None:
            self.callbacks = update(self.callbacks)
            self._renew()
            self.units.let_go(self.callbacks)
            if then is not None:
                then()

        if self._stack.holder(inspect.currentframe()) is not None or not self._held(renew):
            self._queue.append(renew)

    def disown(self) -> None:
        """In a forked child: the bus stays with the parent."""
        if self.state == "open":
            self.state = "forked"
        self.units.after_fork()
        self._tokens.clear()
        self._tokens.append(None)
        self._queue.clear()
        self.units.forget()

    def _renew(self) -> None:
        self.units.forget()
        # While the bus is not open, no callback is compiled in and the inlined path is closed: every event comes by
        # `_first_of`, which says why it is refused.
        is_open = self.state == "open"
        unit = self.units.compile(HOT, self.callbacks if is_open else (), hot=is_open, **self._parts(HOT))
        if not is_open:
            self.units.forget()
        if is_open:  # what is published where a run ends, as of a lack of memory, must not be compiled there
            self.units.dispatch_of.update({each: self._first_of(each) for each in BEFORE_HOOKS})
        self._expose(unit.publish)

    def _parts(self, event_type: type[Event]) -> dict[str, Any]:
        """What the compiled code needs of here. Any: functions and containers of several types."""
        return {
            "tokens": self._tokens,
            "queue": self._queue,
            "contended": self._contended,
            "settle": self._settle,
            "dispatch_of": self.units.dispatch_of,
            "failed": self._failed,
            "before": self._before,
            "record": None if self.recording is None else self.recording.way_of(event_type),
            "record_first": self.recording is not None and event_type in BEFORE_HOOKS,
        }

    # -- who is inside ------------------------------------------------------------------------------------------------

    def publishing(self) -> bool:
        """Whether some thread is inside a publish; cheap, and only a hint: it may be over the next moment."""
        return not self._tokens

    def hook_around(self, frame: FrameType | None) -> HookAccount | None:
        """The hook in which the code of this frame runs, if this bus called it."""
        while frame is not None and not frame.f_code.co_filename.startswith(FILENAME):
            frame = frame.f_back
        return self._stack.hook_at(frame)  # the innermost hook; None where it is another bus's

    def look(self) -> Sighting[HookAccount] | None:
        """The hook call in progress, for the watchdog."""
        if self._tokens:
            return None
        for frame, holder in self._stack.holders():
            hook = self._stack.hook_at(holder)
            unit = self.units.by_file.get(holder.f_code.co_filename)
            if hook is not None and unit is not None:
                return Sighting(hook, (unit.filename, holder.f_lineno, unit.count()), frame, holder)
        return None

    def tell_blocked(self, blocked: Blocked[HookAccount]) -> None:
        """What the watchdog has found: count it, say it."""
        blocked.hook.blocked += 1
        log().warning(
            "hook.blocked",
            callback=blocked.hook.owner,
            hook=blocked.hook.hook,
            seconds=round(blocked.seconds, 1),
            held_interpreter=blocked.held_interpreter,
            stack=f"\n{blocked.stack}",
        )


def _nothing() -> None:
    """The act of one who only wants the queue run."""


def _no_event(given: type) -> EventError:
    return EventError(
        f"publish was given a {given.__name__}, which is no event",
        fix="publish one of the events of evsys_bus.events, or an instance of a subclass of evsys_bus.Event",
    )


_alive: "weakref.WeakSet[Publisher]" = weakref.WeakSet()


def _disown_all() -> None:
    for publisher in list(_alive):
        publisher.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
