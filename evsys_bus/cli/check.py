"""``evsys-bus check``: validates an experiment file and shows its runs; nothing is started or written.

``run`` and ``demo`` load their plan of runs here too.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from evsys_bus.cli.options import add_current_folder_to_path, set_option
from evsys_bus.cli.output.formatting import format_columns, pluralize
from evsys_bus.cli.output.screen import color_option, json_option
from evsys_bus.cli.records import load_previous_experiment
from evsys_bus.codec import json_line, to_builtins
from evsys_bus.config.experiment import ExperimentConfig, expand_arms, expand_seeds, load_experiment
from evsys_bus.config.spec import read_spec
from evsys_bus.config.yaml_nodes import Document, read_document, with_overrides
from evsys_bus.errors import DocumentError, Location, did_you_mean
from evsys_bus.training.plan import RunPlan, run_sequences, safe_folder_name

_MAX_VALUE_CHARS = 60


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@set_option
@json_option
@color_option
def command(file: Path, sets: tuple[str, ...], as_json: bool) -> None:
    """Check the experiment that FILE describes, and show what it would run.

    All errors are reported in one pass, each with its line. Nothing is started or written.
    """
    plan = load_plan(file, sets=sets)
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
        return f"{self.config.name}   {size} = {pluralize(len(self.runs), 'run')}   data: {self.display_folder}"

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
    document = with_overrides(read_document(file), list(sets))
    find_modules_of(file)
    config = load_experiment(document)
    folder = (output_dir or Path(config.output_dir or Path("runs", safe_folder_name(config.name)))).expanduser()
    _check_known("arm", arms, [arm.name for arm in expand_arms(config)], "$.matrix" if config.matrix else "$.runs")
    _check_known("seed", seeds, expand_seeds(config), "$.seeds")
    sequences = run_sequences(config, folder, only_arms=arms or None, only_seeds=seeds or None)
    return ExperimentPlan(file, document, config, folder, [run for sequence in sequences for run in sequence])


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
    config = plan.config
    lines = [plan.title, ""]
    metric = config.success_metric
    facts = [
        ["recipe", config.recipe],
        ["best arm by", f"{metric.name} ({metric.mode})" if metric else "not set"],
        ["at a time", pluralize(config.max_concurrent_runs, "run")],
        *([["plugins", ", ".join(config.plugins)]] if config.plugins else []),
    ]
    lines += format_columns(facts)
    lines += ["", "arms"]
    by_arm = {run.arm: run for run in reversed(plan.runs)}
    arm_names = list(dict.fromkeys(run.arm for run in plan.runs))
    stages = list(dict.fromkeys(run.stage for run in plan.runs))
    if stages == [None]:
        lines += format_columns([[arm, format_params(by_arm[arm].params)] for arm in arm_names], indent="  ")
    else:
        first = {(run.arm, run.stage): run for run in reversed(plan.runs)}
        rows = [[arm, stage or "", format_params(first[arm, stage].params)] for arm in arm_names for stage in stages]
        lines += format_columns(rows, indent="  ")
    seeds = dict.fromkeys(run.seed for run in plan.runs)
    lines += ["", f"seeds   {', '.join(map(str, seeds))}", "", "callbacks"]
    specs = [read_spec(item, "$.callbacks") for item in config.callbacks]
    lines += format_columns([[spec.label, spec.kind, format_params(spec.params)] for spec in specs], indent="  ") or [
        "  none"
    ]
    previous = load_previous_experiment(plan.folder)
    entries = {} if previous is None else previous.runs
    shown = [
        [key, f"{entries[key].status} already" if key in entries else ""] for key in (run.run_key for run in plan.runs)
    ]
    return [*lines, "", "runs", *format_columns(shown, indent="  ")]


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
    return [json_line(row).decode() for row in rows]


def format_params(params: Mapping[str, Any]) -> str:
    """Return parameters on one line."""
    return "  ".join(f"{key}={_format_value(value)}" for key, value in params.items())


def _format_value(value: object) -> str:
    text = value if isinstance(value, str) else json_line({"": value}).decode()[4:-1]
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"
