"""Delivering the pending events of a journal, with one process per original working directory of its adapters.

So relative paths in their params, and their modules, are resolved as in the original program.

If the courier process of a program that has ended still delivers, `deliver` waits for it, ends it if it is stuck, and
delivers the rest itself. The courier process of a live program is left alone.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from evsys_bus.cli.adapter_states import Ranks, ranks_served
from evsys_bus.cli.deliveries import LOOK_SECONDS, Outcome, Watch, busy
from evsys_bus.cli.delivery_progress import Tell
from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.delivery.accounts import Accounts, accounts
from evsys_bus.delivery.kept_process import DELIVERED_CODE, Order
from evsys_bus.delivery.process import LOG_NAME
from evsys_bus.delivery.process_log import open_log
from evsys_bus.delivery.roster import Posted, import_path, roster
from evsys_bus.errors import CourierBusyError
from evsys_bus.journal import JournalReader, OsDisk, layout
from evsys_bus.journal.claim import owner
from evsys_bus.journal.layout import Owner
from evsys_bus.journal.signature import signed
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.where import encode_json

# sys.path must be set before anything of evsys_bus is imported.
_BOOT: Final = (
    "import sys, json; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; from evsys_bus.cli.sync_main import main; main(line)'
)
_END_SECONDS: Final = 5.0
STUCK_SECONDS: Final = 10.0
"""A courier process of an ended program is terminated after this long without progress."""
_SURE_SECONDS: Final = 1.0
"""The owner of a lock is written a moment after the lock was taken."""
_OVERTAKEN_SECONDS: Final = 5.0
"""How long to continue past what was pending at first, where programs record more than adapters take."""
_SIGNAL_SECONDS: Final = 1.0
"""Interval between two signals to the same process."""
_COURIER_MAIN: Final = "evsys_bus.wiring.courier_main"


class Work(NamedTuple):
    """The pending deliveries of a journal."""

    directory: Path
    posted: list[tuple[Posted, DeliveryStatus]]
    """These can be delivered now."""
    busy: list[DeliveryStatus]
    """Another process delivers to these."""
    homeless: list[DeliveryStatus]
    """Only the original program has the adapter."""
    unknown: list[DeliveryStatus]
    """The files of these cannot be read now."""


class Done(NamedTuple):
    """The result of a sync."""

    outcomes: list[Outcome]
    busy: list[CourierBusyError]
    """Errors of adapters that another process still delivers to."""
    interrupted: bool = False
    overtaken: frozenset[str] = frozenset()
    """Adapters that have all that was pending at first, where a program goes on to record more."""


def unfinished_in(directory: Path, only: Collection[str] = ()) -> list[DeliveryStatus]:
    """Return the adapters of a journal that have pending or unconfirmed events."""
    found = (each for each in accounts(directory) if each.pending or each.owed or not each.is_known)
    return [each for each in found if not only or each.name in only or not each.is_known]


def work_in(directory: Path, only: Collection[str] = ()) -> Work:
    """Return the pending deliveries of a journal."""
    try:
        known = {each.name: each for each in roster(str(directory))}
    except OSError:  # every adapter is then reported as unreadable
        known = {}
    work = Work(directory.absolute(), [], [], [], [])
    for account in unfinished_in(directory, only):
        posted = known.get(account.name)
        if not account.is_known:
            work.unknown.append(account)
        elif account.busy:
            work.busy.append(account)
        elif posted is not None and posted.recipe is not None:
            work.posted.append((posted, account))
        elif account.pending:
            work.homeless.append(account)
    return work


def deliver(work: Work, timeout_seconds: float, tell: Tell, note: Callable[[str], object]) -> Done:
    """Deliver until nothing is pending or unconfirmed, or no more progress is to be expected.

    Args:
        work: The pending deliveries.
        timeout_seconds: An adapter that accepts nothing for this long is given up.
        tell: Shows the progress.
        note: Prints a line for the user.
    """
    done = _deliver(work, timeout_seconds, tell)
    if done.interrupted:
        return done
    names = {each.name for each in [*(account for _, account in work.posted), *work.busy]} - done.overtaken
    if not names:
        return done
    held = {each.name for each in work_in(work.directory, names).busy}  # includes couriers that started since
    held |= {each.name for each in work.busy}  # couriers that have ended since may have left events
    if not held:
        return done
    joined = _join(work.directory, held, timeout_seconds, tell, note)
    did_something = [each for each in joined.outcomes if each.before.pending or each.before.owed]
    outcomes = _one_after_another(done.outcomes, did_something)
    if joined.interrupted:
        return Done(outcomes, [], True, done.overtaken)
    left = work_in(work.directory, held)
    rest = _deliver(left, timeout_seconds, tell)
    outcomes = _one_after_another(outcomes, rest.outcomes)
    still = {each.name: each for each in left.busy}
    refused = [busy(work.directory, name, _why(each)) for name, each in still.items()]
    outcomes = [each for each in outcomes if each.adapter not in still]
    return Done(outcomes, refused, rest.interrupted, done.overtaken | rest.overtaken)


def _one_after_another(first: Sequence[Outcome], then: Sequence[Outcome]) -> list[Outcome]:
    """Combine two successive outcomes of each adapter into one."""
    found = {each.adapter: each for each in first}
    for each in then:
        earlier = found.get(each.adapter, each)
        seconds = each.seconds + (earlier.seconds if earlier is not each else 0.0)
        found[each.adapter] = Outcome(each.journal, earlier.before, each.after, round(seconds, 1))
    return list(found.values())


def _deliver(work: Work, timeout_seconds: float, tell: Tell) -> Done:
    """Deliver in child processes."""
    outcomes: list[Outcome] = []
    overtaken: set[str] = set()
    places = dict.fromkeys((each.folder, each.sys_path) for each, _ in work.posted)
    at_once = [[each for each, _ in work.posted if (each.folder, each.sys_path) == place] for place in places]
    overtaken_seconds = min(_OVERTAKEN_SECONDS, timeout_seconds)
    while at_once:
        posted = at_once.pop(0)
        watch = Watch(work.directory, {each.name for each in posted})
        tell(watch.look(0))
        interrupted = False
        with Interrupts(lambda _: None), _process(work.directory, posted) as process:
            try:
                elsewhere_since = math.inf
                while process.poll() is None and not watch.is_over(timeout_seconds, overtaken_seconds):
                    statuses = watch.look(process.pid)
                    tell(statuses)
                    if not _are_all_held_elsewhere(work.directory, statuses, process.pid):
                        elsewhere_since = math.inf
                    elif time.monotonic() - (elsewhere_since := min(elsewhere_since, time.monotonic())) > _SURE_SECONDS:
                        break  # the couriers of a program that has just ended took the locks first
                    time.sleep(LOOK_SECONDS)
            except KeyboardInterrupt:
                interrupted = True
            died_by = process.poll()
        tell(watch.look(process.pid))
        if len(posted) > 1 and not interrupted and process.returncode != DELIVERED_CODE:
            at_once[:0] = [[each] for each in posted]  # one adapter ended the process; deliver to each one separately
            continue
        overtaken.update(watch.overtaken(0.0))
        outcomes += [_with_death(each, died_by, work.directory) for each in watch.outcomes()]
        if interrupted:
            return Done(outcomes, [], interrupted=True)
    return Done(outcomes, [], overtaken=frozenset(overtaken))


def _are_all_held_elsewhere(directory: Path, statuses: Sequence[DeliveryStatus], pid: int) -> bool:
    """Return whether other processes deliver to all adapters that have events left."""
    left = [each for each in statuses if each.pending or each.owed]
    return bool(left) and all(each.busy and _is_held_elsewhere(directory, each.name, pid) for each in left)


def _is_held_elsewhere(directory: Path, name: str, pid: int) -> bool:
    found = signed(OsDisk(), layout.courier_file(str(directory), name, "lock"))
    return found is not None and (found.pid, found.host) != (pid, os.uname().nodename)


def _with_death(outcome: Outcome, code: int | None, directory: Path) -> Outcome:
    """Add the exit status of a process that ended without reporting an error."""
    after = outcome.after
    if code in {None, DELIVERED_CODE} or not (after.pending or after.owed) or after.error is not None:
        return outcome
    assert code is not None
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    fix = f"read {directory / layout.COURIERS / LOG_NAME}"
    after = msgspec.structs.replace(after, error=f"its process has ended by {how}", fix=fix)
    return msgspec.structs.replace(outcome, after=after)


def _join(directory: Path, names: set[str], timeout_seconds: float, tell: Tell, note: Callable[[str], object]) -> Done:
    """Wait for the processes that deliver to these adapters while they make progress; end those that are stuck."""
    watch = Watch(directory, names)
    joining = _Joining(directory, timeout_seconds, note)
    interrupted = False
    with Interrupts(lambda _: None):
        try:
            while True:
                statuses = watch.look(None)
                tell(statuses)
                if not joining.goes_on([each for each in statuses if each.busy and (each.pending or each.owed)]):
                    break
                time.sleep(LOOK_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
    return Done(watch.outcomes(), [], interrupted=interrupted)


class _Joining:
    """Decides how long to wait for other processes that deliver to a journal."""

    def __init__(self, directory: Path, timeout_seconds: float, note: Callable[[str], object]) -> None:
        self._directory = directory
        self._timeout_seconds = timeout_seconds
        self._note = note
        self._accounts = Accounts(directory)
        self._ranks = ranks_served(directory)
        self._began = time.monotonic()
        self._all: list[DeliveryStatus] = []
        self._moved: dict[str, tuple[tuple[int, ...], float]] = {}
        self._noted: set[str] = set()
        self._signalled: dict[int, float] = {}

    def goes_on(self, held: Sequence[DeliveryStatus]) -> bool:
        """Return whether to keep waiting for these adapters; ends stuck processes."""
        self._all = self._accounts.read()
        for each in self._all:
            counts = (each.delivered, each.dead, each.owed)
            if each.name not in self._moved or self._moved[each.name][0] != counts:
                self._moved[each.name] = counts, time.monotonic()
        orphaned: list[DeliveryStatus] = []
        for each in held:
            program = _program(self._directory, each.name, self._ranks)
            if program is None:
                orphaned.append(each)
            elif each.name not in self._noted:
                self._noted.add(each.name)
                who = f"its program, process {program.pid} on {program.host}, still runs and delivers by itself"
                self._note(f"{each.name}: {who}; waiting for it, {self._timeout_seconds:g} s at most")
        for each in orphaned:
            self._end_if_stuck(each.name)
        if len(held) > len(orphaned) and time.monotonic() - self._began < self._timeout_seconds:
            return True
        return any(self._quiet_seconds(each.name) < self._patience(each.name) for each in orphaned)

    def _patience(self, name: str) -> float:
        """Return the allowed time without progress: shorter if the process is on another machine, out of reach."""
        here = _holder(self._directory, name) is not None
        return self._timeout_seconds if here else min(STUCK_SECONDS, self._timeout_seconds)

    def _quiet_seconds(self, name: str) -> float:
        return time.monotonic() - self._moved[name][1] if name in self._moved else 0.0

    def _end_if_stuck(self, name: str) -> None:
        """End the process that delivers to this adapter if its program has ended and no adapter of it progresses."""
        pid = _lingering_courier(self._directory, name)
        if pid is None or time.monotonic() - self._signalled.get(pid, 0.0) < _SIGNAL_SECONDS:
            return
        patience = min(STUCK_SECONDS, self._timeout_seconds / 2)
        for each in self._all:
            if each.busy and (each.pending or each.owed) and _holder(self._directory, each.name) == pid:
                waits_for_a_person = each.state in {"parked", "failed"} or (not each.pending and bool(each.owed_fix))
                if not waits_for_a_person and self._quiet_seconds(each.name) < patience:
                    return
        if pid not in self._signalled:
            self._note(f"{name}: the courier process {pid} of a program that has ended is stuck; taking over from it")
        self._signalled[pid] = time.monotonic()
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)


def _program(directory: Path, name: str, ranks: Ranks) -> Owner | None:
    """Return a live program that writes events for this adapter; None if there is none."""
    reader, served = JournalReader(directory), ranks.get(name)
    for stream in reader.streams():
        if (served is None or layout.rank_of(stream) in served) and reader.is_live(stream):
            return owner(OsDisk(), str(directory), stream) or Owner(0, "an unknown host", "")
    return None


def _holder(directory: Path, name: str) -> int | None:
    """Return the PID of the process on this machine that delivers to the adapter; None if there is none."""
    found = signed(OsDisk(), layout.courier_file(str(directory), name, "lock"))
    if found is None or (found.boot, found.host) != (OsDisk().boot(), os.uname().nodename):
        return None
    return found.pid


def _lingering_courier(directory: Path, name: str) -> int | None:
    """Return the PID of that process if it is a courier process whose program has ended."""
    pid = _holder(directory, name)
    found = None if pid is None else _parent_and_command(pid)
    if found is None or _COURIER_MAIN not in found[1]:
        return None
    writers = {owner(OsDisk(), str(directory), stream) for stream in JournalReader(directory).streams()}
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


def _why(status: DeliveryStatus) -> str | None:
    return None if status.trouble is None else f"{status.name}: {status.trouble}"


@contextmanager
def _process(directory: Path, posted: Sequence[Posted]) -> "Generator[subprocess.Popen[bytes]]":
    """Run a process that delivers within the block, and stop it with saved cursors. All share one working directory."""
    folder, sys_path, ours = posted[0].folder, posted[0].sys_path, import_path()
    path = (*ours, *(each for each in sys_path if each not in ours))
    order = Order(str(directory), list(posted), path, 0.0, os.getpid())
    log = directory / layout.COURIERS / LOG_NAME
    with os.fdopen(open_log(str(log)), "wb") as output:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter with fixed arguments
            [sys.executable, "-P", "-c", _BOOT, str(directory)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder if Path(folder).is_dir() else None,
            start_new_session=True,  # Ctrl-C is handled here, and stops the process with saved cursors
        )
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # the process has died; its events stay pending
            rest = memoryview(encode_json(order) + b"\n")
            while rest:
                rest = rest[process.stdin.write(rest) :]
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
