"""What runs have beside their record, points and evals: checkpoints, contents, alerts, last texts and other events.

The owner of an event is the id of its run, or the negative id of its experiment, or 0 if it names neither.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.records import NewIds
from evsys_adapters.dashboard.series import EPOCH
from evsys_adapters.dashboard.values import json_text
from evsys_bus.reading import JOURNAL

TABLES: Final = [
    """CREATE TABLE IF NOT EXISTS checkpoint (
        run INTEGER NOT NULL, rank INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL,
        body TEXT NOT NULL, PRIMARY KEY (run, rank, name))""",
    """CREATE TABLE IF NOT EXISTS content (
        id INTEGER PRIMARY KEY, run INTEGER NOT NULL, rank INTEGER NOT NULL, step INTEGER, name TEXT NOT NULL,
        kind TEXT NOT NULL, time REAL NOT NULL, body TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS content_of_run ON content (run, step)",
    """CREATE TABLE IF NOT EXISTS alert (
        id INTEGER PRIMARY KEY, run INTEGER NOT NULL, level TEXT NOT NULL, title TEXT NOT NULL, body TEXT NOT NULL,
        time REAL NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS alert_of_run ON alert (run)",
    """CREATE TABLE IF NOT EXISTS last_text (
        run INTEGER NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (run, name))""",
    """CREATE TABLE IF NOT EXISTS journal_status (
        journal TEXT NOT NULL, kind TEXT NOT NULL, name TEXT NOT NULL, time REAL NOT NULL, body TEXT NOT NULL,
        PRIMARY KEY (journal, kind, name))""",
    """CREATE TABLE IF NOT EXISTS event_count (
        owner INTEGER NOT NULL, type TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (owner, type))""",
    """CREATE TABLE IF NOT EXISTS kept_event (
        owner INTEGER NOT NULL, type TEXT NOT NULL, slot INTEGER NOT NULL, n INTEGER NOT NULL, time REAL NOT NULL,
        body TEXT NOT NULL, PRIMARY KEY (owner, type, slot))""",
]

_MAX_CONTENTS: Final = 1_000_000
_KEPT_EVENTS: Final = 10_000
"""Of one type and owner; older ones are only counted."""


class Alert(NamedTuple):
    """An alert of a run."""

    run: int
    title: str
    text: str
    level: str
    time: float


class JournalStatus(NamedTuple):
    """What a courier has reported last about its journal."""

    journal: str
    kind: str
    """``delivery``: the status of an adapter. ``hooks``: how long the hooks of a rank take."""
    name: str
    """The adapter, or the rank."""
    time: float
    body: Any
    """The fields of a `DeliveryStatus` that differ from their defaults; or a list with those of each `HookHealth`."""


class Details:
    """The details of all runs of one database. Texts and counts are written by `flush`, all else at once.

    Args:
        database: Has `TABLES`.
    """

    def __init__(self, database: Database) -> None:
        self._database: Final = database
        self._new_ids: Final = NewIds(database)
        self._counts: Final[dict[tuple[int, str], int]] = {}
        self._changed_counts: Final[set[tuple[int, str]]] = set()
        self._texts: Final[dict[tuple[int, str], tuple[int, str]]] = {}

    def flush(self) -> None:
        """Write the texts and counts that have changed."""
        if self._texts:
            self._database.executemany(
                "INSERT INTO last_text (run, name, step, body) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (run, name) DO UPDATE SET step = excluded.step, body = excluded.body "
                "WHERE excluded.step >= last_text.step",
                [(*key, *value) for key, value in self._texts.items()],
            )
            self._texts.clear()
        if self._changed_counts:
            self._database.executemany(
                "INSERT INTO event_count (owner, type, n) VALUES (?, ?, ?) "
                "ON CONFLICT (owner, type) DO UPDATE SET n = excluded.n",
                [(*key, self._counts[key]) for key in self._changed_counts],
            )
            self._changed_counts.clear()

    def add_checkpoint(self, run: int, rank: int, name: str, step: int, time: float, body: Mapping[str, Any]) -> int:
        """Add a checkpoint, or replace that of this name; return how many the run has."""
        self._database.execute(
            "INSERT INTO checkpoint (run, rank, name, step, time, body) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (run, rank, name) "
            "DO UPDATE SET step = excluded.step, time = excluded.time, body = excluded.body",
            *(run, rank, name, step, time, json_text(body)),
        )
        return self._count_checkpoints(run)

    def cut_checkpoints(self, run: int, rank: int, step: int) -> int:
        """Remove the checkpoints of a rank from a step on; return how many the run has."""
        self._database.execute("DELETE FROM checkpoint WHERE run = ? AND rank = ? AND step >= ?", run, rank, step)
        return self._count_checkpoints(run)

    def _count_checkpoints(self, run: int) -> int:
        return int(self._database.query("SELECT COUNT(*) FROM checkpoint WHERE run = ?", run)[0][0])

    def checkpoints(self, run: int) -> list[dict[str, Any]]:
        """Return the checkpoints of a run by step: name, step, rank, time, and the fields of the manifest row."""
        rows = self._database.query(
            "SELECT name, step, rank, time, body FROM checkpoint WHERE run = ? ORDER BY step, time", run
        )
        return [
            {**_fields(body), "name": name, "step": step, "rank": rank, "time": time}
            for name, step, rank, time, body in rows
        ]

    def add_content(
        self, run: int, rank: int, step: int | None, time: float, item: Mapping[str, Any], folder: str
    ) -> None:
        """Add a content.

        Args:
            run: The run.
            rank: The rank of its process.
            step: None if it belongs to the run as a whole.
            time: When it was published.
            item: The fields of its `ContentItem`.
            folder: The run's directory, where its path begins.
        """
        self._database.execute(
            "INSERT INTO content (id, run, rank, step, name, kind, time, body) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *(self._new_ids.take("content"), run, rank, step, str(item.get("name")), str(item.get("kind")), time),
            json_text({**item, "folder": folder}),
        )

    def cut_contents(self, run: int, rank: int, step: int) -> None:
        """Remove the contents of a rank from a step on."""
        self._database.execute("DELETE FROM content WHERE run = ? AND rank = ? AND step >= ?", run, rank, step)

    def contents(self, run: int, limit: int = _MAX_CONTENTS) -> list[dict[str, Any]]:
        """Return the newest texts, pictures, tables and files of a run, oldest first.

        The ``file`` of each is where it was recorded, maybe on another machine; None if it has none.
        """
        rows = self._database.query(
            "SELECT step, time, body FROM content WHERE run = ? ORDER BY id DESC LIMIT ?", run, limit
        )
        return [_content(*row) for row in reversed(rows)]

    def newest_contents(self, run: int, kinds: Sequence[str], limit: int) -> list[tuple[dict[str, Any], int]]:
        """Return the newest content of each kind and name, and how many there are, in the order of their first ones."""
        marks = ", ".join("?" * len(kinds))
        rows = self._database.query(
            "SELECT step, time, body, n FROM content JOIN (SELECT MIN(id) AS first, MAX(id) AS newest, COUNT(*) AS n "  # noqa: S608 # marks only
            f"FROM content WHERE run = ? AND kind IN ({marks}) GROUP BY kind, name ORDER BY MIN(id) LIMIT ?) found "
            "ON id = newest ORDER BY first",
            *(run, *kinds, limit),
        )
        return [(_content(step, time, body), int(n)) for step, time, body, n in rows]

    def add_alert(self, run: int, title: str, text: str, level: str, time: float) -> None:
        """Add an alert."""
        self._database.execute(
            "INSERT INTO alert (id, run, level, title, body, time) VALUES (?, ?, ?, ?, ?, ?)",
            *(self._new_ids.take("alert"), run, level, title, text, time),
        )

    def alerts(self, runs: Sequence[int], limit: int = 200) -> list[Alert]:
        """Return the newest alerts of these runs, newest first."""
        found: list[Alert] = []
        for run in runs:
            rows = self._database.query(
                "SELECT run, title, body, level, time FROM alert WHERE run = ? ORDER BY id DESC LIMIT ?", run, limit
            )
            found += [Alert(*row) for row in rows]
        return sorted(found, key=lambda each: -each.time)[:limit]

    def set_text(self, run: int, name: str, step: int, text: str) -> None:
        """Replace the last text of a name, unless it is of a later step."""
        known = self._texts.get((run, name))
        if known is None or step >= known[0]:
            self._texts[run, name] = (step, text)

    def cut_texts(self, run: int, step: int) -> None:
        """Remove the last texts of a run from a step on; those of its epochs only if the run starts anew."""
        self.flush()
        kept = "" if step <= 0 else f"{EPOCH}%"
        self._database.execute("DELETE FROM last_text WHERE run = ? AND step >= ? AND name NOT LIKE ?", run, step, kept)

    def texts(self, run: int) -> dict[str, tuple[int, str]]:
        """Return the last text of each name of a row that is no number, with its step."""
        rows = self._database.query("SELECT name, step, body FROM last_text WHERE run = ? ORDER BY name", run)
        return {name: (step, body) for name, step, body in rows}

    def set_status(self, journal: str, kind: str, name: str, time: float, body: object) -> None:
        """Replace what is known about the journal (see `JournalStatus`), unless that is newer."""
        self._database.execute(
            "INSERT INTO journal_status (journal, kind, name, time, body) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (journal, kind, name) DO UPDATE SET time = excluded.time, body = excluded.body "
            "WHERE excluded.time >= journal_status.time",
            *(journal, kind, name, time, json_text(body)),
        )

    def journals(self) -> list[str]:
        """Return the journals about which couriers have reported."""
        return [str(name) for (name,) in self._database.query("SELECT DISTINCT journal FROM journal_status")]

    def remove_statuses(self, folder: str | None) -> None:
        """Remove what is known about the journal in a folder; nothing for None."""
        if folder:
            self._database.execute("DELETE FROM journal_status WHERE journal = ?", journal_in(folder))

    def statuses(self, journals: Sequence[str]) -> list[JournalStatus]:
        """Return what is known about these journals, by kind and name."""
        found: list[JournalStatus] = []
        for journal in journals:
            rows = self._database.query(
                "SELECT kind, name, time, body FROM journal_status WHERE journal = ? ORDER BY kind, name", journal
            )
            found += [
                JournalStatus(journal, kind, name, time, msgspec.json.decode(body)) for kind, name, time, body in rows
            ]
        return found

    def keep_event(self, owner: int, kind: str, parts: Mapping[str, Any], time: float) -> None:
        """Count an event of a type, and keep it; only the newest 10,000 stay."""
        key = (owner, kind)
        if key not in self._counts:
            rows = self._database.query("SELECT n FROM event_count WHERE owner = ? AND type = ?", *key)
            self._counts[key] = int(rows[0][0]) if rows else 0
        n = self._counts[key]
        self._database.execute(
            "INSERT INTO kept_event (owner, type, slot, n, time, body) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (owner, type, slot) DO UPDATE SET n = excluded.n, time = excluded.time, body = excluded.body",
            *(owner, kind, n % _KEPT_EVENTS, n, time, json_text(parts)),
        )
        self._counts[key] = n + 1
        self._changed_counts.add(key)

    def event_counts(self, owner: int) -> dict[str, int]:
        """Return how many events of other types were published, by type."""
        rows = self._database.query("SELECT type, n FROM event_count WHERE owner = ? ORDER BY type", owner)
        return {str(kind): int(n) for kind, n in rows}

    def kept_events(self, owner: int, kind: str, limit: int = 100) -> list[dict[str, Any]]:
        """Return the newest events of a type, newest first: their ``time`` and ``fields``."""
        rows = self._database.query(
            "SELECT time, body FROM kept_event WHERE owner = ? AND type = ? ORDER BY n DESC LIMIT ?", owner, kind, limit
        )
        return [{"time": time, "fields": _fields(body)} for time, body in rows]

    def take_events(self, owner: int, kind: str) -> list[tuple[float, dict[str, Any]]]:
        """Remove the kept events of a type; return the time and the fields of each, oldest first."""
        key = (owner, kind)
        rows = self._database.query("SELECT time, body FROM kept_event WHERE owner = ? AND type = ? ORDER BY n", *key)
        if rows:
            for table in ("kept_event", "event_count"):
                self._database.execute(f"DELETE FROM {table} WHERE owner = ? AND type = ?", *key)  # noqa: S608 # our own names
            self._counts.pop(key, None)
            self._changed_counts.discard(key)
        return [(time, _fields(body)) for time, body in rows]

    def remove_run(self, run: int) -> None:
        """Remove all that a run has."""
        for table in ("checkpoint", "content", "alert", "last_text"):
            self._database.execute(f"DELETE FROM {table} WHERE run = ?", run)  # noqa: S608 # our own names
        self.remove_events(run)

    def remove_events(self, owner: int) -> None:
        """Remove the events of an owner."""
        self.flush()
        for table in ("event_count", "kept_event"):
            self._database.execute(f"DELETE FROM {table} WHERE owner = ?", owner)  # noqa: S608 # our own names
        for key in [key for key in self._counts if key[0] == owner]:
            del self._counts[key]


def _content(step: int | None, time: float, body: str) -> dict[str, Any]:
    item = {**_fields(body), "step": step, "time": time}
    folder, path = item.pop("folder", None), item.get("path")
    return {**item, "file": f"{folder}/{path}" if folder and path else None}


def journal_in(folder: str) -> str:
    """Return the journal of the run or the experiment in a folder."""
    return f"{folder.rstrip('/')}/{JOURNAL}"


def _fields(body: str) -> dict[str, Any]:
    return msgspec.json.decode(body, type=dict[str, Any])
