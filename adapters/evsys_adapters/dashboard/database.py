"""The driver of a database: statements, transactions, and errors with their fix; and the driver of SQLite.

All that differs between database systems is here and in `database_postgres`: connecting, placeholders, types, what a
commit guarantees, and which errors mean a full disk, another writer or damage. SQL outside of these modules is what
SQLite and PostgreSQL have in common, with ``ON CONFLICT … DO UPDATE`` and ``?`` for a value; tables are defined with
the types ``INTEGER`` (64 bits), ``REAL`` (float64), ``TEXT`` (sorted by its bytes) and ``BLOB``.
"""

import os
import sqlite3
import stat
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias

from evsys_bus.errors import EvsysBusError
from evsys_bus.files import FileLock

Row: TypeAlias = tuple[Any, ...]
"""A row of a result; its columns have the types that the statement's author declared."""
Problem: TypeAlias = Literal["full", "locked", "corrupt", "newer", "foreign", "refused", "lost", "read only", "failed"]


class StoreError(EvsysBusError, OSError):
    """The database of the dashboard cannot be opened, read or written.

    Attributes:
        problem: ``full``, ``locked`` and ``lost`` (no connection to the server) pass; ``corrupt``, ``newer`` (written
            by a newer version), ``foreign`` (not a database of the dashboard) and ``refused`` (no permission, no such
            folder) need a person; ``read only`` is a store of which another process is the writer; ``failed`` is one
            that must be opened again after an error.
    """

    code = "EB907"

    def __init__(self, what: str, *, problem: Problem, fix: str, why: str | None = None) -> None:
        super().__init__(what, fix=fix, why=why)
        self.problem: Final = problem


def is_url(location: str) -> bool:
    """Return whether this is the URL of a PostgreSQL database, and not the path of a file."""
    return location.startswith(("postgresql://", "postgres://"))


_PRIVATE: Final = 0o600
_PERMISSIONS: Final = 0o777


class Database(Protocol):
    """A connection, used by one thread at a time. Every method raises `StoreError`."""

    @property
    def location(self) -> str:
        """The path of the file, or the URL without a password."""
        ...

    def query(self, sql: str, *args: object) -> list[Row]:
        """Run a statement and return its rows."""
        ...

    def execute(self, sql: str, *args: object) -> None:
        """Run a statement."""
        ...

    def executemany(self, sql: str, rows: Iterable[Row]) -> None:
        """Run a statement once for each row of values."""
        ...

    def define(self, statement: str) -> None:
        """Run a statement that creates or changes a table or an index, with the types of this module."""
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Commit the block's statements together, or none of them if it raises. A block inside a block joins it.

        What is committed survives a power cut.
        """
        ...

    def relaxed(self) -> AbstractContextManager[None]:
        """Commit the block's transactions without waiting for the disk.

        They survive the end of the process; a power cut may undo those since the last transaction outside such a block.
        """
        ...

    def notify(self, payload: str) -> None:
        """Send at most 7,999 bytes to those who read the database in other processes, when the transaction commits."""
        ...

    def tables(self) -> set[str]:
        """Return the names of the tables."""
        ...

    def size_bytes(self) -> int:
        """Return how much space it takes."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class NestedTransactions(ABC):
    """Transactions of a connection, of which a block inside a block joins the outer one."""

    def __init__(self) -> None:
        self._depth = 0
        self._undone = False

    @contextmanager
    def transaction(self) -> Generator[None]:
        """Commit the block's statements together, or none of them if it raises. A block inside a block joins it."""
        if self._depth == 0:
            self._begin()
            self._undone = False
        self._depth += 1
        completed = False
        try:
            yield
            completed = True
        finally:
            self._depth -= 1
            self._undone = self._undone or not completed
            if self._depth == 0:
                try:
                    if not self._undone:
                        self._commit()
                finally:
                    self._roll_back()
        if self._undone:  # the caller has caught the error of an inner block
            raise failed_in_part()

    @abstractmethod
    def _begin(self) -> None:
        """Begin a transaction."""

    @abstractmethod
    def _commit(self) -> None:
        """Commit it."""

    @abstractmethod
    def _roll_back(self) -> None:
        """End it if it was not committed. Must not raise: the error that led here is raised."""


def failed_in_part() -> StoreError:
    """Return the error of a transaction of which a part has failed."""
    return StoreError(
        "a part of this transaction has failed", problem="failed", fix="open the store again, and repeat it"
    )


