"""What attackers found in the couriers, mended: each was seen to fail."""

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from evsys_bus import Callback, Envelope, Event, EventBus, Sink, follow
from evsys_bus.bus.delivery_manager import FailurePolicy
from evsys_bus.delivery.courier_pool import CourierPool
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.sink_receiver import UNKNOWN_ERROR_ATTEMPTS, SinkReceiver
from evsys_bus.delivery.subscription import DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.journal import JournalWriter, RetentionPolicy, layout
from evsys_bus.sink import BatchResult
from evsys_bus.tasks import DeliveryStatus, LoopThread
from evsys_bus.testing import FailingSink, RecordingSink
from support.waiting import wait_until


class Tick(Event, frozen=True):
    number: int


def account(recorded, delivered, **state):
    return DeliveryStatus("a", recorded, delivered, 0, recorded - delivered, busy=True, **state)


def guard(**terms):
    return FailurePolicy([Subscription("a", policy=DeliveryPolicy(**terms))])


def seconds_until_reason(watch, make_status):
    """Check one status after the other until the run must stop; returns how long that took."""
    began = time.monotonic()

    def check():
        watch.check([make_status()], gave_up=False)
        return watch.reason

    wait_until(check)
    return time.monotonic() - began


def test_a_delivery_that_is_never_quite_done_but_always_close_behind_is_not_stale():
    watch = guard(max_staleness_seconds=0.05)
    for number in range(100):
        watch.check([account(50 * number + 25, 50 * number)], gave_up=False)
        time.sleep(0.002)
    assert watch.reason is None


def test_a_delivery_that_stands_still_is_stale_once_its_patience_is_over():
    watch = guard(max_staleness_seconds=0.1)
    numbers = itertools.count()
    assert seconds_until_reason(watch, lambda: account(50 * next(numbers) + 25, 10)) >= 0.1


def test_failing_is_timed_by_our_own_clock_and_through_couriers_that_begin_anew():
    watch = guard(stop_after_seconds=0.1)
    states = itertools.cycle([{"state": "retrying", "pid": 1, "failing_since": 1e9}, {"state": "failed", "pid": 2}])
    assert seconds_until_reason(watch, lambda: account(5, 0, **next(states))) >= 0.1


def test_what_was_wrong_on_another_day_is_forgotten_where_nobody_delivers(tmp_path):
    directory = str(tmp_path / "journal")
    followed = [Subscription("a", instance=RecordingSink())]
    register(directory, followed)
    state = Path(layout.courier_path(directory, "a", "state.json"))
    state.write_bytes(b'{"state":"failed","pid":1,"at":1.0,"error":"no key"}')
    register(directory, followed)
    assert not state.exists()


@pytest.mark.parametrize("journal", [True, False], ids=["journal", "temporary"])
def test_one_whose_books_cannot_be_written_is_on_the_receipt_with_all_of_it_pending(tmp_path, journal):
    name = "数" * 90
    bus = EventBus(
        sinks=[follow(RecordingSink(), name)], journal=tmp_path / "journal" if journal else None, drain_timeout=2
    )
    with bus:
        for number in range(10):
            bus.publish(Tick(number))
    (delivery,) = bus.receipt.deliveries
    assert (delivery.name, delivery.recorded, delivery.pending) == (name, 10, 10)
    assert bus.receipt.resume_command is not None
    assert Path(bus.receipt.journal).is_dir()


def test_an_exception_without_words_makes_one_dead_letter_and_repeats_nothing(tmp_path):
    class WordlessError(Exception):
        def __str__(self):
            raise RuntimeError("no words")

    class Raises(Callback):
        def __init__(self):
            self.called = []

        def on_tick(self, number):
            self.called.append(number)
            if number == 2:
                raise WordlessError

    callback = Raises()
    with EventBus([follow(callback, "a", on_failure="dead")], journal=tmp_path / "journal") as bus:
        for number in range(5):
            bus.publish(Tick(number))
    assert callback.called == [0, 1, 2, 3, 4]
    assert [(each.delivered, each.dead, each.pending) for each in bus.receipt.deliveries] == [(4, 1, 0)]


async def test_an_outage_seen_through_a_task_group_is_an_outage():
    outage = ExceptionGroup("unhandled errors in a TaskGroup", [ConnectionRefusedError("away")])
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    receiver = SinkReceiver(FailingSink([outage] * (UNKNOWN_ERROR_ATTEMPTS + 2)), sleep=sleep)
    await receiver.open(lambda trouble: None)
    assert await receiver.deliver([Envelope("s", 1, 0.0, Tick(1))], [10]) == BatchResult(1)
    assert len(pauses) == UNKNOWN_ERROR_ATTEMPTS + 2
    await receiver.close()


