"""The attempts of a run: how each starts and ends, and which events of an earlier one a later one has replaced.

A run of several processes has the state of its lowest rank that trains; of another one only an error is shown.

Attempts usually arrive in their order. If the events of an earlier one come late, as by an import, the points that a
later one has made anew stay, and so does its state.
"""

from collections.abc import Mapping
from typing import Any, Final

from evsys_adapters.common.hook_arguments import field
from evsys_adapters.dashboard.experiment_events import STATUSES
from evsys_adapters.dashboard.records import RunRecord
from evsys_adapters.dashboard.values import is_step, json_fields
from evsys_bus.events import Envelope
from evsys_bus.journal.layout import stream_sort_key

_STATE_EVENTS: Final = frozenset({"run_start", "train_start", "train_end", "run_end"})
_INTERRUPTIONS: Final = ("KeyboardInterrupt", "CancelledError", "SystemExit", "GeneratorExit")
_STEP_FIELDS: Final = {
    "eval": "step_idx",
    "benchmark_eval": "step",
    "run.rollout": "step_idx",
    "run.content": "step_idx",
    "system_metrics": "step",
}


class Attempts:
    """Knows from which step on the events of a stream are replaced."""

    def __init__(self) -> None:
        self._limits: Final[dict[tuple[int, str], int | None]] = {}

    def add(self, run: RunRecord, envelope: Envelope, first_step: int) -> None:
        """Add the start of a training."""
        known = run.starts.get(envelope.stream)
        step = first_step if known is None else min(first_step, known[1])
        time = envelope.time if known is None else known[2]
        run.starts = {**run.starts, envelope.stream: (envelope.rank, step, time)}
        self._limits.clear()

    def limit(self, run: RunRecord, envelope: Envelope) -> int | None:
        """Return the step from which on this event's attempt is replaced; None if it is the newest."""
        if not run.starts or (len(run.starts) == 1 and envelope.stream in run.starts):
            return None
        key = (run.id, envelope.stream)
        if key not in self._limits:
            self._limits[key] = _limit(run, envelope)
        return self._limits[key]


def is_earlier(stream: str, time: float, other_stream: str, other_time: float) -> bool:
    """Return whether a process started before another one: by the counters of their streams, and by time.

    The counters alone do not show it, because a new journal counts from the beginning again.
    """
    return time < other_time and stream_sort_key(stream) < stream_sort_key(other_stream)


def _limit(run: RunRecord, envelope: Envelope) -> int | None:
    own = run.starts.get(envelope.stream)
    time = envelope.time if own is None else own[2]
    later = [
        step
        for stream, (rank, step, started) in run.starts.items()
        if rank == envelope.rank and is_earlier(envelope.stream, time, stream, started)
    ]
    return min(later, default=None)


def is_replaced(tag: str, parts: Mapping[str, Any], limit: int) -> bool:
    """Return whether an event of an earlier attempt is left out."""
    if tag in _STATE_EVENTS:
        return True
    if tag == "checkpoint":
        step = field(parts["row"], "batch")
    elif tag in _STEP_FIELDS:
        step = parts.get(_STEP_FIELDS[tag])
    else:
        return False
    return not is_step(step) or step >= limit


def reopen(run: RunRecord, envelope: Envelope) -> None:
    """Forget how an earlier attempt ended."""
    if _is_of_main_rank(run, envelope):
        run.status = run.error = run.ended = run.stop_reason = None
        run.finals = {}


def end_training(run: RunRecord, state: object, envelope: Envelope) -> None:
    """End a run with its training if it failed or was interrupted, or if no RunEnd will come."""
    error, reason = field(state, "error"), field(state, "stop_reason")
    if not _is_of_main_rank(run, envelope):
        _add_error(run, error, envelope)
        return
    run.error = None if error is None else str(error)
    status = "completed"
    if run.error is not None:
        status = "cancelled" if run.error.startswith(_INTERRUPTIONS) else "failed"
    elif field(state, "stopped_early"):
        status = "cancelled"
    elif field(state, "stop_requested"):
        status = "stopped"
        run.stop_reason = str(reason) if reason else "stopped"
    if run.has_start and status in {"completed", "stopped"}:
        return  # evaluation follows, and then its end
    run.status, run.ended = status, envelope.time


def end_run(run: RunRecord, result: object, envelope: Envelope) -> None:
    """End a run by its result."""
    status, error = field(result, "status"), field(result, "error")
    if not _is_of_main_rank(run, envelope):
        _add_error(run, error, envelope)
        return
    run.status = status if isinstance(status, str) and status in STATUSES else "completed"
    if run.status == "completed" and run.stop_reason:
        run.status = "stopped"
    run.error = str(error) if error else None
    run.ended = envelope.time
    metrics = json_fields(field(result, "metrics"))
    given = {name: value for name, value in run.summary.items() if name not in run.result_names}
    run.summary = metrics | given
    run.result_names = [name for name in metrics if name not in given]


def _is_of_main_rank(run: RunRecord, envelope: Envelope) -> bool:
    run.rank = min(run.rank, envelope.rank)
    return envelope.rank == run.rank


def _add_error(run: RunRecord, error: object, envelope: Envelope) -> None:
    if error is not None and run.error is None:
        run.error = f"rank {envelope.rank}: {error}"
