"""Finding the journal or the folder that a command line names, and what is recorded there about runs and experiments.

Records in the folder of a run are read line by line; damaged lines are skipped. Runs without such records are read from
their journal.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import click
import msgspec

from evsys_bus.codec import decode
from evsys_bus.context import ArmResult, EvalResult, ManifestRow
from evsys_bus.delivery.open_runs import decode_annotation
from evsys_bus.errors import CodecError, JournalVersionError, closest_word
from evsys_bus.files import DECODE_ERRORS, read_file
from evsys_bus.journal import JournalReader
from evsys_bus.journal.layout import Family
from evsys_bus.reading import (
    JOURNAL,
    JournalLocation,
    RecordedRun,
    eval_series,
    is_journal,
    locate_journal,
    read_journal,
    summarize_series,
)
from evsys_bus.reading.collector import output_dir_of
from evsys_bus.run_files import RowFile
from evsys_bus.training.experiment_store import (
    EXPERIMENT_FILE,
    MAX_FILE_BYTES,
    RESULT_FILE,
    RunEntry,
    StoredExperiment,
    read_result,
)

RUNS: Final = Path("runs")
_MAX_NAMED: Final = 5
METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints.jsonl"
_NO_METRICS: Final = frozenset({"step", "nonfinite", "replaced"})
_PAGE_URL_KEY: Final = "wandb_url"


def find_journal(requested: Path | None) -> JournalLocation:
    """Find the requested journal; None means the newest one below ``./runs``.

    Raises:
        click.UsageError: There is none, or several match.
    """
    if requested is None:
        newest = max(_find_journals(), key=last_write_time, default=None)
        if newest is None:
            raise click.UsageError(f"there is no journal below {RUNS.absolute()}; name a run")
        return JournalLocation(newest)
    for folder in (requested, RUNS / requested):
        journal = locate_journal(folder)
        if journal is not None:
            return journal

    named = [journal for each in find_runs() if each.name == str(requested) and (journal := locate_journal(each))]
    if len(named) == 1:
        return named[0]
    if named:
        raise click.UsageError(f"several runs are called {requested}; name the folder of one")
    what = f"{requested} holds no journal" if requested.exists() else f"there is no run {requested}"
    known = {str(each.parent) for each in _find_journals()} | {str(each) for each in find_runs()}
    raise click.UsageError(f"{what}{suggest_run(requested, known)}")


def list_journals_newest_first() -> list[Path]:
    """Return the journals below ``./runs``, most recently written first."""
    return sorted(_find_journals(), key=last_write_time, reverse=True)


def _find_journals() -> Iterator[Path]:
    for pattern in (JOURNAL, f"*/{JOURNAL}", f"*/*/{JOURNAL}"):
        yield from filter(is_journal, RUNS.glob(pattern))


def last_write_time(folder: Path) -> float:
    """Return when a journal, or the folder of a run or experiment, was last written."""
    files = [
        each for pattern in ("*/*.seg", f"{JOURNAL}/*/*.seg", METRICS, EXPERIMENT_FILE) for each in folder.glob(pattern)
    ]
    return max((each.stat().st_mtime for each in files), default=folder.stat().st_mtime)


def suggest_run(requested: Path, known: set[str]) -> str:
    """Return the end of an error text: the nearest of the known folders or names of runs, or some of them."""
    near = closest_word(str(requested), [*known, *(Path(each).name for each in known)])
    if near is not None:
        return f"; did you mean {near}?"
    return f"; known: {', '.join(sorted(known)[:_MAX_NAMED])}" if known else ""


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
    stored = msgspec.json.decode(read_file(path, max_bytes=MAX_FILE_BYTES), type=StoredExperiment)
    return ExperimentRecord(folder, stored)


def load_previous_experiment(folder: Path) -> StoredExperiment | None:
    """Return the experiment recorded in this directory; None if there is none or it cannot be read."""
    try:
        record = read_experiment(folder)
    except (OSError, *DECODE_ERRORS):
        return None
    return None if record is None else record.experiment


def read_run(folder: Path) -> RunRecord | None:
    """Read the run in this folder; None if there is none."""
    if not any((folder / name).is_file() for name in (METRICS, CHECKPOINTS, RESULT_FILE)):
        return None
    experiment = load_previous_experiment(folder.absolute().parent)
    metrics: dict[str, MetricRecord] = {}
    last_step, rows = None, 0
    for row in RowFile(folder / METRICS).rows():
        rows += 1
        step = row.get("step")
        last_step = step if isinstance(step, int) and (last_step is None or step > last_step) else last_step
        _add_values(metrics, _numbers(row), step if isinstance(step, int) else None)
    return RunRecord(
        folder,
        None if experiment is None else experiment.runs.get(folder.absolute().name),
        read_result(folder) if (folder / RESULT_FILE).is_file() else None,
        last_step,
        rows,
        list(metrics.values()),
        read_checkpoints(folder),
    )


def read_checkpoints(folder: Path) -> list[ManifestRow]:
    """Return the recorded checkpoints of the run in this folder, in order, fetched ones included."""
    checkpoints: list[ManifestRow] = []
    for row in RowFile(folder / CHECKPOINTS).rows():
        with suppress(msgspec.ValidationError):
            checkpoints.append(msgspec.convert(row, ManifestRow))
    return checkpoints


def find_runs() -> list[Path]:
    """Return the folders of runs and experiments up to two levels below ``./runs``."""
    below = [*RUNS.glob("*/"), *RUNS.glob("*/*/")] if RUNS.is_dir() else []
    return [each for each in below if any((each / name).is_file() for name in (EXPERIMENT_FILE, METRICS))]


def _numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the metrics of a row; values that JSON cannot represent are listed in its ``nonfinite``."""
    yield from (each for each in _numeric_items(row) if each[0] not in _NO_METRICS)
    flags = row.get("nonfinite")
    for name in cast("dict[str, Any]", flags) if isinstance(flags, dict) else ():
        yield name, math.nan


