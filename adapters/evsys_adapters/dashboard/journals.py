"""Journals and the database: importing them, building a database anew from them, and removing what is old.

An import delivers the events of a journal as its courier would, so those that were delivered already are skipped, and
an import that was interrupted goes on where it ended. What is removed is moved to the trash first, from which it can be
restored, and then purged.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from evsys_adapters.dashboard.records import ExperimentRecord, RunRecord, run_state
from evsys_adapters.dashboard.store import Store
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk
from evsys_bus.errors import RunNotFoundError
from evsys_bus.journal import JournalReader, TailReader
from evsys_bus.journal.layout import Family
from evsys_bus.journal.reader import Record, read_newest_first
from evsys_bus.reading import find_journals, locate_journal

MAX_EVENTS: Final = 2_000
"""Of one batch."""
MAX_BYTES: Final = 4 << 20
_FAMILIES: Final[tuple[Family, ...]] = ("r", "s", "c")
"""Trainings first: samples and annotations belong to their runs."""
_DAY_SECONDS: Final = 86_400.0
_READ_ATTEMPTS: Final = 8
"""How often a segment that cannot be read is tried: too many files may be open, or a network share be away."""
_READ_PAUSE_SECONDS: Final = 0.05
"""Before the second one; each further one comes after twice as long."""


class Batch(NamedTuple):
    """Events of one stream."""

    stream: str
    after: int
    """The sequence number of the last event that was known before."""
    payloads: list[bytes]
    total: int
    """About how many events the whole import has."""


class Imported(msgspec.Struct, frozen=True):
    """What an import has added."""

    events: int = 0
    points: int = 0
    unreadable: int = 0


class Removed(msgspec.Struct, frozen=True):
    """What was moved to the trash or purged."""

    experiments: int = 0
    runs: int = 0


Progress = Callable[[int, int], None]
"""Called with the number of events that were read, and about how many there are."""


def journals_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the journals of a path: a journal, the directory of a run or an experiment, or a folder of them.

    Raises:
        RunNotFoundError: There is none.
    """
    folder = Path(path).absolute()
    location = locate_journal(folder)
    found = [each.directory for each in find_journals(folder)] if location is None else [location.directory]
    if not found:
        what = f"there is no journal in {folder}" if folder.exists() else f"there is no {folder}"
        raise RunNotFoundError(what, fix="name the directory of a run, or its journal")
    return found


def read_batches(journal: str | os.PathLike[str], watermark: Callable[[str], int]) -> Iterator[Batch]:
    """Yield the events of a journal that a database does not have, of a live one up to its present end.

    Streams come in the order in which their processes started. Nothing is written, and no store is used, so the batches
    can be delivered by another thread, each with a call of `Store.ingest`.

    Args:
        journal: Its directory.
        watermark: Returns the sequence number of the last event of a stream that the database has; called once for
            each stream, at the beginning.

    Raises:
        JournalVersionError: A newer version has written a part of it.
    """
    reader = JournalReader(journal)
    known = _watermarks(reader, watermark)
    total = 0
    with suppress(OSError):  # only progress needs it
        total = _count_missing(reader, known)
    for stream, sequence in known.items():
        after, payloads, size = sequence, list[bytes](), 0
        last = sequence
        tail = reader.tail(stream, sequence, patience=_READ_ATTEMPTS)
        for record in _read_patiently(tail):
            payload = bytes(record.payload)
            if payloads and (len(payloads) >= MAX_EVENTS or size + len(payload) > MAX_BYTES):
                yield Batch(stream, after, payloads, total)
                after, payloads, size = last, [], 0
            payloads.append(payload)
            size += len(payload)
            last = record.sequence
        if payloads:
            yield Batch(stream, after, payloads, total)
        for segment, error in tail.unreadable_segments.items():
            fix = "make it readable, and import the journal into a new database"
            log().warning("dashboard.segment_unreadable", segment=segment, error=str(error), fix=fix)


