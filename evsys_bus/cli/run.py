"""``evsys-bus run``: runs an experiment file from its plan to its exit code.

Progress goes to stderr. The result on stdout is a table of arms, the conclusion, and the location of the data.
"""

import asyncio
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import anyio
import click
import msgspec

from evsys_bus.bus import EventBus, Health, Receipt
from evsys_bus.cli.check import ExperimentPlan, check_resume, load_plan, plan_json, plan_lines, warn_about_metric
from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.cli.options import build_command_line, dash_option, output_dir_option, running_options
from evsys_bus.cli.output.capture import guard_stdout, keep_output
from evsys_bus.cli.output.deliveries import (
    ProblemMonitor,
    RanksByAdapter,
    describe_counts,
    describe_state,
    load_ranks_by_adapter,
    problem_lines,
    sync_command,
)
from evsys_bus.cli.output.errors import INTERRUPTED, OK, PENDING, RAISED, REMOTE, show_warnings
from evsys_bus.cli.output.formatting import (
    GAP,
    NO_VALUE,
    format_counts,
    format_duration,
    format_facts,
    format_mean_sd,
    format_table,
    format_time,
    pluralize,
    summarize_error,
)
from evsys_bus.cli.output.progress import ProgressMode, resolve_mode, show_progress
from evsys_bus.cli.output.run_state import DrainStatus, PlannedRun, RunStateTracker
from evsys_bus.cli.output.screen import Screen, printable, terminal_width, wrap
from evsys_bus.cli.records import load_previous_experiment, read_page_urls
from evsys_bus.cli.uploads import UploadMonitor
from evsys_bus.codec import json_line
from evsys_bus.codec.redact import redact_key, redact_text
from evsys_bus.config import build_callbacks
from evsys_bus.config.registry import REGISTRY
from evsys_bus.config.spec import read_spec
from evsys_bus.context import ArmResult, ExperimentResult
from evsys_bus.errors import ConfigError, TrainingError
from evsys_bus.run_files import journal_directory, unwritable_error
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.experiment_store import EXPERIMENT_FILE
from evsys_bus.training.plan import RunPlan
from evsys_bus.training.summary import ArmSummary, Spread, summarise

_MAX_STOPPED: Final = 4
_DRAIN_SECONDS: Final = 20.0
"""Deadline of the drain; the bus's own default."""
_MAX_METRICS: Final = 4
_MAX_FAILURES: Final = 10
_MAX_PAGE_URLS: Final = 10
_DASHBOARD_LOGGER: Final = "evsys_logger"
"""The kind of the callback that sends events to the dashboard."""
_HIDDEN_METRICS: Final = frozenset({"epoch", "step_seconds", "grad_norm"})


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@output_dir_option("Default: the file's output_dir, or runs/<name>.")
@click.option("--dry-run", is_flag=True, help="Show the runs, and start nothing.")
@dash_option
@click.option("--output/--no-output", default=True, help="Copy what Python code prints into output.log.")
@running_options
@click.pass_obj
def command(
    screen: Screen,
    file: Path,
    output_dir: Path | None,
    dry_run: bool,
    dash: bool,
    output: bool,
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    sets: tuple[str, ...],
    resume: bool,
    strict: bool,
    progress: ProgressMode,
    as_json: bool,
    log_level: int | None,
) -> int:
    """Run the experiment that FILE describes.

    Progress goes to stderr, the result to stdout. The first Ctrl-C stops the runs after the current step, with a
    checkpoint; --resume continues from there.

    \b
    Examples:
      evsys-bus run sweep.yaml --dry-run
      evsys-bus run sweep.yaml --arm low --seed 0 --set run.steps=10 --output-dir /tmp/try
      evsys-bus run sweep.yaml --resume
    """  # noqa: D301 # click reads the backspace as: do not wrap
    plan = load_plan(file, sets=sets, arms=arms, seeds=seeds, output_dir=output_dir)
    if dry_run:
        if resume:
            check_resume(plan)
        warn_about_metric(plan, screen)
        click.echo("\n".join(plan_json(plan) if as_json else plan_lines(plan)))
        return 0

    shown_sets = tuple(map(redact_text, sets))
    resume_command = build_command_line("run", file, set=shown_sets, arm=arms, seed=seeds, output_dir=output_dir)
    return train(plan, RunOptions(resume, strict, progress, as_json, resume_command, log_level, output, dash), screen)


