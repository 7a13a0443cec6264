"""Progress of an experiment or a download on stderr: a live view, plain ``key=value`` lines, or JSON lines.

A view is refreshed from a thread, so that no training step draws anything. Lines are written for every eval, checkpoint
and change of state, and at intervals for each active run and transfer.
"""

import re
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Literal, ParamSpec, Protocol, TextIO, TypeVar, cast

from evsys_bus.cli.output.run_state import ProgressUpdate, RunProgress, RunStateTracker
from evsys_bus.cli.output.screen import Screen, is_terminal, printable
from evsys_bus.cli.output.transfers import (
    Facts,
    PollUploads,
    Transfer,
    finished_facts,
    line_facts,
    no_uploads,
    transfer_facts,
)
from evsys_bus.codec import json_line, to_builtins
from evsys_bus.codec.redact import current_redaction, redact
from evsys_bus.diagnostics import log
from evsys_bus.location import encode_json
from evsys_bus.tasks import DeliveryStatus

P = ParamSpec("P")
T = TypeVar("T")

ProgressMode = Literal["auto", "live", "plain", "json", "off"]

REDRAW_SECONDS: Final = 0.2
"""Interval of redraws: each takes a few milliseconds, during which the event loop waits for the interpreter lock."""
PULSE_SECONDS: Final = 30.0
DRAIN_PULSE_SECONDS: Final = 10.0
"""Interval of lines during the drain at the end."""
SHORT_DRAIN_SECONDS: Final = 1.0
"""A shorter drain is not reported."""
_UNQUOTED: Final = re.compile(r"[^\s\"'=\\]+")
LINE_SECONDS: Final = 5.0
_BAR_AFTER_SECONDS: Final = 0.3
OnTransfer = Callable[[Transfer], None]


class View(Protocol):
    """Shows the board on every tick."""

    def tick(self) -> None:
        """Show what has changed since the last tick."""
        ...

    def close(self) -> None:
        """Show the remaining changes, and release the terminal."""
        ...


@contextmanager
def show_progress(
    tracker: RunStateTracker,
    mode: ProgressMode,
    screen: Screen,
    *,
    title: str,
    success_metric: str | None,
    poll_uploads: PollUploads,
    poll_problems: Callable[[], Sequence[DeliveryStatus]],
) -> Generator[None]:
    """Show the board, the uploads and the problems of deliveries on stderr within the block.

    All of them are read on the view's thread.
    """
    mode, stream = resolve_mode(mode), sys.stderr
    if mode == "off" or stream is None:  # pyright: ignore[reportUnnecessaryComparison] # a closed stderr is None
        yield
        return
    poll_uploads = _keep_last_result(poll_uploads, no_uploads())
    if mode == "live":
        from evsys_bus.cli.output.live import LiveView

        view: View = LiveView(
            tracker,
            stream,
            title=title,
            success_metric=success_metric,
            color=screen.uses_color(stream),
            poll_uploads=poll_uploads,
            poll_problems=_keep_last_result(poll_problems, ()),
        )
    else:
        view = LineView(tracker, stream, format_json if mode == "json" else format_plain, poll_uploads=poll_uploads)
    stopped = threading.Event()
    timer = threading.Thread(target=_run_view, args=(view, stopped), name="evsys-bus-progress", daemon=True)
    timer.start()
    try:
        yield
    finally:
        stopped.set()
        timer.join()


def resolve_mode(mode: ProgressMode) -> ProgressMode:
    """Resolve ``auto`` for stderr."""
    if mode != "auto":
        return mode
    return "live" if is_terminal(sys.stderr) else "plain"


def _keep_last_result(poll: Callable[P, T], first: T) -> Callable[P, T]:
    """Wrap a function so that it returns its last result while files cannot be read, which must not end the view."""
    results = [first]

    def poll_or_last(*args: P.args, **kwargs: P.kwargs) -> T:
        with suppress(OSError):
            results[0] = poll(*args, **kwargs)
        return results[0]

    return poll_or_last


def _run_view(view: View, stopped: threading.Event) -> None:
    """Refresh the view until ``stopped`` is set; an error of the view ends this thread and nothing else."""
    try:
        try:
            while not stopped.is_set():
                view.tick()
                stopped.wait(REDRAW_SECONDS)
        finally:
            view.close()
    except (OSError, ValueError) as error:  # a closed terminal, or a log on a full disk
        log().warning("progress.closed", error=str(error))


