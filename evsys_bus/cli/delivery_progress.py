"""Progress of deliveries on stderr: bars on a terminal, ``key=value`` or JSON lines elsewhere.

Lines are written every 30 s, and whenever the state of an adapter changes.
"""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click

from evsys_bus.cli.options import PROGRESS
from evsys_bus.cli.screen import Screen, is_terminal, printable

if TYPE_CHECKING:
    from evsys_bus.cli.progress.view import ProgressMode
    from evsys_bus.tasks import DeliveryStatus

progress_option: Final = click.option(
    "--progress",
    type=click.Choice(PROGRESS),
    default="auto",
    show_default=True,
    help="How progress is shown on stderr. auto: live on a terminal, plain otherwise.",
)
timeout_option: Final = click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up on an adapter once it has accepted no events for this long.",
)


Tell = Callable[[Sequence["DeliveryStatus"]], object]


class DeliveryView(NamedTuple):
    """Shows the progress of deliveries."""

    tell: Tell
    """Called several times a second with the current statuses."""
    note: Callable[[str], object]
    """Prints a line."""


@contextmanager
def deliveries_shown(
    mode: "ProgressMode", screen: Screen, known: Sequence["DeliveryStatus"] = ()
) -> Generator[DeliveryView]:
    """Show the progress of deliveries on stderr within the block.

    Args:
        mode: How progress is shown.
        screen: The terminal.
        known: Deliveries whose errors were reported already.
    """
    from evsys_bus.cli.progress import resolved

    def note(text: str) -> None:
        screen.note(printable(text))

    mode = resolved(mode, sys.stderr)
    if mode == "live":
        with _bars(screen, {each.name: each.trouble for each in known}) as view:
            yield view
    elif mode == "off":
        yield DeliveryView(len, note)
    else:
        yield DeliveryView(_Lines(screen, as_json=mode == "json").tell, note)


class _Counted:
    """Counts handled events per adapter since the first call for it, which must come before the first delivery."""

    def __init__(self) -> None:
        self._began: Final = time.monotonic()
        self._first: Final[dict[str, int]] = {}

    def done(self, status: "DeliveryStatus") -> int:
        now = status.delivered + status.dead
        return now - self._first.setdefault(status.name, now)

    def rate(self, status: "DeliveryStatus") -> float:
        """Return the events per second."""
        return self.done(status) / max(time.monotonic() - self._began, 1e-9)


class _Lines:
    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        from evsys_bus.cli.progress.lines import PULSE_SECONDS, plain
        from evsys_bus.cli.progress.lines import as_json as json_form

        self._screen = screen
        self._form = json_form if as_json else plain
        self._pulse_seconds = PULSE_SECONDS
        self._pulsed = time.monotonic()
        self._counted = _Counted()
        self._states: dict[str, tuple[str | None, str | None]] = {}

    def tell(self, statuses: Sequence["DeliveryStatus"]) -> None:
        now = time.monotonic()
        due = now - self._pulsed >= self._pulse_seconds
        self._pulsed = now if due else self._pulsed
        for each in statuses:
            self._counted.done(each)
            state = (each.state, each.trouble)
            before = self._states.setdefault(each.name, ("delivering", None))
            self._states[each.name] = state
            if due or state != before:
                self._screen.note(self._form(self._facts(each)))

    def _facts(self, status: "DeliveryStatus") -> dict[str, Any]:
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "event": "delivery",
            "adapter": status.name,
            "state": status.state,
            "done": self._counted.done(status),
            "pending": status.pending if status.is_known else None,
        }
        if status.owed:
            facts["owed"] = status.owed
        rate = self._counted.rate(status)
        if rate and status.pending and status.state == "delivering":
            facts |= {"events_per_second": round(rate), "eta_seconds": round(status.pending / rate)}
        fix = status.owed_fix or status.fix
        return facts if status.trouble is None else facts | {"error": status.trouble} | ({"fix": fix} if fix else {})


@contextmanager
def _bars(screen: Screen, told: dict[str, str | None]) -> Generator[DeliveryView]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, no_color=not screen.colourful(sys.stderr))
    wide = console.width >= _WIDE
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None if wide else 10),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}" if wide else "{task.percentage:.0f}%"),
        *([TextColumn("{task.fields[rate]}"), TimeRemainingColumn()] if wide else []),
        TextColumn("{task.fields[state]}"),
    )
    tasks: dict[str, Any] = {}
    counted = _Counted()
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=is_terminal(sys.stdout),  # the output of adapters must stay in a pipe
    ) as progress:

        def note(text: str) -> None:
            progress.console.print(escape(printable(text)), soft_wrap=True, highlight=False)

        def tell(statuses: Sequence["DeliveryStatus"]) -> None:
            for each in statuses:
                done = counted.done(each)
                if each.name not in tasks:
                    tasks[each.name] = progress.add_task(escape(printable(each.name)), rate="", state="")
                if each.trouble is not None and told.get(each.name) != each.trouble:  # in full, once, above the bars
                    told[each.name] = each.trouble
                    fix = each.owed_fix or each.fix
                    note(f"{each.name}: {each.trouble}{f'   fix: {fix}' if fix else ''}")
                progress.update(
                    tasks[each.name],
                    completed=done,
                    total=done + each.pending,
                    rate=f"{counted.rate(each):,.0f}/s",
                    state=_state(each),
                )

        yield DeliveryView(tell, note)


def _state(status: "DeliveryStatus") -> str:
    """Return the state in one or two words; the reason is shown above the bars."""
    owed = f"{status.owed:,} owed" if status.owed else ""
    state = "" if status.state in {None, "delivering"} else str(status.state)
    return " ".join(filter(None, (state, owed)))


_WIDE: Final = 80
