"""The attempts of a run that was resumed, and which events of an earlier one a later one has replaced.

Attempts usually arrive in their order. If the events of an earlier one come late, as by an import, the points that a
later one has made anew stay, and so does its state.
"""

from collections.abc import Mapping
from typing import Any, Final

from evsys_adapters.common.hook_arguments import field
from evsys_adapters.dashboard.records import RunRecord
from evsys_adapters.dashboard.values import is_step
from evsys_bus.events import Envelope
from evsys_bus.journal.layout import stream_sort_key

_STATE_EVENTS: Final = frozenset({"run_start", "train_start", "train_end", "run_end"})
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


def _limit(run: RunRecord, envelope: Envelope) -> int | None:
    """Compare by the counters of the streams and by time, because a new journal counts from the beginning again."""
    own = run.starts.get(envelope.stream)
    time, place = envelope.time if own is None else own[2], stream_sort_key(envelope.stream)
    later = [
        step
        for stream, (rank, step, started) in run.starts.items()
        if rank == envelope.rank and started > time and stream_sort_key(stream) > place
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