def _read_patiently(tail: TailReader) -> Iterator[Record]:
    """Yield the events of a stream; a segment that cannot be read is tried again before it is skipped.

    What follows a skipped segment would mark its events as delivered.
    """
    pause = _READ_PAUSE_SECONDS
    while True:
        try:
            yield from tail.poll()
        except OSError:
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        else:
            return


def has_missing(journal: str | os.PathLike[str], watermark: Callable[[str], int]) -> bool:
    """Whether a journal has events that a database does not have.

    Args:
        journal: Its directory, which may be gone.
        watermark: As of `read_batches`.

    Raises:
        OSError: It cannot be read.
    """
    reader = JournalReader(journal)
    known = _watermarks(reader, watermark)
    return _count_missing(reader, known) > 0


def _watermarks(reader: JournalReader, watermark: Callable[[str], int]) -> dict[str, int]:
    """Return what a database has of each stream."""
    return {stream: watermark(stream) for family in _FAMILIES for stream in reader.streams(family)}


def _count_missing(reader: JournalReader, watermarks: Mapping[str, int]) -> int:
    """Return about how many events follow these watermarks."""
    total = 0
    for stream, sequence in watermarks.items():
        newest = next(read_newest_first(OsDisk(), reader.directory, stream), None)
        total += 0 if newest is None else max(0, newest.sequence - sequence)
    return total


def import_journal(store: Store, path: str | os.PathLike[str], on_progress: Progress | None = None) -> Imported:
    """Import the journals of what a path names (see `journals_of`).

    Args:
        store: Receives the events.
        path: What to import.
        on_progress: Called after each batch.

    Raises:
        RunNotFoundError: There is no journal.
        JournalVersionError: A newer version has written a part of it.
        StoreError: The disk refused a batch. Those before it are imported.
    """
    done = events = points = unreadable = 0
    for journal in journals_of(path):
        before = done
        for batch in read_batches(journal, store.watermark):
            result = store.ingest(batch.stream, batch.after, batch.payloads, str(journal))
            done += len(batch.payloads)
            events += result.events
            points += result.points
            unreadable += result.unreadable
            if on_progress is not None:
                on_progress(done, max(done, before + batch.total))
    return Imported(events, points, unreadable)


def rebuild(
    database: str | os.PathLike[str], journals: Iterable[str | os.PathLike[str]], on_progress: Progress | None = None
) -> Imported:
    """Build a database anew from journals, and put it in the place of the old one, which stays as ``NAME.old``.

    No process may have the database open. What clients of the hosted service have sent is in no journal, and so only in
    the old database.

    Args:
        database: Its file; it need not exist.
        journals: What to import; see `journals_of`.
        on_progress: As of `import_journal`, for each of them.

    Raises:
        RunNotFoundError: One of them has no journal; nothing has changed.
        StoreError: The database is open in another process, or the disk is full; the old one is as it was.
    """
    target = Path(database)
    sources = [journal for path in journals for journal in journals_of(path)]
    fresh = target.with_name(f"{target.name}.new")
    _remove_database(fresh)
    found = Imported()
    store = Store.open(fresh)
    try:
        for journal in sources:
            more = import_journal(store, journal, on_progress)
            found = Imported(found.events + more.events, found.points + more.points, found.unreadable + more.unreadable)
    finally:
        store.close()
    if target.exists():
        Store.open(target).close()  # raises if a process has it open; its log and WAL are in the file then
        old = target.with_name(f"{target.name}.old")
        _remove_database(old)
        target.replace(old)
        _remove_database(target)
    fresh.replace(target)
    _remove_database(fresh)
    return found


