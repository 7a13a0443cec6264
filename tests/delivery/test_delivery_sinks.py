"""What a sink's author is promised: what becomes of a batch, for everything that `open` and `write` may do."""

import asyncio
import logging
import math
import subprocess
import sys
import time
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evsys_bus import Eval, EventBus, LoopState, StepEnd
from evsys_bus.delivery.sink_receiver import (
    MAX_ABANDONED_CALLS,
    MAX_CONSECUTIVE_DEAD,
    UNKNOWN_ERROR_ATTEMPTS,
    SinkReceiver,
)
from evsys_bus.errors import BatchTooLargeError, ParkedError, RejectedError, RetryLaterError
from evsys_bus.events import Envelope, Event
from evsys_bus.sink import BatchResult, Sink
from support.waiting import wait_until, wait_until_async


class SinkTested(Event, frozen=True):
    number: int


class Seconds:
    """Virtual time: it passes when someone sleeps."""

    def __init__(self):
        self.now = 0.0
        self.pauses = []

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Model(Sink):
    """Does what ``act(numbers)`` says, and holds what that did not refuse."""

    write_timeout_seconds = 5.0

    def __init__(self, act=lambda numbers: None):
        self.act = act
        self.calls = []
        self.held = []

    async def write(self, batch):
        numbers = [envelope.event.number for envelope in batch]
        self.calls.append(numbers)
        count = self.act(numbers)
        self.held += numbers[:count]
        return count


class Followed:
    """A receiver, and what came of it."""

    def __init__(self, sink, **settings):
        self.time = Seconds()
        self.reports = []
        self.dead = {}
        self.done = 0
        settings = {"grace_seconds": 0.05, "close_seconds": 0.1} | settings
        self.receiver = SinkReceiver(sink, sleep=self.time.sleep, random=Random(1), **settings)

    async def open(self):
        await self.receiver.open(self.reports.append)
        return self

    async def deliver(self, count, *, at_once=500, size=10):
        """Hand over the events 0 to ``count``, as a courier does: what was not taken comes again."""
        events = [Envelope("s", number + 1, 0.0, SinkTested(number)) for number in range(count)]
        while self.done < count:
            batch = events[self.done : self.done + at_once]
            taken = await self.receiver.deliver(batch, [size] * len(batch))
            assert 1 <= taken.handled <= len(batch)
            assert all(0 <= index < taken.handled for index in taken.rejected)
            self.dead |= {self.done + index: why for index, why in taken.rejected.items()}
            self.done += taken.handled
        return self


async def delivered(sink, count, **options):
    return await (await Followed(sink).open()).deliver(count, **options)


def first_then(faults, act=lambda numbers: None):
    """Raise these, one a call; then do as ``act``."""
    left = list(faults)

    def acted(numbers):
        if left:
            raise left.pop(0)
        return act(numbers)

    return acted


def failing_on(*bad, error=KeyError):
    def act(numbers):
        for number in numbers:
            if number in bad:
                raise error(f"no {number}")

    return act


async def test_a_sink_that_is_down_for_ten_minutes_loses_nothing_and_is_asked_now_and_then():
    def away(numbers):
        if followed.time.now < 600:
            raise ConnectionRefusedError("nobody listens")

    sink = Model(away)
    followed = await Followed(sink).open()
    await followed.deliver(50)
    assert sink.held == list(range(50))
    assert not followed.dead
    pauses = followed.time.pauses
    assert 0.05 <= pauses[0] <= 0.1
    assert all(0.05 * 2**n <= pause <= 0.1 * 2**n for n, pause in enumerate(pauses[:8]))
    assert all(15 <= pause <= 30 for pause in pauses[9:])
    assert len(set(pauses)) == len(pauses), "no jitter"
    assert 20 <= len(pauses) <= 60
    assert 600 <= followed.time.now <= 630
    assert followed.reports[-1] is None
    assert [each.attempts for each in followed.reports[:-1]] == list(range(1, len(pauses) + 1))
    assert {(each.state, each.error, each.fix) for each in followed.reports[:-1]} == {
        ("retrying", "ConnectionRefusedError: nobody listens", None)
    }


