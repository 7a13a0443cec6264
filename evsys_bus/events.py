"""The events of a training, one Struct per hook, and the envelope that carries one.

The timeline; each event calls the hook ``on_<name>`` with its fields, in their order:

    ExperimentStart                                  once, before any arm
    │  GroupStart                                    when a new group of runs is needed
    │  │  RunStart                                   per run, before training; ctx.run_config is set
    │  │  │  TrainStart                              once, before the first step
    │  │  │  │  StepEnd                              every step, after its metrics row is written
    │  │  │  │  Checkpoint                           after each checkpoint's manifest row is recorded
    │  │  │  │  Eval, then BenchmarkEval(step=n)     per evaluator; per benchmark, in-loop
    │  │  │  TrainEnd                                once, after the final checkpoint was saved
    │  │  │  BenchmarkEval(step=None)                per benchmark, after training
    │  │  RunEnd                                     after eval, before the run is marked completed
    ExperimentEnd                                    once, at the end

Any number of times, while a run is open: Metrics (a part of a step's row), EpochEnd, Rollout, TrainData, Environment,
ConfigUpdate, Summary, Content and Alert.

To declare your own event, subclass `Event`; its hook is named after the class, and callbacks that have such a method
are called. Hooks take positional arguments in the order of the fields; fields listed in ``keywords`` are passed by
name.

Example:
    >>> class RolloutEnd(Event, frozen=True):
    ...     state: LoopState
    ...     reward: float
    >>> RolloutEnd.hook
    'on_rollout_end'
"""

import re
from keyword import iskeyword
from typing import Any, ClassVar, Final, Literal

import msgspec

from evsys_bus.context import (
    ArmResult,
    ContentItem,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    Prediction,
    RunResult,
    TrainingBatch,
    to_int,
)
from evsys_bus.diagnostics import log
from evsys_bus.errors import EventError

_RESERVED: Final = frozenset({"hook", "keywords"})
_SHIPPED_MODULES: Final = {  # events of the library in other modules, whether imported yet or not
    "learnt": "evsys_bus.adapter",
    "run.delivery_changed": "evsys_bus.adapter",
    "run.hook_times": "evsys_bus.adapter",
    "bus_callback_marks": "evsys_bus.bus.callback_marks",
}
_STEP_BITS: Final = 63
"""Maximum size of a step in the files of TensorBoard and W&B, without the sign."""
_declared: dict[str, type["Event"]] = {}
_newer: dict[str, type["Event"]] = {}
"""The events that were added to the library after version 0.1, by the name of their hook."""
_PREFIX: Final = "run."
"""Of the tags of newer events, so that an event which a program has declared under the same name keeps its records."""


def _tag_of(name: str) -> str:
    if name == "RunAnnotated":
        return "learnt"  # its tag in journals since 0.1, where the class had this name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def event_tag(event_type: type["Event"]) -> str:
    """Return the type of an event in records: ``step_end``."""
    return str(event_type.__struct_config__.tag)


