"""``evsys-bus show``: shows the records of a run or an experiment."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import click

from evsys_bus.cli.check import format_params
from evsys_bus.cli.output.deliveries import adapter_rows, describe_counts, describe_state, load_ranks_by_adapter
from evsys_bus.cli.output.formatting import (
    NO_VALUE,
    format_duration,
    format_facts,
    format_number,
    format_progress,
    format_table,
    format_time,
    format_value,
    pluralize,
    summarize_error,
)
from evsys_bus.cli.output.run_tables import comparison_json, comparison_lines, run_json
from evsys_bus.cli.output.screen import (
    Screen,
    color_option,
    json_option,
    printable,
    printable_name,
    terminal_width,
)
from evsys_bus.cli.records import (
    JOURNAL,
    METRICS,
    RUNS,
    ExperimentRecord,
    MetricRecord,
    RunRecord,
    find_journal,
    find_runs,
    is_abandoned,
    last_write_time,
    list_journals_newest_first,
    read_evals,
    read_experiment,
    read_run,
    read_runs,
    read_status,
    suggest_run,
)
from evsys_bus.codec import json_line, to_builtins
from evsys_bus.delivery.progress import read_progress
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.front.resume import RUN_FILE
from evsys_bus.reading import RecordedRun, locate_journal, read_journal
from evsys_bus.reading.fields import RunFields, metric_names
from evsys_bus.training.experiment_store import EXPERIMENT_FILE, read_result

_MAX_CHECKPOINTS = 10
_MAX_METRICS = 3
_MAX_NAMED = 5


@click.command("show")
@click.argument("folders", metavar="[RUN]...", nargs=-1, type=click.Path(path_type=Path))
@json_option
@color_option
@click.pass_obj
def command(screen: Screen, folders: tuple[Path, ...], as_json: bool) -> None:
    """Show the records of RUN: the folder of a run or of an experiment, its name below ./runs, or a journal.

    Without it, the newest experiment or journal below ./runs.

    Every metric is shown with its first and last value, and the least and greatest with their steps. A run of your own
    training loop, which has only a journal, is shown from that.

    With several RUNs, they are compared side by side, by their journals: states, the config keys that differ, and the
    last and best values of all metrics, with the differences from the first run.

    \b
    Examples:
      evsys-bus show runs/sweep
      evsys-bus show runs/sweep/low-s0 --json
      evsys-bus show runs/sweep/low-s0 runs/sweep/high-s0
    """  # noqa: D301 # click reads the backspace as: do not wrap
    if len(folders) > 1:
        _compare(folders, screen, as_json=as_json)
        return
    folder = next(iter(folders), None)
    if folder is None:
        folder = find_newest()
        screen.note(str(folder))
    requested, folder = folder, find_folder(folder)
    try:
        # The rows of a run of `evsys_bus.run` are in its journal alone, also if it has a list of checkpoints.
        record = read_experiment(folder) or (None if (folder / RUN_FILE).exists() else read_run(folder))
    except DECODE_ERRORS as error:
        raise click.ClickException(f"{folder / 'experiment.json'} is damaged: {error}") from error
    if record is None:
        _show_journal(requested, folder, screen, as_json=as_json)
        return
    _add_journal_facts(record)
    if as_json:
        kind = "run" if isinstance(record, RunRecord) else "experiment"
        click.echo(json_line({"type": kind, **to_builtins(record)[0]}))
        return
    lines = _run_lines(record, screen) if isinstance(record, RunRecord) else _experiment_lines(record, screen)
    click.echo("\n".join(lines))


def _compare(folders: Sequence[Path], screen: Screen, *, as_json: bool) -> None:
    """Show the runs side by side."""
    runs = [RunFields(_read_one(each), str(each)) for each in folders]
    metrics = metric_names(runs)
    if as_json:
        click.echo("\n".join(json_line(each).decode() for each in [*map(run_json, runs), comparison_json(runs)]))
        return
    width = terminal_width(sys.stdout)
    click.echo("\n".join(comparison_lines(runs, metrics, width, lambda text: screen.style_state(text, sys.stdout))))


def _read_one(requested: Path) -> RecordedRun:
    """Read the run that a command line names.

    Raises:
        click.UsageError: It names none, or several.
    """
    folder = find_folder(requested)
    location = find_journal(folder if locate_journal(folder) else requested)
    found = read_journal(location)
    if len(found) == 1:
        return found[0]
    if not found:
        raise click.UsageError(f"{folder} holds no run{_suggest(folder)}")
    names = ", ".join(str(folder / each.id) for each in found[:_MAX_NAMED])
    raise click.UsageError(f"{folder} holds {len(found)} runs, and one is compared; known: {names}")


def _show_journal(requested: Path, folder: Path, screen: Screen, *, as_json: bool) -> None:
    """Show the runs of a journal and their deliveries."""
    try:
        journal = find_journal(requested)
    except click.UsageError:
        raise click.UsageError(f"{folder} holds neither a run nor an experiment{_suggest(folder)}") from None
    runs, deliveries = read_runs(journal), read_progress(journal.directory)
    if journal.run is not None and not runs:
        raise click.UsageError(f"{folder} holds no run, and {journal.directory} has none of this name")
    if as_json:
        rows = [{"type": "run", **to_builtins(each)[0]} for each in runs]
        click.echo("\n".join(json_line(row).decode() for row in [*rows, *adapter_rows(journal.directory, deliveries)]))
        return
    ranks = load_ranks_by_adapter(journal.directory)
    deliveries_text = [
        f"{each.name} "
        + (", ".join([*describe_counts(each), *([] if each.complete else [describe_state(each, ranks)])]) or "ok")
        for each in deliveries
    ]
    known = [
        ["journal", str(journal.directory)],
        *([["delivery", "   ".join(deliveries_text)]] if deliveries_text else []),
    ]
    width = terminal_width(sys.stdout)
    lines = _run_lines(runs[0], screen) if len(runs) == 1 else _runs_lines(journal.directory, runs, screen)
    lines += ["", *format_facts([[name, printable(text)] for name, text in known], width)]
    if not all(each.complete for each in deliveries):
        lines.append(printable(f"for the reasons: evsys-bus status {shlex.quote(str(journal.directory))}"))
    click.echo("\n".join(lines))


def _runs_lines(directory: Path, runs: list[RunRecord], screen: Screen) -> list[str]:
    rows = [["run", "status", "steps", "last metrics", "evals", "checkpoints", "data"]]
    for each in runs:
        last = "  ".join(f"{metric.name} {format_value(metric.last)}" for metric in each.metrics[:_MAX_METRICS])
        evals = "  ".join(f"{metric.name} {format_value(metric.last)}" for metric in each.evals[:_MAX_METRICS])
        status = screen.style_state(printable(each.status or NO_VALUE), sys.stdout)
        cells = [_format_steps(each), last or NO_VALUE, evals or NO_VALUE, f"{len(each.checkpoints):,}"]
        rows.append([printable(each.name or NO_VALUE), status, *map(printable, [*cells, str(each.folder)])])
    head = f"{directory}   {pluralize(len(runs), 'run')}"
    return [printable(head), *(["", *format_table(rows, terminal_width(sys.stdout))] if runs else [])]


def _format_steps(record: RunRecord) -> str:
    done = 0 if record.last_step is None else record.last_step + 1
    return format_progress(done, record.num_steps, " of ")


def _add_journal_facts(record: ExperimentRecord | RunRecord) -> None:
    if isinstance(record, RunRecord):
        record.evals = read_evals(record.folder)
        running = record.result is None and record.entry is not None and record.entry.status == "running"
        if record.result is None and record.entry is None:
            record.status = read_status(record.folder)
    else:
        running = record.experiment.status == "running"
    record.process_gone = running and is_abandoned(record.folder)


def _process_gone_text(experiment: Path) -> str:
    """Return the text after "running" for an experiment without a process."""
    arguments = shlex.join(["--resume", "--output-dir", str(experiment)])
    return f", but its process is gone; go on with: evsys-bus run FILE {arguments}"


def _parent(folder: Path) -> Path:
    """Return the parent folder, also that of ``.``."""
    return (folder if folder.name else folder.absolute()).parent


def find_newest() -> Path:
    """Return the newest folder of an experiment or journal below ``./runs``; a run of an experiment is not one."""
    journals = {each.parent if each.name == JOURNAL else each for each in list_journals_newest_first()}
    found = journals | {each for each in find_runs() if not (each.parent / EXPERIMENT_FILE).is_file()}
    if not found:
        raise click.UsageError(f"there is no run below {RUNS.absolute()}; name one")
    return max(found, key=last_write_time)


def find_folder(folder: Path) -> Path:
    """Return the folder itself, or the one of this name below ``./runs``."""
    if folder.is_dir():
        return folder

    named = [each for each in find_runs() if str(folder) in {each.name, f"{each.parent.name}/{each.name}"}]
    if len(named) == 1:
        return named[0]
    if named:
        raise click.UsageError(f"several runs are called {folder}: {', '.join(map(str, named))}")

    with suppress(click.UsageError):
        journal = find_journal(folder)
        return journal.directory if journal.run is None else journal.directory.parent / journal.run
    raise click.UsageError(f"there is no run {folder}{_suggest(folder)}")


def _suggest(folder: Path) -> str:
    return suggest_run(folder, {str(each) for each in find_runs()})


def _experiment_lines(record: ExperimentRecord, screen: Screen) -> list[str]:
    experiment, width = record.experiment, terminal_width(sys.stdout)
    best = NO_VALUE if experiment.best_arm is None else experiment.best_arm
    score = "" if experiment.best_score is None else f" ({format_number(experiment.best_score)})"
    known = [
        ["status", f"{experiment.status}{_process_gone_text(record.folder) if record.process_gone else ''}"],
        ["started", format_time(experiment.started)],
        *([["ended", format_time(experiment.ended)]] if experiment.ended else []),
        *([["hypothesis", experiment.hypothesis]] if experiment.hypothesis else []),
        *([["best arm", f"{best}{score}"]] if experiment.best_arm else []),
        *([["conclusion", experiment.conclusion]] if experiment.conclusion else []),
        ["data", str(record.folder)],
    ]
    rows = [["run", "status", "evaluation"]]
    for key, entry in experiment.runs.items():
        folder = record.folder / key
        result = read_result(folder) if entry.status == "completed" and (folder / METRICS).exists() else None
        scores = {} if result is None else result.eval_metrics or result.metrics
        scores_text = "  ".join(f"{name} {format_number(value)}" for name, value in list(scores.items())[:3])
        status = "process gone" if record.process_gone and entry.status == "running" else entry.status
        evaluation = scores_text or (summarize_error(entry.error) if entry.error else NO_VALUE)
        rows.append([printable(key), screen.style_state(status, sys.stdout), printable(evaluation)])
    return [
        printable_name(experiment.name),
        "",
        *format_facts([[name, _style(name, printable(text), screen)] for name, text in known], width),
        "",
        *format_table(rows, width),
    ]


def _run_lines(record: RunRecord, screen: Screen) -> list[str]:
    result, entry, width = record.result, record.entry, terminal_width(sys.stdout)
    artifacts = result.run_result.artifacts if result is not None and result.run_result is not None else None
    status = result.status if result is not None else entry.status if entry is not None else record.status or "unknown"
    config = result.run_config if result is not None else entry.run_config if entry is not None else record.config
    steps = 0 if record.last_step is None else record.last_step + 1
    of = f" of {artifacts.total_requested_steps:,}" if artifacts is not None else ""
    error = (result.error if result is not None else None) or (entry.error if entry is not None else record.error)
    known = [
        ["status", f"{status}{_process_gone_text(_parent(record.folder)) if record.process_gone else ''}"],
        *([["error", " ".join(error.split())]] if error else []),
        *([["config", format_params(cast("dict[str, Any]", config))]] if isinstance(config, dict) else []),
        ["steps", f"{steps:,}{of}" if of else _format_steps(record)],
        *([["trained in", format_duration(artifacts.train_seconds)]] if artifacts is not None else []),
        ["data", str(record.folder)],
        *([["page", f"View run at {record.page_url}"]] if record.page_url else []),
    ]
    lines = [
        printable_name(record.name or record.folder.name),
        "",
        *format_facts([[name, _style(name, printable(text), screen)] for name, text in known], width),
    ]
    for head, found in (("metric", record.metrics), ("eval while it trained", record.evals)):
        if found:
            rows = [[head, "rows", "first", "last", "least", "at step", "greatest", "at step"]]
            lines += ["", *format_table([*rows, *map(_metric_row, found)], width)]
    if record.checkpoints:
        last = record.checkpoints[-_MAX_CHECKPOINTS:]
        earlier = len(record.checkpoints) - len(last)
        rows = [["checkpoint", "after step", "state", "weights"]]
        paths = [
            [_relative_path(path, record.folder) for path in (each.state_path, each.sampler_path)] for each in last
        ]
        rows += [[each.name, f"{each.batch:,}", *path_cells] for each, path_cells in zip(last, paths, strict=True)]
        lines += ["", *format_table([[printable(cell) for cell in row] for row in rows], width)]
        lines += [f"({earlier} earlier ones)"] if earlier else []
    evals = record.benchmarks if result is None else result.evals
    if evals:
        rows = [["eval", "tags", "metrics"]]
        for scored in evals:
            metrics_text = "  ".join(f"{name} {format_number(value)}" for name, value in scored.metrics.items())
            rows.append([scored.name, ",".join(scored.tags) or NO_VALUE, metrics_text])
        lines += ["", *format_table([[printable(cell) for cell in row] for row in rows], width)]
    return lines


def _style(name: str, text: str, screen: Screen) -> str:
    return screen.style_state(text, sys.stdout) if name == "status" else text


def _metric_row(each: MetricRecord) -> list[str]:
    values = (each.first, each.last, each.least, each.least_step, each.greatest, each.greatest_step)
    nan_count = f" ({each.nonfinite:,} NaN)" if each.nonfinite else ""
    return [printable(each.name), f"{each.rows:,}{nan_count}", *map(format_value, values)]


def _relative_path(path: str | None, folder: Path) -> str:
    """Return a path relative to the run's folder if it is inside."""
    if path is None:
        return "-"
    return path.removeprefix(f"{folder.absolute()}/")
