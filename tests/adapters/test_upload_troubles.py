"""Whatever S3 says, or does not say: the loop steps on, the state names the trouble, and the checkpoint is whole after.

The bus is real, with the courier on a thread; the server is real, behind one that sees whole requests and may answer
them itself. Each trouble is taken back once the courier has told of it.
"""

import asyncio
import os
import resource
import time
from contextlib import asynccontextmanager
from random import Random

import anyio
import msgspec
import pytest

from evsys_adapters.checkpoint_upload import CheckpointUploadCallback, UploadSink
from evsys_adapters.checkpoints import UploadLedger, open_store
from evsys_adapters.checkpoints.events import CheckpointConflict, CheckpointUploaded
from evsys_adapters.checkpoints.spool import Spool
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
from evsys_bus.config import Registry, build_callbacks
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.sink_receiver import SinkReceiver
from evsys_bus.errors import RetryLaterError
from support.journals import read_events
from support.s3_client import create_bucket, unfinished_uploads

pytestmark = [pytest.mark.asyncio(loop_factories=["asyncio"]), pytest.mark.servers, pytest.mark.long]

NAME = "checkpoint_upload"
PART = 5 << 20
PARTS = 2
SIZE = PART + 17
PATIENCE_SECONDS = 8.0


class Scene:
    """A run with one checkpoint of `SIZE` bytes, which is uploaded through a `InterceptingProxy`."""

    def __init__(self, folder, middle, store, bucket):
        self.folder, self.middle, self.store, self.bucket = folder, middle, store, bucket
        ctx = LogContext(folder / "sweep", run_key="low")
        self.state = LoopState(step=0, num_steps=100, output_dir=folder / "sweep" / "low", ctx=ctx)
        self.saved = folder / "sweep" / "low" / "saved"
        self.saved.parent.mkdir(parents=True)
        self.content = os.urandom(SIZE)
        self.saved.write_bytes(self.content)
        self.journal = folder / "journal"
        self.longest = 0.0
        self.steps = 0

    def spec(self, **params):
        params = {"url": f"s3://{self.bucket}/runs", "endpoint": self.middle.endpoint, **params}
        return {"kind": NAME, "params": {"region": "us-east-1", "part_bytes": PART, **params}}

    @asynccontextmanager
    async def bus(self, **params):
        registry = Registry(entry_points=lambda: ())
        registry.register(NAME)(CheckpointUploadCallback)
        adapters = build_callbacks([self.spec(**params)], registry=registry)
        bus = EventBus(adapters, journal=self.journal, couriers="thread", drain_timeout=PATIENCE_SECONDS)
        async with bus:
            yield bus

    async def train(self, bus, seen, *, announce=True):
        """Announce the checkpoint, and step on until this is seen."""
        bus.publish(RunStart(self.state.ctx))
        if announce:
            bus.publish(Checkpoint(self.state, ManifestRow("big", batch=9, state_path=str(self.saved))))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not seen():
                began = time.perf_counter()
                bus.publish(StepEnd(self.state, self.steps, TrainingBatch(), {"loss": 1.0}))
                self.longest = max(self.longest, time.perf_counter() - began)
                self.steps += 1
                await asyncio.sleep(0.002)
        assert self.longest < 0.5

    def account(self):
        [account] = read_progress(self.journal)
        return account

    def states(self, text):
        """Whether that is what the courier last said of its trouble."""
        return lambda: text in (self.account().last_error or "")

    def learnt(self, kind):
        return [event for event in read_events(self.journal, family="c") if isinstance(event, kind)]

    def dead_letter(self):
        return (self.journal / "couriers" / f"{NAME}.dead.jsonl").read_text()

    async def is_whole(self):
        """Everything was delivered, once, and nothing half done is left."""
        account = self.account()
        assert (account.recorded, account.dead, account.pending) == (account.delivered, 0, 0)
        assert await self.store.get_bytes("runs/low/big-000009/state/saved") == self.content
        assert msgspec.json.decode(await self.store.get_bytes("runs/low/latest.json"))["checkpoint"] == "big-000009"
        assert unfinished_uploads(self.store.where) == []
        assert len(self.learnt(CheckpointUploaded)) == 1
        assert Spool.of(self.state.output_dir, f"s3://{self.bucket}/runs").pending() == []


