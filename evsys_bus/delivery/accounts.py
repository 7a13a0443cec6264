"""`accounts`: how far every adapter of a journal has got, from disk alone: ``recorded = delivered + dead + pending``.

Delivered and dead are what the cursor says; pending is what stands behind it, counted by frames and checksums, with
nothing decoded. So two processes that look agree.
"""

import os
import threading
from collections.abc import Mapping
from typing import Final
from urllib.parse import unquote

import msgspec

from evsys_bus.delivery.followed import CourierState, Terms
from evsys_bus.delivery.roster import roster
from evsys_bus.delivery.states import read_state
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import Cursors, Disk, OsDisk, Place, frame, layout
from evsys_bus.journal.frame import Damage, Frame
from evsys_bus.journal.layout import SegmentName
from evsys_bus.journal.scanning import SegmentScan


class Account(msgspec.Struct, frozen=True):
    """One adapter's."""

    name: str
    recorded: int
    """Events of the streams it is served."""
    delivered: int
    dead: int
    """Those that it did not take and never will; they are in its dead-letter file."""
    pending: int
    state: CourierState | None
    """As its courier last wrote it down."""
    busy: bool
    """Whether a courier delivers to it now."""

    @property
    def trouble(self) -> str | None:
        """What keeps it from being delivered to, in words; None where nothing does."""
        return None if self.state is None or self.state.state in {"delivering", "idle"} else self.state.error


