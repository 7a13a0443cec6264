"""``evsys-bus check``: validates an experiment file and shows its runs; nothing is started or written.

``run`` and ``demo`` load their plan of runs here too.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from evsys_bus.cli.options import add_current_folder_to_path, output_dir_option, set_option
from evsys_bus.cli.output.formatting import format_columns, pluralize
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable, terminal_width, wrap
from evsys_bus.cli.records import load_previous_experiment
from evsys_bus.codec import json_line, to_builtins
from evsys_bus.codec.redact import Redaction, redact, redact_key
from evsys_bus.config.experiment import ExperimentConfig, expand_arms, expand_seeds, load_experiment
from evsys_bus.config.spec import combine_errors, individual_errors, read_spec
from evsys_bus.config.yaml_nodes import Document, read_document, with_overrides
from evsys_bus.errors import ConfigError, DocumentError, Location, TrainingError, closest_word, did_you_mean
from evsys_bus.training.experiment_store import check_params_unchanged, read_result
from evsys_bus.training.plan import RunPlan, run_sequences, safe_folder_name

_MAX_VALUE_CHARS = 60
_MAX_RESULTS = 10
"""How many results are read for the names of their metrics."""
_MAX_METRICS = 12
"""How many names of metrics are listed."""


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@output_dir_option("Default: the file's output_dir, or runs/<name>.")
@click.option("--resume", is_flag=True, help="Also check that the experiment in the output directory can be resumed.")
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen, file: Path, sets: tuple[str, ...], output_dir: Path | None, resume: bool, as_json: bool
) -> None:
    """Check the experiment that FILE describes, and show what it would run.

    All errors are reported in one pass, each with its line. Nothing is started or written.

    \b
    Examples:
      evsys-bus check sweep.yaml
      evsys-bus check sweep.yaml --set run.lr=1e-3
      evsys-bus check sweep.yaml --resume                 whether a stopped experiment can go on with this file
    """  # noqa: D301 # click reads the backspace as: do not wrap
    plan = load_plan(file, sets=sets, output_dir=output_dir)
    if resume:
        check_resume(plan)
    warn_about_metric(plan, screen)
    click.echo("\n".join(plan_json(plan) if as_json else plan_lines(plan)))


class ExperimentPlan(msgspec.Struct, frozen=True):
    """A validated experiment and its runs."""

    file: Path
    document: Document
    config: ExperimentConfig
    folder: Path
    """The experiment's directory."""
    runs: list[RunPlan]

    @property
    def title(self) -> str:
        """One line: the name, the number of runs, and the output directory."""
        arms = len(dict.fromkeys(run.arm for run in self.runs))
        seeds = len({run.seed for run in self.runs})
        stages = len(dict.fromkeys(run.stage for run in self.runs))
        size = f"{pluralize(arms, 'arm')} x {pluralize(seeds, 'seed')}"
        if stages > 1:
            size += f" x {pluralize(stages, 'stage')}"
        return (
            f"{printable(self.config.name)}   {size} = {pluralize(len(self.runs), 'run')}   data: {self.display_folder}"
        )

    @property
    def display_folder(self) -> str:
        """The directory, relative if it is inside the working directory."""
        try:
            return str(self.folder.absolute().relative_to(Path.cwd()))
        except ValueError:
            return str(self.folder)


def load_plan(
    file: Path,
    *,
    sets: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    output_dir: Path | None = None,
) -> ExperimentPlan:
    """Load and validate an experiment file.

    Modules in the current folder can be imported, as with ``python -m``, and those next to the file, after all others.

    Raises:
        ConfigError: The file, an override, or a requested arm or seed is invalid; several errors as `ConfigErrors`.
    """
    mistakes: list[DocumentError] = []
    find_modules_of(file)
    try:
        document = with_overrides(read_document(file, mistakes=mistakes), list(sets))
        config = load_experiment(document)
    except ConfigError as error:
        if not mistakes:
            raise
        others = [each for each in individual_errors(error) if not _is_within(each, mistakes)]
        raise combine_errors([*mistakes, *others]) from error.__cause__
    if mistakes:
        raise combine_errors([*mistakes])
    folder = (output_dir or Path(config.output_dir or Path("runs", safe_folder_name(config.name)))).expanduser()
    _check_known("arm", arms, [arm.name for arm in expand_arms(config)], "$.matrix" if config.matrix else "$.runs")
    _check_known("seed", seeds, expand_seeds(config), "$.seeds")
    sequences = run_sequences(config, folder, only_arms=arms or None, only_seeds=seeds or None)
    return ExperimentPlan(file, document, config, folder, [run for sequence in sequences for run in sequence])


def check_resume(plan: ExperimentPlan) -> None:
    """Check that the experiment in the output directory can be resumed with this plan.

    Raises:
        ExceptionGroup: It is another experiment, or runs of it were started with other parameters: `TrainingError`.
    """
    previous = load_previous_experiment(plan.folder)
    if previous is None:  # the runs start from the beginning, or from checkpoints that were uploaded
        return
    errors: list[TrainingError] = []
    if previous.name != plan.config.name:
        what = f'{plan.display_folder} holds the experiment "{previous.name}", not "{plan.config.name}"'
        errors.append(TrainingError(what, fix="choose another output_dir"))
    redaction = Redaction.of(plan.config.redact, plan.config.reveal)
    for run in plan.runs:
        entry = previous.runs.get(run.run_key)
        try:
            if entry is not None:
                check_params_unchanged(run, entry, Path(plan.display_folder), redaction)
        except TrainingError as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("the experiment cannot be resumed", errors)


