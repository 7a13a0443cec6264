"""Facts about runs from their journal: everything for runs without records of their own, additions for the others."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from evsys_bus.attached import Learnt
from evsys_bus.cli.event_facts import metrics_of, step_of
from evsys_bus.cli.event_reader import EventReader, Wanted
from evsys_bus.cli.journals import JOURNAL, Found, found
from evsys_bus.cli.records import MetricRecord, RunRecord, as_float
from evsys_bus.cli.streams import streams
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

_PAGE: Final = "wandb_url"
_LEARNT: Final = Learnt.hook.removeprefix("on_").encode()


def read_evals(folder: Path) -> list[MetricRecord]:
    """Read the metrics of a run's evals, such as ``val/acc``, over the steps; an unreadable rest is skipped."""
    journal = _journal(folder)
    if journal is None:
        return []
    records: dict[str, MetricRecord] = {}
    reader = EventReader(journal.directory, Wanted(types=frozenset({"eval"}), run=journal.run))
    with suppress(JournalVersionError, OSError):  # the other facts come from the folder
        for envelope in reader.poll():
            for name, value in _numbers(envelope.event):
                records.setdefault(name, MetricRecord(name)).see(value, step_of(envelope.event))
    return list(records.values())


def read_pages(directory: Path, *, inline: bool = True) -> dict[str, str]:
    """Read the URLs that loggers have published for the runs of a journal, by run.

    Args:
        directory: The journal.
        inline: Include URLs published by inline callbacks, which takes reading the whole journal.
    """
    families: tuple[Family, ...] = ("c", "r") if inline else ("c",)
    reader = JournalReader(directory)
    pages: dict[str, str] = {}
    with suppress(JournalVersionError, OSError):
        for stream in (each for family in families for each in reader.streams(family)):
            for record in reader.read(stream):
                learnt = _learnt(record.payload) if _LEARNT in record.payload else None
                if learnt is not None and isinstance(url := learnt.extras.get(_PAGE), str):
                    pages[learnt.run] = url
    return pages


def _learnt(payload: bytes) -> Learnt | None:
    try:
        event = decode(payload).event
    except CodecError:
        return None
    return event if isinstance(event, Learnt) and isinstance(event.extras, dict) else None  # pyright: ignore[reportUnnecessaryIsInstance] # another version may have written it


def read_status(folder: Path) -> str | None:
    """Read the status of the run in this folder from its journal; None if there is no journal."""
    journal = _journal(folder)
    if journal is None:
        return None
    with suppress(JournalVersionError, OSError):
        runs = read_runs(journal)
        if len(runs) == 1:
            return runs[0].status
    return None


def is_deserted(folder: Path) -> bool:
    """Return whether a run or an experiment has a journal that no process writes."""
    journal = _journal(folder)
    if journal is None:
        return False
    reader = JournalReader(journal.directory)
    return not any(map(reader.is_live, reader.streams("r")))


def read_runs(journal: Found) -> list[RunRecord]:
    """Read the runs of a journal in the order in which they started, or only the requested one.

    Raises:
        JournalVersionError: A newer version of evsys-bus wrote it.
    """
    directory = journal.directory
    reader = EventReader(directory, Wanted())
    runs: dict[str, _Run] = {}
    for envelope in reader.poll():
        if isinstance(envelope.event, _OF_RUNS):
            key = _key(envelope) or _named_after(directory)
            runs.setdefault(key, _Run(key)).see(envelope)
    pages = read_pages(directory)
    states = {each.stream: each.state for each in streams(directory)}
    records = [each.record(directory, states, pages.get(each.key)) for each in runs.values()]
    if journal.run is None:
        return records
    named = [each for each in records if each.name == journal.run]
    return named or [each for each in records if each.folder.name == journal.run]


_OF_RUNS: Final = (RunStart, TrainStart, StepEnd, Eval, Checkpoint, BenchmarkEval, TrainEnd, RunEnd)


