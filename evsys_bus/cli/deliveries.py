"""Deliveries as the command line shows them: progress and errors, read from the journal's files.

This module does not deliver anything itself.
"""

import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from evsys_bus.cli.amounts import ago
from evsys_bus.cli.tables import columns, counted
from evsys_bus.delivery.accounts import Accounts
from evsys_bus.delivery.states import read_state
from evsys_bus.errors import (
    BrokenAdapterError,
    CourierBusyError,
    EvsysBusError,
    ParkedError,
    RetryLaterError,
)
from evsys_bus.journal import Cursors, OsDisk, layout
from evsys_bus.journal.signature import signed
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.where import encode_json

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

LOOK_SECONDS: Final = 0.2
"""Interval between two reads of an active delivery."""
TROUBLE_SECONDS: Final = 1.0
LASTING_SECONDS: Final = 10.0
"""A retried error is reported only after this long, because most pass by themselves."""


class Outcome(msgspec.Struct, frozen=True):
    """The change of one delivery between two points in time."""

    journal: str
    before: DeliveryStatus
    after: DeliveryStatus
    """State, error and fix are the last ones that the courier wrote before it ended; None if it wrote none."""
    seconds: float

    @property
    def adapter(self) -> str:
        """The name of the adapter."""
        return self.after.name

    @property
    def is_known(self) -> bool:
        """Whether the counts are valid: False if the files could not be read."""
        return self.before.is_known and self.after.is_known

    @property
    def events(self) -> int:
        """Events that were pending at the start or were recorded since."""
        return self.sent + self.dead + self.after.pending

    @property
    def sent(self) -> int:
        """Events delivered in between."""
        return self.after.delivered - self.before.delivered

    @property
    def dead(self) -> int:
        """Events that became dead letters in between."""
        return self.after.dead - self.before.dead

    @property
    def dead_letters(self) -> str | None:
        """The dead-letter file, if there are new dead letters."""
        return dead_letter_file(self.journal, self.after.name) if self.dead else None


class Watch:
    """Monitors the deliveries to some adapters of a journal, from now on.

    Args:
        directory: The journal.
        names: The adapters.
    """

    def __init__(self, directory: Path, names: "Collection[str]") -> None:
        self._directory: Final = directory
        self._accounts: Final = Accounts(directory)
        self._watched: Final = [_Watched(each) for each in self._accounts.read() if each.name in names]

    def look(self, pid: int | None) -> list[DeliveryStatus]:
        """Read and return the status of each delivery.

        Args:
            pid: Ignore states written by other processes than this one; None accepts all.
        """
        found = {each.name: each for each in self._accounts.read()}
        if self._accounts.unreadable is not None:
            found = {
                each.now.name: self._accounts.unknown(each.now.name, self._accounts.unreadable)
                for each in self._watched
                if each.now.name not in found
            } | found
        return [each.look(found.get(each.now.name, each.now), pid) for each in self._watched]

    def is_over(self, timeout_seconds: float, overtaken_seconds: float = math.inf) -> bool:
        """Whether every delivery with pending events is given up, or all are without progress for too long.

        Args:
            timeout_seconds: A delivery without progress for this long is given up.
            overtaken_seconds: So is one that delivered what was pending at first this long ago, and never catches up.
        """
        left = [each for each in self._watched if each.now.pending] or self._watched
        return all(each.is_given_up(timeout_seconds) or each.is_overtaken(overtaken_seconds) for each in left)

    def overtaken(self, seconds: float) -> list[str]:
        """The adapters that have had all that was there at first for so long, where more was recorded meanwhile."""
        return [each.now.name for each in self._watched if each.is_overtaken(seconds)]

    def count_from_now(self) -> None:
        """Restart the time that counts as no progress."""
        for each in self._watched:
            each.moved_at = time.monotonic()

    def outcomes(self) -> list[Outcome]:
        """Return the outcome of each delivery as of the last `look`."""
        return [each.outcome(self._directory) for each in self._watched]