def test_one_who_waits_for_anothers_lock_ends_when_nothing_is_pending(tmp_path):
    directory = str(tmp_path / "journal")
    with EventBus(sinks=[RecordingSink()], journal=directory) as bus:
        bus.publish(Tick(1))
        while bus.health().deliveries[0].pending:
            time.sleep(0.01)
        second = CourierPool(directory, [Subscription("RecordingSink", instance=RecordingSink())], _never)
        second.start()
        second.finish()
        assert second.join(5)


def _never(recipe):
    raise AssertionError(recipe)


def test_a_sink_that_cancels_every_task_is_shown_and_begun_again(tmp_path):
    class Cancels(Sink):
        calls = 0

        async def write(self, batch):
            Cancels.calls += 1
            if Cancels.calls == 1:
                for task in asyncio.all_tasks():
                    task.cancel()
                await asyncio.sleep(10)

    directory = str(tmp_path / "journal")
    with EventBus([], journal=directory) as bus:
        bus.publish(Tick(1))
    crew = CourierPool(directory, [Subscription("a", instance=Cancels())], _never, restart_seconds=0.01)
    crew.start()
    while not any(each.delivered for each in read_progress(directory)):
        time.sleep(0.01)
    crew.finish()
    assert crew.join(5)


def test_a_task_that_stops_its_loop_stops_nothing():
    thread = LoopThread()
    loop = thread.loop()
    loop.call_soon_threadsafe(loop.stop)
    done = asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05, "on"), loop)
    assert done.result(5) == "on"
    thread.stop()


def test_a_follower_of_other_ranks_holds_up_no_retention(tmp_path):
    directory = tmp_path / "journal"
    register(str(directory), [Subscription("a", instance=RecordingSink(), policy=DeliveryPolicy(ranks=(0,)))])
    writer = JournalWriter(
        directory, rank=1, segment_bytes=2000, retain=RetentionPolicy(max_bytes=4000), flush_seconds=60
    ).open()
    for _ in range(200):
        writer.append(bytes(100))
    writer.flush()
    assert sum(path.stat().st_size for path in directory.glob("r1-*/*.seg")) < 8000
    writer.close()


HOLDS = """
    import sys, time
    from pathlib import Path
    folder = sys.argv[1]
    sys.path.insert(0, folder)
    import holds_the_interpreter
    from evsys_bus import EventBus, build_callbacks, Event

    class Tick(Event, frozen=True):
        number: int

    holds = build_callbacks([{"kind": "holds"}])
    with EventBus(holds, journal=folder + "/journal", drain_timeout=1, linger_seconds=0.1) as bus:
        bus.publish(Tick(1))
        while not Path(folder, "inside").exists():
            time.sleep(0.01)
        print(bus.health().deliveries[0].pid, flush=True)
"""
HOLDER = """
import re
from pathlib import Path

from evsys_bus import Callback, Event, register_callback


class Tick(Event, frozen=True):
    number: int


@register_callback("holds")
class Holds(Callback):
    placement = "follow"

    def on_tick(self, number):
        Path(__file__).with_name("inside").touch()
        re.match("(a+)+$", "a" * 60 + "b")
"""


@pytest.mark.long
def test_a_hook_that_holds_the_interpreter_leaves_no_process_behind(tmp_path, program):
    (tmp_path / "holds_the_interpreter.py").write_text(HOLDER)
    out, errors = program(textwrap.dedent(HOLDS), str(tmp_path)).communicate(timeout=15)
    pid = int(out)
    deadline = time.monotonic() + 12
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists(), errors
    assert "holds_the_interpreter" in (tmp_path / "journal" / "couriers" / "process.log").read_text()


TWICE = """
    import asyncio, sys
    from evsys_bus import Event, EventBus
    from evsys_bus.testing import FailingSink

    class Tick(Event, frozen=True):
        number: int

    async def main():
        async with EventBus(sinks=[FailingSink(["hang"])], journal=sys.argv[1], drain_timeout=60) as bus:
            bus.publish(Tick(1))
            print("leaving", flush=True)
            AWAIT

    asyncio.run(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("body", ["pass", "await asyncio.sleep(3600)"])
def test_ctrl_c_twice_ends_the_wait_for_deliveries_at_once(tmp_path, body):
    script = tmp_path / "twice.py"
    script.write_text(textwrap.dedent(TWICE).replace("AWAIT", body))
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "journal"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"leaving\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode != 0
