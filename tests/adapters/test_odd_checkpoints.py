"""``checkpoint_upload`` of folders that hold what is no ordinary file: the rest arrives, and nothing waits for it."""

import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import anyio
import numpy as np
import pytest

from evsys_adapters.checkpoint_upload import CheckpointUploadCallback, UploadSink
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.restore import choose_checkpoint, fetch_checkpoint
from evsys_adapters.checkpoints.store_urls import StoreOptions, StorePool
from evsys_bus import Checkpoint, Envelope, LogContext, LoopState, ManifestRow
from evsys_bus.codec import decode, encode
from evsys_bus.errors import RejectedError

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


class Run:
    """A run with both halves of `checkpoint_upload`; its destination is a folder."""

    def __init__(self, folder):
        self.folder = folder / "sweep" / "low"
        self.folder.mkdir(parents=True)
        self.saved = self.folder / "saved"
        self.url = f"file://{folder}/bucket"
        self.hook = CheckpointUploadCallback(self.url)
        self.sink = UploadSink(self.url)
        self.sink.evsys_attached = self
        ctx = LogContext(folder / "sweep", run_key="low")
        self.state = LoopState(step=0, num_steps=100, output_dir=self.folder, ctx=ctx)
        self.back = folder / "back"
        self.seq = 0

    def publish(self, event):
        pass

    def announce(self, path, batch=9, hook=True):
        self.seq += 1
        row = ManifestRow(f"step-{batch}", batch=batch, state_path=path)
        if hook:
            self.hook.on_checkpoint(self.state, row)
        stream = "r0-20260131T120000-aaaaaaaa"
        return decode(encode(Envelope(stream, self.seq, 0.0, Checkpoint(self.state, row), run="low")))

    async def upload(self, path, batch=9, hook=True):
        """Upload a checkpoint and fetch it; returns the names and contents of its files, and its manifest."""
        with anyio.fail_after(15):
            await self.sink.write([self.announce(path, batch, hook)])
        return await self.fetched(batch)

    async def fetched(self, batch=9):
        place = await StorePool(StoreOptions()).get(self.url)
        destination = Destination(place.store, place.prefix, "low")
        manifest = await choose_checkpoint(destination, f"step-{batch}")
        await fetch_checkpoint(destination, manifest, self.back)
        root = self.back / f"step-{batch}" / (manifest.state or "")
        found = {each.relative_to(root).as_posix(): each.read_bytes() for each in root.rglob("*") if each.is_file()}
        return found, manifest


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def add_socket(folder):
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket has to be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("odd")
    os.chdir(here)