def _remove_database(path: Path) -> None:
    for suffix in ("", "-wal", "-shm", ".lock"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def move_to_trash(store: Store, public_id: str, now: float) -> bool:
    """Hide an experiment or a run; return whether there is one. It goes on receiving events."""
    return _set_hidden(store, public_id, now)


def restore(store: Store, public_id: str) -> bool:
    """Take an experiment or a run out of the trash; return whether there is one."""
    return _set_hidden(store, public_id, None)


def _set_hidden(store: Store, public_id: str, hidden: float | None, expired: float | None = None) -> bool:
    records = store.catalogue.records
    found: list[ExperimentRecord | RunRecord | None] = []
    experiment, run = store.catalogue.experiment_id(public_id), store.catalogue.run_id(public_id)
    found.append(None if experiment is None else records.experiment(experiment))
    found.append(None if run is None else records.run(run))
    with store.transaction() as changes:
        for each in found:
            if each is not None:
                each.hidden = hidden
                if isinstance(each, ExperimentRecord):
                    each.expired = expired
                records.touch(each)
                changes.experiments.add(each.experiment if isinstance(each, RunRecord) else each.id)
                if isinstance(each, RunRecord):
                    changes.runs.add(each.id)
    return any(each is not None for each in found)


def expire(store: Store, keep_days: float, now: float) -> Removed:
    """Move to the trash what has had no event for so many days: experiments with all their runs.

    Such an experiment comes back as soon as a run of it has an event of these days or later.
    """
    limit = now - keep_days * _DAY_SECONDS
    expired: list[tuple[ExperimentRecord, int]] = []
    for record in store.catalogue.records.experiments():
        runs = store.catalogue.records.runs(record.id)
        newest = max([record.last or record.started or 0.0, *(run.last or 0.0 for run in runs)])
        is_open = any(run_state(run, now) == "running" for run in runs)
        if newest < limit and not is_open:
            expired.append((record, len(runs)))
    for record, _ in expired:
        _set_hidden(store, record.public, now, limit)
    return Removed(len(expired), sum(runs for _, runs in expired))


def purge(store: Store, now: float, trash_days: float = 0.0) -> Removed:
    """Remove for good what has been in the trash for so many days; each run in a transaction of its own.

    What has had an event since then stays: the run goes on.
    The events stay marked as delivered, so that couriers do not send them again.
    """
    limit = now - trash_days * _DAY_SECONDS
    records = store.catalogue.records

    def is_old(record: ExperimentRecord | RunRecord) -> bool:
        return max(record.hidden or 0.0, min(record.last or 0.0, now)) <= limit

    experiments = [
        each.id
        for each in records.experiments(hidden=True)
        if is_old(each) and all(map(is_old, records.runs(each.id, hidden=True)))
    ]
    return _remove(store, experiments, [run.id for run in records.hidden_runs() if is_old(run)])


def purge_one(store: Store, public_id: str) -> Removed:
    """Remove an experiment or a run for good, if it is in the trash; see `purge`."""
    records = store.catalogue.records
    experiments = [each.id for each in records.experiments(hidden=True) if each.public == public_id]
    return _remove(store, experiments, [run.id for run in records.hidden_runs() if run.public == public_id])


def trash(store: Store) -> dict[str, list[dict[str, Any]]]:
    """Return the experiments and runs in the trash, the newest first."""
    records = store.catalogue.records
    experiments = [
        {"id": each.public, "name": each.name, "hidden": each.hidden, "runs": len(records.run_ids(each.id))}
        for each in records.experiments(hidden=True)
    ]
    runs: list[dict[str, Any]] = []
    for run in records.hidden_runs():
        experiment = records.experiment(run.experiment)
        name = None if experiment is None else experiment.name
        runs.append({"id": run.public, "name": run.key, "hidden": run.hidden, "experiment": name})
    return {
        kind: sorted(rows, key=lambda row: row["hidden"], reverse=True)
        for kind, rows in (("experiments", experiments), ("runs", runs))
    }


def _remove(store: Store, experiments: Sequence[int], runs: Iterable[int]) -> Removed:
    """Remove experiments with all their runs, and further runs."""
    records = store.catalogue.records
    runs = list(dict.fromkeys([*runs, *(run for each in experiments for run in records.run_ids(each))]))
    for run in runs:
        with store.transaction():
            store.catalogue.remove_runs([run])
    with store.transaction():
        for experiment in experiments:
            store.catalogue.remove_experiment(experiment)
        if runs:
            store.catalogue.evals.remove_unused_texts()
    return Removed(len(experiments), len(runs))
