"""``checkpoint_prune``: what is removed, and above all what is not."""

import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evsys_adapters.checkpoint_prune import BestCheckpoints, CheckpointPrune, RetentionRules, prunable
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback, UploadSink
from evsys_adapters.checkpoints.events import CheckpointPruned
from evsys_bus import (
    Checkpoint,
    Envelope,
    Eval,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    TrainEnd,
)
from evsys_bus.adapter import Rewindable
from evsys_bus.codec import decode, encode
from evsys_bus.config import Registry, build_callbacks
from evsys_bus.errors import RetryLaterError, WrongParamError
from evsys_bus.testing import conformance
from support.journals import read_events

STREAM = "r0-20260131T120000-aaaaaaaa"


class Trainer:
    """Saves and evaluates; what it announces goes to `sinks`, as couriers hand it over."""

    def __init__(self, folder):
        ctx = LogContext(folder / "sweep", run_key="low")
        self.run_dir = folder / "sweep" / "low"
        self.state = LoopState(step=0, num_steps=100, output_dir=self.run_dir, ctx=ctx)
        self.seq = 0
        self.told = []

    def publish(self, event):
        self.told.append(event)

    def attach(self, sink):
        sink.evsys_attached = self
        return sink

    def save(self, batch, *, name=None, directory=False):
        name = name or f"step-{batch:06d}"
        path = self.run_dir / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if directory:
            path.mkdir()
        (path / "weights" if directory else path).write_bytes(b"%d" % batch)
        return ManifestRow(name, batch=batch, state_path=str(path))

    def envelope(self, event):
        self.seq += 1
        return decode(encode(Envelope(STREAM, self.seq, 0.0, event, run="low")))

    def checkpoint(self, row):
        return self.envelope(Checkpoint(self.state, row))

    def score(self, step, value, name="val"):
        return self.envelope(Eval(self.state, step, name, {"accuracy": value}))

    def end(self):
        return self.envelope(TrainEnd(self.state, LoopArtifacts()))

    def here(self):
        return sorted(path.name for path in (self.run_dir / "checkpoints").iterdir())

    def pruned(self, where="local"):
        events = [event for event in self.told if isinstance(event, CheckpointPruned)]
        return [event.checkpoint for event in events if event.where == where]


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path)


async def test_the_newest_are_kept_and_what_was_removed_is_on_record(trainer):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 2}))
    for batch in (9, 19, 29, 39):
        await prune.write([trainer.checkpoint(trainer.save(batch, directory=batch == 9))])
    assert trainer.here() == ["step-000029", "step-000039"]
    assert trainer.pruned() == ["step-000009", "step-000019"]
    assert trainer.told[0].paths == [str(trainer.run_dir / "checkpoints/step-000009")]


async def test_every_nth_and_the_best_are_kept_too(trainer):
    keep = {"keep_last": 1, "keep_every": 20, "keep_best": {"metric": "accuracy"}}
    prune = trainer.attach(CheckpointPrune(local=keep))
    for batch, score in ((9, 0.9), (19, 0.2), (29, 0.5), (39, 0.3), (49, 0.1), (59, 0.4), (69, 0.3)):
        await prune.write([trainer.checkpoint(trainer.save(batch)), trainer.score(batch, score)])
    assert trainer.here() == ["step-000009", "step-000019", "step-000039", "step-000059", "step-000069"]


async def test_a_checkpoint_whose_eval_is_under_way_is_not_removed(trainer):
    keep = {"keep_last": 1, "keep_best": {"metric": "accuracy", "mode": "min"}}
    prune = trainer.attach(CheckpointPrune(local=keep))
    rows = [trainer.save(batch) for batch in (9, 19, 29)]
    await prune.write([trainer.checkpoint(row) for row in rows])
    assert len(trainer.here()) == 3
    await prune.write([trainer.score(9, 0.5)])
    assert len(trainer.here()) == 3
    await prune.write([trainer.score(19, 0.6)])
    assert trainer.here() == ["step-000009", "step-000029"]


async def test_nothing_local_goes_before_a_newer_one_is_whole(trainer):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    first, second = trainer.save(9), trainer.save(19)
    shutil.rmtree(trainer.run_dir / "checkpoints")
    trainer.save(9)
    await prune.write([trainer.checkpoint(first), trainer.checkpoint(second)])
    assert trainer.here() == ["step-000009"]


