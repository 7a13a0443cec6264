"""``evsys-bus show``: shows the records of a run or an experiment."""

import difflib
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from evsys_bus.cli.options import json_option
from evsys_bus.cli.screen import color_option

if TYPE_CHECKING:
    from evsys_bus.cli.records import ExperimentRecord, MetricRecord, RunRecord

_MAX_CHECKPOINTS = 10
_MAX_METRICS = 3


@click.command("show")
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@json_option
@color_option
def command(folder: Path, as_json: bool) -> None:
    """Show the records of RUN: the folder of a run or of an experiment, its name below ./runs, or a journal.

    Every metric is shown with its first and last value, and the least and greatest with their steps. A run of your own
    training loop, which has only a journal, is shown from that.
    """
    from evsys_bus.cli.records import read_experiment, read_run
    from evsys_bus.files import DAMAGE

    asked, folder = folder, _found(folder)
    try:
        record = read_experiment(folder) or read_run(folder)
    except DAMAGE as error:
        raise click.ClickException(f"{folder / 'experiment.json'} is damaged: {error}") from error
    if record is None:
        _show_journal(asked, folder, as_json=as_json)
        return
    _ask_journal(record)
    if as_json:
        from evsys_bus.codec import json_line, to_plain

        kind = "run" if hasattr(record, "metrics") else "experiment"
        click.echo(json_line({"type": kind, **to_plain(record)[0]}))
        return
    lines = _run_lines(record) if hasattr(record, "metrics") else _experiment_lines(record)  # pyright: ignore[reportArgumentType] # distinguished by their fields
    click.echo("\n".join(lines))


def _show_journal(asked: Path, folder: Path, *, as_json: bool) -> None:
    """Show the runs of a journal and their deliveries."""
    from evsys_bus.cli.adapter_states import adapter_rows, ranks_served, state_words
    from evsys_bus.cli.deliveries import count_words
    from evsys_bus.cli.journals import found
    from evsys_bus.cli.run_journal import read_runs
    from evsys_bus.cli.screen import printable, width_of
    from evsys_bus.cli.tables import facts
    from evsys_bus.delivery.accounts import accounts

    try:
        journal = found(asked)
    except click.UsageError:
        raise click.UsageError(f"{folder} holds neither a run nor an experiment{_others(folder)}") from None
    runs, deliveries = read_runs(journal), accounts(journal.directory)
    if journal.run is not None and not runs:
        raise click.UsageError(f"{folder} holds no run, and {journal.directory} has none of this name")
    if as_json:
        from evsys_bus.codec import json_line, to_plain

        rows = [{"type": "run", **to_plain(each)[0]} for each in runs]
        click.echo("\n".join(json_line(row).decode() for row in [*rows, *adapter_rows(journal.directory, deliveries)]))
        return
    ranks = ranks_served(journal.directory)
    told = [
        f"{each.name} {', '.join([*count_words(each), *([] if each.complete else [state_words(each, ranks)])]) or 'ok'}"
        for each in deliveries
    ]
    known = [["journal", str(journal.directory)], *([["delivery", "   ".join(told)]] if told else [])]
    width = width_of(sys.stdout)
    lines = _run_lines(runs[0]) if len(runs) == 1 else _runs_lines(journal.directory, runs)
    lines += ["", *facts([[name, printable(text)] for name, text in known], width)]
    if not all(each.complete for each in deliveries):
        lines.append(printable(f"for the reasons: evsys-bus status {shlex.quote(str(journal.directory))}"))
    click.echo("\n".join(lines))


