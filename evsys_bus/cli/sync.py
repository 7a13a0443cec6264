"""``evsys-bus sync``: delivers pending events, in one process per original working directory of the adapters.

So relative paths in their params, and their modules, are resolved as in the original program.

If the courier process of a program that has ended still delivers, `deliver` waits for it, ends it if it is stuck, and
delivers the rest itself. The courier process of a live program is left alone.
"""

import math
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import click
import msgspec

from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.cli.options import (
    adapters_option,
    dry_run_option,
    optional_run_argument,
    progress_option,
    timeout_option,
)
from evsys_bus.cli.output.deliveries import (
    POLL_SECONDS,
    DeliveryMonitor,
    DeliveryOutcome,
    RanksByAdapter,
    broken_adapter_error,
    courier_busy_error,
    load_ranks_by_adapter,
    outcome_json,
    outcome_lines,
    problem_lines,
    undelivered_error,
    unreadable_status_error,
)
from evsys_bus.cli.output.delivery_progress import OnProgress, show_deliveries
from evsys_bus.cli.output.errors import INTERRUPTED, OK, report
from evsys_bus.cli.output.formatting import format_columns, pluralize
from evsys_bus.cli.output.progress import ProgressMode
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable
from evsys_bus.cli.records import find_journal, list_journals_newest_first
from evsys_bus.delivery.process_log import LOG_NAME
from evsys_bus.delivery.progress import ProgressReader, read_progress
from evsys_bus.delivery.subscriptions import SubscriptionRecord, import_path, load_subscriptions
from evsys_bus.delivery.supervisor import COURIER_MAIN, EXIT_DELIVERED, SYNC_MAIN, CourierConfig, CourierProcess
from evsys_bus.errors import EvsysBusError, UntrustedFileError, did_you_mean
from evsys_bus.journal import JournalReader, OsDisk, layout
from evsys_bus.journal.layout import LockOwner
from evsys_bus.journal.stream_lock import read_owner, read_stream_owner
from evsys_bus.location import encode_json
from evsys_bus.tasks import DeliveryStatus

_END_SECONDS: Final = 5.0
"""A process that was asked to end is killed after this long."""
STUCK_SECONDS: Final = 10.0
"""A courier process of an ended program is terminated after this long without progress."""
_LOCK_SIGNED_SECONDS: Final = 1.0
"""The owner of a lock is written a moment after the lock was taken."""
_OVERTAKEN_SECONDS: Final = 5.0
"""How long to continue past what was pending at first, where programs record more than adapters take."""


class PendingWork(NamedTuple):
    """The pending deliveries of a journal."""

    directory: Path
    deliverable: list[tuple[SubscriptionRecord, DeliveryStatus]]
    """These can be delivered now."""
    busy: list[DeliveryStatus]
    """Another process delivers to these."""
    program_only: list[DeliveryStatus]
    """Only the original program has the adapter."""
    unreadable: list[DeliveryStatus]
    """The files of these cannot be read now."""
    untrusted: list[UntrustedFileError]
    """Another user wrote, or may write, what names these adapters."""
    trust: bool
    """Whether to deliver to such adapters too."""


class SyncResult(NamedTuple):
    """The result of a sync."""

    outcomes: list[DeliveryOutcome]
    refused: list[EvsysBusError]
    """Errors of adapters that another process still delivers to, or that another user named."""
    interrupted: bool = False
    overtaken: frozenset[str] = frozenset()
    """Adapters that have all that was pending at first, where a program continues to record."""


