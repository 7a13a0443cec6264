"""`Crew`: the couriers of one process, each on an event loop of its own, so that none can block another."""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Final, Literal

import anyio

from evsys_bus.callback import Callback
from evsys_bus.codec import encode
from evsys_bus.delivery.accounts import Accounts
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.followed import Followed, Recipe
from evsys_bus.delivery.own_folder import own_folder
from evsys_bus.delivery.roster import enlist
from evsys_bus.delivery.states import is_held, write_state_of_idle
from evsys_bus.delivery.turns import SHORT_TURNS
from evsys_bus.diagnostics import FaultLog, current_adapter
from evsys_bus.errors import CourierBusyError, EvsysBusError
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import Clock, Disk, JournalWriter, OsClock, OsDisk
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus, Job, LoopThread, TaskOffice

BUSY_SECONDS: Final = 0.5
"""Pause before retrying to acquire a lock that another process holds."""

INSTANT_SECONDS: Final = 0.02
"""The same before the first retry."""

Build = Callable[[Recipe], Callback | Sink]


class Crew:
    """Runs one courier for each adapter, each on its own thread.

    Args:
        directory: The journal.
        followed: The adapters.
        build: Builds an adapter from its recipe; called on the adapter's own thread.
        slice_seconds: How long a courier may work before it sleeps to let other threads of the process run; None if
            the process has no other work.
        office: Runs the couriers as its tasks on its own loop; None gives each a thread.
        poll_seconds: How often the journal is read.
        again_seconds: Pause before a failed delivery is restarted.
        log_path: Path of this process's log, if it has one of its own.
        clock: The clocks.
        disk: The file system.
    """

    def __init__(
        self,
        directory: str,
        followed: Sequence[Followed],
        build: Build,
        *,
        slice_seconds: float | None = None,
        office: TaskOffice | None = None,
        poll_seconds: float = 0.02,
        again_seconds: float = 5.0,
        log_path: str | None = None,
        clock: Clock | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._directory = directory
        self._build = build
        self._slice_seconds = slice_seconds
        self._poll_seconds = poll_seconds
        self._again_seconds = again_seconds
        self._log_path = log_path
        self._clock = OsClock() if clock is None else clock
        self._disk = OsDisk() if disk is None else disk
        self._faults = FaultLog(every_seconds=60.0)
        self._owner = os.getpid()
        self.on_program_loop: Final = office is not None
        self._posts = [_Post(each, self._faults, office) for each in followed]
        self._learnt = _Learnt(directory, self._clock, self._disk)

    def start(self, *, enlists: bool = True) -> None:
        """Start delivering.

        Args:
            enlists: Whether to register the adapters as followed first; False to only deliver what is pending.
        """
        if enlists:
            enlist(self._directory, [post.followed for post in self._posts], self._disk)
        for post in self._posts:
            owner, name = (post.name, "delivery") if self.on_program_loop else ("courier", post.name)
            job = Job(
                self._serve,
                (post,),
                owner=owner,
                name=name,
                timeout=None,
                retry=None,
                lane=None,
                background=self.on_program_loop,  # ends by `finish` or `stop`, so no drain waits for it
            )
            post.office.spawn(job)

    def finish(self, deadline: float | None = None) -> None:
        """Ask each courier to end once it has delivered all events; from any thread.

        Args:
            deadline: Until when the adapters' tasks may run and deliveries be confirmed (monotonic); None for no limit.
        """
        if self._owner == os.getpid():
            for post in self._posts:
                post.deadline = deadline
        self._ask("finish")

    def stop(self) -> None:
        """Ask each courier to end now, at its cursor, and its thread with it; from any thread."""
        self._ask("stop")

    def join(self, timeout_seconds: float) -> bool:
        """Wait for all couriers to end; return whether they did. A thread that an adapter blocks is abandoned."""
        if self._owner != os.getpid():
            return True  # a forked child does not have these threads
        deadline = time.monotonic() + timeout_seconds
        for post in self._posts:
            ended = post.ended.wait(max(0.0, deadline - time.monotonic()))
            if ended and not self.on_program_loop:
                post.thread.stop()
        if self.running:
            return False
        self._learnt.close()
        self._faults.flush()
        return True

    @property
    def running(self) -> list[str]:
        """Names of the adapters whose couriers have not ended."""
        return [post.name for post in self._posts if not post.ended.is_set()]

    @property
    def failed(self) -> list[str]:
        """Names of the adapters that could not be built, or whose couriers ended before delivering all events."""
        return [post.name for post in self._posts if post.failed]

    def _ask(self, what: Literal["finish", "stop"]) -> None:
        if self._owner == os.getpid():
            for post in self._posts:
                post.ask(what)

    async def _serve(self, post: "_Post") -> None:
        current_adapter.set(post.name)
        try:
            if self._slice_seconds is None:  # only in a courier process; threads of a program share its directory
                own_folder(post.name)
            alone = self._slice_seconds is None or self.on_program_loop
            with nullcontext() if alone else SHORT_TURNS.at_most(self._slice_seconds or 0.0):
                while not (await self._deliver_or_say(post) or post.asked == "stop"):
                    pass
        finally:
            task = asyncio.current_task()
            if self.on_program_loop and task is not None:
                # Added after the callback that counts the task: the waiter for this event reads the counts next.
                task.add_done_callback(lambda _: post.ended.set())
            else:
                post.ended.set()
                if post.asked == "stop":
                    post.thread.end_soon()

    async def _deliver_or_say(self, post: "_Post") -> bool:
        """Call `_deliver`, log its failure, and return whether the courier should end.

        After a failure it ends only if that attempt started after the request to end.
        """
        asked = post.asked
        try:
            return await self._deliver(post)
        except asyncio.CancelledError:
            # Caused by an adapter that cancels all tasks; `stop` does not cancel this one.
            self._has_failed(post, RuntimeError("the adapter cancelled its courier"))
        except Exception as error:  # isolation: the next courier starts at the cursor, the others are not affected
            self._has_failed(post, error)
        if post.asked is None:
            await post.pause(self._again_seconds)
        return asked is not None

    async def _deliver(self, post: "_Post") -> bool:
        """Run one courier; return False if it has to be run again."""
        if is_held(self._disk, self._directory, post.name):  # checked first, to avoid building an adapter in vain
            return await self._busy(post)
        try:
            courier = self._courier(post)
        except Exception as error:  # isolation: an adapter's import or constructor may raise anything
            self._has_failed(post, error)
            return True
        try:
            post.take_on(courier)
            await courier.run()
            post.was_busy = False
        except CourierBusyError:
            return await self._busy(post)
        post.failed = False
        return True

    async def _busy(self, post: "_Post") -> bool:
        """Wait while another process delivers, such as the courier of a killed run; return whether to end."""
        if not post.was_busy:  # testing a lock acquires it for an instant, so try again at once
            post.was_busy = True
            await post.pause(INSTANT_SECONDS)
            return False
        fix = "delivery continues here when that process ends; evsys-bus status shows its progress"
        self._faults.warn("courier.busy", post.name, courier=post.name, journal=self._directory, fix=fix)
        post.failed = True
        if post.asked == "finish" and not self._is_pending(post):
            return True
        await post.pause(BUSY_SECONDS)
        return False

    def _is_pending(self, post: "_Post") -> bool:
        if post.accounts is None:
            post.accounts = Accounts(self._directory, self._disk)
        return any(each.pending for each in post.accounts.read() if each.name == post.name)

    def _courier(self, post: "_Post") -> Courier:
        """Create a courier with a newly built adapter: a failed one is in an unknown state."""
        adapter = post.followed.live
        if adapter is None:
            assert post.followed.recipe is not None
            adapter = self._build(post.followed.recipe)
        with suppress(AttributeError):  # slots or frozen: logs show its class's name then
            adapter.spec_name = post.name
        return Courier(
            self._directory,
            post.name,
            adapter,
            post.followed.terms,
            publish=self._learnt.publish,
            slice_seconds=self._slice_seconds,
            poll_seconds=self._poll_seconds,
            log_path=self._log_path,
            clock=self._clock,
            disk=self._disk,
        )

    def _has_failed(self, post: "_Post", error: Exception) -> None:
        post.failed = True
        self._faults.warn("courier.failed", post.name, error=error, courier=post.name)
        known = isinstance(error, EvsysBusError)
        state = DeliveryStatus(
            state="failed",
            pid=os.getpid(),
            at=self._clock.wall(),
            error=f"{type(error).__name__}: {_words(error) if known else error}",
            fix=error.fix if known else "see the log for the traceback",
            log=self._log_path,
        )
        try:
            write_state_of_idle(self._disk, self._directory, post.name, state)
        except Exception as refusal:  # isolation: the journal directory may be in any condition
            self._faults.warn("courier.state_unwritten", post.name, error=refusal, courier=post.name)


def _words(error: EvsysBusError) -> str:
    return error.what if error.why is None else f"{error.what}: {error.why}"


class _Post:
    """One adapter, its thread, and its current courier."""

    def __init__(self, followed: Followed, faults: FaultLog, office: TaskOffice | None) -> None:
        self.name = followed.name
        self.followed = followed
        self.thread = LoopThread()
        self.office = TaskOffice(self.thread.loop, faults) if office is None else office
        self.ended = threading.Event()
        self.failed = False
        self.was_busy = False
        """Whether another courier held the lock at the last attempt."""
        self.asked: Literal["finish", "stop"] | None = None
        self.deadline: float | None = None
        self.accounts: Accounts | None = None
        self._courier: Courier | None = None
        self._lock = threading.Lock()

    def ask(self, what: Literal["finish", "stop"]) -> None:
        with self._lock:
            self.asked = what
            self._pass_on()

    def take_on(self, courier: Courier) -> None:
        with self._lock:
            self._courier = courier
            self._pass_on()

    def _pass_on(self) -> None:
        if self._courier is None:
            return
        if self.asked == "finish":
            self._courier.finish(self.deadline)
        elif self.asked == "stop":
            self._courier.stop()

    async def pause(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until a new request arrives."""
        asked, deadline = self.asked, time.monotonic() + seconds
        while self.asked == asked and time.monotonic() < deadline:  # noqa: ASYNC110  # requests come from other threads
            await anyio.sleep(0.05)


class _Learnt:
    """Writes the couriers' own stream of the journal; opened at the first publish. Safe from any thread."""

    def __init__(self, directory: str, clock: Clock, disk: Disk) -> None:
        self._writer = JournalWriter(directory, family="c", clock=clock, disk=disk)
        self._clock = clock
        self._lock = threading.RLock()  # reentrant: a signal handler may publish while it is held
        self._waiting: deque[Event] = deque()
        self._is_writing = False
        self._state: Literal["new", "open", "closed"] = "new"

    def publish(self, event: Event) -> None:
        with self._lock:
            self._waiting.append(event)
            if self._is_writing:
                return  # the interrupted call below writes this event too
            self._is_writing = True
            try:
                while self._waiting:
                    self._write(self._waiting.popleft())
            finally:
                self._is_writing = False

    def _write(self, event: Event) -> None:
        writer = self._writer
        if self._state == "new":
            writer.open()
            self._state = "open"
        run = getattr(event, "run", None)
        envelope = Envelope(
            writer.stream, writer.next_sequence, self._clock.wall(), event, run if isinstance(run, str) else None
        )
        writer.append(encode(envelope))

    def close(self) -> None:
        with self._lock:
            if self._state == "open":
                self._writer.close()
            self._state = "closed"
