"""Object stores as their callers see them: the folder, and S3 where a server can be run."""

import fcntl
import hashlib
import os
import resource

import anyio
import pytest

from evsys_adapters.checkpoints import (
    ConflictError,
    DamagedError,
    MissingError,
    RefusedError,
    Stored,
    UploadLedger,
    open_store,
)
from evsys_adapters.checkpoints.copying import HashingWriter, partial_of, remove_partials
from evsys_adapters.checkpoints.store import retrying
from evsys_bus import build_callbacks
from evsys_bus.errors import ConfigError, ParkedError, RetryLaterError, WrongParamError
from support.s3_client import create_bucket, unfinished_uploads

pytestmark = pytest.mark.asyncio(loop_factories=["uvloop"])

PART = 1 << 20


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def ledger(tmp_path):
    return UploadLedger(tmp_path / "uploads")


@pytest.fixture(params=["folder", "s3"])
async def store(request, tmp_path, monkeypatch):
    if request.param == "folder":
        store, prefix = open_store((tmp_path / "a store").as_uri())
        assert prefix == ""
    else:
        server = request.getfixturevalue("s3")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
        bucket = create_bucket(server)
        store, prefix = open_store(
            f"s3://{bucket}/team/", endpoint=server.endpoint, region=server.region, part_bytes=PART
        )
        assert prefix == "team/"
    await store.open()
    yield store
    await store.close()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(os.urandom(5 * PART + 17))
    return path


def told():
    seen = []
    return seen, lambda done, size: seen.append((done, size))


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_a_file_comes_back_as_it_was_and_progress_is_told(store, ledger, file, tmp_path):
    seen, tell = told()
    stored = await store.put_file("run-1/a b/ü.pt", file, ledger=ledger, on_progress=tell)
    assert stored == Stored("run-1/a b/ü.pt", 5 * PART + 17, sha256(file.read_bytes()))
    assert seen == sorted(seen)
    assert seen[-1] == (stored.size, stored.size)
    seen.clear()
    got = await store.get_file(stored.key, tmp_path / "back" / "weights.pt", stored=stored, on_progress=tell)
    assert got == stored
    assert seen[-1] == (stored.size, stored.size)
    assert (tmp_path / "back" / "weights.pt").read_bytes() == file.read_bytes()
    assert [each.name for each in (tmp_path / "back").iterdir()] == ["weights.pt"]
    assert not list((tmp_path / "uploads").iterdir())
    assert await store.get_bytes(stored.key) == file.read_bytes()


async def test_files_of_every_size_are_stored(store, ledger, tmp_path):
    for size in (0, 1, PART, PART + 1):
        (tmp_path / "a").write_bytes(os.urandom(size))
        stored = await store.put_file(f"{size}", tmp_path / "a", ledger=ledger)
        assert stored.size == size
        assert await store.get_file(f"{size}", tmp_path / "b") == stored
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


async def test_the_same_content_again_is_done_and_other_content_is_a_conflict(store, ledger, file, tmp_path):
    stored = await store.put_file("k", file, ledger=ledger)
    (tmp_path / "copy").write_bytes(file.read_bytes())
    assert await store.put_file("k", tmp_path / "copy", ledger=ledger) == stored
    for size in (stored.size, 5):
        (tmp_path / "other").write_bytes(os.urandom(size))
        with pytest.raises(ConflictError):
            await store.put_file("k", tmp_path / "other", ledger=ledger)
    assert await store.get_bytes("k") == file.read_bytes()
    assert not list((tmp_path / "uploads").iterdir())


async def test_bytes_are_replaced_only_when_that_is_asked_for(store):
    first = await store.put_bytes("latest", b"step 1")
    assert first == Stored("latest", 6, sha256(b"step 1"))
    assert await store.put_bytes("latest", b"step 1") == first
    with pytest.raises(ConflictError):
        await store.put_bytes("latest", b"step 2")
    await store.put_bytes("latest", b"step 2", replace=True)
    assert await store.get_bytes("latest") == b"step 2"


async def test_names_are_listed_by_prefix_and_what_is_deleted_is_gone(store):
    for key in ("run/b", "run/a", "runs/c", "run/d/e"):
        await store.put_bytes(key, key.encode())
    assert [each.key for each in await store.names("run/")] == ["run/a", "run/b", "run/d/e"]
    assert (await store.names("run/d"))[0].size == 7
    await store.delete("run/a")
    await store.delete("run/a")
    assert [each.key for each in await store.names("run/")] == ["run/b", "run/d/e"]
    assert await store.names("nothing/") == []


