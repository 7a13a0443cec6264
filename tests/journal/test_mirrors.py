"""Streams of another journal, written by name in batches under their own sequences: what relays and mirrors do."""

import errno
import math
import threading
from pathlib import Path

import msgspec
import pytest

from evsys_bus import EventBus, LogContext, LoopArtifacts, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart
from evsys_bus.codec import encode
from evsys_bus.errors import JournalOpenError, UnrecordedError
from evsys_bus.events import ArmResult, Envelope, ExperimentEnd, ExperimentStart, RunEnd, RunResult, RunStart
from evsys_bus.journal import JournalReader, JournalWriter, OsDisk, frame, verify
from evsys_bus.testing import MachineStopped, SimulatedDisk
from support.journals import read_sequences
from support.pages import run_blocks, snippets

NEVER = math.inf
STREAM = "r3-000007-20260131T120000-5f3a91c2"


def mirror(disk=None, directory="/mirror", stream: str = STREAM, **options) -> JournalWriter:
    return JournalWriter(directory, stream=stream, disk=disk, **{"flush_seconds": NEVER, **options}).open()


def batch(*sequences: int) -> list[tuple[int, bytes]]:
    return [(sequence, b"event %d" % sequence) for sequence in sequences]


def carried_by_segment(folder: Path) -> dict[int, list[int]]:
    found = {}
    for path in sorted(folder.glob("*.seg")):
        frames = frame.scan(path.read_bytes(), frame.SEGMENT_HEADER_BYTES)
        found[int(path.stem.partition("-")[2])] = [each.sequence for each in frames if each.kind == frame.CARRIED]
    return found


def test_the_page_on_the_format_has_a_mirror_that_works(tmp_path):
    blocks = list(snippets(Path(__file__).parents[2] / "docs/journal-format.md"))
    assert len(blocks) == 1
    assert run_blocks(tmp_path, blocks) == []
    original, copy = JournalReader(tmp_path / "original"), JournalReader(tmp_path / "copy")
    [stream] = original.streams()
    assert list(copy.read(stream)) == list(original.read(stream))
    assert copy.id != original.id


# -- opening a stream by its name -------------------------------------------------------------------------------------


def test_a_stream_is_continued_by_its_name_after_a_power_cut_too():
    disk = SimulatedDisk()
    writer = mirror(disk)
    assert (writer.stream, writer.append_batch(batch(1, 2))) == (STREAM, 2)
    disk.restart("power")
    second = mirror(disk)
    assert second.next_sequence == 3
    assert second.append_batch(batch(3)) == 3
    assert JournalReader("/mirror", disk).streams() == [STREAM]
    assert read_sequences("/mirror", disk=disk) == [1, 2, 3]
    assert second.close()


def test_a_stream_that_is_open_is_an_error_that_names_its_holder(tmp_path):
    writer = mirror(directory=tmp_path)
    with pytest.raises(JournalOpenError, match=r"process \d+ on .* has the stream"):
        mirror(directory=tmp_path)
    other = mirror(directory=tmp_path, stream=STREAM.replace("r3", "r4"))
    assert writer.close()
    assert other.close()
    assert mirror(directory=tmp_path).close()


@pytest.mark.parametrize("name", ["", "journal", "../r0-000001-20260131T120000-5f3a91c2", "r0-000001"])
def test_what_is_not_the_name_of_a_stream_is_an_error(tmp_path, name):
    with pytest.raises(JournalOpenError, match="not the name of a stream"):
        mirror(directory=tmp_path, stream=name)


def test_a_bus_does_not_continue_a_stream_that_was_written_by_name(tmp_path):
    writer = mirror(directory=tmp_path)
    writer.append_batch(batch(1))
    assert writer.close()
    bus_writer = JournalWriter(tmp_path, rank=3).open()
    assert bus_writer.stream != STREAM
    assert bus_writer.close()


# -- batches ----------------------------------------------------------------------------------------------------------


class CountingDisk(OsDisk):
    """Counts writes and syncs of open files."""

    def __init__(self) -> None:
        self.writes = self.syncs = 0

    def write(self, file, data):
        self.writes += 1
        return super().write(file, data)

    def sync(self, file):
        self.syncs += 1
        super().sync(file)


@pytest.mark.parametrize("flush", ["never", "interval", "always"])
def test_a_batch_is_one_write_and_one_sync(tmp_path, flush):
    disk = CountingDisk()
    writer = mirror(disk, tmp_path, flush=flush, reserve_bytes=0)
    writer.append_batch(batch(1))
    disk.writes = disk.syncs = 0
    assert writer.append_batch(batch(*range(2, 502))) == 501
    assert (disk.writes, disk.syncs) == (1, 1)
    assert read_sequences(tmp_path) == list(range(1, 502))
    assert (writer.recorded, writer.unrecorded, writer.lost) == (501, 0, 0)
    writer.close()


