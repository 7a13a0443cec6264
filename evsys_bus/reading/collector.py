"""Collecting the runs of a journal from its events.

Streams of one rank are read in order, so that a resumed training comes after the one that it resumes: what that has
from the first step of the later one on is dropped. Several records of one step make one row, in which the last value of
each metric counts. Events may come from other programs and versions, so the types of their fields are not trusted.
"""

import itertools
import math
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal, cast

import msgspec

from evsys_bus.adapter import RunAnnotated
from evsys_bus.codec import RunContexts, decode
from evsys_bus.context import EvalResult, ManifestRow
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.events import (
    BenchmarkEval,
    Checkpoint,
    Envelope,
    Eval,
    Event,
    ExperimentStart,
    RunEnd,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
    event_tag,
)
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal import JournalReader, OsDisk, TailReader, frame, layout
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.reader import SegmentScan, read_frames_newest_first
from evsys_bus.reading.recorded_run import (
    RecordedAlert,
    RecordedEpoch,
    RecordedEval,
    RecordedRun,
    State,
    TimeSeries,
    to_datetime,
    to_mapping,
)
from evsys_bus.reading.rows import MAX_STEPS, MetricColumn, RankRecord, is_step, to_step

JOURNAL: Final = "journal"
"""The usual name of a journal's directory; it is no name of a run."""
_SMALL_BYTES: Final = 2 << 20
"""A journal up to this size is always read as a whole."""
_HEAD_EVENTS: Final = 100
_TAIL_FRAMES: Final = 200
_TAIL_WINDOW_BYTES: Final = 64 << 10
_ANNOTATION_TAG: Final = event_tag(RunAnnotated).encode()
_STATUSES: Final[dict[object, State]] = {"completed": "completed", "failed": "failed", "cancelled": "cancelled"}
_INTERRUPTIONS: Final = ("KeyboardInterrupt", "CancelledError", "SystemExit", "GeneratorExit")
_NO_STEP: Final = (*DECODE_ERRORS, BufferError)


class _StepState(msgspec.Struct, gc=False):
    """What a step's state has of its run."""

    output_dir: str | None = None
    root: str | None = None
    context: Any = None


class _StepEvent(msgspec.Struct, gc=False):
    type: Literal["step_end", "run.metrics"]
    step_idx: Annotated[int, msgspec.Meta(gt=-MAX_STEPS, lt=MAX_STEPS)]
    metrics: dict[str, float]
    state: _StepState | None = None


class _StepEnvelope(msgspec.Struct, gc=False):
    time: float
    event: _StepEvent
    run: str | None = None


class _SampleEvent(msgspec.Struct, gc=False):
    type: Literal["system_metrics"]
    values: dict[str, float]


class _SampleEnvelope(msgspec.Struct, gc=False):
    time: float
    event: _SampleEvent
    run: str


_decode_sample: Final = msgspec.msgpack.Decoder(_SampleEnvelope).decode
_decode_step: Final = msgspec.msgpack.Decoder(_StepEnvelope).decode
"""Decodes what nearly all records are, and no more of it than is needed. It refuses all others."""


