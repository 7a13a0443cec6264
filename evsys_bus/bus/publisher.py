"""Publishing: the token and its queue, events published meanwhile, and exceptions of hooks.

The fast path is compiled (`compile`). This module handles everything else: the first event of a type, a publish from
inside a hook, from a signal handler or from another thread, a token lost to an interrupt, and callbacks that are added
or removed. It does not depend on tasks or event loops.
"""

import inspect
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, Final, Literal

from evsys_bus.adapter import EventInfo
from evsys_bus.bus.dispatch import FILENAME_PREFIX, DispatchFunction, DispatchRegistry, HookStats
from evsys_bus.bus.recorder import RECORDED_BEFORE_HOOKS, EventRecorder, NextParts
from evsys_bus.bus.token_recovery import StackReader, TokenRecovery
from evsys_bus.bus.watchdog import BlockedHook, HookCall
from evsys_bus.callback import check_hooks, find_hook, isolate
from evsys_bus.codec import error_text
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError, EventError, ForkedBusError, PublishLoopError
from evsys_bus.events import Event, Metrics, StepEnd, event_tag, with_int_step
from evsys_bus.tasks import Deadline
from evsys_bus.weak_items import WeakItems

NESTED_LIMIT: Final = 1_000
"""How many events the hooks of one publish may publish, including those of nested hooks."""
DEFERRED_LIMIT: Final = 10_000
"""How many events of other threads may wait for the thread whose hook holds the bus."""

SEAL_SECONDS: Final = 1.0
"""Minimum time that closing waits for another thread to finish recording an event."""

HOT_EVENT: Final = StepEnd


