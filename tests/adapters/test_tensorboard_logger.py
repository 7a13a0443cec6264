"""tensorboard_logger: what TensorBoard's own reader finds is what the journal holds, whatever happened in between."""

import itertools
import math
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evsys_adapters import TensorBoardLoggerCallback
from evsys_adapters.tensorboard_logger import FILE
from evsys_bus import (
    Eval,
    EventBus,
    ExperimentEnd,
    LogContext,
    LoopState,
    RunEnd,
    RunStart,
    StepEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
)
from evsys_bus.codec import decode
from evsys_bus.context import ArmResult, ExperimentResult, RunResult
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import BrokenAdapterError, ConfigError, EvsysBusError, RetryLaterError
from evsys_bus.journal import JournalReader, JournalWriter
from evsys_bus.tasks import run_in_new_loop
from evsys_bus.testing import conformance
from evsys_bus.testing.timeline import Timeline
from support import loggers

test_it_conforms = conformance(lambda _: TensorBoardLoggerCallback(clock=lambda: 1.0))
test_it_conforms_in_a_log_dir = conformance(lambda folder: TensorBoardLoggerCallback(folder / "tb", clock=lambda: 1.0))


def read(folder):
    """Scalars by tag, and texts by tag, of one run: (step, value)."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    scalars = {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    texts = {
        tag: [(each.step, each.tensor_proto.string_val[0].decode()) for each in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }
    return scalars, texts


def as_float32(value):
    """What a 32-bit float makes of a number; those beyond it are infinite."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def recorded(journal):
    """The scalars that the journal's steps and evals hold, by run and tag."""
    found = {}
    for (run, head), metrics in loggers.recorded_series(journal).items():
        for key, points in metrics.items():
            numbers = [(step, value) for step, value in points if isinstance(value, int | float)]
            if numbers:
                found.setdefault(run, {})[f"{head}/{key}"] = numbers
    return found


def same(one, other):
    """Whether two series are the same; NaN is NaN."""
    return repr([(step, as_float32(value)) for step, value in one]) == repr([*other])


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


class Run(loggers.Run):
    """A run that tensorboard_logger logs."""

    def __init__(self, folder, key="run", logger=None, **params):
        super().__init__(logger or TensorBoardLoggerCallback(**params), folder, key)
        self.folder = folder / "tensorboard" / key

    def end(self):
        super().end()
        self.logger.on_experiment_end(self.ctx, ExperimentResult("trial", conclusion="It did."))


def test_what_tensorboard_reads_is_what_the_journal_holds(tmp_path):
    timeline = Timeline(tmp_path)
    odd = [{"loss": math.nan, "n": 3}, {"loss": math.inf, "big": 1e300}, {"loss": -0.0, "word": "up"}, {"loss": 1 / 3}]
    with EventBus(build_callbacks([{"kind": "tensorboard_logger"}]), journal=tmp_path / "journal") as bus:
        for event in timeline.start_events():
            bus.publish(event)
        for step, metrics in enumerate(odd):
            for event in timeline.step_events(step, metrics):
                bus.publish(event)
        for event in timeline.end_events():
            bus.publish(event)
    assert [each.pending for each in bus.receipt.deliveries] == [0]
    for name, series in recorded(tmp_path / "journal").items():
        scalars, texts = read(tmp_path / "tensorboard" / name)
        assert series.keys() <= scalars.keys()
        assert not [(tag, points, scalars[tag]) for tag, points in series.items() if not same(points, scalars[tag])]
        assert texts["train/word"] == [(2, "up")]
        assert scalars["eval/tasks/accuracy"] == [(step, 0.75) for step in range(4)]


