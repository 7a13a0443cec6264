"""P4 with S3: how the upload of a checkpoint affects a training loop, to a stalling bucket and at full speed.

Buses alternate: without adapters, twice per round, to know how much two equal runs differ; and one whose courier
process uploads through a proxy, which first delays every chunk by half a second, and then lets it upload at full speed.
Each measures a block of every kind and length of step, because an upload takes seconds to start; the proxy stalls only
from then on. The trainer runs on the first core; courier, proxy and server share the others. Another table shows how
late the loop wakes while it uploads through that stalling proxy itself, with ``placement: inline``.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Final

import anyio

from benchmarks.uploads import s3_server
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
from evsys_adapters.checkpoints.spool import Spool
from evsys_bus import Checkpoint, EventBus, LogContext, LoopState, ManifestRow, build_callbacks
from evsys_bus.bench.couriers import wait_for_courier_exit
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult, rotate
from evsys_bus.bench.wakeup_latency import (
    MAX_WAKEUP_DELAY_NS,
    NO_ADAPTERS,
    NO_ADAPTERS_AGAIN,
    Block,
    StepKind,
    block_row,
    compare_blocks,
    measure_block,
    other_cores,
    p99,
    pin,
)
from evsys_bus.diagnostics import LOGGER_NAME
from evsys_bus.tasks import run_in_new_loop

STEPS: Final[dict[float, int]] = {0.002: 150, 0.02: 25}
"""Number of steps in a block, by their length in seconds."""
KINDS: Final[tuple[StepKind, ...]] = ("waits", "computes")
STALLED: Final = "an upload to an S3 that stalls 500 ms"
INLINE: Final = "an upload on the loop itself, to that S3"
FULL_SPEED: Final = "an upload at full speed"
"""Has no target, because a training node does not run the S3 server."""
STALL_SECONDS: Final = 0.5
BYTES: Final = 250_000_000
BUCKET: Final = "steps"
_MAX_ROUNDS: Final = 12
_TIMEOUT_SECONDS: Final = 60.0
_PROXY: Final = """
import anyio, sys
from evsys_bus.testing import Fault, fault_proxy

async def main(port):
    async with fault_proxy("127.0.0.1", int(port)) as proxy:
        print(proxy.port, flush=True)
        while delay := await anyio.to_thread.run_sync(sys.stdin.readline):
            await proxy.apply(Fault(delay_seconds=float(delay)))
            print(flush=True)

