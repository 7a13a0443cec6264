"""An adapter works where its class says, however it reaches the bus: as an object, from a spec, from a file."""

import asyncio
import csv
import datetime as dt
import decimal
import importlib.util
import json
import math
import os
import sys
import textwrap
import threading
import time
import uuid
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evsys_adapters import CsvMetricsCallback, TensorBoardLoggerCallback, WandbLoggerCallback
from evsys_adapters.checkpoint_prune import CheckpointPrune
from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
from evsys_bus import (
    Callback,
    Checkpoint,
    EventBus,
    LogContext,
    LoopState,
    ManifestRow,
    Sink,
    StepEnd,
    TrainingBatch,
    TrainingLoop,
    TrainStart,
    build_callbacks,
    dispatch,
    follow,
)
from evsys_bus.config import load_experiment, read_document
from evsys_bus.errors import AsyncHookError, SettingError
from evsys_bus.training.experiment import Experiment
from evsys_bus.training.plan import RunComponents
from support import wandb_server
from support.training_parts import IndexBatches, NumberBackend


class Score:
    name, every = "val", 3

    async def evaluate(self, state):
        return {"score": state.step / 4}


def objects(folder):
    return [
        TensorBoardLoggerCallback(),
        CheckpointUploadCallback(f"file://{folder}/bucket"),
        WandbLoggerCallback("p", mode="offline"),
        CsvMetricsCallback("{run_dir}/metrics.csv"),
    ]


def specs(folder):
    return [
        {"kind": "tensorboard_logger"},
        {"kind": "checkpoint_upload", "params": {"url": f"file://{folder}/bucket"}},
        {"kind": "wandb_logger", "params": {"project": "p", "mode": "offline"}},
        {"kind": "csv_metrics", "params": {"out_path": "{run_dir}/metrics.csv"}},
    ]


def parts(folder):
    return {
        "backend": NumberBackend(folder / "saved"),
        "step_builder": IndexBatches(),
        "num_steps": 7,
        "save_every": 3,
        "evaluators": [Score()],
    }


async def by_bus_of_objects(folder):
    async with EventBus(objects(folder), journal=folder / "run" / "journal") as bus:
        await TrainingLoop(**parts(folder), output_dir=folder / "run", bus=bus).run()
    return bus


async def by_loop_of_objects(folder):
    loop = TrainingLoop(**parts(folder), output_dir=folder / "run", callbacks=objects(folder))
    await loop.run()
    return loop


async def by_specs(folder):
    async with EventBus(build_callbacks(specs(folder)), journal=folder / "run" / "journal") as bus:
        await TrainingLoop(**parts(folder), output_dir=folder / "run", bus=bus).run()
    return bus


async def by_file(folder):
    text = {"name": "toy", "recipe": "toy_recipe:recipe", "run": {}, "callbacks": specs(folder)}
    (folder / "toy.yaml").write_text(json.dumps(text))  # JSON is YAML
    sys.modules["toy_recipe"] = module = type(sys)("toy_recipe")
    module.recipe = lambda params, run: RunComponents(**parts(run.run_dir.parent))
    try:
        config = load_experiment(read_document(folder / "toy.yaml"))
    finally:
        del sys.modules["toy_recipe"]
    experiment = Experiment(config, recipe=module.recipe, output_dir=folder)
    result = await experiment.run()
    assert result.status == "completed", result
    return experiment


WAYS = (by_bus_of_objects, by_loop_of_objects, by_specs, by_file)


def scalars(folder):
    [file] = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file), size_guidance={"scalars": 0})
    read.Reload()
    tags = [tag for tag in read.Tags()["scalars"] if "step_seconds" not in tag]
    return {tag: [(each.step, each.value) for each in read.Scalars(tag)] for tag in tags}


