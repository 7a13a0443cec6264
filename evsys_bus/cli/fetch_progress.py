"""Progress of a download on stderr: a bar on a terminal, else ``key=value`` or JSON lines; short ones show nothing."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Final

from evsys_bus.cli.progress import ProgressMode, resolve_mode
from evsys_bus.cli.progress.lines import format_json, format_plain
from evsys_bus.cli.progress.transfers import Transfer, transfer_facts
from evsys_bus.cli.screen import Screen

LINE_SECONDS: Final = 5.0
_BAR_AFTER_SECONDS: Final = 0.3

OnTransfer = Callable[[Transfer], None]


@contextmanager
def show_fetches(mode: ProgressMode, screen: Screen) -> Generator[OnTransfer]:
    """Yield a function that shows the progress of a download; it may be called often."""
    mode = resolve_mode(mode, sys.stderr)
    if mode == "live":
        with _show_bar(screen) as on_transfer:
            yield on_transfer
        return
    format_line = format_json if mode == "json" else format_plain
    last_line_at = time.monotonic()

    def report_periodically(transfer: Transfer) -> None:
        nonlocal last_line_at
        if mode != "off" and time.monotonic() - last_line_at >= LINE_SECONDS:
            last_line_at = time.monotonic()
            screen.note(format_line(transfer_facts("fetching", transfer)))

    yield report_periodically


@contextmanager
def _show_bar(screen: Screen) -> Generator[OnTransfer]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from evsys_bus.cli.progress.transfer_bar import format_transfer_bar

    console = Console(stderr=True, no_color=not screen.uses_color(sys.stderr), highlight=False)
    began = time.monotonic()
    newest: Transfer | None = None

    def draw() -> Text:
        return (
            Text()
            if newest is None
            else format_transfer_bar("fetching", "↓", newest, width=console.width, now=time.time())
        )

    with ExitStack() as stack:

        def on_transfer(transfer: Transfer) -> None:
            nonlocal newest
            newest = transfer
            if not live.is_started and time.monotonic() - began >= _BAR_AFTER_SECONDS:
                stack.enter_context(live)

        live = Live(console=console, get_renderable=draw, refresh_per_second=8, transient=True, redirect_stdout=False)
        yield on_transfer
