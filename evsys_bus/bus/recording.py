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
"""Event types that are recorded before their hooks run."""

_STARTS: Final = frozenset({ExperimentStart, GroupStart, RunStart, TrainStart})
_ENDS: Final = frozenset({TrainEnd, RunEnd, ExperimentEnd})
CLOSE_SECONDS: Final = 1.0
"""Minimum time for closing the journal, even if the tasks have used up the deadline."""
_FIRST_PAUSE_SECONDS: Final = 0.02
_LAST_PAUSE_SECONDS: Final = 0.25
"""Maximum interval of retries while the bus is closing and the disk refuses writes."""
SCRIMPED_BYTES: Final = 16 << 10
"""Maximum size of an event that is truncated for lack of memory."""
_RANKS: Final = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Environment variables for the rank set by launchers: torchrun, Slurm, Open MPI, MPICH."""


_RunOf = Callable[[Event], str | None]
"""Returns the run key of an event."""
_Append = Callable[[Event, str | None, bytes], None]
"""Appends an event, given its run and the encoded envelope."""


class JournalHealth(msgspec.Struct, frozen=True):
    """Counts of the journal of a bus."""

    directory: str
    stream: str
    recorded: int
    """Events written to the operating system."""
    unrecorded: int
    """Events that wait in memory because the disk refuses them."""
    lost: int
    """Events dropped because too many waited."""
    failures: int
    """How often the disk refused an operation."""
    removed_segments: int = 0
    """Segments removed by `retain`."""
    removed_events: int = 0
    """Events in the removed segments."""
    removed_bytes: int = 0
    """Size of the removed segments."""


class Recording:
    """Records the events of a bus. Called with the bus's token held, so by one thread at a time."""

    def __init__(
        self, writer: JournalWriter, rank: int, leave: Callable[[BaseException], None], secrets: frozenset[str]
    ) -> None:
        self.writer = writer
        self._secrets = secrets
        self._stream = writer.stream
        self._rank = rank
        self._leave = leave
        self._faults = FaultLog()
        self._started: set[str | None] = set()  # scopes with a RunStart: closed by RunEnd, not by TrainEnd
        self._roots: dict[str, str] = {}  # by run key: the directory of the experiment
        self._introduced: set[tuple[str | None, str]] = set()  # runs whose context is recorded: key and directory

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
            rank: Rank of this process.
            leave: Called with errors to be raised from the current publish.
            secrets: See `evsys_bus.codec.encode`.

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
        """Write and sync everything within the deadline, and return the receipt with the counts.

        Args:
            receipt: The receipt so far.
            deadline: Refused writes are retried until then, or once if it has passed.
            spare_seconds: How much of it is reserved for others.
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
        """Return the function that records events of this type, given an event and its publish time."""
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
        """Record one event outside its publish; return the journal's error if it was configured to raise.

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
        """Return the stream and the sequence of its last event; empty if events wait or were lost (possible gaps)."""
        writer = self.writer
        return {} if writer.lost or writer.unrecorded else {self._stream: writer.next_sequence - 1}

    def info(self, now: float, *, recorded: bool) -> EventInfo:
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

    def _recorder(
        self, run_of: _RunOf, encode_event: Callable[[Event, int, float], bytes]
    ) -> Callable[[Event, float], None]:
        """Return the recorder for frequent events. It uses local names only, because attributes are slower."""
        append, leave = self.writer.appender(encode_event), self._leave

        def record(event: Event, now: float) -> None:
            try:
                append(event, now)
            except UnrecordedError as error:  # only if the journal is configured to raise
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
        """Return the run whose whole context the event must carry because no recorded event has it yet."""
        place = _place_of(getattr(event, "state", None))
        if place is None or (
            _scope_of(*place) in self._started if isinstance(event, TrainStart) else place in self._introduced
        ):
            return None
        return place

    def _lacks_context(self, state: object) -> bool:
        """Return whether the context of this state is not recorded yet."""
        place = _place_of(state)
        return place is not None and place not in self._introduced

    def _scrimp(self, append: _Append, event: Event, now: float, run: str | None, error: MemoryError) -> None:
        """Record a truncated event for lack of memory, or count it as lost."""
        try:
            append(event, run, self._encoded(event, now, run, SCRIMPED_BYTES))
        except UnrecordedError as refusal:
            self._leave(refusal)
        except MemoryError:
            self.writer.give_up()
        try:
            self._faults.warn("journal.no_memory", type(event), error=error, event_type=type(event).__name__)
        except MemoryError:
            pass  # it is still counted

    def _append_plain(self, _: Event, __: str | None, payload: bytes) -> None:
        self.writer.append(payload)

    def _append_kept(self, _: Event, __: str | None, payload: bytes) -> None:
        self.writer.append(payload, keep=True)

    def _append_introduction(self, event: Event, run: str | None, payload: bytes) -> None:
        """Append like a start event: each later segment begins with it, and so with the context."""
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
            self.writer.append(payload, keep=True)  # the run continues: its benchmarks and its RunEnd follow
            return
        self._started.discard(scope)
        if isinstance(event, RunEnd) and run is not None:
            self._introduced.discard((run, self._roots.get(run, "")))
        self.writer.append_end(payload, scope)

    def _scope(self, event: Any, run: str | None) -> str | None:
        """Return what the event opens or closes: a run of one experiment, or None for the experiment."""
        if run is None:
            return None
        handle = event.ctx if hasattr(event, "ctx") else reader_of(event.state)("ctx")
        root = reader_of(handle)("output_dir")
        if root is not None and root is not ABSENT:
            self._roots[run] = _root_of(root)
        return _scope_of(run, self._roots.get(run, ""))