@click.command("sync")
@optional_run_argument
@adapters_option("Only to this one")
@click.option("--all", "everywhere", is_flag=True, help="Every journal below ./runs.")
@dry_run_option
@click.option("--trust", is_flag=True, help="Also import and write what files of other users in the journal name.")
@timeout_option
@progress_option
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    folder: Path | None,
    adapters: tuple[str, ...],
    everywhere: bool,
    dry_run: bool,
    trust: bool,
    timeout_seconds: float,
    progress: ProgressMode,
    as_json: bool,
) -> int:
    """Deliver the pending events of RUN; without RUN, of the newest journal below ./runs that has any.

    Owed events, which were delivered but not confirmed by the destination, are confirmed too. If the couriers of a
    program that has ended still deliver, the command waits for them, and takes over if they are stuck. Exits with 4 if
    events stay pending or owed because a destination rejects them or is unavailable, with 3 if another process keeps
    delivering, such as a program that still runs. What a program records meanwhile need not be delivered.

    \b
    Examples:
      evsys-bus sync                                 the newest journal with something pending
      evsys-bus sync runs/sweep --adapter wandb_logger
    """  # noqa: D301 # click reads the backspace as: do not wrap
    if everywhere and folder is not None:
        raise click.UsageError("--all means every journal below ./runs; leave RUN or --all out")
    works = [find_work(each, adapters, trust=trust) for each in _journals(folder, adapters, everywhere=everywhere)]
    outcomes: list[DeliveryOutcome] = []
    errors: list[EvsysBusError] = []
    overtaken: list[DeliveryOutcome] = []
    for work in works:
        if folder is None and not as_json:
            screen.note(str(work.directory))
        why = "it is a live object, or cannot be imported elsewhere: the journal has no description to rebuild it from"
        fix = "resume that program; or deliver the run to an adapter of a kind: evsys-bus replay RUN --to KIND"
        errors += [
            broken_adapter_error(
                f"{pluralize(each.pending, 'event')} for {each.name} can only be delivered by its own program",
                why,
                fix,
            )
            for each in work.program_only
        ]
        errors += work.untrusted
        errors += [unreadable_status_error(work.directory, each) for each in work.unreadable]
        _report_moved(work, screen)
        if dry_run:
            click.echo("\n".join(_plan_lines(work, as_json=as_json)), nl=bool(work.deliverable))
            continue
        known = _report_known_problems(work, screen)
        with show_deliveries(progress, screen, known) as view:
            result = deliver(work, timeout_seconds, view.update, view.note)
        if result.outcomes:
            lines = outcome_json(result.outcomes) if as_json else map(printable, outcome_lines(result.outcomes))
            click.echo("\n".join(lines))
        outcomes += result.outcomes
        passed = [each for each in result.outcomes if each.adapter in result.overtaken]
        overtaken += [each for each in passed if each.after.pending and each.after.error is None]
        errors += result.refused
        if result.interrupted:
            screen.note("interrupted; the rest stays pending: run the same command again")
            return INTERRUPTED
    _report_failures(outcomes, screen)
    for each in overtaken:
        screen.note(f"{each.adapter}: a program records more, which goes on; all that was there is delivered")
    errors += [error for each in outcomes if each not in overtaken and (error := undelivered_error(each)) is not None]
    if not works or not (outcomes or errors or dry_run):
        screen.note("nothing is pending")
    return report(ExceptionGroup("some events stay pending", errors), screen) if errors else OK


def _journals(folder: Path | None, adapters: tuple[str, ...], *, everywhere: bool) -> list[Path]:
    if folder is not None:
        directory = find_journal(folder).directory
        known = [each.name for each in read_progress(directory)]
        for name in adapters:
            if name not in known:
                raise click.UsageError(
                    f"{directory} has no adapter {name}; {did_you_mean(name, known) or 'it has none'}"
                )
        return [directory]
    found = [(each, left) for each in list_journals_newest_first() if (left := unfinished_deliveries(each, adapters))]
    if not everywhere:  # one where events only wait comes after all others
        found = sorted(found, key=lambda each: not any(status.unfinished for status in each[1]))[:1]
    return [directory for directory, _ in found]


