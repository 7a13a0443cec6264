"""``evsys_bus.read``: a run from its journal, whoever recorded it and in whatever state it was left."""

import math
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from operator import methodcaller

import msgspec
import pytest

import evsys_bus
from evsys_bus import (
    BenchmarkEval,
    Checkpoint,
    Eval,
    EvalResult,
    EventBus,
    LogContext,
    LoopState,
    ManifestRow,
    RunAnnotated,
    RunNotFoundError,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainingLoop,
    TrainStart,
)
from evsys_bus.context import LoopArtifacts
from evsys_bus.journal import JournalWriter, frame
from evsys_bus.reading import better_mode, flatten_config
from support import TESTS
from support.recorded_runs import KILLED, record_run
from support.training_parts import FixedEvaluator, IndexBatches, NumberBackend

OLD = TESTS / "fixtures" / "directory_of_0_1_0"


def values(run, name):
    return dict(zip(*run.metrics[name], strict=True))


def test_a_run_that_ended_has_everything_that_was_published(tmp_path):
    folder = record_run(tmp_path / "ppo", config={"lr": 0.5, "arm": "base", "seed": 4}, evals={1: 0.25, 2: 0.75})
    run = evsys_bus.read(folder)
    assert (run.id, run.arm, run.seed, run.state, run.error) == ("ppo", "base", 4, "completed", None)
    assert (run.config["lr"], run.num_steps, run.last_step) == (0.5, 3, 2)
    assert values(run, "loss") == {0: 3.0, 1: 1.0, 2: 2.0}
    assert (run.last("loss"), run.best("loss"), run.best_step("loss"), run.best("loss", mode="max")) == (2, 1, 1, 3)
    assert (run.last("val/acc"), run.best("val/acc"), run.best_step("val/acc")) == (0.75, 0.75, 2)
    assert (run.last("none"), run.best("none"), run.best_step("none")) == (None, None, None)
    assert [(each.step, each.name, each.metrics) for each in run.evals] == [
        (1, "val", {"acc": 0.25}),
        (2, "val", {"acc": 0.75}),
    ]
    assert [(each.step, each.metrics["loss"]) for each in run.steps()] == [(0, 3.0), (1, 1.0), (2, 2.0)]
    assert run.started <= run.ended <= datetime.now(UTC)
    assert run.seconds == (run.ended - run.started).total_seconds()
    assert (run.folder, run.directory, run.problems) == (folder, folder / "journal", [])


@pytest.mark.parametrize("asked", ["ppo", "ppo/journal", "ppo/../ppo"])
def test_a_run_is_named_by_its_folder_or_its_journal(tmp_path, asked):
    record_run(tmp_path / "ppo")
    assert evsys_bus.read(str(tmp_path / asked)).id == "ppo"


async def test_a_training_loop_and_a_resume_of_it_read_as_one_run(tmp_path):
    for steps, rate in ((4, 0.5), (7, 0.25)):
        backend = NumberBackend(tmp_path / "run" / "states", rate)
        with EventBus([], journal=tmp_path / "run" / "journal") as bus:
            loop = TrainingLoop(
                backend,
                IndexBatches(),
                num_steps=steps,
                evaluators=[FixedEvaluator("val", 2, {"acc": 0.5})],
                bus=bus,
                output_dir=tmp_path / "run",
                save_every=2,
                resume=True,
            )
            await loop.run()
    run = evsys_bus.read(tmp_path / "run")
    assert (run.state, run.num_steps, list(run.times.steps)) == ("completed", 7, list(range(7)))
    assert len(run.checkpoints) >= 3
    assert [each.batch for each in run.checkpoints] == sorted(each.batch for each in run.checkpoints)
    assert [each.step for each in run.evals] == sorted({each.step for each in run.evals})


