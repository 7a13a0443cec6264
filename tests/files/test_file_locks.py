"""`FileLock`: one holder between processes and, if asked for, within one; it ends with its process."""

import os
import signal
import threading

import pytest

from evsys_bus.disk import LOCK_FLAGS, OsDisk
from evsys_bus.files import FileLock
from evsys_bus.testing import SimulatedDisk

HOLDS = """
    import os, signal, sys
    from pathlib import Path
    from evsys_bus.files import FileLock

    lock = FileLock.acquire_exclusive(Path(sys.argv[1]))
    if "fork" not in sys.argv:
        print("held", flush=True)
    elif os.fork() == 0:
        print(os.getpid(), lock.is_held, flush=True)
    signal.pause()
"""


class ReplacingDisk(OsDisk):
    """A disk on which other processes replace the next locked files between the opening and the lock."""

    def __init__(self, replacements):
        self.replacements = replacements

    def lock(self, path, mode=0o600, flags=LOCK_FLAGS):
        file = super().lock(path, mode, flags)
        if self.replacements:
            self.replacements.pop().replace(path)
        return file


def test_an_exclusive_lock_is_refused_to_its_own_process_as_well(tmp_path):
    path = tmp_path / "lock"
    with FileLock.acquire_exclusive(path) as lock:
        assert lock.is_held
        assert FileLock.acquire_exclusive(path) is None
        assert FileLock.acquire(path) is None
    assert not lock.is_held
    shared = FileLock.acquire(path)
    assert FileLock.acquire(path) is shared
    assert FileLock.acquire_exclusive(path) is None
    shared.release()
    FileLock.acquire_exclusive(path).release()


def test_an_exclusive_lock_ends_with_its_process(tmp_path, program):
    holder = program(HOLDS, str(tmp_path / "lock"))
    assert holder.stdout.readline() == "held\n"
    assert FileLock.acquire_exclusive(tmp_path / "lock", timeout_seconds=0.05) is None
    holder.kill()
    holder.wait()
    assert FileLock.acquire_exclusive(tmp_path / "lock").is_held


def test_a_forked_child_does_not_have_an_exclusive_lock(tmp_path, program):
    parent = program(HOLDS, str(tmp_path / "lock"), "fork")
    child, is_held = parent.stdout.readline().split()
    parent.kill()
    os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert is_held == "False"
        os.kill(int(child), 0)
        assert FileLock.acquire_exclusive(tmp_path / "lock").is_held
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_a_lock_is_waited_for_until_its_holder_releases_it(tmp_path):
    held = FileLock.acquire_exclusive(tmp_path / "lock")
    timer = threading.Timer(0.1, held.release)
    timer.start()
    with FileLock.acquire_exclusive(tmp_path / "lock", timeout_seconds=20.0) as lock:
        assert lock.is_held
    timer.join()


def test_a_file_that_is_replaced_while_it_is_locked_is_locked_again_under_its_name(tmp_path):
    path, other = tmp_path / "lock", tmp_path / "other"
    other.touch()
    with FileLock.acquire_exclusive(path, disk=ReplacingDisk([other])) as lock:
        assert os.path.samestat(os.fstat(lock.fileno()), path.stat())
    other.touch()
    shared = FileLock.acquire(path, disk=ReplacingDisk([other]))
    assert FileLock.acquire_exclusive(path) is None, "it is the file at the path that is locked"
    shared.release()


def test_a_file_that_is_replaced_again_and_again_is_not_locked(tmp_path):
    others = [tmp_path / f"other{number}" for number in range(100)]
    for each in others:
        each.touch()
    assert FileLock.acquire_exclusive(tmp_path / "lock", disk=ReplacingDisk(others)) is None
    assert others[0].exists(), "it gives up"


def test_a_directory_can_be_locked_and_nothing_is_left_in_it(tmp_path):
    flags = os.O_RDONLY | os.O_DIRECTORY
    with FileLock.acquire_exclusive(tmp_path, flags=flags) as lock:
        assert lock.is_held
        assert FileLock.acquire_exclusive(tmp_path, flags=flags) is None
    assert not list(tmp_path.iterdir())


def test_a_link_is_refused_where_it_is_not_to_be_followed(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match="symbolic link"):
        FileLock.acquire_exclusive(tmp_path / "link", flags=LOCK_FLAGS | os.O_NOFOLLOW)
    assert not (tmp_path / "target").exists()


def test_where_the_file_system_has_no_locks_the_lock_is_not_held_and_a_block_under_it_runs(tmp_path):
    disk = SimulatedDisk()
    disk.make_directory("/network")
    disk.without_locks.add("/network")
    with FileLock.acquire_exclusive("/network/lock", disk=disk) as lock:
        assert not lock.is_held
