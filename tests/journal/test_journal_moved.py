"""A directory whose file system has no locks, or does not append: the stream stands on a disk of this machine."""

import contextlib
import errno
import json
import math
import os
import stat

import pytest

from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch, follow
from evsys_bus.cli import run
from evsys_bus.errors import JournalOpenError
from evsys_bus.journal import JournalReader, JournalWriter, OsDisk, verify
from evsys_bus.testing import RecordingSink, SimulatedDisk
from support.journals import read_sequences

NEVER = math.inf
LACKS = pytest.mark.parametrize("lacks", ["locks", "appends"])


def network(lacks: str, *directories: str) -> SimulatedDisk:
    disk = SimulatedDisk()
    (disk.without_locks if lacks == "locks" else disk.without_appends).update(directories)
    return disk


def life(disk: SimulatedDisk, events: int = 10, directory: str = "/network/journal") -> JournalWriter:
    writer = JournalWriter(directory, disk=disk, flush_seconds=NEVER, reserve_bytes=0, segment_bytes=200).open()
    for _ in range(events):
        writer.append(b"event %d" % writer.next_sequence)
    assert writer.close()
    return writer


def sequences(disk: SimulatedDisk, directory: str = "/network/journal") -> list[int]:
    return read_sequences(directory, disk=disk)


@LACKS
def test_a_stream_that_cannot_stand_in_the_journal_stands_on_a_local_disk_and_is_read_from_both_places(lacks, caplog):
    disk = network(lacks, "/network")
    writer = life(disk)
    assert writer.directory == "/network/journal"
    assert sequences(disk) == list(range(1, 11))
    assert [path for path in disk.paths() if path.startswith("/network")] == ["/network/journal/journal.json"]
    local = f"/local/state/evsys-bus-{writer.stream}"
    assert sequences(disk, local) == list(range(1, 11))
    assert verify("/network/journal", disk).is_intact
    [told] = [record for record in caplog.records if "journal.moved" in record.message]
    assert (told.levelname, told.directory, told.to, told.lacks) == ("WARNING", "/network/journal", local, lacks)


@LACKS
def test_the_next_writer_goes_on_in_the_stream_that_was_moved(lacks, caplog):
    disk = network(lacks, "/network")
    streams = {life(disk).stream for _ in range(3)}
    assert len(streams) == 1
    assert sequences(disk) == list(range(1, 31))
    assert sum("journal.moved" in line for line in caplog.messages) == 1


def test_two_writers_at_a_time_are_moved_apart_and_each_stream_is_live():
    disk = network("locks", "/network")
    writers = [JournalWriter("/network/journal", disk=disk, flush_seconds=NEVER).open() for _ in range(2)]
    reader = JournalReader("/network/journal", disk)
    assert sorted(writer.stream for writer in writers) == reader.streams()
    assert all(map(reader.is_live, reader.streams()))
    for writer in writers:
        assert writer.close()
    assert not any(map(reader.is_live, reader.streams()))


def test_what_couriers_lock_is_moved_as_well():
    disk = network("locks", "/network")
    life(disk)
    disk.make_directory("/network/journal/couriers")
    assert disk.lock("/network/journal/couriers/csv.lock") is not None


@LACKS
def test_a_local_place_that_is_no_better_is_passed_over(lacks):
    disk = network(lacks, "/network", "/local/state")
    writer = life(disk)
    assert sequences(disk, f"/local/temporary/evsys-bus-{writer.stream}") == list(range(1, 11))


def test_without_a_better_place_a_stream_without_locks_stays_and_nobody_continues_it(caplog):
    disk = network("locks", "/network", "/local")
    first, second = life(disk), life(disk)
    assert first.stream != second.stream
    assert "journal.not_moved" in caplog.text
    assert "journal.not_lockable" in caplog.text
    assert sequences(disk) == [*range(1, 11), *range(1, 11)]
    assert not JournalReader("/network/journal", disk).is_live(first.stream)
    assert verify("/network/journal", disk).is_intact


def test_without_a_better_place_a_disk_that_does_not_append_is_refused():
    with pytest.raises(JournalOpenError, match="does not append"):
        life(network("appends", "/network", "/local"))


