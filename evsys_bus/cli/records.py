"""The records in the folder of a run or an experiment, read line by line; damaged lines are skipped."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_bus.context import ArmResult, EvalResult, ManifestRow
from evsys_bus.files import DECODE_ERRORS, read_file
from evsys_bus.training.experiment_store import (
    EXPERIMENT_FILE,
    MAX_FILE_BYTES,
    RESULT_FILE,
    RunEntry,
    StoredExperiment,
    read_result,
)
from evsys_bus.training.run_files import RowFile

METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints.jsonl"
_NO_METRICS: Final = frozenset({"step", "nonfinite", "replaced"})


class MetricRecord(msgspec.Struct):
    """A metric over the steps of a run; NaN and infinities are counted, and excluded from least and greatest."""

    name: str
    rows: int = 0
    nonfinite: int = 0
    first: float | None = None
    last: float | None = None
    least: float | None = None
    least_step: int | None = None
    greatest: float | None = None
    greatest_step: int | None = None

    def add(self, value: float, step: int | None) -> None:
        """Add a value."""
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


class RunRecord(msgspec.Struct, rename={"page_url": "page"}):
    """Everything that is recorded about a run."""

    folder: Path
    entry: RunEntry | None
    """The run's entry in the record of its experiment; None if it belongs to none."""
    result: ArmResult | None
    last_step: int | None
    rows: int
    metrics: list[MetricRecord]
    checkpoints: list[ManifestRow]
    evals: list[MetricRecord] = []
    """Evals during training, such as ``val/acc``; read from the journal on request."""
    process_gone: bool = False
    """The status is running, but no process writes the journal."""
    name: str | None = None
    """The run key, if the record comes from a journal."""
    status: str | None = None
    """Status by the journal: that of RunEnd or TrainEnd, else running, ended or killed, depending on the writer."""
    error: str | None = None
    num_steps: int | None = None
    config: Any = None
    page_url: str | None = None
    """The URL of the run's page."""
    benchmarks: list[EvalResult] = []


class ExperimentRecord(msgspec.Struct, rename={"experiment": "page"}):
    """Everything that is recorded about an experiment."""

    folder: Path
    experiment: StoredExperiment
    process_gone: bool = False
    """The status is running, but no process writes the journal."""


def read_experiment(folder: Path) -> ExperimentRecord | None:
    """Read the experiment in this folder; None if there is none.

    Raises:
        Exception: One of `DECODE_ERRORS`: the experiment's file is damaged.
        OSError: The file cannot be read.
    """
    path = folder / EXPERIMENT_FILE
    if not path.is_file():
        return None
    return ExperimentRecord(
        folder, msgspec.json.decode(read_file(path, max_bytes=MAX_FILE_BYTES), type=StoredExperiment)
    )


def read_run(folder: Path) -> RunRecord | None:
    """Read the run in this folder; None if there is none."""
    if not any((folder / name).is_file() for name in (METRICS, CHECKPOINTS, RESULT_FILE)):
        return None
    try:
        experiment = read_experiment(folder.absolute().parent)
    except (OSError, *DECODE_ERRORS):
        experiment = None
    metrics: dict[str, MetricRecord] = {}
    last_step, rows = None, 0
    for row in RowFile(folder / METRICS).rows():
        rows += 1
        step = row.get("step")
        last_step = step if isinstance(step, int) and (last_step is None or step > last_step) else last_step
        for name, value in _numbers(row):
            metrics.setdefault(name, MetricRecord(name)).add(value, step if isinstance(step, int) else None)
    return RunRecord(
        folder,
        experiment.experiment.runs.get(folder.absolute().name) if experiment else None,
        read_result(folder) if (folder / RESULT_FILE).is_file() else None,
        last_step,
        rows,
        list(metrics.values()),
        read_checkpoints(folder),
    )


def read_checkpoints(folder: Path) -> list[ManifestRow]:
    """Return the recorded checkpoints of the run in this folder, in order, fetched ones included."""
    return list(_manifest_rows(RowFile(folder / CHECKPOINTS).rows()))


def find_runs(root: Path) -> list[Path]:
    """Return the folders of runs and experiments up to two levels below ``root``."""
    below = [*root.glob("*/"), *root.glob("*/*/")] if root.is_dir() else []
    return [each for each in below if any((each / name).is_file() for name in (EXPERIMENT_FILE, METRICS))]


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a row; values that JSON cannot represent are listed in its ``nonfinite``."""
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _NO_METRICS:
            yield name, as_float(value)
    flags = row.get("nonfinite")
    for name in cast("dict[str, Any]", flags) if isinstance(flags, dict) else ():
        yield name, math.nan


def as_float(value: float) -> float:
    """Convert to float; integers beyond the range of floats become infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _manifest_rows(rows: Iterable[dict[str, Any]]) -> Iterator[ManifestRow]:
    for row in rows:
        try:
            yield msgspec.convert(row, ManifestRow)
        except msgspec.ValidationError:
            continue
