"""A stand-in for the dashboard's server: serves the page, with made-up experiments that go on for as long as it runs."""

import asyncio
import json
import math
import random
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
SEEDS = 3
STEPS = 50_000
METRICS = {
    "val/accuracy": "max",
    "train/loss": "min",
    "val/loss": "min",
    "train/accuracy": "max",
    "train/grad_norm": None,
    "train/tokens_per_second": None,
    "train/weight_decay_of_the_embedding_and_of_the_output_projection": None,
    "train/entropy": None,
    "eval/rare": None,
    "system/gpu_memory": None,
}


def curve(metric: str, arm: str, seed: int, step: float) -> float:
    """The value of a metric without its noise."""
    quality = ARMS[arm] + 0.02 * seed
    falling = quality + 2.2 * math.exp(-step / (6_000 + 9_000 * quality))
    values = {
        "val/accuracy": 0.95 - 0.3 * falling,
        "train/accuracy": 0.97 - 0.28 * falling,
        "val/loss": falling * 1.1,
        "train/grad_norm": 0.4 + 3 * quality + math.exp(-step / 2_000),
        "train/tokens_per_second": 412_000 - 9_000 * seed,
        "train/weight_decay_of_the_embedding_and_of_the_output_projection": 1e-5 * (1 + quality * step / STEPS),
        "train/entropy": 2.1 - step / STEPS,
        "system/gpu_memory": 38.2 + seed,
    }
    return values.get(metric, falling)


