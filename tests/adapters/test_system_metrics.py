"""system_metrics: what is sampled beside the loop, where it is recorded, and which adapters get it."""

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evsys_adapters import (
    CsvMetricsCallback,
    LocalLoggerCallback,
    SystemMetricsCallback,
    TensorBoardLoggerCallback,
    WandbLoggerCallback,
)
from evsys_adapters.system_metrics import Machine, SystemMetrics, open_nvml
from evsys_bus import (
    Callback,
    EventBus,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    LogContext,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.context import ArmResult, LoopArtifacts
from evsys_bus.errors import ConfigError
from evsys_bus.journal import JournalReader, verify
from evsys_bus.journal.layout import cursor_path
from evsys_bus.testing import RecordingSink, conformance
from support import wandb_server as wandb
from support.couriers import counted, deliver
from support.files import read_json_lines
from support.journals import read_envelopes, read_records

THREAD = "evsys-bus:system_metrics"


def sampling_threads():
    return [each for each in threading.enumerate() if each.name == THREAD]


def wait_for(condition):
    until = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def train(bus, folder, *, steps=3, samples_at=(), journal=None):
    ctx = LogContext(folder).for_run("ppo")
    state = LoopState(0, steps, ctx.run_dir, ctx=ctx)
    bus.publish(RunStart(ctx))
    bus.publish(TrainStart(state))
    for step in range(steps):
        state.step = step
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
        if step in samples_at:
            before = len(read_records(journal, family="s"))
            wait_for(lambda before=before: len(read_records(journal, family="s")) > before + 1)
    bus.publish(TrainEnd(state, LoopArtifacts()))
    bus.publish(RunEnd(ctx, RunResult(), ArmResult("ppo")))


def test_the_machine_and_the_process_are_sampled(tmp_path):
    machine = Machine()
    until = time.monotonic() + 0.1
    while time.monotonic() < until:  # so that percentages have something to count
        pass
    values = machine.sample()
    assert {"cpu/percent", "cpu/process_percent", "memory/percent", "memory/process_bytes"} <= set(values)
    assert {"network/received_bytes_per_second", "process/threads"} <= set(values)
    assert values["cpu/process_percent"] > 0
    assert values["memory/process_bytes"] > 1e6
    disk = machine.disk(tmp_path / "not" / "there" / "yet")
    assert 0 <= disk["disk/percent"] <= 100
    machine.close()


def test_a_machine_with_or_without_gpus_is_sampled():
    machine = Machine(open_nvml())
    assert all(isinstance(each, float) for each in machine.sample().values())
    machine.close()
    machine.close()


class TwoGpus:
    """NVML of a machine with two GPUs, whose second one has no power sensor."""

    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU
    NVMLError = pynvml.NVMLError
    is_open = True

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUtilizationRates(self, gpu):
        return SimpleNamespace(gpu=50 + gpu, memory=1)

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(total=200, used=50, free=150)

    def nvmlDeviceGetTemperature(self, gpu, sensor):
        return 60

    def nvmlDeviceGetPowerUsage(self, gpu):
        if gpu:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 250_500

    def nvmlShutdown(self):
        self.is_open = False


def test_gpus_are_sampled_and_what_one_lacks_is_left_out():
    nvml = TwoGpus()
    assert all(hasattr(pynvml, name) for name in vars(TwoGpus) if name.startswith("nvml"))
    machine = Machine(nvml)
    gpus = {name: value for name, value in machine.sample().items() if name.startswith("gpu/")}
    each = {"memory_percent": 25.0, "memory_used_bytes": 50.0, "celsius": 60.0}
    expected = {f"gpu/{index}/{name}": value for index in (0, 1) for name, value in each.items()}
    assert gpus == expected | {"gpu/0/percent": 50.0, "gpu/1/percent": 51.0, "gpu/0/watts": 250.5}
    machine.close()
    assert not nvml.is_open


async def test_samples_reach_other_adapters_with_time_and_step_and_are_no_training_rows(tmp_path, journal):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        train(bus, tmp_path, samples_at=[2], journal=journal)
        assert not [each for each in bus.health().hooks if each.failures]
    reader = JournalReader(journal)
    assert len(reader.streams()) == 1
    [stream] = reader.streams("s")
    seen = RecordingSink()
    courier = await deliver(journal, seen)
    assert counted(courier)[1:] == (0, 0)
    sampled = [each for each in seen.envelopes if each.stream == stream]
    assert {type(each.event) for each in sampled} == {SystemMetrics}
    assert not [each for each in seen.envelopes if each.stream != stream and type(each.event) is SystemMetrics]
    last = sampled[-1]
    assert (last.run, last.event.step, last.event.ctx.run_key) == ("ppo", 2, "ppo")
    assert last.event.values["cpu/percent"] >= 0
    assert abs(last.time - time.time()) < 60


async def test_a_followed_callback_has_a_hook_for_them(tmp_path, journal):
    class Seen(Callback):
        def __init__(self):
            self.calls = []

        def on_system_metrics(self, ctx, values, step):
            self.calls.append((ctx.run_key, "memory/percent" in values, step))

    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        train(bus, tmp_path, samples_at=[1], journal=journal)
    seen = Seen()
    await deliver(journal, seen)
    assert ("ppo", True, 1) in seen.calls


async def test_the_rows_of_a_table_stay_as_they_are(tmp_path, journal):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        train(bus, tmp_path, samples_at=[0], journal=journal)
    assert read_records(journal, family="s")
    await deliver(journal, CsvMetricsCallback(tmp_path / "rows.csv"))
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["step,loss", "0,1.0", "1,1.0", "2,1.0"]


def sampled_rows(folder):
    return read_json_lines(folder / "ppo" / "logs" / "system_metrics.jsonl")


def lose(path):
    Path(path).unlink()


def local_logger():
    return LocalLoggerCallback(print_every=0)


async def test_local_logger_has_each_sample_once_apart_from_the_training(tmp_path, journal):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        train(bus, tmp_path, samples_at=[1], journal=journal)
    assert counted(await deliver(journal, local_logger()))[1:] == (0, 0)
    recorded, rows = read_envelopes(journal, family="s"), sampled_rows(tmp_path)
    assert [row["time"] for row in rows] == [each.time for each in recorded]
    assert [{"time": each.time, "step": each.event.step, **each.event.values} for each in recorded] == rows
    assert len(read_json_lines(tmp_path / "ppo" / "logs" / "training" / "metrics.jsonl")) == 3


@pytest.mark.parametrize("lost", ["cursor", "cursor and note"])
async def test_a_sample_that_is_delivered_again_is_no_second_row_of_local_logger(tmp_path, journal, lost):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        train(bus, tmp_path, samples_at=[1], journal=journal)
    await deliver(journal, local_logger())
    rows = sampled_rows(tmp_path)
    lose(cursor_path(journal, "it"))
    if lost == "cursor and note":
        lose(tmp_path / "ppo" / "logs" / ".at")
    await deliver(journal, local_logger())
    assert sampled_rows(tmp_path) == rows


async def test_samples_of_steps_that_are_run_again_stay_with_local_logger(tmp_path, journal):
    for _ in range(2):
        with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
            train(bus, tmp_path, samples_at=[0], journal=journal)
        await deliver(journal, local_logger())
    assert len(sampled_rows(tmp_path)) == len(read_records(journal, family="s"))
    assert len(read_json_lines(tmp_path / "ppo" / "logs" / "training" / "metrics.jsonl")) == 3


async def test_local_logger_has_samples_that_come_after_the_end_of_their_experiment(tmp_path, journal):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        bus.publish(ExperimentStart(LogContext(tmp_path)))
        train(bus, tmp_path, samples_at=[0], journal=journal)
        bus.publish(ExperimentEnd(LogContext(tmp_path), ExperimentResult("lab")))
    await deliver(journal, local_logger(), slice_seconds=0.0)
    assert len(sampled_rows(tmp_path)) == len(read_records(journal, family="s"))
    await deliver(journal, local_logger(), name="another")
    assert len(sampled_rows(tmp_path)) == len(read_records(journal, family="s"))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
async def test_dashboards_show_the_samples_apart_from_the_training(tmp_path, journal, kind):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        train(bus, tmp_path, samples_at=[1, 2], journal=journal)
    logger = TensorBoardLoggerCallback() if kind == "tensorboard" else WandbLoggerCallback("p", mode="offline")
    assert counted(await deliver(journal, logger))[1:] == (0, 0)
    if kind == "tensorboard":
        found = EventAccumulator(str(tmp_path / "tensorboard" / "ppo"), size_guidance={"scalars": 0})
        found.Reload()
        loss, memory = (found.Scalars(tag) for tag in ("train/loss", "system/memory/percent"))
        assert [each.step for each in loss] == [0, 1, 2]
        steps, values = [each.step for each in memory], [each.value for each in memory]
    else:
        [file] = wandb.wandb_files_of(tmp_path)
        rows = wandb.rows_in(file)
        assert wandb.metric_series(rows, "train")["loss"] == [(0, 1.0), (1, 1.0), (2, 1.0)]
        series = wandb.metric_series(rows, "system")["memory/percent"]
        steps, values = [step for step, _ in series], [value for _, value in series]
    assert {1, 2} <= set(steps)
    assert all(value > 0 for value in values)


def test_the_thread_runs_while_a_run_is_open_and_ends_with_it(tmp_path, journal):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        assert not sampling_threads()
        ctx = LogContext(tmp_path).for_run("ppo")
        bus.publish(RunStart(ctx))
        assert len(sampling_threads()) == 1
        bus.publish(RunEnd(ctx, RunResult(), ArmResult("ppo")))
        wait_for(lambda: not sampling_threads())
        bus.publish(RunStart(ctx))  # resumed in the same process
        wait_for(lambda: read_records(journal, family="s"))
    assert not sampling_threads()


def test_a_bus_that_is_left_with_an_open_run_ends_the_thread_at_once(tmp_path, journal):
    with EventBus([SystemMetricsCallback(60)], journal=journal) as bus:
        bus.publish(RunStart(LogContext(tmp_path).for_run("ppo")))
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert not sampling_threads()


def test_two_runs_at_once_have_samples_of_their_own(tmp_path, journal):
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        for key in ("a", "b"):
            bus.publish(RunStart(LogContext(tmp_path).for_run(key)))
        assert len(sampling_threads()) == 1
        wait_for(lambda: len(read_records(journal, family="s")) >= 4)
    payloads = b"".join(each.payload for each in read_records(journal, family="s"))
    assert payloads.count(b"cpu/percent") >= 4


async def test_a_loop_without_a_run_start_is_sampled_too(tmp_path, journal):
    state = LoopState(0, 3, tmp_path / "alone")
    with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
        bus.publish(TrainStart(state))
        wait_for(lambda: read_records(journal, family="s"))
        bus.publish(TrainEnd(state, LoopArtifacts()))
        wait_for(lambda: not sampling_threads())
    seen = RecordingSink()
    await deliver(journal, seen)
    sampled = next(each for each in seen.envelopes if type(each.event) is SystemMetrics)
    assert sampled.run == "alone"
    assert str(sampled.event.ctx.output_dir) == str(tmp_path / "alone")


def test_a_second_process_continues_the_training_in_the_stream_of_the_training(tmp_path, journal):
    for _ in range(2):
        with EventBus([SystemMetricsCallback(0.05)], journal=journal) as bus:
            train(bus, tmp_path, samples_at=[0], journal=journal)
    reader = JournalReader(journal)
    assert len(reader.streams()) == 1
    assert len(reader.streams("s")) == 1
    assert verify(journal).is_intact


def test_a_bus_without_a_journal_is_named_as_the_reason(tmp_path, caplog):
    with EventBus([SystemMetricsCallback(0.05)]) as bus:
        bus.publish(RunStart(LogContext(tmp_path).for_run("ppo")))
        wait_for(lambda: not sampling_threads())
    assert "system_metrics.not_sampled" in caplog.text


def test_the_hooks_take_next_to_no_time(tmp_path, journal):
    callback = SystemMetricsCallback(0.05)
    assert not {"on_step_end", "on_eval", "on_checkpoint"} & set(vars(type(callback)))


def test_without_psutil_the_error_names_the_command():
    program = textwrap.dedent("""
        import sys
        sys.modules["psutil"] = None
        import importlib.util
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "psutil" else found(name, *a)
        sys.modules.pop("psutil")
        from evsys_bus import CallbackSpec, build_callbacks
        build_callbacks([CallbackSpec("system_metrics")])
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "BrokenAdapterError" in done.stderr
    assert 'pip install "evsys-bus[system]"' in done.stderr


@pytest.mark.parametrize("params", [{"every_seconds": 0}, {"gpus": "yes"}])
def test_wrong_params_are_refused(params):
    with pytest.raises(ConfigError):
        SystemMetricsCallback(**params)


test_conforms = conformance(lambda _: SystemMetricsCallback(), follow=False)
