"""The adapters of a journal as ``status`` shows them: progress, state and errors."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.cli.deliveries import find_dead_letter_file, problem_lines, sync_command
from evsys_bus.cli.formatting import NO_VALUE, format_duration
from evsys_bus.cli.screen import printable
from evsys_bus.cli.tables import format_table, pluralize, wrap
from evsys_bus.codec import decode
from evsys_bus.delivery.courier_process import LOG_NAME
from evsys_bus.delivery.subscriptions import load_subscriptions
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.journal import CursorStore, JournalReader, layout
from evsys_bus.tasks import DeliveryStatus

_MINUTE: Final = 60
UNKNOWN: Final = "?"
"""Shown instead of the counts of a delivery whose files cannot be read."""

RanksByAdapter = Mapping[str, tuple[int, ...] | None]
"""The ranks that each adapter serves; None for all."""


def load_ranks_by_adapter(directory: str | Path) -> RanksByAdapter:
    """Return the ranks of every adapter of this journal; empty if the journal cannot be read."""
    try:
        return {each.name: each.policy.ranks for each in load_subscriptions(str(directory))}
    except OSError:
        return {}


def describe_state(status: DeliveryStatus, ranks: RanksByAdapter) -> str:
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
    ranks = load_ranks_by_adapter(directory)
    rows: list[dict[str, Any]] = []
    for each in statuses:
        facts = msgspec.to_builtins(each)
        state = describe_state(each, ranks)
        facts["adapter"] = facts.pop("name")
        facts["state"] = "other_rank" if state.startswith("served by") else state
        facts["pid"] = each.pid if each.pid and each.busy else None
        facts["lag_seconds"] = _lag_seconds(directory, each) if each.pending else None
        if not each.is_known:
            facts |= dict.fromkeys(("recorded", "delivered", "dead", "pending", "owed"))
        facts["dead_letters"] = find_dead_letter_file(directory, each.name) if each.dead else None
        rows.append({"type": "adapter", **facts})
    return rows


def adapter_lines(directory: Path, statuses: Sequence[DeliveryStatus], width: int | None = None) -> list[str]:
    """Return the table of adapters, followed by their problems and the command that resolves them."""
    ranks = load_ranks_by_adapter(directory)
    has_unconfirmed = any(each.owed for each in statuses)
    rows = [["adapter", "state", "delivered", *(["owed"] if has_unconfirmed else []), "pending", "dead", "lag"]]
    for each in statuses:
        counts = (each.delivered, *((each.owed,) if has_unconfirmed else ()), each.pending, each.dead)
        state = describe_state(each, ranks)
        rows.append(
            [
                printable(each.name),
                state,
                *(f"{count:,}" if each.is_known else UNKNOWN for count in counts),
                _format_lag(directory, each),
            ]
        )
    lines = format_table(rows, width)
    for each in statuses:
        absent = [
            f"{each.name}: {pluralize(each.absent, 'event')} not delivered: removed from the journal before delivery"
        ]
        for line in (*problem_lines(each, directory), *(absent if each.absent else [])):
            lines += wrap(printable(line), width, indent="  ")
    log = directory / layout.COURIERS / LOG_NAME
    if log.exists() and any(problem_lines(each, directory) for each in statuses):
        lines.append(f"log of the couriers: {printable(str(log))}")
    reader = JournalReader(directory)
    is_live = any(map(reader.is_live, reader.streams()))  # then its own couriers deliver
    undelivered = [
        each
        for each in statuses
        if (each.pending or each.owed) and (not is_live or not each.busy or each.state == "failed")
    ]
    if undelivered:
        reasons = {"pending": any(each.pending for each in undelivered), "owed": any(each.owed for each in undelivered)}
        what = " or ".join(word for word, applies in reasons.items() if applies)
        lines.append(f"deliver what is {what}: {sync_command(directory)}")
    return lines


def _lag_seconds(directory: Path, status: DeliveryStatus) -> float | None:
    """Return the age of the newest delivered event over all streams; None if none was delivered."""
    reader = JournalReader(directory)
    times: list[float] = []
    for stream, position in CursorStore(str(directory)).load(status.name).streams.items():
        try:
            record = next(reader.read(stream, position.sequence - 1), None) if position.sequence else None
            if record is not None and record.sequence == position.sequence:
                times.append(decode(record.payload).time)
        except (CodecError, JournalVersionError, OSError):
            continue  # the lag is then shown as a number of events
    return max(0.0, time.time() - max(times)) if times else None


def _format_lag(directory: Path, status: DeliveryStatus) -> str:
    if not status.pending:
        return NO_VALUE
    seconds = _lag_seconds(directory, status)
    if seconds is None:
        return f"{status.pending:,} events"
    whole = round(seconds)
    return f"{whole} s" if whole < _MINUTE else format_duration(whole)
