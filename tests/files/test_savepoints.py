"""`Savepoints` on the simulated disk."""

import msgspec

from evsys_bus.savepoints import Savepoints
from evsys_bus.testing import SimulatedDisk

FILE = "/run/rows.jsonl"


def _append(savepoints, disk, data):
    savepoints.before_append(FILE, len(disk.contents(FILE)))
    file = disk.open_file(FILE)
    disk.write(file, data)
    disk.close(file)


def test_a_version_that_was_removed_does_not_come_back_with_a_power_cut():
    disk = SimulatedDisk()
    disk.put(FILE, b"")
    first = Savepoints(disk=disk)
    of_cursor = first.take()
    _append(first, disk, b"row 1\n")
    of_note = msgspec.structs.replace(first.take(), files={FILE: 6})

    second = Savepoints(disk=disk)
    second.rewind(of_cursor)
    assert second.adopt(of_note)  # the note beside the output is newer than the cursor
    next_note = msgspec.structs.replace(second.take(), files={FILE: 6})
    disk.restart("power")

    Savepoints(disk=disk).adopt(next_note)
    assert disk.contents(FILE) == b"row 1\n"