anyio.run(main, *sys.argv[1:])
"""


class StallingProxy:
    """A proxy in front of the server, in a process of its own.

    Args:
        port: The server's.
    """

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-c", _PROXY, str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603  # ours
        self.endpoint: Final = f"http://127.0.0.1:{int(self._read_line())}"

    @contextmanager
    def stalled(self) -> Generator[None, None, None]:
        """Delay every chunk inside the block."""
        self._set_delay(STALL_SECONDS)
        try:
            yield
        finally:
            self._set_delay(0.0)

    def kill(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _set_delay(self, seconds: float) -> None:
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        self._read_line()  # it is in force

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class UploadSteps:
    """The suite ``upload-steps``."""

    name = "upload-steps"
    promise = "P4: while a checkpoint is uploaded, the training loop's steps take as long as without"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure each kind and length of step."""
        rounds = min(max(budget.process_rounds // 2, 2), _MAX_ROUNDS)  # each takes as long as two of other suites
        if not all(importlib.util.find_spec(each) for each in ("swift", "aiobotocore")):
            yield Table(title="steps", unit="ns", rows=[], absent={STALLED: "swift, the server, is not installed"})
            return
        logging.getLogger(LOGGER_NAME).setLevel(logging.ERROR)  # else it logs the unfinished upload of each bus
        with tempfile.TemporaryDirectory() as folder, _s3_servers(Path(folder)) as (direct, proxy):
            checkpoint_file = Path(folder, "saved")
            checkpoint_file.write_bytes(b"".join(os.urandom(1 << 20) for _ in range(BYTES >> 20)))
            yield from _measure_beside_courier(checkpoint_file, direct, proxy, rounds)
            yield from _measure_inline(checkpoint_file, direct, proxy, rounds)


def _measure_beside_courier(checkpoint_file: Path, direct: str, proxy: StallingProxy, rounds: int) -> Iterator[Table]:
    """Measure how long steps take while the courier process uploads."""
    found: dict[tuple[StepKind, float], dict[str, list[Block]]] = {
        (kind, seconds): {name: [] for name in (NO_ADAPTERS, NO_ADAPTERS_AGAIN, STALLED, FULL_SPEED)}
        for kind in KINDS
        for seconds in STEPS
    }

    def measure_blocks(bus: EventBus, name: str) -> None:
        for (kind, seconds), blocks in found.items():
            blocks[name].append(run_in_new_loop(partial(measure_block, bus, kind, seconds, STEPS[seconds])))

    for turn in range(rounds):
        for name in rotate((NO_ADAPTERS, NO_ADAPTERS_AGAIN, STALLED), turn):
            _print_progress(f"round {turn + 1} of {rounds}: {name}")
            if name == STALLED:
                with _bus_uploading(checkpoint_file, direct, proxy) as bus:
                    with proxy.stalled():
                        measure_blocks(bus, STALLED)
                    _print_progress(f"round {turn + 1} of {rounds}: {FULL_SPEED}")
                    measure_blocks(bus, FULL_SPEED)
            else:
                with tempfile.TemporaryDirectory() as folder, _open_bus([], Path(folder)) as bus:
                    measure_blocks(bus, name)
    for (kind, seconds), blocks in found.items():
        yield Table(
            title=f"steps of {seconds * 1e3:g} ms that {kind.removesuffix('s')}: median, to p99",
            unit="ns",
            rows=[block_row(name, each, ours=name in {STALLED, FULL_SPEED}) for name, each in blocks.items()],
            target_results=compare_blocks(
                blocks[STALLED], blocks[NO_ADAPTERS], blocks[NO_ADAPTERS_AGAIN], f"beside {STALLED}"
            ),
        )


def _measure_inline(checkpoint_file: Path, direct: str, proxy: StallingProxy, rounds: int) -> Iterator[Table]:
    """Measure how late the loop wakes while it uploads itself."""
    found: dict[str, list[dict[float, Block]]] = {NO_ADAPTERS: [], INLINE: []}
    for turn in range(rounds):
        for name in rotate(found, turn):
            _print_progress(f"round {turn + 1} of {rounds}, placement inline: {name}")
            upload_by = proxy if name == INLINE else None
            found[name].append(run_in_new_loop(partial(_measure_while_uploading, upload_by, checkpoint_file)))
            _abort_all(direct)
    for seconds in STEPS:
        wakeup_delays = {
            name: sorted(chain.from_iterable(each[seconds].wakeup_delays for each in blocks))
            for name, blocks in found.items()
        }
        without = p99(wakeup_delays[NO_ADAPTERS]) * 1e9
        extra = p99(wakeup_delays[INLINE]) * 1e9 - without
        promise = (
            f"an upload on the loop itself makes it wake at most 500 µs later at p99 (without: {without / 1e3:,.0f} µs)"
        )
        yield Table(
            title=f"how late waits of {seconds * 1e3:g} ms end: median, to p99",
            unit="ns",
            rows=[
                Row(name, Spread(median(each) * 1e9, median(each) * 1e9, p99(each) * 1e9), ours=name == INLINE)
                for name, each in wakeup_delays.items()
            ],
            target_results=[TargetResult(promise, extra / 1e3, extra <= MAX_WAKEUP_DELAY_NS, "µs")],
        )


async def _measure_while_uploading(upload_by: StallingProxy | None, checkpoint_file: Path) -> dict[float, Block]:
    """Measure blocks of waiting steps on a loop that also uploads through the proxy, if one is given."""
    url = f"s3://{BUCKET}/{time.monotonic_ns()}"
    adapters: list[object] = []
    if upload_by is not None:
        adapter = CheckpointUploadCallback(url, endpoint=upload_by.endpoint, region="us-east-1")
        adapter.placement = "inline"
        adapters = [adapter]
    with tempfile.TemporaryDirectory(dir=checkpoint_file.parent, ignore_cleanup_errors=True) as folder:
        state = LoopState(0, 1, Path(folder, "run"), ctx=LogContext(Path(folder), run_key="run"))
        spool = Spool.of(state.output_dir, url)
        async with EventBus(adapters, journal=Path(folder, "journal"), drain_timeout=0.0) as bus:
            if upload_by is not None:
                bus.publish(Checkpoint(state, ManifestRow("big", batch=0, state_path=str(checkpoint_file))))
                await anyio.to_thread.run_sync(_wait_for_upload, spool)
            with nullcontext() if upload_by is None else upload_by.stalled():
                found = {seconds: await measure_block(bus, "waits", seconds, steps) for seconds, steps in STEPS.items()}
            _check_unfinished(spool)
            return found


@contextmanager
def _bus_uploading(checkpoint_file: Path, direct: str, proxy: StallingProxy) -> Generator[EventBus, None, None]:
    """Open a bus whose courier process uploads through the proxy during the whole block."""
    url = f"s3://{BUCKET}/{time.monotonic_ns()}"
    spec = {"kind": "checkpoint_upload", "params": {"url": url, "endpoint": proxy.endpoint, "region": "us-east-1"}}
    # In the directory of the checkpoint, because hard links cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=checkpoint_file.parent, ignore_cleanup_errors=True) as folder:
        state = LoopState(0, 1, Path(folder, "run"), ctx=LogContext(Path(folder), run_key="run"))
        spool = Spool.of(state.output_dir, url)
        with _open_bus(build_callbacks([spec]), Path(folder)) as bus:
            bus.publish(Checkpoint(state, ManifestRow("big", batch=0, state_path=str(checkpoint_file))))
            _wait_for_upload(spool)
            yield bus
            _check_unfinished(spool)
    _abort_all(direct)


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
def _s3_servers(folder: Path) -> Generator[tuple[str, StallingProxy], None, None]:
    """Run a server with the bucket and a proxy in front of it; yields the server's endpoint and the proxy."""
    server = s3_server(folder / "s3")
    os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    with other_cores():
        server.start()
        proxy = StallingProxy(server.port)
    try:
        _client(server.endpoint).create_bucket(Bucket=BUCKET)
        yield server.endpoint, proxy
    finally:
        proxy.kill()
        server.stop()


def _abort_all(endpoint: str) -> None:
    """Abort all unfinished uploads, which no later block continues."""
    client = _client(endpoint)
    for each in client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ()):
        client.abort_multipart_upload(Bucket=BUCKET, Key=each["Key"], UploadId=each["UploadId"])


def _client(endpoint: str) -> "botocore.client.BaseClient":  # noqa: F821  # loaded below
    import botocore.session

    return botocore.session.get_session().create_client("s3", endpoint_url=endpoint, region_name="us-east-1")


def _wait_for_upload(spool: Spool) -> None:
    """Wait until the upload has started."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not any(b'"upload":"' in path.read_bytes() for path in spool.ledger.glob("*.upload")):
        if time.monotonic() > deadline:
            raise TimeoutError("the upload does not start")
        time.sleep(0.01)


def _check_unfinished(spool: Spool) -> None:
    if spool.uploaded():
        raise RuntimeError(f"{BYTES} bytes were uploaded before the block was over: measure with more")


def _print_progress(text: str) -> None:
    print(f"{UploadSteps.name}: {text}", file=sys.stderr, flush=True)
