"""Deliveries as the command line sees them: how far each has got, from disk alone, and what is to be said at the end.

Who delivers, in which process, is the commands' business.
"""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from evsys_bus.cli.delivery_progress import Going
from evsys_bus.cli.tables import columns, counted
from evsys_bus.delivery.accounts import Account, Accounts
from evsys_bus.delivery.followed import CourierState
from evsys_bus.errors import (
    BrokenAdapterError,
    CourierBusyError,
    EvsysBusError,
    ParkedError,
    RetryLaterError,
)
from evsys_bus.journal import OsDisk, layout
from evsys_bus.journal.signature import signed

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

LOOK_SECONDS: Final = 0.2
"""How often a delivery under way is looked at."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one delivery."""

    journal: str
    adapter: str
    events: int
    """That were pending when it began, or came meanwhile."""
    sent: int
    dead: int
    pending: int
    seconds: float
    state: str | None = None
    error: str | None = None
    fix: str | None = None
    dead_letters: str | None = None
    """The file, where there is any."""


class Watch:
    """Adapters of one journal, from now on, while they are delivered to.

    Args:
        directory: The journal.
        names: Which of them.
    """

    def __init__(self, directory: Path, names: "Collection[str]") -> None:
        self._directory: Final = directory
        self._accounts: Final = Accounts(directory)
        self._watched: Final = [_Watched(each) for each in self._accounts.read() if each.name in names]

    def look(self, pid: int) -> list[Going]:
        """How far they are; what their couriers say counts only if they are in this process."""
        found = {each.name: each for each in self._accounts.read()}
        return [each.look(found.get(each.now.name, each.now), pid) for each in self._watched]

    def is_over(self, timeout_seconds: float) -> bool:
        """Whether those that still have something are given up; where all have all, they end by themselves, or hang."""
        left = [each for each in self._watched if each.now.pending] or self._watched
        return all(each.is_given_up(timeout_seconds) for each in left)

    def count_from_now(self) -> None:
        """Begin anew to count the time in which nothing moves."""
        for each in self._watched:
            each.moved_at = time.monotonic()

    def outcomes(self) -> list[Outcome]:
        """What became of them, as of the last look."""
        return [each.outcome(self._directory) for each in self._watched]


class _Watched:
    def __init__(self, account: Account) -> None:
        self.now = account
        self.moved_at = self._began = time.monotonic()
        self._before: Final = account
        self._ended_at: float | None = None
        self._state: CourierState | None = None
        """What its courier said last, but for its end."""

    def look(self, account: Account, pid: int) -> Going:
        now = time.monotonic()
        if (account.delivered, account.dead) != (self.now.delivered, self.now.dead):
            self.moved_at = now
        self._ended_at = None if account.pending else self._ended_at or now
        said = account.state if account.state is not None and account.state.pid == pid else None
        if said is not None and (said.state != "ended" or not account.pending):
            self._state = said
        self.now = account
        state, trouble = ("delivering", None) if said is None else (said.state, account.trouble)
        return Going(account.name, sum(self._done()), account.pending, state, trouble)

    def is_given_up(self, timeout_seconds: float) -> bool:
        """Whether nothing more is to be expected of it today: it is parked, or nothing has moved for long."""
        if self.now.pending and self._state is not None and self._state.state in {"parked", "failed"}:
            return True
        return time.monotonic() - self.moved_at >= timeout_seconds

    def outcome(self, directory: Path) -> Outcome:
        (sent, dead), now, state = self._done(), self.now, self._state
        letters = Path(layout.courier_file(str(directory), now.name, "dead.jsonl"))
        return Outcome(
            str(directory),
            now.name,
            sent + dead + now.pending,
            sent,
            dead,
            now.pending,
            round((self._ended_at or time.monotonic()) - self._began, 1),
            None if state is None else state.state,
            None if state is None else state.error,
            None if state is None else state.fix,
            str(letters) if dead and letters.exists() else None,
        )

    def _done(self) -> tuple[int, int]:
        """Sent and dead, since it began."""
        return self.now.delivered - self._before.delivered, self.now.dead - self._before.dead


def busy(directory: Path, name: str) -> CourierBusyError:
    """What to say where another process delivers."""
    holder = signed(OsDisk(), layout.courier_file(str(directory), name, "lock"))
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.since},"
    fix = f"let it finish, or end it; see how it fares: evsys-bus status {directory}"
    return CourierBusyError(f"{who} delivers {directory} to {name}", fix=fix)


def outcome_lines(outcomes: "Sequence[Outcome]") -> list[str]:
    """The table."""
    return columns(
        [
            [
                each.adapter,
                counted(each.events, "event"),
                f"sent {each.sent:,}",
                f"dead {each.dead:,}",
                f"pending {each.pending:,}",
                f"{each.seconds:.1f}s",
            ]
            for each in outcomes
        ]
    )


def outcome_json(outcomes: "Sequence[Outcome]") -> list[str]:
    """A line of JSON for each."""
    rows: list[dict[str, Any]] = [{"type": "delivery", **msgspec.to_builtins(each)} for each in outcomes]  # Any: JSON
    return [msgspec.json.encode(row).decode() for row in rows]


def unbuildable(what: str, why: str | None, fix: str) -> BrokenAdapterError:
    """What to say where an adapter cannot be built here: for the command line that is no fault of its words."""
    error = BrokenAdapterError(what, why=why, fix=fix)
    error.__cause__ = ImportError(what)
    return error


def trouble_of(outcome: Outcome) -> EvsysBusError | None:
    """Why something is pending still, and what to do; None if nothing is."""
    if not outcome.pending:
        return None
    what = f"{outcome.pending:,} of {outcome.events:,} events for {outcome.adapter} stay pending"
    again = shlex.join(["evsys-bus", "sync", outcome.journal, "--adapter", outcome.adapter])
    if outcome.state == "failed":
        fix = outcome.fix or "see the log beside the journal"
        return unbuildable(what, outcome.error, f"{fix}   then: {again}")
    error = ParkedError(what) if outcome.state == "parked" else RetryLaterError(what)
    error.why = outcome.error or f"it took nothing for a while; nor did it say why ({outcome.seconds:.0f} s)"
    error.fix = f"{outcome.fix}   then: {again}" if outcome.fix else f"try again later: {again}"
    return error
