"""`EventBus`: the object that a program enters, publishes to and leaves."""

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec

from evsys_bus.adapter import Adapter, EventInfo
from evsys_bus.bus.callback_marks import add_mark_callbacks
from evsys_bus.bus.delivery_manager import Couriers, DeliveryManager, placement_of
from evsys_bus.bus.handle import add_open_bus, find_bus, remove_open_bus
from evsys_bus.bus.health import Health
from evsys_bus.bus.lifecycle import (
    RUN_BOUNDARIES,
    BusLifecycle,
    CallbackCloser,
    OpenRuns,
    callbacks_to_close,
    check_threads_are_real,
    close_removed,
    shared_callbacks_lock,
    validate_seconds,
)
from evsys_bus.bus.publisher import Publisher
from evsys_bus.bus.recorder import EventRecorder, NextParts, rank_from_environment
from evsys_bus.bus.watchdog import Watchdog
from evsys_bus.callback import Callback, attach, callback_name, check_hooks, detach
from evsys_bus.codec.redact import Redaction, set_redaction
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError
from evsys_bus.events import Event, Metrics, StepEnd
from evsys_bus.journal import JournalWriter
from evsys_bus.location import local_path
from evsys_bus.sink import Sink
from evsys_bus.tasks import (
    CANCEL_GRACE_SECONDS,
    STOP_SECONDS,
    Deadline,
    DrainFuture,
    HookTaskAdopter,
    Job,
    LoopThread,
    Receipt,
    TaskCounts,
    TaskManager,
    UninterruptibleCall,
    preload_wait_imports,
    running_loop,
    wait_shielded,
)

if TYPE_CHECKING:
    from evsys_bus.front.resume import Resume
    from evsys_bus.front.run import Run

T = TypeVar("T")

_EXIT_THREAD_NAME: Final = "evsys-bus-exit"
_POLL_SECONDS: Final = 0.1
"""Interval of checks whether an interrupt has cut the deadline short."""
TEST_VARIABLE: Final = "EVSYS_BUS_TEST"
"""Set in the tests of a program: no process outlives them, and nothing about the machine is recorded."""
_DELIVERY_RESERVE_SECONDS: Final = 1.0
"""Part of the deadline reserved for the couriers while a failing disk is retried."""


