"""The process in which ``evsys-bus sync`` delivers, with the folder and the import path of the original program.

It ends when everything is delivered, or with saved cursors when its stdin gets input or is closed.
"""

import os
import select
from typing import Final

from evsys_bus.delivery.kept_process import DELIVERED_CODE
from evsys_bus.delivery.process_log import flush_log
from evsys_bus.wiring.courier_main import begin

STOP_SECONDS: Final = 2.0
"""Time for couriers to end when they are stopped."""
_LOOK_SECONDS: Final = 0.1


def main(line: bytes) -> None:
    """Deliver as the `Order` in this line specifies, and exit."""
    _, crew = begin(line)
    crew.start(enlists=False)
    crew.finish()
    while not crew.join(_LOOK_SECONDS):
        if select.select([0], [], [], 0)[0]:
            crew.stop()
            crew.join(STOP_SECONDS)
            break
    flush_log()
    # Skips interpreter shutdown, which would wait for threads of libraries or for an adapter that hangs.
    os._exit(DELIVERED_CODE)
