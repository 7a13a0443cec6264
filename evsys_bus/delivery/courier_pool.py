"""`CourierPool`: the couriers of one process, each on an event loop of its own, so that none can block another.

While they run on threads of a program, the interpreter's switch interval is shorter (`SWITCH_INTERVAL`): a thread that
wakes up has to wait for the running thread to release the GIL, by default up to 5 ms (``sys.setswitchinterval``).
System calls release the GIL too, but after a short one the running thread reacquires it before the waiting thread has
woken up (measured; "convoy effect"). The interval is restored when the last courier thread has ended.

In a process of their own, each has a working directory of its own, so an adapter's ``chdir`` affects no other: POSIX
has one per process; on Linux a thread can have one that is shared with the threads it starts.
"""

import asyncio
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import Final, Literal

import anyio

from evsys_bus.callback import Callback
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import ProgressReader
from evsys_bus.delivery.status_files import is_delivering, write_status_if_idle
from evsys_bus.delivery.status_recorder import StatusRecorder
from evsys_bus.delivery.subscription import AdapterRef, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.diagnostics import FaultLog, current_adapter, log
from evsys_bus.errors import CourierBusyError, EvsysBusError
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import Clock, Disk, JournalWriter, OsClock, OsDisk
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus, Job, LoopThread, TaskManager


