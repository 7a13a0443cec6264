"""``evsys-bus replay``: delivers a recorded run to any adapter.

The courier runs on this thread, its progress is shown from another one.
"""

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from evsys_bus.adapter import Adapter
from evsys_bus.callback import Callback
from evsys_bus.cli.events import type_of
from evsys_bus.cli.options import (
    adapter_options,
    dry_run_option,
    event_options,
    load_adapter,
    no_match_message,
    progress_option,
    resolve_subscription,
    run_argument,
    timeout_option,
)
from evsys_bus.cli.output.capture import guard_stdout
from evsys_bus.cli.output.deliveries import POLL_SECONDS
from evsys_bus.cli.output.delivery_progress import OnProgress, show_deliveries
from evsys_bus.cli.output.errors import INTERRUPTED, OK, RAISED, REMOTE, report, show_warnings
from evsys_bus.cli.output.formatting import format_columns, format_event_rate, format_seconds, pluralize
from evsys_bus.cli.output.progress import ProgressMode
from evsys_bus.cli.output.screen import Screen, color_option, json_option, printable
from evsys_bus.cli.records import find_journal, find_run_key
from evsys_bus.delivery.callback_receiver import CallbackReceiver
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import PendingCounter
from evsys_bus.delivery.receiver import ProblemHandler, Receiver
from evsys_bus.delivery.sink_receiver import SinkReceiver
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import JournalReader, OsDisk, Position, layout
from evsys_bus.location import encode_json
from evsys_bus.sink import BatchResult, Sink
from evsys_bus.tasks import DeliveryStatus, run_in_new_loop

_MAX_REASONS: Final = 5


class ReplayResult(msgspec.Struct, frozen=True):
    """The result of a replay."""

    adapter: str
    sent: dict[str, int]
    """Number of delivered events by type."""
    dead: int
    left: int
    """Number of events that were not reached."""
    seconds: float
    interrupted: bool = False
    error: str | None = None
    """The last error of the destination, if events are left."""