def test_rows_that_a_later_start_makes_anew_are_gone_and_so_are_their_evals_and_checkpoints(tmp_path):
    for first, last, loss in ((0, 12, 9.0), (8, 10, 5.0), (5, 7, 1.0)):
        with EventBus([], journal=tmp_path / "journal") as bus:
            state = LoopState(first, 15, tmp_path / "low", ctx=LogContext(tmp_path, run_key="low"))
            bus.publish(TrainStart(state))
            for step in range(first, last):
                bus.publish(StepEnd(state, step, None, {"loss": loss, f"only-{first}": 1.0}))
                bus.publish(Eval(state, step, "val", {"acc": loss}))
                bus.publish(Checkpoint(state, ManifestRow(f"step-{step}", step)))
    run = evsys_bus.read(tmp_path)
    assert values(run, "loss") == dict.fromkeys(range(5), 9.0) | {5: 1.0, 6: 1.0}
    assert [each.step for each in run.evals] == [each.batch for each in run.checkpoints] == list(range(7))
    assert "only-8" not in run.metrics
    assert run.state == "cancelled", "its writer closed the journal before the last step"


def test_parts_of_one_step_make_one_row_and_rows_out_of_order_are_sorted(tmp_path):
    state = LoopState(0, 9, tmp_path / "run")
    rows = [
        (0, {"a": 1.0}),
        (0, {"b": 2.0}),
        (3, {"a": 3.0}),
        (1, {"a": 4.0}),
        (3, {"a": 5.0, "b": 6.0}),
        (1, {"a": 7}),
    ]
    with EventBus([], journal=tmp_path / "journal") as bus:
        for step, metrics in rows:
            bus.publish(StepEnd(state, step, TrainingBatch(), metrics))
    run = evsys_bus.read(tmp_path)
    assert [(row.step, row.metrics) for row in run.steps()] == [
        (0, {"a": 1.0, "b": 2.0}),
        (1, {"a": 7.0}),
        (3, {"a": 5.0, "b": 6.0}),
    ]
    assert run.columns()["b"] == [2.0, None, 6.0]


def test_a_killed_run_has_all_acknowledged_steps_and_its_state(program, tmp_path):
    assert program(KILLED, str(tmp_path / "run")).wait() == -9
    run = evsys_bus.read(tmp_path / "run")
    assert (run.state, run.arm, run.seed, run.last_step, run.last("loss")) == ("killed", "killed", 3, 11, 1.0)
    assert run.ended == run.last_time
    assert run.problems == []


def test_a_live_run_is_read_up_to_what_was_acknowledged(program, tmp_path):
    process = program(KILLED, str(tmp_path / "run"), "wait")
    assert process.stdout.readline() == "ready\n"
    run = evsys_bus.read(tmp_path / "run")
    assert (run.state, run.ended, len(run.metrics["loss"].steps)) == ("running", None, 12)
    assert run.seconds is not None


@pytest.mark.parametrize(
    ("error", "state"), [(ArithmeticError("loss is NaN"), "failed"), (KeyboardInterrupt(), "cancelled")]
)
def test_a_loop_that_raised_has_failed_and_one_that_was_interrupted_is_cancelled(tmp_path, error, state):
    handle = LoopState(0, 9, tmp_path / "run")
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(TrainStart(handle))
        handle.error = error
        bus.publish(TrainEnd(handle, LoopArtifacts()))
    run = evsys_bus.read(tmp_path)
    assert (run.state, type(error).__name__ in run.error) == (state, True)


def test_a_journal_of_0_1_0_is_read(tmp_path):
    run = evsys_bus.read(OLD / "sweep")
    assert (run.id, run.state, run.last_step, run.problems) == ("alpha", "completed", 19, [])
    assert run.config == {"lr": 0.1, "layers": [8, 4]}
    assert run.extras["page"] == "http://board.example/alpha"
    assert list(run.times.steps) == list(range(20))


