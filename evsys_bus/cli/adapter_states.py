"""The adapters of a journal at a glance: how far each is, and what keeps it."""

import shlex
import time
from pathlib import Path
from typing import Final, Literal

import msgspec

from evsys_bus.cli.amounts import NONE, ago, duration
from evsys_bus.cli.screen import printable
from evsys_bus.cli.tables import counted, table, wrapped
from evsys_bus.codec import decode
from evsys_bus.delivery.accounts import Account, accounts
from evsys_bus.errors import CodecError, JournalVersionError
from evsys_bus.journal import Cursors, JournalReader, layout

_MINUTE: Final = 60


class AdapterState(msgspec.Struct, frozen=True):
    """One adapter."""

    adapter: str
    state: Literal["delivering", "idle", "retrying", "parked", "failed", "not running"]
    delivered: int
    dead: int
    pending: int
    lag_seconds: float | None
    """Since the last delivered event was published, where others are pending; None if nothing is, or was delivered."""
    pid: int | None
    """Of the process that delivers now."""
    error: str | None
    """What the destination, or the adapter, said last, if that was no success."""
    fix: str | None
    failing_since: float | None
    hook_failures: int
    dead_letters: str | None
    """The file, where there is any."""


def adapter_states(directory: Path) -> list[AdapterState]:
    """Every adapter that the journal knows of."""
    return [_state(directory, each) for each in accounts(directory)]


def adapter_lines(directory: Path, states: list[AdapterState], width: int | None = None) -> list[str]:
    """The table, and below it what there is to know and to do."""
    rows = [["adapter", "state", "delivered", "pending", "dead", "lag"]]
    for each in states:
        counts = (each.delivered, each.pending, each.dead)
        rows.append([printable(each.adapter), each.state, *(f"{count:,}" for count in counts), _lag(each)])
    lines = table(rows, width)
    for each in states:
        lines += [part for line in _facts(each) for part in wrapped(line, width, indent="  ")]
    waiting = [each for each in states if each.pending and each.state in {"not running", "failed"}]
    if waiting:
        lines.append(f"deliver what is pending: evsys-bus sync {shlex.quote(str(directory))}")
    return lines


def _state(directory: Path, account: Account) -> AdapterState:
    said = account.state
    if said is not None and said.state == "failed":
        state = "failed"
    elif said is None or said.state == "ended" or not account.busy:
        state = "delivering" if account.busy else "not running"
    else:
        state = said.state
    letters = Path(layout.courier_file(str(directory), account.name, "dead.jsonl"))
    return AdapterState(
        adapter=account.name,
        state=state,
        delivered=account.delivered,
        dead=account.dead,
        pending=account.pending,
        lag_seconds=_lag_seconds(directory, account) if account.pending else None,
        pid=said.pid if said is not None and account.busy else None,
        error=None if said is None else said.error,
        fix=None if said is None else said.fix,
        failing_since=None if said is None else said.failing_since,
        hook_failures=0 if said is None else said.hook_failures,
        dead_letters=str(letters) if account.dead and letters.exists() else None,
    )


def _lag_seconds(directory: Path, account: Account) -> float | None:
    """By the newest event that was delivered, over all streams."""
    reader = JournalReader(directory)
    times: list[float] = []
    for stream, place in Cursors(str(directory)).load(account.name).streams.items():
        try:
            record = next(reader.read(stream, place.sequence - 1), None) if place.sequence else None
            if record is not None and record.sequence == place.sequence:
                times.append(decode(record.payload).time)
        except (CodecError, JournalVersionError, OSError):
            continue  # it is behind by a number of events, then
    return max(0.0, time.time() - max(times)) if times else None


def _lag(state: AdapterState) -> str:
    if not state.pending:
        return NONE
    if state.lag_seconds is None:
        return f"{state.pending:,} events"
    whole = round(state.lag_seconds)
    return f"{whole} s" if whole < _MINUTE else duration(whole)


def _facts(state: AdapterState) -> list[str]:
    lines: list[str] = []
    if state.error is not None:
        since = "" if state.failing_since is None else f" (failing since {ago(time.time() - state.failing_since)})"
        fix = "" if state.fix is None else f"   fix: {state.fix}"
        lines.append(printable(f"{state.adapter}: {state.error}{since}{fix}"))
    if state.hook_failures:
        lines.append(f"{printable(state.adapter)}: its hooks raised {counted(state.hook_failures, 'time')}")
    if state.dead_letters is not None:
        lines.append(printable(f"{state.adapter}: {counted(state.dead, 'dead letter')} in {state.dead_letters}"))
    return lines
