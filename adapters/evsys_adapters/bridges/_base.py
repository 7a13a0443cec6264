"""`RunBridge`: the run that a framework's callback, logger or tracker writes to.

Frameworks call hooks in their own order: config after the start, a start without an end, rows on every rank. What
follows from that is decided here, once, for all bridges:

- Only rank 0 writes, and only the process that opened the run: its forked children write nothing.
- No exception leaves an `isolated` hook: the first is logged, all are counted in `RunBridge.failures`.
- A training that was killed and is resumed by its framework goes on in the same run: the start, or the first row, gives
  the first step, and rows from there on replace those of before.
- After its training the run stays open for evals, until the next start or the end of the program.
- Evals of a program that does not train are a run of their own beside that of the training, ``<path>-eval``.
"""

import atexit
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

import evsys_bus
from evsys_adapters.common.hook_arguments import fields, rank_from_environment
from evsys_bus.context import Status
from evsys_bus.diagnostics import log
from evsys_bus.location import local_path

P = ParamSpec("P")
T = TypeVar("T")

RUN_DIR_VARIABLE: Final = "EVSYS_BUS_RUN_DIR"
"""Environment variable with the run's directory, where none was given."""
_DEFAULT_RUN_DIR: Final = "runs/training"
_EVAL_KEY: Final = re.compile(r"(eval|val|validation|test)[_/](.+)", re.DOTALL)
_POSITION_KEYS: Final = frozenset({"epoch", "step"})
"""Added by frameworks to the metrics of an eval; they are no metrics of the training."""


