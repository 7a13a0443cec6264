"""`CallbackReceiver`: delivers events to a followed callback by calling its hooks in order, each isolated."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType
from typing import Any, Final

from evsys_bus.adapter import Adapter, EventInfo, EventPublisher, RetryPolicy, Rewindable
from evsys_bus.callback import (
    Callback,
    attach,
    callback_name,
    check_return_value,
    detach,
    find_hook,
    get_attribute,
    isolate,
)
from evsys_bus.codec import error_text
from evsys_bus.delivery.open_rows import MergedRow
from evsys_bus.delivery.receiver import ProblemHandler, bounded_text, confirm_deliveries
from evsys_bus.delivery.subscription import OnFailure
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Envelope, Event, UnknownEvent
from evsys_bus.sink import BatchResult
from evsys_bus.tasks import (
    CANCEL_GRACE_SECONDS,
    HOOK_FILENAME_PREFIX,
    DeliveryStatus,
    FinishedTask,
    HookTaskAdopter,
    Job,
    TaskManager,
    count_unfinished_calls,
    find_hook_frame,
    task_name,
    wait_shielded,
)

DRAIN_SECONDS: Final = 5.0
"""How long tasks may take in a `close` without a deadline before they are cancelled."""
TASK_WAIT_SECONDS: Final = 10.0
"""How long a batch waits for the tasks of its hooks while none of them ends."""
MAX_FAILURE_CHARS: Final = 500
"""Maximum length of the text of the last failure."""
RETRY_PAUSES: Final = (0.5, 2.0, 8.0)
"""Pauses in seconds before each retry of a hook that raised, with ``on_failure="retry"``."""
MAX_PENDING_TASKS: Final = 1000
"""How many spawned tasks may be queued before the next hook waits for them."""
_EVENTS_PER_YIELD: Final = 128


class CallbackReceiver:
    """Calls hooks on the courier's loop; a hook that blocks delays only its own courier.

    Args:
        callback: The object with the hooks.
        on_failure: What happens to an event when a hook raises.
        slice_seconds: Sleep for this long after as much work, so that other threads can run; None for never.
        faults: Where failures are logged.
        retry_pauses: Pauses before each retry of a hook.
        drain_seconds: How long tasks may take in a `close` without a deadline.
        task_wait_seconds: How long a batch waits for the tasks of its hooks while none of them ends.
        courier: Records what the callback publishes and reports; None to discard it.
    """

    max_events = 512
    max_bytes = 8 << 20
    max_seconds = 0.0

    def __init__(
        self,
        callback: object,
        on_failure: OnFailure = "count",
        *,
        slice_seconds: float | None = None,
        faults: FaultLog,
        retry_pauses: Sequence[float] = RETRY_PAUSES,
        drain_seconds: float = DRAIN_SECONDS,
        task_wait_seconds: float = TASK_WAIT_SECONDS,
        courier: EventPublisher | None = None,
    ) -> None:
        self.failures = 0
        """How often a hook has raised."""
        self.task_failures = 0
        """Tasks of the hooks that raised, timed out or were cancelled."""
        self.last_failure: str | None = None
        """The newest of both: the hook or task, and what it raised."""
        self._callback: Final = callback
        self._rewindable: Final = callback if isinstance(callback, Rewindable) else None
        self._on_failure: Final[OnFailure] = on_failure
        self._slice_seconds: Final = slice_seconds
        self._faults: Final = faults
        self._retry_pauses: Final = tuple(retry_pauses) if on_failure == "retry" else ()
        self._drain_seconds: Final = drain_seconds
        self._task_wait_seconds: Final = task_wait_seconds
        self._courier: Final = courier
        self._calls: dict[type | str, Callable[[Any], object] | None] = {}
        """Compiled hook calls by event type, or by tag for event types that this process does not know."""
        self._task_manager: TaskManager | None = None
        self._on_problem: ProblemHandler | None = None
        self._result = BatchResult(0)
        self._envelope: Envelope | None = None
        """The event whose hook was called last."""
        self._batch_index: int | None = None
        """Index of that event in its batch; None for a repeated start."""
        self._is_calling = False
        self._was_called = False
        self._task_adopter: Final = HookTaskAdopter(lambda: self._is_calling, self._find_owner, self._adopt)
        self._event_tasks: dict[Job | asyncio.Task[Any], int] = {}
        """Unfinished tasks that hooks of this batch have started, and the index of the event."""
        self._task_finished: Final = asyncio.Event()
        self._cancelled_tasks: list[str] = []

    async def open(self, on_problem: ProblemHandler) -> None:
        """Attach the callback, so that it can start tasks on this loop."""
        loop = asyncio.get_running_loop()
        self._on_problem = on_problem
        self._task_manager = TaskManager(lambda: loop, self._faults, on_end=self._on_task_end)
        self._task_adopter.adopt_on_running_loop()
        attach(self._callback, self)

    async def deliver(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> BatchResult:  # noqa: ARG002 # see `Receiver`
        """Call the hooks of these events and wait for the tasks that they start.

        Raises:
            RetryLaterError: A hook raised it: the callback must be rebuilt and rewound to its last mark.
        """
        rejected: dict[int, str] = {}
        self._result = BatchResult(0, rejected)
        self._event_tasks.clear()
        began = time.monotonic()
        for index, envelope in enumerate(batch):
            self._envelope, self._batch_index = envelope, index
            error = self._call_hook(envelope.event)
            if isinstance(error, RetryLaterError):
                raise error
            if isinstance(error, _ArgumentMismatchError):
                rejected[index] = str(error)
            elif error is not None and self._on_failure != "count":
                error = await self._retry_hook(envelope.event, error)
                if error is not None:
                    rejected[index] = error_text(error)
            self._result = BatchResult(index + 1 - len(rejected), rejected)
            if self._slice_seconds is None:
                if not index % _EVENTS_PER_YIELD:
                    await self._yield_to_others(0.0)
            elif time.monotonic() - began >= self._slice_seconds:
                await self._yield_to_others(self._slice_seconds)
                began = time.monotonic()
        if self._event_tasks:
            await self._wait_for_event_tasks()
        self._task_adopter.check_task_factories()
        return self._result

    def interrupted_result(self) -> BatchResult | None:
        """The events whose hooks have returned, up to the first one with an unfinished task.

        None if hooks of later events may have written rows that the callback's mark would cover.
        """
        handled = min(self._event_tasks.values(), default=self._result.handled)
        if handled >= self._result.handled:
            return self._result
        if self._rewindable is not None:
            return None
        rejected = {index: why for index, why in self._result.rejected.items() if index < handled}
        return BatchResult(handled - len(rejected), rejected)

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Call the hooks of the start events; raises RetryLaterError like `deliver`."""
        for each in starts:
            self._envelope, self._batch_index = each, None
            error = self._call_hook(each.event)
            if isinstance(error, RetryLaterError):
                raise error

    def mark(self) -> Any:
        """The callback's mark; None unless it is `Rewindable`."""
        return None if self._rewindable is None else self._rewindable.mark()

    def rewind(self, mark: Any) -> None:
        """Rewind the callback to the mark, if it is `Rewindable`."""
        if self._rewindable is not None:
            self._rewindable.rewind(mark)

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        """Wait for the tasks, cancel late ones, and close the callback.

        Args:
            deadline: Until when tasks and confirmations may take (monotonic); None for the default limits.
            confirm: Whether to ask the destination to confirm delivered events.
        """
        task_manager = self._task_manager
        if task_manager is None:
            return
        self._cancelled_tasks.clear()
        now = time.monotonic()
        seconds = self._drain_seconds if deadline is None else max(0.0, deadline - now)
        cancelled = await wait_shielded(task_manager.drain(seconds, close=True), max_cancellations=1)
        if cancelled:  # give the cancelled tasks a moment to end
            task_manager.close_now()
            await wait_shielded(task_manager.drain(0.0, close=True))
        if self._cancelled_tasks:
            names = ", ".join(sorted(self._cancelled_tasks)[:10])
            log().warning("tasks.cancelled", callback=self._name, count=len(self._cancelled_tasks), tasks=names)
        if not cancelled:
            await self._wait_for_executor_calls(min(now + seconds, time.monotonic() + self._drain_seconds))
        self._close_callback()
        if confirm and not cancelled:
            await confirm_deliveries(self._callback, self._name, deadline)
        task_manager.cancel_background()
        await task_manager.wait_for_background(CANCEL_GRACE_SECONDS)
        self._task_adopter.close()
        detach(self._callback, self)
        if cancelled:
            raise asyncio.CancelledError

    # -- the interface that the callback uses -------------------------------------------------------------------------

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, object]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        lane: str | None = None,
        owner: str | None = None,
        background: bool = False,
    ) -> bool:
        """Run a task on the courier's loop; see `Callback.spawn`."""
        owner = owner or callback_name(self._callback)
        job = Job(fn, args, owner=owner, name=name, timeout=timeout, retry=retry, lane=lane, background=background)
        if self._task_manager is None:
            return False
        if not background:
            self._track_task(job)
        accepted = self._task_manager.spawn(job)
        if not accepted:
            self._event_tasks.pop(job, None)
        return accepted

    def publish(self, event: Event) -> None:
        """Record an event that the callback publishes; see `Callback.publish`."""
        if self._courier is not None:
            self._courier.publish(event)

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Pass the report on to the courier; see `Adapter.report_owed`."""
        if self._courier is not None:
            self._courier.report_owed(adapter, events, why, fix)

    def current_event(self) -> EventInfo | None:
        """Information on the event whose hook is running, or was called last."""
        envelope = self._envelope
        if envelope is None:
            return None
        carried, merged = self._batch_index is None, isinstance(envelope, MergedRow)
        return EventInfo(envelope.time, envelope.stream, envelope.seq, carried, merged)

    @property
    def has_courier(self) -> bool:
        """Whether a courier delivers, so that `has_subscription` works; False where events are only displayed."""
        return callable(getattr(self._courier, "has_subscription", None))

    def has_subscription(self, name: str) -> bool:
        """Whether an adapter of this name is followed in the same journal."""
        has_subscription = getattr(self._courier, "has_subscription", None)
        return callable(has_subscription) and bool(has_subscription(name))

    def may_call_hooks(self) -> bool:
        """Return True: it is attached for as long as it calls hooks."""
        return True

    def publishes_here(self) -> bool:
        """Whether this thread is inside a hook that this receiver called."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL_HOOK_CODE and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return callback_name(self._callback)

    def _call_hook(self, event: Event | UnknownEvent) -> BaseException | None:
        """Call the hook of this event and return what it raised, even KeyboardInterrupt or SystemExit."""
        kind = type(event) if isinstance(event, Event) else event.type
        try:
            call = self._calls[kind]
        except KeyError:
            call = self._calls[kind] = self._compile_call(event)
        if call is None:
            return None
        self._is_calling = self._was_called = True
        try:
            value = call(event)
            if value is not None:
                check_return_value(self._callback, _hook_name(event), value)
        except (_ArgumentMismatchError, RetryLaterError) as error:
            return error
        except BaseException as error:
            self._record_hook_failure(error, _hook_name(event))
            return error
        finally:
            self._is_calling = False
        return None

    def _compile_call(self, event: Event | UnknownEvent) -> Callable[[Any], object] | None:
        """Compile a function that calls the hook with an event's fields; None if the callback has no such hook."""
        if isinstance(event, UnknownEvent):
            hook = get_attribute(self._callback, _hook_name(event))
            source = "lambda event: hook(*(fitted := fit(hook, event)).args, **fitted.kwargs)"
        else:
            kind = type(event)
            hook = find_hook(self._callback, kind)
            names = [name for name in kind.__struct_fields__ if name not in kind.keywords]
            parts = [f"event.{name}" for name in names] + [f"{name}=event.{name}" for name in sorted(kind.keywords)]
            # Generated code, like the constructors of dataclasses: a loop over the fields would take twice as long.
            source = f"lambda event: hook({', '.join(parts)})"
        if not callable(hook):
            return None
        code = compile(source, f"{HOOK_FILENAME_PREFIX}, followed>", "eval")
        return eval(code, {"hook": hook, "receiver": self, "fit": _bind_arguments})  # noqa: S307 - consists of identifiers

    def _record_hook_failure(self, error: BaseException, hook: str) -> None:
        self.failures += 1
        self._set_last_failure(f"{hook}: {error_text(error)}")
        exit_error = isolate(self._callback, hook, error, self._faults)
        if exit_error is not None:  # an exit request, which a courier ignores: it is not the program's main thread
            facts = {"callback": self._name, "hook": hook}
            self._faults.warn("hook.exit_ignored", (id(self._callback), hook), error=error, **facts)

    def _set_last_failure(self, failure: str) -> None:
        self.last_failure = bounded_text(" ".join(failure.split()))[:MAX_FAILURE_CHARS]

    def _find_owner(self, frame: FrameType | None) -> str | None:
        """The callback's name if this receiver called the hook that the frame runs in."""
        hook_frame = find_hook_frame(frame)
        return self._name if hook_frame is not None and hook_frame.f_globals.get("receiver") is self else None

    def _adopt(self, task: "asyncio.Task[Any]", owner: str) -> None:
        if self._task_manager is not None:
            self._track_task(task)
            self._task_manager.adopt(task, owner)

    def _track_task(self, work: "Job | asyncio.Task[Any]") -> None:
        """Delay the current event until this task has ended, if one of the event's hooks has started it."""
        if self._is_calling and self._batch_index is not None:
            self._event_tasks[work] = self._batch_index

    def _on_task_end(self, finished: FinishedTask) -> None:
        self._event_tasks.pop(finished.work, None)
        self._task_finished.set()
        if finished.failure is not None:
            self.task_failures += 1
            self._set_last_failure(f"task {finished.name}: {finished.failure}")
            if finished.failure.startswith("cancelled"):
                self._cancelled_tasks.append(finished.name)

    async def _wait_for_event_tasks(self) -> None:
        """Wait for the tasks that hooks of this batch have started; stop waiting if none ends for a while."""
        while self._event_tasks:
            self._task_finished.clear()
            try:
                async with asyncio.timeout(self._task_wait_seconds):
                    await self._task_finished.wait()
            except TimeoutError:
                names = [each.name if isinstance(each, Job) else task_name(each) for each in self._event_tasks]
                self._event_tasks.clear()
                log().warning(
                    "task.outlasts_its_event",
                    callback=self._name,
                    count=len(names),
                    tasks=", ".join(sorted(set(names))[:10]),
                    waited_seconds=self._task_wait_seconds,
                    meaning="the event counts as delivered; closing the callback waits for the task",
                    fix="a watcher: self.spawn(..., background=True); for others a timeout: self.spawn(..., timeout=5)",
                )
                return

    async def _wait_for_executor_calls(self, deadline: float) -> None:
        """Wait for executor calls of the hooks that nothing awaits; count and log the late ones."""
        loop = asyncio.get_running_loop()
        if not count_unfinished_calls(loop):
            return
        failures, last_failure = self.task_failures, self.last_failure
        while (count := count_unfinished_calls(loop)) and time.monotonic() < deadline:
            if count != self.task_failures - failures:  # counted as failed until they end, in case a kill comes first
                self.task_failures = failures + count
                self._set_last_failure(f"{count} calls in the executor have not ended")
                self._report_problem(f"{count} calls in the executor have not ended")
            await asyncio.sleep(0.01)
        self.task_failures = failures + count
        self._report_problem(None)
        if count:
            log().warning("calls.left", callback=self._name, count=count, fix="give what they call a timeout")
        else:
            self.last_failure = last_failure

    def _close_callback(self) -> None:
        """Call the callback's `close`, isolated like a hook, if any hook was called."""
        callback = self._callback
        if not self._was_called or not isinstance(callback, Callback) or type(callback).close is Callback.close:
            return
        self._was_called = False
        previous = self.last_failure
        self.failures += 1  # until it returns: a close that hangs or ends the process has failed
        self._set_last_failure("close: it has not returned")
        self._report_problem("close() has not returned")
        try:
            check_return_value(callback, "close", callback.close())
        except BaseException as error:
            self.failures -= 1
            self._record_hook_failure(error, "close")
        else:
            self.failures -= 1
            self.last_failure = previous
        self._report_problem(None)

    async def _retry_hook(self, event: Event | UnknownEvent, error: BaseException) -> BaseException | None:
        """Retry a hook that raised; return what it raised last, None if it succeeded."""
        last: BaseException | None = error
        for attempt, pause in enumerate(self._retry_pauses, start=1):
            self._report_problem(error_text(last), attempt)
            await asyncio.sleep(pause)
            last = self._call_hook(event)
            if last is None:
                break
        if self._retry_pauses:
            self._report_problem(None)
        return last

    def _report_problem(self, error: str | None, attempts: int = 1) -> None:
        if self._on_problem is not None:
            status = DeliveryStatus(state="retrying", error=error, attempts=attempts)
            self._on_problem(None if error is None else status)

    async def _yield_to_others(self, seconds: float) -> None:
        """Let other tasks and threads run, and wait while too many spawned tasks are queued."""
        await asyncio.sleep(seconds)
        deadline = time.monotonic() + self._task_wait_seconds

        def has_too_many_tasks() -> bool:
            return bool(self._task_manager and self._task_manager.count_running_and_waiting()[1] >= MAX_PENDING_TASKS)

        while has_too_many_tasks() and time.monotonic() < deadline:  # noqa: ASYNC110 # by polling
            await asyncio.sleep(0.001)


class _ArgumentMismatchError(Exception):
    """An event of an unknown type does not match the signature of its hook."""


def _hook_name(event: Event | UnknownEvent) -> str:
    return type(event).hook if isinstance(event, Event) else f"on_{event.type}"


def _bind_arguments(hook: Callable[..., object], event: UnknownEvent) -> inspect.BoundArguments:
    """Bind the fields of the event to the parameters of the hook.

    Raises:
        _UnfitError: They do not match.
    """
    arguments: Any = getattr(event, "arguments", None)  # a later codec may know which fields go by keyword
    args, kwargs = ([*event.fields.values()], dict[str, Any]()) if arguments is None else arguments()
    try:
        return inspect.signature(hook).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise _ArgumentMismatchError(
            f"no module that the courier imports declares the event {event.type}, and its fields "
            f"({', '.join(event.fields)}) do not match the hook {_hook_name(event)}: {error}"
        ) from None


_CALL_HOOK_CODE: Final = CallbackReceiver._call_hook.__code__  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # same module
