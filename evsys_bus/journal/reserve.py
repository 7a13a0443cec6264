"""A file that reserves disk space, to be released for the end events when the disk is full."""

from typing import Final

from evsys_bus.disk import Disk


class DiskReserve:
    """Disk space that is reserved or not."""

    def __init__(self, disk: Disk, path: str, size: int) -> None:
        self.size: Final = size
        self.is_allocated = False
        self._disk = disk
        self._path = path

    def allocate(self) -> None:
        """Reserve the space if it is available. A full disk is not an error here."""
        if self.is_allocated or not self.size:
            return
        try:
            self._remove_file()
            file = self._disk.open_append(self._path)
            try:
                self.is_allocated = self._disk.write(file, bytes(self.size)) == self.size
            finally:
                self._disk.close(file)
            if not self.is_allocated:
                self._remove_file()
        except OSError:
            self.is_allocated = False

    def release(self) -> bool:
        """Release the space. Returns whether there was any."""
        was_allocated, self.is_allocated = self.is_allocated, False
        try:
            self._remove_file()
        except OSError:
            return False
        return was_allocated

    def _remove_file(self) -> None:
        try:
            self._disk.remove(self._path)
        except FileNotFoundError:
            pass