class FilteredReceiver:
    """Wraps the receiver of an adapter: filters its events by type and run, paces and counts them.

    Args:
        adapter: Receives the events; None only counts them.
        types: The types of events to pass on; empty for all.
        run: Only events of this run, and those that belong to no run; None for all.
        speed: Seconds of the journal per second; 0 for as fast as the adapter accepts them.
        monotonic: The clock.

    Attributes:
        sent: Number of delivered events, by type.
        dead: Number of rejected events.
        reasons: Why the first few were rejected.
        skipped: Number of events that the filter skipped.
        problem: What keeps the adapter from accepting events now; None if nothing does.
        last_sequences: The sequence of the last handled event, by stream.
        is_waiting: Whether the next event is not due yet.
    """

    def __init__(
        self,
        adapter: Callback | Sink | None,
        *,
        types: frozenset[str] = frozenset(),
        run: str | None = None,
        speed: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sent: Final[Counter[str]] = Counter()
        self.dead = 0
        self.reasons: Final[list[str]] = []
        self.skipped = 0
        self.last_sequences: Final[dict[str, int]] = {}
        self.problem: DeliveryStatus | None = None
        self.is_waiting = False
        self._sink: Final = adapter if isinstance(adapter, Sink) else None
        self._hooks: Final = CallbackReceiver(adapter, faults=FaultLog()) if isinstance(adapter, Callback) else None
        self._receiver: Final[Receiver | None] = self._hooks if self._sink is None else SinkReceiver(self._sink)
        self._types: Final = types
        self._run: Final = run
        self._speed: Final = speed
        self._monotonic: Final = monotonic
        self._clock_start: tuple[float, float] | None = None
        self._batch: Sequence[Envelope] = ()
        self._selected: Sequence[int] = ()
        self.max_events = 512 if self._receiver is None else self._receiver.max_events
        self.max_bytes = 8 << 20 if self._receiver is None else self._receiver.max_bytes
        self.max_seconds = 0.0

    @property
    def processed(self) -> int:
        """Number of handled events: delivered, rejected or skipped."""
        return self.sent.total() + self.dead + self.skipped

    @property
    def hook_failures(self) -> int:
        """Number of hook calls that raised."""
        return 0 if self._hooks is None else self._hooks.failures

    async def open(self, on_problem: ProblemHandler) -> None:
        """Open the adapter's receiver, and remember the problems it reports."""

        def store_problem(problem: DeliveryStatus | None) -> None:
            self.problem = problem
            on_problem(problem)

        if self._sink is not None:
            self._sink.evsys_attached = self
        if self._receiver is not None:
            await self._receiver.open(store_problem)

    async def deliver(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> BatchResult:
        """Deliver the selected events from the front of the batch, once they are due."""
        self._batch = ()
        if self._speed:
            batch = await self._wait_until_due(batch)
        selected = [index for index, envelope in enumerate(batch) if self._is_selected(envelope)]
        self._batch, self._selected = batch, selected
        result = BatchResult(len(selected))
        if self._receiver is not None and selected:
            result = await self._receiver.deliver(
                [batch[each] for each in selected], [sizes[each] for each in selected]
            )
        return self._to_batch_result(result)

    def interrupted_result(self) -> BatchResult | None:
        """Return the result of a cancelled `deliver` if it is known."""
        known = None if self._receiver is None or not self._batch else self._receiver.interrupted_result()
        return None if known is None else self._to_batch_result(known)

    @property
    def needs_starts_as_events(self) -> bool:
        """Whether the sink writes the start events of open runs itself; see `SinkReceiver`."""
        return isinstance(self._receiver, SinkReceiver) and self._receiver.needs_starts_as_events

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Pass on the selected start events."""
        selected = [each for each in starts if self._is_selected(each)]
        if self._receiver is not None and selected:
            self._receiver.resume_runs(selected)

    def mark(self) -> Any:
        """Return None: the delivery is never resumed."""

    def rewind(self, mark: Any) -> None:
        """Do nothing: the delivery is never resumed."""

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        """Close the receiver; unconfirmed events are not confirmed."""
        del confirm
        if self._receiver is not None:
            await self._receiver.close(deadline)
        if self._sink is not None:
            self._sink.evsys_attached = None

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Do nothing: unconfirmed events are not tracked here."""

    def publish(self, event: Event) -> None:
        """Do nothing: the event was recorded while the run was live."""

    def _is_selected(self, envelope: Envelope) -> bool:
        if self._run is not None and envelope.run not in {None, self._run}:
            return False
        return not self._types or type_of(envelope.event) in self._types

    def _to_batch_result(self, result: BatchResult) -> BatchResult:
        """Translate the result for the selected events into one for the whole batch, and count them."""
        batch, selected = self._batch, self._selected
        done = len(batch) if result.handled >= len(selected) else selected[result.handled]
        handled = selected[: result.handled]
        rejected = {selected[index]: why for index, why in result.rejected.items()}
        self.sent.update(type_of(batch[each].event) for each in handled if each not in rejected)
        self.dead += len(rejected)
        self.skipped += done - len(handled)
        self.last_sequences.update((each.stream, each.seq) for each in batch[:done])
        room = _MAX_REASONS - len(self.reasons)
        self.reasons.extend(list(dict.fromkeys(rejected.values()))[: max(0, room)])
        return BatchResult(done - len(rejected), rejected)

    async def _wait_until_due(self, batch: Sequence[Envelope]) -> Sequence[Envelope]:
        """Wait until the first event is due, and return the events that are due by then."""
        if self._clock_start is None:
            self._clock_start = self._monotonic(), batch[0].time
        began, first = self._clock_start
        wait = began + (batch[0].time - first) / self._speed - self._monotonic()
        if wait > 0:
            self.is_waiting = True
            await asyncio.sleep(wait)
            self.is_waiting = False
        until = first + (self._monotonic() - began) * self._speed
        return [batch[0], *takewhile(lambda each: each.time <= until, batch[1:])]


@click.command("replay")
@run_argument
@adapter_options
@event_options
@click.option("--from-seq", type=click.IntRange(min=1), default=1, metavar="N", help="Start at this sequence.")
@click.option(
    "--speed",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="X",
    help="1 is the original speed, 10 ten times as fast; default: as fast as the adapter accepts events.",
)
@dry_run_option
@timeout_option
@progress_option
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    folder: Path,
    kind: str,
    sets: tuple[str, ...],
    plugins: tuple[str, ...],
    types: tuple[str, ...],
    run_key: str | None,
    from_seq: int,
    speed: float,
    dry_run: bool,
    timeout_seconds: float,
    progress: ProgressMode,
    as_json: bool,
) -> int:
    """Deliver the recorded events of RUN to an adapter, any number of times: no cursor is read or moved.

    If RUN is one run of an experiment, the events are those of this run and of the experiment as a whole.

    \b
    Examples:
      evsys-bus replay runs/sweep --to csv_metrics --set out_path=again.csv
      evsys-bus replay runs/sweep/low-s0 --to wandb_logger --set project=again
    """  # noqa: D301 # click reads the backspace as: do not wrap
    journal = find_journal(folder)
    subscription = resolve_subscription(kind, sets, plugins)
    receiver = FilteredReceiver(
        None if dry_run else load_adapter(subscription),
        types=frozenset(types),
        run=run_key or find_run_key(journal),
        speed=0.0 if dry_run else speed,
    )
    with (
        guard_stdout(result_is_json=as_json, progress_is_json=progress == "json"),
        show_deliveries(progress, screen) as view,
        show_warnings(screen, as_json=progress == "json"),
    ):
        result = replay(journal.directory, subscription.name, receiver, from_seq - 1, timeout_seconds, view.update)
    if as_json:
        click.echo(encode_json({"type": "plan" if dry_run else "replay", **msgspec.to_builtins(result)}))
    else:
        click.echo("\n".join(_lines(result, dry_run=dry_run)))
    if not receiver.sent and not receiver.dead:
        screen.note(no_match_message(types))
    return _report_problems(result, receiver, screen)


def _lines(result: ReplayResult, *, dry_run: bool) -> list[str]:
    sent = sum(result.sent.values())
    if dry_run:
        rows = [[each, f"{count:,}"] for each, count in sorted(result.sent.items())]
        return [f"{result.adapter}   {pluralize(sent, 'event')} to deliver", *format_columns(rows, indent="  ")]
    rest = [f"left {result.left:,}"] if result.left else []
    counts = [f"sent {sent:,}", f"dead {result.dead:,}", *rest, format_seconds(result.seconds)]
    if result.seconds > 0:
        counts.append(format_event_rate(sent / result.seconds))
    return format_columns([[printable(result.adapter), pluralize(sent + result.dead, "event"), *counts]])


def _report_problems(result: ReplayResult, receiver: FilteredReceiver, screen: Screen) -> int:
    """Report errors on stderr, and return the exit code."""
    for why in receiver.reasons:
        screen.note(f"rejected: {printable(why)}")
    if receiver.hook_failures:
        screen.note(f"hooks of {result.adapter} raised {pluralize(receiver.hook_failures, 'time')}")
    if result.interrupted:
        sequences = list(receiver.last_sequences.values())
        hint = f"; continue with --from-seq {sequences[0] + 1}" if len(sequences) == 1 else ""
        screen.note(f"interrupted with {pluralize(result.left, 'event')} left{hint}")
        return INTERRUPTED
    if result.left:
        error = RetryLaterError(f"{pluralize(result.left, 'event')} could not be delivered to {result.adapter}")
        error.why = result.error or "it accepted no events and gave no reason"
        error.fix = "remove the cause, and run the same command again"
        return report(error, screen)
    return REMOTE if result.dead else RAISED if receiver.hook_failures else OK


def replay(
    directory: Path, name: str, receiver: FilteredReceiver, after: int, timeout_seconds: float, on_progress: OnProgress
) -> ReplayResult:
    """Deliver the events after this sequence of each stream, up to the current end, to the adapter.

    Raises:
        Exception: The adapter cannot be opened.
    """
    policy = DeliveryPolicy()
    streams = [
        each
        for each in JournalReader(directory).streams(*layout.DELIVERED_FAMILIES)
        if policy.ranks and layout.rank_of(each) in policy.ranks
    ]
    start_sequences = dict.fromkeys(streams, after)
    courier = Courier(
        directory, name, receiver, policy, persistent=False, start_after=start_sequences if after else None
    )
    courier.finish()
    total = PendingCounter(str(directory), policy.ranks, OsDisk()).count({each: Position(after) for each in streams})
    began = time.monotonic()
    with (
        _stop_on_signals(courier) as signals,
        _show_progress(name, receiver, total, courier, timeout_seconds, on_progress),
    ):
        run_in_new_loop(courier.run)
    counts = courier.counts
    return ReplayResult(
        name,
        dict(receiver.sent),
        counts.dead,
        max(0, total - counts.delivered - counts.dead),
        round(time.monotonic() - began, 3),
        bool(signals),
        None if receiver.problem is None else receiver.problem.error,
    )


def delivery_status(name: str, receiver: FilteredReceiver, pending: int) -> DeliveryStatus:
    """Return the status of a delivery that stores nothing on disk."""
    problem = receiver.problem
    return DeliveryStatus(
        name,
        recorded=receiver.processed + pending,
        delivered=receiver.processed - receiver.dead,
        dead=receiver.dead,
        pending=pending,
        hook_failures=receiver.hook_failures,
        state="delivering" if problem is None else problem.state,
        error=None if problem is None else problem.error,
        fix=None if problem is None else problem.fix,
    )


@contextmanager
def _stop_on_signals(courier: Courier) -> Generator[list[int]]:
    """Stop the courier on the first signal, and exit on the second one even if a hook hangs."""
    received: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        del frame
        if received:
            os._exit(INTERRUPTED)
        received.append(number)
        courier.stop()

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous_handlers = {each: signal.signal(each, on_signal) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in previous_handlers.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _show_progress(
    name: str, receiver: FilteredReceiver, total: int, courier: Courier, timeout_seconds: float, on_progress: OnProgress
) -> Generator[None]:
    """Report progress from a thread within the block, and stop the courier after too long without progress."""
    finished = threading.Event()

    def poll() -> None:
        processed, last_progress_at = -1, time.monotonic()
        while True:
            ended = finished.wait(POLL_SECONDS)
            if receiver.processed != processed or receiver.is_waiting:
                processed, last_progress_at = receiver.processed, time.monotonic()
            status = delivery_status(name, receiver, max(0, total - receiver.processed))
            on_progress([status])
            if ended:
                return
            if status.state == "parked" or time.monotonic() - last_progress_at >= timeout_seconds:
                courier.stop()

    poller = threading.Thread(target=poll, name="evsys-bus-progress", daemon=True)
    poller.start()
    try:
        yield
    finally:
        finished.set()
        poller.join()
