"""The routes of the pages beside home and experiment: runs, run, compare, deliveries, evals, checkpoints."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, TypeVar

import anyio.to_thread
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from evsys_adapters.dashboard import contents, delivery_views, eval_views, run_events, views
from evsys_adapters.dashboard.pages import Json
from evsys_adapters.dashboard.server.answers import AnswerError, compressed_response
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.store import Store

_MAX_FILTER_CHARS: Final = 2_000
_MAX_ID: Final = (1 << 63) - 1
"""The largest integer of a column."""

T = TypeVar("T")

_decode_position: Final = msgspec.json.Decoder(dict[str, int]).decode

_Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


def page_for_browsers(page: _Handler, other: _Handler) -> _Handler:
    """Return a handler of a path that is a page for browsers and something else for programs."""

    async def answer(request: Request) -> Response:
        is_page = "text/html" in request.headers.get("accept", "")
        return await (page if is_page else other)(request)

    return answer


def _decode_id(text: str) -> int:
    """Return a number that a column can have. Raises ValueError."""
    if not (text.isascii() and text.isdecimal() and int(text[:20]) <= _MAX_ID):
        raise ValueError(f"{text[:100]!r} is no number of a step or a row")
    return int(text)


class ViewRoutes:
    """Answers with what `views` reads.

    Args:
        store: The store's thread.
        frame: Returns the number of the last live frame: later ones have what changes after an answer.
    """

    def __init__(self, store: StoreThread, frame: Callable[[], int]) -> None:
        self._store: Final = store
        self._frame: Final = frame

    def routes(self) -> list[BaseRoute]:
        """Return all of them."""
        return [
            Route("/api/experiments/{id}/runs", self._runs),
            Route("/api/experiments/{id}/evals", self._evals),
            Route("/api/experiments/{id}/checkpoints", self._checkpoints),
            Route("/api/predictions", self._predictions),
            Route("/api/predictions/{id}", self._prediction),
            Route("/api/runs/{id}", self._run),
            Route("/api/runs/{id}/events", self._events),
            Route("/api/runs/{id}/media/{digest}", self._media),
            Route("/api/compare", self._compare),
            Route("/api/compare/predictions", self._paired),
            Route("/api/health", self._health),
        ]

    async def _runs(self, request: Request) -> Response:
        query = request.query_params
        text, metrics = query.get("q", "")[:_MAX_FILTER_CHARS], query.getlist("metric")
        try:
            at = [(_decode_id(step), name) for step, _, name in (each.partition(":") for each in query.getlist("at"))]
        except ValueError as error:
            raise AnswerError(400, "query", str(error), fix="send &at=STEP:METRIC") from error
        id_ = request.path_params["id"]
        return await self._answer(request, lambda store: views.runs(store, id_, text, metrics, at=at))

    async def _evals(self, request: Request) -> Response:
        return await self._answer(request, lambda store: eval_views.evals(store, request.path_params["id"]))

    async def _checkpoints(self, request: Request) -> Response:
        return await self._answer(request, lambda store: eval_views.checkpoints(store, request.path_params["id"]))

    async def _predictions(self, request: Request) -> Response:
        query = request.query_params
        try:
            id_, after = int(query.get("eval", "")), int(query["after"]) if query.get("after") else None
            conditions = eval_views.decode_filter(query.get("filter", ""))
        except ValueError as error:
            raise AnswerError(400, "query", str(error), fix="send ?eval=ID&after=ID&filter={…}") from error
        if max(abs(id_), abs(after or 0)) > _MAX_ID:
            raise AnswerError(404, "id", "no such eval", fix="load the page again")
        return await self._answer(request, lambda store: eval_views.predictions(store, id_, after, conditions))

    async def _prediction(self, request: Request) -> Response:
        text: str = request.path_params["id"]
        id_ = int(text[:20]) if text.isascii() and text.isdecimal() else -1
        if not 0 <= id_ <= _MAX_ID:
            raise AnswerError(404, "id", "no such prediction", fix="load the page again")
        return await self._answer(request, lambda store: eval_views.prediction(store, id_))

    async def _run(self, request: Request) -> Response:
        return await self._answer(request, lambda store: views.run(store, request.path_params["id"]))

    async def _events(self, request: Request) -> Response:
        query = request.query_params
        try:
            before, after = (_decode_position(query.get(name) or "{}") for name in ("before", "after"))
        except msgspec.MsgspecError as error:
            raise AnswerError(400, "query", str(error), fix="send ?before= the `next` of a page") from error
        text, problem = query.get("q", "")[:_MAX_FILTER_CHARS], None
        try:
            is_selected = run_events.parse_selection(text)
        except ValueError as error:
            problem, is_selected = str(error), run_events.parse_selection("")

        def read(source: run_events.EventSource) -> Json:
            if after:
                return run_events.read_since(source, after, is_selected)
            return run_events.read_before(source, before, is_selected)

        frame = self._frame()
        record, head = await self._view(lambda store: views.run_record_and_head(store, request.path_params["id"]))
        source = await anyio.to_thread.run_sync(run_events.journal_source, record.key, record.path)
        if source is not None:
            found = await anyio.to_thread.run_sync(read, source)
        else:
            found = await self._view(lambda store: read(run_events.stored_source(store, record)))
        where = {"source": "database" if source is None else source.kind, "journal": source and source.path}
        body = msgspec.json.encode(
            {"run": head, **where, "problem": problem, **found, "now": time.time(), "frame": frame}
        )
        return await compressed_response(request, body, "application/json")

    async def _media(self, request: Request) -> Response:
        id_, digest = request.path_params["id"], request.path_params["digest"]

        def find(store: Store) -> tuple[list[Json]]:
            record, _ = views.run_record_and_head(store, id_)
            return (store.catalogue.details.contents(record.id),)

        (found,) = await self._view(find)
        picture = await anyio.to_thread.run_sync(contents.read_picture, found, digest)
        if picture is None:
            raise AnswerError(404, "media", "this picture is not here", fix="look at it where the run was recorded")
        kind, data = picture
        return Response(data, headers={"cache-control": "private, max-age=31536000, immutable"}, media_type=kind)

    async def _compare(self, request: Request) -> Response:
        return await self._answer(request, lambda store: views.compare(store, request.query_params.getlist("r")))

    async def _paired(self, request: Request) -> Response:
        query = request.query_params
        try:
            after = _decode_id(query["after"]) if query.get("after") else None
            pick = msgspec.convert(query.get("pick", "all"), eval_views.Pick)
        except (ValueError, msgspec.ValidationError) as error:
            raise AnswerError(400, "query", str(error), fix="send ?r=ID&r=ID&eval=NAME&pick=all") from error
        runs, name = query.getlist("r"), query.get("eval", "")
        return await self._answer(request, lambda store: eval_views.paired(store, runs, name, pick, after))

    async def _health(self, request: Request) -> Response:
        return await self._answer(request, delivery_views.health)

    async def _answer(self, request: Request, view: Callable[[Store], Any]) -> Response:
        frame = self._frame()
        body = await self._view(lambda store: msgspec.json.encode({**view(store), "frame": frame}))
        return await compressed_response(request, body, "application/json")

    async def _view(self, view: Callable[[Store], T]) -> T:
        """Return what a view reads on the store's thread. Raises AnswerError (404) if what it shows is not there."""

        def read(store: Store) -> T | None:
            with contextlib.suppress(views.NotFoundError):
                return view(store)
            return None

        found = await self._store.call(read)
        if found is None:
            raise AnswerError(
                404, "id", "no such experiment or run", fix="look at the home page; it may be in the trash"
            )
        return found
