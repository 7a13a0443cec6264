"""How deliveries go on, on stderr: bars on a terminal, ``key=value`` or JSON lines elsewhere.

A line is written every 30 s, and whenever the state of an adapter changes.
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
    help="How it shows itself on stderr. auto: live on a terminal, plain otherwise.",
)
timeout_option: Final = click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Give an adapter up for today once it has taken nothing for so long.",
)


Tell = Callable[[Sequence["DeliveryStatus"]], object]


class DeliveryView(NamedTuple):
    """Shows deliveries while they go on."""

    tell: Tell
    """How they are now; several times a second."""
    note: Callable[[str], object]
    """A line for people."""


@contextmanager
def deliveries_shown(
    mode: "ProgressMode", screen: Screen, known: Sequence["DeliveryStatus"] = ()
) -> Generator[DeliveryView]:
    """Show deliveries on stderr while the block lasts.

    Args:
        mode: How.
        screen: Where.
        known: Deliveries whose trouble was said already.
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
    """Events that an adapter is done with since it was first shown; tell of it before the first one is delivered."""

    def __init__(self) -> None:
        self._began: Final = time.monotonic()
        self._first: Final[dict[str, int]] = {}

    def done(self, status: "DeliveryStatus") -> int:
        now = status.delivered + status.dead
        return now - self._first.setdefault(status.name, now)

    def rate(self, status: "DeliveryStatus") -> float:
        """Events a second."""
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
        """Any: what a line is made of."""
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
    tasks: dict[str, Any] = {}  # Any: rich's
    counted = _Counted()
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=is_terminal(sys.stdout),  # and if it is a pipe, what adapters print stays in that
    ) as progress:

        def note(text: str) -> None:
            progress.console.print(escape(printable(text)), soft_wrap=True, highlight=False)

        def tell(statuses: Sequence["DeliveryStatus"]) -> None:
            for each in statuses:
                done = counted.done(each)
                if each.name not in tasks:
                    tasks[each.name] = progress.add_task(escape(printable(each.name)), rate="", state="")
                if each.trouble is not None and told.get(each.name) != each.trouble:  # whole, and once, above the bars
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
    """In a word or two: why is said above the bars."""
    owed = f"{status.owed:,} owed" if status.owed else ""
    state = "" if status.state in {None, "delivering"} else str(status.state)
    return " ".join(filter(None, (state, owed)))


_WIDE: Final = 80
