"""`checkpoint_upload` with the dialects of the S3 API that people have; each is replayed by a stand-in.

What a real server does is in test_object_stores.py and test_s3_faults.py.
"""

import os
import threading
from dataclasses import replace

import pytest

from evsys_adapters.checkpoint_prune import CheckpointPrune
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback, UploadSink
from evsys_adapters.checkpoints import ConflictError, RefusedError, UploadLedger, open_store
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.restore import choose_checkpoint, fetch_checkpoint
from evsys_bus import Checkpoint, Envelope, LogContext, LoopState, ManifestRow
from evsys_bus.codec import decode, encode
from evsys_bus.errors import ParkedError, RetryLaterError

pytest.importorskip("aiobotocore")

from support.s3_dialects import DIALECTS, MIN_PART, DialectServer
from support.waiting import wait_until_async

pytestmark = [pytest.mark.asyncio(loop_factories=["asyncio"]), pytest.mark.servers, pytest.mark.long]

PART = MIN_PART
SIZES = {"empty": 0, "one part": PART - 5, "three parts": 2 * PART + 7}
PATIENCE_SECONDS = 15


@pytest.fixture(params=sorted(DIALECTS))
def dialect(request):
    return request.param


@pytest.fixture
def server(request, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    found = request.node.callspec.params.get("dialect", "aws") if hasattr(request.node, "callspec") else "aws"
    server = DialectServer(found)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def store(server):
    store = connected(server)
    yield store
    await store.close()


@pytest.fixture
def ledger(tmp_path):
    return UploadLedger(tmp_path / "uploads")


def connected(server, **settings):
    settings = {"endpoint": server.url, "region": "us-east-1", "part_bytes": PART} | settings
    return open_store("s3://bucket/team", **settings)[0]


def made(path, size):
    path.write_bytes(os.urandom(size))
    return path


async def test_files_of_any_size_are_stored_are_not_sent_again_and_come_back(dialect, store, server, ledger, tmp_path):
    for what, size in SIZES.items():
        file, key = made(tmp_path / "file", size), f"team/{what}"
        stored = await store.put_file(key, file, ledger=ledger)
        assert server.objects[key][0] == file.read_bytes()
        assert server.uploads == {}
        sent = server.count("put_object", "upload_part")
        assert await store.put_file(key, file, ledger=ledger) == stored
        assert server.count("put_object", "upload_part") == sent
        assert await store.get_file(key, tmp_path / "back", stored=stored) == stored
        assert (tmp_path / "back").read_bytes() == file.read_bytes()


async def test_another_content_under_a_key_is_a_conflict_and_stays(dialect, store, server, ledger, tmp_path):
    await store.put_bytes("team/k", b"what is there")
    for size in SIZES.values():
        with pytest.raises(ConflictError):
            await store.put_file("team/k", made(tmp_path / "file", size), ledger=ledger)
        with pytest.raises(ConflictError):
            await store.put_bytes("team/k", b"something else")
        assert server.objects["team/k"][0] == b"what is there"
        assert server.uploads == {}


def part_headers(server):
    """The headers of each request that sent a part."""
    requests = zip(server.requests, server.headers, strict=True)
    return [headers for (operation, _), headers in requests if operation == "upload_part"]


async def test_bodies_are_protected_by_a_digest_or_a_signature(dialect, server, ledger, tmp_path):
    store = connected(server)
    await store.put_file("team/k", made(tmp_path / "file", SIZES["three parts"]), ledger=ledger)
    await store.close()
    checked = DIALECTS[dialect].digests not in {"ignored", (400, "InvalidArgument")}
    parts = part_headers(server)
    assert len(parts) >= 3
    assert all(("x-amz-checksum-sha256" in headers) == checked for headers in parts)
    if not checked:
        assert all(len(headers["x-amz-content-sha256"]) == 64 for headers in parts)
    assert not any("x-amz-trailer" in headers for headers in server.headers)


SEND = """
    import asyncio, sys
    from pathlib import Path
    from evsys_adapters.checkpoints import UploadLedger, open_store

    async def main(endpoint, part, file, ledger):
        settings = {"endpoint": endpoint, "region": "us-east-1", "part_bytes": int(part), "concurrency": 1}
        store, _ = open_store("s3://bucket/team", **settings)
        await store.put_file("team/k", Path(file), ledger=UploadLedger(Path(ledger)))

    asyncio.run(main(*sys.argv[1:]))
"""


async def test_parts_that_were_confirmed_before_a_kill_are_not_sent_again(dialect, server, tmp_path, program):
    file, ledger = made(tmp_path / "file", SIZES["three parts"]), tmp_path / "uploads"
    ledger.mkdir()
    arrived, released = threading.Event(), threading.Event()

    def hold(operation, key):
        if operation == "upload_part" and server.count("upload_part") == 2:
            arrived.set()
            released.wait(PATIENCE_SECONDS)

    server.on_request = hold
    process = program(SEND, server.url, str(PART), str(file), str(ledger))
    await wait_until_async(arrived.is_set, PATIENCE_SECONDS)
    process.kill()
    process.wait()
    server.on_request = None
    released.set()
    before = len(server.requests)
    store = connected(server)
    await store.put_file("team/k", file, ledger=UploadLedger(ledger))
    await store.close()
    assert server.objects["team/k"][0] == file.read_bytes()
    assert server.uploads == {}
    assert [operation for operation, _ in server.requests[before:]].count("upload_part") == 2


class Run:
    """A run with `checkpoint_upload`, whose events go to its sink as couriers hand them over."""

    def __init__(self, folder, server):
        self.folder = folder / "sweep" / "low"
        self.folder.mkdir(parents=True)
        ctx = LogContext(folder / "sweep", run_key="low")
        self.state = LoopState(step=0, num_steps=100, output_dir=self.folder, ctx=ctx)
        self.params = {"endpoint": server.url, "region": "us-east-1"}
        self.hook = CheckpointUploadCallback("s3://bucket/team", **self.params)
        self.upload = self.attach(UploadSink("s3://bucket/team", **self.params))
        self.envelopes = []

    def attach(self, sink):
        sink.evsys_attached = self
        return sink

    def publish(self, event):
        pass

    def save(self, batch, files):
        saved = self.folder / f"step-{batch}"
        saved.mkdir()
        for name, content in files.items():
            (saved / name).write_bytes(content)
        row = ManifestRow(f"step-{batch}", batch=batch, state_path=str(saved))
        self.hook.on_checkpoint(self.state, row)
        stream = "r0-20260131T120000-aaaaaaaa"
        envelope = Envelope(stream, len(self.envelopes) + 1, 0.0, Checkpoint(self.state, row), run="low")
        self.envelopes.append(decode(encode(envelope)))
        return self.envelopes[-1:]


@pytest.fixture
def run(server, tmp_path):
    return Run(tmp_path, server)


async def test_checkpoints_are_uploaded_pruned_and_fetched(dialect, server, run, tmp_path):
    for batch in (9, 19, 29):
        await run.upload.write(run.save(batch, {"weights": b"%d" % batch, "empty": b"", "more": os.urandom(1000)}))
    prune = run.attach(CheckpointPrune(url="s3://bucket/team", remote={"keep_last": 1}, **run.params))
    await prune.write(run.envelopes)
    assert {key.split("/")[2] for key in server.objects} == {"latest.json", "step-29"}
    store = connected(server)
    destination = Destination(store, "team/", "low")
    await fetch_checkpoint(destination, await choose_checkpoint(destination, None), tmp_path / "back")
    [weights] = (tmp_path / "back").rglob("weights")
    assert weights.read_bytes() == b"29"
    for each in (store, run.upload, prune):
        await each.close()


async def test_every_page_of_a_listing_is_read(dialect, store, server):
    keys = [f"team/low/{number:03d} ü+&" for number in range(11)]
    for key in keys:
        server.objects[key] = b"-", {}, '"tag"'
    assert [each.key for each in await store.names("team/low/")] == keys
    assert await store.names("team/none/") == []


async def test_what_is_weaker_is_logged_once(dialect, server, caplog):
    store = connected(server)
    for _ in range(2):
        await store.probe()
    await store.close()
    logged = [record.getMessage() for record in caplog.records if "store_limits" in record.getMessage()]
    assert len(logged) == (dialect in {"b2", "ceph", "gcs"})
    assert server.objects == {}


@pytest.mark.parametrize("status", [400, 403, 415, 500, 501, 503])
async def test_a_store_that_refuses_digests_in_any_way_gets_signed_bodies(server, store, ledger, tmp_path, status):
    server.dialect = replace(server.dialect, digests=(status, "NotImplemented" if status != 503 else "Odd"))
    file = made(tmp_path / "file", SIZES["three parts"])
    await store.put_file("team/k", file, ledger=ledger)
    assert server.objects["team/k"][0] == file.read_bytes()
    parts = part_headers(server)
    assert len(parts) >= 3
    assert all("x-amz-checksum-sha256" not in headers for headers in parts)
    assert all(len(headers["x-amz-content-sha256"]) == 64 for headers in parts)  # the digest that was signed


@pytest.mark.parametrize("answer", [(404, "NoSuchKey"), (405, "MethodNotAllowed"), (500, "NotImplemented")])
async def test_a_store_that_refuses_conditions_in_any_way_is_asked_before_a_write(server, store, tmp_path, answer):
    server.dialect = replace(server.dialect, create=answer, replace=answer)
    await store.put_bytes("team/k", b"one")
    with pytest.raises(ConflictError):
        await store.put_bytes("team/k", b"two")
    assert not await store.change_bytes("team/latest", lambda _: b"new")
    assert server.objects["team/latest"][0] == b"new"


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "denied",
    [
        {"delete_object"},
        {"list_objects"},
        {"list_uploads", "abort_upload", "list_parts"},
        {"delete_object", "list_objects", "list_uploads", "abort_upload", "list_parts"},
    ],
    ids=sorted,
)
async def test_a_key_with_few_permissions_uploads_checkpoints(dialect, server, run, denied):
    server.denied = denied
    for batch in (9, 19):
        await run.upload.write(run.save(batch, {"weights": b"%d" % batch}))
    await run.upload.close()
    assert {"team/low/step-9/manifest.json", "team/low/step-19/manifest.json", "team/low/latest.json"} <= set(
        server.objects
    )
    assert b"step-19" in server.objects["team/low/latest.json"][0]


