"""A small server of EvSys' API: the gateway, its operations, responses and errors, and injected faults.

As strict as the hosted service: an unknown operation, an unknown or a missing argument is a 4xx, NaN is not JSON, and
a row must refer to something that exists. Every request is stored as it came (`operations`), so that a test can compare
order and fields. `python tests/support/evsys_server.py PORT` runs the server alone.
"""

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import socket
import sys
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

KEY = "evk-for-tests"
PATH = "/api/dashboard/api/sdk/data/"

READS = frozenset({"get_experiment", "list_experiments", "list_groups", "get_run", "list_runs", "list_checkpoints"})
READS |= {"list_evals", "list_predictions", "get_metrics"}

# By operation: its required and its optional arguments; None allows any.
OPERATIONS = {
    "create_experiment": ({"experiment_name"}, None),
    "update_experiment": ({"experiment_id", "patch"}, set()),
    "get_experiment": ({"experiment_id"}, set()),
    "list_experiments": (set(), {"project_id", "valid_only"}),
    "create_group": ({"experiment_id", "name"}, {"description"}),
    "list_groups": ({"experiment_id"}, set()),
    "create_run": (set(), None),
    "update_run": ({"run_id", "patch"}, set()),
    "get_run": ({"run_id"}, set()),
    "list_runs": (set(), {"experiment_id", "group_id"}),
    "log_metrics": ({"run_id", "step", "metrics", "split"}, set()),
    "get_metrics": ({"run_id"}, {"name", "split"}),
    "add_checkpoint": ({"run_id", "uri"}, {"label", "step", "base_model", "is_final"}),
    "list_checkpoints": ({"run_id"}, set()),
    "create_eval": (
        {"run_id"},
        {"benchmark_id", "metrics", "breakdowns", "step", "checkpoint_id", "model_ref", "sdk_version"},
    ),
    "list_evals": ({"run_id"}, set()),
    "add_prediction": (
        {"run_id", "kind"},
        {
            *("eval_id", "task_id", "instruction", "expected", "reward", "step", "sample_idx", "metadata"),
            *("model_output", "advantage"),
        },
    ),
    "list_predictions": ({"run_id"}, {"kind"}),
}


class RefusedError(Exception):
    """Raised to respond with an error."""

    def __init__(self, status, text):
        super().__init__(text)
        self.status, self.text = status, text