def _plan_lines(work: PendingWork, *, as_json: bool) -> list[str]:
    rows = [status for _, status in work.deliverable]
    if as_json:
        facts = [
            {"type": "pending", "journal": str(work.directory), "adapter": each.name, "pending": each.pending}
            | {"owed": each.owed, "waiting": each.waiting}
            for each in rows
        ]
        return [encode_json(each).decode() for each in facts]
    has_unconfirmed = any(each.owed for each in rows)
    return format_columns(
        [
            [
                printable(each.name),
                f"{pluralize(each.pending + each.waiting, 'event')} to send",
                *([f"{each.owed:,} to be confirmed"] if has_unconfirmed else []),
            ]
            for each in rows
        ]
    )


def _report_moved(work: PendingWork, screen: Screen) -> None:
    for each, _ in work.deliverable:
        if each.working_directory and not Path(each.working_directory).is_dir():
            screen.note(
                f"{each.name} was set up in {each.working_directory}, which is gone: "
                "relative paths are resolved from here"
            )


def _report_known_problems(work: PendingWork, screen: Screen) -> list[DeliveryStatus]:
    """Report the last known errors before the delivery starts, because they may still apply."""
    known = [each for each in [*(status for _, status in work.deliverable), *work.busy] if each.error is not None]
    for each in known:
        alone = msgspec.structs.replace(each, hook_failures=0, task_failures=0, dead=0)
        screen.note(printable("\n".join(problem_lines(alone, work.directory))))
    return known


def _report_failures(outcomes: list[DeliveryOutcome], screen: Screen) -> None:
    for each in outcomes:
        if each.dead:
            screen.note(f"{each.adapter}: {each.dead:,} rejected; events and reasons are in {each.dead_letters}")
        if each.after.hook_failures or each.after.task_failures:
            failures = msgspec.structs.replace(each.after, owed=0, error=None, dead=0)
            screen.note(printable("\n".join(problem_lines(failures, each.journal))))


def unfinished_deliveries(directory: Path, only: Collection[str]) -> list[DeliveryStatus]:
    """Return the adapters of a journal that have pending, waiting or unconfirmed events."""
    found = (each for each in read_progress(directory) if each.unfinished or each.waiting)
    return [each for each in found if not only or each.name in only or not each.is_known]


def find_work(directory: Path, only: Collection[str], *, trust: bool = False) -> PendingWork:
    """Return the pending deliveries of a journal.

    Args:
        directory: The journal.
        only: Names of adapters; empty for all.
        trust: Whether to deliver to adapters although another user wrote what names them.
    """
    try:
        known = {each.name: each for each in load_subscriptions(str(directory))}
    except OSError:  # every adapter is then reported as unreadable
        known = {}
    work = PendingWork(directory.absolute(), [], [], [], [], [], trust)
    for status in unfinished_deliveries(directory, only):
        stored = known.get(status.name)
        if not status.is_known:
            work.unreadable.append(status)
        elif status.busy:
            work.busy.append(status)
        elif stored is not None and stored.adapter_ref is not None:
            error = None if trust else _untrusted_error(work.directory, status.name)
            if error is None:
                work.deliverable.append((stored, status))
            else:
                work.untrusted.append(error)
        elif status.pending:
            work.program_only.append(status)
    return work


def _untrusted_error(directory: Path, name: str) -> UntrustedFileError | None:
    """Return an error if someone else could have written the file that describes how to build the adapter."""
    path = layout.courier_path(str(directory), name, "spec.json")
    try:
        status = Path(path).stat()
    except OSError as error:
        why = str(error)
    else:
        is_own = status.st_uid == os.geteuid()
        if is_own and not status.st_mode & 0o022:
            return None
        why = "other users may write it" if is_own else f"it belongs to {_user_name(status.st_uid)}"
    fix = shlex.join(["evsys-bus", "sync", str(directory), "--adapter", name, "--trust"])
    return UntrustedFileError(
        f"{path} is not yours alone, so {name} gets nothing", why=why, fix=f"read that file; if you trust it: {fix}"
    )


