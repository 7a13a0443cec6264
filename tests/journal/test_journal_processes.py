"""Rows 1, 7 to 9, 11, 13 of the fault matrix: real processes and file systems, killed, limited, full and gone."""

import math
import random
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from evsys_bus.journal import JournalReader, JournalWriter, verify
from support.files import small_file_system
from support.journals import read_sequences

NEVER = math.inf


def payload(number: int) -> bytes:
    return b"event %d " % number * 3


# -- 1: killed right after an append returned -------------------------------------------------------------------------

RECEIPTS = """
    import os, struct, sys
    from evsys_bus.journal import JournalWriter

    writer = JournalWriter(sys.argv[1], segment_bytes=20_000).open()
    while True:
        number = writer.next_sequence
        sequence = writer.append(os.urandom(number % 500) if number % 50 else bytes(90_000))
        os.write(1, struct.pack("<Q", sequence))
"""


def test_nothing_with_a_receipt_is_lost_when_the_process_is_killed(tmp_path, program):
    chance = random.Random(4)
    receipts: list[int] = []
    for _ in range(15):
        process = program(RECEIPTS, str(tmp_path / "journal"))
        pipe = process.stdout.buffer
        begun = pipe.read(8 * chance.randrange(1, 400))
        process.kill()
        receipts += [number for (number,) in struct.iter_unpack("<Q", begun + pipe.read())]
        process.wait()
    assert len(receipts) > 1000
    assert receipts == sorted(set(receipts))
    found = read_sequences(tmp_path / "journal")
    assert not set(receipts) - set(found)
    [report] = verify(tmp_path / "journal").streams
    assert report.is_intact
    assert report.records == len(found)
    assert 0 <= len(found) - len(receipts) <= 15  # appended, and killed before the receipt


# -- a reader beside a live writer ------------------------------------------------------------------------------------

BUSY = """
    import os, sys, time
    from evsys_bus.journal import JournalWriter

    writer = JournalWriter(sys.argv[1], segment_bytes=300_000).open()
    while not os.path.exists(sys.argv[2]):
        for _ in range(100):
            sequence = writer.next_sequence
            writer.append(b"%d " % sequence * (1 + (sequence * 7919) % (9000 if sequence % 9 == 0 else 40)))
        time.sleep(0.005)  # and the reader is level with it again
    writer.close()
    print(writer.recorded)
"""


def test_a_tail_beside_a_busy_writer_never_takes_a_record_on_its_way_for_damage(tmp_path, program):
    enough = tmp_path / "enough"
    process = program(BUSY, str(tmp_path / "journal"), str(enough))
    reader = JournalReader(tmp_path / "journal")
    while not reader.streams() and process.poll() is None:
        pass
    tail = reader.tail(reader.streams()[0])
    seen = 0
    polls = 0
    ended = False
    while not ended:
        ended = process.poll() is not None
        polls += 1
        for record in tail.poll():
            seen += 1
            assert record.sequence == seen
            assert record.payload.startswith(b"%d " % seen)
        if seen > 5000 and polls > 100:
            enough.touch()
    assert seen == int(process.stdout.read()) > 5000
    assert (tail.corrupt_bytes, tail.torn_bytes, tail.missing_ranges, tail.unreadable_segments) == (0, 0, [], {})


# -- 7: short writes, 11: too many open files -------------------------------------------------------------------------

LIMITED = """
    import resource, sys
    from evsys_bus.journal import JournalWriter

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    writer = JournalWriter(sys.argv[1], reserve_bytes=0).open()
    for _ in range(300):
        writer.append(b"event %d " % writer.next_sequence * 3)
    print(writer.recorded, writer.unrecorded, writer.lost, writer.close())
"""


def test_a_write_that_is_cut_short_is_taken_back_and_goes_to_the_next_segment(tmp_path, program):
    process = program(LIMITED, str(tmp_path))
    out, errors = process.communicate(timeout=15)
    assert out.split() == ["300", "0", "0", "True"], errors
    assert read_sequences(tmp_path) == list(range(1, 301))
    [report] = verify(tmp_path).streams
    assert report.is_intact
    assert report.torn_bytes == 0
    assert report.segments > 4