class EvsysServer:
    """Serves on a thread of its own, and stores what it is sent in memory, which survives a stop and a restart.

    Attributes:
        fault: Called with (operation, args) before the operation; a returned Response, ``"hang"`` or ``"cut"`` is the
            response instead, None responds normally.
        should_drop_reply: Called with the same arguments after the operation; if it returns true the response is
            truncated.
        keys: The accepted API keys.
    """

    def __init__(self, port=0):
        self.port = port
        self.keys = {KEY}
        self.fault = self.should_drop_reply = None
        self.reset()
        self.max_bytes = 1 << 20
        self.redirect = 308
        self._numbers = itertools.count(1)
        self._server = self._thread = self._hanging = None

    def reset(self):
        """Remove everything stored."""
        self.operations = []
        """(operation, args) of every executed request, including reads, in order."""
        self.request_count = 0
        self.received = []
        """The path, the headers and the decompressed body of each request, as bytes."""
        self.connections = set()
        self.tables = {name: {} for name in ("experiments", "groups", "runs", "evals")}
        self.metrics, self.checkpoints, self.predictions = [], [], []

    # -- serving ------------------------------------------------------------------------------------------------------

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def routes(self):
        return [
            Route(PATH, self.gateway, methods=["POST"]),
            Route("/moved/{rest:path}", self.redirect_request, methods=["POST"]),
        ]

    def start(self):
        # With the protocol number, by which asyncio recognizes a TCP socket and disables Nagle's algorithm.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            Starlette(routes=self.routes()),
            log_level="critical",
            timeout_graceful_shutdown=0,
            lifespan="off",
            loop="asyncio",
        )
        self._server = uvicorn.Server(config)
        self._hanging = asyncio.Event()

        async def serve():
            try:
                await self._server.serve(sockets=[listener])
            finally:
                # Connections that still wait for the peer, or were accepted after the server closed the others.
                for _ in range(10):
                    for connection in list(self._server.server_state.connections):
                        connection.transport.abort()
                    await asyncio.sleep(0)

        def run():
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(serve())
            listener.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.001)
        return self

    def stop(self):
        """Stop as if killed: connections are cut and the port is free; what was stored stays."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._server = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        if self._server is not None:
            self.stop()

    async def redirect_request(self, request: Request):
        return RedirectResponse(f"/{request.path_params['rest']}", status_code=self.redirect)

    async def gateway(self, request: Request):
        self.request_count += 1
        self.connections.add(request.client)
        body = await request.body()
        if request.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        headers = [b"%b: %b" % pair for pair in request.headers.raw]
        self.received.append(b"\n".join([str(request.url).encode(), *headers, body]))
        try:
            if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.keys:
                raise RefusedError(401, "no such key")
            if len(body) > self.max_bytes:
                raise RefusedError(413, "too large")
            payload = json.loads(body, parse_constant=_reject_constant)
            op, args = payload["op"], payload["args"]
            override = self.fault and self.fault(op, args)
            if override == "hang":
                await asyncio.sleep(3600)
            if override == "cut":
                return _TruncatedResponse()
            if override is not None:
                return override
            result = self.execute(op, args)
        except RefusedError as refused:
            return JSONResponse({"error": refused.text}, refused.status)
        except (ValueError, KeyError) as error:
            return JSONResponse({"error": f"no request: {error}"}, 400)
        if self.should_drop_reply and self.should_drop_reply(op, args):
            return _TruncatedResponse()
        return JSONResponse({"result": result})

    # -- the operations -----------------------------------------------------------------------------------------------

    def execute(self, op, args):
        if op not in OPERATIONS:
            raise RefusedError(400, f"unknown op {op!r}")
        required, optional = OPERATIONS[op]
        missing, unknown = required - args.keys(), set() if optional is None else args.keys() - required - optional
        if missing or unknown:
            raise RefusedError(422, f"{op}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        for key, table in (("experiment_id", "experiments"), ("group_id", "groups"), ("run_id", "runs")):
            if key in args and args[key] not in self.tables[table]:
                raise RefusedError(404, f"no {key} {args[key]}")
        self.operations.append((op, args))
        return getattr(self, op)(**args)

    def _add(self, table, row):
        row = {"id": f"{table[0]}{next(self._numbers)}", **row}
        self.tables[table][row["id"]] = row
        return row

    def _select(self, table, **filters):
        rows = self.tables[table].values()
        return [
            row for row in rows if all(row.get(key) == value for key, value in filters.items() if value is not None)
        ]

    def create_experiment(self, **row):
        return self._add("experiments", row)

    def update_experiment(self, experiment_id, patch):
        self.tables["experiments"][experiment_id].update(patch)
        return self.tables["experiments"][experiment_id]

    def get_experiment(self, experiment_id):
        return self.tables["experiments"][experiment_id]

    def list_experiments(self, project_id=None, valid_only=False):
        return self._select("experiments", project_id=project_id)

    def create_group(self, **row):
        return self._add("groups", row)

    def list_groups(self, experiment_id):
        return self._select("groups", experiment_id=experiment_id)

    def create_run(self, **row):
        return self._add("runs", {"status": "pending", **row})

    def update_run(self, run_id, patch):
        self.tables["runs"][run_id].update(patch)
        return self.tables["runs"][run_id]

    def get_run(self, run_id):
        return self.tables["runs"][run_id]

    def list_runs(self, experiment_id=None, group_id=None):
        return self._select("runs", experiment_id=experiment_id, group_id=group_id)

    def log_metrics(self, run_id, step, metrics, split):
        if split not in {"train", "val", "test"} or type(step) is not int:
            raise RefusedError(422, f"split {split}, step {step}")
        new = [{"run_id": run_id, "step": step, "name": k, "value": v, "split": split} for k, v in metrics.items()]
        self.metrics += new
        return []

    def get_metrics(self, run_id, name=None, split=None):
        """Return the points; of several with the same split, step and name the last one counts."""
        found = {}
        for row in self.metrics:
            if row["run_id"] == run_id and name in {None, row["name"]} and split in {None, row["split"]}:
                found[row["split"], row["step"], row["name"]] = {k: v for k, v in row.items() if k != "run_id"}
        return list(found.values())

    def add_checkpoint(self, **row):
        self.checkpoints.append(row)
        return row

    def list_checkpoints(self, run_id):
        return [row for row in self.checkpoints if row["run_id"] == run_id]

    def create_eval(self, **row):
        return self._add("evals", {"metrics": {}, **row})

    def list_evals(self, run_id):
        return self._select("evals", run_id=run_id)

    def add_prediction(self, **row):
        self.predictions.append(row)
        return row

    def list_predictions(self, run_id, kind=None):
        return [row for row in self.predictions if row["run_id"] == run_id and kind in {None, row["kind"]}]


class _TruncatedResponse(Response):
    """A response that ends before it is complete, and closes the connection."""

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"resu', "more_body": False})


@pytest.fixture
def server(monkeypatch):
    """Run a server, and replace the EvSys settings of the user who runs the test."""
    for name in [each for each in os.environ if each.startswith("EVSYS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EVSYS_API_KEY", KEY)
    with EvsysServer() as server:
        monkeypatch.setenv("EVSYS_API_URL", server.url)
        yield server


def html_response(status=200):
    return HTMLResponse("<!doctype html><title>Please log in</title>", status)


def error_response(status, **headers):
    return JSONResponse(
        {"error": "not today"}, status, {key.replace("_", "-"): value for key, value in headers.items()}
    )


def _reject_constant(text):
    raise ValueError(f"{text} is no JSON")


if __name__ == "__main__":
    with EvsysServer(int(sys.argv[1])) as server:
        print(f"{server.url}, key {KEY}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