def warn_about_metric(plan: ExperimentPlan, screen: Screen) -> None:
    """Print a warning if runs in the output directory are completed, and none of them has the success metric."""
    metric, previous = plan.config.success_metric, load_previous_experiment(plan.folder)
    if metric is None or previous is None:
        return
    completed = [key for key, entry in previous.runs.items() if entry.status == "completed"][:_MAX_RESULTS]
    results = [result for key in completed if (result := read_result(plan.folder / key)) is not None]
    seen = sorted({name for result in results for name in [*result.eval_metrics, *result.metrics]})
    if seen and metric.name not in seen:
        head = screen.style("warning:", sys.stderr, fg="yellow", bold=True)
        where = plan.document.where("$.success_metric.name")
        place = "" if where.line is None else f"{where.file}:{where.line}: "
        same = [name for name in seen if name.rpartition("/")[2] == metric.name]  # without its benchmark
        near = same[0] if same else closest_word(metric.name, seen)
        fix = "choose one of them" if near is None else f'did you mean "{near}"?'
        more = f" and {len(seen) - _MAX_METRICS} more" if len(seen) > _MAX_METRICS else ""
        names = f"{', '.join(map(redact_key, seen[:_MAX_METRICS]))}{more}"
        what = f'no completed run has the success_metric "{metric.name}"; they have {names}'
        screen.note(f"{head} {place}{printable(f'{what}   fix: {fix}')}")


def _is_within(error: ConfigError, mistakes: Sequence[DocumentError]) -> bool:
    """Whether the error is about a value that is one of the mistakes, or within it."""
    path = "" if error.where is None else error.where.path
    places = [each.where.path for each in mistakes if each.where is not None and each.where.path != "$"]
    return any(path == place or path.startswith((f"{place}.", f"{place}[")) for place in places)


def find_modules_of(file: Path) -> None:
    """Make modules of the current folder and of the file's folder importable, the former before all others."""
    add_current_folder_to_path()
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


def _check_known(option: str, requested: Sequence[object], known: Sequence[object], path: str) -> None:
    for each in requested:
        if each not in known:
            what = f'the experiment has no {option} "{each}"'
            where = Location(path, file=f"--{option} {each}")
            raise DocumentError(what, where=where, fix=did_you_mean(str(each), map(str, known)))


def plan_lines(plan: ExperimentPlan) -> list[str]:
    """Return the plan as text."""
    config, width = plan.config, terminal_width(sys.stdout)
    shown = partial(format_params, redaction=Redaction.of(config.redact, config.reveal))
    lines = [plan.title, ""]
    metric = config.success_metric
    facts = [
        ["recipe", config.recipe],
        ["best arm by", f"{metric.name} ({metric.mode})" if metric else "not set"],
        ["at a time", pluralize(config.max_concurrent_runs, "run")],
        *([["plugins", ", ".join(config.plugins)]] if config.plugins else []),
    ]
    lines += _columns(facts)
    lines += ["", "arms"]
    by_arm = {run.arm: run for run in reversed(plan.runs)}
    arm_names = list(dict.fromkeys(run.arm for run in plan.runs))
    stages = list(dict.fromkeys(run.stage for run in plan.runs))
    if stages == [None]:
        lines += _columns([[arm, shown(by_arm[arm].params)] for arm in arm_names], indent="  ")
    else:
        first = {(run.arm, run.stage): run for run in reversed(plan.runs)}
        rows = [[arm, stage or "", shown(first[arm, stage].params)] for arm in arm_names for stage in stages]
        lines += _columns(rows, indent="  ")
    seeds = dict.fromkeys(run.seed for run in plan.runs)
    lines += ["", f"seeds   {', '.join(map(str, seeds))}", "", "callbacks"]
    specs = [read_spec(item, "$.callbacks") for item in config.callbacks]
    lines += _columns([[spec.label, spec.kind, shown(spec.params)] for spec in specs], indent="  ") or ["  none"]
    previous = load_previous_experiment(plan.folder)
    entries = {} if previous is None else previous.runs
    shown = [
        [key, f"{entries[key].status} already" if key in entries else ""] for key in (run.run_key for run in plan.runs)
    ]
    lines += ["", "runs", *_columns(shown, indent="  ")]
    return [part for line in lines for part in _fit(line, width)]


def _columns(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    return format_columns([[printable(cell) for cell in row] for row in rows], indent=indent)


def _fit(line: str, width: int | None) -> list[str]:
    text = line.lstrip()
    return wrap(text, width, indent=" " * (len(line) - len(text)))


def plan_json(plan: ExperimentPlan) -> list[str]:
    """Return the plan as JSON: a line for each run, and one for the experiment."""
    rows: list[dict[str, Any]] = [
        {"type": "planned_run", "run": run.run_key, "run_dir": str(run.run_dir), "run_config": run.run_config}
        for run in plan.runs
    ]
    rows.append(
        {
            "type": "plan",
            "name": plan.config.name,
            "output_dir": str(plan.folder),
            "runs": len(plan.runs),
            "config": msgspec.to_builtins(plan.config, enc_hook=lambda value: to_builtins(value)[0]),
        }
    )
    redaction = Redaction.of(plan.config.redact, plan.config.reveal)
    return [json_line(row, redaction).decode() for row in rows]


def format_params(params: Mapping[str, Any], redaction: Redaction = Redaction()) -> str:  # noqa: B008 - frozen
    """Return parameters on one line, without credentials."""
    plain: Any = to_builtins(params)[0]
    redact(plain, redaction, "config")
    return "  ".join(f"{key}={_format_value(value)}" for key, value in plain.items())


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else json_line({"": value}, None).decode()[4:-1]
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"
