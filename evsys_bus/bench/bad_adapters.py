"""Adapters that compute, stall and hang, for the couriers of the suite `lateness`."""

import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import anyio

from evsys_bus.callback import Callback
from evsys_bus.config import register_callback, register_sink
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.events import Envelope
from evsys_bus.sink import Sink

COMPUTE_SECONDS = 0.005
STALL_SECONDS = 0.5


@register_callback("bench_computes")
class ComputingCallback(Callback):
    """A callback that holds the interpreter for five milliseconds at every step."""

    name: ClassVar[str] = "bench_computes"
    placement: ClassVar[Literal["inline", "follow"]] = "follow"

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Compute for `COMPUTE_SECONDS`."""
        del state, step_idx, batch, metrics
        deadline = time.perf_counter() + COMPUTE_SECONDS
        while time.perf_counter() < deadline:
            pass


@register_callback("bench_notes")
class LightCallback(Callback):
    """A callback that does as little as a well-behaved logger: a few dozen microseconds of work."""

    name: ClassVar[str] = "bench_notes"
    placement: ClassVar[Literal["inline", "follow"]] = "follow"

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Format a row."""
        del batch
        self.row = ",".join(f"{name}={value:.6g}" for name, value in {"step": step_idx, **metrics}.items()), state.step


@register_sink("bench_stalls")
class StallingSink(Sink):
    """A sink that takes half a second for every batch."""

    name: ClassVar[str] = "bench_stalls"
    max_batch_events = 50

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Sleep for `STALL_SECONDS`."""
        del batch
        await anyio.sleep(STALL_SECONDS)
        return None


@register_sink("bench_hangs")
class HangingSink(Sink):
    """A sink that never returns."""

    name: ClassVar[str] = "bench_hangs"

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Sleep forever."""
        del batch
        await anyio.sleep_forever()
