"""Closing inline callbacks at the end: `close`, and a last chance for their far side to confirm what it got.

Their code may block, so it runs on its own thread, and leaving the bus waits for it at most until the deadline.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Final

from evsys_bus.adapter import Adapter
from evsys_bus.callback import Callback, callback_name, check_return_value
from evsys_bus.diagnostics import log
from evsys_bus.tasks import Deadline, run_on_loop

_POLL_SECONDS: Final = 0.1


def has_cleanup(callback: object) -> bool:
    """Whether its class overrides `close` or `settle_owed`."""
    if not isinstance(callback, Callback):
        return False
    callback_class = type(callback)
    return callback_class.close is not Callback.close or callback_class.settle_owed is not Adapter.settle_owed


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
