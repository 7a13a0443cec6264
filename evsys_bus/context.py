"""The arguments of hooks: the handles of a run in progress, and its results.

`LoopState`, `LogContext` and `TrainingBatch` are *handles*: live, mutable, and shared by all inline callbacks. They are
never encoded; an envelope carries a reference to them, and the receiver gets a detached copy with the same attributes
(`detached`). Everything else here is a frozen value. In the order of a training:

    experiment  LogContext ─┬─ run  LogContext ── LoopState ── TrainingBatch, ManifestRow, EvalResult ── LoopArtifacts
                            │                                                       RunResult, ArmResult
                            └─ ExperimentResult

The status words are always: pending, running, completed, failed, cancelled.
"""

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePath
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NoReturn, TypeVar, cast

import msgspec

from evsys_bus.deprecated import Renamed
from evsys_bus.errors import DetachedError
from evsys_bus.location import local_path

Status = Literal["pending", "running", "completed", "failed", "cancelled"]
"""Progress of an arm, a run or an experiment."""

Prediction = dict[str, Any]
"""One task of a benchmark: task_id, instruction, expected, output, reward, metadata, all of them optional."""


class _Handle:
    """A live object that stays in its process; readers of a record get a detached copy."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Show scalars only: configs may contain credentials, and live parts may be any object."""
        parts = ((each.name, getattr(self, each.name, None)) for each in fields(self))  # pyright: ignore[reportArgumentType] # subclasses are dataclasses
        shown = (f"{name}={value!r}" for name, value in parts if isinstance(value, str | int | PurePath))
        return f"{type(self).__name__}({', '.join(shown)})"


OmittedDefaults = Mapping[str, Callable[[], Any]]
"""Attributes that are omitted from the record if they have their usual value, and factories of that value."""


