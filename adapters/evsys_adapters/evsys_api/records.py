"""Arguments of the operations, built from events. JSON has no NaN: such values are omitted and counted."""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from evsys_adapters.common.hook_arguments import field, fields, list_or_empty, run_name
from evsys_adapters.common.logged_values import config_of
from evsys_bus.codec import to_builtins
from evsys_bus.context import ManifestRow

TAG: Final = "evsys-bus:"
"""Prefix of the tag with our ID, by which an experiment is found again."""
RUN_ID: Final = "evsys_bus_run_id"
"""Key of our ID in ``run_config``."""
INDEX: Final = "evsys_bus_index"
"""Key of a prediction's index within its eval, in its ``metadata``."""
LEFT_OUT: Final = "evsys_bus_left_out"
"""Key for the names of omitted values: in ``metadata``, ``breakdowns`` and a run's ``summary``."""
_COLUMNS: Final = ("task_id", "instruction", "model_output", "expected", "reward", "advantage")
_MAX_NAMES: Final = 50

Args = dict[str, Any]
"""Arguments of an operation."""


class Numbers(NamedTuple):
    """The finite numbers of a row of metrics."""

    values: dict[str, float]
    left_out: list[str]
    """Names of the omitted values."""


def numbers_of(metrics: object, prefix: str = "") -> Numbers:
    """Return the finite numbers of a row; those in nested mappings get names like ``outer/inner``.

    Args:
        metrics: Plain data from the journal.
        prefix: Prepended to every name.
    """
    values: dict[str, float] = {}
    left_out: list[str] = []
    given = cast("Mapping[str, Any]", metrics) if isinstance(metrics, Mapping) else fields(metrics)
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, int | float) and math.isfinite(value):
            values[name] = float(value)
        elif isinstance(value, Mapping):
            inside = numbers_of(cast("Mapping[str, Any]", value), f"{name}/")
            values |= inside.values
            left_out += inside.left_out
        elif value is not None:
            left_out.append(name)
    return Numbers(values, left_out)


def without_nonfinite(value: Any, left_out: list[str], path: str = "") -> Any:
    """Remove NaN and infinities from plain data: omitted from mappings, null in lists.

    Args:
        value: The data.
        left_out: Receives the paths of omitted values.
        path: Path of the value.
    """
    if isinstance(value, float) and not math.isfinite(value):
        left_out.append(path)
        return None
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, each in cast("dict[str, Any]", value).items():
            before = len(left_out)
            cleaned = without_nonfinite(each, left_out, f"{path}.{key}" if path else str(key))
            if cleaned is not None or each is None or len(left_out) == before:
                found[key] = cleaned
        return found
    if isinstance(value, list):
        return [without_nonfinite(each, left_out, f"{path}[{n}]") for n, each in enumerate(cast("list[Any]", value))]
    return value


def experiment_args(ctx: object, name: str, our_id: str, project_id: str | None) -> Args:
    """Return the arguments of ``create_experiment``.

    Args:
        ctx: The experiment's context.
        name: Used if the config has no name.
        our_id: Added to the tags.
        project_id: The project.
    """
    config = config_of(ctx).get("config")
    metadata = field(config, "metadata")
    tags = list_or_empty(field(metadata, "tags")) or list_or_empty(field(config, "tags"))
    hypothesis = field(metadata, "hypothesis")
    return {
        "experiment_name": str(field(config, "name") or name or "experiment"),
        "project_id": project_id,
        "hypothesis": None if hypothesis is None else str(hypothesis),
        "tags": [*map(str, tags), f"{TAG}{our_id}"],
    }


def run_args(ctx: object, handle: object, our_id: str) -> Args:
    """Return the arguments of ``create_run``, without the IDs of its parents.

    Args:
        ctx: The run's context, or None.
        handle: The context or state that names the run.
        our_id: Added to ``run_config``.
    """
    left_out: list[str] = []
    known = config_of(ctx)
    run_config: Any = without_nonfinite(known.get("run_config"), left_out)
    config: Args = (
        dict(cast("Args", run_config))
        if isinstance(run_config, dict)
        else {}
        if run_config is None
        else {"config": run_config}
    )
    config.setdefault("name", run_name(handle))
    config[RUN_ID] = our_id
    if left_out:
        config[LEFT_OUT] = left_out[:_MAX_NAMES]
    kind = field(field(config, "algorithm"), "kind") or field(field(known.get("config"), "algorithm"), "kind")
    seed = config.get("seed")
    url = field(getattr(ctx, "extras", None), "wandb_url")
    return {
        "recipe_kind": kind if isinstance(kind, str) else None,
        "run_config": config,
        "seed": seed if type(seed) is int else None,
        "status": "running",
        "wandb_run_url": url if isinstance(url, str) else None,
    }


def checkpoint_args(row: ManifestRow) -> Args | None:
    """Return the arguments of ``add_checkpoint``; None for a checkpoint without a path."""
    uri = field(row, "sampler_path") or field(row, "state_path")
    if not uri:
        return None
    # EvSys' own client never sets `is_final`: readers use the label.
    return {"uri": str(uri), "label": field(row, "name"), "step": field(row, "batch"), "is_final": False}


def eval_args(result: object, step: int | None) -> Args:
    """Return the arguments of ``create_eval``."""
    left_out: list[str] = []
    metrics: Any = without_nonfinite(to_builtins(field(result, "metrics") or {})[0], left_out)
    breakdowns: Any = without_nonfinite(to_builtins(field(result, "breakdowns") or {})[0], left_out, "breakdowns")
    if left_out and isinstance(breakdowns, dict):
        breakdowns = {**cast("Args", breakdowns), LEFT_OUT: left_out[:_MAX_NAMES]}
    benchmark = field(result, "benchmark_id")
    return {
        "benchmark_id": None if benchmark is None else str(benchmark),
        "metrics": metrics,
        "breakdowns": breakdowns or None,
        "step": step,
    }


def prediction_args(prediction: object, index: int, step: int | None) -> Args:
    """Return the arguments of ``add_prediction`` without the IDs; fields without a column go to ``metadata``."""
    left_out: list[str] = []
    plain: Any = without_nonfinite(to_builtins(prediction)[0], left_out)
    row: Args = dict(cast("Args", plain)) if isinstance(plain, dict) else {"model_output": str(plain)}
    if "output" in row and "model_output" not in row:
        row["model_output"] = row.pop("output")
    columns = {name: row.pop(name, None) for name in _COLUMNS}
    for name in ("task_id", "instruction", "model_output"):
        value = columns[name]
        columns[name] = value if value is None or isinstance(value, str) else str(value)
    sample = row.pop("sample_idx", 0)
    metadata = row.pop("metadata", None)
    extras: Args = dict(cast("Args", metadata)) if isinstance(metadata, dict) else {}
    if metadata is not None and not isinstance(metadata, dict):
        extras["metadata"] = metadata
    for name in ("kind", "run_id", "eval_id", "step"):
        row.pop(name, None)
    extras |= row
    extras[INDEX] = index
    if left_out:
        extras[LEFT_OUT] = left_out[:_MAX_NAMES]
    sampled = sample if type(sample) is int else 0
    return {"kind": "eval", **columns, "step": step, "sample_idx": sampled, "metadata": extras}
