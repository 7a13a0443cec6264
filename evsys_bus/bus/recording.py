"""The recording half of a bus: each event becomes an envelope, and the envelope one append to the journal.

An event is recorded after its hooks, with the ids and metrics that they added; a checkpoint and the ends of things
before them, because an upload or a failure must be on record even if a hook dies on it. The time is taken on entry.
"""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any, Final, Self

import msgspec

from evsys_bus.attached import EventInfo
from evsys_bus.codec import MAX_EVENT_BYTES, IntroductionNeeded, encode, encoder
from evsys_bus.codec.references import (
    ABSENT,
    folder_of,
    hold_folders,
    reader_of,
    release_folders,
    run_and_root,
    run_key_of,
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
    RunEnd,
    RunStart,
    TrainEnd,
    TrainStart,
)
from evsys_bus.journal import JournalWriter
from evsys_bus.tasks import Deadline, Receipt

BEFORE_HOOKS: Final = frozenset({Checkpoint, TrainEnd, RunEnd, ExperimentEnd})
"""Event types that are on record before a hook sees them."""

_STARTS: Final = frozenset({ExperimentStart, GroupStart, RunStart, TrainStart})
_ENDS: Final = frozenset({TrainEnd, RunEnd, ExperimentEnd})
CLOSE_SECONDS: Final = 1.0
"""What closing the journal may take at least, also where the tasks have used up the deadline."""
_FIRST_PAUSE_SECONDS: Final = 0.02
_LAST_PAUSE_SECONDS: Final = 0.25
"""Between two tries of what the disk refuses, while the bus is left."""
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
    removed_segments: int = 0
    """Segments that `retain` has removed."""
    removed_events: int = 0
    """Events in those."""
    removed_bytes: int = 0
    """Their size."""


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
        self._started: set[str | None] = set()  # scopes with a RunStart, which RunEnd and not TrainEnd will close
        self._roots: dict[str, str] = {}  # of runs, by key: the directory of the experiment
        self._introduced: set[tuple[str | None, str]] = set()  # runs whose context is on record: key and directory

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
        writer.open()
        try:
            recording = cls(writer, rank, leave, secrets)
            hold_folders(recording)
        except BaseException:
            writer.close(CLOSE_SECONDS)
            raise
        return recording

    def close(self, receipt: Receipt, deadline: Deadline, spare_seconds: float = 0.0) -> Receipt:
        """Have it all on the medium, in what is left of the deadline, and say so on the receipt.

        Args:
            receipt: So far.
            deadline: What the disk refuses is tried again until then; once where none of it is left.
            spare_seconds: How much of it is left to others.
        """
        writer = self.writer
        pause = _FIRST_PAUSE_SECONDS

        def again() -> bool:
            nonlocal pause
            goes_on = deadline.left() > spare_seconds and deadline.pause(pause)
            pause = min(2 * pause, _LAST_PAUSE_SECONDS)
            return goes_on

        writer.close(max(deadline.left(), CLOSE_SECONDS), again)
        release_folders(self)
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
        encode_event = encoder(event_type, self._stream, self._rank, run_of, self._secrets, self._lacks_context)
        return self._recorder(run_of, encode_event)

    def record(self, event: Event, published: float) -> BaseException | None:
        """Record one event outside its publish; what the journal refused it with, where it was asked to raise.

        Raises:
            JournalClosedError: The journal is closed.
        """
        refusals: list[BaseException] = []
        leave, self._leave = self._leave, refusals.append
        try:
            self.way_of(type(event))(event, published)
        finally:
            self._leave = leave
        return refusals[0] if refusals else None

    def last(self) -> dict[str, int]:
        """The stream, and the sequence of its last event; empty where some wait or were given up: there may be gaps."""
        writer = self.writer
        return {} if writer.lost or writer.unrecorded else {self._stream: writer.next_sequence - 1}

    def info(self, now: float, *, recorded: bool) -> EventInfo:
        """Of the event whose hooks run now, which has its number already, or gets the next one."""
        return EventInfo(now, self._stream, self.writer.next_sequence - recorded)

    def health(self) -> JournalHealth:
        """Every count, now."""
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
            except IntroductionNeeded:
                self._record_with(run_of, self._append_introduction, event, now)

        return record

    def _record_with(self, run_of: _RunOf, append: _Append, event: Event, now: float) -> None:
        run = run_of(event)
        place = self._introduction(event)
        try:
            append(event, run, self._encoded(event, now, run, whole_context=place is not None))
            if place is not None:
                self._introduced.add(place)
        except UnrecordedError as error:
            self._leave(error)
        except MemoryError as error:
            self._scrimp(append, event, now, run, error)

    def _encoded(
        self,
        event: Event,
        now: float,
        run: str | None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        *,
        whole_context: bool = False,
    ) -> bytes:
        envelope = Envelope(self._stream, self.writer.next_sequence, now, event, run, self._rank)
        return encode(envelope, max_event_bytes=max_event_bytes, secrets=self._secrets, whole_context=whole_context)

    def _introduction(self, event: Event) -> tuple[str | None, str] | None:
        """The run whose whole context an event is to carry, because no other event on record has it."""
        place = _place_of(getattr(event, "state", None))
        if place is None or (
            _scope_of(*place) in self._started if isinstance(event, TrainStart) else place in self._introduced
        ):
            return None
        return place

    def _lacks_context(self, state: object) -> bool:
        """Whether the context of a state is not on record."""
        place = _place_of(state)
        return place is not None and place not in self._introduced

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

    def _append_introduction(self, event: Event, run: str | None, payload: bytes) -> None:
        """As a start: each later segment begins with it, and so with the context."""
        self.writer.append_start(payload, self._scope(event, run))

    def _append_start(self, event: Event, run: str | None, payload: bytes) -> None:
        scope = self._scope(event, run)
        if isinstance(event, RunStart):
            self._started.add(scope)
            if run is not None:
                self._introduced.add((run, self._roots.get(run, "")))
        self.writer.append_start(payload, scope)

    def _append_end(self, event: Event, run: str | None, payload: bytes) -> None:
        scope = self._scope(event, run)
        if isinstance(event, TrainEnd) and scope in self._started:
            self.writer.append(payload, keep=True)  # the run goes on: its benchmarks and its RunEnd are still to come
            return
        self._started.discard(scope)
        if isinstance(event, RunEnd) and run is not None:
            self._introduced.discard((run, self._roots.get(run, "")))
        self.writer.append_end(payload, scope)

    def _scope(self, event: Any, run: str | None) -> str | None:
        """What an event opens or closes: a run of one experiment; None for the experiment. Any: a start or an end."""
        if run is None:
            return None
        handle = event.ctx if hasattr(event, "ctx") else reader_of(event.state)("ctx")
        root = reader_of(handle)("output_dir")
        if root is not None and root is not ABSENT:
            self._roots[run] = _root_of(root)
        return _scope_of(run, self._roots.get(run, ""))


