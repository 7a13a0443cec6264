"""Finding the journal or the folder that a command line names, and what is recorded there about runs and experiments.

Records in the folder of a run are read line by line; damaged lines are skipped. Runs without such records are read from
their journal.
"""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import click
import msgspec

from evsys_bus.adapter import RunAnnotated
from evsys_bus.cli.events import EventFilter, EventReader, metrics_of, read_stream_states, step_of
from evsys_bus.codec import decode
from evsys_bus.context import ArmResult, EvalResult, ManifestRow
from evsys_bus.errors import CodecError, JournalVersionError, closest_word
from evsys_bus.events import (
    BenchmarkEval,
    Checkpoint,
    Envelope,
    Eval,
    Event,
    RunEnd,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    event_tag,
)
from evsys_bus.files import DECODE_ERRORS, read_file
from evsys_bus.journal import JournalReader, OsDisk, layout
from evsys_bus.journal.layout import Family
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
JOURNAL: Final = "journal"
_MAX_NAMED: Final = 5
METRICS: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints.jsonl"
_NO_METRICS: Final = frozenset({"step", "nonfinite", "replaced"})
_PAGE_URL_KEY: Final = "wandb_url"
_ANNOTATION_TAG: Final = event_tag(RunAnnotated).encode()
_RUN_EVENTS: Final = (RunStart, TrainStart, StepEnd, Eval, Checkpoint, BenchmarkEval, TrainEnd, RunEnd)
_STATUS: Final = {"live": "running", "closed": "ended", "dead": "killed"}


class JournalLocation(NamedTuple):
    """An existing journal."""

    directory: Path
    run: str | None = None
    """The requested run, if the journal belongs to its whole experiment."""


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
        journal = _journal_in(folder)
        if journal is not None:
            return journal

    named = [journal for each in find_runs() if each.name == str(requested) and (journal := _journal_in(each))]
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


def _journal_in(folder: Path) -> JournalLocation | None:
    if _is_journal(folder):
        return JournalLocation(folder)
    own = _journal_below(folder)
    if own is not None:
        return JournalLocation(own)
    parent = folder.resolve().parent if folder.name in {"", ".."} else folder.parent
    shared = _journal_below(parent) if folder.is_dir() and folder.name != JOURNAL else None
    return None if shared is None else JournalLocation(shared, folder.resolve().name)


def _journal_below(folder: Path) -> Path | None:
    """Return the journal of a folder's runs: in it, or on a local disk if the folder's file system cannot hold one."""
    own = folder / JOURNAL
    substitute = Path(layout.local_substitute(str(own.absolute())))
    return next(filter(_is_journal, (own, substitute)), None)


def _is_journal(directory: Path) -> bool:
    return layout.is_journal(OsDisk(), str(directory))


def _find_journals() -> Iterator[Path]:
    for pattern in (JOURNAL, f"*/{JOURNAL}", f"*/*/{JOURNAL}"):
        yield from filter(_is_journal, RUNS.glob(pattern))


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
    if journal is None:
        return []
    records: dict[str, MetricRecord] = {}
    reader = EventReader(journal.directory, EventFilter(types=frozenset({"eval"}), run=journal.run))
    with suppress(JournalVersionError, OSError):  # the other facts come from the folder
        for envelope in reader.poll():
            if isinstance(envelope.event, Eval):
                _add_values(records, _numeric_items(metrics_of(envelope.event)), step_of(envelope.event))
    return list(records.values())


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
                annotation = _decode_annotation(record.payload) if _ANNOTATION_TAG in record.payload else None
                if annotation is not None and isinstance(url := annotation.extras.get(_PAGE_URL_KEY), str):
                    page_urls[annotation.run] = url
    return page_urls


def _decode_annotation(payload: bytes) -> RunAnnotated | None:
    try:
        event = decode(payload).event
    except CodecError:
        return None
    return event if isinstance(event, RunAnnotated) and isinstance(event.extras, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance] # another version may have written it


def read_status(folder: Path) -> str | None:
    """Read the status of the run in this folder from its journal; None if there is no journal."""
    journal = _find_journal(folder)
    if journal is None:
        return None
    with suppress(JournalVersionError, OSError):
        runs = read_runs(journal)
        if len(runs) == 1:
            return runs[0].status
    return None


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
    directory = journal.directory
    reader = EventReader(directory, EventFilter())
    whole = directory.absolute()
    default_key = (whole.parent if whole.name == JOURNAL else whole).name
    first_steps = _read_first_steps(directory)
    runs: list[_RunBuilder] = []
    for envelope in reader.poll():
        if isinstance(envelope.event, _RUN_EVENTS):
            run_dir = _output_dir(envelope.event)
            key = envelope.run or (run_dir and run_dir.name) or default_key
            _find_builder(runs, key, _run_root(envelope.event), first_steps).add(envelope)
    page_urls = read_page_urls(directory)
    states = {each.stream: each.state for each in read_stream_states(directory)}
    records = [each.build(directory, states, page_urls.get(each.key)) for each in runs]
    if journal.run is None:
        return records
    named = [each for each in records if each.name == journal.run]
    return named or [each for each in records if each.folder.name == journal.run]


def _read_first_steps(directory: Path) -> dict[tuple[str | None, Path | None], list[int]]:
    """Return the first steps of all trainings of each run, by key and root, in the order of their times.

    A training that begins at a step takes the place of the rows from that step on.
    """
    starts: list[Envelope] = []
    reader = JournalReader(directory)
    for stream in reader.streams("r"):
        for record in reader.read(stream):
            if b"train_start" in record.payload:  # few are, so few are decoded
                with suppress(CodecError):
                    starts.append(decode(record.payload))
    found: dict[tuple[str | None, Path | None], list[int]] = {}
    for envelope in sorted(starts, key=lambda envelope: envelope.time):
        step = getattr(getattr(envelope.event, "state", None), "step", None)
        if isinstance(envelope.event, TrainStart) and isinstance(step, int):
            found.setdefault((envelope.run, _run_root(envelope.event)), []).append(step)
    return found


