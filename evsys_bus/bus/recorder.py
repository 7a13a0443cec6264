"""Recording: each event becomes an envelope, and each envelope one append to the journal.

An event is recorded after its hooks, with the ids and metrics that they added; checkpoints and the ends of runs before
their hooks, because an upload or a failure must be recorded even if a hook dies on it. The time is taken on entry.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, Final, Self

import msgspec

from evsys_bus.adapter import EventInfo
from evsys_bus.bus.health import JournalHealth
from evsys_bus.codec import MAX_EVENT_BYTES, RunContextNeeded, encode, event_encoder
from evsys_bus.codec.redact import Redaction
from evsys_bus.codec.step_template import LastPart
from evsys_bus.codec.wire_types import (
    ABSENT,
    absolute_path,
    attribute_reader,
    pin_relative_paths,
    run_and_root,
    run_key_text,
    unpin_relative_paths,
)
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import UnrecordedError
from evsys_bus.events import (
    Checkpoint,
    Envelope,
    Event,
    ExperimentEnd,
    ExperimentStart,
    GroupStart,
    Metrics,
    RunEnd,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainStart,
)
from evsys_bus.journal import JournalWriter
from evsys_bus.tasks import Deadline, Receipt

RECORDED_BEFORE_HOOKS: Final = frozenset({Checkpoint, TrainEnd, RunEnd, ExperimentEnd})
"""Event types that are recorded before their hooks run."""

_ESSENTIAL_EVENTS: Final = frozenset(
    {ExperimentStart, GroupStart, RunStart, TrainStart, Checkpoint, TrainEnd, RunEnd, ExperimentEnd}
)
"""Event types that are among the last to be dropped when too many wait for the disk."""
MIN_CLOSE_SECONDS: Final = 1.0
"""Minimum time for closing the journal, even if the tasks have used up the deadline."""
_MIN_PAUSE_SECONDS: Final = 0.02
_MAX_PAUSE_SECONDS: Final = 0.25
"""Maximum interval of retries while the bus is closing and the disk refuses writes."""
TRUNCATED_EVENT_BYTES: Final = 16 << 10
"""Maximum size of an event that is truncated for lack of memory."""
_RANK_VARIABLES: Final = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables for the rank set by launchers: torchrun, Slurm, Open MPI, MPICH."""


NextParts = dict[int, tuple[Event, Metrics]]
"""By ``id``, a StepEnd that is being published and the part to be recorded with it by one write."""
_RunKeyFunction = Callable[[Event], str | None]
"""Returns the run key of an event."""
_AppendFunction = Callable[[Event, str | None, bytes], None]
"""Appends an event, given its run and the encoded envelope."""


