"""The process in which ``evsys-bus sync`` delivers: in the folder, and with the imports, of who followed the adapters.

It ends when all is delivered; or, at its cursors, when its stdin says anything or ends.
"""

import os
import select
from typing import Final

from evsys_bus.delivery.kept_process import DELIVERED_CODE
from evsys_bus.delivery.process_log import flush_log
from evsys_bus.wiring.courier_main import begin

STOP_SECONDS: Final = 2.0
"""How long couriers may take to end when they are stopped."""
_LOOK_SECONDS: Final = 0.1


def main(line: bytes) -> None:
    """Do what the `Order` says, and exit."""
    _, crew = begin(line)
    crew.start(enlists=False)
    crew.finish()
    while not crew.join(_LOOK_SECONDS):
        if select.select([0], [], [], 0)[0]:
            crew.stop()
            crew.join(STOP_SECONDS)
            break
    flush_log()
    # No finalization: it would wait for the threads of a library that an adapter uses, or for an adapter that hangs.
    os._exit(DELIVERED_CODE)