def _user_name(uid: int) -> str:
    import pwd  # POSIX only

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def deliver(
    work: PendingWork, timeout_seconds: float, on_progress: OnProgress, note: Callable[[str], object]
) -> SyncResult:
    """Deliver until nothing is pending or unconfirmed, or no more progress is to be expected.

    Args:
        work: The pending deliveries.
        timeout_seconds: An adapter that accepts nothing for this long is given up.
        on_progress: Shows the progress.
        note: Prints a line for the user.
    """
    done = _deliver_in_processes(work, timeout_seconds, on_progress)
    if done.interrupted:
        return done
    names = {each.name for each in [*(status for _, status in work.deliverable), *work.busy]} - done.overtaken
    if not names:
        return done
    held = {each.name for each in find_work(work.directory, names).busy}  # includes couriers that started since
    held |= {each.name for each in work.busy}  # couriers that have ended since may have left events
    if not held:
        return done
    joined = _wait_for_couriers(work.directory, held, timeout_seconds, on_progress, note)
    active = [each for each in joined.outcomes if each.before.pending or each.before.owed]
    outcomes = _combine_outcomes(done.outcomes, active)
    if joined.interrupted:
        return SyncResult(outcomes, [], True, done.overtaken)
    left = find_work(work.directory, held, trust=work.trust)
    rest = _deliver_in_processes(left, timeout_seconds, on_progress)
    outcomes = _combine_outcomes(outcomes, rest.outcomes)
    still_busy = {each.name for each in left.busy}
    refused: list[EvsysBusError] = [
        courier_busy_error(
            work.directory, each.name, None if each.last_error is None else f"{each.name}: {each.last_error}"
        )
        for each in left.busy
    ]
    outcomes = [each for each in outcomes if each.adapter not in still_busy]
    return SyncResult(outcomes, [*refused, *left.untrusted], rest.interrupted, done.overtaken | rest.overtaken)


def _combine_outcomes(first: Sequence[DeliveryOutcome], then: Sequence[DeliveryOutcome]) -> list[DeliveryOutcome]:
    """Combine two successive outcomes of each adapter into one."""
    found = {each.adapter: each for each in first}
    for each in then:
        previous = found.get(each.adapter, each)
        seconds = each.seconds + (previous.seconds if previous is not each else 0.0)
        found[each.adapter] = DeliveryOutcome(each.journal, previous.before, each.after, round(seconds, 1))
    return list(found.values())


def _deliver_in_processes(work: PendingWork, timeout_seconds: float, on_progress: OnProgress) -> SyncResult:
    """Deliver in child processes."""
    outcomes: list[DeliveryOutcome] = []
    overtaken: set[str] = set()
    origins = dict.fromkeys((each.working_directory, each.sys_path) for each, _ in work.deliverable)
    groups = [
        [each for each, _ in work.deliverable if (each.working_directory, each.sys_path) == origin]
        for origin in origins
    ]
    overtaken_seconds = min(_OVERTAKEN_SECONDS, timeout_seconds)
    while groups:
        group = groups.pop(0)
        monitor = DeliveryMonitor(work.directory, {each.name for each in group})
        on_progress(monitor.poll(0))
        interrupted = False
        with Interrupts(), _sync_process(work.directory, group) as process:
            try:
                elsewhere_since = math.inf
                while process.exit_code is None and not monitor.is_finished(timeout_seconds, overtaken_seconds):
                    statuses = monitor.poll(process.pid)
                    on_progress(statuses)
                    if not _are_all_held_elsewhere(work.directory, statuses, process.pid):
                        elsewhere_since = math.inf
                    elif (
                        time.monotonic() - (elsewhere_since := min(elsewhere_since, time.monotonic()))
                        > _LOCK_SIGNED_SECONDS
                    ):
                        break  # the couriers of a program that has just ended took the locks first
                    time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                interrupted = True
            exit_code = process.exit_code
        on_progress(monitor.poll(process.pid))
        if len(group) > 1 and not interrupted and process.exit_code != EXIT_DELIVERED:
            groups[:0] = [[each] for each in group]  # one adapter ended the process; deliver to each one separately
            continue
        overtaken.update(monitor.overtaken(0.0))
        outcomes += [_with_exit_reason(each, exit_code, work.directory) for each in monitor.outcomes()]
        if interrupted:
            return SyncResult(outcomes, [], interrupted=True)
    return SyncResult(outcomes, [], overtaken=frozenset(overtaken))


