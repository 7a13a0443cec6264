"""`EventBus`: what a program enters, publishes to, and leaves with everything done."""

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from evsys_bus.bus.adoption import BareTasks
from evsys_bus.bus.entrance import Entrance
from evsys_bus.bus.following import Couriers, Following, tell_if_half_used
from evsys_bus.bus.health import Health, health_of
from evsys_bus.bus.limits import seconds
from evsys_bus.bus.publisher import Publisher
from evsys_bus.bus.recording import Recording, rank_of
from evsys_bus.callback import attach, check_hooks, detach
from evsys_bus.delivery.followed import Followed
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError
from evsys_bus.events import Event
from evsys_bus.journal import JournalWriter
from evsys_bus.sink import Sink
from evsys_bus.tasks import (
    CANCEL_GRACE_SECONDS,
    STOP_SECONDS,
    Draining,
    Job,
    LoopThread,
    Receipt,
    TaskOffice,
    running_loop,
    wait_shielded,
)
from evsys_bus.watchdog import Watchdog


class EventBus:
    """Callbacks in their order, each isolated; tasks that are waited for; one deadline at the end.

    Enter it with ``async with`` where an event loop runs: spawned tasks run on that loop. Enter it with ``with`` in a
    program without one: they run on a thread of the bus's own. `publish`, `spawn`, `health` and `drain` are the same in
    both, and may be called from any thread.

    Args:
        callbacks: Called in this order. Any object with hooks will do; `Callback` has them all, typed.
        journal: A directory, or a `JournalWriter` that is not open yet: every event is on record there before `publish`
            returns, and survives the end of the process. None records nothing.
        sinks: Delivered to off the loop, from the journal, like what is followed among the callbacks (see `follow`);
            without one, from a temporary journal, which stays while anything is undelivered.
        couriers: Where those are delivered to: by a process of its own, or by threads of this one.
        linger_seconds: How long the courier process may go on once the bus is closed, or the program dead.
        rank: Which of several processes this is. Default: what the launcher says, else 0.
        redact: Keys whose text is kept out of the journal in configs, besides those that look like a credential's.
        drain_timeout: Seconds that leaving the block may take, over all tasks and deliveries. Tasks still at work are
            cancelled then, and left, named in the receipt, a second later; what is pending stays in the journal.
        handle_signals: On SIGTERM, where the program has no handler of its own: leave the block as if cancelled, drain,
            and end by the signal. Only where the bus is entered on the main thread.
        blocked_hook_seconds: A hook that lasts longer is named, with its stack, while it blocks.
        publish_patience_seconds: How long a publish waits for another thread's; after that its event is left to that
            thread, in order, and counted as ``handed_over``.
        max_running_tasks: How many spawned tasks run at a time.
        max_waiting_tasks: How many wait for their turn; one more is refused, logged and counted.

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
            """Call the event's hook on every callback that has it, in order; return when they have returned.

            What a hook raises is logged and isolated; KeyboardInterrupt and SystemExit are raised here after the
            remaining hooks ran. Published from inside a hook, the event runs after the current one, before the
            outermost publish returns.

            Raises:
                BusNotOpenError: The bus was not entered yet, or is closed.
                ForkedBusError: In a child process forked from the one that entered the bus.
                EventError: That is no event.
                PublishLoopError: In a hook, if hooks publish inside hooks without end.
            """

    else:
        # Attribute look-up in slots is what `publish` costs least with.
        __slots__ = (  # sorted by what they are
            *(
                "__weakref__",
                "publish",
                "receipt",
                "_bare_tasks",
                "_drain_timeout",
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
        self._drain_timeout = seconds("drain_timeout", drain_timeout)
        self._faults = FaultLog()
        self._rank = rank_of() if rank is None else rank
        self._journal = journal
        self._recording: Recording | None = None
        self._redact = frozenset(key.lower() for key in redact)
        self._following = Following(callbacks, sinks, couriers, seconds("linger_seconds", linger_seconds))
        self._publisher = Publisher(
            self._following.inline,
            self._faults,
            patience_seconds=seconds("publish_patience_seconds", publish_patience_seconds),
            expose=self._expose,
            before=lambda _: self._bare_tasks.begin_here(),  # the thread it comes from may run a loop that is new
        )
        self._office = TaskOffice(
            self._loop, self._faults, max_running=max_running_tasks, max_waiting=max_waiting_tasks
        )
        self._bare_tasks = BareTasks(self._publisher.publishing, self._owner_around, self._office.adopt)
        self._watchdog = Watchdog(
            self._publisher.look,
            self._publisher.tell_blocked,
            self._look_after,
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
        """Call this callback too, after the others; from inside a hook: from the next publish on.

        Raises:
            HookError: It has a hook that could never be called.
        """
        check_hooks(callback)
        tell_if_half_used(callback)
        attach(callback, self)
        self._publisher.change(lambda callbacks: (*callbacks, callback))

    def remove(self, callback: object) -> None:
        """Call this callback no more; from inside a hook: from the next publish on."""
        self._publisher.change(
            lambda callbacks: tuple(each for each in callbacks if each is not callback), partial(detach, callback, self)
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
    ) -> bool:
        """Run ``fn(*args)`` beside the loop; see `Callback.spawn`. Any: the arguments are those of ``fn``.

        Raises:
            BusNotOpenError: The bus was not entered yet, or is closed.
            SpawnError: ``fn`` is no coroutine function.
        """
        job = Job(fn, args, owner=owner or "program", name=name, timeout=timeout, retry=retry, lane=lane)
        if self._publisher.state != "open":
            raise BusNotOpenError(
                f"spawn on a bus that is {self._publisher.state}", fix="spawn inside the `with` block of the bus"
            )
        return self._office.spawn(job)

    def drain(self, timeout: float | None = None) -> Draining:
        """Wait for the tasks so far: ``await bus.drain()``, or ``bus.drain().result()`` on a thread without the loop.

        The bus stays open and nothing is cancelled; what has not ended after ``timeout`` seconds (default: the bus's
        ``drain_timeout``) is named in the receipt. Cancelling the wait leaves the tasks alone.
        """
        return self._office.drain(self._drain_timeout if timeout is None else timeout, close=False)

    def health(self) -> Health:
        """Every count, now."""
        return health_of(self._publisher, self._office, self._bare_tasks.state, self._recording, self._following)

    def publishes_here(self) -> bool:
        """Whether the code that calls this runs inside a hook that this bus called."""
        return self._owner_around(inspect.currentframe()) is not None

    # -- entering and leaving -----------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._entrance.by_task()
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._publisher.state == "forked" or not self._entrance.leaves_here():
            return
        self.receipt, cancelled = await wait_shielded(self._office.drain(self._drain_timeout, close=True))
        delivering = self._then_deliver(self.receipt)
        if delivering is not None:
            # What is not delivered is safe, so a second cancellation (Ctrl-C twice) ends the wait for it.
            told = partial(self._following.told, self.receipt)
            self.receipt, again = await wait_shielded(delivering, most=1 if cancelled else 2, else_=told)
            cancelled = cancelled or again
        self._close()
        if cancelled:
            raise asyncio.CancelledError

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        longest = self._drain_timeout + CANCEL_GRACE_SECONDS + STOP_SECONDS
        if self._publisher.state == "forked" or not self._entrance.leaves_here(longest):
            return
        join_seconds = STOP_SECONDS
        try:
            # A loop that runs on this very thread (a notebook's) cannot turn while we wait: its tasks are only named.
            if self._entrance.loop is not None:  # the program ends, and its loop turns no more
                self._office.close_now()
            draining = self._office.drain(
                self._drain_timeout, close=True, stalled=self._entrance.loop or running_loop()
            )
            self.receipt = draining.result(self._drain_timeout + CANCEL_GRACE_SECONDS)
        except TimeoutError:  # a task blocks the thread that should drain
            self.receipt = self._office.close_now()
            join_seconds = 0.0
        except BaseException:  # Ctrl-C, while draining
            self.receipt = self._office.close_now()
            self._drain_timeout = 0.0
            raise
        finally:
            self._thread.stop(join_seconds)
            try:
                if self.receipt is not None and (delivering := self._then_deliver(self.receipt)) is not None:
                    self.receipt = self._following.told(self.receipt)  # what stands if Ctrl-C ends the wait
                    self.receipt = delivering.result()
            finally:
                self._close()

    def _open(self) -> None:
        if self._publisher.state != "new":
            raise BusNotOpenError(
                "a bus is entered once; this one was entered before", fix="make an EventBus for each block"
            )
        log()  # the first warning must not import structlog in the middle of a step
        journal = self._journal or (self._following.temporary_journal() if self._following else None)
        if journal is not None:
            self._recording = Recording.open(journal, self._rank, self._publisher.raise_later, self._redact)
        for callback in self._publisher.callbacks:
            attach(callback, self)
        self._publisher.open(self._recording)
        if self._recording is not None:
            self._following.start(self._recording.writer.directory, self._rank, self._recording.last)
        self._bare_tasks.begin_here()
        self._watchdog.start()
        self._entrance.listen(self.__exit__)

    def _then_deliver(self, receipt: Receipt) -> Draining | None:
        """The tasks are done: publish no more, and have what is recorded delivered, in what is left of the deadline."""
        if self._publisher.state == "closed":
            return None
        self._publisher.close()
        if self._recording is not None:
            self.receipt = receipt = self._recording.close(receipt, self._drain_timeout)
        left = max(0.0, self._drain_timeout - receipt.seconds)
        return self._following.finish(receipt, left) if self._following else None

    def _close(self) -> None:
        self._publisher.close()
        self._watchdog.stop()
        self._bare_tasks.end()
        for callback in self._publisher.callbacks:
            detach(callback, self)
        self._faults.flush()
        self._entrance.close()

    # -- what the parts need ------------------------------------------------------------------------------------------

    def _expose(self, publish: Callable[[Event], None]) -> None:
        self.publish = publish  # pyright: ignore[reportAttributeAccessIssue] # declared as a method for those who read it

    def _loop(self) -> asyncio.AbstractEventLoop:
        return self._entrance.loop or self._thread.loop()

    def _owner_around(self, frame: FrameType | None) -> str | None:
        account = self._publisher.hook_around(frame)
        return None if account is None else account.owner

    def _look_after(self) -> None:
        """Between two looks of the watchdog, off every thread that matters."""
        self._publisher.units.fold()
        self._bare_tasks.look_after()
        self._following.look_after()
