"""Cursors: how far each follower has got in each stream, in one small file each, replaced whole or not at all."""

from typing import Any, Final, NamedTuple

import msgspec

from evsys_bus.diagnostics import FaultLog
from evsys_bus.disk import Disk, OsDisk
from evsys_bus.files import load_file
from evsys_bus.journal import layout
from evsys_bus.where import decode_json, encode_json


class Place(msgspec.Struct, frozen=True, array_like=True):
    """How far a follower has got in one stream."""

    sequence: int = 0
    """Of the last event that it is done with."""
    delivered: int = 0
    dead: int = 0
    """Of those that it is done with: how many it did not take, and never will."""


class Cursor(msgspec.Struct, omit_defaults=True):
    """How far a follower has got; all of it is true of the same moment."""

    streams: dict[str, Place] = {}
    steps: dict[str, int] = {}
    """The largest step that was delivered, by run, for the runs that are open there."""
    mark: Any = None
    """How far what the follower wrote itself has got, in its own words. Any: plain data."""
    kind: str = ""
    """Whose words those are; empty where that is not known, and anybody of the follower's name takes the cursor on."""

    def place(self, stream: str) -> Place:
        """How far in this stream."""
        return self.streams.get(stream, _START)


class Cursors:
    """The cursors of one journal. One process at a time moves a given follower's."""

    def __init__(self, directory: str, disk: Disk | None = None) -> None:
        self._directory = directory
        self._disk = OsDisk() if disk is None else disk

    def followers(self) -> list[str]:
        """Who has one."""
        return layout.followers(self._disk, self._directory)

    def registered(self) -> set[str]:
        """Who has a cursor or a spec: whom retention waits for.

        Raises:
            OSError: That cannot be told now.
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
        """Where the follower's cursor stands; at the beginning, where it has none.

        A cursor that cannot be read counts as none: what was delivered since is delivered again.
        """
        try:
            return self.look(follower)
        except OSError as error:
            _FAULTS.warn("journal.cursor_unreadable", self._path(follower), error=error, path=self._path(follower))
            return Cursor()

    def look(self, follower: str) -> Cursor:
        """As `load`, for those who only ask.

        Raises:
            OSError: It cannot be read now.
        """
        return self._read(follower, set_aside=False)

    def read(self, follower: str) -> Cursor:
        """As `load`, for those who move it: a cursor that is there and cannot be read now is no reason to begin anew.

        What is damaged is set aside.

        Raises:
            OSError: It cannot be read now.
        """
        return self._read(follower, set_aside=True)

    def place_of(self, follower: str, stream: str) -> int:
        """The sequence of the last event in the stream that the follower is done with; 0 where no cursor says so.

        Raises:
            OSError: Its cursor cannot be read now.
        """
        return self._read(follower, set_aside=False).place(stream).sequence

    def terms_of(self, follower: str) -> "Terms":
        """What its spec says of whom it is served; where there is none, or a damaged one, it may want everything.

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
        """Have the follower's cursor stand there, on the medium when this returns."""
        self._disk.make_directory(f"{self._directory}/{layout.CURSORS}")
        self._disk.replace(self._path(follower), encode_json(cursor))

    def furthest(self, stream: str) -> int:
        """The sequence in this stream that some follower is done with; 0 where none is."""
        return max((self.load(each).place(stream).sequence for each in self.followers()), default=0)


class Terms(NamedTuple):
    """What of a follower's spec concerns the journal."""

    ranks: tuple[int, ...] | None
    """Whose streams it is served; None for all."""
    left_at: float | None = None
    """Since when no program follows it any more; None while one does."""

    def serves(self, stream: str) -> bool:
        """Whether it is served this stream."""
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