def _find_builder(
    runs: list["_RunBuilder"],
    key: str,
    root: Path | None,
    first_steps: Mapping[tuple[str | None, Path | None], list[int]],
) -> "_RunBuilder":
    """Return the builder of a run, a new one if there is none.

    Runs of one key in two folders are two runs, unless the first folder is gone: then the run was moved.
    """
    same_key = [each for each in runs if each.key == key]
    found = next((each for each in same_key if each.is_in(root)), None)
    if found is None and same_key and not any(each.root and each.root.is_dir() for each in same_key):
        found = same_key[-1]
    if found is None:
        found = _RunBuilder(key, first_steps.get((key, root), ()))
        runs.append(found)
    found.root = root or found.root
    return found


class _RunBuilder:
    """Builds the record of a run from its events."""

    root: Path | None = None
    """See `_run_root`."""

    def __init__(self, key: str, first_steps: Sequence[int]) -> None:
        self.key: Final = key
        self._later_first_steps = list(first_steps)  # of trainings that are still to come
        self._folder: Path | None = None
        self._stream = ""
        self._final_status: str | None = None
        self._record: Final = RunRecord(Path(), None, None, None, 0, [], [], [], name=key)
        self._metrics: Final[dict[str, MetricRecord]] = {}
        self._evals: Final[dict[str, MetricRecord]] = {}

    def is_in(self, root: Path | None) -> bool:
        """Whether the run is in this directory; the state of a host may name the experiment's instead."""
        known = self.root
        return root is None or known is None or root in {known, known / self.key} or known == root / self.key

    def add(self, envelope: Envelope) -> None:
        """Add the next event."""
        event, record = envelope.event, self._record
        self._stream = envelope.stream
        self._folder = _output_dir(event) or self._folder
        num_steps = getattr(getattr(event, "state", None), "num_steps", None)
        if isinstance(num_steps, int) and 0 < num_steps < sys.maxsize:
            record.num_steps = num_steps
        match event:
            case RunStart():
                self._final_status, record.error = None, None
                record.config = getattr(event.ctx, "run_config", None)
            case TrainStart():
                self._final_status, record.error = None, None
                del self._later_first_steps[:1]
            case StepEnd() if not self._is_replaced(step_of(event)):
                self._add_step(event)
            case Eval() if not self._is_replaced(step_of(event)):
                _add_values(self._evals, _numeric_items(metrics_of(event)), step_of(event))
            case Checkpoint() if isinstance(event.row, ManifestRow):  # pyright: ignore[reportUnnecessaryIsInstance] # what was read may be anything
                record.checkpoints.append(event.row)
            case BenchmarkEval() if isinstance(event.eval_result, EvalResult):  # pyright: ignore[reportUnnecessaryIsInstance] # likewise
                record.benchmarks.append(event.eval_result)
            case TrainEnd():
                error = getattr(event.state, "error", None)
                self._final_status, record.error = ("ended", None) if error is None else ("failed", str(error))
            case RunEnd():
                self._final_status = str(getattr(event.run_result, "status", None) or "ended")
                record.error = getattr(event.run_result, "error", None)
            case _:
                pass

    def build(self, directory: Path, stream_states: Mapping[str, str], page_url: str | None) -> RunRecord:
        """Return the record."""
        record = self._record
        sibling = None if self._folder is None else directory.parent / self._folder.name
        moved = self._folder is None or (not self._folder.is_dir() and sibling is not None and sibling.is_dir())
        record.folder = sibling or directory if moved else self._folder or directory
        record.status = self._final_status or _STATUS.get(stream_states.get(self._stream, ""), "unknown")
        record.metrics = list(self._metrics.values())
        record.evals = list(self._evals.values())
        record.page_url = page_url
        return record

    def _is_replaced(self, step: int | None) -> bool:
        """Whether a later training begins at this step or before, and has the row of the step anew."""
        return step is not None and step >= min(self._later_first_steps, default=sys.maxsize)

    def _add_step(self, event: StepEnd) -> None:
        record, step = self._record, step_of(event)
        record.rows += 1
        if step is not None and (record.last_step is None or step > record.last_step):
            record.last_step = step
        _add_values(self._metrics, _numeric_items(metrics_of(event)), step)


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
            folder = _output_dir(envelope.event)
            if by_folder is None and folder is not None and folder.name == journal.run:
                by_folder = envelope.run
    return by_folder or journal.run


def _output_dir(event: Event | UnknownEvent) -> Path | None:
    """Return the directory of the run that an event's state names; None if it has none."""
    folder = getattr(getattr(event, "state", None), "output_dir", None)
    return Path(folder) if isinstance(folder, str | Path) and Path(folder) != Path() else None


def _run_root(event: Event | UnknownEvent) -> Path | None:
    """Return the directory of the run, by which runs of one key differ; None if the event names none."""
    ctx = getattr(event, "ctx", None)
    if ctx is None:
        return _output_dir(event)
    folder, key = getattr(ctx, "output_dir", None), getattr(ctx, "run_key", None)
    if not isinstance(folder, str | Path) or Path(folder) == Path():
        return None
    return Path(folder, key) if isinstance(key, str) else Path(folder)


def _find_journal(folder: Path) -> JournalLocation | None:
    try:
        return find_journal(folder)
    except click.UsageError:
        return None
