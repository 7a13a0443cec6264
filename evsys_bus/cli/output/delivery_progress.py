"""Progress of deliveries on stderr: bars on a terminal, ``key=value`` or JSON lines elsewhere.

Lines are written every 30 s, and whenever the state of an adapter changes.
"""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from evsys_bus.cli.output.formatting import format_event_rate
from evsys_bus.cli.output.progress import PULSE_SECONDS, ProgressMode, format_json, format_plain, resolve_mode
from evsys_bus.cli.output.screen import Screen, is_terminal, printable
from evsys_bus.cli.output.transfers import Facts, line_facts
from evsys_bus.tasks import DeliveryStatus

OnProgress = Callable[[Sequence[DeliveryStatus]], object]
_MIN_WIDE_COLUMNS: Final = 80


class DeliveryView(NamedTuple):
    """Shows the progress of deliveries."""

    update: OnProgress
    """Called several times a second with the current statuses."""
    note: Callable[[str], object]
    """Prints a line."""


@contextmanager
def show_deliveries(
    mode: ProgressMode, screen: Screen, known: Sequence[DeliveryStatus] = ()
) -> Generator[DeliveryView]:
    """Show the progress of deliveries on stderr within the block.

    Args:
        mode: How progress is shown.
        screen: The terminal.
        known: Deliveries whose errors were reported already.
    """

    def note(text: str) -> None:
        screen.note(printable(text))

    mode = resolve_mode(mode)
    if mode == "live":
        with _show_bars(screen, {each.name: each.last_error for each in known}) as view:
            yield view
    elif mode == "off":
        yield DeliveryView(len, note)
    else:
        yield DeliveryView(_LineWriter(screen, as_json=mode == "json").update, note)


class _DeliveryRates:
    """Counts handled events per adapter since the first call for it, which must come before the first delivery."""

    def __init__(self) -> None:
        self._started_at: Final = time.monotonic()
        self._initial: Final[dict[str, int]] = {}

    def done(self, status: DeliveryStatus) -> int:
        now = status.delivered + status.dead
        return now - self._initial.setdefault(status.name, now)

    def rate(self, status: DeliveryStatus) -> float:
        """Return the events per second."""
        return self.done(status) / max(time.monotonic() - self._started_at, 1e-9)


class _LineWriter:
    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        self._screen = screen
        self._format_line = format_json if as_json else format_plain
        self._last_pulse = time.monotonic()
        self._rates = _DeliveryRates()
        self._states: dict[str, tuple[str | None, str | None]] = {}

    def update(self, statuses: Sequence[DeliveryStatus]) -> None:
        now = time.monotonic()
        due = now - self._last_pulse >= PULSE_SECONDS
        self._last_pulse = now if due else self._last_pulse
        for each in statuses:
            self._rates.done(each)
            state = (each.state, each.last_error)
            previous = self._states.setdefault(each.name, ("delivering", None))
            self._states[each.name] = state
            if due or state != previous:
                self._screen.note(self._format_line(self._facts(each)), wrapped=False)

    def _facts(self, status: DeliveryStatus) -> Facts:
        facts = line_facts(
            "delivery",
            adapter=status.name,
            state=status.state,
            done=self._rates.done(status),
            pending=status.pending if status.is_known else None,
        )
        if status.owed:
            facts["owed"] = status.owed
        rate = self._rates.rate(status)
        if rate and status.pending and status.state == "delivering":
            facts |= {"events_per_second": round(rate), "eta_seconds": round(status.pending / rate)}
        fix = status.suggested_fix
        if status.last_error is not None:
            facts |= {"error": status.last_error} | ({"fix": fix} if fix else {})
        return facts


@contextmanager
def _show_bars(screen: Screen, reported: dict[str, str | None]) -> Generator[DeliveryView]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, no_color=not screen.uses_color(sys.stderr))
    wide = console.width >= _MIN_WIDE_COLUMNS
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None if wide else 10),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}" if wide else "{task.percentage:.0f}%"),
        *([TextColumn("{task.fields[rate]}"), TimeRemainingColumn()] if wide else []),
        TextColumn("{task.fields[state]}"),
    )
    tasks: dict[str, Any] = {}
    rates = _DeliveryRates()
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=is_terminal(sys.stdout),  # the output of adapters must stay in a pipe
    ) as progress:

        def note(text: str) -> None:
            progress.console.print(escape(printable(text)), soft_wrap=True, highlight=False)

        def update(statuses: Sequence[DeliveryStatus]) -> None:
            for each in statuses:
                done = rates.done(each)
                if each.name not in tasks:
                    tasks[each.name] = progress.add_task(escape(printable(each.name)), rate="", state="")
                if each.last_error is not None and reported.get(each.name) != each.last_error:
                    # in full, once, above the bars
                    reported[each.name] = each.last_error
                    fix = each.suggested_fix
                    note(f"{each.name}: {each.last_error}{f'   fix: {fix}' if fix else ''}")
                unconfirmed = f"{each.owed:,} owed" if each.owed else ""
                state = "" if each.state in {None, "delivering"} else str(each.state)
                progress.update(
                    tasks[each.name],
                    completed=done,
                    total=done + each.pending,
                    rate=format_event_rate(rates.rate(each)),
                    state=" ".join(filter(None, (state, unconfirmed))),
                )

        yield DeliveryView(update, note)
