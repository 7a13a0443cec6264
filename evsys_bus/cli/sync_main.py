"""The process in which ``evsys-bus sync`` delivers, with the folder and the import path of the original program.

It ends when everything is delivered, or with saved cursors when its stdin gets input or is closed.
"""

import os
import select
from typing import Final

from evsys_bus.config.courier_main import prepare
from evsys_bus.delivery.process_log import flush_log
from evsys_bus.delivery.supervisor import EXIT_DELIVERED

STOP_SECONDS: Final = 2.0
"""Time for couriers to end when they are stopped."""
_POLL_SECONDS: Final = 0.1


def main(line: bytes) -> None:
    """Deliver as the `CourierConfig` in this line specifies, and exit."""
    _, pool = prepare(line)
    pool.start(subscribe=False)
    pool.finish()
    while not pool.join(_POLL_SECONDS):
        if select.select([0], [], [], 0)[0]:
            pool.stop()
            pool.join(STOP_SECONDS)
            break
    flush_log()
    # Skips interpreter shutdown, which would wait for threads of libraries or for an adapter that hangs.
    os._exit(EXIT_DELIVERED)
