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

from evsys_bus.delivery.followed import Followed
from evsys_bus.delivery.kept_process import KeptProcess, Order
from evsys_bus.delivery.process_log import LOG_NAME, MOST_BYTES, open_log, set_aside
from evsys_bus.delivery.roster import current_folder, enlist, import_path, posted
from evsys_bus.diagnostics import log
from evsys_bus.journal import layout

# evsys_bus can be imported only once sys.path is the program's. Reads without a buffer, so that what follows the line
# stays in the pipe.
_BOOT: Final = (
    "import sys, json, importlib; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; importlib.import_module(sys.argv[1]).main(line)'
)


class CourierProcess:
    """Delivers to adapters that can be rebuilt, in a process of its own.

    Args:
        directory: The journal.
        followed: The adapters; each has a recipe.
        linger_seconds: How long the process may continue to deliver once nothing more is published.
        pause_seconds: Pause before a process that died is restarted; longer after each quick death.
        main: Module whose ``main(line)`` the process runs; the line is the encoded `Order`.
        python: The interpreter.
    """

    def __init__(
        self,
        directory: str,
        followed: Sequence[Followed],
        *,
        linger_seconds: float = 30.0,
        pause_seconds: float = 0.1,
        main: str = "evsys_bus.wiring.courier_main",
        python: str = sys.executable,
    ) -> None:
        self._folder = current_folder()
        self.directory: Final = os.path.join(self._folder, directory)  # noqa: PTH118  # as text, as all of a journal
        self.log_path: Final = f"{self.directory}/{layout.COURIERS}/{LOG_NAME}"
        self._followed = followed
        self._linger_seconds = linger_seconds
        self._pause_seconds = pause_seconds
        # The last argument is not used: it identifies the journal in a list of processes.
        self._command = [python, "-P", "-c", _BOOT, main, self.directory]
        self._owner = 0
        self._kept: KeptProcess | None = None

    def start(self, *, enlists: bool = True) -> None:
        """Start the process and keep it running. Failures are logged and retried, not raised.

        Args:
            enlists: Whether to register the adapters first; False if that was done.
        """
        if enlists:
            enlist(self.directory, self._followed)
        order = Order(self.directory, posted(self._followed), import_path(), self._linger_seconds, os.getpid())
        self._owner = os.getpid()
        try:
            self._kept = KeptProcess(order, self._spawn, self.log_path, self._pause_seconds)
        except (TypeError, ValueError) as error:  # a path or param that is not valid text
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            return
        self._kept.start()

    def finish(self, wait_seconds: float = 0.0) -> None:
        """Ask the process to end once it has delivered all events. Nothing may be published after this.

        Args:
            wait_seconds: How long the program waits for that; the grace period starts afterwards.
        """
        if (kept := self._ours()) is not None:
            kept.finish(time.monotonic() + wait_seconds)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the process to end after `finish`; return whether it has ended or was given up."""
        return (kept := self._ours()) is None or kept.wait(timeout_seconds)

    @property
    def alive(self) -> bool:
        """Whether the process is running or will be restarted."""
        return (kept := self._ours()) is not None and kept.alive

    @property
    def gave_up(self) -> bool:
        """Whether the process died repeatedly, or could not be configured, and is not restarted any more."""
        return self._owner != 0 and (self._kept is None or self._kept.gave_up)

    @property
    def pid(self) -> int | None:
        """Process id of the current or last process."""
        return None if self._kept is None or self._kept.process is None else self._kept.process.pid

    def _ours(self) -> "KeptProcess | None":
        """The supervisor; None in a forked child, which must not control the process."""
        return self._kept if self._owner == os.getpid() else None

    def _spawn(self) -> "subprocess.Popen[bytes] | None":
        output = _open_log(self.log_path)
        try:
            return subprocess.Popen(  # noqa: S603  # our own interpreter, and nothing from outside
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self._folder if os.path.isdir(self._folder) else None,  # noqa: PTH112  # it may have been removed
                start_new_session=True,  # Ctrl-C and a closed terminal must not end it
            )
        except OSError as error:
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            return None
        finally:
            if output != subprocess.DEVNULL:
                os.close(output)


def _open_log(path: str) -> int:
    """Open the log, readable by the owner only; rotate it first if it is too large."""
    try:
        file = open_log(path)
        if os.fstat(file).st_size <= MOST_BYTES:
            return file
        os.close(file)
        set_aside(path)
        return open_log(path)
    except OSError:
        return subprocess.DEVNULL
