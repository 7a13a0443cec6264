"""``checkpoints`` and ``fetch``: what is told, and what is on disk afterwards."""

import asyncio
import json
import shutil
from pathlib import Path

import msgspec
import pytest

from evsys_adapters.checkpoint_prune import CheckpointPrune
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
from evsys_bus import Checkpoint, EventBus, LogContext, LoopState, ManifestRow, RunStart
from evsys_bus.config import Registry, build_callbacks
from evsys_bus.training import TrainingLoop
from support.files import parse_json_lines


@pytest.fixture
def bucket(tmp_path):
    return f"file://{tmp_path}/bucket"


def train(tmp_path, *specs, steps=(9, 19, 29), run_key="low"):
    """A run below ./runs that saves directories and single files; its folder."""
    registry = Registry(entry_points=lambda: ())
    registry.register("checkpoint_upload")(CheckpointUploadCallback)
    registry.register_sink("checkpoint_prune")(CheckpointPrune)
    experiment = tmp_path / "runs" / "sweep"
    run_dir = experiment / run_key
    ctx = LogContext(experiment, run_key=run_key)
    state = LoopState(step=0, num_steps=100, output_dir=run_dir, ctx=ctx)
    with EventBus(
        build_callbacks(list(specs), registry=registry), journal=experiment / "journal", couriers="thread"
    ) as bus:
        bus.publish(RunStart(ctx))
        for step in steps:
            weights = run_dir / "checkpoints" / f"weights-{step}"
            weights.mkdir(parents=True)
            for shard in range(3):
                (weights / f"{shard}.bin").write_bytes(b"%d-%d" % (step, shard))
            sampler = run_dir / "checkpoints" / f"sampler-{step}"
            sampler.write_bytes(b"sampler %d" % step)
            row = ManifestRow(f"step-{step:06d}", batch=step, state_path=str(weights), sampler_path=str(sampler))
            bus.publish(Checkpoint(state, row))
    assert all(each.pending == each.dead == 0 for each in bus.receipt.deliveries), bus.receipt
    return run_dir


@pytest.fixture
def low(tmp_path, bucket):
    return train(tmp_path, {"kind": "checkpoint_upload", "params": {"url": bucket}})


def test_checkpoints_shows_what_is_here_and_what_is_there(evsys_bus, tmp_path, low, bucket):
    shutil.rmtree(low / "checkpoints/weights-9")
    code, out, _ = evsys_bus("checkpoints", "runs/sweep/low")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["run", "checkpoint", "after", "step", "here", "there", "size", "destination"],
        ["low", "step-000009", "9", "partly", "uploaded", "18", "B", bucket],
        ["low", "step-000019", "19", "whole", "uploaded", "22", "B", bucket],
        ["low", "step-000029", "29", "whole", "uploaded", "22", "B", bucket],
    ]


def test_checkpoints_shows_what_waits_and_what_is_in_conflict(evsys_bus, tmp_path, bucket):
    low = train(tmp_path)
    inline = CheckpointUploadCallback(bucket)
    ctx = LogContext(low.parent, run_key="low")
    state = LoopState(step=0, num_steps=100, output_dir=low, ctx=ctx)
    for step in (9, 19):
        path = str(low / "checkpoints" / f"sampler-{step}")
        inline.on_checkpoint(state, ManifestRow(f"step-{step:06d}", batch=step, sampler_path=path))
    [waiting] = low.glob("spool/*/step-000019@*")
    waiting.rename(f"{waiting}.refused")
    code, out, _ = evsys_bus("checkpoints", "--json")
    assert code == 0
    found = parse_json_lines(out)
    told = [(each["checkpoint"], each["local"], [one["state"] for one in each["remote"]]) for each in found]
    assert told == [
        ("step-000009", "whole", ["waiting"]),
        ("step-000019", "whole", ["conflict"]),
        ("step-000029", "whole", []),
    ]


def test_checkpoints_shows_what_was_pruned(evsys_bus, tmp_path, bucket):
    low = train(tmp_path, {"kind": "checkpoint_upload", "params": {"url": bucket}})
    keep = {"url": bucket, "local": {"keep_last": 1}, "remote": {"keep_last": 2}}
    train(tmp_path, {"kind": "checkpoint_prune", "params": keep}, steps=[])
    code, out, _ = evsys_bus("checkpoints", low)
    assert code == 0
    assert [line.split()[3:5] for line in out.splitlines()[1:]] == [
        ["gone", "pruned"],
        ["gone", "uploaded"],
        ["whole", "uploaded"],
    ]


def test_checkpoints_asks_the_destination_itself_on_another_machine(evsys_bus, tmp_path, low, bucket):
    shutil.rmtree(tmp_path / "runs")
    code, out, _ = evsys_bus("checkpoints", "low", "--from", bucket)
    assert code == 0
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["step-000009", "9", "4", "18", "B"],
        ["step-000019", "19", "4", "22", "B"],
        ["step-000029", "29", "4", "22", "B"],
    ]