def _are_all_held_elsewhere(directory: Path, statuses: Sequence[DeliveryStatus], pid: int) -> bool:
    """Return whether other processes deliver to all adapters that have events left."""
    left = [each for each in statuses if each.unfinished or each.waiting]
    for each in left:
        owner = read_owner(OsDisk(), layout.courier_path(str(directory), each.name, "lock")) if each.busy else None
        if owner is None or (owner.pid, owner.host) == (pid, os.uname().nodename):
            return False
    return bool(left)


def _with_exit_reason(outcome: DeliveryOutcome, code: int | None, directory: Path) -> DeliveryOutcome:
    """Add the exit status of a process that ended without reporting an error."""
    after = outcome.after
    if code in {None, EXIT_DELIVERED} or not (after.pending or after.owed) or after.error is not None:
        return outcome
    assert code is not None
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    fix = f"read {directory / layout.COURIERS / LOG_NAME}"
    after = msgspec.structs.replace(after, error=f"its process has ended by {how}", fix=fix)
    return msgspec.structs.replace(outcome, after=after)


def _wait_for_couriers(
    directory: Path, names: set[str], timeout_seconds: float, on_progress: OnProgress, note: Callable[[str], object]
) -> SyncResult:
    """Wait for the processes that deliver to these adapters while they make progress; end those that are stuck."""
    monitor = DeliveryMonitor(directory, names)
    wait = _CourierWait(directory, timeout_seconds, note)
    interrupted = False
    with Interrupts():
        try:
            while True:
                statuses = monitor.poll(None)
                on_progress(statuses)
                if not wait.should_continue([each for each in statuses if each.busy and (each.pending or each.owed)]):
                    break
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
    return SyncResult(monitor.outcomes(), [], interrupted=interrupted)