def test_a_batch_larger_than_a_segment_goes_into_several_and_all_are_synced():
    disk = SimulatedDisk()
    writer = mirror(disk, segment_bytes=500, flush="never")
    assert writer.append_batch(batch(*range(1, 201))) == 200
    disk.restart("power")
    assert read_sequences("/mirror", disk=disk) == list(range(1, 201))
    assert verify("/mirror", disk).is_intact
    assert len([path for path in disk.paths() if path.endswith(".seg")]) > 10


def test_what_comes_again_is_recorded_once():
    disk = SimulatedDisk()
    writer = mirror(disk)
    assert writer.append_batch(batch(1, 2, 3)) == 3
    assert writer.append_batch(batch(1, 2, 3)) == 3
    assert writer.append_batch(batch(2, 3, 4)) == 4
    assert writer.append_batch([]) == 4
    assert read_sequences("/mirror", disk=disk) == [1, 2, 3, 4]
    [report] = verify("/mirror", disk).streams
    assert (report.records, writer.recorded) == (4, 4)


@pytest.mark.parametrize("sequences", [(1, 1), (2, 1), (0, 1), (-1,)])
def test_a_batch_that_does_not_ascend_is_an_error_and_nothing_of_it_is_recorded(tmp_path, sequences):
    writer = mirror(directory=tmp_path)
    with pytest.raises(ValueError, match="ascend"):
        writer.append_batch(batch(*sequences))
    assert read_sequences(tmp_path) == []
    assert writer.close()


def test_sequences_may_skip_ahead_and_readers_report_the_gaps_also_at_the_start(tmp_path):
    writer = mirror(directory=tmp_path)
    assert writer.append_batch(batch(5, 6)) == 6
    assert writer.append_batch(batch(9)) == 9
    assert (writer.recorded, writer.lost) == (3, 0)
    assert writer.close()
    [report] = verify(tmp_path).streams
    assert report.missing_ranges == [(1, 4), (7, 8)]
    assert read_sequences(tmp_path) == [5, 6, 9]


def test_a_disk_that_refuses_a_batch_is_an_error_and_the_batch_can_be_given_again():
    disk = SimulatedDisk()
    writer = mirror(disk, reserve_bytes=0)
    writer.append_batch(batch(1))
    disk.room = 10
    for _ in range(3):
        with pytest.raises(UnrecordedError, match="did not take"):
            writer.append_batch(batch(2, 3))
        assert (writer.next_sequence, writer.recorded, writer.unrecorded) == (2, 1, 0)
    disk.room = None
    assert writer.append_batch(batch(2, 3)) == 3
    assert read_sequences("/mirror", disk=disk) == [1, 2, 3]
    assert writer.current_error is None
    assert writer.close()


class FailingSync(SimulatedDisk):
    error: BaseException | None = None

    def sync(self, file):
        if self.error is not None:
            raise self.error
        super().sync(file)


