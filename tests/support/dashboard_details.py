"""An experiment with all that a run may have beside its curves: evals with answers, checkpoints, texts, deliveries."""

import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from evsys_adapters.checkpoints.events import CheckpointUploaded
from evsys_bus import (
    Alert,
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    Environment,
    EvalResult,
    Event,
    ExperimentStart,
    LogContext,
    ManifestRow,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    Summary,
    TrainEnd,
    TrainStart,
)
from evsys_bus.adapter import DeliveryChanged, HookTimes
from support.dashboard_stores import Delivery, open_store, state_of

QUIZ = "answers to the quiz"
SWEEP = "a sweep of many runs"
QUIZ_ARMS = {"baseline": 0.0, "with hints": 0.2}
QUIZ_SEEDS = 2
QUESTIONS = 260
SWEEP_RUNS = 120
QUIZ_STEPS = 40
MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"
TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 7\nZeroDivisionError: no batch was left'
DELIVERY_ERROR = "the server answers 403: the key has no write access"
DELIVERY_FIX = "set EVSYS_API_KEY to a key of this project"


def is_right(arm: str, seed: int, question: int) -> bool:
    """Whether a run answers a question of the quiz well at the end."""
    return math.sin(12.9898 * question + 78.233 * seed) * 43_758.5453 % 1 < 0.5 + QUIZ_ARMS[arm]


def fill_details(folder: Path) -> None:
    """Add two experiments to the database of a folder: the quiz, and a sweep of many runs."""
    with closing(open_store(folder)) as store, store.transaction():
        _quiz(Delivery(store, "r8-quiz", start=time.time() - 6_000))
        couriers = Delivery(store, "c8-quiz", start=time.time() - 30)
        journal = "/runs/quiz/baseline-s0/journal"
        hooks: list[dict[str, Any]] = [
            {"callback": "local_logger", "hook": "on_step_end", "calls": QUIZ_STEPS, "failures": 0, "blocked": 0}
            | {"mean_seconds": 0.000_02, "max_seconds": 0.001},
            {"callback": "early_stopping", "hook": "on_eval", "calls": 4, "failures": 1, "blocked": 0}
            | {"mean_seconds": 0.002, "max_seconds": 0.004},
        ]
        done = {"name": "local_logger", "recorded": 52, "delivered": 52, "state": "idle"}
        late = {"name": "evsys_logger", "recorded": 52, "delivered": 30, "pending": 22, "state": "retrying"}
        late |= {"error": DELIVERY_ERROR, "fix": DELIVERY_FIX, "failing_since": time.time() - 400, "attempts": 9}
        couriers.send(
            DeliveryChanged("local_logger", journal, done),
            DeliveryChanged("evsys_logger", journal, late),
            DeliveryChanged("local_logger", "/runs/quiz/with hints-s0/journal", done),
            HookTimes(journal, 0, hooks),
            CheckpointUploaded(
                "baseline-s0", "step-19", 19, "s3://bucket/baseline-s0/step-19/manifest.json", 2, 117, 0.5
            ),
        )
        _sweep(Delivery(store, "r9-sweep", start=time.time() - 90_000))


def _quiz(delivery: Delivery) -> None:
    config = {
        "name": QUIZ,
        "runs": {arm: {"hints": bool(gain)} for arm, gain in QUIZ_ARMS.items()},
        "n_repeats": QUIZ_SEEDS,
        "success_metric": {"name": "quiz/accuracy", "mode": "max"},
    }
    root = LogContext("/runs/quiz", config=config)
    delivery.send(ExperimentStart(root))
    for arm, gain in QUIZ_ARMS.items():
        for seed in range(QUIZ_SEEDS):
            run_config = {"arm": arm, "seed": seed, "hints": bool(gain), "model": {"layers": 12, "width": 768}}
            ctx = root.for_run(f"{arm}-s{seed}", run_config, None)
            state = state_of(ctx, num_steps=QUIZ_STEPS)
            delivery.send(RunStart(ctx), Environment(ctx, {"host": "gpu-7", "python": "3.12"}), TrainStart(state))
            for step in range(QUIZ_STEPS):
                row = {"loss": 2 * math.exp(-step / 12) - gain, "lr": 1e-3, "sample": f"{MARKUP} step {step}\nmore"}
                delivery.send(StepEnd(state, step, metrics=row))
                if step % 10 == 9:
                    _evaluate(delivery, ctx, arm, seed, step)
                    name = f"step-{step}"
                    path = f"{ctx.run_dir}/checkpoints/{name}"
                    delivery.send(Checkpoint(state, ManifestRow(name, step, state_path=path)))
            if (arm, seed) == ("with hints", 1):
                delivery.send(
                    Alert(ctx, "no batch", "the loader is empty"),
                    RunEnd(ctx, RunResult(status="failed", error=TRACEBACK), ArmResult("")),  # pyright: ignore[reportArgumentType] # a test's text
                )
            else:
                _evaluate(delivery, ctx, arm, seed, None)
                delivery.send(Summary(ctx, {"parameters": 12_000_000}), TrainEnd(state))
                delivery.send(RunEnd(ctx, RunResult(), ArmResult("")))


def _evaluate(delivery: Delivery, ctx: LogContext, arm: str, seed: int, step: int | None) -> None:
    """Publish a score; after training with the answers."""
    right = [is_right(arm, seed, question) for question in range(QUESTIONS)]
    part = 1.0 if step is None else (step + 1) / QUIZ_STEPS
    metrics = {"accuracy": part * sum(right) / QUESTIONS, "length": 11.0 + seed}
    answers = [
        {
            "instruction": f"Question {n}: what is {n} + {n}?",
            "prediction": f"{MARKUP} {2 * n if good else 2 * n + 1}" + (" because" * 90 if n == 0 else ""),
            "answer": str(2 * n),
            "reward": float(good),
            "task_id": f"q{n}",
        }
        for n, good in enumerate(right)
    ]
    result = EvalResult("quiz", metrics=metrics, step=step)
    delivery.send(BenchmarkEval(ctx, result, answers if step is None else [], step=step))


def _sweep(delivery: Delivery) -> None:
    config = {"name": SWEEP, "runs": {f"lr-{n}": {"lr": n} for n in range(SWEEP_RUNS)}}
    root = LogContext("/runs/sweep", config=config)
    events: list[Event] = [ExperimentStart(root)]
    for n in range(SWEEP_RUNS):
        config = {"arm": f"lr-{n}", "seed": 0, "lr": (n + 1) * 1e-5, "batch": 2 ** (n % 5)}
        ctx = root.for_run(f"lr-{n}-s0", config, None)
        state = state_of(ctx, num_steps=3)
        steps = [StepEnd(state, step, metrics={"loss": 1 + (n - 100) ** 2 / 1e4 + 1 / (1 + step)}) for step in range(3)]
        events += [RunStart(ctx), TrainStart(state), *steps, TrainEnd(state), RunEnd(ctx, RunResult(), ArmResult(""))]
    delivery.send(*events)