class _RunCollector:
    """Collects the events of one run."""

    def __init__(self, key: str) -> None:
        self.key: Final = key
        self.root: Path | None = None
        """See `_run_root`."""
        self.folder: Path | None = None
        self.first_time = math.inf
        self.last_time = -math.inf
        self._record: Final = RecordedRun(id=key, directory=Path(), folder=Path())
        self._ranks: Final[dict[int, RankRecord]] = {}

    def rank(self, rank: int) -> RankRecord:
        """Return what this rank has recorded."""
        return self._ranks.setdefault(rank, RankRecord())

    def is_in(self, root: Path | None) -> bool:
        """Whether the run is in this directory; the state of a host may name the experiment's instead."""
        known = self.root
        return root is None or known is None or root in {known, known / self.key} or known == root / self.key

    def add(self, envelope: Envelope, stream: str) -> None:
        """Add the next event of a stream."""
        event, record, rank = envelope.event, self._record, self.rank(layout.rank_of(stream))
        rank.streams[stream] = None
        rank.trains = rank.trains or isinstance(event, RunStart | TrainStart | StepEnd | TrainEnd | RunEnd)
        self.first_time = min(self.first_time, envelope.time)
        self.last_time = max(self.last_time, envelope.time)
        state: Any = getattr(event, "state", None)
        num_steps = getattr(state, "num_steps", None)
        if 0 < to_step(num_steps, 0) < MAX_STEPS:
            record.num_steps = num_steps
        self._add_context(
            getattr(event, "ctx", None) or getattr(state, "ctx", None), replace=isinstance(event, RunStart)
        )
        match event:
            case RunStart():
                rank.reopen()
            case TrainStart():
                rank.reopen()
                rank.cut(to_step(getattr(state, "step", None), MAX_STEPS))
            case StepEnd() if is_step(event.step_idx):
                rank.add_row(event.step_idx, envelope.time, _numbers(event.metrics))
            case Eval() if is_step(event.step_idx):
                metrics = _numbers(event.metrics)
                rank.evals.append(RecordedEval(event.step_idx, str(event.eval_name), metrics, envelope.time))
            case BenchmarkEval() if isinstance(event.eval_result, EvalResult):  # pyright: ignore[reportUnnecessaryIsInstance] # what was read may be anything
                result, step = event.eval_result, event.step if is_step(event.step) else None
                rank.benchmarks.append(result)
                metrics = _numbers(result.metrics)
                rank.evals.append(RecordedEval(step, str(result.name), metrics, envelope.time, is_benchmark=True))
            case Checkpoint() if isinstance(event.row, ManifestRow):  # pyright: ignore[reportUnnecessaryIsInstance] # likewise
                rank.checkpoints.append(event.row)
            case TrainEnd() | RunEnd():
                self._add_end(event, rank)
            case _:
                self._add_other(envelope, rank)

    def _add_end(self, event: TrainEnd | RunEnd, rank: RankRecord) -> None:
        record = self._record
        if isinstance(event, TrainEnd):
            error = getattr(event.state, "error", None)
            rank.end_event, rank.error = "TrainEnd", None if error is None else str(error)
            if rank.error is not None:
                rank.status = "cancelled" if rank.error.startswith(_INTERRUPTIONS) else "failed"
            elif getattr(event.state, "stopped_early", False):
                rank.status = "cancelled"
            return
        rank.end_event, rank.error = "RunEnd", getattr(event.run_result, "error", None)
        rank.status = _STATUSES.get(getattr(event.run_result, "status", None), "completed")
        record.summary = {**_numbers(getattr(event.run_result, "metrics", None)), **record.summary}
        name = _text(getattr(event.arm, "name", None))
        record.arm = record.arm or (None if name == self.key else name)  # a lone run is an arm of its own name

    def _add_other(self, envelope: Envelope, rank: RankRecord) -> None:
        """Add an event that later versions than 0.1 have; this process may not know its class."""
        record, event = self._record, envelope.event
        fields: dict[str, Any]
        if isinstance(event, UnknownEvent):
            tag, fields = event.type, event.fields
        else:
            tag = str(event.__struct_config__.tag)
            fields = {name: getattr(event, name, None) for name in event.__struct_fields__}
        match tag:
            case "run.metrics" if is_step(fields.get("step_idx")):  # a part of a row
                rank.trains = True
                rank.add_row(fields["step_idx"], envelope.time, _numbers(fields.get("metrics")))
            case "run.epoch_end" if is_step(fields.get("epoch")):
                epoch: int = fields["epoch"]
                recorded = RecordedEpoch(epoch, _numbers(fields.get("metrics")), envelope.time)
                rank.epochs[epoch] = (
                    max(to_step(getattr(fields.get("state"), "step", None), 0), rank.last_step),
                    recorded,
                )
            case "run.config_update":
                record.config = _merge(record.config, to_mapping(fields.get("config")))
            case "run.summary":
                record.summary = {**record.summary, **to_mapping(fields.get("values"))}
            case "run.alert":
                title, text, level = (str(fields.get(name) or "") for name in ("title", "text", "level"))
                record.alerts.append(RecordedAlert(title, text, level or "warning", envelope.time))
            case "run.environment":
                record.environment = to_mapping(fields.get("facts"))
            case "run.content":
                record.contents.append(event)
            case _:
                pass

    def _add_context(self, ctx: Any, *, replace: bool) -> None:
        """Add what a context has of the run; ``replace``: the run starts, maybe again with another config."""
        if ctx is None:
            return
        record, config, extras = (
            self._record,
            to_mapping(getattr(ctx, "run_config", None)),
            getattr(ctx, "extras", None),
        )
        record.config = config if config and (replace or not record.config) else record.config
        record.group = record.group or _text(getattr(ctx, "group_name", None))
        tags, notes = (to_mapping(extras).get(name) for name in ("tags", "notes"))
        if isinstance(tags, list | tuple):
            record.tags = [str(each) for each in cast("list[object]", tags)]
        record.notes = _text(notes) or record.notes

    def build(self, directory: Path, stream_states: Mapping[str, str]) -> RecordedRun:
        """Return the record.

        Args:
            directory: The journal.
            stream_states: Of each stream: live, closed or dead.
        """
        record = self._record
        record.directory = directory
        record.folder = self._find_folder(directory)
        record.arm = _text(record.config.get("arm")) or record.arm
        seed = record.config.get("seed")
        record.seed = seed if is_step(seed) else None
        ranks = [rank for _, rank in sorted(self._ranks.items())]
        times = MetricColumn()
        for rank in ranks:
            for name, column in rank.metrics.items():
                if column.steps:
                    record.metrics.setdefault(name, column.series())
            if times.steps:
                for step, time in zip(*rank.times.series(), strict=True):
                    times.add(step, time)
            else:
                times = rank.times
            record.evals += rank.evals
            record.benchmarks += rank.benchmarks
            record.checkpoints += rank.checkpoints
            record.epochs += [each for _, (_, each) in sorted(rank.epochs.items())]
        record.times = times.series()
        main = next((rank for rank in ranks if rank.trains), ranks[0])
        record.error, record.end_event = _text(main.error), main.end_event
        record.state = self._state(main, [stream_states.get(each, "dead") for each in main.streams])
        record.started, record.last_time = to_datetime(self.first_time), to_datetime(self.last_time)
        record.ended = None if record.state == "running" else record.last_time
        return record

    def _find_folder(self, directory: Path) -> Path:
        """Return the run's directory; if the run was moved, it is beside the journal, or around it."""
        if self.folder is not None and self.folder.is_dir():
            return self.folder
        name, around = self.folder.name if self.folder is not None else self.key, directory.absolute().parent
        if (directory.parent / name).is_dir():
            return directory.parent / name
        if around.name == name:
            return directory.parent
        return directory if self.folder is None else self.folder

    def _state(self, rank: RankRecord, stream_states: list[str]) -> State:
        if rank.status is not None:
            return rank.status
        if "live" in stream_states:
            return "running"
        if rank.end_event is not None:
            return "completed"
        if stream_states[-1] != "closed":
            return "killed"
        last, requested = self._record.last_step, self._record.num_steps
        return "completed" if requested is None or (last is not None and last + 1 >= requested) else "cancelled"


