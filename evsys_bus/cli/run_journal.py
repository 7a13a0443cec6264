"""What the journal adds to what the folder of a run says: evals made while it trained, and who writes it."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from evsys_bus.cli.event_facts import metrics_of, step_of
from evsys_bus.cli.event_reader import EventReader, Wanted
from evsys_bus.cli.journals import Found, found
from evsys_bus.cli.records import MetricRecord, as_float
from evsys_bus.errors import JournalVersionError
from evsys_bus.events import Eval, Event, UnknownEvent
from evsys_bus.journal import JournalReader


def read_evals(folder: Path) -> list[MetricRecord]:
    """The metrics of the evals of a run, ``val/acc``, over the steps at which they were made, as far as can be read."""
    journal = _journal(folder)
    if journal is None:
        return []
    records: dict[str, MetricRecord] = {}
    reader = EventReader(journal.directory, Wanted(types=frozenset({"eval"}), run=journal.run))
    with suppress(JournalVersionError, OSError):  # the folder has the rest
        for envelope in reader.poll():
            for name, value in _numbers(envelope.event):
                records.setdefault(name, MetricRecord(name)).see(value, step_of(envelope.event))
    return list(records.values())


def is_deserted(folder: Path) -> bool:
    """Whether a run or an experiment has a journal that no process writes any more."""
    journal = _journal(folder)
    if journal is None:
        return False
    reader = JournalReader(journal.directory)
    return not any(map(reader.is_live, reader.streams("r")))


def _numbers(event: Event | UnknownEvent) -> Iterator[tuple[str, float]]:
    if isinstance(event, Eval):
        for name, value in metrics_of(event).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield name, as_float(value)


def _journal(folder: Path) -> Found | None:
    try:
        return found(folder)
    except click.UsageError:
        return None