CROWDED = """
    import os, resource, sys
    from evsys_bus.journal import JournalWriter

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    writer = JournalWriter(sys.argv[1], segment_bytes=1000, flush_seconds=1e9).open()
    append = lambda: writer.append(b"event %d " % writer.next_sequence * 3)
    append()
    others = []
    try:
        while True:
            others.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    before = writer.segment
    for _ in range(150):
        append()
    writer.flush()
    assert writer.segment == before and writer.failures
    for each in others:
        os.close(each)
    for _ in range(150):
        append()
    assert writer.segment != before
    print(writer.recorded, writer.unrecorded, writer.lost, writer.close())
"""


def test_with_too_many_open_files_the_segment_grows_and_nothing_waits(tmp_path, program):
    process = program(CROWDED, str(tmp_path))
    out, errors = process.communicate(timeout=15)
    assert out.split() == ["301", "0", "0", "True"], errors
    assert read_sequences(tmp_path) == list(range(1, 302))
    assert verify(tmp_path).is_intact


# -- 8: a full disk ---------------------------------------------------------------------------------------------------


def fill_up(path: Path) -> Path:
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    with small_file_system(tmp_path / "small", "1m") as path:
        yield path


def test_a_full_disk_and_then_space_again_loses_nothing(small_disk):
    writer = JournalWriter(small_disk / "journal", reserve_bytes=65536, flush_seconds=NEVER, segment_bytes=9000).open()
    for number in range(1, 1001):
        if number == 200:
            filler = fill_up(small_disk)
        if number == 800:
            filler.unlink()
        assert writer.append(payload(number)) == number
        if number == 700:
            assert writer.unrecorded > 400
            assert writer.recorded + writer.unrecorded == 700
    assert (writer.recorded, writer.unrecorded, writer.lost) == (1000, 0, 0)
    writer.flush()
    assert writer.close()
    assert read_sequences(small_disk / "journal") == list(range(1, 1001))
    assert verify(small_disk / "journal").is_intact


def test_a_disk_that_stays_full_takes_the_end_events_into_the_reserve(small_disk):
    writer = JournalWriter(small_disk / "journal", reserve_bytes=65536, flush_seconds=NEVER).open()
    writer.append(payload(1))
    fill_up(small_disk)
    for number in range(2, 5000):
        writer.append(payload(number))
    end = msgspec.msgpack.encode({"event": {"type": "experiment_end"}})
    writer.append(end, essential=True)
    assert not writer.close()
    records = list(JournalReader(small_disk / "journal").read(writer.stream))
    assert records[-1].payload == end
    assert writer.recorded == len(records) > 1000
    assert writer.recorded + writer.lost == 5000


# -- 9: the directory is gone, or takes nothing -----------------------------------------------------------------------


def test_what_is_written_after_the_directory_was_removed_waits_in_memory_and_one_warning_says_so(tmp_path, caplog):
    writer = JournalWriter(tmp_path / "journal", flush_seconds=NEVER).open()
    writer.append(payload(1))
    shutil.rmtree(tmp_path / "journal")
    writer.append(payload(2))  # into a file without a name
    for number in range(3, 10):
        writer.flush()
        assert writer.append(payload(number)) == number
    assert (writer.recorded, writer.unrecorded, writer.lost) == (0, 7, 2)
    [warning] = [each for each in caplog.records if each.levelname == "WARNING"]
    assert "journal.removed" in warning.message
    assert "restart the program" in warning.fix
    assert not writer.close(60.0, lambda: pytest.fail("there is nothing to wait for"))
    assert not (tmp_path / "journal").exists()


def test_a_directory_that_was_moved_and_comes_back_takes_what_waited(tmp_path):
    writer = JournalWriter(tmp_path / "journal", flush_seconds=NEVER).open()
    writer.append(payload(1))
    (tmp_path / "journal").rename(tmp_path / "elsewhere")  # for example a mount that is gone for a while
    writer.flush()
    for number in range(2, 10):
        assert writer.append(payload(number)) == number
    assert writer.unrecorded == 8
    (tmp_path / "elsewhere").rename(tmp_path / "journal")
    writer.flush()
    assert writer.unrecorded == 0
    assert read_sequences(tmp_path / "journal") == list(range(1, 10))
    writer.close()


