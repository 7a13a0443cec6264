"""Publishing: the token and its queue, events published meanwhile, and exceptions of hooks.

The fast path is compiled (`compile`). This module handles everything else: the first event of a type, a publish from
inside a hook, from a signal handler or from another thread, a token lost to an interrupt, and callbacks that are added
or removed. It does not depend on tasks or event loops.
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
"""How many events the hooks of one publish may publish, including those of nested hooks."""
HANDED_OVER_LIMIT: Final = 10_000
"""How many events of other threads may wait for the thread whose hook holds the bus."""

SEAL_SECONDS: Final = 1.0
"""Minimum time that closing waits for another thread to finish recording an event."""

HOT: Final = StepEnd


class _Late:
    """An event whose hooks cannot run immediately."""

    __slots__ = ("event", "is_begun", "is_done", "published", "sequence")

    def __init__(self, event: Event, published: float) -> None:
        self.event = event
        self.published = published
        """Seconds since the epoch."""
        self.is_begun = False
        """Whether at least some of its hooks were called."""
        self.is_done = False
        """Whether it is recorded, or counted as refused."""
        self.sequence = 0
        """The next sequence of the journal when its dispatch started; no other event is recorded before it is done."""


class Publisher:
    """Takes events and calls hooks.

    Args:
        callbacks: In the order of the calls.
        faults: Logs failures of hooks and dropped events.
        patience_seconds: How long a publish waits for that of another thread.
        expose: Called with the compiled `publish` whenever it changes.
        before: Called with each event that is not a hot one, before its hooks.
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
        self._sealed = threading.RLock()  # guards recording after close, while a hook still holds the token
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

    # -- slow paths ---------------------------------------------------------------------------------------------------

    def _first_of(self, event_type: type[Event]) -> Dispatch:
        """Compile for the first event of a type since the callbacks changed; raise if the bus is not open."""
        self._check_open()
        if not issubclass(event_type, Event):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may be untyped
            raise _no_event(event_type)
        return self.units.compile(event_type, self.callbacks, hot=False, **self._parts(event_type)).dispatch

    def _contended(self, event: Event) -> None:
        """Publish when the token is taken: by this thread in a hook, by another thread, or lost to an interrupt."""
        self._check_open()
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may be untyped
            raise _no_event(type(event))
        late = _Late(with_whole_step(event), time.time())  # validate here, where an error still reaches the caller
        if self._stack.holder(inspect.currentframe()) is not None:
            self._publish_nested(late)
        elif not self._held(partial(self._dispatch, late)):
            self._hand_over(late)

    def _dispatch(self, late: "_Late") -> None:
        self.units.dispatch_of[type(late.event)](late.event, late.published)

    def _dispatch_late(self, late: "_Late") -> None:
        """Dispatch an event from the queue; its publish may have returned, so errors reach no caller."""
        if self.state != "open" or late.is_begun:
            self._record_without_hooks(late)
            return
        late.sequence = self._next_sequence()
        late.is_begun = True
        self._dispatch(late)
        late.is_done = True  # not reached after an interrupt: `_settle` then sees the event again

    def _next_sequence(self) -> int:
        return 0 if self.recording is None else self.recording.writer.next_sequence

    def _record_without_hooks(self, late: "_Late") -> None:
        """Record an event whose publish has returned and whose hooks cannot be called, or not all of them."""
        if late.is_done or (late.sequence and late.sequence != self._next_sequence()):
            return  # it was recorded before an interrupt came
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
        """Record an event outside its publish; a failure is counted and logged."""
        assert self.recording is not None
        with self._sealed:
            try:
                refusal = self.recording.record(event, published)
            except Exception as error:  # isolated: there is no caller to raise it to
                refusal = error
        if refusal is not None:
            self._refuse(event, f"it could not be recorded: {error_text(refusal)}")
        return refusal is None

    def _record_sealed(self, event: Event, published: float) -> None:
        """Record for a publish that was inside a hook when the bus was closed."""
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
        """Remove an item from the queue; return False if another thread has done so."""
        try:
            self._queue.remove(item)
        except ValueError:
            return False
        return True

    def _held(self, act: Callable[[], None]) -> bool:
        """Run the action with the token, waiting for it as long as patience lasts; return False if it timed out."""
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
        """Process the queue before the token is returned: nested events, changes of callbacks, and errors to raise.

        An item stays in the queue until it is done, so that no interrupt loses it. Everything is processed before an
        error is raised; of several errors the first is raised, and none is left for a later publish.
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
        """Raise an error from the current publish, after its hooks have run and the token was returned."""
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
                fix="make a new EventBus once that is fixed",
            )
        if self.state == "new":
            raise BusNotOpenError("publish before the bus was entered", fix="`async with EventBus(...) as bus:` first")
        raise BusNotOpenError("publish after the bus was closed", fix="publish inside the `with` block of the bus")

    # -- opening, changing, closing -----------------------------------------------------------------------------------

    def open(self, recording: Recording | None) -> None:
        """Start taking events, and recording them if there is a journal."""
        self.recording = recording
        self.state = "open"
        self._renew()

    def close(self, deadline: Deadline | None = None) -> None:
        """Stop taking events after the queue was processed. May be called from any thread.

        A hook that blocks in another thread is waited for as long as patience lasts, or until the deadline if events
        were left to that thread. Events that are still queued then are recorded without hooks, and so is the event of
        the blocked hook.
        """
        deadline = Deadline(0.0) if deadline is None else deadline
        if self.state == "open" and not self._shut(deadline):
            self._take_over(deadline)
        self.state = "closed"
        self.units.forget()

    def _shut(self, deadline: Deadline) -> bool:
        """Close with the token held, so that no hook is running; return False if the token cannot be had."""

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
                return False  # this very thread is inside a hook and would wait for itself
            self._lost_token.restore()
            time.sleep(pause)
            pause = min(0.001, pause + 0.00005)
        return True

    def _take_over(self, deadline: Deadline) -> None:
        """Close while a hook holds the token and is not waited for any longer; record the remaining events."""
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
            time.sleep(0.001)  # it is recording, or between two events
        if not self._try_held(_nothing):
            for item in tuple(self._queue):
                if isinstance(item, _Late) and self._withdraw(item):
                    self._refuse(item.event, "another thread has held the bus until the end, and not in a hook")

    def _take_over_queue(self) -> None:
        for item in tuple(self._queue):
            if isinstance(item, _Late) and self._withdraw(item):
                self._record_without_hooks(item)

    def _event_in_hook(self) -> tuple[Event, float, bool] | None:
        """Return the event whose hook holds the token, its publish time, and whether it is recorded already."""
        for _, holder in self._stack.holders():
            unit = self.units.find(holder.f_code.co_filename)
            event = holder.f_locals.get("event")
            if unit is not None and holder.f_lineno in unit.lines and isinstance(event, Event):
                return event, unit.event_time(), unit.record_first
        return None

    def _record_for_hook(self, event: Event, published: float, is_recorded: bool) -> None:
        """Record the event of the hook that holds the token."""
        for item in tuple(self._queue):
            if isinstance(item, _Late) and item.event is event:
                item.is_done = True
        if not is_recorded:
            self._recorded_for_hook = event
            self._record_now(event, published)

    def change(
        self, update: Callable[[tuple[object, ...]], tuple[object, ...]], then: Callable[[], None] | None = None
    ) -> None:
        """Change the callbacks from the next publish on, and then call ``then``."""

        def renew() -> None:
            self.callbacks = update(self.callbacks)
            self._renew()
            if then is not None:
                then()
            self.units.let_go(self.callbacks)

        if self._stack.holder(inspect.currentframe()) is not None or not self._held(renew):
            self._queue.append(renew)

    def disown(self) -> None:
        """Mark the bus as the parent's, in a forked child."""
        if self.state == "open":
            self.state = "forked"
        self.units.after_fork()
        self._tokens.clear()
        self._tokens.append(None)
        self._queue.clear()
        self.units.forget()

    def _renew(self) -> None:
        self.units.forget()
        # While the bus is not open, no callbacks are compiled in and the inlined path is disabled: every event reaches
        # `_first_of`, which raises the reason.
        is_open = self.state == "open"
        unit = self.units.compile(HOT, self.callbacks if is_open else (), hot=is_open, **self._parts(HOT))
        if not is_open:
            self.units.forget()
        if is_open:  # compile events of the end of a run now: it may end because of a lack of memory
            self.units.dispatch_of.update({each: self._first_of(each) for each in BEFORE_HOOKS})
        self._expose(unit.publish)

    def _parts(self, event_type: type[Event]) -> dict[str, Any]:
        """Return what the compiled code needs from this object."""
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

    # -- the publish in progress --------------------------------------------------------------------------------------

    def publishing(self) -> bool:
        """Return whether some thread is inside a publish; cheap, and only a hint, since it may end at any moment."""
        return not self._tokens

    def hook_around(self, frame: FrameType | None) -> HookAccount | None:
        """Return the hook in which the code of this frame runs, if this bus called it."""
        while frame is not None and not frame.f_code.co_filename.startswith(FILENAME):
            frame = frame.f_back
        return self._stack.hook_at(frame)  # the innermost hook; None if it is one of another bus

    def current_event(self, frame: FrameType | None) -> EventInfo | None:
        """Return the event whose hook runs in this frame or an outer one."""
        while frame is not None and not frame.f_code.co_filename.startswith(FILENAME):
            frame = frame.f_back
        unit = None if frame is None else self.units.by_file.get(frame.f_code.co_filename)
        if frame is None or unit is None:
            return None
        if self.recording is None:
            return EventInfo(time.time())
        return self.recording.info(unit.event_time(), recorded=unit.record_first)

    def look(self) -> Sighting[HookAccount] | None:
        """Return the hook call in progress, for the watchdog."""
        if self._tokens:
            return None
        for frame, holder in self._stack.holders():
            hook = self._stack.hook_at(holder)
            unit = self.units.by_file.get(holder.f_code.co_filename)
            if hook is not None and unit is not None:
                return Sighting(hook, (unit.filename, holder.f_lineno, unit.count()), frame, holder)
        return None

    def tell_blocked(self, blocked: Blocked[HookAccount]) -> None:
        """Count and log a blocked hook."""
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
    """Do nothing; for callers that only want the queue processed."""


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
