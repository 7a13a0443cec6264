"""What a lock's file says: who holds the lock, or held it last.

A line for each holder, and the last whole one counts: a process that is killed while it signs leaves what was there.
"""

import os
import time
from typing import Final

import msgspec

from evsys_bus.disk import Disk
from evsys_bus.files import DAMAGE
from evsys_bus.journal.clock import Clock
from evsys_bus.journal.layout import Owner

_MOST_BYTES: Final = 4096


def sign(disk: Disk, clock: Clock, lock: int) -> None:
    """Say that this process holds the lock whose file is open here.

    Raises:
        OSError: The disk does not take it.
    """
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(clock.wall()))
    disk.write(lock, b"\n" + _encode(Owner(os.getpid(), os.uname().nodename, since, disk.boot())))


def signed(disk: Disk, path: str) -> Owner | None:
    """Who signed the lock at this path last; None where nobody has, or it cannot be read."""
    try:
        data = disk.read(path, max(0, disk.size(path) - _MOST_BYTES), _MOST_BYTES)
    except OSError:
        return None
    for line in reversed(data.split(b"\n")):
        try:
            return _decode(line)
        except DAMAGE:
            continue
    return None


_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Owner).decode
