"""A courier: every event of every stream, in order, to one adapter, and how far it has got on disk."""

import asyncio
import base64
import os
from collections import Counter
from pathlib import Path

import pytest

from evsys_bus import (
    Callback,
    Envelope,
    Event,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    LogContext,
    LoopArtifacts,
    LoopState,
    Metrics,
    RunStart,
    Sink,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.source import Batch, EventSource
from evsys_bus.delivery.subscription import AdapterRef, DeliveryPolicy
from evsys_bus.delivery.subscriptions import register
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import CourierBusyError, RetryLaterError
from evsys_bus.journal import Cursor, CursorStore, JournalReader, JournalWriter, OsClock, OsDisk, Position
from evsys_bus.sink import BatchResult
from evsys_bus.tasks import DeliveryStatus
from support.couriers import counted, deliver, read_dead_letters, read_status
from support.journals import read_records

TERMS = DeliveryPolicy(ranks=None)


class Kept:
    """A receiver that keeps what it is given."""

    max_events = 5
    max_bytes = 1 << 20
    max_seconds = 0.0

    def __init__(self, takes: int | None = None, refuses=()) -> None:
        self.batches: list[list[Envelope]] = []
        self.introduced: list[Envelope] = []
        self.marks: list[object] = []
        self.seen = asyncio.Event()
        self.wanted = 0
        self._takes = takes
        self._refuses = refuses

    @property
    def envelopes(self):
        return [each for batch in self.batches for each in batch]

    @property
    def numbers(self):
        return [each.seq for each in self.envelopes]

    async def open(self, report):
        pass

    async def deliver(self, batch, sizes):
        assert len(batch) == len(sizes) <= self.max_events
        done = len(batch) if self._takes is None else min(self._takes, len(batch))
        self.batches.append(list(batch[:done]))
        if len(self.envelopes) >= self.wanted:
            self.seen.set()
        rejected = {i: "refused" for i, each in enumerate(batch[:done]) if each.seq in self._refuses}
        return BatchResult(done - len(rejected), rejected)

    def interrupted_result(self):
        return None

    def resume_runs(self, starts):
        self.introduced += starts

    def mark(self):
        return len(self.envelopes)

    def rewind(self, mark):
        self.marks.append(mark)

    async def close(self, deadline=None, *, confirm=False):
        self.closed = True


class Stream:
    """A writer, and events that are quickly made."""

    def __init__(self, directory, rank=0, **options) -> None:
        self.writer = JournalWriter(directory, rank=rank, **options).open()
        self.rank = rank
        self.name = self.writer.stream
        self.ctx = LogContext(output_dir=Path("/out"), run_key="run-a")
        self.state = LoopState(step=0, num_steps=9, output_dir=Path("/out/run-a"), ctx=self.ctx)

    def envelope(self, event, run="run-a"):
        return encode(Envelope(self.name, self.writer.next_sequence, 1.0, event, run, self.rank))

    def add(self, event, run="run-a"):
        return self.writer.append(self.envelope(event, run))

    def steps(self, *steps):
        for step in steps:
            self.add(StepEnd(self.state, step, TrainingBatch(), {"loss": 0.5}))

    def start(self, event, run="run-a"):
        self.writer.append(self.envelope(event, run), essential=True)

    def run(self, *steps):
        self.start(RunStart(self.ctx))
        self.state.step = steps[0] if steps else 0
        self.start(TrainStart(self.state))
        self.steps(*steps)


@pytest.fixture
def stream(journal):
    stream = Stream(journal)
    yield stream
    stream.writer.close()


def names_in(folder):
    return sorted(each.name for each in Path(folder).iterdir())


def make_older(journal, stream):
    """As if it had been written before the machine was started, so that no writer goes on with it."""
    older = Path(journal, "r0-20200101T000000-00000000")
    Path(journal, stream.name).rename(older)
    lock = older / "lock"
    lock.write_bytes(lock.read_bytes().replace(b'"boot":"', b'"boot":"another'))


def segments_of(journal, stream):
    return sorted(Path(journal, stream.name).glob("*.seg"))


def spread(stream):
    """A log of which stream each event is from, without its repeats in a row."""
    return [name for i, name in enumerate(stream) if i == 0 or stream[i - 1] != name]


async def test_everything_is_delivered_once_and_in_order(journal, stream):
    stream.steps(*range(23))
    kept = Kept()
    await deliver(journal, kept)
    assert kept.numbers == list(range(1, 24))
    assert [len(each) for each in kept.batches] == [5, 5, 5, 5, 3]


async def test_a_second_courier_goes_on_where_the_first_one_ended(journal, stream):
    stream.steps(*range(7))
    await deliver(journal, Kept())
    stream.steps(7, 8)
    kept = Kept()
    await deliver(journal, kept)
    assert kept.numbers == [8, 9]
    assert kept.marks == [7]


async def test_what_comes_while_it_runs_is_delivered(journal, stream):
    kept = Kept()
    courier = Courier(journal, "it", kept, TERMS)

    async def write():
        for step in range(50):
            stream.steps(step)
            await asyncio.sleep(0)
        kept.wanted = 50
        await asyncio.wait_for(kept.seen.wait(), 10)
        courier.finish()

    kept.wanted = 50
    await asyncio.gather(courier.run(), write())
    assert kept.numbers == list(range(1, 51))


async def test_a_part_that_is_taken_moves_the_cursor_as_far_and_the_rest_comes_again(journal, stream):
    stream.steps(*range(7))
    kept = Kept(takes=2)
    await deliver(journal, kept)
    assert kept.numbers == list(range(1, 8))
    assert CursorStore(journal).load("it").position(stream.name) == Position(7, 7, 0)


async def test_a_batch_holds_no_more_bytes_than_it_may_unless_it_is_one_event(journal, stream):
    stream.steps(*range(6))
    size = len(next(JournalReader(journal).read(stream.name)).payload)
    kept = Kept()
    kept.max_bytes = 2 * size + 5
    await deliver(journal, kept)
    assert [len(each) for each in kept.batches] == [2, 2, 2]
    small = Kept()
    small.max_bytes = 1
    await deliver(journal, small, name="small")
    assert [len(each) for each in small.batches] == [1] * 6


async def test_a_batch_ends_with_a_start_or_an_end_and_the_cursor_stands_behind_it_at_once(journal, stream):
    stream.run(0, 1)
    places = []

    class Looks(Kept):
        async def deliver(self, batch, sizes):
            places.append(CursorStore(journal).load("it").position(stream.name).sequence)
            return await super().deliver(batch, sizes)

    kept = Looks()
    await deliver(journal, kept)
    assert [[type(each.event) for each in batch] for batch in kept.batches] == [
        [RunStart],
        [TrainStart],
        [StepEnd, StepEnd],
    ]
    assert places == [0, 1, 2]


async def test_a_batch_waits_for_more_as_long_as_its_receiver_says(journal, stream):
    kept = Kept()
    kept.max_seconds = 60.0
    kept.wanted = 5
    stream.steps(0, 1, 2)
    courier = Courier(journal, "it", kept, TERMS, poll_seconds=0.001)

    async def write():
        await asyncio.sleep(0.05)
        assert kept.batches == []
        stream.steps(3, 4, 5)
        await asyncio.wait_for(kept.seen.wait(), 5)
        assert [len(each) for each in kept.batches] == [5]
        courier.finish()  # then nothing waits any longer

    await asyncio.gather(courier.run(), write())
    assert [len(each) for each in kept.batches] == [5, 1]


async def test_in_slices_everything_is_delivered_too(journal, stream):
    stream.steps(*range(1500))
    kept = Kept()
    kept.max_events, kept.max_seconds = 1000, 60.0
    await deliver(journal, kept, slice_seconds=0.0002)
    assert kept.numbers == list(range(1, 1501))
    assert len(kept.batches) == 2


def test_a_feed_reads_no_longer_than_its_slice(journal, stream):
    stream.steps(*range(100))
    feed = EventSource(journal, Cursor(), ranks=None, disk=OsDisk(), clock=OsClock(), faults=FaultLog())
    batch = Batch()
    assert feed.read_batch(batch, 1000, 1 << 20, slice_seconds=0.0) == "slice"
    assert 0 < len(batch.items) <= 16
    assert feed.read_batch(batch, 1000, 1 << 20) == "dry"
    assert batch.sequences == list(range(1, 101))


async def test_the_cursor_never_stands_behind_an_event_that_was_not_acknowledged(journal, stream):
    stream.steps(*range(8))

    hangs = asyncio.Event()

    class Hangs(Kept):
        async def deliver(self, batch, sizes):
            if self.batches:
                hangs.set()
                await asyncio.Event().wait()
            return await super().deliver(batch, sizes)

    kept = Hangs()
    courier = Courier(journal, "it", kept, TERMS)

    async def stop():
        await hangs.wait()
        courier.stop()

    await asyncio.gather(asyncio.wait_for(courier.run(), 5), stop())
    assert kept.numbers == [1, 2, 3, 4, 5]
    # Stopped in the middle of a batch, one that is rewindable is not marked: the mark might cover what was not entered.
    assert CursorStore(journal).load("it").position(stream.name) in {Position(0, 0, 0), Position(5, 5, 0)}
    assert kept.closed


@pytest.mark.parametrize("says", [5, 3, None])
async def test_what_a_sink_took_before_it_was_stopped_does_not_come_again(journal, stream, says):
    stream.steps(*range(8))
    begun = asyncio.Event()

    class Finishes(Sink):
        """Cancelled, it says how much the destination has; None may come of a cancellation that was swallowed."""

        max_batch_events = 5

        def __init__(self):
            self.taken = []

        async def write(self, batch):
            begun.set()
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                self.taken += [each.seq for each in batch]
                return says

    sink = Finishes()
    courier = Courier(journal, "it", sink, TERMS)

    async def stop():
        await begun.wait()
        courier.stop()

    await asyncio.gather(asyncio.wait_for(courier.run(), 5), stop())
    assert sink.taken == [1, 2, 3, 4, 5]
    done = says or 0
    assert CursorStore(journal).load("it").position(stream.name) == Position(done, done, 0)


async def test_a_hook_that_has_returned_is_not_called_again_although_its_batch_was_cut_off(journal, stream):
    stream.steps(*range(8))

    class Stops(Callback):
        def __init__(self):
            self.steps = []

        def on_step_end(self, state, step_idx, batch, metrics):
            self.steps.append(step_idx)
            if step_idx == 4:
                courier.stop()

        def mark(self):
            return len(self.steps)

        def rewind(self, mark):
            del self.steps[mark:]

    callback = Stops()
    # Slices so short that every hook is followed by a moment in which the courier can be stopped.
    courier = Courier(journal, "it", callback, TERMS, slice_seconds=1e-9)
    await asyncio.wait_for(courier.run(), 5)
    (place, mark) = (cursor := CursorStore(journal).load("it")).position(stream.name), cursor.mark
    assert callback.steps == [0, 1, 2, 3, 4]
    assert (place, mark) == (Position(5, 5, 0), 5)
    again = Courier(journal, "it", callback, TERMS)
    again.finish()
    await asyncio.wait_for(again.run(), 5)
    assert callback.steps == [*range(8)]


async def test_at_its_end_a_receiver_hears_that_its_last_mark_is_on_record(journal, stream):
    """What it keeps for the mark before can go then; also where nothing came since the last commit."""
    stream.run(0, 1, 2)
    on_record = []

    class Keeps(Kept):
        def mark(self):
            on_record.append(CursorStore(journal).load("it").position(stream.name).sequence)
            return super().mark()

    await deliver(journal, Keeps())
    assert on_record[-1] == CursorStore(journal).load("it").position(stream.name).sequence > 0


async def test_a_record_that_is_no_envelope_is_a_dead_letter_and_the_others_are_delivered(journal, stream):
    stream.steps(0)
    stream.writer.append(b"no envelope")
    stream.steps(1)
    kept = Kept()
    await deliver(journal, kept)
    assert kept.numbers == [1, 3]
    (letter,) = read_dead_letters(journal)
    assert (letter["stream"], letter["seq"]) == (stream.name, 2)
    assert base64.b64decode(letter["bytes"]) == b"no envelope"
    assert read_status(journal).dead == 1


async def test_what_a_receiver_refuses_is_a_dead_letter_with_the_reason_and_the_event(journal, stream):
    stream.steps(*range(7))
    await deliver(journal, Kept(refuses={2, 7}))
    assert [(each["seq"], each["why"], each["event"]["event"]["step_idx"]) for each in read_dead_letters(journal)] == [
        (2, "refused", 1),
        (7, "refused", 6),
    ]
    assert (read_status(journal).delivered, read_status(journal).dead) == (5, 2)


async def test_the_streams_of_all_ranks_are_read_in_turn(journal):
    streams = [Stream(journal, rank) for rank in range(3)]
    for each in streams:
        each.steps(*range(20))
    kept = Kept()
    await deliver(journal, kept)
    turns = spread([each.stream for each in kept.envelopes])
    assert len(turns) >= 9
    for each in streams:
        assert [e.seq for e in kept.envelopes if e.stream == each.name] == list(range(1, 21))
        each.writer.close()


async def test_only_the_ranks_of_its_terms_are_delivered_and_counted(journal):
    streams = [Stream(journal, rank) for rank in range(3)]
    for each in streams:
        each.steps(*range(4))
    kept = Kept()
    register(journal, ())
    courier = await deliver(journal, kept, DeliveryPolicy(ranks=(1,)))
    assert {each.rank for each in kept.envelopes} == {1}
    assert counted(courier) == (4, 0, 0)
    for each in streams:
        each.writer.close()


async def test_a_stream_that_begins_while_it_runs_is_noticed(journal, stream):
    stream.steps(0)
    kept = Kept()
    kept.wanted = 1
    courier = Courier(journal, "it", kept, TERMS)

    async def later():
        await kept.seen.wait()
        other = Stream(journal, 1)
        other.steps(0, 1)
        other.writer.close()
        kept.seen.clear()
        kept.wanted = 3
        await asyncio.wait_for(kept.seen.wait(), 5)
        courier.finish()

    await asyncio.gather(courier.run(), later())
    assert len(kept.envelopes) == 3


async def test_a_stream_whose_writer_is_gone_comes_before_the_one_that_followed_it(journal, tmp_path):
    first = Stream(journal)
    first.steps(*range(12))
    first.writer.close()
    make_older(journal, first)
    second = Stream(journal)
    assert second.name != first.name
    second.steps(*range(12))
    kept = Kept()
    await deliver(journal, kept)
    assert spread([each.stream for each in kept.envelopes]) == [first.name, second.name]
    second.writer.close()


async def test_with_keep_off_nothing_is_written_and_everything_comes_again(journal, stream):
    stream.steps(*range(3))
    for _ in range(2):
        kept = Kept(refuses={2})
        await deliver(journal, kept, persistent=False)
        assert kept.numbers == [1, 2, 3]
    assert names_in(journal) == ["journal.json", stream.name]


async def test_it_begins_behind_the_sequences_it_is_given(journal, stream):
    stream.steps(*range(6))
    kept = Kept()
    await deliver(journal, kept, start_after={stream.name: 4})
    assert kept.numbers == [5, 6]
    kept = Kept()
    await deliver(journal, kept, start_after={stream.name: 1})
    assert kept.numbers == []  # there is a cursor by now


# -- introduction -----------------------------------------------------------------------------------------------------


async def test_what_is_open_is_introduced_with_the_step_behind_the_largest(journal, stream):
    stream.add(ExperimentStart(LogContext(output_dir=Path("/out"))), run=None)
    stream.run(3, 5, 4)
    await deliver(journal, Kept())
    stream.steps(6)
    kept = Kept()
    await deliver(journal, kept)
    starts = [each.event for each in kept.introduced]
    assert [type(each) for each in starts] == [ExperimentStart, RunStart, TrainStart]
    assert starts[2].state.step == 6
    assert starts[2].state.ctx is starts[1].ctx
    assert kept.envelopes[0].event.state.ctx is starts[1].ctx
    assert kept.numbers == [7]


async def test_what_has_ended_is_not_introduced(journal, stream):
    stream.run(0, 1)
    stream.add(TrainEnd(stream.state, LoopArtifacts()))
    await deliver(journal, Kept())
    kept = Kept()
    await deliver(journal, kept)
    assert [type(each.event) for each in kept.introduced] == [RunStart]


async def test_what_is_open_is_known_in_a_later_segment_from_what_it_carries(journal):
    stream = Stream(journal, segment_bytes=600)
    stream.start(ExperimentStart(LogContext(output_dir=Path("/out"))), None)
    stream.run(*range(12))
    assert len(segments_of(journal, stream)) > 4
    await deliver(journal, Kept())
    kept = Kept()
    await deliver(journal, kept)
    assert [type(each.event) for each in kept.introduced] == [ExperimentStart, RunStart, TrainStart]
    assert kept.introduced[2].event.state.step == 12
    stream.add(TrainEnd(stream.state, LoopArtifacts()))  # the run goes on, and later segments carry its TrainStart
    stream.steps(*range(20, 30))
    await deliver(journal, Kept())
    kept = Kept()
    await deliver(journal, kept)
    assert [type(each.event) for each in kept.introduced] == [ExperimentStart, RunStart]
    stream.writer.close()


async def test_a_receiver_is_introduced_to_nothing_at_the_beginning(journal, stream):
    stream.run(0, 1)
    kept = Kept()
    await deliver(journal, kept)
    assert kept.introduced == []
    assert kept.marks == []


async def test_an_experiment_that_ended_leaves_no_steps_behind(journal, stream):
    stream.run(0, 1)
    await deliver(journal, Kept())
    assert CursorStore(journal).load("it").steps == {"run-a": 1}
    stream.add(ExperimentEnd(LogContext(output_dir=Path("/out")), ExperimentResult("x")), run=None)
    await deliver(journal, Kept())
    assert CursorStore(journal).load("it").steps == {}


async def test_a_training_that_begins_again_at_an_earlier_step_counts_from_there(journal, stream):
    stream.run(*range(6))
    stream.state.step = 2
    stream.start(TrainStart(stream.state))
    stream.steps(2)
    await deliver(journal, Kept())
    assert CursorStore(journal).load("it").steps == {"run-a": 2}


# -- books ------------------------------------------------------------------------------------------------------------


async def test_one_courier_at_a_time_delivers_to_an_adapter_and_says_who_it_is(journal, stream):
    kept = Kept()
    courier = Courier(journal, "it", kept, TERMS)
    stream.steps(0)
    kept.wanted = 1

    async def another():
        await kept.seen.wait()
        with pytest.raises(CourierBusyError, match=rf"process {os.getpid()} on .*, since 20") as caught:
            await deliver(journal, Kept())
        assert caught.value.code == "EB905"
        await deliver(journal, Kept(), name="another")
        courier.finish()

    await asyncio.gather(courier.run(), another())
    await deliver(journal, Kept())


def test_the_lock_ends_with_the_process(journal, program, stream):
    stream.steps(0)
    holder = program(
        """
        import asyncio, sys
        from evsys_bus import Callback
        from evsys_bus.delivery.courier import Courier
        from evsys_bus.delivery.subscription import DeliveryPolicy

        class Says(Callback):
            def on_step_end(self, state, step_idx, batch, metrics):
                print("here", flush=True)

        asyncio.run(Courier(sys.argv[1], "it", Says(), DeliveryPolicy()).run())
        """,
        journal,
    )
    assert holder.stdout.readline() == "here\n"
    with pytest.raises(CourierBusyError, match=f"process {holder.pid} "):
        asyncio.run(deliver(journal, Kept()))
    assert read_status(journal).busy
    holder.kill()
    holder.wait()
    assert not read_status(journal).busy
    asyncio.run(deliver(journal, Kept()))


async def test_its_state_is_written_down(journal, stream):
    stream.steps(0)
    await deliver(journal, Kept())
    state = read_status(journal)
    assert (state.state, state.pid, state.error) == ("ended", os.getpid(), None)
    assert state.at > 1e9


async def test_trouble_is_written_down_at_once_and_its_end_too(journal, stream):
    states = []

    class Troubled(Kept):
        async def open(self, report):
            self.report = report

        async def deliver(self, batch, sizes):
            self.report(DeliveryStatus(state="parked", error="401", fix="give it a key", attempts=7))
            states.append(read_status(journal))
            self.report(None)
            states.append(read_status(journal))
            return await super().deliver(batch, sizes)

    stream.steps(0)
    await deliver(journal, Troubled())
    assert [(each.state, each.error, each.fix, each.attempts) for each in states] == [
        ("parked", "401", "give it a key", 7),
        ("delivering", None, None, 0),
    ]
    assert states[0].failing_since > 1e9


async def test_a_receiver_that_fails_where_it_never_should_is_asked_again(journal, stream):
    failed = []

    class Fails(Kept):
        async def deliver(self, batch, sizes):
            if len(failed) < 3:
                failed.append(BatchResult(0))
                if len(failed) == 2:
                    return failed[-1]
                raise ValueError("a fault")
            return await super().deliver(batch, sizes)

    stream.steps(0, 1)
    kept = Fails()
    await deliver(journal, kept, retry_seconds=0.001)
    assert kept.numbers == [1, 2]


async def test_a_receiver_that_cannot_be_opened_ends_the_courier_and_frees_the_lock(journal, stream):
    class Fails(Kept):
        async def open(self, report):
            raise ValueError("no such bucket")

    stream.steps(0)
    with pytest.raises(ValueError, match="bucket"):
        await deliver(journal, Fails())
    await deliver(journal, Kept())


async def test_it_is_stopped_from_any_thread_while_nothing_comes(journal, stream):
    courier = Courier(journal, "it", Kept(), TERMS)

    async def stop():
        while not read_progress(journal):
            await asyncio.sleep(0.001)
        await asyncio.to_thread(courier.stop)

    await asyncio.gather(asyncio.wait_for(courier.run(), 5), stop())
    assert read_status(journal).state == "ended"


async def test_one_that_was_stopped_before_it_ran_delivers_nothing(journal, stream):
    stream.steps(0)
    kept = Kept()
    courier = Courier(journal, "it", kept, TERMS)
    courier.stop()
    await asyncio.wait_for(courier.run(), 5)
    assert kept.numbers == []


# -- accounts ---------------------------------------------------------------------------------------------------------


async def test_recorded_is_delivered_and_dead_and_pending_at_any_time(journal):
    streams = [Stream(journal, rank, segment_bytes=1500) for rank in range(3)]
    for each in streams:
        each.run(*range(17 + each.rank))
        each.writer.append(b"no envelope")
        each.steps(*range(30, 34))
    register(journal, ())
    checked = []

    class Checks(Kept):
        async def deliver(self, batch, sizes):
            one, counts = read_status(journal), courier.counts
            checked.append((len(read_records(journal)), one, counts, len(self.envelopes)))
            if len(checked) <= 30:
                streams[len(checked) % 3].steps(99)
                courier.finish()
            return await super().deliver(batch, sizes)

    kept = Checks()
    CursorStore(journal).save("it", Cursor({each.name: Position() for each in streams}))
    courier = Courier(journal, "it", kept, TERMS)
    await asyncio.wait_for(courier.run(), 15)
    assert len(checked) > 20
    for there, one, counts, given in checked:
        assert one.recorded == one.delivered + one.dead + one.pending == there
        assert counts.recorded == there
        assert counts.delivered == given
    one = read_status(journal)
    assert (one.pending, one.dead) == (0, 3)
    assert one.recorded == one.delivered + one.dead == len(read_records(journal))
    for each in streams:
        each.writer.close()


async def test_the_account_is_right_beside_damage_and_missing_events(journal):
    stream = Stream(journal, segment_bytes=1200)
    stream.steps(*range(40))
    stream.writer.close()
    segments = segments_of(journal, stream)
    assert len(segments) > 5
    damaged = bytearray(segments[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    segments[1].write_bytes(damaged)
    segments[3].unlink()
    cut = segments[4].read_bytes()
    segments[4].write_bytes(cut[:-7])
    CursorStore(journal).save("it", Cursor())
    assert read_status(journal).pending == len(read_records(journal)) < 40
    kept = Kept()
    courier = Courier(journal, "it", kept, TERMS)
    kept.wanted = 9

    async def stop():
        await kept.seen.wait()
        courier.stop()

    await asyncio.gather(courier.run(), stop())
    one = read_status(journal)
    assert one.delivered == len(kept.envelopes)
    assert one.delivered + one.pending == one.recorded == len(read_records(journal))
    await deliver(journal, Kept())
    assert read_status(journal).delivered == len(read_records(journal))


async def test_an_adapter_with_a_spec_and_no_cursor_has_an_account_of_the_ranks_it_serves(journal):
    streams = [Stream(journal, rank) for rank in range(2)]
    for each in streams:
        each.steps(*range(5))
        each.writer.close()
    from evsys_bus.delivery.subscription import Subscription

    register(
        journal,
        [Subscription("all", AdapterRef("x"), policy=DeliveryPolicy(ranks=None)), Subscription("one", AdapterRef("x"))],
    )
    found = {each.name: each for each in read_progress(journal)}
    assert (found["all"].pending, found["one"].pending) == (10, 5)
    assert found["all"].state is None
    assert not found["all"].busy


def test_a_place_without_a_journal_has_no_accounts(tmp_path):
    assert read_progress(tmp_path / "none") == []


async def test_a_courier_waits_for_a_journal_that_is_not_there_yet(tmp_path):
    journal = str(tmp_path / "none")
    kept = Kept()
    kept.wanted = 1
    courier = Courier(journal, "it", kept, TERMS)

    async def write():
        await asyncio.sleep(0.05)
        stream = Stream(journal)
        stream.steps(0)
        await asyncio.wait_for(kept.seen.wait(), 5)
        stream.writer.close()
        courier.finish()

    await asyncio.gather(courier.run(), write())
    assert kept.numbers == [1]


async def test_finish_ends_although_a_writer_is_alive_and_writing(journal, stream):
    stream.steps(*range(10))

    class Slow(Kept):
        async def deliver(self, batch, sizes):
            if len(self.batches) < 3:
                stream.steps(50)
            return await super().deliver(batch, sizes)

    kept = Slow()
    await deliver(journal, kept)
    assert kept.numbers == list(range(1, 14))
    assert JournalReader(journal).is_live(stream.name)


def rows(kept):
    return [(each.event.step_idx, each.event.metrics) for each in kept.envelopes if isinstance(each.event, StepEnd)]


def add_killed_training(stream, next_step):
    """Steps 0 and 1, two parts of step 2, and then, in the same stream, the training that goes on from a step."""
    stream.run(0, 1)
    stream.add(Metrics(stream.state, 2, {"a": 2.0}))
    stream.add(Metrics(stream.state, 2, {"b": 2.5}))
    stream.run(*range(next_step, 5))


LOSS = {"loss": 0.5}


async def test_a_row_that_a_kill_left_open_is_delivered_although_the_training_goes_on_in_the_same_stream(
    journal, stream
):
    add_killed_training(stream, 3)
    kept = Kept()
    courier = await deliver(journal, kept)
    assert rows(kept) == [(0, LOSS), (1, LOSS), (2, {"a": 2.0, "b": 2.5}), (3, LOSS), (4, LOSS)]
    assert counted(courier) == (10, 0, 0)
    again = Kept()
    await deliver(journal, again)
    assert rows(again) == []


async def test_a_row_that_a_kill_left_open_comes_before_the_start_of_the_training_that_makes_it_anew(journal, stream):
    add_killed_training(stream, 2)
    kept = Kept()
    await deliver(journal, kept)
    assert rows(kept) == [(0, LOSS), (1, LOSS), (2, {"a": 2.0, "b": 2.5}), (2, LOSS), (3, LOSS), (4, LOSS)]
    kinds = [type(each.event) for each in kept.envelopes]
    assert kinds[kinds.index(Metrics) :][:5] == [Metrics, Metrics, StepEnd, RunStart, TrainStart]


@pytest.mark.parametrize("key", ["run-b", None])
async def test_a_row_of_a_run_that_is_open_is_not_complete_because_another_run_starts_in_its_stream(
    journal, stream, key
):
    stream.run(0)
    stream.add(Metrics(stream.state, 1, {"a": 1.0}))
    stream.add(RunStart(LogContext(output_dir=Path("/out"), run_key=key)), key)
    stream.add(TrainStart(stream.state))  # after a hook of the run's start has logged
    stream.add(Metrics(stream.state, 1, {"b": 1.5}))
    stream.add(StepEnd(stream.state, 1, TrainingBatch(), {"a": 1.0, "b": 1.5}))
    kept = Kept()
    await deliver(journal, kept)
    assert rows(kept) == [(0, LOSS), (1, {"a": 1.0, "b": 1.5})]


async def test_a_row_that_a_kill_left_open_waits_for_the_next_courier_if_its_receiver_cannot_take_it(journal, stream):
    class Full(Kept):
        async def deliver(self, batch, sizes):
            if any(isinstance(each.event, StepEnd) and each.event.step_idx == 2 for each in batch):
                raise RetryLaterError("no room")
            return await super().deliver(batch, sizes)

    add_killed_training(stream, 3)
    full = Full()
    with pytest.raises(RetryLaterError):
        await deliver(journal, full)
    assert rows(full) == [(0, LOSS), (1, LOSS)]
    kept = Kept()
    await deliver(journal, kept)
    assert (2, {"a": 2.0, "b": 2.5}) in rows(kept)
    assert {step for step, _ in rows(kept)} >= {2, 3, 4}


async def test_a_row_that_a_kill_left_open_is_delivered_where_only_the_start_of_the_training_is_published_again(
    journal, stream
):
    """A training without `RunStart`, as of a `TrainingLoop` alone."""
    stream.start(TrainStart(stream.state))
    stream.steps(0, 1)
    stream.add(Metrics(stream.state, 1, {"late": 1.5}))
    stream.state.step = 2
    stream.start(TrainStart(stream.state))
    stream.add(Metrics(stream.state, 2, {"a": 2.0}))
    stream.add(StepEnd(stream.state, 2, TrainingBatch(), {"a": 2.0}))
    kept = Kept()
    await deliver(journal, kept)
    assert rows(kept) == [(0, LOSS), (1, LOSS), (1, {"late": 1.5}), (2, {"a": 2.0})]


async def test_a_row_that_a_kill_left_open_and_its_receiver_rejects_is_a_dead_letter(journal, stream):
    class Strict(Kept):
        async def deliver(self, batch, sizes):
            result = await super().deliver(batch, sizes)
            for index, each in enumerate(batch):
                if isinstance(each.event, StepEnd) and each.event.step_idx == 2:
                    result = BatchResult(result.delivered - 1, {**result.rejected, index: "no such column"})
            return result

    add_killed_training(stream, 3)
    courier = await deliver(journal, Strict())
    [letter] = read_dead_letters(journal)
    assert (letter["stream"], letter["seq"], letter["why"]) == (stream.name, 6, "no such column")
    assert letter["event"]["event"]["metrics"] == {"a": 2.0, "b": 2.5}
    assert counted(courier) == (9, 1, 0)


async def test_a_part_that_is_recorded_after_its_row_by_another_thread_is_no_row_of_its_own(journal, stream):
    """Unless it has something that the row has not, as a part that was logged after its row."""
    stream.add(Metrics(stream.state, 1, {"a": 1.0}))
    stream.add(StepEnd(stream.state, 1, TrainingBatch(), {"a": 1.0, "b": 1.5}))
    stream.add(Metrics(stream.state, 1, {"b": 1.5}))
    kept = Kept()
    await deliver(journal, kept)
    stream.add(Metrics(stream.state, 2, {"a": 2.0}))
    stream.add(StepEnd(stream.state, 2, TrainingBatch(), {"a": 2.0}))
    stream.add(Metrics(stream.state, 2, {"c": 2.5}))
    stream.writer.close()
    await deliver(journal, kept)
    assert rows(kept) == [(1, {"a": 1.0, "b": 1.5}), (2, {"a": 2.0}), (2, {"c": 2.5})]


async def test_such_a_part_before_the_end_of_a_stream_is_no_row_of_its_own(journal, stream):
    stream.add(Metrics(stream.state, 1, {"a": 1.0}))
    stream.add(StepEnd(stream.state, 1, TrainingBatch(), {"a": 1.0, "b": 1.5}))
    stream.add(Metrics(stream.state, 1, {"b": 1.5}))
    stream.writer.close()
    kept = Kept()
    await deliver(journal, kept)
    assert rows(kept) == [(1, {"a": 1.0, "b": 1.5})]


def test_a_row_is_not_left_open_if_another_process_goes_on_in_the_stream_while_it_is_read(journal):
    killed = Stream(journal)
    killed.steps(0, 1)
    killed.writer.close()
    options = {"disk": OsDisk(), "clock": OsClock(), "faults": FaultLog()}
    source, batch = EventSource(str(journal), Cursor(), ranks=None, **options), Batch()
    assert source.read_batch(batch, 1, 1 << 20) == "full"
    going_on = Stream(journal)
    assert going_on.name == killed.name
    going_on.add(Metrics(going_on.state, 2, {"a": 2.0}))
    source.read_batch(batch, 100, 1 << 20)
    assert (len(batch.items), batch.ended) == (3, [])
    going_on.writer.close()
    source.close()


async def test_the_start_of_another_rank_leaves_an_open_row_as_it_is(journal, stream):
    """The ranks of a run start at moments of their own, and their streams come in any order."""
    other, kept = Stream(journal, rank=1), Kept()
    other.add(Metrics(other.state, 2, {"a": 2.0}))
    await deliver(journal, kept)
    stream.start(TrainStart(stream.state))
    await deliver(journal, kept)
    other.add(Metrics(other.state, 2, {"b": 2.5}))
    other.writer.close()
    await deliver(journal, kept)
    assert rows(kept) == [(2, {"a": 2.0, "b": 2.5})]


class Samples(Event, frozen=True):
    state: LoopState


async def test_events_of_unknown_types_reach_receivers(journal, stream):
    payload = stream.envelope(Samples(stream.state)).replace(b"samples", b"s4mples")
    stream.writer.append(payload)
    kept = Kept()
    await deliver(journal, kept)
    assert kept.envelopes[0].event.type == "s4mples"
    seen = Counter()

    class Counts(Callback):
        def __getattribute__(self, name):
            seen[name] += name.startswith("on_")
            return super().__getattribute__(name)

    await deliver(journal, Counts(), name="hooks")
    assert read_status(journal, "hooks").delivered == 1
    assert +seen == {"on_s4mples": 1}  # it has none