@pytest.mark.parametrize("has_round_between", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_batch_whose_sync_failed_is_written_again_and_read_once(code, has_round_between):
    disk = FailingSync()
    writer = mirror(disk)
    writer.append_batch(batch(1))
    broken = writer.segment
    disk.error = OSError(code, "the disk is broken")
    with pytest.raises(UnrecordedError):
        writer.append_batch(batch(2, 3))
    if has_round_between:  # a sync that fails or succeeds in it must not make the batch look synced
        writer.flush()
        disk.error = None
        writer.flush()
    disk.error = None
    assert writer.append_batch(batch(2, 3)) == 3
    assert writer.segment != broken  # what a failed sync left of it is not known
    disk.restart("power")
    assert read_sequences("/mirror", disk=disk) == [1, 2, 3]


def test_a_batch_that_was_written_and_not_synced_before_a_kill_is_synced_before_it_is_acknowledged():
    disk = FailingSync()
    writer = mirror(disk)
    disk.error = MachineStopped()
    with pytest.raises(MachineStopped):
        writer.append_batch(batch(1, 2))
    disk.error = None
    disk.restart("kill")
    assert mirror(disk).append_batch(batch(1, 2)) == 2
    disk.restart("power")
    assert read_sequences("/mirror", disk=disk) == [1, 2]


def test_whichever_call_the_machine_stops_in_an_acknowledged_batch_is_there_once_after_it():
    batches = [batch(*range(first, first + 4)) for first in range(1, 20, 4)]

    def live(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        writer = mirror(disk, segment_bytes=150, reserve_bytes=0)
        acknowledged.extend(map(writer.append_batch, batches))

    disk = SimulatedDisk()
    live(disk, [])
    for call in range(1, disk.calls + 1):
        disk, acknowledged = SimulatedDisk(), [0]
        disk.stop(call)
        try:
            live(disk, acknowledged)
        except MachineStopped:
            pass
        disk.restart("power")
        assert read_sequences("/mirror", disk=disk)[: acknowledged[-1]] == list(range(1, acknowledged[-1] + 1)), call
        again = []
        live(disk, again)  # all batches come again
        assert again[-1] == 20
        assert read_sequences("/mirror", disk=disk) == list(range(1, 21)), call


# -- what is open -----------------------------------------------------------------------------------------------------

CTX = LogContext(output_dir=Path("/out"), run_key="run-a")
STATE = LoopState(step=0, num_steps=9, output_dir=Path("/out/run-a"), ctx=CTX)


def events():
    yield ExperimentStart(LogContext(output_dir=Path("/out"))), None
    yield RunStart(CTX), "run-a"
    yield TrainStart(STATE), "run-a"
    for step in range(12):
        yield StepEnd(STATE, step, TrainingBatch(), {"loss": 0.5}), "run-a"
    yield TrainEnd(STATE, LoopArtifacts()), "run-a"
    for step in range(12):
        yield StepEnd(STATE, step, TrainingBatch(), {"eval": 0.5}), "run-a"
    yield RunEnd(CTX, RunResult(), ArmResult("a")), "run-a"
    for step in range(12):
        yield StepEnd(LoopState(0, 9, Path("/other")), step, TrainingBatch(), {"loss": 0.5}), "other"
    yield ExperimentEnd(CTX, None), None


def envelopes() -> list[tuple[int, bytes]]:
    return [
        (number, encode(Envelope(STREAM, number, 1.0, event, run))) for number, (event, run) in enumerate(events(), 1)
    ]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_batches_repeat_the_starts_of_what_is_open_in_each_segment_exactly_as_single_appends_do(tmp_path, size):
    records = envelopes()
    single = mirror(directory=tmp_path / "single", segment_bytes=900)
    for _, payload in records:
        single.append(payload, essential=True)
    assert single.close()
    batched = mirror(directory=tmp_path / "batched", segment_bytes=900)
    for start in range(0, len(records), size):
        batched.append_batch(records[start : start + size])
    assert batched.close()
    expected = carried_by_segment(tmp_path / "single" / STREAM)
    assert carried_by_segment(tmp_path / "batched" / STREAM) == expected
    assert {tuple(each) for each in expected.values()} >= {(1, 2, 3), (1, 2), (1,)}


def test_a_mirror_that_is_started_again_still_repeats_the_starts(tmp_path):
    records = envelopes()
    for record in records[:20]:
        writer = mirror(directory=tmp_path, segment_bytes=900)
        writer.append_batch([record])
        assert writer.close()
    carried = carried_by_segment(tmp_path / STREAM)
    assert carried[10] == [1, 2, 3]  # each life has begun a segment
    assert carried[20] == [1, 2]


# -- liveness ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_live_as_its_writer_last_declared_and_not_after_its_end(tmp_path):
    reader = JournalReader(tmp_path)
    writer = mirror(directory=tmp_path)
    assert reader.is_live(STREAM)
    writer.set_live(False)
    assert not reader.is_live(STREAM)
    assert verify(tmp_path).streams[0].is_live is False
    with pytest.raises(JournalOpenError):  # it is still locked
        mirror(directory=tmp_path)
    assert writer.close()
    second = mirror(directory=tmp_path)
    assert not reader.is_live(STREAM)  # as declared before
    second.set_live(True)
    assert reader.is_live(STREAM)
    assert second.close()
    assert not reader.is_live(STREAM)


# -- the identity of a journal ----------------------------------------------------------------------------------------


def test_a_journal_has_an_id_that_stays(tmp_path):
    reader = JournalReader(tmp_path)
    assert reader.id == ""
    writer = JournalWriter(tmp_path).open()
    assert len(writer.id) == 36
    assert writer.close()
    with EventBus([], journal=tmp_path):
        pass
    named = mirror(directory=tmp_path)
    assert {reader.id, named.id} == {writer.id}
    assert named.close()
    other = JournalWriter(tmp_path / "other").open()
    assert other.id != writer.id
    assert other.close()


def test_a_journal_of_an_earlier_version_gets_an_id_when_it_is_next_written(tmp_path):
    (tmp_path / "journal.json").write_text('{"evsys_bus_journal":1}\n')
    assert JournalReader(tmp_path).id == ""
    writer = JournalWriter(tmp_path).open()
    assert writer.id
    assert writer.close()
    assert msgspec.json.decode((tmp_path / "journal.json").read_bytes()) == {"evsys_bus_journal": 1, "id": writer.id}


def test_an_id_that_was_used_survives_whichever_call_the_machine_stops_in():
    disk = SimulatedDisk()
    JournalWriter("/journal", disk=disk, flush_seconds=NEVER, reserve_bytes=0).open()
    for call in range(1, disk.calls + 1):
        disk = SimulatedDisk()
        disk.stop(call)
        found = ""
        try:
            found = JournalWriter("/journal", disk=disk, flush_seconds=NEVER, reserve_bytes=0).open().id
        except MachineStopped:
            pass
        disk.restart("power")
        again = JournalWriter("/journal", disk=disk, flush_seconds=NEVER, reserve_bytes=0).open().id
        assert again
        assert found in {"", again}


def test_writers_that_open_a_new_journal_at_once_agree_on_its_id(tmp_path):
    writers = [JournalWriter(tmp_path / "journal", rank=rank) for rank in range(8)]
    threads = [threading.Thread(target=writer.open) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {writer.id for writer in writers} == {JournalReader(tmp_path / "journal").id}
    assert all(writer.close() for writer in writers)