@pytest.mark.parametrize("error", [RetryLaterError("busy"), OSError("x"), TimeoutError(), ConnectionResetError()])
async def test_what_passes_is_tried_again_without_a_limit(error):
    sink = Model(first_then([error] * 100))
    followed = await delivered(sink, 3)
    assert sink.calls == [[0, 1, 2]] * 101
    assert not followed.dead


async def test_a_pause_is_never_shorter_than_the_destination_asked_for():
    sink = Model(first_then([RetryLaterError("busy", after_seconds=45), *[RetryLaterError("", after_seconds=0.5)] * 9]))
    followed = await delivered(sink, 1)
    assert followed.time.pauses[0] == 45
    assert all(pause >= 0.5 for pause in followed.time.pauses)
    assert followed.time.pauses[-1] >= 15, "pauses grow beyond what it asked for"


@pytest.mark.parametrize("after", ["120", math.nan, math.inf, -1, None])
async def test_a_strange_request_to_wait_harms_nothing(after):
    followed = await delivered(Model(first_then([RetryLaterError("busy", after_seconds=after)])), 1)
    assert 0.05 <= followed.time.pauses[0] <= 86_400


async def test_a_parked_sink_is_tried_every_minute_and_says_what_mends_it():
    sink = Model(first_then([ParkedError("the key is wrong", fix="set KEY")] * 7))
    followed = await delivered(sink, 2)
    assert followed.time.pauses == [60.0] * 7
    report = followed.reports[6]
    assert (report.state, report.error, report.fix) == ("parked", "ParkedError: the key is wrong", "set KEY")
    assert report.attempts == 7
    assert followed.reports[-1] is None
    assert sink.held == [0, 1]


async def test_rejected_events_are_dead_with_their_reasons_and_the_others_delivered(caplog):
    def picky(numbers):
        raise RejectedError({1: "no name", 3: "too old", 99: "?", -1: "?"})

    sink = Model(picky)
    followed = await delivered(sink, 4)
    assert followed.dead == {1: "no name", 3: "too old"}
    assert followed.done == 4
    assert len(sink.calls) == 1
    (line,) = [each for each in caplog.records if "sink.rejected_unknown" in each.message]
    assert line.outside == 2


async def test_a_batch_that_is_too_large_is_halved_until_it_fits():
    def small(numbers):
        if len(numbers) > 100:
            raise BatchTooLargeError("100 at most")

    sink = Model(small)
    followed = await delivered(sink, 1000)
    assert sink.held == list(range(1000))
    assert not followed.dead
    assert not followed.time.pauses
    assert len(sink.calls) <= 30


async def test_one_event_that_is_too_large_by_itself_is_dead():
    def narrow(numbers):
        if 7 in numbers:
            raise BatchTooLargeError("1 MB at most")

    sink = Model(narrow)
    followed = await delivered(sink, 500)
    assert followed.dead == {7: "BatchTooLargeError: 1 MB at most"}
    assert sink.held == [number for number in range(500) if number != 7]
    assert sink.calls[-1] == list(range(8, 500)), "the ones behind it go at once again"


@pytest.mark.parametrize("bad", [0, 123, 499])
async def test_an_unknown_failure_is_tried_five_times_and_then_found(bad):
    sink = Model(failing_on(bad))
    followed = await delivered(sink, 500)
    assert followed.dead == {bad: f"KeyError: 'no {bad}'"}
    assert sink.held == [number for number in range(500) if number != bad]
    assert sink.calls[:UNKNOWN_ERROR_ATTEMPTS] == [list(range(500))] * UNKNOWN_ERROR_ATTEMPTS
    assert sink.calls.count([bad]) == UNKNOWN_ERROR_ATTEMPTS
    assert len(sink.calls) <= 2 * UNKNOWN_ERROR_ATTEMPTS + 20
    assert len(followed.time.pauses) == 2 * (UNKNOWN_ERROR_ATTEMPTS - 1)
    assert followed.reports[-1] is None


async def test_an_unknown_failure_that_passes_costs_nothing():
    sink = Model(first_then([KeyError("x")] * (UNKNOWN_ERROR_ATTEMPTS - 1)))
    followed = await delivered(sink, 10)
    assert (sink.held, followed.dead) == (list(range(10)), {})


