"""The tables of the store, the version of their layout, and the way from an older version to this one."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Final

from evsys_adapters.dashboard.database import Database, StoreError

VERSION: Final = 1
"""Version of the layout that this program writes. Raise it with each change of a table, and add to `MIGRATIONS`."""

TABLES: Final = (
    # key -> value: the layout's version, and the id of this database
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # the sequence number of the last event of each stream that is stored
    "CREATE TABLE IF NOT EXISTS stream (name TEXT PRIMARY KEY, seq INTEGER NOT NULL)",
    # summary: see `Series` in series.py; right for each series that has no points in the log
    """CREATE TABLE IF NOT EXISTS series (
        id INTEGER PRIMARY KEY, run INTEGER NOT NULL, rank INTEGER NOT NULL, name TEXT NOT NULL,
        scale INTEGER NOT NULL, summary BLOB, UNIQUE (run, rank, name))""",
    # chunks: id = series << 31 | chunk, so that a range of the primary key reads a series in the order of steps
    "CREATE TABLE IF NOT EXISTS rollup (id INTEGER PRIMARY KEY, whole BLOB NOT NULL, r256 BLOB, r32 BLOB)",
    "CREATE TABLE IF NOT EXISTS raw (id INTEGER PRIMARY KEY, body BLOB NOT NULL)",
    # points and cuts that the chunks on disk may lack; emptied by a checkpoint
    "CREATE TABLE IF NOT EXISTS log (id INTEGER PRIMARY KEY, body BLOB NOT NULL)",
)

MIGRATIONS: Final[Mapping[int, Sequence[str]]] = {
    0: ("ALTER TABLE series ADD COLUMN summary BLOB",),
}
"""Version -> the statements that lead to the next one."""


def migrate(database: Database, tables: Sequence[str] = ()) -> str:
    """Create what is absent, bring an older layout to this version in one transaction, and return the database's id.

    Args:
        database: The database.
        tables: Statements that create further tables; each must do nothing where its table exists.

    Raises:
        StoreError: A newer version has written the database, or it belongs to another program.
    """
    with database.transaction():
        version = _version_of(database)
        while version is not None and version < VERSION:
            for statement in MIGRATIONS[version]:
                database.define(statement)
            version += 1
        for statement in (*TABLES, *tables):
            database.define(statement)
        database.execute("DELETE FROM meta WHERE key = 'version'")
        database.execute("INSERT INTO meta (key, value) VALUES ('version', ?)", str(VERSION))
        database.execute(
            "INSERT INTO meta (key, value) VALUES ('id', ?) ON CONFLICT (key) DO NOTHING", str(uuid.uuid4())
        )
        return str(database.query("SELECT value FROM meta WHERE key = 'id'")[0][0])


def check(database: Database) -> str:
    """Return the database's id, without changing anything.

    Raises:
        StoreError: It does not have this version's layout.
    """
    version = _version_of(database)
    if version != VERSION:
        raise StoreError(
            "the database was not created yet, or an older version of evsys-bus has done so",
            problem="read only",
            fix="start a dashboard of this version that may write to it",
        )
    return str(database.query("SELECT value FROM meta WHERE key = 'id'")[0][0])


def _version_of(database: Database) -> int | None:
    """Return the version of the layout, None for a new database."""
    names = database.tables()
    if not names:
        return None
    rows = database.query("SELECT value FROM meta WHERE key = 'version'") if {"meta", "series"} <= names else []
    version = rows[0][0] if rows else ""
    if not str(version).isdecimal():
        raise StoreError(
            "this is not a database of the dashboard",
            problem="foreign",
            why=f"it has the tables {', '.join(sorted(names)[:5])}",
            fix="give the path of a new file, or in PostgreSQL a schema of its own",
        )
    if int(version) > VERSION:
        raise StoreError(
            f"a newer version of evsys-bus has written this database (layout {version}, known: {VERSION})",
            problem="newer",
            fix="update evsys-bus, or give another database",
        )
    return int(version)
