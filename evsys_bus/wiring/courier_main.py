"""The courier process: builds the adapters that it is told, and delivers until nothing more is published.

That is when its stdin says anything or ends, or when its parent is another one: a child that the program forked may
keep the pipe open. It then goes on for at most the linger. SIGTERM means the same; SIGINT is the program's, not ours.
"""

import faulthandler
import logging
import os
import select
import signal
import sys
import time
from typing import Final

import msgspec

from evsys_bus.delivery.crew import Crew
from evsys_bus.delivery.kept_process import DELIVERED_CODE, PENDING_CODE, Order
from evsys_bus.diagnostics import LOGGER_NAME, log
from evsys_bus.wiring.followed import build_followed

GRACE_SECONDS: Final = 5.0
"""What comes on top of the linger before a process whose interpreter is held ends itself."""
STOP_SECONDS: Final = 1.0
"""How long couriers may take to end when the linger is over."""
_LOOK_SECONDS: Final = 0.2
"""How often the parent is looked at."""


def main(line: bytes) -> None:
    """Do what the `Order` says, and exit."""
    terminated: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    order = msgspec.json.decode(line, type=Order)
    logging.basicConfig(format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    logging.getLogger(LOGGER_NAME).setLevel(logging.INFO)
    crew = Crew(order.directory, [each.as_followed() for each in order.followed], build_followed)
    # An adapter may hold the interpreter for ever (a regular expression can), and nothing of Python runs then.
    faulthandler.enable()
    patience = order.linger_seconds + GRACE_SECONDS
    faulthandler.dump_traceback_later(patience, exit=True)
    crew.start()
    while not terminated and not select.select([0], [], [], _LOOK_SECONDS)[0] and os.getppid() == order.parent:
        faulthandler.dump_traceback_later(patience, exit=True)
    wait_seconds = _told()
    faulthandler.dump_traceback_later(wait_seconds + patience, exit=True)
    crew.finish()
    deadline = time.monotonic() + wait_seconds + order.linger_seconds
    while not crew.join(_LOOK_SECONDS) and time.monotonic() < deadline:
        if os.getppid() != order.parent:  # it does not wait for us any more
            deadline = min(deadline, time.monotonic() + order.linger_seconds)
            order = msgspec.structs.replace(order, parent=os.getppid())
    left = {*crew.running, *crew.failed}
    if crew.running:
        crew.stop()
        crew.join(STOP_SECONDS)
    if left:
        log().warning("couriers.left", adapters=", ".join(sorted(left)), fix=f"evsys-bus sync {order.directory}")
    logging.shutdown()
    sys.stdout.flush()
    # No finalization: it would wait for the threads of a library that an adapter uses, or for an adapter that hangs.
    os._exit(PENDING_CODE if left else DELIVERED_CODE)


def _told() -> float:
    """How long the program waits for us, where it said so before it left."""
    try:
        return float(os.read(0, 64)) if select.select([0], [], [], 0)[0] else 0.0
    except (OSError, ValueError):
        return 0.0  # its end, and not a word