class JournalCollector:
    """Collects the runs of one journal."""

    def __init__(self, directory: Path) -> None:
        self._directory: Final = directory
        self._disk: Final = OsDisk()
        self._reader: Final = JournalReader(directory, self._disk)
        self._tails: Final[list[TailReader]] = []
        self._runs: Final[list[_RunCollector]] = []
        self._stream_states: Final[dict[str, str]] = {}
        self._extras: Final[dict[str, dict[str, Any]]] = {}
        self._samples: Final[dict[str, dict[str, TimeSeries]]] = {}
        self._undecodable_records = 0
        self._problems: Final[list[str]] = []
        self._experiment: str | None = None
        self._success_metric: Mapping[str, Any] = {}
        self._is_whole = True
        whole = directory.absolute()
        self._default_key: Final = (whole.parent if whole.name == JOURNAL else whole).name

    def read_whole(self) -> None:
        """Read all events."""
        streams: list[str] = []
        with _Problems(self._problems):
            streams = self._streams()
            self._read_annotations()
            self._read_samples()
        for stream in streams:
            with _Problems(self._problems):
                self._read_stream(stream)

    def _read_stream(self, stream: str) -> None:
        is_live = self._reader.is_live(stream)  # before reading: if not, nothing comes after what is read
        tail = TailReader(self._disk, f"{self._directory}/{stream}", skip_newer_formats=True)
        self._tails.append(tail)
        events = _StreamEvents(self, stream)
        for run in tail.poll_runs(is_complete=not is_live):
            events.add(run.payloads)
        self._stream_states[stream] = "live" if is_live else "closed" if tail.is_closed else "dead"

    def read_ends(self) -> bool:
        """Read the first and the last events of each stream; False if all of them have to be read.

        So it is if the journal is small, damaged, or may have more than one run.
        """
        self._is_whole = False
        try:
            streams = self._streams()
            if self._size(streams) <= _SMALL_BYTES:
                return False
            self._read_annotations()
            is_readable = all(self._read_ends_of(stream) for stream in streams)
        except OSError:  # reading all of it names the problem
            return False
        return is_readable and self._experiment is None and len(self._runs) == 1 and not self._undecodable_records

    def _size(self, streams: Iterable[str]) -> int:
        folders = [f"{self._directory}/{stream}" for stream in streams]
        return sum(
            self._disk.size(f"{folder}/{name}")
            for folder in folders
            for name in layout.list_segments(self._disk, folder)
        )

    def _read_ends_of(self, stream: str) -> bool:
        """Read the ends of one stream; False if it is damaged there, or has no step near its end."""
        is_live, events = self._reader.is_live(stream), _StreamEvents(self, stream)
        folder = f"{self._directory}/{stream}"
        names = layout.list_segments(self._disk, folder)
        last_head_sequence = 0
        for name in names:  # the later ones begin with the start events of the runs that were open then
            for item in SegmentScan(self._disk, f"{folder}/{name}").frames():
                if not isinstance(item, Frame):
                    return False
                if name != names[0] and item.kind != frame.CARRIED:
                    break
                last_head_sequence = max(last_head_sequence, item.sequence)
                if item.kind in {frame.EVENT, frame.CARRIED}:
                    events.add([bytes(item.payload)])
                if item.sequence >= names[0].first_sequence + _HEAD_EVENTS and name == names[0]:
                    break
        last_frames = list(
            itertools.islice(
                (
                    item
                    for name in reversed(names)
                    for item in read_frames_newest_first(self._disk, f"{folder}/{name}", _TAIL_WINDOW_BYTES)
                ),
                _TAIL_FRAMES,
            )
        )
        payloads = [
            bytes(each.payload)
            for each in reversed(last_frames)
            if each.kind == frame.EVENT and each.sequence > last_head_sequence
        ]
        events.add(payloads)
        is_closed = bool(last_frames) and last_frames[0].kind == frame.CLOSED
        self._stream_states[stream] = "live" if is_live else "closed" if is_closed else "dead"
        return not payloads or any(b"step_idx" in each for each in payloads)

    def runs(self) -> list[RecordedRun]:
        """Return the runs, in the order in which they were started.

        A journal from which nothing could be read has one run, with the problem.
        """
        problems = [*self._problems, *describe_damage(self._tails, self._undecodable_records)]
        found = sorted(self._runs, key=lambda run: run.first_time)
        records = [each.build(self._directory, self._stream_states) for each in found]
        if problems and not records:
            folder = self._directory.parent if self._directory.name == JOURNAL else self._directory
            records = [RecordedRun(id=self._default_key, directory=self._directory, folder=folder, state="killed")]
        for each in records:
            each.extras = self._extras.get(each.id, {})
            each.system = self._samples.get(each.id, {})
            each.experiment = self._experiment
            each.success_metric = _text(self._success_metric.get("name"))
            each.success_mode = "min" if self._success_metric.get("mode") == "min" else "max"
            each.problems = [*problems]
            each.is_whole = self._is_whole
        return records

    def annotate(self, event: RunAnnotated) -> None:
        """Add what a logger has published about a run."""
        if isinstance(event.run, str):  # pyright: ignore[reportUnnecessaryIsInstance] # another version may have written it
            self._extras.setdefault(event.run, {}).update(to_mapping(event.extras))

    def decode(self, payload: bytes, contexts: RunContexts | None = None) -> Envelope | None:
        """Decode a record; None if that is not possible, which is counted."""
        try:
            return decode(payload, contexts)
        except CodecError:
            self._undecodable_records += 1
            return None

    def add_experiment(self, event: ExperimentStart) -> None:
        """Add what the start of an experiment has."""
        config = to_mapping(getattr(event.ctx, "config", None))
        self._experiment = _text(config.get("name")) or self._default_key
        self._success_metric = to_mapping(config.get("success_metric"))

    def find_run(self, envelope: Envelope) -> _RunCollector:
        """Return the collector of an event's run, a new one if there is none.

        Runs of one key in two folders are two runs, unless the first folder is gone: then the run was moved.
        """
        folder, root = output_dir_of(envelope.event), _run_root(envelope.event)
        key = envelope.run or (folder and folder.name) or self._default_key
        same_key = [each for each in self._runs if each.key == key]
        found = next((each for each in same_key if each.is_in(root)), None)
        if found is None and same_key and not any(each.root and each.root.is_dir() for each in same_key):
            found = same_key[-1]
        if found is None:
            found = _RunCollector(key)
            self._runs.append(found)
        found.root = root or found.root
        found.folder = folder or found.folder
        return found

    def _streams(self) -> list[str]:
        """Return the streams of the publishing processes by rank, and in their order within each."""
        return sorted(self._reader.streams("r"), key=layout.rank_of)

    def _read_annotations(self) -> None:
        for stream in self._reader.streams("c"):
            for record in self._reader.read(stream):
                envelope = self.decode(record.payload) if _ANNOTATION_TAG in record.payload else None
                if envelope is not None and isinstance(envelope.event, RunAnnotated):
                    self.annotate(envelope.event)

    def _read_samples(self) -> None:
        """Read the samples of the machine, which have streams of their own."""
        for stream in self._reader.streams("s"):
            for record in self._reader.read(stream):
                try:
                    sample = _decode_sample(record.payload)
                except _NO_STEP:  # another event
                    continue
                series = self._samples.setdefault(sample.run, {})
                for name, value in sample.event.values.items():
                    found = series.setdefault(name, TimeSeries(array("d"), array("d")))
                    found.times.append(sample.time)
                    found.values.append(value)


