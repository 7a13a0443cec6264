"""``evsys-bus follow``: delivers a live run to an adapter in this process, until the run ends.

A run has ended when no process writes a stream of its journal. An adapter with a name has a cursor, like the adapters
of the run itself; one without a name gets all events from the first on, and leaves nothing in the journal.
"""

import os
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
import msgspec

from evsys_bus.cli.interrupts import Interrupts
from evsys_bus.cli.options import (
    adapter_options,
    load_adapter,
    progress_option,
    resolve_subscription,
    run_argument,
    timeout_option,
)
from evsys_bus.cli.output.capture import guard_stdout
from evsys_bus.cli.output.deliveries import (
    POLL_SECONDS,
    DeliveryMonitor,
    DeliveryOutcome,
    courier_busy_error,
    outcome_json,
    outcome_lines,
    sync_command,
    undelivered_error,
)
from evsys_bus.cli.output.delivery_progress import OnProgress, show_deliveries
from evsys_bus.cli.output.errors import INTERRUPTED, report, show_warnings
from evsys_bus.cli.output.progress import ProgressMode
from evsys_bus.cli.output.screen import Screen, color_option, json_option
from evsys_bus.cli.records import find_journal
from evsys_bus.cli.replay import FilteredReceiver, delivery_status
from evsys_bus.codec import error_text
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.courier_pool import CourierPool
from evsys_bus.delivery.progress import PendingCounter
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.delivery.subscriptions import load_subscriptions, register
from evsys_bus.errors import BadSpecError
from evsys_bus.journal import Cursor, CursorStore, JournalReader, OsDisk, layout
from evsys_bus.tasks import DeliveryStatus, run_in_new_loop
from evsys_bus.tasks.daemon_executor import DaemonExecutor

STOP_SECONDS: Final = 5.0
"""Time for the courier to stop and save its cursor."""


@click.command("follow")
@run_argument
@adapter_options
@click.option("--name", help="Store a cursor under this name; the next call continues there.")
@click.option("--from-start", is_flag=True, help="With --name: start again at the first event.")
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
    name: str | None,
    from_start: bool,
    timeout_seconds: float,
    progress: ProgressMode,
    as_json: bool,
) -> int:
    """Deliver the events of RUN to an adapter until the run ends, or until Ctrl-C.

    Delivery begins at the first event, and leaves nothing in the journal. With --name the adapter has a cursor like
    those of the run: it continues where it stopped the last time, and `status` and `sync` include it. If the run has
    ended already, its events are delivered and the command ends.

    \b
    Examples:
      evsys-bus follow runs/sweep --to print_progress
      evsys-bus follow runs/sweep --to csv_metrics --set out_path=live.csv --name live
    """  # noqa: D301 # click reads the backspace as: do not wrap
    journal = find_journal(folder)
    subscription = resolve_subscription(kind, sets, plugins, name)
    if name is not None:
        check_same_adapter(journal.directory, subscription)
    if journal.run is not None:
        screen.note(f"{journal.run} shares its journal: all events of {journal.directory} are delivered")
    with (
        guard_stdout(result_is_json=as_json, progress_is_json=progress == "json"),
        show_deliveries(progress, screen) as view,
        show_warnings(screen, as_json=progress == "json"),
    ):
        if name is None:
            delivery: ResumableDelivery | OneOffDelivery = OneOffDelivery(journal.directory, subscription)
        else:
            delivery = ResumableDelivery(journal.directory, subscription, from_start=from_start)
        outcome, interrupted = delivery.run(timeout_seconds, view.update)
    click.echo("\n".join(outcome_json([outcome]) if as_json else outcome_lines([outcome])))
    if outcome.dead:
        location = "" if outcome.dead_letters is None else f"; events and reasons are in {outcome.dead_letters}"
        screen.note(f"{outcome.dead:,} rejected{location}")
    if interrupted:
        advice = "the same command starts again at the first event; with --name it would continue where it stopped"
        if name is not None:
            advice = f"the same command continues where it stopped, and so does: {sync_command(journal.directory)}"
        screen.note(f"interrupted; {advice}")
        return INTERRUPTED
    error = undelivered_error(outcome)
    if error is not None and name is None:
        error.fix = f"{outcome.after.fix or 'remove the cause'}   then run the same command again"
    return 0 if error is None else report(error, screen)


