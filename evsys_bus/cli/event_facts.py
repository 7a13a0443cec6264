"""The type, step, metrics and further facts of an event, for people.

Events may come from journals of other programs and versions, so the types of their fields are not trusted.
"""

from collections.abc import Mapping
from typing import Any, cast

from evsys_bus.adapter import RunAnnotated
from evsys_bus.cli.output.formatting import format_duration, pluralize
from evsys_bus.events import (
    BenchmarkEval,
    Checkpoint,
    Eval,
    Event,
    ExperimentEnd,
    GroupStart,
    RunEnd,
    StepEnd,
    TrainEnd,
    TrainStart,
    UnknownEvent,
)


def type_of(event: Event | UnknownEvent) -> str:
    """Return the type of an event as journals record it: ``step_end``."""
    return event.type if isinstance(event, UnknownEvent) else event.hook.removeprefix("on_")


def step_of(event: Event | UnknownEvent) -> int | None:
    """Return the 0-based train step of an event; None if it has none."""
    if isinstance(event, Checkpoint):
        step = _get(event.row, "batch")
    else:
        fields = _fields(event)
        step = fields.get("step_idx", fields.get("step", fields.get("batch") if "checkpoint" in fields else None))
    return step if isinstance(step, int) else None


def metrics_of(event: Event | UnknownEvent) -> dict[str, Any]:
    """Return the metrics of an event; those of an eval or a benchmark have its name as prefix: ``val/acc``."""
    if isinstance(event, Eval):
        return _prefix_names(event.eval_name, event.metrics)
    if isinstance(event, BenchmarkEval):
        return _prefix_names(_get(event.eval_result, "name"), _get(event.eval_result, "metrics"))
    if isinstance(event, RunEnd):
        return _entries(_get(event.run_result, "metrics"))
    if isinstance(event, UnknownEvent):
        return _entries(event.fields.get("metrics"))
    return _entries(_get(event, "metrics"))


def facts_of(event: Event | UnknownEvent, run: str | None = None) -> list[str]:  # noqa: PLR0911 # one for each type
    """Return further facts of an event as short texts; ``run`` is left out, because it is shown elsewhere."""
    match event:
        case StepEnd() | Eval():
            return []
        case GroupStart():
            return [str(event.group_name)]
        case TrainStart():
            steps = _get(event.state, "num_steps")
            return [f"of {pluralize(steps, 'step')}"] if isinstance(steps, int) else []
        case Checkpoint():
            return _to_lines(_get(event.row, "name"), _get(event.row, "state_path") or _get(event.row, "sampler_path"))
        case BenchmarkEval():
            rows = len(event.predictions) if isinstance(event.predictions, list) else 0  # pyright: ignore[reportUnnecessaryIsInstance] # what was read may be anything
            return [pluralize(rows, "prediction")] if rows else []
        case TrainEnd():
            seconds = _get(event.artifacts, "train_seconds")
            took_text = f"after {format_duration(seconds)}" if isinstance(seconds, int | float) else None
            error = _get(event.state, "error")
            return _to_lines(took_text, None if error is None else f"failed: {error}")
        case RunEnd():
            return _to_lines(_get(event.run_result, "status"), _get(event.run_result, "error"))
        case ExperimentEnd():
            best = _get(event.result, "best_arm")
            return _to_lines(_get(event.result, "status"), f"best arm {best}" if best else None)
        case RunAnnotated():
            return _scalars(event.extras)
        case _:
            fields = _fields(event)
            shown_elsewhere = {"run": run, "batch": step_of(event)}
            return _scalars(
                {name: value for name, value in fields.items() if shown_elsewhere.get(name) != value or value is None}
            )


def _fields(event: Event | UnknownEvent) -> Mapping[str, Any]:
    if isinstance(event, UnknownEvent):
        return event.fields
    return {name: _get(event, name) for name in event.__struct_fields__}


def _scalars(fields: Mapping[str, object]) -> list[str]:
    return [
        f"{name} {value}"
        for name, value in fields.items()
        if isinstance(value, str | int | float) and name not in {"step", "step_idx"}
    ]


def _to_lines(*facts: object) -> list[str]:
    return [" ".join(str(fact).split()) for fact in facts if fact is not None]


def _prefix_names(name: object, metrics: object) -> dict[str, Any]:
    return {f"{name}/{metric}": value for metric, value in _entries(metrics).items()}


def _entries(metrics: object) -> dict[str, Any]:
    return (
        {str(name): value for name, value in cast("dict[object, Any]", metrics).items()}
        if isinstance(metrics, dict)
        else {}
    )


def _get(thing: object, name: str, default: object = None) -> Any:
    return getattr(thing, name, default)
