"""Cursors: the position of each adapter in each stream, in one small file per adapter that is replaced atomically."""

from typing import Any, Final, NamedTuple

import msgspec

from evsys_bus.diagnostics import FaultLog
from evsys_bus.disk import Disk, OsDisk
from evsys_bus.files import load_file
from evsys_bus.journal import layout
from evsys_bus.where import decode_json, encode_json


class Place(msgspec.Struct, frozen=True, array_like=True):
    """The position of an adapter in one stream."""

    sequence: int = 0
    """Of the last event that the adapter is finished with: delivered, or a dead letter."""
    delivered: int = 0
    dead: int = 0
    """How many of the events up to the position became dead letters."""


class Cursor(msgspec.Struct, omit_defaults=True):
    """The positions of one adapter in all streams, with the state that belongs to them."""

    streams: dict[str, Place] = {}
    steps: dict[str, int] = {}
    """The largest step that was delivered, by run, for the runs that are open at this position."""
    mark: Any = None
    """What the adapter's ``mark()`` returned at this position: plain data."""
    kind: str = ""
    """The kind of adapter that wrote the mark. Empty if unknown; any adapter with this name may then use it."""

    def place(self, stream: str) -> Place:
        """The position in this stream."""
        return self.streams.get(stream, _START)


class Cursors:
    """Reads and writes the cursors of one journal. Only one process at a time may save the cursor of an adapter."""

    def __init__(self, directory: str, disk: Disk | None = None) -> None:
        self._directory = directory
        self._disk = OsDisk() if disk is None else disk

    def followers(self) -> list[str]:
        """The names of all adapters that have a cursor."""
        return layout.followers(self._disk, self._directory)

    def registered(self) -> set[str]:
        """The names of all adapters that have a cursor or a spec. Retention waits for these.

        Raises:
            OSError: A folder cannot be listed now.
        """
        found: set[str] = set()
        for folder, suffix in ((layout.CURSORS, _CURSOR), (layout.COURIERS, _SPEC)):
            try:
                names = self._disk.names(f"{self._directory}/{folder}")
            except FileNotFoundError:
                continue
            found |= {layout.follower_of(name.removesuffix(suffix)) for name in names if name.endswith(suffix)}
        return found

    def load(self, follower: str) -> Cursor:
        """Load a cursor. A missing one starts at the beginning of every stream.

        An unreadable one counts as missing: what was delivered is delivered again.
        """
        try:
            return self.look(follower)
        except OSError as error:
            _FAULTS.warn("journal.cursor_unreadable", self._path(follower), error=error, path=self._path(follower))
            return Cursor()

    def look(self, follower: str) -> Cursor:
        """Load a cursor without changing any file. A damaged one counts as missing.

        Raises:
            OSError: The file cannot be read now.
        """
        return self._read(follower, set_aside=False)

    def read(self, follower: str) -> Cursor:
        """Load a cursor in order to save it later. A damaged file is quarantined.

        Raises:
            OSError: The file cannot be read now. Do not start from the beginning because of this.
        """
        return self._read(follower, set_aside=True)

    def place_of(self, follower: str, stream: str) -> int:
        """The sequence of the last event in the stream that the adapter is finished with; 0 without a cursor.

        Raises:
            OSError: The cursor cannot be read now.
        """
        return self._read(follower, set_aside=False).place(stream).sequence

    def terms_of(self, follower: str) -> "Terms":
        """Load what the journal needs from the adapter's spec. Without a valid spec it may receive every stream.

        Raises:
            OSError: The spec cannot be read now.
        """
        path = layout.courier_file(self._directory, follower, "spec.json")
        spec = load_file(
            path, lambda data: decode_json(data, _Spec), set_aside=False, most_bytes=_MOST_BYTES, disk=self._disk
        )
        return Terms(None) if spec is None else Terms(spec.terms.ranks, spec.left_at)

    def _read(self, follower: str, *, set_aside: bool) -> Cursor:
        path = self._path(follower)
        found = load_file(
            path, lambda data: decode_json(data, Cursor), set_aside=set_aside, most_bytes=_MOST_BYTES, disk=self._disk
        )
        return Cursor() if found is None else found

    def _path(self, follower: str) -> str:
        return layout.cursor_file(self._directory, follower)

    def save(self, follower: str, cursor: Cursor) -> None:
        """Save the cursor. It is synced to disk when this returns."""
        self._disk.make_directory(f"{self._directory}/{layout.CURSORS}")
        self._disk.replace(self._path(follower), encode_json(cursor))

    def furthest(self, stream: str) -> int:
        """The largest sequence in this stream that any adapter is finished with; 0 if there is none."""
        return max((self.load(each).place(stream).sequence for each in self.followers()), default=0)


class Terms(NamedTuple):
    """The part of an adapter's spec that the journal needs."""

    ranks: tuple[int, ...] | None
    """The ranks whose streams it receives; None for all."""
    left_at: float | None = None
    """When the adapter was removed from the config, in seconds since the epoch; None while it is in use."""

    def serves(self, stream: str) -> bool:
        """Whether the adapter receives this stream."""
        return self.ranks is None or layout.rank_of(stream) in self.ranks


class _SpecTerms(msgspec.Struct, frozen=True):
    ranks: tuple[int, ...] | None = (0,)


class _Spec(msgspec.Struct):
    terms: _SpecTerms = _SpecTerms()
    left_at: float | None = None


_START: Final = Place()
_FAULTS: Final = FaultLog(every_seconds=60.0)
_MOST_BYTES: Final = 16 << 20
_CURSOR: Final = ".json"
_SPEC: Final = ".spec.json"
