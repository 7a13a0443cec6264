"""Progress of a download on stderr: a bar on a terminal, else ``key=value`` or JSON lines; short ones show nothing."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Final

from evsys_bus.cli.progress import ProgressMode, resolved
from evsys_bus.cli.progress.lines import as_json, plain
from evsys_bus.cli.progress.transfers import Transfer, facts
from evsys_bus.cli.screen import Screen

LINE_SECONDS: Final = 5.0
_BAR_AFTER_SECONDS: Final = 0.3

Tell = Callable[[Transfer], None]


@contextmanager
def fetches_shown(mode: ProgressMode, screen: Screen) -> Generator[Tell]:
    """Yield a function that shows the progress of a download; it may be called often."""
    mode = resolved(mode, sys.stderr)
    if mode == "live":
        with _bar(screen) as tell:
            yield tell
        return
    form = as_json if mode == "json" else plain
    told = time.monotonic()

    def tell_now_and_then(transfer: Transfer) -> None:
        nonlocal told
        if mode != "off" and time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            screen.note(form(facts("fetching", transfer)))

    yield tell_now_and_then


@contextmanager
def _bar(screen: Screen) -> Generator[Tell]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from evsys_bus.cli.progress.transfer_bar import bar_line

    console = Console(stderr=True, no_color=not screen.colourful(sys.stderr), highlight=False)
    began = time.monotonic()
    newest: Transfer | None = None

    def draw() -> Text:
        return Text() if newest is None else bar_line("fetching", "↓", newest, width=console.width, now=time.time())

    with ExitStack() as shown:

        def tell(transfer: Transfer) -> None:
            nonlocal newest
            newest = transfer
            if not live.is_started and time.monotonic() - began >= _BAR_AFTER_SECONDS:
                shown.enter_context(live)

        live = Live(console=console, get_renderable=draw, refresh_per_second=8, transient=True, redirect_stdout=False)
        yield tell
