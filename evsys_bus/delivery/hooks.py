"""`HookReceiver`: a followed callback, as its courier sees it: its hooks in order, with detached objects, isolated."""

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
"""What tasks may take at the close where no deadline is given, before they are cancelled."""
HOLD_SECONDS: Final = 10.0
"""How long a batch waits for the tasks of its hooks while none of them ends."""
MOST_LETTERS: Final = 500
"""Of what is said of the last failure."""
RETRY_PAUSES: Final = (0.5, 2.0, 8.0)
"""Before a hook that raised is called again, where failures are to be retried."""
MAX_WAITING_TASKS: Final = 1000
"""Spawned tasks that may wait for their turn before the next hook waits for them."""
_BETWEEN_YIELDS: Final = 128


class HookReceiver:
    """Calls hooks on the courier's loop; one that blocks holds up its own courier and nothing else.

    Args:
        callback: Whose hooks.
        on_failure: What a hook that raises means for its event.
        slice_seconds: After so much work, sleep as long, where others in this process want the interpreter.
        faults: Where failures are said.
        retry_pauses: How often a hook is called again, and when.
        drain_seconds: What tasks may take at a close without a deadline.
        hold_seconds: How long a batch waits for the tasks of its hooks while none of them ends.
        courier: Records what the callback learns, and what it owes; None where there is nowhere to record it.
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
        """Tasks of the hooks that raised, ran out of time or were cancelled."""
        self.last_failure: str | None = None
        """The newest of both: the hook or the task, and what it raised."""
        self._callback: Final = callback
        self._rewindable: Final = callback if isinstance(callback, Rewindable) else None
        self._on_failure: Final[OnFailure] = on_failure
        self._slice: Final = slice_seconds
        self._faults: Final = faults
        self._pauses: Final = tuple(retry_pauses) if on_failure == "retry" else ()
        self._drain_seconds: Final = drain_seconds
        self._hold_seconds: Final = hold_seconds
        self._courier: Final = courier
        self._calls: dict[type | str, Callable[[Any], object] | None] = {}  # Any: an event of that type
        """By the type of events; by their tag for those whose type this process does not know."""
        self._office: TaskOffice | None = None
        self._report: Report | None = None
        self._taken = Taken(0)
        self._envelope: Envelope | None = None
        """Of the event whose hook was called last."""
        self._index: int | None = None
        """Of that event in its batch; None for an introduction."""
        self._calling = False
        self._was_called = False
        self._bare_tasks: Final = BareTasks(lambda: self._calling, self._owner_around, self._adopt)
        self._held: dict[Job | asyncio.Task[Any], int] = {}  # Any: a task's result is its maker's business
        """The tasks that hooks of this batch have started, and the index of the event."""
        self._one_ended: Final = asyncio.Event()
        self._cancelled: list[str] = []

    async def open(self, report: Report) -> None:
        """Let the callback start tasks on this loop."""
        loop = asyncio.get_running_loop()
        self._report = report
        self._office = TaskOffice(lambda: loop, self._faults, on_end=self._task_ended)
        self._bare_tasks.begin_here()
        attach(self._callback, self)

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:  # noqa: ARG002 # the protocol's
        """Call the hooks of these events, and wait for the tasks that they start.

        Raises:
            RetryLaterError: A hook raised it: the callback is to begin anew, where it stood last.
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
        """Those whose hooks have returned, up to the first of which a task has not ended.

        None where later ones have left rows that the callback's mark would cover.
        """
        done = min(self._held.values(), default=self._taken.done)
        if done >= self._taken.done:
            return self._taken
        if self._rewindable is not None:
            return None
        return Taken(done, {index: why for index, why in self._taken.dead.items() if index < done})

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Call the hooks of the starts; raises RetryLaterError, as `take`."""
        for each in starts:
            self._envelope, self._index = each, None
            error = self._call(each.event)
            if isinstance(error, RetryLaterError):
                raise error

    def mark(self) -> Any:
        """The callback's, if it has one. Any: plain data."""
        return None if self._rewindable is None else self._rewindable.mark()

    def rewind(self, mark: Any) -> None:
        """Rewind the callback, if it can be. Any: what `mark` returned."""
        if self._rewindable is not None:
            self._rewindable.rewind(mark)

    async def close(self, deadline: float | None = None, *, settles: bool = False) -> None:
        """Wait for the tasks, cancel what is late, and close the callback.

        Args:
            deadline: How long tasks may take, and what is owed (monotonic); None for the receiver's own bounds.
            settles: Have the far side confirm what is owed.
        """
        office = self._office
        if office is None:
            return
        self._cancelled.clear()
        now = time.monotonic()
        seconds = self._drain_seconds if deadline is None else max(0.0, deadline - now)
        cancelled = await wait_shielded(office.drain(seconds, close=True), most=1)
        if cancelled:  # what was cancelled gets a moment to end
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

    # -- what the callback is attached to -----------------------------------------------------------------------------

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
        """As `Callback.spawn`, on the courier's loop."""
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
        """As `Callback.publish`."""
        if self._courier is not None:
            self._courier.publish(event)

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """As `Adapter.report_owed`."""
        if self._courier is not None:
            self._courier.report_owed(adapter, events, why, fix)

    def current_event(self) -> EventInfo | None:
        """Of the event whose hook runs, or whose hook was called last."""
        at = self._envelope
        return None if at is None else EventInfo(at.time, at.stream, at.seq, carried=self._index is None)

    @property
    def has_courier(self) -> bool:
        """Whether a courier delivers, so that `follows` can be asked; not so where events are only shown."""
        return callable(getattr(self._courier, "follows", None))

    def follows(self, name: str) -> bool:
        """Whether a follower of this name is on record where this one is delivered to, and has not left."""
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
        """Call the hook of this event; what it raised, which goes no further: not even a Ctrl-C or an exit."""
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
        """What calls the hook for events of this type, with their fields; None where the callback has no such hook."""
        if isinstance(event, UnknownEvent):
            hook = attribute(self._callback, _hook_for(event))
            source = "lambda event: hook(*(fitted := fit(hook, event)).args, **fitted.kwargs)"
        else:
            kind = type(event)
            hook = hook_of(self._callback, kind)
            names = [name for name in kind.__struct_fields__ if name not in kind.keywords]
            parts = [f"event.{name}" for name in names] + [f"{name}=event.{name}" for name in sorted(kind.keywords)]
            # Written out, as dataclasses write their constructors: a loop over the fields would take twice as long.
            source = f"lambda event: hook({', '.join(parts)})"
        if not callable(hook):
            return None
        code = compile(source, f"{HOOK_CALLS}, followed>", "eval")
        return eval(code, {"hook": hook, "receiver": self, "fit": _fitted})  # noqa: S307 - made of identifiers

    def _failed(self, error: BaseException, hook: str) -> None:
        self.failures += 1
        self._note(f"{hook}: {error_text(error)}")
        leave = isolate(self._callback, hook, error, self._faults)
        if leave is not None:  # nobody is here to leave: the courier is not the program
            facts = {"callback": self._name, "hook": hook}
            self._faults.warn("hook.exit_ignored", (id(self._callback), hook), error=error, **facts)

    def _note(self, failure: str) -> None:
        self.last_failure = plain_text(" ".join(failure.split()))[:MOST_LETTERS]

    def _owner_around(self, frame: FrameType | None) -> str | None:
        """The callback's name, if this receiver called the hook that this frame is in."""
        call = hook_call(frame)
        return self._name if call is not None and call.f_globals.get("receiver") is self else None

    def _adopt(self, task: "asyncio.Task[Any]", owner: str) -> None:
        if self._office is not None:
            self._hold_on(task)
            self._office.adopt(task, owner)

    def _hold_on(self, work: "Job | asyncio.Task[Any]") -> None:
        """Count the event at hand as delivered only when this has ended, if one of its hooks has started it."""
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
        """Wait for the tasks that hooks of this batch have started; let go of them if none ends for a while."""
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
                    meaning="the event counts as delivered; the task is waited for at the close",
                    fix="a watcher: self.spawn(..., background=True); for others a timeout: self.spawn(..., timeout=5)",
                )
                return

    async def _calls_ended(self, until: float) -> None:
        """Wait for what hooks gave to the loop's executor and nobody awaits; what is late is counted and told."""
        loop = asyncio.get_running_loop()
        if not unended_calls(loop):
            return
        failures, last_failure = self.task_failures, self.last_failure
        while (count := unended_calls(loop)) and time.monotonic() < until:
            if count != self.task_failures - failures:  # until they end, they have failed: a kill may come first
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
        """Behind the wall of the hooks."""
        callback = self._callback
        if not self._was_called or not isinstance(callback, Callback) or type(callback).close is Callback.close:
            return
        self._was_called = False
        before = self.last_failure
        self.failures += 1  # until it returns: one that hangs, or ends the process, has failed
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
        """Call a hook that raised a few times more; what it raised last."""
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
        """Let others have the loop, and the interpreter; and let spawned tasks catch up."""
        await asyncio.sleep(seconds)
        until = time.monotonic() + self._hold_seconds
        office = self._office
        while office and office.load()[1] >= MAX_WAITING_TASKS and time.monotonic() < until:  # noqa: ASYNC110 # by polling
            await asyncio.sleep(0.001)


class _UnfitError(Exception):
    """An event of a type that is not known here does not fit the hook of its name."""


def _hook_for(event: Event | UnknownEvent) -> str:
    return type(event).hook if isinstance(event, Event) else f"on_{event.type}"


def _fitted(hook: Callable[..., object], event: UnknownEvent) -> inspect.BoundArguments:
    """The arguments of the hook, from the fields of the event.

    Raises:
        _UnfitError: They do not fit.
    """
    arguments: Any = getattr(event, "arguments", None)  # Any: of a later codec, which knows which go by keyword
    args, kwargs = ([*event.fields.values()], dict[str, Any]()) if arguments is None else arguments()
    try:
        return inspect.signature(hook).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise _UnfitError(
            f"no module that the courier imports declares the event {event.type}, and its fields "
            f"({', '.join(event.fields)}) do not fit the hook {_hook_for(event)}: {error}"
        ) from None


_CALL: Final = HookReceiver._call.__code__  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # its own