class _StreamEvents:
    """Passes the events of one stream to the collectors of their runs."""

    def __init__(self, journal: JournalCollector, stream: str) -> None:
        self._journal: Final = journal
        self._stream: Final = stream
        self._contexts: Final = RunContexts()
        self._known: Final[dict[tuple[Any, Any, Any], tuple[_RunCollector, RankRecord]]] = {}
        """By what a step has of its run."""

    def add(self, payloads: Iterable[bytes]) -> None:
        """Add the next events."""
        for payload in payloads:
            try:
                step = _decode_step(payload)
            except _NO_STEP:  # another event, or a step with values that are no numbers
                self._add_any(payload, None)
                continue
            event, state = step.event, step.event.state
            key = (step.run, None, None) if state is None else (step.run, state.output_dir, state.root)
            known = self._known.get(key)
            if known is None or (state is not None and state.context is not None):
                self._add_any(payload, key)
                continue
            run, rank = known
            run.last_time = max(run.last_time, step.time)
            rank.add_row(event.step_idx, step.time, event.metrics)

    def _add_any(self, payload: bytes, step_key: tuple[Any, Any, Any] | None) -> None:
        journal = self._journal
        envelope = journal.decode(payload, self._contexts)
        event = None if envelope is None else envelope.event
        if envelope is None or isinstance(event, RunAnnotated):
            if isinstance(event, RunAnnotated):
                journal.annotate(event)
            return
        if isinstance(event, ExperimentStart):
            journal.add_experiment(event)
        if envelope.run is None and getattr(event, "state", None) is None and not isinstance(event, Eval | StepEnd):
            return  # of the whole experiment
        run = journal.find_run(envelope)
        run.add(envelope, self._stream)
        if step_key is not None:
            self._known[step_key] = (run, run.rank(layout.rank_of(self._stream)))
        elif isinstance(event, RunStart | TrainStart):
            self._known.clear()  # another run of the same key may begin


