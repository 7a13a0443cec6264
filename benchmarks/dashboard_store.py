"""What the dashboard's store costs: CPU time of ingest, bytes on disk and written, and the time to read charts.

    uv run python -m benchmarks.dashboard_store 10_000_000
    uv run python -m benchmarks.dashboard_store --db 'postgresql://USER@HOST/NAME?options=-csearch_path%3DSCHEMA'

Twenty runs of an experiment publish steps with ten metrics each, in turns of a hundred steps. Every value is a random
walk of which no two are the same: with all bits of a float64, or with those of a float32 (``--float32``), as most
frameworks log them. With ``--db``, an empty schema of PostgreSQL stores them, in which the tables remain.
"""

import argparse
import random
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Final

from evsys_adapters.dashboard.database import is_url
from evsys_adapters.dashboard.store import Store
from evsys_bus.codec import encode
from evsys_bus.context import LogContext, LoopState
from evsys_bus.events import Envelope, RunStart, StepEnd

RUNS: Final = 20
METRICS: Final = 10
TURN: Final = 100
_FLOAT32: Final = struct.Struct("f")


def bodies(steps: int, *, float32: bool) -> Iterator[tuple[str, int, list[bytes]]]:
    """Yield the name of a stream, the sequence number before the first event, and encoded events."""
    rng = random.Random(1)  # noqa: S311 # numbers to store
    values = {run: {f"metric_{index}": rng.random() for index in range(METRICS)} for run in range(RUNS)}
    contexts = [LogContext("/experiments/lr", run_key=f"lr-{run}-s0") for run in range(RUNS)]
    for run, ctx in enumerate(contexts):
        yield f"run-{run}", 0, [encode(Envelope(f"run-{run}", 1, 1.7e9, RunStart(ctx), ctx.run_key))]
    for first in range(0, steps, TURN):
        for run, ctx in enumerate(contexts):
            payloads: list[bytes] = []
            for step in range(first, first + TURN):
                row = values[run] = {name: value + rng.gauss(0, 0.01) for name, value in values[run].items()}
                if float32:
                    row = {name: _FLOAT32.unpack(_FLOAT32.pack(value))[0] for name, value in row.items()}
                published = 1.7e9 + step * 0.25 + rng.random() * 0.01
                event = StepEnd(LoopState(step, steps, ctx.run_dir, ctx=ctx), step, metrics=row)
                payloads.append(encode(Envelope(f"run-{run}", step + 2, published, event, ctx.run_key)))
            yield f"run-{run}", first + 1, payloads


def written_bytes(store: Store) -> int:
    """Return the bytes that this process has sent to the disk, or the server of PostgreSQL to its write-ahead log.

    0 where the system does not count them.
    """
    if is_url(store.location):
        return int(store.database.query("SELECT CAST(pg_current_wal_insert_lsn() - '0/0' AS BIGINT)")[0][0])
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def measure(points: int, location: str | Path, *, float32: bool) -> None:
    """Store so many points, and print what it costs."""
    steps = points // (RUNS * METRICS) // TURN * TURN
    store = Store.open(location)
    before, used, waited, stored, slowest = written_bytes(store), 0.0, 0.0, 0, 0.0
    for stream, after, payloads in bodies(steps, float32=float32):
        began, began_cpu = time.perf_counter(), time.process_time()
        stored += store.ingest(stream, after, payloads).points
        used += time.process_time() - began_cpu
        took = time.perf_counter() - began
        waited += took
        slowest = max(slowest, took)
    rates = f"{stored / used:,.0f} per CPU second, {stored / waited:,.0f} per second"
    print(f"{stored:,} points: {rates}, slowest batch {slowest * 1e3:.0f} ms")
    began = time.perf_counter()
    store = store.reopen()
    print(f"opened without a checkpoint in {time.perf_counter() - began:.2f} s")
    store.checkpoint()
    written = written_bytes(store) - before
    size = store.database.size_bytes()
    store.close()
    print(f"{size / stored:.1f} bytes per point on disk, {written / stored:.0f} written")
    store = Store.open(location)
    runs = [run for (run,) in store.database.query("SELECT DISTINCT run FROM series ORDER BY run")]
    infos = {run: store.series.names(run) for run in runs}
    for buckets in (500, 2000):
        times: list[float] = []
        width = 0
        for metric in range(METRICS):
            began = time.perf_counter()
            width = store.series.read([each[metric].id for each in infos.values()], buckets=buckets).width
            times.append((time.perf_counter() - began) * 1e3)
        shown = f"first {times[0]:.1f}, median {median(times):.1f}, slowest {max(times):.1f} ms"
        print(f"chart of {RUNS} runs x {steps:,} steps in <= {buckets:,} buckets of {width}: {shown}")
    times = []
    for metric in range(METRICS):
        began = time.perf_counter()
        store.series.read([each[metric].id for each in infos.values()], first=steps // 2, last=steps // 2 + 400)
        times.append((time.perf_counter() - began) * 1e3)
    print(f"400 steps of {RUNS} runs as points: median {median(times):.1f} ms")
    store.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--db", help="URL of an empty database of PostgreSQL")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(chosen.points, chosen.db or Path(directory, "store.sqlite"), float32=chosen.float32)