@pytest.fixture
def staged(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)

    @asynccontextmanager
    async def staged():
        bucket = create_bucket(s3)
        reach = {"endpoint": s3.endpoint, "region": s3.region, "part_bytes": PART, "concurrency": 1}
        store, _ = open_store(f"s3://{bucket}", **reach)
        async with s3.behind_proxy() as middle:
            try:
                yield Scene(tmp_path, middle, store, bucket)
            finally:
                await store.close()

    return staged


def puts_object(request):
    return request.method == "PUT" and "probe" not in request.path


def is_part(request):
    return request.method == "PUT" and "partNumber" in request.query


def completes(request):
    return request.method == "POST" and "uploadId" in request.query


def answers(when, *words, **head):
    """Refuse such requests."""

    def plant(middle):
        async def on(request, body):
            return middle.make_response(*words, **head) if when(request) else None

        middle.on_request = on

    return plant


def loses(when):
    """Do such requests, and lose the replies."""

    def plant(middle):
        async def after(request):
            return when(request)

        middle.should_drop_reply = after

    return plant


def alters(when):
    """Have another byte arrive."""

    def plant(middle):
        async def on(request, body):
            return bytes([body[0] ^ 1]) + body[1:] if when(request) else None

        middle.on_request = on

    return plant


PASSING = {
    "503": (answers(is_part, 503, "SlowDown"), "busy or faulty: UploadPart got SlowDown, status 503"),
    "429, Retry-After": (
        answers(is_part, 429, "TooManyRequests", **{"Retry-After": "1"}),
        "busy or faulty: UploadPart got TooManyRequests, status 429",
    ),
    "completion fails with 200": (
        answers(completes, 200, "InternalError"),
        "busy or faulty: CompleteMultipartUpload got InternalError",
    ),
    "manifest's reply lost": (loses(lambda request: "manifest" in request.path), "cannot be reached"),
    "manifest lost": (
        answers(lambda request: request.method == "GET" and "manifest" in request.path, 404, "NoSuchKey"),
        "runs/low/big-000009/manifest.json differs from what was written",
    ),
    "bytes altered": (alters(is_part), "busy or faulty: UploadPart got BadDigest"),
}


@pytest.mark.parametrize("what", PASSING)
async def test_what_passes_is_waited_for(staged, what):
    plant, says = PASSING[what]
    async with staged() as scene:
        plant(scene.middle)
        async with scene.bus() as bus:
            await scene.train(bus, scene.states(says))
            assert scene.account().state == "retrying"
            assert await scene.store.names("runs/low/latest") == []
            scene.saved.unlink()  # the trainer rotates its own while it is sent
            scene.middle.on_request = scene.middle.should_drop_reply = None
        await scene.is_whole()


async def test_a_completion_whose_reply_is_lost_is_told_of_and_found_done(staged, caplog):
    async with staged() as scene:
        lost = []

        async def lose(request):
            return completes(request) and not lost and not lost.append(request)

        scene.middle.should_drop_reply = lose
        async with scene.bus() as bus:
            await scene.train(bus, lambda: scene.learnt(CheckpointUploaded))
        await scene.is_whole()
        assert "sink.retrying" in caplog.text
        assert "cannot be reached" in caplog.text
        assert len([path for _, path, _ in scene.middle.requests if "partNumber" in path]) == PARTS


