#!/usr/bin/env python3
"""Kill programs that use `evsys_bus.run`, and the couriers behind them; then compare all that received the runs.

usage: uv run python tests/front_door_kills.py --histories 1000

A history is a few lives of one program, each a forked process: runs that log rows in parts, evals, epochs, checkpoints,
tables and alerts, alone or two at once on one bus. A life ends by itself or is killed just before it records an event.
Between the lives, and beside them, couriers deliver to CSV, local files, TensorBoard, W&B (offline) and a dashboard's
store; they end, are killed, or live on. In the end everything is delivered. Then each receiver must have what a plain
model makes of the journal, as must `read`; and each value of a call that returned must be in the model, unless a
training that was resumed made its step anew. A history is repeated by its seed, but for the moments of kills by signal.
"""

import argparse
import asyncio
import csv
import functools
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import evsys_bus
from evsys_adapters import CsvMetricsCallback, LocalLoggerCallback, TensorBoardLoggerCallback, WandbLoggerCallback
from evsys_adapters.dashboard.store import Store
from evsys_bus import (
    BenchmarkEval,
    Callback,
    Eval,
    EvalResult,
    EventBus,
    RunStart,
    StepEnd,
    TrainStart,
)
from evsys_bus.codec import decode
from evsys_bus.delivery import courier as courier_module
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.events import Alert, EpochEnd, Metrics
from evsys_bus.journal import JournalReader, JournalWriter
from support.files import read_json_lines
from support.violations import Violation, require
from support.wandb_server import rows_in, wandb_files_of

ADAPTERS: dict[str, Callable[[], Callback]] = {
    "csv": lambda: CsvMetricsCallback("{run_dir}/rows.csv"),
    "local": lambda: LocalLoggerCallback(print_every=0),
    "tensorboard": TensorBoardLoggerCallback,
    "wandb": lambda: WandbLoggerCallback("p", mode="offline"),
}
KILLED = 9
LIFE_SECONDS = 60.0
BESIDE_SHARE, COURIERS_SHARE, LOSS_SHARE = 0.35, 0.4, 0.1
"""How often couriers run beside a life, how often between two, and how often cursors are lost."""
PRINTED_EVERY = 20
NO_STEP = -1
UNCERTAIN = -1.0
Points = dict[tuple[str, int], float]
"""Values by name and step."""


# -- a life of the program --------------------------------------------------------------------------------------------


class Killer(Callback):
    """Ends the process at its nth event, before that is recorded."""

    def __init__(self, events: int | None) -> None:
        self.remaining = events

    def count(self, *args: object, **kwargs: object) -> None:
        del args, kwargs
        if self.remaining is not None:
            self.remaining -= 1
            if self.remaining < 0:
                os._exit(KILLED)

    on_run_start = on_train_start = on_step_end = on_eval = on_benchmark_eval = on_checkpoint = count  # pyright: ignore[reportAssignmentType]
    on_metrics = on_epoch_end = on_summary = on_config_update = on_content = on_alert = count  # pyright: ignore[reportAssignmentType]
    on_train_end = on_run_end = count  # pyright: ignore[reportAssignmentType]


