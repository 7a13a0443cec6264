"""Deliveries as the command line shows them: progress and errors, read from the journal's files.

This module does not deliver anything itself.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.cli.output.formatting import (
    GAP,
    NO_VALUE,
    format_age,
    format_columns,
    format_counts,
    format_duration,
    format_seconds,
    format_table,
    format_time,
    pluralize,
)
from evsys_bus.cli.output.screen import Screen, cell_width, printable, terminal_width, wrap
from evsys_bus.codec import decode
from evsys_bus.delivery.process_log import LOG_NAME
from evsys_bus.delivery.progress import ProgressReader
from evsys_bus.delivery.status_files import read_status
from evsys_bus.delivery.subscriptions import load_subscriptions
from evsys_bus.errors import (
    BrokenAdapterError,
    CodecError,
    CourierBusyError,
    EvsysBusError,
    JournalVersionError,
    ParkedError,
    RetryLaterError,
)
from evsys_bus.journal import CursorStore, JournalReader, OsDisk, layout
from evsys_bus.journal.stream_lock import read_owner
from evsys_bus.location import encode_json
from evsys_bus.tasks import DeliveryStatus

POLL_SECONDS: Final = 0.2
"""Interval between two reads of an active delivery."""
PROBLEM_POLL_SECONDS: Final = 1.0
PERSISTENT_PROBLEM_SECONDS: Final = 10.0
"""A retried error is reported only after this long, because most pass by themselves."""
_MINUTE: Final = 60
_TAKEN: Final = ("delivered", "dead", "waiting")
"""The counts of what an adapter is finished with."""
RanksByAdapter = Mapping[str, tuple[int, ...] | None]
"""The ranks that each adapter serves; None for all."""


class DeliveryOutcome(msgspec.Struct, frozen=True):
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
        """Events that were pending or waiting at the start, or were recorded since."""
        return self.sent + self.dead + self.after.pending + self.after.waiting

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
        return find_dead_letter_file(self.journal, self.after.name) if self.dead else None


class DeliveryMonitor:
    """Monitors the deliveries to some adapters of a journal, from now on.

    Args:
        directory: The journal.
        names: The adapters.
    """

    def __init__(self, directory: Path, names: Collection[str]) -> None:
        self._directory: Final = directory
        self._progress: Final = ProgressReader(directory)
        self._deliveries: Final = [_MonitoredDelivery(each) for each in self._progress.read() if each.name in names]

    def poll(self, pid: int | None) -> list[DeliveryStatus]:
        """Read and return the status of each delivery.

        Args:
            pid: Ignore states written by other processes than this one; None accepts all.
        """
        found = {each.name: each for each in self._progress.read()}
        if self._progress.read_error is not None:
            found = {
                each.current.name: self._progress.unknown_status(each.current.name, self._progress.read_error)
                for each in self._deliveries
                if each.current.name not in found
            } | found
        return [each.update(found.get(each.current.name, each.current), pid) for each in self._deliveries]

    def is_finished(self, timeout_seconds: float, overtaken_seconds: float = math.inf) -> bool:
        """Whether every delivery with pending events is given up, or all are without progress for too long.

        Args:
            timeout_seconds: A delivery without progress for this long is given up.
            overtaken_seconds: So is one that delivered what was pending at first this long ago, and never catches up.
        """
        left = [each for each in self._deliveries if each.current.pending] or self._deliveries
        return all(each.is_given_up(timeout_seconds) or each.is_overtaken(overtaken_seconds) for each in left)

    def overtaken(self, seconds: float) -> list[str]:
        """The adapters that have had all that was there at first for so long, where more was recorded meanwhile."""
        return [each.current.name for each in self._deliveries if each.is_overtaken(seconds)]

    def restart_timeout(self) -> None:
        """Restart the time that counts as no progress."""
        for each in self._deliveries:
            each.last_progress_at = time.monotonic()

    def outcomes(self) -> list[DeliveryOutcome]:
        """Return the outcome of each delivery as of the last `poll`."""
        return [each.outcome(self._directory) for each in self._deliveries]


class _MonitoredDelivery:
    def __init__(self, status: DeliveryStatus) -> None:
        self.current = status
        self.last_progress_at = self._started_at = time.monotonic()
        self._initial: Final = status
        self._finished_at: float | None = None
        self._had_first_at = math.inf
        self._last_report: DeliveryStatus | None = None
        """The last status that its courier wrote, except for ``ended``."""

    def update(self, status: DeliveryStatus, pid: int | None) -> DeliveryStatus:
        now = time.monotonic()
        if not status.is_known:
            return status  # the next read may succeed; until then the last known status counts
        counts = [(each.delivered, each.dead, each.owed, each.waiting) for each in (status, self.current)]
        if counts[0] != counts[1]:
            self.last_progress_at = now
        self._finished_at = None if status.unfinished else self._finished_at or now
        taken = sum(getattr(status, name) - getattr(self._initial, name) for name in _TAKEN)
        if self._initial.is_known and taken >= self._initial.pending:
            self._had_first_at = min(self._had_first_at, now)
        self.current = status
        if status.state is None or pid not in {None, status.pid}:
            return msgspec.structs.replace(status, state="delivering", error=None, fix=None)
        if status.state != "ended" or not status.pending:
            self._last_report = status
        return status

    def is_overtaken(self, seconds: float) -> bool:
        """Whether it has had all that was there at first for so long, and more was recorded meanwhile."""
        return self.current.pending > 0 and time.monotonic() - self._had_first_at >= seconds

    def is_given_up(self, timeout_seconds: float) -> bool:
        """Whether the delivery is parked or failed, or made no progress within the timeout."""
        if self.current.pending and self._last_report is not None and self._last_report.state in {"parked", "failed"}:
            return True
        return time.monotonic() - self.last_progress_at >= timeout_seconds

    def outcome(self, directory: Path) -> DeliveryOutcome:
        last_report = DeliveryStatus() if self._last_report is None else self._last_report
        after = msgspec.structs.replace(
            self.current,
            state=last_report.state,
            error=last_report.error,
            fix=last_report.fix,
            failing_since=last_report.failing_since,
        )
        seconds = round((self._finished_at or time.monotonic()) - self._started_at, 1)
        return DeliveryOutcome(str(directory), self._initial, after, seconds)


def find_dead_letter_file(directory: str | Path, name: str) -> str | None:
    """Return the path of an adapter's dead-letter file; None if there is none."""
    path = Path(layout.courier_path(str(directory), name, "dead.jsonl"))
    return str(path) if path.exists() else None