class Accounts:
    """The accounts of one journal, for those who ask again and again: what was counted is not counted again.

    Args:
        directory: The journal.
        disk: The file system.
    """

    def __init__(self, directory: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self._directory: Final = os.fspath(directory)
        self._disk: Final = OsDisk() if disk is None else disk
        self._pending: dict[str, Pending] = {}

    def read(self, known: Mapping[str, int] | None = None) -> list[Account]:
        """Of every adapter that has a cursor, a spec or a courier, by name.

        Args:
            known: The last sequence of streams that their own writer asks about; they need not be read.
        """
        disk, where = self._disk, self._directory
        terms = {each.name: each.terms for each in roster(where, disk)}
        names = sorted({*terms, *layout.followers(disk, where), *_with_state(disk, where)})
        return [self._account(name, terms.get(name, Terms()), known or {}) for name in names]

    def unbooked(self, name: str, terms: Terms) -> Account:
        """Of an adapter for which nothing could be written down: all that is for it is pending."""
        pending = Pending(self._directory, terms.ranks, self._disk).count({})
        fix = "look at the log; a name that is shorter, or room on the disk, may be what is missing"
        state = CourierState("failed", 0, 0.0, error="its books cannot be written", fix=fix)
        return Account(name, pending, 0, 0, pending, state, busy=False)

    def _account(self, name: str, terms: Terms, known: Mapping[str, int]) -> Account:
        disk, where = self._disk, self._directory
        # The state first, the cursor behind it, the journal last: what happens meanwhile shows as pending.
        state = read_state(disk, where, name)
        busy = disk.is_locked(layout.courier_file(where, name, "lock"))
        places = Cursors(where, disk).load(name).streams
        delivered, dead = sum(each.delivered for each in places.values()), sum(each.dead for each in places.values())
        if name not in self._pending:
            self._pending[name] = Pending(where, terms.ranks, disk)
        pending = self._pending[name].count(places, known)
        return Account(name, delivered + dead + pending, delivered, dead, pending, state, busy)


def accounts(directory: str | os.PathLike[str], disk: Disk | None = None) -> list[Account]:
    """Of every adapter that has a cursor, a spec or a courier, by name; counted anew."""
    return Accounts(directory, disk).read()


def _with_state(disk: Disk, directory: str) -> list[str]:
    try:
        names = disk.names(f"{directory}/{layout.COURIERS}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [unquote(name.removesuffix(_STATE)) for name in names if name.endswith(_STATE)]


class Pending:
    """Counts what stands behind a cursor, each record once however often it is asked; from any thread.

    Args:
        directory: The journal.
        ranks: Whose streams, besides those that the cursor names; None for all.
        disk: The file system.
    """

    def __init__(self, directory: str, ranks: tuple[int, ...] | None, disk: Disk) -> None:
        self._directory: Final = directory
        self._ranks: Final = ranks
        self._disk: Final = disk
        self._lock: Final = threading.Lock()
        self._ahead: dict[str, _Ahead] = {}

    def count(self, places: Mapping[str, Place], known: Mapping[str, int] = {}) -> int:
        """How many events are behind these places; the places never go back from one call to the next.

        Args:
            places: By stream.
            known: The last sequence of streams that have no gaps and need not be read.
        """
        with self._lock:
            names = layout.streams(self._disk, self._directory)
            served = [name for name in names if self._ranks is None or layout.rank_of(name) in self._ranks]
            return sum(self._count(name, places.get(name, Place()), known.get(name)) for name in {*served, *places})

    def _count(self, stream: str, place: Place, last: int | None) -> int:
        if last is not None:
            return max(0, last - place.sequence)
        ahead = self._ahead.get(stream)
        if ahead is None or ahead.is_removed():
            ahead = self._ahead[stream] = _Ahead(self._disk, f"{self._directory}/{stream}", place)
        return max(0, ahead.count() - (place.delivered + place.dead - ahead.done))


class _Ahead:
    """The events of one stream behind a place, as far as they were counted."""

    def __init__(self, disk: Disk, folder: str, place: Place) -> None:
        self.done: Final = place.delivered + place.dead
        """At the place where counting began."""
        self._disk: Final = disk
        self._folder: Final = folder
        self._last = place.sequence
        self._found = 0
        self._at: SegmentName | None = None
        self._scan: SegmentScan | None = None
        self._expected = 1
        self._suspect = -1

    def count(self) -> int:
        """How many there are now."""
        while True:
            if self._scan is not None:
                self._read_on(self._scan)
            following = self._following()
            if following is None:
                return self._found
            if self._scan is not None:
                self._read_on(self._scan)  # it may have grown until the next one was begun
            self._at = following
            self._scan = SegmentScan(self._disk, f"{self._folder}/{following}")
            self._expected, self._suspect = following.first, -1

    def is_removed(self) -> bool:
        """Whether the segment that was read last is gone: events that were counted may be gone with it, unread."""
        return self._at is not None and self._at not in layout.segments(self._disk, self._folder)

    def _following(self) -> SegmentName | None:
        names = layout.segments(self._disk, self._folder)
        at = self._at
        if at is None:
            return next((name for name in reversed(names) if name.first <= self._last + 1), names[0] if names else None)
        return next((name for name in names if name > at), None)

    def _read_on(self, scan: SegmentScan) -> None:
        try:
            while not self._read(scan):
                pass
        except (OSError, JournalVersionError):
            pass  # it counts once it can be read

    def _read(self, scan: SegmentScan) -> bool:
        """Count what follows; False where the same place has to be read again."""
        for piece in scan.count(self._expected):
            if isinstance(piece, int):
                self._found += piece - max(self._expected, self._last + 1) if piece > self._last + 1 else 0
                self._last = max(self._last, piece - 1)
                self._expected = piece
            elif isinstance(piece, Frame) and piece.kind in {frame.EVENT, frame.CARRIED}:
                if piece.kind == frame.EVENT:
                    self._expected = max(self._expected, piece.sequence + 1)
                if piece.sequence > self._last:
                    self._found += 1
                    self._last = piece.sequence
            elif isinstance(piece, Damage) and scan.offset != self._suspect:
                self._suspect = scan.offset  # perhaps it was read while it was written, as `Tail` has it
                scan.offset -= piece.length
                return False
        return True


_STATE: Final = ".state.json"