def test_several_runs_of_one_journal_are_listed_in_order_and_one_is_found_by_name(tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        for key in ("b", "a"):
            state = LoopState(0, 2, tmp_path / key, ctx=LogContext(tmp_path, run_key=key, run_config={"arm": key}))
            (tmp_path / key).mkdir()
            bus.publish(TrainStart(state))
            bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 1.0}))
    assert [run.id for run in evsys_bus.read_runs(tmp_path)] == ["b", "a"]
    assert evsys_bus.read(tmp_path / "a").arm == "a"
    with pytest.raises(RunNotFoundError, match="2 runs: b, a") as caught:
        evsys_bus.read(tmp_path)
    assert "read_runs" in caught.value.fix


def test_what_is_not_there_is_an_error_with_the_nearest_name(tmp_path):
    record_run(tmp_path / "runs" / "digits")
    with pytest.raises(RunNotFoundError) as caught:
        evsys_bus.read(tmp_path / "runs" / "digit")
    assert f"did you mean {tmp_path / 'runs' / 'digits'}?" in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)
    (tmp_path / "empty").mkdir()
    assert evsys_bus.read_runs(tmp_path / "empty") == []
    with pytest.raises(RunNotFoundError, match="holds no run"):
        evsys_bus.read(tmp_path / "empty")


def test_ranks_of_one_run_are_one_run_and_a_later_start_of_one_rank_drops_nothing_of_another(tmp_path):
    for rank in (0, 1):
        with EventBus([], journal=tmp_path / "journal", rank=rank) as bus:
            state = LoopState(0, 3, tmp_path / "run", ctx=LogContext(tmp_path, run_key="run"))
            bus.publish(TrainStart(state))
            for step in range(3):
                bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": float(rank), f"rank{rank}": 1.0}))
            if rank == 0:
                bus.publish(TrainEnd(state, LoopArtifacts()))
    run = evsys_bus.read(tmp_path)
    assert (run.state, values(run, "loss"), sorted(run.metrics)) == (
        "completed",
        dict.fromkeys(range(3), 0.0),
        ["loss", "rank0", "rank1"],
    )


def test_evals_of_another_process_belong_to_the_run_and_do_not_decide_its_state(tmp_path):
    ctx = LogContext(tmp_path, run_key="run")
    with EventBus([], journal=tmp_path / "journal", rank=0) as bus:
        state = LoopState(0, 3, tmp_path / "run", ctx=ctx)
        bus.publish(TrainStart(state))
        bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 1.0}))
        with EventBus([], journal=tmp_path / "journal", rank=1) as other:
            other.publish(BenchmarkEval(ctx, EvalResult("mmlu", metrics={"acc": 0.5}), [], step=0))
        run = evsys_bus.read(tmp_path)
        assert (run.state, run.last("mmlu/acc"), run.benchmarks[0].name) == ("running", 0.5, "mmlu")
        bus.publish(TrainEnd(state, LoopArtifacts()))
    assert evsys_bus.read(tmp_path).state == "completed"


def test_what_loggers_publish_about_a_run_is_among_its_extras(tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(LogContext(tmp_path, run_key="run", extras={"tags": ["a", "b"], "notes": "first try"})))
        bus.publish(RunAnnotated("run", {"wandb_url": "https://wandb.example/1"}))
    run = evsys_bus.read(tmp_path)
    assert (run.extras, run.tags, run.notes) == ({"wandb_url": "https://wandb.example/1"}, ["a", "b"], "first try")


# -- damage ------------------------------------------------------------------------------------------------------------


def segments(folder):
    return sorted((folder / "journal").glob("r*/*.seg"))


def test_a_damaged_journal_is_read_as_far_as_it_goes_and_says_so(tmp_path):
    folder = record_run(tmp_path / "run", [float(step) for step in range(50)], num_steps=50)
    [segment] = segments(folder)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    run = evsys_bus.read(folder)
    assert run.state == "completed"
    assert len(run.metrics["loss"].steps) == 49
    assert any("1 event missing" in each for each in run.problems), run.problems
    assert any("damaged" in each for each in run.problems), run.problems


