"""`TaskManager`: the managed tasks of one bus.

Spawned tasks run on the bus's loop: the caller's loop under ``async with``, a `LoopThread` under ``with``. One lock
guards all state, because hooks run on any thread; nothing is awaited while it is held.
"""

import asyncio
import contextvars
import inspect
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from evsys_bus.codec import error_text
from evsys_bus.diagnostics import FaultLog, log, message_shape
from evsys_bus.errors import SpawnError
from evsys_bus.tasks.adoption import task_name
from evsys_bus.tasks.loops import LoopStopped, call_soon, running_loop
from evsys_bus.tasks.receipt import DrainFuture, Receipt, TaskCounts


class Job:
    """The arguments of one `spawn` call and the state of its task."""

    __slots__ = ("args", "attempts", "background", "context", "fn", "kind", "lane", "name", "owner", "retry", "timeout")

    def __init__(
        self,
        fn: Callable[..., Awaitable[object]],
        args: tuple[object, ...],
        *,
        owner: str,
        name: str | None,
        timeout: float | None,
        retry: Callable[..., Awaitable[object]] | None,
        lane: str | None,
        background: bool = False,
    ) -> None:
        _check_callable(fn)
        self.fn = fn
        self.args = args
        self.owner = owner
        self.kind = _function_name(fn)
        self.name = name or self.kind
        self.timeout = timeout
        self.retry = retry
        self.lane = None if lane is None else (owner, lane)
        self.context = contextvars.copy_context()
        self.background = background
        self.attempts = 0

    def __str__(self) -> str:
        return f"{self.owner}:{self.name}"

    async def run(self) -> None:
        """Run all attempts within the timeout.

        Raises:
            TimeoutError: They took longer.
            RuntimeError: The task called ``sys.exit``.
        """
        timeout_scope = asyncio.timeout(self.timeout)
        try:
            async with timeout_scope:
                await (self._attempt(*self.args) if self.retry is None else self.retry(self._attempt, *self.args))
        except TimeoutError:
            if not timeout_scope.expired():
                raise  # raised by the task itself
            raise TimeoutError(f"timed out after {self.timeout:g} s") from None
        except SystemExit as error:  # asyncio would propagate it out of the loop and end the program
            raise RuntimeError(f"the task called sys.exit({error.code!r})") from error

    async def _attempt(self, *args: object) -> object:
        self.attempts += 1
        awaitable = self.fn(*args)
        if not inspect.isawaitable(awaitable):
            raise _not_async(self.name)
        return await awaitable


def _check_callable(fn: object) -> None:
    if inspect.iscoroutine(fn):
        fn.close()
        raise SpawnError(
            f"spawn() was given the coroutine {fn.__qualname__}(...), not the function",
            fix="pass the function and its arguments: self.spawn(upload, path), not self.spawn(upload(path))",
        )
    # A wrapper without functools.wraps looks like an ordinary function here; `_attempt` checks what it returns.
    if not callable(fn) or inspect.isasyncgenfunction(fn) or inspect.isclass(fn) or inspect.isbuiltin(fn):
        raise _not_async(_function_name(fn))


def _not_async(name: str) -> SpawnError:
    return SpawnError(
        f"spawn() takes a coroutine function; {name} is not one",
        fix="define it with `async def`; blocking code: self.spawn(anyio.to_thread.run_sync, function, argument)",
    )


def _function_name(fn: object) -> str:
    while isinstance(fn, partial):
        fn = fn.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] # a partial of anything
    return getattr(fn, "__name__", None) or type(fn).__name__


CANCEL_GRACE_SECONDS: Final = 1.0
"""How long a cancelled task may take to end before it is abandoned."""


class FinishedTask(NamedTuple):
    """One task that has ended."""

    work: "Job | asyncio.Task[Any]"
    """The job that was spawned, or the task that was adopted."""
    name: str
    failure: str | None
    """The error text, or "cancelled"; None if the task succeeded."""