REFUSALS = {
    "quota": (
        answers(is_part, 403, "QuotaExceeded", "1 GB is used"),
        "is full: QuotaExceeded, 1 GB is used",
        "make room, or raise the bucket's quota",
    ),
    "expired": (
        answers(puts_object, 403, "ExpiredToken"),
        "refuses the key evsy… (from the environment, AWS_ACCESS_KEY_ID): it has expired (ExpiredToken)",
        "renew it; it is read again at the next attempt",
    ),
    "bucket removed": (
        answers(lambda request: request.method != "HEAD", 404, "NoSuchBucket"),
        "there is no bucket 'BUCKET'",
        "create it, or correct the URL in the adapter's params",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
async def test_what_a_person_must_mend_parks_the_upload_and_the_next_run_finishes_it(staged, what):
    plant, says, fix = REFUSALS[what]
    async with staged() as scene:
        plant(scene.middle)
        async with scene.bus() as bus:
            await scene.train(bus, scene.states(says.replace("BUCKET", scene.bucket)))
            state = scene.account()
            assert (state.state, state.fix) == ("parked", fix)
        assert bus.receipt.resume_command == f"evsys-bus sync {scene.journal}"
        assert bus.receipt.seconds < 5  # waiting would not help
        scene.middle.on_request = None
        async with scene.bus():
            pass
        await scene.is_whole()


@pytest.mark.parametrize("name", ["runs", "{experiment}"])
async def test_credentials_are_tried_before_there_is_any_checkpoint(staged, s3, monkeypatch, name):
    async with staged() as scene:
        if name == "runs":
            s3.grant_read(scene.bucket)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.limited_key)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.limited_secret)
            says = "does not let the key evsy… (from the environment, AWS_ACCESS_KEY_ID) do PutObject (AccessDenied)"
            fix = f"grant it s3:PutObject on '{scene.bucket}'"
        else:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not it")
            says = "refuses the key evsy… (from the environment, AWS_ACCESS_KEY_ID): the secret is wrong"
            fix = "correct the secret where it is; it is read again at the next attempt"
        async with scene.bus(url=f"s3://{scene.bucket}/{name}") as bus:
            await scene.train(bus, scene.states(says), announce=False)
            state = scene.account()
            assert (state.state, state.fix) == ("parked", fix)
            said = msgspec.json.encode(state).decode()
            assert not any(secret in said for secret in (s3.secret, s3.limited_secret, "not it"))


async def test_a_key_that_is_taken_is_a_conflict_that_is_told_and_the_next_checkpoint_is_uploaded(staged):
    async with staged() as scene:
        await scene.store.put_bytes("runs/low/big-000009/state/saved", b"someone else's")
        async with scene.bus() as bus:
            await scene.train(bus, lambda: scene.learnt(CheckpointConflict))
            other = scene.folder / "other"
            other.write_bytes(b"other")
            bus.publish(Checkpoint(scene.state, ManifestRow("other", batch=19, state_path=str(other))))
        [conflict] = scene.learnt(CheckpointConflict)
        assert f"has other content: 14 bytes, and not the {SIZE} to be stored" in conflict.why
        assert "has other content: 14 bytes" in scene.dead_letter()
        assert (scene.account().dead, scene.account().pending) == (1, 0)
        assert await scene.store.get_bytes("runs/low/big-000009/state/saved") == b"someone else's"
        assert await scene.store.get_bytes("runs/low/other-000019/state/other") == b"other"


@pytest.mark.parametrize("what", ["rewritten", "grown", "deleted"])
async def test_a_checkpoint_that_changes_while_it_is_sent(staged, what):
    async with staged() as scene:
        changed = []

        async def change(request, body):
            if not is_part(request) or changed:
                return
            changed.append(what)
            if what == "deleted":
                scene.saved.unlink()
            else:
                with scene.saved.open("r+b" if what == "rewritten" else "ab") as file:
                    file.write(b"more")

        scene.middle.on_request = change
        async with scene.bus() as bus:
            await scene.train(bus, lambda: scene.account().dead or scene.learnt(CheckpointUploaded))
        if what == "deleted":
            await scene.is_whole()
            return
        assert (scene.account().dead, scene.account().pending) == (1, 0)
        assert "state/saved was modified after the checkpoint event" in scene.dead_letter()
        assert not [each.key for each in await scene.store.names("runs/") if each.key.endswith(".json")]
        assert unfinished_uploads(scene.store.where) == []


async def test_an_upload_whose_file_is_gone_is_ended_when_the_next_one_begins(staged):
    async with staged() as scene:
        spool = Spool.of(scene.state.output_dir, scene.spec()["params"]["url"])
        gone = scene.folder / "gone"
        gone.write_bytes(scene.content)
        params = scene.spec()["params"]
        before, _ = open_store(**params)
        with anyio.CancelScope() as scope:
            await before.put_file(
                "runs/low/gone-000001/state/gone",
                gone,
                ledger=UploadLedger(spool.ledger),
                on_progress=lambda done, _: scope.cancel() if done else None,
            )
        await before.close()
        assert len(unfinished_uploads(scene.store.where)) == 1
        gone.unlink()
        async with scene.bus() as bus:
            await scene.train(bus, lambda: scene.learnt(CheckpointUploaded))
        await scene.is_whole()


# -- minutes, by a clock of their own ---------------------------------------------------------------------------------