async def test_what_is_not_there_is_missing(store, ledger, tmp_path):
    with pytest.raises(MissingError):
        await store.get_bytes("nothing")
    with pytest.raises(MissingError):
        await store.get_file("nothing", tmp_path / "x")
    with pytest.raises(MissingError):
        await store.put_file("k", tmp_path / "nothing", ledger=ledger)
    assert not (tmp_path / "x").exists()


async def test_an_object_that_is_not_what_was_stored_is_damaged_and_the_file_stays(store, tmp_path):
    await store.put_bytes("k", b"what is there")
    (tmp_path / "x").write_bytes(b"an earlier version")
    for wanted in (Stored("k", 13, sha256(b"what was there")), Stored("k", 12), Stored("k", 12, sha256(b"what"))):
        with pytest.raises(DamagedError):
            await store.get_file("k", tmp_path / "x", stored=wanted)
    assert (tmp_path / "x").read_bytes() == b"an earlier version"
    assert not list(tmp_path.glob("*.partial"))


async def test_what_is_no_key_is_refused(store, ledger, file):
    for key in ("", "/a", "a//b", "a/../b", ".", "a/", "x" * 1025):
        with pytest.raises(RefusedError):
            await store.put_bytes(key, b"x")
        with pytest.raises(RefusedError):
            await store.put_file(key, file, ledger=ledger)


async def test_a_probe_leaves_nothing(store):
    await store.probe()
    assert await store.names("") == []


@pytest.mark.long
async def test_an_upload_that_is_cancelled_leaves_nothing_under_the_key_and_goes_on_later(store, ledger, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(9 << 20))
    with anyio.CancelScope() as scope:
        await store.put_file("k", path, ledger=ledger, on_progress=lambda done, _: scope.cancel() if done else None)
    assert scope.cancelled_caught
    assert await store.names("") == []
    assert await store.abort_abandoned("", ledger) == ("folder" in type(store).__name__.lower())
    stored = await store.put_file("k", path, ledger=ledger)
    assert (await store.names("")) == [Stored("k", stored.size)]
    assert await store.get_bytes("k") == path.read_bytes()


async def fetched_in_part(store, stored, path):
    """A fetch that ended when most of it was here; how much that was."""
    seen, tell = told()
    with anyio.CancelScope() as scope:
        await store.get_file(
            stored.key,
            path,
            stored=stored,
            on_progress=lambda done, size: tell(done, size) or (done > 3 * PART and scope.cancel()),
        )
    assert scope.cancelled_caught
    assert not path.exists()
    return seen[-1][0]


async def test_a_fetch_that_ended_goes_on_where_it_was(store, ledger, file, tmp_path):
    stored = await store.put_file("k", file, ledger=ledger)
    path = tmp_path / "back" / ("ü" * 126 + ".pt")
    here = await fetched_in_part(store, stored, path) - 77
    (left,) = path.parent.iterdir()
    os.truncate(left, here)
    seen, tell = told()
    assert await store.get_file("k", path, stored=stored, on_progress=tell) == stored
    assert seen[0] == (here, stored.size)
    assert path.read_bytes() == file.read_bytes()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.long
async def test_what_is_left_of_a_fetch_and_is_wrong_is_fetched_again(store, ledger, file, tmp_path):
    stored = await store.put_file("k", file, ledger=ledger)
    path = tmp_path / "back" / "weights.pt"
    for wrong in (b"torn", bytes(stored.size), os.urandom(6 * PART)):
        await fetched_in_part(store, stored, path)
        (left,) = path.parent.iterdir()
        left.write_bytes(wrong)
        assert await store.get_file("k", path, stored=stored) == stored
        assert path.read_bytes() == file.read_bytes()
        path.unlink()
    assert not list(path.parent.iterdir())


@pytest.mark.long
async def test_two_that_fetch_one_file_at_a_time_do_not_disturb_each_other(store, ledger, file, tmp_path):
    stored = await store.put_file("k", file, ledger=ledger)
    path = tmp_path / "back" / "weights.pt"
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(lambda: store.get_file("k", path, stored=stored))
    assert path.read_bytes() == file.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["weights.pt"]


@pytest.mark.long
@pytest.mark.parametrize("what", ["a directory", "a link"])
async def test_what_is_in_the_way_of_a_copy_is_left_alone(store, ledger, file, tmp_path, what):
    stored = await store.put_file("k", file, ledger=ledger)
    path, precious = tmp_path / "back" / "weights.pt", tmp_path / "precious"
    precious.write_bytes(b"precious")
    path.parent.mkdir()
    way = partial_of(path, stored.sha256)
    if what == "a link":
        way.symlink_to(precious)
    else:
        way.mkdir()
    assert await store.get_file("k", path, stored=stored) == stored
    assert path.read_bytes() == file.read_bytes()
    assert precious.read_bytes() == b"precious"
    assert set(path.parent.iterdir()) == {path, way}
    remove_partials(path.parent)
    assert way.is_symlink() or way.is_dir()


