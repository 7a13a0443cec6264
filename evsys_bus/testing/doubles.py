"""Test doubles: callbacks and sinks that record what they get or fail by plan, and a clock that is set by hand."""

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

from evsys_bus import events as ev
from evsys_bus.callback import Callback
from evsys_bus.context import (
    ArmResult,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Prediction,
    RunResult,
    TrainingBatch,
)
from evsys_bus.events import Envelope, Event
from evsys_bus.sink import Sink

UNTIL_TIMEOUT_SECONDS = 5.0
"""Default timeout of `until`."""


class ArrivalCounter:
    """A counter that is incremented on one thread and can be awaited on another's event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._waiting: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []

    def add(self, number: int) -> None:
        """Increase the count."""
        with self._lock:
            self._count += number
            reached = [each for each in self._waiting if each[0] <= self._count]
            self._waiting = [each for each in self._waiting if each[0] > self._count]
        for _, loop, event in reached:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    async def until(self, count: int, timeout: float) -> None:
        """Return when the count is reached; raise TimeoutError, with the current count, otherwise."""
        event = asyncio.Event()
        with self._lock:
            if self._count >= count:
                return
            self._waiting.append((count, asyncio.get_running_loop(), event))
        try:
            async with asyncio.timeout(timeout):
                await event.wait()
        except TimeoutError:
            raise TimeoutError(f"{self._count} of {count} events came within {timeout} s") from None


class RecordingCallback(Callback):
    """Records every event for which a hook is called.

    Example:
        >>> from evsys_bus.callback import dispatch
        >>> callback = RecordingCallback()
        >>> dispatch([callback], "on_step_end", None, 3, None, {"loss": 0.5})
        >>> callback.hooks, callback.events[0].metrics
        (['on_step_end'], {'loss': 0.5})
    """

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        """In the order of the calls; metrics are copied, everything else is the original object."""
        self._arrivals = ArrivalCounter()

    @property
    def hooks(self) -> list[str]:
        """The names of the called hooks, in order."""
        return [event.hook for event in self.events]

    async def until(self, count: int, timeout: float = UNTIL_TIMEOUT_SECONDS) -> None:
        """Return when this many events were recorded, on any thread.

        Raises:
            TimeoutError: They were not recorded in time.
        """
        await self._arrivals.until(count, timeout)

    def keep(self, event: ev.Event) -> None:
        """Record an event; called by every hook."""
        self.events.append(event)
        self._arrivals.add(1)

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Record it."""
        self.keep(ev.ExperimentStart(ctx))

    def on_group_start(self, ctx: LogContext, group_name: str) -> None:
        """Record it."""
        self.keep(ev.GroupStart(ctx, group_name))

    def on_run_start(self, ctx: LogContext) -> None:
        """Record it."""
        self.keep(ev.RunStart(ctx))

    def on_train_start(self, state: LoopState) -> None:
        """Record it."""
        self.keep(ev.TrainStart(state))

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Record it."""
        self.keep(ev.StepEnd(state, step_idx, batch, dict(metrics)))

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Record it."""
        self.keep(ev.Checkpoint(state, row))

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Record it."""
        self.keep(ev.Eval(state, step_idx, eval_name, dict(metrics)))

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Record it."""
        self.keep(ev.BenchmarkEval(ctx, eval_result, predictions, step))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Record it."""
        self.keep(ev.TrainEnd(state, artifacts))

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Record it."""
        self.keep(ev.RunEnd(ctx, run_result, arm))

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Record it."""
        self.keep(ev.ExperimentEnd(ctx, result))


def _recorder(event_type: type[ev.Event]) -> Callable[..., None]:
    def record(self: RecordingCallback, *values: Any) -> None:
        self.keep(event_type(*values))

    return record


for _each in (
    *(ev.Metrics, ev.EpochEnd, ev.Rollout, ev.TrainData, ev.Environment),
    *(ev.ConfigUpdate, ev.Summary, ev.Content, ev.Alert),
):
    setattr(RecordingCallback, _each.hook, _recorder(_each))


class RecordingSink(Sink):
    """Records every batch.

    Example:
        >>> sink = RecordingSink()
        >>> envelope = ev.Envelope("s", 1, 0.0, ev.UnknownEvent("tick", {}))
        >>> asyncio.run(sink.write([envelope]))
        >>> [each.seq for each in sink.envelopes]
        [1]
    """

    def __init__(self) -> None:
        self.batches: list[list[ev.Envelope]] = []
        """The acknowledged batches."""
        self.opened = 0
        """How often `open` returned."""
        self.closed = 0
        self._arrivals = ArrivalCounter()

    @property
    def envelopes(self) -> list[ev.Envelope]:
        """The envelopes of all batches, in order."""
        return [envelope for batch in self.batches for envelope in batch]

    async def until(self, count: int, timeout: float = UNTIL_TIMEOUT_SECONDS) -> None:
        """Return when this many envelopes were recorded, on any thread.

        Raises:
            TimeoutError: They were not recorded in time.
        """
        await self._arrivals.until(count, timeout)

    def keep(self, batch: Sequence[ev.Envelope]) -> None:
        """Record a batch; called by `write`."""
        self.batches.append(list(batch))
        self._arrivals.add(len(batch))

    async def open(self) -> None:
        """Count the call."""
        self.opened += 1

    async def write(self, batch: Sequence[ev.Envelope]) -> int | None:
        """Record the batch."""
        self.keep(batch)

    async def close(self) -> None:
        """Count the call."""
        self.closed += 1


PlannedOutcome: TypeAlias = BaseException | int | Literal["hang", "deaf"] | None
"""Result of a call: an error to raise; the number of events taken from the batch; a wait that ends only when cancelled
(``hang``), or not even then (``deaf``); None takes the whole batch."""


class FailingCallback(RecordingCallback):
    """Raises by plan, with one entry for each call of a hook; after the end of the plan it records everything.

    Example:
        >>> from evsys_bus.callback import dispatch
        >>> callback = FailingCallback([None, ValueError("no")])
        >>> callback.on_group_start(None, "a")
        >>> callback.on_group_start(None, "b")
        Traceback (most recent call last):
        ValueError: no
        >>> callback.on_group_start(None, "c")
        >>> [event.group_name for event in callback.events]
        ['a', 'c']
    """

    def __init__(self, plan: Iterable[BaseException | None]) -> None:
        super().__init__()
        self._plan = iter(plan)
        self.calls = 0
        """Including those that failed."""

    def keep(self, event: Event) -> None:
        """Record the event, or raise as planned."""
        self.calls += 1
        error = next(self._plan, None)
        if error is not None:
            raise error
        super().keep(event)


class FailingSink(RecordingSink):
    """Fails by plan, with one entry for each `write`; after the end of the plan it records everything.

    Args:
        plan: For `write`.
        opening: For `open`.

    Example:
        >>> sink = FailingSink([OSError("away")])
        >>> asyncio.run(sink.write([]))
        Traceback (most recent call last):
        OSError: away
        >>> asyncio.run(sink.write([]))
        >>> sink.calls
        2
    """

    def __init__(self, plan: Iterable[PlannedOutcome] = (), *, opening: Iterable[PlannedOutcome] = ()) -> None:
        super().__init__()
        self._plan: Iterator[PlannedOutcome] = iter(plan)
        self._opening: Iterator[PlannedOutcome] = iter(opening)
        self._released = False
        self.calls = 0
        """Calls of `write`, including those that failed."""
        self.cancellations = 0
        """How often a hanging call was cancelled."""

    def release(self) -> None:
        """Let deaf calls return at their next cancellation or within 10 ms, so that a test can end."""
        self._released = True

    async def open(self) -> None:
        """Open, as planned."""
        await self._apply(next(self._opening, None))
        await super().open()

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Record the batch, as planned."""
        self.calls += 1
        outcome = next(self._plan, None)
        await self._apply(outcome)
        if isinstance(outcome, int):
            self.keep(batch[:outcome])
            return outcome
        self.keep(batch)
        return None

    async def _apply(self, outcome: PlannedOutcome) -> None:
        if isinstance(outcome, BaseException):
            raise outcome
        while outcome in {"hang", "deaf"} and not self._released:
            try:
                await asyncio.sleep(0.01)  # release() may come from another thread
            except asyncio.CancelledError:
                self.cancellations += 1
                if outcome == "hang":
                    raise


class ManualClock:
    """A wall clock that may be set to any time, and a monotonic clock that only `advance` moves."""

    def __init__(self, wall: float = 1_700_000_000.0) -> None:
        self._wall = wall
        self._monotonic = 0.0

    def wall(self) -> float:
        """Return seconds since the epoch."""
        return self._wall

    def monotonic(self) -> float:
        """Return seconds."""
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Advance both clocks."""
        self._wall += seconds
        self._monotonic += seconds

    def jump(self, seconds: float) -> None:
        """Set the wall clock, as an administrator or a time server does."""
        self._wall += seconds