def add_device(folder):
    try:
        os.mknod(folder / "odd", 0o20600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


def add_deep_file(folder):
    """Make a file whose path is longer than any that can be opened."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        for _ in range(30):
            Path("d" * 200).mkdir()
            os.chdir("d" * 200)
        Path("model.pt").write_bytes(b"weights")
    finally:
        os.chdir(here)


ODD = {
    "a socket": add_socket,
    "a FIFO": lambda folder: os.mkfifo(folder / "odd"),
    "a device": add_device,
    "a link to nothing": lambda folder: (folder / "odd").symlink_to("/nothing/there"),
    "a link to itself": lambda folder: (folder / "odd").symlink_to("odd"),
    "a link to everything": lambda folder: (folder / "odd").symlink_to("/"),
    "a link to the run": lambda folder: (folder / "odd").symlink_to(folder.parent),
    "a link to a device": lambda folder: (folder / "odd").symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("what", ODD)
async def test_what_is_no_file_is_left_out_and_named_and_the_rest_arrives(run, what, hook, caplog):
    run.saved.mkdir()
    (run.saved / "model.pt").write_bytes(b"weights")
    ODD[what](run.saved)
    found, manifest = await run.upload(str(run.saved), hook=hook)
    assert found == {"model.pt": b"weights"}
    assert list(manifest.left_out) == ["state/saved/odd"]
    assert "files_left_out" in caplog.text


@pytest.mark.parametrize("what", ["a FIFO", "a device"])
async def test_a_checkpoint_that_is_no_file_is_a_dead_letter_and_the_next_one_arrives(run, what):
    ODD[what](run.folder)
    with pytest.raises(RejectedError, match="not a regular file"):
        await run.upload(str(run.folder / "odd"))
    (run.folder / "model.pt").write_bytes(b"weights")
    found, _ = await run.upload(str(run.folder / "model.pt"), batch=19)
    assert found == {} or list(found.values()) == [b"weights"]


@pytest.mark.long
async def test_what_lies_within_more_folders_than_can_be_fetched_is_left_out_and_named(run):
    run.saved.mkdir()
    (run.saved / "model.pt").write_bytes(b"weights")
    path = run.saved
    for _ in range(450):
        path /= "d"
        path.mkdir()
    (path / "model.pt").write_bytes(b"weights")
    found, manifest = await run.upload(str(run.saved))
    assert found == {"model.pt": b"weights"}
    [why] = manifest.left_out.values()
    assert why == "it is within 395 folders"


async def test_a_folder_in_which_nothing_can_be_uploaded_is_a_dead_letter(run):
    run.saved.mkdir()
    os.mkfifo(run.saved / "odd")
    with pytest.raises(RejectedError, match="none of its files"):
        await run.upload(str(run.saved))


LIST = """
    import os, sys
    from pathlib import Path
    from evsys_adapters.checkpoints.source_files import files_of
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for name, found in files_of(Path(sys.argv[1]), Path("/nowhere")):
        print(name, found if isinstance(found, str) else "", sep=":")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody else")
async def test_what_may_not_be_read_is_left_out(program):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # noqa: PTH101
        saved = Path(folder, "saved")
        (saved / "closed").mkdir(parents=True)
        for name, mode in (("a", 0o644), ("b", 0o600), ("closed/c", 0o644)):
            (saved / name).write_bytes(b"-")
            (saved / name).chmod(mode)
        (saved / "closed").chmod(0o700)
        out, err = program(LIST, str(saved)).communicate(timeout=15)
    assert out.splitlines() == ["a:", "b:it may not be read", "closed:Permission denied"], err


NAMES = [b"caf\xe9.pt", b"two\nlines", b"tab\tand \\ and *?", "ü".encode(), b".hidden", b"-rf", b"a" * 255]


async def test_names_of_any_bytes_arrive(run):
    run.saved.mkdir()
    for number, name in enumerate(NAMES):
        (run.saved / os.fsdecode(name)).write_bytes(b"%d" % number)
    found, manifest = await run.upload(str(run.saved))
    assert sorted(found.values()) == [b"%d" % number for number in range(len(NAMES))]
    assert manifest.left_out == {}
    assert {"ü", ".hidden"} <= set(found)


async def test_a_folder_whose_own_name_is_odd_arrives(run):
    saved = run.folder / os.fsdecode(b"caf\xe9\n")
    saved.mkdir()
    (saved / "model.pt").write_bytes(b"weights")
    found, _ = await run.upload(str(saved))
    assert found == {"model.pt": b"weights"}


async def test_a_path_that_is_an_object_or_has_dots_arrives(run):
    run.saved.mkdir()
    (run.saved / "model.pt").write_bytes(b"weights")
    assert (await run.upload(run.saved))[0] == {"model.pt": b"weights"}
    assert (await run.upload(f"{run.folder}/saved/../saved", batch=19))[0] == {"model.pt": b"weights"}
    assert (await run.upload(f"{run.saved}/.", batch=29))[0] == {"model.pt": b"weights"}


async def test_a_path_below_the_home_directory_arrives(run, monkeypatch):
    monkeypatch.setenv("HOME", str(run.folder))
    run.saved.mkdir()
    (run.saved / "weights").write_bytes(b"weights")
    files, _ = await run.upload("~/saved")
    assert files == {"weights": b"weights"}


class NamedRow(NamedTuple):
    name: str
    batch: int
    state_path: str


@pytest.mark.parametrize(
    "make",
    [
        lambda path: ManifestRow("step-9", batch=9.0, epoch=None, state_path=path),
        lambda path: ManifestRow("step-9", batch=np.int64(9), state_path=path),
        lambda path: {"name": "step-9", "batch": 9.0, "state_path": path, "loss": 0.5},
        lambda path: NamedRow("step-9", 9, path),
        lambda path: SimpleNamespace(name="step-9", batch=np.float32(9), state_path=path),
    ],
    ids=["float", "numpy", "dict", "named-tuple", "object"],
)
async def test_a_row_of_any_class_and_with_whole_numbers_of_any_type_arrives(run, make):
    run.saved.mkdir()
    (run.saved / "weights").write_bytes(b"weights")
    row = make(str(run.saved))
    run.hook.on_checkpoint(run.state, row)
    stream = "r0-20260131T120000-aaaaaaaa"
    await run.sink.write([decode(encode(Envelope(stream, 1, 0.0, Checkpoint(run.state, row), run="low")))])
    files, manifest = await run.fetched(9)
    assert files == {"weights": b"weights"}
    assert (manifest.row.batch, manifest.row.epoch) == (9, 0)


async def test_a_folder_without_files_arrives(run):
    run.saved.mkdir()
    found, manifest = await run.upload(str(run.saved))
    assert (found, manifest.files, manifest.left_out) == ({}, [], {})


async def test_hard_links_sparse_files_and_names_that_differ_in_case_arrive(run, tmp_path):
    run.saved.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"shared")
    (run.saved / "link").hardlink_to(tmp_path / "elsewhere")
    (run.saved / "outside").symlink_to(tmp_path / "elsewhere")
    with (run.saved / "sparse").open("wb") as file:
        file.truncate(3 << 20)
    (run.saved / "Model.pt").write_bytes(b"A")
    (run.saved / "model.pt").write_bytes(b"b")
    found, _ = await run.upload(str(run.saved))
    assert found == {
        "link": b"shared",
        "outside": b"shared",
        "sparse": bytes(3 << 20),
        "Model.pt": b"A",
        "model.pt": b"b",
    }


