"""An upload to S3 whose courier, trainer or server is killed, or whose disk fills up: a real bus, in real processes.

A proxy between courier and server counts what is sent.
"""

import asyncio
import hashlib
import json
import os
import re
import signal
from contextlib import asynccontextmanager

import msgspec
import pytest

from evsys_adapters.checkpoints import UploadLedger, open_store
from evsys_adapters.checkpoints.manifest import Latest, Manifest
from evsys_adapters.checkpoints.spool import Spool
from evsys_bus.delivery.progress import read_progress
from evsys_bus.testing import Fault, fault_proxy
from support.couriers import courier_processes
from support.files import small_file_system
from support.s3_client import create_bucket, unfinished_uploads
from support.waiting import wait_until_async

# The loop of these tests carries the proxy alone: couriers have loops of their own.
pytestmark = [
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.timeout(60),
    pytest.mark.servers,
    pytest.mark.long,
]

PART = 5 << 20
PARTS = 5
SIZE = PARTS * PART - 5
SLACK = 300_000
"""Bytes of heads and of small requests, and of what the proxy held when a process was killed."""
PATIENCE_SECONDS = 30.0
CUT = Fault(reset_request_at=0)

EVSYS_BUS = "from evsys_bus.cli import main; main()"
TRAINER = """
    import json, sys, time
    from pathlib import Path
    from evsys_bus import (
        Checkpoint, EventBus, LogContext, LoopState, ManifestRow, RunStart, StepEnd, TrainingBatch, build_callbacks
    )

    folder, spec, saved = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    ctx = LogContext(folder / "sweep", run_key="low")
    state = LoopState(step=0, num_steps=10**6, output_dir=folder / "sweep" / "low", ctx=ctx)
    steps, longest = 0, 0.0
    with EventBus(build_callbacks([spec]), journal=Path(sys.argv[4])) as bus:
        bus.publish(RunStart(ctx))
        if saved:
            bus.publish(Checkpoint(state, ManifestRow("big", batch=9, state_path=saved)))
            if Path(saved).is_relative_to(folder):
                Path(saved).unlink()  # it rotates its own at once
        while not (folder / "enough").exists():
            began = time.perf_counter()
            bus.publish(StepEnd(state, steps, TrainingBatch(), {"loss": 1.0}))
            longest = max(longest, time.perf_counter() - began)
            steps += 1
            time.sleep(0.01)
    [delivery] = bus.receipt.deliveries
    told = {"steps": steps, "longest": longest, "unrecorded": bus.receipt.unrecorded}
    told |= {name: getattr(delivery, name) for name in ("recorded", "delivered", "dead", "pending")}
    print(json.dumps(told), flush=True)
"""


class Scene:
    """A run that uploads one checkpoint of `SIZE` bytes through a proxy, and what is to be seen of it."""

    def __init__(self, folder, proxy, store, program, journal):
        self.folder, self.proxy, self.store, self.program, self.journal = folder, proxy, store, program, journal
        self.url = f"{store.where.split()[0]}/runs"
        params = {"url": self.url, "endpoint": f"http://127.0.0.1:{proxy.port}", "region": "us-east-1"}
        self.spec = {"kind": "checkpoint_upload", "params": {**params, "part_bytes": PART, "concurrency": 2}}
        self.spool = Spool.of(folder / "sweep" / "low", self.url)

    def save(self, path, size=SIZE):
        """What the trainer saved; its digest."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = os.urandom(size)
        path.write_bytes(content)
        self.digest, self.size = hashlib.sha256(content).hexdigest(), size
        return path

    def train(self, saved=""):
        return self.program(TRAINER, str(self.folder), json.dumps(self.spec), str(saved), str(self.journal))

    def sent_since(self):
        """Counts what is sent from now on."""
        before = self.proxy.sent
        return lambda: self.proxy.sent - before

    def account(self):
        return next(iter(read_progress(self.journal)), None)

    def confirmed(self):
        """How many parts are on record as sent."""
        ledger = UploadLedger(self.spool.ledger)
        where = f"{self.store.where.split()[0]} at http://127.0.0.1:{self.proxy.port}"
        return sum(len(ledger.find(where, plan.key)[1]) for plan in ledger.uploads_under(where, ""))

    async def trouble(self, text):
        """Wait until this is what keeps the upload from going on; seconds of that."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        await wait_until_async(
            lambda: (account := self.account()) and text in (account.last_error or ""), PATIENCE_SECONDS
        )
        return loop.time() - began

    async def end(self, trainer):
        """Have the trainer end, and hear what it says; nothing of it is left in the spool or half done."""
        (self.folder / "enough").touch()
        out, err = await asyncio.to_thread(trainer.communicate, timeout=PATIENCE_SECONDS)
        told = json.loads(out)
        assert (told["pending"], told["dead"], told["unrecorded"]) == (0, 0, 0), err
        assert told["recorded"] == told["delivered"]
        assert told["longest"] < 0.5
        await self.is_whole()
        return told

    async def is_whole(self):
        manifest = msgspec.json.decode(await self.store.get_bytes("runs/low/big-000009/manifest.json"), type=Manifest)
        assert [(file.size, file.sha256) for file in manifest.files] == [(self.size, self.digest)]
        stored = await self.store.get_bytes(f"runs/low/big-000009/{manifest.files[0].name}")
        assert hashlib.sha256(stored).hexdigest() == self.digest
        latest = msgspec.json.decode(await self.store.get_bytes("runs/low/latest.json"), type=Latest)
        assert latest.checkpoint == "big-000009"
        assert unfinished_uploads(self.store.where) == []
        assert self.spool.pending() == []
        assert list(self.spool.ledger.iterdir()) == []