@pytest.mark.parametrize("left", [0, 5, 12, 40, 0.5])
def test_a_cut_journal_is_read_as_far_as_it_goes(tmp_path, left):
    folder = record_run(tmp_path / "run", [float(step) for step in range(50)], num_steps=50)
    [segment] = segments(folder)
    data = segment.read_bytes()
    segment.write_bytes(data[: int(len(data) * left) if isinstance(left, float) else left])
    runs = evsys_bus.read_runs(folder)
    if left == 0.5:
        assert (runs[0].state, 10 < len(runs[0].metrics["loss"].steps) < 40) == ("killed", True)
    else:
        assert all(run.state == "killed" for run in runs)


def test_a_journal_of_a_newer_version_and_one_of_noise_are_runs_with_a_problem(tmp_path):
    for name, damage in (("newer", None), ("noise", b"\x00\x01EJ" * 1000)):
        [segment] = segments(record_run(tmp_path / name))
        if damage is None:
            segment.write_bytes(frame.pack_segment_header(99) + segment.read_bytes()[frame.SEGMENT_HEADER_BYTES :])
        else:
            segment.write_bytes(damage)
    newer, noise = (evsys_bus.read_runs(tmp_path / name) for name in ("newer", "noise"))
    assert [(run.id, run.state) for run in newer] == [("newer", "killed")]
    assert newer[0].problems
    assert noise == [] or noise[0].problems


def test_events_of_unknown_types_and_odd_values_cost_nothing_else(tmp_path):
    state = LoopState(0, 9, tmp_path / "run")
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": math.nan, "name": "text", "none": None, "flag": True}))
        bus.publish(StepEnd(state, 1, TrainingBatch(), {"loss": math.inf, "count": 3}))
        bus.publish(StepEnd(None, 2, None, {"loss": 0.5}))
    run = next(each for each in evsys_bus.read_runs(tmp_path) if each.id == "run")
    assert math.isnan(run.metrics["loss"].values[0])
    assert run.last("loss") == math.inf
    assert run.best("loss") is None
    assert sorted(run.metrics) == ["count", "loss"]


