"""`StepBridge`: a run that begins at the step of its first row, for loggers that get neither a start nor an end.

Such programs write texts and settings before their first row. The run is therefore open from the first call on, behind
all that is on record; when the first row has an earlier step, the recorded rows from there on are replaced. Metrics of
one eval that come in several calls are one eval. A program that ends without closing its logger completes the run,
unless it ends by an exception, a signal or another exit code than 0.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec

from evsys_adapters.bridges._base import RunBridge
from evsys_adapters.common.hook_arguments import field
from evsys_bus.adapter import Adapter
from evsys_bus.config import CallbackSpec, build_callbacks
from evsys_bus.context import to_int
from evsys_bus.diagnostics import log
from evsys_bus.errors import EvsysBusError, TrainingError
from evsys_bus.events import TrainStart
from evsys_bus.front import Run, exit_code
from evsys_bus.front.resume import choose_directory
from evsys_bus.reading import read

_SIGNAL_EXIT_CODES: Final = range(129, 160)
"""128 and the number of the signal, by which a program ends that was asked to: 130 is Ctrl-C, 143 is SIGTERM."""


class StepBridge(RunBridge):
    """A `RunBridge` that opens its run at the first call, whatever it is. Arguments as there."""

    def __init__(self, path: Any = None, **options: Any) -> None:
        super().__init__(path, **options)
        self.recorded_steps = 0
        """How many steps earlier attempts at the run have on record: the number of the next one."""
        self._has_rows = False
        self._evals: dict[str, tuple[int | None, dict[str, Any]]] = {}
        self._not_carried: set[str] = set()

    def open(self, first_step: int | None = None, **start_options: Any) -> Run:
        """Return the open run.

        Args:
            first_step: The first step to come. None: that of the first row.
            start_options: As of `start`.
        """
        if self.run is None:
            self._path, previous = choose_directory(self.path, self._options.get("resume", "auto"))
            self.recorded_steps = 0 if previous is None else _recorded_steps(self.path)
            self._has_rows = first_step is not None
            self.start(self.recorded_steps if first_step is None else first_step, **start_options)
        if self.run is None:
            raise TrainingError("this process does not write the run", fix="log on rank 0")
        return self.run

    def log(self, metrics: Mapping[str, Any], step: int | None = None, *, commit: bool = False) -> None:
        """Record metrics of a step; see `RunBridge.log`. The first call may go back behind what is on record."""
        run = self.open()
        if step is not None and not self._has_rows:
            self._has_rows = True
            step = to_int(step)
            if step < self.recorded_steps:
                run.state.step = step
                run.publish(TrainStart(run.state))
        super().log(metrics, step, commit=commit)

    def eval(self, name: str, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record metrics of an eval, together with those that were recorded of the same eval and step before."""
        known_step, known = self._evals.get(name, (None, {}))
        whole = {**known, **metrics} if known_step == step else {**metrics}
        self._evals[name] = (step, whole)
        super().eval(name, whole, step)

    def complete(self) -> None:
        """End the training and close the run."""
        self.end()
        self.finish()

    def warn_not_carried(self, what: str, why: str = "a run has no place for it") -> None:
        """Log once that something is not recorded."""
        if what not in self._not_carried:
            self._not_carried.add(what)
            log().warning("bridge.not_carried", what=what, why=why)

    def _finish_at_exit(self) -> None:
        code = exit_code()
        if getattr(sys, "last_value", None) is None and code not in _SIGNAL_EXIT_CODES:
            self.is_training = False
            if code:
                self.finish_failed(code)
        super()._finish_at_exit()

    def finish_failed(self, code: int) -> None:
        """Close the run as failed, because of an exit code."""
        self.finish(TrainingError(f"the program ended with exit code {code}", fix="see its output"))

    def copy_for(self, path: Any) -> "StepBridge":
        """Return a bridge to another run, whose callbacks are made with the same arguments."""
        other = copy.deepcopy(self)
        vars(other)["_path"] = path
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Pickle callbacks by their arguments: open ones have files and locks."""
        makers = [_maker(each) for each in self._options.get("callbacks", ())]
        return super().__getstate__() | {
            "_options": self._options | {"callbacks": makers},
            "_has_rows": False,
            "_evals": {},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._options["callbacks"] = [make() for make in self._options["callbacks"]]


def _maker(callback: Any) -> Callable[[], Any]:
    if not isinstance(callback, Adapter):
        return partial(copy.copy, callback)
    arguments = callback.evsys_arguments
    if callback.spec_name is None:
        return partial(type(callback), *arguments.positional, **arguments.named)
    policy: Any = field(field(callback, "evsys_subscription"), "policy")
    options: dict[str, Any] = {} if policy is None else msgspec.structs.asdict(policy)
    if options.get("ranks") is not None:
        options["ranks"] = [*options["ranks"]]
    placement = vars(callback).get("placement")
    spec = CallbackSpec(callback.name, arguments.named, callback.spec_name, placement, **options)
    return partial(_build, spec)


def _build(spec: CallbackSpec) -> Any:
    [callback] = build_callbacks([spec])
    return callback


def _recorded_steps(path: Any) -> int:
    try:
        last = read(path).last_step
    except (EvsysBusError, OSError):  # nothing is on record, or it cannot be read: then nothing is cut
        return 0
    return 0 if last is None else last + 1
