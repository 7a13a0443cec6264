"""`HookReceiver`: delivers events to a followed callback by calling its hooks in order, isolated from their errors."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType
from typing import Any, Final

from evsys_bus.attached import Adapter, EventInfo, Publishes, RetryPolicy
from evsys_bus.callback import Callback, attach, attribute, callback_name, check_returned, detach, hook_of, isolate
from evsys_bus.codec import error_text
from evsys_bus.delivery.followed import OnFailure
from evsys_bus.delivery.receiver import Report, Rewindable, Taken, Trouble, settle
from evsys_bus.delivery.retry import plain_text
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Envelope, Event, UnknownEvent
from evsys_bus.tasks import (
    CANCEL_GRACE_SECONDS,
    HOOK_CALLS,
    BareTasks,
    Ended,
    Job,
    TaskOffice,
    hook_call,
    name_of,
    unended_calls,
    wait_shielded,
)

DRAIN_SECONDS: Final = 5.0
"""How long tasks may take in a `close` without a deadline before they are cancelled."""
HOLD_SECONDS: Final = 10.0
"""How long a batch waits for the tasks of its hooks while none of them ends."""
MOST_LETTERS: Final = 500
"""Maximum length of the text of the last failure."""
RETRY_PAUSES: Final = (0.5, 2.0, 8.0)
"""Pauses in seconds before each retry of a hook that raised, with ``on_failure="retry"``."""
MAX_WAITING_TASKS: Final = 1000
"""How many spawned tasks may be queued before the next hook waits for them."""
_BETWEEN_YIELDS: Final = 128


class HookReceiver:
    """Calls hooks on the courier's loop; a hook that blocks delays only its own courier.

    Args:
        callback: The object with the hooks.
        on_failure: What happens to an event when a hook raises.
        slice_seconds: Sleep for this long after as much work, so that other threads can run; None for never.
        faults: Where failures are logged.
        retry_pauses: Pauses before each retry of a hook.
        drain_seconds: How long tasks may take in a `close` without a deadline.
        hold_seconds: How long a batch waits for the tasks of its hooks while none of them ends.
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
        hold_seconds: float = HOLD_SECONDS,
        courier: Publishes | None = None,
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
        self._slice: Final = slice_seconds
        self._faults: Final = faults
        self._pauses: Final = tuple(retry_pauses) if on_failure == "retry" else ()
        self._drain_seconds: Final = drain_seconds
        self._hold_seconds: Final = hold_seconds
        self._courier: Final = courier
        self._calls: dict[type | str, Callable[[Any], object] | None] = {}
        """Compiled hook calls by event type, or by tag for event types that this process does not know."""
        self._office: TaskOffice | None = None
        self._report: Report | None = None
        self._taken = Taken(0)
        self._envelope: Envelope | None = None
        """The event whose hook was called last."""
        self._index: int | None = None
        """Index of that event in its batch; None for a repeated start."""
        self._calling = False
        self._was_called = False
        self._bare_tasks: Final = BareTasks(lambda: self._calling, self._owner_around, self._adopt)
        self._held: dict[Job | asyncio.Task[Any], int] = {}
        """Unfinished tasks that hooks of this batch have started, and the index of the event."""
        self._one_ended: Final = asyncio.Event()
        self._cancelled: list[str] = []

    async def open(self, report: Report) -> None:
        """Attach the callback, so that it can start tasks on this loop."""
        loop = asyncio.get_running_loop()
        self._report = report
        self._office = TaskOffice(lambda: loop, self._faults, on_end=self._task_ended)
        self._bare_tasks.begin_here()
        attach(self._callback, self)

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:  # noqa: ARG002 # see `Receiver`
        """Call the hooks of these events and wait for the tasks that they start.

        Raises:
            RetryLaterError: A hook raised it: the callback must be rebuilt and rewound to its last mark.
        """
        dead: dict[int, str] = {}
        self._taken = Taken(0, dead)
        self._held.clear()
        began = time.monotonic()
        for index, envelope in enumerate(batch):
            self._envelope, self._index = envelope, index
            error = self._call(envelope.event)
            if isinstance(error, RetryLaterError):
                raise error
            if isinstance(error, _UnfitError):
                dead[index] = str(error)
            elif error is not None and self._on_failure != "count":
                error = await self._again(envelope.event, error)
                if error is not None:
                    dead[index] = error_text(error)
            self._taken = Taken(index + 1, dead)
            if self._slice is None:
                if not index % _BETWEEN_YIELDS:
                    await self._yield(0.0)
            elif time.monotonic() - began >= self._slice:
                await self._yield(self._slice)
                began = time.monotonic()
        if self._held:
            await self._hold()
        self._bare_tasks.look_after()
        return self._taken

    def interrupted(self) -> Taken | None:
        """The events whose hooks have returned, up to the first one with an unfinished task.

        None if hooks of later events may have written rows that the callback's mark would cover.
        """
        done = min(self._held.values(), default=self._taken.done)
        if done >= self._taken.done:
            return self._taken
        if self._rewindable is not None:
            return None
        return Taken(done, {index: why for index, why in self._taken.dead.items() if index < done})

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Call the hooks of the start events; raises RetryLaterError like `take`."""
        for each in starts:
            self._envelope, self._index = each, None
            error = self._call(each.event)
            if isinstance(error, RetryLaterError):
                raise error

    def mark(self) -> Any:
        """The callback's mark; None unless it is `Rewindable`."""
        return None if self._rewindable is None else self._rewindable.mark()

    def rewind(self, mark: Any) -> None:
        """Rewind the callback to the mark, if it is `Rewindable`."""
        if self._rewindable is not None:
            self._rewindable.rewind(mark)

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """Wait for the tasks, cancel late ones, and close the callback.

        Args:
            deadline: Until when tasks and confirmations may take (monotonic); None for the default limits.
            settles: Whether to ask the destination to confirm delivered events.
        """
        office = self._office
        if office is None:
            return
        self._cancelled.clear()
        now = time.monotonic()
        seconds = self._drain_seconds if deadline is None else max(0.0, deadline - now)
        cancelled = await wait_shielded(office.drain(seconds, close=True), most=1)
        if cancelled:  # give the cancelled tasks a moment to end
            office.close_now()
            await wait_shielded(office.drain(0.0, close=True))
        if self._cancelled:
            names = ", ".join(sorted(self._cancelled)[:10])
            log().warning("tasks.cancelled", callback=self._name, count=len(self._cancelled), tasks=names)
        if not cancelled:
            await self._calls_ended(min(now + seconds, time.monotonic() + self._drain_seconds))
        self._close_callback()
        if settles and not cancelled:
            await settle(self._callback, self._name, deadline)
        office.end_background()
        await office.background_ended(CANCEL_GRACE_SECONDS)
        self._bare_tasks.end()
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
        if self._office is None:
            return False
        if not background:
            self._hold_on(job)
        taken = self._office.spawn(job)
        if not taken:
            self._held.pop(job, None)
        return taken

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
        at = self._envelope
        return None if at is None else EventInfo(at.time, at.stream, at.seq, carried=self._index is None)

    @property
    def has_courier(self) -> bool:
        """Whether a courier delivers, so that `follows` works; False where events are only displayed."""
        return callable(getattr(self._courier, "follows", None))

    def follows(self, name: str) -> bool:
        """Whether an adapter of this name is followed in the same journal."""
        follows = getattr(self._courier, "follows", None)
        return callable(follows) and bool(follows(name))

    def publishes_here(self) -> bool:
        """Whether this thread is inside a hook that this receiver called."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return callback_name(self._callback)

    def _call(self, event: Event | UnknownEvent) -> BaseException | None:
        """Call the hook of this event and return what it raised, even KeyboardInterrupt or SystemExit."""
        kind = type(event) if isinstance(event, Event) else event.type
        try:
            call = self._calls[kind]
        except KeyError:
            call = self._calls[kind] = self._call_of(event)
        if call is None:
            return None
        self._calling = self._was_called = True
        try:
            value = call(event)
            if value is not None:
                check_returned(self._callback, _hook_for(event), value)
        except (_UnfitError, RetryLaterError) as error:
            return error
        except BaseException as error:
            self._failed(error, _hook_for(event))
            return error
        finally:
            self._calling = False
        return None

    def _call_of(self, event: Event | UnknownEvent) -> Callable[[Any], object] | None:
        """Compile a function that calls the hook with an event's fields; None if the callback has no such hook."""
        if isinstance(event, UnknownEvent):
            hook = attribute(self._callback, _hook_for(event))
            source = "lambda event: hook(*(fitted := fit(hook, event)).args, **fitted.kwargs)"
        else:
            kind = type(event)
            hook = hook_of(self._callback, kind)
            names = [name for name in kind.__struct_fields__ if name not in kind.keywords]
            parts = [f"event.{name}" for name in names] + [f"{name}=event.{name}" for name in sorted(kind.keywords)]
            # Generated code, like the constructors of dataclasses: a loop over the fields would take twice as long.
            source = f"lambda event: hook({', '.join(parts)})"
        if not callable(hook):
            return None
        code = compile(source, f"{HOOK_CALLS}, followed>", "eval")
        return eval(code, {"hook": hook, "receiver": self, "fit": _fitted})  # noqa: S307 - consists of identifiers

    def _failed(self, error: BaseException, hook: str) -> None:
        self.failures += 1
        self._note(f"{hook}: {error_text(error)}")
        leave = isolate(self._callback, hook, error, self._faults)
        if leave is not None:  # an exit request, which a courier ignores: it is not the program's main thread
            facts = {"callback": self._name, "hook": hook}
            self._faults.warn("hook.exit_ignored", (id(self._callback), hook), error=error, **facts)

    def _note(self, failure: str) -> None:
        self.last_failure = plain_text(" ".join(failure.split()))[:MOST_LETTERS]

    def _owner_around(self, frame: FrameType | None) -> str | None:
        """The callback's name if this receiver called the hook that the frame runs in."""
        call = hook_call(frame)
        return self._name if call is not None and call.f_globals.get("receiver") is self else None

    def _adopt(self, task: "asyncio.Task[Any]", owner: str) -> None:
        if self._office is not None:
            self._hold_on(task)
            self._office.adopt(task, owner)

    def _hold_on(self, work: "Job | asyncio.Task[Any]") -> None:
        """Delay the current event until this task has ended, if one of the event's hooks has started it."""
        if self._calling and self._index is not None:
            self._held[work] = self._index

    def _task_ended(self, ended: Ended) -> None:
        self._held.pop(ended.work, None)
        self._one_ended.set()
        if ended.failure is not None:
            self.task_failures += 1
            self._note(f"task {ended.name}: {ended.failure}")
            if ended.failure.startswith("cancelled"):
                self._cancelled.append(ended.name)

    async def _hold(self) -> None:
        """Wait for the tasks that hooks of this batch have started; stop waiting if none ends for a while."""
        while self._held:
            self._one_ended.clear()
            try:
                async with asyncio.timeout(self._hold_seconds):
                    await self._one_ended.wait()
            except TimeoutError:
                names = [each.name if isinstance(each, Job) else name_of(each) for each in self._held]
                self._held.clear()
                log().warning(
                    "task.outlasts_its_event",
                    callback=self._name,
                    count=len(names),
                    tasks=", ".join(sorted(set(names))[:10]),
                    waited_seconds=self._hold_seconds,
                    meaning="the event counts as delivered; closing the callback waits for the task",
                    fix="a watcher: self.spawn(..., background=True); for others a timeout: self.spawn(..., timeout=5)",
                )
                return

    async def _calls_ended(self, until: float) -> None:
        """Wait for executor calls of the hooks that nothing awaits; count and log the late ones."""
        loop = asyncio.get_running_loop()
        if not unended_calls(loop):
            return
        failures, last_failure = self.task_failures, self.last_failure
        while (count := unended_calls(loop)) and time.monotonic() < until:
            if count != self.task_failures - failures:  # counted as failed until they end, in case a kill comes first
                self.task_failures = failures + count
                self._note(f"{count} calls in the executor have not ended")
                self._tell(Trouble("retrying", f"{count} calls in the executor have not ended"))
            await asyncio.sleep(0.01)
        self.task_failures = failures + count
        self._tell(None)
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
        before = self.last_failure
        self.failures += 1  # until it returns: a close that hangs or ends the process has failed
        self._note("close: it has not returned")
        self._tell(Trouble("retrying", "close() has not returned"))
        try:
            check_returned(callback, "close", callback.close())
        except BaseException as error:
            self.failures -= 1
            self._failed(error, "close")
        else:
            self.failures -= 1
            self.last_failure = before
        self._tell(None)

    async def _again(self, event: Event | UnknownEvent, error: BaseException) -> BaseException | None:
        """Retry a hook that raised; return what it raised last, None if it succeeded."""
        last: BaseException | None = error
        for attempt, pause in enumerate(self._pauses, start=1):
            self._tell(Trouble("retrying", error_text(last), attempts=attempt))
            await asyncio.sleep(pause)
            last = self._call(event)
            if last is None:
                break
        if self._pauses:
            self._tell(None)
        return last

    def _tell(self, trouble: Trouble | None) -> None:
        if self._report is not None:
            self._report(trouble)

    async def _yield(self, seconds: float) -> None:
        """Let other tasks and threads run, and wait while too many spawned tasks are queued."""
        await asyncio.sleep(seconds)
        until = time.monotonic() + self._hold_seconds
        office = self._office
        while office and office.load()[1] >= MAX_WAITING_TASKS and time.monotonic() < until:  # noqa: ASYNC110 # by polling
            await asyncio.sleep(0.001)


class _UnfitError(Exception):
    """An event of an unknown type does not match the signature of its hook."""


def _hook_for(event: Event | UnknownEvent) -> str:
    return type(event).hook if isinstance(event, Event) else f"on_{event.type}"


def _fitted(hook: Callable[..., object], event: UnknownEvent) -> inspect.BoundArguments:
    """Bind the fields of the event to the parameters of the hook.

    Raises:
        _UnfitError: They do not match.
    """
    arguments: Any = getattr(event, "arguments", None)  # a later codec may know which fields go by keyword
    args, kwargs = ([*event.fields.values()], dict[str, Any]()) if arguments is None else arguments()
    try:
        return inspect.signature(hook).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise _UnfitError(
            f"no module that the courier imports declares the event {event.type}, and its fields "
            f"({', '.join(event.fields)}) do not match the hook {_hook_for(event)}: {error}"
        ) from None


_CALL: Final = HookReceiver._call.__code__  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # same module