async def test_bad_events_among_good_ones_never_stop_the_delivery():
    bad = set(range(0, 300, 3))
    followed = await delivered(Model(failing_on(*bad)), 300)
    assert set(followed.dead) == bad


async def test_a_sink_that_fails_on_every_event_gives_up_three_and_is_parked_until_it_takes_one():
    broken_until = 7200

    def broken(numbers):
        if followed.time.now < broken_until:
            raise AttributeError(f"attempt {followed.time.now}")

    sink = Model(broken)
    followed = await Followed(sink).open()
    await followed.deliver(1000)
    assert set(followed.dead) == {0, 1, 2}
    assert len(followed.dead) == MAX_CONSECUTIVE_DEAD
    assert sink.held == list(range(3, 1000))
    parked = [each for each in followed.reports if each is not None and each.state == "parked"]
    assert len(parked) > 100
    assert "fix the sink" in parked[0].fix
    assert followed.reports[-1] is None


async def test_what_a_sink_took_in_part_is_done_and_the_rest_comes_again():
    sink = Model(lambda numbers: min(3, len(numbers)))
    followed = await delivered(sink, 10)
    assert sink.calls == [list(range(10)), list(range(3, 10)), list(range(6, 10)), [9]]
    assert sink.held == list(range(10))
    assert not followed.time.pauses


WRONG_RESULTS = [BatchResult(0), BatchResult(11), BatchResult(True), BatchResult(1, {3: "x"}), BatchResult(2, ["x"])]


async def test_a_sink_says_in_what_it_returns_which_events_it_rejects():
    class Table(Sink):
        async def write(self, batch):
            return BatchResult(delivered=2, rejected={1: "no such column"})

    followed = await Followed(Table()).open()
    events = [Envelope("s", number, 0.0, SinkTested(number)) for number in range(1, 5)]
    result = await followed.receiver.deliver(events, [9] * 4)
    assert (result.delivered, result.handled, result.rejected) == (2, 3, {1: "no such column"})
    assert followed.reports == []


async def test_a_healthy_wait_is_a_state_of_its_own_and_no_warning(caplog):
    def act(numbers):
        if answers:
            raise answers.pop()

    answers = [RetryLaterError("cp-9 is waiting to be uploaded", after_seconds=3, waiting=True)]
    followed = await delivered(Model(act), 1)
    report, end = followed.reports
    assert (report.state, report.error, end) == ("waiting", "RetryLaterError: cp-9 is waiting to be uploaded", None)
    assert report.last_error is None
    assert followed.time.pauses == [3]
    assert not caplog.records


@pytest.mark.parametrize("value", [0, -1, 11, True, False, "10", 10.0, 10**50, object(), *WRONG_RESULTS])
async def test_a_number_that_cannot_be_is_a_failure_that_is_tried_again(value):
    class Odd(Sink):
        async def write(self, batch):
            return values.pop(0) if values else None

    values = [value] * 8
    followed = await delivered(Odd(), 10)
    assert not values
    assert not followed.dead
    assert followed.reports[0].error.startswith("RetryLaterError: write returned")


async def test_a_write_that_takes_too_long_is_cancelled_and_tried_again():
    class Slow(Model):
        write_timeout_seconds = 0.02
        ended = 0

        async def write(self, batch):
            await super().write(batch)
            if len(self.calls) < 3:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.ended += 1

    sink = Slow()
    followed = await delivered(sink, 2)
    assert (len(sink.calls), sink.ended, followed.receiver.abandoned_calls) == (3, 2, 0)
    assert followed.reports[0].error == "TimeoutError: it took longer than 0.02 s"


async def wait_stubbornly(released):
    """Ignore every cancellation; but give in after 3 s, so that what is broken fails a test and does not hang it."""
    ends = asyncio.get_running_loop().time() + 3
    while not released.is_set() and asyncio.get_running_loop().time() < ends:
        try:
            async with asyncio.timeout_at(ends):
                await released.wait()
        except (asyncio.CancelledError, TimeoutError):
            pass


class Stubborn(Model):
    """Ignores every cancellation until it is released."""

    write_timeout_seconds = 0.01

    def __init__(self):
        super().__init__()
        self.released = asyncio.Event()
        self.running = 0
        self.most_running = 0

    async def write(self, batch):
        await super().write(batch)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await wait_stubbornly(self.released)
        self.running -= 1


