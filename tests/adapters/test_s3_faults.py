"""Uploads to S3 while everything breaks: a real server, full, or behind a proxy that breaks its connections.

How a run fares through that is in test_upload_troubles.py, what is killed in test_upload_kills.py.
"""

import os
import random
from contextlib import asynccontextmanager
from http import HTTPStatus

import anyio
import pytest

from evsys_adapters.checkpoints import (
    ConflictError,
    DamagedError,
    MissingError,
    UploadLedger,
    open_store,
)
from evsys_adapters.checkpoints.store import UploadedPart
from evsys_bus.errors import ParkedError, RetryLaterError
from evsys_bus.testing import Fault, fault_proxy, unavailable
from support.s3_client import abort_upload, create_bucket, parse_where, put_object, unfinished_uploads

# Couriers have asyncio's loop; of each kind of fault, one test is run on uvloop as well.
pytestmark = [pytest.mark.asyncio(loop_factories=["asyncio"]), pytest.mark.servers, pytest.mark.long]
on_both_loops = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])

PART = 1 << 17
PARTS = 8
SLACK = 50_000
"""Bytes of heads and of small requests."""


@pytest.fixture
def ledger(tmp_path):
    return UploadLedger(tmp_path / "uploads")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(os.urandom(PARTS * PART - 5))
    return path


@pytest.fixture
def keys(s3, tmp_path, monkeypatch):
    """Where the secret is read from: a file that can be rewritten."""
    path = tmp_path / "credentials"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))

    def write(key=s3.key, secret=s3.secret):
        path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n", encoding="utf-8")

    write()
    return write


@pytest.fixture
async def bucket(s3, keys):
    """The store without anything between it and the server, in a bucket of its own."""
    store = connected(s3, s3.endpoint, create_bucket(s3))
    yield store
    await store.close()


def connected(s3, endpoint, bucket, **settings):
    return open_store(f"s3://{bucket}", endpoint=endpoint, region=s3.region, part_bytes=PART, **settings)[0]


@asynccontextmanager
async def through_proxy(s3, bucket, **settings):
    """A store whose way leads through a proxy that breaks connections."""
    async with fault_proxy("127.0.0.1", s3.port) as proxy:
        name = bucket_name(bucket)
        store = connected(s3, f"http://127.0.0.1:{proxy.port}", name, **settings)
        try:
            yield store, proxy
        finally:
            await store.close()


@asynccontextmanager
async def through_middle(s3, bucket):
    """A store whose way leads through a server that sees whole requests, and may answer them itself."""
    async with s3.behind_proxy() as middle:
        store = connected(s3, middle.endpoint, bucket_name(bucket))
        try:
            yield store, middle
        finally:
            await store.close()


def is_part(request, number=None):
    return request.method == "PUT" and request.query.get("partNumber") in (
        {str(number)} if number else set("123456789")
    )


def completes(request):
    return request.method == "POST" and "uploadId" in request.query


def bucket_name(store):
    return parse_where(store.where)[0]


async def is_whole(bucket, key, file):
    assert await bucket.get_bytes(key) == file.read_bytes()
    assert unfinished_uploads(bucket.where) == []


# -- 29: busy, faulty, asked to wait ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "after"),
    [(HTTPStatus.INTERNAL_SERVER_ERROR, None), (HTTPStatus.SERVICE_UNAVAILABLE, 7), (HTTPStatus.TOO_MANY_REQUESTS, 30)],
)
async def test_a_busy_server_is_asked_later_and_by_its_own_clock(s3, bucket, ledger, file, status, after):
    async with through_proxy(s3, bucket) as (store, proxy):
        await proxy.apply(unavailable(status, retry_after=after))
        with pytest.raises(RetryLaterError, match="busy or faulty") as caught:
            await store.put_file("k", file, ledger=ledger)
        assert caught.value.after_seconds == after
        await proxy.apply(Fault())
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


