"""Progress as a table that is redrawn in place: title, arms, failures, uploads and problems."""

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Final, NamedTuple, TextIO

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evsys_bus.cli.output.capture import CapturedStream, LineBuffer
from evsys_bus.cli.output.deliveries import describe_counts
from evsys_bus.cli.output.formatting import (
    NO_VALUE,
    format_duration,
    format_mean_sd,
    format_progress,
    summarize_error,
)
from evsys_bus.cli.output.run_state import RunProgress, RunStateTracker, ShownAlert
from evsys_bus.cli.output.screen import is_terminal, printable
from evsys_bus.cli.output.transfers import PollUploads, Transfer, format_transfer
from evsys_bus.codec import to_builtins
from evsys_bus.codec.redact import redact_key, redact_text
from evsys_bus.context import Spread, spread_of
from evsys_bus.tasks import DeliveryStatus

_HIDDEN_METRICS: Final = frozenset({"step", "epoch", "step_seconds"})
_MAX_FAILURES: Final = 4
_MAX_UPLOADS: Final = 2
_OVERHEAD: Final = 9
"""Lines besides the arms: title, headings, footer, notice, and the blank lines between them."""
_MIN_WIDE_COLUMNS: Final = 90
_MIN_FULL_COLUMNS: Final = 70
_ARM_WIDTH: Final = 32
_NARROW_ARM_WIDTH: Final = 16
_GAP: Final = "  "
_MAX_BAR: Final = 20
_MIN_BAR: Final = 10
_MIN_NAME: Final = 12
_MIN_RUN: Final = 4
_ALERT_STYLES: Final = {"info": "cyan", "warning": "yellow", "error": "red"}


class ArmRow(NamedTuple):
    """One row of the table."""

    arm: str
    runs: int
    completed: int
    running: int
    failed: int
    step: int
    num_steps: int
    train: Spread
    eval: Spread
    eta: float | None


class ShownMetrics(NamedTuple):
    """The metrics that the table shows; None before they are known."""

    train: str | None
    eval: tuple[str, str] | None
    """Name of the eval and of its metric."""


def choose_metrics(tracker: RunStateTracker, success_metric: str | None) -> ShownMetrics:
    """Choose the success metric if it was reported, else the loss and the first eval, evals during training first."""
    runs = list(tracker.runs.values())
    names = list(dict.fromkeys(name for run in runs for name, value in run.metrics.items() if _is_number(value)))
    success_name = success_metric or ""
    visible = [name for name in names if name not in _HIDDEN_METRICS]
    train = next((name for name in (success_name, "loss", *visible) if name in names), None)
    evals = dict.fromkeys(
        (step is None, name, metric)
        for run in runs
        for name, (step, metrics) in run.evals.items()
        for metric, value in metrics.items()
        if _is_number(value)
    )
    success_metric_name = success_name.rpartition("/")[2]
    best = min(
        evals,
        key=lambda each: (each[0], "/".join(each[1:]) != success_name, each[2] != success_metric_name),
        default=None,
    )
    return ShownMetrics(train, None if best is None else best[1:])


def arm_rows(tracker: RunStateTracker, shown: ShownMetrics, now: float) -> list[ArmRow]:
    """Return the row of every arm, in the order of the plan."""
    arms: dict[str, list[RunProgress]] = {}
    for run in list(tracker.runs.values()):
        arms.setdefault(run.arm, []).append(run)
    return [_arm_row(arm, runs, shown, now) for arm, runs in arms.items()]


def _arm_row(arm: str, runs: Sequence[RunProgress], shown: ShownMetrics, now: float) -> ArmRow:
    running = [run for run in runs if run.status == "running"]
    started = [run for run in runs if run.started_at is not None and run.status != "failed"]
    measured = running or started or [run for run in runs if run.started_at is not None]
    train = spread_of(_numbers(run.metrics.get(shown.train) for run in started) if shown.train else ())
    scored = spread_of(_numbers(_eval_value(run, shown.eval) for run in started) if shown.eval else ())
    return ArmRow(
        arm,
        runs=len(runs),
        completed=sum(run.status == "completed" for run in runs),
        running=len(running),
        failed=sum(run.status == "failed" for run in runs),
        step=round(sum(run.step for run in measured) / len(measured)) if measured else 0,
        num_steps=max((run.num_steps for run in measured), default=0),
        train=train,
        eval=scored,
        eta=_estimate_seconds_left(runs, now),
    )


