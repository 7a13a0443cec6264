"""The courier process: builds the adapters in its configuration and delivers, beside a program or for ``sync``.

`main` delivers until the program has ended; `deliver_pending` delivers what is pending.

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

from evsys_bus.codec.redact import set_redaction
from evsys_bus.config.subscription_builder import build_adapter
from evsys_bus.delivery.courier_pool import CourierPool
from evsys_bus.delivery.process_log import LOG_NAME, flush_log, log_to_file
from evsys_bus.delivery.supervisor import EXIT_DELIVERED, EXIT_PENDING, CourierConfig
from evsys_bus.diagnostics import log
from evsys_bus.journal import layout
from evsys_bus.location import decode_json

GRACE_SECONDS: Final = 5.0
"""Time after the grace period before a process with a blocked interpreter is ended by a watchdog."""
STOP_SECONDS: Final = 2.0
"""Time for couriers to stop after the grace period; longer than a cancelled task gets."""
THREADS_SECONDS: Final = 5.0
"""Time for threads of adapters to end after everything was delivered."""
_POLL_SECONDS: Final = 0.2
"""Interval of checking the parent process."""


def _prepare(line: bytes) -> tuple[CourierConfig, CourierPool]:
    """Decode the configuration, open the log, and create the couriers without starting them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = decode_json(line, CourierConfig)
    log_path = f"{config.directory}/{layout.COURIERS}/{LOG_NAME}"
    log_to_file(log_path)
    pool = CourierPool(
        config.directory, [entry.to_subscription() for entry in config.subscriptions], build_adapter, log_path=log_path
    )
    return config, pool


def main(line: bytes) -> None:
    """Run the courier process with an encoded `CourierConfig`, and exit."""
    sigterms: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: sigterms.append(number))
    set_redaction(None)  # the program redacts what it records, and reveals what it chooses to
    config, pool = _prepare(line)
    # An adapter may block the interpreter for ever (a regular expression can), and then no Python code runs.
    hang_seconds = config.grace_seconds + GRACE_SECONDS
    faulthandler.dump_traceback_later(hang_seconds, exit=True, file=2)
    pool.start()
    while not sigterms and not select.select([0], [], [], _POLL_SECONDS)[0] and os.getppid() == config.parent_pid:
        faulthandler.dump_traceback_later(hang_seconds, exit=True, file=2)
        pool.record_status()
    wait_seconds = _read_wait_seconds()
    faulthandler.dump_traceback_later(wait_seconds + hang_seconds, exit=True, file=2)
    deadline = time.monotonic() + wait_seconds + config.grace_seconds
    pool.finish(deadline)
    signals_before: int | None = None  # the program was gone
    while not pool.join(_POLL_SECONDS) and time.monotonic() < deadline:
        pool.record_status()
        if os.getppid() != config.parent_pid:  # the program no longer waits for this process
            deadline = min(deadline, time.monotonic() + config.grace_seconds)
            config = msgspec.structs.replace(config, parent_pid=os.getppid())
            signals_before = len(sigterms)
        if signals_before is not None and len(sigterms) > signals_before:
            break
    unfinished = {*pool.running, *pool.failed}
    if pool.running:
        pool.stop()
        pool.join(STOP_SECONDS)
    if unfinished:
        log().warning("couriers.left", adapters=", ".join(sorted(unfinished)), fix=f"evsys-bus sync {config.directory}")
    _exit(EXIT_PENDING if unfinished else EXIT_DELIVERED, min(deadline - time.monotonic(), THREADS_SECONDS))


def deliver_pending(line: bytes) -> None:
    """Deliver what is pending with an encoded `CourierConfig`, and exit; input or end of file on stdin ends it."""
    _, pool = _prepare(line)
    pool.start(subscribe=False)
    pool.finish()
    while not pool.join(_POLL_SECONDS):
        pool.record_status()
        if select.select([0], [], [], 0)[0]:
            pool.stop()
            pool.join(STOP_SECONDS)
            break
    _exit(EXIT_DELIVERED, 0.0)


def _exit(code: int, wait_seconds: float) -> None:
    """Exit when the threads that adapters started (for example for uploads) have ended, or after that time.

    The rest of interpreter finalization is skipped: it could wait for an adapter or a library that hangs.
    """

    def end() -> None:
        flush_log()
        os._exit(code)

    def give_up() -> None:
        time.sleep(max(0.0, wait_seconds))
        thread_names = [
            thread.name for thread in threading.enumerate() if not thread.daemon and thread is not main_thread
        ]
        log().warning("couriers.threads_left", count=len(thread_names), threads=", ".join(sorted(thread_names)[:10]))
        end()

    main_thread = threading.main_thread()
    if wait_seconds <= 0:
        end()
    threading.Thread(target=give_up, name="evsys-bus-exit", daemon=True).start()
    atexit.register(end)  # registered last, so it runs first, after other threads have ended


def _read_wait_seconds() -> float:
    """Read from stdin how long the program waits for this process; 0 if it did not send that."""
    try:
        return float(os.read(0, 64)) if select.select([0], [], [], 0)[0] else 0.0
    except (OSError, ValueError):
        return 0.0  # stdin was closed without data
