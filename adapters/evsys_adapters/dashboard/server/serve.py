"""Running the server: its socket, its state file, its end."""

import asyncio
import contextlib
import errno
import os
import resource
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from evsys_adapters.dashboard import state_file
from evsys_adapters.dashboard.database import is_url
from evsys_adapters.dashboard.server.app import DashboardApp, DashboardSettings
from evsys_adapters.dashboard.server.protocol import ConnectionLimits, http_protocol, websocket_protocol
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.state_file import DashboardState
from evsys_bus.diagnostics import log
from evsys_bus.errors import DashboardError

DEFAULT_PORT: Final = 8420
IDLE_SECONDS: Final = 43_200.0
_OPEN_FILES: Final = 4096
_MAX_PORTS: Final = 50
_TICK_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 2
_MAX_MESSAGE_BYTES: Final = 1 << 20


class DashboardServer:
    """One server of one database.

    Args:
        path: The database; created if it does not exist. A str may be the URL of one in PostgreSQL.
        host: The address to listen at.
        port: The port; 0 takes any free one, None 8420 or the next free one.
        settings: Token, names, limits.
        idle_seconds: It ends after so long without a viewer and without events.
        limits: Bounds of its connections.
        state: The path of the state file.
        on_ready: Called with the state once it listens, on the loop.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        host: str,
        port: int | None,
        settings: DashboardSettings,
        idle_seconds: float = IDLE_SECONDS,
        limits: ConnectionLimits | None = None,
        state: Path | None = None,
        on_ready: Callable[[DashboardState], object] | None = None,
    ) -> None:
        self._path: Final = str(path) if is_url(str(path)) else Path(path).absolute()
        self._host: Final = host
        self._port: Final = port
        self._settings: Final = settings
        self._idle_seconds: Final = idle_seconds
        self._limits: Final = limits or ConnectionLimits()
        self._state_path: Final = state
        self._on_ready: Final = on_ready
        self._stop = threading.Event()
        self._server: _Server | None = None

    @property
    def open_connections(self) -> int:
        """The number of open connections."""
        return 0 if self._server is None else len(self._server.server_state.connections)

    def request_stop(self) -> None:
        """Let `run` return; from any thread."""
        self._stop.set()

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT, `request_stop`, or too long without use.

        Raises:
            StoreError: The database cannot be opened.
            DashboardError: The port is in use.
            OSError: The address cannot be bound.
        """
        listening = listen(self._host, self._port)
        with listening:
            store = StoreThread(self._path)
            store.open()
            try:
                self._serve(listening, DashboardApp(store, self._settings))
            finally:
                store.close()

    def _serve(self, listening: socket.socket, app: DashboardApp) -> None:
        config = uvicorn.Config(
            app.asgi,
            loop="uvloop",
            http=http_protocol(self._limits),
            ws=websocket_protocol(self._limits),
            ws_max_size=_MAX_MESSAGE_BYTES,
            ws_per_message_deflate=False,  # a frame is encoded once for all viewers
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,  # a header must not decide who counts as this machine
            server_header=False,
            date_header=False,
            timeout_keep_alive=self._limits.keep_alive_seconds,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        state = self._make_state(listening)
        server = self._server = _Server(
            config,
            should_stop=lambda: self._stop.is_set() or time.monotonic() - app.last_active > self._idle_seconds,
            on_started=lambda: self._announce(state),
        )
        try:
            server.run(sockets=[listening])
        finally:
            with contextlib.suppress(OSError):
                state_file.remove_state(state, self._state_path)

    def _make_state(self, listening: socket.socket) -> DashboardState:
        port: int = listening.getsockname()[1]
        name = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(self._host, self._host)  # noqa: S104 # compared
        name = f"[{name}]" if ":" in name and not name.startswith("[") else name
        return DashboardState(
            url=f"http://{name}:{port}",
            token=self._settings.token,
            pid=os.getpid(),
            host=socket.gethostname(),
            store=str(self._path),
            started=time.time(),
        )

    def _announce(self, state: DashboardState) -> None:
        try:
            state_file.write_state(state, self._state_path)
        except OSError as error:
            log().warning(
                "dashboard.state_not_written", error=str(error), fix="give clients EVSYS_API_URL and its token"
            )
        log().info("dashboard.started", url=state.url, database=state.store)
        if self._on_ready is not None:
            self._on_ready(state)


def serve(
    path: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_loopback: bool = False,
    idle_seconds: float = IDLE_SECONDS,
    allowed_hosts: Iterable[str] = (),
    keep_days: float | None = None,
    on_ready: Callable[[DashboardState], object] | None = None,
) -> None:
    """Serve a dashboard until SIGTERM or SIGINT.

    The token is that of the user's earlier dashboards, so that open pages continue after a restart.

    Args:
        path: The database; created if it does not exist. A str may be the URL of one in PostgreSQL.
        host: The address to listen at.
        port: The port; 0 takes any free one, None 8420 or the next free one.
        open_loopback: Whether the routes of the hosted service accept any token from this machine.
        idle_seconds: It ends after so long without a viewer and without events.
        allowed_hosts: Names besides those of loopback by which browsers reach it, such as that of a proxy.
        keep_days: Experiments without an event for so many days go to the trash, and after 30 more days are removed;
            None keeps all.
        on_ready: Called with the state once it listens.

    Raises:
        StoreError: The database cannot be opened.
        DashboardError: The port is in use.
        OSError: The address cannot be bound.
    """
    _allow_many_files()
    settings = DashboardSettings(
        token=state_file.load_token() or secrets.token_urlsafe(32),
        allowed_hosts=(*allowed_hosts, *(() if host in {"0.0.0.0", "::", ""} else (host,))),  # noqa: S104 # compared
        open_loopback=open_loopback,
        keep_days=keep_days,
    )
    DashboardServer(path, host=host, port=port, settings=settings, idle_seconds=idle_seconds, on_ready=on_ready).run()


def _allow_many_files() -> None:
    """Raise this process's limit of open files, so that connections do not use all of them up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))


def listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket; for None at the default port or the next free one. Raises DashboardError, OSError."""
    first = DEFAULT_PORT if port is None else port
    for candidate in range(first, first + (_MAX_PORTS if port is None else 1)):
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, candidate, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(1024)
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            listening.setblocking(False)
            return listening
    raise DashboardError(f"port {first} is in use", fix="give another one, or 0 for any that is free")


class _Server(uvicorn.Server):
    """Uvicorn's server, which here ends also without a signal, and does not raise a signal again that ended it."""

    def __init__(
        self, config: uvicorn.Config, *, should_stop: Callable[[], bool], on_started: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._should_stop = should_stop
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and announce it."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    async def main_loop(self) -> None:
        """Wait for the end."""
        while not (self.should_exit or self._should_stop()):  # noqa: ASYNC110 # signal handlers and threads set these
            await asyncio.sleep(_TICK_SECONDS)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Stop at SIGINT and SIGTERM while the block runs."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _: FrameType | None) -> None:
            self.force_exit = self.should_exit and number == signal.SIGINT
            self.should_exit = True

        earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)
