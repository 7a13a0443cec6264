"""Facts about runs from their journal: everything for runs without records of their own, additions for the others."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from evsys_bus.adapter import RunAnnotated
from evsys_bus.cli.event_facts import metrics_of, step_of
from evsys_bus.cli.event_reader import EventFilter, EventReader
from evsys_bus.cli.journals import JOURNAL, JournalLocation, find_journal
from evsys_bus.cli.records import MetricRecord, RunRecord, as_float
from evsys_bus.cli.streams import read_stream_states
from evsys_bus.codec import decode
from evsys_bus.context import EvalResult, ManifestRow
from evsys_bus.errors import CodecError, JournalVersionError
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
)
from evsys_bus.journal import JournalReader
from evsys_bus.journal.layout import Family

_PAGE_URL_KEY: Final = "wandb_url"
_ANNOTATION_TAG: Final = RunAnnotated.hook.removeprefix("on_").encode()


def read_evals(folder: Path) -> list[MetricRecord]:
    """Read the metrics of a run's evals, such as ``val/acc``, over the steps; an unreadable rest is skipped."""
    journal = _find_journal(folder)
    if journal is None:
        return []
    records: dict[str, MetricRecord] = {}
    reader = EventReader(journal.directory, EventFilter(types=frozenset({"eval"}), run=journal.run))
    with suppress(JournalVersionError, OSError):  # the other facts come from the folder
        for envelope in reader.poll():
            for name, value in _eval_numbers(envelope.event):
                records.setdefault(name, MetricRecord(name)).add(value, step_of(envelope.event))
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
    runs: dict[str, _RunBuilder] = {}
    for envelope in reader.poll():
        if isinstance(envelope.event, _RUN_EVENTS):
            key = _event_run_key(envelope) or _name_from_path(directory)
            runs.setdefault(key, _RunBuilder(key)).add(envelope)
    page_urls = read_page_urls(directory)
    states = {each.stream: each.state for each in read_stream_states(directory)}
    records = [each.build(directory, states, page_urls.get(each.key)) for each in runs.values()]
    if journal.run is None:
        return records
    named = [each for each in records if each.name == journal.run]
    return named or [each for each in records if each.folder.name == journal.run]


_RUN_EVENTS: Final = (RunStart, TrainStart, StepEnd, Eval, Checkpoint, BenchmarkEval, TrainEnd, RunEnd)


class _RunBuilder:
    """Builds the record of a run from its events."""

    def __init__(self, key: str) -> None:
        self.key: Final = key
        self._folder: Path | None = None
        self._stream = ""
        self._final_status: str | None = None
        self._record: Final = RunRecord(Path(), None, None, None, 0, [], [], [], name=key)
        self._metrics: Final[dict[str, MetricRecord]] = {}
        self._evals: Final[dict[str, MetricRecord]] = {}

    def add(self, envelope: Envelope) -> None:
        """Add the next event."""
        event, record = envelope.event, self._record
        self._stream = envelope.stream
        self._read_loop_state(event)
        match event:
            case RunStart():
                self._final_status, record.error = None, None
                record.config = getattr(event.ctx, "run_config", None)
            case TrainStart():
                self._final_status, record.error = None, None
            case StepEnd():
                self._add_step(event)
            case Eval():
                for name, value in _eval_numbers(event):
                    self._evals.setdefault(name, MetricRecord(name)).add(value, step_of(event))
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

    def _add_step(self, event: StepEnd) -> None:
        record, step = self._record, step_of(event)
        record.rows += 1
        if step is not None and (record.last_step is None or step > record.last_step):
            record.last_step = step
        for name, value in _numeric_items(metrics_of(event)):
            self._metrics.setdefault(name, MetricRecord(name)).add(value, step)

    def _read_loop_state(self, event: Event | UnknownEvent) -> None:
        state = getattr(event, "state", None)
        folder = getattr(state, "output_dir", None)
        if isinstance(folder, str | Path) and str(folder):
            self._folder = Path(folder)
        steps = getattr(state, "num_steps", None)
        if isinstance(steps, int) and 0 < steps < sys.maxsize:
            self._record.num_steps = steps


_STATUS: Final = {"live": "running", "closed": "ended", "dead": "killed"}


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
            folder = getattr(getattr(envelope.event, "state", None), "output_dir", None)
            if by_folder is None and isinstance(folder, str | Path) and Path(folder).name == journal.run:
                by_folder = envelope.run
    return by_folder or journal.run


def _event_run_key(envelope: Envelope) -> str | None:
    if envelope.run is not None:
        return envelope.run
    folder = getattr(getattr(envelope.event, "state", None), "output_dir", None)
    return Path(folder).name or None if isinstance(folder, str | Path) else None


def _name_from_path(directory: Path) -> str:
    """Return the name of a run whose events carry none, from the journal's path."""
    whole = directory.absolute()
    return (whole.parent if whole.name == JOURNAL else whole).name


def _numeric_items(metrics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, as_float(value)


def _eval_numbers(event: Event | UnknownEvent) -> Iterator[tuple[str, float]]:
    if isinstance(event, Eval):
        yield from _numeric_items(metrics_of(event))


def _find_journal(folder: Path) -> JournalLocation | None:
    try:
        return find_journal(folder)
    except click.UsageError:
        return None
