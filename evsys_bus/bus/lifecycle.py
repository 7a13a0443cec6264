"""Entering and leaving a bus: by a task or a thread, by SIGTERM, or at the end of the program; closing its callbacks.

With the default disposition of SIGTERM, our handler stops the code of every open bus once. When the last bus has
closed, the signal is raised again with the default in place, so that the process ends as its sender expects. If the
host has a handler, that one runs, and ours only forwards to it. SIGINT is left to the asyncio runner, which cancels the
main task.
"""

import asyncio
import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from types import FrameType
from typing import Any, Final

from evsys_bus.adapter import Adapter
from evsys_bus.callback import Callback, Spawner, callback_name, check_return_value, detach
from evsys_bus.codec import error_text
from evsys_bus.codec.wire_types import attribute_reader, run_and_root, run_key_text
from evsys_bus.context import ArmResult, LoopArtifacts, RunResult, Status
from evsys_bus.diagnostics import log
from evsys_bus.errors import SettingError, TrainingError
from evsys_bus.events import Event, RunEnd, RunStart, TrainEnd, TrainStart
from evsys_bus.tasks import Deadline, Gate, run_on_loop

_SIGNAL_EXIT_CODES: Final = (128 + signal.SIGINT, 128 + signal.SIGTERM)


class SigtermHandler:
    """The SIGTERM handler of one bus, from its entry to its exit. Nothing is installed off the main thread.

    ``on_sigterm`` is called once in the signal handler, on the main thread.
    """

    def __init__(self, on_sigterm: Callable[[], None]) -> None:
        self.on_sigterm = on_sigterm
        self._was_last = False

    def install(self) -> bool:
        """Install the handler; return True if the signal has arrived already and another bus is still closing."""
        if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
            return False
        current = signal.getsignal(signal.SIGTERM)
        if current is None or current is signal.SIG_IGN:
            return False  # set outside Python, or meant to be ignored
        _process_state.handlers.append(self)  # first, so that `remove` undoes it after an interrupt
        if current is not _on_signal:
            _process_state.previous_handler = current
            _process_state.received = False
            signal.signal(signal.SIGTERM, _on_signal)
        return _process_state.received and _process_state.previous_handler is signal.SIG_DFL

    def remove(self) -> None:
        """Remove the handler; the last one restores the host's handler, unless it has set another one since."""
        # An interrupt may come between any two statements; calling this again has the same result.
        self._was_last = self._was_last or _process_state.handlers == [self]
        if self in _process_state.handlers:
            _process_state.handlers.remove(self)
        if not _process_state.handlers:
            _restore_previous_handler()

    def raise_again(self) -> None:
        """End the process as the signal would have, after the last `remove`."""
        if self._was_last and _process_state.received and _process_state.previous_handler is signal.SIG_DFL:
            for stream in (sys.stdout, sys.stderr):  # the default disposition flushes nothing
                try:
                    stream.flush()
                except (AttributeError, OSError, ValueError):
                    pass  # no stream, or a broken one
            os.kill(os.getpid(), signal.SIGTERM)


class _ProcessState:
    """State shared by all buses of the process, because a signal has only one handler."""

    def __init__(self) -> None:
        self.handlers: list[SigtermHandler] = []
        self.previous_handler: Any = None  # a handler, or SIG_DFL or SIG_IGN
        self.received = False
        self.pid = os.getpid()
        self.exit_code = 0
        """What the program gave `sys.exit` last, since it started a run."""
        self.original_exit: Callable[[Any], Any] | None = None


_process_state = _ProcessState()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _process_state.pid:  # it arrived in a forked child before the after-fork hook ran
        _reset_after_fork()
        os.kill(os.getpid(), number)
    elif not _process_state.handlers:  # the last bus was left by a thread that may not restore the handler
        _restore_previous_handler()
        os.kill(os.getpid(), number)
    elif _process_state.previous_handler is not signal.SIG_DFL:
        _process_state.previous_handler(number, frame)
    elif not _process_state.received:
        _process_state.received = True
        try:
            for each in reversed(_process_state.handlers):  # the innermost first
                each.on_sigterm()
        except RuntimeError:  # its loop was just closed
            _process_state.received = False  # possibly nothing was stopped: handle the next signal
            raise


