"""Small files: replaced whole or not at all, and read whatever stands in their place."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from evsys_bus.disk import OsDisk
from evsys_bus.files import (
    AppendFile,
    DamagedFileError,
    FileLock,
    create_file,
    load_file,
    read_file,
    replace_file,
    write_into_place,
)
from evsys_bus.testing import SimulatedDisk


class Note(msgspec.Struct, forbid_unknown_fields=True):
    words: str
    count: int = 0


def decode(data: bytes) -> Note:
    return msgspec.json.decode(data, type=Note)


NOTE = msgspec.json.encode(Note("as it was written", 17))


def directory(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("kept")


def damages() -> dict[str, object]:
    cut = {f"cut at {size}": NOTE[:size] for size in range(len(NOTE))}
    return cut | {
        "zeros": bytes(len(NOTE)),
        "later version": b'{"words":"x","count":1,"more":[]}',
        "other kind": b"[1,2]",
        "no text": b"\xff\xfe\x00",
        "nested": b"[" * 200_000,
        "large": b" " * (17 << 20),
        "directory": directory,
        "fifo": os.mkfifo,
        "link to itself": lambda path: path.symlink_to(path),
        "link to a directory": lambda path: path.symlink_to(path.parent, target_is_directory=True),
        "device": lambda path: path.symlink_to("/dev/zero"),
    }


DAMAGES = damages()


def put(path: Path, damage: object) -> None:
    path.unlink(missing_ok=True)
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        damage(path)  # type: ignore[operator]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_set_aside_once_and_made_anew(kind, tmp_path, caplog):
    path = tmp_path / "note.json"
    for _ in range(2):  # also where an earlier one was set aside
        put(path, DAMAGES[kind])
        assert load_file(path, decode, quarantine=True) is None
        assert load_file(path, decode, quarantine=True) is None
        replace_file(path, NOTE)
        assert load_file(path, decode, quarantine=True) == Note("as it was written", 17)
    assert [record.event for record in caplog.records] == ["file.damaged"] * 2
    assert os.path.lexists(tmp_path / "note.json.damaged")
    assert len([*tmp_path.iterdir()]) <= 3


@pytest.mark.parametrize("kind", DAMAGES)
def test_who_only_looks_leaves_a_damaged_file_and_warns_once(kind, tmp_path, caplog):
    path = tmp_path / "note.json"
    put(path, DAMAGES[kind])
    assert [load_file(path, decode, quarantine=False) for _ in range(3)] == [None] * 3
    assert [record.event for record in caplog.records] == ["file.damaged"]
    assert os.path.lexists(path)


def test_one_kind_set_aside_gives_way_to_another(tmp_path):
    path = tmp_path / "note.json"
    for kind in [*DAMAGES, *reversed(DAMAGES)]:
        put(path, DAMAGES[kind])
        assert load_file(path, decode, quarantine=True) is None
        replace_file(path, NOTE)
    assert len([*tmp_path.iterdir()]) <= 4


def test_a_missing_file_and_a_link_to_nothing_are_not_damaged(tmp_path, caplog):
    path = tmp_path / "note.json"
    assert load_file(path, decode, quarantine=True) is None
    path.symlink_to(tmp_path / "nowhere" / "at all")
    assert load_file(path, decode, quarantine=True) is None
    replace_file(path, NOTE)
    assert (read_file(path), path.is_symlink(), caplog.records) == (NOTE, False, [])


def test_a_file_that_cannot_be_read_now_is_not_damaged(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(NotADirectoryError):
        load_file(tmp_path / "file" / "note.json", decode, quarantine=True)


def test_what_is_larger_than_asked_for_is_refused(tmp_path):
    replace_file(tmp_path / "note", b"12345")
    assert read_file(tmp_path / "note", max_bytes=5) == b"12345"
    with pytest.raises(DamagedFileError, match="larger than 4"):
        read_file(tmp_path / "note", max_bytes=4)


def test_a_link_is_replaced_or_followed_as_asked(tmp_path):
    there = tmp_path / "elsewhere" / "note"
    replace_file(there, b"before")
    path = tmp_path / "note"
    path.symlink_to(there)
    replace_file(path, b"followed", follow_link=True)
    assert (path.is_symlink(), there.read_bytes()) == (True, b"followed")
    replace_file(path, b"replaced")
    assert (path.is_symlink(), path.read_bytes(), there.read_bytes()) == (False, b"replaced", b"followed")


def test_files_are_the_owners_or_as_the_umask_has_it(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "own" / "file", b"")
        replace_file(tmp_path / "users" / "file", b"", mode=0o666)
    finally:
        os.umask(before)
    modes = [oct((tmp_path / each).stat().st_mode & 0o777) for each in ("own", "own/file", "users", "users/file")]
    assert modes == ["0o700", "0o600", "0o750", "0o640"]


@pytest.mark.parametrize(
    "left",
    [
        lambda path: path.write_bytes(b"half of it"),
        os.mkfifo,
        lambda path: path.symlink_to(path.parent / "victim"),
        lambda path: os.link(path.parent / "victim", path),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path),
    ],
    ids=["file", "fifo", "link", "hard link", "dangling", "loop"],
)
def test_what_stands_where_the_data_is_written_first_is_removed_and_not_followed(left, tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    left(tmp_path / "note.new")
    replace_file(tmp_path / "note", b"data")
    assert (tmp_path / "note").read_bytes() == b"data"
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["note", "victim"]


def test_a_directory_where_the_data_is_written_first_stays(tmp_path):
    directory(tmp_path / "note.new")
    replace_file(tmp_path / "note", b"data")
    assert (tmp_path / "note").read_bytes() == b"data"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["note", "note.new"]


def test_threads_that_replace_one_file_do_not_mix_their_data(tmp_path):
    path, wrong = tmp_path / "note", []
    written = [bytes([65 + number]) * (1 << 16) for number in range(4)]
    replace_file(path, written[0])

    def work(data: bytes) -> None:
        for _ in range(40):
            replace_file(path, data)
            if read_file(path) not in written:
                wrong.append(len(read_file(path)))

    threads = [threading.Thread(target=work, args=(each,)) for each in written]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (wrong, [*tmp_path.iterdir()]) == ([], [path])


def test_a_directory_in_the_place_of_a_small_file_makes_room_and_is_kept(tmp_path):
    for _ in range(3):
        (tmp_path / "note").unlink(missing_ok=True)
        directory(tmp_path / "note")
        replace_file(tmp_path / "note", b"data")
        assert read_file(tmp_path / "note") == b"data"
    names = ["note", "note.damaged", "note.damaged.1", "note.damaged.2"]
    assert sorted(each.name for each in tmp_path.iterdir()) == names


def test_what_cannot_be_written_leaves_nothing_beside(tmp_path):
    disk = SimulatedDisk()
    replace_file("/folder/note", b"before", disk=disk)
    for number in range(disk.calls + 1, disk.calls + 9):
        disk.fail(number, errno.ENOSPC)
        with suppress(OSError):
            replace_file("/folder/note", b"after", disk=disk)
        assert disk.contents("/folder/note") in (b"before", b"after")
        replace_file("/folder/note", b"before", disk=disk)
        assert [*disk.paths()] == ["/folder/note"]


def test_of_several_that_create_a_file_at_once_one_counts(tmp_path):
    made = []

    def work(number: int) -> None:
        if create_file(tmp_path / "id", b"%d" % number):
            made.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [int(read_file(tmp_path / "id"))] == made
    assert [each.name for each in tmp_path.iterdir()] == ["id"]


def test_what_is_written_into_place_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "table.csv"
    with pytest.raises(ZeroDivisionError), write_into_place(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [*tmp_path.iterdir()] == []
    with write_into_place(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    with write_into_place("/dev/null") as file:
        file.write(b"gone")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("taken", [1, 9, 10, 15])
def test_what_a_refused_append_left_is_taken_back_before_the_next_one(taken):
    class Refusing(SimulatedDisk):
        refuses = 0

        def write(self, file, data, /):
            self._refuse()
            if self.refuses:
                self.refuses -= 1
                return super().write(file, data[:taken])
            return super().write(file, data)

        def truncate(self, file, size):
            self._refuse()
            super().truncate(file, size)

        def _refuse(self):
            if 0 < self.refuses < 3:
                self.refuses -= 1
                raise OSError(errno.EIO, "I/O error")

    disk = Refusing()
    file = AppendFile(Path("/folder/rows"), disk=disk)
    file.append(b"before\n")
    disk.refuses = 3  # a part of it is written, then the rest is refused, and the cut as well
    with pytest.raises(OSError, match="I/O error"):
        file.append(b"first row\nsecond row\n")
    file.append(b"first row\nsecond row\n")
    assert bytes(disk.contents("/folder/rows")) == b"before\nfirst row\nsecond row\n"


def test_a_torn_line_that_the_disk_does_not_let_us_cut_is_cut_before_the_next_row():
    class Refusing(SimulatedDisk):
        refuses = False

        def truncate(self, file, size):
            if self.refuses:
                raise OSError(errno.EIO, "I/O error")
            super().truncate(file, size)

    disk = Refusing()
    disk.put("/folder/rows", b"whole\nto")
    file = AppendFile(Path("/folder/rows"), disk=disk)
    disk.refuses = True
    with pytest.raises(OSError, match="I/O error"):
        file.append(b"next\n")
    disk.refuses = False
    file.append(b"next\n")
    assert bytes(disk.contents("/folder/rows")) == b"whole\nnext\n"


@pytest.mark.parametrize("kind", [OsDisk, SimulatedDisk])
def test_a_directory_in_place_of_a_small_file_is_set_aside_with_what_is_in_it(kind, tmp_path):
    disk, small = kind(), f"{tmp_path}/small"
    disk.make_directory(small)
    replace_file(f"{small}/within", b"kept", disk=disk)
    assert load_file(small, bytes.decode, quarantine=True, disk=disk) is None
    (aside,) = [name for name in disk.names(str(tmp_path)) if name != "small"]
    assert disk.names(str(tmp_path)) == [aside]
    assert read_file(f"{tmp_path}/{aside}/within", disk=disk) == b"kept"
    replace_file(small, b"new", disk=disk)
    assert load_file(small, bytes.decode, quarantine=True, disk=disk) == "new"


def test_a_file_ends_before_what_a_power_cut_made_zeros_and_what_stood_behind_them_is_kept_beside_it():
    disk = SimulatedDisk()
    torn = b"first\nsec" + bytes(40) + b"d\nthird\nfou"
    disk.put("/folder/rows", torn)
    file = AppendFile(Path("/folder/rows"), disk=disk)
    assert [*file.lines()] == [b"first\n"]
    file.append(b"second\n")
    assert bytes(disk.contents("/folder/rows")) == b"first\nsecond\n"
    beside = [path for path in disk.paths() if path.endswith(".set-aside")]
    assert [bytes(disk.contents(path)) for path in beside] == [torn]


def test_zeros_at_the_end_of_a_file_are_cut_and_nothing_is_kept_of_them():
    disk = SimulatedDisk()
    disk.put("/folder/rows", b"first\nsec" + bytes(40))
    AppendFile(Path("/folder/rows"), disk=disk).append(b"second\n")
    assert [*disk.paths()] == ["/folder/rows"]
    assert bytes(disk.contents("/folder/rows")) == b"first\nsecond\n"


def test_a_folder_that_is_a_link_to_itself_is_an_error_of_the_disk(tmp_path):
    """`OSError` is what walls expect; `pathlib` makes a `RuntimeError` of it before Python 3.13."""
    (tmp_path / "couriers").symlink_to("couriers")
    with pytest.raises(OSError, match="couriers"):
        OsDisk().make_directory(str(tmp_path / "couriers"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes another user's link")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: AppendFile(path).append(b"row\n"),
        FileLock.acquire,
        lambda path: replace_file(path, b"row\n", follow_link=True),
    ],
    ids=["append", "lock", "replace"],
)
def test_nothing_is_written_through_a_link_that_another_user_made(tmp_path, write):
    target, link = tmp_path / "mine", tmp_path / "link"
    target.write_text("kept")
    link.symlink_to(target)
    os.chown(link, 65534, 65534, follow_symlinks=False)
    with suppress(OSError):
        write(link)
    assert target.read_text() == "kept"


def test_a_link_of_the_same_user_is_written_through(tmp_path):
    target, link = tmp_path / "mine", tmp_path / "link"
    target.write_text("kept\n")
    link.symlink_to(target)
    AppendFile(link).append(b"row\n")
    assert target.read_text() == "kept\nrow\n"
    replace_file(link, b"other\n", follow_link=True)
    assert target.read_text() == "other\n"
    assert link.is_symlink()


def test_a_simulated_disk_overwrites_and_removes_a_file_durably():
    disk = SimulatedDisk()
    disk.put("/folder/rows", b"first")
    file = disk.open_read("/folder/rows")
    disk.put("/folder/rows", b"damaged")
    assert disk.pread(file, 99, 0) == b"damaged"
    disk.restart("power")
    assert disk.read("/folder/rows", 0, 99) == b"damaged"
    disk.take_away("/folder/rows")
    disk.restart("power")
    assert list(disk.paths()) == []
    assert disk.names("/") == ["folder"]
