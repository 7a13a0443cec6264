"""`PrintProgressCallback`: one plain line on stdout per step, with the rate and the time that is left.

    step 12/300  loss 0.4312  accuracy 0.87  41.2 steps/s  eta 0:07

No carriage returns and no colours, so it reads the same in a terminal, a pipe and a batch job's log.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Annotated, ClassVar, Final, SupportsFloat, TextIO

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.context import LogContext, LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.diagnostics import log

_MAX_TEXT: Final = 40
_WHOLE_FROM: Final = 1e4
_WHOLE_BELOW: Final = 1e9


class PrintProgressConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `PrintProgressCallback` can be told."""

    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Print every so many steps; the first and the last step of a run are always printed."""
    keys: list[str] | None = None
    """Metrics to print, in this order; a step that lacks one leaves it out. Default: all, in the order of the row."""


class PrintProgressCallback(Callback):
    """Prints one line per step; a line names its run in an experiment, and once there are several runs.

    Args:
        every: As in `PrintProgressConfig`.
        keys: As in `PrintProgressConfig`.
        clock: Seconds, for rate and eta.
        stream: Where to print; default: ``sys.stdout`` at that moment.

    Example:
        >>> progress = PrintProgressCallback(clock=lambda: 0.0)
        >>> state = LoopState(step=0, num_steps=3, output_dir="runs/a")
        >>> progress.on_step_end(state, 0, TrainingBatch(), {"loss": 0.25, "lr": 1e-5})
        step 1/3  loss 0.25  lr 1e-05
    """

    name: ClassVar[str] = "print_progress"
    Config: ClassVar[type | None] = PrintProgressConfig

    def __init__(
        self,
        every: int = 1,
        keys: Sequence[str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._every = every
        self._keys = None if keys is None else tuple(keys)
        self._clock = clock
        self._stream = stream
        self._closed = False
        self._runs: dict[str, _Pace] = {}
        self._named = False  # whether lines name their run: once there are several, or may be

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Name the run in every line from here on."""
        del ctx
        self._named = True

    def on_train_start(self, state: LoopState) -> None:
        """Start the clock of the run."""
        self._runs[str(state.output_dir)] = _Pace(state.step, self._clock())

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Print the step's line if it is due."""
        del batch
        pace = self._runs.get(str(state.output_dir))
        if pace is None:  # attached to a run in progress: this step's duration is not known
            pace = self._runs[str(state.output_dir)] = _Pace(step_idx + 1, self._clock())
        first = pace.last_step is None
        pace.see(step_idx)
        done = step_idx + 1
        if first or done % self._every == 0 or done == state.num_steps:
            pace.unprinted = None
            self._print(state, step_idx, metrics, pace)
        else:
            pace.unprinted = (step_idx, dict(metrics))

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Print the last step's line if it was not due, and forget the run."""
        del artifacts
        pace = self._runs.get(str(state.output_dir))
        if pace is not None and pace.unprinted is not None:
            step_idx, metrics = pace.unprinted
            self._print(state, step_idx, metrics, pace)
        self._runs.pop(str(state.output_dir), None)

    def _print(self, state: LoopState, step_idx: int, metrics: Mapping[str, object], pace: "_Pace") -> None:
        if self._closed:
            return
        keys = metrics if self._keys is None else [key for key in self._keys if key in metrics]
        parts = [f"step {step_idx + 1}/{state.num_steps}"]
        parts += [f"{_bounded(key)} {_fmt_value(metrics[key])}" for key in keys]
        parts += pace.told(state.num_steps, self._clock())
        self._named = self._named or len(self._runs) > 1
        if self._named:
            parts.insert(0, _run_name(state))
        try:
            print("  ".join(parts), file=self._stream or sys.stdout, flush=True)
        except (OSError, ValueError) as error:  # a pipe whose reader left, a full disk, a closed file
            self._closed = True
            log().warning("print_progress.closed", error=str(error))


class _Pace:
    """How fast one run goes."""

    __slots__ = ("began", "first_step", "last_step", "unprinted")

    def __init__(self, first_step: int, began: float) -> None:
        self.first_step = first_step
        self.began = began
        self.last_step: int | None = None
        self.unprinted: tuple[int, dict[str, float]] | None = None

    def see(self, step_idx: int) -> None:
        """Late and repeated steps do not set the pace back."""
        self.last_step = step_idx if self.last_step is None else max(self.last_step, step_idx)

    def told(self, num_steps: int, now: float) -> list[str]:
        """Rate and eta, as far as they are known."""
        seconds = now - self.began
        done = 0 if self.last_step is None else self.last_step + 1 - self.first_step
        if done <= 0 or seconds <= 0:
            return []
        left = max(num_steps - self.first_step - done, 0)
        rate = done / seconds
        speed = f"{_fmt_value(rate)} steps/s" if rate >= 1 else f"{_fmt_value(1 / rate)} s/step"
        return [speed, f"eta {timedelta(seconds=round(left / rate))}"]


def _run_name(state: LoopState) -> str:
    ctx = getattr(state, "ctx", None)  # a detached state may have none
    return (ctx.run_key if ctx is not None else None) or state.output_dir.name


def _fmt_value(value: object) -> str:
    """A number in four significant digits (what is not zero never looks like zero), anything else as bounded text."""
    if isinstance(value, int):
        return _bounded(value)
    if isinstance(value, SupportsFloat) and not isinstance(value, str):
        try:
            number = float(value)
        except Exception:  # whatever a stranger's __float__ raises: it is text then
            return _bounded(value)
        return f"{number:.0f}" if _WHOLE_FROM <= abs(number) < _WHOLE_BELOW else f"{number:.4g}"
    return _bounded(value)


def _bounded(value: object) -> str:
    try:
        text = " ".join(str(value).split())
    except Exception:  # a stranger's __str__
        return f"<{type(value).__name__}>"
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