class RunOptions(NamedTuple):
    """How to run and show the experiment."""

    resume: bool
    strict: bool
    progress: ProgressMode
    as_json: bool
    command: Sequence[str]
    """The command line without ``--resume``, for hints."""
    log_level: int | None = None
    """The least level of log records that are shown; WARNING if None. From ERROR on there is no progress either."""
    output: bool = True
    """Whether to copy what Python code prints into the experiment's ``output.log``."""
    dash: bool = False
    """Whether to show it in the dashboard."""


def train(plan: ExperimentPlan, options: RunOptions, screen: Screen) -> int:
    """Run the experiment, show its progress and result, and return the exit code.

    Raises:
        EvsysBusError: The experiment could not be started.
    """
    level = logging.WARNING if options.log_level is None else options.log_level
    if level >= logging.ERROR:
        options = options._replace(progress="off")
    resume_command = shlex.join([*options.command, "--resume"])
    _check_unused(plan, options, resume_command)
    callbacks = _build_callbacks(plan)
    callbacks += _open_dashboard(callbacks, screen) if options.dash else []
    if options.resume:
        _fetch_before_resume(plan, resolve_mode(options.progress), screen)
    tracker = _make_tracker(plan, options)
    as_json = options.progress == "json"
    if resolve_mode(options.progress) == "plain":  # the live table shows it itself
        screen.note(f"{plan.title}\nCtrl-C stops after the current step; go on with: {resume_command}")

    def on_signal(received: signal.Signals) -> None:
        tracker.notice = f"{received.name}: stopping after the current steps; a second one ends the program at once"
        tracker.add_update("stopping", signal=received.name)

    began = time.monotonic()
    outcome: _TrainingOutcome | None = None
    with (
        Interrupts(on_signal) as interrupts,
        guard_stdout(result_is_json=options.as_json, progress_is_json=as_json),
        show_progress(
            tracker,
            options.progress,
            screen,
            title=plan.title,
            success_metric=plan.config.success_metric and plan.config.success_metric.name,
            poll_uploads=UploadMonitor(journal_directory(plan.folder)).poll,
            poll_problems=ProblemMonitor(journal_directory(plan.folder)).poll,
        ),
        show_warnings(screen, as_json=as_json, level=level),
    ):
        try:
            outcome = anyio.run(_train, plan, options, [*callbacks, tracker], interrupts, tracker)
        except (asyncio.CancelledError, KeyboardInterrupt):
            if interrupts.received is None:
                raise
    if outcome is None:
        runs = list(tracker.runs.values())
        done = sum(run.status == "completed" for run in runs)
        stopped = [run for run in runs if run.status in {"cancelled", "running"} and run.started_at is not None]
        at = ", ".join(f"{run.key} at step {run.step:,}" for run in stopped[:_MAX_STOPPED])
        more = f" and {len(stopped) - _MAX_STOPPED} more" if len(stopped) > _MAX_STOPPED else ""
        screen.note(f"interrupted: {done} of {pluralize(len(runs), 'run')} done{f'; stopped {at}{more}' if at else ''}")
        screen.note(f"data: {plan.display_folder}")
        screen.note(f"go on with: {resume_command}")
        return INTERRUPTED
    seconds = time.monotonic() - began
    page_urls = read_page_urls(journal_directory(plan.folder), inline="learnt" in outcome.health.published)
    page_urls = {run.run_key: page_urls[run.run_key] for run in plan.runs if run.run_key in page_urls}
    facts = (plan, outcome.result, seconds, outcome.receipt, page_urls)
    lines = result_json(*facts) if options.as_json else result_lines(*facts, screen)
    with suppress(BrokenPipeError):  # stdout is closed; the exit code is still that of the training
        click.echo("\n".join(lines))
    unfinished = _report_problems(outcome, screen, quiet=level >= logging.ERROR)
    if outcome.result.status == "failed" or any(run.status == "failed" for run in outcome.result.arms):
        return RAISED
    if outcome.result.status == "cancelled":  # by a required delivery
        screen.note(f"stopped before it was done; go on with: {resume_command}")
        return REMOTE
    return PENDING if unfinished and options.strict else OK


class _TrainingOutcome(NamedTuple):
    result: ExperimentResult
    health: Health
    receipt: Receipt | None


