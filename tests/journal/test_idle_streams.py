"""Streams without new events cost a follower next to nothing, and it still sees soon what comes next."""

import math
import subprocess
import sys

import pytest

from evsys_bus.codec import encode
from evsys_bus.delivery.source import MAX_CHECK_SECONDS, MAX_REST_SECONDS, Batch, EventSource
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Envelope, Event
from evsys_bus.journal import Cursor, JournalWriter, OsDisk
from evsys_bus.testing import ManualClock


class Idled(Event, frozen=True):
    number: int


class CountingDisk(OsDisk):
    def __init__(self):
        self.calls = 0

    def pread(self, file, size, offset, /):
        self.calls += 1
        return super().pread(file, size, offset)

    def open_read(self, path):
        self.calls += 3
        return super().open_read(path)

    def names(self, path):
        self.calls += 3
        return super().names(path)

    def is_locked(self, path):
        self.calls += 4
        return super().is_locked(path)

    def size(self, path):
        self.calls += 1
        return super().size(path)


def publish(writer, number):
    writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1.0, Idled(number))))


class Follower:
    def __init__(self, directory):
        self.disk, self.clock = CountingDisk(), ManualClock()
        self.source = EventSource(
            str(directory), Cursor(), ranks=None, disk=self.disk, clock=self.clock, faults=FaultLog()
        )

    def poll(self, seconds=0.0):
        self.clock.advance(seconds)
        batch = Batch()
        self.source.read_batch(batch, 500, 1 << 20)
        return [each.event.number for each in batch.items]

    def rest(self, seconds=300):
        for _ in range(seconds * 2):
            assert self.poll(0.5) == []


@pytest.fixture
def open_writer(tmp_path):
    writers = []

    def open_writer(rank=0, **options):
        writers.append(JournalWriter(tmp_path, rank=rank, flush_seconds=math.inf, reserve_bytes=0, **options).open())
        return writers[-1]

    yield open_writer
    for writer in writers:
        writer.close()


def test_a_quiet_stream_with_a_writer_costs_two_calls_a_second_and_a_check_in_ten(tmp_path, open_writer):
    for rank in range(20):
        publish(open_writer(rank), rank)
    follower = Follower(tmp_path)
    assert sorted(follower.poll()) == list(range(20))
    follower.rest()
    follower.disk.calls = 0
    follower.rest(60)
    assert follower.disk.calls < 20 * 60 * (1 / MAX_REST_SECONDS + 20 / MAX_CHECK_SECONDS)


def test_the_next_event_of_a_quiet_stream_is_read_half_a_second_later_at_most(tmp_path, open_writer):
    writer = open_writer()
    publish(writer, 1)
    follower = Follower(tmp_path)
    assert follower.poll() == [1]
    follower.rest()
    publish(writer, 2)
    assert follower.poll(MAX_REST_SECONDS) == [2]
    publish(writer, 3)
    assert follower.poll() == [3]


def test_the_next_segment_of_a_quiet_stream_is_found(tmp_path, open_writer):
    writer = open_writer(segment_bytes=10)
    publish(writer, 1)
    follower = Follower(tmp_path)
    assert follower.poll() == [1]
    follower.rest()
    publish(writer, 2)
    assert follower.poll(MAX_CHECK_SECONDS) == [2]


def test_what_a_resting_stream_has_left_comes_before_the_next_stream_of_its_rank(tmp_path, open_writer):
    first = open_writer()
    publish(first, 1)
    follower = Follower(tmp_path)
    assert follower.poll() == [1]
    follower.rest()
    second = open_writer()  # the first is locked, so this is a new stream
    for number in (2, 3):
        publish(first, number)
    publish(second, 4)
    assert first.close()
    assert follower.poll(1.0) == [2, 3, 4]


FIRST_READS = """
import sys, threading
from evsys_bus.journal import JournalReader

sys.setswitchinterval(1e-6)
reader, errors, barrier = JournalReader(sys.argv[1]), [], threading.Barrier(8)


def read():
    tail = reader.tail(reader.streams()[0], keep_open=True)
    barrier.wait()
    try:
        assert len(list(tail.poll())) == 1
        tail.close()
    except Exception as error:
        errors.append(error)


threads = [threading.Thread(target=read) for _ in range(8)]
for each in threads:
    each.start()
for each in threads:
    each.join()
print(errors)
"""


@pytest.mark.long
def test_the_first_readers_of_a_process_may_come_at_once_from_many_threads(tmp_path):
    writer = JournalWriter(tmp_path).open()
    writer.append(b"an event")
    writer.close()
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", FIRST_READS, tmp_path], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"
