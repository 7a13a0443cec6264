"""How deliveries go on, on stderr: bars on a terminal, ``key=value`` or JSON lines elsewhere.

A line is written every 30 s, and whenever the state of an adapter changes.
"""

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from evsys_bus.cli.options import PROGRESS
from evsys_bus.cli.screen import Screen, is_terminal, printable

if TYPE_CHECKING:
    from evsys_bus.cli.progress.view import ProgressMode

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


class Going(msgspec.Struct, frozen=True):
    """How far one delivery is."""

    name: str
    done: int
    """Events since it began, delivered or dead."""
    pending: int
    state: str = "delivering"
    error: str | None = None


Tell = Callable[[Sequence[Going]], object]


@contextmanager
def deliveries_shown(mode: "ProgressMode", screen: Screen) -> Generator[Tell]:
    """What to tell how the deliveries go, several times a second, while the block lasts."""
    from evsys_bus.cli.progress import resolved

    mode = resolved(mode, sys.stderr)
    if mode == "live":
        with _bars(screen) as tell:
            yield tell
    elif mode == "off":
        yield len
    else:
        yield _Lines(screen, as_json=mode == "json").tell


class _Lines:
    def __init__(self, screen: Screen, *, as_json: bool) -> None:
        from evsys_bus.cli.progress.lines import PULSE_SECONDS, plain
        from evsys_bus.cli.progress.lines import as_json as json_form

        self._screen = screen
        self._form = json_form if as_json else plain
        self._pulse_seconds = PULSE_SECONDS
        self._began = self._pulsed = time.monotonic()
        self._states: dict[str, tuple[str, str | None]] = {}

    def tell(self, goings: Sequence[Going]) -> None:
        now = time.monotonic()
        due = now - self._pulsed >= self._pulse_seconds
        self._pulsed = now if due else self._pulsed
        for each in goings:
            state = (each.state, each.error)
            before = self._states.setdefault(each.name, ("delivering", None))
            self._states[each.name] = state
            if due or state != before:
                self._screen.note(self._form(self._facts(each, now)))

    def _facts(self, going: Going, now: float) -> dict[str, Any]:
        """Any: what a line is made of."""
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "event": "delivery",
            "adapter": going.name,
            "state": going.state,
            "done": going.done,
            "pending": going.pending,
        }
        rate = going.done / max(now - self._began, 1e-9)
        if rate and going.pending and going.state == "delivering":
            facts |= {"events_per_second": round(rate), "eta_seconds": round(going.pending / rate)}
        return facts if going.error is None else facts | {"error": going.error}


@contextmanager
def _bars(screen: Screen) -> Generator[Tell]:
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
    began = time.monotonic()
    with Progress(
        *columns,
        console=console,
        transient=True,
        refresh_per_second=8,
        redirect_stdout=is_terminal(sys.stdout),  # and if it is a pipe, what adapters print stays in that
    ) as progress:

        def tell(goings: Sequence[Going]) -> None:
            for each in goings:
                if each.name not in tasks:
                    tasks[each.name] = progress.add_task(escape(printable(each.name)), rate="", state="")
                rate = each.done / max(time.monotonic() - began, 1e-9)
                said = each.state if each.error is None else f"{each.state}: {each.error}"
                progress.update(
                    tasks[each.name],
                    completed=each.done,
                    total=each.done + each.pending,
                    rate=f"{rate:,.0f}/s",
                    state="" if said == "delivering" else escape(printable(said)[:_MOST_SAID]),
                )

        yield tell


_WIDE: Final = 80
_MOST_SAID: Final = 60
