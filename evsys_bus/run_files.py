"""The files of a run: rows, its journal's directory, its last error, and the lock on its directory.

None of them raises into the training once it runs: a row that cannot be written waits in memory, and a failed write is
logged.
"""

import errno
import functools
import os
import platform
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.codec import json_line
from evsys_bus.codec.redact import Redaction, redact_text
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk
from evsys_bus.errors import JournalOpenError, TrainingError
from evsys_bus.files import DECODE_ERRORS, AppendFile, Backlog, FileLock, open_binary, replace_file
from evsys_bus.journal import layout
from evsys_bus.journal.stream_lock import check_file_system

Row = dict[str, Any]
"""One row."""

JOURNAL_DIR: Final = "journal"


def journal_directory(folder: Path) -> Path:
    """Return where the runs of a folder are recorded: in the folder itself, if its file system can hold a journal.

    Otherwise, as on a network file system without locks, on a local disk, with one WARNING. The folder need not exist;
    then the nearest folder above it is tried.
    """
    folder = folder.absolute()
    own, substitute = folder / JOURNAL_DIR, Path(layout.local_substitute(str(folder / JOURNAL_DIR)))
    with suppress(OSError, ValueError):  # opening the journal reports it
        for directory in (own, substitute):
            if layout.is_journal(OsDisk(), str(directory)):
                return directory
        existing = next(each for each in (folder, *folder.parents) if each.is_dir())
        if not _can_hold_journal(existing, folder, substitute):
            return substitute
    return own


@functools.cache
def _can_hold_journal(existing: Path, folder: Path, substitute: Path) -> bool:
    """Return whether the file system of an existing directory can hold the journal of a folder; the WARNING if not."""
    try:
        check_file_system(OsDisk(), str(existing))
    except JournalOpenError as error:
        log().warning("journal.elsewhere", folder=str(folder), journal=str(substitute), why=error.what)
        return False
    return True


_decode = msgspec.json.Decoder(Row).decode


class RowFile:
    """A file of JSON objects, one per line, with one writer.

    A row that cannot be written, because the disk is full or the folder was removed, stays in memory and is written, in
    order, before the next one. `flush` closes the file, and the next row opens it again.

    Args:
        path: The file. Its folder is not created.
        max_pending_bytes: Limit of the rows in memory. Further ones are dropped and counted.
    """

    def __init__(self, path: Path, *, max_pending_bytes: int = 16 << 20, redaction: Redaction | None = None) -> None:
        self.path = path
        self._redaction = redaction
        self._file = AppendFile(path, make_folder=False, disk=OsDisk())
        self._backlog = Backlog(str(path), max_bytes=max_pending_bytes)

    @property
    def pending(self) -> int:
        """Number of rows in memory that could not be written yet."""
        return self._backlog.pending

    @property
    def lost(self) -> int:
        """Number of rows dropped because too many were pending."""
        return self._backlog.lost

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row, with values of any type (see `evsys_bus.codec.encode`); never raises."""
        line = json_line(row, self._redaction) + b"\n"
        self._backlog.write(partial(self._file.append, line), len(line))

    def log_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the row of a step; its step is the first key, and overrides a metric of that name."""
        self.append({"step": step} | {**metrics} | {"step": step})

    def flush(self) -> None:
        """Try to write the pending rows, log how many remain or were dropped, and close the file."""
        self._backlog.flush()
        with suppress(OSError):  # every row was written, or is pending
            self._file.close()

    def rows(self) -> Iterator[Row]:
        """Iterate over the rows, in order, skipping torn and damaged lines. A missing file has no rows."""
        for line in self._lines():
            row = _parse(line)
            if row is not None:
                yield row

    def retain(self, predicate: Callable[[Row], bool]) -> int:
        """Remove the rows for which ``predicate`` is false, and torn or damaged lines; return how many were removed.

        The file is replaced atomically, and not touched if there is nothing to remove.

        Raises:
            OSError: The new file could not be written; the old one is unchanged.
        """
        lines = list(self._lines())
        retained = [line for line in lines if (row := _parse(line)) is not None and predicate(row)]
        if len(retained) < len(lines):
            replace_file(self.path, b"".join(retained), mode=0o666, follow_link=True, disk=OsDisk())
        return len(lines) - len(retained)

    def _lines(self) -> Iterator[bytes]:
        try:
            file = open_binary(self.path, OsDisk())
        except FileNotFoundError:
            return
        with file:
            yield from file


def _parse(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        return _decode(line)
    except DECODE_ERRORS:
        return None


ERROR_FILE: Final = "error.txt"
OUTPUT_FILE: Final = "output.log"
MAX_CHARS: Final = 64_000
"""A longer traceback is cut in the middle; the end gets twice as many characters as the beginning."""


def write_error_file(run_dir: Path, error: BaseException) -> Path | None:
    """Write the traceback atomically and return the path; if that fails, log a warning and return None."""
    path = run_dir / ERROR_FILE
    try:
        replace_file(
            path, redact_text(_truncate(_format_traceback(error))).encode(errors="backslashreplace"), mode=0o666
        )
    except (OSError, MemoryError) as write_error:
        log().warning("run.error_unwritten", file=str(path), error=str(write_error))
        return None
    return path


def remove_error_file(run_dir: Path) -> None:
    """Remove the error file of an earlier attempt, after the run completed."""
    try:
        (run_dir / ERROR_FILE).unlink(missing_ok=True)
    except OSError as error:
        log().warning("run.error_stale", file=str(run_dir / ERROR_FILE), error=str(error))


def _format_traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as failure:  # raised by the error's own code
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"{frames}{type(error).__name__}: <no message: {type(failure).__name__} while formatting it>\n"


def _truncate(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    head = MAX_CHARS // 3
    tail = MAX_CHARS - head
    return f"{text[:head]}\n... {len(text) - MAX_CHARS} characters are left out here ...\n{text[-tail:]}"


LOCK_FILE: Final = ".lock"
_MAX_OWNER_BYTES: Final = 200


@contextmanager
def lock_folder(folder: Path, description: str) -> Generator[None]:
    """Create the directory if necessary, and lock it until the block ends.

    On a file system without locks, a warning is logged and nothing is locked.

    Args:
        folder: The directory.
        description: Name of the directory in error messages: ``the run's directory``.

    Raises:
        TrainingError: From an OSError: the directory is locked by another process, or cannot be written.
    """
    path, disk = folder / LOCK_FILE, OsDisk()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire_exclusive(path, disk=disk)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, or not encodable
        raise unwritable_error(folder, description, error) from error
    if lock is None:
        owner = b""
        with suppress(OSError):  # some file systems do not let a locked file be read
            owner = disk.read(str(path), 0, _MAX_OWNER_BYTES)
        raise TrainingError(
            f"{description} {folder} is in use by {owner.decode(errors='replace').strip() or 'another process'}",
            fix="wait until that has ended, or choose another output_dir",
        ) from BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
    if not lock.is_held:
        log().warning("folder.not_locked", folder=str(folder), error=os.strerror(errno.ENOLCK))
    with lock:
        with suppress(OSError):  # a full disk: the lock works, but cannot name its owner
            lock.write(f"process {os.getpid()} on {platform.node()}\n".encode(), sync=False)
        try:
            yield
        finally:
            with suppress(OSError):  # in a forked child it is not held
                lock.write(b"", sync=False)


def unwritable_error(folder: Path, description: str, error: OSError | ValueError) -> TrainingError:
    """Return the error for a directory that cannot be written; raise it from ``error``."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return TrainingError(f"{description} {folder} cannot be written: {reason}", fix="choose another output_dir")