class _CourierWait:
    """Decides how long to wait for other processes that deliver to a journal."""

    def __init__(self, directory: Path, timeout_seconds: float, note: Callable[[str], object]) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._note = note
        self._progress = ProgressReader(directory)
        self._ranks = load_ranks_by_adapter(directory)
        self._started_at = time.monotonic()
        self._statuses: list[DeliveryStatus] = []
        self._last_progress: dict[str, tuple[tuple[int, ...], float]] = {}
        self._noted: set[str] = set()
        self._signalled_at: dict[int, float] = {}

    def should_continue(self, held: Sequence[DeliveryStatus]) -> bool:
        """Return whether to keep waiting for these adapters; ends stuck processes."""
        self._statuses = self._progress.read()
        for each in self._statuses:
            counts = (each.delivered, each.dead, each.owed, each.waiting)
            if each.name not in self._last_progress or self._last_progress[each.name][0] != counts:
                self._last_progress[each.name] = counts, time.monotonic()
        orphaned: list[DeliveryStatus] = []
        for each in held:
            program = _live_program(self._directory, each.name, self._ranks)
            if program is None:
                orphaned.append(each)
            elif each.name not in self._noted:
                self._noted.add(each.name)
                who = f"its program, process {program.pid} on {program.host}, still runs and delivers by itself"
                self._note(f"{each.name}: {who}; waiting for it, {self._timeout_seconds:g} s at most")
        for each in orphaned:
            self._end_if_stuck(each.name)
        if len(held) > len(orphaned) and time.monotonic() - self._started_at < self._timeout_seconds:
            return True
        return any(self._idle_seconds(each.name) < self._allowed_idle_seconds(each.name) for each in orphaned)

    def _allowed_idle_seconds(self, name: str) -> float:
        """Return the allowed time without progress: shorter if the process is on another machine, out of reach."""
        is_local = _lock_owner_pid(self._directory, name) is not None
        return self._timeout_seconds if is_local else min(STUCK_SECONDS, self._timeout_seconds)

    def _idle_seconds(self, name: str) -> float:
        return time.monotonic() - self._last_progress[name][1] if name in self._last_progress else 0.0

    def _end_if_stuck(self, name: str) -> None:
        """End the process that delivers to this adapter if its program has ended and no adapter of it progresses."""
        pid = _orphaned_courier(self._directory, name)
        if pid is None:
            return
        allowed_seconds = min(STUCK_SECONDS, self._timeout_seconds / 2)
        for each in self._statuses:
            if each.busy and (each.pending or each.owed) and _lock_owner_pid(self._directory, each.name) == pid:
                waits_for_a_person = each.state in {"parked", "failed"} or (not each.pending and bool(each.owed_fix))
                if not waits_for_a_person and self._idle_seconds(each.name) < allowed_seconds:
                    return
        if pid not in self._signalled_at:
            self._note(f"{name}: the courier process {pid} of a program that has ended is stuck; taking over from it")
            number = signal.SIGTERM
        elif time.monotonic() - self._signalled_at[pid] >= _END_SECONDS:
            number = signal.SIGKILL  # it is stopped, or its adapter lets no handler run; cursors survive a kill
        else:
            return
        self._signalled_at[pid] = time.monotonic()
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _live_program(directory: Path, name: str, ranks: RanksByAdapter) -> LockOwner | None:
    """Return a live program that writes events for this adapter; None if there is none."""
    reader, served = JournalReader(directory), ranks.get(name)
    for stream in reader.streams():
        if (served is None or layout.rank_of(stream) in served) and reader.is_live(stream):
            return read_stream_owner(OsDisk(), str(directory), stream) or LockOwner(0, "an unknown host", "")
    return None


def _lock_owner_pid(directory: Path, name: str) -> int | None:
    """Return the PID of the process on this machine that delivers to the adapter; None if there is none."""
    found = read_owner(OsDisk(), layout.courier_path(str(directory), name, "lock"))
    if found is None or (found.boot, found.host) != (OsDisk().boot(), os.uname().nodename):
        return None
    return found.pid


def _orphaned_courier(directory: Path, name: str) -> int | None:
    """Return the PID of that process if it is a courier process whose program has ended."""
    pid = _lock_owner_pid(directory, name)
    found = None if pid is None else _parent_and_command(pid)
    if found is None or COURIER_MAIN not in found[1]:
        return None
    writers = {read_stream_owner(OsDisk(), str(directory), stream) for stream in JournalReader(directory).streams()}
    return None if found[0] in {each.pid for each in writers if each is not None} else pid


def _parent_and_command(pid: int) -> tuple[int, str] | None:
    """Return the parent's PID and the command line of a process; None if it is unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ")
        return int(stat.rpartition(")")[2].split()[1]), command
    except (OSError, ValueError, IndexError):
        pass
    ps = shutil.which("ps")
    if ps is None:
        return None
    line = subprocess.run([ps, "-o", "ppid=,args=", "-p", str(pid)], capture_output=True, text=True, check=False)  # noqa: S603 # from the user's PATH
    parent, _, command = line.stdout.strip().partition(" ")
    return (int(parent), command) if parent.isdecimal() else None


@contextmanager
def _sync_process(directory: Path, subscriptions: Sequence[SubscriptionRecord]) -> Generator[CourierProcess]:
    """Run a process that delivers within the block, and stop it with saved cursors. All share one working directory."""
    own_path = import_path()
    path = (*own_path, *(each for each in subscriptions[0].sys_path if each not in own_path))
    process = CourierProcess(CourierConfig(str(directory), list(subscriptions), path, 0.0, os.getpid()), SYNC_MAIN)
    try:
        process.send_config()
        yield process
    finally:
        process.end(_END_SECONDS)
