"""A file that reserves disk space, to be released for the end events when the disk is full."""

from typing import Final

from evsys_bus.disk import Disk


class Reserve:
    """Disk space that is reserved or not."""

    def __init__(self, disk: Disk, path: str, size: int) -> None:
        self.size: Final = size
        self.held = False
        self._disk = disk
        self._path = path

    def hold(self) -> None:
        """Reserve the space if it is available. A full disk is not an error here."""
        if self.held or not self.size:
            return
        try:
            self._drop()
            file = self._disk.open_append(self._path)
            try:
                self.held = self._disk.write(file, bytes(self.size)) == self.size
            finally:
                self._disk.close(file)
            if not self.held:
                self._drop()
        except OSError:
            self.held = False

    def free(self) -> bool:
        """Release the space. Returns whether there was any."""
        held, self.held = self.held, False
        try:
            self._drop()
        except OSError:
            return False
        return held

    def _drop(self) -> None:
        try:
            self._disk.remove(self._path)
        except FileNotFoundError:
            pass