class _Detached:
    """Turns a handle into a detached one: the recorded parts are looked up on access."""

    # Live classes must not inherit this: `__getattr__` slows down every attribute access.
    __slots__ = ()

    if not TYPE_CHECKING:

        def __getattr__(self, attribute: str) -> Any:
            # Only called if the ordinary lookup fails, because the slot is empty.
            class_name, is_field = type(self).__name__, attribute in self.__dataclass_fields__
            own, live = ({}, ()) if attribute == "_parts" else map(self._parts.get, ("own", "live"))
            if type(own) is dict and attribute in own:
                return own[attribute]
            if not is_field and not (type(live) is list and attribute in live):
                raise AttributeError(f"{class_name!r} object has no attribute {attribute!r}", name=attribute, obj=self)
            if is_field and attribute in self._parts:
                value = self._parts[attribute]
                if type(value) is FunctionType:  # never a recorded value: a factory, called on first access
                    value = value(self._parts)
            elif attribute in self._omitted_defaults:
                value = self._omitted_defaults[attribute]()
            else:
                raise DetachedError(
                    f"{class_name}.{attribute} is a live object; "
                    f"this {class_name} is detached, read from a record of the run",
                    fix='place the callback "inline" if it needs live objects',
                )
            if attribute == "output_dir" and type(value) is str:
                value = Path(value)
            setattr(self, attribute, value)
            return value


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class LogContext(_Handle):
    """What a logger needs to know of an experiment and a run; one per run, and one for the experiment."""

    output_dir: Path
    """The experiment's directory, absolute; a run's is ``<output_dir>/<run_key>``."""
    config: Any = None
    """The experiment's configuration as given, of the host's own type."""
    store: Any = None
    """The host's store of experiments, live."""
    run_key: str | None = None
    """Identifies the run: its folder, and the ``run`` of an envelope. None in the experiment's own context."""
    run_config: Any = None
    """The configuration of this run, of the host's own type."""
    group_name: str | None = None
    """The group (replicates of one arm, or one continual stage) that the run belongs to."""
    ids: dict[str, Any] = field(default_factory=dict[str, Any])
    """Identifiers written by callbacks: ``experiment_id``, ``group:<name>``, ``run_id``."""
    extras: dict[str, Any] = field(default_factory=dict[str, Any])
    """Values passed from one callback to a later one, for example ``wandb_url``."""

    if TYPE_CHECKING:  # accepts more than the attributes then have

        def __init__(
            self,
            output_dir: str | os.PathLike[str],
            config: Any = None,
            store: Any = None,
            run_key: str | None = None,
            run_config: Any = None,
            group_name: str | None = None,
            ids: dict[str, Any] = ...,
            extras: dict[str, Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        self.output_dir = local_path(self.output_dir, "LogContext.output_dir")

    @property
    def run_dir(self) -> Path:
        """The run's own directory, or the experiment's if there is no run."""
        return self.output_dir if self.run_key is None else self.output_dir / self.run_key

    def for_run(self, run_key: str, run_config: Any = None, group_name: str | None = None) -> "LogContext":
        """Return a context for one run of the same experiment; ids and extras are copied, so that runs do not mix."""
        return LogContext(
            output_dir=self.output_dir,
            config=self.config,
            store=self.store,
            run_key=run_key,
            run_config=run_config,
            group_name=group_name,
            ids=dict(self.ids),
            extras=dict(self.extras),
        )


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class LoopState(_Handle):
    """The loop in progress; all hooks of a loop get the same object."""

    step: int
    """The step that is running or ran last, 0-based. At TrainStart: the first step to run, so not 0 after a resume."""
    num_steps: int
    """The requested number of steps; None if it is not known."""
    output_dir: Path
    """The run's directory, absolute."""
    backend: Any = None
    """What trains, live, of the host's own type."""
    log_store: Any = None
    """Where the loop writes its metrics rows, live, of the host's own type."""
    checkpoint_mgr: Any = None
    """What saves checkpoints, live, of the host's own type."""
    stop_requested: bool = False
    """Whether a hook requested a stop after the current step."""
    stop_reason: str | None = None
    """The first reason given with a stop request."""
    error: BaseException | None = None
    """The exception of the loop, from TrainEnd on."""
    ctx: LogContext | None = None
    """The context of the run, if there is one."""
    stopped_early: bool = False
    """Set together with a stop that interrupts the run, for example because something that it needs has failed: the run
    then counts as cancelled, and a resume continues it."""

    unfinished: ClassVar[Renamed] = Renamed("stopped_early")

    if TYPE_CHECKING:  # accepts more than the attributes then have

        def __init__(
            self,
            step: int,
            num_steps: int | None,
            output_dir: str | os.PathLike[str],
            backend: Any = None,
            log_store: Any = None,
            checkpoint_mgr: Any = None,
            stop_requested: bool = False,
            stop_reason: str | None = None,
            error: BaseException | None = None,
            ctx: LogContext | None = None,
            stopped_early: bool = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        self.output_dir = local_path(self.output_dir, "LoopState.output_dir")

    @property
    def run_key(self) -> str:
        """The key under which callbacks store data of a run: the context's, or the name of the run's directory."""
        ctx = self.ctx
        return self.output_dir.name if ctx is None or ctx.run_key is None else ctx.run_key

    def request_stop(self, reason: str | None = None) -> None:
        """Ask the loop to stop after the current step; its writes, due checkpoint and due evals still happen."""
        self.stop_requested = True
        if self.stop_reason is None:
            self.stop_reason = reason


class DetachedLoopState(_Detached, LoopState):
    """A `LoopState` read from a record: recorded scalars, no live parts, and no way to stop the run.

    Attributes that a subclass added are available if they were scalars or small plain data; omitted ones have defaults.
    """

    __slots__ = ("_parts",)
    _omitted_defaults: ClassVar[OmittedDefaults] = {
        "step": int,
        "output_dir": Path,
        "stop_requested": bool,
        "stopped_early": bool,
    } | (dict.fromkeys(("num_steps", "stop_reason", "error", "ctx"), type(None)))

    def request_stop(self, reason: str | None = None) -> NoReturn:  # noqa: ARG002 # the signature it replaces
        """Raises: DetachedError, always."""
        raise DetachedError(
            "request_stop() on a detached LoopState cannot reach the loop",
            fix='place the callback "inline": only inline callbacks may stop a run',
        )


@dataclass(slots=True, eq=False, repr=False, weakref_slot=True)
class TrainingBatch(_Handle):
    """What one step trained on."""

    data: Any = None
    """The examples, live, of the host's own type."""
    loss_fn: str | None = None
    """The name of the loss."""
    loss_fn_config: dict[str, Any] | None = None
    """Its parameters."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Facts about the batch that are known before the step: sizes, token counts."""
    rollouts: Sequence[Any] = ()
    """The trajectories that the examples were made of, live; a `Rollout` event records them."""
    rollout_items: Sequence[Any] = ()
    """The items of the data set that they were sampled for, live."""


class DetachedLogContext(_Detached, LogContext):
    """A `LogContext` read from a record."""

    __slots__ = ("_parts",)
    _omitted_defaults: ClassVar[OmittedDefaults] = {"output_dir": Path, "ids": dict, "extras": dict} | dict.fromkeys(
        ("config", "run_key", "run_config", "group_name"), type(None)
    )


class DetachedTrainingBatch(_Detached, TrainingBatch):
    """A `TrainingBatch` read from a record."""

    __slots__ = ("_parts",)
    _omitted_defaults: ClassVar[OmittedDefaults] = {
        "loss_fn": type(None),
        "loss_fn_config": type(None),
        "metrics": dict,
    }


HandleT = TypeVar("HandleT", bound=_Handle)

_DETACHED_CLASSES: Final[
    dict[type, Any]
] = {  # pyright cannot express the mapping from a class to its detached subclass
    LoopState: DetachedLoopState,
    DetachedLoopState: DetachedLoopState,
    LogContext: DetachedLogContext,
    TrainingBatch: DetachedTrainingBatch,
}


def detached(kind: type[HandleT], attributes: Mapping[str, Any]) -> HandleT:
    """Return a detached handle with just these attributes; any other one raises `DetachedError` on access."""
    return detached_factory(kind)(attributes)


def detached_factory(kind: type[HandleT]) -> Callable[[Mapping[str, Any]], HandleT]:
    """Return a function that creates detached handles, for callers that create many."""
    detached_class: Any = _DETACHED_CLASSES[kind]
    new = object.__new__

    def create(attributes: Mapping[str, Any]) -> HandleT:
        handle = new(detached_class)
        handle._parts = attributes  # noqa: SLF001
        return handle

    return create


def to_int(value: Any) -> int:
    """Return a whole number as an int: an integral float, a numpy integer, a tensor with one number.

    Raises:
        TypeError: It is no whole number; or another error that its own code raises.
    """
    scalar: object = value.item() if hasattr(value, "item") else value
    return int(scalar) if isinstance(scalar, float) and scalar.is_integer() else operator.index(cast("Any", scalar))


class ManifestRow(msgspec.Struct, frozen=True):
    """One row of ``checkpoints.jsonl``."""

    name: str
    """Unique within the run; the last row is always ``final``."""
    batch: int = 0
    """The 0-based step after which it was saved."""
    epoch: int = 0
    """0-based."""
    state_path: str | None = None
    """The full state, to resume from: a path or a URI."""
    sampler_path: str | None = None
    """The weights alone, for inference: a path or a URI."""
    stopped: str | None = None
    """Of a ``final`` row: why the run ended for good before its last requested step. None if a resume continues after
    it."""

    def __post_init__(self) -> None:
        """Make ints of whole numbers of other types and a text of a number as name; None counts as not given."""
        for field_name in ("batch", "epoch"):
            value: object = getattr(self, field_name)
            if type(value) is not int:
                with suppress(Exception):  # what is no number is left for the receiver to reject
                    msgspec.structs.force_setattr(self, field_name, 0 if value is None else to_int(value))
        if isinstance(cast("object", self.name), int):
            msgspec.structs.force_setattr(self, "name", str(self.name))


ContentKind = Literal["text", "table", "histogram", "image", "audio", "video", "figure", "html", "artifact"]


class ContentItem(msgspec.Struct, frozen=True):
    """A text, picture, table, file or the like that a run has stored, by reference."""

    kind: ContentKind
    name: str
    """Chosen by the program; the same name at several steps is one series."""
    path: str | None = None
    """Relative to the run's directory: ``media/<digest>.<suffix>``, or a directory there. None if `data` holds all."""
    digest: str = ""
    """SHA-256 of the file in hexadecimal; of a directory, that of its manifest."""
    media_type: str = ""
    """As in HTTP: ``image/png``."""
    size: int = 0
    """In bytes."""
    caption: str | None = None
    artifact_type: str | None = None
    """Of an artifact: what it is used for, such as ``dataset``."""
    data: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """The small part: ``{"text"}`` of a short text; ``{"edges", "counts"}`` of a histogram, with one edge more than
    counts; ``{"columns", "rows", "row_count"}`` with the first rows of a table."""


class LoopArtifacts(msgspec.Struct, frozen=True):
    """What a training loop leaves behind."""

    run_dir: str = ""
    manifest_path: str | None = None
    """``checkpoints.jsonl`` of the run."""
    checkpoints: list[ManifestRow] = msgspec.field(default_factory=list[ManifestRow])
    """In the order in which they were saved."""
    total_requested_steps: int = 0
    """The requested number of steps, not the number of steps run."""
    train_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain data, as JSON would have them."""
        return cast("dict[str, Any]", msgspec.to_builtins(self))


class EvalResult(msgspec.Struct, frozen=True):
    """One benchmark, scored once."""

    name: str
    benchmark_id: str | None = None
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    breakdowns: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """Metrics by category, as named and structured by the benchmark."""
    eval_seconds: float = 0.0
    step: int | None = None
    """The 0-based train step it was scored at; None after training."""
    tags: list[str] = msgspec.field(default_factory=list[str])
    """``val`` marks a validation benchmark."""


class RunResult(msgspec.Struct, frozen=True):
    """How one run ended."""

    run_id: str | None = None
    status: Status = "completed"
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    """The last training metrics."""
    artifacts: LoopArtifacts | None = None
    error: str | None = None
    """The exception as text, if the run failed."""
    implied: bool = False
    """Whether the program left without ending the run, so that its bus did."""


class ArmResult(msgspec.Struct, frozen=True):
    """How one run of one arm ended, including its evaluation."""

    name: str
    run_config: Any = None
    """The configuration of the run, of the host's own type."""
    status: Status = "completed"
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    eval_metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    evals: list[EvalResult] = msgspec.field(default_factory=list[EvalResult])
    run_id: str | None = None
    group_name: str | None = None
    error: str | None = None
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    run_result: RunResult | None = None

    def eval(self, name: str) -> EvalResult | None:
        """Return the newest result of a benchmark: that after training, else that of the last step. None if none is."""
        found = [each for each in self.evals if each.name == name]
        return max(found, key=lambda each: math.inf if each.step is None else each.step, default=None)

    def score(self, metric: str) -> float | None:
        """Return the value by which arms are compared: that of the evals after training, else that of the training."""
        return self.eval_metrics.get(metric, self.metrics.get(metric))


class ExperimentResult(msgspec.Struct, frozen=True):
    """How the experiment ended."""

    name: str
    status: Status = "completed"
    arms: list[ArmResult] = msgspec.field(default_factory=list[ArmResult])
    best_arm: str | None = None
    best_score: float | None = None
    conclusion: str | None = None
    experiment_id: str | None = None
    hypothesis: str | None = None


class Spread(msgspec.Struct, frozen=True):
    """Statistics of a metric over the runs of an arm."""

    mean: float | None
    """Mean of the finite values; None if there are none."""
    sd: float | None
    """Sample standard deviation; None for fewer than two finite values."""
    n: int
    """Number of runs with a finite value."""
    nonfinite: int = 0
    """Number of runs with NaN or an infinity."""

    def __str__(self) -> str:
        if self.mean is None:
            return "NaN" if self.nonfinite else "-"
        return f"{self.mean:.4g}" if self.sd is None else f"{self.mean:.4g} ± {self.sd:.2g}"


def spread_of(values: Iterable[float | None]) -> Spread:
    """Return the statistics of a metric over runs; None for a run that does not have it."""
    import statistics  # takes some ms, and is needed only when runs are compared

    known = [float(value) for value in values if value is not None]
    finite = [value for value in known if math.isfinite(value)]
    return Spread(
        mean=statistics.fmean(finite) if finite else None,
        sd=statistics.stdev(finite) if len(finite) > 1 else None,
        n=len(finite),
        nonfinite=len(known) - len(finite),
    )