@on_both_loops
async def test_a_part_that_fails_in_passing_is_sent_again_at_once_and_one_that_must_wait_ends_the_attempt(
    s3, bucket, ledger, file
):
    async with through_middle(s3, bucket) as (store, middle):
        failed = []

        async def slow_down(request, body):
            if is_part(request, 2) and not failed:
                failed.append(request)
                return middle.make_response(503, "SlowDown")
            if is_part(request, 7) and len(failed) < 2:
                failed.append(request)
                return middle.make_response(503, "SlowDown", **{"Retry-After": "9"})
            return None

        middle.on_request = slow_down
        with pytest.raises(RetryLaterError, match="SlowDown") as caught:
            await store.put_file("k", file, ledger=ledger)
        assert caught.value.after_seconds == 9
        middle.requests.clear()
        await store.put_file("k", file, ledger=ledger)
        again = [path for method, path, _ in middle.requests if "partNumber" in path]
        assert 1 <= len(again) <= 2  # the one that failed, and the one that was not begun after it
    await is_whole(bucket, "k", file)


# -- 30, 38: refused --------------------------------------------------------------------------------------------------


async def test_a_wrong_secret_parks_and_the_right_one_is_found_when_it_is_there(s3, bucket, ledger, file, keys):
    keys(secret="wrong")
    store = connected(s3, s3.endpoint, bucket_name(bucket))
    for ask in (store.probe(), store.put_file("k", file, ledger=ledger)):
        with pytest.raises(ParkedError) as caught:
            await ask
        assert "the secret is wrong" in caught.value.what
        assert "key evsy… (from the credentials file" in caught.value.what
        assert "wrong" not in caught.value.fix
        assert s3.secret not in str(caught.value)
    keys()
    await store.put_file("k", file, ledger=ledger)
    await store.close()
    await is_whole(bucket, "k", file)


async def test_a_key_that_is_rotated_in_the_middle_of_an_upload(s3, bucket, ledger, file, keys):
    async with through_middle(s3, bucket) as (store, middle):

        async def refuse_old_key(request, body):
            if request.method != "HEAD":  # whose response has no error code; the store then asks for it
                middle.on_request = None
            return middle.make_response(403, "InvalidAccessKeyId")

        await store.probe()
        keys(secret="not yet valid")
        middle.on_request = refuse_old_key
        for answer in ("InvalidAccessKeyId", "the secret is wrong"):
            with pytest.raises(ParkedError, match=answer):
                await store.put_file("k", file, ledger=ledger)
        keys()
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


async def test_a_missing_permission_a_missing_bucket_and_no_key_at_all_are_told_apart(s3, bucket, keys, tmp_path):
    keys(s3.limited_key, s3.limited_secret)
    store = connected(s3, s3.endpoint, bucket_name(bucket))
    with pytest.raises(ParkedError, match=r"does not let the key .* do PutObject") as caught:
        await store.probe()
    assert caught.value.fix == f"grant it s3:PutObject on '{bucket_name(bucket)}'"
    await store.close()
    keys()
    store = connected(s3, s3.endpoint, "no-such-bucket")
    with pytest.raises(ParkedError, match="there is no bucket 'no-such-bucket'"):
        await store.probe()
    await store.close()
    (tmp_path / "credentials").write_text("")
    store = connected(s3, s3.endpoint, bucket_name(bucket))
    with pytest.raises(ParkedError, match="Unable to locate credentials") as caught:
        await store.probe()
    assert "~/.aws/credentials" in caught.value.fix
    store = connected(s3, s3.endpoint, "bucket", profile="nobody")
    with pytest.raises(ParkedError, match="nobody"):
        await store.probe()


async def test_a_full_bucket_parks_and_goes_on_when_there_is_room(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):

        async def full(request, body):
            return middle.make_response(403, "QuotaExceeded", "1 GB is used") if is_part(request, 4) else None

        middle.on_request = full
        with pytest.raises(ParkedError, match="is full: QuotaExceeded, 1 GB is used"):
            await store.put_file("k", file, ledger=ledger)
        middle.on_request = None
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


async def test_a_server_that_is_away_is_asked_later(s3, bucket, ledger, file):
    async with through_proxy(s3, bucket) as (store, proxy):
        await proxy.apply(Fault(refuse=True))
        for ask in (store.probe(), store.put_file("k", file, ledger=ledger), store.get_bytes("k"), store.names("")):
            with pytest.raises(RetryLaterError, match="cannot be reached"):
                await ask


