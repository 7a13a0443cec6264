"""`HookReceiver`: a followed callback, as its courier sees it: its hooks in order, with detached objects, isolated."""

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from evsys_bus.attached import RetryPolicy
from evsys_bus.callback import attach, callback_name, detach, hook_of, isolate
from evsys_bus.codec import error_text
from evsys_bus.delivery.followed import OnFailure
from evsys_bus.delivery.receiver import Report, Rewindable, Taken, Trouble
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, Event, UnknownEvent
from evsys_bus.tasks import Job, TaskOffice, wait_shielded

DRAIN_SECONDS: Final = 5.0
"""What spawned tasks may take at the close, before they are cancelled."""
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
        drain_seconds: What spawned tasks may take at the close.
        publish: Records what the callback learns; None where there is nowhere to record it.
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
        publish: Callable[[Event], None] | None = None,
    ) -> None:
        self.failures = 0
        """How often a hook has raised."""
        self._callback: Final = callback
        self._rewindable: Final = callback if isinstance(callback, Rewindable) else None
        self._on_failure: Final[OnFailure] = on_failure
        self._slice: Final = slice_seconds
        self._faults: Final = faults
        self._pauses: Final = tuple(retry_pauses) if on_failure == "retry" else ()
        self._drain_seconds: Final = drain_seconds
        self._publish: Final = publish
        self._calls: dict[type, Callable[[Any], object] | None] = {UnknownEvent: None}  # Any: an event of that type
        self._office: TaskOffice | None = None
        self._report: Report | None = None
        self._taken = Taken(0)

    async def open(self, report: Report) -> None:
        """Let the callback spawn on this loop."""
        loop = asyncio.get_running_loop()
        self._report = report
        self._office = TaskOffice(lambda: loop, self._faults)
        attach(self._callback, self)

    async def take(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> Taken:  # noqa: ARG002 # the protocol's
        """Call the hooks of these events."""
        dead: dict[int, str] = {}
        self._taken = Taken(0, dead)
        began = time.monotonic()
        for index, envelope in enumerate(batch):
            error = self._call(envelope.event)
            if error is not None and self._on_failure != "count":
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
        return self._taken

    def interrupted(self) -> Taken:
        """Those whose hooks have returned."""
        return self._taken

    def introduce(self, starts: Sequence[Envelope]) -> None:
        """Call the hooks of the starts."""
        for each in starts:
            self._call(each.event)

    def mark(self) -> Any:
        """The callback's, if it has one. Any: plain data."""
        return None if self._rewindable is None else self._rewindable.mark()

    def rewind(self, mark: Any) -> None:
        """Rewind the callback, if it can be. Any: what `mark` returned."""
        if self._rewindable is not None:
            self._rewindable.rewind(mark)

    async def close(self) -> None:
        """Wait for spawned tasks, at most the bound, and cancel the others."""
        if self._office is not None:
            _, cancelled = await wait_shielded(self._office.drain(self._drain_seconds, close=True))
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
    ) -> bool:
        """As `Callback.spawn`, on the courier's loop. Any: the arguments are those of ``fn``."""
        owner = owner or callback_name(self._callback)
        job = Job(fn, args, owner=owner, name=name, timeout=timeout, retry=retry, lane=lane)
        return self._office is not None and self._office.spawn(job)

    def publish(self, event: Event) -> None:
        """As `Callback.publish`."""
        if self._publish is not None:
            self._publish(event)

    def publishes_here(self) -> bool:
        """Whether this thread is inside a hook that this receiver called."""
        frame = inspect.currentframe()
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self:
                return True
            frame = frame.f_back
        return False

    # -----------------------------------------------------------------------------------------------------------------

    def _call(self, event: Event | UnknownEvent) -> BaseException | None:
        """Call the hook of this event; what it raised, which goes no further: not even a Ctrl-C or an exit."""
        kind = type(event)
        try:
            call = self._calls[kind]
        except KeyError:
            call = self._calls[kind] = _call_of(self._callback, event)
        if call is None:
            return None
        try:
            call(event)
        except BaseException as error:
            self._failed(error, event)
            return error
        return None

    def _failed(self, error: BaseException, event: Event | UnknownEvent) -> None:
        self.failures += 1
        hook = type(event).hook if isinstance(event, Event) else ""
        leave = isolate(self._callback, hook, error, self._faults)
        if leave is not None:  # nobody is here to leave: the courier is not the program
            facts = {"callback": callback_name(self._callback), "hook": hook}
            self._faults.warn("hook.exit_ignored", (id(self._callback), hook), error=error, **facts)

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
        while self._office is not None and self._office.load()[1] >= MAX_WAITING_TASKS:  # noqa: ASYNC110 # by polling
            await asyncio.sleep(0.001)


_CALL: Final = HookReceiver._call.__code__  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] # its own


def _call_of(callback: object, event: Event | UnknownEvent) -> Callable[[Any], object] | None:
    """What calls the callback's hook for events of this type, with their fields; None where there is no such hook."""
    kind = type(event)
    if not issubclass(kind, Event):
        return None
    hook = hook_of(callback, kind)
    if hook is None:
        return None
    names = [name for name in kind.__struct_fields__ if name not in kind.keywords]
    parts = [f"event.{name}" for name in names] + [f"{name}=event.{name}" for name in sorted(kind.keywords)]
    # Written out, as dataclasses write their constructors: a loop over the fields would take twice as long.
    return eval(f"lambda event: hook({', '.join(parts)})", {"hook": hook})  # noqa: S307 - made of identifiers
