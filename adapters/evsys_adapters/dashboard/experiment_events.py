"""What the events of an experiment have of it: its plan, its success metric, and how it has ended."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from evsys_adapters.common.hook_arguments import field, fields, list_or_empty
from evsys_adapters.dashboard.records import ExperimentRecord
from evsys_adapters.dashboard.values import MAX_NAME_CHARS, UNREADABLE, finite
from evsys_bus.config.experiment import ExperimentConfig, count_arms, expand_arms, expand_seeds

STATUSES: Final = frozenset({"pending", "completed", "failed", "cancelled"})
"""Status words of what is not running."""
_PLANNED_KEYS: Final = ("name", "recipe", "run", "runs", "matrix", "continual", "n_repeats", "seeds")
_MAX_PLANNED_ARMS: Final = 1_000


def start_experiment(experiment: ExperimentRecord, config: dict[str, Any], time: float) -> None:
    """Add what the config has, and forget how an earlier attempt ended."""
    metadata = fields(config.get("metadata"))
    experiment.has_start = True
    experiment.status = experiment.ended = experiment.error = experiment.conclusion = None
    experiment.best_score = experiment.best_arm = None
    experiment.started = time if experiment.started is None else min(experiment.started, time)
    experiment.config = config
    name = config.get("name")
    experiment.name = name[:MAX_NAME_CHARS] if isinstance(name, str) and name else experiment.name
    for key in ("hypothesis", "notes"):
        text = metadata.get(key) or config.get(key)
        setattr(experiment, key, str(text) if text else getattr(experiment, key))
    tags = list_or_empty(metadata.get("tags")) or list_or_empty(config.get("tags"))
    experiment.tags = [str(each) for each in tags] or experiment.tags
    given = config.get("success_metric") or metadata.get("success_metric")
    success = {"name": given} if isinstance(given, str) else fields(given)
    experiment.success_metric = str(success["name"]) if success.get("name") else None
    mode = success.get("mode")
    # "max" is the default of our own configs, which have a recipe.
    known_mode = mode if mode in {"min", "max"} else "max" if "recipe" in config else None
    experiment.success_mode = known_mode if experiment.success_metric else None
    experiment.planned_arms, experiment.planned = planned_runs(config)


def end_experiment(experiment: ExperimentRecord, result: object, time: float) -> None:
    """Add how the experiment has ended."""
    status = field(result, "status")
    experiment.status = status if isinstance(status, str) and status in STATUSES else "completed"
    experiment.ended = time
    for name in ("conclusion", "hypothesis", "best_arm"):
        text = field(result, name)
        setattr(experiment, name, str(text) if text else getattr(experiment, name))
    score = field(result, "best_score")
    experiment.best_score = finite(score) if isinstance(score, int | float) else None


def planned_runs(config: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """Return the names of the planned arms in order, and the number of planned runs; None if this is no config of ours.

    No names are returned for more than 1,000 arms.
    """
    if "recipe" not in config:
        return [], None
    known = {key: config[key] for key in _PLANNED_KEYS if config.get(key) is not None}
    try:
        ours = msgspec.convert(known, ExperimentConfig, strict=False)
        count = count_arms(ours)
        arms = [each.name for each in expand_arms(ours)] if count <= _MAX_PLANNED_ARMS else []
        return arms, count * len(expand_seeds(ours)) * max(1, len(ours.continual))
    except UNREADABLE:
        return [], None
