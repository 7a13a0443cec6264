"""The owner recorded in a lock file: the process that holds the lock, or held it last.

Each owner appends a line and the last complete one counts, so a kill during the write leaves the previous owner.
"""

import os
import time
from typing import Final

import msgspec

from evsys_bus.disk import Disk
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.layout import LockOwner

_MAX_BYTES: Final = 4096


def write_owner(disk: Disk, clock: Clock, lock: int) -> None:
    """Record this process as the owner in an open lock file.

    Raises:
        OSError: The disk returned an error.
    """
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.wall()))
    disk.write(lock, b"\n" + _encode(LockOwner(os.getpid(), os.uname().nodename, since, disk.boot())))


def read_owner(disk: Disk, path: str) -> LockOwner | None:
    """The last owner recorded in the lock file; None if there is none or it cannot be read."""
    try:
        data = disk.read(path, max(0, disk.size(path) - _MAX_BYTES), _MAX_BYTES)
    except OSError:
        return None
    for line in reversed(data.split(b"\n")):
        try:
            return _decode(line)
        except DECODE_ERRORS:
            continue
    return None


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(LockOwner).decode