def _runs_lines(directory: Path, runs: "list[RunRecord]") -> list[str]:
    from evsys_bus.cli.amounts import NONE
    from evsys_bus.cli.screen import printable, width_of
    from evsys_bus.cli.tables import counted, table

    rows = [["run", "status", "steps", "last metrics", "evals", "checkpoints", "data"]]
    for each in runs:
        last = "  ".join(f"{metric.name} {_told(metric.last)}" for metric in each.metrics[:_MAX_METRICS])
        evals = "  ".join(f"{metric.name} {_told(metric.last)}" for metric in each.evals[:_MAX_METRICS])
        row = [each.name or NONE, each.status or NONE, _steps(each), last or NONE, evals or NONE]
        rows.append([printable(cell) for cell in [*row, f"{len(each.checkpoints):,}", str(each.folder)]])
    head = f"{directory}   {counted(len(runs), 'run')}"
    return [printable(head), *(["", *table(rows, width_of(sys.stdout))] if runs else [])]


def _steps(record: "RunRecord") -> str:
    done = 0 if record.last_step is None else record.last_step + 1
    return f"{done:,}" if record.num_steps is None else f"{done:,} of {record.num_steps:,}"


def _ask_journal(record: "ExperimentRecord | RunRecord") -> None:
    from evsys_bus.cli.run_journal import is_deserted, read_evals, read_status

    if hasattr(record, "metrics"):
        run = cast("RunRecord", record)
        run.evals = read_evals(run.folder)
        running = run.result is None and run.entry is not None and run.entry.status == "running"
        if run.result is None and run.entry is None:
            run.status = read_status(run.folder)
    else:
        running = cast("ExperimentRecord", record).page.status == "running"
    record.process_gone = running and is_deserted(record.folder)


def _gone(experiment: Path) -> str:
    """Return the text after "running" for an experiment without a process."""
    again = shlex.join(["--resume", "--output-dir", str(experiment)])
    return f", but its process is gone; go on with: evsys-bus run FILE {again}"


def _parent(folder: Path) -> Path:
    """Return the parent folder, also that of ``.``."""
    return (folder if folder.name else folder.absolute()).parent


def _found(folder: Path) -> Path:
    """Return the folder itself, or the one of this name below ``./runs``."""
    if folder.is_dir():
        return folder
    from evsys_bus.cli.records import found_runs

    named = [each for each in found_runs(Path("runs")) if str(folder) in {each.name, f"{each.parent.name}/{each.name}"}]
    if len(named) == 1:
        return named[0]
    if named:
        raise click.UsageError(f"several runs are called {folder}: {', '.join(map(str, named))}")
    from evsys_bus.cli.journals import found

    with suppress(click.UsageError):
        journal = found(folder)
        return journal.directory if journal.run is None else journal.directory.parent / journal.run
    raise click.UsageError(f"there is no run {folder}{_others(folder)}")


def _others(folder: Path) -> str:
    from evsys_bus.cli.records import found_runs

    known = {str(each) for each in found_runs(Path("runs"))}
    near = difflib.get_close_matches(str(folder), [*known, *(Path(each).name for each in known)], n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(sorted(known)[:5])}" if known else ""


def _experiment_lines(record: "ExperimentRecord") -> list[str]:
    from evsys_bus.cli.amounts import NONE
    from evsys_bus.cli.progress.figures import number
    from evsys_bus.cli.progress.live import first_line
    from evsys_bus.cli.records import METRICS
    from evsys_bus.cli.screen import printable, width_of
    from evsys_bus.cli.tables import facts, table
    from evsys_bus.training.ledger import read_result

    page, width = record.page, width_of(sys.stdout)
    best = NONE if page.best_arm is None else page.best_arm
    score = "" if page.best_score is None else f" ({number(page.best_score)})"
    known = [
        ["status", f"{page.status}{_gone(record.folder) if record.process_gone else ''}"],
        ["started", page.started],
        *([["ended", page.ended]] if page.ended else []),
        *([["hypothesis", page.hypothesis]] if page.hypothesis else []),
        *([["best arm", f"{best}{score}"]] if page.best_arm else []),
        *([["conclusion", page.conclusion]] if page.conclusion else []),
        ["data", str(record.folder)],
    ]
    rows = [["run", "status", "evaluation"]]
    for key, entry in page.runs.items():
        folder = record.folder / key
        result = read_result(folder) if entry.status == "completed" and (folder / METRICS).exists() else None
        scores = {} if result is None else result.eval_metrics or result.metrics
        told = "  ".join(f"{name} {number(value)}" for name, value in list(scores.items())[:3])
        status = "process gone" if record.process_gone and entry.status == "running" else entry.status
        rows.append([key, status, printable(told or (first_line(entry.error) if entry.error else NONE))])
    return [page.name, "", *facts([[name, printable(text)] for name, text in known], width), "", *table(rows, width)]


