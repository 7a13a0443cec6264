"""Delivering what is pending in one journal: a process for each folder that adapters were followed from.

Relative paths in their params, and their modules, mean what they meant there.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from evsys_bus.cli.deliveries import LOOK_SECONDS, Outcome, Watch, busy
from evsys_bus.cli.delivery_progress import Tell
from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.delivery.accounts import Account, accounts
from evsys_bus.delivery.kept_process import DELIVERED_CODE, Order
from evsys_bus.delivery.process import LOG_NAME
from evsys_bus.delivery.roster import Posted, import_path, roster
from evsys_bus.errors import CourierBusyError
from evsys_bus.journal import layout

# Nothing of ours may be imported before sys.path is what the order says.
_BOOT: Final = (
    "import sys, json; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; from evsys_bus.cli.sync_main import main; main(line)'
)
_END_SECONDS: Final = 5.0


class Work(NamedTuple):
    """What there is to be delivered in one journal."""

    directory: Path
    posted: list[tuple[Posted, Account]]
    """Can be delivered now."""
    busy: list[CourierBusyError]
    homeless: list[Account]
    """Only the program that followed them has the adapter."""


def pending_in(directory: Path, only: Collection[str] = ()) -> list[Account]:
    """The adapters of a journal that something is pending for."""
    return [each for each in accounts(directory) if each.pending and (not only or each.name in only)]


def work_in(directory: Path, only: Collection[str] = ()) -> Work:
    """What there is to do."""
    known = {each.name: each for each in roster(str(directory))}
    work = Work(directory.absolute(), [], [], [])
    for account in pending_in(directory, only):
        posted = known.get(account.name)
        if account.busy:
            work.busy.append(busy(directory, account.name))
        elif posted is None or posted.recipe is None:
            work.homeless.append(account)
        else:
            work.posted.append((posted, account))
    return work


def deliver(work: Work, timeout_seconds: float, tell: Tell) -> tuple[list[Outcome], bool]:
    """Deliver until nothing is pending, or nothing more is to be expected.

    Returns:
        What came of it, and whether it was interrupted.
    """
    outcomes: list[Outcome] = []
    places = dict.fromkeys((each.folder, each.sys_path) for each, _ in work.posted)
    at_once = [[each for each, _ in work.posted if (each.folder, each.sys_path) == place] for place in places]
    while at_once:
        posted = at_once.pop(0)
        watch = Watch(work.directory, {each.name for each in posted})
        interrupted = False
        with Interrupts(lambda _: None), _process(work.directory, posted) as process:
            try:
                while process.poll() is None and not watch.is_over(timeout_seconds):
                    tell(watch.look(process.pid))
                    time.sleep(LOOK_SECONDS)
            except KeyboardInterrupt:
                interrupted = True
        tell(watch.look(process.pid))
        if len(posted) > 1 and not interrupted and process.returncode != DELIVERED_CODE:
            at_once[:0] = [[each] for each in posted]  # one of them ended it; by themselves the others are delivered to
            continue
        outcomes += watch.outcomes()
        if interrupted:
            return outcomes, True
    return outcomes, False


@contextmanager
def _process(directory: Path, posted: Sequence[Posted]) -> "Generator[subprocess.Popen[bytes]]":
    """Runs while the block does, and is then stopped at its cursors. All were followed from the same folder."""
    folder, sys_path, ours = posted[0].folder, posted[0].sys_path, import_path()
    path = (*ours, *(each for each in sys_path if each not in ours))
    order = Order(str(directory), list(posted), path, 0.0, os.getpid())
    log = directory / layout.COURIERS / LOG_NAME
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as output:
        process = subprocess.Popen(  # noqa: S603  # our own interpreter, and nothing from outside
            [sys.executable, "-P", "-c", _BOOT, str(directory)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder if Path(folder).is_dir() else None,
            start_new_session=True,  # Ctrl-C is ours: it is stopped at its cursors then
        )
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):  # it is dead already, and what is pending says so
            rest = memoryview(msgspec.json.encode(order) + b"\n")
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
