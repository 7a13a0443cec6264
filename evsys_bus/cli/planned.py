"""Loading an experiment file into a validated plan of runs, for ``check``, ``run`` and ``demo``.

Nothing is started or written here.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from evsys_bus.cli.tables import columns, counted
from evsys_bus.codec import json_line, to_plain
from evsys_bus.errors import DocumentError, Where, did_you_mean
from evsys_bus.files import DAMAGE, read_file
from evsys_bus.training.ledger import LEDGER, MOST_PAGE_BYTES, Page
from evsys_bus.training.plan import RunPlan, chains_of, folder_name
from evsys_bus.wiring.arms import arms_of, seeds_of
from evsys_bus.wiring.document import Document, read_document, with_overrides
from evsys_bus.wiring.experiment import ExperimentConfig
from evsys_bus.wiring.load import load_experiment
from evsys_bus.wiring.spec import read_spec

_MAX_VALUE_CHARS = 60


class Planned(msgspec.Struct, frozen=True):
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
        size = f"{counted(arms, 'arm')} x {counted(seeds, 'seed')}"
        if stages > 1:
            size += f" x {counted(stages, 'stage')}"
        return f"{self.config.name}   {size} = {counted(len(self.runs), 'run')}   data: {self.shown_folder}"

    @property
    def shown_folder(self) -> str:
        """The directory, relative if it is inside the working directory."""
        try:
            return str(self.folder.absolute().relative_to(Path.cwd()))
        except ValueError:
            return str(self.folder)


def planned(
    file: Path,
    *,
    sets: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    output_dir: Path | None = None,
) -> Planned:
    """Load and validate an experiment file.

    Modules next to the file can be imported, as for a script, but installed modules take precedence.

    Raises:
        ConfigError: The file, an override, or a requested arm or seed is invalid; several errors as `ConfigErrors`.
    """
    document = with_overrides(read_document(file), list(sets))
    beside = str(file.absolute().parent)
    if beside not in sys.path:
        sys.path.append(beside)
    config = load_experiment(document)
    folder = (output_dir or Path(config.output_dir or Path("runs", folder_name(config.name)))).expanduser()
    _check_known("arm", arms, [arm.name for arm in arms_of(config)], "$.matrix" if config.matrix else "$.runs")
    _check_known("seed", seeds, seeds_of(config), "$.seeds")
    chains = chains_of(config, folder, only_arms=arms or None, only_seeds=seeds or None)
    return Planned(file, document, config, folder, [run for chain in chains for run in chain])


def _check_known(option: str, wanted: Sequence[object], known: Sequence[object], path: str) -> None:
    for each in wanted:
        if each not in known:
            what = f'the experiment has no {option} "{each}"'
            where = Where(path, file=f"--{option} {each}")
            raise DocumentError(what, where=where, fix=did_you_mean(str(each), map(str, known)))


def earlier_page(folder: Path) -> Page | None:
    """Return the experiment recorded in this directory; None if there is none or it cannot be read."""
    try:
        return msgspec.json.decode(read_file(folder / LEDGER, most_bytes=MOST_PAGE_BYTES), type=Page)
    except (OSError, *DAMAGE):
        return None


def plan_lines(plan: Planned) -> list[str]:
    """Return the plan as text."""
    config = plan.config
    lines = [plan.title, ""]
    metric = config.success_metric
    facts = [
        ["recipe", config.recipe],
        ["best arm by", f"{metric.name} ({metric.mode})" if metric else "not set"],
        ["at a time", counted(config.max_concurrent_runs, "run")],
        *([["plugins", ", ".join(config.plugins)]] if config.plugins else []),
    ]
    lines += columns(facts)
    lines += ["", "arms"]
    by_arm = {run.arm: run for run in reversed(plan.runs)}
    of_arm = list(dict.fromkeys(run.arm for run in plan.runs))
    stages = list(dict.fromkeys(run.stage for run in plan.runs))
    if stages == [None]:
        lines += columns([[arm, params_line(by_arm[arm].params)] for arm in of_arm], indent="  ")
    else:
        first = {(run.arm, run.stage): run for run in reversed(plan.runs)}
        rows = [[arm, stage or "", params_line(first[arm, stage].params)] for arm in of_arm for stage in stages]
        lines += columns(rows, indent="  ")
    seeds = dict.fromkeys(run.seed for run in plan.runs)
    lines += ["", f"seeds   {', '.join(map(str, seeds))}", "", "callbacks"]
    specs = [read_spec(item, "$.callbacks") for item in config.callbacks]
    lines += columns([[spec.label, spec.kind, params_line(spec.params)] for spec in specs], indent="  ") or ["  none"]
    shown = [[run.run_key, _state(run, plan.folder)] for run in plan.runs]
    return [*lines, "", "runs", *columns(shown, indent="  ")]


def plan_json(plan: Planned) -> list[str]:
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
            "config": msgspec.to_builtins(plan.config, enc_hook=lambda value: to_plain(value)[0]),
        }
    )
    return [json_line(row).decode() for row in rows]


def _state(run: RunPlan, folder: Path) -> str:
    page = earlier_page(folder)
    entry = None if page is None else page.runs.get(run.run_key)
    return "" if entry is None else f"{entry.status} already"


def params_line(params: Mapping[str, Any]) -> str:
    """Return parameters on one line."""
    return "  ".join(f"{key}={_value(value)}" for key, value in params.items())


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json_line({"": value}).decode()[4:-1]
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[: _MAX_VALUE_CHARS - 1]}…"
