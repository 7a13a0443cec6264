"""What is known about experiments and runs: one record each, its identity, and a cache of the records in use.

A run is identified by its UUID where a logger has made one, else by its directory. What follows in the same stream
names the run by directory only, so the pair of stream and directory is kept as well.
"""

import hashlib
import uuid
from collections.abc import Iterable
from typing import Any, Final, Literal, NamedTuple

import msgspec

from evsys_adapters.common.hook_arguments import field, fields, output_dir_of, run_context, run_id, run_key
from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.values import MAX_NAME_CHARS, json_text
from evsys_bus.events import Envelope

TABLES: Final = [
    "CREATE TABLE IF NOT EXISTS experiment (id INTEGER PRIMARY KEY, hidden REAL, body TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS run (id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL, hidden REAL,
        body TEXT NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS run_of_experiment ON run (experiment)",
    "CREATE TABLE IF NOT EXISTS progress (run INTEGER PRIMARY KEY, step INTEGER, last REAL, pace REAL)",
    """CREATE TABLE IF NOT EXISTS identity (kind TEXT NOT NULL, name TEXT NOT NULL, id INTEGER NOT NULL,
        PRIMARY KEY (kind, name))""",
    "CREATE INDEX IF NOT EXISTS identity_of ON identity (id)",
]

Kind = Literal["experiment", "run"]
_JOURNALS: Final = "SELECT name FROM identity WHERE kind = 'journal' ORDER BY id"
_MAX_INDEXED_BYTES: Final = 2_600
_MAX_CACHED_RUNS: Final = 5_000
_MAX_CACHED_NAMES: Final = 100_000
_STALLED_SECONDS: Final = 60.0
_STALLED_PACES: Final = 20.0
"""After how many usual intervals without an event a run counts as stalled."""


class ExperimentRecord(msgspec.Struct, omit_defaults=True):
    """An experiment: one of several arms, or the directory of runs that belong to none."""

    id: int
    public: str
    name: str
    path: str | None = None
    """Its output directory."""
    uuid: str | None = None
    has_start: bool = False
    """Whether it has an ExperimentStart, so that it goes on until its end event."""
    start: tuple[str, float] | None = None
    """Stream and time of its newest ExperimentStart."""
    status: str | None = None
    """By its end event; None while it is open."""
    hypothesis: str | None = None
    conclusion: str | None = None
    tags: list[str] = []
    notes: str | None = None
    config: dict[str, Any] = {}
    success_metric: str | None = None
    success_mode: str | None = None
    best_score: float | None = None
    best_arm: str | None = None
    error: str | None = None
    started: float | None = None
    ended: float | None = None
    last: float | None = None
    planned: int | None = None
    """Number of planned runs, if the config has them."""
    planned_arms: list[str] = []
    groups: list[str] = []
    hidden: float | None = None
    """When it was moved to the trash."""
    extra: dict[str, Any] = {}
    """What a client of the hosted service has sent beside these."""
    expired: float | None = None
    """If it is in the trash because it had no event since then: that time; None if a person moved it there."""


class RunRecord(msgspec.Struct, omit_defaults=True):
    """One run."""

    id: int
    experiment: int
    public: str
    key: str
    """Its name within the experiment."""
    path: str | None = None
    uuid: str | None = None
    arm: str | None = None
    seed: int | None = None
    group: str | None = None
    rank: int = 0
    """The lowest rank that has published rows or its start."""
    status: str | None = None
    """pending, completed, failed, cancelled or stopped; None while it is open."""
    has_start: bool = False
    """Whether it has a RunStart, so that its TrainEnd is not its end."""
    error: str | None = None
    stop_reason: str | None = None
    num_steps: int | None = None
    unit: str | None = None
    started: float | None = None
    ended: float | None = None
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    result_names: list[str] = []
    """The keys of the summary that its RunEnd has given, which the RunEnd of a later attempt replaces."""
    finals: dict[str, float | None] = {}
    """Results after training, by ``<benchmark>/<metric>``; None if it was not finite."""
    eval_names: list[str] = []
    """Series of evals, in the order in which they came."""
    tags: list[str] = []
    notes: str | None = None
    environment: dict[str, Any] = {}
    extras: dict[str, Any] = {}
    checkpoints: int = 0
    starts: dict[str, tuple[int, int, float]] = {}
    """Stream -> rank, first step and time of the trainings that it has started."""
    hidden: float | None = None
    extra: dict[str, Any] = {}
    """As of an experiment."""
    step: int | None = None
    last: float | None = None
    pace: float | None = None
    """Mean time between two rows, in seconds, of the recent ones."""