def _estimate_seconds_left(runs: Sequence[RunProgress], now: float) -> float | None:
    """Estimate the seconds until these runs are done, at the rate of the running ones; None if none is running."""
    running = [run for run in runs if run.status == "running"]
    rates = [rate for run in running if (rate := run.rate(now)) is not None]
    if not rates:
        return None
    horizon = max(run.num_steps for run in running)
    pending_runs = sum(run.status == "pending" for run in runs)
    steps_left = sum(max(run.num_steps - run.step, 0) for run in running) + pending_runs * horizon
    return steps_left / sum(rates)


def _eval_value(run: RunProgress, eval_metric: tuple[str, str]) -> object:
    name, metric = eval_metric
    return run.evals[name][1].get(metric) if name in run.evals else None


def _numbers(values: Iterable[object]) -> list[float]:
    return [float(value) for value in map(_to_builtin, values) if _is_number(value) and isinstance(value, int | float)]


def _is_number(value: object) -> bool:
    plain = _to_builtin(value)
    return isinstance(plain, int | float) and not isinstance(plain, bool)


def _to_builtin(value: object) -> object:
    """Convert a number of numpy or a similar library to Python's type."""
    return value if isinstance(value, int | float) else to_builtins(value)[0]


class LiveView:
    """Shows a table at the bottom of the terminal; other output is printed above it."""

    def __init__(
        self,
        tracker: RunStateTracker,
        stream: TextIO,
        *,
        title: str,
        success_metric: str | None,
        color: bool,
        poll_uploads: PollUploads,
        poll_problems: Callable[[], Sequence[DeliveryStatus]],
    ) -> None:
        self._tracker = tracker
        self._poll_uploads = poll_uploads
        self._poll_problems = poll_problems
        self._title = title
        self._success_metric = success_metric
        self._buffer = LineBuffer()
        self._streams = [CapturedStream(stream, self._buffer.add)]
        self._redirects = ExitStack()
        self._console = Console(file=stream, force_terminal=True, no_color=not color, highlight=False, emoji=False)
        self._redirects.enter_context(redirect_stderr(self._streams[0]))
        if is_terminal(sys.stdout):  # a redirected stdout is left as it is
            self._streams.append(CapturedStream(sys.stdout, self._buffer.add))
            self._redirects.enter_context(redirect_stdout(self._streams[1]))
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def tick(self) -> None:
        """Print captured output and alerts, and redraw the table."""
        self._show_printed()
        self._show_alerts()
        size = shutil.get_terminal_size()
        self._console.size = (size.columns, size.lines)  # pyright: ignore[reportAttributeAccessIssue] # its setter takes a pair
        table = render(
            self._tracker,
            self._title,
            self._success_metric,
            width=size.columns,
            height=size.lines,
            uploads=self._poll_uploads().active,
            problems=self._poll_problems(),
        )
        self._live.update(table, refresh=True)

    def close(self) -> None:
        """Remove the table, and restore the streams."""
        self._redirects.close()
        self._live.stop()
        for stream in self._streams:
            stream.finish()
        self._show_printed()
        self._show_alerts()

    def _show_alerts(self) -> None:
        alerts = self._tracker.alerts
        while alerts:
            self._console.print(render_alert(alerts.popleft()), soft_wrap=True)

    def _show_printed(self) -> None:
        lines = self._buffer.drain()
        if lines:
            self._console.print(Text("\n").join(map(Text.from_ansi, lines)), soft_wrap=True)


def render_alert(alert: ShownAlert) -> Text:
    """Return an alert with its run, as one line in the colour of its level."""
    words = " ".join(f"{alert.run}  {alert.level.upper()}  {alert.title}  {alert.text}".split("\n")).rstrip()
    return Text(printable(redact_text(words)), style=_ALERT_STYLES.get(alert.level, "yellow"))


