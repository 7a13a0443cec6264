"""The adapters of a journal as ``status`` shows them: progress, state and errors."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.cli.amounts import NONE, duration
from evsys_bus.cli.deliveries import dead_letter_file, sync_command, trouble_lines
from evsys_bus.cli.screen import printable
from evsys_bus.cli.tables import counted, table, wrapped
from evsys_bus.codec import decode
from evsys_bus.delivery.process import LOG_NAME
from evsys_bus.delivery.roster import roster
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.journal import Cursors, JournalReader, layout
from evsys_bus.tasks import DeliveryStatus

_MINUTE: Final = 60
UNKNOWN: Final = "?"
"""Shown instead of the counts of a delivery whose files cannot be read."""

Ranks = Mapping[str, tuple[int, ...] | None]
"""The ranks that each adapter serves; None for all."""


def ranks_served(directory: str | Path) -> Ranks:
    """Return the ranks of every adapter of this journal; empty if the journal cannot be read."""
    try:
        return {each.name: each.terms.ranks for each in roster(str(directory))}
    except OSError:
        return {}


def state_words(status: DeliveryStatus, ranks: Ranks) -> str:
    """Return the state in one or two words; a recorded state counts only while the courier runs."""
    if status.state in {"failed", "unknown"}:
        return str(status.state)
    if status.state == "other_rank" and not status.busy:
        served = ranks.get(status.name)
        return f"served by rank {', '.join(map(str, served))}" if served else "served by another rank"
    if not status.busy:
        return "not running"
    return "delivering" if status.state in {None, "ended", "other_rank"} else str(status.state)


def adapter_rows(directory: Path, statuses: Sequence[DeliveryStatus]) -> list[dict[str, Any]]:
    """Return the JSON rows of adapters: each status, completed with facts from the journal."""
    ranks = ranks_served(directory)
    rows: list[dict[str, Any]] = []
    for each in statuses:
        facts = msgspec.to_builtins(each)
        words = state_words(each, ranks)
        facts["adapter"] = facts.pop("name")
        facts["state"] = "other_rank" if words.startswith("served by") else words
        facts["pid"] = each.pid if each.pid and each.busy else None
        facts["lag_seconds"] = _lag_seconds(directory, each) if each.pending else None
        if not each.is_known:
            facts |= dict.fromkeys(("recorded", "delivered", "dead", "pending", "owed"))
        facts["dead_letters"] = dead_letter_file(directory, each.name) if each.dead else None
        rows.append({"type": "adapter", **facts})
    return rows


def adapter_lines(directory: Path, statuses: Sequence[DeliveryStatus], width: int | None = None) -> list[str]:
    """Return the table of adapters, followed by their problems and the command that resolves them."""
    ranks = ranks_served(directory)
    owes = any(each.owed for each in statuses)
    rows = [["adapter", "state", "delivered", *(["owed"] if owes else []), "pending", "dead", "lag"]]
    for each in statuses:
        counts = (each.delivered, *((each.owed,) if owes else ()), each.pending, each.dead)
        state = state_words(each, ranks)
        rows.append(
            [
                printable(each.name),
                state,
                *(f"{count:,}" if each.is_known else UNKNOWN for count in counts),
                _lag(directory, each),
            ]
        )
    lines = table(rows, width)
    for each in statuses:
        absent = [
            f"{each.name}: {counted(each.absent, 'event')} not delivered: removed from the journal before delivery"
        ]
        for line in (*trouble_lines(each, directory), *(absent if each.absent else [])):
            lines += wrapped(printable(line), width, indent="  ")
    log = directory / layout.COURIERS / LOG_NAME
    if log.exists() and any(trouble_lines(each, directory) for each in statuses):
        lines.append(f"log of the couriers: {printable(str(log))}")
    reader = JournalReader(directory)
    is_live = any(map(reader.is_live, reader.streams()))  # then its own couriers deliver
    waiting = [
        each
        for each in statuses
        if (each.pending or each.owed) and (not is_live or not each.busy or each.state == "failed")
    ]
    if waiting:
        has = {"pending": any(each.pending for each in waiting), "owed": any(each.owed for each in waiting)}
        what = " or ".join(word for word, some in has.items() if some)
        lines.append(f"deliver what is {what}: {sync_command(directory)}")
    return lines


def _lag_seconds(directory: Path, status: DeliveryStatus) -> float | None:
    """Return the age of the newest delivered event over all streams; None if none was delivered."""
    reader = JournalReader(directory)
    times: list[float] = []
    for stream, place in Cursors(str(directory)).load(status.name).streams.items():
        try:
            record = next(reader.read(stream, place.sequence - 1), None) if place.sequence else None
            if record is not None and record.sequence == place.sequence:
                times.append(decode(record.payload).time)
        except (CodecError, JournalVersionError, OSError):
            continue  # the lag is then shown as a number of events
    return max(0.0, time.time() - max(times)) if times else None


def _lag(directory: Path, status: DeliveryStatus) -> str:
    if not status.pending:
        return NONE
    seconds = _lag_seconds(directory, status)
    if seconds is None:
        return f"{status.pending:,} events"
    whole = round(seconds)
    return f"{whole} s" if whole < _MINUTE else duration(whole)
