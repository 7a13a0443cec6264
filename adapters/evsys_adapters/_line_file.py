"""Files of lines that survive full disks, kills and resumes: what csv_metrics and local_logger write through.

`LineFile` owns the bytes of one file, `Backlog` the writes that a disk refused. What a line means is their users'
business.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

from evsys_adapters._marks import Marks
from evsys_bus.diagnostics import FaultLog, log

_BLOCK: Final = 1 << 16
_MAX_WAITING_BYTES: Final = 16 << 20


class LineFile:
    """A file of whole lines with one writer.

    Nothing is touched before the first call; the folder is made when it is needed. The file stays open between writes
    (closing costs a round trip on network file systems); one that was removed meanwhile is made anew. A last line
    without an end, torn by a kill, is cut off when the file is opened. Every method may raise OSError.

    With ``marks``, a file goes back to how it was at the last of them after a crash.
    """

    def __init__(self, path: Path, marks: Marks | None = None) -> None:
        self.path = path
        self._key = os.path.abspath(path)  # noqa: PTH100  # as the marks call it
        self._marks = Marks() if marks is None else marks
        self._settled = False
        self._fd: int | None = None

    def settle(self) -> None:
        """Undo what a crashed process left behind its last mark; every method does so before it looks at the file."""
        if not self._settled:
            self._marks.settle(self._key)
            self._settled = True

    def append(self, lines: bytes, *, head: bytes = b"") -> int:
        """Append whole lines by one ``os.write``: all of them, or none and OSError.

        ``head`` goes in front if the file is empty. Returns the size of the file before.
        """
        fd = self._open()
        self._marks.appending(self._key)
        size = os.fstat(fd).st_size
        rest = memoryview(lines if size else head + lines)
        try:
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            if rest:
                os.ftruncate(fd, size)
        return size

    def replace_tail(self, start: int, lines: bytes) -> None:
        """Put ``lines`` where the last lines, from byte ``start`` on, were, in one write.

        Shorter lines are padded with spaces. On OSError the old lines are gone, and the file ends at ``start``.
        """
        size = os.fstat(self._open()).st_size
        lines = lines[:-1].ljust(size - start - 1) + b"\n"
        if self._marks.protects(self._key, start):
            self.rewrite(chain(self._head(start), [lines]))
            return
        self._marks.appending(self._key)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(start)
            rest = memoryview(lines)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            finally:
                if rest:
                    file.truncate(start)

    def lines(self) -> Iterator[bytes]:
        """Every whole line, its end included; none if there is no file."""
        self.settle()
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            yield from (line for line in file if line.endswith(b"\n"))

    def rewrite(self, lines: Iterable[bytes]) -> int:
        """Replace the whole file in one move, and return its new size; until then, and on an error, it is as it was."""
        self._shut()
        self.settle()
        target = self.path.resolve()  # a link stays a link
        beside = target.with_name(f".{target.name}.new")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave an empty file where a full one was
                size = file.tell()
            self._marks.replacing(self._key)
            beside.replace(target)
            self._marks.replaced(self._key)
        finally:
            beside.unlink(missing_ok=True)
        return size

    def keep(self, wanted: Callable[[bytes], bool]) -> None:
        """Cut the lines that are not wanted; a file that loses none is left alone."""
        if not all(map(wanted, self.lines())):
            self.rewrite(filter(wanted, self.lines()))

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        self._shut()
        self._marks.closed(self._key)

    def _shut(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _open(self) -> int:
        if self._fd is not None:
            if os.fstat(self._fd).st_nlink:
                return self._fd
            self._shut()
        self.settle()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._cut_torn(self._fd)
        return self._fd

    def _cut_torn(self, fd: int) -> None:
        _cut_torn_line(fd)

    def _head(self, size: int) -> Iterator[bytes]:
        """The first bytes of the file."""
        with self.path.open("rb") as file:
            while size and (block := file.read(min(size, _BLOCK))):
                size -= len(block)
                yield block


def _cut_torn_line(fd: int) -> None:
    size = start = os.fstat(fd).st_size
    newline = -1
    while start and newline < 0:
        end, start = start, max(0, start - _BLOCK)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
    whole = start + newline + 1
    if whole < size:
        os.ftruncate(fd, whole)


class Backlog:
    """Writes to one file, in order; what the disk refuses waits in memory and is tried again with the next write.

    Bounded: beyond ``max_bytes`` the newest write is given up. The first refusal is logged at once, repeated ones at
    most once a second with their count, and so is every write given up.
    """

    def __init__(self, file: str, *, max_bytes: int = _MAX_WAITING_BYTES) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self._faults = FaultLog()
        self._waiting: deque[tuple[Callable[[], object], int]] = deque()
        self._bytes = 0
        self.lost = 0
        """Writes given up, because too much was waiting."""

    @property
    def waiting(self) -> int:
        """Writes that the disk has refused so far."""
        return len(self._waiting)

    def write(self, action: Callable[[], object], size: int) -> None:
        """Run ``action`` after those that wait; one that raises OSError, having done nothing, is kept and run again.

        ``size`` is about how many bytes it holds on to. What else it raises is a bug, and reaches the caller.
        """
        troubled = bool(self._waiting)
        self._waiting.append((action, size))
        self._bytes += size
        self._run(troubled=troubled)
        if self._waiting and self._bytes > self._max_bytes:
            self._bytes -= self._waiting.pop()[1]
            self.lost += 1
            self._faults.warn("rows.lost", "full", file=self._file, lost=self.lost, waiting=len(self._waiting))

    def settle(self) -> None:
        """Try once more to write what waits, for a mark: what it says to be on the medium must be there.

        Raises:
            OSError: The disk still refuses, or has refused so much that rows were given up.
        """
        if self._waiting:
            self._run(troubled=True)
        if self._waiting or self.lost:
            raise OSError(errno.EAGAIN, f"{len(self._waiting)} writes wait, {self.lost} were given up", self._file)

    def flush(self) -> None:
        """Try once more to write what waits, and log how much is left."""
        if self._waiting:
            self._run(troubled=True)
        self._faults.flush()
        if self._waiting:
            log().warning("rows.unwritten", file=self._file, waiting=len(self._waiting), lost=self.lost)

    def _run(self, *, troubled: bool) -> None:
        while self._waiting:
            action, size = self._waiting.popleft()
            self._bytes -= size
            try:
                action()
            except OSError as error:
                self._waiting.appendleft((action, size))
                self._bytes += size
                self._faults.warn(
                    "rows.waiting", "refused", file=self._file, why=str(error), waiting=len(self._waiting)
                )
                return
        if troubled:
            log().info("rows.written_again", file=self._file, lost=self.lost)
