"""``checkpoint_upload``: what is at the destination, in the spool and on record, after every kind of trouble."""

import asyncio
import hashlib
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from evsys_adapters.checkpoint_upload import CheckpointUploadCallback, UploadSink
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.events import CheckpointConflict, CheckpointUploaded, UploadProgress
from evsys_adapters.checkpoints.manifest import checkpoint_folder, component, safe_relative_path
from evsys_adapters.checkpoints.spool import Spool
from evsys_adapters.checkpoints.store_urls import StoreOptions, StorePool, url_for
from evsys_bus import (
    Checkpoint,
    Envelope,
    EventBus,
    LogContext,
    LoopState,
    ManifestRow,
    RunStart,
    StepEnd,
    TrainingBatch,
)
from evsys_bus.codec import decode, encode
from evsys_bus.config import Registry, build_callbacks
from evsys_bus.errors import BatchTooLargeError, ParkedError, RejectedError, WrongParamError
from evsys_bus.testing import conformance
from support.journals import read_events

pytestmark = pytest.mark.long_on_uvloop  # the order of requests is the store's, not the loop's


class Courier:
    """What a sink is attached to."""

    def __init__(self, sink):
        self.events = []
        self.sink = sink
        sink.evsys_attached = self

    def publish(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


class Upload:
    """Both halves, with a trainer that saves and announces."""

    def __init__(self, folder, url, **params):
        ctx = LogContext(folder / "sweep", run_key="low")
        self.state = LoopState(step=0, num_steps=100, output_dir=folder / "sweep" / "low", ctx=ctx)
        self.inline = CheckpointUploadCallback(url, **params)
        self.courier = Courier(UploadSink(url, **params))
        self.spool = Spool.of(self.state.output_dir, url)
        self.url, self.params = url, params
        self.seq = 0

    def save(self, name="step-000009", batch=9, state=b"state", sampler=b"sampler"):
        """Files as a trainer makes them: new ones each time."""
        paths = []
        for part, content in (("state", state), ("sampler", sampler)):
            path = self.state.output_dir / "checkpoints" / f"{name}.{part}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            paths.append(str(path))
        return ManifestRow(name, batch=batch, state_path=paths[0], sampler_path=paths[1])

    def announce(self, row, hook=True, run="low"):
        """The inline half; and the event as the courier will have it."""
        self.seq += 1
        if hook:
            self.inline.on_checkpoint(self.state, row)
        envelope = Envelope("r0-20260131T120000-aaaaaaaa", self.seq, 0.0, Checkpoint(self.state, row), run=run)
        return decode(encode(envelope))

    async def deliver(self, *envelopes):
        await self.courier.sink.open()
        batch = list(envelopes)
        try:
            while batch:
                done = await self.courier.sink.write(batch)
                batch = batch[len(batch) if done is None else done :]
        finally:
            await self.courier.sink.close()

    async def destination(self):
        places = StorePool(StoreOptions.of(self.inline.config))
        place = await places.get(self.url)
        return Destination(place.store, place.prefix, "low")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.servers)])
