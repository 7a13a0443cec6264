"""Delivery of a live run to one adapter until the run ends, for ``evsys-bus follow``.

A run has ended when no process writes a stream of its journal. An adapter with a name has a cursor, like the adapters
of the run itself; one without a name gets all events from the first on, and leaves nothing in the journal.
"""

import os
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from evsys_bus.cli.adapter_choice import built
from evsys_bus.cli.chosen_events import ChosenEvents
from evsys_bus.cli.deliveries import LOOK_SECONDS, Outcome, Watch, busy
from evsys_bus.cli.delivery_progress import Tell
from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.cli.replaying import status_of
from evsys_bus.codec import error_text
from evsys_bus.delivery.accounts import Pending
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.crew import Crew
from evsys_bus.delivery.followed import Followed
from evsys_bus.delivery.roster import enlist, roster
from evsys_bus.errors import BadSpecError
from evsys_bus.journal import Cursor, Cursors, JournalReader, OsDisk, layout
from evsys_bus.tasks import DeliveryStatus, run_alone
from evsys_bus.tasks.daemon_executor import DaemonExecutor

STOP_SECONDS: Final = 5.0
"""Time for the courier to stop and save its cursor."""


class Followup:
    """Delivers to an adapter with a cursor, in this process.

    Args:
        directory: The journal.
        followed: The subscription.
        from_start: Reset the cursor, and begin at the first event.

    Raises:
        CourierBusyError: Another process delivers to it.
    """

    def __init__(self, directory: Path, followed: Followed, *, from_start: bool) -> None:
        self._directory = directory.absolute()
        self._reader = JournalReader(self._directory)
        if OsDisk().is_locked(layout.courier_file(str(self._directory), followed.name, "lock")):
            raise busy(self._directory, followed.name)
        enlist(str(self._directory), [followed])
        if from_start:
            self._begin_anew(followed.name)
        self._watch = Watch(self._directory, {followed.name})
        self._crew = Crew(str(self._directory), [followed], lambda _: built(followed))

    def run(self, timeout_seconds: float, tell: Tell) -> tuple[Outcome, bool]:
        """Deliver until the run ends; return the outcome, and whether it was interrupted."""
        interrupted = False
        with Interrupts(lambda _: None):
            self._crew.start()
            try:
                self._go(timeout_seconds, tell)
            except KeyboardInterrupt:
                interrupted = True
            with suppress(KeyboardInterrupt):  # on the second signal the cursor stays where it is
                self._crew.stop()
                self._crew.join(STOP_SECONDS)
        self._watch.look(os.getpid())
        [outcome] = self._watch.outcomes()
        return outcome, interrupted

    def _go(self, timeout_seconds: float, tell: Tell) -> None:
        over = False
        while self._crew.running:
            if not over and not _is_live(self._reader):
                over = True
                self._crew.finish()
                self._watch.count_from_now()
            tell(self._watch.look(os.getpid()))
            if over and self._watch.is_over(timeout_seconds):
                break
            time.sleep(LOOK_SECONDS)
        tell(self._watch.look(os.getpid()))

    def _begin_anew(self, name: str) -> None:
        disk = OsDisk()
        lock = disk.lock(layout.courier_file(str(self._directory), name, "lock"))
        if lock is None:
            raise busy(self._directory, name)
        try:
            Cursors(str(self._directory), disk).save(name, Cursor())
        finally:
            disk.close(lock)


class OneOffFollowup:
    """Delivers to an adapter without a cursor, in this process, from the first event on.

    Args:
        directory: The journal.
        followed: The subscription.

    Raises:
        CourierBusyError: Another process delivers to the same adapter: both would write the same files.
    """

    def __init__(self, directory: Path, followed: Followed) -> None:
        self._directory = directory.absolute()
        self._reader = JournalReader(self._directory)
        self._name = followed.name
        for each in roster(str(self._directory)):
            lock = layout.courier_file(str(self._directory), each.name, "lock")
            if each.recipe == followed.recipe and OsDisk().is_locked(lock):
                raise busy(self._directory, each.name)
        self._pending = Pending(str(self._directory), followed.terms.ranks, OsDisk())
        self._followed = followed
        self._events: ChosenEvents | None = None
        self._courier: Courier | None = None
        self._delivery: Future[None] | None = None
        self._finishing = False

    def run(self, timeout_seconds: float, tell: Tell) -> tuple[Outcome, bool]:
        """Deliver until the run ends; return the outcome, and whether it was interrupted."""
        before, began = self._look(), time.monotonic()
        interrupted = False
        with Interrupts(lambda _: None):
            delivery = self._delivery = DaemonExecutor().submit(self._deliver)
            try:
                self._go(delivery, timeout_seconds, tell)
            except KeyboardInterrupt:
                interrupted = True
            with suppress(KeyboardInterrupt):  # the second signal
                if self._courier is not None:
                    self._courier.stop()
                wait([delivery], STOP_SECONDS)
        after = self._look()
        tell([after])
        return Outcome(str(self._directory), before, after, round(time.monotonic() - began, 1)), interrupted

    def _deliver(self) -> None:
        self._events = ChosenEvents(built(self._followed))
        self._courier = Courier(self._directory, self._name, self._events, self._followed.terms, keep=False)
        if self._finishing:
            self._courier.finish()
        run_alone(self._courier.run)

    def _go(self, delivery: "Future[None]", timeout_seconds: float, tell: Tell) -> None:
        done, moved_at = -1, time.monotonic()
        while not delivery.done():
            status = self._look()
            tell([status])
            if status.delivered + status.dead != done:
                done, moved_at = status.delivered + status.dead, time.monotonic()
            if not self._finishing and not _is_live(self._reader):
                self._finishing, moved_at = True, time.monotonic()
                if self._courier is not None:
                    self._courier.finish()
            stuck = status.state == "parked" or time.monotonic() - moved_at >= timeout_seconds
            if self._finishing and stuck:
                return
            time.sleep(LOOK_SECONDS)

    def _look(self) -> DeliveryStatus:
        total = self._pending.count({})
        if self._events is None:
            status = DeliveryStatus(self._name, recorded=total, pending=total)
        else:
            status = status_of(self._name, self._events, max(0, total - self._events.seen))
        error = self._delivery.exception() if self._delivery is not None and self._delivery.done() else None
        return status if error is None else msgspec.structs.replace(status, state="failed", error=error_text(error))


def _is_live(reader: JournalReader) -> bool:
    return any(map(reader.is_live, reader.streams()))


def refuse_other(directory: Path, followed: Followed) -> None:
    """Check that the name is not used by another adapter of the journal.

    Raises:
        BadSpecError: Another adapter has this name.
    """
    for each in roster(str(directory)):
        if each.name == followed.name and each.recipe != followed.recipe:
            raise BadSpecError(
                f'"{each.name}" is followed already, with other params',
                why="its cursor is stored under this name, and its events went to another destination",
                fix="choose another name: --name",
            )
