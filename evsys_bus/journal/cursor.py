"""Cursors: how far each follower has got in each stream, in one small file each, replaced whole or not at all."""

import msgspec

from evsys_bus.diagnostics import log
from evsys_bus.journal import layout
from evsys_bus.journal.disk import Disk, OsDisk


class Cursors:
    """The cursors of one journal. One process at a time moves a given follower's."""

    def __init__(self, directory: str, disk: Disk | None = None) -> None:
        self._directory = directory
        self._disk = OsDisk() if disk is None else disk

    def followers(self) -> list[str]:
        """Who has one."""
        return layout.followers(self._disk, self._directory)

    def load(self, follower: str) -> dict[str, int]:
        """The sequence of the last event that the follower is done with, by stream.

        A cursor that cannot be read counts as none: what was delivered since is delivered again.
        """
        path = layout.cursor_file(self._directory, follower)
        try:
            return _read(self._disk.read(path, 0, _MOST_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log().warning("journal.cursor_unreadable", path=path, exc_info=error)
            return {}

    def save(self, follower: str, positions: dict[str, int]) -> None:
        """Have the follower's cursor stand there, on the medium when this returns."""
        self._disk.make_directory(f"{self._directory}/{layout.CURSORS}")
        self._disk.replace(layout.cursor_file(self._directory, follower), _write(positions))

    def passed(self, stream: str) -> int | None:
        """The sequence in this stream that every follower is done with; None where there are no followers."""
        return min((self.load(each).get(stream, 0) for each in self.followers()), default=None)

    def furthest(self, stream: str) -> int:
        """The sequence in this stream that some follower is done with; 0 where none is."""
        return max((self.load(each).get(stream, 0) for each in self.followers()), default=0)


_MOST_BYTES = 16 << 20
_read = msgspec.json.Decoder(dict[str, int]).decode
_write = msgspec.json.Encoder().encode
