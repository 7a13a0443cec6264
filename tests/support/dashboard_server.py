"""A dashboard that keeps in memory what it is sent: the requests of clients, their answers, and injected faults.

As strict as the real one: a gap within a body is an error, and an ``after`` beyond what it has is answered by 409.
"""

import asyncio
import gzip
import os
import socket
import time
import uuid

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from evsys_adapters.dashboard.state_file import SERVICE, DashboardState, state_path, write_state
from evsys_bus.codec import decode
from evsys_bus.journal import JournalReader
from support.evsys_server import EvsysServer, _TruncatedResponse

TOKEN = "token-for-tests"


class DashboardServer(EvsysServer):
    """Serves on a thread of its own; what it has survives a stop and a restart.

    Attributes:
        fault: Called with the path before a request; a returned Response, ``"hang"`` or ``"cut"`` is the response
            instead, None responds normally.
        should_drop_reply: Called with the path after a body was stored; if it returns true the response is truncated.
        import_steps: How often an import is still running when it is asked for.
    """

    token = TOKEN
    import_steps = 1

    def reset(self):
        super().reset()
        self.streams = {}
        """By stream: the payloads by sequence."""
        self.store = str(uuid.uuid4())
        self.bodies = []
        """(stream, after, first, last) of each stored body."""
        self.imports = {}
        self.requests = []

    def routes(self):
        return [
            Route("/health", self.health),
            Route("/api/ingest", self.ingest, methods=["POST"]),
            Route("/api/import", self.start_import, methods=["POST"]),
            Route("/api/import/{id}", self.import_progress),
        ]

    def publish_state(self, pid=None):
        """Write the state file, as a running dashboard does."""
        write_state(DashboardState(self.url, self.token, pid or os.getpid(), socket.gethostname(), "/db", time.time()))

    @staticmethod
    def remove_state():
        state_path().unlink(missing_ok=True)

    def watermark(self, stream):
        return max(self.streams.get(stream, ()), default=0)

    def events(self, family="r"):
        """The stored envelopes of the streams of a family, in order."""
        contexts = {}
        return [
            decode(payload, contexts)
            for stream, payloads in sorted(self.streams.items())
            if stream.startswith(family)
            for _, payload in sorted(payloads.items())
        ]

    async def health(self, request: Request):
        del request
        return JSONResponse({"service": SERVICE, "protocol": 1, "version": "0", "store": self.store})

    async def _refusal(self, request):
        path = request.url.path
        self.requests.append(path)
        override = self.fault and self.fault(path)
        if override == "hang":
            await asyncio.sleep(3600)
        if override == "cut":
            return _TruncatedResponse()
        if override is not None:
            return override
        if request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": {"code": "token", "message": "wrong token", "fix": "x"}}, 401)
        return None

    async def ingest(self, request: Request):
        body = await request.body()
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        if len(body) > self.max_bytes:
            return JSONResponse({"error": {"code": "size", "message": "too large", "fix": "x"}}, 413)
        if request.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        assert request.headers["content-type"] == "application/msgpack"
        stream, after = request.query_params["stream"], int(request.query_params["after"])
        watermark = self.watermark(stream)
        if after > watermark:
            return JSONResponse(
                {"error": {"code": "behind", "message": "behind", "fix": "x"}, "sequence": watermark}, 409
            )
        payloads = {decode(raw).seq: bytes(raw) for raw in msgspec.msgpack.decode(body, type=list[msgspec.Raw])}
        first, last = min(payloads), max(payloads)
        assert len(payloads) == last - first + 1, "a gap within a body"
        stored = self.streams.setdefault(stream, {})
        for sequence, payload in payloads.items():
            if sequence > watermark:
                stored[sequence] = payload
            else:
                assert stored[sequence] == payload, "another event of the same sequence"
        self.bodies.append((stream, after, first, last))
        if self.should_drop_reply and self.should_drop_reply(request.url.path):
            return _TruncatedResponse()
        return JSONResponse(
            {"sequence": self.watermark(stream), "events": len(payloads), "points": 0, "store": self.store}
        )

    async def start_import(self, request: Request):
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        number = str(len(self.imports) + 1)
        self.imports[number] = [(await request.json())["journal"], self.import_steps]
        return JSONResponse({"import": number}, 202)

    async def import_progress(self, request: Request):
        if (refusal := await self._refusal(request)) is not None:
            return refusal
        entry = self.imports.get(request.path_params["id"])
        if entry is None:
            return JSONResponse({"error": {"code": "import", "message": "unknown", "fix": "x"}}, 404)
        entry[1] -= 1
        if entry[1] >= 0:
            return JSONResponse({"state": "running", "events": 1, "of": 2, "error": None})
        reader = JournalReader(entry[0])
        for stream in reader.streams("r", "c", "s"):
            stored = self.streams.setdefault(stream, {})
            for run in reader.tail(stream, self.watermark(stream)).poll_runs():
                for sequence, payload in enumerate(run.payloads, run.first_sequence):
                    if not run.is_carried:
                        stored[sequence] = bytes(payload)
            if not stored:
                del self.streams[stream]
        return JSONResponse({"state": "completed", "events": 2, "of": 2, "error": None})