def bucket(request, tmp_path):
    """A destination: its URL, and the params that lead there."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket", {}
    name, reach = request.getfixturevalue("s3_bucket")
    return f"s3://{name}/prefix", reach


@pytest.fixture
def upload(tmp_path):
    return Upload(tmp_path, f"file://{tmp_path}/bucket")


async def fetched(upload, folder):
    """The checkpoint as it stands there: name -> content, of its first ten files; each is as its manifest says."""
    destination = await upload.destination()
    manifest = await destination.manifest(folder)
    contents = {}
    for file in manifest.files[:10]:
        contents[file.name] = content = await destination.store.get_bytes(destination.key(folder, file.name))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)
    await destination.store.close()
    return contents


def remove(path):
    Path(path).unlink()


def write_into(path, content):
    """As a trainer should not: the file keeps its inode."""
    with Path(path).open("r+b") as file:
        file.write(content)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


async def test_a_checkpoint_is_uploaded_with_its_manifest_and_latest_names_it(tmp_path, bucket):
    url, params = bucket
    upload = Upload(tmp_path, url, **params)
    await upload.deliver(upload.announce(upload.save()))
    assert await fetched(upload, "step-000009") == {
        "state/step-000009.state": b"state",
        "sampler/step-000009.sampler": b"sampler",
    }
    destination = await upload.destination()
    assert (await destination.latest()).checkpoint == "step-000009"
    [uploaded] = upload.courier.events
    assert (uploaded.run, uploaded.checkpoint, uploaded.files, uploaded.bytes) == ("low", "step-000009", 2, 12)
    assert uploaded.url == f"{url}/low/step-000009"
    assert upload.spool.pending() == []
    await destination.store.close()


async def test_both_halves_call_a_checkpoint_the_same_whatever_its_name(upload):
    row = msgspec.structs.replace(upload.save(), name="\ud800/x")
    envelope = upload.announce(row)
    shutil.rmtree(Path(row.state_path).parent)
    await upload.deliver(envelope)
    assert len(upload.courier.of(CheckpointUploaded)) == 1


async def test_the_trainer_may_remove_its_own_files_as_soon_as_publish_has_returned(upload):
    row = upload.save()
    envelope = upload.announce(row)
    shutil.rmtree(Path(row.state_path).parent)
    await upload.deliver(envelope)
    assert len(await fetched(upload, "step-000009")) == 2


async def test_the_spool_takes_no_room_but_that_of_links(upload):
    row = upload.save()
    upload.announce(row)
    [waiting] = upload.spool.pending()
    assert (waiting.folder / "state/step-000009.state").samefile(row.state_path)


async def test_the_courier_may_be_faster_than_the_hook(upload):
    row = upload.save()
    envelope = upload.announce(row, hook=False)
    await upload.deliver(envelope)
    upload.inline.on_checkpoint(upload.state, row)
    assert len(await fetched(upload, "step-000009")) == 2
    assert [path.name for path in upload.spool.folder.iterdir() if path.is_dir() and path.name != "ledger"] == []


async def test_a_hook_that_comes_late_leaves_nothing_in_the_spool(upload):
    """It had looked for what was done, and made its links while the courier went all the way."""
    row = upload.save()
    await upload.deliver(upload.announce(row))
    [done] = upload.spool.folder.glob("*.done.json")
    await asyncio.to_thread(done.rename, f"{done}.hidden")
    upload.announce(row)
    assert len(upload.spool.pending()) == 1
    await asyncio.to_thread(Path(f"{done}.hidden").rename, done)
    upload.announce(row)
    assert list(upload.spool.folder.glob("*@????????")) == []


async def test_a_manifest_of_another_checkpoint_is_a_conflict(upload, tmp_path):
    await upload.deliver(upload.announce(upload.save()))
    path = tmp_path / "bucket/low/step-000009/manifest.json"
    other = msgspec.json.decode(path.read_bytes())
    other["files"][0]["sha256"] = "0" * 64
    path.write_bytes(msgspec.json.encode(other))
    with pytest.raises(RejectedError, match="manifest of another"):
        await upload.deliver(upload.announce(upload.save()))
    assert len(upload.courier.of(CheckpointConflict)) == 1


async def test_what_a_killed_trainer_left_in_the_spool_is_swept(upload):
    upload.spool.folder.mkdir(parents=True)
    old, new = upload.spool.folder / ".old", upload.spool.folder / ".new"
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (0, 0))
    await upload.deliver(upload.announce(upload.save()))
    assert new.exists()
    assert not old.exists()


async def test_a_repeated_event_changes_nothing(upload):
    row = upload.save()
    await upload.deliver(upload.announce(row))
    before = {name: (upload.spool.folder.parents[3] / "bucket" / name).stat().st_mtime_ns for name in names_of(upload)}
    again = upload.announce(row)
    remove(row.state_path)
    await upload.deliver(again, upload.announce(row, hook=False))
    assert before == {
        name: (upload.spool.folder.parents[3] / "bucket" / name).stat().st_mtime_ns for name in names_of(upload)
    }
    assert len(upload.courier.events) == 1


def names_of(upload):
    return names(upload.url.removeprefix("file://"))


async def test_a_checkpoint_that_is_saved_again_with_the_same_content_is_no_conflict(upload):
    await upload.deliver(upload.announce(upload.save()))
    await upload.deliver(upload.announce(upload.save()))
    assert upload.courier.of(CheckpointConflict) == []


async def test_another_content_under_the_same_name_is_a_conflict_and_a_dead_letter(tmp_path, bucket):
    url, params = bucket
    upload = Upload(tmp_path, url, **params)
    await upload.deliver(upload.announce(upload.save()))
    row = upload.save(state=b"other")
    envelope = upload.announce(row)
    with pytest.raises(RejectedError):
        await upload.deliver(envelope)
    [conflict] = upload.courier.of(CheckpointConflict)
    assert (conflict.run, conflict.checkpoint, conflict.batch) == ("low", "step-000009", 9)
    assert (await fetched(upload, "step-000009"))["state/step-000009.state"] == b"state"
    [kept] = upload.spool.folder.glob("*.refused")
    assert (kept / "state/step-000009.state").read_bytes() == b"other"


async def test_a_rejected_checkpoint_takes_no_other_with_it(upload):
    await upload.deliver(upload.announce(upload.save()))
    batch = [upload.announce(upload.save(state=b"other")), upload.announce(upload.save("step-000019", 19))]
    with pytest.raises(BatchTooLargeError):
        await upload.courier.sink.write(batch)
    with pytest.raises(RejectedError):
        await upload.courier.sink.write(batch[:1])
    assert await upload.courier.sink.write(batch[1:]) == 1
    assert len(upload.courier.of(CheckpointConflict)) == 1
    assert len(await fetched(upload, "step-000019")) == 2


async def test_a_final_checkpoint_of_a_run_that_goes_on_has_a_place_of_its_own(upload):
    await upload.deliver(upload.announce(upload.save("final", 9)))
    await upload.deliver(upload.announce(upload.save("final", 19, state=b"later")))
    assert upload.courier.of(CheckpointConflict) == []
    assert (await fetched(upload, "final-000009"))["state/final.state"] == b"state"
    assert (await fetched(upload, "final-000019"))["state/final.state"] == b"later"
    assert (await (await upload.destination()).latest()).checkpoint == "final-000019"


async def test_latest_never_goes_back_to_an_older_checkpoint(upload):
    old, new = upload.announce(upload.save()), upload.announce(upload.save("step-000019", 19))
    await upload.deliver(new)
    await upload.deliver(old)
    destination = await upload.destination()
    assert (await destination.latest()).checkpoint == "step-000019"
    assert [each.row.name for each in await destination.manifests()] == ["step-000009", "step-000019"]


@pytest.mark.parametrize("what", ["circle", "folder", "torn"])
async def test_a_latest_that_is_no_file_or_torn_is_written_anew_with_the_next_checkpoint(tmp_path, what):
    upload = Upload(tmp_path, (tmp_path / "store").as_uri())
    await upload.deliver(upload.announce(upload.save()))
    (latest,) = tmp_path.rglob("latest.json")
    content = latest.read_bytes()
    latest.unlink()
    if what == "circle":
        latest.symlink_to("latest.json")
    elif what == "folder":
        latest.mkdir()
    else:
        latest.write_bytes(content[:9])
    await upload.deliver(upload.announce(upload.save("step-000019", 19)))
    assert (await (await upload.destination()).latest()).checkpoint == "step-000019"


async def test_latest_follows_a_run_that_was_resumed_from_an_earlier_step(upload):
    await upload.deliver(upload.announce(upload.save("step-000019", 19)))
    envelope = upload.announce(upload.save("step-000014", 14))
    await upload.deliver(msgspec.structs.replace(envelope, stream="r0-20260131T130000-aaaaaaaa", seq=1))
    assert (await (await upload.destination()).latest()).checkpoint == "step-000014"


@pytest.mark.parametrize(
    ("params", "uploaded"),
    [
        ({"checkpoints": "final"}, ["final-000024"]),
        ({"checkpoints": 10}, ["final-000024", "step-000009", "step-000019"]),
        ({"what": "sampler"}, ["final-000024", "step-000004", "step-000009", "step-000014", "step-000019"]),
    ],
)
async def test_what_is_wanted_is_uploaded_and_nothing_else(tmp_path, params, uploaded):
    upload = Upload(tmp_path, f"file://{tmp_path}/bucket", **params)
    rows = [upload.save(f"step-{batch:06d}", batch) for batch in (4, 9, 14, 19)]
    await upload.deliver(*map(upload.announce, [*rows, upload.save("final", 24)]))
    assert sorted(path.name for path in (tmp_path / "bucket/low").glob("*/")) == uploaded
    parts = {path.name for path in (tmp_path / "bucket/low").glob("*/*/")}
    assert parts == ({"sampler"} if "what" in params else {"state", "sampler"})


async def test_what_lies_elsewhere_is_recorded_and_not_uploaded(upload):
    row = msgspec.structs.replace(upload.save(), state_path="tinker://weights/7")
    await upload.deliver(upload.announce(row))
    manifest = await (await upload.destination()).manifest("step-000009")
    assert (manifest.state, manifest.sampler) == ("tinker://weights/7", "sampler/step-000009.sampler")
    assert [file.name for file in manifest.files] == ["sampler/step-000009.sampler"]


@pytest.mark.timeout(60)  # the S3 server of the tests takes 20 ms for each request
@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.long
async def test_a_directory_of_300_files_is_uploaded_as_it_is(tmp_path, bucket):
    url, params = bucket
    upload = Upload(tmp_path, url, **params)
    root = tmp_path / "trained" / "step 9"
    (root / "shards" / "a").mkdir(parents=True)
    for number in range(300):
        (root / ("shards/a" if number % 2 else ".") / f"{number}.bin").write_bytes(b"%d" % number)
    (root / ".hidden").write_bytes(b"h")
    row = ManifestRow("step-000009", batch=9, state_path=str(root))
    envelope = upload.announce(row)
    shutil.rmtree(root)
    await upload.deliver(envelope)
    contents = await fetched(upload, "step-000009")
    assert contents["state/step 9/.hidden"] == b"h"
    assert contents["state/step 9/100.bin"] == b"100"
    destination = await upload.destination()
    manifest = await destination.manifest("step-000009")
    await destination.store.close()
    expected = {
        f"state/step 9/{'shards/a/' if number % 2 else ''}{number}.bin": b"%d" % number for number in range(300)
    }
    expected["state/step 9/.hidden"] = b"h"
    assert {file.name: file.sha256 for file in manifest.files} == {
        name: hashlib.sha256(content).hexdigest() for name, content in expected.items()
    }


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/../b", "..", ".", "", "a\0b", "n" * 300, "C:\\x", "\ud800"]
)
async def test_no_name_leads_out_of_the_prefix(tmp_path, name):
    upload = Upload(tmp_path, f"file://{tmp_path}/bucket/prefix")
    row = msgspec.structs.replace(upload.save(), name=name)
    envelope = upload.announce(row, run=name)
    await upload.deliver(envelope)
    [run] = (tmp_path / "bucket/prefix").iterdir()
    assert names(tmp_path / "bucket") == [
        f"prefix/{run.name}/{each}"
        for each in sorted(["latest.json", *(f"{checkpoint_folder(envelope.event.row)}/{file}" for file in FILES)])
    ]


FILES = ["manifest.json", "sampler/step-000009.sampler", "state/step-000009.state"]


def test_two_names_that_look_alike_in_a_path_are_told_apart():
    assert component("a/b") != component("a-b") == "a-b"
    assert component("x" * 250) != component("x" * 251)


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a//b", "a/../b", ".", "", "a\\b", "C:x", "a\0", "a/" + "n" * 256, "a\n"]
)
def test_no_name_of_a_manifest_leads_out_of_its_folder(name):
    assert safe_relative_path(name) is None


def test_links_in_a_checkpoint_are_followed_and_circles_are_not(upload, tmp_path):
    root = tmp_path / "saved"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "blob").write_bytes(b"blob")
    (root / "model.bin").symlink_to(tmp_path / "blob")
    (root / "sub" / "up").symlink_to(root)
    (root / "same").symlink_to(root / "sub")
    upload.announce(ManifestRow("a", batch=1, state_path=str(root)))
    (tmp_path / "blob").unlink()
    [waiting] = upload.spool.pending()
    assert names(waiting.folder) == ["entry.json", "state/saved/model.bin"]
    assert (waiting.folder / "state/saved/model.bin").read_bytes() == b"blob"


async def test_a_checkpoint_that_was_written_to_again_is_not_passed_off_as_what_was_saved(upload):
    row = upload.save()
    envelope = upload.announce(row)
    write_into(row.state_path, b"STATE and more")
    with pytest.raises(RejectedError, match="was modified"):
        await upload.deliver(envelope)
    destination = await upload.destination()
    assert await destination.manifest("step-000009") is None
    assert await destination.latest() is None


async def test_a_checkpoint_that_was_gone_before_it_could_be_linked_is_a_dead_letter(upload):
    row = upload.save()
    remove(row.state_path)
    with pytest.raises(RejectedError, match="is missing"):
        await upload.deliver(upload.announce(row, hook=False))


async def test_a_crash_after_any_step_is_made_good(upload, tmp_path):
    """Whatever the last run of the courier got done: what it left is what the next one goes on with."""
    bucket = tmp_path / "bucket" / "low"
    whole = upload.announce(upload.save())
    await upload.deliver(whole)
    expected = names(bucket)
    for left in range(len(expected) + 1):
        shutil.rmtree(bucket)
        shutil.rmtree(upload.spool.folder)
        row = upload.save()
        envelope = upload.announce(row)
        await upload.deliver(envelope)
        for path in upload.spool.folder.glob("*.done.json"):
            path.unlink()
        upload.announce(row)
        order = [*(bucket / "step-000009").glob("s*/*"), bucket / "step-000009/manifest.json", bucket / "latest.json"]
        for path in order[left:]:
            path.unlink()
        await upload.deliver(envelope)
        assert names(bucket) == expected
        assert upload.spool.pending() == []
        assert len(upload.spool.uploaded(row)) == 1
        assert len(await fetched(upload, "step-000009")) == 2


async def test_the_spool_is_let_go_only_after_the_manifest_is_there(upload, tmp_path):
    (tmp_path / "bucket/low/step-000009").mkdir(parents=True)
    (tmp_path / "bucket/low/step-000009/manifest.json").write_text("{}")
    with pytest.raises(RejectedError):
        await upload.deliver(upload.announce(upload.save()))
    assert len(list(upload.spool.folder.glob("*.refused/state/*"))) == 1
    assert not (tmp_path / "bucket/low/latest.json").exists()


async def test_an_upload_under_way_says_how_far_it_has_got(tmp_path):
    upload = Upload(tmp_path, f"file://{tmp_path}/bucket", progress_seconds=1e-6)
    await upload.deliver(upload.announce(upload.save(state=b"s" * 100_000)))
    told = upload.courier.of(UploadProgress)
    assert told[-1].done_bytes == told[-1].total_bytes == 100_007
    assert told[-1].eta_seconds == 0
    assert all(each.bytes_per_second > 0 for each in told)


async def test_a_destination_that_cannot_be_written_shows_at_the_start(tmp_path):
    (tmp_path / "bucket").write_text("a file")
    with pytest.raises(ParkedError):
        await UploadSink(f"file://{tmp_path}/bucket").open()


async def test_the_url_may_name_the_experiment(tmp_path):
    upload = Upload(tmp_path, "file://{output_dir}/of-{experiment}")
    await upload.deliver(upload.announce(upload.save()))
    assert (tmp_path / "sweep/of-sweep/low/latest.json").exists()


test_it_keeps_the_rules_for_adapters = conformance(
    lambda folder: CheckpointUploadCallback(f"file://{folder}/bucket"),
    delivery=lambda folder: UploadSink(f"file://{folder}/bucket"),
)


@pytest.mark.parametrize(
    "url", ["file:///archive/{run}", "file://{output_dir}/{run_dir}", "file:///a/{}", "file:///a/{{experiment}}"]
)
@pytest.mark.parametrize("kind", ["checkpoint_upload", "checkpoint_prune"])
def test_a_placeholder_that_means_nothing_is_an_error_that_lists_the_others(kind, url):
    with pytest.raises(WrongParamError, match=r"placeholders are \{experiment\}, \{output_dir\}"):
        build_callbacks([{"kind": kind, "params": {"url": url}}])


def test_a_state_of_any_class_names_the_folder_of_its_experiment(tmp_path):
    root, ctx = str(tmp_path / "sweep"), SimpleNamespace(output_dir=str(tmp_path / "sweep"), run_key=None)
    for handle in (
        SimpleNamespace(output_dir=f"{root}/a", step=1),
        SimpleNamespace(output_dir=f"{root}/a", ctx=ctx),
        SimpleNamespace(output_dir=f"{root}/a", ctx=SimpleNamespace(run_key="a")),
        ctx,
    ):
        assert url_for("file://{output_dir}/of-{experiment}", handle) == f"file://{root}/of-sweep"
    with pytest.raises(ValueError, match="without output_dir names no folder"):
        url_for("file://{output_dir}", SimpleNamespace(step=1))


def test_checkpoints_of_a_state_of_any_class_are_linked_below_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / "model.pt"
    model.write_bytes(b"w")
    callback = CheckpointUploadCallback("file:///archive")
    callback.on_checkpoint(SimpleNamespace(output_dir="~/runs/a"), ManifestRow("a", batch=1, state_path=str(model)))
    [waiting] = Spool.of(tmp_path / "runs/a", "file:///archive").pending()
    assert waiting.entry.row.name == "a"


def test_params_are_checked():
    with pytest.raises(WrongParamError):
        CheckpointUploadCallback("s3://bucket", checkpoints="some")
    with pytest.raises(WrongParamError):
        CheckpointUploadCallback("no url")


def test_what_cannot_be_linked_is_copied_and_that_is_told(upload, tmp_path, caplog):
    other = Path("/dev/shm") / f"evsys-{os.getpid()}"
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    try:
        other.write_bytes(b"far away")
        upload.announce(ManifestRow("a", batch=1, state_path=str(other)))
    finally:
        other.unlink()
    [waiting] = upload.spool.pending()
    assert (waiting.folder / waiting.entry.state).read_bytes() == b"far away"
    assert waiting.changed_files() == []
    assert "checkpoint.copied" in caplog.text


PUBLISH = """
    import signal, sys
    from pathlib import Path
    from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
    from evsys_bus import Checkpoint, EventBus, LogContext, LoopState, ManifestRow, RunStart
    from evsys_bus.config import Registry, build_callbacks

    folder, url, wait = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    registry = Registry(entry_points=lambda: ())
    registry.register("checkpoint_upload")(CheckpointUploadCallback)
    callbacks = build_callbacks([{"kind": "checkpoint_upload", "params": {"url": url}}], registry=registry)
    ctx = LogContext(folder, run_key="low")
    state = LoopState(step=0, num_steps=100, output_dir=folder / "low", ctx=ctx)
    with EventBus(callbacks, journal=folder / "journal", couriers="thread") as bus:
        if wait == "die":
            bus.publish(RunStart(ctx))
            saved = folder / "big"
            bus.publish(Checkpoint(state, ManifestRow("big", batch=9, state_path=str(saved))))
            saved.unlink()
            print("published", flush=True)
            signal.pause()
    print(bus.receipt.deliveries[0], flush=True)