async def test_an_upload_that_may_not_be_aborted_does_not_stop_the_next_one(server, store, ledger, tmp_path, caplog):
    file = made(tmp_path / "file", SIZES["three parts"])
    server.on_request = lambda operation, key: (500, "InternalError") if operation == "complete_upload" else None
    with pytest.raises(RetryLaterError):
        await store.put_file("team/k", file, ledger=ledger)
    server.on_request = None
    server.denied = {"list_uploads", "abort_upload"}
    made(file, SIZES["three parts"])
    await store.put_file("team/k", file, ledger=ledger)
    assert server.objects["team/k"][0] == file.read_bytes()
    assert "s3:AbortMultipartUpload" in caplog.text


@pytest.mark.parametrize(("denied", "fix"), [("put_object", "s3:PutObject"), ("head_object", "s3:GetObject")])
async def test_a_permission_that_is_needed_is_named_at_the_start(server, store, denied, fix):
    server.denied = {denied}
    with pytest.raises(ParkedError) as caught:
        await store.probe()
    assert fix in caught.value.fix


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [(503, "SlowDown"), (500, "InternalError"), (400, "RequestTimeout"), (429, "TooManyRequests"), (503, "None")],
)
async def test_what_passes_is_for_later(server, store, ledger, tmp_path, refusal):
    file = made(tmp_path / "file", SIZES["one part"])
    await store.probe()
    server.on_request = lambda operation, key: refusal if operation == "put_object" else None
    with pytest.raises(RetryLaterError):
        await store.put_file("team/k", file, ledger=ledger)
    server.on_request = None
    await store.put_file("team/k", file, ledger=ledger)


