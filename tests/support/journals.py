"""Reading a journal from disk, and opening one on a simulated disk."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evsys_bus import EventBus, RunAnnotated, StepEnd
from evsys_bus.codec import decode
from evsys_bus.disk import Disk
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import JournalReader, JournalWriter
from evsys_bus.journal.reader import Record


def read_records(journal: str | Path, *, family: str = "r", disk: Disk | None = None) -> list[Record]:
    """Return all records, stream by stream, of the program ("r"), the couriers ("c") or system_metrics ("s")."""
    reader = JournalReader(journal, disk)
    return [record for stream in reader.streams(family) for record in reader.read(stream)]


def read_sequences(journal: str | Path, *, disk: Disk | None = None) -> list[int]:
    """Return the sequence of each record."""
    return [record.sequence for record in read_records(journal, disk=disk)]


def read_envelopes(journal: str | Path, contexts: dict[Any, Any] | None = None, *, family: str = "r") -> list[Envelope]:
    """Return the envelope of each record; ``contexts`` is passed to `decode`."""
    return [decode(record.payload, contexts) for record in read_records(journal, family=family)]


def read_events(journal: str | Path, *, family: str = "r") -> list[Event]:
    """Return the event of each record."""
    return [envelope.event for envelope in read_envelopes(journal, family=family)]


def read_annotations(journal: str | Path) -> list[RunAnnotated]:
    """Return the annotations by couriers, whose stream also has how the deliveries go."""
    return [each for each in read_events(journal, family="c") if isinstance(each, RunAnnotated)]


def events_of(run_dir: Path, *kinds: type) -> list[Any]:
    """Return the events of these types in the journal of a run that has one of its own."""
    return [event for event in read_events(run_dir / "journal") if isinstance(event, kinds)]


def rows_of(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the step and the metrics of each row in the journal of a run that has one of its own."""
    return [(each.step_idx, each.metrics) for each in events_of(run_dir, StepEnd)]


def record(journal: Path, events: Iterable[Event]) -> None:
    """Publish the events on a bus that only records."""
    with EventBus([], journal=journal) as bus:
        for each in events:
            bus.publish(each)


def open_journal(disk: Disk, directory: str = "/journal", **options: Any) -> JournalWriter:
    """Open a journal on a simulated disk that flushes only on request; ``options`` go to `JournalWriter`."""
    return JournalWriter(directory, disk=disk, **{"flush_seconds": math.inf, **options}).open()