class LineView:
    """Writes new updates of the board and of the uploads on every tick."""

    def __init__(
        self,
        tracker: RunStateTracker,
        stream: TextIO,
        format_line: Callable[[Facts], str],
        *,
        poll_uploads: PollUploads = no_uploads,
    ) -> None:
        self._tracker = tracker
        self._stream = stream
        self._write = stream.write  # bound now: lines of progress are not among what is copied into output.log
        self._format_line = format_line
        self._last_pulse = tracker.clock()
        self._next_drain_line = SHORT_DRAIN_SECONDS
        self._dropped = 0
        self._poll_uploads = poll_uploads

    def close(self) -> None:
        """Write the remaining updates."""
        self.tick(last=True)

    def tick(self, *, last: bool = False) -> None:
        """Write new updates, and the periodic lines if they are due."""
        tracker = self._tracker
        lines: list[str] = []
        while tracker.updates:
            lines.append(self._format_line(_update_facts(tracker.updates.popleft())))
        if tracker.updates_dropped > self._dropped:
            dropped, self._dropped = tracker.updates_dropped - self._dropped, tracker.updates_dropped
            lines.append(self._format_line(line_facts("lines_dropped", count=dropped)))
        uploads = self._poll_uploads(force=last)
        lines += [self._format_line(finished_facts(each)) for each in uploads.finished]
        if tracker.clock() - self._last_pulse >= PULSE_SECONDS:
            self._last_pulse = tracker.clock()
            lines += [
                self._format_line(line_facts("progress") | _run_facts(run, tracker.clock()))
                for run in list(tracker.runs.values())
                if run.status == "running"
            ]
            lines += [self._format_line(transfer_facts("uploading", each)) for each in uploads.active]
        lines += self._drain_lines()
        if lines:
            self._write("".join(f"{line}\n" for line in lines))
            self._stream.flush()

    def _drain_lines(self) -> list[str]:
        drain_status = self._tracker.drain_status
        if drain_status is None or drain_status.elapsed_seconds < self._next_drain_line:
            return []
        facts = drain_status.facts()
        if facts is None:
            return []
        self._next_drain_line = drain_status.elapsed_seconds + DRAIN_PULSE_SECONDS
        return [self._format_line(line_facts(**facts))]


def _run_facts(run: RunProgress, now: float) -> Facts:
    """Return the progress of a run as facts of a line."""
    facts: Facts = {"run": run.key}
    if run.num_steps:
        facts["step"] = f"{run.step}/{run.num_steps}"
    facts["metrics"] = dict(run.metrics)
    rate = run.rate(now)
    if rate is not None:
        facts |= {"steps_per_second": round(rate, 2), "eta_seconds": round(run.eta(now) or 0)}
    return facts


def format_plain(facts: Facts) -> str:
    """Format facts as ``key=value`` pairs on one line; metrics are inlined under their own names."""
    flat: Facts = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {name: to_builtins(each)[0] for name, each in cast("Facts", value).items() if name not in flat}
        else:
            flat[key] = value
    redaction = current_redaction()
    if redaction is not None:
        redact(flat, redaction)
    return " ".join(f"{_quote(str(key))}={_quote(_format_value(value))}" for key, value in flat.items())


def format_json(facts: Facts) -> str:
    """Format facts as a JSON object; ``step`` and ``num_steps`` are numbers, metrics are a nested object."""
    numbers: Facts = {}
    for key, value in facts.items():
        if key == "step":
            numbers["step"], numbers["num_steps"] = map(int, value.split("/"))
        else:
            numbers[key] = value
    return json_line(numbers).decode()


def _update_facts(update: ProgressUpdate) -> Facts:
    facts = line_facts(update.event, update.time)
    if update.run is not None:
        facts["run"] = update.run
    if update.num_steps:
        facts["step"] = f"{update.step}/{update.num_steps}"
    return facts | {key: value for key, value in update.facts.items() if value is not None}


def _format_value(value: object) -> str:
    plain = to_builtins(value)[0]
    return f"{plain:.6g}" if isinstance(plain, float) else str(plain)


def _quote(text: str) -> str:
    """Quote the text if it contains a blank or another character that would split the pair."""
    if _UNQUOTED.fullmatch(text):
        return printable(text)
    return encode_json(text).decode()


@contextmanager
def show_fetches(mode: ProgressMode, screen: Screen) -> Generator[OnTransfer]:
    """Yield a function that shows the progress of a download; it may be called often."""
    mode = resolve_mode(mode)
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
            screen.note(format_line(transfer_facts("fetching", transfer)), wrapped=False)

    yield report_periodically


@contextmanager
def _show_bar(screen: Screen) -> Generator[OnTransfer]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from evsys_bus.cli.output.live import format_transfer_bar

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
