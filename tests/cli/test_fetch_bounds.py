"""``fetch`` copies what the manifest says and nothing else, into its folder and nowhere else; else it says why."""

import hashlib
import json
import os
import unicodedata

import msgspec
import pytest

from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.folder_store import FolderStore
from evsys_adapters.checkpoints.manifest import Manifest
from evsys_adapters.checkpoints.restore import fetch_checkpoint
from evsys_adapters.checkpoints.store import DamagedError, Stored
from evsys_adapters.checkpoints.store_urls import StoreOptions, StorePool
from tests.cli.test_checkpoints_cli import bucket, low, train

__all__ = ["bucket", "low", "train"]  # fixtures


def there(tmp_path):
    return tmp_path / "bucket/low/step-000029"


def altered(tmp_path, change):
    """The manifest at the destination, changed."""
    path = there(tmp_path) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def copied(folder):
    return [path for path in (folder / "fetched").rglob("*") if path.is_file() and "manifest.json" not in path.name]


@pytest.mark.parametrize("size", [9 << 30, 0, 3])
def test_an_object_of_another_size_is_refused_before_anything_is_copied(evsys_bus, tmp_path, low, size):
    with (there(tmp_path) / "state/weights-29/2.bin").open("wb") as file:
        file.truncate(size)
    code, _, err = evsys_bus("fetch", low)
    assert code == 4
    assert "EB404" in err
    assert copied(low) == []


def test_an_object_that_is_gone_is_named_before_anything_is_copied(evsys_bus, tmp_path, low):
    (there(tmp_path) / "state/weights-29/2.bin").unlink()
    code, _, err = evsys_bus("fetch", low)
    assert code == 4
    assert "step-000029/state/weights-29/2.bin is not in" in err
    assert copied(low) == []


async def test_a_stream_that_gives_more_than_it_said_is_stopped(tmp_path):
    class Growing(FolderStore):
        """One whose object becomes larger once its size was looked at."""

        async def get_file(self, key, path, *, stored=None, on_progress=None):
            def grow(done, size):
                with (tmp_path / "store" / key).open("ab") as file:
                    file.write(b"x" * 1000)

            return await super().get_file(key, path, stored=stored, on_progress=grow)

    (tmp_path / "store").mkdir()
    (tmp_path / "store/k").write_bytes(os.urandom(9 << 20))
    with pytest.raises(DamagedError, match="more than"):
        await Growing(tmp_path / "store").get_file("k", tmp_path / "out/k", stored=Stored("k", 9 << 20, "0" * 64))
    assert list((tmp_path / "out").iterdir()) == []


