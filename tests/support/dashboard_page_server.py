"""A stand-in for the dashboard's server: serves the page, with made-up experiments that grow when a test says so."""

import asyncio
import json
import math
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

TOKEN = "a-token"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"
ARMS = {"adamw lr=3e-4": 0.2, "adamw lr=1e-3": 0.1, "lion lr=1e-4": 0.28, "sgd momentum=0.9": 0.45}
BASELINE, BEST = "adamw lr=3e-4", "adamw lr=1e-3"
SEEDS = 3
STEPS = 50_000
FAILED_AT = 12_300
CONSTANTS = {"train/lr": 3e-4, "train/world_size": 8}
CURVES: dict[str, Any] = {  # name -> value at a step, from the curve of the loss, the seed and the step
    "val/accuracy": lambda loss, seed, step: 0.95 - 0.3 * loss,
    "train/loss": lambda loss, seed, step: loss,
    "val/loss": lambda loss, seed, step: 1.1 * loss,
    "train/accuracy": lambda loss, seed, step: 0.97 - 0.28 * loss,
    "train/grad_norm": lambda loss, seed, step: 0.4 + 0.9 * loss + math.exp(-step / 2_000),
    "train/tokens_per_second": lambda loss, seed, step: 412_000 - 9_000 * seed,
    "train/weight_decay_of_the_embedding_and_of_the_output_projection": lambda loss, seed, step: 1e-5 * (1 + loss),
    "train/entropy": lambda loss, seed, step: 2.1 - step / STEPS,
    "train/never_positive": lambda loss, seed, step: -loss,
    "eval/rare": lambda loss, seed, step: loss,
    "eval/lonely": lambda loss, seed, step: loss if step == 15_000 else math.nan,
    "system/gpu_memory": lambda loss, seed, step: 38.2 + seed,
}


def value_at(metric: str, arm: str, seed: int, step: float) -> float:
    if metric == "train/grad_norm" and arm.startswith("lion") and 9_000 < step < 14_000:
        return math.nan
    quality = ARMS[arm] + 0.02 * seed
    loss = quality + 2.2 * math.exp(-step / (6_000 + 9_000 * quality))
    noise = math.sin(12.9898 * step + 78.233 * seed + 37.7 * quality) * 43_758.5453 % 1 - 0.5
    return CURVES[metric](loss, seed, step) * (1 + noise * (0.02 if "val" in metric else 0.15))


def spread(points: list[float]) -> tuple[float, float]:
    """The mean of values and their sample deviation."""
    mean = sum(points) / len(points)
    return mean, math.sqrt(sum((point - mean) ** 2 for point in points) / max(1, len(points) - 1))


