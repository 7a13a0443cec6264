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
from evsys_bus.bench.growth import resident_megabytes
from evsys_bus.bench.harness import spread_of
from evsys_bus.bench.question import Effort, Row, Table, Verdict
from evsys_bus.tasks import run_alone

BYTES: Final = 200_000_000
PART: Final = 16 << 20
SIDE_BY_SIDE: Final = 4
LEAST_SHARE: Final = 0.95
MAX_GROWTH_MB: Final = 64
BARE: Final = "bare aiobotocore"
COMMAND: Final = "aws s3 cp"
OURS: Final = "put_file"
_MOST_TURNS: Final = 7
_AWS_CONFIG: Final = f"""
[default]
s3 =
  multipart_chunksize = {PART}
  max_concurrent_requests = {SIDE_BY_SIDE}
"""


class Uploads:
    """The suite ``uploads``."""

    name = "uploads"
    promise = "P8: an upload to S3 at 0.95 of the speed of bare aiobotocore and of Amazon's command, in 64 MB"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure the speed, then the memory."""
        if not all(importlib.util.find_spec(each) for each in ("swift", "aiobotocore")):
            yield Table(title="upload of 200 MB", unit="MB/s", rows=[], absent={BARE: "swift, the server, is missing"})
            return
        with tempfile.TemporaryDirectory() as directory:
            server = s3_server(Path(directory, "s3"))
            server.start()
            try:
                seconds, growth = run_alone(lambda: _measure(server, Path(directory), effort))
            finally:
                server.stop()
        peers = [name for name in (BARE, COMMAND) if seconds[name]]
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
            floor=faster,
            verdicts=[Verdict(f"at least {LEAST_SHARE} of the speed of {faster}", share, share >= LEAST_SHARE)],
            absent={} if seconds[COMMAND] else {COMMAND: "no aws on the PATH: pip install awscli"},
        )
        yield Table(
            title="memory while it is sent",
            unit="MB",
            rows=[Row(OURS, spread_of([growth, growth]), ours=True)],
            verdicts=[Verdict(f"at most {MAX_GROWTH_MB} MB", growth, growth <= MAX_GROWTH_MB, "MB")],
        )


async def _measure(server: Any, directory: Path, effort: Effort) -> tuple[dict[str, list[float]], float]:
    """Return the seconds of each candidate per round, and the memory growth in MB of our first upload."""
    os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    path = directory / "weights"
    path.write_bytes(b"".join(os.urandom(1 << 20) for _ in range(BYTES // (1 << 20) + 1))[:BYTES])
    ledger = UploadLedger(directory / "uploads")
    store, _ = open_store("s3://uploads", endpoint=server.endpoint, region=server.region, part_bytes=PART)
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    config = AioConfig(s3={"addressing_style": "path"})
    async with get_session().create_client(
        "s3", endpoint_url=server.endpoint, region_name=server.region, config=config
    ) as client:
        await client.create_bucket(Bucket="uploads")
        await store.probe()
        contenders: dict[str, Callable[[str], Awaitable[object]]] = {
            OURS: lambda key: store.put_file(key, path, ledger=ledger),
            BARE: lambda key: _bare(client, key, path),
        }
        if shutil.which("aws"):
            contenders[COMMAND] = lambda key: _command(server, key, path)
        seconds: dict[str, list[float]] = {OURS: [], BARE: [], COMMAND: []}
        names, growth = list(contenders), 0.0
        for turn in range(min(_MOST_TURNS, effort.process_rounds)):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                with _Peak() as peak:
                    began = time.perf_counter()
                    await contenders[name]("weights")
                    seconds[name].append(time.perf_counter() - began)
                growth = growth or peak.growth  # of our first upload: memory that others have used is not returned
                await client.delete_object(Bucket="uploads", Key="weights")
    await store.close()
    return seconds, growth


async def _command(server: Any, key: str, path: Path) -> None:
    config = path.with_name("aws_config")
    config.write_text(_AWS_CONFIG, encoding="utf-8")
    # Like ours: the server checks digests sent with a part, but not trailing checksums.
    settings = {"AWS_CONFIG_FILE": str(config), "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
    command = ["aws", "s3", "cp", str(path), f"s3://uploads/{key}", "--endpoint-url", server.endpoint, "--no-progress"]
    done = await anyio.run_process(
        [*command, "--region", server.region], env=os.environ | settings, check=False, stderr=subprocess.PIPE
    )
    if done.returncode:
        raise RuntimeError(f"aws ended with {done.returncode}: {done.stderr.decode()}")


async def _bare(client: Any, key: str, path: Path) -> None:
    upload = (await client.create_multipart_upload(Bucket="uploads", Key=key))["UploadId"]
    numbers = iter(range(1, -(-BYTES // PART) + 1))
    parts: dict[int, str] = {}

    async def work() -> None:
        with path.open("rb") as file:
            for number in numbers:
                file.seek((number - 1) * PART)
                reply = await client.upload_part(
                    Bucket="uploads", Key=key, UploadId=upload, PartNumber=number, Body=file.read(PART)
                )
                parts[number] = reply["ETag"]

    async with anyio.create_task_group() as group:
        for _ in range(SIDE_BY_SIDE):
            group.start_soon(work)
    listed = [{"PartNumber": number, "ETag": tag} for number, tag in sorted(parts.items())]
    await client.complete_multipart_upload(
        Bucket="uploads", Key=key, UploadId=upload, MultipartUpload={"Parts": listed}
    )


class _Peak:
    """Measures the largest growth of this process' memory within its block."""

    def __enter__(self) -> Self:
        self.growth = 0.0
        self._before = resident_megabytes() or 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
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
