"""`own_folder`: a current directory for each courier of a process, so that an adapter's ``chdir`` moves only its own.

It belongs to the process, says POSIX; Linux lets a thread have its own, which the threads that it starts then share.
"""

import os
import sys
from collections.abc import Callable
from typing import Final

from evsys_bus.diagnostics import log

_CLONE_FS: Final = 0x200


def own_folder(adapter: str) -> None:
    """Give this thread a current directory of its own; where that cannot be had, say so, and go on."""
    try:
        _unshare()(_CLONE_FS)
    except (AttributeError, OSError) as error:  # not Linux; or a container that refuses the call, as Docker's do
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