async def test_writes_that_swallow_cancellation_are_left_behind_and_never_more_than_a_few():
    sink = Stubborn()
    followed = await Followed(sink, grace_seconds=0.01).open()
    delivery = asyncio.create_task(followed.deliver(2))
    await wait_until_async(lambda: any("waiting for one to end" in each.error for each in followed.reports if each))
    for _ in range(20):
        await asyncio.sleep(0.005)  # a fourth would be made now
    assert sink.running == sink.most_running == followed.receiver.abandoned_calls == MAX_ABANDONED_CALLS
    assert "abandoned" in followed.reports[0].error
    sink.released.set()
    await asyncio.wait_for(delivery, 5)
    assert followed.reports[-1] is None
    assert sink.most_running == MAX_ABANDONED_CALLS


@pytest.mark.parametrize("calls", [1, MAX_ABANDONED_CALLS], ids=["in a write", "waiting for one to end"])
async def test_a_courier_that_stops_is_let_go_even_by_a_sink_that_swallows_cancellation(calls):
    sink = Stubborn()
    sink.write_timeout_seconds = 0.01 if calls > 1 else 60
    followed = await Followed(sink).open()
    delivery = asyncio.create_task(followed.deliver(2))
    await wait_until_async(lambda: len(sink.calls) == calls)
    began = asyncio.get_running_loop().time()
    delivery.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivery
    await followed.receiver.close()
    assert asyncio.get_running_loop().time() - began < 1
    sink.released.set()
    await wait_until_async(lambda: not sink.running)


async def test_a_courier_that_stops_ends_the_write_that_is_under_way():
    class Tidy(Model):
        tidied = False

        async def write(self, batch):
            await super().write(batch)
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                self.tidied = True

    sink = Tidy()
    followed = await Followed(sink).open()
    delivery = asyncio.create_task(followed.deliver(1))
    await wait_until_async(lambda: sink.calls)
    delivery.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivery
    assert sink.tidied


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, BaseException])
async def test_what_is_no_exception_ends_neither_loop_nor_delivery(error):
    sink = Model(failing_on(2, error=error))
    followed = await delivered(sink, 5)
    assert followed.dead == {2: f"RuntimeError: it raised {error.__name__}"}
    assert sink.held == [0, 1, 3, 4]


async def test_a_sink_that_cancels_its_own_task_has_failed():
    class Own(Model):
        async def write(self, batch):
            if len(self.calls) < 3:
                asyncio.current_task().cancel()
            return await super().write(batch)

    sink = Own()
    followed = await delivered(sink, 5)
    assert len(sink.calls) == 4
    assert followed.reports[0].error == "RuntimeError: it cancelled its own task"


async def test_an_exception_that_cannot_be_told_is_one_like_others():
    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    followed = await delivered(Model(failing_on(1, error=MuteError)), 3)
    assert followed.dead == {1: "MuteError"}
    followed = await delivered(Model(failing_on(1, error=lambda _: ValueError("\ud800" + "x" * 9999))), 3)
    assert followed.dead[1].startswith("ValueError: ?xx")
    assert len(followed.dead[1].encode()) <= 2000


async def test_a_sink_that_changes_the_batch_it_is_given_changes_nothing():
    class Takes(Model):
        async def write(self, batch):
            assert isinstance(batch, tuple)
            return await super().write(batch)

    await delivered(Takes(), 5)


async def test_a_batch_above_the_bounds_is_given_in_parts():
    sink = Model()
    sink.max_batch_events, sink.max_batch_bytes = 4, 35
    await delivered(sink, 7)
    assert sink.calls == [[0, 1, 2], [3, 4, 5], [6]]
    sink.calls.clear()
    await delivered(sink, 2, size=1000)
    assert sink.calls == [[0], [1]]
    sink.max_batch_bytes = 1000
    sink.calls.clear()
    await delivered(sink, 5)
    assert sink.calls == [[0, 1, 2, 3], [4]]


