"""The journal: an append-only record of what a process published, that outlives the process.

It owns bytes, files and cursors; what the bytes say is the codec's business. The format is in docs/journal-format.md.
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