async def _train(
    plan: ExperimentPlan,
    options: RunOptions,
    callbacks: Sequence[object],
    interrupts: Interrupts,
    tracker: RunStateTracker,
) -> _TrainingOutcome:
    interrupts.cancel_this_task_on_signal()
    bus = EventBus(
        callbacks,
        journal=journal_directory(plan.folder),
        redact=plan.config.redact,
        reveal=plan.config.reveal,
        drain_timeout=_DRAIN_SECONDS,
    )
    try:  # otherwise the journal would report it, as an error of its own directory
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable_error(plan.folder.absolute(), "the experiment's directory", error) from error
    result: ExperimentResult | None = None
    try:
        async with AsyncExitStack() as stack:
            if options.output:
                stack.enter_context(keep_output(plan.folder))
            await stack.enter_async_context(bus)
            experiment = Experiment(
                plan.config,
                bus=bus,
                resume=options.resume,
                output_dir=plan.folder,
                only_arms=list(dict.fromkeys(run.arm for run in plan.runs)),
                only_seeds=list(dict.fromkeys(run.seed for run in plan.runs)),
            )
            try:
                result = await experiment.run()
            finally:
                interrupts.stop_waiting_on_signal()
                tracker.drain_status = DrainStatus(lambda: _remaining_work(bus.health()), _DRAIN_SECONDS)
    except asyncio.CancelledError:
        if result is None:
            raise
        # All runs had ended: only the drain was cut short, and pending events are reported.
    finally:
        tracker.drain_status = None
    assert result is not None
    return _TrainingOutcome(
        result, bus.health(), bus.receipt
    )  # read after the bus was left, so that its last calls count


def _remaining_work(health: Health) -> tuple[int, Sequence[DeliveryStatus]]:
    return health.tasks_running + health.tasks_waiting, health.deliveries


def _check_unused(plan: ExperimentPlan, options: RunOptions, resume_command: str) -> None:
    """Refuse a directory that holds an experiment, with the command line that continues it."""
    if not options.resume and (plan.folder / EXPERIMENT_FILE).exists():
        previous = load_previous_experiment(plan.folder)
        why = (
            None
            if previous is None
            else f'it is "{previous.name}", {previous.status}, started {format_time(previous.started)}'
        )
        raise TrainingError(
            f"{plan.display_folder} holds an experiment already",
            why=why,
            fix=f"go on with it: {resume_command}   or choose another --output-dir",
        )


def _build_callbacks(plan: ExperimentPlan) -> list[object]:
    """Build the callbacks; errors of their constructors point to the line of the file."""
    try:
        return list(build_callbacks(plan.config.callbacks))
    except ConfigError as error:
        for each in getattr(error, "errors", (error,)):
            if each.where is not None and each.where.file is None:
                each.where = plan.document.where(each.where.path)
        raise


def _open_dashboard(callbacks: Sequence[object], screen: Screen) -> list[object]:
    """Let the adapter of the dashboard find or start it; returns the callbacks that it adds to those of the plan."""
    logger: Any = REGISTRY.find(_DASHBOARD_LOGGER)
    return logger.open_dashboard(callbacks, screen)


def _fetch_before_resume(plan: ExperimentPlan, mode: ProgressMode, screen: Screen) -> None:
    """Let adapters that store checkpoints elsewhere fetch the ones that the runs continue from."""
    specs = [read_spec(item, "$.callbacks") for item in plan.config.callbacks]
    classes = [REGISTRY.find(spec.kind) for spec in specs]
    for fetch in dict.fromkeys(getattr(each, "fetch_before_resume", None) for each in classes):
        if fetch is not None:
            fetch(specs, plan.folder, plan.runs, mode, screen)


def _make_tracker(plan: ExperimentPlan, options: RunOptions) -> RunStateTracker:
    previous = load_previous_experiment(plan.folder) if options.resume else None
    done: set[str] = (
        set() if previous is None else {key for key, entry in previous.runs.items() if entry.status == "completed"}
    )
    runs = [
        PlannedRun(run.run_key, run.arm, run.seed, run.stage, "completed" if run.run_key in done else "pending")
        for run in plan.runs
    ]
    return RunStateTracker(runs, folder=plan.display_folder, keep_updates=options.progress != "off")