def test_fetch_has_the_newest_checkpoint_again(evsys_bus, low):
    expected = {path.name: path.read_bytes() for path in (low / "checkpoints/weights-29").iterdir()}
    shutil.rmtree(low / "checkpoints")
    code, out, err = evsys_bus("fetch", "runs/sweep/low")
    assert code == 0, err
    state, sampler = map(Path, out.splitlines())
    assert {path.name: path.read_bytes() for path in state.iterdir()} == expected
    assert sampler.read_bytes() == b"sampler 29"
    assert state.is_relative_to(low / "fetched")
    assert "step-000029 after step 29: 4 files, 22 B, verified" in err


def test_fetch_takes_a_name_and_offers_the_nearest_for_a_wrong_one(evsys_bus, low):
    code, out, _ = evsys_bus("fetch", "runs/sweep/low@step-000019", "--json")
    assert code == 0
    assert json.loads(out)["batch"] == 19
    code, _, err = evsys_bus("fetch", "runs/sweep/low@step-000018")
    assert code == 2
    assert "did you mean" in err


def test_fetch_on_a_new_machine_and_a_run_that_resumes_from_there(evsys_bus, tmp_path, low, bucket):
    shutil.rmtree(tmp_path / "runs")
    code, out, err = evsys_bus("fetch", "low", "--from", bucket, "--to", "new/low", "--record")
    assert code == 0, err

    class Backend:
        loaded = None

        async def load_state(self, path):
            self.loaded = path

        async def save_state(self, name):
            return None

        async def save_weights_for_sampler(self, name):
            return None

    class Nothing:
        async def build_batch(self, step_idx):
            return None

    backend = Backend()
    loop = TrainingLoop(backend, Nothing(), num_steps=31, output_dir=tmp_path / "new/low", resume=True)
    asyncio.run(loop.run())
    assert backend.loaded == out.splitlines()[0]
    assert loop.skipped_steps == 1
    rows = (tmp_path / "new/low/checkpoints.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["name"] == "step-000029"


def test_fetch_goes_on_where_it_ended_and_mends_what_is_not_right(evsys_bus, tmp_path, low, bucket):
    assert evsys_bus("fetch", low)[0] == 0
    fetched = low / "fetched/step-000029"
    kept, gone, altered = (fetched / f"state/weights-29/{shard}.bin" for shard in range(3))
    before = kept.stat().st_mtime_ns, kept.stat().st_ino
    gone.unlink()
    altered.write_bytes(b"29-X")
    assert evsys_bus("fetch", low)[0] == 0
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    assert (gone.read_bytes(), altered.read_bytes()) == (b"29-1", b"29-2")


def test_fetch_refuses_what_is_not_what_the_manifest_says(evsys_bus, tmp_path, low):
    (tmp_path / "bucket/low/step-000029/state/weights-29/1.bin").write_bytes(b"29-X")
    code, out, err = evsys_bus("fetch", low)
    assert (code, out) == (4, "")
    assert "EB404" in err
    assert not (low / "fetched/step-000029/state/weights-29/1.bin").exists()
    assert not (low / "fetched/step-000029/manifest.json").exists()


@pytest.mark.parametrize("name", ["../../out", "/tmp/evsys-out", "state/../../../out", "a\\..\\out"])
def test_no_name_of_a_manifest_leads_out_of_the_folder_that_is_fetched_into(evsys_bus, tmp_path, low, name):
    path = tmp_path / "bucket/low/step-000029/manifest.json"
    manifest = msgspec.json.decode(path.read_bytes())
    manifest["files"][0]["name"] = name
    path.write_bytes(msgspec.json.encode(manifest))
    before = sorted(each for each in tmp_path.rglob("*") if "fetched" not in each.parts)
    code, _, err = evsys_bus("fetch", low)
    assert code == 4
    assert "would not stay in" in err
    assert before == sorted(each for each in tmp_path.rglob("*") if "fetched" not in each.parts)


def test_a_link_in_the_folder_does_not_lead_a_fetch_out_of_it(evsys_bus, tmp_path, low):
    (tmp_path / "out").mkdir()
    (low / "fetched/step-000029").mkdir(parents=True)
    (low / "fetched/step-000029/state").symlink_to(tmp_path / "out")
    code, _, err = evsys_bus("fetch", low)
    assert code == 4
    assert "is a link that leaves" in err
    assert not [each for each in (tmp_path / "out").rglob("*") if each.is_file()]


def test_what_was_never_uploaded_is_said(evsys_bus, tmp_path):
    low = train(tmp_path)
    code, _, err = evsys_bus("fetch", low)
    assert code == 2
    assert "--from URL" in err
    code, _, err = evsys_bus("fetch", "low", "--from", f"file://{tmp_path}/nowhere")
    assert code == 4
    assert "there is no checkpoint" in err
    code, _, err = evsys_bus("checkpoints", "nothing")
    assert code == 2