class _Watched:
    def __init__(self, account: DeliveryStatus) -> None:
        self.now = account
        self.moved_at = self._began = time.monotonic()
        self._before: Final = account
        self._ended_at: float | None = None
        self._had_first_at = math.inf
        self._state: DeliveryStatus | None = None
        """The last status that its courier wrote, except for ``ended``."""

    def look(self, account: DeliveryStatus, pid: int | None) -> DeliveryStatus:
        now = time.monotonic()
        if not account.is_known:
            return account  # the next read may succeed; until then the last known status counts
        if (account.delivered, account.dead, account.owed) != (self.now.delivered, self.now.dead, self.now.owed):
            self.moved_at = now
        self._ended_at = None if account.pending or account.owed else self._ended_at or now
        taken = account.delivered + account.dead - self._before.delivered - self._before.dead
        if self._before.is_known and taken >= self._before.pending:
            self._had_first_at = min(self._had_first_at, now)
        self.now = account
        if account.state is None or pid not in {None, account.pid}:
            return msgspec.structs.replace(account, state="delivering", error=None, fix=None)
        if account.state != "ended" or not account.pending:
            self._state = account
        return account

    def is_overtaken(self, seconds: float) -> bool:
        """Whether it has had all that was there at first for so long, and more was recorded meanwhile."""
        return self.now.pending > 0 and time.monotonic() - self._had_first_at >= seconds

    def is_given_up(self, timeout_seconds: float) -> bool:
        """Whether the delivery is parked or failed, or made no progress within the timeout."""
        if self.now.pending and self._state is not None and self._state.state in {"parked", "failed"}:
            return True
        return time.monotonic() - self.moved_at >= timeout_seconds

    def outcome(self, directory: Path) -> Outcome:
        said = DeliveryStatus() if self._state is None else self._state
        after = msgspec.structs.replace(
            self.now, state=said.state, error=said.error, fix=said.fix, failing_since=said.failing_since
        )
        seconds = round((self._ended_at or time.monotonic()) - self._began, 1)
        return Outcome(str(directory), self._before, after, seconds)


def dead_letter_file(directory: str | Path, name: str) -> str | None:
    """Return the path of an adapter's dead-letter file; None if there is none."""
    letters = Path(layout.courier_file(str(directory), name, "dead.jsonl"))
    return str(letters) if letters.exists() else None


def trouble_lines(status: DeliveryStatus, directory: str | Path | None, *, timed: bool = True) -> list[str]:
    """Return a line for each problem of a delivery, with its fix and the file that has more details.

    Args:
        status: The delivery.
        directory: The journal; None if there is none.
        timed: Include since when the delivery fails.
    """
    lines: list[str] = []
    parts: list[str] = []
    if status.owed:
        parts.append(f"{counted(status.owed, 'event')} delivered, but not confirmed by the destination")
    if status.error is not None:
        since = (
            ""
            if status.failing_since is None or not timed
            else f" (failing since {ago(time.time() - status.failing_since)})"
        )
        parts.append(f"{status.error}{since}")
    if parts:
        fix = (status.owed_fix if status.owed else None) or status.fix
        lines.append(_line(f"{status.name}: {': '.join(parts)}", fix, status.log if status.state == "failed" else None))
    failed = [f"its hooks raised {counted(status.hook_failures, 'time')}"] if status.hook_failures else []
    if status.task_failures:
        failed.append(f"{counted(status.task_failures, 'task')} started by them failed")
    if failed:
        last = "" if status.last_failure is None else f"; the last one: {status.last_failure}"
        lines.append(_line(f"{status.name}: {', '.join(failed)}{last}", None, status.log))
    if status.dead:
        letters = None if directory is None else dead_letter_file(directory, status.name)
        where = "" if letters is None else f" in {letters}"
        lines.append(f"{status.name}: {counted(status.dead, 'dead letter')}{where}")
    return lines


def _line(what: str, fix: str | None, log: str | None) -> str:
    more = ("" if fix is None else f"   fix: {fix}") + ("" if log is None else f"   traceback: {log}")
    return f"{what}{more}"


def count_words(status: DeliveryStatus) -> list[str]:
    """Return the counts that are not zero, as ``120 owed`` or ``3 dead``; empty if the delivery is complete."""
    if not status.is_known:
        return ["unknown"]
    counts = (
        (status.pending, "pending"),
        (status.owed, "owed"),
        (status.dead, "dead"),
        (status.hook_failures, "hook failure" if status.hook_failures == 1 else "hook failures"),
        (status.task_failures, "task failure" if status.task_failures == 1 else "task failures"),
    )
    return [f"{count:,} {word}" for count, word in counts if count]