"""


@pytest.mark.long
def test_an_upload_that_was_killed_in_the_middle_is_finished_by_the_next_process(tmp_path, program):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "big").write_bytes(os.urandom(300 << 20))
    digest = hashlib.sha256((folder / "big").read_bytes()).hexdigest()
    url = f"file://{tmp_path}/bucket"
    first = program(PUBLISH, str(folder), url, "die")
    assert first.stdout.readline() == "published\n"
    until = time.monotonic() + 10
    while not list((tmp_path / "bucket/low").rglob("*.partial")):
        assert time.monotonic() < until
        time.sleep(0.001)
    first.kill()
    first.wait()
    assert not list((tmp_path / "bucket").rglob("manifest.json"))
    second = program(PUBLISH, str(folder), url, "finish")
    assert "delivered=2, dead=0, pending=0" in second.communicate(timeout=15)[0]
    manifest = msgspec.json.decode((tmp_path / "bucket/low/big-000009/manifest.json").read_bytes())
    assert [file["sha256"] for file in manifest["files"]] == [digest]
    assert sha256_of(tmp_path / "bucket/low/big-000009/state/big") == digest
    assert not list((tmp_path / "bucket/low").rglob("*.partial"))


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("placement", ["follow", "inline"])
@pytest.mark.asyncio(loop_factories=["asyncio"])  # couriers have loops of their own
@pytest.mark.long
async def test_the_loop_steps_on_while_200_megabytes_go_out_and_the_trainer_removes_its_own(
    tmp_path, bucket, placement
):
    url, params = bucket
    registry = Registry(entry_points=lambda: ())
    registry.register("checkpoint_upload")(CheckpointUploadCallback)
    spec = {"kind": "checkpoint_upload", "params": {"url": url, **params}, "placement": placement}
    ctx = LogContext(tmp_path / "sweep", run_key="low")
    state = LoopState(step=0, num_steps=100, output_dir=tmp_path / "sweep/low", ctx=ctx)
    saved = tmp_path / "sweep/low/big"
    saved.parent.mkdir(parents=True)
    saved.write_bytes(b"".join(bytes([number]) * (1 << 20) for number in range(200)))
    took: list[float] = []
    async with EventBus(build_callbacks([spec], registry=registry), journal=tmp_path / "sweep/journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(Checkpoint(state, ManifestRow("big", batch=9, state_path=str(saved))))
        saved.unlink()
        for number in range(300):
            began = time.perf_counter()
            bus.publish(StepEnd(state, number, TrainingBatch(), {"loss": 1.0}))
            took.append(time.perf_counter() - began)
            await asyncio.sleep(0.001)
    [delivery] = bus.receipt.deliveries
    assert (delivery.recorded, delivery.delivered, delivery.dead, delivery.pending) == (
        303,
        303,
        0,
        0,
    )  # with the end of the run, implied
    assert sorted(took)[-3] < 0.5  # a disk that syncs 200 MB for another test may hold up one
    inline = placement == "inline"
    assert bus.health().couriers == {"checkpoint_upload": "loop" if inline else "process"}
    tasks = bus.receipt.tasks_by_owner.get("checkpoint_upload")
    assert (tasks and (tasks.spawned, tasks.completed)) == ((1, 1) if inline else None)
    [uploaded] = [
        each for each in read_events(tmp_path / "sweep/journal", family="c") if isinstance(each, CheckpointUploaded)
    ]
    assert (uploaded.checkpoint, uploaded.bytes) == ("big-000009", 200 << 20)
    assert Spool.of(state.output_dir, url).pending() == []
