"""Training frameworks: as peers in the suite ``dispatch``, and with their bridges in the suite ``frameworks``.

In ``dispatch`` each is measured through the code that its own trainer calls. They take gigabytes to install (group
``peers``, or ``.ci/frameworks.txt``) and are left out where they are missing. Each passes its own arguments to its
hooks; the hook does nothing in all of them. None of them isolates a hook that raises.
"""

import ast
import csv
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import quantiles
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any, Final

from benchmarks.framework_trainings import SAVE_EVERY, TRAININGS
from evsys_bus import read
from evsys_bus.bench.dispatch import BATCH, METRICS, Peer
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult, TimedLoop

# Types of the frameworks are Any, because pyright runs where they are not installed.


@contextmanager
def transformers(k: int) -> Generator[TimedLoop, None, None]:
    """The callback list of Hugging Face's Trainer."""
    from transformers import logging as transformers_logging
    from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState

    class NoOp(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Do nothing."""

    transformers_logging.set_verbosity_error()
    handler = CallbackHandler([], None, None, None, None)
    handler.callbacks = [NoOp() for _ in range(k)]

    def run(operations: int) -> int:
        args, state, control = SimpleNamespace(), TrainerState(), TrainerControl()
        started = perf_counter_ns()
        for _ in range(operations):
            handler.on_step_end(args, state, control)
        return perf_counter_ns() - started

    yield run


@contextmanager
def lightning(k: int) -> Generator[TimedLoop, None, None]:
    """The function with which Lightning's loops call every callback."""
    import lightning.pytorch as pl
    from lightning.pytorch.trainer.call import _call_callback_hooks

    class NoOp(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """Do nothing."""

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet_options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, enable_model_summary=False, accelerator="cpu", **quiet_options)
    trainer.callbacks = [NoOp() for _ in range(k)]
    module = pl.LightningModule()
    trainer.strategy._lightning_module = module  # noqa: SLF001 - there is no public way without training
    module.trainer = trainer

    def run(operations: int) -> int:
        batch, metrics = BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            _call_callback_hooks(trainer, "on_train_batch_end", metrics, batch, i)
        return perf_counter_ns() - started

    yield run


@contextmanager
def composer(k: int) -> Generator[TimedLoop, None, None]:
    """Composer's engine."""
    try:
        from composer.core import Callback, Engine, Event, State
        from composer.devices import DeviceCPU
        from composer.loggers import Logger
        from composer.models import ComposerModel
    except RuntimeError as error:  # raised by a torchvision that does not match the installed torch
        raise ImportError(str(error)) from error
    import torch
    from torch.utils.data import DataLoader

    class Model(ComposerModel):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, batch: Any) -> Any: ...

        def loss(self, outputs: Any, batch: Any) -> Any: ...

    class NoOp(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            """Do nothing."""

    state = State(
        model=Model(),
        rank_zero_seed=0,
        run_name="bench",
        device=DeviceCPU(),
        max_duration="1ep",
        device_train_microbatch_size=1,
        dataloader=DataLoader([1, 2, 3]),
        dataloader_label="train",
        callbacks=[NoOp() for _ in range(k)],
    )
    engine = Engine(state, Logger(state))
    try:

        def run(operations: int) -> int:
            started = perf_counter_ns()
            for _ in range(operations):
                engine.run_event(Event.BATCH_END)
            return perf_counter_ns() - started

        yield run
    finally:
        engine.close()


@contextmanager
def keras(k: int) -> Generator[TimedLoop, None, None]:
    """The callback list of Keras's fit."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    from keras.src.callbacks.callback_list import CallbackList

    class NoOp(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            """Do nothing."""

    callback_list = CallbackList([NoOp() for _ in range(k)], add_history=False, add_progbar=False)

    def run(operations: int) -> int:
        metrics = METRICS
        started = perf_counter_ns()
        for i in range(operations):
            callback_list.on_train_batch_end(i, metrics)
        return perf_counter_ns() - started

    yield run


FRAMEWORKS: Final = {
    "transformers": Peer(transformers, "transformers"),
    "lightning": Peer(lightning, "lightning"),
    "composer": Peer(composer, "mosaicml"),
    "keras": Peer(keras, "keras"),
}


def steps_in_journal(run: Path) -> list[int]:
    """Return the steps of a recorded run, in order; its attempts read as one run."""
    return [each.step for each in read(run).steps()]


def steps_in_csv(run: Path) -> list[int]:
    """Return the steps of the rows that `csv_metrics` wrote, in their order."""
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def steps_in_tensorboard(folder: Path) -> list[int]:
    """Return the steps of a training metric that each row has, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps: list[int] = []
    for each in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        accumulator = EventAccumulator(str(each), size_guidance={"scalars": 0, "tensors": 0})
        accumulator.Reload()
        tags = accumulator.Tags()
        rows = [[scalar.step for scalar in accumulator.Scalars(tag)] for tag in tags["scalars"] if "eval" not in tag]
        rows += [[tensor.step for tensor in accumulator.Tensors(tag)] for tag in tags["tensors"] if "/" in tag]
        steps += max(rows, key=len, default=[])
    return steps


def train(framework: str, folder: Path, *options: object) -> "subprocess.CompletedProcess[str]":
    """Run one of `TRAININGS` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.framework_trainings", framework, str(folder), *map(str, options)]
    root = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)  # noqa: S603 # our own program


def lines_of_code(path: Path) -> int:
    """Return the number of statements' lines, without docstrings, comments and line breaks inside a statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[:1] = [ast.Pass()]
    return sum(line.strip() not in {"", "pass"} for line in ast.unparse(tree).splitlines())


class FrameworkRuns:
    """Trains with each installed framework, kills it at random rows, and resumes it by the framework's own means."""

    name = "frameworks"
    promise = (
        "a framework's training that is killed and resumed reads as one run: no acknowledged row is lost or doubled"
    )

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure one framework after another; what is not installed is left out."""
        random, is_quick = Random(), budget.process_rounds <= _QUICK_ROUNDS  # noqa: S311 # no secret
        for framework in TRAININGS:
            if find_spec(framework) is None:
                yield Table(f"{framework}: a killed and resumed run", "rows", [], absent={framework: "not installed"})
                continue
            with tempfile.TemporaryDirectory() as folder:
                yield self._measure_rows(framework, Path(folder), random, kills=1 if is_quick else 3)
            with tempfile.TemporaryDirectory() as folder:
                yield self._measure_costs(framework, Path(folder), steps=40 if is_quick else 400)
        bridges = Path(find_spec("evsys_adapters.bridges._base").origin or "").parent  # pyright: ignore[reportOptionalMemberAccess]
        rows = [
            _count(each.stem, lines_of_code(each)) for each in sorted(bridges.glob("*.py")) if each.stem != "__init__"
        ]
        yield Table("lines of each bridge, on top of _base", "lines", rows)

    def _measure_rows(self, framework: str, folder: Path, random: Random, kills: int) -> Table:
        steps = 10 * SAVE_EVERY
        for attempt in range(kills):
            kill_at = random.randrange(2, steps // kills)
            done = train(framework, folder, "--steps", steps, "--kill-at", kill_at, *["--resume"][:attempt])
            _check(done, expected=-9)
        _check(train(framework, folder, "--steps", steps, "--resume"), expected=0)
        acknowledged = {int(each) for each in (folder / "acknowledged").read_text(encoding="utf-8").split()}
        found = {
            "rows in the journal": steps_in_journal(folder / "run"),
            "rows in CSV": steps_in_csv(folder / "run"),
            "rows in TensorBoard": steps_in_tensorboard(folder / "tensorboard"),
        }
        lost = sum(len(acknowledged.difference(each)) for each in found.values())
        doubled = sum(len(each) - len({*each}) for each in found.values())
        return Table(
            f"{framework}: a run of {steps} rows, killed {kills} times and resumed",
            "rows",
            [
                _count("acknowledged", len(acknowledged)),
                *[_count(name, len(each)) for name, each in found.items()],
                _count("lost", lost),
                _count("doubled", doubled),
            ],
            target_results=[
                TargetResult(f"{framework}: acknowledged rows that are lost", lost, lost == 0, "rows"),
                TargetResult(f"{framework}: steps that are there twice", doubled, doubled == 0, "rows"),
            ],
        )

    def _measure_costs(self, framework: str, folder: Path, steps: int) -> Table:
        _check(train(framework, folder, "--steps", steps), expected=0)
        costs: dict[str, list[float]] = {}
        for line in (folder / "costs").read_text(encoding="utf-8").splitlines():
            label, nanoseconds = line.split("\t")
            costs.setdefault(label, []).append(float(nanoseconds))
        ours, own = (_spread(each[1:]) for each in costs.values())  # the first call opens files
        ratio = Spread(ours.median / own.median, ours.low / own.high, ours.high / own.low)
        ours_name, own_name = costs
        rows = [Row(ours_name, ours, ratio, ours=True), Row(own_name, own, Spread(1, 1, 1))]
        return Table(
            f"{framework}: a log call, beside the framework's own logger in the same run", "ns", rows, own_name
        )


_QUICK_ROUNDS: Final = 5


def _count(name: str, number: float) -> Row:
    return Row(name, Spread(number, number, number), ours=True)


def _spread(values: list[float]) -> Spread:
    low, median, high = quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def _check(done: "subprocess.CompletedProcess[str]", expected: int) -> None:
    if done.returncode != expected:
        raise RuntimeError(f"the training ended with {done.returncode}, not {expected}:\n{done.stderr[-3000:]}")
