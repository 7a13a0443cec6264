"""The thread that uses the store: all of its calls in order, and a store that failed is opened again.

SQLite and the open chunks belong to one thread. Ingested bodies are applied in slices, of which at most one waits for
the thread at any time: reads for charts and live frames come between two slices, and slices that wait together share
one transaction.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

from evsys_adapters.dashboard.database import StoreError, is_url
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.store import Store
from evsys_bus.diagnostics import log

T = TypeVar("T")
P = ParamSpec("P")

_LOCK_SECONDS: Final = 1.0
"""How long a call waits for another program that has locked the database, and all other calls with it."""
_FOLLOW_SECONDS: Final = 0.2
"""Between two looks at what another server has written."""
_REOPEN_SECONDS: Final = 1.0
"""How long all calls fail at once after the store could not be opened."""


def open_store(location: str | Path) -> Store:
    """Open the store of a server; only for reading if another one writes to it in PostgreSQL. Raises StoreError."""
    try:
        return Store.open(location, timeout_seconds=_LOCK_SECONDS)
    except StoreError as error:
        if error.problem not in {"locked", "read only"} or not is_url(str(location)):
            raise
    from evsys_adapters.dashboard.store_reader import StoreReader

    return StoreReader.open(location, timeout_seconds=_LOCK_SECONDS)


class StoreThread:
    """Runs calls on the store's thread.

    Args:
        location: The database, as `Store.open` takes it.
        open_store: Opens it; called on the thread, again after a failure.
    """

    def __init__(self, location: str | Path, open_store: Callable[[str | Path], Store] = open_store) -> None:
        self._location = location
        self._open_store = open_store
        self.id = ""
        """The UUID of the database, once it is open."""
        self.times_opened = 0
        """How often the store was opened: then the ids of what was removed before may be those of something new."""
        self._executor = ThreadPoolExecutor(1, "dashboard-store")
        self._store: Store | None = None
        self._failure: tuple[float, str, str] | None = None
        """Until when calls fail at once, why, and the fix; after that the store is opened again."""

    def open(self) -> None:
        """Open the store. Raises StoreError."""
        error = self._executor.submit(self._open).exception()
        if error is not None:
            self._executor.shutdown()
            raise error
        self._executor.submit(_import_numpy)

    def close(self) -> None:
        """Write what is in memory, and close the store. Raises StoreError."""
        try:
            self._executor.submit(self._close).result()
        finally:
            self._executor.shutdown()

    async def follow(self, publish: Callable[[Changes], None]) -> None:
        """Publish what another server writes, and take over when it has ended, until cancelled.

        A store that cannot be used is opened again, so that it is back before the next call. Returns at once for
        SQLite, which no other server opens.
        """
        if not is_url(str(self._location)):
            return
        checked = time.monotonic()
        while True:
            await asyncio.sleep(_FOLLOW_SECONDS)
            loop = asyncio.get_running_loop()
            changes = await loop.run_in_executor(self._executor, self._take_followed)
            if changes is not None and (changes.series or changes.runs or changes.experiments):
                publish(changes)
            if time.monotonic() - checked >= _REOPEN_SECONDS:
                await loop.run_in_executor(self._executor, self._take_over)
                checked = time.monotonic()

    async def call(self, work: Callable[Concatenate[Store, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return ``work(store, *args)``, run on the thread.

        Raises:
            AnswerError: The database cannot be used now (503). It is opened again for the next call.
        """

        def run() -> T:
            return self._run(lambda store: work(store, *args, **kwargs))

        return await asyncio.get_running_loop().run_in_executor(self._executor, run)

    def _run(self, work: Callable[[Store], T], *, is_repeated: bool = False) -> T:
        if self._failure is not None and time.monotonic() < self._failure[0]:
            raise _unavailable(*self._failure[1:])
        try:
            if self._store is None or self._failure is not None:
                self._open()
            assert self._store is not None
            with self._store.reading():
                return work(self._store)
        except (StoreError, sqlite3.OperationalError) as error:  # others are of this call alone
            if isinstance(error, StoreError) and error.problem == "read only":
                raise _unavailable(error.what, error.fix) from error
            if isinstance(error, StoreError) and error.problem == "failed" and not is_repeated:
                self._failure = (0.0, "", "")
            else:
                raise self._fail(error) from error
        return self._run(work, is_repeated=True)  # an earlier call broke the store: nothing was done in this one

    def _take_followed(self) -> Changes | None:
        if self._failure is not None or self._store is None:
            return None
        try:
            with self._store.reading():
                return self._store.take_followed()
        except (StoreError, sqlite3.Error) as error:
            self._fail(error)
            return None

    def _take_over(self) -> None:
        """Open the store again if it cannot be used, or if it is to be the writer."""
        is_failed = self._failure is not None
        try:
            if not is_failed and (self._store is None or not self._store.may_take_over()):
                return
            self._open()
        except (StoreError, sqlite3.Error) as error:
            self._fail(error)
        else:
            log().info("dashboard.store_opened", database=str(self._location))

    def _fail(self, error: StoreError | sqlite3.Error) -> AnswerError:
        """Let calls fail for a while, and return the error of this one."""
        why, fix = (error.what, error.fix) if isinstance(error, StoreError) else (str(error), REPORT)
        if self._failure is None or self._failure[1] != why:
            log().warning("dashboard.store_failed", database=str(self._location), error=why, fix=fix)
        self._failure = (time.monotonic() + _REOPEN_SECONDS, why, fix)
        return _unavailable(why, fix)

    def _open(self) -> None:
        if self._store is None or is_url(str(self._location)):  # who writes may have changed
            if self._store is not None:
                self._store.abandon()
            self._store = self._open_store(self._location)
        else:
            self._store = self._store.reopen()
        self.id = self._store.id
        self.times_opened += 1
        self._failure = None

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()


REPORT: Final = "report it with the log of the dashboard"


def _import_numpy() -> None:
    """Import what charts need, so that the first one does not wait for it."""
    import numpy as np

    np.zeros(1)


def _unavailable(why: str, fix: str) -> AnswerError:
    return AnswerError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "store",
        f"the database cannot be used now: {why}",
        fix=fix,
        headers={"retry-after": "2"},
    )
