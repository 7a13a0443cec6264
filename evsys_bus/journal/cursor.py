"""Cursors: how far each follower has got in each stream, in one small file each, replaced whole or not at all."""

from typing import Any, Final

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.journal import layout
from evsys_bus.journal.disk import Disk, OsDisk


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

    def load(self, follower: str) -> Cursor:
        """Where the follower's cursor stands; at the beginning, where it has none.

        A cursor that cannot be read counts as none: what was delivered since is delivered again.
        """
        try:
            return self.read(follower)
        except OSError as error:
            log().warning("journal.cursor_unreadable", path=self._path(follower), exc_info=error)
            return Cursor()

    def read(self, follower: str) -> Cursor:
        """As `load`, for those who move it: a cursor that is there and cannot be read now is no reason to begin anew.

        Raises:
            OSError: It cannot be read now.
        """
        try:
            return _read(self._disk.read(self._path(follower), 0, _MOST_BYTES))
        except FileNotFoundError:
            return Cursor()
        except msgspec.DecodeError as error:
            log().warning("journal.cursor_unreadable", path=self._path(follower), exc_info=error)
            return Cursor()

    def _path(self, follower: str) -> str:
        return layout.cursor_file(self._directory, follower)

    def save(self, follower: str, cursor: Cursor) -> None:
        """Have the follower's cursor stand there, on the medium when this returns."""
        self._disk.make_directory(f"{self._directory}/{layout.CURSORS}")
        self._disk.replace(self._path(follower), _write(cursor))

    def passed(self, stream: str) -> int | None:
        """The sequence in this stream that every follower it is served to is done with; None where there are none."""
        return min((self.load(each).place(stream).sequence for each in self.served(stream)), default=None)

    def served(self, stream: str) -> dict[str, float | None]:
        """Who is served this stream, and since when each is not followed any more; None for those who are."""
        rank, found = layout.rank_of(stream), dict[str, float | None]()
        for follower in self.followers():
            try:
                path = layout.courier_file(self._directory, follower, "spec.json")
                spec = _spec(self._disk.read(path, 0, _MOST_BYTES))
            except (OSError, msgspec.DecodeError):
                spec = _Spec(_Terms(None))  # it may want all of it
            if spec.terms.ranks is None or rank in spec.terms.ranks:
                found[follower] = spec.left_at
        return found

    def furthest(self, stream: str) -> int:
        """The sequence in this stream that some follower is done with; 0 where none is."""
        return max((self.load(each).place(stream).sequence for each in self.followers()), default=0)


class _Terms(msgspec.Struct, frozen=True):
    ranks: tuple[int, ...] | None = (0,)


class _Spec(msgspec.Struct):
    """What of a spec concerns the journal: whose streams are served, and to whom not any more."""

    terms: _Terms = _Terms()
    left_at: float | None = None


_START: Final = Place()
_MOST_BYTES: Final = 16 << 20
_read: Final = msgspec.json.Decoder(Cursor).decode
_write: Final = msgspec.json.Encoder().encode
_spec: Final = msgspec.json.Decoder(_Spec).decode
