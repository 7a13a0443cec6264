"""The journal: an append-only record of published events that outlives the process.

This package owns the files, their bytes and the cursors. Events are encoded and decoded by `evsys_bus.codec`. The
format is described in docs/journal-format.md.
"""

from evsys_bus.deprecated import former_names
from evsys_bus.disk import Disk, OsDisk
from evsys_bus.journal.clock import Clock, OsClock
from evsys_bus.journal.cursor import Cursor, CursorStore, Position
from evsys_bus.journal.reader import JournalReader, JournalReport, Record, TailReader, verify
from evsys_bus.journal.retention import RetentionPolicy
from evsys_bus.journal.writer import JournalWriter

__all__ = [
    "Clock",
    "Cursor",
    "CursorStore",
    "Disk",
    "JournalReader",
    "JournalReport",
    "JournalWriter",
    "OsClock",
    "OsDisk",
    "Position",
    "Record",
    "RetentionPolicy",
    "TailReader",
    "verify",
]

__getattr__ = former_names(
    __name__,
    {
        "Cursors": "CursorStore",
        "Place": "Position",
        "Report": "JournalReport",
        "Retain": "RetentionPolicy",
        "Tail": "TailReader",
    },
)