class Life:
    """One life: a random program. Each value is one that no other call has."""

    def __init__(self, root: Path, number: int, rng: random.Random) -> None:
        self.root, self.rng = root, rng
        self.value = number * 100_000
        self.receipts = os.open(root / "receipts", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def values(self, *names: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in names:
            self.value += 1
            found[name] = float(self.value)
        return found

    def acknowledge(self, values: dict[str, float]) -> None:
        os.write(self.receipts, "".join(f"{each:.0f}\n" for each in values.values()).encode())

    def run(self, is_killed: bool) -> None:  # of a forked process
        """Run the program."""
        rng = self.rng
        kill_at = None if not is_killed else rng.choice([None, *[rng.randrange(0, 40)] * 8])
        writer = JournalWriter(self.root / "journal", segment_bytes=rng.choice([2_500, 1 << 26]), flush_seconds=3600)
        bus = EventBus([Killer(kill_at)], journal=writer, handle_signals=False)
        names = rng.sample(["a", "b"], k=rng.choice([1, 2, 2]))
        with bus, ExitStack() as stack:
            programs: list[Any] = []
            for name in names:
                first = rng.choice([None, None, None, rng.randrange(0, 12)])
                run = bus.run(self.root / "out" / name, environment=False, output=False, first_step=first)
                if rng.random() < 0.5:
                    stack.enter_context(run)
                else:
                    run.start()
                programs.append(self.train(run))
            if len(programs) == 2 and rng.random() < 0.15:
                threads = [threading.Thread(target=list, args=[each], daemon=True) for each in programs]
                for each in threads:
                    each.start()
                for each in threads:
                    each.join()
            while programs:
                each = rng.choice(programs)
                if next(each, None) is None:
                    programs.remove(each)
            if rng.random() < 0.6:
                os._exit(KILLED)

    def train(self, run: Any):
        """Log to a run; yields after each call."""
        rng = self.rng
        num_steps = rng.randrange(1, 8)
        has_loop = rng.random() < 0.4
        step = run.state.step
        style = rng.choice(["parts", "commit", "mixed", "plain"])
        if has_loop:
            for loop_step in run.steps(run.state.step + num_steps):
                yield from self.step(run, loop_step, None, style)
        else:
            for _ in range(num_steps):
                step += rng.choice([0, 1, 1, 1, 1, 2])
                yield from self.step(run, step, step, style)
                if rng.random() < 0.05:
                    yield from self.step(run, max(0, step - rng.randrange(1, 4)), max(0, step - 1), style)
        if rng.random() < 0.3:
            yield from self.benchmark(run, None)
        if rng.random() < 0.2:
            run.finish()
        yield 1

    def step(self, run: Any, at: int, step: int | None, style: str):
        rng = self.rng
        for part in range(rng.choice([1, 1, 2, 3]) if style != "plain" else 1):
            values = self.values(*rng.sample(["loss", "lr", f"p{part}", "deep/x"], k=rng.choice([1, 2])))
            commit = style == "plain" or (style in {"commit", "mixed"} and rng.random() < 0.4)
            run.log(values, step=step, commit=commit)
            self.acknowledge(values)
            yield 1
            if rng.random() < 0.3:
                yield from self.other(run, at, step)

    def other(self, run: Any, at: int, step: int | None):
        rng = self.rng
        kind = rng.choice(["eval", "eval", "checkpoint", "alert", "summary", "config", "epoch", "text", "benchmark"])
        if kind == "eval":
            values = self.values("acc")
            run.eval(rng.choice(["val", "held"]), values, step=step)
            self.acknowledge(values)
        elif kind == "checkpoint":
            path = run.path / f"state-{self.value}.bin"
            path.write_bytes(b"x")
            run.checkpoint(f"c{self.value}", state_path=path, step=step)
        elif kind == "alert":
            run.alert(f"alert {self.value}", "text", level="warning")
        elif kind == "summary":
            run.summary["best"] = float(self.value)
        elif kind == "config":
            run.config.update({"more": self.value})
        elif kind == "epoch":
            values = self.values("epoch_loss")
            run.epoch_end(self.value, values)
            self.acknowledge(values)
        elif kind == "text":
            run.text("note", f"text {self.value}", step=step)
        else:
            yield from self.benchmark(run, at)
        yield 1

    def benchmark(self, run: Any, step: int | None):
        values = self.values("score")
        result = EvalResult("tasks", metrics=values)
        run.publish(BenchmarkEval(run.ctx, result, step=step))
        self.acknowledge(values)
        yield 1


# -- couriers ---------------------------------------------------------------------------------------------------------


def killing(method: Callable[..., Any], calls: Iterator[int]) -> Callable[..., Any]:
    """Return the method; the process ends after the call that is one too many."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if next(calls, None) is None:
            os._exit(KILLED)
        return result

    return call


def deliver(root: Path, names: list[str], rng: random.Random, kill_after: int | None, wait_for: int | None) -> None:
    """Run couriers in this process until everything is delivered.

    They are killed after so many calls of their adapters, and do not end before the pipe ``wait_for`` is closed.
    """
    journal = str(root / "journal")
    register(journal, [Subscription(name) for name in ADAPTERS])
    courier_module.COMMIT_SECONDS = rng.choice([0.0, 0.0, 0.2])  # pyright: ignore[reportAttributeAccessIssue]
    calls = None if kill_after is None else iter(range(kill_after))
    couriers: list[Courier] = []
    for name in names:
        adapter = ADAPTERS[name]()
        adapter.spec_name = name
        if calls is not None:
            for method in [each for each in dir(adapter) if each.startswith("on_") or each == "mark"]:
                setattr(adapter, method, killing(getattr(adapter, method), calls))
        policy = DeliveryPolicy()
        couriers.append(
            Courier(journal, name, adapter, policy, slice_seconds=rng.choice([None, 0.0]), poll_seconds=0.005)
        )

    def finish() -> None:
        if wait_for is not None:
            os.read(wait_for, 1)
        for each in couriers:
            each.finish()

    async def run() -> None:
        if wait_for is None:
            finish()
        else:
            threading.Thread(target=finish, daemon=True).start()
        await asyncio.gather(*(each.run() for each in couriers))

    asyncio.run(run())


# -- processes --------------------------------------------------------------------------------------------------------


def start(root: Path, work: Callable[..., None], *args: Any) -> int:
    """Fork a process that does this."""
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(*args)
        (root / "modules").write_text("\n".join(sys.modules))  # see `import_what_children_need`
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def wait(pid: int, what: str, root: Path) -> int:
    deadline = time.monotonic() + LIFE_SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            require(code in {0, KILLED, -9}, f"{what} ended with {code}:\n{(root / 'log').read_text()[-3000:]}")
            return code
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Violation(f"{what} has not ended:\n{(root / 'log').read_text()[-3000:]}")
        time.sleep(0.01)


def play(root: Path, seed: int, counts: Counter[str]) -> None:
    """Play one history."""
    rng = random.Random(seed)
    lives = rng.choice([1, 2, 2, 3, 4])
    for number in range(1, lives + 1):
        life = Life(root, number, random.Random(f"{seed}-{number}"))
        beside = start_couriers_beside(root, rng) if rng.random() < BESIDE_SHARE else None
        is_killed = number < lives or rng.random() < 1 / 2
        counts["killed lives"] += wait(start(root, life.run, is_killed), "a life", root) != 0
        os.close(life.receipts)
        counts["lives"] += 1
        if beside is not None:
            counts["killed couriers"] += end_couriers_beside(*beside, root, rng) != 0
        while rng.random() < COURIERS_SHARE:
            counts["killed couriers"] += deliver_between(root, rng) != 0
        if rng.random() < LOSS_SHARE:
            for name in random_names(rng):
                (root / "journal" / "cursors" / f"{name}.json").unlink(missing_ok=True)
    wait(start(root, deliver, root, [*ADAPTERS], random.Random(rng.random()), None, None), "the last couriers", root)


def start_couriers_beside(root: Path, rng: random.Random) -> tuple[int, int]:
    """Start couriers beside a life; returns their process, and a pipe: they may end once it is closed."""
    reading, writing = os.pipe()
    own, names = random.Random(rng.random()), random_names(rng)

    def work() -> None:
        os.close(writing)
        deliver(root, names, own, None, reading)

    pid = start(root, work)
    os.close(reading)
    return pid, writing


def end_couriers_beside(pid: int, writing: int, root: Path, rng: random.Random) -> int:
    """Kill them, or let them end."""
    if rng.random() < 1 / 3:
        time.sleep(rng.random() / 20)
        os.kill(pid, signal.SIGKILL)
    os.close(writing)
    return wait(pid, "couriers beside a life", root)


def deliver_between(root: Path, rng: random.Random) -> int:
    """Deliver between two lives, or begin to."""
    own, names = random.Random(rng.random()), random_names(rng)
    kill_after = rng.choice([None, rng.randrange(80)])
    return wait(start(root, deliver, root, names, own, kill_after, None), "couriers", root)


def random_names(rng: random.Random) -> list[str]:
    return rng.sample([*ADAPTERS], k=rng.choice([1, 2, 4, 4]))


# -- what there should be ---------------------------------------------------------------------------------------------


class ModelRun:
    """What a plain reading of the journal makes of one run."""

    def __init__(self) -> None:
        self.train: Points = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        """Rows in order of delivery, those of several parts as one."""
        self.evals: dict[str, Points] = {}
        self.epochs: dict[int, tuple[int, float]] = {}
        self.alerts: list[str] = []
        self.open: tuple[int, dict[str, float]] | None = None
        self.last_step = -1

    def add_row(self, step: int, metrics: dict[str, float]) -> None:
        self.last_step = max(self.last_step, step)
        self.rows.append((step, metrics))
        for name, value in metrics.items():
            self.train[name, step] = value

    def flush(self) -> None:
        if self.open is not None:
            row, self.open = self.open, None
            self.add_row(*row)

    def add_part(self, step: int, metrics: dict[str, float]) -> None:
        if self.open is not None and self.open[0] == step:
            self.open[1].update(metrics)
        else:
            self.flush()
            self.open = step, metrics

    def add_whole_row(self, step: int, metrics: dict[str, float]) -> None:
        if self.open is not None and self.open[0] == step:
            lost = self.open[1].keys() - metrics.keys()
            require(not lost, f"the row of step {step} lacks parts: {lost}")
            self.open = None
        self.add_row(step, metrics)

    def add_eval(self, name: str, step: int, metrics: dict[str, float]) -> None:
        self.evals.setdefault(name, {}).update({(key, step): value for key, value in metrics.items()})

    def add_epoch(self, epoch: int, step: int, value: float) -> None:
        step = max(step, self.last_step)
        is_row_open = self.open is not None and self.open[0] > step
        # Receivers of whole rows do not know the step of an open one yet.
        self.epochs[epoch] = step, UNCERTAIN if is_row_open else value

    def cut(self, first: int) -> None:
        self.rows = [each for each in self.rows if each[0] < first]
        self.train = {key: value for key, value in self.train.items() if key[1] < first}
        for name, points in self.evals.items():
            self.evals[name] = {key: value for key, value in points.items() if NO_STEP < key[1] < first}
        self.epochs = {epoch: each for epoch, each in self.epochs.items() if each[0] < first or each[1] < 0}
        self.last_step = min(self.last_step, first - 1)

    def compare_epochs(self, what: str, found: dict[int, float]) -> None:
        certain = {epoch: value for epoch, (_, value) in self.epochs.items() if value >= 0}
        uncertain = self.epochs.keys() - certain.keys()
        compare(what, certain, {epoch: value for epoch, value in found.items() if epoch not in uncertain})


class Model:
    def __init__(self, journal: Path) -> None:
        self.runs: dict[str, ModelRun] = {}
        self.seen: set[float] = set()
        self.log: list[str] = []
        reader = JournalReader(journal)
        for stream in reader.streams():
            sequence = 0
            for record in reader.read(stream):
                if record.sequence <= sequence:
                    continue
                sequence = record.sequence
                envelope = decode(record.payload)
                self.add(envelope)
            for run in self.runs.values():
                run.flush()

    def add(self, envelope: Any) -> None:
        event, run = envelope.event, self.runs.setdefault(envelope.run, ModelRun())
        step, metrics = getattr(event, "step_idx", None), dict(getattr(event, "metrics", {}))
        if isinstance(event, BenchmarkEval):
            step, metrics = event.step, dict(event.eval_result.metrics)
        self.seen |= {*metrics.values()}
        match event:
            case RunStart():
                run.flush()
            case TrainStart():
                step = event.state.step
                run.flush()
                run.cut(step)
            case Metrics():
                run.add_part(event.step_idx, metrics)
            case StepEnd():
                run.add_whole_row(event.step_idx, metrics)
            case Eval():
                run.add_eval(event.eval_name, event.step_idx, metrics)
            case BenchmarkEval():
                run.add_eval(event.eval_result.name, NO_STEP if step is None else step, metrics)
            case EpochEnd():
                run.add_epoch(event.epoch, event.state.step, metrics["epoch_loss"])
            case Alert():
                run.alerts.append(event.title)
            case _:
                pass
        kind = type(event).__name__
        self.log.append(f"{envelope.stream} {envelope.seq} {envelope.run} {kind} {step} {metrics or ''}")


# -- what there is ----------------------------------------------------------------------------------------------------


def compare(what: str, expected: Any, found: Any) -> None:
    if expected == found:
        return
    if isinstance(expected, dict) and isinstance(found, dict):
        missing = {key: value for key, value in expected.items() if key not in found}
        unexpected = {key: value for key, value in found.items() if key not in expected}
        other = {key: (value, found[key]) for key, value in expected.items() if key in found and found[key] != value}
        raise Violation(f"{what}: missing {missing}, unexpected {unexpected}, other (expected, found) {other}")
    raise Violation(f"{what}: expected {expected}, found {found}")


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in row.items() if key != "step" and value not in {"", None}}


def check_read(root: Path, model: Model) -> None:
    runs = {run.id: run for run in evsys_bus.read_runs(root)}
    for key, expected in model.runs.items():
        run = runs[key]
        found = {
            (name, step): value
            for name, series in run.metrics.items()
            for step, value in zip(series.steps, series.values, strict=True)
        }
        compare(f"read of {key}, train", expected.train, found)
        evals: dict[str, Points] = {name: {} for name in expected.evals}
        for each in run.evals:
            for name, value in each.metrics.items():
                evals.setdefault(each.name, {})[name, NO_STEP if each.step is None else each.step] = value
        compare(f"read of {key}, evals", expected.evals, evals)
        compare(f"read of {key}, alerts", expected.alerts, [each.title for each in run.alerts])
        epochs = {each.epoch: each.metrics["epoch_loss"] for each in run.epochs}
        expected.compare_epochs(f"read of {key}, epochs", epochs)


def check_csv(root: Path, model: Model) -> None:
    for key, expected in model.runs.items():
        path = root / "out" / key / "rows.csv"
        rows: list[tuple[int, dict[str, float]]] = []
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    more = json.loads(row.pop("more_metrics", "") or "{}")
                    rows.append((int(row["step"]), numbers({**row, **more})))
        compare(f"csv of {key}", expected.rows, rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path) if path.exists() else []


def check_local(root: Path, model: Model) -> None:
    for key, expected in model.runs.items():
        logs = root / "out" / key / "logs"
        rows = [(row["step"], numbers(row)) for row in read_rows(logs / "training" / "metrics.jsonl")]
        compare(f"local files of {key}, train", expected.rows, rows)
        evals: dict[str, Points] = {name: {} for name in expected.evals}
        for split in ("validation", "test"):
            for row in read_rows(logs / split / "metrics.jsonl"):
                step = NO_STEP if row["step"] is None else row["step"]
                for name in ("acc", "score"):
                    if name in row:
                        evals.setdefault(row["benchmark"], {})[name, step] = row[name]
        training = {name: without_final(points) for name, points in expected.evals.items()}
        compare(
            f"local files of {key}, evals", training, {name: without_final(points) for name, points in evals.items()}
        )
        alerts = [row["title"] for row in read_rows(logs / "alerts.jsonl")]
        compare(f"local files of {key}, alerts", expected.alerts, alerts)
        epochs = {row["epoch"]: row["epoch_loss"] for row in read_rows(logs / "training" / "epochs.jsonl")}
        expected.compare_epochs(f"local files of {key}, epochs", epochs)


def without_final(points: Points) -> Points:
    return {key: value for key, value in points.items() if key[1] != NO_STEP}


def split_tags(points: dict[tuple[str, int], float]) -> tuple[Points, dict[str, Points]]:
    train: Points = {}
    evals: dict[str, Points] = {}
    for (tag, step), value in points.items():
        section, _, name = tag.partition("/")
        if section in {"held", "val", "tasks"}:  # of the dashboard
            evals.setdefault(section, {})[name, step] = value
        elif section == "eval":
            benchmark, _, metric = name.partition("/")
            evals.setdefault(benchmark, {})[metric, step] = value
        elif section == "train":
            train[name, step] = value
        elif tag == "deep/x":
            train[tag, step] = value
    return train, evals


def check_tagged(what: str, expected: ModelRun, points: dict[tuple[str, int], float]) -> None:
    train, evals = split_tags(points)
    compare(f"{what}, train", expected.train, train)
    wanted = {name: found for name, each in expected.evals.items() if (found := without_final(each))}
    compare(f"{what}, evals", wanted, evals)


def check_tensorboard(root: Path, model: Model) -> None:
    for key, expected in model.runs.items():
        points: dict[tuple[str, int], float] = {}
        count: Counter[tuple[str, int, float]] = Counter()
        for file in sorted((root / "out/tensorboard" / key).glob("events*")):
            for event in EventFileLoader(str(file)).Load():
                if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                    points = {each: value for each, value in points.items() if each[1] < event.step}
                for each in event.summary.value:
                    if each.HasField("tensor") and each.tensor.float_val:
                        points[each.tag, event.step] = each.tensor.float_val[0]
                        count[each.tag, event.step, each.tensor.float_val[0]] += 1
        check_tagged(f"tensorboard of {key}", expected, points)
        repeated = [each for each, number in count.items() if number > 1]
        require(not repeated, f"tensorboard of {key}: {repeated} occur twice")


def check_wandb(root: Path, model: Model) -> None:
    for key, expected in model.runs.items():
        points: dict[tuple[str, int], float] = {}
        count: Counter[tuple[str, int, float]] = Counter()
        for file in wandb_files_of(root / "out" / key):
            for row in rows_in(file):
                for tag, value in row.items():
                    section = tag.rpartition("/")[0]
                    step = row.get(f"{section}/step", row.get("train/step"))
                    if isinstance(value, int | float) and not tag.endswith("/step") and not tag.startswith("_"):
                        points[tag, step] = value
                        count[tag, step, value] += 1
        check_tagged(f"wandb of {key}", expected, points)
        repeated = [each for each, number in count.items() if number > 1]
        require(not repeated, f"wandb of {key}: {repeated} occur twice")


def check_dashboard(root: Path, model: Model, rng: random.Random) -> None:
    store = Store.open(root / "dashboard.sqlite")
    try:
        reader = JournalReader(root / "journal")
        for stream in reader.streams():
            payloads: list[bytes] = []
            for record in reader.read(stream):
                if record.sequence == len(payloads) + 1:
                    payloads.append(bytes(record.payload))
            at = 0
            while at < len(payloads):
                end = at + rng.randrange(1, 40)
                store.ingest(stream, at, payloads[at:end])
                at = end
        catalogue = store.catalogue
        found: dict[str, Any] = {}
        for experiment in catalogue.records.experiments():
            for run in catalogue.records.runs(experiment.id):
                points: dict[tuple[str, int], float] = {}
                for info in store.series.names(run.id):
                    line = store.series.read([info.id], width=1).lines[0]
                    points.update({(info.name, int(x)): y for x, y in zip(line.x, line.last, strict=True)})
                found[Path(run.path).name] = points
        for key, expected in model.runs.items():
            if not (expected.rows or expected.evals):
                continue
            check_tagged(f"dashboard of {key}", expected, found[key])
    finally:
        store.close()


def check(root: Path, seed: int) -> list[str]:
    """Return what is wrong."""
    model = Model(root / "journal")
    problems: list[str] = []
    receipts = {float(each) for each in (root / "receipts").read_text().split()}
    lost = receipts - model.seen
    if lost:
        problems.append(f"acknowledged and not recorded: {sorted(lost)}")
    checks: list[Callable[[], None]] = [
        lambda: check_read(root, model),
        lambda: check_csv(root, model),
        lambda: check_local(root, model),
        lambda: check_tensorboard(root, model),
        lambda: check_wandb(root, model),
        lambda: check_dashboard(root, model, random.Random(seed)),
    ]
    for each in checks:
        try:
            each()
        except Violation as violation:
            problems.append(str(violation))
    letters = (root / "journal" / "couriers").glob("*.dead.jsonl")
    problems += [f"dead letters: {each.read_text()[:500]}" for each in letters]
    if problems:
        (root / "events.txt").write_text("\n".join(model.log))
    return problems


def import_what_children_need(seed: int, folder: Path | None) -> None:
    """Import the modules that a history needs, once and here, so that forked processes need not."""
    root = Path(tempfile.mkdtemp(prefix="front-door-", dir=folder))
    play(root, seed, Counter())
    for name in (root / "modules").read_text().split():
        if name not in sys.modules and not name.startswith("_"):
            with suppress(Exception):
                importlib.import_module(name)
    shutil.rmtree(root)


def run_histories(first: int, count: int, folder: Path | None, *, stop_after: int = 1) -> list[str]:
    """Play the histories with these seeds; returns what is wrong in them."""
    counts: Counter[str] = Counter()
    began, problems = time.monotonic(), list[str]()
    import_what_children_need(first, folder)
    for seed in range(first, first + count):
        root = Path(tempfile.mkdtemp(prefix=f"front-door-{seed}-", dir=folder))
        try:
            play(root, seed, counts)
            found = check(root, seed)
        except Violation as violation:
            found = [str(violation)]
        counts["histories"] += 1
        counts["failed"] += bool(found)
        if found:
            problems += [f"seed {seed}, in {root}", *found]
            print(*problems[-len(found) - 1 :], sep="\n  ", flush=True)
            if counts["failed"] >= stop_after:
                break
        else:
            shutil.rmtree(root)
        if not counts["histories"] % PRINTED_EVERY:
            print(f"until seed {seed}: {dict(counts)}, {time.monotonic() - began:.0f} s", flush=True)
    print(f"from seed {first}: {dict(counts)}, {time.monotonic() - began:.0f} s")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the first history; default: a random one")
    parser.add_argument("--folder", type=Path, default=None, help="where their folders are; those that failed stay")
    parser.add_argument("--stop-after", type=int, default=1, help="failed histories; default: 1")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    first = random.randrange(1_000_000) if options.seed is None else options.seed
    return bool(run_histories(first, options.histories, options.folder, stop_after=options.stop_after))


if __name__ == "__main__":
    sys.exit(main())