def _report_problems(outcome: _TrainingOutcome, screen: Screen, *, quiet: bool) -> bool:
    """Report failed hooks, tasks and deliveries, and return whether anything is unfinished."""
    head = screen.style("warning:", sys.stderr, fg="yellow", bold=True)
    warn: Callable[[str], None] = (lambda _: None) if quiet else screen.note
    unfinished = False
    for hook in outcome.health.hooks:
        if hook.failures:
            unfinished = True
            warn(f"{head} {hook.callback}.{hook.hook} raised in {hook.failures:,} of {hook.calls:,} calls")
    receipt = outcome.receipt
    if receipt is None:
        return unfinished
    for owner, tasks in receipt.tasks_by_owner.items():
        counts = ((tasks.failed, "failed"), (tasks.cancelled, "cancelled"), (tasks.refused, "refused"))
        parts = format_counts(counts)
        if parts:
            unfinished = True
            warn(f"{head} tasks of {owner}: {', '.join(parts)} of {tasks.spawned + tasks.adopted:,}")
    if receipt.unfinished:
        unfinished = True
        warn(f"{head} still running at the end: {', '.join(receipt.unfinished)}")
    return _report_undelivered(receipt, warn, head) or unfinished


def _report_undelivered(receipt: Receipt, warn: Callable[[str], None], head: str) -> bool:
    """Report problems of deliveries, ending with the command that finishes them."""
    for each in receipt.deliveries:
        is_shown = each.unfinished or each.waiting or each.state == "failed"
        status = each if is_shown else msgspec.structs.replace(each, error=None)
        for line in problem_lines(status, receipt.journal, show_since=False):
            warn(printable(line) if each.state == "waiting" else f"{head} {printable(line)}")
    pending = [f"{printable(each.name)} {each.pending:,}" for each in receipt.deliveries if each.pending]
    pending += [f"{printable(each.name)} unknown" for each in receipt.deliveries if not each.is_known]
    unconfirmed = [f"{printable(each.name)} {each.owed:,} owed" for each in receipt.deliveries if each.owed]
    if pending or unconfirmed:
        command = delivery_command(receipt)
        suffix = "" if command is None else f"; finish with: {command}"
        kinds = [*(["delivered"] if pending else []), *(["confirmed"] if unconfirmed else [])]
        what = f"{' or not '.join(kinds)} yet"
        warn(f"{head} events not {what}: {', '.join([*pending, *unconfirmed])}{suffix}")
    return any(each.unfinished or each.dead or each.failures for each in receipt.deliveries)


def result_lines(
    plan: ExperimentPlan,
    result: ExperimentResult,
    seconds: float,
    receipt: Receipt | None,
    page_urls: Mapping[str, str],
    screen: Screen,
) -> list[str]:
    """Return the result as text; ``page_urls`` are the known URLs of runs."""
    width = terminal_width(sys.stdout)
    arms = summarise(result.arms, plan.config.success_metric)
    metrics = [
        name for name in dict.fromkeys(name for arm in arms for name in arm.metrics) if name not in _HIDDEN_METRICS
    ]
    shown = metrics[:_MAX_METRICS]
    head = ["arm", "runs", *(printable(redact_key(name)) for name in shown)]
    rows = [head, *(_row(arm, shown, result.best_arm, screen) for arm in arms)]
    lines = [
        f"{printable(result.name)}   {screen.style_state(result.status, sys.stdout)} in {format_duration(seconds)}",
        "",
        *format_table(rows, width),
    ]
    failed = [(run, arm) for run, arm in _pair_runs(plan, result) if arm.status == "failed"]
    lines += [""] if failed else []
    for run, arm in failed[:_MAX_FAILURES]:
        name = " ".join([run.arm, f"seed {run.seed}", *([run.stage] if run.stage else [])])
        show = f"traceback: evsys-bus logs {plan.display_folder}/{run.run_key}"
        lines += wrap(f"! {printable(name)} failed: {summarize_error(arm.error)}   {show}", width)
    if len(failed) > _MAX_FAILURES:
        lines.append(f"! and {len(failed) - _MAX_FAILURES} more failed runs")
    details = [
        *([["hypothesis", redact_text(result.hypothesis)]] if result.hypothesis else []),
        *([["conclusion", redact_text(result.conclusion)]] if result.conclusion else []),
        *([["delivery", _format_deliveries(receipt)]] if receipt and receipt.deliveries else []),
        ["data", plan.display_folder],
        ["a run", f"evsys-bus show {plan.display_folder}/{plan.runs[0].run_key}"],
        *([run, f"View run at {url}"] for run, url in list(page_urls.items())[:_MAX_PAGE_URLS]),
    ]
    if len(page_urls) > _MAX_PAGE_URLS:
        details.append(["", f"and {len(page_urls) - _MAX_PAGE_URLS} more runs"])
    return [*lines, "", *format_facts([[name, printable(text)] for name, text in details], width)]


