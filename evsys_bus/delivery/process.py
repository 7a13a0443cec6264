"""`CourierProcess`: the process that delivers, as the program that publishes sees it: started, kept alive, told to end.

It is told what to do in one line through its stdin, which then stays open: its end, however it comes, means that no
more is published. What comes of it is read from the journal's directory.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from evsys_bus.delivery.followed import Followed
from evsys_bus.delivery.roster import Posted, current_folder, enlist, import_path, posted
from evsys_bus.diagnostics import log
from evsys_bus.journal import layout

LOG_NAME: Final = "process.log"
"""Of its stdout and stderr, beside the couriers' files."""
QUICK_SECONDS: Final = 5.0
"""One that dies sooner than that may never do better."""
MOST_QUICK_DEATHS: Final = 5
"""After so many, one after another, it is not started again."""
_MOST_LOG_BYTES: Final = 4 << 20

# Nothing of ours may be imported before sys.path is the program's own: only there may we be found at all. Read without
# a buffer, so that what follows the line stays in the pipe.
_BOOT: Final = (
    "import sys, json, importlib; line = sys.stdin.buffer.raw.readline() or sys.exit(); "
    'sys.path[:] = json.loads(line)["sys_path"]; importlib.import_module(sys.argv[1]).main(line)'
)


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
        self.gave_up = False
        """It died again and again, or cannot be told what to do, and is not started any more."""
        self._followed = followed
        self._linger_seconds = linger_seconds
        self._pause_seconds = pause_seconds
        # The last one is for people who list processes.
        self._command = [python, "-P", "-c", _BOOT, main, self.directory]
        self._order = b""
        self._owner = 0
        self._asked = threading.Event()
        self._lock = threading.Lock()  # over the process's stdin
        self._told = False
        self._wait_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._watch, name="evsys-bus-couriers", daemon=True)

    def start(self) -> None:
        """Start it, and keep it alive. It never raises: what goes wrong is logged and tried again."""
        enlist(self.directory, self._followed)
        order = Order(self.directory, posted(self._followed), import_path(), self._linger_seconds, os.getpid())
        try:
            self._order = msgspec.json.encode(order) + b"\n"
        except (TypeError, ValueError) as error:  # a path, or a param, that is no text
            log().warning("couriers.not_started", journal=self.directory, exc_info=error)
            self.gave_up = True
            return
        self._owner = os.getpid()
        self._process = self._spawn()
        self._watcher.start()

    def finish(self, wait_seconds: float = 0.0) -> None:
        """Have it end once it has delivered what is there. Nothing more is published.

        Args:
            wait_seconds: How long the program waits for that; the linger begins when that is over.
        """
        if not self._is_ours():
            return
        self._wait_seconds = wait_seconds
        self._asked.set()
        with self._lock:
            if self._told and self._process is not None:
                _end(self._process, wait_seconds)

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for its end, once it was asked to finish; whether it has ended, or was given up."""
        if self._is_ours():
            self._watcher.join(timeout_seconds)
            return not self._watcher.is_alive()
        return True

    @property
    def alive(self) -> bool:
        """Whether it runs, or will again."""
        return self._is_ours() and self._watcher.is_alive()

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, or ran last."""
        return None if self._process is None else self._process.pid

    def _is_ours(self) -> bool:
        """Not in a child that was forked from the program; it has no business with the process."""
        return self._owner == os.getpid()

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

    def _watch(self) -> None:
        quick = 0
        while True:
            began, code = time.monotonic(), None
            if self._process is not None:
                self._tell(self._process)
                code = self._process.wait()
                with self._lock:
                    _end(self._process)
            if self._asked.is_set() and code is not None and code >= 0:
                return
            quick = quick + 1 if time.monotonic() - began < QUICK_SECONDS else 1
            facts = {"journal": self.directory, "exit_code": code, "log": self.log_path}
            if quick >= MOST_QUICK_DEATHS:
                self.gave_up = True
                fix = f"read the log; what is pending goes out with: evsys-bus sync {self.directory}"
                log().warning("couriers.given_up", **facts, deaths=quick, fix=fix)
                return
            pause = self._pause_seconds * 3 ** (quick - 1)
            log().warning("couriers.died", **facts, again_in_seconds=round(pause, 1))
            self._asked.wait(pause)
            with self._lock:
                self._told = False
                self._process = self._spawn()

    def _tell(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        rest = memoryview(self._order)
        with contextlib.suppress(OSError):  # it is dead already, which its exit code will tell
            while rest:
                rest = rest[process.stdin.write(rest) :]
        with self._lock:
            self._told = True
            if self._asked.is_set():
                _end(process, self._wait_seconds)


def _end(process: "subprocess.Popen[bytes]", wait_seconds: float = 0.0) -> None:
    """A line, and not only the end of the stream: a child that the program forked may keep that open."""
    assert process.stdin is not None
    if process.stdin.closed:
        return
    with contextlib.suppress(OSError):
        os.set_blocking(process.stdin.fileno(), False)
        process.stdin.write(b"%f\n" % wait_seconds)
    with contextlib.suppress(OSError):
        process.stdin.close()


def _open_log(path: str) -> int:
    """For the owner alone; what an earlier process said stays, up to a bound."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return subprocess.DEVNULL
    if os.fstat(file).st_size > _MOST_LOG_BYTES:
        os.ftruncate(file, 0)
    return file
