"""`Books`: the files of one courier: its cursor, dead letters and state, and the lock that makes it the only courier.

A replay keeps them in memory only. A disk error never ends a delivery: it is logged, and the write is retried.
"""

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any, Final
from urllib.parse import quote

import msgspec

from evsys_bus.delivery.courier_lock import CourierLock
from evsys_bus.delivery.dead_letters import DeadLetters
from evsys_bus.delivery.feed import Batch, Broken
from evsys_bus.delivery.receiver import Taken
from evsys_bus.delivery.states import kept, read_state, write_state
from evsys_bus.diagnostics import FaultLog, log, message_shape
from evsys_bus.errors import CourierBusyError
from evsys_bus.events import Envelope, ExperimentEnd, RunEnd, StepEnd, TrainEnd, TrainStart
from evsys_bus.journal import Clock, Cursor, Cursors, Disk, Place, layout
from evsys_bus.tasks import DeliveryStatus

LOOK_SECONDS: Final = 1.0
"""Time between two checks that the directory still exists."""
STATE_SECONDS: Final = 1.0
"""Minimum time between two writes of the state file for changes that are not urgent."""


class Books:
    """The files of one courier. Used on the courier's thread only.

    Args:
        directory: The journal.
        name: Name of the adapter.
        kind: Kind of the adapter; a cursor that another kind has stored under this name is not used.
        keep: Whether to store anything on disk.
    """

    def __init__(
        self, directory: str, name: str, kind: str, *, keep: bool, disk: Disk, clock: Clock, faults: FaultLog
    ) -> None:
        self.cursor = Cursor()
        self.changed = False
        """Whether the cursor has moved since it was last saved."""
        self.training: set[tuple[str, str]] = set()
        """Stream and run of each open training."""
        self._directory: Final = directory
        self._name: Final = name
        self._kind: Final = kind
        self._keep: Final = keep
        self._disk: Final = disk
        self._clock: Final = clock
        self._faults: Final = faults
        self._cursors: Final = Cursors(directory, disk)
        self._letters: Final = DeadLetters(directory, name, disk=disk, clock=clock)
        self._unsaved: Cursor | None = None
        """The cursor as it was when its mark was taken, until it is saved."""
        self._lock: Final = CourierLock(directory, name, disk, clock)
        self._look_due = 0.0
        self._state: DeliveryStatus | None = None
        self._stated_at = 0.0

    def disown(self) -> None:
        """Release the lock in a forked child; the parent process keeps it."""
        self._lock.let_go()

    def open(self) -> bool:
        """Acquire the lock and read the cursor; return whether there was one.

        Raises:
            CourierBusyError: Another courier holds the lock.
            OSError: The cursor or the dead-letter file cannot be read now.
        """
        if not self._keep:
            return False
        self._lock.take()
        _open.add(self)
        try:
            self.cursor = self._fresh(self._own(self._cursors.read(self._name)))
            self._letters.open(self.cursor)
        except OSError:
            self.close()
            raise
        return bool(self.cursor.streams)

    def state_before(self) -> DeliveryStatus:
        """The part of the previous courier's state that is still valid; see `kept`."""
        return kept(read_state(self._disk, self._directory, self._name) if self._keep else None)

    def begin(self, after: Mapping[str, int]) -> None:
        """Set the cursor to just after these sequences, by stream."""
        self.cursor = Cursor({stream: Place(sequence) for stream, sequence in after.items()})
        self.changed = True

    def done(self, batch: Batch, taken: Taken) -> None:
        """Record the result for the front of a batch and remove those events from it."""
        envelopes, sequences = batch.envelopes[: taken.done], batch.sequences[: taken.done]
        place = 0
        for stream, number, last in batch.drop(taken.done):
            part = range(place, place + number)
            place += number
            dead = [index for index in taken.dead if index in part]
            for index in dead if self._keep else ():
                self._letters.put(stream, sequences[index], taken.dead[index], envelopes[index])
                self._tell_dead(stream, sequences[index], taken.dead[index], taken.errors.get(index))
            self._move(stream, last, number - len(dead), len(dead))
            self._count_steps(stream, envelopes if number == len(envelopes) else envelopes[part.start : part.stop])

    def introduced(self, starts: Iterable[Envelope]) -> None:
        """Record the trainings that are open, from start events that were repeated and not delivered."""
        for each in starts:
            if isinstance(each.event, TrainStart):
                self._open_or_close(each.stream, each.run or "", each.event)

    def broken(self, broken: Broken) -> None:
        """Record a dead letter for a record that is not a valid envelope."""
        if self._keep:
            self._letters.put(broken.stream, broken.sequence, broken.why, broken)
            self._tell_dead(broken.stream, broken.sequence, broken.why)
        self._move(broken.stream, broken.sequence, 0, 1)

    @property
    def full(self) -> bool:
        """Whether so many dead letters wait for the disk that the delivery has to wait too."""
        return self._keep and self._letters.full

    def commit(self, mark: Callable[[], Any]) -> bool:
        """Flush dead letters, then the receiver's own files, then the cursor; return whether all are on disk.

        Args:
            mark: The receiver's `mark`, which flushes what it wrote.

        Raises:
            Exception: What ``mark`` raised; the saved cursor is unchanged.
        """
        while self._keep and (self.changed or self._unsaved is not None):
            try:
                if self._unsaved is None:
                    self._letters.write()
            except OSError as error:
                return self._refused(error)
            if self._unsaved is None:
                cursor = self.cursor
                self._unsaved = Cursor(dict(cursor.streams), dict(cursor.steps), mark(), self._kind)
                self.changed = False
            if not self.save():
                return False
        return True

    def save(self) -> bool:
        """Save the cursor of the last `commit` if it is not on disk yet; return whether it is.

        A mark is valid until two more were taken, so no mark may be taken while this returns False.
        """
        if self._unsaved is not None:
            try:
                self._cursors.save(self._name, self._unsaved)
            except OSError as error:
                return self._refused(error)
            self._unsaved = None
        return True

    def _refused(self, error: OSError) -> bool:
        self._faults.warn("courier.not_committed", self._name, error=error, adapter=self._name)
        return False

    def state(self, state: DeliveryStatus, *, urgent: bool) -> None:
        """Write the state if it differs from the last one; changes that are not urgent once a second at most."""
        now = self._clock.monotonic()
        before = self._state
        if (
            not self._keep
            or before == state
            or not (urgent or before is None or now - self._stated_at >= STATE_SECONDS)
        ):
            return
        self._stated_at = now
        self._state = state
        written = msgspec.structs.replace(state, at=self._clock.wall())
        try:
            write_state(self._disk, self._directory, self._name, written)
        except OSError as error:
            self._state = None
            self._faults.warn("courier.state_not_written", self._name, error=error, adapter=self._name)

    def look(self, *, last: bool = False) -> None:
        """Check once a second whether the directory was removed, and write all files again if it was.

        Args:
            last: Check now, and do not raise.

        Raises:
            CourierBusyError: Another courier has acquired the new lock.
        """
        now = self._clock.monotonic()
        if not last and now < self._look_due:
            return
        self._look_due = now + LOOK_SECONDS
        if not self._lock.is_removed():
            return
        self._lock.let_go()
        with suppress(CourierBusyError) if last else nullcontext():
            self._lock.take()
            with suppress(OSError):  # letters in the removed file are lost
                self._letters.close()
            self._state = None
            self.changed = True

    def close(self) -> None:
        """Close the files and release the lock."""
        with suppress(OSError):  # a file that cannot be closed needs no handling
            self._letters.close()
        self._lock.let_go()

    def _tell_dead(self, stream: str, sequence: int, why: str, error: Exception | None = None) -> None:
        """Log the dead letter; repeated ones are logged as a count."""
        file = layout.courier_file(self._directory, self._name, "dead.jsonl")
        self._faults.warn(
            "delivery.dead_letter",
            self._name,
            error=error,
            shape=message_shape(why),
            adapter=self._name,
            why=why,
            stream=stream,
            seq=sequence,
            file=file,
        )

    def _own(self, cursor: Cursor) -> Cursor:
        """Return the cursor, or a new one if it belongs to another kind of adapter that had this name.

        That is a new destination, which has received no events yet. The files of the other one are renamed and kept.

        Raises:
            OSError: The files cannot be renamed.
        """
        if cursor.kind in {"", self._kind}:
            return cursor
        aside = f"{quote(cursor.kind, safe='')}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime(self._clock.wall()))}"
        letters, place = (
            layout.courier_file(self._directory, self._name, "dead.jsonl"),
            layout.cursor_file(self._directory, self._name),
        )
        with suppress(FileNotFoundError):  # there may be no dead letters
            self._disk.replace(f"{letters}.{aside}", self._disk.read(letters, 0, self._disk.size(letters)))
            self._disk.remove(letters)
        self._disk.replace(f"{place}.{aside}", self._disk.read(place, 0, _MOST_BYTES))
        self._cursors.save(self._name, Cursor(kind=self._kind))
        facts = {"adapter": self._name, "kind": self._kind, "before": cursor.kind, "cursor": f"{place}.{aside}"}
        log().warning(
            "courier.begins_anew", **facts, why="another kind of adapter had this name, so this one gets all events"
        )
        return Cursor()

    def _fresh(self, cursor: Cursor) -> Cursor:
        """Return the cursor, or a new one if it is older than the removed segments, as after a restore from a backup.

        Rows after its mark belong to events that were removed and cannot be delivered again, so they must not be cut.
        """
        for stream, place in cursor.streams.items() if cursor.mark is not None else ():
            removed = layout.removed_in_front(layout.segments(self._disk, f"{self._directory}/{stream}"))
            if removed > place.sequence:
                facts = {"adapter": self._name, "stream": stream, "at": place.sequence, "removed_up_to": removed}
                why = "the cursor is older than the removed segments: what is left is compared with what was written"
                log().warning("courier.begins_anew", **facts, why=why)
                return Cursor()
        return cursor

    def _move(self, stream: str, sequence: int, delivered: int, dead: int) -> None:
        before = self.cursor.place(stream)
        self.cursor.streams[stream] = Place(sequence, before.delivered + delivered, before.dead + dead)
        self.changed = True

    def _count_steps(self, stream: str, envelopes: list[Envelope]) -> None:
        """Record the largest step of each open training."""
        steps = self.cursor.steps
        for envelope in envelopes:
            event = envelope.event
            if type(event) is StepEnd:
                if steps:
                    run, step = envelope.run or "", event.step_idx
                    if run in steps and type(step) is int and (step > steps[run] or steps[run] == _BEHIND_ALL):
                        steps[run] = step
            elif isinstance(event, _TRAINING):
                self._open_or_close(stream, envelope.run or "", event)

    def _open_or_close(self, stream: str, run: str, event: TrainStart | TrainEnd | RunEnd | ExperimentEnd) -> None:
        if isinstance(event, TrainStart):
            first = getattr(event.state, "step", 0)
            self.training.add((stream, run))
            self.cursor.steps[run] = first - 1 if type(first) is int else -1
            return
        if isinstance(event, ExperimentEnd):
            self.training = {each for each in self.training if each[0] != stream}
        else:
            self.training.discard((stream, run))
        still = {each[1] for each in self.training}
        for each in [each for each in self.cursor.steps if each not in still]:
            del self.cursor.steps[each]


_BEHIND_ALL: Final = sys.maxsize - 1
"""The largest step of a training whose start was repeated and that has no step in the journal yet."""
_TRAINING: Final = (TrainStart, TrainEnd, RunEnd, ExperimentEnd)
_MOST_BYTES: Final = 16 << 20

_open: "weakref.WeakSet[Books]" = weakref.WeakSet()


def _disown_all() -> None:
    for books in list(_open):
        books.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)