def test_a_disk_that_does_all_that_is_needed_keeps_its_streams_and_nothing_of_the_trial(caplog):
    disk = SimulatedDisk()
    writer = life(disk)
    paths = [path for path in disk.paths() if not path.startswith(f"/network/journal/{writer.stream}/")]
    assert paths == ["/network/journal/journal.json"]
    assert caplog.messages == []


def test_a_stream_whose_lock_is_refused_is_not_continued_and_costs_no_start():
    disk = SimulatedDisk()
    first = life(disk)
    disk.without_locks.add("/network")
    second = life(disk)
    assert second.stream != first.stream
    assert sequences(disk) == [*range(1, 11), *range(1, 11)]


class Network(OsDisk):
    """The real disk, without locks below one directory: as over NFS whose lock service is not there."""

    def __init__(self, directory, local):
        self.directory, self.local = directory, local

    def local_directories(self):
        return [str(self.local)]

    def lock(self, path):
        if os.path.realpath(path).startswith(f"{self.directory}/"):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), path)
        return super().lock(path)


def test_the_command_line_finds_what_was_moved(tmp_path, capsys):
    folder = tmp_path / "runs" / "first"
    state = LoopState(step=0, num_steps=3, output_dir=folder)
    writer = JournalWriter(folder / "journal", disk=Network(tmp_path / "runs", tmp_path / "local"))
    with EventBus([], journal=writer) as bus:
        for number in range(3):
            bus.publish(StepEnd(state, number, TrainingBatch(), {"loss": 1.0}))
        assert bus.health().journal.directory == str(folder / "journal")
        with contextlib.chdir(tmp_path):
            assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "live"
    assert (folder / "journal" / writer.stream).is_symlink()
    [local] = (tmp_path / "local").iterdir()
    for place in (folder, local):
        assert run(["tail", str(place), "--json"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3
        assert run(["journal", "verify", str(place)]) == 0
        assert "closed   3 events" in capsys.readouterr().out
    for path in [local, *local.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_stream_that_stands_on_another_machine_is_known_and_empty(tmp_path, capsys):
    disk = Network(tmp_path / "runs", tmp_path / "local")
    other = life(disk, directory=str(tmp_path / "runs" / "journal"))
    (tmp_path / "local").rename(tmp_path / "the other machine's")
    assert run(["status", str(tmp_path / "runs" / "journal"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["stream"], row["state"], row["bytes"]) == (other.stream, "dead", 0)
    assert run(["journal", "verify", str(tmp_path / "runs")]) == 0
    own = life(disk, directory=str(tmp_path / "runs" / "journal"))
    assert own.stream != other.stream
    assert own.recorded == 10


def test_a_local_directory_that_was_cleared_away_is_made_again(tmp_path):
    disk = Network(tmp_path / "runs", tmp_path / "local")
    writer = JournalWriter(tmp_path / "runs" / "journal", disk=disk, flush_seconds=NEVER).open()
    writer.append(b"one")
    for path in sorted((tmp_path / "local").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    writer.flush()
    writer.append(b"two")
    assert (writer.unrecorded, writer.close(), writer.recorded, writer.lost) == (0, False, 1, 1)
    assert [record.payload for record in JournalReader(tmp_path / "runs" / "journal").read(writer.stream)] == [b"two"]


def test_the_local_places_are_the_users_state_and_then_the_temporary_directory(tmp_path, program):
    ask = "from evsys_bus.journal import OsDisk; print(*OsDisk().local_directories(), sep='\\n')"
    temporary = str(tmp_path)

    def places(**environment):
        return program(ask, TMPDIR=temporary, **environment).communicate(timeout=10)[0].split()

    assert places(XDG_STATE_HOME="/somewhere") == ["/somewhere/evsys-bus", temporary]
    assert places(XDG_STATE_HOME="", HOME="/home/me") == ["/home/me/.local/state/evsys-bus", temporary]
    assert places(XDG_STATE_HOME="relative", HOME="/home/me") == ["/home/me/.local/state/evsys-bus", temporary]


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