@pytest.mark.parametrize("name", ["d", pytest.param("folder", marks=pytest.mark.long)])
async def test_a_folder_nested_300_deep_arrives_with_its_names(run, name):
    deepest = run.saved.joinpath(*[name] * 300)
    deepest.mkdir(parents=True)
    (deepest / "model.pt").write_bytes(b"weights")
    (run.saved / "config.json").write_bytes(b"{}")
    found, manifest = await run.upload(str(run.saved))
    assert found == {"/".join([name] * 300) + "/model.pt": b"weights", "config.json": b"{}"}
    assert max(len(file.object_name) for file in manifest.files) < 900


async def test_what_is_too_deep_for_any_path_is_left_out(run):
    run.saved.mkdir()
    (run.saved / "config.json").write_bytes(b"{}")
    add_deep_file(run.saved)
    found, manifest = await run.upload(str(run.saved))
    assert found == {"config.json": b"{}"}
    assert list(manifest.left_out.values()) == ["File name too long"]


async def test_a_model_in_the_runs_own_folder_arrives_without_what_is_ours(run):
    (run.folder / "model.pt").write_bytes(b"weights")
    (run.folder / "metrics.csv").write_bytes(b"step")
    (run.folder / "table.csv").write_bytes(b"step")
    (run.folder / ".table.csv.run").write_bytes(b"low\0csv_metrics\n")
    (run.folder / "events").mkdir()
    (run.folder / "events" / ".run").write_bytes(b"low\0tensorboard_logger\n")
    (run.folder / "events" / "tfevents.1").write_bytes(b"-")
    (run.folder / "journal").mkdir()
    (run.folder / "journal" / "journal.json").write_bytes(b'{"format": 1}')
    (run.folder / "metrics").mkdir()
    (run.folder / "metrics" / "metrics.csv").write_bytes(b"the model's own")
    for batch in (9, 19):
        found, manifest = await run.upload(str(run.folder), batch)
        assert found == {"model.pt": b"weights", "metrics/metrics.csv": b"the model's own"}
        assert manifest.left_out == {}


async def test_files_that_vanish_after_they_were_announced_arrive(run):
    run.saved.mkdir()
    (run.saved / "model.pt").write_bytes(b"weights")
    envelope = run.announce(str(run.saved))
    shutil.rmtree(run.saved)
    await run.sink.write([envelope])
    assert (await run.fetched())[0] == {"model.pt": b"weights"}


async def test_a_checkpoint_that_changed_is_a_dead_letter_and_the_next_one_arrives(run):
    run.saved.mkdir()
    (run.saved / "model.pt").write_bytes(b"weights")
    envelope = run.announce(str(run.saved))
    with (run.saved / "model.pt").open("ab") as file:
        file.write(b" and more")
    with pytest.raises(RejectedError, match="modified"):
        await run.sink.write([envelope])
    (run.folder / "next").mkdir()
    (run.folder / "next" / "model.pt").write_bytes(b"weights")
    assert (await run.upload(str(run.folder / "next"), batch=19))[0] == {"model.pt": b"weights"}


@pytest.mark.long
async def test_directories_that_are_linked_to_each_other_arrive_in_a_bounded_number_of_copies(run):
    names = [f"d{number}" for number in range(6)]
    for name in names:
        (run.saved / name).mkdir(parents=True)
        (run.saved / name / "weights").write_bytes(name.encode())
        for other in names:
            (run.saved / name / other).symlink_to(run.saved / other)
    found, manifest = await run.upload(str(run.saved))
    assert {f"{name}/weights" for name in names} <= set(found)
    assert len(found) < 1000
    assert manifest.left_out


async def test_a_log_that_grows_is_left_out_and_the_rest_arrives(run):
    run.saved.mkdir()
    for name in ("model.pt", "train.log", "quiet.log"):
        (run.saved / name).write_bytes(b"-")
    envelope = run.announce(str(run.saved))
    with (run.saved / "train.log").open("ab") as file:
        file.write(b"more")
    await run.sink.write([envelope])
    found, manifest = await run.fetched()
    assert found == {"model.pt": b"-", "quiet.log": b"-"}
    assert manifest.left_out == {"state/saved/train.log": "it has grown since the checkpoint event"}


@pytest.mark.long
@pytest.mark.timeout(180)
async def test_20_000_small_files_arrive(run):
    run.saved.mkdir()
    for number in range(20_000):
        (run.saved / f"{number:05d}").write_bytes(b"%d" % number)
    start = time.monotonic()
    envelope = run.announce(str(run.saved))
    assert time.monotonic() - start < 5
    with anyio.fail_after(120):
        await run.sink.write([envelope])
    place = await StorePool(StoreOptions()).get(run.url)
    manifest = await Destination(place.store, place.prefix, "low").manifest("step-9")
    assert len(manifest.files) == 20_000
