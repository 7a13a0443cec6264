"""Server IDs of our objects, by our IDs. Stored beside the cursor; of ended runs, only the newest."""

from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec

MAX_ENDED: Final = 500
"""Ended runs and experiments that are remembered; an older one is looked up when it continues."""
MAX_EVAL_IDS: Final = 64
"""Maximum number of remembered eval IDs of a run, the newest."""
MAX_NAMES: Final = 50

ServerId = str | int


@dataclass(slots=True)
class Experiment:
    """One experiment."""

    our_id: str
    path: str
    """Its folder; identifies the experiment of events without IDs."""
    id: ServerId | None = None
    """The server's ID; None before it is created, and if that was rejected."""
    ended: bool = False
    groups: dict[str, ServerId | None] = field(default_factory=dict[str, ServerId | None])
    """Group IDs by name; None for a group without an ID."""
    refused: str | None = None


@dataclass(slots=True)
class Run:
    """One run."""

    our_id: str
    path: str
    experiment: str
    """Our ID of its experiment."""
    id: ServerId | None = None
    announced: bool = False
    """Whether it has a RunStart, and so will have a RunEnd."""
    ended: bool = False
    last_step: int = -1
    evals: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Steps of the stored evals, by name; for evals after training, -2 minus the last step."""
    claimed: list[ServerId] = field(default_factory=list[ServerId])
    """The server's IDs of the newest evals."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """Number of values of each metric that JSON cannot represent."""
    refused: str | None = None
    made_here: bool = False
    """Whether this process has created it, and so knows all its objects."""
    checkpoints: set[tuple[Any, Any, Any]] | None = None
    """Stored checkpoints by label, step and URI; None if unknown."""

    def record_eval(self, name: str, slot: int, eval_id: ServerId | None) -> None:
        """Record an eval once all its predictions are stored; earlier, it would be duplicated after a crash."""
        self.evals.setdefault(name, []).append(slot)
        if eval_id is not None:
            self.claimed = [*self.claimed, eval_id][-MAX_EVAL_IDS:]

    def count_left_out(self, names: list[str]) -> None:
        """Count omitted values."""
        for name in names:
            if name in self.left_out or len(self.left_out) < MAX_NAMES:
                self.left_out[name] = self.left_out.get(name, 0) + 1


_NOT_STORED: Final = frozenset({"refused", "made_here", "checkpoints"})


class KnownObjects:
    """The known experiments and runs.

    Args:
        max_ended: How many ended runs and experiments are remembered.
    """

    def __init__(self, max_ended: int = MAX_ENDED) -> None:
        self._max_ended: Final = max_ended
        self.experiments: dict[str, Experiment] = {}
        self.runs: dict[str, Run] = {}
        self.experiment_at: dict[str, Experiment] = {}
        """The newest experiment in each folder."""
        self.run_at: dict[str, Run] = {}

    def add_experiment(self, experiment: Experiment) -> Experiment:
        """Add an experiment."""
        self.experiments[experiment.our_id] = self.experiment_at[experiment.path] = experiment
        return experiment

    def add_run(self, run: Run) -> Run:
        """Add a run."""
        self.runs[run.our_id] = self.run_at[run.path] = run
        return run

    def prune(self) -> list[str]:
        """Forget the oldest ended objects once there are twice as many as the limit; returns our IDs of them."""
        runs = [run for run in self.runs.values() if run.ended]
        runs = [] if len(runs) < 2 * self._max_ended else runs[: -self._max_ended]
        for run in runs:
            del self.runs[run.our_id]
            if self.run_at.get(run.path) is run:
                del self.run_at[run.path]
        used = {run.experiment for run in self.runs.values()}
        idle = [each for each in self.experiments.values() if each.ended and each.our_id not in used]
        idle = [] if len(idle) < 2 * self._max_ended else idle[: -self._max_ended]
        for each in idle:
            del self.experiments[each.our_id]
            if self.experiment_at.get(each.path) is each:
                del self.experiment_at[each.path]
        return [each.our_id for each in (*runs, *idle)]

    def to_builtins(self) -> dict[str, Any]:
        """Return the objects with server IDs as plain data."""
        return {
            "experiments": [_to_builtins(each) for each in self.experiments.values() if each.id is not None],
            "runs": [_to_builtins(each) for each in self.runs.values() if each.id is not None],
        }

    def load(self, stored: dict[str, Any]) -> None:
        """Add the objects returned by `stored`; unknown keys of newer versions are ignored."""
        for each in stored.get("experiments", ()):
            self.add_experiment(msgspec.convert(each, Experiment))
        for each in stored.get("runs", ()):
            self.add_run(msgspec.convert(each, Run))


def _to_builtins(entry: Experiment | Run) -> dict[str, Any]:
    return {name: _copy_containers(getattr(entry, name)) for name in entry.__slots__ if name not in _NOT_STORED}


def _copy_containers(value: Any) -> Any:
    """Copy containers, which may be modified later."""
    if isinstance(value, dict):
        return {key: _copy_containers(each) for key, each in cast("dict[str, Any]", value).items()}
    return list(cast("list[Any]", value)) if isinstance(value, list) else value