class Event(msgspec.Struct, frozen=True, gc=False, tag=_tag_of):
    """What happened. Subclass it to declare an event of your own.

    Events are not tracked by the garbage collector (that would slow down every step), so one that refers to itself is
    never freed; handles and metrics are fine.

    Raises:
        EventError: The subclass's name results in the hook of an event of the library, or a field has an invalid name.
    """

    hook: ClassVar[str] = ""
    """The method of callbacks that this event calls: ``on_`` and the class's name in snake case."""
    keywords: ClassVar[frozenset[str]] = frozenset()
    """Fields that the hook takes by keyword only."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for field in vars(cls).get("__annotations__", {}):
            reserved = field in _RESERVED and "ClassVar" not in str(vars(cls)["__annotations__"][field])
            if reserved or not field.isidentifier() or iskeyword(field):
                raise EventError(
                    f"event {cls.__qualname__} has a field called {field!r}, which no hook could be given",
                    fix="give the field another name",
                )
        tag = name = _tag_of(cls.__name__)
        if cls.__module__ == _NEWER_EVENTS.get(cls.__name__):
            tag = _PREFIX + name
            _newer[f"on_{name}"] = cls
        previous = _declared.get(tag)
        is_taken = _SHIPPED_MODULES.get(tag, cls.__module__) != cls.__module__
        if is_taken or (previous is not None and previous.__module__ == __name__):
            raise EventError(
                f"event {cls.__qualname__} has the name of an event that ships with evsys-bus",
                fix="give it another name, or publish the one that ships",
            )
        cls.hook = f"on_{name}"
        _declared[tag] = cls
        newer = _newer.get(cls.hook, cls)
        if newer is not cls and newer.hook == cls.hook:  # the program's own event has the name, whatever ships later
            newer.hook = f"on_run_{name}"
            log().warning(
                "event.hook_renamed", shipped=f"{newer.__module__}.{newer.__name__}", hook=newer.hook, taken_by=cls
            )


_NEWER_EVENTS: Final = {
    **dict.fromkeys(
        ("Metrics", "EpochEnd", "Rollout", "TrainData", "Environment", "ConfigUpdate", "Summary", "Content", "Alert"),
        __name__,
    ),
    **dict.fromkeys(("DeliveryChanged", "HookTimes"), "evsys_bus.adapter"),
}
"""The module of each."""


def lookup_event_type(tag: str) -> type[Event] | None:
    """Return the event type with this tag, or None if this process has none."""
    return _declared.get(tag)


def is_newer(event_type: type[Event]) -> bool:
    """Return whether the event has, or has taken, the name of one that was added to the library after version 0.1.

    A method of that name may belong to an older callback, or to one that is made for the other event.
    """
    return event_type in _newer.values() or event_type.hook in _newer


def is_shipped(event_class: type[Event]) -> bool:
    """Return whether an event type is part of the library, so that every process can decode it."""
    return event_class.__module__ == __name__ or _SHIPPED_MODULES.get(event_tag(event_class)) == event_class.__module__


def declared_events() -> dict[str, type[Event]]:
    """Return all event types declared so far, by tag (``step_end``); the last declaration of a tag counts."""
    return dict(_declared)


class ExperimentStart(Event, frozen=True):
    """Once, before any arm; a logger writes ``ctx.ids["experiment_id"]``."""

    ctx: LogContext


class GroupStart(Event, frozen=True):
    """When a new group of runs is needed; a logger writes ``ctx.ids[f"group:{group_name}"]``."""

    ctx: LogContext
    group_name: str


class RunStart(Event, frozen=True):
    """Per run, before training; a logger opens its run and writes ``ctx.ids["run_id"]``."""

    ctx: LogContext


class TrainStart(Event, frozen=True):
    """Once, before the first step; ``state.step`` is that step, so not 0 after a resume."""

    state: LoopState


class StepEnd(Event, frozen=True):
    """After every step's metrics row is written."""

    state: LoopState
    step_idx: int
    """0-based. Async loops may publish several rows for one step, late and out of order."""
    batch: TrainingBatch = msgspec.field(default_factory=TrainingBatch)
    metrics: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """Inline callbacks may add keys; later callbacks and every sink see them."""


class Checkpoint(Event, frozen=True):
    """After each checkpoint's manifest row is recorded."""

    state: LoopState
    row: ManifestRow


class Eval(Event, frozen=True):
    """Per evaluator, after each in-loop eval."""

    state: LoopState
    step_idx: int
    eval_name: str
    metrics: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class BenchmarkEval(Event, frozen=True):
    """Per benchmark scored, in-loop or after training."""

    keywords: ClassVar[frozenset[str]] = frozenset({"step"})

    ctx: LogContext
    eval_result: EvalResult
    predictions: list[Prediction] = msgspec.field(default_factory=list[Prediction])
    step: int | None = None
    """The 0-based train step; None after training."""


class TrainEnd(Event, frozen=True):
    """Once, after the loop; also when it raised (then ``state.error`` is set)."""

    state: LoopState
    artifacts: LoopArtifacts = msgspec.field(default_factory=LoopArtifacts)


class RunEnd(Event, frozen=True):
    """Per run, after eval, before the run is marked completed."""

    ctx: LogContext
    run_result: RunResult = msgspec.field(default_factory=RunResult)
    arm: ArmResult = msgspec.field(default_factory=lambda: ArmResult(name=""))


class ExperimentEnd(Event, frozen=True):
    """Once, at the end."""

    ctx: LogContext
    result: ExperimentResult


class Metrics(Event, frozen=True, tag=f"{_PREFIX}metrics"):
    """A part of a step's row. The whole row follows as a `StepEnd`; adapters need not handle its parts."""

    state: LoopState
    step_idx: int
    metrics: dict[str, Any]


class EpochEnd(Event, frozen=True, tag=f"{_PREFIX}epoch_end"):
    """After a pass over the data."""

    state: LoopState
    epoch: int
    """0-based."""
    metrics: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])


