"""P8: an upload of 200 MB to a real S3 server on loopback, compared with bare aiobotocore and Amazon's command line.

All send parts of 16 MiB, four concurrently; ours also computes digests, writes the ledger, and checks the object before
and after. The command is a separate process, whose start is part of its time.
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import anyio

from evsys_adapters.checkpoints import UploadLedger, open_store
from evsys_bus.bench.suite import Budget, Row, Table, TargetResult, resident_megabytes, spread_of
from evsys_bus.tasks import run_in_new_loop

BYTES: Final = 200_000_000
PART_BYTES: Final = 16 << 20
CONCURRENT_PARTS: Final = 4
MIN_SHARE: Final = 0.95
MAX_GROWTH_MB: Final = 64
BARE: Final = "bare aiobotocore"
AWS_COMMAND: Final = "aws s3 cp"
OURS: Final = "put_file"
_MAX_ROUNDS: Final = 7
_AWS_CONFIG: Final = f"""
[default]
s3 =
  multipart_chunksize = {PART_BYTES}
  max_concurrent_requests = {CONCURRENT_PARTS}
"""


class Uploads:
    """The suite ``uploads``."""

    name = "uploads"
    promise = "P8: an upload to S3 at 0.95 of the speed of bare aiobotocore and of Amazon's command, in 64 MB"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure the speed, then the memory."""
        if not all(importlib.util.find_spec(each) for each in ("swift", "aiobotocore")):
            yield Table(title="upload of 200 MB", unit="MB/s", rows=[], absent={BARE: "swift, the server, is missing"})
            return
        with tempfile.TemporaryDirectory() as directory:
            server = s3_server(Path(directory, "s3"))
            server.start()
            try:
                seconds, growth = run_in_new_loop(lambda: _measure(server, Path(directory), budget))
            finally:
                server.stop()
        peers = [name for name in (BARE, AWS_COMMAND) if seconds[name]]
        faster = min(peers, key=lambda name: spread_of(seconds[name]).median)
        shares = {name: [a / b for a, b in zip(seconds[faster], seconds[name], strict=True)] for name in (*peers, OURS)}
        share = spread_of(shares[OURS]).median
        yield Table(
            title="upload of 200 MB",
            unit="MB/s",
            rows=[
                Row(
                    name,
                    spread_of([BYTES / 1e6 / each for each in seconds[name]]),
                    None if name == faster else spread_of(shares[name]),
                    ours=name == OURS,
                )
                for name in (*peers, OURS)
            ],
            baseline=faster,
            target_results=[TargetResult(f"at least {MIN_SHARE} of the speed of {faster}", share, share >= MIN_SHARE)],
            absent={} if seconds[AWS_COMMAND] else {AWS_COMMAND: "no aws on the PATH: pip install awscli"},
        )
        yield Table(
            title="memory while it is sent",
            unit="MB",
            rows=[Row(OURS, spread_of([growth, growth]), ours=True)],
            target_results=[TargetResult(f"at most {MAX_GROWTH_MB} MB", growth, growth <= MAX_GROWTH_MB, "MB")],
        )


async def _measure(server: Any, directory: Path, budget: Budget) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of each candidate per round, and the memory growth in MB of our first upload."""
    os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    path = directory / "weights"
    path.write_bytes(b"".join(os.urandom(1 << 20) for _ in range(BYTES // (1 << 20) + 1))[:BYTES])
    ledger = UploadLedger(directory / "uploads")
    store, _ = open_store("s3://uploads", endpoint=server.endpoint, region=server.region, part_bytes=PART_BYTES)
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    config = AioConfig(s3={"addressing_style": "path"})
    async with get_session().create_client(
        "s3", endpoint_url=server.endpoint, region_name=server.region, config=config
    ) as client:
        await client.create_bucket(Bucket="uploads")
        await store.probe()
        candidates: dict[str, Callable[[str], Awaitable[object]]] = {
            OURS: lambda key: store.put_file(key, path, ledger=ledger),
            BARE: lambda key: _upload_bare(client, key, path),
        }
        if shutil.which("aws"):
            candidates[AWS_COMMAND] = lambda key: _upload_by_command(server, key, path)
        seconds: dict[str, list[float]] = {OURS: [], BARE: [], AWS_COMMAND: []}
        names, growth = list(candidates), 0.0
        for turn in range(min(_MAX_ROUNDS, budget.process_rounds)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                with _MemoryPeak() as peak:
                    started = time.perf_counter()
                    await candidates[name]("weights")
                    seconds[name].append(time.perf_counter() - started)
                growth = growth or peak.growth  # of our first upload: memory that others have used is not returned
                await client.delete_object(Bucket="uploads", Key="weights")
    await store.close()
    return seconds, growth


async def _upload_by_command(server: Any, key: str, path: Path) -> None:
    config = path.with_name("aws_config")
    config.write_text(_AWS_CONFIG, encoding="utf-8")
    # Like ours: the server checks digests sent with a part, but not trailing checksums.
    settings = {"AWS_CONFIG_FILE": str(config), "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    command = ["aws", "s3", "cp", str(path), f"s3://uploads/{key}", "--endpoint-url", server.endpoint, "--no-progress"]
    completed = await anyio.run_process(
        [*command, "--region", server.region], env=os.environ | settings, check=False, stderr=subprocess.PIPE
    )
    if completed.returncode:
        raise RuntimeError(f"aws ended with {completed.returncode}: {completed.stderr.decode()}")


async def _upload_bare(client: Any, key: str, path: Path) -> None:
    upload = (await client.create_multipart_upload(Bucket="uploads", Key=key))["UploadId"]
    numbers = iter(range(1, -(-BYTES // PART_BYTES) + 1))
    parts: dict[int, str] = {}

    async def upload_parts() -> None:
        with path.open("rb") as file:
            for number in numbers:
                file.seek((number - 1) * PART_BYTES)
                reply = await client.upload_part(
                    Bucket="uploads", Key=key, UploadId=upload, PartNumber=number, Body=file.read(PART_BYTES)
                )
                parts[number] = reply["ETag"]

    async with anyio.create_task_group() as group:
        for _ in range(CONCURRENT_PARTS):
            group.start_soon(upload_parts)
    listed = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(parts.items())]
    await client.complete_multipart_upload(
        Bucket="uploads", Key=key, UploadId=upload, MultipartUpload={"Parts": listed}
    )


class _MemoryPeak:
    """Measures the largest growth of this process' memory within its block."""

    def __enter__(self) -> Self:
        self.growth = 0.0
        self._before = resident_megabytes() or 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(0.01):
            self.growth = max(self.growth, (resident_megabytes() or 0.0) - self._before)


def s3_server(folder: Path) -> Any:
    """Load the `S3Server` of the tests from its file, because the tests are not a package."""
    path = Path(__file__).parent.parent / "tests" / "support" / "s3_server.py"
    spec = importlib.util.spec_from_file_location("s3_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.S3Server(folder)
