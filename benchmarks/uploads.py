"""P8: an upload of 200 MB to a real S3 server on loopback, beside the same parts sent by aiobotocore as it comes.

Both send parts of 16 MiB, four side by side; ours also makes digests, keeps the ledger, asks before and looks after.
"""

import importlib.util
import os
import tempfile
import threading
import time
from collections.abc import Iterator
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
_MOST_TURNS: Final = 7


class Uploads:
    """The question."""

    name = "uploads"
    promise = "P8: an upload to S3 at 0.95 of the speed of bare aiobotocore, in 64 MB"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """The speed, then the memory."""
        if not all(importlib.util.find_spec(each) for each in ("swift", "aiobotocore")):
            absent = {"bare aiobotocore": "swift, the server, is not installed"}
            yield Table(title="upload of 200 MB", unit="MB/s", rows=[], absent=absent)
            return
        with tempfile.TemporaryDirectory() as directory:
            server = _server(Path(directory, "s3"))
            server.start()
            try:
                ours, bare, growth = run_alone(lambda: _measure(server, Path(directory), effort))
            finally:
                server.stop()
        shares = [bare_seconds / our_seconds for our_seconds, bare_seconds in zip(ours, bare, strict=True)]
        share = spread_of(shares).median
        yield Table(
            title="upload of 200 MB",
            unit="MB/s",
            rows=[
                Row("bare aiobotocore", spread_of([BYTES / 1e6 / each for each in bare])),
                Row("put_file", spread_of([BYTES / 1e6 / each for each in ours]), spread_of(shares), ours=True),
            ],
            floor="bare aiobotocore",
            verdicts=[Verdict(f"at least {LEAST_SHARE} of its speed", share, share >= LEAST_SHARE)],
        )
        yield Table(
            title="memory while it is sent",
            unit="MB",
            rows=[Row("put_file", spread_of([growth, growth]), ours=True)],
            verdicts=[Verdict(f"at most {MAX_GROWTH_MB} MB", growth, growth <= MAX_GROWTH_MB, "MB")],
        )


async def _measure(server: Any, directory: Path, effort: Effort) -> tuple[list[float], list[float], float]:
    os.environ |= {"AWS_ACCESS_KEY_ID": server.key, "AWS_SECRET_ACCESS_KEY": server.secret}
    path = directory / "weights"
    path.write_bytes(b"".join(os.urandom(1 << 20) for _ in range(BYTES // (1 << 20) + 1))[:BYTES])
    ledger = UploadLedger(directory / "uploads")
    store, _ = open_store("s3://uploads", endpoint=server.endpoint, region=server.region, part_bytes=PART)
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    config = AioConfig(s3={"addressing_style": "path"})
    ours, bare = list[float](), list[float]()
    async with get_session().create_client(
        "s3", endpoint_url=server.endpoint, region_name=server.region, config=config
    ) as client:
        await client.create_bucket(Bucket="uploads")
        await store.probe()
        growth = 0.0
        for turn in range(min(_MOST_TURNS, effort.process_rounds)):
            with _Peak() as peak:
                began = time.perf_counter()
                await store.put_file(f"ours-{turn}", path, ledger=ledger)
                ours.append(time.perf_counter() - began)
            growth = growth or peak.growth  # of the first: what bare aiobotocore took is not given back
            began = time.perf_counter()
            await _bare(client, f"bare-{turn}", path)
            bare.append(time.perf_counter() - began)
            for key in (f"ours-{turn}", f"bare-{turn}"):
                await client.delete_object(Bucket="uploads", Key=key)
    await store.close()
    return ours, bare, growth


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
    """How much more memory this process held at most than when it was entered."""

    def __enter__(self) -> Self:
        self.growth = 0.0
        self._before = resident_megabytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.01):
            self.growth = max(self.growth, resident_megabytes() - self._before)


def _server(folder: Path) -> Any:
    """The tests' server. Any: it is loaded from its file, as the tests are no package."""
    path = Path(__file__).parent.parent / "tests" / "s3_server.py"
    spec = importlib.util.spec_from_file_location("s3_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.S3Server(folder)