def result_json(
    plan: ExperimentPlan,
    result: ExperimentResult,
    seconds: float,
    receipt: Receipt | None,
    page_urls: Mapping[str, str],
) -> list[str]:
    """Return the result as JSON: a line for each run, arm and delivery, and one for the experiment."""
    rows: list[dict[str, Any]] = [
        {
            "type": "run",
            "run": run.run_key,
            "arm": run.arm,
            "seed": run.seed,
            "stage": run.stage,
            "status": arm.status,
            "metrics": arm.metrics,
            "eval_metrics": arm.eval_metrics,
            "error": arm.error,
            "run_dir": str(run.run_dir),
            "page": page_urls.get(run.run_key),
        }
        for run, arm in _pair_runs(plan, result)
    ]
    for arm in summarise(result.arms, plan.config.success_metric):
        spreads = {name: {"mean": each.mean, "sd": each.sd, "n": each.n} for name, each in arm.metrics.items()}
        counts = {"runs": arm.runs, "completed": arm.completed, "failed": arm.failed}
        rows.append({"type": "arm", "arm": arm.name, **counts, "metrics": spreads})
    deliveries = receipt.deliveries if receipt else ()
    rows += [{"type": "delivery", **msgspec.to_builtins(each), "trouble": each.last_error} for each in deliveries]
    rows.append(
        {
            "type": "experiment",
            "name": result.name,
            "status": result.status,
            "best_arm": result.best_arm,
            "best_score": result.best_score,
            "conclusion": result.conclusion,
            "output_dir": str(plan.folder),
            "seconds": round(seconds, 3),
            "finish": None if receipt is None else delivery_command(receipt),
        }
    )
    return [json_line(row).decode() for row in rows]


def delivery_command(receipt: Receipt) -> str | None:
    """Return the command that delivers pending events and confirms unconfirmed ones; None if there are none."""
    if receipt.resume_command is not None or receipt.journal is None:
        return receipt.resume_command
    confirmable_by_sync = any(
        each.owed and each.state is not None for each in receipt.deliveries
    )  # inline ones have none
    return sync_command(receipt.journal) if confirmable_by_sync else None


def _format_deliveries(receipt: Receipt) -> str:
    """Return ``csv_metrics ok   wandb 1,204 pending, 120 owed``."""
    ranks: RanksByAdapter = {} if receipt.journal is None else load_ranks_by_adapter(receipt.journal)
    parts: list[str] = []
    for each in receipt.deliveries:
        complete = describe_state(each, ranks) if each.state == "other_rank" else "ok"
        parts.append(f"{each.name} {', '.join(describe_counts(each)) or complete}")
    return GAP.join(parts)


def _row(arm: ArmSummary, metrics: list[str], best: str | None, screen: Screen) -> list[str]:
    mark = "!" if arm.failed else "*" if arm.name == best else " "
    seeds = f"{arm.completed}/{arm.runs} {mark}".rstrip()
    if arm.failed:
        seeds = screen.style(seeds, sys.stdout, fg="red")
    return [printable(arm.name), seeds, *(_format_spread(arm.metrics.get(name)) for name in metrics)]


def _format_spread(spread: Spread | None) -> str:
    if spread is None or spread.mean is None:
        return "NaN" if spread is not None and spread.nonfinite else NO_VALUE
    text = format_mean_sd(spread)
    return f"{text} ({spread.nonfinite} NaN)" if spread.nonfinite else text


def _pair_runs(plan: ExperimentPlan, result: ExperimentResult) -> list[tuple[RunPlan, ArmResult]]:
    """Pair planned runs with results: both are in plan order, followed by unplanned runs of earlier sessions."""
    return list(zip(plan.runs, result.arms, strict=False))
