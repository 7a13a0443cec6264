"""`KeptProcess`: a courier process that is started again whenever it dies; and, when its adapters are why, parted.

    all adapters in one ── died twice ── each adapter in one of its own ── died five times at once ── given up

An adapter may end the process that it is in, by a fault in C or by ``os._exit``, and nobody lives to tell which one it
was. In processes of their own the others go on, and the one that dies again is at fault beyond doubt.
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
"""One that dies sooner than that may never do better."""
MOST_QUICK_DEATHS: Final = 5
"""After so many, one after another, it is not started again."""
MOST_DEATHS_TOGETHER: Final = 2
"""After so many, at whatever pace, its adapters are parted."""
DELIVERED_CODE: Final = 80
"""It exits with this where all was delivered; no adapter that ends its process would hit upon it."""
PENDING_CODE: Final = 81
"""And with this where it was told to end before that."""


class Order(msgspec.Struct, frozen=True):
    """What the process is told."""

    directory: str
    """The journal."""
    followed: list[Posted]
    sys_path: tuple[str, ...]
    linger_seconds: float
    """How long it may go on to deliver once nothing more is published."""
    parent: int
    """The process that publishes."""


Spawn = Callable[[], "subprocess.Popen[bytes] | None"]


class KeptProcess:
    """One process, told what to do in one line through its stdin; the end of that means that no more is published.

    Args:
        order: What it is told.
        spawn: Starts one; None where that failed, which it has said.
        log_path: Where its last words are.
        pause_seconds: Until it is started again; longer after each quick death.

    Raises:
        TypeError: The order cannot be told, or ValueError: a path, or a param, is no text.
    """

    def __init__(self, order: Order, spawn: Spawn, log_path: str, pause_seconds: float) -> None:
        self.gave_up = False
        """It died again and again, and is not started any more."""
        self.process: subprocess.Popen[bytes] | None = None
        """The one that runs now, or ran last."""
        self._order: Final = order
        self._line: Final = encode_json(order) + b"\n"
        self._spawn: Final = spawn
        self._log_path: Final = log_path
        self._pause_seconds: Final = pause_seconds
        self._asked: Final = threading.Event()
        self._lock: Final = threading.Lock()  # over the process's stdin, and over those of the parted
        self._told = False
        self._until = 0.0
        self._parted: list[KeptProcess] = []
        self._watcher: Final = threading.Thread(target=self._watch, name="evsys-bus-couriers", daemon=True)

    def start(self) -> None:
        """Start it, and keep it alive."""
        self.process = self._started()
        try:
            self._watcher.start()
        except BaseException:  # no thread is to be had: nobody would tell it what to do
            if self.process is not None:
                _end(self.process, 0.0)
            raise

    def _started(self) -> "subprocess.Popen[bytes] | None":
        try:
            return self._spawn()
        except Exception as error:  # a wall: no memory, or whatever keeps a process from being made; tried again
            log().warning("couriers.not_started", journal=self._order.directory, exc_info=error)
            return None

    def finish(self, until: float) -> None:
        """Have it end once it has delivered what is there.

        Args:
            until: How long the program waits for that (monotonic); the linger begins then.
        """
        self._until = until
        self._asked.set()
        with self._lock:
            for each in self._parted:
                each.finish(until)
            if self._told and self.process is not None:
                _end(self.process, until)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for its end; whether it has ended, or was given up."""
        self._watcher.join(timeout_seconds)
        return not self._watcher.is_alive()

    @property
    def alive(self) -> bool:
        """Whether it runs, or will again."""
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
                    "couriers.parted", **facts, why="one of its adapters may be why it died, and the others go on"
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
        """Tell the process what to do, and wait for its end; its exit code, None where there is none."""
        if self.process is None:
            return None
        self._tell(self.process)
        code = self.process.wait()
        with self._lock:
            _end(self.process, 0.0)
        return code

    def _part(self) -> None:
        """Go on with one for each adapter; they are asked for what this one was asked for."""
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
        """Where all who look into the journal find it."""
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
            except Exception as refusal:  # a wall: whatever the journal's folder is now
                log().warning("courier.state_unwritten", courier=each.name, exc_info=refusal)

    def _names(self) -> str:
        return ", ".join(each.name for each in self._order.followed)

    def _tell(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        rest = memoryview(self._line)
        with contextlib.suppress(OSError):  # it is dead already, which its exit code will tell
            while rest:
                rest = rest[process.stdin.write(rest) :]
        with self._lock:
            self._told = True
            if self._asked.is_set():
                _end(process, self._until)


def _end(process: "subprocess.Popen[bytes]", until: float) -> None:
    """A line, and not only the end of the stream: a child that the program forked may keep that open."""
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
