"""``checkpoint_prune`` removes what lies in the folders of its run and experiment, whatever is named."""

import logging
import os
import shutil

import msgspec
import pytest

from evsys_adapters.checkpoint_prune import CheckpointPrune
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback, UploadSink
from evsys_adapters.checkpoints.removal import RemovalBounds, plan_removal, remove_path
from evsys_bus import LogContext, LoopState, ManifestRow
from evsys_bus.errors import WrongParamError
from tests.adapters.test_checkpoint_prune import Trainer


@pytest.fixture
def trainer(tmp_path):
    return Trainer(tmp_path)


def row(name, path, batch=0):
    return ManifestRow(name, batch=batch, state_path=str(path))


def tree(folder):
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"w")
    return folder


async def pruned_beside(trainer, path, **local):
    """Have a checkpoint at this path, and a newer one; what was pruned."""
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1, **local}))
    await prune.write([trainer.checkpoint(row("old", path)), trainer.checkpoint(trainer.save(99))])
    await prune.close()
    return [path for event in trainer.told for path in event.paths]


async def test_what_lies_outside_stays_is_counted_and_said_once_with_the_fix(trainer, tmp_path, caplog):
    base = tree(tmp_path / "models" / "base")
    other = tree(tmp_path / "models" / "other")
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    for number, folder in enumerate((base, other)):
        await prune.write([trainer.checkpoint(row(f"init-{number}", folder, number))])
    with caplog.at_level(logging.WARNING):
        await prune.write([trainer.checkpoint(trainer.save(9))])
        await prune.close()
    assert (base / "weights.bin").exists()
    assert (other / "weights.bin").exists()
    assert trainer.told == []
    said = [each.getMessage() for each in caplog.records if "checkpoint.left" in each.getMessage()]
    assert len(said) == 2  # the first, and how many at the end
    assert f"outside: [{tmp_path / 'models'}]" in said[0]
    assert "left=2" in said[1]


async def test_a_folder_that_is_opted_in_is_pruned_but_not_itself(trainer, tmp_path):
    scratch = tree(tmp_path / "scratch" / "step-1")
    assert await pruned_beside(trainer, scratch, outside=[str(scratch)]) == []
    assert scratch.exists()
    trainer.told.clear()
    assert await pruned_beside(trainer, scratch, outside=[str(tmp_path / "scratch")]) == [str(scratch)]
    assert not scratch.exists()
    assert (tmp_path / "scratch").exists()


def test_an_opted_in_folder_is_no_url():
    with pytest.raises(WrongParamError):
        CheckpointPrune(local={"keep_last": 1, "outside": ["s3://bucket"]})


@pytest.mark.parametrize("way", ["dots", "parent", "run_folder"])
async def test_no_detour_leads_out_of_the_run(trainer, tmp_path, way):
    outside = tree(tmp_path / "elsewhere" / "step-1")
    trainer.run_dir.mkdir(parents=True)
    if way == "dots":
        path = trainer.run_dir / ".." / ".." / "elsewhere" / "step-1"
    elif way == "parent":
        (trainer.run_dir / "there").symlink_to(outside.parent)
        path = trainer.run_dir / "there" / "step-1"
    else:
        path = trainer.run_dir / "deeper" / ".." / ".." / ".." / "elsewhere" / "step-1"
        (trainer.run_dir / "deeper").mkdir()
    assert await pruned_beside(trainer, path) == []
    assert (outside / "weights.bin").exists()


async def test_a_run_folder_that_is_a_link_is_pruned_where_it_leads(trainer, tmp_path):
    real = tmp_path / "scratch" / "low"
    real.mkdir(parents=True)
    trainer.run_dir.parent.mkdir(parents=True)
    trainer.run_dir.symlink_to(real)
    folder = tree(trainer.run_dir / "checkpoints" / "one")
    assert await pruned_beside(trainer, folder) == [str(real / "checkpoints" / "one")]
    assert trainer.run_dir.is_symlink()


async def test_the_folders_themselves_and_what_we_keep_in_them_stay(trainer, tmp_path):
    experiment = trainer.run_dir.parent
    tree(experiment / "journal" / "r0-000001-20260131T120000-aaaaaaaa")
    (experiment / "journal" / "journal.json").write_text('{"evsys_bus_journal": 1}')
    tree(experiment / "records" / "cursors")
    tree(trainer.run_dir / "spool" / "abc")
    (trainer.run_dir / "checkpoints.jsonl").write_text("{}\n")
    named = [
        trainer.run_dir,
        experiment,
        tmp_path,
        experiment / "journal",
        experiment / "journal" / "r0-000001-20260131T120000-aaaaaaaa",
        experiment / "records",
        trainer.run_dir / "spool",
        trainer.run_dir / "spool" / "abc",
        trainer.run_dir / "checkpoints.jsonl",
    ]
    before = sorted(experiment.rglob("*"))
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    events = [trainer.checkpoint(row(f"n{number}", path, number)) for number, path in enumerate(named)]
    await prune.write([*events, trainer.checkpoint(row("last", trainer.run_dir / "nothing", 98))])
    (trainer.run_dir / "nothing").touch()
    await prune.write([trainer.checkpoint(row("last", trainer.run_dir / "nothing", 99))])
    assert set(before) <= set(experiment.rglob("*"))
    assert trainer.told == []


