"""The recording half of a bus: each event becomes an envelope, and the envelope one append to the journal.

An event is recorded after its hooks, with the ids and metrics that they added; a checkpoint and the ends of things
before them, because an upload or a failure must be on record even if a hook dies on it. The time is taken on entry.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from evsys_bus.codec import MAX_EVENT_BYTES, encode, encoder
from evsys_bus.context import LogContext, LoopState
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import UnrecordedError
from evsys_bus.events import (
    Checkpoint,
    Envelope,
    Event,
    ExperimentEnd,
    ExperimentStart,
    GroupStart,
    RunEnd,
    RunStart,
    TrainEnd,
    TrainStart,
)
from evsys_bus.journal import JournalWriter
from evsys_bus.tasks import Receipt

BEFORE_HOOKS: Final = frozenset({Checkpoint, TrainEnd, RunEnd, ExperimentEnd})
"""Event types that are on record before a hook sees them."""

_STARTS: Final = frozenset({ExperimentStart, GroupStart, RunStart, TrainStart})
_ENDS: Final = frozenset({TrainEnd, RunEnd, ExperimentEnd})
CLOSE_SECONDS: Final = 1.0
"""What closing the journal may take at least, also where the tasks have used up the deadline."""
SCRIMPED_BYTES: Final = 16 << 10
"""What an event may take where there is no memory for all of it."""
_RANKS: Final = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Where launchers say which process of many this is: torchrun, Slurm, Open MPI, MPICH."""


_RunOf = Callable[[Event], str | None]
"""How the run key of an event is found."""
_Append = Callable[[Event, str | None, bytes], None]
"""Appends an event, given its run and what was made of both."""


class JournalHealth(msgspec.Struct, frozen=True):
    """How the journal of a bus fares."""

    directory: str
    stream: str
    recorded: int
    """Events with the operating system."""
    unrecorded: int
    """Events that wait in memory, because the disk does not take them."""
    lost: int
    """Events given up because too many waited."""
    failures: int
    """How often the disk refused something."""


