"""The process in which ``evsys-bus sync`` delivers: in the folder, and with the imports, of who followed the adapters.

It ends when all is delivered; or, at its cursors, when its stdin says anything or ends.
"""

import logging
import os
import select
import signal
from typing import Final

import msgspec

from evsys_bus.delivery.crew import Crew
from evsys_bus.delivery.kept_process import DELIVERED_CODE, Order
from evsys_bus.diagnostics import LOGGER_NAME
from evsys_bus.wiring.followed import build_followed

STOP_SECONDS: Final = 2.0
"""How long couriers may take to end when they are stopped."""
_LOOK_SECONDS: Final = 0.1


def main(line: bytes) -> None:
    """Do what the `Order` says, and exit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = msgspec.json.decode(line, type=Order)
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    logging.getLogger(LOGGER_NAME).setLevel(logging.INFO)
    crew = Crew(order.directory, [each.as_followed() for each in order.followed], build_followed)
    crew.start(enlists=False)
    crew.finish()
    while not crew.join(_LOOK_SECONDS):
        if select.select([0], [], [], 0)[0]:
            crew.stop()
            crew.join(STOP_SECONDS)
            break
    logging.shutdown()
    # No finalization: it would wait for the threads of a library that an adapter uses, or for an adapter that hangs.
    os._exit(DELIVERED_CODE)