class TaskManager:
    """Runs, bounds, isolates, counts and drains the tasks of a bus or courier, by owner.

    Args:
        loop: Returns the loop that spawned tasks run on.
        faults: Where failures are logged.
        max_running: How many spawned tasks run at a time.
        max_waiting: How many spawned tasks may be queued; further ones are refused.
        on_end: Called when a task has ended, or was dropped before it started.
    """

    def __init__(
        self,
        loop: Callable[[], asyncio.AbstractEventLoop],
        faults: FaultLog,
        *,
        max_running: int = 32,
        max_waiting: int = 10_000,
        on_end: Callable[[FinishedTask], object] | None = None,
    ) -> None:
        self._loop = loop
        self._faults = faults
        self._on_end = on_end
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._lock = threading.RLock()
        self._ready: deque[Job] = deque()
        self._lanes: dict[tuple[str, str], deque[Job]] = {}  # a key is a busy lane; its jobs wait for the running one
        self._waiting_in_lanes = 0  # how many jobs wait in lanes
        self._running: dict[asyncio.Task[Any], Job] = {}
        self._adopted: dict[asyncio.Task[Any], str] = {}
        self._background: dict[asyncio.Task[Any], Job] = {}  # nothing waits for these
        self._background_cancelled = False
        self._counts_by_owner: dict[str, TaskCounts] = {}
        self._end_listeners: list[Callable[[], object]] = []  # called each time a task has ended
        self._is_closed = False

    def spawn(self, job: Job) -> bool:
        """Accept a job; False if it was refused, which is logged and counted."""
        with self._lock:
            counts = self._counts_of(job.owner)
            if self._is_closed or len(self._ready) + self._waiting_in_lanes >= self._max_waiting:
                counts.refused += 1
                why = "the bus is closed" if self._is_closed else f"{self._max_waiting} tasks wait already"
                self._faults.warn("task.refused", job.owner, owner=job.owner, task=job.name, why=why)
                return False
            counts.spawned += 1
            if job.background:
                call_soon(self._loop(), partial(self._start_background, job))
                return True
            if job.lane in self._lanes:
                self._lanes[job.lane].append(job)
                self._waiting_in_lanes += 1
                return True
            if job.lane is not None:
                self._lanes[job.lane] = deque()
            self._ready.append(job)
        self._schedule_ready()
        return True

    def adopt(self, task: "asyncio.Task[Any]", owner: str) -> None:
        """Adopt a task that a hook created itself. Called on the thread of the task's loop."""
        with self._lock:
            self._counts_of(owner).adopted += 1
            self._adopted[task] = owner
        task.add_done_callback(self._on_task_done)

    def counts(self) -> tuple[TaskCounts, dict[str, TaskCounts]]:
        """The total counts, and the counts by owner."""
        with self._lock:
            owners = {owner: msgspec.structs.replace(counts) for owner, counts in self._counts_by_owner.items()}
        fields = TaskCounts.__struct_fields__
        total = TaskCounts(*(sum(getattr(counts, field) for counts in owners.values()) for field in fields))
        return total, owners

    def count_running_and_waiting(self) -> tuple[int, int]:
        """How many tasks are running (adopted ones included), and how many are queued."""
        with self._lock:
            return len(self._running) + len(self._adopted), len(self._ready) + self._waiting_in_lanes

    def cancel_all(self) -> None:
        """Cancel every running task and drop the queued ones; from any thread."""
        with self._lock:
            dropped = [*self._ready, *(job for lane in self._lanes.values() for job in lane)]
            for job in dropped:
                self._counts_of(job.owner).cancelled += 1
            self._ready.clear()
            self._lanes.clear()
            self._waiting_in_lanes = 0
            tasks = [*self._running, *self._adopted]
        _cancel(tasks)
        for job in dropped:
            self._notify_end(FinishedTask(job, job.name, "cancelled before it began"))

    def cancel_background(self) -> None:
        """Cancel the background tasks without waiting; from any thread. Called when all other work has ended."""
        with self._lock:
            self._background_cancelled = True
            tasks = [*self._background]
        _cancel(tasks)

    async def wait_for_background(self, timeout: float) -> None:
        """Wait at most ``timeout`` seconds for the background tasks of the running loop, after `cancel_background`."""
        with self._lock:
            tasks = [task for task in self._background if task.get_loop() is running_loop()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def drain(
        self, timeout: float, *, close: bool, stalled_loop: asyncio.AbstractEventLoop | None = None
    ) -> DrainFuture:
        """Start waiting for every task, at most ``timeout`` seconds; may be called on any thread.

        With ``close``, no job is accepted after the deadline, and unfinished tasks are cancelled and given
        `CANCEL_GRACE_SECONDS`. ``stalled_loop`` is a loop that is blocked meanwhile: its tasks are not waited for.
        """
        with self._lock:
            if not self._has_unfinished(stalled_loop):  # the usual case, which needs neither a loop nor a thread
                self._is_closed = self._is_closed or close
                return self._finished_drain()
        try:
            loop = self._loop()
        except LoopStopped:  # the tasks that are left were abandoned
            return self._finished_drain()
        drain_future = DrainFuture(loop)

        def start_drain() -> None:
            task = loop.create_task(
                self._drain(timeout, close=close, stalled_loop=stalled_loop), name="evsys-bus:drain"
            )
            task.add_done_callback(set_receipt)

        def set_receipt(task: asyncio.Task[Receipt]) -> None:
            # Cancelled: the host is closing its loop, as after a second Ctrl-C. Report what is known.
            is_finished = not task.cancelled() and task.exception() is None
            drain_future.set_result(task.result() if is_finished else self.close_now())

        if running_loop() is loop:
            start_drain()
        else:
            loop.call_soon_threadsafe(start_drain)
        return drain_future

    def _finished_drain(self) -> DrainFuture:
        drain_future = DrainFuture()
        drain_future.set_result(self._make_receipt(0.0))
        return drain_future

    def close_now(self) -> Receipt:
        """Accept no more jobs and cancel all tasks, without waiting."""
        with self._lock:
            self._is_closed = True
        self.cancel_all()
        return self._make_receipt(0.0)

    async def _drain(self, timeout: float, *, close: bool, stalled_loop: asyncio.AbstractEventLoop | None) -> Receipt:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._start_ready()
        await self._wait_for_all(began + timeout, stalled_loop)
        if close:
            with self._lock:
                self._is_closed = True
            self.cancel_all()
            await self._wait_for_all(loop.time() + CANCEL_GRACE_SECONDS, stalled_loop)
        return self._make_receipt(loop.time() - began)

    async def _wait_for_all(self, deadline: float, stalled_loop: asyncio.AbstractEventLoop | None) -> None:
        task_ended = asyncio.Event()
        listener = partial(call_soon, asyncio.get_running_loop(), task_ended.set)
        self._end_listeners.append(listener)
        try:
            async with asyncio.timeout_at(deadline):
                while self._has_unfinished(stalled_loop):
                    await task_ended.wait()
                    task_ended.clear()
        except TimeoutError:
            pass  # the receipt lists the unfinished tasks
        finally:
            self._end_listeners.remove(listener)

    def _has_unfinished(self, stalled_loop: asyncio.AbstractEventLoop | None) -> bool:
        with self._lock:
            if self._running or self._ready:
                return True
            loops = {task.get_loop() for task in self._adopted}
        return any(loop is not stalled_loop and not loop.is_closed() for loop in loops)

    def _make_receipt(self, seconds: float) -> Receipt:
        total, owners = self.counts()
        with self._lock:
            unfinished = [str(job) for job in (*self._running.values(), *self._ready)]
            unfinished += [str(job) for lane in self._lanes.values() for job in lane]
            unfinished += [f"{owner}:{task_name(task)}" for task, owner in self._adopted.items()]
        if unfinished:
            log().warning("tasks.left", count=len(unfinished), tasks=", ".join(sorted(unfinished)[:10]))
        return Receipt(tasks=total, tasks_by_owner=owners, unfinished=tuple(sorted(unfinished)), seconds=seconds)

    def _counts_of(self, owner: str) -> TaskCounts:
        counts = self._counts_by_owner.get(owner)
        if counts is None:
            counts = self._counts_by_owner[owner] = TaskCounts()
        return counts

    def _schedule_ready(self) -> None:
        """Start the ready jobs on the loop's thread."""
        try:
            loop = self._loop()
        except LoopStopped:
            return  # the jobs were dropped when the manager was closed
        if running_loop() is loop:
            self._start_ready()
        else:
            call_soon(loop, self._start_ready)

    def _start_ready(self) -> None:
        loop = asyncio.get_running_loop()  # `self._loop` raises once a thread's loop was asked to stop
        with self._lock:
            while len(self._running) < self._max_running:
                try:
                    job = self._ready.popleft()
                except IndexError:
                    return
                task = loop.create_task(job.run(), name=str(job), context=job.context)
                self._running[task] = job
                # Not a `finally` in the coroutine: a task that is cancelled before its first step never runs it.
                task.add_done_callback(self._on_task_done)

    def _start_background(self, job: Job) -> None:
        if self._background_cancelled:
            self._counts_of(job.owner).completed += 1
            return
        task = asyncio.get_running_loop().create_task(job.run(), name=str(job), context=job.context)
        self._background[task] = job
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: "asyncio.Task[Any]") -> None:
        """Count and log how a task ended, spawned or adopted. What it raised is not propagated."""
        error = None if task.cancelled() else task.exception()
        with self._lock:
            job = self._running.pop(task, None) or self._background.pop(task, None)
            owner = self._adopted.pop(task) if job is None else job.owner
            counts = self._counts_of(owner)
            # Being cancelled at the close is the normal end of a background task.
            cancelled = task.cancelled() and not (job is not None and job.background and self._background_cancelled)
            counts.cancelled += cancelled
            counts.failed += error is not None
            counts.completed += error is None and not cancelled
            if job is not None:
                counts.retries += max(0, job.attempts - 1)
                self._leave_lane(job)
        name = task_name(task) if job is None else job.name
        if error is not None:
            # Task names may be unique to each task, and the key must not be.
            kind = message_shape(name) if job is None else job.kind
            self._faults.warn("task.failed", (owner, kind), error=error, owner=owner, task=name)
        if self._ready:
            self._schedule_ready()
        for listener in tuple(self._end_listeners):
            listener()
        if self._on_end is not None:
            failure = error_text(error) if error is not None else "cancelled" if cancelled else None
            self._notify_end(FinishedTask(task if job is None else job, name, failure))

    def _notify_end(self, finished: FinishedTask) -> None:
        if self._on_end is not None:
            try:
                self._on_end(finished)
            except Exception as error:  # isolation: the other tasks must still be handled
                self._faults.warn("task.end_unseen", finished.name, error=error, task=finished.name)

    def _leave_lane(self, job: Job) -> None:
        waiting = self._lanes.get(job.lane) if job.lane is not None else None
        if waiting:
            self._ready.append(waiting.popleft())
            self._waiting_in_lanes -= 1
        elif job.lane is not None:
            self._lanes.pop(job.lane, None)


def _cancel(tasks: "list[asyncio.Task[Any]]") -> None:
    for task in tasks:
        if task.get_loop() is running_loop():
            task.cancel()
        else:
            call_soon(task.get_loop(), task.cancel)
