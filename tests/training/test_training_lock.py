"""One training at a time in a folder: locks that end with their process, and name it."""

import asyncio
import os
import signal

import pytest

from evsys_bus.errors import TrainingError
from evsys_bus.run_files import LOCK_FILE, lock_folder

HOLDS = """
    import os, signal, sys
    from pathlib import Path
    from evsys_bus.run_files import lock_folder

    with lock_folder(Path(sys.argv[1]), "the run's directory"):
        if "fork" not in sys.argv:
            print("held", flush=True)
        elif os.fork() == 0:
            print(os.getpid(), flush=True)
        signal.pause()
"""


def take(folder):
    with lock_folder(folder, "the run's directory"):
        pass


def test_a_folder_that_is_in_use_is_refused_with_the_process_that_uses_it(tmp_path, program):
    holder = program(HOLDS, str(tmp_path / "run"))
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(TrainingError, match=f"the run's directory .* is in use by process {holder.pid} on ") as refused:
        take(tmp_path / "run")
    assert isinstance(refused.value.__cause__, OSError), "it is the environment's fault, and the exit code says so"
    holder.kill()
    holder.wait()
    take(tmp_path / "run")


def test_one_process_cannot_hold_a_folder_twice_and_a_refusal_changes_nothing(tmp_path):
    with lock_folder(tmp_path, "the run's directory"):
        for _ in range(2):
            with pytest.raises(TrainingError, match=f"process {os.getpid()} "):
                take(tmp_path)
    take(tmp_path)
    assert (tmp_path / LOCK_FILE).read_bytes() == b"", "nobody holds it, and it names nobody"


def test_a_forked_child_that_outlives_its_parent_does_not_hold_its_folder(tmp_path, program):
    parent = program(HOLDS, str(tmp_path), "fork")
    child = int(parent.stdout.readline())
    parent.kill()
    os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
    try:
        os.kill(child, 0)
        take(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_is_free_again_however_its_block_ends(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt, asyncio.CancelledError):
        with pytest.raises(error), lock_folder(tmp_path, "the run's directory"):
            raise error
    take(tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written: Not a directory"):
        take(tmp_path / "file" / "run")