class _DeferredEvent:
    """An event whose hooks cannot run immediately."""

    __slots__ = ("event", "is_done", "is_started", "published", "sequence")

    def __init__(self, event: Event, published: float) -> None:
        self.event = event
        self.published = published
        """Seconds since the epoch."""
        self.is_started = False
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
        set_publish: Called with the compiled `publish` and `EventRecorder.next_parts` whenever they change.
        before_event: Called with each event that is not a hot one, before its hooks.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        faults: FaultLog,
        *,
        patience_seconds: float,
        set_publish: Callable[[Callable[[Event], None], NextParts], None],
        before_event: Callable[[Event], None],
    ) -> None:
        for callback in callbacks:
            check_hooks(callback)
        self.callbacks = tuple(callbacks)
        self.state: Literal["new", "open", "closed", "forked"] = "new"
        self.deferred = 0
        self.dropped = 0
        self.without_hooks = 0
        self.entry_error: BaseException | None = None
        """Why the bus could not be entered."""
        self._seal_lock = threading.RLock()  # guards recording after close, while a hook still holds the token
        self._recorded_for_hook: Event | None = None
        self._faults = faults
        self._patience = patience_seconds
        self._set_publish = set_publish
        self._before_event = before_event
        self.recorder: EventRecorder | None = None
        self._tokens: deque[None] = deque([None])
        self._queue: deque[_DeferredEvent | BaseException | Callable[[], None]] = deque()
        self._nested_count = 0
        self.dispatches = DispatchRegistry(self._compile_dispatch)
        self._stack_reader = StackReader(
            self,
            self.dispatches.by_filename,
            self.dispatches.prefix,
            waiting_code=Publisher._publish_slow.__code__,
            holding_code=Publisher._try_with_token.__code__,
        )
        self._token_recovery = TokenRecovery(
            self._tokens, self._stack_reader.find_holders, lambda: sum(self.dispatches.published_counts().values())
        )
        self._recompile()
        _publishers.add(self)

    # -- slow paths ---------------------------------------------------------------------------------------------------

    def _compile_dispatch(self, event_type: type[Event]) -> DispatchFunction:
        """Compile for the first event of a type since the callbacks changed; raise if the bus is not open."""
        self._check_open()
        if not issubclass(event_type, Event):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may be untyped
            raise _not_an_event(event_type)
        return self.dispatches.compile(
            event_type, self.callbacks, hot=False, **self._template_globals(event_type)
        ).dispatch

    def _publish_slow(self, event: Event) -> None:
        """Publish when the token is taken: by this thread in a hook, by another thread, or lost to an interrupt."""
        self._check_open()
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance] # callers may be untyped
            raise _not_an_event(type(event))
        deferred = _DeferredEvent(
            with_int_step(event), time.time()
        )  # validate here, where an error still reaches the caller
        if self._stack_reader.find_holder(inspect.currentframe()) is not None:
            self._publish_nested(deferred)
        elif not self._with_token(partial(self._dispatch, deferred)):
            self._defer(deferred)

    def _dispatch(self, deferred: "_DeferredEvent") -> None:
        self.dispatches.dispatch_of[type(deferred.event)](deferred.event, deferred.published)

    def _dispatch_deferred(self, deferred: "_DeferredEvent") -> None:
        """Dispatch an event from the queue; its publish may have returned, so errors reach no caller."""
        if self.state != "open" or deferred.is_started:
            self._record_without_hooks(deferred)
            return
        deferred.sequence = self._next_sequence()
        deferred.is_started = True
        self._dispatch(deferred)
        deferred.is_done = True  # not reached after an interrupt: `_drain_queue` then sees the event again

    def _next_sequence(self) -> int:
        return 0 if self.recorder is None else self.recorder.writer.next_sequence

    def _record_without_hooks(self, deferred: "_DeferredEvent") -> None:
        """Record an event whose publish has returned and whose hooks cannot be called, or not all of them."""
        if deferred.is_done or (deferred.sequence and deferred.sequence != self._next_sequence()):
            return  # it was recorded before an interrupt came
        if self.recorder is None:
            deferred.is_done = True
            if not deferred.is_started:
                self._drop(deferred.event, "the bus was closed while it waited, and there is no journal")
            return
        with self._seal_lock:
            deferred.sequence = self._next_sequence()
            recorded = self._record_now(deferred.event, deferred.published)
            deferred.is_done = True
        if recorded and not deferred.is_started:
            self.without_hooks += 1
            name = type(deferred.event).__name__
            why = "the bus was left while another thread's hook held it; the event is in the journal"
            self._faults.warn("publish.without_hooks", name, event_type=name, why=why)

    def _record_now(self, event: Event, published: float) -> bool:
        """Record an event outside its publish; a failure is counted and logged."""
        assert self.recorder is not None
        with self._seal_lock:
            try:
                record_error = self.recorder.record(event, published)
            except Exception as error:  # isolated: there is no caller to raise it to
                record_error = error
        if record_error is not None:
            self._drop(event, f"it could not be recorded: {error_text(record_error)}")
        return record_error is None

    def record(self, event: Event) -> None:
        """Record an event whose hooks were called, but whose publish was interrupted before it was on record."""

        def record_now() -> None:
            self._record_now(event, time.time())

        if self.recorder is not None and self.state == "open" and not self._with_token(record_now):
            self._queue.append(record_now)

    def _record_after_close(self, event: Event, published: float) -> None:
        """Record for a publish that was inside a hook when the bus was closed."""
        with self._seal_lock:
            if event is not self._recorded_for_hook:
                self._record_now(event, published)

    def _drop(self, event: Event, why: str) -> None:
        self.dropped += 1
        self._faults.warn("publish.refused", type(event), event_type=type(event).__name__, why=why)

    def _publish_nested(self, deferred: "_DeferredEvent") -> None:
        if self._nested_count >= NESTED_LIMIT:
            raise PublishLoopError(
                f"hooks published {NESTED_LIMIT} events inside one publish",
                why="a hook that publishes the event that calls it never ends",
                fix="publish another type of event, or publish it from the loop",
            )
        self._nested_count += 1
        self._queue.append(deferred)

    def _defer(self, deferred: "_DeferredEvent") -> None:
        if len(self._queue) >= DEFERRED_LIMIT:
            self._drop(deferred.event, f"{DEFERRED_LIMIT} events wait already for the thread whose hook holds the bus")
            return
        self.deferred += 1
        self._queue.append(deferred)
        if self.state != "open" and self._remove_queued(deferred):
            self.deferred -= 1
            self._check_open()
        self._try_with_token(_noop)  # the other thread may have finished between our last try and the append

    def _remove_queued(self, item: "_DeferredEvent | BaseException | Callable[[], None]") -> bool:
        """Remove an item from the queue; return False if another thread has done so."""
        try:
            self._queue.remove(item)
        except ValueError:
            return False
        return True

    def _with_token(self, action: Callable[[], None]) -> bool:
        """Run the action with the token, waiting for it as long as patience lasts; return False if it timed out."""
        deadline = time.monotonic() + self._patience
        pause = 0.0
        while not self._try_with_token(action):
            if time.monotonic() >= deadline:
                return False
            self._token_recovery.restore()
            time.sleep(pause)
            pause = min(0.001, pause + 0.00005)
        return True

    def _try_with_token(self, action: Callable[[], None]) -> bool:
        try:
            self._tokens.pop()
        except IndexError:
            return False
        try:
            action()
            if self._queue:
                self._drain_queue()
        except BaseException as error:
            self._drain_queue(error)
        finally:
            self._tokens.append(None)
        return True

    def _drain_queue(self, first_error: BaseException | None = None) -> None:
        """Process the queue before the token is returned: nested events, changes of callbacks, and errors to raise.

        An item stays in the queue until it is done, so that no interrupt loses it. Everything is processed before an
        error is raised; of several errors the first is raised, and none is left for a later publish.
        """
        item: _DeferredEvent | BaseException | Callable[[], None] | None = None
        while self._queue:
            try:
                item = self._queue[0]
                if isinstance(item, BaseException):
                    first_error = first_error or item
                elif isinstance(item, _DeferredEvent):
                    self._dispatch_deferred(item)
                else:
                    item()
                self._remove_queued(item)
            except BaseException as error:
                first_error = first_error or error
                if item is not None and not isinstance(item, _DeferredEvent):
                    self._remove_queued(item)
        self._nested_count = 0
        if first_error is not None:
            raise first_error

    def raise_later(self, error: BaseException) -> None:
        """Raise an error from the current publish, after its hooks have run and the token was returned."""
        self._queue.append(error)

    def _hook_failed(self, stats: HookStats, error: BaseException) -> None:
        stats.failures += 1
        exit_error = isolate(stats.callback, stats.hook, error, self._faults)
        if exit_error is not None:
            self.raise_later(exit_error)

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

    def open(self, recorder: EventRecorder | None) -> None:
        """Start taking events, and recording them if there is a journal."""
        self.recorder = recorder
        self.state = "open"
        self._recompile()

    def close(self, deadline: Deadline | None = None) -> None:
        """Stop taking events after the queue was processed. May be called from any thread.

        A hook that blocks in another thread is waited for as long as patience lasts, or until the deadline if events
        were left to that thread. Events that are still queued then are recorded without hooks, and so is the event of
        the blocked hook.
        """
        deadline = Deadline(0.0) if deadline is None else deadline
        if self.state == "open" and not self._close_with_token(deadline):
            self._close_without_token(deadline)
        self.state = "closed"
        self.dispatches.retire_all()

    def _close_with_token(self, deadline: Deadline) -> bool:
        """Close with the token held, so that no hook is running; return False if the token cannot be had."""

        def close_now() -> None:
            try:
                self._drain_queue()
            finally:
                self.state = "closed"

        started_at, pause = time.monotonic(), 0.0
        while not self._try_with_token(close_now):
            left = 0.0 if deadline.is_cut_short else self._patience - (time.monotonic() - started_at)
            if max(left, deadline.remaining() if self._queue else 0.0) <= 0.0:
                return False
            if self._stack_reader.find_holder(inspect.currentframe()) is not None:
                return False  # this very thread is inside a hook and would wait for itself
            self._token_recovery.restore()
            time.sleep(pause)
            pause = min(0.001, pause + 0.00005)
        return True

    def _close_without_token(self, deadline: Deadline) -> None:
        """Close while a hook holds the token and is not waited for any longer; record the remaining events."""
        self.state = "closed"
        if self.recorder is None:
            self._record_queue_without_hooks()
            return
        self.dispatches.set_recorder(self._record_after_close)
        give_up_at = time.monotonic() + max(deadline.remaining(), SEAL_SECONDS)
        while not self._tokens and time.monotonic() < give_up_at:
            with self._seal_lock:
                event_in_hook = self._event_in_hook()
                if event_in_hook is not None:
                    self._record_for_hook(*event_in_hook)
                    self._record_queue_without_hooks()
                    return
            time.sleep(0.001)  # it is recording, or between two events
        if not self._try_with_token(_noop):
            for item in tuple(self._queue):
                if isinstance(item, _DeferredEvent) and self._remove_queued(item):
                    self._drop(item.event, "another thread has held the bus until the end, and not in a hook")

    def _record_queue_without_hooks(self) -> None:
        for item in tuple(self._queue):
            if isinstance(item, _DeferredEvent) and self._remove_queued(item):
                self._record_without_hooks(item)

    def _event_in_hook(self) -> tuple[Event, float, bool] | None:
        """Return the event whose hook holds the token, its publish time, and whether it is recorded already."""
        for _, holder in self._stack_reader.find_holders():
            compiled = self.dispatches.find(holder.f_code.co_filename)
            event = holder.f_locals.get("event")
            if compiled is not None and holder.f_lineno in compiled.hooks_by_line and isinstance(event, Event):
                return event, compiled.event_time(), compiled.record_first
        return None

    def _record_for_hook(self, event: Event, published: float, is_recorded: bool) -> None:
        """Record the event of the hook that holds the token."""
        for item in tuple(self._queue):
            if isinstance(item, _DeferredEvent) and item.event is event:
                item.is_done = True
        if not is_recorded:
            self._recorded_for_hook = event
            self._record_now(event, published)

    def change_callbacks(
        self, update: Callable[[tuple[object, ...]], tuple[object, ...]], on_changed: Callable[[], None] | None = None
    ) -> None:
        """Change the callbacks from the next publish on, and then call ``on_changed``."""

        def apply_update() -> None:
            self.callbacks = update(self.callbacks)
            self._recompile()
            if on_changed is not None:
                on_changed()
            self.dispatches.discard_others(self.callbacks)

        if self._stack_reader.find_holder(inspect.currentframe()) is not None or not self._with_token(apply_update):
            self._queue.append(apply_update)

    def after_fork(self) -> None:
        """Mark the bus as the parent's, in a forked child."""
        if self.state == "open":
            self.state = "forked"
        self.dispatches.after_fork()
        self._tokens.clear()
        self._tokens.append(None)
        self._queue.clear()
        self.dispatches.retire_all()

    def _recompile(self) -> None:
        self.dispatches.retire_all()
        # While the bus is not open, no callbacks are compiled in and the inlined path is disabled: every event reaches
        # `_compile_dispatch`, which raises the reason.
        is_open = self.state == "open"
        compiled = self.dispatches.compile(
            HOT_EVENT, self.callbacks if is_open else (), hot=is_open, **self._template_globals(HOT_EVENT)
        )
        if not is_open:
            self.dispatches.retire_all()
        has_part_hooks = any(find_hook(each, Metrics) is not None for each in self.callbacks)
        # With hooks for parts, a mapping that nothing takes parts from.
        next_parts: NextParts = {} if self.recorder is None or has_part_hooks else self.recorder.next_parts
        if is_open:  # compile events of the end of a run now: it may end because of a lack of memory
            self.dispatches.dispatch_of.update({each: self._compile_dispatch(each) for each in RECORDED_BEFORE_HOOKS})
        self._set_publish(compiled.publish, next_parts)

    def _template_globals(self, event_type: type[Event]) -> dict[str, Any]:
        """Return what the compiled code needs from this object."""
        return {
            "tokens": self._tokens,
            "queue": self._queue,
            "contended": self._publish_slow,
            "settle": self._drain_queue,
            "dispatch_of": self.dispatches.dispatch_of,
            "failed": self._hook_failed,
            "before": self._before_event,
            "record": None if self.recorder is None else self.recorder.recorder_for(event_type),
            "record_first": self.recorder is not None and event_type in RECORDED_BEFORE_HOOKS,
        }

    # -- the publish in progress --------------------------------------------------------------------------------------

    def published_counts(self) -> dict[str, int]:
        """Return the exact number of published events by type."""
        counts = self.dispatches.published_counts()
        if self.recorder is not None and self.recorder.joined_parts:
            tag = event_tag(Metrics)
            counts[tag] = counts.get(tag, 0) + self.recorder.joined_parts
        return counts

    def is_publishing(self) -> bool:
        """Return whether some thread is inside a publish; cheap, and only a hint, since it may end at any moment."""
        return not self._tokens

    def enclosing_hook(self, frame: FrameType | None) -> HookStats | None:
        """Return the hook in which the code of this frame runs, if this bus called it."""
        while frame is not None and not frame.f_code.co_filename.startswith(FILENAME_PREFIX):
            frame = frame.f_back
        return self._stack_reader.hook_at(frame)  # the innermost hook; None if it is one of another bus

    def current_event(self, frame: FrameType | None) -> EventInfo | None:
        """Return the event whose hook runs in this frame or an outer one."""
        while frame is not None and not frame.f_code.co_filename.startswith(FILENAME_PREFIX):
            frame = frame.f_back
        compiled = None if frame is None else self.dispatches.by_filename.get(frame.f_code.co_filename)
        if frame is None or compiled is None:
            return None
        if self.recorder is None:
            return EventInfo(time.time())
        return self.recorder.event_info(compiled.event_time(), recorded=compiled.record_first)

    def were_hooks_called(self, error: BaseException) -> bool:
        """Return whether an error that a publish has raised came when it called hooks, or after that."""
        for frame, line in traceback.walk_tb(error.__traceback__):
            compiled = self.dispatches.find(frame.f_code.co_filename)
            if compiled is not None and line in compiled.lines_after_calls:
                return True
        return False

    def current_hook(self) -> HookCall[HookStats] | None:
        """Return the hook call in progress, for the watchdog."""
        if self._tokens:
            return None
        for frame, holder in self._stack_reader.find_holders():
            hook = self._stack_reader.hook_at(holder)
            compiled = self.dispatches.by_filename.get(holder.f_code.co_filename)
            if hook is not None and compiled is not None:
                return HookCall(hook, (compiled.filename, holder.f_lineno, compiled.count()), frame, holder)
        return None

    def report_blocked(self, blocked: BlockedHook[HookStats]) -> None:
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


def _noop() -> None:
    """Do nothing; for callers that only need the queue processed."""


def _not_an_event(given: type) -> EventError:
    return EventError(
        f"publish was given a {given.__name__}, which is no event",
        fix="publish one of the events of evsys_bus.events, or an instance of a subclass of evsys_bus.Event",
    )


_publishers: Final[WeakItems[Publisher]] = WeakItems()


def _after_fork() -> None:
    for publisher in list(_publishers):
        publisher.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
