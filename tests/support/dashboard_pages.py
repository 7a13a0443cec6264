"""A dashboard with experiments to look at, on a port of its own, which grow when a test says so."""

import math
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import msgspec

from evsys_adapters.dashboard.server import DashboardServer
from evsys_adapters.dashboard.server.app import DashboardSettings
from evsys_adapters.dashboard.state_file import DashboardState
from evsys_adapters.dashboard.store import Store
from evsys_bus import (
    Alert,
    ArmResult,
    Eval,
    Event,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    LogContext,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.events import Envelope
from support.dashboard_stores import Delivery, key_of, open_store, state_of, train

TOKEN = "a-token"
NAME = "optimizers on the small corpus"
HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"
ARMS = {"adamw lr=3e-4": 0.2, "adamw lr=1e-3": 0.1, "lion lr=1e-4": 0.28, "sgd momentum=0.9": 0.45}
SEEDS = 3
STEPS, STEPS_SO_FAR, FAILED_AT, EVAL_EVERY = 800, 512, 307, 16
EXPERIMENTS = 12
ERROR = f'Traceback (most recent call last):\n  File "train.py"\nFloatingPointError: loss is NaN at step {FAILED_AT}'
NOT_FINITE = range(160, 240)


def metrics_at(arm: str, seed: int, step: int) -> tuple[dict[str, float], dict[str, float]]:
    """What a run logs at a step, and what it logs at an evaluation."""
    quality = ARMS[arm] + 0.02 * seed
    noise = math.sin(12.9898 * step + 78.233 * seed + 37.7 * quality) * 43_758.5453 % 1 - 0.5
    smooth = quality + 2.2 * math.exp(-step / (90 + 135 * quality))
    loss = smooth * (1 + 0.15 * noise)
    lacks_norm = arm.startswith("lion") and step in NOT_FINITE
    steps = {
        "loss": loss,
        "grad_norm": math.nan if lacks_norm else 0.4 + 0.9 * loss,
        "accuracy": 0.97 - 0.28 * loss,
        "tokens_per_second": 412_000 - 9_000 * seed + 20_000 * noise,
        "weight_decay_of_the_embedding_and_of_the_output_projection": 1e-5 * (1 + loss),
        "never_positive": -loss,
        "lr": 3e-4,
        "world_size": 8,
    }
    evals = {
        "accuracy": 0.95 - 0.3 * smooth * (1 + 0.02 * noise),
        "loss": 1.1 * smooth,
        "lonely": smooth if step == 16 * EVAL_EVERY else math.nan,
    }
    return steps, evals


def steps_of(ctx: LogContext, arm: str, seed: int, steps: range) -> list[Event]:
    state = state_of(ctx, num_steps=STEPS)
    events: list[Event] = []
    for step in steps:
        logged, evaluated = metrics_at(arm, seed, step)
        events.append(StepEnd(state, step, metrics=logged))
        if step % EVAL_EVERY == 0:
            events.append(Eval(state, step, "val", evaluated))
    return events


def fails(arm: str, seed: int) -> bool:
    return arm.startswith("sgd") and seed == SEEDS - 1


def contexts() -> dict[tuple[str, int], LogContext]:
    """The runs of the experiment that grows, by arm and seed."""
    root = _experiment(0, NAME, {arm: {"optimizer": arm} for arm in ARMS})
    return {
        (arm, seed): root.for_run(f"{arm}-s{seed}", {"optimizer": arm, "width": 768, "arm": arm, "seed": seed}, None)
        for arm in ARMS
        for seed in range(SEEDS)
    }


def _experiment(i: int, name: str, runs: dict[str, Any]) -> LogContext:
    config = {
        "name": name,
        "recipe": "m:f",
        "run": {"steps": STEPS, "width": 768},
        "runs": runs,
        "n_repeats": SEEDS,
        "success_metric": {"name": "val/accuracy", "mode": "max"},
        "metadata": {
            "hypothesis": "AdamW beats Lion at equal compute" if i % 3 == 0 else None,
            "tags": [["corpus-small", "optimizer"], [], ["ablation"]][i % 3],
        },
    }
    return LogContext(f"/runs/{i}", config=config)


class Growing:
    """The stream of the experiment that grows; a step takes a second."""

    def __init__(self, ingest: Callable[[str, int, list[bytes]], object], stream: str, start: float) -> None:
        self._ingest = ingest
        self._stream = stream
        self._start = start
        self._sequence = 0

    def send(self, *events: Event) -> None:
        times = [self._start + getattr(event, "step_idx", 0) for event in events]
        payloads = [
            encode(Envelope(self._stream, seq, at, event, key_of(event), 0))
            for seq, (event, at) in enumerate(zip(events, times, strict=True), start=self._sequence + 1)
        ]
        self._ingest(self._stream, self._sequence, payloads)
        self._sequence += len(payloads)


def fill(folder: Path) -> None:
    """Write a database with a dozen experiments; the first has curves."""
    with closing(open_store(folder)) as store:
        growing = Growing(store.ingest, "r0-growing", time.time() - STEPS_SO_FAR)
        growing.send(ExperimentStart(_experiment(0, NAME, {arm: {"optimizer": arm} for arm in ARMS})))
        for (arm, seed), ctx in contexts().items():
            growing.send(RunStart(ctx), TrainStart(state_of(ctx, num_steps=STEPS)))
            growing.send(*steps_of(ctx, arm, seed, range(FAILED_AT if fails(arm, seed) else STEPS_SO_FAR)))
            if fails(arm, seed):
                growing.send(Alert(ctx, "gradient norm", "above 10 for 200 steps"))
                growing.send(RunEnd(ctx, RunResult(status="failed", error=ERROR), ArmResult("")))  # pyright: ignore[reportArgumentType] # a test's text
        fill_hostile(store)
        names = ["learning rate", "batch size", "warm-up", "dropout"]
        for i in range(2, EXPERIMENTS):
            name = names[i - 2] if i < len(names) + 2 else f"sweep {i}"
            older = Delivery(store, f"r{i}-older", start=time.time() - 3_700 * i)
            root = _experiment(i, name, {"low": {"lr": 0.1}, "high": {"lr": 0.2}})
            older.send(ExperimentStart(root))
            status = ("completed", "failed", "cancelled", None)[i % 4]
            for arm in ("low", "high"):
                ctx = root.for_run(f"{arm}-s0", {"arm": arm, "seed": 0}, None)
                losses = [3 / (1 + step) for step in range(6)]
                train(older, ctx, losses, num_steps=8, evals={1: 0.3, 3: 0.5, 5: 0.6 + i / 100}, status=status)
            if status is not None:
                older.send(ExperimentEnd(root, ExperimentResult(name, status, [], "high", 0.6, "")))


def fill_hostile(store: Store) -> None:
    """An experiment all of whose texts are markup, and long."""
    text = f"{HOSTILE} {'x' * 100_000} \u202e"
    root = _experiment(1, HOSTILE + "y" * 300, {text: {"lr": text}})
    root.config["metadata"] = {"hypothesis": text, "tags": [text] * 9, "notes": text, "conclusion": text}
    delivery = Delivery(store, "r1-hostile", start=time.time() - 9_000)
    ctx = root.for_run("a-s0", {"arm": text, "seed": 0, "text": text}, None)
    state = state_of(ctx, num_steps=9)
    delivery.send(ExperimentStart(root), RunStart(ctx), TrainStart(state))
    delivery.send(*(StepEnd(state, step, metrics={HOSTILE: step, "m" * 900: -step}) for step in range(9)))
    wide = "w" * 2_000
    delivery.send(StepEnd(state, 9, metrics={f"{wide}/{wide}": 1.0, f"{wide}/m": 2.0}))
    delivery.send(Eval(state, 9, text, {text: 1.0}), Alert(ctx, text, text))
    delivery.send(Alert(ctx, text, text, text))  # pyright: ignore[reportArgumentType] # a test's text
    delivery.send(RunEnd(ctx, RunResult(status="failed", error=text), ArmResult("")))  # pyright: ignore[reportArgumentType] # a test's text


class PageServer:
    """A dashboard that has what `fill` wrote.

    Args:
        folder: Its database is copied, so that each server has one of its own.
        copy: A folder for the copy; it is used again if there is one.
        port: 0 takes any.
    """

    def __init__(self, folder: Path, copy: Path, port: int = 0) -> None:
        if not copy.exists():
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("copy"))
        self._ready = threading.Event()
        self._server = DashboardServer(
            copy / "dashboard.sqlite",
            host="127.0.0.1",
            port=port,
            settings=DashboardSettings(token=TOKEN),
            state=copy / "dashboard.json",
            on_ready=self._is_ready,
        )
        self._thread = threading.Thread(target=self._server.run)
        self._growing = Growing(self.ingest, f"r0-{time.time_ns()}", time.time() - STEPS_SO_FAR)
        self.step = STEPS_SO_FAR
        self.url = ""
        self.port = 0

    def _is_ready(self, state: DashboardState) -> None:
        self.url = state.url
        self.port = int(state.url.rsplit(":", 1)[1])
        self._ready.set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.request_stop()
        self._thread.join()

    def request(self, path: str, body: bytes | None = None) -> Any:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/msgpack"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers)) as answer:
            return msgspec.json.decode(answer.read())

    def ingest(self, stream: str, after: int, payloads: Sequence[bytes]) -> Any:
        """Post a batch, in place of a store's method."""
        body = msgspec.msgpack.encode([msgspec.Raw(payload) for payload in payloads])
        return self.request(f"/api/ingest?stream={stream}&after={after}", body)

    @property
    def experiment(self) -> str:
        """The path of the page of the experiment that grows."""
        return self.path_of(NAME)

    def path_of(self, name: str) -> str:
        """The path of the page of the experiment whose name begins so."""
        rows = self.request("/api/home")["experiments"]
        return next(f"/e/{row['id']}" for row in rows if row["name"].startswith(name))

    def grow(self, steps: int) -> None:
        """Let all runs that go on do some steps."""
        events: list[Event] = []
        for (arm, seed), ctx in contexts().items():
            if not fails(arm, seed):
                events += steps_of(ctx, arm, seed, range(self.step, self.step + steps))
        self._growing.send(*events)
        self.step += steps