class _Run:
    """Builds the record of a run from its events."""

    def __init__(self, key: str) -> None:
        self.key: Final = key
        self._folder: Path | None = None
        self._stream = ""
        self._ended: str | None = None
        self._record: Final = RunRecord(Path(), None, None, None, 0, [], [], [], name=key)
        self._metrics: Final[dict[str, MetricRecord]] = {}
        self._evals: Final[dict[str, MetricRecord]] = {}

    def see(self, envelope: Envelope) -> None:
        """Add the next event."""
        event, record = envelope.event, self._record
        self._stream = envelope.stream
        self._look_at(event)
        match event:
            case RunStart():
                self._ended, record.error = None, None
                record.config = getattr(event.ctx, "run_config", None)
            case TrainStart():
                self._ended, record.error = None, None
            case StepEnd():
                self._step(event)
            case Eval():
                for name, value in _numbers(event):
                    self._evals.setdefault(name, MetricRecord(name)).see(value, step_of(event))
            case Checkpoint() if isinstance(event.row, ManifestRow):  # pyright: ignore[reportUnnecessaryIsInstance] # what was read may be anything
                record.checkpoints.append(event.row)
            case BenchmarkEval() if isinstance(event.eval_result, EvalResult):  # pyright: ignore[reportUnnecessaryIsInstance] # likewise
                record.benchmarks.append(event.eval_result)
            case TrainEnd():
                error = getattr(event.state, "error", None)
                self._ended, record.error = ("ended", None) if error is None else ("failed", str(error))
            case RunEnd():
                self._ended = str(getattr(event.run_result, "status", None) or "ended")
                record.error = getattr(event.run_result, "error", None)
            case _:
                pass

    def record(self, directory: Path, streams: Mapping[str, str], page: str | None) -> RunRecord:
        """Return the record."""
        record = self._record
        beside = None if self._folder is None else directory.parent / self._folder.name
        moved = self._folder is None or (not self._folder.is_dir() and beside is not None and beside.is_dir())
        record.folder = beside or directory if moved else self._folder or directory
        record.status = self._ended or _STATUS.get(streams.get(self._stream, ""), "unknown")
        record.metrics = list(self._metrics.values())
        record.evals = list(self._evals.values())
        record.page = page
        return record

    def _step(self, event: StepEnd) -> None:
        record, step = self._record, step_of(event)
        record.rows += 1
        if step is not None and (record.last_step is None or step > record.last_step):
            record.last_step = step
        for name, value in _plain_numbers(metrics_of(event)):
            self._metrics.setdefault(name, MetricRecord(name)).see(value, step)

    def _look_at(self, event: Event | UnknownEvent) -> None:
        state = getattr(event, "state", None)
        folder = getattr(state, "output_dir", None)
        if isinstance(folder, str | Path) and str(folder):
            self._folder = Path(folder)
        steps = getattr(state, "num_steps", None)
        if isinstance(steps, int) and 0 < steps < sys.maxsize:
            self._record.num_steps = steps


_STATUS: Final = {"live": "running", "closed": "ended", "dead": "killed"}


def run_key_of(journal: Found) -> str | None:
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


def _key(envelope: Envelope) -> str | None:
    if envelope.run is not None:
        return envelope.run
    folder = getattr(getattr(envelope.event, "state", None), "output_dir", None)
    return Path(folder).name or None if isinstance(folder, str | Path) else None


def _named_after(directory: Path) -> str:
    """Return the name of a run whose events carry none, from the journal's path."""
    whole = directory.absolute()
    return (whole.parent if whole.name == JOURNAL else whole).name


def _plain_numbers(metrics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, as_float(value)


def _numbers(event: Event | UnknownEvent) -> Iterator[tuple[str, float]]:
    if isinstance(event, Eval):
        yield from _plain_numbers(metrics_of(event))


def _journal(folder: Path) -> Found | None:
    try:
        return found(folder)
    except click.UsageError:
        return None
