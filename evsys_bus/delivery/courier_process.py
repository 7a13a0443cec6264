"""`CourierProcess`: the publishing program's handle of the courier process: start it, keep it running, and end it.

The process reads its configuration as one line from stdin, which stays open: end of file, also after a kill of the
program, means that nothing more is published. Results are read from the journal directory.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final

from evsys_bus.delivery.process_log import LOG_NAME, MAX_LOG_BYTES, open_log, rotate_log
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.delivery.subscriptions import current_directory, import_path, register, to_records
from evsys_bus.delivery.supervisor import CourierConfig, Supervisor
from evsys_bus.diagnostics import log
from evsys_bus.journal import layout

# evsys_bus can be imported only once sys.path is the program's. Reads without a buffer, so that what follows the line
# stays in the pipe.
_BOOTSTRAP: Final = (
    "import sys, json, importlib; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; importlib.import_module(sys.argv[1]).main(line)'
)


class CourierProcess:
    """Delivers to adapters that can be rebuilt, in a process of its own.

    Args:
        directory: The journal.
        subscriptions: The adapters; each has a recipe.
        grace_seconds: How long the process may continue to deliver once nothing more is published.
        restart_seconds: Pause before a process that died is restarted; longer after each quick death.
        main: Module whose ``main(line)`` the process runs; the line is the encoded `CourierConfig`.
        python: The interpreter.
    """

    def __init__(
        self,
        directory: str,
        subscriptions: Sequence[Subscription],
        *,
        grace_seconds: float = 30.0,
        restart_seconds: float = 0.1,
        main: str = "evsys_bus.config.courier_main",
        python: str = sys.executable,
    ) -> None:
        self._working_directory = current_directory()
        self.directory: Final = os.path.join(self._working_directory, directory)  # noqa: PTH118  # as text, as all of a journal
        self.log_path: Final = f"{self.directory}/{layout.COURIERS}/{LOG_NAME}"
        self._subscriptions = subscriptions
        self._grace_seconds = grace_seconds
        self._restart_seconds = restart_seconds
        # The last argument is not used: it identifies the journal in a list of processes.
        self._command = [python, "-P", "-c", _BOOTSTRAP, main, self.directory]
        self._owner_pid = 0
        self._supervisor: Supervisor | None = None

    def start(self, *, subscribe: bool = True) -> None:
        """Start the process and keep it running. Failures are logged and retried, not raised.

        Args:
            subscribe: Whether to register the adapters first; False if that was done.
        """
        if subscribe:
            register(self.directory, self._subscriptions)
        config = CourierConfig(
            self.directory, to_records(self._subscriptions), import_path(), self._grace_seconds, os.getpid()
        )
        self._owner_pid = os.getpid()
        try:
            self._supervisor = Supervisor(config, self._spawn, self.log_path, self._restart_seconds)
        except (TypeError, ValueError) as error:  # a path or param that is not valid text
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            return
        self._supervisor.start()

    def finish(self, wait_seconds: float = 0.0) -> None:
        """Ask the process to end once it has delivered all events. Nothing may be published after this.

        Args:
            wait_seconds: How long the program waits for that; the grace period starts afterwards.
        """
        if (supervisor := self._own_supervisor()) is not None:
            supervisor.finish(time.monotonic() + wait_seconds)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the process to end after `finish`; return whether it has ended or was given up."""
        return (supervisor := self._own_supervisor()) is None or supervisor.wait(timeout_seconds)

    @property
    def is_alive(self) -> bool:
        """Whether the process is running or will be restarted."""
        return (supervisor := self._own_supervisor()) is not None and supervisor.is_alive

    @property
    def has_given_up(self) -> bool:
        """Whether the process died repeatedly, or could not be configured, and is not restarted any more."""
        return self._owner_pid != 0 and (self._supervisor is None or self._supervisor.has_given_up)

    @property
    def pid(self) -> int | None:
        """Process id of the current or last process."""
        return None if self._supervisor is None or self._supervisor.process is None else self._supervisor.process.pid

    def _own_supervisor(self) -> "Supervisor | None":
        """The supervisor; None in a forked child, which must not control the process."""
        return self._supervisor if self._owner_pid == os.getpid() else None

    def _spawn(self) -> "subprocess.Popen[bytes] | None":
        output = _open_bounded_log(self.log_path)
        try:
            return subprocess.Popen(  # noqa: S603  # our own interpreter, and nothing from outside
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self._working_directory if os.path.isdir(self._working_directory) else None,  # noqa: PTH112  # it may have been removed
                start_new_session=True,  # Ctrl-C and a closed terminal must not end it
            )
        except OSError as error:
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            return None
        finally:
            if output != subprocess.DEVNULL:
                os.close(output)


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