class SwitchInterval:
    """Reference-counted override of ``sys.setswitchinterval``; one object for the whole process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._previous = 0.0
        self._applied = 0.0

    @contextmanager
    def at_most(self, seconds: float) -> Generator[None, None, None]:
        """Limit the switch interval inside the block; safe from any thread.

        The first of several nested or concurrent blocks sets the value. A shorter interval that the program has set is
        kept, and so is one that it sets meanwhile.
        """
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._previous = sys.getswitchinterval()
                sys.setswitchinterval(min(self._previous, seconds))
                self._applied = sys.getswitchinterval()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users and sys.getswitchinterval() == self._applied:
                    sys.setswitchinterval(self._previous)


SWITCH_INTERVAL: Final = SwitchInterval()


_CLONE_FS: Final = 0x200


def unshare_working_directory(adapter: str) -> None:
    """Give this thread a working directory of its own; where that is not possible, log it and continue."""
    try:
        _unshare()(_CLONE_FS)
    except (AttributeError, OSError) as error:  # not Linux, or a container that forbids the call, such as Docker's
        log().info("courier.shares_folder", adapter=adapter, why=str(error), meaning="a chdir moves all couriers")


def _unshare() -> Callable[[int], object]:
    if sys.version_info >= (3, 12):
        return os.unshare
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)

    def unshare(flags: int) -> None:
        if library.unshare(flags):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return unshare


LOCK_RETRY_SECONDS: Final = 0.5
"""Pause before retrying to acquire a lock that another process holds."""

FIRST_LOCK_RETRY_SECONDS: Final = 0.02
"""The same before the first retry."""

AdapterBuilder = Callable[[AdapterRef], Callback | Sink]


class CourierPool:
    """Runs one courier for each adapter, each on its own thread.

    Args:
        directory: The journal.
        subscriptions: The adapters.
        build: Builds an adapter from its recipe; called on the adapter's own thread.
        slice_seconds: How long a courier may work before it sleeps to let other threads of the process run; None if
            the process has no other work.
        task_manager: Runs the couriers as its tasks on its own loop; None gives each a thread.
        poll_seconds: How often the journal is read.
        restart_seconds: Pause before a failed delivery is restarted.
        log_path: Path of this process's log, if it has one of its own.
        clock: The clocks.
        disk: The file system.
    """

    def __init__(
        self,
        directory: str,
        subscriptions: Sequence[Subscription],
        build: AdapterBuilder,
        *,
        slice_seconds: float | None = None,
        task_manager: TaskManager | None = None,
        poll_seconds: float = 0.02,
        restart_seconds: float = 5.0,
        log_path: str | None = None,
        clock: Clock | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._directory = directory
        self._build = build
        self._slice_seconds = slice_seconds
        self._poll_seconds = poll_seconds
        self._restart_seconds = restart_seconds
        self._log_path = log_path
        self._clock = OsClock() if clock is None else clock
        self._disk = OsDisk() if disk is None else disk
        self._faults = FaultLog(every_seconds=60.0)
        self._owner_pid = os.getpid()
        self.on_program_loop: Final = task_manager is not None
        self._task_manager = task_manager
        self._workers = [_CourierWorker(each) for each in subscriptions]
        self._annotations = _AnnotationWriter(directory, self._clock, self._disk)
        self._status_recorder = StatusRecorder(
            directory, self._annotations.publish, self._disk, monotonic=self._clock.monotonic
        )

    def start(self, *, subscribe: bool = True) -> None:
        """Start delivering.

        Args:
            subscribe: Whether to register the adapters as followed first; False to only deliver what is pending.
        """
        if subscribe:
            register(self._directory, [worker.subscription for worker in self._workers], self._disk)
        for worker in self._workers:
            if self._task_manager is None:
                worker.future = worker.thread.submit(self._run_worker(worker))
                continue
            job = Job(
                self._run_worker,
                (worker,),
                owner=worker.name,
                name="delivery",
                timeout=None,
                retry=None,
                lane=None,
                background=True,  # ends by `finish` or `stop`, so no drain waits for it
            )
            self._task_manager.spawn(job)

    def finish(self, deadline: float | None = None) -> None:
        """Ask each courier to end once it has delivered all events; from any thread.

        Args:
            deadline: Until when the adapters' tasks may run and deliveries be confirmed (monotonic); None for no limit.
        """
        if self._owner_pid == os.getpid():
            for worker in self._workers:
                worker.deadline = deadline
        self._request("finish")

    def stop(self) -> None:
        """Ask each courier to end now, at its cursor, and its thread with it; from any thread."""
        self._request("stop")

    def join(self, timeout_seconds: float) -> bool:
        """Wait for all couriers to end; return whether they did. A thread that an adapter blocks is abandoned."""
        if self._owner_pid != os.getpid():
            return True  # a forked child does not have these threads
        deadline = time.monotonic() + timeout_seconds
        for worker in self._workers:
            ended = worker.ended.wait(max(0.0, deadline - time.monotonic()))
            if ended and not self.on_program_loop:
                worker.thread.stop()
        if self.running:
            return False
        self.record_status(final=True)
        self._annotations.close()
        self._faults.flush()
        return True

    def record_status(self, *, final: bool = False) -> None:
        """Record in the journal how the deliveries go, if that has changed and is due; see `StatusRecorder`.

        Called periodically, on a thread that no training waits for.
        """
        couriers = [worker.courier for worker in self._workers if worker.courier is not None]
        self._status_recorder.record(couriers, final=final)

    @property
    def running(self) -> list[str]:
        """Names of the adapters whose couriers have not ended."""
        return [worker.name for worker in self._workers if not worker.ended.is_set()]

    @property
    def failed(self) -> list[str]:
        """Names of the adapters that could not be built, or whose couriers ended before delivering all events."""
        return [worker.name for worker in self._workers if worker.failed]

    def _request(self, request: Literal["finish", "stop"]) -> None:
        if self._owner_pid == os.getpid():
            for worker in self._workers:
                worker.request(request)

    async def _run_worker(self, worker: "_CourierWorker") -> None:
        current_adapter.set(worker.name)
        try:
            if self._slice_seconds is None:  # only in a courier process; threads of a program share its directory
                unshare_working_directory(worker.name)
            is_alone = self._slice_seconds is None or self.on_program_loop
            with nullcontext() if is_alone else SWITCH_INTERVAL.at_most(self._slice_seconds or 0.0):
                while not (await self._deliver_logging_errors(worker) or worker.requested == "stop"):
                    pass
        finally:
            task = asyncio.current_task()
            if self.on_program_loop and task is not None:
                # Added after the callback that counts the task: the waiter for this event reads the counts next.
                task.add_done_callback(lambda _: worker.ended.set())
            else:
                worker.ended.set()
                if worker.requested == "stop":
                    worker.thread.request_stop()

    async def _deliver_logging_errors(self, worker: "_CourierWorker") -> bool:
        """Call `_deliver`, log its failure, and return whether the courier should end.

        After a failure it ends only if that attempt started after the request to end, or nothing is to be delivered.
        """
        requested = worker.requested
        try:
            return await self._deliver(worker)
        except asyncio.CancelledError:
            # Caused by an adapter that cancels all tasks; `stop` does not cancel this one.
            self._record_failure(worker, RuntimeError("the adapter cancelled its courier"))
        except Exception as error:  # isolation: the next courier starts at the cursor, the others are not affected
            self._record_failure(worker, error)
        if worker.requested is None:
            await worker.pause(self._restart_seconds)
        return requested is not None or (worker.requested == "finish" and not self._has_unfinished(worker))

    async def _deliver(self, worker: "_CourierWorker") -> bool:
        """Run one courier; return False if it has to be run again."""
        if is_delivering(
            self._disk, self._directory, worker.name
        ):  # checked first, to avoid building an adapter in vain
            return await self._wait_for_lock(worker)
        try:
            courier = self._make_courier(worker)
        except Exception as error:  # isolation: an adapter's import or constructor may raise anything
            self._record_failure(worker, error)
            return True
        try:
            worker.set_courier(courier)
            await courier.run()
            worker.was_locked = False
        except CourierBusyError:
            return await self._wait_for_lock(worker)
        worker.failed = False
        return True

    async def _wait_for_lock(self, worker: "_CourierWorker") -> bool:
        """Wait while another process delivers, such as the courier of a killed run; return whether to end."""
        if not worker.was_locked:  # testing a lock acquires it for an instant, so try again at once
            worker.was_locked = True
            await worker.pause(FIRST_LOCK_RETRY_SECONDS)
            return False
        fix = "delivery continues here when that process ends; evsys-bus status shows its progress"
        self._faults.warn("courier.busy", worker.name, courier=worker.name, journal=self._directory, fix=fix)
        worker.failed = True
        if worker.requested == "finish" and not self._has_unfinished(worker):
            return True
        await worker.pause(LOCK_RETRY_SECONDS)
        return False

    def _has_unfinished(self, worker: "_CourierWorker") -> bool:
        """Return whether events are pending or unconfirmed, or may be."""
        if worker.progress is None:
            worker.progress = ProgressReader(self._directory, self._disk)
        statuses = [each for each in worker.progress.read() if each.name == worker.name]
        return any(each.unfinished for each in statuses)

    def _make_courier(self, worker: "_CourierWorker") -> Courier:
        """Create a courier with a newly built adapter: a failed one is in an unknown state."""
        adapter = worker.subscription.instance
        if adapter is None:
            assert worker.subscription.adapter_ref is not None
            adapter = self._build(worker.subscription.adapter_ref)
        with suppress(AttributeError):  # slots or frozen: logs show its class's name then
            adapter.spec_name = worker.name
        return Courier(
            self._directory,
            worker.name,
            adapter,
            worker.subscription.policy,
            publish=self._annotations.publish,
            slice_seconds=self._slice_seconds,
            poll_seconds=self._poll_seconds,
            log_path=self._log_path,
            clock=self._clock,
            disk=self._disk,
        )

    def _record_failure(self, worker: "_CourierWorker", error: Exception) -> None:
        worker.failed = True
        self._faults.warn("courier.failed", worker.name, error=error, courier=worker.name)
        known = isinstance(error, EvsysBusError)
        status = DeliveryStatus(
            state="failed",
            pid=os.getpid(),
            at=self._clock.wall(),
            error=f"{type(error).__name__}: {_describe(error) if known else error}",
            fix=error.fix if known else "see the log for the traceback",
            log=self._log_path,
        )
        try:
            write_status_if_idle(self._disk, self._directory, worker.name, status)
        except Exception as write_error:  # isolation: the journal directory may be in any condition
            self._faults.warn("courier.state_unwritten", worker.name, error=write_error, courier=worker.name)


def _describe(error: EvsysBusError) -> str:
    return error.what if error.why is None else f"{error.what}: {error.why}"


class _CourierWorker:
    """One adapter, its thread, and its current courier."""

    def __init__(self, subscription: Subscription) -> None:
        self.name = subscription.name
        self.subscription = subscription
        self.thread = LoopThread()
        self.future: Future[None] | None = None
        """The result of its courier on that thread; keeps the task alive."""
        self.ended = threading.Event()
        self.failed = False
        self.was_locked = False
        """Whether another courier held the lock at the last attempt."""
        self.requested: Literal["finish", "stop"] | None = None
        self.deadline: float | None = None
        self.progress: ProgressReader | None = None
        self.courier: Courier | None = None
        """The current one, or the last one."""
        self._lock = threading.Lock()

    def request(self, request: Literal["finish", "stop"]) -> None:
        with self._lock:
            self.requested = request
            self._forward_request()

    def set_courier(self, courier: Courier) -> None:
        with self._lock:
            self.courier = courier
            self._forward_request()

    def _forward_request(self) -> None:
        if self.courier is None:
            return
        if self.requested == "finish":
            self.courier.finish(self.deadline)
        elif self.requested == "stop":
            self.courier.stop()

    async def pause(self, seconds: float) -> None:
        """Sleep for ``seconds``, or until a new request arrives."""
        requested, deadline = self.requested, time.monotonic() + seconds
        while self.requested == requested and time.monotonic() < deadline:  # noqa: ASYNC110  # requests come from other threads
            await anyio.sleep(0.05)


class _AnnotationWriter:
    """Writes the couriers' own stream of the journal; opened at the first publish. Safe from any thread."""

    def __init__(self, directory: str, clock: Clock, disk: Disk) -> None:
        self._writer = JournalWriter(directory, family="c", clock=clock, disk=disk)
        self._clock = clock
        self._lock = threading.RLock()  # reentrant: a signal handler may publish while it is held
        self._pending: deque[Event] = deque()
        self._is_writing = False
        self._state: Literal["new", "open", "closed"] = "new"

    def publish(self, event: Event) -> None:
        with self._lock:
            self._pending.append(event)
            if self._is_writing:
                return  # the interrupted call below writes this event too
            self._is_writing = True
            try:
                while self._pending:
                    self._write(self._pending.popleft())
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
