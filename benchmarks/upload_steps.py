"""P4 with S3: how the upload of a checkpoint affects a training loop, to a stalling bucket and at full speed.

Blocks of steps alternate: without adapters, twice per round, to know how much two equal runs differ; while the courier
process uploads through a proxy that delays every chunk by half a second; and while it uploads at full speed. The
trainer runs on the first core; courier, proxy and server share the others. Another table shows how late the loop wakes
while it uploads through that proxy itself, with ``placement: inline``.
"""

import asyncio
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.uploads import s3_server
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
from evsys_adapters.checkpoints.spool import Spool
from evsys_bus import Checkpoint, EventBus, LogContext, LoopState, ManifestRow, build_callbacks
from evsys_bus.bench.couriers import wait_for_courier_exit
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult
from evsys_bus.bench.wakeup_latency import (
    MAX_WAKEUP_DELAY_NS,
    NO_ADAPTERS,
    NO_ADAPTERS_AGAIN,
    Block,
    StepKind,
    block_row,
    compare_blocks,
    measure_block,
    measure_blocks,
    other_cores,
    p99,
    pin,
)
from evsys_bus.diagnostics import LOGGER_NAME
from evsys_bus.tasks import run_in_new_loop

STEPS: Final[dict[float, int]] = {0.002: 400, 0.02: 80}
"""Number of steps in a block, by their length in seconds."""
STALLED: Final = "an upload to an S3 that stalls 500 ms"
INLINE: Final = "an upload on the loop itself, to that S3"
FULL_SPEED: Final = "an upload at full speed"
"""Has no target, because a training node does not run the S3 server."""
STALL_SECONDS: Final = 0.5
BYTES: Final = 400_000_000
BUCKET: Final = "steps"
_MAX_ROUNDS: Final = 12
_TIMEOUT_SECONDS: Final = 60.0
_PROXY: Final = """
import anyio, sys
from evsys_bus.testing import Fault, fault_proxy

async def main(port, stall_seconds):
    async with fault_proxy("127.0.0.1", int(port)) as proxy:
        await proxy.apply(Fault(delay_seconds=float(stall_seconds)))
        print(proxy.port, flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)

anyio.run(main, *sys.argv[1:])
"""


