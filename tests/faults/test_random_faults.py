"""The short form of `random_faults.py`, and whether it would notice what it looks for; the long form is its command."""

import asyncio
import errno
import math

import pytest
import random_faults

from evsys_bus import Envelope, LoopState, Sink, StepEnd, TrainingBatch
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.journal import JournalWriter
from evsys_bus.testing import RecordingSink, SimulatedDisk


@pytest.mark.parametrize("seed", range(20))
def test_after_a_random_mix_of_faults_every_adapter_has_every_event(seed):
    random_faults.run_seed(seed)


def test_a_seed_does_the_same_again():
    first, second = (random_faults.run_seed(7) for _ in range(2))
    assert first.trace_digest.hexdigest() == second.trace_digest.hexdigest()
    assert first.disk.calls == second.disk.calls > 1000


@pytest.fixture(scope="module")
def scene():
    scene = random_faults.run_seed(7)
    assert len(scene.recorded) > 20
    return scene


def test_the_inspection_notices_an_event_that_is_missing(scene):
    post = scene.subscriptions[0]
    before = post.deliveries
    post.deliveries = [each for each in before if each[1:] != before[-1][1:]]
    with pytest.raises(random_faults.Violation, match="sink lacks"):
        scene.check()
    post.deliveries = before


def test_the_inspection_notices_an_order_that_was_not_kept(scene):
    post = scene.subscriptions[0]
    before = post.deliveries
    post.deliveries = [(1, *each[1:]) for each in reversed(before)]
    with pytest.raises(random_faults.Violation, match="in this order"):
        scene.check()
    post.deliveries = before


def test_the_inspection_notices_a_row_that_came_twice_and_one_that_is_missing(scene):
    data = scene.disk.contents(f"{random_faults.ROWS}/rows")
    before = bytes(data)
    rows = before.splitlines(keepends=True)
    data += rows[-1]
    with pytest.raises(random_faults.Violation, match="rows twice"):
        scene.check()
    data[:] = b"".join(rows[:-1])
    with pytest.raises(random_faults.Violation, match="rows lacks"):
        scene.check()
    data[:] = before


# -- what it has found ------------------------------------------------------------------------------------------------


def journal(disk, count):
    """A journal of so many events, in segments of a few."""
    writer = JournalWriter("/journal", disk=disk, flush_seconds=math.inf, segment_bytes=900, reserve_bytes=0).open()
    state = LoopState(step=0, num_steps=count, output_dir="run")
    for step in range(count):
        event = StepEnd(state, step, TrainingBatch(), {})
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 0.0, event)))
    writer.close()


def deliver(disk, sink):
    courier = Courier("/journal", "it", sink, DeliveryPolicy(), disk=disk)
    courier.finish()
    asyncio.run(asyncio.wait_for(courier.run(), 10))


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(155, id="a letter that the disk took in part, and did not let us cut, spoils the next one"),
        pytest.param(10169, id="the mark of the last commit covers what was written and not entered"),
    ],
)
def test_a_seed_that_failed_once(seed):
    random_faults.run_seed(seed)


def test_a_segment_that_cannot_be_read_for_a_moment_is_delivered_when_it_can():
    class Away(SimulatedDisk):
        failures = 0

        def read(self, path, offset, size):
            if self.failures and path.endswith("000001-1.seg"):
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().read(path, offset, size)

    disk = Away()
    journal(disk, 20)
    disk.failures = 2
    sink = RecordingSink()
    deliver(disk, sink)
    assert [each.seq for each in sink.envelopes] == list(range(1, 21))


def test_what_a_rewindable_sink_wrote_just_when_its_courier_was_stopped_is_there_once():
    rows, stops = [], [False, True]

    class Rows(Sink):
        max_batch_events = 2

        async def write(self, batch):
            rows.extend(each.seq for each in batch)
            if len(rows) == 4 and stops.pop():
                self.evsys_attached.stop()  # as it comes from another thread, at any moment

        def mark(self):
            return len(rows)

        def rewind(self, mark):
            del rows[mark:]

    disk = SimulatedDisk()
    journal(disk, 6)
    deliver(disk, Rows())
    assert rows[:4] == [1, 2, 3, 4]
    deliver(disk, Rows())
    assert rows == [1, 2, 3, 4, 5, 6]
