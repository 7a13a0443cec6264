"""`EventBus`: the object that a program enters, publishes to and leaves."""

import asyncio
import inspect
import os
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec

from evsys_bus.attached import Adapter, EventInfo
from evsys_bus.bus.callback_marks import with_marks
from evsys_bus.bus.closing import Closing, close_callback, wants_closing
from evsys_bus.bus.entrance import Entrance
from evsys_bus.bus.following import Couriers, Following, placement_of
from evsys_bus.bus.health import Health, health_of
from evsys_bus.bus.limits import seconds
from evsys_bus.bus.publisher import Publisher
from evsys_bus.bus.recording import Recording, rank_of
from evsys_bus.callback import Callback, attach, callback_name, check_hooks, detach
from evsys_bus.delivery.followed import Followed
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError, SettingError
from evsys_bus.events import Event
from evsys_bus.journal import JournalWriter
from evsys_bus.sink import Sink
from evsys_bus.tasks import (
    CANCEL_GRACE_SECONDS,
    STOP_SECONDS,
    BareTasks,
    Deadline,
    Draining,
    Job,
    LoopThread,
    Receipt,
    TaskCounts,
    TaskOffice,
    Uninterrupted,
    prepare_to_wait,
    running_loop,
    wait_shielded,
)
from evsys_bus.watchdog import Watchdog
from evsys_bus.where import local_path

T = TypeVar("T")

