"""Periodic looks go on after one that fails, what cannot be read is unknown, and leaving counts to the last event."""

import errno
import json
import os
import threading
import time

import pytest

from evsys_bus import Callback, Checkpoint, Eval, EventBus, StepEnd, build_callbacks
from evsys_bus.bus.watchdog import Watchdog
from evsys_bus.disk import OsDisk
from evsys_bus.journal import JournalWriter
from support.journals import read_events

# -- looks -----------------------------------------------------------------------------------------------


def test_a_watchdog_whose_looks_raise_goes_on_and_says_so(caplog):
    looked, later = [], threading.Event()

    def raises():
        looked.append("raises")
        raise PermissionError("not now")

    def goes_on():
        looked.append("goes on")
        if len(looked) > 6:
            later.set()

    def look():
        raise RuntimeError("nor here")

    watchdog = Watchdog(look, lambda _: None, (raises, goes_on), blocked_seconds=0.02)
    watchdog.start()
    assert later.wait(10)
    watchdog.stop()
    assert looked[:4] == ["raises", "goes on"] * 2
    assert caplog.text.count("watchdog.look_failed") in {2, 3, 4}  # by type, at most once a minute, and the last count


@pytest.fixture
def followed(tmp_path):
    specs = [{"kind": "csv_metrics", "params": {"out_path": str(tmp_path / "m.csv")}, "placement": "follow"}]
    return lambda: build_callbacks(specs)


def unreadable(folder):
    """As a folder of a file server is whose handle is stale."""
    aside = folder.with_name(f"{folder.name} aside")
    folder.rename(aside)
    folder.symlink_to(folder.name)

    def readable():
        folder.unlink()
        aside.rename(folder)

    return readable


@pytest.mark.parametrize("name", ["couriers", "cursors"])
@pytest.mark.parametrize("couriers", ["process", "thread"])
def test_a_folder_that_cannot_be_read_makes_deliveries_unknown_and_then_known_again(
    name, couriers, tmp_path, followed, step_end, caplog
):
    journal = tmp_path / "journal"
    with EventBus(followed(), journal=journal, couriers=couriers, drain_timeout=5, linger_seconds=1) as bus:
        bus.publish(step_end(0, v=1.0))
        until = time.monotonic() + 20
        while bus.health().deliveries[0].delivered != 1 and time.monotonic() < until:
            time.sleep(0.02)
        readable = unreadable(journal / name)
        (status,) = bus.health().deliveries
        assert (status.state, status.is_known, status.complete) == ("unknown", False, False)
        assert "levels of symbolic links" in status.error
        assert "delivery.unknown" in caplog.text
        readable()
        (status,) = bus.health().deliveries
        assert (status.is_known, status.delivered) == (True, 1)
    assert bus.receipt.deliveries[0].delivered == 1


def test_the_receipt_status_and_sync_say_unknown_and_not_0(tmp_path, followed, step_end, evsys_bus):
    journal = tmp_path / "journal"
    with EventBus(followed(), journal=journal, couriers="thread", drain_timeout=1) as bus:
        bus.publish(step_end(0, v=1.0))
        readable = unreadable(journal / "couriers")
    (status,) = bus.receipt.deliveries
    assert (status.state, status.complete) == ("unknown", False)
    assert bus.receipt.resume_command is not None
    code, out, _ = evsys_bus("status", str(journal))
    assert code == 0
    assert ["csv_metrics", "unknown", "?", "?", "?", "-"] in [line.split() for line in out.splitlines()]
    _, out, _ = evsys_bus("status", "--json", str(journal))
    (adapter,) = [row for row in map(json.loads, out.splitlines()) if row["type"] == "adapter"]
    assert (adapter["state"], adapter["pending"], adapter["delivered"]) == ("unknown", None, None)
    code, _, err = evsys_bus("sync", str(journal))
    assert code != 0
    assert "the pending events for csv_metrics are unknown" in err
    readable()
    code, *_ = evsys_bus("sync", str(journal))
    assert code == 0


# -- handed over -----------------------------------------------------------------------------------------------


class Holds(Callback):
    """Its hook for evals lasts until it is let go."""

    def __init__(self):
        self.inside, self.go_on, self.steps = threading.Event(), threading.Event(), []

    def on_eval(self, state, step_idx, eval_name, metrics):
        self.inside.set()
        self.go_on.wait(30)

    def on_checkpoint(self, state, row):
        self.inside.set()
        self.go_on.wait(30)

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps.append(step_idx)


def publish_on_a_thread(bus, event, raised):
    def publish():
        try:
            bus.publish(event)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    return thread


