"""`KeptProcess`: keeps a courier process running, and splits it if one of its adapters may be the reason why it dies.

    all adapters in one process ── died twice ── one process per adapter ── five quick deaths in a row ── given up

An adapter may end its process, by a crash in C code or by ``os._exit``, without a trace of which adapter it was. In
separate processes the other adapters continue, and the process that dies again identifies the faulty one.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from evsys_bus.delivery.roster import Posted
from evsys_bus.delivery.states import write_state_of_idle
from evsys_bus.diagnostics import log
from evsys_bus.journal import OsDisk
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.where import encode_json

QUICK_SECONDS: Final = 5.0
"""A process that dies sooner than this after its start counts as a quick death."""
MOST_QUICK_DEATHS: Final = 5
"""After this many quick deaths in a row the process is not started again."""
MOST_DEATHS_TOGETHER: Final = 2
"""After this many deaths, quick or not, each adapter gets a process of its own."""
DELIVERED_CODE: Final = 80
"""Exit code if all events were delivered; an adapter that ends its process is unlikely to use it."""
PENDING_CODE: Final = 81
"""Exit code if the process was asked to end before that."""


class Order(msgspec.Struct, frozen=True):
    """The configuration of a courier process."""

    directory: str
    """The journal."""
    followed: list[Posted]
    """The adapters to deliver to."""
    sys_path: tuple[str, ...]
    """The import path of the program."""
    linger_seconds: float
    """How long it may continue to deliver once nothing more is published."""
    parent: int
    """Process id of the program that publishes."""


Spawn = Callable[[], "subprocess.Popen[bytes] | None"]


class KeptProcess:
    """Starts and restarts one courier process.

    The process reads its configuration as one line from stdin; end of file means that nothing more is published.

    Args:
        order: The configuration.
        spawn: Starts a process; returns None after logging a failure.
        log_path: The log file of the process.
        pause_seconds: Pause before a restart; longer after each quick death.

    Raises:
        TypeError: The configuration cannot be encoded.
        ValueError: A path or parameter is not valid text.
    """

    def __init__(self, order: Order, spawn: Spawn, log_path: str, pause_seconds: float) -> None:
        self.gave_up = False
        """Whether it died repeatedly and is not restarted any more."""
        self.process: subprocess.Popen[bytes] | None = None
        """The current or last process."""
        self._order: Final = order
        self._line: Final = encode_json(order) + b"\n"
        self._spawn: Final = spawn
        self._log_path: Final = log_path
        self._pause_seconds: Final = pause_seconds
        self._asked: Final = threading.Event()
        self._lock: Final = threading.Lock()  # guards the process's stdin, also after the split
        self._told = False
        self._until = 0.0
        self._parted: list[KeptProcess] = []
        self._watcher: Final = threading.Thread(target=self._watch, name="evsys-bus-couriers", daemon=True)

    def start(self) -> None:
        """Start the process and keep it running."""
        self.process = self._started()
        try:
            self._watcher.start()
        except BaseException:  # without the thread nothing would send the configuration
            if self.process is not None:
                _end(self.process, 0.0)
            raise

    def _started(self) -> "subprocess.Popen[bytes] | None":
        try:
            return self._spawn()
        except Exception as error:  # isolation: out of memory or any other failed start; retried later
            log().warning("couriers.not_started", journal=self._order.directory, exc_info=error)
            return None

    def finish(self, until: float) -> None:
        """Ask the process to end once it has delivered all events.

        Args:
            until: Until when the program waits for that (monotonic); the grace period starts then.
        """
        self._until = until
        self._asked.set()
        with self._lock:
            for each in self._parted:
                each.finish(until)
            if self._told and self.process is not None:
                _end(self.process, until)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the process to end; return whether it has ended or was given up."""
        self._watcher.join(timeout_seconds)
        return not self._watcher.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the process is running or will be restarted."""
        return self._watcher.is_alive()

    def _watch(self) -> None:
        deaths = quick = 0
        while True:
            began, code = time.monotonic(), self._served()
            now = time.monotonic()
            ended = code in {DELIVERED_CODE, PENDING_CODE}
            if self._asked.is_set() and (ended or now > self._until + self._order.linger_seconds):
                return
            deaths += code is not None and not ended
            quick = quick + 1 if now - began < QUICK_SECONDS else 1
            facts = {"journal": self._order.directory, "exit_code": code, "log": self._log_path}
            if deaths >= MOST_DEATHS_TOGETHER and len(self._order.followed) > 1:
                log().warning(
                    "couriers.parted", **facts, why="one of its adapters may have ended it; the others continue"
                )
                self._part()
                return
            if quick >= MOST_QUICK_DEATHS:
                self.gave_up = True
                fix = f"read the log; what is pending goes out with: evsys-bus sync {self._order.directory}"
                log().warning("couriers.given_up", **facts, deaths=quick, adapters=self._names(), fix=fix)
                self._say_failed(code, quick)
                return
            pause = self._pause_seconds * 3 ** (quick - 1)
            log().warning("couriers.died", **facts, adapters=self._names(), again_in_seconds=round(pause, 1))
            self._asked.wait(pause)
            with self._lock:
                self._told = False
                self.process = self._started()

    def _served(self) -> int | None:
        """Send the configuration, wait for the process to end, and return its exit code; None if it did not start."""
        if self.process is None:
            return None
        self._tell(self.process)
        code = self.process.wait()
        with self._lock:
            _end(self.process, 0.0)
        return code

    def _part(self) -> None:
        """Continue with one process for each adapter, passing on a request to finish."""
        alone = [msgspec.structs.replace(self._order, followed=[each]) for each in self._order.followed]
        with self._lock:
            self._parted = [KeptProcess(each, self._spawn, self._log_path, self._pause_seconds) for each in alone]
            for each in self._parted:
                each.start()
                if self._asked.is_set():
                    each.finish(self._until)
        for each in self._parted:
            each.wait(threading.TIMEOUT_MAX)
        self.gave_up = all(each.gave_up for each in self._parted)

    def _say_failed(self, code: int | None, deaths: int) -> None:
        """Write the failure to the state file of each adapter."""
        directory = self._order.directory
        error = "the courier process cannot be started"
        if code is not None:
            error = f"its process has ended {deaths} times, the last time by {_exit_in_words(code)}"
        for each in self._order.followed:
            again = shlex.join(["evsys-bus", "sync", directory, "--adapter", each.name])
            fix = f"read {self._log_path}; then: {again}"
            state = DeliveryStatus(state="failed", pid=os.getpid(), at=time.time(), error=error, fix=fix)
            try:
                write_state_of_idle(OsDisk(), directory, each.name, state)
            except Exception as refusal:  # isolation: the journal directory may be in any condition
                log().warning("courier.state_unwritten", courier=each.name, exc_info=refusal)

    def _names(self) -> str:
        return ", ".join(each.name for each in self._order.followed)

    def _tell(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        rest = memoryview(self._line)
        with contextlib.suppress(OSError):  # it has died already; its exit code is handled in `_watch`
            while rest:
                rest = rest[process.stdin.write(rest) :]
        with self._lock:
            self._told = True
            if self._asked.is_set():
                _end(process, self._until)


def _end(process: "subprocess.Popen[bytes]", until: float) -> None:
    """Send the remaining seconds as a line and close stdin; a forked child may keep the pipe open."""
    assert process.stdin is not None
    if process.stdin.closed:
        return
    with contextlib.suppress(OSError):
        os.set_blocking(process.stdin.fileno(), False)
        process.stdin.write(b"%f\n" % max(0.0, until - time.monotonic()))
    with contextlib.suppress(OSError):
        process.stdin.close()


def _exit_in_words(code: int) -> str:
    try:
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