async def test_another_runs_checkpoint_of_the_same_name_stays(trainer, tmp_path):
    high = Trainer(tmp_path)
    high.run_dir = trainer.run_dir.with_name("high")
    high.state = LoopState(0, 100, high.run_dir, ctx=LogContext(high.run_dir.parent, run_key="high"))
    theirs = high.save(19)  # known by an event, though nothing in its folder says what it is
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    await prune.write([msgspec.structs.replace(high.checkpoint(high.save(29)), run="high")])
    trainer.told.clear()
    await prune.write([trainer.checkpoint(row("warm", theirs.state_path)), trainer.checkpoint(trainer.save(49))])
    assert "step-000019" in high.here()
    assert trainer.told == []


async def test_a_folder_with_a_runs_record_is_no_part_of_another_run(trainer):
    other = tree(trainer.run_dir.parent / "others" / "deep" / "checkpoints" / "one")
    (trainer.run_dir.parent / "others" / "deep" / "metrics.jsonl").write_text("{}\n")
    assert await pruned_beside(trainer, other) == []
    assert await pruned_beside(trainer, trainer.run_dir.parent / "others" / "deep") == []
    assert other.exists()


async def test_what_lies_in_the_experiments_folder_is_pruned(trainer):
    folder = tree(trainer.run_dir.parent / "checkpoints" / "low-1")
    assert await pruned_beside(trainer, folder) == [str(folder)]
    assert not folder.exists()


async def test_without_a_context_the_folder_around_the_run_is_not_the_experiments(trainer):
    beside = tree(trainer.run_dir.parent / "models" / "base")
    trainer.state = LoopState(0, 100, trainer.run_dir)
    assert await pruned_beside(trainer, beside) == []
    assert beside.exists()


async def test_files_that_two_events_name_go_with_the_second(trainer):
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}))
    shared = trainer.save(9, name="same")
    again = ManifestRow("again", batch=19, state_path=shared.state_path)
    await prune.write([trainer.checkpoint(shared), trainer.checkpoint(again)])
    assert trainer.here() == ["same"]
    await prune.write([trainer.checkpoint(trainer.save(29))])
    assert trainer.here() == ["step-000029"]


async def test_a_hard_link_elsewhere_keeps_its_content(trainer, tmp_path):
    old = trainer.save(9)
    os.link(old.state_path, tmp_path / "kept")
    assert await pruned_beside(trainer, old.state_path) == [old.state_path]
    assert (tmp_path / "kept").read_bytes() == b"9"


async def test_a_link_within_the_bounds_goes_with_what_it_leads_to(trainer):
    real = tree(trainer.run_dir / "store" / "one")
    link = trainer.run_dir / "linked"
    link.symlink_to(real)
    assert await pruned_beside(trainer, link) == [str(real), str(link)]
    assert not real.exists()
    assert not link.is_symlink()


async def test_a_dry_run_names_only_what_would_go(trainer, tmp_path):
    outside = tree(tmp_path / "base")
    prune = trainer.attach(CheckpointPrune(local={"keep_last": 1}, dry_run=True))
    await prune.write([trainer.checkpoint(row("init", outside)), trainer.checkpoint(trainer.save(9))])
    await prune.write([trainer.checkpoint(trainer.save(19))])
    assert trainer.pruned() == ["step-000009"]


@pytest.mark.parametrize("replaced", ["itself", "parent"])
def test_a_path_that_became_a_link_after_it_was_looked_at_is_not_followed(tmp_path, replaced):
    victim = tree(tmp_path / "victim" / "one")
    mine = tree(tmp_path / "run" / "checkpoints" / "one")
    [found] = plan_removal(row("x", mine), (), RemovalBounds(tmp_path / "run")).removable
    gone = mine if replaced == "itself" else mine.parent
    shutil.rmtree(gone)
    gone.symlink_to(victim if replaced == "itself" else victim.parent)
    with pytest.raises(OSError, match=r"was replaced|Not a directory|Too many levels"):
        remove_path(found)
    assert (victim / "weights.bin").exists()


async def test_at_the_destination_only_what_a_manifest_of_ours_names_goes(trainer, tmp_path):
    url = f"file://{tmp_path}/bucket"
    inline, upload = CheckpointUploadCallback(url), trainer.attach(UploadSink(url))
    intents = []
    for batch in (9, 19, 29):
        saved = trainer.save(batch)
        inline.on_checkpoint(trainer.state, saved)
        intents.append(trainer.checkpoint(saved))
        await upload.write(intents[-1:])
    bucket = tmp_path / "bucket"
    shutil.copytree(bucket / "low", bucket / "low-2")
    shutil.copytree(bucket / "low/step-000009", bucket / "low/step-0000091")
    (bucket / "low/step-000009/notes.txt").write_text("a person's")
    shutil.copy(bucket / "low/step-000009/notes.txt", bucket / "low/notes.txt")
    manifest = bucket / "low/step-000019/manifest.json"
    manifest.write_text(manifest.read_text().replace("state/step-000019", "state/../../notes.txt"))
    await trainer.attach(CheckpointPrune(url=url, remote={"keep_last": 1})).write(intents)
    left = {path.relative_to(bucket / "low").as_posix() for path in (bucket / "low").rglob("*") if path.is_file()}
    assert "step-000009/notes.txt" in left
    assert "notes.txt" in left
    assert not {"step-000009/manifest.json", "step-000009/state/step-000009"} & left
    assert {"step-0000091/manifest.json", "step-0000091/state/step-000009"} <= left
    assert len(list((bucket / "low-2").rglob("manifest.json"))) == 3