class TroubleWatch:
    """Reads the problems that couriers report in their state files. Not thread-safe.

    Args:
        directory: The journal; it may not exist yet.
        clock: Monotonic seconds; files are read at most every `TROUBLE_SECONDS`.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory: Final = directory
        self._clock: Final = clock
        self._due = clock()
        self._found: list[DeliveryStatus] = []

    def look(self) -> list[DeliveryStatus]:
        """Return the deliveries that are stuck, need a person to act, or had failing hooks, tasks or events."""
        now = self._clock()
        if now >= self._due:
            self._due = now + TROUBLE_SECONDS
            states = sorted((self._directory / layout.COURIERS).glob("*.state.json"))
            read = [self._read(layout.follower_of(each.name.removesuffix(".state.json"))) for each in states]
            self._found = [each for each in read if each is not None and _is_told(each)]
        return self._found

    def _read(self, name: str) -> DeliveryStatus | None:
        state = read_state(OsDisk(), str(self._directory), name)
        if state is None:
            return None
        places = Cursors(str(self._directory)).load(name).streams.values()
        return msgspec.structs.replace(state, name=name, dead=sum(each.dead for each in places))


def _is_told(status: DeliveryStatus) -> bool:
    if status.state in {None, "ended", "other_rank"}:  # possibly written by an earlier program
        return False
    lasting = status.failing_since is not None and time.time() - status.failing_since >= LASTING_SECONDS
    stuck = status.state in {"parked", "failed"} or lasting or (status.owed and status.owed_fix is not None)
    return bool(stuck or status.dead or status.hook_failures or status.task_failures)


def sync_command(directory: str | Path, *names: str) -> str:
    """Return the command that delivers pending events and confirms unconfirmed ones."""
    return shlex.join(["evsys-bus", "sync", str(directory), *(word for name in names for word in ("--adapter", name))])


def busy(directory: Path, name: str, why: str | None = None) -> CourierBusyError:
    """Return the error for an adapter that another process delivers to."""
    holder = signed(OsDisk(), layout.courier_file(str(directory), name, "lock"))
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host}, since {holder.since},"
    fix = f"let it finish, or end it; check its progress: evsys-bus status {directory}"
    return CourierBusyError(f"{who} delivers {directory} to {name}", why=why, fix=fix)


def outcome_lines(outcomes: "Sequence[Outcome]") -> list[str]:
    """Return the table of outcomes."""
    owes = any(each.before.owed or each.after.owed for each in outcomes)
    return columns(
        [
            [
                each.adapter,
                *(
                    (
                        counted(each.events, "event"),
                        f"sent {each.sent:,}",
                        f"dead {each.dead:,}",
                        f"pending {each.after.pending:,}",
                    )
                    if each.is_known
                    else ("? events", "sent ?", "dead ?", "pending ?")
                ),
                *([f"confirmed {max(0, each.before.owed - each.after.owed):,}"] if owes else []),
                *([f"owed {each.after.owed:,}"] if owes else []),
                f"{each.seconds:.1f}s",
            ]
            for each in outcomes
        ]
    )


def outcome_json(outcomes: "Sequence[Outcome]") -> list[str]:
    """Return a line of JSON for each outcome."""
    rows: list[dict[str, Any]] = [
        {
            "type": "delivery",
            "journal": each.journal,
            "adapter": each.adapter,
            "events": each.events if each.is_known else None,
            "sent": each.sent if each.is_known else None,
            "dead": each.dead if each.is_known else None,
            "pending": each.after.pending if each.is_known else None,
            "seconds": each.seconds,
            "state": each.after.state,
            "error": each.after.error,
            "fix": each.after.fix,
            "dead_letters": each.dead_letters,
            "owed": each.after.owed,
            "owed_before": each.before.owed,
            "owed_fix": each.after.owed_fix,
            "hook_failures": each.after.hook_failures,
            "task_failures": each.after.task_failures,
            "last_failure": each.after.last_failure,
            "log": each.after.log,
        }
        for each in outcomes
    ]
    return [encode_json(row).decode() for row in rows]


def unbuildable(what: str, why: str | None, fix: str) -> BrokenAdapterError:
    """Return the error for an adapter that cannot be built here; its exit code is that of the environment."""
    error = BrokenAdapterError(what, why=why, fix=fix)
    error.__cause__ = ImportError(what)
    return error


def unknown(journal: str | Path, status: DeliveryStatus) -> EvsysBusError:
    """Return the error for an adapter whose files cannot be read."""
    error = RetryLaterError(f"the pending events for {status.name} are unknown")
    error.why = status.error
    error.fix = f"make its files readable   then: {sync_command(journal)}"
    return error


def trouble_of(outcome: Outcome) -> EvsysBusError | None:
    """Return the error for events that are still pending or unconfirmed; None if there are none."""
    after, name = outcome.after, outcome.adapter
    again = sync_command(outcome.journal, name)
    if not outcome.is_known:
        return unknown(outcome.journal, after)
    if after.pending:
        what = f"{after.pending:,} of {outcome.events:,} events for {name} stay pending"
        fix = after.fix or (outcome.before.fix if after.error is None else None)
        why = after.error or outcome.before.error
        if after.state == "failed":
            return unbuildable(what, why, f"{fix or 'see the log beside the journal'}   then: {again}")
        error = ParkedError(what) if after.state == "parked" else RetryLaterError(what)
        silent = f"it accepted no events and gave no reason ({outcome.seconds:.0f} s)"
    elif after.owed:
        what = f"{counted(after.owed, 'event')} for {name} stay owed: delivered, but not confirmed by the destination"
        fix = after.owed_fix or after.fix
        why = after.error or outcome.before.error
        error = RetryLaterError(what) if fix is None else ParkedError(what)
        silent = "the destination gave no reason"
    else:
        return None
    error.why = why or silent
    error.fix = f"{fix}   then: {again}" if fix else f"try again later: {again}"
    return error