class SqliteDatabase(NestedTransactions):
    """A database in one file, created if needed, which only one process at a time may open.

    Args:
        path: The file. Its folder must exist.
        timeout_seconds: How long a statement waits for another process that has locked the file.

    Raises:
        StoreError: It cannot be opened, or another process has it open.
    """

    def __init__(self, path: str | Path, *, timeout_seconds: float = 1.0) -> None:
        super().__init__()
        self.path: Final = Path(path)
        self._lock = self._acquire_lock()
        self._make_private()
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=timeout_seconds, isolation_level=None, check_same_thread=False
            )
        except sqlite3.Error as error:
            self._lock.release()
            raise self._store_error(error) from error
        with ExitStack() as stack:
            stack.callback(self.close)
            self.execute("PRAGMA page_size = 2048")  # 4096 take 8 % more space, and 40 % more is written
            self.execute("PRAGMA journal_mode = WAL")
            self.execute("PRAGMA wal_autocheckpoint = 4096")
            self.execute("PRAGMA secure_delete = OFF")  # where it is on, freed pages of the log are written once more
            self.execute("PRAGMA synchronous = FULL")
            self.execute("PRAGMA journal_size_limit = 16777216")
            self.execute("PRAGMA temp_store = MEMORY")
            self.execute("PRAGMA cache_size = -32768")
            stack.pop_all()

    @property
    def location(self) -> str:
        """The path of the file."""
        return str(self.path)

    def query(self, sql: str, *args: object) -> list[Row]:
        """Run a statement and return its rows."""
        try:
            return self._connection.execute(sql, args).fetchall()
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def execute(self, sql: str, *args: object) -> None:
        """Run a statement."""
        try:
            self._connection.execute(sql, args)
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def executemany(self, sql: str, rows: Iterable[Row]) -> None:
        """Run a statement once for each row of values."""
        try:
            self._connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise self._store_error(error) from error

    def define(self, statement: str) -> None:
        """Run a statement that creates or changes a table or an index."""
        self.execute(statement)

    @contextmanager
    def relaxed(self) -> Generator[None]:
        """Commit the block's transactions without waiting for the disk. It must not begin inside a transaction."""
        self.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self.execute("PRAGMA synchronous = FULL")

    def notify(self, payload: str) -> None:
        """Do nothing: no other process reads the file."""

    def tables(self) -> set[str]:
        """Return the names of the tables."""
        return {name for (name,) in self.query("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def size_bytes(self) -> int:
        """Return the size of the file and of its write-ahead log."""
        return sum(_size(self.path.with_name(self.path.name + suffix)) for suffix in ("", "-wal"))

    def close(self) -> None:
        """Close the connection. A transaction that is open is rolled back."""
        try:
            self._connection.close()
        except sqlite3.Error as error:
            raise self._store_error(error) from error
        finally:
            self._lock.release()

    def _begin(self) -> None:
        self.execute("BEGIN IMMEDIATE")

    def _commit(self) -> None:
        self.execute("COMMIT")

    def _roll_back(self) -> None:
        if self._connection.in_transaction:  # a full disk may have ended it already
            try:
                self._connection.execute("ROLLBACK")
            except sqlite3.Error:
                pass  # the error that led here is raised; an unfinished transaction is undone when the file is opened

    def _make_private(self) -> None:
        """Let only its user read the file, and what SQLite creates beside it: home folders may be open to others."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _PRIVATE)
            try:
                mode = os.fstat(file).st_mode
                if stat.S_ISREG(mode) and mode & ~_PRIVATE & _PERMISSIONS:  # not of a device that was named by mistake
                    os.fchmod(file, _PRIVATE)
            finally:
                os.close(file)
        except OSError:
            pass  # connecting fails with the reason; and a file of another owner stays as it is

    def _acquire_lock(self) -> FileLock:
        path = self.path.with_name(f"{self.path.name}.lock")
        try:
            lock = FileLock.acquire_exclusive(path)
        except OSError as error:
            raise StoreError(
                f"the database {self.path} cannot be opened",
                problem="refused",
                why=f"{path.name}: {error.strerror}",
                fix="give a path in a folder that exists and that you may write",
            ) from error
        if lock is None:
            raise StoreError(
                f"the database {self.path} is open in another process",
                problem="locked",
                fix="use the dashboard that is running, stop it, or give another path",
            )
        return lock

    def _store_error(self, error: sqlite3.Error) -> Exception:
        """Return the error to raise instead; errors of the program itself stay as they are."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in _PROBLEMS:
            return error
        problem, what, fix = _PROBLEMS[code]
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        return StoreError(
            f"the database {self.path} {what}", problem=problem, why=f"{error} ({name})", fix=fix.format(path=self.path)
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


_LOCKED: Final = "close the program that holds it, such as a shell of sqlite3 with an open transaction"
_REFUSED: Final = "give a path in a folder that exists and that you may write"
_CORRUPT: Final = "move {path} away and import the journals again, or restore a copy"
_PROBLEMS: Final[dict[int, tuple[Problem, str, str]]] = {
    sqlite3.SQLITE_FULL: ("full", "cannot grow: the disk is full", "free space on the disk of {path}"),
    sqlite3.SQLITE_BUSY: ("locked", "is locked by another program", _LOCKED),
    sqlite3.SQLITE_LOCKED: ("locked", "is locked by another program", _LOCKED),
    sqlite3.SQLITE_CORRUPT: ("corrupt", "is damaged", _CORRUPT),
    sqlite3.SQLITE_NOTADB: ("corrupt", "is not a database", _CORRUPT),
    sqlite3.SQLITE_FORMAT: ("corrupt", "is damaged", _CORRUPT),
    sqlite3.SQLITE_IOERR: ("full", "cannot be read or written", "check the disk of {path}, and its free space"),
    sqlite3.SQLITE_READONLY: ("refused", "cannot be written", "make {path} and its folder writable for this user"),
    sqlite3.SQLITE_CANTOPEN: ("refused", "cannot be opened", _REFUSED),
    sqlite3.SQLITE_PERM: ("refused", "cannot be opened", _REFUSED),
    sqlite3.SQLITE_AUTH: ("refused", "cannot be opened", _REFUSED),
}
"""Primary result code of SQLite -> problem, what is wrong, fix."""
