"""`Supervisor`: keeps a courier process running, and splits it if one of its adapters may be the reason why it dies.

    all adapters in one process ── died twice ── one process per adapter ── five quick deaths in a row ── given up

An adapter may end its process, by a crash in C code or by ``os._exit``, without a trace of which adapter it was. In
separate processes the other adapters continue, and the process that dies again identifies the faulty one.

A `CourierProcess` reads its configuration as one line from stdin, which stays open: end of file, also after a kill of
the program, means that nothing more is published. Results are read from the journal directory.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Final

import msgspec

from evsys_bus.delivery.process_log import LOG_NAME, MAX_LOG_BYTES, open_log, rotate_log
from evsys_bus.delivery.status_files import write_status_if_idle
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.delivery.subscriptions import SubscriptionRecord, current_directory, import_path, to_records
from evsys_bus.diagnostics import log
from evsys_bus.journal import OsDisk, layout
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
COURIER_MAIN: Final = "evsys_bus.config.courier_main:main"
"""The function that the courier process of a program runs; identifies such a process in a list of processes."""
SYNC_MAIN: Final = "evsys_bus.config.courier_main:deliver_pending"
"""The function for a process that only delivers what is pending."""

# evsys_bus can be imported only once sys.path is the program's. Reads without a buffer, so that what follows the line
# stays in the pipe.
_BOOTSTRAP: Final = (
    "import sys, json, importlib; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; module, _, name = sys.argv[1].partition(":"); '
    "getattr(importlib.import_module(module), name)(line)"
)


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

    @property
    def working_directory(self) -> str:
        """The working directory of the program."""
        return self.subscriptions[0].working_directory if self.subscriptions else ""

    @property
    def log_path(self) -> str:
        """The log file of the process."""
        return f"{self.directory}/{layout.COURIERS}/{LOG_NAME}"


def courier_config(
    directory: str, subscriptions: Iterable[Subscription], *, grace_seconds: float = 30.0
) -> CourierConfig:
    """The configuration of the courier process of this program.

    Args:
        directory: The journal.
        subscriptions: The adapters; each has a recipe.
        grace_seconds: How long the process may continue to deliver once nothing more is published.
    """
    path = os.path.join(current_directory(), directory)  # noqa: PTH118  # as text, as all of a journal
    return CourierConfig(path, to_records(subscriptions), import_path(), grace_seconds, os.getpid())


class CourierProcess:
    """One courier process, started when this object is created.

    Args:
        config: Its configuration; `send_config` sends it.
        main: Module and function that the process calls with the encoded configuration.
        python: The interpreter.

    Raises:
        OSError: The process cannot be started.
        TypeError: The configuration cannot be encoded.
        ValueError: A path or parameter is not valid text.
    """

    def __init__(self, config: CourierConfig, main: str = COURIER_MAIN, python: str = sys.executable) -> None:
        self._config_line: Final = encode_json(config) + b"\n"
        self._lock: Final = threading.Lock()  # guards stdin
        self._config_sent = False
        self._end_deadline: float | None = None
        folder, output = config.working_directory, _open_bounded_log(config.log_path)
        try:
            self._process: Final = subprocess.Popen(  # noqa: S603  # our own interpreter, and nothing from outside
                # The last argument is not used: it identifies the journal in a list of processes.
                [python, "-P", "-c", _BOOTSTRAP, main, config.directory],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder if os.path.isdir(folder) else None,  # noqa: PTH112  # it may have been removed
                start_new_session=True,  # Ctrl-C and a closed terminal must not end it
            )
        finally:
            if output != subprocess.DEVNULL:
                os.close(output)
        self.pid: Final = self._process.pid

    def send_config(self) -> None:
        """Send the configuration, then an earlier request to end."""
        assert self._process.stdin is not None
        remaining = memoryview(self._config_line)
        with contextlib.suppress(OSError):  # the process has died already; its exit code shows that
            while remaining:
                remaining = remaining[self._process.stdin.write(remaining) :]
        with self._lock:
            self._config_sent = True
            if self._end_deadline is not None:
                self._close_stdin(self._end_deadline)

    def request_end(self, deadline: float) -> None:
        """Ask the process to end; from any thread.

        Args:
            deadline: Until when the program waits for that (monotonic).
        """
        with self._lock:
            self._end_deadline = deadline
            if self._config_sent:
                self._close_stdin(deadline)

    def _close_stdin(self, deadline: float) -> None:
        """Send the remaining seconds as a line and close stdin; a forked child may keep the pipe open."""
        stdin = self._process.stdin
        assert stdin is not None
        if stdin.closed:
            return
        with contextlib.suppress(OSError):
            os.set_blocking(stdin.fileno(), False)
            stdin.write(b"%f\n" % max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            stdin.close()

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Wait for the end of the process and return its exit code."""
        code = self._process.wait()
        self.request_end(0.0)
        return code

    def end(self, timeout_seconds: float) -> int:
        """Ask the process to end now, kill it if it has not ended within the timeout, and return its exit code."""
        self.request_end(0.0)
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Supervisor:
    """Starts and restarts the courier process of a program.

    Args:
        config: The configuration of the process.
        restart_seconds: Pause before a process that died is restarted; longer after each quick death.
        main: Module and function that the process calls with the encoded configuration.
        python: The interpreter.
    """

    def __init__(
        self,
        config: CourierConfig,
        *,
        restart_seconds: float = 0.1,
        main: str = COURIER_MAIN,
        python: str = sys.executable,
    ) -> None:
        self._config: Final = config
        self._restart_seconds: Final = restart_seconds
        self._main: Final = main
        self._python: Final = python
        self._has_given_up = False
        self._process: CourierProcess | None = None
        self._finish_requested: Final = threading.Event()
        self._lock: Final = threading.Lock()  # guards which processes there are
        self._finish_deadline = 0.0
        self._split_supervisors: list[Supervisor] = []
        self._owner_pid: Final = os.getpid()
        self._watcher: Final = threading.Thread(target=self._watch, name="evsys-bus-couriers", daemon=True)

    def start(self) -> None:
        """Start the process and keep it running. Failures are logged and retried, not raised."""
        try:
            encode_json(self._config)
        except (TypeError, ValueError) as error:  # a path or param that is not valid text
            self._has_given_up = True
            log().warning("couriers.not_started", journal=self._config.directory, exc_info=error)
            return
        self._process = self._spawn()
        try:
            self._watcher.start()
        except BaseException:  # without the thread nothing would send the configuration
            if self._process is not None:
                self._process.end(0.0)
            raise

    def finish(self, deadline: float | None = None) -> None:
        """Ask the process to end once it has delivered all events. Nothing may be published after this.

        Args:
            deadline: Until when the program waits for that (monotonic); the grace period starts then. None for now.
        """
        deadline = time.monotonic() if deadline is None else deadline
        if self._owner_pid != os.getpid():
            return  # a forked child must not control the process
        self._finish_deadline = deadline
        self._finish_requested.set()
        with self._lock:
            for each in self._split_supervisors:
                each.finish(deadline)
            if self._process is not None:
                self._process.request_end(deadline)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the process to end after `finish`; return whether it has ended or was given up."""
        if self.is_alive:
            self._watcher.join(timeout_seconds)
        return not self.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether the process is running or will be restarted; False in a forked child."""
        return self._owner_pid == os.getpid() and self._watcher.is_alive()

    @property
    def has_given_up(self) -> bool:
        """Whether the process died repeatedly, or could not be configured, and is not restarted any more."""
        return self._has_given_up

    @property
    def pid(self) -> int | None:
        """Process id of the current or last process."""
        return None if self._process is None else self._process.pid

    def _spawn(self) -> CourierProcess | None:
        try:
            return CourierProcess(self._config, self._main, self._python)
        except Exception as error:  # isolation: out of memory or any other failed start; retried later
            log().warning("couriers.not_started", journal=self._config.directory, exc_info=error)
            return None

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
            facts = {"journal": self._config.directory, "exit_code": code, "log": self._config.log_path}
            if exits >= MAX_SHARED_EXITS and len(self._config.subscriptions) > 1:
                log().warning(
                    "couriers.parted", **facts, why="one of its adapters may have ended it; the others continue"
                )
                self._split()
                return
            if quick_exits >= MAX_QUICK_EXITS:
                self._has_given_up = True
                fix = f"read the log; deliver what is pending with: evsys-bus sync {self._config.directory}"
                log().warning("couriers.given_up", **facts, deaths=quick_exits, adapters=self._adapter_names(), fix=fix)
                self._write_failed_status(code, quick_exits)
                return
            pause = self._restart_seconds * 3 ** (quick_exits - 1)
            log().warning("couriers.died", **facts, adapters=self._adapter_names(), again_in_seconds=round(pause, 1))
            self._finish_requested.wait(pause)
            with self._lock:
                self._process = self._spawn()
                if self._process is not None and self._finish_requested.is_set():
                    self._process.request_end(self._finish_deadline)

    def _run_process(self) -> int | None:
        """Send the configuration, wait for the process to end, and return its exit code; None if it did not start."""
        if self._process is None:
            return None
        self._process.send_config()
        return self._process.wait()

    def _split(self) -> None:
        """Continue with one process for each adapter, passing on a request to finish."""
        configs = [msgspec.structs.replace(self._config, subscriptions=[each]) for each in self._config.subscriptions]
        with self._lock:
            self._split_supervisors = [
                Supervisor(each, restart_seconds=self._restart_seconds, main=self._main, python=self._python)
                for each in configs
            ]
            for each in self._split_supervisors:
                each.start()
                if self._finish_requested.is_set():
                    each.finish(self._finish_deadline)
        for each in self._split_supervisors:
            each.wait(threading.TIMEOUT_MAX)
        self._has_given_up = all(each.has_given_up for each in self._split_supervisors)

    def _write_failed_status(self, code: int | None, exits: int) -> None:
        """Write the failure to the state file of each adapter."""
        directory = self._config.directory
        error = "the courier process cannot be started"
        if code is not None:
            error = f"its process has ended {exits} times, the last time by {_describe_exit(code)}"
        for each in self._config.subscriptions:
            sync_command = shlex.join(["evsys-bus", "sync", directory, "--adapter", each.name])
            fix = f"read {self._config.log_path}; then: {sync_command}"
            status = DeliveryStatus(state="failed", pid=os.getpid(), at=time.time(), error=error, fix=fix)
            try:
                write_status_if_idle(OsDisk(), directory, each.name, status)
            except Exception as write_error:  # isolation: the journal directory may be in any condition
                log().warning("courier.state_unwritten", courier=each.name, exc_info=write_error)

    def _adapter_names(self) -> str:
        return ", ".join(each.name for each in self._config.subscriptions)


def _open_bounded_log(path: str) -> int:
    """Open the log, readable by the owner only; rotate it first if it is too large."""
    try:
        file = open_log(path)
        if os.fstat(file).st_size <= MAX_LOG_BYTES:
            return file
        os.close(file)
        rotate_log(path)
        return open_log(path)
    except OSError:
        return subprocess.DEVNULL


def _describe_exit(code: int) -> str:
    try:
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