# -- 31: cut ---------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_resets_at_random_bytes_lose_nothing_and_confirmed_parts_are_not_sent_again(s3, bucket, tmp_path):
    """The long form: ``EVSYS_S3_RESETS=200 uv run pytest tests/adapters/test_s3_faults.py -k random --timeout 900``."""
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    size = 3 * PART + 17
    for number in range(int(os.environ.get("EVSYS_S3_RESETS", "4"))):
        path = tmp_path / f"{number}"
        path.write_bytes(dice.randbytes(size))
        ledger = UploadLedger(tmp_path / f"uploads-{number}")
        whole = number % 4  # parts that are let through; without any, every connection breaks as far on
        done = [0]
        async with through_proxy(s3, bucket, concurrency=1 + number % 3) as (store, proxy):
            await store.probe()
            if not whole:
                await proxy.apply(Fault(reset_request_at=dice.randrange(1, 3 * PART)))

            def told(seen, _, proxy=proxy, done=done, whole=whole):
                done.append(seen)
                if whole and seen >= whole * PART:
                    proxy.fault = Fault(reset_request_at=dice.randrange(1, PART))

            try:
                await store.put_file(path.name, path, ledger=ledger, on_progress=told)
            except RetryLaterError:
                pass
            await proxy.apply(Fault())
            before = proxy.sent
            await store.put_file(path.name, path, ledger=ledger)
            assert proxy.sent - before <= size - max(done) + SLACK, f"seed {seed}, file {number}"
        assert await bucket.get_bytes(path.name) == path.read_bytes(), f"seed {seed}, file {number}"
    assert unfinished_uploads(bucket.where) == []


# -- 34: completed, or so it says -------------------------------------------------------------------------------------


@on_both_loops
@pytest.mark.parametrize("forgets", [False, True])  # a completed upload: Amazon's servers do, this one does not
async def test_a_completion_whose_reply_is_lost_is_found_done_and_nothing_is_sent_again(
    s3, bucket, ledger, file, forgets
):
    async with through_middle(s3, bucket) as (store, middle):

        async def lose(request):
            return completes(request)

        async def forget(request, body):
            return middle.make_response(404, "NoSuchUpload") if forgets and "uploadId" in request.query else None

        middle.should_drop_reply = lose
        with pytest.raises(RetryLaterError, match="cannot be reached"):
            await store.put_file("k", file, ledger=ledger)
        middle.on_request, middle.should_drop_reply = forget, None
        middle.requests.clear()
        await store.put_file("k", file, ledger=ledger)
        assert not [path for _, path, _ in middle.requests if "partNumber" in path]
    assert await bucket.get_bytes("k") == file.read_bytes()


async def test_a_completion_that_says_200_and_means_an_error_is_made_again(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):

        async def fail(request, body):
            return middle.make_response(200, "InternalError", "We failed") if completes(request) else None

        middle.on_request = fail
        with pytest.raises(RetryLaterError, match="InternalError"):
            await store.put_file("k", file, ledger=ledger)
        assert await bucket.names("") == []
        middle.on_request = None
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


async def test_an_upload_that_the_server_forgot_is_begun_again(s3, bucket, ledger, file):
    for when in (5, PARTS):
        with anyio.CancelScope() as scope:
            await bucket.put_file(
                f"k{when}",
                file,
                ledger=ledger,
                on_progress=lambda done, _, w=when: done >= min(w * PART, 7 * PART) and scope.cancel(),
            )
        for each in unfinished_uploads(bucket.where):
            abort_upload(bucket.where, each["Key"], each["UploadId"])
        await bucket.put_file(f"k{when}", file, ledger=ledger)
        await is_whole(bucket, f"k{when}", file)


async def test_a_part_that_only_the_ledger_knows_of_is_sent(s3, bucket, ledger, file):
    with anyio.CancelScope() as scope:
        await bucket.put_file("k", file, ledger=ledger, on_progress=lambda done, _: done > 2 * PART and scope.cancel())
    [plan] = ledger.uploads_under(bucket.where, "")
    ledger.add_part(plan, UploadedPart(PARTS, '"of something else"'))
    await bucket.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


