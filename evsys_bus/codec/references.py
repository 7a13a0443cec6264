"""What of a handle travels: the scalars of `LoopState`, the parts of `LogContext` and `TrainingBatch` that are data.

The handle itself is never given to an encoder; the live parts (``backend``, ``store``, ``batch.data``, …) never leave.
"""

from typing import Any, Final

import msgspec

from evsys_bus.codec.flat import NotFlat, flat
from evsys_bus.context import LogContext, LoopState, TrainingBatch

HANDLES: Final = (LoopState, LogContext, TrainingBatch)

_CONTEXT_PARTS: Final = ("output_dir", "run_key", "group_name", "ids", "extras", "config", "run_config")
_BATCH_PARTS: Final = ("loss_fn", "loss_fn_config", "metrics")
_STATE_PARTS: Final = ("step", "num_steps", "output_dir", "stop_requested", "stop_reason")


class StateRef(msgspec.Struct, gc=False, omit_defaults=True):
    """A `LoopState` on the wire; what is as nearly always is left out (`evsys_bus.context.Unsaid`)."""

    step: int
    num_steps: int
    output_dir: str
    stop_requested: bool = False
    stop_reason: str | None = None
    error: str | None = None
    """What the loop raised, as text."""
    run: str | None = None
    """The run key of its context."""


class BatchRef(msgspec.Struct, gc=False, omit_defaults=True):
    """A `TrainingBatch` on the wire; likewise."""

    loss_fn: str | None = None
    loss_fn_config: dict[str, Any] | None = None
    metrics: dict[str, Any] = {}


_NOTHING_SAID: Final = BatchRef()


def state_ref(state: LoopState) -> StateRef:
    """The reference to a state whose attributes have the types that they should have.

    Raises:
        NotFlat: One of them has not.
        AttributeError: One of them is absent.
    """
    step, num_steps, stop, reason = state.step, state.num_steps, state.stop_requested, state.stop_reason
    try:
        ctx = state.ctx
    except AttributeError:  # a detached state may have none
        ctx = None
    run = None if ctx is None else ctx.run_key
    error = state.error
    if (
        type(step) is int
        and type(num_steps) is int
        and (stop is False or stop is True)
        and (reason is None or type(reason) is str)
        and (run is None or type(run) is str)
    ):
        return StateRef(
            step, num_steps, str(state.output_dir), stop, reason, None if error is None else error_text(error), run
        )
    raise NotFlat


def batch_ref(batch: TrainingBatch) -> BatchRef:
    """The reference to a batch whose parts are flat.

    Raises:
        NotFlat: One of them is not.
        AttributeError: One of them is absent.
    """
    loss_fn, config, metrics = batch.loss_fn, batch.loss_fn_config, batch.metrics
    if loss_fn is None and config is None and not metrics:
        return _NOTHING_SAID
    if loss_fn is None or type(loss_fn) is str:
        return BatchRef(loss_fn, None if config is None else flat(config), flat(metrics) if metrics else {})
    raise NotFlat


def error_text(error: object) -> str:
    """An exception as text: its type and what it says. Text, as a detached state has it, stays as it is."""
    if type(error) is str:
        return error
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def parts_of(handle: object, kind: type) -> dict[str, Any]:
    """The parts of a handle that travel, uncopied; those that it lacks, as detached ones do, are left out.

    Any: they are of every type.
    """
    if issubclass(kind, LogContext):
        return attributes(handle, _CONTEXT_PARTS)
    if issubclass(kind, TrainingBatch):
        return attributes(handle, _BATCH_PARTS)
    parts = attributes(handle, _STATE_PARTS)
    error = getattr(handle, "error", None)
    parts["error"] = None if error is None else error_text(error)
    parts["run"] = getattr(getattr(handle, "ctx", None), "run_key", None)
    return parts


def attributes(value: object, names: Any) -> dict[str, Any]:
    """Those of the named attributes that the value has. Any: names come from foreign classes, values are anything."""
    missing = object()
    found = ((name, getattr(value, name, missing)) for name in names)
    return {name: part for name, part in found if part is not missing}
