"""Recorded experiments to look at: small, large, empty, failed and hostile ones, and one to ask questions of.

python -m benchmarks.dashboard_recorded DATABASE
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TypeAlias

from evsys_adapters.checkpoints.events import CheckpointUploaded
from evsys_adapters.dashboard.store import Store
from evsys_bus import (
    Alert,
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    Environment,
    Eval,
    Event,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    LogContext,
    LoopState,
    ManifestRow,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainStart,
)
from evsys_bus.adapter import DeliveryChanged, HookTimes
from evsys_bus.codec import encode
from evsys_bus.context import EvalResult
from evsys_bus.events import Envelope

Timed: TypeAlias = tuple[float, Event]
"""An event, and when it was published."""

QUESTIONS: Final = "reasoning: optimizer and warm-up"
"""Name of the experiment with an answer to each question that a reader has: five arms of four seeds."""
ARMS: Final = {"baseline": 0.55, "lr-3e-4": 0.6, "lr-1e-3": 0.52, "lion": 0.58, "long-warmup": 0.68}
"""Its arms, and the part of the tasks that each solves at the end."""
WINNER: Final = "long-warmup"
SEEDS: Final = 4
TASKS: Final = {"gsm8k": 160, "mbpp": 90}
"""Its benchmarks, and how many tasks they have."""
STEPS: Final = 1_000
SPIKED, SPIKE_AT = ("lr-1e-3", 2), 420
FAILED, FAILED_AT = ("lion", 3), 653
RUNNING, RUNNING_AT = ("long-warmup", 3), 820
BEST: Final = ("long-warmup", 1)
"""The run with the best checkpoint: its third one, after which it overfits."""
BEST_STEP: Final = 749
ERROR: Final = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB (GPU 0; 79.15 GiB total)"
UNDELIVERED: Final = "wandb_logger"
UNDELIVERED_ERROR: Final = "the server answers 401: the key is not valid"
HOSTILE: Final = "<img src=x onerror=\"document.title='broken in'\">"

_STEP_SECONDS: Final = 60.0
_BATCH: Final = 2_000
_TRACEBACK: Final = (
    'Traceback (most recent call last):\n  File "train.py", line 212, in step\n    loss = model(batch)\n'
    '  File "model.py", line 88, in forward\n    scores = q @ k.transpose(-2, -1)\n'
)


class Recorder:
    """An experiment that is recorded into a store as if its processes had sent it.

    Args:
        store: Where to.
        name: The experiment's name.
        arms: Its arms with their own config.
        seeds: Runs of each arm.
        config: More of its config.
    """

    def __init__(
        self, store: Store, name: str, arms: Mapping[str, Mapping[str, Any]], seeds: int, **config: object
    ) -> None:
        self.store = store
        self.arms = arms
        self.seeds = seeds
        folder = "".join(letter if letter.isalnum() else "-" for letter in name)[:60]
        planned = {"name": name, "recipe": "m:f", "run": {"steps": 1}, "runs": arms, "n_repeats": seeds}
        self.root = LogContext(f"/runs/{folder}", config=planned | config)
        self.journal = f"{self.root.output_dir}/journal"
        self._sequences: dict[str, int] = {}

    def runs(self) -> Iterator[tuple[str, int, LogContext]]:
        """Yield arm, seed and context of each run."""
        for arm, own in self.arms.items():
            for seed in range(self.seeds):
                config = {"model": {"layers": 12, "width": 768}, "batch": 32, **own, "arm": arm, "seed": seed}
                yield arm, seed, self.root.for_run(f"{arm[:80]}-s{seed}", config, arm[:80])

    def send(self, events: Iterable[Timed], stream: str = "main") -> None:
        """Deliver events of one process."""
        name = f"r0-{self.root.output_dir.name}-{stream}"
        remaining = iter(events)
        while batch := list(itertools.islice(remaining, _BATCH)):
            after = self._sequences.get(name, 0)
            self.store.ingest(
                name,
                after,
                [
                    encode(Envelope(name, sequence, at, event, _run_key(event), 0))
                    for sequence, (at, event) in enumerate(batch, start=after + 1)
                ],
            )
            self._sequences[name] = after + len(batch)

    def end(self, at: float) -> None:
        """Record that the experiment is completed."""
        result = ExperimentResult(self.root.config["name"], "completed", [], None, None, "")
        self.send([(at, ExperimentEnd(self.root, result))])


def _run_key(event: Event) -> str | None:
    state, ctx = getattr(event, "state", None), getattr(event, "ctx", None)
    return state.run_key if state is not None else ctx.run_key if ctx is not None else None


def _state(ctx: LogContext, steps: int) -> LoopState:
    return LoopState(0, steps, ctx.run_dir, ctx=ctx)


def _ended(ctx: LogContext, at: float, status: str = "completed", error: str | None = None) -> Iterator[Timed]:
    if status == "completed":
        yield at, TrainEnd(_state(ctx, 0))
    yield at, RunEnd(ctx, RunResult(status=status, error=error), ArmResult(""))  # pyright: ignore[reportArgumentType] # a literal


def _loss(quality: float, seed: int, step: int, steps: int) -> float:
    """A curve that falls, with noise."""
    noise = math.sin(12.9898 * step + 78.233 * seed + 37.7 * quality) * 43_758.5453 % 1 - 0.5
    return (1.4 - quality + 2.2 * math.exp(-6 * step / steps)) * (1 + 0.12 * noise)


def simple(store: Store, name: str, arms: int, seeds: int, metrics: int = 4, steps: int = 400) -> None:
    """Record an experiment that is completed, with so many metrics of training and an eval."""
    own = {f"lr-{(arm + 1)}e-4": {"lr": (arm + 1) * 1e-4} for arm in range(arms)}
    recorder = Recorder(store, name, own, seeds, success_metric={"name": "val/accuracy", "mode": "max"})
    began = time.time() - 86_400 - steps
    kinds = itertools.product(range(metrics), ("layer", "head", "expert"), ("norm", "scale", "bias"))
    names = [f"{section}/{kind}_{n}" for n, section, kind in itertools.islice(kinds, max(0, metrics - 4))]
    recorder.send([(began, ExperimentStart(recorder.root))])
    for index, (_, seed, ctx) in enumerate(recorder.runs()):
        quality = 0.3 + 0.5 * math.sin(1 + index // seeds) ** 2
        recorder.send(_simple_run(ctx, began + 2 * index, quality, seed, steps, names), ctx.run_key or "")
    recorder.end(began + steps + 100)


def _simple_run(
    ctx: LogContext, began: float, quality: float, seed: int, steps: int, names: list[str]
) -> Iterator[Timed]:
    state = _state(ctx, steps)
    yield began, RunStart(ctx)
    yield began, TrainStart(state)
    for step in range(steps):
        loss = _loss(quality, seed, step, steps)
        at = began + step
        row = {"loss": loss, "grad_norm": 0.4 + 0.9 * loss, "lr": 3e-4, "tokens_per_second": 4e5 + 1e4 * math.sin(step)}
        yield at, StepEnd(state, step, metrics=row | {name: loss * (1 + i % 7) for i, name in enumerate(names)})
        if step % 40 == 39:  # noqa: PLR2004 # each tenth part
            yield at, Eval(state, step, "val", {"accuracy": quality + 0.05 * math.sin(seed) - 0.1 * loss, "loss": loss})
    yield from _ended(ctx, began + steps)


def predictions(store: Store, count: int, runs: int = 4, rows: int = 50_000) -> None:
    """Record an experiment with so many predictions, in evals of ``rows`` each."""
    recorder = Recorder(
        store, f"{count:,} predictions", {"plain": {"hints": False}, "hints": {"hints": True}}, runs // 2
    )
    began = time.time() - 172_800
    recorder.send([(began, ExperimentStart(recorder.root))])
    evals = count // (rows * runs)
    for _, seed, ctx in recorder.runs():
        recorder.send([(began, RunStart(ctx)), (began, TrainStart(_state(ctx, 10)))])
        for number in range(evals):
            answers: list[dict[str, Any]] = [
                {
                    "task_id": f"task-{row}",
                    "instruction": f"question {row}: how much is {row} + {row}?",
                    "output": f"answer {2 * row + (row * (number + seed + 1) % 3 == 0)}",
                    "reward": float(row * (number + seed + 1) % 3 != 0),
                }
                for row in range(rows)
            ]
            result = EvalResult(f"bench-{number}", metrics={"accuracy": sum(a["reward"] for a in answers) / rows})
            recorder.send([(began + number, BenchmarkEval(ctx, result, answers))])
        recorder.send(_ended(ctx, began + 60))
    recorder.end(began + 100)


def empty(store: Store) -> None:
    """Record an experiment that has started, and nothing else."""
    recorder = Recorder(store, "nothing has run yet", {"a": {"lr": 0.1}, "b": {"lr": 0.2}}, 2)
    recorder.send([(time.time() - 20, ExperimentStart(recorder.root))])


def failed(store: Store) -> None:
    """Record an experiment in which each run ended otherwise: raised, killed, stalled, cancelled, done."""
    ends = ("raises", "killed", "stalled", "cancelled", "completes")
    recorder = Recorder(store, "each run ended otherwise", {end: {"end": end} for end in ends}, 1)
    began = time.time() - 7_200
    recorder.send([(began, ExperimentStart(recorder.root))])
    statuses = {
        "raises": ("failed", f"{_TRACEBACK}ZeroDivisionError: no batch was left at step 120"),
        "killed": ("failed", "the process was killed by signal 9 (SIGKILL); its journal ends at step 120"),
        "cancelled": ("cancelled", None),
        "completes": ("completed", None),
    }
    for arm, seed, ctx in recorder.runs():
        run = _simple_run(ctx, began, 0.5, seed, 240, [])
        recorder.send(run if arm == "completes" else itertools.islice(run, 120), arm)
        if arm == "raises":
            recorder.send([(began + 118, Alert(ctx, "few batches", "the loader has 2 batches left"))], arm)
        if arm in statuses and arm != "completes":
            recorder.send(_ended(ctx, began + 121, *statuses[arm]), arm)


def hostile(store: Store) -> None:
    """Record an experiment all of whose texts are markup, and long, or written from right to left."""
    text = f"{HOSTILE} {'x' * 20_000} \u202eabc"
    metadata = {"hypothesis": text, "tags": [text] * 9, "notes": text, "conclusion": text}
    recorder = Recorder(
        store, HOSTILE + "y" * 300, {text: {"lr": text}, "\u05d0\u202e": {"lr": "\0"}}, 1, metadata=metadata
    )
    began = time.time() - 9_000
    recorder.send([(began, ExperimentStart(recorder.root))])
    for _, _, ctx in recorder.runs():
        state = _state(ctx, 9)
        row: dict[str, Any] = {HOSTILE: 1.0, "m" * 900: 2.0, f"{'w' * 2_000}/m": 3.0, "sample": text}
        answers = [{"task_id": text, "instruction": text, "output": text, "reward": 1.0}]
        events: list[Event] = [RunStart(ctx), Environment(ctx, {text: text}), TrainStart(state)]
        events += [
            StepEnd(state, step, metrics={k: v if k == "sample" else v * step for k, v in row.items()})
            for step in range(9)
        ]
        events += [
            BenchmarkEval(ctx, EvalResult(text, metrics={text: 0.5}), answers),
            Checkpoint(state, ManifestRow(text, 8, state_path=text)),
            Alert(ctx, text, text),
        ]
        recorder.send((began + i, event) for i, event in enumerate(events))
        recorder.send(_ended(ctx, began + 60, "failed", text))
    recorder.send(
        [(began, DeliveryChanged(text, recorder.journal, {"name": text, "pending": 3, "error": text, "fix": text}))],
        "c",
    )


def is_solved(arm: str, seed: int, benchmark: str, task: int) -> bool:
    """Return whether a run of `QUESTIONS` solves a task at the end; what one arm solves, a better one solves mostly."""
    hard = math.sin(12.9898 * task + 4.1 * len(benchmark)) * 43_758.5453 % 1
    luck = math.sin(78.233 * seed + 3.7 * task + ARMS[arm]) * 9_631.77 % 1
    return hard + 0.25 * (luck - 0.5) < ARMS[arm]


def questions(store: Store, now: float | None = None) -> None:
    """Record `QUESTIONS`: one run failed, one had a spike, one goes on; an adapter has something not delivered."""
    now = time.time() if now is None else now
    began = now - RUNNING_AT * _STEP_SECONDS
    own = {
        "baseline": {"lr": 1e-4, "optimizer": "adamw", "warmup": 100},
        "lr-3e-4": {"lr": 3e-4, "optimizer": "adamw", "warmup": 100},
        "lr-1e-3": {"lr": 1e-3, "optimizer": "adamw", "warmup": 100},
        "lion": {"lr": 3e-5, "optimizer": "lion", "warmup": 100},
        "long-warmup": {"lr": 3e-4, "optimizer": "adamw", "warmup": 800},
    }
    recorder = Recorder(
        store, QUESTIONS, own, SEEDS,
        success_metric={"name": "gsm8k/accuracy", "mode": "max"},
        metadata={"hypothesis": "a longer warm-up lets a higher rate pay off", "tags": ["reasoning", "optimizer"]},
    )  # fmt: skip
    recorder.send([(began, ExperimentStart(recorder.root))])
    for arm, seed, ctx in recorder.runs():
        recorder.send(
            _asked_run(arm, seed, ctx, began if (arm, seed) == RUNNING else began - 40_000), ctx.run_key or ""
        )
    couriers: list[Timed] = []
    good: dict[str, object] = {"recorded": 40_912, "delivered": 40_912, "state": "idle"}
    late: dict[str, object] = {"recorded": 40_912, "delivered": 31_004, "pending": 9_908, "state": "retrying"}
    late |= {
        "error": UNDELIVERED_ERROR,
        "fix": "set WANDB_API_KEY to a valid key",
        "failing_since": now - 5_400,
        "attempts": 61,
    }
    for name, status in (("evsys_logger", good), ("local_logger", good), (UNDELIVERED, late)):
        couriers.append((now - 5, DeliveryChanged(name, recorder.journal, {"name": name, **status})))
    calls = sum(STEPS for _ in recorder.runs()) - STEPS + FAILED_AT - STEPS + RUNNING_AT
    hooks: list[dict[str, Any]] = [
        {"callback": "local_logger", "hook": "on_step_end", "calls": calls, "failures": 0, "blocked": 0}
        | {"mean_seconds": 0.000_018, "max_seconds": 0.0041},
        {"callback": "early_stopping", "hook": "on_eval", "calls": calls // 50, "failures": 0, "blocked": 0}
        | {"mean_seconds": 0.0021, "max_seconds": 0.012},
    ]
    couriers.append((now - 5, HookTimes(recorder.journal, 0, hooks)))
    recorder.send(couriers, "c")


def _asked_run(arm: str, seed: int, ctx: LogContext, began: float) -> Iterator[Timed]:
    state = _state(ctx, STEPS)
    quality = ARMS[arm]
    last = {FAILED: FAILED_AT, RUNNING: RUNNING_AT}.get((arm, seed), STEPS)
    yield began, RunStart(ctx)
    yield began, Environment(ctx, {"host": f"gpu-{seed}", "python": "3.12", "torch": "2.6"})
    yield began, TrainStart(state)
    for step in range(last):
        at = began + step * _STEP_SECONDS
        loss = _loss(quality, seed, step, STEPS)
        if (arm, seed) == SPIKED and SPIKE_AT <= step < SPIKE_AT + 4:  # its width
            loss *= 18
        row = {
            "loss": loss,
            "grad_norm": 0.4 + 0.9 * loss,
            "lr": ctx.run_config["lr"],
            "tokens_per_second": 4e5 - 9e3 * seed,
        }
        yield at, StepEnd(state, step, metrics=row)
        if step % 50 == 49:  # noqa: PLR2004 # twenty times
            overfits = 0.04 * max(0, step - BEST_STEP) / 250 if (arm, seed) == BEST else 0.0
            part = min(1.0, (step + 1) / (BEST_STEP + 1) if (arm, seed) == BEST else (step + 1) / STEPS)
            solved = quality * (0.6 + 0.4 * part) - overfits + 0.01 * math.sin(step + seed)
            yield at, Eval(state, step, "val", {"accuracy": solved, "loss": 1.1 * loss})
        if step % 250 == 249:  # noqa: PLR2004 # four times
            name = f"step-{step}"
            yield at, Checkpoint(state, ManifestRow(name, step, state_path=f"{ctx.run_dir}/checkpoints/{name}"))
            if step < last - 1:
                url = f"s3://bucket/{ctx.run_key}/{name}/manifest.json"
                yield at + 20, CheckpointUploaded(ctx.run_key or "", name, step, url, 3, 2_469_000_000, 18.5)
    at = began + last * _STEP_SECONDS
    if (arm, seed) == RUNNING:
        return
    if (arm, seed) == FAILED:
        yield at, Alert(ctx, "memory", "97 % of the GPU's memory is in use")
        yield from _ended(ctx, at, "failed", _TRACEBACK + ERROR)
        return
    for benchmark, tasks in TASKS.items():
        solved = [is_solved(arm, seed, benchmark, task) for task in range(tasks)]
        answers = [
            {
                "task_id": f"{benchmark}-{task}",
                "instruction": f"Task {task}: a shop sells {task + 3} pens at {task % 7 + 2} each. What do all cost?",
                "prediction": f"All cost {(task + 3) * (task % 7 + 2) + (not good)}.",
                "answer": str((task + 3) * (task % 7 + 2)),
                "reward": float(good),
            }
            for task, good in enumerate(solved)
        ]
        result = EvalResult(benchmark, metrics={"accuracy": sum(solved) / tasks})
        yield at + 60, BenchmarkEval(ctx, result, answers)
    yield from _ended(ctx, at + 120)


EXPERIMENTS: Final[Mapping[str, Callable[[Store], None]]] = {
    "small": lambda store: simple(store, "six runs", 3, 2),
    "sixty": lambda store: simple(store, "sixty runs", 20, 3, steps=200),
    "metrics": lambda store: simple(store, "1,000 metrics", 2, 2, metrics=1_000, steps=64),
    "predictions": lambda store: predictions(store, 1_000_000),
    "empty": empty,
    "failed": failed,
    "hostile": hostile,
    "questions": questions,
}
"""Writes each of the experiments."""


def record(database: Path) -> None:
    """Write all experiments into a database, and print how long each took."""
    with closing(Store.open(database)) as store:
        for name, write in EXPERIMENTS.items():
            began = time.perf_counter()
            write(store)
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