class EventRecorder:
    """Records the events of a bus. Called with the bus's token held, so by one thread at a time."""

    def __init__(
        self, writer: JournalWriter, rank: int, raise_later: Callable[[BaseException], None], redaction: Redaction
    ) -> None:
        self.writer = writer
        self._redaction = redaction
        self._stream = writer.stream
        self._rank = rank
        self._raise_later = raise_later
        self._faults = FaultLog()
        self._started_runs: set[tuple[str | None, str]] = set()
        """Runs with a RunStart: run key and directory of the experiment."""
        self._recorded_contexts: set[tuple[str | None, str]] = set()
        """Runs whose context is recorded, likewise."""
        self.next_parts: Final[NextParts] = {}
        """An interrupt may leave one here; as it holds its event, no other event gets that ``id``."""
        self._last_part: Final = LastPart()
        self.joined_parts = 0
        """How many parts were recorded in this way."""

    @classmethod
    def open(
        cls,
        journal: JournalWriter | str | os.PathLike[str],
        rank: int,
        raise_later: Callable[[BaseException], None],
        redaction: Redaction,
    ) -> Self:
        """Open the journal.

        Args:
            journal: A directory, or a writer that is not open yet.
            rank: Rank of this process.
            raise_later: Called with errors to be raised from the current publish.
            redaction: See `evsys_bus.codec.encode`.

        Raises:
            JournalOpenError: The directory cannot be written.
        """
        writer = journal if isinstance(journal, JournalWriter) else JournalWriter(journal, rank=rank)
        writer.open()
        try:
            recorder = cls(writer, rank, raise_later, redaction)
            pin_relative_paths(recorder)
        except BaseException:
            writer.close(MIN_CLOSE_SECONDS)
            raise
        return recorder

    def close(self, receipt: Receipt, deadline: Deadline, reserve_seconds: float = 0.0) -> Receipt:
        """Write and sync everything within the deadline, and return the receipt with the counts.

        Args:
            receipt: The receipt so far.
            deadline: Refused writes are retried until then, or once if it has passed.
            reserve_seconds: How much of it is reserved for others.
        """
        writer = self.writer
        pause = _MIN_PAUSE_SECONDS

        def wait_before_retry() -> bool:
            nonlocal pause
            can_retry = deadline.remaining() > reserve_seconds and deadline.pause(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            return can_retry

        writer.close(max(deadline.remaining(), MIN_CLOSE_SECONDS), wait_before_retry)
        unpin_relative_paths(self)
        return msgspec.structs.replace(
            receipt, recorded=writer.recorded, unrecorded=writer.unrecorded + writer.lost, journal=writer.directory
        )

    def recorder_for(self, event_type: type[Event]) -> Callable[[Event, float], None]:
        """Return the function that records events of this type, given an event and its publish time."""
        fields = event_type.__struct_fields__
        get_run_key = partial(
            _run_key, next((getter for field, getter in _RUN_GETTERS.items() if field in fields), None)
        )
        if event_type in _ESSENTIAL_EVENTS:
            return partial(self._record_with, get_run_key, self._append_essential)
        return self._fast_recorder(event_type, get_run_key)

    def record(self, event: Event, published: float) -> BaseException | None:
        """Record one event outside its publish; return the journal's error if it was configured to raise.

        Raises:
            JournalClosedError: The journal is closed.
        """
        errors: list[BaseException] = []
        raise_later, self._raise_later = self._raise_later, errors.append
        try:
            self.recorder_for(type(event))(event, published)
        finally:
            self._raise_later = raise_later
        return errors[0] if errors else None

    def last_sequences(self) -> dict[str, int]:
        """Return the stream and the sequence of its last event; empty if events wait or were lost (possible gaps)."""
        writer = self.writer
        return {} if writer.lost or writer.unrecorded else {self._stream: writer.next_sequence - 1}

    def event_info(self, now: float, *, recorded: bool) -> EventInfo:
        """Describe the event whose hooks are running; if not ``recorded`` yet, it will get the next sequence."""
        return EventInfo(now, self._stream, self.writer.next_sequence - recorded)

    def health(self) -> JournalHealth:
        """Return all current counts."""
        writer = self.writer
        removed = writer.removed
        return JournalHealth(
            directory=writer.directory,
            stream=writer.stream,
            recorded=writer.recorded,
            unrecorded=writer.unrecorded,
            lost=writer.lost,
            failures=writer.failures,
            removed_segments=removed.segments,
            removed_events=removed.events,
            removed_bytes=removed.bytes,
        )

    def _fast_recorder(self, event_type: type[Event], get_run_key: _RunKeyFunction) -> Callable[[Event, float], None]:
        """Return the recorder for frequent events. It uses local names only, because attributes are slower."""

        def make_encoder(event_type: type[Event]) -> Callable[[Event, int, float], bytes]:
            return event_encoder(
                *(event_type, self._stream, self._rank, get_run_key),
                *(self._redaction, self._is_context_missing, self._last_part),
            )

        encode_event, raise_later = make_encoder(event_type), self._raise_later
        append = self.writer.make_appender(encode_event)
        next_parts = self.next_parts if event_type is StepEnd else {}
        append_pair = self.writer.make_pair_appender(encode_event, make_encoder(Metrics))

        def record(event: Event, now: float) -> None:
            pair = next_parts.pop(id(event), None) if next_parts else None
            try:
                if pair is None:
                    append(event, now)
                else:
                    append_pair(event, pair[1], now)
                    self.joined_parts += 1
                    pair = None
            except UnrecordedError as error:  # only if the journal is configured to raise
                raise_later(error)
            except MemoryError as error:
                self._record_truncated(self._append_plain, event, now, get_run_key(event), error)
            except RunContextNeeded:
                self._record_with(get_run_key, self._append_essential, event, now)
            if pair is not None:
                next_parts[id(event)] = pair  # it was not recorded: it is published by itself

        return record

    def _record_with(self, get_run_key: _RunKeyFunction, append: _AppendFunction, event: Event, now: float) -> None:
        run = get_run_key(event)
        context_key = self._missing_context(event)
        try:
            append(event, run, self._encode(event, now, run, whole_context=context_key is not None))
            if context_key is not None:
                self._recorded_contexts.add(context_key)
        except UnrecordedError as error:
            self._raise_later(error)
        except MemoryError as error:
            self._record_truncated(append, event, now, run, error)

    def _encode(
        self,
        event: Event,
        now: float,
        run: str | None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        *,
        whole_context: bool = False,
    ) -> bytes:
        envelope = Envelope(self._stream, self.writer.next_sequence, now, event, run, self._rank)
        return encode(
            envelope,
            max_event_bytes=max_event_bytes,
            redaction=self._redaction,
            whole_context=whole_context,
            log_replacements=True,
        )

    def _missing_context(self, event: Event) -> tuple[str | None, str] | None:
        """Return the run whose whole context the event must carry because no recorded event has it yet."""
        context_key = _context_key(getattr(event, "state", None))
        if context_key is None or (
            context_key in self._started_runs
            if isinstance(event, TrainStart)
            else context_key in self._recorded_contexts
        ):
            return None
        return context_key

    def _is_context_missing(self, state: object) -> bool:
        """Return whether the context of this state is not recorded yet."""
        context_key = _context_key(state)
        return context_key is not None and context_key not in self._recorded_contexts

    def _record_truncated(
        self, append: _AppendFunction, event: Event, now: float, run: str | None, error: MemoryError
    ) -> None:
        """Record a truncated event for lack of memory, or count it as lost."""
        try:
            append(event, run, self._encode(event, now, run, TRUNCATED_EVENT_BYTES))
        except UnrecordedError as append_error:
            self._raise_later(append_error)
        except MemoryError:
            self.writer.skip_sequence()
        try:
            self._faults.warn("journal.no_memory", type(event), error=error, event_type=type(event).__name__)
        except MemoryError:
            pass  # it is still counted

    def _append_plain(self, _: Event, __: str | None, payload: bytes) -> None:
        self.writer.append(payload)

    def _append_essential(self, event: Event, run: str | None, payload: bytes) -> None:
        if run is not None and isinstance(event, RunStart | RunEnd):
            key = (run, _root_text(attribute_reader(event.ctx)("output_dir")))
            for known_runs in (self._started_runs, self._recorded_contexts):
                known_runs.discard(key)
                if isinstance(event, RunStart):
                    known_runs.add(key)
        self.writer.append(payload, essential=True)


class _CachedName:
    """Returns the last component of a path, with a cache of one, because `PurePath` parses itself each time."""

    def __init__(self) -> None:
        self._last: tuple[object, str] = (None, "")

    def get(self, path: Any) -> str:
        cached, name = self._last
        if cached is not path:
            name = path.name if isinstance(path, PurePath) else PurePath(path).name
            self._last = (path, name)
        return name


_directory_name: Final = _CachedName().get


def _run_from_state(event: Any) -> object:
    """Return the run of an event with a ``state``, which may be any object with the right attributes."""
    state = event.state
    try:
        ctx = getattr(state, "ctx", None)
        run = None if ctx is None else getattr(ctx, "run_key", None)
        return _directory_name(state.output_dir) if run is None else run
    except Exception:  # a dict, or an object whose own code raises
        return run_and_root(state)[0]


def _run_from_context(event: Any) -> object:
    """Return the run of an event with a ``ctx``; None for events of the whole experiment."""
    return attribute_reader(event.ctx)("run_key")


def _context_key(state: Any) -> tuple[str | None, str] | None:
    """Return run key and experiment directory of a state that has a context, or None."""
    try:
        ctx = state.ctx
        if ctx is None:
            return None
        run, root = getattr(ctx, "run_key", None), getattr(ctx, "output_dir", None)
        run = _directory_name(state.output_dir) if run is None else run_key_text(run)
    except Exception:  # a dict, or an object that lacks an attribute or whose own code raises
        ctx = attribute_reader(state)("ctx")
        if ctx is None or ctx is ABSENT:
            return None
        run, root = run_and_root(state)
    return run, _root_text(root)


def _root_text(folder: object) -> str:
    """Return the directory of an experiment as text; empty if there is none."""
    return "" if folder is None or folder is ABSENT else str(absolute_path(folder))


def _run_from_field(event: Any) -> object:
    """Return the run of an event with a ``run`` field."""
    return event.run


_RUN_GETTERS: Final = {"state": _run_from_state, "ctx": _run_from_context, "run": _run_from_field}
"""By the field that an event has."""


def _run_key(getter: Callable[[Event], object] | None, event: Event) -> str | None:
    """Return the run key of an event, or None if it has none."""
    if getter is None:
        return None
    try:
        run = getter(event)
    except Exception:  # a program may put any object into a state
        return None
    return run_key_text(run)


def rank_from_environment(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the launcher gave this process, or 0."""
    found = (environment.get(name, "") for name in _RANK_VARIABLES)
    return next((int(rank) for rank in found if rank.isdecimal()), 0)