class _Problems:
    """Adds the error that ends its block to a list, if it is one of the file system, or a newer version's format."""

    def __init__(self, problems: list[str]) -> None:
        self._problems: Final = problems

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> bool:
        if isinstance(error, OSError):
            self._problems.append(f"{error.filename or 'the journal'} could not be read: {_reason(error)}")
        return isinstance(error, OSError)


def describe_damage(
    tails: Iterable[TailReader], undecodable_records: int = 0, other_missing: Iterable[tuple[int, int]] = ()
) -> list[str]:
    """Return which events are missing, bytes damaged and files unreadable of what was read: one short text for each.

    Args:
        tails: What has been read.
        undecodable_records: How many intact records could not be decoded.
        other_missing: Further ranges of missing sequences.
    """
    tails = [*tails]
    unreadable = [each for tail in tails for each in tail.unreadable_segments.items()]
    missing_ranges = [*other_missing, *(each for tail in tails for each in tail.missing_ranges)]
    missing = sum(last - first + 1 for first, last in missing_ranges)
    counts = (
        (missing, "event", "missing"),
        (sum(tail.corrupt_bytes for tail in tails), "byte", "damaged"),
        (undecodable_records, "record", "that cannot be decoded"),
    )
    parts = [f"{count:,} {noun}{'s' if count != 1 else ''} {what}" for count, noun, what in counts if count]
    return parts + [f"{path} could not be read: {_reason(error)}" for path, error in unreadable]