def history(folder):
    [file] = wandb_server.wandb_files_of(folder)
    timed = ("_timestamp", "_runtime", "train/step_seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in wandb_server.rows_in(file)]


def table(folder):
    [file] = folder.rglob("metrics.csv")
    return [(row["step"], row["value"]) for row in csv.DictReader(file.read_text().splitlines())]


def uploaded(folder):
    bucket = folder / "bucket"
    [run] = bucket.iterdir()
    found = {str(each.relative_to(run)): each.read_bytes() for each in run.rglob("*") if each.is_file()}
    return {name: data if name.endswith("/state") else None for name, data in found.items()}


@pytest.mark.long_on_uvloop
@pytest.mark.timeout(90)
async def test_four_ways_to_the_bus_give_equal_deliveries_and_equal_files_value_by_value(tmp_path):
    seen = []
    for way in WAYS:
        folder = tmp_path / way.__name__
        folder.mkdir()
        bus = await way(folder)
        status = bus.receipt.deliveries
        assert all(each.complete for each in status), status
        places = bus.health().couriers
        seen.append((places, scalars(folder), history(folder), table(folder), uploaded(folder)))
        counts = {each.name: (each.delivered, each.dead, each.pending) for each in status}
        if way is not by_file:  # an experiment has events of its own besides
            assert counts == dict.fromkeys(places, (14, 0, 0))
    assert seen[0][0] == {
        "tensorboard_logger": "process",
        "checkpoint_upload": "process",
        "wandb_logger": "process",
    }
    assert [value for _, value in seen[0][3]] == [str(step / 2) for step in range(7)]
    assert seen[0][1]["train/value"] == [(step, step / 2) for step in range(7)]
    assert {name.partition("/")[0] for name in seen[0][4]} >= {"step-000002", "final-000006", "latest.json"}
    for others in seen[1:]:
        assert others == seen[0]


# -- objects ----------------------------------------------------------------------------------------------------------


def step_end(folder, step=0):
    return StepEnd(LoopState(step, 9, folder / "run"), step, TrainingBatch(), {"loss": 0.5})


MODULE = """
    from evsys_bus import Callback, Sink
    import msgspec, os

    class Config(msgspec.Struct):
        path: str
        most: int = 3

    class Follower(Callback):
        Config = Config
        placement = "follow"

        def __init__(self, path, most=3):
            self.path = path

        def on_step_end(self, state, step_idx, batch, metrics):
            with open(self.path, "a") as file:
                file.write(f"{os.getpid()} {step_idx}\\n")

    class Below(Follower):
        pass

    class KeyedConfig(msgspec.Struct):
        path: str
        api_token: str

    class Keyed(Follower):
        Config = KeyedConfig

        def __init__(self, path, api_token):
            self.path = path
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = f"evsys_rule_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__(name)
    del sys.modules[name]


@pytest.mark.parametrize("kind", ["Follower", "Below"])
@pytest.mark.parametrize("by", ["position", "name", "path"])
def test_an_object_whose_arguments_pass_its_config_is_built_again_in_the_courier_process(tmp_path, module, kind, by):
    cls, out = getattr(module, kind), tmp_path / "out"
    made = {
        "position": lambda: cls(str(out), 4),
        "name": lambda: cls(path=str(out)),
        "path": lambda: cls(out, most=2),
    }[by]()
    with EventBus([made], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path))
        assert set(bus.health().couriers.values()) == {"process"}
    pid, step = out.read_text().split()
    assert (int(pid) != os.getpid(), step) == (True, "0")
    [delivery] = bus.receipt.deliveries
    assert (delivery.name, delivery.delivered, delivery.complete) == (kind, 1, True)


def test_an_object_with_live_arguments_is_delivered_to_itself_on_a_thread(tmp_path):
    class Collects(Callback):
        placement: ClassVar = "follow"

        def __init__(self, seen):
            self.seen = seen

        def on_step_end(self, state, step_idx, batch, metrics):
            self.seen.append((step_idx, threading.current_thread() is threading.main_thread()))

    seen = []
    with EventBus([Collects(seen)], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path, 3))
        assert bus.health().couriers == {"Collects": "thread"}
    assert seen == [(3, False)]


def test_what_the_arguments_were_counts_and_not_what_became_of_the_objects_meanwhile(tmp_path):
    keys = ["loss"]

    class Keeps(Callback):
        def __init__(self, keys, *, deep=None):
            keys.append("changed by the constructor")

    kept = Keeps(keys, deep={"a": [1]})
    keys.append("changed by the program")
    assert kept.evsys_arguments.positional == (["loss"],)
    assert kept.evsys_arguments.named == {"deep": {"a": [1]}}
    assert "loss" not in repr(kept)


def test_two_objects_of_one_kind_are_numbered_and_have_cursors_of_their_own(tmp_path):
    pair = [TensorBoardLoggerCallback(tmp_path / "a"), TensorBoardLoggerCallback(tmp_path / "b")]
    with EventBus(pair, journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path))
    assert [each.name for each in bus.receipt.deliveries] == ["tensorboard_logger", "tensorboard_logger_2"]
    assert len(list(tmp_path.glob("[ab]/run/events*"))) == 2


def test_two_objects_of_a_class_without_a_kind_need_names_and_are_told_how(tmp_path):
    class Seen(Callback):
        placement = "follow"

        def on_step_end(self, state, step_idx, batch, metrics): ...

    one, other = Seen(), Seen()
    for pair in ([one, other], [one, one]):
        with pytest.raises(SettingError, match='called "Seen"') as caught:
            EventBus(pair, journal=tmp_path / "journal")
        assert 'follow(adapter, "...")' in caught.value.fix
    with EventBus([one, follow(other, "other")], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path, 4))
    assert sorted(each.name for each in bus.receipt.deliveries) == ["Seen", "other"]


@pytest.mark.parametrize("ranks", ["rank1", 0, [], [0, -1], ["all"], (1.0,), "01"])
@pytest.mark.parametrize("placement", ["inline", "follow"])
def test_ranks_that_are_none_are_refused_where_the_bus_is_made(ranks, placement):
    class Odd(Callback):
        def on_step_end(self, state, step_idx, batch, metrics): ...

    odd = Odd()
    odd.ranks, odd.placement = ranks, placement
    with pytest.raises(SettingError, match="ranks is ") as caught:
        EventBus([odd])
    assert '"rank0", "all"' in caught.value.fix
    with pytest.raises(SettingError, match="ranks is "):
        follow(odd, ranks=ranks)


@pytest.mark.parametrize(("ranks", "chosen"), [("all", None), (None, None), ("rank0", (0,)), ([0, 2], (0, 2))])
def test_follow_takes_the_ranks_that_a_class_and_a_spec_take(ranks, chosen):
    class Any(Callback):
        def on_step_end(self, state, step_idx, batch, metrics): ...

    assert follow(Any(), ranks=ranks).policy.ranks == chosen


def test_a_placement_that_there_is_not_is_refused_where_the_bus_is_made():
    class Odd(Callback):
        placement = "beside"

        def on_step_end(self, state, step_idx, batch, metrics): ...

    with pytest.raises(SettingError, match="placement of Odd is 'beside'"):
        EventBus([Odd()])
    with pytest.raises(SettingError, match="placement of Odd is 'beside'"), EventBus() as bus:
        bus.add(Odd())


def test_a_sink_with_a_config_that_is_given_as_an_object_goes_to_the_process(tmp_path):
    with EventBus([CheckpointPrune(local={"keep_last": 2})], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path))
        assert bus.health().couriers == {"checkpoint_prune": "process"}
    assert bus.receipt.deliveries[0].complete


def test_all_that_is_built_are_callbacks_and_dispatch_runs_them_inline(tmp_path, caplog):
    built = build_callbacks(specs(tmp_path))
    assert all(isinstance(each, Callback) for each in built)
    state = LoopState(0, 2, tmp_path / "run")
    for step in range(2):
        dispatch(built, "on_step_end", state, step, TrainingBatch(), {"value": step / 2})
    dispatch(built, "on_checkpoint", state, ManifestRow("a", state_path="gone"))
    for each in built:
        each.close()
    assert table(tmp_path) == [("0", "0.0"), ("1", "0.5")]
    assert scalars(tmp_path)["train/value"] == [(0, 0.0), (1, 0.5)]
    assert [row["train/value"] for row in history(tmp_path)] == [0.0, 0.5]
    said = [each.getMessage() for each in caplog.records if "dispatch.not_delivered" in each.getMessage()]
    assert len(said) == 1
    assert "checkpoint_upload" in said[0]


def test_a_rank_that_an_adapter_does_not_serve_is_named_on_the_receipt(tmp_path):
    class Everywhere(Callback):
        seen = 0

        def on_step_end(self, state, step_idx, batch, metrics):
            self.seen += 1

    class FirstRank(Everywhere):
        ranks: ClassVar = "rank0"

    class Some(Everywhere):
        ranks: ClassVar = (1, 3)

    three = [Everywhere(), FirstRank(), Some()]
    adapters = [*three, follow(Everywhere(), "all", ranks=None), follow(Everywhere(), "first")]
    with EventBus(adapters, journal=tmp_path / "journal", rank=1) as bus:
        bus.publish(step_end(tmp_path))
    assert [each.seen for each in three] == [1, 0, 1]
    assert {each.name: (each.state, each.delivered) for each in bus.receipt.deliveries} == {
        "all": ("ended", 1),
        "first": ("other_rank", 0),
    }


def test_a_credential_among_the_arguments_stands_in_no_file(tmp_path, module):
    keyed = module.Keyed(str(tmp_path / "out"), "hunter2")
    with EventBus([keyed], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path))
        assert set(bus.health().couriers.values()) == {"process"}
    assert bus.receipt.deliveries[0].complete
    assert not [each for each in tmp_path.rglob("*") if each.is_file() and b"hunter2" in each.read_bytes()]


# -- a half that is placed inline -------------------------------------------------------------------------------------


def saved(folder, name):
    path = folder / "saved" / name
    path.mkdir(parents=True)
    (path / "weights").write_bytes(name.encode() * 1000)
    return Checkpoint(LoopState(1, 9, folder / "run"), ManifestRow(name, batch=1, state_path=str(path)))


@pytest.mark.parametrize("journal", ["given", "none"])
async def test_a_half_that_is_placed_inline_is_delivered_to_by_a_task_on_the_callers_loop(tmp_path, journal):
    upload = CheckpointUploadCallback(f"file://{tmp_path}/bucket")
    upload.placement = "inline"
    given = {"journal": tmp_path / "journal"} if journal == "given" else {}
    before = {each.name for each in threading.enumerate()}
    async with EventBus([upload], **given) as bus:
        assert bus.health().couriers == {"checkpoint_upload": "loop"}
        bus.publish(saved(tmp_path, "one"))
        while not (tmp_path / "bucket/run/one-000001/manifest.json").exists():
            await asyncio.sleep(0.01)
        assert not {each.name for each in threading.enumerate()} & {"evsys-bus-loop", "evsys-bus-couriers"} - before
        bus.publish(saved(tmp_path, "two"))
    assert (tmp_path / "bucket/run/two-000001/manifest.json").exists()
    assert json.loads((tmp_path / "bucket/run/latest.json").read_text())["checkpoint"] == "two-000001"
    tasks = bus.receipt.tasks_by_owner["checkpoint_upload"]
    assert (tasks.spawned, tasks.completed, tasks.failed, tasks.cancelled) == (1, 1, 0, 0)
    [delivery] = bus.receipt.deliveries
    assert (delivery.delivered, delivery.complete) == (2, True)


class EndsOnABusyLoop(Sink):
    """From its last call on, the loop has something else to do at each turn."""

    async def write(self, batch):
        del batch

    async def close(self):
        loop, turns = asyncio.get_running_loop(), iter(range(10))

        def busy():
            time.sleep(0.2)
            if next(turns, None) is not None:
                loop.call_soon(busy)

        loop.call_soon(busy)


class DeliversOnABusyLoop(Callback):
    placement: ClassVar = "inline"
    delivery: ClassVar = EndsOnABusyLoop


async def test_a_delivery_on_the_callers_loop_is_counted_in_the_receipt_though_the_loop_is_busy_when_it_ends(tmp_path):
    async with EventBus([DeliversOnABusyLoop()], journal=tmp_path / "journal") as bus:
        bus.publish(saved(tmp_path, "one"))
    [tasks] = bus.receipt.tasks_by_owner.values()
    assert (tasks.spawned, tasks.completed) == (1, 1)


def test_without_a_loop_it_is_delivered_to_on_the_thread_of_the_bus(tmp_path):
    [upload] = build_callbacks(
        [{"kind": "checkpoint_upload", "placement": "inline", "params": {"url": f"file://{tmp_path}/bucket"}}]
    )
    with EventBus([upload], journal=tmp_path / "journal") as bus:
        bus.publish(saved(tmp_path, "one"))
    assert (tmp_path / "bucket/run/one-000001/manifest.json").exists()
    assert bus.receipt.tasks_by_owner["checkpoint_upload"].completed == 1


class Half(Sink):
    """Takes as long as it is told."""

    def __init__(self, seconds):
        self.seconds = seconds

    async def write(self, batch):
        await asyncio.sleep(self.seconds)


class Slow(Callback):
    delivery: ClassVar = Half
    placement: ClassVar = "inline"

    def __init__(self, seconds): ...


async def test_the_deadline_holds_for_it_and_what_is_pending_is_told(tmp_path):
    async with EventBus([Slow(30)], journal=tmp_path / "journal", drain_timeout=0.3) as bus:
        bus.publish(step_end(tmp_path))
    assert bus.receipt.seconds < 1.3
    [delivery] = bus.receipt.deliveries
    assert (delivery.pending, bus.receipt.resume_command) == (1, f"evsys-bus sync {tmp_path / 'journal'}")


@pytest.mark.parametrize("failing", [True, False])
async def test_it_gets_what_is_left_when_the_body_raises(tmp_path, failing):
    bus = EventBus([Slow(0.2)], journal=tmp_path / "journal")
    with pytest.raises(ValueError, match="training failed"):
        async with bus:
            bus.publish(step_end(tmp_path))
            raise ValueError("training failed")
    assert bus.receipt.deliveries[0].complete


# -- close ------------------------------------------------------------------------------------------------------------


class Closes(Callback):
    def __init__(self):
        self.calls = []

    def on_step_end(self, state, step_idx, batch, metrics):
        self.calls.append("step")
        self.spawn(self.work)

    async def work(self):
        await asyncio.sleep(0.05)
        self.calls.append("task")

    def close(self):
        self.calls.append("close")


async def test_close_is_called_once_after_the_last_task_and_only_where_hooks_were_called(tmp_path):
    used, idle = Closes(), Closes()
    async with EventBus([used], journal=tmp_path / "journal") as bus, EventBus([idle]):
        bus.publish(step_end(tmp_path))
    assert (used.calls, idle.calls) == (["step", "task", "close"], [])


def test_a_callback_that_is_removed_is_closed_and_opens_again_where_it_is_used_again(tmp_path):
    callback = Closes()
    with EventBus([callback]) as bus:
        bus.publish(step_end(tmp_path))
        bus.remove(callback)
        assert callback.calls[-1] == "close"
        bus.add(callback)
        bus.publish(step_end(tmp_path))
    assert callback.calls.count("close") == 2


@pytest.mark.parametrize("given", [lambda it: it, lambda it: follow(it, "steps")])
def test_a_followed_callback_that_is_removed_is_delivered_to_all_the_same_and_the_log_says_so(tmp_path, caplog, given):
    class Steps(Callback):
        placement = "follow"
        seen = 0

        def on_step_end(self, *_):
            self.seen += 1

    steps, inline = Steps(), Closes()
    with EventBus([given(steps), inline], journal=tmp_path / "journal", couriers="thread") as bus:
        bus.remove(inline)
        assert "callback.still_followed" not in caplog.text
        bus.remove(steps)
        bus.publish(step_end(tmp_path))
    assert steps.seen == 1
    assert "callback.still_followed callback=" in caplog.text


class AsyncClose(Closes):
    async def close(self):
        pass


class GeneratorClose(Closes):
    def close(self):
        yield


class CallsAsyncClose(Closes):
    def close(self):
        return AsyncClose.close(self)


@pytest.mark.parametrize("kind", [AsyncClose, GeneratorClose])
@pytest.mark.parametrize("placement", ["inline", "follow"])
def test_a_close_that_nobody_would_await_is_an_error_at_once(kind, placement):
    callback = kind()
    callback.placement = placement
    with pytest.raises(AsyncHookError, match=r"Close.close .*\n.*\nfix: "):
        EventBus([callback])


@pytest.mark.parametrize("placement", ["inline", "follow"])
def test_a_close_that_returns_a_coroutine_has_failed(tmp_path, caplog, placement):
    callback = CallsAsyncClose()
    callback.placement = placement
    with EventBus([callback], journal=tmp_path / "journal", couriers="thread") as bus:
        bus.publish(step_end(tmp_path))
    assert "CallsAsyncClose.close returned a coroutine, and nothing runs it" in caplog.text
    failures = {each.name: each.hook_failures for each in bus.receipt.deliveries}
    failures |= {each.callback: each.failures for each in bus.health().hooks if each.hook == "close"}
    assert failures == {"CallsAsyncClose": 1}


@pytest.mark.parametrize("placement", ["follows", None, "Follow", 1])
def test_a_placement_that_there_is_not_is_an_error_at_once(placement):
    callback = Closes()
    callback.placement = placement
    with pytest.raises(SettingError, match="placement of Closes is"):
        EventBus([callback])


def test_a_close_that_raises_or_hangs_ends_nothing(tmp_path, caplog):
    over = threading.Event()

    class Raises(Closes):
        def close(self):
            raise OSError("the disk is gone")

    class Hangs(Closes):
        def close(self):
            over.wait(10)

    last = Closes()
    began = time.monotonic()
    with EventBus([Raises(), last, Hangs()], drain_timeout=0.4) as bus:
        bus.publish(step_end(tmp_path))
    assert time.monotonic() - began < 1.4
    over.set()
    assert last.calls[-1] == "close"
    assert "callback.close_failed" in caplog.text
    assert "the disk is gone" in caplog.text
    assert "callback.close_hangs callback=Hangs" in caplog.text
    failed = {each.callback: each.failures for each in bus.health().hooks if each.hook == "close"}
    assert failed == {"Raises": 1, "Hangs": 1}


@pytest.mark.parametrize("couriers", ["process", pytest.param("thread", marks=pytest.mark.long)])
def test_a_close_that_hangs_in_a_courier_is_no_ok(tmp_path, caplog, couriers, monkeypatch):
    source = """
        import threading
        import msgspec
        from evsys_bus import Callback

        class Stuck(Callback):
            placement = "follow"

            class Config(msgspec.Struct): ...

            def on_step_end(self, *_): ...

            def close(self):
                threading.Event().wait()
    """
    (tmp_path / f"stuck_{couriers}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    stuck = importlib.import_module(f"stuck_{couriers}").Stuck()
    journal = tmp_path / "journal"
    with EventBus([stuck], journal=journal, couriers=couriers, drain_timeout=3, linger_seconds=0.1) as bus:
        bus.publish(step_end(tmp_path))
    (status,) = bus.receipt.deliveries
    assert (status.delivered, status.pending, status.hook_failures) == (1, 0, 1)
    assert status.last_failure == "close: it has not returned"
    assert not status.complete
    assert "delivery.not_ended adapter=Stuck why=close() has not returned" in caplog.text


def test_an_object_of_another_kind_with_a_close_of_its_own_is_left_alone(tmp_path):
    class Foreign:
        closed = False

        def on_step_end(self, *_): ...

        def close(self):
            self.closed = True

    foreign = Foreign()
    with EventBus([foreign]) as bus:
        bus.publish(step_end(tmp_path))
    assert not foreign.closed


# -- the time of an event ---------------------------------------------------------------------------------------------


def test_a_hook_sees_when_and_as_what_its_event_was_published_inline_and_followed_alike(tmp_path):
    class Sees(Callback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, state, step_idx, batch, metrics):
            self.seen.append(self.event)

        def on_checkpoint(self, state, row):
            self.seen.append(self.event)

    inline, followed = Sees(), Sees()
    with EventBus([inline, follow(followed)], journal=tmp_path / "journal") as bus:
        for step in range(70):
            bus.publish(step_end(tmp_path, step))
        bus.publish(Checkpoint(LoopState(1, 9, tmp_path), ManifestRow("a")))
        outside = inline.event
    assert inline.seen == followed.seen
    assert [each.sequence for each in inline.seen] == [*range(1, 72)]
    assert {each.stream for each in inline.seen} == {bus.health().journal.stream}
    assert (outside.stream, outside.sequence) == ("", 0)
    assert abs(outside.time - time.time()) < 5


def test_gevents_threads_are_refused_with_the_fix(program):
    source = """
        import sys, types
        patch = types.ModuleType("gevent.monkey")
        patch.is_module_patched = lambda name: name == "threading"
        sys.modules["gevent.monkey"] = patch
        from evsys_bus import EventBus
        try:
            with EventBus([]):
                pass
        except ValueError as error:
            print(error)
    """
    process = program(source)
    out, err = process.communicate(timeout=15)
    assert "thread=False" in out, err


def test_the_program_of_a_newcomer_leaves_whole_files(tmp_path):
    """Steps alone, no start and no end, the loggers given as they are."""
    loggers = objects(tmp_path)
    with EventBus(loggers, journal=tmp_path / "journal") as bus:
        state = LoopState(0, 5, tmp_path / "run")
        for state.step in range(5):
            bus.publish(StepEnd(state, state.step, TrainingBatch(), {"value": state.step / 2}))
    assert all(each.complete for each in bus.receipt.deliveries), bus.receipt
    assert table(tmp_path) == [(str(step), str(step / 2)) for step in range(5)]
    assert scalars(tmp_path)["train/value"] == [(step, step / 2) for step in range(5)]
    assert [row["train/value"] for row in history(tmp_path)] == [step / 2 for step in range(5)]


# -- inline and followed ----------------------------------------------------------------------------------------------


def texts(folder):
    [file] = folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file), size_guidance={"tensors": 0})
    read.Reload()
    shown = {tag: read.Tensors(tag) for tag in read.Tags()["tensors"]}
    return {
        tag: [(each.step, each.tensor_proto.string_val[0].decode()) for each in found] for tag, found in shown.items()
    }


ODD_VALUES = [
    dt.date(2031, 5, 4),
    dt.datetime(2031, 5, 4, 3, 2, 1, 5),  # noqa: DTZ001 # as people write them
    dt.timedelta(minutes=7, microseconds=3),
    uuid.UUID(int=77),
    {"at": dt.date(2031, 5, 4), "for": [dt.timedelta(days=1)]},
    np.datetime64("2031-05-04T01:02:03"),
    decimal.Decimal("0.25"),
    np.float16(0.5),
    math.inf,
]


def test_odd_values_of_a_host_are_the_same_in_the_files_of_inline_and_followed_adapters(tmp_path):
    found = {}
    for place in ("inline", "follow"):
        folder = tmp_path / place
        listed = [each | {"placement": place} for each in specs(folder) if each["kind"] != "checkpoint_upload"]
        with EventBus(build_callbacks(listed), journal=folder / "journal", couriers="thread") as bus:
            ctx = SimpleNamespace(output_dir=str(folder), run_key=31, config={"began": dt.date(2031, 5, 4)})
            for step, value in enumerate(ODD_VALUES):
                state = {"step": step, "num_steps": None, "output_dir": str(folder / "x"), "ctx": ctx}
                bus.publish(StepEnd(state, np.int16(step), None, {"odd": value, "value": step / 2}))
        rows = [[*csv.reader(file.read_text().splitlines())] for file in folder.glob("31/metrics.csv")]
        found[place] = scalars(folder), texts(folder), history(folder), rows
    assert len(found["inline"][3][0]) == 1 + len(ODD_VALUES)
    assert found["inline"][0]["train/value"] == [(step, step / 2) for step in range(len(ODD_VALUES))]
    assert found["follow"] == found["inline"]


@pytest.mark.parametrize("place", ["inline", "follow"])
def test_every_rank_that_an_adapter_serves_has_files_of_its_own(tmp_path, place):
    kinds = {
        "tensorboard_logger": {},
        "local_logger": {"print_every": 0},
        "csv_metrics": {"out_path": f"{tmp_path}/m.csv"},
    }
    kinds["wandb_logger"] = {"project": "p", "mode": "offline"}
    listed = [
        {"kind": kind, "params": params, "placement": place, "ranks": "all" if kind == "local_logger" else [0, 2]}
        for kind, params in kinds.items()
    ]
    state = LoopState(0, 4, tmp_path / "x", ctx=LogContext(tmp_path, run_key="a"))
    buses = [EventBus(build_callbacks(listed), journal=tmp_path / "journal", couriers="thread", rank=r) for r in (0, 2)]
    with buses[0], buses[1]:
        for step in range(2):
            for bus, loss in zip(buses, (0.25, 0.5), strict=True):
                if not step:
                    bus.publish(TrainStart(state))  # of the rank that comes second: cuts nothing of the first
                bus.publish(StepEnd(state, step, None, {"loss": loss + step}))
    for rank, loss in ((0, 0.25), (2, 0.5)):
        own, beside = (f"rank{rank}", f"-rank{rank}") if rank else ("", "")
        losses = [loss, loss + 1]
        rows = csv.DictReader((tmp_path / f"m{beside}.csv").read_text().splitlines())
        assert [float(row["loss"]) for row in rows] == losses
        rows = (tmp_path / "a" / own / "logs/training/metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["loss"] for row in rows] == losses
        [file] = (tmp_path / "tensorboard/a" / own).glob("events.*")
        read = EventAccumulator(str(file))
        read.Reload()
        assert [each.value for each in read.Scalars("train/loss")] == losses
        [file] = (tmp_path / "a" / own).glob("wandb/*/*.wandb")
        assert [row["train/loss"] for row in wandb_server.rows_in(file)] == losses


@pytest.mark.parametrize("first_to_leave", ["calls hooks", "calls none"])
def test_a_callback_of_two_buses_is_closed_once_by_the_one_that_is_left_last(step_end, first_to_leave):
    closed = []

    class Holds(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            assert not closed

        def close(self):
            closed.append(threading.get_ident())

    shared = Holds()
    one, other = EventBus([shared]), EventBus([shared])
    with one:
        with other:
            (other if first_to_leave == "calls hooks" else one).publish(step_end(0))
        assert closed == []
        one.remove(shared) if first_to_leave == "calls none" else None
    assert len(closed) == 1
    assert other.receipt is not None


def test_files_of_a_callback_that_buses_on_many_threads_share_have_every_row(tmp_path, step_end):
    # A bus that was left closed the files that another thread was writing: rows were lost or came twice.
    table = CsvMetricsCallback("{run_dir}/m.csv")

    def train(name):
        state = LoopState(0, 30, tmp_path / name / "run", ctx=LogContext(tmp_path / name, run_key="run"))
        with EventBus([table]) as bus:
            bus.publish(TrainStart(state))
            for step in range(30 * (1 + int(name) % 3)):
                bus.publish(StepEnd(state, step, None, {"loss": float(name)}))

    for _ in range(5):
        threads = [threading.Thread(target=train, args=(str(number),)) for number in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        for number in range(8):
            rows = (tmp_path / str(number) / "run" / "m.csv").read_text().split()[1:]
            assert rows == [f"{step},{float(number)}" for step in range(30 * (1 + number % 3))]
