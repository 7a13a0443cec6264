"""What 0.1.0 has left on disk is read, shown and delivered by this version.

How the directory came about stands in ``fixtures/write_directory_of_0_1_0.py``: two lives of one run; behind step 13 of
the second nothing was delivered any more, and the CSV file has a row and a half behind the last mark.
"""

import importlib
import json
import math
import os
import shutil

import pytest

from evsys_bus import CallbackSpec, EventBus, StepEnd, build_callbacks
from evsys_bus.codec import to_json
from support import TESTS
from support.files import read_json_lines
from support.journals import read_envelopes

FIXTURES = TESTS / "fixtures"
EXPECTED = read_json_lines(FIXTURES / "events_of_0_1_0.jsonl")
FIRST, SECOND = sorted({each["stream"] for each in EXPECTED if each["stream"].startswith("r")})
RECORDED = sum(each["stream"] in {FIRST, SECOND} for each in EXPECTED)
ADAPTERS = ["board", "checkpoint_upload", "csv_metrics", "local_logger", "page"]
DELIVERED = 40
"""To each adapter, dead letters included: the first life and, of the second, what was published up to step 13."""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the folder that the program of 0.1.0 ran in."""
    root = tmp_path / "root"
    shutil.copytree(FIXTURES / "directory_of_0_1_0", root, ignore=shutil.ignore_patterns("__pycache__"))
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".seg":
            path.write_bytes(path.read_bytes().replace(b"@ROOT@", os.fsencode(root)))
    for path in root.rglob("entry.json"):  # git keeps no times
        for file in json.loads(path.read_bytes())["files"]:
            os.utime(path.parent / file["name"], ns=(file["mtime_ns"], file["mtime_ns"]))
    monkeypatch.syspath_prepend(FIXTURES / "directory_of_0_1_0")
    importlib.import_module("board_of_0_1_0")
    return root


def recorded(root):
    journal = root / "sweep/journal"
    return [*read_envelopes(journal), *read_envelopes(journal, family="c")]


def holds(found, expected):
    """Whether what 0.1.0 wrote is there, value by value; new keys may have come."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(key in found and holds(found[key], expected[key]) for key in expected)
    return (type(found), found) == (type(expected), expected)


def statuses(evsys_bus, root, kind):
    code, out, _ = evsys_bus("status", root / "sweep", "--json")
    assert code == 0
    return [row for row in map(json.loads, out.splitlines()) if row["type"] == kind]


def test_every_event_is_read_with_its_values(root):
    found = [json.loads(to_json(envelope)) for envelope in recorded(root)]
    assert [(each["stream"], each["seq"]) for each in found] == [(each["stream"], each["seq"]) for each in EXPECTED]
    for each, expected in zip(found, EXPECTED, strict=True):
        assert holds(each, expected), (each, expected)


def test_odd_values_are_read_as_what_they_were(root):
    metrics = next(
        each.event.metrics for each in recorded(root) if isinstance(each.event, StepEnd) and each.event.step_idx == 5
    )
    assert math.isnan(metrics.pop("loss"))
    assert math.copysign(1, metrics["zero"]) == -1
    assert metrics == {
        "up": math.inf,
        "down": -math.inf,
        "zero": 0.0,
        "big": 2.0**70,
        "tiny": 5e-324,
        "flag": True,
        "none": None,
        "text": "=1+1",
        "bytes": b"\x00\xff",
        "list": [1, 2.5, "x"],
        "näme": 0.1,
    }


def test_an_event_of_the_programs_own_is_read_as_one_of_its_class(root):
    [scored] = [each.event for each in recorded(root) if type(each.event).__name__ == "RolloutScored"]
    assert isinstance(scored, importlib.import_module("board_of_0_1_0").RolloutScored)
    assert (scored.reward, scored.tags, scored.notes) == (0.75, ["a", "ü"], {"kl": -math.inf})
    assert (scored.state.step, scored.state.run_key, scored.state.ctx.ids) == (6, "alpha", {})


def test_verify_finds_nothing_wrong(evsys_bus, root):
    code, out, _ = evsys_bus("journal", "verify", root / "sweep")
    assert code == 0, out


def test_status_shows_the_streams_and_how_far_each_adapter_had_got(evsys_bus, root):
    streams = statuses(evsys_bus, root, "stream")
    assert [(each["stream"], each["state"], each["first"], each["last"]) for each in streams] == [
        (FIRST, "dead", 1, 27),
        (SECOND, "dead", 1, RECORDED - 27),
    ]
    assert [each["owner"]["host"] for each in streams] == ["host-1", "host-2"]
    adapters = statuses(evsys_bus, root, "adapter")
    assert [each["adapter"] for each in adapters] == ADAPTERS
    for each in adapters:
        dead = int(each["adapter"] == "board")
        assert (each["delivered"], each["dead"], each["pending"]) == (DELIVERED - dead, dead, RECORDED - DELIVERED)


