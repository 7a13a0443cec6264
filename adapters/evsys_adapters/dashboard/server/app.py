"""The routes of the server, and what they share: the store's thread, the ingester, the live hub."""

import base64
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import anyio
import anyio.to_thread
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket, WebSocketDisconnect

from evsys_adapters.dashboard import hosted, pages
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.server.answers import AnswerError, compressed_response, json_response
from evsys_adapters.dashboard.server.bodies import BodyLimits, BodyReader, encodings
from evsys_adapters.dashboard.server.charts import ChartsQuery, Clock, ClockKey, write_chart
from evsys_adapters.dashboard.server.columns import ColumnWriter
from evsys_adapters.dashboard.server.guards import HOSTED_PATH, SUBPROTOCOL, Guard
from evsys_adapters.dashboard.server.imports import JournalImports
from evsys_adapters.dashboard.server.ingest import Ingester
from evsys_adapters.dashboard.server.live import LiveHub, LiveLimits, Subscription, Viewer
from evsys_adapters.dashboard.server.openapi import DESCRIPTION
from evsys_adapters.dashboard.server.page_files import PageFiles
from evsys_adapters.dashboard.server.retention import TrashRoutes, remove_old
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.server.view_routes import ViewRoutes, page_for_browsers
from evsys_adapters.dashboard.state_file import SERVICE
from evsys_adapters.dashboard.store import Store
from evsys_bus.files import DECODE_ERRORS

T = TypeVar("T")

PROTOCOL: Final = 1
"""Version of the routes; a client of another version does not send."""
_MAX_STREAM_BYTES: Final = 1024
_MAX_PATH_CHARS: Final = 4096
_MAX_SEQUENCE: Final = 1 << 62
_MISSING_SECONDS: Final = 10.0
"""How long a request waits for the imports that the start leads to; more may follow."""
_GOING_AWAY: Final = 1001
_POLICY_VIOLATION: Final = 1008


class DashboardSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is started with, beside its database."""

    token: str
    allowed_hosts: tuple[str, ...] = ()
    """Names besides those of loopback by which it is reached."""
    open_loopback: bool = False
    """Whether the routes of the hosted service accept any token from this machine."""
    keep_days: float | None = None
    """Experiments without an event for so many days are removed (`retention`); None keeps all."""
    retention_seconds: float = 60.0
    """When that happens first, after the start; then daily."""
    page_folder: Path = Path(__file__).parent.parent / "_web"
    bodies: BodyLimits = BodyLimits()
    live: LiveLimits = LiveLimits()


class _Subscribe(msgspec.Struct, frozen=True):
    subscribe: list[Subscription]


_decode_subscribe: Final = msgspec.json.Decoder(_Subscribe).decode
_decode_topics: Final = msgspec.json.Decoder(list[Subscription]).decode


class DashboardApp:
    """The application of one server.

    Attributes:
        asgi: What uvicorn serves.
        last_active: When the last events or the last viewer were there, in monotonic seconds.
    """

    def __init__(self, store: StoreThread, settings: DashboardSettings) -> None:
        self._store: Final = store
        self._bodies: Final = BodyReader(settings.bodies)
        self._limits: Final = settings.live
        self.hub: Final = LiveHub(store, settings.live)
        self._ingester: Final = Ingester(store, self._publish)
        self._imports: Final = JournalImports(store, self._ingester)
        self._keep_days: Final = settings.keep_days
        self._retention_seconds: Final = settings.retention_seconds
        self._missing_started: Final = anyio.Event()
        """Set once the imports are known that the start of the server leads to."""
        self._last_ingest = time.monotonic()
        self._version: Final = version("evsys-bus")
        self._page: Final = PageFiles(settings.page_folder)
        app = Starlette(
            routes=self._routes(),
            exception_handlers={
                AnswerError: _answer_error,
                HTTPException: _answer_http_error,
                HTTPStatus.INTERNAL_SERVER_ERROR: _answer_fault,
            },
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False  # clients would follow a redirected POST with a GET
        self.asgi: Final[ASGIApp] = Guard(
            app,
            token=settings.token,
            allowed_hosts=settings.allowed_hosts,
            open_loopback=settings.open_loopback,
        )

    @property
    def last_active(self) -> float:
        """When the last events or the last viewer were there, in monotonic seconds."""
        viewed = time.monotonic() if self.hub.clients or self._imports.is_running else self.hub.last_viewed
        return max(viewed, self._last_ingest)

    def _routes(self) -> list[BaseRoute]:
        hosted_routes = [
            Route(f"{HOSTED_PATH}sdk/data{slash}", self._hosted_gateway, methods=["POST"]) for slash in ("", "/")
        ]
        return [
            Route("/health", page_for_browsers(self._page.index, self._health)),
            Route("/api/openapi.json", self._openapi),
            Route("/api/ingest", self._ingest, methods=["POST"]),
            Route("/api/import", self._start_import, methods=["POST"]),
            Route("/api/import", self._all_imports),
            Route("/api/import/{id}", self._import_progress),
            Route("/api/home", self._home),
            Route("/api/experiments/{id}", self._experiment),
            Route("/api/charts", self._charts, methods=["POST"]),
            *ViewRoutes(self._store, lambda: self.hub.number).routes(),
            *TrashRoutes(self._store, self._publish).routes(),
            Route("/api/live", self._poll),
            WebSocketRoute("/api/live", self._live),
            *hosted_routes,
            Route(HOSTED_PATH + "{path:path}", self._hosted_rest, methods=["POST"]),
            Route("/api/{path:path}", _no_such_route, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
            Route("/assets/{name}", self._page.asset),
            Route("/{path:path}", self._page.index),
        ]

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.hub.run)
            tasks.start_soon(self._imports.run)
            tasks.start_soon(self._start_missing)
            tasks.start_soon(self._store.follow, self._publish)
            tasks.start_soon(partial(remove_old, self._store, self._keep_days, first_seconds=self._retention_seconds))
            yield
            tasks.cancel_scope.cancel()

    async def _start_missing(self) -> None:
        try:
            await self._imports.start_missing()
        finally:
            self._missing_started.set()

    async def _health(self, request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):  # a browser: the page of that name
            return await self._page.index(request)
        return json_response(
            {
                "service": SERVICE,
                "protocol": PROTOCOL,
                "version": self._version,
                "store": self._store.id,  # without a call: the thread may be busy for longer than a client waits
                "encodings": encodings(),
            }
        )

    async def _openapi(self, _: Request) -> Response:
        return json_response(DESCRIPTION)

    async def _ingest(self, request: Request) -> Response:
        stream = request.query_params.get("stream", "")
        after = request.query_params.get("after", "0")
        if not 0 < len(stream.encode(errors="replace")) <= _MAX_STREAM_BYTES:
            raise AnswerError(400, "stream", "`stream` is missing or too long", fix="send ?stream=NAME&after=SEQ")
        if not (after.isascii() and after.isdecimal() and int(after[:20]) < _MAX_SEQUENCE):
            raise AnswerError(400, "after", "`after` is no sequence number", fix="send ?stream=NAME&after=SEQ")
        journal: str | None = request.query_params.get("journal", "")[:_MAX_PATH_CHARS] or None
        async with self._bodies.read_envelopes(request) as payloads:
            self._last_ingest = time.monotonic()
            totals = await self._ingester.ingest(stream, int(after), payloads, journal)
        answer = {**totals._asdict(), "store": self._store.id}
        if not totals.unreadable:
            del answer["unreadable"]
        return json_response(answer)

    async def _start_import(self, request: Request) -> Response:
        body = await self._bodies.read_json(request)
        journal = body.get("journal")
        if not isinstance(journal, str):
            raise AnswerError(400, "journal", "`journal` is missing", fix='send {"journal": "/path/of/a/journal"}')
        return json_response({"import": self._imports.start(journal)}, HTTPStatus.ACCEPTED)

    async def _all_imports(self, _: Request) -> Response:
        with anyio.move_on_after(_MISSING_SECONDS):
            await self._missing_started.wait()
        return json_response(self._imports.progress_of_all())

    async def _import_progress(self, request: Request) -> Response:
        return json_response(self._imports.progress(request.path_params["id"]))

    async def _home(self, request: Request) -> Response:
        answer = await self._read_page(request, "home", pages.home)
        assert answer is not None
        return answer

    async def _experiment(self, request: Request) -> Response:
        id_: str = request.path_params["id"]
        answer = await self._read_page(request, f"e/{id_}", lambda store: pages.experiment(store, id_))
        if answer is None:
            raise AnswerError(404, "experiment", "no such experiment", fix="look at the home page")
        return answer

    async def _read_page(
        self, request: Request, topic: str, read: Callable[[Store], dict[str, Any] | None]
    ) -> Response | None:
        """Answer with a page that live frames continue; None if there is none."""
        frame = self.hub.number

        def encode(store: Store) -> tuple[dict[str, Any], bytes] | None:
            page = read(store)
            return None if page is None else (page, msgspec.json.encode({**page, "now": time.time(), "frame": frame}))

        found = await self._store.call(encode)
        if found is None:
            return None
        self.hub.note_read(topic, frame, found[0])
        return await compressed_response(request, found[1], "application/json")

    async def _charts(self, request: Request) -> Response:
        query = self._convert(await self._bodies.read_json(request), ChartsQuery)
        frame = self.hub.number
        writer, clocks = ColumnWriter(), dict[ClockKey, Clock]()
        # A call for each chart, so that events and live frames come in between.
        charts = [await self._store.call(write_chart, query.experiment, each, writer, clocks) for each in query.charts]
        body = await anyio.to_thread.run_sync(writer.encode, {"charts": charts, "frame": frame})
        return await compressed_response(request, body, "application/octet-stream")

    async def _poll(self, request: Request) -> Response:
        try:
            subscriptions = _decode_topics(request.query_params.get("topics", ""))
        except DECODE_ERRORS as error:
            raise _bad_subscription(error) from error
        frames = await self.hub.poll(subscriptions)
        if not frames:
            return Response(status_code=HTTPStatus.NO_CONTENT)
        return json_response([base64.b64encode(each).decode() for each in frames])

    async def _live(self, socket: WebSocket) -> None:
        if self.hub.clients >= self._limits.max_clients:
            error = AnswerError(503, "clients", "too many live views are open", fix="close some, or poll")
            await socket.send_denial_response(error.response())
            return
        # Counted before the handshake, so that many at once are bounded too.
        self.hub.clients += 1
        viewer = Viewer()
        try:
            await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_send_frames, socket, viewer)
                await self._receive_subscriptions(socket, viewer)
                tasks.cancel_scope.cancel()
        finally:
            self.hub.leave(viewer)
            self.hub.clients -= 1
            self.hub.last_viewed = time.monotonic()

    async def _receive_subscriptions(self, socket: WebSocket, viewer: Viewer) -> None:
        """Return when the client has left or has sent what is no subscription."""
        try:
            while True:
                message = await socket.receive_text()
                try:
                    subscriptions = _decode_subscribe(message).subscribe
                    await self.hub.subscribe(viewer, subscriptions)
                except DECODE_ERRORS as error:
                    raise _bad_subscription(error) from error
        except WebSocketDisconnect:
            return
        except KeyError:  # starlette's `receive_text` of a binary message
            await socket.close(_POLICY_VIOLATION, "send text")
        except AnswerError as error:
            await socket.close(_POLICY_VIOLATION, error.message[:100])

    async def _hosted_gateway(self, request: Request) -> Response:
        body = await self._bodies.read_json(request)
        op: object = body.get("op")
        args: object = body.get("args") or {}
        if not isinstance(op, str) or not isinstance(args, dict):
            raise AnswerError(400, "op", "`op` is missing", fix='send {"op": "NAME", "args": {…}}')
        result = await self._call_hosted(hosted.call, op, cast("dict[str, Any]", args))
        return json_response({"result": result})

    async def _hosted_rest(self, request: Request) -> Response:
        body = await self._bodies.read_json(request)
        status, answer = await self._call_hosted(hosted.rest, request.path_params["path"], body)
        return json_response(answer, status)

    async def _call_hosted(
        self, work: Callable[[Store, str, dict[str, Any], Changes], T], name: str, args: dict[str, Any]
    ) -> T:
        """Answer a call of a client of the hosted service.

        Such a client waits for each answer inside the training loop, so the disk is not waited for.
        """
        changes = Changes()

        def run(store: Store) -> "T | hosted.HostedError":
            with store.database.relaxed():
                try:
                    return work(store, name, args, changes)
                except hosted.HostedError as error:
                    return error

        result = await self._store.call(run)
        self._publish(changes)
        if isinstance(result, hosted.HostedError):
            raise AnswerError(result.status, "hosted", result.message, fix="see /api/openapi.json")
        return result

    def _publish(self, changes: Changes) -> None:
        self._last_ingest = time.monotonic()
        if changes.series or changes.runs or changes.experiments:
            self.hub.publish(changes)

    def _convert(self, value: Any, kind: type[Any]) -> Any:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise AnswerError(400, "query", str(error), fix="see /api/openapi.json") from error


async def _send_frames(socket: WebSocket, viewer: Viewer) -> None:
    """Send what the viewer's topics have, until cancelled or cut (`BoundedWebSocketProtocol`)."""
    try:
        while True:
            for data in await viewer.next_frames():
                await socket.send_bytes(data)
    except (WebSocketDisconnect, RuntimeError):  # the second: sent after the close of the other side
        return


def _bad_subscription(error: Exception) -> AnswerError:
    return AnswerError(
        400, "topics", f"not a list of topics: {error}", fix='send {"subscribe": [{"topic": "home", "frame": null}]}'
    )


async def _no_such_route(_: Request) -> Response:
    raise AnswerError(404, "route", "no such route", fix="see /api/openapi.json")


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, AnswerError)
    return error.response()


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = AnswerError(error.status_code, "http", error.detail, fix="see /api/openapi.json", headers=error.headers)
    return found.response()


async def _answer_fault(_: Request, __: Exception) -> Response:
    error = AnswerError(500, "fault", "the dashboard failed; its log has the cause", fix="report it with the log")
    return error.response()