class MadeUp:
    """Two dozen experiments; the first has curves, and grows."""

    def __init__(self) -> None:
        self.started = time.time() - 3_000
        self.step = 34_000
        self.frame = 1
        self.chart_requests = 0

    def home(self) -> dict[str, Any]:
        rows = [self.row(i) for i in range(24)]
        return {"store": "a-store", "now": time.time(), "frame": self.frame, "experiments": rows}

    def row(self, i: int) -> dict[str, Any]:
        names = ["optimizers on the small corpus", "learning rate", "batch size", "warm-up", HOSTILE, "dropout"]
        states = ["running", "completed", "failed", "stalled", "completed", "cancelled", "pending", "stopped"]
        state, total = states[i % len(states)], 6 if i else len(ARMS) * SEEDS
        done = {"completed": total, "stopped": total, "pending": 0}.get(state, 4)
        spark = [None if k == 9 else 0.9 - 0.5 * math.exp(-k / 8) + 0.02 * math.sin(k * (i + 1)) for k in range(32)]
        headline = {"name": "val/accuracy", "direction": "max", "value": 0.9123 - i / 100, "arm": BEST, "spark": spark}
        ago = 3_700 * i + 2
        return {
            "id": f"exp-{i}",
            "name": names[i] if i < len(names) else f"sweep {i}",
            "state": state,
            "hypothesis": "AdamW beats Lion at equal compute on the small corpus" if i % 3 == 0 else None,
            "tags": [["corpus-small", "optimizer"], [], ["ablation"]][i % 3],
            "arms": 4,
            "runs": {"total": total, "planned": total, state: 1, "completed": done},
            "headline": None if state == "pending" else headline,
            "started": time.time() - ago - 3_000,
            "ended": None,
            "last_event": time.time() - ago,
            "progress": {"completed": 1.0, "pending": 0.0}.get(state, 0.68),
        }

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        state, step, error = "running", self.step, None
        if arm.startswith("lion"):
            state, step = "completed", STEPS
        elif arm.startswith("sgd") and seed == SEEDS - 1:
            state, step = "failed", FAILED_AT
            error = f'Traceback (most recent call last):\n  File "train.py"\nFloatingPointError: loss is NaN at {step}'
        return {
            "id": f"{arm}-{seed}",
            "name": f"{arm.split(maxsplit=1)[0]}-{seed}",
            "arm": arm,
            "seed": seed,
            "rank": 0,
            "state": state,
            "error": error,
            "step": step,
            "num_steps": STEPS,
            "unit": "steps",
            "started": self.started,
            "ended": None,
            "last_event": time.time() - 3,
            "values": [value_at("val/accuracy", arm, seed, step), value_at("train/loss", arm, seed, step)],
            "checkpoints": 3,
            "config": {"optimizer": arm.split(maxsplit=1)[0]},
        }

    def arm(self, name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
        values = []
        for i in range(2):
            points = {
                arm: [run["values"][i] for run in runs if run["arm"] == arm and not run["error"]]
                for arm in (name, BASELINE)
            }
            mean, sd = spread(points[name])
            delta = mean - spread(points[BASELINE])[0]
            row = {"mean": mean, "sd": sd, "n": len(points[name]), "delta": delta, "delta_sd": sd}
            values.append({**row, "points": points[name]})
        return {
            "name": name,
            "state": "completed" if name.startswith("lion") else "running",
            "runs": [run["id"] for run in runs if run["arm"] == name],
            "n": values[0]["n"],
            "values": values,
            "winner": name == BEST,
        }

    def experiment(self) -> dict[str, Any]:
        runs = [self.run(arm, seed) for arm in ARMS for seed in range(SEEDS)]
        metrics = [
            {
                "name": name,
                "runs": len(runs),
                "points": 12 * self.step,
                "constant": CONSTANTS.get(name),
                "section": name.split("/", maxsplit=1)[0],
                "direction": None,
            }
            for name in [*CURVES, *CONSTANTS]
        ]
        alert = {"title": "gradient norm", "text": "above 10 for 200 steps", "level": "warning"}
        return {
            **self.row(0),
            "conclusion": None,
            "notes": None,
            "config": {},
            "started": self.started,
            "progress": self.step / STEPS,
            "best_score": None,
            "error": None,
            "baseline": BASELINE,
            "headlines": [
                {"name": "val/accuracy", "direction": "max", "rule": "success metric"},
                {"name": "train/loss", "direction": "min", "rule": "training loss"},
            ],
            "arms": [self.arm(name, runs) for name in ARMS],
            "runs": runs,
            "metrics": metrics,
            "same": {"model.layers": 12, "model.width": 768, "data.path": "/data/corpus", "batch_size": 256},
            "alerts": [{**alert, "run": None, "time": time.time() - 300}],
            "frame": self.frame,
        }

    def chart(self, query: dict[str, Any], data: list[float], last_buckets: int | None = None) -> dict[str, Any]:
        """The header of a chart, whose columns go into `data`."""
        metric = query["metric"]
        first, last = query["from"] or 0, int(min(self.step, query["to"] or self.step))
        fitting = [width for width in (1, 32, 256, 2_048) if (last - first) / width <= query["buckets"]]
        width = query.get("width") or (1 if metric.startswith("eval/") else fitting[0])
        start = int(first - first % width)
        if last_buckets:
            start = max(start, last - last % width - last_buckets * width)
        x = list(range(start, last, 5_000 if metric.startswith("eval/") else width))

        def line(kind: str, rows: list[list[float]], **facts: Any) -> dict[str, Any]:
            mean = [sum(row) / len(row) for row in rows]
            columns = {
                "x": x,
                "mean": mean,
                "min": [0.97 * min(row) for row in rows],
                "max": [1.03 * max(row) for row in rows],
                "badAt": [step for step, value in zip(x, mean, strict=True) if math.isnan(value)],
            }
            if kind == "band":
                columns["sd"] = [spread(row)[1] for row in rows]
            places = {}
            for name, column in columns.items():
                places[name] = [len(data), len(column)]
                data.extend(column)
            return {"kind": kind, "points": len(x) * width, "bad": places["badAt"][1], **facts, **places}

        lines = []
        for arm in ARMS:
            seeds = [[value_at(metric, arm, seed, step) for step in x] for seed in range(SEEDS)]
            if query["lines"] != "band":
                lines += [
                    line("member", [[value] for value in values], arm=arm, run=f"{arm}-{seed}", seed=seed, n=1)
                    for seed, values in enumerate(seeds)
                ]
            if query["lines"] != "members":
                lines.append(line("band", [list(row) for row in zip(*seeds, strict=True)], arm=arm, n=SEEDS))
        return {"metric": metric, "width": width, "total": 12 * int(last - first), "lines": lines}

    def update(self, topic: str) -> bytes:
        """What a live topic sends after the made-up experiment grew."""
        header: dict[str, Any] = {"topic": topic, "frame": self.frame, "kind": "data"}
        data: list[float] = []
        if topic == "home":
            header["home"] = {"experiments": [self.row(0)], "removed": []}
        elif topic.startswith("e/"):
            header["experiment"] = {name: value for name, value in self.experiment().items() if name != "metrics"}
        else:
            _, _, lines, width, metric = topic.split("/", 4)
            query = {"metric": metric, "lines": lines, "width": int(width), "from": None, "to": None, "buckets": 320}
            header["chart"] = self.chart(query, data, last_buckets=4)
        return columns_of(header, data)


def columns_of(header: dict[str, Any], data: list[float]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"EVC1" + struct.pack("<I", len(text)) + text + struct.pack(f"<{len(data)}d", *data)


class Routes:
    """The server's routes that the page asks."""

    def __init__(self, made_up: MadeUp, web: Path) -> None:
        self.made_up = made_up
        self.web = web

    async def index(self, request: Request) -> Response:
        return FileResponse(self.web / "index.html", headers={"Content-Security-Policy": POLICY})

    async def read(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": {"code": "token", "message": "no valid token", "fix": ""}}, 401)
        if request.url.path == "/api/home":
            return JSONResponse(self.made_up.home())
        if request.url.path == "/api/experiments/exp-0":
            return JSONResponse(self.made_up.experiment())
        return JSONResponse({"error": {"code": "unknown", "message": "There is no such experiment.", "fix": ""}}, 404)

    async def charts(self, request: Request) -> Response:
        self.made_up.chart_requests += 1
        data: list[float] = []
        queries = (await request.json())["charts"]
        header = {"charts": [self.made_up.chart(query, data) for query in queries], "frame": self.made_up.frame}
        return Response(columns_of(header, data), media_type="application/octet-stream")

    async def live(self, socket: WebSocket) -> None:
        if f"token.{TOKEN}" not in socket.scope["subprotocols"]:
            await socket.close()
            return
        await socket.accept(subprotocol="evsys")
        topics: list[str] = []
        frame = self.made_up.frame
        try:
            while True:
                try:
                    message = await asyncio.wait_for(socket.receive_json(), 0.05)
                    topics = [each["topic"] for each in message["subscribe"]]
                except TimeoutError:
                    pass
                if self.made_up.frame != frame:
                    frame = self.made_up.frame
                    for topic in topics:
                        await socket.send_bytes(self.made_up.update(topic))
        except (WebSocketDisconnect, RuntimeError):
            return


class PageServer:
    """The stand-in on a port of its own, in a thread."""

    def __init__(self, web: Path, port: int = 0) -> None:
        self.made_up = MadeUp()
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        routes = Routes(self.made_up, web)
        app = Starlette(
            routes=[
                *(Route(path, routes.index) for path in ("/", "/e/{id}", "/e/{id}/metrics")),
                Route("/api/home", routes.read),
                Route("/api/experiments/{id}", routes.read),
                Route("/api/charts", routes.charts, methods=["POST"]),
                WebSocketRoute("/api/live", routes.live),
                Mount("/assets", StaticFiles(directory=web / "assets")),
            ]
        )
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})

    def __enter__(self) -> Self:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    def grow(self, steps: int) -> None:
        """Go on by some steps, of which the tabs that follow are notified."""
        self.made_up.step += steps
        self.made_up.frame += 1