@pytest.fixture
def staged(s3, program, monkeypatch):
    """A scene in a folder; no fixture of its own, as a proxy has to end in the task that it began in."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)

    @asynccontextmanager
    async def staged(folder, journal):
        store, _ = open_store(f"s3://{create_bucket(s3)}", endpoint=s3.endpoint, region=s3.region)
        async with fault_proxy("127.0.0.1", s3.port) as proxy:
            scene = Scene(folder, proxy, store, program, journal)
            try:
                yield scene
            finally:
                for pid in courier_processes(scene.journal):
                    os.kill(pid, signal.SIGKILL)
                await store.close()

    return staged


# -- killed -----------------------------------------------------------------------------------------------------------


async def middle_of(scene):
    """Wait until about 40 % is sent, and some of that confirmed."""
    await wait_until_async(lambda: scene.proxy.sent > 0.4 * SIZE and scene.confirmed(), PATIENCE_SECONDS)
    assert scene.proxy.sent < 0.9 * SIZE


@pytest.mark.parametrize("by", ["the bus", "the next run", "sync"])
async def test_what_a_killed_courier_left_half_sent_is_finished_and_only_unfinished_parts_are_sent(
    staged, tmp_path, by
):
    async with staged(tmp_path, tmp_path / "journal") as scene:
        process = scene.train(scene.save(scene.folder / "saved"))
        await middle_of(scene)
        [courier] = courier_processes(scene.journal)
        if by != "the bus":
            process.kill()
        os.kill(courier, signal.SIGKILL)
        await scene.proxy.apply(CUT)  # what the dead one had handed to the system is not counted
        sent, unfinished, seen = scene.sent_since(), PARTS - scene.confirmed(), scene.proxy.connections
        assert 0 < unfinished < PARTS
        assert await scene.store.names("runs/") == []
        if by == "the next run":
            process = scene.train()
        elif by == "sync":
            process = scene.program(EVSYS_BUS, "sync", str(scene.journal))
        await wait_until_async(lambda: scene.proxy.connections > seen, PATIENCE_SECONDS)
        await scene.proxy.apply(Fault())
        await wait_until_async(scene.spool.uploaded, PATIENCE_SECONDS)
        assert (unfinished - 1) * PART < sent() <= unfinished * PART + SLACK
        if by == "sync":
            _, err = await asyncio.to_thread(process.communicate, timeout=PATIENCE_SECONDS)
            assert process.returncode == 0, err
            await scene.is_whole()
        else:
            assert (await scene.end(process))["steps"] > 10


async def test_a_server_that_is_killed_gets_only_what_it_does_not_have_once_it_is_back(staged, tmp_path, s3):
    async with staged(tmp_path, tmp_path / "journal") as scene:
        trainer = scene.train(scene.save(scene.folder / "saved"))
        try:
            await middle_of(scene)
            s3.kill()
            await scene.trouble("cannot be reached")
            sent, unfinished = scene.sent_since(), PARTS - scene.confirmed()
            assert 0 < unfinished < PARTS
        finally:
            await asyncio.to_thread(s3.start)
        await wait_until_async(scene.spool.uploaded, PATIENCE_SECONDS)
        assert sent() <= unfinished * PART + SLACK
        assert (await scene.end(trainer))["steps"] > 50


# -- refused ----------------------------------------------------------------------------------------------------------

SECONDS_TO_SHOW = 5.0
"""A second on a machine with nothing else to do; it is the start of a process, and of a client library."""


async def test_a_wrong_secret_shows_at_the_start_with_where_the_key_came_from_and_never_the_secret(
    staged, tmp_path, monkeypatch
):
    async with staged(tmp_path, tmp_path / "journal") as scene:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not it")
        trainer = scene.train()
        await wait_until_async(scene.account, PATIENCE_SECONDS)
        assert await scene.trouble("the secret is wrong") < SECONDS_TO_SHOW
        (scene.folder / "enough").touch()
        out, err = await asyncio.to_thread(trainer.communicate, timeout=PATIENCE_SECONDS)
        told = json.loads(out)
        assert (told["delivered"], told["dead"], told["pending"]) == (0, 0, told["recorded"])
        where = f"{scene.url.removesuffix('/runs')} at {scene.spec['params']['endpoint']}"
        why = (
            f"ParkedError: {where} refuses the key evsy… "
            "(from the environment, AWS_ACCESS_KEY_ID): the secret is wrong (SignatureDoesNotMatch)"
        )
        fix = "correct the secret where it is; it is read again at the next attempt"
        status = await heard(scene.program(EVSYS_BUS, "status", str(scene.journal)))
        assert re.search(f"{re.escape(why)} .failing since .*   fix: {re.escape(fix)}", status)
        for pid in courier_processes(scene.journal):  # it lingers, and would not let another one look
            os.kill(pid, signal.SIGKILL)
        sync = await heard(scene.program(EVSYS_BUS, "sync", str(scene.journal), "--progress", "off"))
        events = f"{told['recorded']} of {told['recorded']} events for checkpoint_upload"
        known, _, sync = sync.partition("\n")
        assert re.fullmatch(f"checkpoint_upload: {re.escape(why)} .failing since .*   fix: {re.escape(fix)}", known)
        assert sync == (
            f"error[EB902]: {events} stay pending\nwhy: {why}\n"
            f"fix: {fix}   then: evsys-bus sync {scene.journal} --adapter checkpoint_upload\n"
        )
        log = (scene.journal / "couriers" / "process.log").read_text()
        assert not any("not it" in text for text in (err, status, sync, log))


async def heard(process):
    """What a command says: its errors, else its result."""
    out, err = await asyncio.to_thread(process.communicate, timeout=PATIENCE_SECONDS)
    return err or out


# -- no room ----------------------------------------------------------------------------------------------------------


def fill(folder):
    """Leave no room; the file that takes it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    with small_file_system(tmp_path / "small", "16m") as path:
        yield path


