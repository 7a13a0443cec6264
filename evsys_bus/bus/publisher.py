"""The publishing half of a bus: the token and who waits for it, what is published meanwhile, and what a hook raises.

The fast path is compiled (`compile`); this is everything around it: the first event of a type, a publish from inside a
hook or from a signal handler, a publish from another thread, a token lost to an interrupt, callbacks added and removed.
It knows nothing of tasks and nothing of event loops.
"""

import inspect
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, Final, Literal

from evsys_bus.attached import EventInfo
from evsys_bus.bus.account import HookAccount
from evsys_bus.bus.compile import FILENAME, Dispatch
from evsys_bus.bus.recording import BEFORE_HOOKS, Recording
from evsys_bus.bus.stack import LostToken, StackReader
from evsys_bus.bus.units import Units
from evsys_bus.callback import check_hooks, isolate
from evsys_bus.codec import error_text
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError, EventError, ForkedBusError, PublishLoopError
from evsys_bus.events import Event, StepEnd, with_whole_step
from evsys_bus.tasks import Deadline
from evsys_bus.watchdog import Blocked, Sighting

NESTED_LIMIT: Final = 1_000
"""How many events the hooks of one publish may publish in turn, all generations together."""
HANDED_OVER_LIMIT: Final = 10_000
"""How many events of other threads may wait for the thread whose hook holds the bus."""

SEAL_SECONDS: Final = 1.0
"""How long closing waits at least for another thread to come to the end of recording an event."""

HOT: Final = StepEnd


