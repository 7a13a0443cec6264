"""The journal: an append-only record of published events that outlives the process.

This package owns the files, their bytes and the cursors. Events are encoded and decoded by `evsys_bus.codec`. The
format is described in docs/journal-format.md.
"""

from evsys_bus.disk import Disk, OsDisk
from evsys_bus.journal.clock import Clock, OsClock
from evsys_bus.journal.cursor import Cursor, Cursors, Place
from evsys_bus.journal.reader import JournalReader, Record, Tail
from evsys_bus.journal.retain import Retain
from evsys_bus.journal.verify import Report, verify
from evsys_bus.journal.writer import JournalWriter

__all__ = [
    "Clock",
    "Cursor",
    "Cursors",
    "Disk",
    "JournalReader",
    "JournalWriter",
    "OsClock",
    "OsDisk",
    "Place",
    "Record",
    "Report",
    "Retain",
    "Tail",
    "verify",
]