@pytest.mark.parametrize("held", [Eval(None, 100, "e", {}), Checkpoint(None, None)])
def test_what_waits_for_a_hook_that_outlasts_the_deadline_is_recorded_without_hooks(held, tmp_path, step_end, caplog):
    holds, raised, journal = Holds(), [], tmp_path / "journal"
    with EventBus([holds], journal=journal, publish_patience_seconds=0.02, drain_timeout=0.1) as bus:
        thread = publish_on_a_thread(bus, held, raised)
        assert holds.inside.wait(10)
        for step in range(3):
            bus.publish(step_end(step))
    assert (bus.receipt.without_hooks, bus.receipt.dropped, bus.receipt.recorded) == (3, 0, 4)
    holds.go_on.set()
    thread.join()
    assert raised == []
    assert holds.steps == []
    found = read_events(journal)
    assert [event.step_idx for event in found if isinstance(event, StepEnd)] == [0, 1, 2]
    assert sum(type(event) is type(held) for event in found) == 1
    assert (bus.health().without_hooks, bus.health().dropped, bus.health().journal.recorded) == (3, 0, 4)
    assert "publish.without_hooks" in caplog.text


def test_what_waits_for_a_hook_that_ends_before_the_deadline_meets_its_hooks(tmp_path, step_end):
    holds, raised = Holds(), []
    with EventBus([holds], journal=tmp_path / "journal", publish_patience_seconds=0.02, drain_timeout=30) as bus:
        thread = publish_on_a_thread(bus, Eval(None, 100, "e", {}), raised)
        assert holds.inside.wait(10)
        bus.publish(step_end(7))
        threading.Timer(0.3, holds.go_on.set).start()
    thread.join()
    assert (holds.steps, raised) == ([7], [])
    assert (bus.receipt.without_hooks, bus.receipt.dropped, bus.receipt.recorded) == (0, 0, 2)


async def test_an_async_exit_lets_its_loop_turn_while_it_waits_for_a_hook_that_needs_it(tmp_path, step_end):
    import asyncio

    loop, raised, steps = asyncio.get_running_loop(), [], []
    inside = threading.Event()

    async def answer():
        await asyncio.sleep(0.1)
        return 42

    class Asks(Callback):
        def on_eval(self, state, step_idx, eval_name, metrics):
            inside.set()
            steps.append(asyncio.run_coroutine_threadsafe(answer(), loop).result(10))

        def on_step_end(self, state, step_idx, batch, metrics):
            steps.append(step_idx)

    async with EventBus([Asks()], journal=tmp_path / "journal", publish_patience_seconds=0.01) as bus:
        thread = publish_on_a_thread(bus, Eval(None, 0, "e", {}), raised)
        assert inside.wait(10)
        bus.publish(step_end(7))
    thread.join()
    assert (steps, raised) == ([42, 7], [])
    assert bus.receipt.recorded == 2


# -- a disk that refuses -----------------------------------------------------------------------------------------------


class Refuses(OsDisk):
    """A disk that takes no event for a while."""

    def __init__(self, number):
        self.number, self.refuses, self.tries = number, False, 0

    def write(self, file, data, /):
        if self.refuses:
            self.tries += 1
            raise OSError(self.number, os.strerror(self.number))
        return os.write(file, data)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_events_that_wait_for_the_disk_get_what_is_left_of_the_deadline(number, tmp_path, step_end, followed):
    disk = Refuses(number)
    writer = JournalWriter(tmp_path / "journal", disk=disk, reserve_bytes=0, flush_seconds=60)
    with EventBus(followed(), journal=writer, couriers="thread", drain_timeout=30) as bus:
        bus.publish(step_end(0, v=0.0))
        disk.refuses = True
        for step in range(1, 200):
            bus.publish(step_end(step, v=0.0))
        assert bus.health().journal.unrecorded == 199

        def mend():
            disk.refuses = False

        threading.Timer(0.4, mend).start()
    assert (bus.receipt.recorded, bus.receipt.unrecorded) == (200, 0)
    assert bus.receipt.deliveries[0].delivered == 200
    assert bus.receipt.seconds < 20


def test_without_a_deadline_the_disk_is_tried_once_and_the_receipt_counts_what_is_lost(tmp_path, step_end):
    disk = Refuses(errno.ENOSPC)
    writer = JournalWriter(tmp_path / "journal", disk=disk, reserve_bytes=0, flush_seconds=60)
    with EventBus([], journal=writer, drain_timeout=0) as bus:
        bus.publish(step_end(0))
        disk.refuses = True
        for step in range(1, 6):
            bus.publish(step_end(step))
        disk.tries = 0
    assert disk.tries == 1
    assert (bus.receipt.recorded, bus.receipt.unrecorded) == (1, 5)
    assert len(read_events(tmp_path / "journal")) == 1