def _numeric_items(metrics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield the metrics that are numbers; integers beyond the range of floats become infinite."""
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                yield name, float(value)
            except OverflowError:
                yield name, math.inf if value > 0 else -math.inf


def _add_values(records: dict[str, MetricRecord], values: Iterable[tuple[str, float]], step: int | None) -> None:
    for name, value in values:
        records.setdefault(name, MetricRecord(name)).add(value, step)


def read_evals(folder: Path) -> list[MetricRecord]:
    """Read the metrics of a run's evals, such as ``val/acc``, over the steps; an unreadable rest is skipped."""
    journal = _find_journal(folder)
    found = [] if journal is None else read_journal(journal)
    return _eval_records(found[0]) if len(found) == 1 else []


def read_page_urls(directory: Path, *, inline: bool = True) -> dict[str, str]:
    """Read the URLs that loggers have published for the runs of a journal, by run.

    Args:
        directory: The journal.
        inline: Include URLs published by inline callbacks, which takes reading the whole journal.
    """
    families: tuple[Family, ...] = ("c", "r") if inline else ("c",)
    reader = JournalReader(directory)
    page_urls: dict[str, str] = {}
    with suppress(JournalVersionError, OSError):
        for stream in (each for family in families for each in reader.streams(family)):
            for record in reader.read(stream):
                annotation = decode_annotation(record.payload)
                if annotation is not None and isinstance(url := annotation.extras.get(_PAGE_URL_KEY), str):
                    page_urls[annotation.run] = url
    return page_urls


def read_status(folder: Path) -> str | None:
    """Read the status of the run in this folder from its journal; None if there is no journal."""
    journal = _find_journal(folder)
    found = [] if journal is None else read_journal(journal)
    return _status_of(found[0]) if len(found) == 1 else None


def is_abandoned(folder: Path) -> bool:
    """Return whether a run or an experiment has a journal that no process writes."""
    journal = _find_journal(folder)
    if journal is None:
        return False
    reader = JournalReader(journal.directory)
    return not any(map(reader.is_live, reader.streams("r")))


def read_runs(journal: JournalLocation) -> list[RunRecord]:
    """Read the runs of a journal in the order in which they started, or only the requested one.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    reader = JournalReader(journal.directory)
    for stream in reader.streams():
        next(reader.read(stream), None)
    return [_to_record(each) for each in read_journal(journal)]


def _to_record(run: RecordedRun) -> RunRecord:
    url = run.extras.get(_PAGE_URL_KEY)
    return RunRecord(
        run.folder,
        None,
        None,
        run.last_step,
        len(run.times.steps),
        [MetricRecord(name, *summarize_series(series)) for name, series in run.metrics.items()],
        run.checkpoints,
        _eval_records(run),
        name=run.id,
        status=_status_of(run),
        error=run.error,
        num_steps=run.num_steps,
        config=run.config or None,
        page_url=url if isinstance(url, str) else None,
        benchmarks=run.benchmarks,
    )


def _eval_records(run: RecordedRun) -> list[MetricRecord]:
    during_training = eval_series(each for each in run.evals if not each.is_benchmark)
    return [MetricRecord(name, *summarize_series(series)) for name, series in during_training.items()]


def _status_of(run: RecordedRun) -> str:
    """Return the status that is shown: a training without a RunEnd has only ended."""
    if run.end_event == "RunEnd":
        return run.state
    if run.end_event == "TrainEnd":
        return "ended" if run.error is None else "failed"
    return "ended" if run.state in {"completed", "cancelled"} else run.state


def find_run_key(journal: JournalLocation) -> str | None:
    """Find the key of the requested run, which may differ from the name of its folder."""
    if journal.run is None:
        return None
    reader, name = JournalReader(journal.directory), journal.run.encode(errors="replace")
    by_folder: str | None = None
    for stream in reader.streams():
        for record in reader.read(stream):
            if name not in record.payload:  # payloads contain texts verbatim
                continue
            try:
                envelope = decode(record.payload)
            except CodecError:
                continue
            if envelope.run == journal.run:
                return journal.run
            folder = output_dir_of(envelope.event)
            if by_folder is None and folder is not None and folder.name == journal.run:
                by_folder = envelope.run
    return by_folder or journal.run


def _find_journal(folder: Path) -> JournalLocation | None:
    try:
        return find_journal(folder)
    except click.UsageError:
        return None
