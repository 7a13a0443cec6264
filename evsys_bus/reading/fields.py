"""The fields of a run by name, for filters, columns and sorting: its own facts, config keys, and metrics."""

import time
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cached_property
from typing import Any, Final

from evsys_bus.reading.recorded_run import RecordedRun, flatten_config

BEST: Final = "best "
"""Before the name of a metric: its best value instead of the last one."""
RUN_FIELDS: Final = (
    "run",
    "state",
    "experiment",
    "arm",
    "seed",
    "group",
    "tags",
    "notes",
    "started",
    "age",
    "duration",
    "steps",
    "evals",
    "checkpoints",
    "error",
    "problems",
    "folder",
)
_NO_GOALS: Final = frozenset({"epoch", "step_seconds", "grad_norm", "lr", "learning_rate"})
_SYNONYMS: Final = {"name": "run", "id": "run", "status": "state", "tag": "tags", "step": "steps", "data": "folder"}


class RunFields:
    """The fields of one run.

    Args:
        run: The run.
        name: Its name in a list of runs; by default its id.
    """

    def __init__(self, run: RecordedRun, name: str | None = None) -> None:
        self.run: Final = run
        self.name: Final = run.id if name is None else name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config without nested mappings; arm and seed have fields of their own."""
        return {name: value for name, value in flatten_config(self.run.config).items() if name not in {"arm", "seed"}}

    @property
    def texts(self) -> Collection[str]:
        """The texts that words and regular expressions of a filter are searched in."""
        run = self.run
        facts = (self.name, run.id, run.arm, run.experiment, run.group, run.notes, *run.tags)
        return [each for each in facts if each]

    def field(self, name: str) -> object:
        """Return the value of a field, None if the run has none of this name.

        Args:
            name: One of `RUN_FIELDS`; a config key, of which the last part is enough if no other key has it; a metric,
                for its last value; or ``best`` and a metric.
        """
        own = _SYNONYMS.get(name, name)
        if own in RUN_FIELDS:
            return self._own_field(own)
        key = self.config_key(name)
        if key is not None:
            return self.config[key]
        if name.startswith(BEST):
            return self.run.best(name.removeprefix(BEST))
        return self.run.last(name)

    def config_key(self, name: str) -> str | None:
        """Return the config key that has this name, or, if only one has, that ends with it; None if there is none."""
        if name in self.config:
            return name
        same = [key for key in self.config if key.rpartition(".")[2] == name]
        return same[0] if len(same) == 1 else None

    def _own_field(self, name: str) -> object:  # noqa: PLR0911 # one for each field
        run = self.run
        match name:
            case "run":
                return self.name
            case "started":
                return None if run.started is None else run.started.timestamp()
            case "age":
                return None if run.started is None else max(0.0, time.time() - run.started.timestamp())
            case "duration":
                return run.seconds
            case "steps":
                return None if run.last_step is None else run.last_step + 1
            case "evals" | "checkpoints":
                return len(getattr(run, name))
            case "folder":
                return str(run.folder)
            case _:
                return getattr(run, name)


def differing_keys(runs: Iterable[RunFields]) -> list[str]:
    """Return the config keys whose values differ between the runs, in the order of the configs."""
    configs = [each.config for each in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    missing = object()
    return [key for key in keys if any(config.get(key, missing) != configs[0].get(key, missing) for config in configs)]


def metric_names(runs: Iterable[RunFields]) -> list[str]:
    """Return the names of the metrics of the runs: of steps, then of evals, then numbers of summaries."""
    found = [each.run for each in runs]
    names = [name for run in found for name in run.metrics]
    names += [name for run in found for name in run.eval_metrics]
    names += [name for run in found for name in run.summary if run.last(name) is not None]
    return list(dict.fromkeys(names))


def is_goal(metric: str) -> bool:
    """Return whether a metric is one to optimize, by its name: a schedule or a duration is not."""
    return metric.rpartition("/")[2] not in _NO_GOALS


def main_metrics(runs: Iterable[RunFields]) -> list[str]:
    """Return the one or two metrics to show first: the success metric or an eval's, and a loss or the first metric."""
    found = [*runs]
    names = metric_names(found)
    counts = Counter(name for each in found for name in (*each.run.metrics, *each.run.eval_metrics))
    successes = [each.run.success_metric for each in found if each.run.success_metric in names]
    evals = [name for name, _ in counts.most_common() if any(name in each.run.eval_metrics for each in found)]
    losses = ["loss"] if "loss" in names else [name for name, _ in counts.most_common() if "loss" in name.lower()]
    others = [name for name in names if is_goal(name)]
    chosen = (next(iter(each), None) for each in ([*successes, *evals], [*losses, *others, *names]))
    return list(dict.fromkeys(each for each in chosen if each is not None))
