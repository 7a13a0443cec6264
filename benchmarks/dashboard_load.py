"""What the benchmark of the dashboard stores in it: experiments as envelopes, clients that post them, and processes.

    python -m benchmarks.dashboard_load serve DATABASE
    python -m benchmarks.dashboard_load post URL SECONDS NAME     twenty runs, each with a stream of its own
    python -m benchmarks.dashboard_load publish URL SECONDS NAME  twenty runs of a bus, whose courier delivers them
    python -m benchmarks.dashboard_load catch-up URL POINTS NAME  a client that sends what was recorded earlier

``post`` and ``publish`` print as JSON when each step was published. ``catch-up`` prints a line once it is ready, waits
for one, and prints how many points it has sent in which time.
"""

import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote, urlsplit

import msgspec

from evsys_bus import EventBus, LogContext, LoopState, RunStart, StepEnd, TrainStart, build_callbacks
from evsys_bus.codec import encode
from evsys_bus.context import EvalResult
from evsys_bus.events import BenchmarkEval, Envelope, Event
from evsys_bus.sink import Sink

TOKEN: Final = "token-of-the-benchmark"  # noqa: S105 # of a server that ends with it
RUNS: Final = 20
SEEDS: Final = 4
"""Runs of an arm."""
METRICS: Final = 10
LIVE_METRICS: Final = 8
STEP_SECONDS: Final = 0.1
LARGE: Final = "large"
"""Name of the experiment with most points."""
MANY: Final = "many"
"""Name of the experiment with most metrics."""
_ENDED: Final = 3_600


class Body(NamedTuple):
    """A request's body, as `evsys_logger` sends it."""

    stream: str
    after: int
    data: bytes
    points: int


def contexts(name: str, runs: int = RUNS) -> list[LogContext]:
    """Return the contexts of an experiment's runs, `SEEDS` of each arm."""
    root = LogContext(f"/benchmark/{name}", config={"name": name})
    keys = [(f"arm-{index // SEEDS}", index % SEEDS) for index in range(runs)]
    return [root.for_run(f"{arm}-s{seed}", {"arm": arm, "seed": seed}) for arm, seed in keys]


