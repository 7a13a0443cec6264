"""File systems that a journal cannot be on: without locks, or where appended data goes elsewhere."""

import math

import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch, follow
from evsys_bus.errors import JournalOpenError
from evsys_bus.journal import JournalWriter, OsDisk, verify
from evsys_bus.testing import RecordingSink, SimulatedDisk

NEVER = math.inf


def write_ten(disk: SimulatedDisk, directory: str = "/network/journal") -> JournalWriter:
    writer = JournalWriter(directory, disk=disk, flush_seconds=NEVER, reserve_bytes=0, segment_bytes=200).open()
    for _ in range(10):
        writer.append(b"event %d" % writer.next_sequence)
    assert writer.close()
    return writer


@pytest.mark.parametrize(("lacks", "text"), [("locks", "has no locks"), ("appends", "does not append")])
def test_a_journal_on_an_unsuitable_file_system_is_an_error_at_the_start_that_names_the_fix(lacks, text):
    disk = SimulatedDisk()
    (disk.without_locks if lacks == "locks" else disk.without_appends).add("/network")
    with pytest.raises(JournalOpenError, match=text) as caught:
        write_ten(disk)
    assert "local disk" in str(caught.value)
    assert list(disk.paths()) == []


def test_locks_that_end_between_two_runs_are_an_error_as_well_and_cost_no_event():
    disk = SimulatedDisk()
    first = write_ten(disk)
    disk.without_locks.add("/network")
    with pytest.raises(JournalOpenError, match="has no locks"):
        write_ten(disk)
    disk.without_locks.clear()
    assert write_ten(disk).stream == first.stream
    assert verify("/network/journal", disk).streams[0].records == 20


def test_a_suitable_disk_is_left_without_a_trace_of_the_test(caplog):
    disk = SimulatedDisk()
    writer = write_ten(disk)
    paths = [path for path in disk.paths() if not path.startswith(f"/network/journal/{writer.stream}/")]
    assert paths == ["/network/journal/journal.json"]
    assert caplog.messages == []


def test_a_directory_below_links_that_lead_to_each_other_is_an_os_error(tmp_path):
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    for path in (tmp_path / "one", tmp_path / "one" / "journal"):
        with pytest.raises(OSError, match="one"):
            OsDisk().make_directory(str(path))


def test_a_couriers_folder_of_links_that_lead_to_each_other_keeps_nobody_from_training(tmp_path):
    journal = tmp_path / "journal"
    journal.mkdir()
    (journal / "couriers").symlink_to("elsewhere")
    (journal / "elsewhere").symlink_to("couriers")
    followed = [follow(RecordingSink(), "kept")]
    with EventBus([], sinks=followed, journal=journal, couriers="thread", drain_timeout=2.0) as bus:
        bus.publish(StepEnd(LoopState(0, 1, tmp_path), 0, TrainingBatch(), {"loss": 1.0}))
    assert (bus.receipt.recorded, [each.state for each in bus.receipt.deliveries]) == (1, ["unknown"])
    assert verify(journal).is_intact
