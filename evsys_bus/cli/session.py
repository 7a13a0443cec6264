"""Running an experiment from its plan to its exit code, for ``run`` and ``demo``."""

import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import anyio
import click
import msgspec

from evsys_bus.bus import EventBus, Health, Receipt
from evsys_bus.cli.deliveries import TroubleWatch, trouble_lines
from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.cli.planned import Planned, earlier_page
from evsys_bus.cli.printed import printed_aside
from evsys_bus.cli.progress import Board, PlannedRun, ProgressMode, Waiting, resolved, shown
from evsys_bus.cli.results import finish_command, result_json, result_lines
from evsys_bus.cli.run_journal import read_pages
from evsys_bus.cli.screen import Screen, printable
from evsys_bus.cli.tables import counted
from evsys_bus.cli.telling import INTERRUPTED, OK, PENDING, RAISED, REMOTE
from evsys_bus.cli.uploads import UploadWatch
from evsys_bus.cli.warnings_log import warnings_shown
from evsys_bus.context import ExperimentResult
from evsys_bus.errors import ConfigError, TrainingError
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.folder_lock import unwritable
from evsys_bus.training.ledger import LEDGER
from evsys_bus.training.loop import JOURNAL
from evsys_bus.wiring import build_callbacks

_MAX_STOPPED: Final = 4
_DRAIN_SECONDS: Final = 20.0
"""Deadline of the drain; the bus's own default."""


class Wishes(NamedTuple):
    """How to run and show the experiment."""

    resume: bool = False
    strict: bool = False
    progress: ProgressMode = "auto"
    as_json: bool = False
    command: Sequence[str] = ()
    """The command line without ``--resume``, for hints."""


def train(plan: Planned, wishes: Wishes, screen: Screen) -> int:
    """Run the experiment, show its progress and result, and return the exit code.

    Raises:
        EvsysBusError: The experiment could not be started.
    """
    again = shlex.join([*wishes.command, "--resume"])
    _refuse_used(plan, wishes, again)
    callbacks = _built(plan)
    if wishes.resume:
        from evsys_bus.cli.resuming import bring_newest

        bring_newest(plan, resolved(wishes.progress, sys.stderr), screen)
    board = _board(plan, wishes)
    as_json = wishes.progress == "json"
    if resolved(wishes.progress, sys.stderr) == "plain":  # the live table shows it itself
        screen.note(f"{plan.title}\nCtrl-C stops after the current step; go on with: {again}")

    def told(received: signal.Signals) -> None:
        board.notice = f"{received.name}: stopping after the current steps; a second one ends the program at once"
        board.say("stopping", signal=received.name)

    began = time.monotonic()
    outcome: _Outcome | None = None
    with (
        Interrupts(told) as interrupts,
        printed_aside(result_is_json=wishes.as_json, progress_is_json=as_json),
        shown(
            board,
            wishes.progress,
            screen,
            title=plan.title,
            success_metric=_metric(plan),
            uploads=UploadWatch(plan.folder / JOURNAL).look,
            troubles=TroubleWatch(plan.folder / JOURNAL).look,
        ),
        warnings_shown(screen, as_json=as_json),
    ):
        try:
            outcome = anyio.run(_train, plan, wishes, [*callbacks, board], interrupts, board)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if interrupts.received is None:
                raise
    if outcome is None:
        _tell_interrupted(board, plan, again, screen)
        return INTERRUPTED
    seconds = time.monotonic() - began
    pages = read_pages(plan.folder / JOURNAL, inline="learnt" in outcome.health.published)
    pages = {run.run_key: pages[run.run_key] for run in plan.runs if run.run_key in pages}
    form = result_json if wishes.as_json else result_lines
    lines = form(plan, outcome.result, seconds, outcome.receipt, pages)
    with suppress(BrokenPipeError):  # stdout is closed; the exit code is still that of the training
        click.echo("\n".join(lines))
    unfinished = _tell_troubles(outcome, screen)
    if outcome.result.status == "failed" or any(run.status == "failed" for run in outcome.result.arms):
        return RAISED
    if outcome.result.status == "cancelled":  # by a required delivery
        screen.note(f"stopped before it was done; go on with: {again}")
        return REMOTE
    return PENDING if unfinished and wishes.strict else OK


class _Outcome(NamedTuple):
    result: ExperimentResult
    health: Health
    receipt: Receipt | None


async def _train(
    plan: Planned, wishes: Wishes, callbacks: Sequence[object], interrupts: Interrupts, board: Board
) -> _Outcome:
    interrupts.stop_this_task()
    bus = EventBus(callbacks, journal=plan.folder / JOURNAL, drain_timeout=_DRAIN_SECONDS)
    try:  # otherwise the journal would report it, as an error of its own directory
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(plan.folder.absolute(), "the experiment's directory", error) from error
    trained: ExperimentResult | None = None
    try:
        async with bus:
            experiment = Experiment(
                plan.config,
                bus=bus,
                resume=wishes.resume,
                output_dir=plan.folder,
                only_arms=list(dict.fromkeys(run.arm for run in plan.runs)),
                only_seeds=list(dict.fromkeys(run.seed for run in plan.runs)),
            )
            try:
                trained = await experiment.run()
            finally:
                interrupts.end_the_wait_of_this_task()
                board.waiting = Waiting(lambda: _left(bus.health()), _DRAIN_SECONDS)
    except asyncio.CancelledError:
        if trained is None:
            raise
        # All runs had ended: only the drain was cut short, and pending events are reported.
    finally:
        board.waiting = None
    assert trained is not None
    return _Outcome(trained, bus.health(), bus.receipt)  # read after the bus was left, so that its last calls count