async def test_a_checkpoint_that_has_no_room_in_the_spool_is_uploaded_once_there_is_room(staged, small_disk, tmp_path):
    """It was saved on another file system, so it has to be copied."""
    async with staged(small_disk, tmp_path / "journal") as scene:
        filler = fill(scene.folder)
        trainer = scene.train(scene.save(tmp_path / "elsewhere", 2 * PART + 5))
        await scene.trouble(f"no room in {scene.spool.folder}: No space left on device")
        assert scene.spool.pending() == []
        filler.unlink()
        await wait_until_async(scene.spool.uploaded, PATIENCE_SECONDS)
        assert (await scene.end(trainer))["steps"] > 50


async def test_an_upload_that_cannot_be_accounted_for_waits_for_room(staged, small_disk, tmp_path):
    """The checkpoint is linked, and takes no room; the ledger does."""
    async with staged(small_disk, tmp_path / "journal") as scene:
        await scene.proxy.apply(Fault(refuse=True))
        trainer = scene.train(scene.save(scene.folder / "saved", 2 * PART + 5))
        await wait_until_async(scene.spool.pending, PATIENCE_SECONDS)
        filler = fill(scene.folder)
        await scene.proxy.apply(Fault())
        await scene.trouble(f"no room in {scene.spool.folder}: No space left on device")
        assert unfinished_uploads(scene.store.where) == []
        filler.unlink()
        await wait_until_async(scene.spool.uploaded, PATIENCE_SECONDS)
        assert (await scene.end(trainer))["steps"] > 50