def exit_code() -> int:
    """Return the code that the program gave `sys.exit` since it started a run; 0 if it did not call that."""
    return _process_state.exit_code


def _observe_exit_code() -> None:
    """Note the code of `sys.exit` from here on: functions that run at exit have no other way to get it."""
    _process_state.exit_code = 0  # a call before this was caught: the program has continued
    if _process_state.original_exit is None:
        _process_state.original_exit, sys.exit = sys.exit, _exit


def _exit(status: Any = None, /) -> Any:
    if threading.current_thread() is threading.main_thread():
        _process_state.exit_code = status if isinstance(status, int) else int(status is not None)
    assert _process_state.original_exit is not None
    return _process_state.original_exit(status)


def _restore_previous_handler() -> None:
    """Restore the host's handler; Python allows this on the main thread only."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread and signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.signal(signal.SIGTERM, _process_state.previous_handler)


def _reset_after_fork() -> None:
    """Remove the handlers in a forked child, which has no bus to drain."""
    _restore_previous_handler()
    _process_state.handlers.clear()
    _process_state.pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


class BusLifecycle:
    """Tracks who entered a bus and who leaves it.

    Args:
        handles_signals: Whether to handle SIGTERM.
    """

    def __init__(self, *, handles_signals: bool) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        """The caller's loop, under ``async with``."""
        self._task: asyncio.Task[Any] | None = None
        self._sigterm_handler = SigtermHandler(self._on_sigterm) if handles_signals else None
        self._exit_bus: Callable[..., object] | None = None
        self._owner_pid = 0
        self._lock = threading.RLock()  # guards `_exiting_thread`
        self._exiting_thread: threading.Thread | None = None
        self._exited = Gate()

    def enter_from_task(self) -> None:
        """Note that the current task enters."""
        self.loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()

    def install_exit_handlers(self, exit_bus: Callable[..., object]) -> None:
        """Handle SIGTERM and program exit from here on; leave at once if SIGTERM has already arrived.

        Args:
            exit_bus: Leaves the bus if the program ends without having done so; called like ``__exit__``.
        """
        self._exit_bus, self._owner_pid = exit_bus, os.getpid()
        atexit.register(self._at_exit)
        if self._sigterm_handler is not None and self._sigterm_handler.install() and self.loop is not None:
            self._on_sigterm()

    def try_begin_exit(self, wait_seconds: float = 0.0) -> bool:
        """Claim leaving the bus for this thread; return False if another thread has left it or is leaving it.

        Args:
            wait_seconds: How long to wait for that other thread.
        """
        current_thread, main_thread = threading.current_thread(), threading.main_thread()
        with self._lock:
            exiting_thread = self._exiting_thread
            # A thread that died half-way does not count; the main thread is not "alive" at interpreter shutdown.
            if not self._exited.is_open and (
                exiting_thread is None
                or exiting_thread is current_thread
                or not (exiting_thread.is_alive() or exiting_thread is main_thread)
            ):
                self._exiting_thread = current_thread
                return True
        self._exited.wait(wait_seconds)
        return False

    def complete_exit(self) -> None:
        """Finish leaving; if SIGTERM was the cause, end the process by it."""
        try:
            self._uninstall()
        except BaseException:  # Ctrl-C between two statements
            self._uninstall()
            raise
        if self._sigterm_handler is not None:
            self._sigterm_handler.raise_again()

    def _uninstall(self) -> None:
        self._exited.open()
        atexit.unregister(self._at_exit)
        if self._sigterm_handler is not None:
            self._sigterm_handler.remove()

    def _at_exit(self) -> None:
        """Finish pending work if the program ends without leaving the bus."""
        if self._exit_bus is not None and self._owner_pid == os.getpid():
            if self._exiting_thread is None:
                fix = "enter it with `with` or `async with`, which leave it even if an exception is raised"
                log().warning("bus.never_left", fix=fix)
            error = self._cause_of_exit()
            self._exit_bus(None if error is None else type(error), error)

    @staticmethod
    def _cause_of_exit() -> BaseException | None:
        """Return why the program ends, for runs that are open still: a signal, an exception, or an exit code."""
        code = 128 + signal.SIGTERM if _process_state.received else _process_state.exit_code
        if code in _SIGNAL_EXIT_CODES:
            return SystemExit(code)
        cause = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
        if isinstance(cause, BaseException):
            return cause
        return TrainingError(f"the program ended with exit code {code}", fix="see its output") if code else None

    def _on_sigterm(self) -> None:
        """Called in the signal handler."""
        if self.loop is not None and self._task is not None and self.loop.is_running() and not self._task.done():
            self.loop.call_soon_threadsafe(self._task.cancel, "SIGTERM")
        elif (
            self._exiting_thread is None
        ):  # also if that task or its loop has ended: a cancellation would have no effect
            sys.exit(128 + signal.SIGTERM)