@pytest.mark.long
def test_three_kills_of_the_courier_lose_no_point_and_double_none(tmp_path):
    journal = tmp_path / "journal"
    with EventBus([], journal=journal) as bus:
        state = LoopState(step=0, num_steps=2000, output_dir=tmp_path / "run")
        bus.publish(TrainStart(state))
        for step in range(2000):
            metrics = {"loss": math.nan if step % 7 == 0 else 1 / (step + 1), "n": step}
            bus.publish(StepEnd(state, step, TrainingBatch(), metrics))
    file = tmp_path / "run" / "tensorboard" / FILE

    def size():
        return file.stat().st_size if file.exists() else 0

    loggers.deliver_with_kills(
        journal, "tensorboardX.proto.event_pb2", "TensorBoardLoggerCallback(flush_secs=0)", size, 30_000
    )
    [series] = recorded(journal).values()
    scalars, _ = read(file.parent)
    assert len(series["train/loss"]) == 2000
    assert all(same(points, scalars[tag]) for tag, points in series.items())
    assert [each.name for each in file.parent.glob("[!.]*")] == [FILE]


def test_a_recorded_run_replays_into_it(tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        for event in Timeline(tmp_path).all_events():
            bus.publish(event)
    courier = Courier(tmp_path / "journal", "replay", TensorBoardLoggerCallback(), DeliveryPolicy(), persistent=False)
    courier.finish()
    run_in_new_loop(courier.run)
    points = [(step, 0.5 / (step + 1)) for step in range(4)]
    assert same(points, read(tmp_path / "tensorboard" / "wide")[0]["train/loss"])


def test_a_resumed_run_continues_its_file_and_what_is_run_again_is_void(run, tmp_path):
    run.start()
    for step in range(10):
        run.step(step, loss=1.0)
    run.eval(8, accuracy=0.1)
    run.logger.mark()  # its rows are on disk; then the process dies
    again = Run(tmp_path)
    again.start(step=6)
    for step in range(6, 12):
        again.step(step, loss=2.0)
    again.eval(8, accuracy=0.9)
    again.end()
    scalars, texts = read(run.folder)
    assert scalars["train/loss"] == [(step, 1.0 if step < 6 else 2.0) for step in range(12)]
    assert scalars["eval/held out/accuracy"] == [(8, pytest.approx(0.9))]
    assert len(list(run.folder.iterdir())) == 1
    assert texts["hypothesis"][-1][1] == "It learns."


def test_late_and_repeated_steps_are_all_kept_and_end_in_order(run):
    run.start()
    for step in (0, 1, 5, 2, 5, 3):
        run.step(step, loss=float(step))
    run.end()
    assert read(run.folder)[0]["train/loss"] == [(step, float(step)) for step in (0, 1, 2, 3, 5, 5)]


def test_R12_an_eval_that_comes_again_replaces_the_one_before(run):
    run.start()
    run.step(0, loss=1.0)
    run.eval(0, "tasks", accuracy=0.5, f1=math.nan)
    run.benchmark(0, "tasks", accuracy=0.5, f1=math.nan)
    run.logger.mark()
    assert read(run.folder)[0]["eval/tasks/accuracy"] == [(0, 0.5)]
    run.eval(4, "tasks", accuracy=0.25)
    run.eval(4, "tasks", accuracy=0.75)
    run.eval(0, "tasks", accuracy=0.125)
    run.end()
    scalars, _ = read(run.folder)
    assert scalars["eval/tasks/accuracy"] == [(0, 0.125), (4, 0.75)]
    assert repr(scalars["eval/tasks/f1"]) == "[(0, nan)]"


def test_evals_that_come_out_of_order_end_in_order(run):
    run.start()
    run.eval(4, accuracy=0.5)
    run.eval(0, accuracy=0.25)
    run.end()
    assert read(run.folder)[0]["eval/held out/accuracy"] == [(0, 0.25), (4, 0.5)]


def test_a_benchmark_without_a_step_is_not_drawn_at_0(run, tmp_path):
    run.start()
    run.step(7, loss=1.0)
    run.benchmark(None, accuracy=0.5)
    run.end()
    assert read(run.folder)[0]["final/tasks/accuracy"] == [(7, 0.5)]
    untrained = Run(tmp_path, "untrained")
    untrained.benchmark(None, accuracy=0.5)
    untrained.end()
    scalars, texts = read(untrained.folder)
    assert not scalars
    assert texts["final/tasks/accuracy"][0][1] == "0.5"


def test_predictions_are_a_table_that_says_how_many_it_leaves_out(run):
    run.logger = TensorBoardLoggerCallback(max_pred_rows=2)
    run.start()
    run.benchmark(3, predictions=[{"task_id": n, "output": "a|b\nc"} for n in range(5)], accuracy=0.5)
    run.end()
    [(step, table)] = read(run.folder)[1]["eval/tasks/predictions"]
    assert step == 3
    lines = ["| task_id | output |", "| --- | --- |", "| 0 | a\\|b c |", "| 1 | a\\|b c |", "", "2 of 5 predictions"]
    assert table.splitlines() == lines


def test_what_is_no_number_is_a_text_beside_the_others(run):
    run.start()
    run.step(0, loss=0.5, phase="warm up", grads=[1.0, 2.0], nothing=None, flag=True)
    run.end()
    scalars, texts = read(run.folder)
    assert scalars["train/loss"] == [(0, 0.5)]
    assert scalars["train/flag"] == [(0, 1.0)]
    assert [texts[f"train/{key}"][0][1] for key in ("phase", "grads", "nothing")] == ["warm up", "[1.0, 2.0]", "null"]


def test_the_config_is_redacted_and_the_hypothesis_and_the_conclusion_are_there(run):
    run.start()
    run.end()
    _, texts = read(run.folder)
    assert '"lr": 0.1' in texts["config"][0][1]
    assert "secret" not in str(texts)
    assert texts["hypothesis"][0][1] == "It learns."
    assert "It did." in texts["conclusion"][0][1]


def test_the_conclusion_reaches_runs_that_ended_before_the_process_was_started_again(run, tmp_path):
    run.start()
    run.step(0, loss=1.0)
    loggers.Run.end(run)
    saved = run.logger.mark()
    run.logger.close()
    again = Run(tmp_path)
    again.logger.rewind(saved)
    again.logger.on_experiment_end(run.ctx, ExperimentResult("trial", conclusion="It did."))
    scalars, texts = read(run.folder)
    assert "It did." in texts["conclusion"][0][1]
    assert scalars["train/loss"] == [(0, 1.0)]
    assert [each.name for each in (tmp_path / "tensorboard").iterdir()] == ["run"]


def test_runs_side_by_side_and_of_other_experiments_keep_to_their_own_folders(tmp_path):
    logger = TensorBoardLoggerCallback(tmp_path / "all")
    runs = [Run(tmp_path / folder, key, logger) for folder, key in (("one", "a"), ("one", "b"), ("two", "a"))]
    for each in runs:
        each.start()
    for number, each in enumerate(runs):
        each.step(0, loss=float(number))
    for each in runs:
        each.end()
    later = Run(tmp_path / "three", "a", log_dir=tmp_path / "all")
    later.start()
    later.step(0, loss=3.0)
    later.end()
    found = [read(path)[0]["train/loss"][0][1] for path in (tmp_path / "all").iterdir()]
    assert sorted(found) == [0.0, 1.0, 2.0, 3.0]


def test_a_file_torn_at_any_byte_goes_on_after_its_last_whole_record(tmp_path):
    whole = Run(tmp_path / "whole")
    whole.start()
    whole.step(0, loss=0.0)
    whole.logger.mark()
    first = (whole.folder / FILE).stat().st_size
    whole.step(1, loss=1.0)
    whole.logger.mark()
    data = (whole.folder / FILE).read_bytes()
    for size in range(first, len(data)):
        torn = Run(tmp_path / str(size))
        torn.folder.mkdir(parents=True)
        (torn.folder / FILE).write_bytes(data[:size])
        torn.start(step=1)
        torn.step(1, loss=2.0)
        torn.end()
        assert read(torn.folder)[0]["train/loss"] == [(0, 0.0), (1, 2.0)], size


def test_rows_wait_no_longer_than_flush_secs_and_not_at_all_for_a_mark(run):
    run.logger = TensorBoardLoggerCallback(flush_secs=1000)
    run.start()
    run.step(0, loss=0.5)
    assert not (run.folder / FILE).exists()
    run.logger.mark()
    assert read(run.folder)[0] == {"train/loss": [(0, 0.5)]}
    at_once = Run(run.ctx.output_dir, "at once", flush_secs=0)
    at_once.start()
    at_once.step(0, loss=0.5)
    assert read(at_once.folder)[0] == {"train/loss": [(0, 0.5)]}


WITHOUT = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == {package!r}:
                raise ModuleNotFoundError(name, name=name)

    sys.meta_path.insert(0, Missing())
    from evsys_bus import build_callbacks
    build_callbacks([{{"kind": {kind!r}, "params": {params!r}, "placement": "inline"}}])
"""


@pytest.mark.parametrize(
    ("kind", "package", "params"),
    [("tensorboard_logger", "tensorboardX", {}), ("wandb_logger", "wandb", {"project": "p"})],
)
def test_a_missing_package_is_an_error_that_names_the_command(program, kind, package, params):
    process = program(WITHOUT.format(kind=kind, package=package, params=params))
    _, said = process.communicate(timeout=10)
    assert BrokenAdapterError.code in said
    assert f'pip install "evsys-bus[{kind.removesuffix("_logger")}]"' in said
    assert "uv add" in said


def test_nothing_is_imported_before_the_first_hook():
    program = """if True:
        import sys
        from evsys_bus import build_callbacks
        build_callbacks([{"kind": "tensorboard_logger"}, {"kind": "wandb_logger", "params": {"project": "p"}}])
        build_callbacks([{"kind": "tensorboard_logger", "placement": "inline"}])
        build_callbacks([{"kind": "wandb_logger", "params": {"project": "p"}, "placement": "inline"}])
        print([each for each in ("wandb", "tensorboardX", "numpy", "google") if each in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert Path(FILE).name == FILE


def wall_times(folder):
    """When TensorBoard says that each point was logged, by tag and step."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    points = {(tag, each.step): each.wall_time for tag in found.Tags()["scalars"] for each in found.Scalars(tag)}
    texts = {(tag, each.step): each.wall_time for tag in found.Tags()["tensors"] for each in found.Tensors(tag)}
    return points | texts


def test_wall_times_are_those_of_the_journal_however_late_the_rows_are_delivered(tmp_path):
    ctx = LogContext(tmp_path, config={"lr": 0.5}).for_run("away")
    state = LoopState(step=0, num_steps=30, output_dir=ctx.run_dir, ctx=ctx)
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(ctx))
        for step in (0, 1, 2, 5, 4, 3, *range(6, 20)):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0, "note": "a"}))
            if step % 4 == 0:
                bus.publish(Eval(state, step, "val", {"accuracy": 0.5}))
        bus.publish(RunEnd(ctx, RunResult(), ArmResult("away")))
        bus.publish(ExperimentEnd(ctx, ExperimentResult("trial", conclusion="It did.")))
    published = {}
    for stream in JournalReader(tmp_path / "journal").streams():
        for record in JournalReader(tmp_path / "journal").read(stream):
            envelope = decode(record.payload)
            match type(envelope.event).__name__:
                case "StepEnd":
                    published["train/loss", envelope.event.step_idx] = envelope.time
                    published["train/note", envelope.event.step_idx] = envelope.time
                case "Eval":
                    published["eval/val/accuracy", envelope.event.step_idx] = envelope.time
                case "RunStart":
                    published["config", 0] = envelope.time
                case "ExperimentEnd":
                    published["conclusion", 19] = envelope.time
    assert len(set(published.values())) > 20
    courier = Courier(tmp_path / "journal", "later", TensorBoardLoggerCallback(), DeliveryPolicy(), persistent=False)
    courier.finish()
    run_in_new_loop(courier.run)
    assert wall_times(tmp_path / "tensorboard" / "away") == published
    found = EventAccumulator(str(tmp_path / "tensorboard" / "away")).Reload()
    assert found.FirstEventTimestamp() == min(published.values())


def test_inline_a_wall_time_is_that_of_the_event_too(tmp_path):
    logger = TensorBoardLoggerCallback(tmp_path / "tb")
    logger.placement = "inline"
    state = LoopState(step=0, num_steps=3, output_dir=tmp_path / "run")
    with EventBus([logger], journal=tmp_path / "journal") as bus:
        for step in range(3):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
    logger.close()
    published = {}
    for stream in JournalReader(tmp_path / "journal").streams():
        for record in JournalReader(tmp_path / "journal").read(stream):
            envelope = decode(record.payload)
            published["train/loss", envelope.event.step_idx] = envelope.time
    assert len(published) == 3
    assert wall_times(tmp_path / "tb" / "run") == published


def test_a_clock_that_is_given_dates_the_rows(run):
    run.logger = TensorBoardLoggerCallback(clock=itertools.count(100).__next__)
    run.start()
    run.step(0, loss=1.0)
    run.step(1, loss=1.0)
    run.end()
    times = wall_times(run.folder)
    # Before them: hypothesis, configuration, hyperparameters.
    assert [each for (tag, _), each in sorted(times.items()) if tag == "train/loss"] == [103.0, 104.0]


def test_a_key_with_a_prefix_is_its_own_tag_and_no_two_keys_share_one(run):
    run.start()
    run.step(0, **{"loss": 1.0, "train/entropy": 2.0, "actor/grad_norm": 3.0, "kl": 4.0, "train/kl": 5.0, "env/x": "y"})
    run.eval(0, "maze", **{"acc": 0.5, "eval/maze/len": 7.0, "easy/acc": 0.75})
    run.end()
    scalars, texts = read(run.folder)
    assert {tag: value for tag, [(_, value)] in scalars.items()} == {
        "train/loss": 1.0,
        "train/entropy": 2.0,
        "actor/grad_norm": 3.0,
        "train/train/kl": 4.0,
        "train/kl": 5.0,
        "eval/maze/acc": 0.5,
        "eval/maze/len": 7.0,
        "eval/maze/easy/acc": 0.75,
    }
    assert texts["env/x"] == [(0, "y")]


def test_a_loop_that_only_publishes_steps_has_a_whole_file_once_the_callback_is_closed(tmp_path):
    logger = TensorBoardLoggerCallback(tmp_path / "tb", flush_secs=1000)
    logger.placement = "inline"
    state = LoopState(step=0, num_steps=5, output_dir=tmp_path / "alone")
    with EventBus([logger]) as bus:
        for step in (0, 1, 3, 2):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": float(step)}))
    logger.close()
    assert read(tmp_path / "tb" / "alone")[0]["train/loss"] == [(step, float(step)) for step in range(4)]
    logger.close()
    with EventBus([logger]) as bus:
        for step in (4, 6, 5):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": float(step)}))
    logger.close()
    assert read(tmp_path / "tb" / "alone")[0]["train/loss"] == [(step, float(step)) for step in range(7)]
    assert len([each for each in (tmp_path / "tb" / "alone").iterdir() if each.name != ".run"]) == 1


def test_handles_of_other_classes_and_steps_of_other_kinds_are_logged(tmp_path):
    logger = TensorBoardLoggerCallback()
    ctx = types.SimpleNamespace(output_dir=tmp_path, run_key="foreign", config={"lr": 0.5})
    state = types.SimpleNamespace(step=np.int64(0), output_dir=tmp_path / "foreign", ctx=ctx)
    logger.on_run_start(ctx)
    logger.on_train_start(state)
    for step in (0.0, np.int32(1), np.array(2)):
        logger.on_step_end(state, step, None, {"loss": 1.0})
    logger.on_eval(state, np.float64(2.0), "val", {"acc": 0.5})
    bare = types.SimpleNamespace(output_dir=str(tmp_path / "bare"))
    bare.step = 0
    logger.on_step_end(bare, 0, None, {"loss": 2.0})
    logger.close()
    scalars, texts = read(tmp_path / "tensorboard" / "foreign")
    assert scalars == {"train/loss": [(0, 1.0), (1, 1.0), (2, 1.0)], "eval/val/acc": [(2, 0.5)]}
    assert '"lr": 0.5' in texts["config"][0][1]
    assert read(tmp_path / "bare" / "tensorboard")[0] == {"train/loss": [(0, 2.0)]}
    with pytest.raises(TypeError):
        logger.on_step_end(state, 2.5, None, {"loss": 1.0})


@pytest.mark.parametrize("log_dir", ["{experiment}/tb", "gs://bucket/tb", "tb/{rank}"])
def test_a_log_dir_that_is_no_path_here_is_refused(log_dir):
    with pytest.raises(ConfigError):
        build_callbacks([{"kind": "tensorboard_logger", "params": {"log_dir": log_dir}}])
    with pytest.raises(EvsysBusError):
        TensorBoardLoggerCallback(log_dir)


def test_a_log_dir_is_where_it_was_when_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path, logger=TensorBoardLoggerCallback("tb"))
    monkeypatch.chdir("elsewhere")
    run.start()
    run.step(0, loss=1.0)
    run.end()
    assert read(tmp_path / "tb" / "run")[0]["train/loss"] == [(0, 1.0)]


def test_it_is_given_the_events_of_rank_0():
    assert TensorBoardLoggerCallback.ranks == "rank0"


def test_constructing_it_imports_no_vendor_and_leaves_the_disk_alone(tmp_path):
    program = """if True:
        import os, sys
        from evsys_adapters import TensorBoardLoggerCallback
        written = []

        def look(event, args):
            if event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.truncate", "os.symlink"):
                written.append(event)
            elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "__pycache__" not in args[0]:
                written.append(args[0])

        sys.addaudithook(look)
        TensorBoardLoggerCallback()
        TensorBoardLoggerCallback("tb")
        print(written, [each for each in ("tensorboardX", "numpy", "google.protobuf", "torch") if each in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[] []"
    assert not [*tmp_path.iterdir()]


def test_rows_of_a_run_whose_folder_was_away_when_it_was_first_heard_of_come_once_it_is_back(tmp_path):
    """Its files cannot be looked at then; the courier begins anew until they can."""
    away = tmp_path / "away"
    away.symlink_to("away")
    state = LoopState(step=0, num_steps=30, output_dir=tmp_path / "run", ctx=LogContext(tmp_path, run_key="run"))
    with EventBus(journal=tmp_path / "journal") as bus:
        bus.publish(TrainStart(state))
        for step in range(30):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": step / 4}))

    def deliver():
        courier = Courier(tmp_path / "journal", "board", TensorBoardLoggerCallback(away), DeliveryPolicy())
        courier.finish()
        run_in_new_loop(courier.run)
        return courier.counts.pending

    with pytest.raises(RetryLaterError, match="away"):
        deliver()
    away.unlink()
    assert deliver() == 0
    assert read(away / "run")[0] == {"train/loss": [(step, step / 4) for step in range(30)]}


def test_rows_that_a_start_made_void_and_that_come_again_are_written_again(tmp_path):
    """The follower's cursor is lost, and with it goes the front of the second stream, the start of its run included."""

    def train(first, last):
        state = LoopState(
            step=first, num_steps=99, output_dir=tmp_path / "run", ctx=LogContext(tmp_path, run_key="run")
        )
        writer = JournalWriter(tmp_path / "journal", segment_bytes=2000)
        with EventBus(journal=writer) as bus:
            bus.publish(TrainStart(state))
            for step in range(first, last):
                bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": step / 4}))
        return tmp_path / "journal" / writer.stream

    def deliver():
        courier = Courier(
            tmp_path / "journal", "board", TensorBoardLoggerCallback(tmp_path / "board"), DeliveryPolicy()
        )
        courier.finish()
        run_in_new_loop(courier.run)
        return {step for step, _ in read(tmp_path / "board" / "run")[0]["train/loss"]}

    train(0, 40)
    first = train(40, 60)
    (first / "lock").unlink()  # nobody goes on with that stream
    second = train(60, 120)
    assert second != first
    assert deliver() == set(range(120))
    (tmp_path / "journal" / "cursors" / "board.json").unlink()
    for segment in sorted(second.glob("*.seg"))[:3]:
        segment.unlink()
    (left, *_) = sorted(second.glob("*.seg"))
    behind = 60 + int(left.stem.partition("-")[2]) - 2  # its first event is a start
    assert deliver() >= {*range(60), *range(behind, 120)}
