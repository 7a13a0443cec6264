"""Events as lines of text: time, run, type, step and metrics, in columns that only grow wider."""

import re
import time
from collections.abc import Iterable
from typing import Any, Final

from rich.cells import cell_len, set_cell_size

from evsys_bus.cli.event_facts import facts_of, metrics_of, step_of, type_of
from evsys_bus.cli.output.formatting import GAP, NO_VALUE, format_number
from evsys_bus.cli.output.screen import printable
from evsys_bus.events import Envelope

_MAX_METRICS: Final = 6
_HIDDEN_METRICS: Final = frozenset({"epoch", "step_seconds", "grad_norm"})
_MAX_CHARS: Final = 160


class EventFormatter:
    """Formats events as lines.

    Args:
        metric: Show all metrics whose names match; None shows the first few.
        columns: The width of the terminal, which no line exceeds; None for no limit.
    """

    def __init__(self, *, metric: re.Pattern[str] | None = None, columns: int | None = None) -> None:
        self._metric = metric
        self._columns = columns
        self._widths = [0, 0, 0]

    def widen_for(self, envelopes: Iterable[Envelope]) -> None:
        """Widen the columns for these events."""
        for envelope in envelopes:
            self._widen(_cells(envelope))

    def format_event(self, envelope: Envelope) -> str:
        """Return the line of one event."""
        cells = _cells(envelope)
        self._widen(cells)
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(envelope.time))
        padded = [set_cell_size(cell, width) for cell, width in zip(cells, self._widths, strict=True)]
        line = GAP.join([when, *padded, "  ".join(self._details(envelope))]).rstrip()
        if self._columns is None or cell_len(line) <= self._columns:
            return line
        return f"{set_cell_size(line, self._columns - 1).rstrip()}…"

    def _widen(self, cells: list[str]) -> None:
        self._widths = [max(width, cell_len(cell)) for width, cell in zip(self._widths, cells, strict=True)]

    def _details(self, envelope: Envelope) -> list[str]:
        metrics = metrics_of(envelope.event)
        shown = (
            [name for name in metrics if name not in _HIDDEN_METRICS][:_MAX_METRICS]
            if self._metric is None
            else [name for name in metrics if self._metric.search(name)]
        )
        details = [
            *facts_of(envelope.event, envelope.run),
            *(f"{name} {_format_value(metrics[name])}" for name in shown),
        ]
        left = len(metrics) - len(shown)
        details += [f"(+{left})"] if left and self._metric is None else []
        return [printable(each if len(each) <= _MAX_CHARS else f"{each[:_MAX_CHARS]}…") for each in details]


def _cells(envelope: Envelope) -> list[str]:
    """Return run, type and step."""
    step = step_of(envelope.event)
    run = NO_VALUE if envelope.run is None else printable(envelope.run)
    run = f"{run} rank {envelope.rank}" if envelope.rank else run
    return [run, printable(type_of(envelope.event)), NO_VALUE if step is None else f"{step:,}"]


def _format_value(value: Any) -> str:
    return format_number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