def _reason(error: Exception) -> str:
    if isinstance(error, JournalVersionError):
        return error.what
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _merge(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in changes.items():
        before, after = to_mapping(merged.get(name)), to_mapping(value)
        merged[name] = _merge(before, after) if before and after else value
    return merged


def _numbers(metrics: object) -> dict[str, float]:
    """Return the metrics that are numbers; integers beyond the range of floats become infinite."""
    found: dict[str, float] = {}
    for name, value in to_mapping(metrics).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except OverflowError:
                found[name] = math.inf if value > 0 else -math.inf
    return found


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def output_dir_of(event: Event | UnknownEvent) -> Path | None:
    """Return the directory of the run that an event's state names; None if it has none."""
    folder = getattr(getattr(event, "state", None), "output_dir", None)
    return Path(folder) if isinstance(folder, str | Path) and Path(folder) != Path() else None


def _run_root(event: Event | UnknownEvent) -> Path | None:
    """Return the directory of the run, by which runs of one key differ; None if the event names none."""
    ctx = getattr(event, "ctx", None)
    if ctx is None:
        return output_dir_of(event)
    folder, key = getattr(ctx, "output_dir", None), getattr(ctx, "run_key", None)
    if not isinstance(folder, str | Path) or Path(folder) == Path():
        return None
    return Path(folder, key) if isinstance(key, str) else Path(folder)