async def test_a_clock_that_is_wrong_is_named_with_the_fix(server, store):
    server.on_request = lambda operation, key: (403, "RequestTimeTooSkewed")
    with pytest.raises(ParkedError, match="clock") as caught:
        await store.probe()
    assert "set the clock" in caught.value.fix


async def test_parts_that_are_too_small_are_refused_with_the_fix(server, ledger, tmp_path):
    store = connected(server, part_bytes=PART - 1)
    with pytest.raises(RefusedError, match="EntityTooSmall") as caught:
        await store.put_file("team/k", made(tmp_path / "file", 3 * PART), ledger=ledger)
    assert "part_bytes" in caught.value.fix
    await store.close()


async def test_an_upload_that_was_aborted_by_somebody_is_begun_again(dialect, server, store, ledger, tmp_path):
    file = made(tmp_path / "file", SIZES["three parts"])
    server.on_request = lambda operation, key: (500, "InternalError") if operation == "complete_upload" else None
    with pytest.raises(RetryLaterError):
        await store.put_file("team/k", file, ledger=ledger)
    server.uploads.clear()
    server.on_request = None
    await store.put_file("team/k", file, ledger=ledger)
    assert server.objects["team/k"][0] == file.read_bytes()


async def test_a_region_that_is_not_the_buckets_is_found_by_the_redirect(server, ledger, tmp_path):
    store = connected(server, region=None)
    file = made(tmp_path / "file", SIZES["three parts"])
    await store.put_file("team/k", file, ledger=ledger)
    assert server.objects["team/k"][0] == file.read_bytes()
    await store.close()