def _run_lines(record: "RunRecord") -> list[str]:
    from evsys_bus.cli.amounts import NONE, duration
    from evsys_bus.cli.planned import params_line
    from evsys_bus.cli.progress.figures import number
    from evsys_bus.cli.screen import printable, width_of
    from evsys_bus.cli.tables import facts, table

    result, entry, width = record.result, record.entry, width_of(sys.stdout)
    artifacts = result.run_result.artifacts if result is not None and result.run_result is not None else None
    status = result.status if result is not None else entry.status if entry is not None else record.status or "unknown"
    config = result.run_config if result is not None else entry.run_config if entry is not None else record.config
    steps = 0 if record.last_step is None else record.last_step + 1
    of = f" of {artifacts.total_requested_steps:,}" if artifacts is not None else ""
    error = (result.error if result is not None else None) or (entry.error if entry is not None else record.error)
    known = [
        ["status", f"{status}{_gone(_parent(record.folder)) if record.process_gone else ''}"],
        *([["error", " ".join(error.split())]] if error else []),
        *([["config", params_line(cast("dict[str, Any]", config))]] if isinstance(config, dict) else []),
        ["steps", f"{steps:,}{of}" if of else _steps(record)],
        *([["trained in", duration(artifacts.train_seconds)]] if artifacts is not None else []),
        ["data", str(record.folder)],
        *([["page", f"View run at {record.page}"]] if record.page else []),
    ]
    lines = [
        printable(record.name or record.folder.name),
        "",
        *facts([[name, printable(text)] for name, text in known], width),
    ]
    for head, found in (("metric", record.metrics), ("eval while it trained", record.evals)):
        if found:
            rows = [[head, "rows", "first", "last", "least", "at step", "greatest", "at step"]]
            lines += ["", *table([*rows, *map(_metric_row, found)], width)]
    if record.checkpoints:
        last = record.checkpoints[-_MAX_CHECKPOINTS:]
        earlier = len(record.checkpoints) - len(last)
        rows = [["checkpoint", "after step", "state", "weights"]]
        places = [[_near(path, record.folder) for path in (each.state_path, each.sampler_path)] for each in last]
        rows += [[each.name, f"{each.batch:,}", *place] for each, place in zip(last, places, strict=True)]
        lines += ["", *table([[printable(cell) for cell in row] for row in rows], width)]
        lines += [f"({earlier} earlier ones)"] if earlier else []
    evals = record.benchmarks if result is None else result.evals
    if evals:
        rows = [["eval", "tags", "metrics"]]
        for scored in evals:
            told = "  ".join(f"{name} {number(value)}" for name, value in scored.metrics.items())
            rows.append([scored.name, ",".join(scored.tags) or NONE, told])
        lines += ["", *table([[printable(cell) for cell in row] for row in rows], width)]
    return lines


def _metric_row(each: "MetricRecord") -> list[str]:
    from evsys_bus.cli.screen import printable

    values = (each.first, each.last, each.least, each.least_step, each.greatest, each.greatest_step)
    return [printable(each.name), f"{each.rows:,}{_nan(each.nonfinite)}", *map(_told, values)]


def _near(path: str | None, folder: Path) -> str:
    """Return a path relative to the run's folder if it is inside."""
    if path is None:
        return "-"
    return path.removeprefix(f"{folder.absolute()}/")


def _told(value: float | None) -> str:
    from evsys_bus.cli.amounts import NONE
    from evsys_bus.cli.progress.figures import number

    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else number(value)


def _nan(count: int) -> str:
    return f" ({count:,} NaN)" if count else ""