_EXIT_THREAD: Final = "evsys-bus-exit"
_LOOK_SECONDS: Final = 0.1
"""Interval of checks whether an interrupt has cut the deadline short."""
_DELIVERY_SECONDS: Final = 1.0
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
            from a temporary one, which is kept while anything is undelivered.
        couriers: Deliver to these adapters from a separate process, or from threads of this one.
        linger_seconds: How long the courier process may continue after the bus is closed or the program has died.
        rank: Which of several processes this is. Default: the rank set by the launcher, else 0.
        redact: Config keys whose text is not recorded, in addition to those that look like credentials.
        drain_timeout: Seconds that leaving the block may take, for all tasks and deliveries. Tasks that are still
            running are then cancelled, and abandoned a second later; the receipt names them. Pending events stay in
            the journal.
        handle_signals: On SIGTERM, if the program has no handler of its own: leave the block as if cancelled, drain,
            and end by the signal. Only if the bus is entered on the main thread.
        blocked_hook_seconds: A hook that takes longer is logged, with its stack, while it blocks.
        publish_patience_seconds: How long a publish waits for that of another thread. After that its event is left to
            the other thread, in order, and counted as ``handed_over``.
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

    if TYPE_CHECKING:

        def publish(self, event: Event) -> None:
            """Call the event's hook on every callback that has it, in order, and return when all have returned.

            Exceptions of a hook are logged and isolated; KeyboardInterrupt and SystemExit are raised here after the
            remaining hooks ran. An event published from inside a hook is dispatched after the current one, before
            the outermost publish returns.

            Raises:
                BusNotOpenError: The bus was not entered yet, or is closed.
                ForkedBusError: In a child process forked from the one that entered the bus.
                EventError: The argument is not an event.
                PublishLoopError: Hooks publish inside hooks without end.
            """

    else:
        # Slots make the attribute lookup of `publish` fastest.
        __slots__ = (  # sorted by what they are
            *(
                "__weakref__",
                "publish",
                "receipt",
                "_bare_tasks",
                "_drain_timeout",
                "_ending",
                "_entrance",
                "_faults",
                "_following",
            ),
            *("_journal", "_office", "_publisher", "_rank", "_recording", "_redact", "_thread", "_watchdog"),
        )

    def __init__(
        self,
        callbacks: Iterable[object] = (),
        *,
        journal: JournalWriter | str | os.PathLike[str] | None = None,
        sinks: Iterable[Sink | Followed] = (),
        couriers: Couriers = "process",
        linger_seconds: float = 30.0,
        rank: int | None = None,
        redact: Iterable[str] = (),
        drain_timeout: float = 20.0,
        handle_signals: bool = True,
        blocked_hook_seconds: float = 1.0,
        publish_patience_seconds: float = 1.0,
        max_running_tasks: int = 32,
        max_waiting_tasks: int = 10_000,
    ) -> None:
        self.receipt: Receipt | None = None
        self._ending: Uninterrupted[None] | None = None
        self._drain_timeout = seconds("drain_timeout", drain_timeout)
        self._faults = FaultLog()
        self._rank = rank_of() if rank is None else rank
        if journal is not None and not isinstance(journal, JournalWriter):
            journal = os.fspath(local_path(journal, "journal"))
        self._journal = journal
        self._recording: Recording | None = None
        self._redact = frozenset(key.lower() for key in redact)
        self._following = Following(callbacks, sinks, couriers, seconds("linger_seconds", linger_seconds), self._rank)
        self._publisher = Publisher(
            with_marks(self._following.inline, self._journal, self._rank),
            self._faults,
            patience_seconds=seconds("publish_patience_seconds", publish_patience_seconds),
            expose=self._expose,
            before=lambda _: self._bare_tasks.begin_here(),  # its thread may run a new event loop
        )
        self._office = TaskOffice(
            self._loop, self._faults, max_running=max_running_tasks, max_waiting=max_waiting_tasks
        )
        self._bare_tasks = BareTasks(self._publisher.publishing, self._owner_around, self._office.adopt)
        self._watchdog = Watchdog(
            self._publisher.look,
            self._publisher.tell_blocked,
            (self._publisher.units.fold, self._bare_tasks.look_after, self._following.look_after),
            blocked_seconds=seconds("blocked_hook_seconds", blocked_hook_seconds, least=0.01),
        )
        self._thread = LoopThread()
        self._entrance = Entrance(handles_signals=handle_signals)

    # -- what hooks and programs call ---------------------------------------------------------------------------------

    @property
    def callbacks(self) -> tuple[object, ...]:
        """The callbacks, in the order in which they are called."""
        return self._publisher.callbacks

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
        self._publisher.change(lambda callbacks: (*callbacks, callback))

    def remove(self, callback: object) -> None:
        """Remove a callback; called from inside a hook, it takes effect with the next publish.

        A followed adapter still gets the events recorded until the bus is left; this is logged.
        """
        if self._following.delivers_to(callback):
            why = "its events are recorded, and are delivered to it until the bus is left"
            log().warning("callback.still_followed", callback=callback_name(callback), why=why)
        self._publisher.change(
            lambda callbacks: tuple(each for each in callbacks if each is not callback), partial(self._let_go, callback)
        )

    def _let_go(self, callback: object) -> None:
        if self._publisher.units.called(callback):
            close_callback(callback, self._publisher.units.close_failed)
        detach(callback, self)

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
        return self._office.spawn(job)

    def drain(self, timeout: float | None = None) -> Draining:
        """Wait for the tasks so far: ``await bus.drain()``, or ``bus.drain().result()`` on a thread without the loop.

        The bus stays open and nothing is cancelled; the receipt names tasks that have not ended after ``timeout``
        seconds (default: the bus's ``drain_timeout``). Cancelling the wait does not affect the tasks.
        """
        return self._office.drain(self._drain_timeout if timeout is None else timeout, close=False)

    def health(self) -> Health:
        """Return all current counts."""
        return health_of(self._publisher, self._office, self._bare_tasks.state, self._recording, self._following)

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Record what an inline callback reports with `Adapter.report_owed`."""
        self._following.report_owed(adapter, events, why, fix)

    def current_event(self) -> EventInfo | None:
        """Return the event whose hook is running on this thread, or None outside a hook."""
        return self._publisher.current_event(inspect.currentframe())

    def publishes_here(self) -> bool:
        """Return whether the calling code runs inside a hook that this bus called."""
        return self._owner_around(inspect.currentframe()) is not None

    # -- entering and leaving -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._entrance.by_task()
        prepare_to_wait()
        return self._open()

    async def __aexit__(self, *_: object) -> None:
        if self._publisher.state == "forked" or not self._entrance.leaves_here():
            return
        deadline = Deadline(self._drain_timeout)
        try:
            cancelled = await self._leave_on_loop(deadline)
        except BaseException:  # Ctrl-C between two statements
            self._leave(deadline, in_haste=True)
            raise
        finally:
            self._close_entrance()
        if cancelled is not None:
            raise asyncio.CancelledError if isinstance(cancelled, asyncio.CancelledError) else cancelled

    async def _leave_on_loop(self, deadline: Deadline) -> BaseException | None:
        """Leave without blocking the loop; return the cancellation or interrupt that arrived meanwhile, if any."""
        draining = self._office.drain(self._drain_timeout, close=True)
        longest = self._drain_timeout + CANCEL_GRACE_SECONDS + STOP_SECONDS
        cancelled = await wait_shielded(draining, seconds=longest)
        self.receipt = draining.result() if draining.done() else self._office.close_now()
        # Undelivered events are safe in the journal, so a second cancellation (Ctrl-C twice) ends the wait for them.
        most = 1 if cancelled else 2
        self._ending = ending = Uninterrupted(partial(self._end, deadline), _EXIT_THREAD)
        ending.start()
        again = await wait_shielded(
            ending, most=most + 1, on_cancel=lambda count: deadline.cut() if count >= most else None
        )
        if not ending.done():
            self.receipt = self._following.told(self.receipt)
        return cancelled or again

    def __enter__(self) -> Self:
        return self._open()

    def __exit__(self, *_: object) -> None:
        longest = self._drain_timeout + CANCEL_GRACE_SECONDS + STOP_SECONDS
        if self._publisher.state == "forked" or not self._entrance.leaves_here(longest):
            return
        deadline = Deadline(self._drain_timeout)
        try:
            self._leave(deadline)
        except BaseException:  # Ctrl-C, possibly between two statements, before the work has started
            self._leave(deadline, in_haste=True)
            raise
        finally:
            self._close_entrance()

    def _leave(self, deadline: Deadline, *, in_haste: bool = False) -> None:
        """Leave by blocking this thread; if leaving has already started, wait for it."""
        if in_haste:
            deadline.cut()
        # An event loop of this very thread (a notebook's) cannot run while we wait: its tasks are only listed.
        stalled = self._entrance.loop or running_loop()
        ending = self._ending
        if ending is None:
            self._ending = ending = Uninterrupted(partial(self._drain_and_end, deadline, stalled), _EXIT_THREAD)
        ending.do(deadline.cut)

    def _close_entrance(self) -> None:
        if self._ending is not None and self._ending.done():
            self._entrance.close()

    def _open(self) -> Self:
        if self._publisher.state != "new":
            raise BusNotOpenError(
                "a bus is entered once; this one was entered before", fix="make an EventBus for each block"
            )
        _check_threads()
        log()  # the first warning must not import structlog in the middle of a step
        opening = Uninterrupted(self._open_parts, "evsys-bus-entry")
        try:
            opening.do(_nothing)
            self._bare_tasks.begin_here()
            self._entrance.listen(self.__exit__)
            return self  # noqa: TRY300 # an interrupt on this very line is undone too
        except BaseException as error:
            try:
                self._leave_half_entered(opening, error)
            except BaseException:  # Ctrl-C again, possibly between two statements, before the work has started
                self._leave_half_entered(opening, error)
                raise
            raise

    def _leave_half_entered(self, opening: "Uninterrupted[None]", error: BaseException) -> None:
        """Release everything that was opened."""
        self._publisher.entry_error = error
        if self._ending is None:
            self._ending = Uninterrupted(partial(self._undo_opening, opening, running_loop()), _EXIT_THREAD)
        try:
            self._ending.do(_nothing)
        finally:
            self._close_entrance()

    def _undo_opening(self, opening: "Uninterrupted[None]", stalled: asyncio.AbstractEventLoop | None) -> None:
        opening.withdraw()
        self._drain_timeout = 0.0
        if self._recording is not None or self._publisher.state == "open":
            self._drain_and_end(Deadline(0.0), stalled)

    # -- on a separate thread, where no KeyboardInterrupt is raised ---------------------------------------------------

    def _open_parts(self) -> None:
        self._open_journal()
        for callback in self._publisher.callbacks:
            attach(callback, self)
        self._publisher.open(self._recording)
        if self._recording is not None:
            self._following.start(self._recording.last, self._office)
        self._watchdog.start()

    def _open_journal(self) -> None:
        journal = self._journal or (self._following.temporary_journal() if self._following else None)
        if journal is not None:
            self._recording = Recording.open(journal, self._rank, self._publisher.raise_later, self._redact)
            self._following.register(self._recording.writer)

    def _drain_and_end(self, deadline: Deadline, stalled: asyncio.AbstractEventLoop | None) -> None:
        """Shut down without a loop to wait on; tasks of the ``stalled`` loop, which cannot run, are only listed."""
        self.receipt = self._office.close_now() if self._entrance.loop is not None else self._drained(deadline, stalled)
        self._end(deadline)

    def _drained(self, deadline: Deadline, stalled: asyncio.AbstractEventLoop | None) -> Receipt:
        until = time.monotonic() + self._drain_timeout + CANCEL_GRACE_SECONDS
        try:
            draining = self._office.drain(self._drain_timeout, close=True, stalled=stalled)
            while not deadline.is_cut and time.monotonic() < until:
                with suppress(TimeoutError):
                    return draining.result(_LOOK_SECONDS)
        except Exception as error:  # isolated: the remaining steps must run
            self._faults.warn("bus.step_failed", "drain", error=error, step="drain")
        return self._office.close_now()  # Ctrl-C, or a task blocks the thread that should drain

    def _end(self, deadline: Deadline) -> None:
        """Stop taking events, record and deliver the remaining ones, and release everything; the tasks have ended."""
        began = time.monotonic()
        receipt = self.receipt or Receipt(TaskCounts(), {})
        self._step("publisher", None, partial(self._publisher.close, deadline))
        if self._recording is not None:
            spare = _DELIVERY_SECONDS if self._following else 0.0
            close = partial(self._recording.close, receipt, deadline, spare)
            receipt = self._step("journal", receipt, close)
        refused, without_hooks = self._publisher.refused, self._publisher.without_hooks
        receipt = msgspec.structs.replace(receipt, refused=refused, without_hooks=without_hooks)
        self.receipt = receipt
        receipt = self._step("couriers", receipt, partial(self._deliver, receipt, deadline))
        self._step("tasks", None, self._office.end_background)
        # Do not wait again for a task that blocks the loop's thread.
        join_seconds = 0.0 if receipt.left and deadline.left() == 0.0 and not deadline.is_cut else STOP_SECONDS
        self._step("loop", None, partial(self._thread.stop, join_seconds, self._office.background_ended))
        total, by_owner = self._office.counts()  # inline deliveries are tasks too
        seconds = receipt.seconds + time.monotonic() - began
        self.receipt = msgspec.structs.replace(receipt, total=total, tasks_by_owner=by_owner, seconds=seconds)
        self._step("watchdog", None, self._watchdog.stop)
        self._step("tasks", None, self._bare_tasks.end)
        for callback in self._publisher.callbacks:
            self._step("callbacks", None, partial(detach, callback, self))
        self._faults.flush()

    def _step(self, name: str, otherwise: T, act: Callable[[], T]) -> T:
        """Run one step of the shutdown; an exception is logged, and the next step follows."""
        try:
            return act()
        except Exception as error:  # isolated: the next step must run
            self._faults.warn("bus.step_failed", name, error=error, step=name)
            return otherwise

    def _deliver(self, receipt: Receipt, deadline: Deadline) -> Receipt:
        called = self._publisher.units.called
        closing = [each for each in self._publisher.callbacks if wants_closing(each) and called(each)]
        if not (self._following or closing or self._following.owes):
            return receipt
        loop = self._entrance.loop
        if loop is None and (closing or self._following.uses_loop):
            loop = self._thread.loop()
        loop = loop if loop is not None and loop.is_running() else None
        return self._following.finish(
            receipt, deadline, Closing(closing, loop, self._publisher.units.close_failed), loop_runs=loop is not None
        )

    # -- what the components need -------------------------------------------------------------------------------------

    def _expose(self, publish: Callable[[Event], None]) -> None:
        self.publish = publish  # pyright: ignore[reportAttributeAccessIssue] # declared as a method for readers

    def _loop(self) -> asyncio.AbstractEventLoop:
        return self._entrance.loop or self._thread.loop()

    def _owner_around(self, frame: FrameType | None) -> str | None:
        account = self._publisher.hook_around(frame)
        return None if account is None else account.owner


def _nothing() -> None:
    """Ignore the interrupt: nothing here can be cut short."""


def _check_threads() -> None:
    """Refuse green threads, as gevent's monkey patch installs them: they would wait for each other forever."""
    patch = sys.modules.get("gevent.monkey")
    if patch is not None and patch.is_module_patched("threading"):
        raise SettingError(
            "gevent has replaced the threads of this process, and a bus needs real ones",
            why="its event loop and its deadlines run on threads beside the program's",
            fix="do not patch them: gevent.monkey.patch_all(thread=False, threading=False)",
        )
