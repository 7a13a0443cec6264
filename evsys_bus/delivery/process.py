"""`CourierProcess`: the process that delivers, as the program that publishes sees it: started, kept alive, told to end.

It is told what to do in one line through its stdin, which then stays open: its end, however it comes, means that no
more is published. What comes of it is read from the journal's directory.
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

# Nothing of ours may be imported before sys.path is the program's own: only there may we be found at all. Read without
# a buffer, so that what follows the line stays in the pipe.
_BOOT: Final = (
    "import sys, json, importlib; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; importlib.import_module(sys.argv[1]).main(line)'
)


class CourierProcess:
    """Delivers to adapters that can be built again, in a process of its own.

    Args:
        directory: The journal.
        followed: The adapters; each has a recipe.
        linger_seconds: How long it may go on to deliver once nothing more is published.
        pause_seconds: Until it is started again, when it has died; longer after each quick death.
        main: The module whose ``main(line)`` it runs; the line is the `Order`.
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
        # The last one is for people who list processes.
        self._command = [python, "-P", "-c", _BOOT, main, self.directory]
        self._owner = 0
        self._kept: KeptProcess | None = None

    def start(self, *, enlists: bool = True) -> None:
        """Start it, and keep it alive. It never raises: what goes wrong is logged and tried again.

        Args:
            enlists: Whether to write down who is followed; False where that was done.
        """
        if enlists:
            enlist(self.directory, self._followed)
        order = Order(self.directory, posted(self._followed), import_path(), self._linger_seconds, os.getpid())
        self._owner = os.getpid()
        try:
            self._kept = KeptProcess(order, self._spawn, self.log_path, self._pause_seconds)
        except (TypeError, ValueError) as error:  # a path, or a param, that is no text
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            return
        self._kept.start()

    def finish(self, wait_seconds: float = 0.0) -> None:
        """Have it end once it has delivered what is there. Nothing more is published.

        Args:
            wait_seconds: How long the program waits for that; the linger begins when that is over.
        """
        if (kept := self._ours()) is not None:
            kept.finish(time.monotonic() + wait_seconds)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for its end, once it was asked to finish; whether it has ended, or was given up."""
        return (kept := self._ours()) is None or kept.wait(timeout_seconds)

    @property
    def alive(self) -> bool:
        """Whether it runs, or will again."""
        return (kept := self._ours()) is not None and kept.alive

    @property
    def gave_up(self) -> bool:
        """Whether it died again and again, or could not be told what to do, and is not started any more."""
        return self._owner != 0 and (self._kept is None or self._kept.gave_up)

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, or ran last."""
        return None if self._kept is None or self._kept.process is None else self._kept.process.pid

    def _ours(self) -> "KeptProcess | None":
        """Not in a child that was forked from the program; it has no business with the process."""
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
                start_new_session=True,  # Ctrl-C, and a terminal that is closed, are not for it
            )
        except OSError as error:
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            return None
        finally:
            if output != subprocess.DEVNULL:
                os.close(output)


def _open_log(path: str) -> int:
    """For the owner alone; what an earlier process said stays, up to a bound."""
    try:
        file = open_log(path)
        if os.fstat(file).st_size <= MOST_BYTES:
            return file
        os.close(file)
        set_aside(path)
        return open_log(path)
    except OSError:
        return subprocess.DEVNULL