def bodies(name: str, steps: int, *, runs: int = RUNS, metrics: int = METRICS) -> Iterator[Body]:
    """Yield the bodies of an experiment whose runs take turns. Its values are random walks of float64."""
    import numpy as np

    rng = np.random.default_rng(1)
    names = [f"metric_{index}" for index in range(metrics)]
    walks = [np.cumsum(rng.normal(0, 0.01, (steps, metrics)), axis=0) for _ in range(runs)]
    began = time.time() - 2 * _ENDED  # long enough ago that the runs count as stalled, not soon to become it
    events = max(1, min(Sink.max_batch_events, Sink.max_batch_bytes // (20 * metrics)))
    all_contexts = contexts(name, runs)
    for ctx in all_contexts:
        yield make_body(stream_of(ctx), 0, began, start_events(ctx, steps), ctx.run_key, 0)
    for turn in (range(steps)[first : first + events] for first in range(0, steps, events)):
        for index, ctx in enumerate(all_contexts):
            rows = walks[index][turn[0] : turn[-1] + 1].tolist()
            state = LoopState(turn[0], steps, ctx.run_dir, ctx=ctx)
            sent = [
                StepEnd(state, s, metrics=dict(zip(names, row, strict=True))) for s, row in zip(turn, rows, strict=True)
            ]
            published = began + turn[0] * (_ENDED - 60) / steps
            yield make_body(stream_of(ctx), turn[0] + 2, published, sent, ctx.run_key, len(sent) * metrics)


def evals(count: int, predictions: int) -> Iterator[Sequence[bytes]]:
    """Yield encoded events, one at a time, of evals with so many predictions each."""
    [ctx] = contexts("predictions", 1)
    for number in range(count):
        rows = [
            {
                "task_id": f"task-{row}",
                "instruction": f"question {row}",
                "output": f"answer {row * number}",
                "reward": row % 2,
            }
            for row in range(predictions)
        ]
        result = EvalResult(f"bench-{number}", metrics={"accuracy": 0.5})
        event = BenchmarkEval(ctx, result, rows, step=number)
        yield [encode(Envelope(stream_of(ctx), number + 1, time.time(), event, ctx.run_key))]


def start_events(ctx: LogContext, steps: int) -> list[Event]:
    """Return the first two events of a run."""
    return [RunStart(ctx), TrainStart(LoopState(0, steps, ctx.run_dir, ctx=ctx))]


def stream_of(ctx: LogContext) -> str:
    """Return the name of a run's stream."""
    return f"r0-{Path(ctx.output_dir).name}-{ctx.run_key}"


def make_body(stream: str, after: int, published: float, events: Iterable[Event], run: str | None, points: int) -> Body:
    """Encode the events after a sequence number, and compress them as `evsys_logger` does."""
    payloads = [
        msgspec.Raw(encode(Envelope(stream, sequence, published, event, run)))
        for sequence, event in enumerate(events, start=after + 1)
    ]
    compressor = zlib.compressobj(1, wbits=31)
    return Body(stream, after, compressor.compress(msgspec.msgpack.encode(payloads)) + compressor.flush(), points)


class Client:
    """One connection to a dashboard; not to be shared by threads."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)

    def request(self, path: str, body: bytes | None = None, **headers: str) -> bytes:
        """Return the response's body. Raises RuntimeError unless it is a success."""
        sent = {"Authorization": f"Bearer {TOKEN}"} | {name.replace("_", "-"): text for name, text in headers.items()}
        self._connection.request("GET" if body is None else "POST", path, body, sent)
        response = self._connection.getresponse()
        data = response.read()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path}: {response.status} {data[:300]!r}")
        return data

    def send(self, body: Body) -> None:
        """Post a body of events."""
        path = f"/api/ingest?stream={quote(body.stream)}&after={body.after}"
        self.request(path, body.data, Content_Type="application/msgpack", Content_Encoding="gzip")

    def charts(self, experiment: str, metrics: Sequence[str], lines: str) -> bytes:
        """Read charts, as the page does."""
        charts = [{"metric": each, "lines": lines, "buckets": 240} for each in metrics]
        return self.request("/api/charts", msgspec.json.encode({"experiment": experiment, "charts": charts}))

    def experiment(self, name: str) -> str:
        """Return the ID of the experiment with this name."""
        rows = json.loads(self.request("/api/home"))["experiments"]
        return next(row["id"] for row in rows if row["name"] == name)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def send_all(url: str, all_bodies: Sequence[Body], connections: int) -> float:
    """Send bodies, each stream's in order over one of some connections; returns the seconds taken."""
    streams = {name: index for index, name in enumerate(dict.fromkeys(each.stream for each in all_bodies))}
    errors: list[BaseException] = []

    def send(index: int) -> None:
        client = Client(url)
        try:
            for body in all_bodies:
                if streams[body.stream] % connections == index:
                    client.send(body)
        except BaseException as error:  # raised by the caller
            errors.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=send, args=(index,)) for index in range(connections)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - began


class Server(NamedTuple):
    """A running dashboard."""

    url: str
    process: subprocess.Popen[str]

    def bytes_written(self) -> int:
        """Return the bytes that it has sent to the disk, 0 where the system does not count them."""
        return _bytes_written(self.process.pid)


@contextlib.contextmanager
def server(database: Path) -> Iterator[Server]:
    """Run a dashboard in its own process."""
    with process("serve", str(database)) as started:
        yield Server(read_line(started), started)


def read_line(of: subprocess.Popen[str]) -> str:
    """Return the next line that a process prints. Raises RuntimeError if it ends before."""
    assert of.stdout is not None
    line = of.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{of.args} ended with status {of.wait()}")
    return line