def test_tail_shows_what_was_recorded_and_what_was_learnt(evsys_bus, root):
    code, out, _ = evsys_bus("tail", root / "sweep", "-n", 1000, "--json")
    assert code == 0
    found = {(each["stream"], each["seq"]): each for each in map(json.loads, out.splitlines())}
    assert found.keys() == {(each["stream"], each["seq"]) for each in EXPECTED}
    assert all(holds(found[each["stream"], each["seq"]], each) for each in EXPECTED)


def test_sync_delivers_what_is_pending_and_nothing_twice(evsys_bus, root):
    letters = (root / "sweep/journal/couriers/board.dead.jsonl").read_bytes()
    code, out, _ = evsys_bus("sync", root / "sweep", "--json", "--progress", "off")
    assert code == 0
    sent = {each["adapter"]: each["sent"] for each in map(json.loads, out.splitlines())}
    assert sent == dict.fromkeys(ADAPTERS, RECORDED - DELIVERED)

    whole = FIXTURES / "logs_of_0_1_0/sweep"
    assert (root / "sweep/alpha/metrics.csv").read_text() == (whole / "alpha/metrics.csv").read_text()
    logs = sorted(path.relative_to(whole) for path in whole.rglob("*.jsonl"))
    assert len(logs) == 3
    for log in logs:
        found, expected = read_json_lines(root / "sweep" / log), read_json_lines(whole / log)
        assert [{**row, **wanted} for row, wanted in zip(found, expected, strict=True)] == found, log
    for page in ("alpha/logs/hypothesis.md", "alpha/logs/conclusion.md", "experiment.md"):
        assert (root / "sweep" / page).is_file(), page

    lines = [tuple(line.split()[:2]) for line in (root / "board.txt").read_text().splitlines()]
    refused = json.loads(letters)["stream"], str(json.loads(letters)["seq"])
    recorded_here = [(each["stream"], str(each["seq"])) for each in EXPECTED if each["stream"] in {FIRST, SECOND}]
    assert lines == [each for each in recorded_here if each != refused]
    assert (root / "sweep/journal/couriers/board.dead.jsonl").read_bytes() == letters
    assert [(each["dead"], each["pending"]) for each in statuses(evsys_bus, root, "adapter")] == [
        (int(name == "board"), 0) for name in ADAPTERS
    ]
    assert evsys_bus("sync", root / "sweep")[0] == 0
    assert len((root / "board.txt").read_text().splitlines()) == len(lines)


def test_checkpoints_that_waited_in_the_spool_arrive_and_those_that_were_uploaded_stay(evsys_bus, root):
    bucket, [spool] = root / "sweep-bucket/alpha", (root / "sweep/alpha/spool").iterdir()
    before = {path: path.stat().st_mtime_ns for path in bucket.rglob("*") if path.is_file()}
    there = sorted(path.name for path in bucket.iterdir() if path.is_dir())
    waiting = sorted(path.parent.name.partition("@")[0] for path in spool.glob("*/entry.json"))
    assert (there, waiting) == (["step_11", "step_3", "step_7"], ["final-000019", "step_15", "step_19"])
    assert evsys_bus("sync", root / "sweep", "--adapter", "checkpoint_upload", "--progress", "off")[0] == 0
    assert not list(spool.glob("*/entry.json"))
    assert sorted(path.name for path in bucket.iterdir() if path.is_dir()) == sorted([*there, *waiting])
    assert (bucket / "step_15/state/state/weights.bin").read_bytes() == bytes(range(15, 115))
    assert (bucket / "final-000019/sampler/sampler.bin").read_bytes() == b"sampler of final"
    assert json.loads((bucket / "latest.json").read_bytes())["checkpoint"] == "final-000019"
    files = {path: path.stat().st_mtime_ns for path in before if path.name != "latest.json"}
    assert files == {path: before[path] for path in files}


def test_a_program_of_this_version_goes_on_in_the_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    specs = [
        CallbackSpec("csv_metrics", {"out_path": "{run_dir}/metrics.csv"}, placement="follow"),
        CallbackSpec("board_of_0_1_0", {"path": "board.txt"}, name="board"),
    ]
    with EventBus(build_callbacks(specs), journal="sweep/journal") as bus:
        pass
    deliveries = {
        each.name: (each.recorded, each.delivered, each.dead, each.pending) for each in bus.receipt.deliveries
    }
    assert deliveries == {"csv_metrics": (RECORDED, RECORDED, 0, 0), "board": (RECORDED, RECORDED - 1, 1, 0)}
    whole = FIXTURES / "logs_of_0_1_0/sweep/alpha/metrics.csv"
    assert (root / "sweep/alpha/metrics.csv").read_text() == whole.read_text()