class ResumableDelivery:
    """Delivers to an adapter with a cursor, in this process.

    Args:
        directory: The journal.
        subscription: The subscription.
        from_start: Reset the cursor, and begin at the first event.

    Raises:
        CourierBusyError: Another process delivers to it.
    """

    def __init__(self, directory: Path, subscription: Subscription, *, from_start: bool) -> None:
        self._directory = directory.absolute()
        self._reader = JournalReader(self._directory)
        if OsDisk().is_locked(layout.courier_path(str(self._directory), subscription.name, "lock")):
            raise courier_busy_error(self._directory, subscription.name)
        register(str(self._directory), [subscription])
        if from_start:
            disk = OsDisk()
            lock = disk.lock(layout.courier_path(str(self._directory), subscription.name, "lock"))
            if lock is None:
                raise courier_busy_error(self._directory, subscription.name)
            try:
                CursorStore(str(self._directory), disk).save(subscription.name, Cursor())
            finally:
                disk.close(lock)
        self._monitor = DeliveryMonitor(self._directory, {subscription.name})
        self._pool = CourierPool(str(self._directory), [subscription], lambda _: load_adapter(subscription))

    def run(self, timeout_seconds: float, on_progress: OnProgress) -> tuple[DeliveryOutcome, bool]:
        """Deliver until the run ends; return the outcome, and whether it was interrupted."""
        interrupted = False
        with Interrupts():
            self._pool.start()
            try:
                self._poll_until_done(timeout_seconds, on_progress)
            except KeyboardInterrupt:
                interrupted = True
            with suppress(KeyboardInterrupt):  # on the second signal the cursor stays where it is
                self._pool.stop()
                self._pool.join(STOP_SECONDS)
        self._monitor.poll(os.getpid())
        [outcome] = self._monitor.outcomes()
        return outcome, interrupted

    def _poll_until_done(self, timeout_seconds: float, on_progress: OnProgress) -> None:
        run_ended = False
        while self._pool.running:
            if not run_ended and not _is_live(self._reader):
                run_ended = True
                self._pool.finish()
                self._monitor.restart_timeout()
            on_progress(self._monitor.poll(os.getpid()))
            if run_ended and self._monitor.is_finished(timeout_seconds):
                break
            time.sleep(POLL_SECONDS)
        on_progress(self._monitor.poll(os.getpid()))


class OneOffDelivery:
    """Delivers to an adapter without a cursor, in this process, from the first event on.

    Args:
        directory: The journal.
        subscription: The subscription.

    Raises:
        CourierBusyError: Another process delivers to the same adapter: both would write the same files.
    """

    def __init__(self, directory: Path, subscription: Subscription) -> None:
        self._directory = directory.absolute()
        self._reader = JournalReader(self._directory)
        self._name = subscription.name
        for each in load_subscriptions(str(self._directory)):
            lock = layout.courier_path(str(self._directory), each.name, "lock")
            if each.adapter_ref == subscription.adapter_ref and OsDisk().is_locked(lock):
                raise courier_busy_error(self._directory, each.name)
        self._pending = PendingCounter(str(self._directory), subscription.policy.ranks, OsDisk())
        self._subscription = subscription
        self._receiver: FilteredReceiver | None = None
        self._courier: Courier | None = None
        self._delivery: Future[None] | None = None
        self._finishing = False

    def run(self, timeout_seconds: float, on_progress: OnProgress) -> tuple[DeliveryOutcome, bool]:
        """Deliver until the run ends; return the outcome, and whether it was interrupted."""
        before, began = self._status(), time.monotonic()
        interrupted = False
        with Interrupts():
            delivery = self._delivery = DaemonExecutor().submit(self._deliver)
            try:
                self._poll_until_done(delivery, timeout_seconds, on_progress)
            except KeyboardInterrupt:
                interrupted = True
            with suppress(KeyboardInterrupt):  # the second signal
                if self._courier is not None:
                    self._courier.stop()
                wait([delivery], STOP_SECONDS)
        after = self._status()
        on_progress([after])
        return DeliveryOutcome(str(self._directory), before, after, round(time.monotonic() - began, 1)), interrupted

    def _deliver(self) -> None:
        self._receiver = FilteredReceiver(load_adapter(self._subscription))
        self._courier = Courier(
            self._directory, self._name, self._receiver, self._subscription.policy, persistent=False
        )
        if self._finishing:
            self._courier.finish()
        run_in_new_loop(self._courier.run)

    def _poll_until_done(self, delivery: Future[None], timeout_seconds: float, on_progress: OnProgress) -> None:
        done, last_progress_at = -1, time.monotonic()
        while not delivery.done():
            status = self._status()
            on_progress([status])
            if status.delivered + status.dead != done:
                done, last_progress_at = status.delivered + status.dead, time.monotonic()
            if not self._finishing and not _is_live(self._reader):
                self._finishing, last_progress_at = True, time.monotonic()
                if self._courier is not None:
                    self._courier.finish()
            stuck = status.state == "parked" or time.monotonic() - last_progress_at >= timeout_seconds
            if self._finishing and stuck:
                return
            time.sleep(POLL_SECONDS)

    def _status(self) -> DeliveryStatus:
        total = self._pending.count({})
        if self._receiver is None:
            status = DeliveryStatus(self._name, recorded=total, pending=total)
        else:
            status = delivery_status(self._name, self._receiver, max(0, total - self._receiver.processed))
        error = self._delivery.exception() if self._delivery is not None and self._delivery.done() else None
        return status if error is None else msgspec.structs.replace(status, state="failed", error=error_text(error))


def _is_live(reader: JournalReader) -> bool:
    return any(map(reader.is_live, reader.streams()))


def check_same_adapter(directory: Path, subscription: Subscription) -> None:
    """Check that the name is not used by another adapter of the journal.

    Raises:
        BadSpecError: Another adapter has this name.
    """
    for each in load_subscriptions(str(directory)):
        if each.name == subscription.name and each.adapter_ref != subscription.adapter_ref:
            raise BadSpecError(
                f'"{each.name}" is followed already, with other params',
                why="its cursor is stored under this name, and its events went to another destination",
                fix="choose another name: --name",
            )