def split_evals(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split a framework's metrics into those of the training and those of each eval, by the prefix of the key.

    Example:
        >>> split_evals({"loss": 0.5, "eval_loss": 0.7, "val/acc": 0.9})
        ({'loss': 0.5}, {'eval': {'loss': 0.7}, 'val': {'acc': 0.9}})
    """
    training: dict[str, Any] = {}
    evals: dict[str, dict[str, Any]] = {}
    for key, value in metrics.items():
        found = _EVAL_KEY.fullmatch(key)
        if found is None:
            training[key] = value
        else:
            evals.setdefault(found[1], {})[found[2]] = value
    if evals and training.keys() <= _POSITION_KEYS:
        training = {}
    return training, evals


def _plain_items(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield metrics as a run takes them: nested ones by path, and what is no number, array or text as its text."""
    for key, value in metrics.items():
        if value is None or isinstance(value, int | float | str) or hasattr(value, "shape"):
            yield key, value
        elif isinstance(value, Mapping):
            nested = cast("Mapping[str, Any]", value)
            yield from _plain_items({f"{key}/{name}": each for name, each in nested.items()})
        elif isinstance(value, list) and all(isinstance(each, int | float) for each in cast("list[Any]", value)):
            yield key, cast("object", value)
        else:
            yield key, str(cast("object", value))


class RunBridge:
    """One run, opened and ended as a framework's hooks are called. Its methods raise; hooks are `isolated`.

    Args:
        path: The run's directory. Default: ``EVSYS_BUS_RUN_DIR``, else the framework's output directory.
        run: An open run to write to, which is then neither started nor ended here.
        options: Passed to `evsys_bus.run`: ``callbacks``, ``tags``, ``notes``, ``config`` and others.

    Raises:
        SettingError: The path is a URL.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, run: "evsys_bus.Run | None" = None, **options: Any
    ) -> None:
        self.run: evsys_bus.Run | None = run
        """The open run: for tables, images and all that the framework has no hook for. None before the first row."""
        self.failures = 0
        """How many calls of hooks failed; the first one is in the log."""
        self.is_training = False
        """Whether a training was started and has not ended."""
        self.default_path: str | os.PathLike[str] = _DEFAULT_RUN_DIR
        """The run's directory where none was given: the framework's output directory."""
        given = path or os.environ.get(RUN_DIR_VARIABLE)
        self._path = local_path(given, "path") if given else None
        self._config = fields(options.pop("config", None))
        self._options = options
        self._start_options: dict[str, Any] = {}
        self._is_borrowed = run is not None
        self._is_eval_only = False
        self._is_rank_zero = rank_from_environment() == 0
        self._has_failed_to_open = False
        self._pid = os.getpid()

    @property
    def path(self) -> Path:
        """The run's directory as requested; a run beside a complete one has another, see ``run.path``."""
        return self._path or local_path(self.default_path, "path")

    @property
    def writes(self) -> bool:
        """Whether this process writes: it is rank 0, no forked child, and the run could be opened."""
        is_owner = self.run is None or self._pid == os.getpid()
        return is_owner and self._is_rank_zero and not self._has_failed_to_open

    @property
    def stop_requested(self) -> bool:
        """Whether a callback of the run requested that the training stops."""
        return self.run is not None and self.run.stop_requested

    def start(
        self,
        first_step: int | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        num_steps: int | None = None,
        unit: str = "steps",
        is_rank_zero: bool = True,
    ) -> None:
        """Start a training. The run of an earlier one is closed, as cancelled if that had not ended.

        Args:
            first_step: The first step to come, in the framework's count; rows that an earlier process recorded from
                there on are replaced. None: that of the first row, which then opens the run.
            config: Settings that the framework knows at the start.
            num_steps: The requested number of steps; None if it is not known.
            unit: What a step counts, as of `evsys_bus.run`.
            is_rank_zero: Whether the framework logs from this process.
        """
        self._is_rank_zero = self._is_rank_zero and is_rank_zero
        self._has_failed_to_open = False
        if not self.writes:
            return
        self.finish()
        self._start_options = {"num_steps": num_steps, "unit": unit}
        self.is_training = True
        self.update_config(config or {})
        if first_step is not None and self.run is None:
            self._open(first_step)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Add settings, before the run is open or after."""
        self._config.update(config)
        if self.run is not None and config:
            self.run.config.update(config)

    def log(self, metrics: Mapping[str, Any], step: int | None = None, *, commit: bool = False) -> None:
        """Record metrics of a step; those with the prefix of an eval (``eval_``, ``val/``) as that eval's.

        Args:
            metrics: By the framework's own names.
            step: In the framework's count. None: one more than the last.
            commit: Whether this is all of the step, so that its row is complete.
        """
        training, evals = split_evals(metrics)
        if training:
            self._run_at(step).log(dict(_plain_items(training)), step, commit=commit)
        for name, values in evals.items():
            self.eval(name, dict(_plain_items(values)), step)

    def eval(self, name: str, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record the metrics of an eval."""
        self._run_at(step, is_eval=True).eval(name, metrics, step=step)

    def checkpoint(self, path: str | os.PathLike[str], step: int, *, name: str | None = None) -> None:
        """Record a checkpoint from which the framework can resume; its name is that of the file, without suffix."""
        self._run_at(step).checkpoint(name or Path(path).stem, state_path=path, step=step)

    def end(self, error: BaseException | None = None) -> None:
        """End the training: completed, or by this error, which closes the run."""
        if error is None:
            self.is_training = False
        else:
            self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        """Close the run: failed by an error, cancelled if its training has not ended, else completed."""
        run, self.run = self.run, self.run if self._is_borrowed else None
        was_training, self.is_training, self._is_eval_only = self.is_training, False, False
        if run is None or self._is_borrowed:
            return
        atexit.unregister(self._finish_at_exit)
        status: Status = "cancelled" if was_training else "completed"
        run.close("failed" if isinstance(error, Exception) else status, error)

    def count_failure(self, hook: str, error: Exception) -> None:
        """Count a failed call, and log the first."""
        self.failures += 1
        if self.failures == 1:
            why = "the training goes on; further failures are counted, not logged"
            path = str(self._path or self.default_path)
            log().warning("bridge.failed", hook=hook, path=path, why=why, exc_info=error)

    def _run_at(self, step: int | None, *, is_eval: bool = False) -> "evsys_bus.Run":
        """Return the run, opened at this step if it is not open yet."""
        if self._is_eval_only and not is_eval:
            self.finish()
        if self.run is None:
            self._is_eval_only = is_eval and not self.is_training
            self.is_training = not self._is_eval_only
            self._open(step)
        assert self.run is not None
        return self.run

    def _open(self, first_step: int | None) -> None:
        path = self.path.with_name(f"{self.path.name}-eval") if self._is_eval_only else self.path
        options: dict[str, Any] = self._options | self._start_options | {"config": self._config}
        self._has_failed_to_open = True  # so that not every row tries again
        self.run = evsys_bus.run(path, first_step=first_step, **options).start()
        self._has_failed_to_open, self._pid = False, os.getpid()
        atexit.register(self._finish_at_exit)  # behind the exit handler of the bus, so that it is called before
        if multiprocessing.parent_process() is not None:  # such a process may end without its exit handlers
            Finalize(None, self._finish_at_exit, exitpriority=0)

    def _finish_at_exit(self) -> None:
        """Close the run at the end of the program, which may have failed outside the framework's hooks."""
        if not self.writes:
            return
        last_error: BaseException | None = getattr(sys, "last_value", None)
        try:
            self.finish(last_error if self.is_training else None)
        except Exception as error:  # isolated: as in a hook
            self.count_failure("finish", error)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle without the run: a spawned rank 0 opens its own."""
        return vars(self) | {"run": None}


class _Bridged(Protocol):
    @property
    def bridge(self) -> RunBridge: ...


BridgedT = TypeVar("BridgedT", bound=_Bridged)


def isolated(hook: Callable[Concatenate[BridgedT, P], T]) -> Callable[Concatenate[BridgedT, P], T | None]:
    """Decorate a hook of a class that has a ``bridge``: where it raises, that is counted, and the hook returns None.

    It does nothing in a process that does not write the run.
    """

    @wraps(hook)
    def call(self: BridgedT, *args: P.args, **kwargs: P.kwargs) -> T | None:
        bridge = self.bridge
        if not bridge.writes:
            return None
        try:
            return hook(self, *args, **kwargs)
        except Exception as error:  # isolated: no training ends because of what is written about it
            bridge.count_failure(hook.__qualname__, error)
            return None

    return call