async def test_an_upload_that_is_forgotten_while_it_is_sent_is_begun_again(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):

        async def forget(request, body):
            if is_part(request, 5):
                middle.on_request = None
                abort_upload(bucket.where, "k", request.query["uploadId"])

        middle.on_request = forget
        with pytest.raises(RetryLaterError, match="restarted"):
            await store.put_file("k", file, ledger=ledger)
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


async def test_a_beginning_whose_reply_is_lost_leaves_no_upload_behind(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):

        async def lose(request):
            return request.method == "POST" and "uploads" in request.query

        middle.should_drop_reply = lose
        with pytest.raises(RetryLaterError, match="cannot be reached"):
            await store.put_file("k", file, ledger=ledger)
        assert len(unfinished_uploads(bucket.where)) == 1
        middle.should_drop_reply = None
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


async def test_an_upload_whose_ledger_is_lost_is_ended_when_the_file_is_sent_anew(s3, bucket, ledger, file, tmp_path):
    with anyio.CancelScope() as scope:
        await bucket.put_file("k", file, ledger=ledger, on_progress=lambda done, _: done > 2 * PART and scope.cancel())
    assert len(unfinished_uploads(bucket.where)) == 1
    await bucket.put_file("k", file, ledger=UploadLedger(tmp_path / "elsewhere"))
    await is_whole(bucket, "k", file)
    assert unfinished_uploads(bucket.where) == []


async def test_who_may_not_list_uploads_may_send_files(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):

        async def forbid(request, body):
            listing = request.method == "GET" and "uploads" in request.query
            return middle.make_response(403, "AccessDenied", "no") if listing else None

        middle.on_request = forbid
        await store.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)


# -- 35: wrong bytes --------------------------------------------------------------------------------------------------


@on_both_loops
async def test_bytes_that_change_on_the_way_are_not_taken_and_sent_again(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):
        altered = []

        async def alter(request, body):
            if is_part(request, 3) and len(altered) < 2:
                altered.append(request)
                return bytes([body[0] ^ 1]) + body[1:]
            return None

        middle.on_request = alter
        await store.put_file("k", file, ledger=ledger)
        assert len(altered) == 2
    await is_whole(bucket, "k", file)


async def test_bytes_that_change_in_the_store_are_seen_when_they_are_fetched(s3, bucket, tmp_path):
    data = os.urandom(300_000)
    stored = await bucket.put_bytes("k", data)
    (kept,) = [path for path in s3.data_files() if path.stat().st_size == len(data)]
    kept.write_bytes(data[:1000] + b"?" + data[1001:])
    for wanted in (None, stored):
        with pytest.raises((DamagedError, MissingError)):
            await bucket.get_file("k", tmp_path / "back", stored=wanted)
    assert not (tmp_path / "back").exists()


async def test_a_server_that_checks_no_digests_gets_signed_payloads(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):
        taken = []

        async def take_anything(request, body):
            if "probe" in request.path and request.method == "PUT" and not taken:
                taken.append(request)
                return middle.make_response(200)
            return None

        middle.on_request = take_anything
        await store.put_file("k", file, ledger=ledger)
        signed = [head["X-Amz-Content-Sha256"] for _, path, head in middle.requests if "partNumber" in path]
        assert len(set(signed)) == PARTS
        assert "UNSIGNED-PAYLOAD" not in signed
    await is_whole(bucket, "k", file)


@on_both_loops
async def test_a_download_that_is_cut_goes_on_where_it_ended(s3, bucket, ledger, file, tmp_path):
    os.truncate(file, 5 * PART)
    stored = await bucket.put_file("k", file, ledger=ledger)
    async with through_proxy(s3, bucket) as (store, proxy):
        await proxy.apply(Fault(reset_reply_at=3 * PART))
        assert await store.get_file("k", tmp_path / "back", stored=stored) == stored
        assert proxy.connections >= 2
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


FETCHER = """
    import asyncio, sys
    from pathlib import Path
    from evsys_adapters.checkpoints import open_store

    async def main():
        store, _ = open_store(sys.argv[1], endpoint=sys.argv[2], region="us-east-1")
        await store.get_file("k", Path(sys.argv[3]))

    asyncio.run(main())
"""