_decode_experiment: Final = msgspec.json.Decoder(ExperimentRecord).decode
_decode_run: Final = msgspec.json.Decoder(RunRecord).decode


class RunIdentity(NamedTuple):
    """What an event has that identifies its run."""

    stream: str
    key: str
    path: str
    """The run's directory."""
    root: str
    """The experiment's directory."""
    experiment_id: str | None = None
    run_id: str | None = None


def as_uuid(value: object) -> str | None:
    """Return an identifier in its usual spelling; None if it is no UUID."""
    try:
        return str(uuid.UUID(str(value))) if value else None
    except ValueError:
        return None


def digest_id(*parts: str) -> str:
    """Return the public identifier of what has no UUID: 16 hexadecimal digits."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:16]


def arm_of(run: RunRecord) -> str:
    """Return the arm of a run; one that belongs to none is an arm of its own."""
    if run.arm is not None or run.group is not None:
        return run.arm or run.group or run.key
    for suffix in () if run.seed is None else (f"__s{run.seed}", f"-s{run.seed}"):
        if run.key.endswith(suffix) and run.key != suffix:
            return run.key.removesuffix(suffix)
    return run.key


def run_state(run: RunRecord, now: float | None = None) -> str:
    """Return pending, running, completed, failed, cancelled, stopped or stalled.

    Args:
        run: The run.
        now: The time in seconds since the epoch; None for that of its last event, by which no run is stalled.
    """
    if run.status is not None:
        return run.status
    return "stalled" if now is not None and now >= stalled_at(run) else "running"


def stalled_at(run: RunRecord) -> float:
    """Return when a running run counts as stalled if no event of it comes: seconds since the epoch."""
    return (run.last or 0.0) + max(_STALLED_SECONDS, _STALLED_PACES * (run.pace or 0.0))


def run_seconds(run: RunRecord, now: float) -> float | None:
    """Return how long a run took: until its end, its last event, or now."""
    if run.started is None:
        return None
    end = run.ended if run.ended is not None else now if run_state(run, now) == "running" else run.last
    return None if end is None else max(0.0, end - run.started)


class NewIds:
    """New primary keys of tables that no other process writes."""

    def __init__(self, database: Database) -> None:
        self._database: Final = database
        self._last: Final[dict[str, int]] = {}

    def take(self, table: str) -> int:
        """Return a new key."""
        last = self._last.get(table)
        if last is None:
            last = int(self._database.query(f"SELECT COALESCE(MAX(id), 0) FROM {table}")[0][0])  # noqa: S608 # our own names
        self._last[table] = last + 1
        return last + 1


class Records:
    """The records of one database. Changes are written by `flush`."""

    def __init__(self, database: Database) -> None:
        self._database: Final = database
        self._experiments: Final[dict[int, ExperimentRecord]] = {}
        self._runs: Final[dict[int, RunRecord]] = {}
        self._ids: Final[dict[tuple[str, str], int]] = {}
        self._changed_experiments: Final[set[int]] = set()
        self._changed_runs: Final[set[int]] = set()
        self._changed_progress: Final[set[int]] = set()
        self._versions: Final[dict[int, int]] = {}
        self._new_ids: Final = NewIds(database)

    def next_id(self, table: str) -> int:
        """Return a new primary key for a table."""
        return self._new_ids.take(table)

    def find(self, kind: str, name: str) -> int | None:
        """Return the id behind a name, or None."""
        name = _indexable(name)
        known = self._ids.get((kind, name))
        if known is None:
            rows = self._database.query("SELECT id FROM identity WHERE kind = ? AND name = ?", kind, name)
            if not rows:
                return None
            known = self._ids[kind, name] = int(rows[0][0])
        return known

    def name(self, kind: str, name: str, id_: int) -> None:
        """Make a name that of an id."""
        name = _indexable(name)
        if self.find(kind, name) != id_:
            self._database.execute(
                "INSERT INTO identity (kind, name, id) VALUES (?, ?, ?) "
                "ON CONFLICT (kind, name) DO UPDATE SET id = excluded.id",
                *(kind, name, id_),
            )
            self._ids[kind, name] = id_

    def experiment(self, id_: int) -> ExperimentRecord | None:
        """Return an experiment, or None."""
        known = self._experiments.get(id_)
        if known is None:
            rows = self._database.query("SELECT body FROM experiment WHERE id = ?", id_)
            if not rows:
                return None
            known = self._experiments[id_] = _decode_experiment(rows[0][0])
        return known

    def run(self, id_: int) -> RunRecord | None:
        """Return a run, or None."""
        known = self._runs.get(id_)
        if known is None:
            return next(iter(self._load_runs("run.id = ?", id_)), None)
        return known

    def experiments(self, *, hidden: bool = False) -> list[ExperimentRecord]:
        """Return all experiments outside the trash, or those in it."""
        self.flush()
        where = "hidden IS NOT NULL" if hidden else "hidden IS NULL"
        rows = self._database.query(f"SELECT id FROM experiment WHERE {where} ORDER BY id")  # noqa: S608 # no input
        found = (self.experiment(int(id_)) for (id_,) in rows)
        return [each for each in found if each is not None]

    def runs(self, experiment: int, *, hidden: bool = False) -> list[RunRecord]:
        """Return the runs of an experiment in the order in which they came, without those in the trash."""
        self.flush()
        found = self._load_runs("run.experiment = ?", experiment)
        return [each for each in found if hidden or each.hidden is None]

    def run_ids(self, experiment: int) -> list[int]:
        """Return the ids of all runs of an experiment."""
        return [int(id_) for (id_,) in self._database.query("SELECT id FROM run WHERE experiment = ?", experiment)]

    def hidden_runs(self) -> list[RunRecord]:
        """Return the runs in the trash."""
        self.flush()
        return self._load_runs("run.hidden IS NOT NULL")

    def _load_runs(self, where: str, *args: object) -> list[RunRecord]:
        rows = self._database.query(
            "SELECT run.id, progress.step, progress.last, progress.pace FROM run "  # noqa: S608 # no input
            f"LEFT JOIN progress ON progress.run = run.id WHERE {where} ORDER BY run.id",
            *args,
        )
        found: list[RunRecord] = []
        for id_, step, last, pace in rows:
            known = self._runs.get(id_)
            if known is None:
                known = _decode_run(self._database.query("SELECT body FROM run WHERE id = ?", id_)[0][0])
                known.step, known.last, known.pace = step, last, pace
                self._runs[id_] = known
            found.append(known)
        return found

    def find_in_stream(self, stream: str, key: str) -> RunRecord | None:
        """Return the newest run of this key whose own events came in a stream."""
        rows = self._database.query(
            "SELECT id FROM identity WHERE kind = 'run stream' AND name >= ? AND name < ? ORDER BY id DESC",
            *(f"{stream}\n", f"{stream}\v"),
        )
        found = (self.run(int(id_)) for (id_,) in rows)
        return next((run for run in found if run is not None and run.key == key), None)

    def set_journal(self, stream: str, journal: str) -> None:
        """Record which journal holds a stream."""
        number = self.find("journal", journal)
        if number is None:
            last = self._database.query("SELECT COALESCE(MAX(id), 0) FROM identity WHERE kind = 'journal'")[0][0]
            number = int(last) + 1
            self.name("journal", journal, number)
        self.name("journal stream", stream, number)

    def journals(self) -> list[str]:
        """Return the paths of all journals whose events have come, in the order in which they came first."""
        return [str(name) for (name,) in self._database.query(_JOURNALS)]

    def _journals_of(self, run: RunRecord) -> set[int]:
        """Return the journals, as far as known, of the streams in which a run's own events came."""
        rows = self._database.query("SELECT name FROM identity WHERE kind = 'run stream' AND id = ?", run.id)
        found = {self.find("journal stream", str(name).partition("\n")[0]) for (name,) in rows}
        return {each for each in found if each is not None}

    def ids_of_key(self, key: str) -> list[int]:
        """Return the ids of all runs of this key."""
        rows = self._database.query(
            "SELECT id FROM identity WHERE kind = 'run key' AND name >= ? AND name < ?", f"{key}\n", f"{key}\v"
        )
        return [int(id_) for (id_,) in rows]

    def find_by_key(self, key: str, stream: str, time: float) -> RunRecord | None:
        """Return the run of this key whose events are in the same journal as a stream.

        Of several, and where the journal of the stream or of the runs is unknown: that whose newest event is nearest to
        the time.
        """
        found = [run for id_ in self.ids_of_key(key) if (run := self.run(id_)) is not None]
        journal = self.find("journal stream", stream)
        if journal is not None:
            journals = {run.id: self._journals_of(run) for run in found}
            found = [run for run in found if journal in journals[run.id]] or [
                run for run in found if not journals[run.id]
            ]
        return min(found, key=lambda run: abs((run.last or 0.0) - time), default=None)

    def find_experiment(self, identity: RunIdentity, time: float) -> ExperimentRecord:
        """Return the experiment of an event; a new one if there is none."""
        known = self._find("experiment", identity.stream, identity.root, identity.experiment_id)
        record = None if known is None else self.experiment(known)
        if record is None:
            public = identity.experiment_id or self._free_digest("experiment", identity.root)
            name = identity.root.rstrip("/").rpartition("/")[2] or "experiment"
            record = ExperimentRecord(self.next_id("experiment"), public, name, path=identity.root, started=time)
            self.add_experiment(record)
        self._remember("experiment", record, identity.stream, identity.root, identity.experiment_id)
        return record

    def find_run(self, identity: RunIdentity, time: float) -> RunRecord:
        """Return the run of an event; a new one if there is none."""
        known = self._find("run", identity.stream, identity.path, identity.run_id)
        record = None if known is None else self.run(known)
        if record is None:
            experiment = self.find_experiment(identity, time)
            public = identity.run_id or self._free_digest("run", identity.root, identity.key)
            record = RunRecord(self.next_id("run"), experiment.id, public, identity.key, path=identity.path)
            record.started = record.last = time
            self.add_run(record)
        self._remember("run", record, identity.stream, identity.path, identity.run_id)
        return record

    def _find(self, kind: Kind, stream: str, path: str, public: str | None) -> int | None:
        if public is not None:
            known = self.find(kind, public)
            if known is None:
                known = self.find(f"{kind} path", path)
                record = None if known is None else self.experiment(known) if kind == "experiment" else self.run(known)
                return known if record is not None and record.uuid is None else None
            return known
        known = self.find(f"{kind} stream", f"{stream}\n{path}")
        return self.find(f"{kind} path", path) if known is None else known

    def _remember(
        self, kind: Kind, record: ExperimentRecord | RunRecord, stream: str, path: str, public: str | None
    ) -> None:
        self.name(f"{kind} path", path, record.id)
        self.name(f"{kind} stream", f"{stream}\n{path}", record.id)
        if public is not None and record.uuid is None:
            self.name(kind, public, record.id)
            record.uuid = public
            self.touch(record)

    def _free_digest(self, kind: Kind, *parts: str) -> str:
        """Return the public id of a path; another one if that is taken, by what had no UUID then."""
        public = digest_id(*parts)
        return public if self.find(kind, public) is None else digest_id(*parts, uuid.uuid4().hex)

    def add_experiment(self, record: ExperimentRecord) -> None:
        """Add a new experiment."""
        self._experiments[record.id] = record
        self.name("experiment", record.public, record.id)
        self.touch(record)

    def add_run(self, record: RunRecord) -> None:
        """Add a new run."""
        self._runs[record.id] = record
        self.name("run", record.public, record.id)
        self.name("run key", f"{record.key}\n{record.id}", record.id)
        self.touch(record)
        self._changed_progress.add(record.id)

    def touch(self, record: ExperimentRecord | RunRecord) -> None:
        """Have a changed record written with the next `flush`."""
        if isinstance(record, RunRecord):
            self._changed_runs.add(record.id)
            self.count_change(record.experiment)
        else:
            self._changed_experiments.add(record.id)
            self.count_change(record.id)

    def touch_progress(self, run: RunRecord) -> None:
        """Have the last step and time of a run written with the next `flush`."""
        self._changed_progress.add(run.id)
        self.count_change(run.experiment)

    def count_change(self, experiment: int) -> None:
        """Count a change of an experiment, its runs or their points."""
        self._versions[experiment] = self._versions.get(experiment, 0) + 1

    def version(self, experiment: int) -> int:
        """Return a number that changes with an experiment; it counts from 0 in each process."""
        return self._versions.get(experiment, 0)

    def flush(self) -> None:
        """Write the changed records. An experiment that has expired leaves the trash if a run of it goes on."""
        for id_ in self._changed_progress:
            run = self._runs[id_]
            experiment = self.experiment(run.experiment)
            if experiment is not None and experiment.expired is not None and (run.last or 0.0) >= experiment.expired:
                experiment.hidden = experiment.expired = None
                self.touch(experiment)
        if self._changed_experiments:
            found = [self._experiments[id_] for id_ in self._changed_experiments]
            self._database.executemany(
                "INSERT INTO experiment (id, hidden, body) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET hidden = excluded.hidden, body = excluded.body",
                [(each.id, each.hidden, json_text(each)) for each in found],
            )
            self._changed_experiments.clear()
        if self._changed_runs:
            runs = [self._runs[id_] for id_ in self._changed_runs]
            self._database.executemany(
                "INSERT INTO run (id, experiment, hidden, body) VALUES (?, ?, ?, ?) ON CONFLICT (id) "
                "DO UPDATE SET experiment = excluded.experiment, hidden = excluded.hidden, body = excluded.body",
                [(each.id, each.experiment, each.hidden, json_text(each)) for each in runs],
            )
            self._changed_runs.clear()
        if self._changed_progress:
            runs = [self._runs[id_] for id_ in self._changed_progress]
            self._database.executemany(
                "INSERT INTO progress (run, step, last, pace) VALUES (?, ?, ?, ?) ON CONFLICT (run) "
                "DO UPDATE SET step = excluded.step, last = excluded.last, pace = excluded.pace",
                [(each.id, each.step, each.last, each.pace) for each in runs],
            )
            self._changed_progress.clear()

    def evict(self, experiments: Iterable[int], runs: Iterable[int]) -> None:
        """Read records again, because another process has changed them."""
        for experiment in experiments:
            self._experiments.pop(experiment, None)
            self.count_change(experiment)
        for run in runs:
            known = self._runs.pop(run, None)
            if known is not None:
                self.count_change(known.experiment)

    def limit_memory(self) -> None:
        """Drop the records from memory if there are many; not while one of them is in use."""
        if len(self._runs) > _MAX_CACHED_RUNS or len(self._ids) > _MAX_CACHED_NAMES:
            self._runs.clear()
            self._experiments.clear()
            self._ids.clear()

    def remove(self, kind: Kind, ids: Iterable[int]) -> None:
        """Remove records and their names."""
        self.flush()
        for id_ in ids:
            run = self.run(id_) if kind == "run" else None
            self.count_change(id_ if run is None else run.experiment)
            self._database.execute(f"DELETE FROM {kind} WHERE id = ?", id_)  # noqa: S608 # one of two words
            for suffix in ("", " path", " stream", " key"):
                self.forget(f"{kind}{suffix}", id_)
            if kind == "run":
                self._database.execute("DELETE FROM progress WHERE run = ?", id_)
                self._runs.pop(id_, None)
            else:
                self._experiments.pop(id_, None)

    def forget(self, kind: str, id_: int) -> None:
        """Remove the names of an id."""
        self._database.execute("DELETE FROM identity WHERE kind = ? AND id = ?", kind, id_)
        self._ids.clear()


def _indexable(name: str) -> str:
    """Return a name, or the beginning and the digest of one that is too long for an index of PostgreSQL."""
    if len(name) <= MAX_NAME_CHARS or len(encoded := name.encode(errors="surrogatepass")) <= _MAX_INDEXED_BYTES:
        return name
    return f"{name[:MAX_NAME_CHARS]}\n{hashlib.sha256(encoded).hexdigest()}"


def identity_of(envelope: Envelope, handle: object) -> RunIdentity:
    """Return what identifies the run of an event, or its experiment."""
    if handle is None:
        key = envelope.run or envelope.stream
        return RunIdentity(envelope.stream, key, key, "")
    ctx = run_context(handle)
    path = run_id(handle)
    root = output_dir_of(ctx) or path.rstrip("/").rpartition("/")[0]
    key = envelope.run or run_key(handle) or path.rstrip("/").rpartition("/")[2] or envelope.stream
    ids = fields(field(ctx, "ids"))
    return RunIdentity(
        *(envelope.stream, key, path or key, root, as_uuid(ids.get("experiment_id")), as_uuid(ids.get("run_id")))
    )
