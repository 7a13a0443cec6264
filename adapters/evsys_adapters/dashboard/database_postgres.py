"""The driver of PostgreSQL.

Everything of a dashboard is in one schema, the first of the connection's search path; several dashboards may share a
database if each has a schema of its own. The one that writes holds an advisory lock, which ends with its connection,
and notifies those that read.
"""

import re
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.abc import Buffer
from psycopg.adapt import Dumper, Loader
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.string import StrDumperUnknown

from evsys_adapters.dashboard.database import NestedTransactions, Problem, Row, StoreError, failed_in_part

_LOCK: Final = "1702261619, hashtext(current_schema())"
"""Key of the advisory lock; the first number is a constant by which one finds it in ``pg_locks``."""
_DEFAULTS: Final[dict[str, str]] = {
    "application_name": "evsys-bus dashboard",
    "client_encoding": "UTF8",
    "connect_timeout": "5",
    # a server that has gone without a word is noticed within half a minute; the other way round see `_SESSION`
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""Options of a connection that its URL may replace."""
_SESSION: Final = {
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30000",
}
"""Settings of the writer's session, so that its lock ends half a minute after its machine is gone."""


class PostgresDatabase(NestedTransactions):
    """A schema of a PostgreSQL database, which only one process at a time may open for writing.

    Args:
        url: ``postgresql://USER@HOST:PORT/DATABASE?OPTION=VALUE``; what it lacks comes from the environment
            (``PGPASSWORD`` and its like) and from ``~/.pgpass``. It has no password, for others see command lines.
        timeout_seconds: How long a statement waits for another session that has locked a table, and opening for the
            end of the process that had the database open before.
        is_writer: Whether it writes. Those who read need not wait, and receive what the writer notifies.

    Raises:
        StoreError: It cannot be opened, or another process writes to it.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 1.0, is_writer: bool = True) -> None:
        super().__init__()
        self._payloads: list[str] = []
        self._location: Final = url
        self._is_relaxed = False
        self._connection: Final = self._connect(_connection_options(url))
        with ExitStack() as stack:
            stack.callback(self.close)
            self._check_server()
            self.execute("SELECT set_config('lock_timeout', ?, FALSE)", f"{round(timeout_seconds * 1000)}ms")
            if self.query("SHOW synchronous_commit") == [("off",)]:
                self.execute("SET synchronous_commit = on")  # what is committed survives a power cut
            [(self._channel,)] = self.query("SELECT 'evsys_' || md5(current_schema())")
            if is_writer:
                for name, value in _SESSION.items():
                    self.execute("SELECT set_config(?, ?, FALSE)", name, value)
                self._check_privileges()
                self._acquire_lock()
            else:
                self._connection.add_notify_handler(lambda notice: self._payloads.append(notice.payload))
                self.execute(f"LISTEN {self._channel}")
            stack.pop_all()

    @property
    def location(self) -> str:
        """The URL."""
        return self._location

    def query(self, sql: str, *args: object) -> list[Row]:
        """Run a statement and return its rows."""
        try:
            return self._connection.execute(_statement(sql), args, binary=True).fetchall()
        except psycopg.Error as error:
            raise self._store_error(error) from error

    def execute(self, sql: str, *args: object) -> None:
        """Run a statement."""
        try:
            self._connection.execute(_statement(sql), args)
        except psycopg.Error as error:
            raise self._store_error(error) from error

    def executemany(self, sql: str, rows: Iterable[Row]) -> None:
        """Run a statement once for each row of values."""
        try:
            with self._connection.cursor() as cursor:
                cursor.executemany(_statement(sql), rows)
        except psycopg.Error as error:
            raise self._store_error(error) from error

    def define(self, statement: str) -> None:
        """Run a statement that creates or changes a table or an index."""
        created = _CREATED_TABLE.match(statement)
        if created is not None and created[1] in self.tables():
            return
        translated = statement
        for name, type_ in _TYPES.items():
            translated = re.sub(rf"\b{name}\b", type_, translated)
        self.execute(translated)
        altered = created or _ALTERED_TABLE.match(statement)
        if altered is not None:
            for column in _BLOB_COLUMN.findall(statement):  # they are compressed, or would not become smaller
                self.execute(f"ALTER TABLE {altered[1]} ALTER COLUMN {column} SET STORAGE EXTERNAL")

    @contextmanager
    def relaxed(self) -> Generator[None]:
        """Commit the block's transactions without waiting for the disk. It must not begin inside a transaction."""
        self._is_relaxed = True
        try:
            yield
        finally:
            self._is_relaxed = False

    @contextmanager
    def snapshot(self) -> Generator[list[str]]:
        """Read in the block what was committed before it; yields what was notified since the last one."""
        self.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:  # the first query takes the snapshot, so it has all that was notified until now
            payloads, self._payloads = self._payloads, []
            yield payloads
        finally:
            self._roll_back()

    def notify(self, payload: str) -> None:
        """Send a text to those who read, when the transaction commits."""
        self.execute("SELECT pg_notify(?, ?)", self._channel, payload)

    def may_take_over(self) -> bool:
        """Return whether no process writes now, and this user may."""
        if not self.query("SELECT has_schema_privilege(current_schema(), 'CREATE')")[0][0]:
            return False
        free = bool(self.query(f"SELECT pg_try_advisory_lock({_LOCK})")[0][0])
        if free:
            self.query(f"SELECT pg_advisory_unlock({_LOCK})")
        return free

    def tables(self) -> set[str]:
        """Return the names of the schema's tables."""
        return {name for (name,) in self.query("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")}

    def size_bytes(self) -> int:
        """Return how much space the schema's tables and their indexes take."""
        rows = self.query(
            "SELECT CAST(COALESCE(SUM(pg_total_relation_size(oid)), 0) AS BIGINT) FROM pg_class"
            " WHERE relkind = 'r' AND relnamespace = CAST(current_schema() AS regnamespace)"
        )
        return int(rows[0][0])

    def close(self) -> None:
        """Close the connection. A transaction that is open is rolled back."""
        self._connection.close()

    def _begin(self) -> None:
        self.execute("BEGIN")
        if self._is_relaxed:
            self.execute("SET LOCAL synchronous_commit = off")

    def _commit(self) -> None:
        if self._connection.info.transaction_status == pq.TransactionStatus.INERROR:  # COMMIT would roll back silently
            raise failed_in_part()
        self.execute("COMMIT")

    def _roll_back(self) -> None:
        if self._connection.info.transaction_status != pq.TransactionStatus.IDLE:
            try:
                self._connection.execute("ROLLBACK")
            except psycopg.Error:
                pass  # the error that led here is raised; the server undoes what a lost connection has not committed

    def _connect(self, options: dict[str, Any]) -> "psycopg.Connection[Row]":
        try:
            connection = psycopg.connect(**options, autocommit=True)
        except psycopg.Error as error:
            raise StoreError(
                f"the database {self._location} cannot be reached",
                problem="lost",
                why=_first_line(error),
                fix="check that the server runs and that this user may connect; the password belongs into PGPASSWORD or"
                " ~/.pgpass",
            ) from error
        for kind in (int, bool):
            connection.adapters.register_dumper(kind, _IntDumper)
        connection.adapters.register_dumper(str, _TextDumper)
        connection.adapters.register_loader("text", _TextLoader)
        return connection

    def _check_server(self) -> None:
        [(encoding, schema)] = self.query("SELECT current_setting('server_encoding'), current_schema()")
        if encoding != "UTF8":
            self._refuse(
                f"has the encoding {encoding}", "create it with: createdb --encoding=UTF8 --template=template0"
            )
        if schema is None:
            self._refuse(
                "has no schema of the search path", "create the schema that the URL or the user's setting names"
            )

    def _refuse(self, what: str, fix: str) -> None:
        raise StoreError(f"the database {self._location} {what}", problem="refused", fix=fix)

    def _check_privileges(self) -> None:
        if not self.query("SELECT has_schema_privilege(current_schema(), 'CREATE')")[0][0]:
            raise StoreError(
                f"this user may only read the database {self._location}",
                problem="read only",
                fix="grant its role what docs/scale.md lists, or give the URL of another user",
            )

    def _acquire_lock(self) -> None:
        try:
            self._connection.execute(f"SELECT pg_advisory_lock({_LOCK})".encode())
        except psycopg.errors.LockNotAvailable as error:
            raise StoreError(
                f"the database {self._location} is open in another process",
                problem="locked",
                fix="use the dashboard that is running, stop it, or give another database or schema",
            ) from error
        except psycopg.Error as error:
            raise self._store_error(error) from error

    def _store_error(self, error: psycopg.Error) -> StoreError:
        """Return the error to raise instead."""
        state = error.sqlstate or ""
        known = _PROBLEMS.get(state) or _PROBLEMS.get(state[:2])
        if known is None or self._connection.closed:
            known = _PROBLEMS["08"] if self._connection.closed else _UNEXPECTED
        problem, what, fix = known
        why = _first_line(error) + (f" ({state})" if state else "")
        return StoreError(f"the database {self._location} {what}", problem=problem, why=why, fix=fix)


def _connection_options(url: str) -> dict[str, Any]:
    """Return the options of a connection that a URL has, and the defaults of the others."""
    try:
        options = conninfo_to_dict(url)
    except psycopg.Error:  # its text may have a part of a password
        raise StoreError(
            "this is not the URL of a PostgreSQL database",
            problem="refused",
            fix="give postgresql://USER@HOST:PORT/DATABASE; a character with a meaning in URLs as %40 for @",
        ) from None
    if options.keys() & {"password", "sslpassword"} or _PASSWORD_IN_URL.match(url):
        raise StoreError(
            "the URL of the database has a password, which others see in the list of processes",
            problem="refused",
            fix="give the URL without it, and the password as PGPASSWORD or in ~/.pgpass",
        )
    return {**_DEFAULTS, **options}


@lru_cache(512)
def _statement(sql: str) -> bytes:
    return sql.replace("%", "%%").replace("?", "%s").encode()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _IntDumper(Dumper):
    """Sends all numbers with the one type of the columns: each combination of types is a prepared statement."""

    oid = psycopg.adapters.types["int8"].oid

    def dump(self, obj: int) -> Buffer:
        if not -(1 << 63) <= obj < 1 << 63:
            raise OverflowError("an int that no column can have")  # as sqlite3 does
        return str(int(obj)).encode()


class _TextDumper(StrDumperUnknown):
    """Sends U+0000, which PostgreSQL has not, as two characters; `_TextLoader` makes one of them again."""

    def dump(self, obj: str) -> Buffer | None:
        if "\0" in obj or "\x1a" in obj:
            obj = obj.replace("\x1a", "\x1a1").replace("\0", "\x1a0")
        return super().dump(obj)


class _TextLoader(Loader):
    format = pq.Format.BINARY

    def load(self, data: Buffer) -> str:
        text = str(data, "utf-8")
        return text.replace("\x1a0", "\0").replace("\x1a1", "\x1a") if "\x1a" in text else text


_TYPES: Final = {"INTEGER": "BIGINT", "REAL": "DOUBLE PRECISION", "BLOB": "BYTEA", "TEXT": 'TEXT COLLATE "C"'}
_PASSWORD_IN_URL: Final = re.compile("^[a-z]+://[^@:]*:[^@]*@")  # with a slash in it, libpq takes it for the port
_CREATED_TABLE: Final = re.compile(r"\s*CREATE TABLE IF NOT EXISTS (\w+)")
_ALTERED_TABLE: Final = re.compile(r"\s*ALTER TABLE (\w+)")
_BLOB_COLUMN: Final = re.compile(r"(\w+) BLOB\b")
_UNEXPECTED: Final[tuple[Problem, str, str]] = ("refused", "refused a statement", "report it with the log")
_PROBLEMS: Final[dict[str, tuple[Problem, str, str]]] = {
    "08": ("lost", "cannot be reached", "check that the server runs, and the way to it"),
    "25006": ("refused", "is read-only", "give the URL of the primary server"),
    "28": ("refused", "refused this user", "check the user and its password: PGPASSWORD or ~/.pgpass"),
    "3D000": ("refused", "does not exist", "create it with createdb"),
    "42501": ("refused", "refused this user", "grant its role what docs/scale.md lists"),
    "53100": ("full", "cannot grow: the disk is full", "free space on the disk of the server"),
    "53": ("locked", "has no resources left", "raise max_connections or the memory of the server"),
    "55P03": ("locked", "is locked by another session", "end the session that holds it; pg_stat_activity lists them"),
    "57": ("lost", "cannot be reached", "wait until the server has started again"),
    "57014": ("locked", "took too long", "raise statement_timeout, or end what keeps the server busy"),
    "58": ("full", "cannot be read or written", "check the disk of the server, and its free space"),
    "XX": ("corrupt", "is damaged", "restore a backup, or import the journals into another database or schema"),
}
"""SQLSTATE or the class of one -> problem, what is wrong, fix."""