class Rollout(Event, frozen=True, tag=f"{_PREFIX}rollout"):
    """The trajectories that a step of reinforcement learning has sampled."""

    state: LoopState
    step_idx: int
    rollouts: list[Any]
    """Plain data of the host's own structure, one entry per trajectory."""
    rollout_items: list[Any] = msgspec.field(default_factory=list[Any])
    """The items of the data set that they were sampled for."""


class TrainData(Event, frozen=True, tag=f"{_PREFIX}train_data"):
    """The examples as they are rendered for training, once per run."""

    ctx: LogContext
    rows: list[Any]


class Environment(Event, frozen=True, tag=f"{_PREFIX}environment"):
    """Where a run takes place: commit, command line, packages, host, GPUs; once per start, a moment after RunStart."""

    ctx: LogContext
    facts: dict[str, Any]


class ConfigUpdate(Event, frozen=True, tag=f"{_PREFIX}config_update"):
    """Keys of a run's configuration that were added or changed after its start."""

    ctx: LogContext
    config: dict[str, Any]


class Summary(Event, frozen=True, tag=f"{_PREFIX}summary"):
    """Values that describe a run as a whole: the newest of each name counts."""

    ctx: LogContext
    values: dict[str, Any]


class Content(Event, frozen=True, tag=f"{_PREFIX}content"):
    """A text, picture, table, file or the like; it is stored in the run's directory before the event is published."""

    state: LoopState
    step_idx: int | None
    """None for what belongs to the run as a whole."""
    item: ContentItem


class Alert(Event, frozen=True, tag=f"{_PREFIX}alert"):
    """Something that a person should see."""

    ctx: LogContext
    title: str
    text: str = ""
    level: Literal["info", "warning", "error"] = "warning"


def step_field(event_type: type[Event]) -> str | None:
    """Return the name of the field that holds the step of one of our events, or None."""
    if issubclass(event_type, StepEnd | Eval | Metrics | Rollout | Content):
        return "step_idx"
    return "step" if issubclass(event_type, BenchmarkEval) else None


def with_int_step(event: Event) -> Event:
    """Return the event with its step as an int: from an integral float, a numpy integer or a tensor with one number.

    Raises:
        EventError: Its step is not a whole number, or too large for some file format.
    """
    name = step_field(type(event))
    if name is None:
        return event
    value: Any = getattr(event, name)
    if value is None and isinstance(event, BenchmarkEval | Content):
        return event
    try:
        step = to_int(value)
    except Exception as error:
        raise EventError(
            f"{name} of a {type(event).__name__} is {value!r:.80}, which is no whole number",
            why="rows, files and charts are keyed by the step",
            fix=f"publish an int: {type(event).__name__}(..., {name}=int(...))",
        ) from error
    if step.bit_length() > _STEP_BITS:
        raise EventError(
            f"{name} of a {type(event).__name__} has {step.bit_length()} bits, and files and charts hold {_STEP_BITS}",
            why="such a number is no count of steps: it may be a time in nanoseconds, a hash, or a sum that ran over",
            fix=f"publish the number of the step: {type(event).__name__}(..., {name}=...)",
        )
    return event if type(value) is int else msgspec.structs.replace(event, **{name: step})


class UnknownEvent(msgspec.Struct, frozen=True):
    """An event of a type that this process does not know, with the fields that were read; its handles are detached.

    Its hook can still be called:

        hook = getattr(callback, f"on_{event.type}")
        args, kwargs = event.arguments()
        hook(*args, **kwargs)
    """

    type: str
    """Its tag in the record."""
    fields: dict[str, Any]
    """The recorded fields, in the order of its class."""
    handles: dict[str, str] = {}
    """Which fields are handles: ``state``, ``context`` or ``batch``."""
    keywords: tuple[str, ...] = ()
    """Fields that the hook takes by keyword only."""

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the positional and keyword arguments of the hook."""
        by_name = {name: self.fields[name] for name in self.keywords if name in self.fields}
        return [value for name, value in self.fields.items() if name not in by_name], by_name


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """An event with its metadata. ``(stream, seq)`` identifies it forever; order is total within a stream."""

    stream: str
    """One publishing process."""
    seq: int
    """From 1, without gaps."""
    time: float
    """When the event was published: seconds since the epoch, wall clock, for display only."""
    event: Event | UnknownEvent
    run: str | None = None
    """The run key; None for experiment-wide events."""
    rank: int = 0
    replaced: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """Values that could not be encoded: path within the event (``metrics.loss``) -> reason."""