async def test_a_download_that_is_killed_goes_on_in_another_process(s3, bucket, tmp_path, program):
    data, back = os.urandom(5 << 20), tmp_path / "back" / "large"
    stored = await bucket.put_bytes("k", data)  # the server holds up an object of many parts
    async with fault_proxy("127.0.0.1", s3.port) as proxy:
        await proxy.apply(Fault(delay_seconds=0.01))
        url = bucket.where.split()[0]
        process = program(FETCHER, url, f"http://127.0.0.1:{proxy.port}", str(back))
        here = 0
        while here < 2 << 20:
            assert process.poll() is None, process.stderr.read()
            await anyio.sleep(0.001)
            here = sum(left.stat().st_size for left in back.parent.glob(".large.*"))
        process.kill()
        process.wait()
    async with through_proxy(s3, bucket) as (store, proxy):
        assert await store.get_file("k", back, stored=stored) == stored
        assert proxy.received < stored.size - here + SLACK
    assert back.read_bytes() == data
    assert [each.name for each in back.parent.iterdir()] == ["large"]


# -- 36, 37: the key exists; the file changes -------------------------------------------------------------------------


async def test_a_key_that_is_taken_while_its_object_is_sent(s3, bucket, ledger, file):
    async with through_middle(s3, bucket) as (store, middle):
        content = [b"someone else's", file.read_bytes()]

        async def take(request, body):
            if completes(request):
                await bucket.put_bytes(request.path.rpartition("/")[2], content.pop(0))

        middle.on_request = take
        with pytest.raises(ConflictError, match=f"has other content: 14 bytes, and not the {PARTS * PART - 5}"):
            await store.put_file("k", file, ledger=ledger)
        assert await bucket.get_bytes("k") == b"someone else's"
        stored = await store.put_file("same", file, ledger=ledger)
        assert stored.size == file.stat().st_size
    assert not list((file.parent / "uploads").iterdir())
    await is_whole(bucket, "same", file)


async def test_an_object_without_a_digest_is_read_to_be_compared(s3, bucket, ledger, file):
    put_object(bucket.where, "k", file.read_bytes())
    await bucket.put_file("k", file, ledger=ledger)
    put_object(bucket.where, "l", os.urandom(file.stat().st_size))
    with pytest.raises(ConflictError):
        await bucket.put_file("l", file, ledger=ledger)


@pytest.mark.parametrize("what", ["deleted", "rewritten", "grown", "cut", "replaced"])
async def test_a_file_that_changes_while_it_is_sent(s3, bucket, ledger, file, what):
    data = file.read_bytes()
    changed = []

    def change(done, _):
        if done < 3 * PART or changed:
            return
        changed.append(what)
        if what == "deleted":
            file.unlink()
        elif what == "rewritten":
            with file.open("r+b") as out:
                out.write(os.urandom(PARTS * PART - 5))
        elif what == "grown":
            with file.open("ab") as out:
                out.write(b"more")
        elif what == "cut":
            os.truncate(file, 4 * PART)
        else:
            (file.parent / "new").write_bytes(os.urandom(5 * PART))
            (file.parent / "new").replace(file)

    await bucket.put_file("k", file, ledger=ledger, on_progress=change)
    assert changed
    assert await bucket.get_bytes("k") == (data if what == "deleted" else file.read_bytes())
    assert unfinished_uploads(bucket.where) == []


async def test_a_file_that_never_rests_is_for_later(s3, bucket, ledger, file):
    def change(done, _):
        with file.open("ab") as out:
            out.write(b"more")

    with pytest.raises(RetryLaterError, match="changes while it is sent"):
        await bucket.put_file("k", file, ledger=ledger, on_progress=change)
    assert await bucket.names("") == []
    assert unfinished_uploads(bucket.where) == []


async def test_a_file_that_changed_between_two_attempts_is_a_new_upload(s3, bucket, ledger, file):
    with anyio.CancelScope() as scope:
        await bucket.put_file("k", file, ledger=ledger, on_progress=lambda done, _: done > 2 * PART and scope.cancel())
    assert len(unfinished_uploads(bucket.where)) == 1
    file.write_bytes(os.urandom(PARTS * PART - 5))
    await bucket.put_file("k", file, ledger=ledger)
    await is_whole(bucket, "k", file)
