"""Closing inline callbacks at the end: `close`, and a last chance for their far side to confirm what it got.

Their code may block, so it runs on its own thread, and leaving the bus waits for it at most until the deadline.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Final

from evsys_bus.attached import Adapter
from evsys_bus.callback import Callback, callback_name, check_returned
from evsys_bus.diagnostics import log
from evsys_bus.tasks import Deadline, run_on

_LOOK_SECONDS: Final = 0.1


def wants_closing(callback: object) -> bool:
    """Whether its class overrides `close` or `settle_owed`."""
    if not isinstance(callback, Callback):
        return False
    kind = type(callback)
    return kind.close is not Callback.close or kind.settle_owed is not Adapter.settle_owed


def close_callback(callback: object, failed: Callable[[object], None]) -> None:
    """Call the callback's `close`; an exception is logged and counted."""
    if isinstance(callback, Callback) and type(callback).close is not Callback.close:
        try:
            check_returned(callback, "close", callback.close())
        except BaseException as error:  # isolated, like hooks
            log().warning("callback.close_failed", callback=callback_name(callback), exc_info=error)
            failed(callback)


class Closing:
    """Closes callbacks in order, on its own thread.

    Args:
        callbacks: Those whose hooks were called.
        loop: Runs `settle_owed`; None if no event loop is running.
        failed: Called with a callback whose `close` raised or did not return.
    """

    def __init__(
        self,
        callbacks: Sequence[object],
        loop: asyncio.AbstractEventLoop | None,
        failed: Callable[[object], None],
    ) -> None:
        self._callbacks = callbacks
        self._loop = loop
        self._failed = failed
        self._deadline = Deadline(0.0)
        self._at: object = None
        self._settles = False
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
        while self._thread.is_alive() and self._deadline.left():
            self._thread.join(min(_LOOK_SECONDS, self._deadline.left()))
        if self._thread.is_alive():
            what = "settle_owed" if self._settles else "close"
            name = callback_name(self._at)
            log().warning("callback.close_hangs", callback=name, method=what, meaning="it is left behind")
            if not self._settles:
                self._failed(self._at)

    def _run(self) -> None:
        for callback in self._callbacks:
            self._at, self._settles = callback, False
            close_callback(callback, self._failed)
            self._settles = True
            if isinstance(callback, Callback) and type(callback).settle_owed is not Adapter.settle_owed:
                self._settle(callback)

    def _settle(self, callback: Callback) -> None:
        left = self._deadline.left()
        if self._loop is None or left <= 0:
            return
        try:
            run_on(self._loop, callback.settle_owed(self._deadline.at), left)
        except TimeoutError:
            pass  # the receipt shows what is still unconfirmed
        except BaseException as error:  # isolated, like hooks
            log().warning("callback.settle_failed", callback=callback_name(callback), exc_info=error)
