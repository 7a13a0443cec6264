"""`Supervisor`: keeps a courier process running, and splits it if one of its adapters may be the reason why it dies.

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

from evsys_bus.delivery.status_files import write_status_if_idle
from evsys_bus.delivery.subscriptions import SubscriptionRecord
from evsys_bus.diagnostics import log
from evsys_bus.journal import OsDisk
from evsys_bus.location import encode_json
from evsys_bus.tasks import DeliveryStatus

QUICK_EXIT_SECONDS: Final = 5.0
"""A process that dies sooner than this after its start counts as a quick death."""
MAX_QUICK_EXITS: Final = 5
"""After this many quick deaths in a row the process is not started again."""
MAX_SHARED_EXITS: Final = 2
"""After this many deaths, quick or not, each adapter gets a process of its own."""
EXIT_DELIVERED: Final = 80
"""Exit code if all events were delivered; an adapter that ends its process is unlikely to use it."""
EXIT_PENDING: Final = 81
"""Exit code if the process was asked to end before that."""


class CourierConfig(
    msgspec.Struct,
    frozen=True,
    rename={"subscriptions": "followed", "grace_seconds": "linger_seconds", "parent_pid": "parent"},
):
    """The configuration of a courier process."""

    directory: str
    """The journal."""
    subscriptions: list[SubscriptionRecord]
    """The adapters to deliver to."""
    sys_path: tuple[str, ...]
    """The import path of the program."""
    grace_seconds: float
    """How long it may continue to deliver once nothing more is published."""
    parent_pid: int
    """Process id of the program that publishes."""


SpawnProcess = Callable[[], "subprocess.Popen[bytes] | None"]


class Supervisor:
    """Starts and restarts one courier process.

    The process reads its configuration as one line from stdin; end of file means that nothing more is published.

    Args:
        config: The configuration.
        spawn: Starts a process; returns None after logging a failure.
        log_path: The log file of the process.
        restart_seconds: Pause before a restart; longer after each quick death.

    Raises:
        TypeError: The configuration cannot be encoded.
        ValueError: A path or parameter is not valid text.
    """

    def __init__(self, config: CourierConfig, spawn: SpawnProcess, log_path: str, restart_seconds: float) -> None:
        self.has_given_up = False
        """Whether it died repeatedly and is not restarted any more."""
        self.process: subprocess.Popen[bytes] | None = None
        """The current or last process."""
        self._config: Final = config
        self._config_line: Final = encode_json(config) + b"\n"
        self._spawn: Final = spawn
        self._log_path: Final = log_path
        self._restart_seconds: Final = restart_seconds
        self._finish_requested: Final = threading.Event()
        self._lock: Final = threading.Lock()  # guards the process's stdin, also after the split
        self._config_sent = False
        self._finish_deadline = 0.0
        self._split_supervisors: list[Supervisor] = []
        self._watcher: Final = threading.Thread(target=self._watch, name="evsys-bus-couriers", daemon=True)

    def start(self) -> None:
        """Start the process and keep it running."""
        self.process = self._try_spawn()
        try:
            self._watcher.start()
        except BaseException:  # without the thread nothing would send the configuration
            if self.process is not None:
                _request_end(self.process, 0.0)
            raise

    def _try_spawn(self) -> "subprocess.Popen[bytes] | None":
        try:
            return self._spawn()
        except Exception as error:  # isolation: out of memory or any other failed start; retried later
            log().warning("couriers.not_started", journal=self._config.directory, exc_info=error)
            return None

    def finish(self, deadline: float) -> None:
        """Ask the process to end once it has delivered all events.

        Args:
            deadline: Until when the program waits for that (monotonic); the grace period starts then.
        """
        self._finish_deadline = deadline
        self._finish_requested.set()
        with self._lock:
            for each in self._split_supervisors:
                each.finish(deadline)
            if self._config_sent and self.process is not None:
                _request_end(self.process, deadline)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the process to end; return whether it has ended or was given up."""
        self._watcher.join(timeout_seconds)
        return not self._watcher.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the process is running or will be restarted."""
        return self._watcher.is_alive()

    def _watch(self) -> None:
        exits = quick_exits = 0
        while True:
            began, code = time.monotonic(), self._run_process()
            now = time.monotonic()
            is_finished = code in {EXIT_DELIVERED, EXIT_PENDING}
            if self._finish_requested.is_set() and (
                is_finished or now > self._finish_deadline + self._config.grace_seconds
            ):
                return
            exits += code is not None and not is_finished
            quick_exits = quick_exits + 1 if now - began < QUICK_EXIT_SECONDS else 1
            facts = {"journal": self._config.directory, "exit_code": code, "log": self._log_path}
            if exits >= MAX_SHARED_EXITS and len(self._config.subscriptions) > 1:
                log().warning(
                    "couriers.parted", **facts, why="one of its adapters may have ended it; the others continue"
                )
                self._split()
                return
            if quick_exits >= MAX_QUICK_EXITS:
                self.has_given_up = True
                fix = f"read the log; what is pending goes out with: evsys-bus sync {self._config.directory}"
                log().warning("couriers.given_up", **facts, deaths=quick_exits, adapters=self._adapter_names(), fix=fix)
                self._write_failed_status(code, quick_exits)
                return
            pause = self._restart_seconds * 3 ** (quick_exits - 1)
            log().warning("couriers.died", **facts, adapters=self._adapter_names(), again_in_seconds=round(pause, 1))
            self._finish_requested.wait(pause)
            with self._lock:
                self._config_sent = False
                self.process = self._try_spawn()

    def _run_process(self) -> int | None:
        """Send the configuration, wait for the process to end, and return its exit code; None if it did not start."""
        if self.process is None:
            return None
        self._send_config(self.process)
        code = self.process.wait()
        with self._lock:
            _request_end(self.process, 0.0)
        return code

    def _split(self) -> None:
        """Continue with one process for each adapter, passing on a request to finish."""
        configs = [msgspec.structs.replace(self._config, subscriptions=[each]) for each in self._config.subscriptions]
        with self._lock:
            self._split_supervisors = [
                Supervisor(each, self._spawn, self._log_path, self._restart_seconds) for each in configs
            ]
            for each in self._split_supervisors:
                each.start()
                if self._finish_requested.is_set():
                    each.finish(self._finish_deadline)
        for each in self._split_supervisors:
            each.wait(threading.TIMEOUT_MAX)
        self.has_given_up = all(each.has_given_up for each in self._split_supervisors)

    def _write_failed_status(self, code: int | None, exits: int) -> None:
        """Write the failure to the state file of each adapter."""
        directory = self._config.directory
        error = "the courier process cannot be started"
        if code is not None:
            error = f"its process has ended {exits} times, the last time by {_describe_exit(code)}"
        for each in self._config.subscriptions:
            sync_command = shlex.join(["evsys-bus", "sync", directory, "--adapter", each.name])
            fix = f"read {self._log_path}; then: {sync_command}"
            status = DeliveryStatus(state="failed", pid=os.getpid(), at=time.time(), error=error, fix=fix)
            try:
                write_status_if_idle(OsDisk(), directory, each.name, status)
            except Exception as write_error:  # isolation: the journal directory may be in any condition
                log().warning("courier.state_unwritten", courier=each.name, exc_info=write_error)

    def _adapter_names(self) -> str:
        return ", ".join(each.name for each in self._config.subscriptions)

    def _send_config(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        remaining = memoryview(self._config_line)
        with contextlib.suppress(OSError):  # it has died already; its exit code is handled in `_monitor`
            while remaining:
                remaining = remaining[process.stdin.write(remaining) :]
        with self._lock:
            self._config_sent = True
            if self._finish_requested.is_set():
                _request_end(process, self._finish_deadline)


def _request_end(process: "subprocess.Popen[bytes]", deadline: float) -> None:
    """Send the remaining seconds as a line and close stdin; a forked child may keep the pipe open."""
    assert process.stdin is not None
    if process.stdin.closed:
        return
    with contextlib.suppress(OSError):
        os.set_blocking(process.stdin.fileno(), False)
        process.stdin.write(b"%f\n" % max(0.0, deadline - time.monotonic()))
    with contextlib.suppress(OSError):
        process.stdin.close()


def _describe_exit(code: int) -> str:
    try:
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
