"""What programs do to a run in their first week: odd values, odd paths, second loops, second processes, sudden ends."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from enum import IntEnum
from pathlib import Path

import pytest

import evsys_bus
from evsys_bus import Callback, EventBus, LoopState, Metrics, TrainingLoop, TrainStart
from evsys_bus.delivery.open_rows import EndedRows, OpenRows
from evsys_bus.errors import BusNotOpenError, SettingError, TrainingError
from evsys_bus.events import Envelope
from evsys_bus.front.rows import UnpublishedRows
from tests.support.journals import read_envelopes
from tests.support.programs import run_evsys_bus
from tests.support.training_parts import IndexBatches, NumberBackend

QUIET = {"environment": False, "output": False}


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def on_step_end(self, state, step_idx, batch, metrics):
        self.rows.append((step_idx, dict(metrics)))


class Scalar:
    """A number as frameworks have it."""

    shape = ()

    def item(self) -> float:
        return 1.5


Colour = IntEnum("Colour", "RED")


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"val": {"acc": 0.5, "by": {"a": 1}}}, {"val/acc": 0.5, "val/by/a": 1}),
        ({1: 2.0}, {"1": 2.0}),
        ({"a": Scalar()}, {"a": 1.5}),
        ({"a": Colour.RED}, {"a": 1}),
        ({"a": ["x", "y"], "b": 1.0}, {"a": ["x", "y"], "b": 1.0}),
        ({"a": Path("x")}, {"a": "x"}),
        ({"a": None, "b": True, "c": "text", "d": math.inf}, {"a": None, "b": True, "c": "text", "d": math.inf}),
        ({}, {}),
        ({"a": {}}, {}),
    ],
)  # fmt: skip
def test_any_value_is_logged_and_a_nested_dict_gets_paths_as_names(tmp_path, metrics, expected):
    rows = Rows()
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        run.log(metrics, step=0, commit=True)
        assert rows.rows == [(0, expected)]
        assert type(rows.rows[0][1].get("a")) is not Colour


def test_scalars_of_numpy_keep_their_kind(tmp_path):
    numpy = pytest.importorskip("numpy")
    rows = Rows()
    metrics = {
        "i": numpy.int64(3), "b": numpy.bool_(True), "f": numpy.float32(1.5), "d": numpy.float64(2.5),
        "z": numpy.array(4),
    }  # fmt: skip
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        run.log(metrics, step=0, commit=True)
    assert {name: (type(value), value) for name, value in rows.rows[0][1].items()} == {
        "i": (int, 3), "b": (bool, True), "f": (float, 1.5), "d": (float, 2.5), "z": (int, 4),
    }  # fmt: skip


@pytest.mark.parametrize("step", [True, 2**63, -(2**70), math.nan, "3", 1.5])
def test_a_wrong_step_is_refused_and_the_run_goes_on(tmp_path, step):
    rows = Rows()
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        with pytest.raises(TrainingError, match="no whole number"):
            run.log({"a": 1.0}, step=step)
        run.log({"a": 2.0})
    assert rows.rows == [(0, {"a": 2.0})]


@pytest.mark.parametrize("metrics", [None, 3, "x", [("a", 1.0)]])
def test_metrics_that_are_no_mapping_are_refused_in_words(tmp_path, metrics):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run, pytest.raises(TrainingError, match="no mapping"):
        run.log(metrics)


def test_what_is_recorded_does_not_change_with_the_callers_dict_or_the_next_part(tmp_path):
    parts: list[dict] = []

    class Parts(Rows):
        def on_metrics(self, state, step_idx, metrics):
            parts.append(metrics)

    rows = Parts()
    metrics = {"a": 1.0, "list": [1.0], "nested": {"x": 1.0}}
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        run.log(metrics, step=0)
        metrics["a"] = 2.0
        metrics["list"].append(2.0)
        metrics["nested"]["x"] = 2.0
        run.log({"b": 1.0}, step=0)
    assert parts == [{"a": 1.0, "list": [1.0], "nested/x": 1.0}, {"b": 1.0}]
    assert rows.rows == [(0, {**parts[0], **parts[1]})]


def test_a_histogram_belongs_to_the_step_of_its_row(tmp_path):
    steps = []

    class Contents(Callback):
        def on_content(self, state, step_idx, item):
            steps.append(step_idx)

    with evsys_bus.run(tmp_path / "a", callbacks=[Contents()], **QUIET) as run:
        for _ in range(2):
            run.log({"weights": [float(each) for each in range(100)], "loss": 1.0})
    assert steps == [0, 1]


def test_a_second_loop_goes_on_behind_the_first(tmp_path, caplog):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        for step in run.steps(10):
            if step == 3:
                break
        assert list(run.steps(6)) == [4, 5]
        assert list(run.steps(6)) == []
        assert list(run.steps(7)) == [6]
    assert "run.no_steps_left" in caplog.text
    with pytest.raises(TrainingError, match="not open"):
        list(run.steps(9))


def test_hooks_of_the_end_may_log(tmp_path):
    class AtTheEnd(Rows):
        def on_train_end(self, state, artifacts):
            evsys_bus.current_run().log({"last": 1.0}, step=9)
            evsys_bus.current_run().summary["best"] = 1.0

    rows = AtTheEnd()
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        run.log({"a": 1.0}, step=0)
    assert rows.rows == [(0, {"a": 1.0}), (9, {"last": 1.0})]
    found = [type(each.event).__name__ for each in read_envelopes(tmp_path / "a" / "journal")]
    assert found[-1] == "RunEnd"


def test_every_change_of_the_config_is_recorded(tmp_path):
    with evsys_bus.run(tmp_path / "a", config={"a": 1}, **QUIET) as run:
        run.config.b = 2
        run.config |= {"c": 3}
        assert run.config.setdefault("d", 4) == 4
        assert copy.deepcopy(run.config) == {"a": 1, "b": 2, "c": 3, "d": 4}
    changes = [
        each.event.config for each in read_envelopes(tmp_path / "a" / "journal") if hasattr(each.event, "config")
    ]
    assert changes == [{"b": 2}, {"c": 3}, {"d": 4}]


@pytest.mark.parametrize("path", ["", "/", "s3://bucket/run"])
def test_a_path_that_names_no_run_is_refused(path):
    with pytest.raises(SettingError, match="path is"):
        evsys_bus.run(path)


def test_a_file_in_place_of_the_directory_is_refused_in_words(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match="cannot be"):
            evsys_bus.run(path)


def test_an_unknown_way_to_resume_is_refused(tmp_path):
    with pytest.raises(SettingError, match="resume is"):
        evsys_bus.run(tmp_path / "a", resume="always")  # pyright: ignore[reportArgumentType] # what is tested


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with evsys_bus.run("läuf e ✓", **QUIET) as run:
        monkeypatch.chdir("/")
        run.log({"a": 1.0}, commit=True)
        run.checkpoint("one", state_path="/")
    assert (tmp_path / "läuf e ✓" / "checkpoints.jsonl").exists()


def test_a_cell_that_runs_again_is_refused_and_the_first_run_goes_on(tmp_path):
    first = evsys_bus.run(tmp_path / "a", **QUIET).start()
    with pytest.raises(TrainingError, match="open already"):
        evsys_bus.run(tmp_path / "a", **QUIET).start()
    first.log({"a": 1.0})
    assert evsys_bus.current_run() is first
    first.close()
    first.close()
    assert len([*(tmp_path / "a" / "journal").glob("r0-*")]) == 1
    with pytest.raises(TrainingError, match="entered once"):
        first.start()


def test_a_run_whose_bus_is_not_open_leaves_nothing(tmp_path):
    with pytest.raises(BusNotOpenError):
        EventBus().run(tmp_path / "a", **QUIET).start()
    assert not (tmp_path / "a").exists()
    with pytest.raises(TrainingError, match="no run is open"):
        evsys_bus.current_run()


def test_two_runs_of_one_name_on_one_bus_are_refused(tmp_path):
    with EventBus(journal=tmp_path / "journal") as bus:
        with bus.run(tmp_path / "a" / "seed", **QUIET) as run:
            run.log({"a": 1.0})
        with pytest.raises(TrainingError, match="has a run named"):
            bus.run(tmp_path / "b" / "seed", **QUIET)


def test_an_interrupt_in_the_first_hook_ends_the_run(tmp_path):
    class Interrupts(Callback):
        def on_run_start(self, ctx):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), evsys_bus.run(tmp_path / "a", callbacks=[Interrupts()], **QUIET):
        pass
    with pytest.raises(TrainingError, match="no run is open"):
        evsys_bus.current_run()
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "cancelled"


def test_a_damaged_run_file_costs_no_rows(tmp_path):
    (tmp_path / "state").touch()
    with pytest.raises(ZeroDivisionError), evsys_bus.run(tmp_path / "a", **QUIET) as run:
        for step in run.steps(5):
            run.log({"a": step})
        run.checkpoint("one", state_path=tmp_path / "state")
        raise ZeroDivisionError
    (tmp_path / "a" / "run.json").write_text("{")
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        assert run.path == tmp_path / "a"
        assert list(run.steps(7)) == [5, 6]


async def test_the_run_of_a_training_loop_is_left_alone(tmp_path):
    loop = TrainingLoop(NumberBackend(tmp_path / "states"), IndexBatches(), num_steps=3, output_dir=tmp_path / "a")
    await loop.run()
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    async with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        assert run.path == tmp_path / "a-2"
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before
    with pytest.raises(TrainingError, match="not made by"):
        evsys_bus.run(tmp_path / "a", resume="must")


def test_another_rank_begins_at_the_same_step(tmp_path):
    (tmp_path / "state").touch()
    with pytest.raises(ZeroDivisionError), evsys_bus.run(tmp_path / "a", **QUIET) as run:
        run.checkpoint("one", state_path=tmp_path / "state", step=4)
        raise ZeroDivisionError
    with evsys_bus.run(tmp_path / "a", rank=1, **QUIET) as run:
        assert list(run.steps(7)) == [5, 6]
    starts = [each.event for each in read_envelopes(tmp_path / "a" / "journal") if isinstance(each.event, TrainStart)]
    assert [each.state.step for each in starts] == [0, 5]


def test_a_pickled_run_does_nothing_elsewhere(tmp_path):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        data = pickle.dumps(run)
        assert pickle.loads(data) is run
        assert copy.deepcopy(run) is run
        code = (
            "import pickle, sys\nrun = pickle.load(sys.stdin.buffer)\nrun.log({'a': 1.0})\nrun.text('a', 'b')\n"
            "run.eval('a', {})\nrun.config.update(a=1)\nprint(run.name, list(run.steps(3)))"
        )
        done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout == b"a []\n"
    assert done.stderr.count(b"run.forked") == 1


@pytest.mark.parametrize(
    ("last_line", "status"),
    [
        ("", "completed"),
        ("raise ValueError('no')", "failed"),
        ("os.kill(os.getpid(), 15); time.sleep(30)", "cancelled"),
    ],
)
def test_a_run_that_is_never_closed_ends_by_the_cause_of_the_exit(tmp_path, last_line, status):
    code = (
        "import evsys_bus, os, time\n"
        f"run = evsys_bus.run({str(tmp_path / 'a')!r}, environment=False, output=False).start()\n"
        f"run.log({{'a': 1.0}})\n{last_line}\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == status


def test_a_child_that_leaves_the_block_ends_nothing(tmp_path):
    with evsys_bus.run(tmp_path / "a", environment=False) as run:
        pid = os.fork()
        if not pid:
            try:
                run.__exit__(None, None, None)
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
        assert run.is_open
        run.log({"a": 1.0}, step=3)
        code = f"import evsys_bus; evsys_bus.run({str(tmp_path / 'a')!r}).start()"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert b"is in use by" in second.stderr
    assert any(isinstance(each.event, Metrics) for each in read_envelopes(tmp_path / "a" / "journal"))


def test_the_variable_for_tests_starts_no_process_and_records_no_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("EVSYS_BUS_TEST", "1")
    callbacks = evsys_bus.build_callbacks(
        [{"kind": "csv_metrics", "params": {"out_path": str(tmp_path / "rows.csv")}, "placement": "follow"}]
    )
    with evsys_bus.run(tmp_path / "a", callbacks=callbacks) as run:
        run.log({"a": 1.0})
        assert {*run.bus.health().couriers.values()} == {"thread"}
    assert (tmp_path / "rows.csv").exists()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {".lock", "journal", "run.json"}


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_refused_in_words(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(TrainingError, match="cannot be written"):
        evsys_bus.run(tmp_path / "a", **QUIET).start()
    tmp_path.chmod(0o755)


def test_show_reads_a_run_with_checkpoints_from_its_journal(tmp_path):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        for step in run.steps(3):
            run.log({"loss": float(step)})
        run.checkpoint("one", state_path=tmp_path)
    shown = run_evsys_bus("show", tmp_path / "a").stdout
    assert "3 of 3" in shown
    assert "loss" in shown
    assert "one" in shown


def test_a_part_that_is_recorded_late_does_not_remove_the_row_of_a_later_step(tmp_path):
    state = LoopState(step=0, num_steps=None, output_dir=tmp_path)
    rows = OpenRows()
    for sequence, (step, metrics) in enumerate([(6, {"a": 6.0}), (5, {"b": 5.0}), (6, {"c": 6.5})], 1):
        rows.update(Envelope("r0-000001", sequence, 0.0, Metrics(state, step, metrics), "a", 0))
    [row] = rows.of(EndedRows("r0-000001"))
    assert (row.event.step_idx, row.event.metrics) == (6, {"a": 6.0, "c": 6.5})
    assert rows.first_parts() == {"r0-000001": 1}


def test_a_row_that_an_interrupt_left_unpublished_stays_until_it_is_removed():
    rows = UnpublishedRows()
    rows.is_merged = True
    rows.add(0, {"a": 0.0}, commit=False)
    [row] = rows.add(1, {"a": 1.0}, commit=False)
    assert rows.add(1, {"b": 1.0}, commit=False) is None  # as if Ctrl-C came before the complete row was published
    assert [(each.step, each.metrics) for each in rows.left()] == [(0, {"a": 0.0})]
    rows.remove(row)
    assert rows.add(1, {"b": 1.0}, commit=False) == ()
    assert [(each.step, each.metrics) for each in rows.take()] == [(1, {"a": 1.0, "b": 1.0})]


def test_content_that_a_full_disk_refuses_does_not_end_the_training(tmp_path):
    code = (
        "import evsys_bus, resource\n"
        f"with evsys_bus.run({str(tmp_path / 'a')!r}, environment=False, output=False) as run:\n"
        "    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, hard))\n"
        "    run.text('long', 'x' * (5 << 20))\n"
        "    run.log({'a': 1.0})\n"
        "print('on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "on\n", done.stderr
    assert "run.content_not_stored" in done.stderr