class Doors(Model):
    """Opens after some faults."""

    def __init__(self, *faults, closing=None):
        super().__init__()
        self.faults = list(faults)
        self.closing = closing
        self.opened = 0
        self.closed = 0

    async def open(self):
        self.opened += 1
        if self.faults:
            raise self.faults.pop(0)

    async def close(self):
        self.closed += 1
        if self.closing is not None:
            raise self.closing


async def test_opening_follows_the_rules_of_writing():
    faults = [*[OSError("away")] * 50, ParkedError("who are you?"), *[KeyError("x")] * (UNKNOWN_ERROR_ATTEMPTS - 1)]
    sink = Doors(*faults)
    followed = await Followed(sink).open()
    assert sink.opened == 50 + 1 + UNKNOWN_ERROR_ATTEMPTS
    assert [each.state for each in followed.reports[:-1]].count("parked") == 1
    assert followed.time.pauses[50] == 60
    assert followed.reports[-1] is None


async def test_a_sink_that_cannot_be_opened_is_at_fault():
    sink = Doors(*[KeyError("x")] * 50)
    with pytest.raises(KeyError):
        await Followed(sink).open()
    assert sink.opened == UNKNOWN_ERROR_ATTEMPTS
    with pytest.raises(RuntimeError, match="it raised SystemExit"):
        await Followed(Doors(*[SystemExit(1)] * 50)).open()


async def test_a_sink_is_closed_once_and_what_that_raises_is_logged(caplog):
    sink = Doors(closing=SystemExit(3))
    followed = await Followed(sink).open()
    await followed.receiver.close()
    assert sink.closed == 1
    assert "sink.close_failed" in caplog.text
    never = Doors()
    await Followed(never).receiver.close()
    assert never.closed == 0


@pytest.mark.parametrize(
    ("task", "failures"),
    [("ends", 0), ("raises", 1), ("hangs", 1)],
)
def test_tasks_that_a_sink_does_not_await_are_waited_for_at_the_close_and_counted(tmp_path, caplog, task, failures):
    ended = []

    class Strays(Model):
        async def write(self, batch):
            asyncio.create_task(self.work(), name=f"stray {len(batch)}")

        async def work(self):
            await asyncio.sleep(100 if task == "hangs" else 0.1)
            if task == "raises":
                raise ConnectionError("no route")
            ended.append(True)

    with EventBus(sinks=[Strays()], journal=tmp_path / "journal", couriers="thread", drain_timeout=2) as bus:
        bus.publish(Eval(None, 1, "val", {"accuracy": 0.5}))
    (status,) = bus.receipt.deliveries
    assert (status.delivered, status.task_failures, ended) == (1, failures, [True] if task == "ends" else [])
    assert (status.last_failure or "").startswith("task stray 1: " if failures else "")
    assert ("sink.task_failed sink=" in caplog.text) == bool(failures)


async def test_a_close_that_never_returns_is_left(caplog):
    class Endless(Model):
        async def close(self):
            await wait_stubbornly(released)

    released = asyncio.Event()
    followed = await Followed(Endless()).open()
    async with asyncio.timeout(2):
        await followed.receiver.close()
    assert "sink.close_failed" in caplog.text
    released.set()


def test_a_sink_keeps_a_mark_and_is_introduced_only_if_it_asks_for_that():
    class Account(Model):
        seen = ()

        def mark(self):
            return {"size": 3}

        def rewind(self, mark):
            self.seen += (mark,)

        def resume_runs(self, starts):
            self.seen += (len(starts),)

    plain = SinkReceiver(Model())
    plain.rewind({"size": 3})
    plain.resume_runs([])
    assert plain.mark() is None
    sink = Account()
    receiver = SinkReceiver(sink)
    assert receiver.mark() == {"size": 3}
    receiver.rewind(None)
    receiver.rewind({"size": 2})
    receiver.resume_runs([Envelope("s", 1, 0.0, SinkTested(0))])
    assert sink.seen == ({"size": 2}, 1)


async def test_retries_are_logged_with_the_sink_and_the_traceback_of_what_is_unknown(caplog):
    await delivered(Model(first_then([KeyError("x"), OSError("away")])), 1)
    unknown, known = [each for each in caplog.records if "sink.retrying" in each.message]
    assert (unknown.sink, unknown.levelno) == ("Model", logging.WARNING)
    assert unknown.exc_info
    assert not known.exc_info