class EventBus:
    """Calls callbacks in order, each isolated, waits for the tasks they start, and ends within one deadline.

    Enter it with ``async with`` if an event loop is running: spawned tasks run on that loop. Enter it with ``with`` in
    a program without one: they run on a thread of the bus. `publish`, `spawn`, `health` and `drain` work the same in
    both cases and may be called from any thread.

    Args:
        callbacks: Called in this order. Any object with hooks works; `Callback` declares all of them, with types.
        journal: A directory, or a `JournalWriter` that is not open yet. Every event is recorded there before `publish`
            returns, and survives the end of the process. None records nothing.
        sinks: Delivered to off the loop, from the journal, like followed callbacks (see `follow`). Without a journal,
            from a temporary one, which is not removed while anything is undelivered.
        couriers: Deliver to these adapters from a separate process, or from threads of this one.
        linger_seconds: How long the courier process may continue after the bus is closed or the program has died.
        rank: Which of several processes this is. Default: the rank set by the launcher, else 0.
        redact: Keys whose values are not recorded, in addition to those that look like credentials.
        reveal: Keys whose texts are recorded even if they look like credentials.
        drain_timeout: Seconds that leaving the block may take, for all tasks and deliveries. Tasks that are still
            running are then cancelled, and abandoned a second later; the receipt names them. Pending events stay in
            the journal.
        handle_signals: On SIGTERM, if the program has no handler of its own: leave the block as if cancelled, drain,
            and end by the signal. Only if the bus is entered on the main thread.
        blocked_hook_seconds: A hook that takes longer is logged, with its stack, while it blocks.
        publish_patience_seconds: How long a publish waits for that of another thread. After that its event is left to
            the other thread, in order, and counted as ``deferred``.
        max_running_tasks: How many spawned tasks run at a time.
        max_waiting_tasks: How many may wait for their turn; any more are refused, logged and counted.

    Raises:
        HookError: A callback has a hook that could never be called, or none at all.
        SettingError: A duration is out of range.

    Example:
        >>> from evsys_bus import Callback
        >>> class Loss(Callback):
        ...     def on_eval(self, state, step_idx, eval_name, metrics):
        ...         print(eval_name, metrics)
        >>> from evsys_bus import Eval
        >>> with EventBus([Loss()]) as bus:
        ...     bus.publish(Eval(None, 10, "val", {"acc": 0.9}))
        val {'acc': 0.9}
    """

    __slots__ = (  # so that `__dict__`, where each publish looks, holds the compiled `publish` alone
        *("__dict__", "__weakref__", "receipt", "row_merger", "runs", "_bare_tasks", "_closes_callbacks"),
        *("_compiled_publish", "_delivery_manager", "_drain_timeout", "_faults", "_journal", "_lifecycle"),
        *("_loop_thread", "_next_parts", "_open_runs", "_publisher", "_rank", "_recorder", "_redaction"),
        *("_shutdown", "_task_manager", "_watchdog"),
    )

    def __init__(
        self,
        callbacks: Iterable[object] = (),
        *,
        journal: JournalWriter | str | os.PathLike[str] | None = None,
        sinks: Iterable[Sink | Subscription] = (),
        couriers: Couriers = "process",
        linger_seconds: float = 30.0,
        rank: int | None = None,
        redact: Iterable[str] = (),
        reveal: Iterable[str] = (),
        drain_timeout: float = 20.0,
        handle_signals: bool = True,
        blocked_hook_seconds: float = 1.0,
        publish_patience_seconds: float = 1.0,
        max_running_tasks: int = 32,
        max_waiting_tasks: int = 10_000,
    ) -> None:
        self.receipt: Receipt | None = None
        self.runs: list[Run] = []
        """The open runs; see `run`."""
        self.row_merger: Any = None
        """Completes rows that a run has logged in parts."""
        self._shutdown: UninterruptibleCall[None] | None = None
        self._drain_timeout = validate_seconds("drain_timeout", drain_timeout)
        self._faults = FaultLog()
        self._rank = rank_from_environment() if rank is None else rank
        if journal is not None and not isinstance(journal, JournalWriter):
            journal = os.fspath(local_path(journal, "journal"))
        self._journal = journal
        self._recorder: EventRecorder | None = None
        self._redaction = Redaction.of(redact, reveal)
        linger_seconds = validate_seconds("linger_seconds", linger_seconds)
        if os.environ.get(TEST_VARIABLE):
            couriers, linger_seconds = "thread", 0.0
        self._delivery_manager = DeliveryManager(callbacks, sinks, couriers, linger_seconds, self._rank)
        self._publisher = Publisher(
            add_mark_callbacks(self._delivery_manager.inline, self._journal, self._rank),
            self._faults,
            patience_seconds=validate_seconds("publish_patience_seconds", publish_patience_seconds),
            set_publish=self._set_publish,
            before_event=self._before_event,
        )
        self._task_manager = TaskManager(
            self._get_loop, self._faults, max_running=max_running_tasks, max_waiting=max_waiting_tasks
        )
        self._bare_tasks = HookTaskAdopter(self._publisher.is_publishing, self._owner_at, self._task_manager.adopt)
        self._open_runs = OpenRuns()
        self._closes_callbacks = False  # set once no hook is called any more
        self._watchdog = Watchdog(
            self._publisher.current_hook,
            self._publisher.report_blocked,
            (
                self._publisher.dispatches.flush_samples,
                self._bare_tasks.check_task_factories,
                self._delivery_manager.run_checks,
            ),
            blocked_seconds=validate_seconds("blocked_hook_seconds", blocked_hook_seconds, minimum=0.01),
        )
        self._loop_thread = LoopThread()
        self._lifecycle = BusLifecycle(handles_signals=handle_signals)

    # -- what hooks and programs call ---------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Call the event's hook on every callback that has it, in order, and return when all have returned.

        Exceptions of a hook are logged and isolated; KeyboardInterrupt and SystemExit are raised here after the
        remaining hooks ran. An event published from inside a hook is dispatched after the current one, before the
        outermost publish returns. A subclass may override it; what hooks publish is passed to the override too.

        Raises:
            BusNotOpenError: The bus was not entered yet, or is closed.
            ForkedBusError: In a child process forked from the one that entered the bus.
            EventError: The argument is not an event.
            PublishLoopError: Hooks publish inside hooks without end.
        """
        self._compiled_publish(event)

    def publish_row(self, row: StepEnd, next_part: Metrics) -> None:
        """Publish a row and then the first part of the next one; both are recorded by one write if possible."""
        next_parts, key = self._next_parts, id(row)
        next_parts[key] = row, next_part
        try:
            self.publish(row)
        finally:
            is_recorded = next_parts.pop(key, None) is None
        if not is_recorded:
            self.publish(next_part)

    def record(self, event: Event) -> None:
        """Record an event without calling hooks, after a publish that Ctrl-C interrupted behind them."""
        self._publisher.record(event)

    def were_hooks_called(self, error: BaseException) -> bool:
        """Return whether an error that `publish` has raised came when it called hooks, or after that."""
        return self._publisher.were_hooks_called(error)

    @property
    def journal_writer(self) -> JournalWriter | None:
        """What writes the journal; None if nothing is recorded."""
        return None if self._recorder is None else self._recorder.writer

    @property
    def redaction(self) -> Redaction:
        """Which keys are redacted and revealed; for code that writes files of its own beside the journal."""
        return self._redaction

    @property
    def callbacks(self) -> tuple[object, ...]:
        """The callbacks, in the order in which they are called."""
        return self._publisher.callbacks

    @property
    def rank(self) -> int:
        """Which of several processes this is."""
        return self._rank

    def run(self, path: str | os.PathLike[str], *, resume: "Resume" = "auto", **options: Any) -> "Run":
        """Open one of several runs on this bus: ``with bus.run("runs/a", config=...) as run:``.

        Args:
            path: The run's directory; its last part is the name of the run.
            resume: As of `evsys_bus.run`, like the further options, from ``config`` to ``output``.

        Raises:
            TrainingError: The directory cannot be written or is in use, or ``resume`` forbids it.
        """
        from evsys_bus.front.open import open_run  # a floor above, so imported when it is called

        return open_run(self, path, resume=resume, **options)

    def add(self, callback: object) -> None:
        """Add a callback after the others; called from inside a hook, it takes effect with the next publish.

        It runs inline, even if its class is followed: adapters to deliver to are given to the bus at the start.

        Raises:
            HookError: It has a hook that could never be called.
        """
        check_hooks(callback)
        if isinstance(callback, Callback) and placement_of(callback) == "follow":
            fix = "give it to EventBus([...]), before the bus is entered"
            log().warning("callback.runs_inline", callback=callback_name(callback), why="it was added later", fix=fix)
        attach(callback, self)
        self._publisher.change_callbacks(lambda callbacks: (*callbacks, callback))

    def add_first(self, callback: object) -> None:
        """Add a callback before the others; see `add`."""
        check_hooks(callback)
        attach(callback, self)
        self._publisher.change_callbacks(lambda callbacks: (callback, *callbacks))

    def remove(self, callback: object) -> None:
        """Remove a callback; called from inside a hook, it takes effect with the next publish.

        A followed adapter still gets the events recorded until the bus is left; this is logged.
        """
        if self._delivery_manager.has_adapter(callback):
            why = "its events are recorded, and are delivered to it until the bus is left"
            log().warning("callback.still_followed", callback=callback_name(callback), why=why)
        dispatches = self._publisher.dispatches
        self._publisher.change_callbacks(
            lambda callbacks: tuple(each for each in callbacks if each is not callback),
            partial(close_removed, callback, self, dispatches.has_called, dispatches.count_failed_close),
        )

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, object]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        retry: Callable[..., Awaitable[object]] | None = None,
        lane: str | None = None,
        owner: str | None = None,
        background: bool = False,
    ) -> bool:
        """Run ``fn(*args)`` as a task beside the loop; see `Callback.spawn`.

        Raises:
            BusNotOpenError: The bus was not entered yet, or is closed.
            SpawnError: ``fn`` is not a coroutine function.
        """
        owner = owner or "program"
        job = Job(fn, args, owner=owner, name=name, timeout=timeout, retry=retry, lane=lane, background=background)
        if self._publisher.state != "open":
            raise BusNotOpenError(
                f"spawn on a bus that is {self._publisher.state}", fix="spawn inside the `with` block of the bus"
            )
        return self._task_manager.spawn(job)

    def drain(self, timeout: float | None = None) -> DrainFuture:
        """Wait for the tasks so far: ``await bus.drain()``, or ``bus.drain().result()`` on a thread without the loop.

        The bus stays open and nothing is cancelled; the receipt names tasks that have not ended after ``timeout``
        seconds (default: the bus's ``drain_timeout``). Cancelling the wait does not affect the tasks.
        """
        return self._task_manager.drain(self._drain_timeout if timeout is None else timeout, close=False)

    def health(self) -> Health:
        """Return all current counts."""
        tasks, by_owner = self._task_manager.counts()
        running, waiting = self._task_manager.count_running_and_waiting()
        return Health(
            state=self._publisher.state,
            published=self._publisher.published_counts(),
            hooks=self._publisher.dispatches.hook_health(),
            tasks=tasks,
            tasks_by_owner=by_owner,
            tasks_running=running,
            tasks_waiting=waiting,
            deferred=self._publisher.deferred,
            dropped=self._publisher.dropped,
            adoption=self._bare_tasks.state,
            journal=None if self._recorder is None else self._recorder.health(),
            deliveries=self._delivery_manager.deliveries(),
            couriers=self._delivery_manager.courier_locations(),
            without_hooks=self._publisher.without_hooks,
        )

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Record what an inline callback reports with `Adapter.report_owed`."""
        self._delivery_manager.report_owed(adapter, events, why, fix)

    def current_event(self) -> EventInfo | None:
        """Return the event whose hook is running on this thread, or None outside a hook."""
        return self._publisher.current_event(inspect.currentframe())

    def publishes_here(self) -> bool:
        """Return whether the calling code runs inside a hook that this bus called."""
        return self._owner_at(inspect.currentframe()) is not None

    def may_call_hooks(self) -> bool:
        """Return whether this bus is open in this process and has not started to close its callbacks."""
        return self._publisher.state == "open" and not self._closes_callbacks

    # -- entering and leaving -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._lifecycle.enter_from_task()
        preload_wait_imports()
        return self._enter()

    async def __aexit__(
        self, error_type: type[BaseException] | None = None, error: BaseException | None = None, _: object = None
    ) -> None:
        self._end_open_runs(error)
        if self._publisher.state == "forked" or not self._lifecycle.try_begin_exit():
            return
        deadline = Deadline(self._drain_timeout)
        try:
            cancelled = await self._exit_on_loop(deadline, error_type)
        except BaseException:  # Ctrl-C between two statements
            self._exit_blocking(deadline, immediately=True)
            raise
        finally:
            self._complete_exit()
        if cancelled is not None:
            raise asyncio.CancelledError if isinstance(cancelled, asyncio.CancelledError) else cancelled

    async def _exit_on_loop(self, deadline: Deadline, error_type: type[BaseException] | None) -> BaseException | None:
        """Leave without blocking the loop; return the cancellation or interrupt that arrived meanwhile, if any."""
        drain_future = self._task_manager.drain(self._drain_timeout, close=True)
        max_seconds = self._drain_timeout + CANCEL_GRACE_SECONDS + STOP_SECONDS
        cancelled = await wait_shielded(drain_future, seconds=max_seconds)
        self.receipt = drain_future.result() if drain_future.done() else self._task_manager.close_now()
        # Undelivered events are safe in the journal, so a second cancellation (Ctrl-C twice) ends the wait for them;
        # the first one may have ended the body of the block.
        interrupted = error_type is not None and issubclass(error_type, asyncio.CancelledError | KeyboardInterrupt)
        max_cancellations = 1 if cancelled or interrupted else 2
        self._shutdown = shutdown = UninterruptibleCall(partial(self._shut_down, deadline), _EXIT_THREAD_NAME)
        shutdown.start()
        cancelled_again = await wait_shielded(
            shutdown,
            max_cancellations=max_cancellations + 1,
            on_cancel=lambda count: deadline.cut_short() if count >= max_cancellations else None,
        )
        if not shutdown.done():
            self.receipt = self._delivery_manager.add_deliveries(self.receipt)
        return cancelled or cancelled_again

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a handle, which finds the open bus of the process that it lands in; see `find_bus`."""
        return find_bus, (os.getpid(), id(self))

    def __enter__(self) -> Self:
        return self._enter()

    def __exit__(self, _: object = None, error: BaseException | None = None, __: object = None) -> None:
        self._end_open_runs(error)
        max_seconds = self._drain_timeout + CANCEL_GRACE_SECONDS + STOP_SECONDS
        if self._publisher.state == "forked" or not self._lifecycle.try_begin_exit(max_seconds):
            return
        deadline = Deadline(self._drain_timeout)
        try:
            self._exit_blocking(deadline)
        except BaseException:  # Ctrl-C, possibly between two statements, before the work has started
            self._exit_blocking(deadline, immediately=True)
            raise
        finally:
            self._complete_exit()

    def _exit_blocking(self, deadline: Deadline, *, immediately: bool = False) -> None:
        """Leave by blocking this thread; if leaving has already started, wait for it."""
        if immediately:
            deadline.cut_short()
        # An event loop of this very thread (a notebook's) cannot run while we wait: its tasks are only listed.
        blocked_loop = self._lifecycle.loop or running_loop()
        shutdown = self._shutdown
        if shutdown is None:
            self._shutdown = shutdown = UninterruptibleCall(
                partial(self._drain_and_shut_down, deadline, blocked_loop), _EXIT_THREAD_NAME
            )
        shutdown.run(deadline.cut_short)

    def _end_open_runs(self, error: BaseException | None) -> None:
        """End the runs that the program has left open, by the error with which it leaves the bus."""
        for each in reversed(self.runs):
            self._run_step("runs", None, partial(each.end_implied, error))
        if self._publisher.state == "open":
            for event in self._open_runs.take_ends(error):
                self._run_step("runs", None, partial(self.publish, event))

    def _complete_exit(self) -> None:
        if self._shutdown is not None and self._shutdown.done():
            self._lifecycle.complete_exit()

    def _enter(self) -> Self:
        if self._publisher.state != "new":
            raise BusNotOpenError(
                "a bus is entered once; this one was entered before", fix="make an EventBus for each block"
            )
        check_threads_are_real()
        log()  # the first warning must not import structlog in the middle of a step
        opening = UninterruptibleCall(self._open_components, "evsys-bus-entry")
        try:
            opening.run(lambda: None)
            self._bare_tasks.adopt_on_running_loop()
            self._lifecycle.install_exit_handlers(self.__exit__)
            add_open_bus(self)
            return self  # noqa: TRY300 # an interrupt on this very line is undone too
        except BaseException as error:
            try:
                self._abort_enter(opening, error)
            except BaseException:  # Ctrl-C again, possibly between two statements, before the work has started
                self._abort_enter(opening, error)
                raise
            raise

    def _abort_enter(self, opening: "UninterruptibleCall[None]", error: BaseException) -> None:
        """Release everything that was opened."""
        self._publisher.entry_error = error
        if self._shutdown is None:
            self._shutdown = UninterruptibleCall(partial(self._undo_open, opening, running_loop()), _EXIT_THREAD_NAME)
        try:
            self._shutdown.run(lambda: None)
        finally:
            self._complete_exit()

    def _undo_open(self, opening: "UninterruptibleCall[None]", blocked_loop: asyncio.AbstractEventLoop | None) -> None:
        opening.cancel_or_wait()
        self._drain_timeout = 0.0
        if self._recorder is not None or self._publisher.state == "open":
            self._drain_and_shut_down(Deadline(0.0), blocked_loop)

    # -- on a separate thread, where no KeyboardInterrupt is raised ---------------------------------------------------

    def _open_components(self) -> None:
        if self._redaction != Redaction():
            set_redaction(self._redaction)
        journal = self._journal or (
            self._delivery_manager.create_temporary_journal() if self._delivery_manager else None
        )
        if journal is not None:
            self._recorder = EventRecorder.open(journal, self._rank, self._publisher.raise_later, self._redaction)
            self._delivery_manager.register(self._recorder.writer)
        for callback in self._publisher.callbacks:
            attach(callback, self)
        self._publisher.open(self._recorder)
        if self._recorder is not None:
            self._delivery_manager.start(
                self._recorder.last_sequences, self._task_manager, self._publisher.dispatches.hook_health
            )
        self._watchdog.start()

    def _drain_and_shut_down(self, deadline: Deadline, blocked_loop: asyncio.AbstractEventLoop | None) -> None:
        """Shut down without a loop to wait on; tasks of ``blocked_loop``, which cannot run, are only listed."""
        self.receipt = (
            self._task_manager.close_now()
            if self._lifecycle.loop is not None
            else self._drain_tasks(deadline, blocked_loop)
        )
        self._shut_down(deadline)

    def _drain_tasks(self, deadline: Deadline, blocked_loop: asyncio.AbstractEventLoop | None) -> Receipt:
        give_up_at = time.monotonic() + self._drain_timeout + CANCEL_GRACE_SECONDS
        try:
            drain_future = self._task_manager.drain(self._drain_timeout, close=True, stalled_loop=blocked_loop)
            while not deadline.is_cut_short and time.monotonic() < give_up_at:
                with suppress(TimeoutError):
                    return drain_future.result(_POLL_SECONDS)
        except Exception as error:  # isolated: the remaining steps must run
            self._faults.warn("bus.step_failed", "drain", error=error, step="drain")
        return self._task_manager.close_now()  # Ctrl-C, or a task blocks the thread that should drain

    def _shut_down(self, deadline: Deadline) -> None:
        """Stop taking events, record and deliver the remaining ones, and release everything; the tasks have ended."""
        started_at = time.monotonic()
        receipt = self.receipt or Receipt(TaskCounts(), {})
        self._run_step("publisher", None, partial(self._publisher.close, deadline))
        if self._recorder is not None:
            reserve_seconds = _DELIVERY_RESERVE_SECONDS if self._delivery_manager else 0.0
            close = partial(self._recorder.close, receipt, deadline, reserve_seconds)
            receipt = self._run_step("journal", receipt, close)
        dropped, without_hooks = self._publisher.dropped, self._publisher.without_hooks
        receipt = msgspec.structs.replace(receipt, dropped=dropped, without_hooks=without_hooks)
        self.receipt = receipt
        receipt = self._run_step("couriers", receipt, partial(self._finish_deliveries, receipt, deadline))
        self._run_step("tasks", None, self._task_manager.cancel_background)
        # Do not wait again for a task that blocks the loop's thread.
        join_seconds = (
            0.0 if receipt.unfinished and deadline.remaining() == 0.0 and not deadline.is_cut_short else STOP_SECONDS
        )
        self._run_step(
            "loop", None, partial(self._loop_thread.stop, join_seconds, self._task_manager.wait_for_background)
        )
        total, by_owner = self._task_manager.counts()  # inline deliveries are tasks too
        seconds = receipt.seconds + time.monotonic() - started_at
        self.receipt = msgspec.structs.replace(receipt, tasks=total, tasks_by_owner=by_owner, seconds=seconds)
        self._run_step("watchdog", None, self._watchdog.stop)
        self._run_step("tasks", None, self._bare_tasks.close)
        remove_open_bus(self)
        for callback in self._publisher.callbacks:
            self._run_step("callbacks", None, partial(detach, callback, self))
        self._faults.flush()

    def _run_step(self, name: str, default: T, action: Callable[[], T]) -> T:
        """Run one step of the shutdown; an exception is logged, and the next step follows."""
        try:
            return action()
        except Exception as error:  # isolated: the next step must run
            self._faults.warn("bus.step_failed", name, error=error, step=name)
            return default

    def _finish_deliveries(self, receipt: Receipt, deadline: Deadline) -> Receipt:
        with shared_callbacks_lock:
            self._closes_callbacks = True
            closing_callbacks = callbacks_to_close(
                self._publisher.callbacks, self, self._publisher.dispatches.has_called
            )
        if not (self._delivery_manager or closing_callbacks or self._delivery_manager.has_unconfirmed):
            return receipt
        loop = self._lifecycle.loop
        if loop is None and (closing_callbacks or self._delivery_manager.has_loop_couriers):
            loop = self._loop_thread.loop()
        loop = loop if loop is not None and loop.is_running() else None
        return self._delivery_manager.finish(
            receipt,
            deadline,
            CallbackCloser(closing_callbacks, loop, self._publisher.dispatches.count_failed_close),
            is_loop_running=loop is not None,
        )

    # -- what the components need -------------------------------------------------------------------------------------

    def _set_publish(self, publish: Callable[[Event], None], next_parts: NextParts) -> None:
        self._compiled_publish, self._next_parts = publish, next_parts
        if type(self).publish is EventBus.publish:  # not overridden: spare each event the frame of the method
            self.publish = publish  # pyright: ignore[reportAttributeAccessIssue] # a function where a method was
        else:
            self._next_parts = {}  # each part is passed to the override

    def _before_event(self, event: Event) -> None:
        self._bare_tasks.adopt_on_running_loop()  # this thread may run a new event loop
        if type(event) in RUN_BOUNDARIES:
            self._open_runs.note(event)

    def _get_loop(self) -> asyncio.AbstractEventLoop:
        return self._lifecycle.loop or self._loop_thread.loop()

    def _owner_at(self, frame: FrameType | None) -> str | None:
        stats = self._publisher.enclosing_hook(frame)
        return None if stats is None else stats.owner