def render(
    tracker: RunStateTracker,
    title: str,
    success_metric: str | None,
    *,
    width: int,
    height: int,
    uploads: Sequence[Transfer] = (),
    problems: Sequence[DeliveryStatus] = (),
) -> RenderableType:
    """Return the table for a terminal of this size, followed by active uploads and problems of deliveries."""
    now = tracker.clock()
    below = [
        format_transfer_bar("checkpoints", "↑", each, width=width, now=time.time()) for each in uploads[:_MAX_UPLOADS]
    ]
    if len(uploads) > _MAX_UPLOADS:
        below.append(_dim_line(f"… and {len(uploads) - _MAX_UPLOADS} more uploads"))
    if tracker.drain_status is None:  # the drain's text includes them
        below += _problem_lines(problems, width, max(0, height - _OVERHEAD - 1 - len(below)))
    notices = _notices(tracker, width)
    height -= len(below) + max(len(notices) - 1, 0)
    shown_metrics = choose_metrics(tracker, success_metric)
    arms = arm_rows(tracker, shown_metrics, now)
    failures = [run for run in list(tracker.runs.values()) if run.status == "failed"]
    shown_failures = failures[max(len(failures) - min(_MAX_FAILURES, max(height - _OVERHEAD - 1, 0) // 4), 0) :]
    room = max(height - _OVERHEAD - 2 * len(shown_failures), 1)
    shown_arms = _select_arms(arms, room)

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    arm_width = _ARM_WIDTH if width >= _MIN_WIDE_COLUMNS else _NARROW_ARM_WIDTH
    table.add_column("arm", no_wrap=True, overflow="ellipsis", max_width=arm_width)
    table.add_column("seeds", no_wrap=True)
    table.add_column("step", no_wrap=True)
    glue = "/" if width >= _MIN_WIDE_COLUMNS else "/\n"
    table.add_column(
        f"train{glue}{_printable_metric(shown_metrics.train)}" if shown_metrics.train else "train", no_wrap=True
    )
    table.add_column(
        glue.join(map(_printable_metric, shown_metrics.eval)) if shown_metrics.eval else "eval", no_wrap=True
    )
    table.add_column("eta", no_wrap=True)
    for arm in shown_arms:
        table.add_row(*_arm_cells(arm, sd=width >= _MIN_FULL_COLUMNS))
    parts: list[RenderableType] = [Text(title, style="bold", overflow="ellipsis", no_wrap=True), Text(""), table]
    if len(shown_arms) < len(arms):
        parts.append(_dim_line(f"… and {len(arms) - len(shown_arms)} more arms"))
    parts += [_render_failure(run, tracker.folder, width) for run in shown_failures]
    if len(failures) > len(shown_failures):
        parts.append(Text(f"! and {len(failures) - len(shown_failures)} more failed runs", style="red"))
    parts += [Text(""), *below, _dim_line(_footer(tracker, now, hint=width >= _MIN_FULL_COLUMNS))]
    return Group(*parts, *notices)


def _printable_metric(name: str) -> str:
    return printable(redact_key(name))


def _notices(tracker: RunStateTracker, width: int) -> list[Text]:
    """Return the text about the drain, wrapped, or the current notice."""
    drain_text = None if tracker.drain_status is None else tracker.drain_status.text()
    if drain_text is not None:
        return [Text(line, style="yellow") for line in textwrap.wrap(drain_text, max(width, 1))]
    return [Text(tracker.notice, style="yellow", overflow="ellipsis", no_wrap=True)] if tracker.notice else []


def _arm_cells(arm: ArmRow, *, sd: bool) -> list[RenderableType]:
    style = "" if arm.running else "red" if arm.failed == arm.runs else "green" if arm.completed == arm.runs else "dim"
    return [
        Text(printable(arm.arm), style="red" if arm.failed else ""),
        Text(f"{arm.completed}/{arm.runs}{' !' if arm.failed else ''}", style="red" if arm.failed else ""),
        Text(format_progress(arm.step, arm.num_steps) if arm.num_steps else NO_VALUE, style=style),
        Text(_format_metric(arm.train, sd=sd)),
        Text(_format_metric(arm.eval, sd=sd)),
        Text("done" if arm.completed + arm.failed == arm.runs else format_duration(arm.eta)),
    ]


def _format_metric(spread: Spread, *, sd: bool) -> str:
    return "nan" if spread.nonfinite else format_mean_sd(spread, sd=sd)


def _select_arms(arms: list[ArmRow], room: int) -> list[ArmRow]:
    """Return all arms if they fit, else the running, failed and completed ones first, in their order."""
    if len(arms) <= room:
        return arms
    by_weight = sorted(arms, key=lambda arm: (-arm.running, -arm.failed, -arm.completed))
    selected = {arm.arm for arm in by_weight[:room]}
    return [arm for arm in arms if arm.arm in selected]


def _render_failure(run: RunProgress, folder: str, width: int) -> RenderableType:
    """Return which run failed, at which step, and why, with the command that shows it."""
    stage = f" {run.stage}" if run.stage else ""
    failure = f"! {run.arm} seed {run.seed}{stage} failed at step {run.step:,}: {summarize_error(run.error)}"
    text = Text(failure, style="red")
    show = Text(f"show: evsys-bus show {printable(folder)}/{printable(run.key)}", style="dim")
    line = Text("   ").join([text, show])
    if line.cell_len <= width:
        return line
    for each in (text, show):
        each.no_wrap, each.overflow = True, "ellipsis"
    return Group(text, Text("  ", no_wrap=True, overflow="ellipsis") + show)


def _problem_lines(problems: Sequence[DeliveryStatus], width: int, room: int) -> list[Text]:
    """Return the problems in full, each with its fix; those that do not fit are counted."""
    lines: list[Text] = []
    for number, each in enumerate(problems):
        state = f"{each.state}: " if each.state in {"parked", "failed", "retrying"} else ""
        why = "" if each.last_error is None else f"{state}{each.last_error}"
        fix = each.suggested_fix
        parts = (each.name, ", ".join(describe_counts(each)), why, f"fix: {fix}" if fix and why else "")
        texts = textwrap.wrap(printable("   ".join(filter(None, parts))), max(width, 1), subsequent_indent="  ")
        if len(lines) + len(texts) + (number + 1 < len(problems)) > room:
            more = _dim_line(f"… {len(problems) - number} more with problems: evsys-bus status")
            return [*lines, more] if len(lines) < room else lines
        lines += [Text(text, style="yellow") for text in texts]
    return lines


def _dim_line(text: str) -> Text:
    return Text(text, style="dim", overflow="ellipsis", no_wrap=True)


def _footer(tracker: RunStateTracker, now: float, *, hint: bool) -> str:
    runs = list(tracker.runs.values())
    finished = sum(run.status in {"completed", "failed", "cancelled"} for run in runs)
    running = sum(run.status == "running" for run in runs)
    left = _estimate_seconds_left(runs, now)
    parts = [
        f"{finished}/{len(runs)} runs done",
        f"{running} running",
        f"{format_duration(now - tracker.started_at)} elapsed",
    ]
    parts += [f"eta {format_duration(left)}"] if left is not None else []
    return "   ".join([*parts, *(["Ctrl-C stops"] if hint else [])])


def format_transfer_bar(label: str, short_label: str, transfer: Transfer, *, width: int, now: float) -> Text:
    """Return the line, at most ``width`` cells wide.

    Whatever does not fit is left out in this order: bar, label, the run's name, the last figures.

    Args:
        label: The text in front.
        short_label: Replaces a label that is too long.
        transfer: The transfer.
        width: Width of the terminal.
        now: Seconds since the epoch.
    """
    figures = [
        Text(each, style="yellow" if each.startswith("silent") else "") for each in format_transfer(transfer, now)
    ]
    name = printable(transfer.name)
    head = [Text(label, style="dim")]
    room = width - Text(_GAP).join([*head, *figures]).cell_len - len(_GAP)
    if room < cell_len(name):
        head = [Text(short_label, style="dim")]
        room += cell_len(label) - cell_len(short_label)
    while figures and room < min(_MIN_NAME, cell_len(name)):
        room += figures.pop().cell_len + len(_GAP)
    spare = room - cell_len(name) - len(_GAP)
    if spare >= _MIN_BAR:
        cells = min(spare, _MAX_BAR)
        halves = int(transfer.fraction * cells * 2)  # a bar with a resolution of half a cell
        done = "━" * (halves // 2) + "╸" * (halves % 2)
        figures.insert(0, Text.assemble((done, "cyan"), ("━" * (cells - len(done)), "bright_black")))
    shown = Text(_shorten(printable(transfer.run), printable(transfer.checkpoint), room))
    line = Text(_GAP).join([*head, shown, *figures])
    line.truncate(width, overflow="ellipsis")
    line.no_wrap = True
    return line


def _shorten(run: str, checkpoint: str, room: int) -> str:
    """Fit both names into the cells; the run's name is shortened first, because the checkpoint's holds the step."""
    run_room = room - cell_len(checkpoint) - 1
    if cell_len(run) <= run_room:
        return f"{run}/{checkpoint}"
    if run_room >= _MIN_RUN:
        return f"{set_cell_size(run, run_room - 1).rstrip()}…/{checkpoint}"
    return checkpoint
