"""`PrintProgressCallback`: one plain line on stdout per step, with the rate and the remaining time.

    step 12/300  loss 0.4312  accuracy 0.87  41.2 steps/s  eta 0:07

Without carriage returns, so it reads the same in a terminal, a pipe and a batch job's log. Alerts are lines of their
own, in colour on a terminal.
"""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Annotated, Any, ClassVar, Final, NamedTuple, SupportsFloat, TextIO

import msgspec

from evsys_adapters.common.hook_arguments import (
    fields,
    first_step_of,
    is_repeated_start,
    num_steps_of,
    rank_of_event,
    ranked_key,
    run_id,
    run_key,
    run_name,
    step_of,
)
from evsys_adapters.common.logged_values import redacted_row
from evsys_adapters.common.params import as_list, validate_params
from evsys_adapters.common.terminal import LinePrinter, alert_line, one_line, step_label
from evsys_bus.callback import Callback
from evsys_bus.context import LogContext, LoopArtifacts, LoopState, TrainingBatch

_WHOLE_MIN: Final = 1e4
_WHOLE_MAX: Final = 1e9
_MAX_ETA_SECONDS: Final = 1e10
"""Three hundred years; a longer estimate is not shown."""


class PrintProgressConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `PrintProgressCallback`."""

    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Print every this many steps; the first and the last step of a run are always printed."""
    keys: list[str] | None = None
    """Metrics to print, in this order; missing ones are omitted. Default: all, in the order of the row."""