class UploadSteps:
    """The suite ``upload-steps``."""

    name = "upload-steps"
    promise = "P4: while a checkpoint is uploaded, the training loop's steps take as long as without"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure each kind and length of step."""
        rounds = min(max(budget.process_rounds, 2), _MAX_ROUNDS)
        if not all(importlib.util.find_spec(each) for each in ("swift", "aiobotocore")):
            yield Table(title="steps", unit="ns", rows=[], absent={STALLED: "swift, the server, is not installed"})
            return
        kinds: tuple[StepKind, ...] = ("waits", "computes")
        logging.getLogger(LOGGER_NAME).setLevel(logging.ERROR)  # else it logs the unfinished upload after each block
        with tempfile.TemporaryDirectory() as folder, _s3_servers(Path(folder)) as (direct, stalling):
            checkpoint_file = Path(folder, "saved")
            checkpoint_file.write_bytes(b"".join(os.urandom(1 << 20) for _ in range(BYTES >> 20)))
            candidates = {
                NO_ADAPTERS: _bus_without_adapters,
                NO_ADAPTERS_AGAIN: _bus_without_adapters,
                STALLED: partial(_bus_uploading, checkpoint_file, stalling),
                FULL_SPEED: partial(_bus_uploading, checkpoint_file, direct),
            }
            for kind in kinds:
                for seconds, steps in STEPS.items():
                    yield _measure_table(candidates, kind, seconds, steps, rounds)
            for seconds, steps in STEPS.items():
                yield _measure_inline_table(checkpoint_file, stalling, seconds, steps, rounds)


def _measure_inline_table(checkpoint_file: Path, endpoint: str, seconds: float, steps: int, rounds: int) -> Table:
    """Measure how late the loop wakes while it uploads itself."""
    found: dict[str, list[Block]] = {NO_ADAPTERS: [], INLINE: []}
    for _ in range(rounds):
        found[NO_ADAPTERS].append(
            run_in_new_loop(partial(_measure_block_while_uploading, None, checkpoint_file, seconds, steps))
        )
        found[INLINE].append(
            run_in_new_loop(partial(_measure_block_while_uploading, endpoint, checkpoint_file, seconds, steps))
        )
        _abort_all(endpoint)
    wakeup_delays = {
        name: sorted(chain.from_iterable(each.wakeup_delays for each in blocks)) for name, blocks in found.items()
    }
    extra = (p99(wakeup_delays[INLINE]) - p99(wakeup_delays[NO_ADAPTERS])) * 1e9
    promise = "an upload on the loop itself makes it wake at most 500 µs later at p99"
    return Table(
        title=f"how late waits of {seconds * 1e3:g} ms end: median, to p99",
        unit="ns",
        rows=[
            Row(name, Spread(median(each) * 1e9, median(each) * 1e9, p99(each) * 1e9), ours=name == INLINE)
            for name, each in wakeup_delays.items()
        ],
        target_results=[TargetResult(promise, extra / 1e3, extra <= MAX_WAKEUP_DELAY_NS, "µs")],
    )


async def _measure_block_while_uploading(
    endpoint: str | None, checkpoint_file: Path, seconds: float, steps: int
) -> Block:
    """Measure a block of waiting steps on a loop that also uploads, or that does not if ``endpoint`` is None."""
    url = f"s3://{BUCKET}/{time.monotonic_ns()}"
    adapters = []
    if endpoint is not None:
        adapters = [CheckpointUploadCallback(url, endpoint=endpoint, region="us-east-1")]
        adapters[0].placement = "inline"
    with tempfile.TemporaryDirectory(dir=checkpoint_file.parent, ignore_cleanup_errors=True) as folder:
        state = LoopState(0, 1, Path(folder, "run"), ctx=LogContext(Path(folder), run_key="run"))
        async with EventBus(adapters, journal=Path(folder, "journal"), drain_timeout=0.0) as bus:
            bus.publish(Checkpoint(state, ManifestRow("big", batch=0, state_path=str(checkpoint_file))))
            ledger = Spool.of(state.output_dir, url).ledger
            deadline = time.monotonic() + _TIMEOUT_SECONDS
            while endpoint and not any(b'"upload":"' in path.read_bytes() for path in ledger.glob("*.upload")):
                if time.monotonic() > deadline:
                    raise TimeoutError("the upload does not start")
                await asyncio.sleep(0.01)
            return await measure_block(bus, "waits", seconds, steps)


def _measure_table(
    candidates: dict[str, Callable[[], AbstractContextManager[EventBus]]],
    kind: StepKind,
    seconds: float,
    steps: int,
    rounds: int,
) -> Table:
    found = measure_blocks(candidates, kind, seconds, steps, rounds)
    return Table(
        title=f"steps of {seconds * 1e3:g} ms that {kind.removesuffix('s')}: median, to p99",
        unit="ns",
        rows=[block_row(name, each, ours=name in {STALLED, FULL_SPEED}) for name, each in found.items()],
        target_results=compare_blocks(
            found[STALLED], found[NO_ADAPTERS], found[NO_ADAPTERS_AGAIN], f"beside {STALLED}"
        ),
    )


@contextmanager
def _bus_without_adapters() -> Generator[EventBus, None, None]:
    with tempfile.TemporaryDirectory() as folder, _open_bus([], Path(folder)) as bus:
        yield bus


@contextmanager
def _bus_uploading(checkpoint_file: Path, endpoint: str) -> Generator[EventBus, None, None]:
    """Open a bus whose courier process is uploading during the whole block."""
    url = f"s3://{BUCKET}/{time.monotonic_ns()}"
    spec = {"kind": "checkpoint_upload", "params": {"url": url, "endpoint": endpoint, "region": "us-east-1"}}
    # In the directory of the checkpoint, because hard links cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=checkpoint_file.parent, ignore_cleanup_errors=True) as folder:
        state = LoopState(0, 1, Path(folder, "run"), ctx=LogContext(Path(folder), run_key="run"))
        spool = Spool.of(state.output_dir, url)
        with _open_bus(build_callbacks([spec]), Path(folder)) as bus:
            bus.publish(Checkpoint(state, ManifestRow("big", batch=0, state_path=str(checkpoint_file))))
            _wait_until(lambda: any(b'"upload":"' in path.read_bytes() for path in spool.ledger.glob("*.upload")))
            yield bus
            if spool.uploaded():
                raise RuntimeError(f"{BYTES} bytes were uploaded before the block was over: measure with more")
    _abort_all(endpoint)


@contextmanager
def _open_bus(adapters: list[object], folder: Path) -> Generator[EventBus, None, None]:
    """Open a bus on the first core, with its courier process on the others."""
    with other_cores() as cores:
        bus = EventBus(adapters, journal=folder / "journal", drain_timeout=0.0, linger_seconds=0.0)
        with bus:
            pin(cores[:1], threads=True)
            yield bus
        wait_for_courier_exit(folder / "journal")


@contextmanager
def _s3_servers(folder: Path) -> Generator[tuple[str, str], None, None]:
    """Run a server with the bucket and a stalling proxy in front of it; yields the endpoints of both."""
    server = s3_server(folder / "s3")
    os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    with other_cores():
        server.start()
        command = [sys.executable, "-c", _PROXY, str(server.port), str(STALL_SECONDS)]
        proxy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
    try:
        assert proxy.stdout is not None
        stalling = f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        _client(server.endpoint).create_bucket(Bucket=BUCKET)
        yield server.endpoint, stalling
    finally:
        proxy.kill()
        proxy.communicate()
        server.stop()


def _abort_all(endpoint: str) -> None:
    """Abort all unfinished uploads, which no later block continues."""
    client = _client(endpoint)
    for each in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=BUCKET, Key=each["Key"], UploadId=each["UploadId"])


def _client(endpoint: str) -> "botocore.client.BaseClient":  # noqa: F821  # loaded below
    import botocore.session

    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the upload does not start")
        time.sleep(0.01)