class Recording:
    """Writes what a bus publishes; called with the bus's token held, so by one thread at a time."""

    def __init__(
        self, writer: JournalWriter, rank: int, leave: Callable[[BaseException], None], secrets: frozenset[str]
    ) -> None:
        self.writer = writer
        self._secrets = secrets
        self._stream = writer.stream
        self._rank = rank
        self._leave = leave
        self._faults = FaultLog()
        self._started: set[str | None] = set()  # runs with a RunStart, which RunEnd and not TrainEnd will close

    @classmethod
    def open(
        cls,
        journal: JournalWriter | str | os.PathLike[str],
        rank: int,
        leave: Callable[[BaseException], None],
        secrets: frozenset[str],
    ) -> Self:
        """Open the journal.

        Args:
            journal: A directory, or a writer that is not open yet.
            rank: Which of several processes this is.
            leave: Called with what must be raised from the publish in progress.
            secrets: As `evsys_bus.codec.encode` takes them.

        Raises:
            JournalOpenError: The directory cannot be written.
        """
        writer = journal if isinstance(journal, JournalWriter) else JournalWriter(journal, rank=rank)
        return cls(writer.open(), rank, leave, secrets)

    def close(self, receipt: Receipt, drain_timeout: float) -> Receipt:
        """Have it all on the medium, in what the drain has left of the deadline, and say so on the receipt."""
        writer = self.writer
        writer.close(max(drain_timeout - receipt.seconds, CLOSE_SECONDS))
        return msgspec.structs.replace(
            receipt, recorded=writer.recorded, unrecorded=writer.unrecorded + writer.lost, journal=writer.directory
        )

    def way_of(self, event_type: type[Event]) -> Callable[[Event, float], None]:
        """The function that records events of this type, given when they were published."""
        fields = event_type.__struct_fields__
        run_of = partial(_run_of, next((way for field, way in _WAYS.items() if field in fields), None))
        if event_type in _STARTS:
            return partial(self._record_with, run_of, self._append_start)
        if event_type in _ENDS:
            return partial(self._record_with, run_of, self._append_end)
        if event_type is Checkpoint:
            return partial(self._record_with, run_of, self._append_kept)
        return self._recorder(run_of, encoder(event_type, self._stream, self._rank, run_of, self._secrets))

    def last(self) -> dict[str, int]:
        """The stream, and the sequence of its last event; empty where some wait or were given up: there may be gaps."""
        writer = self.writer
        return {} if writer.lost or writer.unrecorded else {self._stream: writer.next_sequence - 1}

    def health(self) -> JournalHealth:
        """Every count, now."""
        writer = self.writer
        return JournalHealth(
            directory=writer.directory,
            stream=writer.stream,
            recorded=writer.recorded,
            unrecorded=writer.unrecorded,
            lost=writer.lost,
            failures=writer.failures,
        )

    def _recorder(
        self, run_of: _RunOf, encode_event: Callable[[Event, int, float], bytes]
    ) -> Callable[[Event, float], None]:
        """For the many: steps and evals. What it needs are its own names: an attribute costs more."""
        append, leave = self.writer.appender(encode_event), self._leave

        def record(event: Event, now: float) -> None:
            try:
                append(event, now)
            except UnrecordedError as error:  # only where the program asked for it
                leave(error)
            except MemoryError as error:
                self._scrimp(self._append_plain, event, now, run_of(event), error)

        return record

    def _record_with(self, run_of: _RunOf, append: _Append, event: Event, now: float) -> None:
        run = run_of(event)
        try:
            append(event, run, self._encoded(event, now, run))
        except UnrecordedError as error:
            self._leave(error)
        except MemoryError as error:
            self._scrimp(append, event, now, run, error)

    def _encoded(self, event: Event, now: float, run: str | None, max_event_bytes: int = MAX_EVENT_BYTES) -> bytes:
        envelope = Envelope(self._stream, self.writer.next_sequence, now, event, run, self._rank)
        return encode(envelope, max_event_bytes=max_event_bytes, secrets=self._secrets)

    def _scrimp(self, append: _Append, event: Event, now: float, run: str | None, error: MemoryError) -> None:
        """There is no memory for the record: have less of it recorded, or the event counted as lost."""
        try:
            append(event, run, self._encoded(event, now, run, SCRIMPED_BYTES))
        except UnrecordedError as refusal:
            self._leave(refusal)
        except MemoryError:
            self.writer.give_up()
        try:
            self._faults.warn("journal.no_memory", type(event), error=error, event_type=type(event).__name__)
        except MemoryError:
            pass  # the counts have to do

    def _append_plain(self, _: Event, __: str | None, payload: bytes) -> None:
        self.writer.append(payload)

    def _append_kept(self, _: Event, __: str | None, payload: bytes) -> None:
        self.writer.append(payload, keep=True)

    def _append_start(self, event: Event, run: str | None, payload: bytes) -> None:
        if isinstance(event, RunStart):
            self._started.add(run)
        self.writer.append_start(payload, run)

    def _append_end(self, event: Event, run: str | None, payload: bytes) -> None:
        if isinstance(event, TrainEnd) and run in self._started:
            self.writer.append(payload, keep=True)  # the run goes on: its benchmarks and its RunEnd are still to come
            return
        self._started.discard(run)
        self.writer.append_end(payload, run)


class _LastName:
    """The name of a path; of the one that was asked for last it is known, for a path takes itself apart anew."""

    def __init__(self) -> None:
        self._last: tuple[Path | None, str] = (None, "")

    def of(self, path: Path) -> str:
        known, name = self._last
        if known is not path:
            name = path.name
            self._last = (path, name)
        return name


_name_of: Final = _LastName().of


def _run_of_state(event: Any) -> object:
    """The run of an event with a ``state``; None where that is no live state. Any: a program may put anything there."""
    state = event.state
    if not isinstance(state, LoopState):
        return None
    try:
        ctx = state.ctx
    except AttributeError:  # a detached state may have none
        ctx = None
    return _name_of(state.output_dir) if ctx is None else ctx.run_key


def _run_of_ctx(event: Any) -> object:
    """The run of an event with a ``ctx``; None for those of the whole experiment. Any: as above."""
    return event.ctx.run_key if isinstance(event.ctx, LogContext) else None


def _run_of_run(event: Any) -> object:
    """The run of an event that names it. Any: as above."""
    return event.run


_WAYS: Final = {"state": _run_of_state, "ctx": _run_of_ctx, "run": _run_of_run}
"""By what an event has."""


def _run_of(way: Callable[[Event], object] | None, event: Event) -> str | None:
    """The run of an event; None for one that says nothing of a run, or nothing that could be one."""
    if way is None:
        return None
    try:
        run = way(event)
    except Exception:  # what a program puts into a state may be anything
        return None
    return run if isinstance(run, str) else None


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave this process; 0 where there is none."""
    found = (environment.get(name, "") for name in _RANKS)
    return next((int(rank) for rank in found if rank.isdecimal()), 0)
