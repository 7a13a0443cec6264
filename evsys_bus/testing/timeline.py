"""Sample events for testing adapters: a small experiment of two runs, as live objects and as read from a record."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from evsys_bus import events as ev
from evsys_bus.codec import decode, encode
from evsys_bus.context import (
    ArmResult,
    ContentItem,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunResult,
    TrainingBatch,
)

RUNS: Final = ("wide", "narrow")
STEPS: Final = 4


class Timeline:
    """The events of one small experiment below a folder, created on each call."""

    def __init__(self, folder: Path, runs: Iterable[str] = RUNS) -> None:
        self.experiment = LogContext(folder, config={"metadata": {"hypothesis": "Wider is better."}})
        self.contexts = {run: self.experiment.for_run(run, {"seed": 7}, "arms") for run in runs}

    def state(self, run: str, step: int = 0) -> LoopState:
        """Return a run's state at this step."""
        ctx = self.contexts[run]
        return LoopState(step=step, num_steps=STEPS, output_dir=ctx.run_dir, ctx=ctx)

    def start_events(self, step: int = 0) -> Iterator[ev.Event]:
        """Yield the start events; ``step`` is the first step, as when a courier repeats them."""
        yield ev.ExperimentStart(self.experiment)
        for run, ctx in self.contexts.items():
            yield ev.GroupStart(ctx, "arms")
            yield ev.RunStart(ctx)
            yield ev.TrainStart(self.state(run, step))

    def step_events(self, step: int, metrics: Mapping[str, Any] | None = None) -> Iterator[ev.Event]:
        """Yield the events of one step of each run, in turns, with everything that a step may include."""
        for run, ctx in self.contexts.items():
            state, row = self.state(run, step), dict(metrics or {"loss": 0.5 / (step + 1), "step_seconds": 0.25})
            yield ev.StepEnd(state, step, TrainingBatch(loss_fn="mse", metrics={"tokens": 3}), row)
            yield ev.Checkpoint(state, ManifestRow(f"{step:06d}", batch=step, state_path=str(ctx.run_dir / "state")))
            yield ev.Eval(state, step, "held out", {"accuracy": 0.5})
            eval_result = EvalResult(
                "tasks", "tasks-1", {"accuracy": 0.75}, {"easy": {"accuracy": 1.0}}, 0.5, step, ["val"]
            )
            yield ev.BenchmarkEval(ctx, eval_result, [{"task_id": "1", "reward": 1.0, "output": "yes"}], step)

    def fact_events(self, step: int) -> Iterator[ev.Event]:
        """Yield what each run may log beside its metrics: facts, content, alerts, trajectories."""
        for run, ctx in self.contexts.items():
            state = self.state(run, step)
            yield ev.Environment(ctx, {"python": "3.11", "command": ["train.py"]})
            yield ev.ConfigUpdate(ctx, {"batch": 8})
            yield ev.TrainData(ctx, [{"text": "one and one"}])
            yield ev.Metrics(state, step, {"loss": 0.5})
            yield ev.Rollout(state, step, [{"reward": 1.0, "text": "two"}], ["sum"])
            yield ev.EpochEnd(state, 0, {"loss": 0.25})
            yield ev.Content(state, step, ContentItem("text", "answer", data={"text": "two"}))
            counts = {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]}
            yield ev.Content(state, step, ContentItem("histogram", "lengths", data=counts))
            yield ev.Content(
                state, None, ContentItem("image", "gone", "media/gone.png", "00", "image/png", 8, "a file")
            )
            yield ev.Summary(ctx, {"best": 0.25})
            yield ev.Alert(ctx, "loss is high", "twice the baseline")

    def end_events(self) -> Iterator[ev.Event]:
        """Yield the end events."""
        arms: list[ArmResult] = []
        for run, ctx in self.contexts.items():
            artifacts = LoopArtifacts(str(ctx.run_dir), None, [ManifestRow("final", batch=STEPS - 1)], STEPS, 1.5)
            yield ev.TrainEnd(self.state(run, STEPS - 1), artifacts)
            yield ev.BenchmarkEval(ctx, EvalResult("final", metrics={"accuracy": 0.875}), [{"task_id": "2"}])
            result = RunResult(run, metrics={"loss": 0.125}, artifacts=artifacts)
            arms.append(ArmResult(run, {"seed": 7}, metrics={"loss": 0.125}, eval_metrics={"accuracy": 0.875}))
            yield ev.RunEnd(ctx, result, arms[-1])
        yield ev.ExperimentEnd(self.experiment, ExperimentResult("trial", arms=arms, best_arm="wide", best_score=0.875))

    def all_events(self, *, facts: bool = False) -> Iterator[ev.Event]:
        """Yield all events, from first to last; with ``facts`` also those of `fact_events`."""
        yield from self.start_events()
        for step in range(STEPS):
            yield from self.step_events(step)
            if facts:
                yield from self.fact_events(step)
        yield from self.end_events()


def minimal_events(folder: Path) -> Iterator[ev.Event]:
    """Yield the same hooks' events with minimal objects."""
    directory = folder / "least"  # a fixed name, because adapters record it and temporary folders differ
    directory.mkdir(exist_ok=True)
    ctx, state = LogContext(directory), LoopState(step=0, num_steps=0, output_dir=directory)
    yield ev.ExperimentStart(ctx)
    yield ev.GroupStart(ctx, "")
    yield ev.RunStart(ctx)
    yield ev.TrainStart(state)
    yield ev.StepEnd(state, 0, TrainingBatch(), {})
    yield ev.Checkpoint(state, ManifestRow("final"))
    yield ev.Eval(state, 0, "", {})
    yield ev.BenchmarkEval(ctx, EvalResult(""), [])
    yield ev.TrainEnd(state, LoopArtifacts())
    yield ev.RunEnd(ctx, RunResult(), ArmResult(""))
    yield ev.ExperimentEnd(ctx, ExperimentResult(""))


def hostile_metrics() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield unusual metrics that users have published, with a description."""
    yield "NaN", {"m": math.nan}
    yield "infinity", {"m": -math.inf}
    yield "a huge int", {"m": 1 << 80}
    yield "a text", {"m": "=1+1\n\0\ud800"}
    yield "None", {"m": None}
    yield "a list", {"m": [1, {"deep": [None]}]}
    yield "a bool", {"m": True}
    yield "a name of 10,000 letters", {"m" * 10_000: 1.0}
    yield "an empty name", {"": 1.0}
    yield "a name that is no text", {3: 1.0}  # pyright: ignore[reportReturnType]  # it happens
    yield "names that adapters use themselves", {"step": 7, "run": 1.0, "benchmark": 2.0, "time": 3.0}
    try:
        import numpy as np
    except ImportError:
        return
    yield "scalars of numpy", {"m": np.float32(0.5), "n": np.int64(3), "b": np.bool_(True)}


def as_envelopes(events: Iterable[ev.Event]) -> Iterator[ev.Envelope]:
    """Yield the events as followed adapters get them: encoded and decoded, with detached objects."""
    contexts: dict[str, LogContext] = {}
    for seq, event in enumerate(events, 1):
        handle: LogContext | LoopState | None = getattr(event, "ctx", None) or getattr(event, "state", None)
        run = None if handle is None else handle.run_key
        envelope = decode(encode(ev.Envelope("conformance", seq, 1.7e9 + seq, event, run)), contexts)
        if isinstance(envelope.event, ev.RunStart) and run is not None:
            contexts[run] = envelope.event.ctx
        yield envelope