async def test_nothing_local_goes_before_a_newer_one_is_verified_at_the_destination(trainer, tmp_path):
    url = f"file://{tmp_path}/bucket"
    prune = trainer.attach(CheckpointPrune(url=url, local={"keep_last": 1}))
    inline, upload = CheckpointUploadCallback(url), trainer.attach(UploadSink(url))
    intents = []
    for batch in (9, 19, 29):
        row = trainer.save(batch)
        inline.on_checkpoint(trainer.state, row)
        intents.append(trainer.checkpoint(row))
    await prune.write(intents)
    assert len(trainer.here()) == 3
    end = trainer.end()
    with pytest.raises(RetryLaterError, match="is waiting to be uploaded"):
        await prune.write([end])
    assert await upload.write(intents[:1]) == 1
    with pytest.raises(RetryLaterError):
        await prune.write([end])
    assert len(trainer.here()) == 3
    await upload.write(intents[1:2])
    with pytest.raises(RetryLaterError):
        await prune.write([end])
    assert trainer.here() == ["step-000019", "step-000029"]
    await upload.write(intents[2:])
    await prune.write([end])
    assert trainer.here() == ["step-000029"]


async def test_the_destination_is_pruned_by_rules_of_its_own_and_by_default_never(trainer, tmp_path):
    url = f"file://{tmp_path}/bucket"
    inline, upload = CheckpointUploadCallback(url), trainer.attach(UploadSink(url))
    intents = []
    for batch in (9, 19, 29):
        row = trainer.save(batch)
        inline.on_checkpoint(trainer.state, row)
        intents.append(trainer.checkpoint(row))
        await upload.write(intents[-1:])
    bucket = tmp_path / "bucket/low"
    await trainer.attach(CheckpointPrune(url=url, local={"keep_last": 1})).write(intents)
    assert len(list(bucket.glob("step-*/manifest.json"))) == 3
    (bucket / "step-000029/manifest.json").rename(tmp_path / "aside")
    await trainer.attach(CheckpointPrune(url=url, remote={"keep_last": 1})).write(intents)
    assert len(list(bucket.glob("step-*/manifest.json"))) == 1  # of the two that are whole the newer stays
    (tmp_path / "aside").rename(bucket / "step-000029/manifest.json")
    await trainer.attach(CheckpointPrune(url=url, remote={"keep_last": 1})).write(intents)
    assert sorted(path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()) == [
        "latest.json",
        "step-000029/manifest.json",
        "step-000029/state/step-000029",
    ]
    assert trainer.pruned("remote") == ["step-000009", "step-000019"]


async def test_what_latest_names_is_never_removed(trainer, tmp_path):
    url = f"file://{tmp_path}/bucket"
    inline, upload = CheckpointUploadCallback(url), trainer.attach(UploadSink(url))
    intents = []
    for batch in (9, 19):
        row = trainer.save(batch)
        inline.on_checkpoint(trainer.state, row)
        intents.append(trainer.checkpoint(row))
        await upload.write(intents[-1:])
    latest = tmp_path / "bucket/low/latest.json"
    latest.write_text(latest.read_text().replace("step-000019", "step-000009"))
    await trainer.attach(CheckpointPrune(url=url, remote={"keep_last": 1})).write(intents)
    assert trainer.pruned("remote") == []


async def test_a_dry_run_removes_nothing_and_tells_each_once(trainer):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}, dry_run=True))
    for batch in (9, 19, 29):
        await prune.write([trainer.checkpoint(trainer.save(batch))])
    assert len(trainer.here()) == 3
    assert trainer.pruned() == ["step-000009", "step-000019"]
    assert all(event.dry_run for event in trainer.told)


async def test_files_that_another_checkpoint_uses_and_folders_around_the_run_stay(trainer, tmp_path):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    shared = trainer.save(9, name="same")
    elsewhere = [
        shared,
        ManifestRow("around", batch=19, state_path=str(tmp_path)),
        ManifestRow("here", batch=29, state_path=str(Path.cwd())),
        ManifestRow("uri", batch=39, state_path="s3://bucket/x"),
        ManifestRow("again", batch=49, state_path=shared.state_path),
    ]
    await prune.write([trainer.checkpoint(row) for row in elsewhere])
    assert trainer.here() == ["same"]
    assert trainer.told == []