@contextlib.contextmanager
def process(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Run this module; the process ends with the block at the latest."""
    command = [sys.executable, "-m", __spec__.name, *args]
    folder = Path(__file__).parent.parent
    started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder)  # noqa: S603 # ours
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            started.kill()
            started.communicate()


def _bytes_written(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def _serve(database: str) -> None:
    from evsys_adapters.dashboard.server import DashboardServer
    from evsys_adapters.dashboard.server.app import DashboardSettings

    path = Path(database)
    DashboardServer(
        path,
        host="127.0.0.1",
        port=0,
        settings=DashboardSettings(token=TOKEN),
        state=path.with_name("dashboard.json"),
        on_ready=lambda state: print(state.url, flush=True),
    ).run()


def _live_metrics(step: int, index: int) -> dict[str, float]:
    return {f"metric_{number}": (step % 50) / 50 + index / 10 + number for number in range(LIVE_METRICS)}


async def _post(url: str, seconds: float, name: str) -> dict[str, list[float]]:
    """Post twenty runs; a run has one request under way, with all steps since the one before."""
    import aiohttp

    published: dict[str, list[float]] = {}
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/msgpack", "Content-Encoding": "gzip"}
    steps = int(seconds / STEP_SECONDS)

    async def run(index: int, ctx: LogContext, session: aiohttp.ClientSession) -> None:
        times = published[f"arm-{index // SEEDS}/{index % SEEDS}"] = list[float]()
        state = LoopState(0, steps, ctx.run_dir, ctx=ctx)
        sequence = 0
        began = time.time() + index * STEP_SECONDS / RUNS
        events: list[Event] = start_events(ctx, steps)
        while len(times) < steps:
            await asyncio.sleep(max(0.0, began + len(times) * STEP_SECONDS - time.time()))
            while len(times) < steps and (due := began + len(times) * STEP_SECONDS) <= time.time():
                events.append(StepEnd(state, len(times), metrics=_live_metrics(len(times), index)))
                times.append(due)
            body = make_body(stream_of(ctx), sequence, time.time(), events, ctx.run_key, 0)
            path = f"{url}/api/ingest?stream={quote(body.stream)}&after={body.after}"
            async with session.post(path, data=body.data, headers=headers) as response:
                response.raise_for_status()
            sequence += len(events)
            events = []

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for index, ctx in enumerate(contexts(name)):
            group.create_task(run(index, ctx, session))  # of a block that waits
    return published


async def _publish(url: str, seconds: float, name: str) -> dict[str, list[float]]:
    """Publish twenty runs on one bus; `evsys_logger` delivers them."""
    os.environ |= {"EVSYS_API_URL": url, "EVSYS_API_KEY": TOKEN}
    published: dict[str, list[float]] = {f"arm-{each // SEEDS}/{each % SEEDS}": [] for each in range(RUNS)}
    steps = int(seconds / STEP_SECONDS)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = LogContext(Path(folder, name), config={"name": name})
        runs = [root.for_run(ctx.run_key or "", ctx.run_config) for ctx in contexts(name)]
        async with EventBus(build_callbacks([{"kind": "evsys_logger"}]), journal=Path(folder, "journal")) as bus:
            states = [LoopState(0, steps, ctx.run_dir, ctx=ctx) for ctx in runs]
            for ctx, state in zip(runs, states, strict=True):
                bus.publish(RunStart(ctx))
                bus.publish(TrainStart(state))
            began = time.time() + 2  # the courier has started
            for step in range(steps):
                for index, (state, times) in enumerate(zip(states, published.values(), strict=True)):
                    due = began + step * STEP_SECONDS + index * STEP_SECONDS / RUNS
                    await asyncio.sleep(max(0.0, due - time.time()))
                    times.append(time.time())
                    bus.publish(StepEnd(state, step, metrics=_live_metrics(step, index)))
    return published


def _catch_up(url: str, points: int, name: str) -> dict[str, float]:
    all_bodies = list(bodies(name, max(1, points // (4 * METRICS)), runs=4))
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.time()
    seconds = send_all(url, all_bodies, 1)
    return {"points": sum(each.points for each in all_bodies), "seconds": seconds, "began": began}


def _main(mode: str, *args: str) -> None:
    if mode == "serve":
        _serve(*args)
        return
    url, amount, name = args
    if mode == "catch-up":
        print(json.dumps(_catch_up(url, int(amount), name)))
    else:
        print(json.dumps(asyncio.run((_publish if mode == "publish" else _post)(url, float(amount), name))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