def status_of(error: BaseException | None) -> Status:
    """Return how a run ended that the program left with this error, or without one."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "completed"
    if isinstance(error, SystemExit):
        return "cancelled" if error.code in _SIGNAL_EXIT_CODES else "failed"
    is_request = isinstance(error, KeyboardInterrupt | GeneratorExit | asyncio.CancelledError)
    return "cancelled" if is_request else "failed"


class OpenRuns:
    """The runs that a program has started by publishing `RunStart`, and has not ended."""

    def __init__(self) -> None:
        self._contexts: dict[str, Any] = {}
        self._states: dict[str | None, Any] = {}
        """Those that train."""

    def note(self, event: Event) -> None:
        """Note that a run or its training starts or ends."""
        if isinstance(event, RunStart):
            key = _run_key(event.ctx)
            _observe_exit_code()
            if key:  # without one it is not different from the experiment
                self._contexts[key] = event.ctx
        elif isinstance(event, TrainStart):
            self._states[run_and_root(event.state)[0]] = event.state
        elif isinstance(event, TrainEnd):
            self._states.pop(run_and_root(event.state)[0], None)
        elif isinstance(event, RunEnd):
            self._contexts.pop(_run_key(event.ctx) or "", None)

    def take_ends(self, error: BaseException | None) -> Generator[Event]:
        """Forget the runs and yield their ends, of the newest run first, by the error with which the bus is left."""
        status, text = status_of(error), None if error is None else error_text(error)
        while self._contexts:
            key, ctx = self._contexts.popitem()
            result = RunResult(status=status, error=text, implied=True)
            state = self._states.pop(key, None)
            if state is not None:
                yield TrainEnd(state, LoopArtifacts())
            yield RunEnd(ctx, result, ArmResult(key, status=status, error=text, run_result=result))


RUN_BOUNDARIES: Final = frozenset({RunStart, TrainStart, TrainEnd, RunEnd})
"""The events that `OpenRuns` notes."""


def _run_key(ctx: object) -> str | None:
    return run_key_text(attribute_reader(ctx)("run_key"))


_POLL_SECONDS: Final = 0.1


def has_cleanup(callback: object) -> bool:
    """Whether its class overrides `close` or `settle_owed`."""
    if not isinstance(callback, Callback):
        return False
    callback_class = type(callback)
    return callback_class.close is not Callback.close or callback_class.settle_owed is not Adapter.settle_owed


shared_callbacks_lock: Final = threading.RLock()
"""Held while a bus decides which of its callbacks it closes, so that of several buses only the last one does."""


def may_close(callback: object, bus: object, *, has_called: bool) -> bool:
    """Whether a bus that is being left may close a callback: not while another bus or a courier may call its hooks.

    Args:
        callback: The callback.
        bus: The bus.
        has_called: Whether the bus called hooks of it.
    """
    if not isinstance(callback, Callback):
        return False
    is_needed = has_called or callback.evsys_left_open
    is_shared = any(each is not bus and each.may_call_hooks() for each in callback.evsys_attached)
    object.__setattr__(callback, "evsys_left_open", is_needed and is_shared)  # it may be a frozen dataclass
    return is_needed and not is_shared


def callbacks_to_close(callbacks: Iterable[object], bus: object, has_called: Callable[[object], bool]) -> list[object]:
    """Return those that a bus which is being left closes."""
    with shared_callbacks_lock:
        return [each for each in callbacks if has_cleanup(each) and may_close(each, bus, has_called=has_called(each))]


def close_removed(
    callback: object, bus: Spawner, has_called: Callable[[object], bool], on_failure: Callable[[object], None]
) -> None:
    """Close a callback that was removed from a bus, unless another one has it, and detach it."""
    with shared_callbacks_lock:
        closes = may_close(callback, bus, has_called=has_called(callback))
    if closes:
        close_callback(callback, on_failure)
    detach(callback, bus)


def close_callback(callback: object, on_failure: Callable[[object], None]) -> None:
    """Call the callback's `close`; an exception is logged and counted."""
    if isinstance(callback, Callback) and type(callback).close is not Callback.close:
        try:
            check_return_value(callback, "close", callback.close())
        except BaseException as error:  # isolated, like hooks
            log().warning("callback.close_failed", callback=callback_name(callback), exc_info=error)
            on_failure(callback)


