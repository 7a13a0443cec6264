"""A callback and a sink that record what they get, for inspection by tests."""

import asyncio
import threading
from collections.abc import Sequence

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