# -- conversions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow"])
def test_a_conversion_to_a_package_that_is_missing_names_the_command(tmp_path, package, monkeypatch):
    run = evsys_bus.read(record_run(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        getattr(run, f"to_{package.removeprefix('py')}")()


@pytest.fixture
def sparse(tmp_path):
    state = LoopState(0, 3, tmp_path / "run")
    with EventBus([], journal=tmp_path / "journal") as bus:
        for step, metrics in ((0, {"loss": 1.0}), (2, {"loss": 0.5, "acc": 0.25, "time": 7.0})):
            bus.publish(StepEnd(state, step, TrainingBatch(), metrics))
    return evsys_bus.read(tmp_path)


def test_to_pandas_has_a_row_for_each_step(sparse):
    pandas = pytest.importorskip("pandas")
    frame = sparse.to_pandas()
    assert list(frame.columns) == ["step", "time", "loss", "acc", "metric/time"]
    assert (list(frame.step), list(frame.loss), pandas.isna(frame.acc[0]), frame.acc[1]) == (
        [0, 2],
        [1, 0.5],
        True,
        0.25,
    )
    assert str(frame.time.dt.tz) == "UTC"
    assert (str(frame.step.dtype), str(frame.acc.dtype)) == ("int64", "float64")


def test_to_polars_has_a_row_for_each_step(sparse):
    polars = pytest.importorskip("polars")
    frame = sparse.to_polars()
    assert frame.columns == ["step", "time", "loss", "acc", "metric/time"]
    assert frame["acc"].to_list() == [None, 0.25]
    assert frame.schema["time"] == polars.Datetime("us", "UTC")
    assert frame["time"][0].timestamp() == pytest.approx(sparse.times.values[0], abs=1e-5)


def test_to_arrow_has_a_row_for_each_step(sparse):
    pytest.importorskip("pyarrow")
    table = sparse.to_arrow()
    assert table.column_names == ["step", "time", "loss", "acc", "metric/time"]
    assert table["acc"].to_pylist() == [None, 0.25]
    assert str(table.schema.field("time").type) == "timestamp[us, tz=UTC]"


def test_metrics_are_arrays_that_numpy_views_without_a_copy(sparse):
    numpy = pytest.importorskip("numpy")
    steps, losses = sparse.metrics["loss"]
    assert numpy.asarray(steps).tolist() == [0, 2]
    assert numpy.shares_memory(numpy.asarray(losses), losses)


def test_a_notebook_shows_a_run_as_a_table_without_its_markup(tmp_path):
    run = evsys_bus.read(record_run(tmp_path / "run", config={"name": "<b>&"}, status="failed", error="<script>"))
    text = methodcaller("_repr_html_")(run)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;&amp;" in text
    assert "<th>loss</th><td>2</td><td>1</td><td>1</td>" in text
    assert repr(run) == "<RecordedRun 'run': failed, 3 of 3 steps, 2 metrics>"


@pytest.mark.parametrize(
    ("name", "mode"), [("loss", "min"), ("val/loss", "min"), ("train_loss", "min"), ("acc", "max"), ("glossary", "max")]
)
def test_which_value_is_better_follows_from_the_name(name, mode):
    assert better_mode(name) == mode


def test_a_config_is_flattened_by_dots():
    assert flatten_config({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {}}) == {"a": 1, "b.c": 2, "b.d.e": 3, "f": {}}


# -- large journals ----------------------------------------------------------------------------------------------------

_LARGE = """
import resource, sys, time
import evsys_bus
evsys_bus.RecordedRun
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = evsys_bus.read(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(len(run.times.steps), (after - before) // 1024, time.process_time())
"""


def test_a_long_run_needs_little_memory(tmp_path):
    state, batch, count = LoopState(0, 1, tmp_path / "run"), TrainingBatch(), 100_000
    with EventBus([], journal=tmp_path / "journal") as bus:
        for step in range(count):
            bus.publish(StepEnd(state, step, batch, {"loss": 1.0, "acc": 0.5, "lr": 0.1}))
    done = subprocess.run([sys.executable, "-c", _LARGE, tmp_path], capture_output=True, text=True, check=True)
    steps, megabytes, _ = map(float, done.stdout.split())
    assert (steps, megabytes < 40) == (count, True), done.stdout


def test_a_run_that_was_moved_is_in_its_new_folder(tmp_path):
    record_run(tmp_path / "runs" / "ppo")
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    run = evsys_bus.read(tmp_path / "elsewhere" / "ppo")
    folder = tmp_path / "elsewhere" / "ppo"
    assert (run.id, run.folder, run.directory) == ("ppo", folder, folder / "journal")


@pytest.mark.parametrize(
    "odd",
    [
        {"state": {"output_dir": ["a"], "run": {}, "root": 3}},
        {"step_idx": 2**63 + 5},
        {"step_idx": "3"},
        {"metrics": [1, 2]},
        {"metrics": {"loss": [1.0]}},
        {"state": 7},
        {"state": {"context": {"run_config": [1], "extras": "x", "output_dir": b"\xff"}}},
        {"type": "run.alert", "title": 3},
        {"type": "run.config_update", "config": 5},
        {"type": "run_end", "run_result": [], "arm": 1},
        {"type": "train_start", "state": {"step": "x"}},
    ],
)
def test_a_record_with_values_of_other_types_costs_no_other_row(tmp_path, odd):
    folder = record_run(tmp_path / "run")
    writer = JournalWriter(folder / "journal").open()
    step = {"type": "step_end", "state": {"step": 0, "output_dir": str(folder)}, "step_idx": 9, "batch": {}}
    for event in ({**step, "metrics": {"loss": 0.5}} | odd, {**step, "metrics": {"loss": 0.25}}):
        head = {"stream": writer.stream, "seq": writer.next_sequence, "time": 1.0, "run": "run", "event": event}
        writer.append(msgspec.msgpack.encode(head))
    writer.close()
    [run] = evsys_bus.read_runs(folder)
    assert values(run, "loss").items() >= {0: 3.0, 1: 1.0, 2: 2.0, 9: 0.25}.items()