class _Late:
    """An event whose hooks cannot run at once."""

    __slots__ = ("event", "is_begun", "is_done", "published", "sequence")

    def __init__(self, event: Event, published: float) -> None:
        self.event = event
        self.published = published
        """Seconds since the epoch."""
        self.is_begun = False
        """Whether its hooks were called, or some of them."""
        self.is_done = False
        """Whether it is on record, or counted as refused."""
        self.sequence = 0
        """The one that was the next when its turn began; it keeps the token, or the seal, until it is done."""


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
        self.without_hooks = 0
        self.entry_error: BaseException | None = None
        """Why the bus could not be entered."""
        self._sealed = threading.RLock()  # over what is recorded once the bus is closed and a hook holds it still
        self._recorded_for_hook: Event | None = None
        self._faults = faults
        self._patience = patience_seconds
        self._expose = expose
        self._before = before
        self.recording: Recording | None = None
        self._tokens: deque[None] = deque([None])
        self._queue: deque[_Late | BaseException | Callable[[], None]] = deque()
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

    def _first_of(self, event_type: type[Event]) -> Dispatch:
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
        late = _Late(with_whole_step(event), time.time())  # here, where an error still reaches who publishes
        if self._stack.holder(inspect.currentframe()) is not None:
            self._publish_nested(late)
        elif not self._held(partial(self._dispatch, late)):
            self._hand_over(late)

    def _dispatch(self, late: "_Late") -> None:
        self.units.dispatch_of[type(late.event)](late.event, late.published)

    def _dispatch_late(self, late: "_Late") -> None:
        """An event from the queue; its publish may have returned, so nobody is left to raise an error at."""
        if self.state != "open" or late.is_begun:
            self._record_without_hooks(late)
            return
        late.sequence = self._next_sequence()
        late.is_begun = True
        self._dispatch(late)
        late.is_done = True  # not so where an interrupt came; `_settle` finds it again

    def _next_sequence(self) -> int:
        return 0 if self.recording is None else self.recording.writer.next_sequence

    def _record_without_hooks(self, late: "_Late") -> None:
        """Its publish has returned, and its hooks cannot be called, or not all of them."""
        if late.is_done or (late.sequence and late.sequence != self._next_sequence()):
            return  # the sequence was its own: an interrupt came once it was recorded
        if self.recording is None:
            late.is_done = True
            if not late.is_begun:
                self._refuse(late.event, "the bus was closed while it waited, and there is no journal")
            return
        with self._sealed:
            late.sequence = self._next_sequence()
            recorded = self._record_now(late.event, late.published)
            late.is_done = True
        if recorded and not late.is_begun:
            self.without_hooks += 1
            name = type(late.event).__name__
            why = "the bus was left while another thread's hook held it; the event is in the journal"
            self._faults.warn("publish.without_hooks", name, event_type=name, why=why)

    def _record_now(self, event: Event, published: float) -> bool:
        """Record it outside its publish; where that fails, it is counted and said."""
        assert self.recording is not None
        with self._sealed:
            try:
                refusal = self.recording.record(event, published)
            except Exception as error:  # a wall: nobody is left to raise it at
                refusal = error
        if refusal is not None:
            self._refuse(event, f"it could not be recorded: {error_text(refusal)}")
        return refusal is None

    def _record_sealed(self, event: Event, published: float) -> None:
        """What a publish records by that was in a hook when the bus was closed."""
        with self._sealed:
            if event is not self._recorded_for_hook:
                self._record_now(event, published)

    def _refuse(self, event: Event, why: str) -> None:
        self.refused += 1
        self._faults.warn("publish.refused", type(event), event_type=type(event).__name__, why=why)

    def _publish_nested(self, late: "_Late") -> None:
        if self._nested >= NESTED_LIMIT:
            raise PublishLoopError(
                f"hooks published {NESTED_LIMIT} events inside one publish",
                why="a hook that publishes the event that calls it never ends",
                fix="publish another type of event, or publish it from the loop",
            )
        self._nested += 1
        self._queue.append(late)

    def _hand_over(self, late: "_Late") -> None:
        if len(self._queue) >= HANDED_OVER_LIMIT:
            self._refuse(late.event, f"{HANDED_OVER_LIMIT} events wait already for the thread whose hook holds the bus")
            return
        self.handed_over += 1
        self._queue.append(late)
        if self.state != "open" and self._withdraw(late):
            self.handed_over -= 1
            self._check_open()
        self._try_held(_nothing)  # the other thread may have finished between our last try and the append

    def _withdraw(self, item: "_Late | BaseException | Callable[[], None]") -> bool:
        """Take it out of the queue; False where another thread has done so."""
        try:
            self._queue.remove(item)
        except ValueError:
            return False
        return True

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
        except BaseException as error:
            self._settle(error)
        finally:
            self._tokens.append(None)
        return True

    def _settle(self, leave: BaseException | None = None) -> None:
        """Before the token is given back: what hooks published, what they changed, and what must reach the caller.

        What is in the queue stays there until it is done, so that no interrupt loses it; and whatever is raised, the
        rest is done first. Of several errors the first is raised, and none is left behind for a later publish.
        """
        item: _Late | BaseException | Callable[[], None] | None = None
        while self._queue:
            try:
                item = self._queue[0]
                if isinstance(item, BaseException):
                    leave = leave or item
                elif isinstance(item, _Late):
                    self._dispatch_late(item)
                else:
                    item()
                self._withdraw(item)
            except BaseException as error:
                leave = leave or error
                if item is not None and not isinstance(item, _Late):
                    self._withdraw(item)
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
        if self.entry_error is not None:
            raise BusNotOpenError(
                "publish on a bus that could not be entered",
                why=error_text(self.entry_error),
                fix="make a new EventBus once that is mended",
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

    def close(self, deadline: Deadline | None = None) -> None:
        """Take no more events, once what waits has run.

        A hook that blocks in another thread is waited for as patience lasts; where events were left to that thread,
        until the deadline. What waits then is recorded without its hooks, and the thread that comes out of its hook
        later finds its event recorded. From any thread.
        """
        deadline = Deadline(0.0) if deadline is None else deadline
        if self.state == "open" and not self._shut(deadline):
            self._take_over(deadline)
        self.state = "closed"
        self.units.forget()

    def _shut(self, deadline: Deadline) -> bool:
        """Close with the token held, so that nobody is inside; False where it did not come."""

        def shut() -> None:
            try:
                self._settle()
            finally:
                self.state = "closed"

        began, pause = time.monotonic(), 0.0
        while not self._try_held(shut):
            left = 0.0 if deadline.is_cut else self._patience - (time.monotonic() - began)
            if max(left, deadline.left() if self._queue else 0.0) <= 0.0:
                return False
            if self._stack.holder(inspect.currentframe()) is not None:
                return False  # this very thread is in a hook, and would wait for itself
            self._lost_token.restore()
            time.sleep(pause)
            pause = min(0.001, pause + 0.00005)
        return True

    def _take_over(self, deadline: Deadline) -> None:
        """Record what nobody else will: a hook holds the bus, and is not waited for any longer."""
        self.state = "closed"
        if self.recording is None:
            self._take_over_queue()
            return
        self.units.record_by(self._record_sealed)
        until = time.monotonic() + max(deadline.left(), SEAL_SECONDS)
        while not self._tokens and time.monotonic() < until:
            with self._sealed:
                held = self._event_in_hook()
                if held is not None:
                    self._record_for_hook(*held)
                    self._take_over_queue()
                    return
            time.sleep(0.001)  # it records, or goes from one event to the next
        if not self._try_held(_nothing):
            for item in tuple(self._queue):
                if isinstance(item, _Late) and self._withdraw(item):
                    self._refuse(item.event, "another thread has held the bus until the end, and not in a hook")

    def _take_over_queue(self) -> None:
        for item in tuple(self._queue):
            if isinstance(item, _Late) and self._withdraw(item):
                self._record_without_hooks(item)

    def _event_in_hook(self) -> tuple[Event, float, bool] | None:
        """The event whose hook holds the bus, when it was published, and whether it is on record already."""
        for _, holder in self._stack.holders():
            unit = self.units.find(holder.f_code.co_filename)
            event = holder.f_locals.get("event")
            if unit is not None and holder.f_lineno in unit.lines and isinstance(event, Event):
                return event, unit.event_time(), unit.record_first
        return None

    def _record_for_hook(self, event: Event, published: float, is_recorded: bool) -> None:
        """The event of the hook that holds the bus."""
        for item in tuple(self._queue):
            if isinstance(item, _Late) and item.event is event:
                item.is_done = True
        if not is_recorded:
            self._recorded_for_hook = event
            self._record_now(event, published)

    def change(
        self, update: Callable[[tuple[object, ...]], tuple[object, ...]], then: Callable[[], None] | None = None
    ) -> None:
        """Change the callbacks, from the next publish on; ``then`` is called with it."""

        def renew() -> None:
            self.callbacks = update(self.callbacks)
            self._renew()
            if then is not None:
                then()
            self.units.let_go(self.callbacks)

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

    def current_event(self, frame: FrameType | None) -> EventInfo | None:
        """Of the event whose hook runs in this frame, or further out."""
        while frame is not None and not frame.f_code.co_filename.startswith(FILENAME):
            frame = frame.f_back
        unit = None if frame is None else self.units.by_file.get(frame.f_code.co_filename)
        if frame is None or unit is None:
            return None
        if self.recording is None:
            return EventInfo(time.time())
        return self.recording.info(unit.event_time(), recorded=unit.record_first)

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