def test_the_retry_library_is_loaded_by_the_first_delivery_only():
    program = "import sys, evsys_bus, evsys_bus.delivery.sink_receiver; print('tenacity' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


OUTCOMES = ["ok", "part", "retry", "parked", "reject", "too large", "unknown", "exit", "lost ack"]


@settings(max_examples=150, deadline=None)
@given(
    script=st.lists(st.tuples(st.sampled_from(OUTCOMES), st.integers(1, 4)), max_size=60),
    bad=st.sets(st.integers(0, 39), max_size=2),
    at_once=st.integers(1, 40),
)
async def test_every_event_ends_delivered_or_dead_and_in_order_whatever_the_sink_does(script, bad, at_once):
    turns = [outcome for outcome, times in script for _ in range(times)]
    unsure = set()  # held, and then said to have failed
    mended_at = 86_400

    class Any(Model):
        async def write(self, batch):
            numbers = [envelope.event.number for envelope in batch]
            self.calls.append(numbers)
            outcome = turns.pop(0) if turns else "ok"
            refused = bad & set(numbers) if followed.time.now < mended_at else set()
            if outcome == "part":
                count = next((n for n, each in enumerate(numbers) if each in refused), len(numbers) // 2)
                self.held += numbers[:count]
                return count
            if outcome == "reject":
                dead = {0: "no"} | {numbers.index(each): "no" for each in refused}
                self.held += [each for n, each in enumerate(numbers) if n not in dead]
                raise RejectedError(dead)
            if outcome == "lost ack":
                unsure.update(numbers)
                self.held += numbers
            if outcome != "ok":
                error = {
                    "retry": ConnectionError,
                    "parked": lambda: ParkedError("no"),
                    "too large": lambda: BatchTooLargeError("no"),
                    "unknown": KeyError,
                    "exit": SystemExit,
                    "lost ack": ValueError,
                }[outcome]
                raise error()
            if refused:
                raise KeyError("bad")
            self.held += numbers
            return None

    sink = Any()
    followed = await Followed(sink).open()
    await followed.deliver(40, at_once=at_once)
    held, dead = set(sink.held), set(followed.dead)
    assert held | dead == set(range(40))
    assert held & dead <= unsure
    firsts = list(dict.fromkeys(sink.held))
    assert firsts == sorted(firsts)
    assert all(sink.held.count(number) == 1 for number in held - unsure)
    assert bad <= dead | unsure or followed.time.now >= mended_at


async def test_what_a_write_says_that_was_judged_late_counts_for_nothing():
    """It ran out of time, and swallowed its cancellation; then it was stopped in the pause before the next attempt."""

    class Swallows(Sink):
        write_timeout_seconds = 0.01

        async def write(self, batch):
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                return len(batch)

    paused = asyncio.Event()

    async def pause(seconds):
        paused.set()
        await asyncio.sleep(30)

    receiver = SinkReceiver(Swallows(), sleep=pause)
    await receiver.open(lambda trouble: None)
    taking = asyncio.ensure_future(receiver.deliver([Envelope("s", 1, 0.0, SinkTested(1))], [10]))
    await paused.wait()
    taking.cancel()
    await asyncio.wait([taking])
    assert receiver.interrupted_result() is None
    await receiver.close()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_sink_may_have_an_event_at_once_where_the_last_batch_is_long_ago(tmp_path, at_once):
    class Viewed(Sink):
        max_batch_seconds = 0.6
        first_at_once = at_once

        def __init__(self):
            self.seconds = []

        async def write(self, batch):
            self.seconds += [time.time() - each.time for each in batch if isinstance(each.event, StepEnd)]

    sink = Viewed()
    with EventBus([sink], journal=tmp_path / "journal") as bus:
        for step in (0, 1, 2):
            bus.publish(StepEnd(LoopState(step, 3, tmp_path), step, metrics={"loss": 1.0}))
            wait_until(lambda: len(sink.seconds) > step)  # noqa: B023 # called before the next turn
            time.sleep(0.7)
    assert (max(sink.seconds) < 0.6) is at_once, sink.seconds
