"""Reading a journal from disk, and opening one on a simulated disk."""

import math
from pathlib import Path
from typing import Any

from evsys_bus.codec import decode
from evsys_bus.disk import Disk
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import JournalReader, JournalWriter
from evsys_bus.journal.reader import Record


def read_records(journal: str | Path, *, family: str = "r", disk: Disk | None = None) -> list[Record]:
    """Return all records, stream by stream, of the program's streams ("r") or the couriers' ("c")."""
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


def open_journal(disk: Disk, directory: str = "/journal", **options: Any) -> JournalWriter:
    """Open a journal on a simulated disk that flushes only on request; ``options`` go to `JournalWriter`."""
    return JournalWriter(directory, disk=disk, **{"flush_seconds": math.inf, **options}).open()