class PrintProgressCallback(Callback):
    """Prints one line per step; a line names its run in an experiment, and once there are several runs.

    Rate and remaining time are computed from the times of the events, so a followed or replayed run shows its original
    rate. If the number of steps is unknown, a line has neither total nor remaining time.

    Args:
        every: See `PrintProgressConfig`.
        keys: See `PrintProgressConfig`.
        clock: Seconds, for the rate. Default: the time of the event.
        stream: Where to print; default: ``sys.stdout`` at the time of printing.

    Example:
        >>> progress = PrintProgressCallback(clock=lambda: 0.0)
        >>> state = LoopState(step=0, num_steps=3, output_dir="runs/a")
        >>> progress.on_step_end(state, 0, TrainingBatch(), {"loss": 0.25, "lr": 1e-5})
        step 1/3  loss 0.25  lr 1e-05
    """

    name: ClassVar[str] = "print_progress"
    Config: ClassVar[type | None] = PrintProgressConfig
    ranks = "rank0"

    def __init__(
        self,
        every: int = 1,
        keys: Sequence[str] | None = None,
        *,
        clock: Callable[[], float] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        config = validate_params(PrintProgressConfig, {"every": every, "keys": as_list(keys)})
        self._every = config.every
        self._keys = config.keys
        self._clock = clock
        self._lines = LinePrinter("print_progress.closed", stream)
        self._runs: dict[str, _Pace] = {}
        self._show_run_name = False  # whether lines name their run: in an experiment, or with several runs

    def on_experiment_start(self, ctx: LogContext) -> None:
        """Name the run in every line from now on."""
        del ctx
        self._show_run_name = True

    def on_train_start(self, state: LoopState) -> None:
        """Start the clock of the run; after a repeated start, its first step does."""
        first = first_step_of(state)
        if first is not None and not is_repeated_start(self.event):
            self._runs[self._key(state)] = _Pace(self._name(state), first, self._now())

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Print the step's line if it is due."""
        del batch
        run, step, now = self._key(state), step_of(step_idx), self._now()
        pace = self._runs.get(run)
        if pace is None:  # attached during a run: the duration of this step is unknown
            pace = self._runs[run] = _Pace(self._name(state), step + 1, now)
        first = pace.last_step is None
        pace.last_step = step if pace.last_step is None else max(pace.last_step, step)
        done = step + 1
        pace.unprinted = _Step(step, num_steps_of(state), fields(metrics), now)
        if first or done % self._every == 0 or done == pace.unprinted.num_steps:
            self._print_last(pace)

    def on_alert(self, ctx: LogContext, title: str, text: str, level: str) -> None:
        """Print the alert, with its level."""
        rank, shown = rank_of_event(self.event), redacted_row({"title": title, "text": text})
        line = alert_line(level, shown["title"], shown["text"])
        if self._show_run_name or rank:
            name = one_line(run_key(ctx) or run_name(ctx))
            line = f"{name} rank {rank}  {line}" if rank else f"{name}  {line}"
        self._lines.print(line, level=level)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Print the last step's line if it was not printed, and forget the run."""
        del artifacts
        pace = self._runs.get(self._key(state))
        if pace is not None:
            self._print_last(pace)
            del self._runs[self._key(state)]

    def close(self) -> None:
        """Print the last step's line of every run, if it was not printed."""
        for pace in list(self._runs.values()):
            self._print_last(pace)
        self._lines.flush()

    def _key(self, state: LoopState) -> str:
        return ranked_key(run_id(state), rank_of_event(self.event))

    def _name(self, state: LoopState) -> str:
        name, rank = one_line(run_key(state) or run_name(state)), rank_of_event(self.event)
        return f"{name} rank {rank}" if rank else name

    def _now(self) -> float:
        return self.event.time if self._clock is None else self._clock()

    def _print_last(self, pace: "_Pace") -> None:
        last, pace.unprinted = pace.unprinted, None
        if last is None:
            return
        keys = last.metrics if self._keys is None else [key for key in self._keys if key in last.metrics]
        parts = [step_label(last.step, last.num_steps)]
        shown = redacted_row({key: last.metrics[key] for key in keys})
        parts += [f"{one_line(key)} {_fmt_value(value)}" for key, value in shown.items()]
        parts += pace.format(last.num_steps, last.time)
        self._show_run_name = self._show_run_name or len(self._runs) > 1
        if self._show_run_name:
            parts.insert(0, pace.name)
        self._lines.print("  ".join(parts))


class _Step(NamedTuple):
    """The data of one line."""

    step: int
    num_steps: int | None
    metrics: dict[str, Any]
    """Values may be of any type."""
    time: float


class _Pace:
    """The rate of one run."""

    __slots__ = ("began", "first_step", "last_step", "name", "unprinted")

    def __init__(self, name: str, first_step: int, began: float) -> None:
        self.name = name
        self.first_step = first_step
        self.began = began
        self.last_step: int | None = None
        """The largest step: late and repeated ones do not decrease the count."""
        self.unprinted: _Step | None = None

    def format(self, num_steps: int | None, now: float) -> list[str]:
        """Format rate and remaining time, as far as they are known."""
        seconds = now - self.began
        done = 0 if self.last_step is None else self.last_step + 1 - self.first_step
        if done <= 0 or not 0 < seconds < math.inf:
            return []
        rate = done / seconds
        speed = f"{_fmt_value(rate)} steps/s" if rate >= 1 else f"{_fmt_value(1 / rate)} s/step"
        if num_steps is None:
            return [speed]
        remaining = max(num_steps - self.first_step - done, 0) / rate
        return [speed, f"eta {timedelta(seconds=round(remaining))}"] if remaining < _MAX_ETA_SECONDS else [speed]


def _fmt_value(value: object) -> str:
    """Format a number with four significant digits, never a non-zero one as zero, anything else as bounded text."""
    if isinstance(value, int):
        return one_line(value)
    if isinstance(value, SupportsFloat) and not isinstance(value, str):
        try:
            number = float(value)
        except Exception:  # whatever a foreign __float__ raises: it is text then
            return one_line(value)
        return f"{number:.0f}" if _WHOLE_MIN <= abs(number) < _WHOLE_MAX else f"{number:.4g}"
    return one_line(value)