class _LastName:
    """Returns the last component of a path, with a cache of one, because `PurePath` parses itself each time."""

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
    """Return the run of an event with a ``state``, which may be any object with the right attributes."""
    state = event.state
    try:
        ctx = getattr(state, "ctx", None)
        run = None if ctx is None else getattr(ctx, "run_key", None)
        return _name_of(state.output_dir) if run is None else run
    except Exception:  # a dict, or an object whose own code raises
        return run_and_root(state)[0]


def _run_of_ctx(event: Any) -> object:
    """Return the run of an event with a ``ctx``; None for events of the whole experiment."""
    return reader_of(event.ctx)("run_key")


def _place_of(state: Any) -> tuple[str | None, str] | None:
    """Return run key and experiment directory of a state that has a context, or None."""
    try:
        ctx = state.ctx
        if ctx is None:
            return None
        run, root = getattr(ctx, "run_key", None), getattr(ctx, "output_dir", None)
        run = _name_of(state.output_dir) if run is None else run_key_of(run)
    except Exception:  # a dict, or an object that lacks an attribute or whose own code raises
        ctx = reader_of(state)("ctx")
        if ctx is None or ctx is ABSENT:
            return None
        run, root = run_and_root(state)
    return run, _root_of(root)


def _root_of(folder: object) -> str:
    """Return the directory of an experiment as text; empty if there is none."""
    return "" if folder is None else str(folder_of(folder))


def _scope_of(run: str | None, root: str) -> str:
    return f"{root}\0{run}"


def _run_of_run(event: Any) -> object:
    """Return the run of an event with a ``run`` field."""
    return event.run


_WAYS: Final = {"state": _run_of_state, "ctx": _run_of_ctx, "run": _run_of_run}
"""By the field that an event has."""


def _run_of(way: Callable[[Event], object] | None, event: Event) -> str | None:
    """Return the run key of an event, or None if it has none."""
    if way is None:
        return None
    try:
        run = way(event)
    except Exception:  # a program may put any object into a state
        return None
    return run_key_of(run)


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank that the launcher gave this process, or 0."""
    found = (environment.get(name, "") for name in _RANKS)
    return next((int(rank) for rank in found if rank.isdecimal()), 0)
