"""Replays a journal: the courier runs on this thread, its progress is shown from another one."""

import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from evsys_bus.cli.chosen_events import ChosenEvents
from evsys_bus.cli.deliveries import LOOK_SECONDS
from evsys_bus.cli.delivery_progress import Tell
from evsys_bus.cli.telling import INTERRUPTED
from evsys_bus.delivery.accounts import Pending
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.followed import Terms
from evsys_bus.journal import JournalReader, OsDisk, Place, layout
from evsys_bus.tasks import DeliveryStatus, run_alone


class Replayed(msgspec.Struct, frozen=True):
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
    directory: Path, name: str, events: ChosenEvents, after: int, timeout_seconds: float, tell: Tell
) -> Replayed:
    """Deliver the events after this sequence of each stream, up to the current end, to the adapter.

    Raises:
        Exception: The adapter cannot be opened.
    """
    terms = Terms()
    streams = [
        each for each in JournalReader(directory).streams() if terms.ranks and layout.rank_of(each) in terms.ranks
    ]
    places = dict.fromkeys(streams, after)
    courier = Courier(directory, name, events, terms, keep=False, after=places if after else None)
    courier.finish()
    total = Pending(str(directory), terms.ranks, OsDisk()).count({each: Place(after) for each in streams})
    began = time.monotonic()
    with _stopped_by_signals(courier) as heard, _shown(name, events, total, courier, timeout_seconds, tell):
        run_alone(courier.run)
    counts = courier.counts
    return Replayed(
        name,
        dict(events.sent),
        counts.dead,
        max(0, total - counts.delivered - counts.dead),
        round(time.monotonic() - began, 3),
        bool(heard),
        None if events.trouble is None else events.trouble.error,
    )


def status_of(name: str, events: ChosenEvents, pending: int) -> DeliveryStatus:
    """Return the status of a delivery that stores nothing on disk."""
    trouble = events.trouble
    return DeliveryStatus(
        name,
        recorded=events.seen + pending,
        delivered=events.seen - events.dead,
        dead=events.dead,
        pending=pending,
        hook_failures=events.hook_failures,
        state="delivering" if trouble is None else trouble.state,
        error=None if trouble is None else trouble.error,
        fix=None if trouble is None else trouble.fix,
    )


@contextmanager
def _stopped_by_signals(courier: Courier) -> Generator[list[int]]:
    """Stop the courier on the first signal, and exit on the second one even if a hook hangs."""
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        del frame
        if heard:
            os._exit(INTERRUPTED)
        heard.append(number)
        courier.stop()

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    earlier = {each: signal.signal(each, hear) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for each, handler in earlier.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _shown(
    name: str, events: ChosenEvents, total: int, courier: Courier, timeout_seconds: float, tell: Tell
) -> Generator[None]:
    """Report progress from a thread within the block, and stop the courier after too long without progress."""
    over = threading.Event()

    def watch() -> None:
        seen, moved_at = -1, time.monotonic()
        while True:
            ended = over.wait(LOOK_SECONDS)
            if events.seen != seen or events.waiting:
                seen, moved_at = events.seen, time.monotonic()
            status = status_of(name, events, max(0, total - events.seen))
            tell([status])
            if ended:
                return
            if status.state == "parked" or time.monotonic() - moved_at >= timeout_seconds:
                courier.stop()

    watcher = threading.Thread(target=watch, name="evsys-bus-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