READ_ONLY = """
    import fcntl, os, sys  # and what is loaded late: the user that it becomes may not read the libraries
    from evsys_bus.diagnostics import log
    from evsys_bus.errors import JournalOpenError
    from evsys_bus.journal import JournalWriter

    log().debug("loaded")
    directory = sys.argv[1]
    os.makedirs(directory, 0o777)
    os.chmod(directory, 0o777)
    if os.getuid() == 0:
        os.setuid(65534)
    writer = JournalWriter(directory, segment_bytes=1000, flush_seconds=1e9).open()
    append = lambda: writer.append(b"event %d " % writer.next_sequence * 3)
    append()
    folder = os.path.dirname(writer.segment)
    os.chmod(folder, 0o500)
    for _ in range(100):
        append()
    assert (writer.recorded, writer.unrecorded) == (101, 0), writer.unrecorded
    os.chmod(folder, 0o700)
    append()
    print(writer.recorded, writer.unrecorded, writer.lost, writer.close())
    os.chmod(folder, 0o500)
    try:
        os.rename(folder + "/lock", folder + "/other")
    except OSError:
        print("read-only")
    try:
        JournalWriter("/proc/journal").open()
    except JournalOpenError as error:
        print(error.code)
"""


def test_a_directory_that_becomes_read_only_costs_rotation_only(tmp_path, program):
    for parent in [tmp_path, *tmp_path.parents][:4]:  # a worker of pytest-xdist has a folder more
        parent.chmod(0o755)
    process = program(READ_ONLY, str(tmp_path / "journal"))
    out, errors = process.communicate(timeout=15)
    assert out.split() == ["102", "0", "0", "True", "read-only", "EB801"], errors
    assert verify(tmp_path / "journal").is_intact
    assert read_sequences(tmp_path / "journal") == list(range(1, 103))


# -- 13: several processes, one directory -----------------------------------------------------------------------------

CROWD = """
    import sys
    from evsys_bus.journal import JournalWriter

    writer = JournalWriter(sys.argv[1]).open()
    print(writer.stream, flush=True)
    sys.stdin.readline()
    for _ in range(200):
        writer.append(b"x")
    writer.close()
"""


def test_writers_at_the_same_time_never_share_a_stream(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CROWD), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    streams = {process.stdout.readline().strip() for process in processes}
    for process in processes:
        process.communicate("go\n", timeout=15)
    assert len(streams) == 4
    report = verify(tmp_path)
    assert report.is_intact
    assert [stream.records for stream in report.streams] == [200] * 4
    again = JournalWriter(tmp_path).open()
    assert again.stream == max(streams)
    assert again.next_sequence == 201
    assert again.close()


# -- 14: forks while another thread appends ---------------------------------------------------------------------------

FORKS = """
    import os, sys, threading, warnings
    from evsys_bus.errors import ForkedBusError
    from evsys_bus.journal import JournalReader, JournalWriter

    warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside a thread
    sys.setswitchinterval(1e-5)
    writer = JournalWriter(sys.argv[1], segment_bytes=2000, flush_seconds=0.001).open()
    stop, begun = threading.Event(), threading.Event()

    def append():
        while not stop.is_set():
            writer.append(b"event %d " % writer.next_sequence * 3)
            begun.set()

    def child():
        try:
            writer.append(b"of the child")
        except ForkedBusError:
            writer.flush()
            return 9 if writer.close(5.0) else 7
        return 8

    def fork(ending):
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(ending())
            finally:
                os._exit(10)
        return pid

    thread = threading.Thread(target=append)
    thread.start()
    begun.wait()
    codes = [os.waitstatus_to_exitcode(os.waitpid(fork(child), 0)[1]) for _ in range(40)]
    end, other = os.pipe()
    last = fork(lambda: os.close(other) or len(os.read(end, 1)))  # outlives the journal
    stop.set()
    thread.join()
    closed = writer.close()
    print(set(codes), closed, JournalReader(sys.argv[1]).is_live(writer.stream), writer.recorded)
    os.close(other)
    os.waitpid(last, 0)
"""


@pytest.mark.long
def test_children_that_are_forked_while_events_are_appended_touch_nothing_and_hold_nothing(tmp_path, program):
    process = program(FORKS, str(tmp_path / "journal"))
    out, errors = process.communicate(timeout=18)
    words = out.split()
    assert words[:3] == ["{7}", "True", "False"], (out, errors)
    recorded = int(words[3])
    assert recorded > 40
    assert read_sequences(tmp_path / "journal") == list(range(1, recorded + 1))
    assert verify(tmp_path / "journal").is_intact
