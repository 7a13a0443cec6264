"""The thread that uses the store: all of its calls in order, and a store that failed is opened again.

SQLite and the open chunks belong to one thread. Ingested bodies are applied in slices, of which at most one waits for
the thread at any time: reads for charts and live frames come between two slices, and slices that wait together share
one transaction.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.store import Store, StoreError
from evsys_bus.diagnostics import log

T = TypeVar("T")
P = ParamSpec("P")

_REOPEN_SECONDS: Final = 1.0
"""How long all calls fail at once after the store could not be opened."""


class StoreThread:
    """Runs calls on the store's thread.

    Args:
        path: The database.
        open_store: Opens it; called on the thread, again after a failure.
    """

    def __init__(self, path: Path, open_store: Callable[[Path], Store] = Store.open) -> None:
        self._path = path
        self._open_store = open_store
        self._executor = ThreadPoolExecutor(1, "dashboard-store")
        self._store: Store | None = None
        self._failure: tuple[float, str, str] | None = None  # until when calls fail at once, and why, and the fix

    def open(self) -> None:
        """Open the store. Raises StoreError."""
        self._executor.submit(self._open).result()

    def close(self) -> None:
        """Write what is in memory, and close the store. Raises StoreError."""
        self._executor.submit(self._close).result()
        self._executor.shutdown()

    async def call(self, work: Callable[Concatenate[Store, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``work(store, *args)``, run on the thread.

        Raises:
            AnswerError: The database cannot be used now (503). It is opened again for the next call.
        """

        def run() -> T:
            with self._guarded() as store:
                return work(store, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._executor, run)

    @contextmanager
    def _guarded(self) -> Iterator[Store]:
        """A context manager that yields the store, and discards it if the block fails: its memory may be ahead of it."""
        if self._failure is not None and time.monotonic() < self._failure[0]:
            raise _unavailable(*self._failure[1:])
        try:
            yield self._store or self._open()
        except (StoreError, sqlite3.Error) as error:
            fix = getattr(error, "fix", None) or suggest_fix(error)
            why = getattr(error, "what", None) or str(error)
            self._failure = (time.monotonic() + _REOPEN_SECONDS, why, fix)
            log().warning("dashboard.store_failed", database=str(self._path), error=why, fix=fix)
            self._discard()
            raise _unavailable(why, fix) from error

    def _open(self) -> Store:
        self._store = self._open_store(self._path)
        self._failure = None
        return self._store

    def _close(self) -> None:
        if self._store is not None:
            store, self._store = self._store, None
            store.close()

    def _discard(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            try:
                store.discard()
            except (StoreError, sqlite3.Error, OSError):
                pass  # it failed already; the database is as its last transaction left it


def suggest_fix(error: BaseException) -> str:
    """Return what to do about an error of the database."""
    text = str(error)
    if "locked" in text or "busy" in text:
        return "another process uses the database: end it, or start the dashboard with another --db"
    if "full" in text or "I/O" in text:
        return "make room on the disk of the database; clients send again what was refused"
    return "end the dashboard, move the database away, and import the runs again: `evsys-bus dash --import RUN`"


def _unavailable(why: str, fix: str) -> AnswerError:
    return AnswerError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "store",
        f"the database cannot be used now: {why}",
        fix=fix,
        headers={"retry-after": "2"},
    )