class MadeUp:
    """Two dozen experiments; the first has curves, and grows."""

    def __init__(self) -> None:
        self.started = time.time() - 3_000
        self.step = 34_000
        self.frame = 1
        self.chart_requests = 0

    def value(self, metric: str, arm: str, seed: int, step: float) -> float:
        noise = random.Random(f"{metric} {arm} {seed} {step}")
        return curve(metric, arm, seed, step) * (1 + 0.06 * noise.gauss(0, 1) * (0.15 if "val" in metric else 1))

    def home(self) -> dict[str, Any]:
        now = time.time()
        states = ["running", "completed", "failed", "stalled", "completed", "cancelled", "pending", "stopped"]
        names = ["optimizers on the small corpus", "learning rate", "batch size", "warm-up", HOSTILE, "dropout"]
        rows = []
        for i in range(24):
            state = states[i % len(states)] if i else "running"
            done = {"completed": 6, "stopped": 6, "pending": 0}.get(state, 4)
            rows.append({
                "id": f"exp-{i}",
                "name": names[i] if i < len(names) else f"sweep {i}",
                "state": state,
                "hypothesis": "AdamW beats Lion at equal compute on the small corpus" if i % 3 == 0 else None,
                "tags": [["corpus-small", "optimizer"], [], ["ablation"]][i % 3],
                "arms": 4,
                "runs": {"total": 12 if i == 0 else 6, "planned": 12 if i == 0 else 6, "completed": done, state: done if state == "completed" else 1},
                "headline": None if state == "pending" else {
                    "name": "val/accuracy", "direction": "max", "value": 0.9123 - i / 100, "arm": "adamw lr=1e-3",
                    "spark": [None if k == 9 else 0.9 - 0.5 * math.exp(-k / 8) + 0.02 * math.sin(k * (i + 1)) for k in range(32)],
                },
                "started": now - 4_000 * i - 3_000,
                "ended": None,
                "last_event": now - 3_700 * i - 2,
                "progress": {"completed": 1.0, "pending": 0.0}.get(state, 0.68),
            })  # fmt: skip
        return {"store": "a-store", "now": now, "frame": self.frame, "experiments": rows}

    def runs(self) -> list[dict[str, Any]]:
        runs = []
        for arm in ARMS:
            for seed in range(SEEDS):
                state = "failed" if arm.startswith("sgd") and seed == 2 else "completed" if arm.startswith("lion") else "running"
                step = 12_300 if state == "failed" else STEPS if state == "completed" else self.step
                error = "Traceback (most recent call last):\n  File \"train.py\", line 88, in step\nFloatingPointError: loss is NaN at step 12300" if state == "failed" else None
                runs.append({
                    "id": f"{arm}-{seed}", "name": f"{arm.split()[0]}-{seed}", "arm": arm, "seed": seed, "rank": 0, "state": state, "error": error,
                    "step": step, "num_steps": STEPS, "unit": "steps", "started": self.started, "ended": None, "last_event": time.time() - 3,
                    "values": [self.value("val/accuracy", arm, seed, step), self.value("train/loss", arm, seed, step)], "checkpoints": 3,
                    "config": {"lr": 3e-4, "optimizer": arm.split()[0]},
                })  # fmt: skip
        return runs

    def experiment(self) -> dict[str, Any]:
        runs = self.runs()
        arms = []
        means: dict[str, list[float]] = {}
        for arm in ARMS:
            own = [run for run in runs if run["arm"] == arm and run["state"] != "failed"]
            values = []
            for h in range(2):
                points = [run["values"][h] for run in own]
                mean = sum(points) / len(points)
                sd = math.sqrt(sum((p - mean) ** 2 for p in points) / (len(points) - 1))
                means.setdefault(arm, []).append(mean)
                delta = mean - means["adamw lr=3e-4"][h]
                values.append({"mean": mean, "sd": sd, "n": len(points), "delta": delta, "delta_sd": sd, "points": points})
            states = {run["state"] for run in own}
            arms.append({"name": arm, "state": "running" if "running" in states else "completed", "runs": [r["id"] for r in runs if r["arm"] == arm], "n": len(own), "values": values, "winner": arm == "adamw lr=1e-3"})
        metrics = [{"name": name, "runs": 12, "points": 12 * self.step, "constant": None, "section": name.split("/")[0], "direction": direction} for name, direction in METRICS.items()]
        metrics.append({"name": "train/lr", "runs": 12, "points": 9, "constant": 3e-4, "section": "train", "direction": None})
        metrics.append({"name": "train/world_size", "runs": 12, "points": 9, "constant": 8, "section": "train", "direction": None})
        return {
            "id": "exp-0", "name": "optimizers on the small corpus", "state": "running",
            "hypothesis": "AdamW beats Lion at equal compute on the small corpus", "conclusion": None, "tags": ["corpus-small", "optimizer"],
            "notes": None, "config": {}, "started": self.started, "ended": None, "last_event": time.time() - 1, "progress": self.step / STEPS,
            "best_score": None, "error": None, "baseline": "adamw lr=3e-4",
            "headlines": [{"name": "val/accuracy", "direction": "max", "rule": "success metric"}, {"name": "train/loss", "direction": "min", "rule": "training loss"}],
            "arms": arms, "runs": runs, "metrics": metrics, "same": {"model.layers": 12, "model.width": 768, "data.path": "/data/corpus", "batch_size": 256},
            "alerts": [{"run": None, "title": "gradient norm", "text": "above 10 for 200 steps", "level": "warning", "time": time.time() - 300}],
            "frame": self.frame,
        }  # fmt: skip

    def chart(self, query: dict[str, Any], data: list[float], last_buckets: int | None = None) -> dict[str, Any]:
        metric, kind = query["metric"], query["lines"]
        first, last = query["from"] or 0, min(self.step, self.step if query["to"] is None else query["to"])
        width = next((w for w in (1, 32, 256, 2048) if (last - first) / w <= query["buckets"]), 2048)
        if metric == "eval/rare":
            width = 1
        width = query.get("width", width)
        lines = []
        for arm in ARMS:
            members: list[tuple[int, list[int], list[float]]] = []
            for seed in range(SEEDS):
                end = min(last, 12_300) if arm.startswith("sgd") and seed == 2 else last
                start = first - first % width
                if last_buckets:
                    start = max(start, end - end % width - last_buckets * width)
                xs = list(range(start, int(end), 5_000 if metric == "eval/rare" else width))
                is_gap = lambda x: metric == "train/grad_norm" and arm.startswith("lion") and 9_000 < x < 14_000  # noqa: E731
                members.append((seed, xs, [math.nan if is_gap(x) else self.value(metric, arm, seed, x) for x in xs]))

            def put(values: list[float]) -> list[int]:
                data.extend(values)
                return [len(data) - len(values), len(values)]

            def bad(xs: list[int], values: list[float]) -> list[int]:
                return put([x for x, value in zip(xs, values, strict=True) if math.isnan(value)])

            if kind in {"members", "both"}:
                for seed, xs, values in members:
                    lines.append({"kind": "member", "arm": arm, "run": f"{arm}-{seed}", "seed": seed, "n": 1, "points": len(xs) * width, "bad": 0,
                        "x": put(xs), "mean": put(values), "min": put([v * 0.95 for v in values]), "max": put([v * 1.05 for v in values]), "badAt": bad(xs, values)})  # fmt: skip
            if kind in {"band", "both"}:
                xs = members[0][1]
                rows = [[m[2][i] for m in members if i < len(m[2])] for i in range(len(xs))]
                means = [sum(row) / len(row) for row in rows]
                sds = [math.sqrt(sum((v - mean) ** 2 for v in row) / max(1, len(row) - 1)) for row, mean in zip(rows, means, strict=True)]
                lines.append({"kind": "band", "arm": arm, "run": None, "seed": None, "n": SEEDS, "points": len(xs) * width * SEEDS, "bad": sum(map(math.isnan, means)),
                    "x": put(xs), "mean": put(means), "min": put([min(r) for r in rows]), "max": put([max(r) for r in rows]), "sd": put(sds), "badAt": bad(xs, means)})  # fmt: skip
        return {"metric": metric, "width": width, "total": 12 * int(last - first), "lines": lines}