def problem_lines(status: DeliveryStatus, directory: str | Path | None, *, show_since: bool = True) -> list[str]:
    """Return a line for each problem of a delivery, with its fix and the file that has more details.

    Args:
        status: The delivery.
        directory: The journal; None if there is none.
        show_since: Include since when the delivery fails.
    """
    lines: list[str] = []
    parts: list[str] = []
    if status.owed:
        parts.append(f"{pluralize(status.owed, 'event')} delivered, but not confirmed by the destination")
    if status.waiting:
        parts.append(f"{pluralize(status.waiting, 'event')} waiting")
    if status.error is not None:
        since = (
            ""
            if status.failing_since is None or not show_since
            else f" (failing since {format_age(time.time() - status.failing_since)})"
        )
        parts.append(f"{status.error}{since}")
    if parts:
        fix = status.suggested_fix
        lines.append(
            _join_parts(f"{status.name}: {': '.join(parts)}", fix, status.log if status.state == "failed" else None)
        )
    failed = [f"its hooks raised {pluralize(status.hook_failures, 'time')}"] if status.hook_failures else []
    if status.task_failures:
        failed.append(f"{pluralize(status.task_failures, 'task')} started by them failed")
    if failed:
        last = "" if status.last_failure is None else f"; the last one: {status.last_failure}"
        lines.append(_join_parts(f"{status.name}: {', '.join(failed)}{last}", None, status.log))
    if status.dead:
        path = None if directory is None else find_dead_letter_file(directory, status.name)
        where = "" if path is None else f" in {path}"
        lines.append(f"{status.name}: {pluralize(status.dead, 'dead letter')}{where}")
    return lines