class _LastName:
    """The name of a path; of the one that was asked for last it is known, for a path takes itself apart anew."""

    def __init__(self) -> None:
        self._last: tuple[object, str] = (None, "")

    def of(self, path: Any) -> str:
        known, name = self._last
        if known is not path:
            name = path.name if isinstance(path, PurePath) else PurePath(path).name
            self._last = (path, name)
        return name


_name_of: Final = _LastName().of


def _run_of_state(event: Any) -> object:
    """The run of an event with a ``state``. Any: a program may put anything there; its attributes decide."""
    state = event.state
    try:
        ctx = getattr(state, "ctx", None)
        run = None if ctx is None else getattr(ctx, "run_key", None)
        return _name_of(state.output_dir) if run is None else run
    except Exception:  # a dict, or one whose own code raises what it likes
        return run_and_root(state)[0]


def _run_of_ctx(event: Any) -> object:
    """The run of an event with a ``ctx``; None for those of the whole experiment. Any: as above."""
    return reader_of(event.ctx)("run_key")


def _place_of(state: Any) -> tuple[str | None, str] | None:
    """Of a state that has a context, the key of its run and the directory of its experiment. Any: as above."""
    try:
        ctx = state.ctx
        if ctx is None:
            return None
        run, root = getattr(ctx, "run_key", None), getattr(ctx, "output_dir", None)
        run = _name_of(state.output_dir) if run is None else run_key_of(run)
    except Exception:  # a dict, or one that lacks something, or whose own code raises what it likes
        ctx = reader_of(state)("ctx")
        if ctx is None or ctx is ABSENT:
            return None
        run, root = run_and_root(state)
    return run, _root_of(root)


def _root_of(folder: object) -> str:
    """The directory of an experiment as text; empty where there is none."""
    return "" if folder is None else str(folder_of(folder))


def _scope_of(run: str | None, root: str) -> str:
    return f"{root}\0{run}"


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
    return run_key_of(run)


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """The rank that the launcher gave this process; 0 where there is none."""
    found = (environment.get(name, "") for name in _RANKS)
    return next((int(rank) for rank in found if rank.isdecimal()), 0)