def columns(header: dict[str, Any], data: list[float]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"EVC1" + struct.pack("<I", len(text)) + text + struct.pack(f"<{len(data)}d", *data)


def is_allowed(request: Request) -> bool:
    return request.headers.get("authorization") == f"Bearer {TOKEN}"


REFUSED = {"error": {"code": "token", "message": "no valid token", "fix": "open the address that was printed"}}


def application(made_up: MadeUp, web: Path) -> Starlette:
    async def index(request: Request) -> Response:
        return FileResponse(web / "index.html", headers={"Content-Security-Policy": POLICY})

    async def home(request: Request) -> Response:
        return JSONResponse(made_up.home()) if is_allowed(request) else JSONResponse(REFUSED, 401)

    async def experiment(request: Request) -> Response:
        if not is_allowed(request):
            return JSONResponse(REFUSED, 401)
        if request.path_params["id"] != "exp-0":
            return JSONResponse({"error": {"code": "unknown", "message": "There is no such experiment.", "fix": ""}}, 404)
        return JSONResponse(made_up.experiment())

    async def charts(request: Request) -> Response:
        made_up.chart_requests += 1
        data: list[float] = []
        asked = await request.json()
        header = {"charts": [made_up.chart(query, data) for query in asked["charts"]], "frame": made_up.frame}
        return Response(columns(header, data), media_type="application/octet-stream")

    async def live(socket: WebSocket) -> None:
        if f"token.{TOKEN}" not in socket.scope["subprotocols"]:
            await socket.close()
            return
        await socket.accept(subprotocol="evsys")
        topics: list[dict[str, Any]] = []
        frame = made_up.frame
        try:
            while True:
                try:
                    topics = (await asyncio.wait_for(socket.receive_json(), 0.1))["subscribe"]
                except TimeoutError:
                    pass
                if made_up.frame == frame:
                    continue
                frame = made_up.frame
                for topic in (each["topic"] for each in topics):
                    await socket.send_bytes(update(topic))
        except (WebSocketDisconnect, RuntimeError):
            return

    def update(topic: str) -> bytes:
        header: dict[str, Any] = {"topic": topic, "frame": made_up.frame, "kind": "data"}
        data: list[float] = []
        if topic == "home":
            header["home"] = {"experiments": made_up.home()["experiments"][:1], "removed": []}
        elif topic.startswith("e/"):
            header["experiment"] = {k: v for k, v in made_up.experiment().items() if k != "metrics"}
        else:
            _, _, lines, width, metric = topic.split("/", 4)
            query = {"metric": metric, "lines": lines, "width": int(width), "from": None, "to": None, "buckets": 320}
            header["chart"] = made_up.chart(query, data, last_buckets=4)
        return columns(header, data)

    pages = [Route(path, index) for path in ("/", "/e/{id}", "/e/{id}/metrics")]
    return Starlette(routes=[
        *pages,
        Route("/api/home", home),
        Route("/api/experiments/{id}", experiment),
        Route("/api/charts", charts, methods=["POST"]),
        WebSocketRoute("/api/live", live),
        Mount("/assets", StaticFiles(directory=web / "assets")),
    ])  # fmt: skip


class PageServer:
    """The stand-in on a port of its own, in a thread."""

    def __init__(self, web: Path, port: int = 0) -> None:
        self.made_up = MadeUp()
        self.web = web
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        config = uvicorn.Config(application(self.made_up, self.web), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.should_exit = True
        self.thread.join()

    def grow(self, steps: int) -> None:
        """Go on by some steps; whoever follows gets a frame."""
        self.made_up.step += steps
        self.made_up.frame += 1