async def test_a_key_that_was_mended_is_found_at_the_next_look_a_minute_later(staged, s3, monkeypatch):
    async with staged() as scene:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not it")
        pauses, reports = [], []

        async def sleep(seconds):
            pauses.append(seconds)
            if len(pauses) == 3:
                monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)

        receiver = SinkReceiver(UploadSink(**scene.spec()["params"]), sleep=sleep)
        await receiver.open(reports.append)
        await receiver.close()
        assert pauses == [60.0] * 3
        assert [each and each.state for each in reports] == ["parked"] * 3 + [None]
        assert all("the secret is wrong" in each.error for each in reports[:3])


async def test_a_server_that_says_slow_down_for_a_minute_is_asked_a_few_times_and_by_its_own_clock(staged):
    async with staged() as scene:
        now, asked, pauses = [0.0], [], []

        async def sleep(seconds):
            pauses.append(seconds)
            now[0] += seconds

        async def busy(request, body):
            if "probe" in request.path or now[0] >= 60:
                return None
            asked.append(now[0])
            head = {"Retry-After": "20"} if now[0] > 10 else {}
            return scene.middle.make_response(503, "SlowDown", **head)

        scene.middle.on_request = busy
        scene.saved.write_bytes(b"small")
        sink = UploadSink(**scene.spec()["params"])
        sink.evsys_attached = Learns()
        receiver = SinkReceiver(sink, sleep=sleep, random=Random(1))
        reports = []
        await receiver.open(reports.append)
        event = Checkpoint(scene.state, ManifestRow("big", batch=9, state_path=str(scene.saved)))
        taken = await receiver.deliver([Envelope("r0", 1, 0.0, event, run="low")], [100])
        await receiver.close()
        assert (taken.handled, taken.rejected) == (1, {})
        assert 60 <= now[0] < 100
        assert len(asked) <= 12  # not one request more than attempts
        assert len(pauses) == len(asked)
        assert all(pause >= 20 for at, pause in zip(asked, pauses, strict=True) if at > 10)  # as it asked for
        says = f"{scene.bucket} at {scene.middle.endpoint} is busy or faulty: HeadObject got 503, status 503"
        assert {each.error for each in reports if each} == {f"RetryLaterError: s3://{says}"}
        assert await scene.store.get_bytes("runs/low/big-000009/state/saved") == b"small"


class Learns:
    """What a sink is attached to."""

    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)


# -- no room for what an upload writes down ---------------------------------------------------------------------------


class NoRoom:
    """No file of this process may grow beyond so many bytes: as on a full disk, what fits is written."""

    def __init__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self):
        return self

    def set(self, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self._before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


async def test_a_part_that_has_no_room_in_the_ledger_ends_the_attempt_as_an_error_of_the_disk(staged):
    async with staged() as scene:
        uploads = scene.folder / "uploads"
        with NoRoom() as room:

            def no_room(done, _):
                if done >= PART:
                    [file] = uploads.iterdir()
                    room.set(file.stat().st_size + 5)

            with pytest.raises(OSError, match="File too large"):
                await scene.store.put_file("k", scene.saved, ledger=UploadLedger(uploads), on_progress=no_room)
        done = []
        await scene.store.put_file(
            "k", scene.saved, ledger=UploadLedger(uploads), on_progress=lambda *each: done.append(each)
        )
        assert await scene.store.get_bytes("k") == scene.content
        assert unfinished_uploads(scene.store.where) == []


async def test_an_upload_that_cannot_be_ticked_off_for_want_of_room_says_so_and_is_told_of_once(staged):
    async with staged() as scene:
        scene.saved.write_bytes(b"small")
        sink = UploadSink(**scene.spec()["params"])
        sink.evsys_attached = learns = Learns()
        await sink.open()
        event = Checkpoint(scene.state, ManifestRow("big", batch=9, state_path=str(scene.saved)))
        spool = Spool.of(scene.state.output_dir, scene.spec()["params"]["url"])
        spool.add(event.row, ("state",))
        batch = [Envelope("r0", 1, 0.0, event, run="low")]
        with NoRoom() as room:
            room.set(200)
            for _ in range(2):
                with pytest.raises(RetryLaterError, match=r"no room in .*/spool/.*: File too large; it resumes once"):
                    await sink.write(batch)
        assert await sink.write(batch) == 1
        await sink.close()
        assert [type(each) for each in learns.events] == [CheckpointUploaded]
        assert spool.pending() == []
