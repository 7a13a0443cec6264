"""A real dashboard on port 0, its clients, and what they send."""

import contextlib
import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from websockets.sync.client import ClientConnection, connect

from evsys_adapters.dashboard.server import DashboardServer
from evsys_adapters.dashboard.server.app import DashboardSettings
from evsys_adapters.dashboard.server.columns import decode_columns
from evsys_adapters.dashboard.state_file import DashboardState
from evsys_bus import LogContext, LoopState, RunEnd, RunResult, RunStart, StepEnd, TrainStart
from evsys_bus.codec import encode
from evsys_bus.events import Envelope
from support.database_places import location_in

TOKEN = "a-token-for-tests-0123456789-0123456789"


class Answer:
    def __init__(self, status: int, headers: http.client.HTTPMessage, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json["error"]["code"]


class Dashboard:
    """A running server and a client of it."""

    def __init__(self, state: DashboardState, server: DashboardServer) -> None:
        self.state, self.server = state, server
        self.port = int(state.url.rsplit(":", 1)[1])

    def request(
        self, method: str, path: str, body: bytes | str | None = None, *, token: str | None = TOKEN, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent.setdefault("Authorization", f"Bearer {token}")
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        answer = self.request("GET", path)
        assert answer.status == 200, (answer.status, answer.body)
        return answer.json

    def post(self, path: str, value: object) -> Answer:
        return self.request("POST", path, json.dumps(value))

    def charts(self, experiment: str, *charts: dict[str, Any]) -> tuple[Any, Any]:
        answer = self.post("/api/charts", {"experiment": experiment, "charts": charts})
        assert answer.status == 200, answer.body
        return decode_columns(answer.body)

    def ingest(
        self, stream: str, after: int, payloads: Sequence[bytes], *, encoding: str = "gzip", body: bytes | None = None
    ) -> Answer:
        body = body_of(payloads) if body is None else body
        return self.request(
            "POST",
            f"/api/ingest?stream={quote(stream)}&after={after}",
            gzip.compress(body, 1) if encoding == "gzip" else body,
            Content_Encoding=encoding,
            Content_Type="application/msgpack",
        )

    def live(self, token: str = TOKEN, **options: Any) -> ClientConnection:
        return connect(
            f"ws://127.0.0.1:{self.port}/api/live",
            subprotocols=["evsys", f"token.{token}"],  # pyright: ignore[reportArgumentType] # a NewType of str
            compression=None,
            **options,
        )

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@contextlib.contextmanager
def running_dashboard(folder: Path, *, settings: dict[str, Any] | None = None, **options: Any) -> Iterator[Dashboard]:
    """Run a server in a thread of this process."""
    ready, states, errors = threading.Event(), list[DashboardState](), list[BaseException]()

    def on_ready(state: DashboardState) -> None:
        states.append(state)
        ready.set()

    server = DashboardServer(
        location_in(folder),
        host="127.0.0.1",
        port=0,
        settings=DashboardSettings(**{"token": TOKEN, "page_folder": folder / "_web", **(settings or {})}),
        state=folder / "state" / "dashboard.json",
        on_ready=on_ready,
        **options,
    )

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run, name="dashboard", daemon=True)
    thread.start()
    assert ready.wait(15)
    if errors:
        raise errors[0]
    try:
        yield Dashboard(states[0], server)
    finally:
        server.request_stop()
        thread.join(15)
        assert not thread.is_alive()
        if errors:
            raise errors[0]


def body_of(payloads: Sequence[bytes]) -> bytes:
    return msgspec.msgpack.encode([msgspec.Raw(each) for each in payloads])


class Trainer:
    """Makes the envelopes of one run."""

    def __init__(self, name: str = "a-s0", *, root: str = "/runs/lr", config: dict[str, Any] | None = None) -> None:
        self.stream = f"r0-{Path(root).name}-{name}"
        self.ctx = LogContext(root, run_key=name, run_config=config)
        self.run_state = LoopState(0, 1000, self.ctx.run_dir, ctx=self.ctx)
        self.sequence = 0
        self.step = 0
        self.started = float(int(time.time()))

    def start(self) -> list[bytes]:
        return [self._encode(RunStart(self.ctx)), self._encode(TrainStart(self.run_state))]

    def steps(self, count: int, **metrics: Any) -> list[bytes]:
        """Steps with the loss 1000 - step, unless given; a callable gets the step."""
        found: list[bytes] = []
        for _ in range(count):
            values = {
                k: v(self.step) if callable(v) else v for k, v in ({"loss": lambda s: 1000.0 - s} | metrics).items()
            }
            found.append(self._encode(StepEnd(self.run_state, self.step, metrics=values)))
            self.step += 1
        return found

    def resume(self, step: int) -> list[bytes]:
        self.step = step
        state = LoopState(step, 1000, self.ctx.run_dir, ctx=self.ctx)
        return [self._encode(TrainStart(state))]

    def end(self) -> list[bytes]:
        return [self._encode(RunEnd(self.ctx, RunResult(status="completed")))]

    def _encode(self, event: Any) -> bytes:
        self.sequence += 1
        time_ = self.started + self.sequence
        return encode(Envelope(self.stream, self.sequence, time_, event, self.ctx.run_key, 0))

    def send(self, dashboard: Dashboard, payloads: Sequence[bytes]) -> Any:
        """Deliver payloads that were just made."""
        answer = dashboard.ingest(self.stream, self.sequence - len(payloads), payloads)
        assert answer.status == 200, (answer.status, answer.body)
        return answer.json