async def test_a_link_that_leads_out_of_the_run_stays_with_what_it_leads_to(trainer, tmp_path):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "weights").write_bytes(b"w")
    new = trainer.save(19)
    link = trainer.run_dir / "checkpoints" / "linked"
    link.symlink_to(tmp_path / "store")
    old = trainer.checkpoint(ManifestRow("linked", batch=9, state_path=str(link)))
    await prune.write([old, trainer.checkpoint(new)])
    assert trainer.here() == ["linked", "step-000019"]
    assert (tmp_path / "store" / "weights").exists()
    assert trainer.pruned() == []


async def test_a_courier_that_begins_anew_knows_what_it_knew(trainer):
    keep = {"keep_last": 1, "keep_best": {"metric": "accuracy"}}
    before = trainer.attach(CheckpointPrune(local=keep))
    await before.write([trainer.checkpoint(trainer.save(9)), trainer.score(9, 0.9)])
    await before.write([trainer.checkpoint(trainer.save(19)), trainer.score(19, 0.5)])
    after = trainer.attach(CheckpointPrune(local=keep))
    assert isinstance(after, Rewindable)
    after.rewind(decode_plain(before.mark()))
    await after.write([trainer.checkpoint(trainer.save(29)), trainer.score(29, 0.1)])
    assert trainer.here() == ["step-000009", "step-000029"]


def decode_plain(mark):
    return msgspec.json.decode(msgspec.json.encode(mark))


async def test_a_batch_that_comes_again_removes_nothing_more(trainer):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 2}))
    batch = [trainer.checkpoint(trainer.save(number)) for number in (9, 19, 29)]
    await prune.write(batch)
    await prune.write(batch)
    assert trainer.here() == ["step-000019", "step-000029"]
    assert trainer.pruned() == ["step-000009"]


rows = st.lists(st.integers(0, 30), unique=True, max_size=12).map(
    lambda batches: [ManifestRow(f"{batch}", batch=batch) for batch in batches]
)
keeps = st.builds(
    RetentionRules,
    keep_last=st.none() | st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 5),
    keep_best=st.none() | st.builds(BestCheckpoints, metric=st.just("m"), mode=st.sampled_from(["max", "min"])),
)


@given(rows, keeps, st.dictionaries(st.integers(0, 30), st.floats(allow_nan=False)), st.integers(-1, 11))
def test_the_verified_one_and_all_newer_ones_always_stay(rows, keep, scores, verified):
    verified = min(verified, len(rows) - 1)
    gone = prunable(rows, keep, scores, verified)
    assert verified >= 0 or not gone
    assert not set(map(id, gone)) & set(map(id, rows[max(verified, 0) :]))
    if keep.keep_last:
        assert not set(map(id, gone)) & set(map(id, rows[-keep.keep_last :]))


test_it_keeps_the_rules_for_adapters = conformance(lambda _: CheckpointPrune(local={"keep_last": 1}))


def test_params_are_checked():
    with pytest.raises(WrongParamError):
        CheckpointPrune(local={"keep_last": 0})
    with pytest.raises(WrongParamError):
        CheckpointPrune(local={"keep_lst": 2})


async def test_uploading_and_pruning_go_together_in_the_courier_process(trainer, tmp_path):
    url = f"file://{tmp_path}/bucket"
    registry = Registry(entry_points=lambda: ())
    registry.register("checkpoint_upload")(CheckpointUploadCallback)
    registry.register_sink("checkpoint_prune")(CheckpointPrune)
    specs = [
        {"kind": "checkpoint_upload", "params": {"url": url}},
        {"kind": "checkpoint_prune", "params": {"url": url, "local": {"keep_last": 1}, "remote": {"keep_last": 2}}},
    ]
    async with EventBus(build_callbacks(specs, registry=registry), journal=tmp_path / "sweep/journal") as bus:
        for batch in range(9, 60, 10):
            bus.publish(Checkpoint(trainer.state, trainer.save(batch)))
        bus.publish(TrainEnd(trainer.state, LoopArtifacts()))
    assert [(each.name, each.delivered, each.pending) for each in bus.receipt.deliveries] == [
        ("checkpoint_prune", 7, 0),
        ("checkpoint_upload", 7, 0),
    ]
    assert trainer.here() == ["step-000059"]
    kept = sorted(path.parent.name for path in (tmp_path / "bucket/low").glob("*/manifest.json"))
    assert kept == ["step-000049", "step-000059"]
    events = read_events(tmp_path / "sweep/journal", family="c")
    local = [each.checkpoint for each in events if isinstance(each, CheckpointPruned) and each.where == "local"]
    assert local == [f"step-0000{number}9" for number in range(5)]