def _left(health: Health) -> tuple[int, Sequence[DeliveryStatus]]:
    return health.tasks_running + health.tasks_waiting, health.deliveries


def _refuse_used(plan: Planned, wishes: Wishes, again: str) -> None:
    """Refuse a directory that holds an experiment, with the command line that continues it."""
    if not wishes.resume and (plan.folder / LEDGER).exists():
        page = earlier_page(plan.folder)
        why = None if page is None else f'it is "{page.name}", {page.status}, started {page.started}'
        raise TrainingError(
            f"{plan.shown_folder} holds an experiment already",
            why=why,
            fix=f"go on with it: {again}   or choose another --output-dir",
        )


def _built(plan: Planned) -> list[object]:
    """Build the callbacks; errors of their constructors point to the line of the file."""
    try:
        return list(build_callbacks(plan.config.callbacks))
    except ConfigError as error:
        for each in getattr(error, "errors", (error,)):
            if each.where is not None and each.where.file is None:
                each.where = plan.document.where(each.where.path)
        raise


def _board(plan: Planned, wishes: Wishes) -> Board:
    page = earlier_page(plan.folder) if wishes.resume else None
    done: set[str] = set() if page is None else {key for key, entry in page.runs.items() if entry.status == "completed"}
    runs = [
        PlannedRun(run.run_key, run.arm, run.seed, run.stage, "completed" if run.run_key in done else "pending")
        for run in plan.runs
    ]
    return Board(runs, folder=plan.shown_folder, keep_news=wishes.progress != "off")


def _metric(plan: Planned) -> str | None:
    return plan.config.success_metric and plan.config.success_metric.name


def _tell_interrupted(board: Board, plan: Planned, again: str, screen: Screen) -> None:
    runs = list(board.runs.values())
    done = sum(run.status == "completed" for run in runs)
    stopped = [run for run in runs if run.status in {"cancelled", "running"} and run.began is not None]
    at = ", ".join(f"{run.key} at step {run.step:,}" for run in stopped[:_MAX_STOPPED])
    more = f" and {len(stopped) - _MAX_STOPPED} more" if len(stopped) > _MAX_STOPPED else ""
    screen.note(f"interrupted: {done} of {counted(len(runs), 'run')} done{f'; stopped {at}{more}' if at else ''}")
    screen.note(f"data: {plan.shown_folder}")
    screen.note(f"go on with: {again}")


def _tell_troubles(outcome: _Outcome, screen: Screen) -> bool:
    """Report failed hooks, tasks and deliveries, and return whether anything is unfinished."""
    head = screen.style("warning:", sys.stderr, fg="yellow", bold=True)
    unfinished = False
    for hook in outcome.health.hooks:
        if hook.failures:
            unfinished = True
            screen.note(f"{head} {hook.callback}.{hook.hook} raised in {hook.failures:,} of {hook.calls:,} calls")
    receipt = outcome.receipt
    if receipt is None:
        return unfinished
    for owner, tasks in receipt.tasks_by_owner.items():
        counts = ((tasks.failed, "failed"), (tasks.cancelled, "cancelled"), (tasks.refused, "refused"))
        parts = [f"{count:,} {word}" for count, word in counts if count]
        if parts:
            unfinished = True
            screen.note(f"{head} tasks of {owner}: {', '.join(parts)} of {tasks.spawned + tasks.adopted:,}")
    if receipt.left:
        unfinished = True
        screen.note(f"{head} still running at the end: {', '.join(receipt.left)}")
    return _tell_undelivered(receipt, screen) or unfinished


def _tell_undelivered(receipt: Receipt, screen: Screen) -> bool:
    """Report problems of deliveries, ending with the command that finishes them."""
    head = screen.style("warning:", sys.stderr, fg="yellow", bold=True)
    for each in receipt.deliveries:
        unfinished = each.pending or each.owed or not each.is_known
        told = each if unfinished or each.state == "failed" else msgspec.structs.replace(each, error=None)
        for line in trouble_lines(told, receipt.journal, timed=False):
            screen.note(f"{head} {printable(line)}")
    pending = [f"{printable(each.name)} {each.pending:,}" for each in receipt.deliveries if each.pending]
    pending += [f"{printable(each.name)} unknown" for each in receipt.deliveries if not each.is_known]
    owed = [f"{printable(each.name)} {each.owed:,} owed" for each in receipt.deliveries if each.owed]
    if pending or owed:
        command = finish_command(receipt)
        then = "" if command is None else f"; finish with: {command}"
        what = "delivered yet" if not owed else "confirmed yet" if not pending else "delivered or not confirmed yet"
        screen.note(f"{head} events not {what}: {', '.join([*pending, *owed])}{then}")
    return not all(each.complete for each in receipt.deliveries)
