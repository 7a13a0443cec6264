"""Removing what is old, once a day, or what a person chooses: first to the trash, from there for good."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from evsys_adapters.dashboard import journals
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.server.answers import AnswerError, json_response
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


class TrashRoutes:
    """The routes by which a person moves experiments and runs to the trash, restores them, or removes them for good.

    Args:
        store: The store's thread.
        publish: Shows changes in live views.
    """

    def __init__(self, store: StoreThread, publish: Callable[[Changes], None]) -> None:
        self._store: Final = store
        self._publish: Final = publish

    def routes(self) -> list[BaseRoute]:
        """Return all of them."""
        return [
            Route("/api/trash", self._list),
            *(
                Route(f"/api/{kind}s/{{id}}/{action}", self._route(kind, action), methods=["POST"])
                for kind in _KINDS
                for action in _ACTIONS
            ),
        ]

    async def _list(self, _: Request) -> Response:
        return json_response({**await self._store.call(journals.trash), "days": TRASH_DAYS})

    def _route(self, kind: "_Kind", action: "_Action") -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            body, changes = await self._store.call(_change, kind, action, request.path_params["id"], time.time())
            self._publish(changes)
            return json_response(body)

        return answer


_Kind = Literal["experiment", "run"]
_Action = Literal["trash", "restore", "purge"]
_KINDS: Final[tuple[_Kind, ...]] = ("experiment", "run")
_ACTIONS: Final[tuple[_Action, ...]] = ("trash", "restore", "purge")


def _change(store: Store, kind: _Kind, action: _Action, public_id: str, now: float) -> tuple[dict[str, Any], Changes]:
    """Carry out an action, on the store's thread. Raises AnswerError."""
    catalogue = store.catalogue
    id_ = catalogue.experiment_id(public_id) if kind == "experiment" else catalogue.run_id(public_id)
    records = catalogue.records
    record = None if id_ is None else records.experiment(id_) if kind == "experiment" else records.run(id_)
    if record is None:
        raise AnswerError(404, "id", f"no such {kind}", fix="look at the home page, and at /api/trash")
    if action == "purge" and record.hidden is None:
        fix = f"move it there first: POST /api/{kind}s/{public_id}/trash"
        raise AnswerError(409, "trash", f"this {kind} is not in the trash", fix=fix)
    if action == "purge":
        return msgspec.structs.asdict(journals.purge_one(store, public_id)), Changes()
    with store.transaction() as changes:
        if action == "restore":
            journals.restore(store, public_id)
        elif record.hidden is None:
            journals.move_to_trash(store, public_id, now)
    return {"id": public_id, "hidden": record.hidden}, changes
