"""The courier process: builds the adapters in its configuration and delivers until the program has ended.

The program has ended when stdin delivers data or is closed, or when the parent process changes (a forked child of the
program may keep the pipe open). The process then continues for at most the grace period. SIGTERM has the same effect;
after the end of the program, it ends the grace period, because another process takes over. SIGINT is ignored, as it
is meant for the program.
"""

import atexit
import faulthandler
import os
import select
import signal
import threading
import time
from typing import Final

import msgspec

from evsys_bus.delivery.crew import Crew
from evsys_bus.delivery.kept_process import DELIVERED_CODE, PENDING_CODE, Order
from evsys_bus.delivery.process_log import LOG_NAME, flush_log, log_to_file
from evsys_bus.diagnostics import log
from evsys_bus.journal import layout
from evsys_bus.where import decode_json
from evsys_bus.wiring.followed import build_followed

GRACE_SECONDS: Final = 5.0
"""Time after the grace period before a process with a blocked interpreter is ended by a watchdog."""
STOP_SECONDS: Final = 2.0
"""Time for couriers to stop after the grace period; longer than a cancelled task gets."""
THREADS_SECONDS: Final = 5.0
"""Time for threads of adapters to end after everything was delivered."""
_LOOK_SECONDS: Final = 0.2
"""Interval of checking the parent process."""


def begin(line: bytes) -> tuple[Order, Crew]:
    """Decode the configuration, open the log, and create the couriers without starting them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = decode_json(line, Order)
    log_path = f"{order.directory}/{layout.COURIERS}/{LOG_NAME}"
    log_to_file(log_path)
    crew = Crew(order.directory, [each.as_followed() for each in order.followed], build_followed, log_path=log_path)
    return order, crew


def main(line: bytes) -> None:
    """Run the courier process with an encoded `Order`, and exit."""
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    order, crew = begin(line)
    # An adapter may block the interpreter for ever (a regular expression can), and then no Python code runs.
    patience = order.linger_seconds + GRACE_SECONDS
    faulthandler.dump_traceback_later(patience, exit=True, file=2)
    crew.start()
    while not terminated and not select.select([0], [], [], _LOOK_SECONDS)[0] and os.getppid() == order.parent:
        faulthandler.dump_traceback_later(patience, exit=True, file=2)
    wait_seconds = _told()
    faulthandler.dump_traceback_later(wait_seconds + patience, exit=True, file=2)
    deadline = time.monotonic() + wait_seconds + order.linger_seconds
    crew.finish(deadline)
    signals_before: int | None = None  # the program was gone
    while not crew.join(_LOOK_SECONDS) and time.monotonic() < deadline:
        if os.getppid() != order.parent:  # the program no longer waits for this process
            deadline = min(deadline, time.monotonic() + order.linger_seconds)
            order = msgspec.structs.replace(order, parent=os.getppid())
            signals_before = len(terminated)
        if signals_before is not None and len(terminated) > signals_before:
            break
    left = {*crew.running, *crew.failed}
    if crew.running:
        crew.stop()
        crew.join(STOP_SECONDS)
    if left:
        log().warning("couriers.left", adapters=", ".join(sorted(left)), fix=f"evsys-bus sync {order.directory}")
    _exit(PENDING_CODE if left else DELIVERED_CODE, min(deadline - time.monotonic(), THREADS_SECONDS))


def _exit(code: int, wait_seconds: float) -> None:
    """Exit when the threads that adapters started (for uploads, say) have ended, or after that time.

    The rest of interpreter finalization is skipped: it could wait for an adapter or a library that hangs.
    """

    def end() -> None:
        flush_log()
        os._exit(code)

    def give_up() -> None:
        time.sleep(max(0.0, wait_seconds))
        left = [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not main_thread]
        log().warning("couriers.threads_left", count=len(left), threads=", ".join(sorted(left)[:10]))
        end()

    main_thread = threading.main_thread()
    if wait_seconds <= 0:
        end()
    threading.Thread(target=give_up, name="evsys-bus-exit", daemon=True).start()
    atexit.register(end)  # registered last, so it runs first, after other threads have ended


def _told() -> float:
    """Read from stdin how long the program waits for this process; 0 if it did not send that."""
    try:
        return float(os.read(0, 64)) if select.select([0], [], [], 0)[0] else 0.0
    except (OSError, ValueError):
        return 0.0  # stdin was closed without data
