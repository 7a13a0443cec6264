"""Replays a journal: the courier runs on this thread, its progress is shown from another one."""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from evsys_bus.cli.filtered_receiver import FilteredReceiver
from evsys_bus.cli.output.deliveries import POLL_SECONDS
from evsys_bus.cli.output.delivery_progress import OnProgress
from evsys_bus.cli.output.errors import INTERRUPTED
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import PendingCounter
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.journal import JournalReader, OsDisk, Position, layout
from evsys_bus.tasks import DeliveryStatus, run_in_new_loop


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


def replay(
    directory: Path, name: str, receiver: FilteredReceiver, after: int, timeout_seconds: float, on_progress: OnProgress
) -> ReplayResult:
    """Deliver the events after this sequence of each stream, up to the current end, to the adapter.

    Raises:
        Exception: The adapter cannot be opened.
    """
    policy = DeliveryPolicy()
    streams = [
        each for each in JournalReader(directory).streams() if policy.ranks and layout.rank_of(each) in policy.ranks
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
