"""What the folder of a run or an experiment says of it; read only, a line at a time, and patient with damage."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_bus.context import ArmResult, EvalResult, ManifestRow
from evsys_bus.files import DAMAGE, read_file
from evsys_bus.training.ledger import LEDGER, MOST_PAGE_BYTES, RESULT, Page, RunEntry, read_result
from evsys_bus.training.rows import RowFile

METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints.jsonl"
_NO_METRICS: Final = frozenset({"step", "nonfinite", "replaced"})


class MetricRecord(msgspec.Struct):
    """One metric over the steps of a run; NaN and infinities are counted, and are neither least nor greatest."""

    name: str
    rows: int = 0
    nonfinite: int = 0
    first: float | None = None
    last: float | None = None
    least: float | None = None
    least_step: int | None = None
    greatest: float | None = None
    greatest_step: int | None = None

    def see(self, value: float, step: int | None) -> None:
        """One more row."""
        self.rows += 1
        if not math.isfinite(value):
            self.nonfinite += 1
            return
        self.first = value if self.first is None else self.first
        self.last = value
        if self.least is None or value < self.least:
            self.least, self.least_step = value, step
        if self.greatest is None or value > self.greatest:
            self.greatest, self.greatest_step = value, step


class RunRecord(msgspec.Struct):
    """Everything on record of one run."""

    folder: Path
    entry: RunEntry | None
    """Its line in the experiment's ledger; None where it belongs to no experiment."""
    result: ArmResult | None
    last_step: int | None
    rows: int
    metrics: list[MetricRecord]
    checkpoints: list[ManifestRow]
    evals: list[MetricRecord] = []
    """Those made while it trained, by their steps: ``val/acc``; from the journal, for whoever asks it."""
    process_gone: bool = False
    """It is called running, and no process writes its journal."""
    name: str | None = None
    """Its run key, where the journal tells of it."""
    status: str | None = None
    """By the journal: how its RunEnd or TrainEnd says; without one running, ended or killed, as its writer is."""
    error: str | None = None
    num_steps: int | None = None
    config: Any = None
    """Any: as the program gave it."""
    page: str | None = None
    """The URL where it is shown."""
    benchmarks: list[EvalResult] = []


class ExperimentRecord(msgspec.Struct):
    """Everything on record of an experiment."""

    folder: Path
    page: Page
    process_gone: bool = False
    """As a run's."""


def read_experiment(folder: Path) -> ExperimentRecord | None:
    """The experiment in this folder; None where there is none.

    Raises:
        Its ledger is damaged: one of `DAMAGE`.
        OSError: It cannot be read.
    """
    path = folder / LEDGER
    if not path.is_file():
        return None
    return ExperimentRecord(folder, msgspec.json.decode(read_file(path, most_bytes=MOST_PAGE_BYTES), type=Page))


def read_run(folder: Path) -> RunRecord | None:
    """The run in this folder; None where there is none."""
    if not any((folder / name).is_file() for name in (METRICS, CHECKPOINTS, RESULT)):
        return None
    try:
        experiment = read_experiment(folder.absolute().parent)
    except (OSError, *DAMAGE):
        experiment = None
    metrics: dict[str, MetricRecord] = {}
    last_step, rows = None, 0
    for row in RowFile(folder / METRICS).rows():
        rows += 1
        step = row.get("step")
        last_step = step if isinstance(step, int) and (last_step is None or step > last_step) else last_step
        for name, value in _numbers(row):
            metrics.setdefault(name, MetricRecord(name)).see(value, step if isinstance(step, int) else None)
    return RunRecord(
        folder,
        experiment.page.runs.get(folder.absolute().name) if experiment else None,
        read_result(folder) if (folder / RESULT).is_file() else None,
        last_step,
        rows,
        list(metrics.values()),
        read_checkpoints(folder),
    )


def read_checkpoints(folder: Path) -> list[ManifestRow]:
    """What the run in this folder has saved, in order; what was brought from elsewhere stands among it."""
    return list(_manifest(RowFile(folder / CHECKPOINTS).rows()))


def found_runs(root: Path) -> list[Path]:
    """Folders of runs and experiments up to two levels below ``root``."""
    below = [*root.glob("*/"), *root.glob("*/*/")] if root.is_dir() else []
    return [each for each in below if any((each / name).is_file() for name in (LEDGER, METRICS))]


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Any: a row holds what was measured; what JSON has no number for stands in its ``nonfinite``."""
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_METRICS:
            yield name, as_float(value)
    flags = row.get("nonfinite")
    for name in cast("dict[str, Any]", flags) if isinstance(flags, dict) else ():
        yield name, math.nan


def as_float(value: float) -> float:
    """JSON has integers beyond every float."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _manifest(rows: Iterable[dict[str, Any]]) -> Iterator[ManifestRow]:
    """Any: as `_numbers`."""
    for row in rows:
        try:
            yield msgspec.convert(row, ManifestRow)
        except msgspec.ValidationError:
            continue