async def test_the_bucket_may_be_part_of_the_host_name(server, monkeypatch, ledger, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", server.url)  # so that no name has to be resolved
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    store = connected(server, endpoint="http://s3.example.test", path_style=False)
    await store.put_file("team/k", made(tmp_path / "file", 10), ledger=ledger)
    await store.close()
    assert "team/k" in server.objects
    assert {headers["host"] for headers in server.headers} == {"bucket.s3.example.test"}


async def test_a_url_may_name_the_endpoint_and_the_region(server, ledger, tmp_path):
    url = f"s3://bucket/team?endpoint={server.url}&region=eu-central-1&path_style=true"
    store, prefix = open_store(url, endpoint="http://127.0.0.1:1")
    assert prefix == "team/"
    await store.put_file("team/k", made(tmp_path / "file", 10), ledger=ledger)
    await store.close()
    assert "team/k" in server.objects
    assert {headers["authorization"].split("/")[2] for headers in server.headers} == {"eu-central-1"}


async def test_a_part_whose_confirmation_is_not_listed_is_not_sent_again(server, store, ledger, tmp_path):
    file = made(tmp_path / "file", SIZES["three parts"])
    server.on_request = lambda operation, key: (500, "InternalError") if operation == "complete_upload" else None
    with pytest.raises(RetryLaterError):
        await store.put_file("team/k", file, ledger=ledger)
    server.on_request = lambda operation, key: (501, "NotImplemented") if operation == "list_parts" else None
    await store.put_file("team/k", file, ledger=ledger)
    assert server.count("upload_part") == 3
    assert server.objects["team/k"][0] == file.read_bytes()


async def test_403_is_a_wrong_clock_if_the_servers_time_is_far_away(server, store, monkeypatch):
    await store.probe()
    server.denied = {"head_object"}
    server.date = "Thu, 01 Jan 2026 00:00:00 GMT"
    with pytest.raises(ParkedError, match="clock is .* ahead"):
        await store.get_file("team/k", None)
