"""What a journal holds, read back from disk; and one opened on a simulated disk."""

import math
from pathlib import Path
from typing import Any

from evsys_bus.codec import decode
from evsys_bus.disk import Disk
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import JournalReader, JournalWriter
from evsys_bus.journal.reader import Record


def read_records(journal: str | Path, *, family: str = "r", disk: Disk | None = None) -> list[Record]:
    """All records, stream by stream: of the program's streams ("r"), or of the couriers' ("c")."""
    reader = JournalReader(journal, disk)
    return [record for stream in reader.streams(family) for record in reader.read(stream)]


def read_sequences(journal: str | Path, *, disk: Disk | None = None) -> list[int]:
    """The sequence of each record."""
    return [record.sequence for record in read_records(journal, disk=disk)]


def read_envelopes(journal: str | Path, contexts: dict[Any, Any] | None = None, *, family: str = "r") -> list[Envelope]:
    """The envelope of each record; ``contexts`` as in `decode`."""
    return [decode(record.payload, contexts) for record in read_records(journal, family=family)]


def read_events(journal: str | Path, *, family: str = "r") -> list[Event]:
    """The event of each record."""
    return [envelope.event for envelope in read_envelopes(journal, family=family)]


def open_journal(disk: Disk, directory: str = "/journal", **options: Any) -> JournalWriter:
    """A journal on a simulated disk, which is flushed when the test says so. Any: options of `JournalWriter`."""
    return JournalWriter(directory, disk=disk, **{"flush_seconds": math.inf, **options}).open()