@pytest.mark.long
async def test_what_is_left_of_an_object_without_a_digest_is_not_trusted(store, ledger, file, tmp_path):
    stored = await store.put_file("k", file, ledger=ledger)
    path = tmp_path / "back" / "weights.pt"
    for digest in (stored.sha256, ""):
        path.parent.mkdir(exist_ok=True)
        partial_of(path, digest).write_bytes(bytes(stored.size))
        assert (await store.get_file("k", path)).size == stored.size
        assert path.read_bytes() == file.read_bytes()


async def test_copies_that_are_under_way_are_not_cleared_and_what_is_left_of_others_is(tmp_path):
    left, kept, held, odd = (tmp_path / "deep" / f".w.{digit * 32}.partial" for digit in ("0", "1", "2", "x"))
    (tmp_path / "deep").mkdir()
    for each in (left, kept, held, odd):
        each.touch()
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_partials(tmp_path, {kept})
    assert set((tmp_path / "deep").iterdir()) == {kept, held, odd}


async def test_a_piece_that_was_taken_in_part_is_in_the_copy_once(tmp_path):
    whole = os.urandom(300_000)
    with (tmp_path / "copy").open("w+b") as file:
        copy = HashingWriter(file.fileno(), tmp_path)
        copy.add(whole[:100_000])
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
        try:
            with pytest.raises(RetryLaterError, match="no room in"):
                copy.add(whole[100_000:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        copy.add(whole[100_000:200_000])
        copy.add(whole[200_000:])
        copy.finish()
    assert (tmp_path / "copy").read_bytes() == whole
    assert copy.as_stored("k") == Stored("k", len(whole), sha256(whole))


@pytest.mark.long
async def test_uploads_of_files_that_are_gone_or_changed_are_abandoned(store, ledger, tmp_path):
    for name in ("gone", "changed", "here"):
        path = tmp_path / name
        path.write_bytes(os.urandom(9 << 20))
        with anyio.CancelScope() as scope:
            await store.put_file(
                f"run/{name}", path, ledger=ledger, on_progress=lambda done, _: scope.cancel() if done else 0
            )
        assert scope.cancelled_caught
    (tmp_path / "gone").unlink()
    (tmp_path / "changed").write_bytes(b"x")
    assert await store.abort_abandoned("other/", ledger) == 0
    folder = "folder" in type(store).__name__.lower()
    assert await store.abort_abandoned("run/", ledger) == 2 + folder
    assert await store.abort_abandoned("run/", ledger) == 0
    assert len(list((tmp_path / "uploads").iterdir())) == 1 - folder
    if not folder:
        left = unfinished_uploads(store.where)
        assert [each["Key"] for each in left] == ["run/here"]


async def test_the_folder_says_that_it_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    store, _ = open_store((tmp_path / "file").as_uri())
    with pytest.raises(ParkedError, match="cannot be written"):
        await store.probe()


async def test_a_folder_without_room_says_so_and_takes_the_file_once_there_is_some(tmp_path, ledger, file):
    store, _ = open_store((tmp_path / "a store").as_uri())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PART, before[1]))
    try:
        with pytest.raises(RetryLaterError, match=r"no room in file://.*/a store: File too large; it resumes once"):
            await store.put_file("k", file, ledger=ledger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await store.put_file("k", file, ledger=ledger)
    assert await store.get_bytes("k") == file.read_bytes()
    assert [each.name for each in (tmp_path / "a store").iterdir()] == ["k"]


async def test_what_names_no_store_is_a_config_error():
    for url in ("s3:bucket", "s3://", "/a/path", "gs://bucket/x", "file://host/x", ""):
        with pytest.raises(ConfigError):
            open_store(url)


@pytest.mark.parametrize("kind", ["checkpoint_upload", "checkpoint_prune"])
@pytest.mark.parametrize(
    ("url", "way"),
    [
        ("gs://bucket/x", "s3://bucket/prefix?endpoint=https://storage.googleapis.com, with an HMAC key"),
        ("r2://bucket/x", "s3://bucket/prefix?endpoint=https://ACCOUNT.r2.cloudflarestorage.com"),
        ("https://s3.example.org/bucket", "s3://bucket/prefix?endpoint=https://HOST"),
        ("az://container/x", "mount the container"),
        ("abfs://container@account/x", "mount the container"),
        ("hf://me/repo", "hf upload-large-folder"),
        ("memory://x", "write file:///"),
        ("file://host/x", "write file:///a/folder"),
        ("/a/folder", "with an absolute path"),
        ("s3a://bucket/x", "write s3://bucket/prefix"),
        ("s3://bucket/x?endpont=http://h", "endpoint, region, path_style, profile, and not endpont"),
    ],
)
async def test_a_url_that_names_no_store_says_what_there_is_and_the_way(url, way, kind):
    params = {"url": url} | ({"local": {"keep_last": 1}} if kind == "checkpoint_prune" else {})
    with pytest.raises(WrongParamError) as caught:
        build_callbacks([{"kind": kind, "params": params}])
    assert "s3:// for every store with the S3 API, and file:// for folders" in str(caught.value)
    assert way in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        open_store(url)
    assert way in caught.value.fix


async def test_a_torn_ledger_forgets_a_part_and_an_unreadable_one_the_upload(tmp_path, caplog):
    from evsys_adapters.checkpoints.store import FileIdentity, UploadedPart, UploadPlan

    ledger = UploadLedger(tmp_path / "uploads")
    plan = UploadPlan("here", "k", "/x", FileIdentity(1, 2, 3), upload_id="u")
    assert ledger.find("here", "k") is None
    ledger.begin(plan)
    for number in (1, 2):
        ledger.add_part(plan, UploadedPart(number, "tag"))
    (path,) = (tmp_path / "uploads").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    ledger.add_part(plan, UploadedPart(3, "tag"))
    assert ledger.find("here", "k") == (plan, {1: UploadedPart(1, "tag"), 3: UploadedPart(3, "tag")})
    assert ledger.find("elsewhere", "k") is None
    assert [each.key for each in ledger.uploads_under("here", "")] == ["k"]
    path.write_bytes(whole[:20])
    assert ledger.find("here", "k") is None
    assert "file.damaged" in caplog.text


async def test_the_client_library_is_loaded_at_the_first_request_only(program):
    source = """
        import sys
        from evsys_adapters.checkpoints import open_store
        open_store("s3://bucket/x")
        print("aiobotocore" in sys.modules, "botocore" in sys.modules, "aiohttp" in sys.modules)
    """
    pytest.importorskip("aiobotocore")
    out, _ = program(source).communicate(timeout=20)
    assert out == "False False False\n"


async def test_a_folder_with_links_that_lead_to_nothing_names_the_others(tmp_path):
    store, _ = open_store(tmp_path.as_uri())
    await store.put_bytes("run/good", b"1")
    (tmp_path / "run" / "circle").symlink_to("circle")
    (tmp_path / "run" / "dangling").symlink_to("nowhere")
    (tmp_path / "run" / "through a file").symlink_to("good/below")
    assert [each.key for each in await store.names("run/")] == ["run/good"]


class Busy:
    """A call of a store that fails with these errors, one after the other, and then succeeds."""

    def __init__(self, *errors):
        self.errors = list(errors)

    async def __call__(self):
        if self.errors:
            raise self.errors.pop(0)
        return "stored"


async def test_a_busy_store_is_called_again_after_random_pauses_up_to_a_limit_that_doubles():
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    outages = [RetryLaterError("busy") for _ in range(200)]
    policy = retrying(attempts=201, first_pause_seconds=1.0, max_pause_seconds=8.0).copy(sleep=sleep)
    assert await policy(Busy(*outages)) == "stored"
    assert all(pause <= min(2.0**number, 8.0) for number, pause in enumerate(pauses))
    assert min(pauses) < 1.0, "no pause has a fixed part"
    assert max(pauses) > 7.0, "the whole range is used"
    with pytest.raises(RetryLaterError, match="busy"):
        await retrying(attempts=3).copy(sleep=sleep)(Busy(*outages[:3]))
    with pytest.raises(RefusedError):
        await retrying().copy(sleep=sleep)(Busy(RefusedError("no")))


async def test_a_store_that_asks_for_a_pause_gets_it_or_is_not_called_again():
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    short, long = RetryLaterError("busy", after_seconds=30.0), RetryLaterError("closed", after_seconds=3600.0)
    policy = retrying(max_requested_seconds=60.0).copy(sleep=sleep)
    assert await policy(Busy(short)) == "stored"
    assert pauses == [30.0]
    with pytest.raises(RetryLaterError, match="closed"):
        await policy(Busy(long))
    with pytest.raises(RetryLaterError, match="busy"):
        await retrying().copy(sleep=sleep)(Busy(short))
