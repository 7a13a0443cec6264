"""`accounts`: the delivery progress of every adapter of a journal: ``recorded = delivered + dead + pending``.

Everything is read from disk. The cursor holds the delivered and dead counts; pending events are those after the cursor,
counted by frames and checksums without decoding. So all processes that read a journal get the same counts.
"""

import os
import threading
from collections.abc import Mapping
from typing import Final

import msgspec

from evsys_bus.codec import error_text
from evsys_bus.delivery.followed import Terms
from evsys_bus.delivery.roster import roster
from evsys_bus.delivery.states import read_state
from evsys_bus.errors import JournalVersionError
from evsys_bus.journal import Cursors, Disk, OsDisk, Place, frame, layout
from evsys_bus.journal.frame import Damage, Frame
from evsys_bus.journal.layout import SegmentName
from evsys_bus.journal.scanning import SegmentNames, SegmentScan
from evsys_bus.tasks import DeliveryStatus


class Accounts:
    """Reads the delivery progress of one journal repeatedly; events are counted only once.

    Args:
        directory: The journal.
        disk: The file system.
    """

    def __init__(self, directory: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self._directory: Final = os.fspath(directory)
        self._disk: Final = OsDisk() if disk is None else disk
        self._pending: dict[str, Pending] = {}
        self.unreadable: OSError | None = None
        """The error of the last `read`; None if it could read everything."""

    def read(self, known: Mapping[str, int] | None = None) -> list[DeliveryStatus]:
        """The status of every adapter that has a cursor, a spec or a courier, sorted by name.

        An adapter whose files cannot be read has the state ``unknown``.

        Args:
            known: The last sequence of each stream that the calling process writes; these streams are not read.
        """
        disk, where = self._disk, self._directory
        terms: dict[str, Terms] = {}
        names: set[str] = set()
        self.unreadable = None
        for look in (
            lambda: terms.update({each.name: each.terms for each in roster(where, disk)}),
            lambda: names.update(layout.followers(disk, where)),
            lambda: names.update(_with_state(disk, where)),
        ):
            try:
                look()
            except OSError as error:
                self.unreadable = error
        names |= terms.keys()
        if (error := self.unreadable) is not None:  # the names found may be incomplete
            return [self.unknown(name, error) for name in sorted(names or {"(unknown)"})]
        return [self._known_or_not(name, terms.get(name, Terms()), known or {}) for name in sorted(names)]

    def unknown(self, name: str, error: OSError) -> DeliveryStatus:
        """The status of an adapter whose files cannot be read now."""
        why = f"its files cannot be read: {error_text(error)}"
        fix = f"run evsys-bus status {self._directory} once they can be read"
        return DeliveryStatus(name, state="unknown", error=why, fix=fix)

    def _known_or_not(self, name: str, terms: Terms, known: Mapping[str, int]) -> DeliveryStatus:
        try:
            return self._account(name, terms, known)
        except OSError as error:
            self.unreadable = error
            return self.unknown(name, error)

    def unbooked(self, name: str, terms: Terms) -> DeliveryStatus:
        """The status of an adapter whose files could not be written: all of its events are pending."""
        pending = Pending(self._directory, terms.ranks, self._disk).count({})
        fix = "read the log; the disk may be full, or the name too long"
        error = "its cursor and state cannot be written"
        return DeliveryStatus(name, recorded=pending, pending=pending, state="failed", error=error, fix=fix)

    def _account(self, name: str, terms: Terms, known: Mapping[str, int]) -> DeliveryStatus:
        disk, where = self._disk, self._directory
        # First the state, then the cursor, last the journal: what changes meanwhile is counted as pending.
        state = read_state(disk, where, name)
        busy = disk.is_locked(layout.courier_file(where, name, "lock"))
        places = Cursors(where, disk).look(name).streams
        delivered, dead = sum(each.delivered for each in places.values()), sum(each.dead for each in places.values())
        if name not in self._pending:
            self._pending[name] = Pending(where, terms.ranks, disk)
        pending = self._pending[name].count(places, known)
        state = state or DeliveryStatus()
        return msgspec.structs.replace(
            state,
            name=name,
            recorded=delivered + dead + pending,
            delivered=delivered,
            dead=dead,
            pending=pending,
            owed=min(state.owed, delivered),
            absent=self._pending[name].absent(places),
            busy=busy,
        )


def accounts(directory: str | os.PathLike[str], disk: Disk | None = None) -> list[DeliveryStatus]:
    """The status of every adapter that has a cursor, a spec or a courier, sorted by name; counts all events again."""
    return Accounts(directory, disk).read()


def _with_state(disk: Disk, directory: str) -> list[str]:
    try:
        names = disk.names(f"{directory}/{layout.COURIERS}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [layout.follower_of(name.removesuffix(_STATE)) for name in names if name.endswith(_STATE)]


class Pending:
    """Counts the events after a cursor; reads each record only once. Safe from any thread.

    Args:
        directory: The journal.
        ranks: The ranks whose streams are counted, besides those in the cursor; None for all.
        disk: The file system.
    """

    def __init__(self, directory: str, ranks: tuple[int, ...] | None, disk: Disk) -> None:
        self._directory: Final = directory
        self._ranks: Final = ranks
        self._disk: Final = disk
        self._lock: Final = threading.Lock()
        self._ahead: dict[str, _Ahead] = {}

    def count(self, places: Mapping[str, Place], known: Mapping[str, int] = {}) -> int:
        """The number of events after these positions, which must not move back between calls.

        Args:
            places: Position by stream.
            known: The last sequence of streams without gaps, which need not be read.
        """
        with self._lock:
            served = {*self._served(), *places}
            return sum(self._count(name, places.get(name, Place()), known.get(name)) for name in served)

    def absent(self, places: Mapping[str, Place]) -> int:
        """The number of events that were removed from the journal before the adapter could get them."""
        with self._lock:
            return sum(self._absent(name, places.get(name, Place())) for name in {*self._served(), *places})

    def _served(self) -> list[str]:
        names = layout.streams(self._disk, self._directory)
        return [name for name in names if self._ranks is None or layout.rank_of(name) in self._ranks]

    def _absent(self, stream: str, place: Place) -> int:
        removed = layout.removed_in_front(layout.segments(self._disk, f"{self._directory}/{stream}"))
        return max(0, max(place.sequence, removed) - place.delivered - place.dead)

    def _count(self, stream: str, place: Place, last: int | None) -> int:
        if last is not None and place.sequence:
            return max(0, last - place.sequence)
        ahead = self._ahead.get(stream)
        if ahead is None or ahead.is_removed():
            ahead = self._ahead[stream] = _Ahead(self._disk, f"{self._directory}/{stream}", place)
        return max(0, ahead.count() - (place.delivered + place.dead - ahead.done))


class _Ahead:
    """Counts the events of one stream after a position, incrementally."""

    def __init__(self, disk: Disk, folder: str, place: Place) -> None:
        self.done: Final = place.delivered + place.dead
        """Events that were delivered or dead where counting started."""
        self._disk: Final = disk
        self._folder: Final = folder
        self._last = place.sequence
        self._found = 0
        self._names: Final = SegmentNames(disk, folder)
        self._at: SegmentName | None = None
        self._scan: SegmentScan | None = None
        self._expected = 1
        self._suspect = -1

    def count(self) -> int:
        """The number of events found so far, including new ones."""
        while True:
            if self._scan is not None:
                self._read_on(self._scan)
            following = self._following()
            if following is None:
                return self._found
            if self._scan is not None:
                self._read_on(self._scan)  # it may have grown before the next segment was started
            self._at = following
            self._scan = SegmentScan(self._disk, f"{self._folder}/{following}")
            self._expected, self._suspect = following.first, -1

    def is_removed(self) -> bool:
        """Whether the segment that was read last is gone, and with it events that were counted but not delivered."""
        return self._at is not None and self._at not in layout.segments(self._disk, self._folder)

    def _following(self) -> SegmentName | None:
        return self._names.holding(self._last + 1) if self._at is None else self._names.after(self._at)

    def _read_on(self, scan: SegmentScan) -> None:
        try:
            while not self._read(scan):
                pass
        except (OSError, JournalVersionError):
            pass  # counted once it can be read

    def _read(self, scan: SegmentScan) -> bool:
        """Count the next frames; False if the same offset has to be read again."""
        for piece in scan.count(self._expected):
            if isinstance(piece, int):
                self._found += piece - max(self._expected, self._last + 1) if piece > self._last + 1 else 0
                self._last = max(self._last, piece - 1)
                self._expected = piece
            elif isinstance(piece, Frame) and piece.kind == frame.EVENT:
                self._expected = max(self._expected, piece.sequence + 1)
                if piece.sequence > self._last:
                    self._found += 1
                    self._last = piece.sequence
            elif isinstance(piece, Damage) and scan.offset != self._suspect:
                self._suspect = scan.offset  # perhaps read while it was being written; see `Tail`
                scan.offset -= piece.length
                return False
        return True


_STATE: Final = ".state.json"
