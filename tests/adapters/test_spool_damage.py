"""What a power cut, or a person, does to the small files of a spool costs no checkpoint, and ends no command."""

import json
import os
import shutil

import msgspec
import pytest

from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
from evsys_adapters.checkpoints.spool import Spool
from evsys_adapters.checkpoints.store import FileIdentity, UploadedPart, UploadLedger, UploadPlan
from evsys_bus import LogContext, LoopState, ManifestRow
from evsys_bus.errors import BatchTooLargeError, RejectedError
from tests.adapters.test_checkpoint_upload import Upload, fetched, remove


@pytest.fixture
def upload(tmp_path):
    return Upload(tmp_path, f"file://{tmp_path}/bucket")


def entry_of(upload, name="step-000009"):
    [folder] = upload.spool.folder.glob(f"{name}@????????")
    return folder


def as_directory(path):
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def as_link(path):
    path.unlink()
    path.symlink_to(path)


def of_another_version(path):
    path.write_bytes(b'{"format": 7, "checkpoint": {"name": "x"}}')


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\x00" * path.stat().st_size),
    "missing": lambda path: path.unlink(),
    "directory": as_directory,
    "link": as_link,
    "version": of_another_version,
    "no text": lambda path: path.write_bytes(b"\xff\xfe{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("originals", ["here", "gone"])
async def test_a_damaged_entry_is_made_anew_and_uploaded(upload, damage, originals):
    row = upload.save()
    event = upload.announce(row)
    DAMAGES[damage](entry_of(upload) / "entry.json")
    if originals == "gone":
        shutil.rmtree(upload.state.output_dir / "checkpoints")
    assert [each.folder.name[:11] for each in upload.spool.pending()] == ["step-000009"]
    await upload.deliver(event)
    assert await fetched(upload, "step-000009") == {
        "state/step-000009.state": b"state",
        "sampler/step-000009.sampler": b"sampler",
    }
    assert upload.spool.pending() == []


@pytest.mark.long_on_uvloop
async def test_an_entry_is_made_anew_wherever_it_was_torn(upload):
    row = upload.save()
    upload.announce(row)
    path = entry_of(upload) / "entry.json"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        [pending] = upload.spool.pending(row)
        assert pending.entry is None
        repaired = upload.spool.repair(pending, row, ("state", "sampler"))
        assert msgspec.structs.replace(repaired.entry, number=1) == msgspec.json.decode(
            whole, type=type(repaired.entry)
        )
        assert upload.spool.pending(row)[0].entry == repaired.entry


async def test_files_that_are_missing_in_an_entry_are_linked_again(upload):
    row = upload.save()
    event = upload.announce(row)
    (entry_of(upload) / "state/step-000009.state").unlink()
    remove(row.sampler_path)  # the other one is only in the spool by now
    await upload.deliver(event)
    assert (await fetched(upload, "step-000009"))["state/step-000009.state"] == b"state"


@pytest.mark.parametrize("entry", ["whole", "torn"])
async def test_what_cannot_be_made_anew_is_a_dead_letter_with_the_reason(upload, entry):
    event = upload.announce(upload.save())
    if entry == "torn":
        (entry_of(upload) / "entry.json").write_bytes(b"{")
    (entry_of(upload) / "state/step-000009.state").unlink()
    shutil.rmtree(upload.state.output_dir / "checkpoints")
    with pytest.raises(RejectedError, match="is missing"):
        await upload.courier.sink.write([event])
    assert [path.name[-8:] for path in upload.spool.folder.glob("step-*")] == [".refused"]


async def test_a_spool_that_was_removed_is_made_of_what_is_there(upload):
    events = [upload.announce(upload.save(f"step-{batch:06d}", batch)) for batch in (9, 19)]
    shutil.rmtree(upload.spool.folder.parent)
    remove(upload.state.output_dir / "checkpoints/step-000019.state")
    await upload.deliver(events[0])
    assert len(await fetched(upload, "step-000009")) == 2
    with pytest.raises((RejectedError, BatchTooLargeError)):
        await upload.deliver(events[1])


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_note_of_an_upload_is_asked_again(upload, damage, caplog):
    row = upload.save()
    event = upload.announce(row)
    await upload.deliver(event)
    [marker] = upload.spool.folder.glob("*.done.json")
    shutil.rmtree(upload.state.output_dir / "checkpoints")
    DAMAGES[damage](marker)
    if damage != "missing":
        assert (upload.spool.uploaded(), len(upload.spool.unreadable(row))) == ([], 1)
        await upload.deliver(upload.announce(row, hook=False))
        assert [done.manifest.row.name for done in upload.spool.uploaded(row)] == ["step-000009"]
    assert "Traceback" not in caplog.text


async def test_two_that_wait_under_one_name_keep_their_order_when_the_clock_goes_back(upload):
    first = upload.announce(upload.save("final", 9))
    upload.announce(upload.save("final", 9, state=b"again"))
    early, late = sorted(upload.spool.pending(), key=lambda each: each.entry.number)
    os.utime(late.folder, ns=(1, 1))
    assert [each.folder for each in upload.spool.pending()] == [early.folder, late.folder]
    await upload.deliver(first)
    assert (await fetched(upload, "final-000009"))["state/final.state"] == b"state"


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_upload_whose_record_is_damaged_is_begun_again(tmp_path, damage):
    ledger = UploadLedger(tmp_path / "uploads")
    plan = UploadPlan("here", "k", "/x", FileIdentity(1, 2, 3), upload_id="u")
    ledger.begin(plan)
    ledger.add_part(plan, UploadedPart(1, "tag"))
    [path] = (tmp_path / "uploads").iterdir()
    DAMAGES[damage](path)
    assert ledger.uploads_under("here", "") == []
    assert ledger.find("here", "k") is None
    ledger.remove("here", "k")
    ledger.begin(plan)
    assert ledger.find("here", "k") == (plan, {})


def test_a_record_torn_anywhere_has_the_parts_before(tmp_path):
    ledger = UploadLedger(tmp_path)
    plan = UploadPlan("here", "k", "/x", FileIdentity(1, 2, 3), upload_id="u")
    ledger.begin(plan)
    for number in (1, 2):
        ledger.add_part(plan, UploadedPart(number, f"tag{number}"))
    [path] = tmp_path.glob("*.upload")
    whole = path.read_bytes()
    known = []
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = ledger.find("here", "k")
        known.append(-1 if found is None else len(found[1]))
    assert known == sorted(known)
    assert known[-1] == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_commands_show_what_is_damaged_and_end_well(evsys_bus, tmp_path, damage):
    run_dir = tmp_path / "runs/sweep/low"
    state = LoopState(0, 9, run_dir, ctx=LogContext(run_dir.parent, run_key="low"))
    rows = []
    for number in range(4):
        path = run_dir / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
        rows.append(ManifestRow(f"step-{number}", batch=number, state_path=str(path)))
        CheckpointUploadCallback("file:///nowhere", what="state").on_checkpoint(state, rows[-1])
    (run_dir / "checkpoints.jsonl").write_bytes(
        b"".join(msgspec.json.encode(msgspec.structs.asdict(row)) + b"\n" for row in rows)
    )
    spool = Spool.of(run_dir, "file:///nowhere")
    [entry] = spool.folder.glob("step-1@*")
    DAMAGES[damage](entry / "entry.json")
    for name in ("step-2", "step-3"):
        [other] = spool.folder.glob(f"{name}@*")
        shutil.copy(other / "entry.json", f"{other}.done.json")
        DAMAGES[damage](other.with_name(f"{other.name}.done.json"))
    shutil.rmtree(other)
    code, out, err = evsys_bus("checkpoints", "runs/sweep/low", "--json")
    assert (code, "Traceback" in err) == (0, False)
    states = [[each["state"] for each in json.loads(line)["remote"]] for line in out.splitlines()]
    assert states == [["waiting"], ["waiting"], ["waiting"], [] if damage == "missing" else ["unknown"]]
