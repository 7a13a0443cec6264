"""Folders whose names are no UTF-8, or hold control characters: what is delivered, and shown, from within them."""

import json
import os
import subprocess
import sys

import msgspec
import pytest

from evsys_bus.codec import decode, encode, to_json
from evsys_bus.codec.decode import RunContexts
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.events import Envelope, RunStart, StepEnd, TrainStart
from evsys_bus.journal import Cursor, CursorStore, Position
from evsys_bus.location import decode_json, encode_json
from support.files import parse_json_lines
from support.programs import EVSYS_BUS

NAMES = [b"r\xe9sum\xe9", b"\xff", "日本".encode("shift_jis"), b"bell\x07 and\nline", b"\xc3\xa9-\xe9"]

PROGRAM = r"""
import sys
from evsys_bus import EventBus, LogContext, LoopState, RunStart, StepEnd, TrainingBatch, TrainStart, build_callbacks

specs = [
    {"kind": "local_logger", "placement": "follow"},
    {"kind": "csv_metrics", "params": {"out_path": "rows.csv"}, "placement": "follow"},
]
ctx = LogContext("exp").for_run("low")
state = LoopState(0, 10, "exp/low", ctx=ctx)
patience = float(sys.argv[1])
with EventBus(build_callbacks(specs), journal="exp/journal", drain_timeout=patience, linger_seconds=0.1) as bus:
    bus.publish(RunStart(ctx))
    bus.publish(TrainStart(state))
    for state.step in range(10):
        bus.publish(StepEnd(state, state.step, TrainingBatch(), {"v": float(state.step)}))
"""


def command(folder, *arguments):
    """`evsys-bus` in this folder, with what it says."""
    program = EVSYS_BUS
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("name", "patience"),
    [
        pytest.param(name, patience, marks=[pytest.mark.long] * (number > 0))
        for number, (name, patience) in enumerate(zip(NAMES, ["20", "0", "20", "0", "0"], strict=True))
    ],
)
def test_followers_are_delivered_to_from_any_folder_at_once_and_by_sync(tmp_path, name, patience):
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    subprocess.run([sys.executable, "-c", PROGRAM, patience], cwd=folder, check=True, timeout=60, capture_output=True)
    for arguments in (["sync", "exp"], ["sync", folder / "exp"]):
        done = command(folder, *arguments)
        assert done.returncode == 0, done.stderr
    rows = (folder / "rows.csv").read_text().splitlines()
    assert len(rows) == 11
    log = (folder / "exp/low/logs/training/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(10))
    assert list(tmp_path.iterdir()) == [folder]  # nothing beside it under a name that is only like it


@pytest.mark.long
def test_what_commands_say_of_such_a_folder_is_told_and_is_json_where_that_is_asked_for(tmp_path):
    folder = tmp_path / os.fsdecode(NAMES[0])
    folder.mkdir()
    subprocess.run([sys.executable, "-c", PROGRAM, "20"], cwd=folder, check=True, timeout=60, capture_output=True)
    for words in ("status exp", "tail exp", "show exp/low", "journal verify exp", "status --verify exp"):
        done = command(folder, *words.split())
        assert (done.returncode, done.stderr) == (0, b"") or words.startswith("show"), done.stderr
        assert done.returncode == 0
        assert done.stdout
    for words in ("status exp --json", "tail exp --json", "sync exp --json"):
        done = command(folder, *words.split())
        assert done.returncode == 0, done.stderr
        assert parse_json_lines(done.stdout) or words.startswith("sync")


@pytest.mark.parametrize("name", NAMES)
def test_the_directories_of_handles_come_back_as_they_were(name):
    root = os.fsdecode(b"/data/" + name)
    ctx = LogContext(root).for_run("a")
    state = LoopState(3, 10, f"{root}/a", ctx=ctx)
    moved = LoopState(3, 10, "/elsewhere", ctx=ctx)
    for given in (state, moved):
        data = encode(Envelope("r0-x", 1, 1.0, StepEnd(given, 3, TrainingBatch(), {}), "a", 0))
        read = decode(data, RunContexts()).event.state
        assert (str(read.output_dir), str(read.ctx.output_dir)) == (str(given.output_dir), root)
        again = decode(encode(Envelope("r0-x", 1, 1.0, StepEnd(read, 3, TrainingBatch(), {}), "a", 0))).event.state
        assert str(again.output_dir) == str(given.output_dir)
    data = encode(Envelope("r0-x", 1, 1.0, TrainStart(state), "a", 0), whole_context=True)
    assert str(decode(data, RunContexts()).event.state.ctx.output_dir) == root
    envelope = Envelope("r0-x", 1, 1.0, RunStart(ctx), "a", 0)
    assert str(decode(encode(envelope)).event.ctx.output_dir) == root
    assert "/data/" in json.loads(to_json(envelope))["event"]["ctx"]["output_dir"]


def test_json_holds_any_path_and_gives_it_back(tmp_path):
    for name in NAMES:
        path = os.fsdecode(name)
        assert decode_json(encode_json({"a": [path, 1.5, None]}), dict) == {"a": [path, 1.5, None]}
        assert json.loads(encode_json([path])) == [path]
        cursors = CursorStore(str(tmp_path / path))
        cursor = Cursor({"r0-x": Position(7, 6, 1)}, {"run": 3}, {path: 12}, "csv_metrics")
        cursors.save(path, cursor)
        assert cursors.load(path) == cursor


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": "\\udce9"', b'{"a": "\xe9"}', b'["\\udce9"]', b"\x00" * 9])
def test_json_that_is_damaged_is_one_kind_of_error(data):
    with pytest.raises(msgspec.DecodeError):
        decode_json(data, dict[str, str])
