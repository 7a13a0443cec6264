"""`unshare_working_directory`: a working directory for each courier thread: an adapter's ``chdir`` affects no other.

POSIX has one working directory per process; on Linux a thread can have its own, shared with the threads it starts.
"""

import os
import sys
from collections.abc import Callable
from typing import Final

from evsys_bus.diagnostics import log

_CLONE_FS: Final = 0x200


def unshare_working_directory(adapter: str) -> None:
    """Give this thread a working directory of its own; where that is not possible, log it and continue."""
    try:
        _unshare()(_CLONE_FS)
    except (AttributeError, OSError) as error:  # not Linux, or a container that forbids the call, such as Docker's
        log().info("courier.shares_folder", adapter=adapter, why=str(error), meaning="a chdir moves all couriers")


def _unshare() -> Callable[[int], object]:
    if sys.version_info >= (3, 12):
        return os.unshare
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)

    def unshare(flags: int) -> None:
        if library.unshare(flags):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    return unshare