def _join_parts(what: str, fix: str | None, log: str | None) -> str:
    more = ("" if fix is None else f"   fix: {fix}") + ("" if log is None else f"   traceback: {log}")
    return f"{what}{more}"


def describe_counts(status: DeliveryStatus) -> list[str]:
    """Return the counts that are not zero, as ``120 owed`` or ``3 dead``; empty if the delivery is complete."""
    if not status.is_known:
        return ["unknown"]
    counts = (
        (status.pending, "pending"),
        (status.waiting, "waiting"),
        (status.owed, "owed"),
        (status.dead, "dead"),
        (status.hook_failures, "hook failure" if status.hook_failures == 1 else "hook failures"),
        (status.task_failures, "task failure" if status.task_failures == 1 else "task failures"),
    )
    return format_counts(counts)


class ProblemMonitor:
    """Reads the problems that couriers report in their state files. Not thread-safe.

    Args:
        directory: The journal; it may not exist yet.
        clock: Monotonic seconds; files are read at most every `PROBLEM_POLL_SECONDS`.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory: Final = directory
        self._clock: Final = clock
        self._next_poll = clock()
        self._problems: list[DeliveryStatus] = []

    def poll(self) -> list[DeliveryStatus]:
        """Return the deliveries that are stuck, need a person to act, or had failing hooks, tasks or events."""
        now = self._clock()
        if now >= self._next_poll:
            self._next_poll = now + PROBLEM_POLL_SECONDS
            states = sorted((self._directory / layout.COURIERS).glob("*.state.json"))
            read = [self._read(layout.decode_adapter_name(each.name.removesuffix(".state.json"))) for each in states]
            self._problems = [each for each in read if each is not None and _needs_attention(each)]
        return self._problems

    def _read(self, name: str) -> DeliveryStatus | None:
        state = read_status(OsDisk(), str(self._directory), name)
        if state is None:
            return None
        positions = CursorStore(str(self._directory)).load(name).streams.values()
        return msgspec.structs.replace(state, name=name, dead=sum(each.dead for each in positions))


def _needs_attention(status: DeliveryStatus) -> bool:
    if status.state in {None, "ended", "other_rank"}:  # possibly written by an earlier program
        return False
    is_persistent = (
        status.failing_since is not None and time.time() - status.failing_since >= PERSISTENT_PROBLEM_SECONDS
    )
    is_stuck = status.state in {"parked", "failed"} or is_persistent or (status.owed and status.owed_fix is not None)
    return bool(is_stuck or status.dead or status.hook_failures or status.task_failures)


def sync_command(directory: str | Path, *names: str) -> str:
    """Return the command that delivers pending events and confirms unconfirmed ones."""
    return shlex.join(["evsys-bus", "sync", str(directory), *(word for name in names for word in ("--adapter", name))])


def courier_busy_error(directory: Path, name: str, why: str | None = None) -> CourierBusyError:
    """Return the error for an adapter that another process delivers to."""
    owner = read_owner(OsDisk(), layout.courier_path(str(directory), name, "lock"))
    who = (
        "another process"
        if owner is None
        else f"process {owner.pid} on {owner.host}, since {format_time(owner.since)},"
    )
    fix = f"let it finish, or end it; check its progress: evsys-bus status {directory}"
    return CourierBusyError(f"{who} delivers {directory} to {name}", why=why, fix=fix)


def outcome_lines(outcomes: Sequence[DeliveryOutcome]) -> list[str]:
    """Return the table of outcomes."""
    has_unconfirmed = any(each.before.owed or each.after.owed for each in outcomes)
    has_waiting = any(each.after.waiting for each in outcomes)
    rows = [
        [
            each.adapter,
            *(
                (
                    pluralize(each.events, "event"),
                    f"sent {each.sent:,}",
                    f"dead {each.dead:,}",
                    f"pending {each.after.pending:,}",
                )
                if each.is_known
                else ("? events", "sent ?", "dead ?", "pending ?")
            ),
            *([f"waiting {each.after.waiting:,}"] if has_waiting else []),
            *([f"confirmed {max(0, each.before.owed - each.after.owed):,}"] if has_unconfirmed else []),
            *([f"owed {each.after.owed:,}"] if has_unconfirmed else []),
            format_seconds(each.seconds),
        ]
        for each in outcomes
    ]
    width = terminal_width(sys.stdout)
    lines = format_columns(rows)
    fits = width is None or all(cell_width(line) <= width for line in lines)
    return lines if fits else [part for row in rows for part in wrap(GAP.join(row), width)]


def outcome_json(outcomes: Sequence[DeliveryOutcome]) -> list[str]:
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
            "waiting": each.after.waiting,
        }
        for each in outcomes
    ]
    return [encode_json(row).decode() for row in rows]


def broken_adapter_error(what: str, why: str | None, fix: str) -> BrokenAdapterError:
    """Return the error for an adapter that cannot be built here; its exit code is that of the environment."""
    error = BrokenAdapterError(what, why=why, fix=fix)
    error.__cause__ = ImportError(what)
    return error


def unreadable_status_error(journal: str | Path, status: DeliveryStatus) -> EvsysBusError:
    """Return the error for an adapter whose files cannot be read."""
    error = RetryLaterError(f"the pending events for {status.name} are unknown")
    error.why = status.error
    error.fix = f"make its files readable   then: {sync_command(journal)}"
    return error


def undelivered_error(outcome: DeliveryOutcome) -> EvsysBusError | None:
    """Return the error for events that are still pending or unconfirmed; None if there are none."""
    after, name = outcome.after, outcome.adapter
    command = sync_command(outcome.journal, name)
    if not outcome.is_known:
        return unreadable_status_error(outcome.journal, after)
    if after.pending:
        what = f"{after.pending:,} of {outcome.events:,} events for {name} stay pending"
        fix = after.fix or (outcome.before.fix if after.error is None else None)
        why = after.error or outcome.before.error
        if after.state == "failed":
            return broken_adapter_error(what, why, f"{fix or 'see the log beside the journal'}   then: {command}")
        error = ParkedError(what) if after.state == "parked" else RetryLaterError(what)
        default_why = f"it accepted no events and gave no reason ({outcome.seconds:.0f} s)"
    elif after.owed:
        what = f"{pluralize(after.owed, 'event')} for {name} stay owed: delivered, but not confirmed by the destination"
        fix = after.suggested_fix
        why = after.error or outcome.before.error
        error = RetryLaterError(what) if fix is None else ParkedError(what)
        default_why = "the destination gave no reason"
    else:
        return None
    error.why = why or default_why
    error.fix = f"{fix}   then: {command}" if fix else f"try again later: {command}"
    return error


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
        return "waiting" if status.waiting and not status.pending else "not running"
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
            facts |= dict.fromkeys(("recorded", "delivered", "dead", "pending", "owed", "waiting"))
        facts["dead_letters"] = find_dead_letter_file(directory, each.name) if each.dead else None
        rows.append({"type": "adapter", **facts})
    return rows


def adapter_lines(directory: Path, statuses: Sequence[DeliveryStatus], screen: Screen, width: int | None) -> list[str]:
    """Return the table of adapters, followed by their problems and the command that resolves them."""
    ranks = load_ranks_by_adapter(directory)
    optional = [name for name in ("owed", "waiting") if any(getattr(each, name) for each in statuses)]
    names = ["delivered", *optional, "pending", "dead"]
    rows = [["adapter", "state", *names, "lag"]]
    for each in statuses:
        counts = [getattr(each, name) for name in names]
        state = describe_state(each, ranks)
        rows.append(
            [
                printable(each.name),
                screen.style_state(state, sys.stdout),
                *(f"{count:,}" if each.is_known else "?" for count in counts),
                _format_lag(directory, each),
            ]
        )
    lines = format_table(rows, width)
    has_problems = False
    for each in statuses:
        problems = problem_lines(each, directory)
        has_problems = has_problems or bool(problems)
        if each.absent:
            gone = f"{pluralize(each.absent, 'event')} not delivered: removed from the journal before delivery"
            problems.append(f"{each.name}: {gone}")
        for line in problems:
            lines += wrap(printable(line), width, indent="  ")
    log = directory / layout.COURIERS / LOG_NAME
    if log.exists() and has_problems:
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