WRONG = {
    "a negative size": lambda each: each["files"][0].update(size=-1),
    "no digest": lambda each: each["files"][0].pop("sha256"),
    "an empty digest": lambda each: each["files"][0].update(sha256=""),
    "a digest that is a path": lambda each: each["files"][0].update(sha256="../" * 20),
    "a name twice": lambda each: each["files"].append(each["files"][0]),
    "a file that is a folder": lambda each: each["files"].append(each["files"][0] | {"name": "state/weights-29"}),
    "our own name": lambda each: each["files"][0].update(name="manifest.json"),
    "NUL": lambda each: each["files"][0].update(name="state/a\0b"),
    "absolute": lambda each: each["files"][0].update(name="/etc/evsys"),
    "two thousand folders": lambda each: each["files"][0].update(name="state/" + "d/" * 2000 + "f"),
    "dots": lambda each: each["files"][0].update(name="state/../../../x"),
    "a place that leads out": lambda each: each.update(state="../../x"),
    "a size that is no number": lambda each: each["files"][0].update(size="10"),
    "another checkpoint": lambda each: each["row"].update(name="../../step-000029"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_manifest_that_cannot_be_right_is_refused(evsys_bus, tmp_path, low, wrong):
    altered(tmp_path, WRONG[wrong])
    before = sorted(each for each in tmp_path.rglob("*") if "fetched" not in each.parts)
    code, _, err = evsys_bus("fetch", f"{low}@step-000029")
    assert code == 4, err
    assert "error[EB40" in err
    assert "Traceback" not in err
    assert copied(low) == []
    assert before == sorted(each for each in tmp_path.rglob("*") if "fetched" not in each.parts)


def test_a_checkpoint_that_has_no_room_here_is_refused_before_it_is_copied(evsys_bus, tmp_path, low):
    huge = 1 << 52
    with (there(tmp_path) / "sampler/sampler-29").open("wb") as file:
        file.truncate(1 << 42)  # sparse
    altered(tmp_path, lambda each: [file.update(size=1 << 42) for file in each["files"] if "sampler" in file["name"]])
    code, _, err = evsys_bus("fetch", low)
    assert code != 0
    assert "no room" in err
    assert huge > os.statvfs(tmp_path).f_bavail
    assert copied(low) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null", b'{"a":' * 50_000])
def test_a_damaged_manifest_is_said_to_be(evsys_bus, tmp_path, low, content):
    (there(tmp_path) / "manifest.json").write_bytes(content)
    code, _, err = evsys_bus("fetch", f"{low}@step-000029")
    assert code == 4
    assert "manifest.json is damaged" in err
    assert evsys_bus("fetch", low)[0] == 0  # the newest that is whole


@pytest.mark.parametrize("name", ["manifest.json", "latest.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "huge", "nested"])
def test_small_objects_that_are_none_are_not_waited_for_nor_read(evsys_bus, tmp_path, low, name, kind):
    path = there(tmp_path) / name if name == "manifest.json" else there(tmp_path).parent / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "nested":
        path.write_bytes(b'{"a":' * 50_000)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 36)
    code, out, err = evsys_bus("fetch", low)
    assert code == 0, err
    assert ("step-000019" if name == "manifest.json" else "step-000029") in out


@pytest.mark.parametrize("what", ["file", "folder", "named", "link"])
def test_what_is_no_fetched_checkpoint_is_not_overwritten(evsys_bus, tmp_path, low, what):
    root = low / "fetched/step-000029"
    root.parent.mkdir()
    if what == "file":
        root.write_text("a person's")
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        root.symlink_to(tmp_path / "elsewhere")
    else:
        path = root / ("notes/x" if what == "folder" else "state/weights-29/1.bin")
        path.parent.mkdir(parents=True)
        path.write_text("a person's")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, err = evsys_bus("fetch", low)
    assert code == 4
    assert "EB402" in err or "a link that leaves" in err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_folder_that_is_a_link_elsewhere_is_not_written_through(evsys_bus, tmp_path, low):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/fetched").symlink_to(tmp_path / "elsewhere")
    code, _, err = evsys_bus("fetch", low, "--to", "new")
    assert code == 4
    assert "a link that leaves" in err
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_no_folder_is_made_behind_a_link(evsys_bus, tmp_path, low):
    (tmp_path / "elsewhere").mkdir()
    root = low / "fetched/step-000029"
    root.mkdir(parents=True)
    (root / "state").symlink_to(tmp_path / "elsewhere")
    assert evsys_bus("fetch", low)[0] == 4
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_interrupted_fetch_goes_on(evsys_bus, tmp_path, low):
    assert evsys_bus("fetch", low)[0] == 0
    root = low / "fetched/step-000029"
    (root / "manifest.json").rename(root / ".manifest.json")
    (root / "state/weights-29/1.bin").unlink()
    (root / "state/weights-29/2.bin").write_bytes(b"torn")
    assert evsys_bus("fetch", low)[0] == 0
    assert (root / "state/weights-29/2.bin").read_bytes() == b"29-2"
    assert sorted(path.name for path in root.iterdir()) == ["manifest.json", "sampler", "state"]
    (root / "manifest.json").unlink()  # as the version before left it: whole files alone
    (root / "state/weights-29/1.bin").unlink()
    assert evsys_bus("fetch", low)[0] == 0
    (root / "manifest.json").write_bytes(b"")
    assert evsys_bus("fetch", low)[0] == 0


@pytest.mark.long
@pytest.mark.asyncio(loop_factories=["asyncio"])  # which loop it is makes no difference to the files
async def test_thousands_of_files_and_names_that_differ_in_case_are_fetched(tmp_path):
    root = tmp_path / "bucket/low/many-000001"
    names = [f"state/many/{number:05d}.bin" for number in range(1000)]
    names += ["state/many/Case", "state/many/case", "state/many/é", unicodedata.normalize("NFD", "state/many/é")]
    (root / "state/many").mkdir(parents=True)
    files = []
    for name in names:
        (root / name).write_bytes(name.encode())
        digest = hashlib.sha256(name.encode()).hexdigest()
        files.append({"name": name, "size": len(name.encode()), "sha256": digest})
    plain = {"run": "low", "row": {"name": "many", "batch": 1}, "stream": "r0-x", "seq": 1, "files": files}
    manifest = msgspec.convert(plain | {"state": "state/many"}, Manifest)
    places = StorePool(StoreOptions())
    place = await places.get(f"file://{tmp_path}/bucket")
    row = await fetch_checkpoint(Destination(place.store, place.prefix, "low"), manifest, tmp_path / "run/fetched")
    fetched = tmp_path / "run/fetched/many-000001/state/many"
    assert row.state_path == str(fetched)
    found = {path.name: path.read_bytes() for path in fetched.iterdir()}
    assert found == {name.rpartition("/")[2]: name.encode() for name in names}
