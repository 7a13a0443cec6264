"""Removing what is old: once a day, first to the trash, from there for good."""

import time
from typing import Final

import anyio

from evsys_adapters.dashboard import journals
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.store import Store
from evsys_bus.diagnostics import log

TRASH_DAYS: Final = 30.0
_INTERVAL_SECONDS: Final = 86_400.0
_RETRY_SECONDS: Final = 3_600.0


async def remove_old(store: StoreThread, keep_days: float | None, *, first_seconds: float = 60.0) -> None:
    """Remove what is old, once a day, until cancelled.

    Args:
        store: The store's thread.
        keep_days: Experiments without an event for so many days go to the trash; None keeps all.
        first_seconds: When it begins.
    """
    await anyio.sleep(first_seconds)
    while True:
        try:
            removed = await store.call(_remove, keep_days, time.time())
        except AnswerError as error:  # the database cannot be used now
            log().warning("dashboard.retention_failed", error=error.message)
            await anyio.sleep(_RETRY_SECONDS)
            continue
        if any(removed.values()):
            log().info("dashboard.removed", **removed)
        await anyio.sleep(_INTERVAL_SECONDS)


def _remove(store: Store, keep_days: float | None, now: float) -> dict[str, int]:
    if not store.is_writer:
        return {}
    moved = None if keep_days is None else journals.expire(store, keep_days, now)
    purged = journals.purge(store, now, TRASH_DAYS)
    return {
        "moved_to_trash": 0 if moved is None else moved.experiments,
        "purged_experiments": purged.experiments,
        "purged_runs": purged.runs,
    }