class CallbackCloser:
    """Closes callbacks in order, on its own thread.

    Args:
        callbacks: Those whose hooks were called.
        loop: Runs `settle_owed`; None if no event loop is running.
        on_failure: Called with a callback whose `close` raised or did not return.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        loop: asyncio.AbstractEventLoop | None,
        on_failure: Callable[[object], None],
    ) -> None:
        self._callbacks = callbacks
        self._loop = loop
        self._on_failure = on_failure
        self._deadline = Deadline(0.0)
        self._current: object = None
        self._is_settling = False
        self._thread = threading.Thread(target=self._run, name="evsys-bus-close", daemon=True)

    def start(self, deadline: Deadline) -> None:
        """Start closing; the work should be done by the deadline."""
        self._deadline = deadline
        if self._callbacks:
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is shutting down and starts no more threads
                self._run()

    def join(self) -> None:
        """Wait for the thread, at most until the deadline."""
        if not self._thread.ident:
            return
        while self._thread.is_alive() and self._deadline.remaining():
            self._thread.join(min(_POLL_SECONDS, self._deadline.remaining()))
        if self._thread.is_alive():
            method = "settle_owed" if self._is_settling else "close"
            name = callback_name(self._current)
            log().warning("callback.close_hangs", callback=name, method=method, meaning="it is left behind")
            if not self._is_settling:
                self._on_failure(self._current)

    def _run(self) -> None:
        for callback in self._callbacks:
            self._current, self._is_settling = callback, False
            close_callback(callback, self._on_failure)
            self._is_settling = True
            if isinstance(callback, Callback) and type(callback).settle_owed is not Adapter.settle_owed:
                self._settle_callback(callback)

    def _settle_callback(self, callback: Callback) -> None:
        left = self._deadline.remaining()
        if self._loop is None or left <= 0:
            return
        try:
            run_on_loop(self._loop, callback.settle_owed(self._deadline.at), left)
        except TimeoutError:
            pass  # the receipt shows what is still unconfirmed
        except BaseException as error:  # isolated, like hooks
            log().warning("callback.settle_failed", callback=callback_name(callback), exc_info=error)


_MAX_SECONDS: Final = 1e8
"""Three years; system calls accept no longer timeouts."""


def check_threads_are_real() -> None:
    """Refuse green threads, as gevent's monkey patch installs them: they would wait for each other forever."""
    patch = sys.modules.get("gevent.monkey")
    if patch is not None and patch.is_module_patched("threading"):
        raise SettingError(
            "gevent has replaced the threads of this process, and a bus needs real ones",
            why="its event loop and its deadlines run on threads beside the program's",
            fix="do not patch them: gevent.monkey.patch_all(thread=False, threading=False)",
        )


def validate_seconds(name: str, value: float, minimum: float = 0.0) -> float:
    """Return a valid duration; infinity becomes three years.

    Raises:
        SettingError: It is less than ``minimum``, or not a number.
    """
    if not value >= minimum:  # NaN too
        raise SettingError(f"{name} is {value!r}", fix=f"give it seconds, at least {minimum:g}")
    return min(float(value), _MAX_SECONDS)
