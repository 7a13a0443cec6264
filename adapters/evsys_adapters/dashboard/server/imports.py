"""Importing journals of this machine: of runs that were recorded before the dashboard was there."""

import asyncio
from collections import OrderedDict
from http import HTTPStatus
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, Literal

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec

from evsys_adapters.dashboard import journals
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.ingest import Ingester
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.store import Store
from evsys_bus.diagnostics import log
from evsys_bus.errors import EvsysBusError

_MAX_KEPT: Final = 200
_MAX_WAITING: Final = 1_000
_MAX_ATTEMPTS: Final = 300
"""How often an import is tried while the database cannot be used: for ten minutes."""
_MAX_LOOKS: Final = 4
"""Threads that look into known journals at once; those whose share does not answer keep theirs."""


class Import(msgspec.Struct):
    """One journal that is, was or will be imported."""

    journal: str
    state: Literal["waiting", "running", "completed", "failed"] = "waiting"
    events: int = 0
    """Events that were delivered so far; those that the database had before do not count."""
    of: int | None = None
    """Events to deliver, as far as known."""
    error: str | None = None
    unreadable: int = 0
    """Delivered events that the database skips, because they could not be read."""


class JournalImports:
    """Imports journals one after another, through the ingester, so that readers come in between.

    Args:
        store: The store's thread.
        ingester: Applies the events.
        retry_seconds: After which an import goes on while the database cannot be used.
        look_seconds: How long `start_missing` waits for each journal: it may be on a share that does not answer.
    """

    def __init__(
        self, store: StoreThread, ingester: Ingester, *, retry_seconds: float = 2.0, look_seconds: float = 5.0
    ) -> None:
        self._store: Final = store
        self._ingester: Final = ingester
        self._retry_seconds: Final = retry_seconds
        self._look_seconds: Final = look_seconds
        self._imports: Final[OrderedDict[str, Import]] = OrderedDict()
        self._waiting: Final[asyncio.Queue[Import]] = asyncio.Queue(_MAX_WAITING)

    @property
    def is_running(self) -> bool:
        """Whether a journal is being imported."""
        return any(each.state in {"waiting", "running"} for each in self._imports.values())

    def start(self, journal: str) -> str:
        """Import a journal, or continue with one whose import was requested already. Returns the import's id.

        Raises:
            AnswerError: There is no such directory, or too many wait.
        """
        path = Path(journal)
        try:
            is_folder = path.is_absolute() and path.is_dir()
        except (OSError, ValueError):
            is_folder = False
        if not is_folder:
            raise AnswerError(
                400, "journal", "no such directory on the machine of the dashboard", fix="give its absolute path"
            )
        for id_, known in self._imports.items():
            if known.journal == journal and known.state in {"waiting", "running"}:
                return id_
        new = Import(journal)
        try:
            self._waiting.put_nowait(new)
        except asyncio.QueueFull as error:
            raise AnswerError(429, "imports", "too many imports wait", fix="wait for them") from error
        id_ = token_hex(8)
        self._imports[id_] = new
        if len(self._imports) > _MAX_KEPT:
            done = (each for each, known in self._imports.items() if known.state in {"completed", "failed"})
            self._imports.pop(next(done, ""), None)
        return id_

    async def start_missing(self) -> None:
        """Import what known journals of this machine have beyond the database: of runs that it did not see end."""
        limiter = anyio.CapacityLimiter(_MAX_LOOKS)
        try:
            known = await self._store.call(_known_journals)
            for journal in known:
                try:
                    with anyio.fail_after(self._look_seconds):
                        has_missing = await anyio.to_thread.run_sync(
                            journals.has_missing, journal, self._watermark, abandon_on_cancel=True, limiter=limiter
                        )
                    if has_missing:
                        self.start(journal)
                except TimeoutError:
                    why = f"it was not read within {self._look_seconds:g} s"
                    log().warning("dashboard.journal_unreadable", journal=journal, why=why)
                except (EvsysBusError, OSError, ValueError) as error:
                    log().warning("dashboard.journal_unreadable", journal=journal, why=str(error))
        except AnswerError as error:  # the database cannot be used now, or too many wait
            fix = "evsys-bus dash --import RUN"
            log().warning("dashboard.imports_not_started", why=error.message, fix=fix)

    def progress_of_all(self) -> dict[str, Any]:
        """Return how far each import is, the newest last."""
        return {"imports": [{"import": id_, **msgspec.to_builtins(each)} for id_, each in self._imports.items()]}

    def progress(self, id_: str) -> dict[str, Any]:
        """Return how far an import is. Raises AnswerError if it is not known."""
        known = self._imports.get(id_)
        if known is None:
            raise AnswerError(404, "import", "no such import", fix="start it again: it changes nothing twice")
        return msgspec.to_builtins(known)

    async def run(self) -> None:
        """Import what is requested, until cancelled."""
        while True:
            each = await self._waiting.get()
            each.state = "running"
            try:
                await self._import_patiently(each)
            except (AnswerError, EvsysBusError, OSError) as error:
                each.state, each.error = "failed", str(error)
            except Exception as error:
                log().error("dashboard.import_failed", journal=each.journal, exc_info=True)
                each.state, each.error = "failed", f"{type(error).__name__}: {error}"
            else:
                each.state = "completed"

    async def _import_patiently(self, each: Import) -> None:
        """Import a journal, and go on where it was while the database cannot be used. Raises what `_import` does."""
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                return await self._import(each)
            except AnswerError as error:
                if error.status != HTTPStatus.SERVICE_UNAVAILABLE or attempt == _MAX_ATTEMPTS:
                    raise
                if attempt == 1:
                    log().warning("dashboard.import_waiting", journal=each.journal, why=error.message, fix=error.fix)
                await anyio.sleep(self._retry_seconds)
        return None

    async def _import(self, each: Import) -> None:
        for journal in await anyio.to_thread.run_sync(journals.journals_of, each.journal):
            batches = journals.read_batches(journal, self._watermark)
            before = each.events
            while (batch := await anyio.to_thread.run_sync(next, batches, None)) is not None:
                each.of = max(before + batch.total, each.events + len(batch.payloads))
                done = await self._ingester.ingest(batch.stream, batch.after, batch.payloads, str(journal))
                each.events += len(batch.payloads)
                each.unreadable += done.unreadable

    def _watermark(self, stream: str) -> int:
        """Return what the database has of a stream; called on the thread that reads the journal."""

        async def read() -> int:
            return await self._store.call(Store.watermark, stream)

        return anyio.from_thread.run(read)


def _known_journals(store: Store) -> list[str]:
    """Return the journals whose events have come, and those about which couriers have reported."""
    catalogue = store.catalogue
    return list(dict.fromkeys([*catalogue.records.journals(), *catalogue.details.journals()]))
