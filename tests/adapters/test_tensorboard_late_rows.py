"""tensorboard_logger while a run goes on whose rows come late: both of TensorBoard's loaders show every point."""

import contextlib
import errno
import functools
import itertools
import logging
import random
import subprocess
import tempfile
import time
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard import context
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event as LegacyEvent
from tensorboard.data import grpc_provider
from tensorboard_data_server import server_binary

from evsys_adapters import TensorBoardLoggerCallback
from evsys_adapters.output_files.tensorboard_events import Events
from evsys_adapters.tensorboard_logger import FILE
from evsys_bus import (
    Eval,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
)
from evsys_bus.disk import OsDisk
from evsys_bus.files import use_disk
from support import loggers
from tests.adapters import test_rewind as rewind

pytestmark = pytest.mark.long


SECONDS = 15


class Fast:
    """TensorBoard's default loader, at work: its data server, asked over gRPC."""

    def __init__(self, folder, port_file):
        command = [server_binary(), "--logdir", str(folder), "--reload", "1", "--port", "0", "--die-after-stdin"]
        command += ["--samples-per-plugin", "scalars=all", "--port-file", str(port_file)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE)
        end = time.monotonic() + SECONDS
        while not (port_file.exists() and port_file.read_text().endswith("\n")) and time.monotonic() < end:
            time.sleep(0.01)
        self.channel = grpc.insecure_channel(f"localhost:{port_file.read_text().strip()}")
        self.provider = grpc_provider.GrpcDataProvider("", grpc_provider.make_stub(self.channel))

    def stop(self):
        """End it: it ends with its input."""
        self.channel.close()
        self.process.communicate(timeout=SECONDS)

    def points(self, run):
        """What it shows now of a run: steps and values by tag."""
        said = self.provider.read_scalars(
            context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=1 << 20
        )
        return {tag: [(each.step, each.value) for each in series] for tag, series in said.get(run, {}).items()}

    def shows(self, run, expected):
        """Wait until it shows just that; what it shows in the end."""
        end = time.monotonic() + SECONDS
        while (shown := self.points(run)) != expected and time.monotonic() < end:
            time.sleep(0.05)
        return shown


@pytest.fixture
def fast(tmp_path, tmp_path_factory):
    """Starts a data server that watches the folder."""
    servers = []
    ports = tmp_path_factory.mktemp("ports")

    def start():
        servers.append(Fast(tmp_path, ports / str(len(servers))))
        return servers[-1]

    yield start
    for each in servers:
        each.stop()


def slow(folder):
    """What the other loader shows, begun now; in the order of the file."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def in_order(shown):
    return {tag: sorted(points) for tag, points in shown.items()}


def events(folder):
    """Every event in every file that a loader would read."""
    for path in sorted(folder.iterdir()):
        if "tfevents" in path.name:
            yield from LegacyEventFileLoader(str(path)).Load()


def restarts(folder):
    return [each for each in events(folder) if each.HasField("session_log")]


def points_of(steps):
    return [(step, float(step)) for step in sorted(steps)]


def swapped(count):
    """2, 1, 4, 3, …"""
    pairs = [(step + 1, step) for step in range(1, count, 2)]
    return [0, *itertools.chain.from_iterable(pairs)]


def far_late(count):
    """Every tenth step comes thirty steps late."""
    return sorted(range(count), key=lambda step: step + 30.5 if step % 10 == 0 else step)


def shuffled(count):
    steps = [*range(count)]
    random.Random(5).shuffle(steps)
    return steps


ORDERS = {"swapped": swapped(81), "far late": far_late(90), "shuffled": shuffled(60), "backwards": [*range(30, -1, -1)]}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("place", ["inline", "follow"])
def test_every_point_is_shown_while_the_run_goes_on_and_when_it_has_ended(order, place, tmp_path, fast, caplog):
    running = fast()
    ctx = LogContext(tmp_path).for_run("late")
    folder = tmp_path / "tensorboard" / "late"
    state = LoopState(step=0, num_steps=200, output_dir=ctx.run_dir, ctx=ctx)
    specs = [{"kind": "tensorboard_logger", "placement": place, "params": {"flush_secs": 0}}]
    half = len(order) // 2
    with EventBus(build_callbacks(specs), journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for steps, seen in ((order[:half], order[:half]), (order[half:], order)):
            for step in steps:
                bus.publish(StepEnd(state, step, TrainingBatch(), {"reward": float(step)}))
            expected = {"train/reward": points_of(seen)}
            assert running.shows("tensorboard/late", expected) == expected
            assert in_order(slow(folder)) == expected
            assert fast().shows("tensorboard/late", expected) == expected
            assert not restarts(folder)
        bus.publish(TrainEnd(state, LoopArtifacts()))
    expected = {"train/reward": points_of(order)}
    assert slow(folder) == expected
    assert running.shows("tensorboard/late", expected) == expected
    assert not restarts(folder)
    assert len([each for each in folder.iterdir() if each.name not in {".run", ".at"}]) == 1
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING and "restart" in each.getMessage()]


def test_evals_that_come_late_or_again_are_shown_once_at_their_step_while_the_run_goes_on(tmp_path, fast):
    running = fast()
    state = LoopState(step=0, num_steps=50, output_dir=tmp_path / "run")
    with EventBus(
        build_callbacks([{"kind": "tensorboard_logger", "params": {"log_dir": str(tmp_path / "tb"), "flush_secs": 0}}]),
        journal=tmp_path / "journal",
    ) as bus:
        for step in range(50):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"p": float(step)}))
        for step in (20, 0, 40, 10):
            for name, times in (("maze", 1), ("walk", 10)):
                bus.publish(Eval(state, step, name, {"wins": float(step * times)}))
        bus.publish(Eval(state, 40, "maze", {"wins": 41.0}))
        steps = (0, 10, 20, 40)
        expected = {
            "train/p": points_of(range(50)),
            "eval/maze/wins": [(step, 41.0 if step == 40 else float(step)) for step in steps],
            "eval/walk/wins": [(step, step * 10.0) for step in steps],
        }
        assert running.shows("tb/run", expected) == expected
        assert slow(tmp_path / "tb" / "run") == expected


def row(step, **metrics):
    return rewind.row(step, **(metrics or {"p": float(step)}))


def tensorboard(folder):
    return TensorBoardLoggerCallback(folder / "tb", flush_secs=0)


def content(folder):
    """What every run's only file holds, once it is in order."""
    found = {}
    for run in sorted((folder / "tb").iterdir()) if (folder / "tb").exists() else ():
        read = Events()
        files = [each for each in run.iterdir() if "tfevents" in each.name and each.stat().st_size]
        assert len(files) <= 1
        for path in files:
            with path.open("rb") as file:
                frames = [*read.sorted_frames(file)][1:]
            values = [LegacyEvent.FromString(each[12:-4]) for each in frames]
            found[run.name] = sorted(
                (value.tag, each.step, repr(value.simple_value), str(value.tensor))
                for each in values
                for value in each.summary.value
                if value.tag != "conclusion"
            )
    return found


LATE = [rewind.start(0), *map(row, (0, 1, 2, 4)), row(3), row(6), row(5), row(7), row(2, q=0.5)]


@pytest.mark.parametrize("call", range(14))
@pytest.mark.parametrize("unsaved", [True, False])
def test_a_courier_killed_while_it_puts_the_file_in_order_doubles_and_loses_nothing(call, unsaved, tmp_path):
    end = [*LATE, rewind.END]
    expected = rewind.deliver(tensorboard, end, tmp_path / "calm", read=content)
    assert [(tag, step) for tag, step, *_ in expected["a"]] == [
        *(("train/p", step) for step in range(8)),
        ("train/q", 2),
    ]
    for more in range(len(end) - 4):
        for rewind_call in (None, call):
            lives = [rewind.Life(3, unsaved=unsaved, more=more, call=call, rewind_call=rewind_call)]
            folder = tmp_path / f"{more} {rewind_call}"
            commits = frozenset([3])
            assert rewind.deliver(tensorboard, end, folder, commits=commits, lives=lives, read=content) == expected
            [run] = (folder / "tb").iterdir()
            # A kill may leave a file that was on its way into place.
            assert len([each for each in run.iterdir() if each.name != ".run" and each.suffix != ".new"]) == 1
            assert not restarts(run)


@pytest.mark.parametrize("call", range(14))
def test_a_program_killed_while_it_puts_the_file_in_order_leaves_one_file_with_every_row(call, tmp_path):
    logger = tensorboard(tmp_path)
    for event in LATE[:-4]:
        rewind.call(logger, event, tmp_path)
    with rewind.killed_at(call, tmp_path):
        logger.close()  # puts a file with late rows in order, however lately that was done
    shown = in_order(slow(tmp_path / "tb" / "a"))
    assert shown == {"train/p": points_of([0, 1, 2, 3, 4, 6][: len(shown["train/p"])])}
    assert len(shown["train/p"]) >= 5
    again = tensorboard(tmp_path)
    for event in (rewind.start(4), row(4), row(6), row(5)):
        rewind.call(again, event, tmp_path)
    again.close()
    expected = {"train/p": points_of(range(7))}
    assert in_order(slow(tmp_path / "tb" / "a")) == expected
    assert len([each for each in (tmp_path / "tb" / "a").iterdir() if each.name not in {".run", ".at"}]) == 1


def test_three_kills_of_a_courier_that_is_given_late_rows_lose_no_point_and_double_none(tmp_path):
    journal = tmp_path / "journal"
    steps = sorted(range(2000), key=lambda step: step + 25.5 if step % 7 == 0 else step)
    with EventBus([], journal=journal) as bus:
        state = LoopState(step=0, num_steps=2000, output_dir=tmp_path / "run")
        bus.publish(TrainStart(state))
        for step in steps:
            bus.publish(StepEnd(state, step, TrainingBatch(), {"reward": float(step), "n": step}))
        bus.publish(TrainEnd(state, LoopArtifacts()))
    folder = tmp_path / "run" / "tensorboard"

    def size():
        """While a file is replaced, its number counts as well as its size: either is work done."""
        found = [each for each in folder.iterdir() if "tfevents" in each.name] if folder.exists() else []
        sizes = []
        for each in found:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(each.stat().st_size)
        return max(sizes, default=0)

    adapter = "TensorBoardLoggerCallback(flush_secs=0)"
    loggers.deliver_with_kills(journal, "tensorboardX.proto.event_pb2", adapter, size, 20_000)
    shown = slow(folder)
    assert shown["train/reward"] == points_of(steps)
    assert len(shown["train/n"]) == 2000
    assert len([each for each in folder.iterdir() if each.name not in {".run", ".at"}]) == 1
    assert not restarts(folder)


def late_run(folder, steps=(0, 1, 3)):
    """A logger that has logged a run, and the run's state and folder."""
    logger = TensorBoardLoggerCallback(folder / "tb", flush_secs=0)
    state = LoopState(step=0, num_steps=9, output_dir=folder / "run")
    for step in steps:
        logger.on_step_end(state, step, TrainingBatch(), {"p": float(step)})
    return logger, state, folder / "tb" / "run"


def test_a_file_that_cannot_be_put_in_order_now_keeps_every_row_and_is_put_in_order_later(tmp_path, caplog):
    class Full(OsDisk):
        is_full = True

        def open_new(self, path: str, mode: int = 0o600) -> int | None:
            if self.is_full:
                raise OSError(errno.ENOSPC, "no room for a new file", path)
            return super().open_new(path, mode)

    disk = Full()
    with use_disk(disk):
        logger, state, folder = late_run(tmp_path)
        logger.on_step_end(state, 2, TrainingBatch(), {"p": 2.0})
        logger.close()
        assert "rows.out_of_order" in caplog.text
        assert in_order(slow(folder)) == {"train/p": points_of(range(4))}
        disk.is_full = False
        logger.close()
    assert slow(folder) == {"train/p": points_of(range(4))}


def test_a_damaged_record_does_not_keep_the_others_from_being_put_in_order(tmp_path):
    logger, state, folder = late_run(tmp_path, ())
    for step in (0, 1, 3):
        logger.on_eval(state, step, "maze", {"p": float(step)})
    logger.close()
    content = bytearray((folder / FILE).read_bytes())
    content[content.rindex(b"eval/maze/p") - 1] = 0xFF  # the length of the tag
    (folder / FILE).write_bytes(content)
    again, state, _ = late_run(tmp_path, ())
    for step in (5, 4):
        again.on_eval(state, step, "maze", {"p": float(step)})
    again.mark()
    again.close()
    [path] = [each for each in folder.iterdir() if "tfevents" in each.name]
    assert path.name != FILE
    assert path.read_bytes().count(b"eval/maze/p") == 5


def test_what_0_1_0_wrote_twice_is_read_and_put_in_order(tmp_path):
    logger, state, folder = late_run(tmp_path, ())
    written = Events(lambda: 7.0)
    folder.mkdir(parents=True)
    rows = [written.scalars(step, {"train/p": float(step)}) for step in (0, 1, 4, 2, 3)]
    again = [written.scalars(step, {"train/p": float(step)}) for step in range(5)]
    frames = [written.frame(each, 0) for each in (*rows, written.restart(0), *again)]
    (folder / FILE).write_bytes(b"".join([written.header(), *frames]))
    for step in (6, 5):
        logger.on_step_end(state, step, TrainingBatch(), {"p": float(step)})
    logger.close()
    assert slow(folder) == {"train/p": points_of(range(7))}
    assert not restarts(folder)


def test_an_earlier_version_that_0_1_0_left_beside_a_file_is_found(tmp_path):
    logger, state, folder = late_run(tmp_path)
    mark = logger.mark()
    logger.on_step_end(state, 2, TrainingBatch(), {"p": 2.0})
    logger.close()
    for each in [path for path in folder.iterdir() if ".tf-events." in path.name]:
        each.rename(each.with_name(each.name.replace("tf-events", "tfevents")))
    again = TensorBoardLoggerCallback(tmp_path / "tb")
    again.rewind(mark)
    again.on_step_end(state, 2, TrainingBatch(), {"p": 2.0})
    again.close()
    assert slow(folder) == {"train/p": points_of(range(4))}


def test_only_a_resume_is_a_restart_and_what_it_cut_is_gone_once_the_file_is_in_order(tmp_path):
    logger, state, folder = late_run(tmp_path, range(6))
    logger.close()
    again, state, _ = late_run(tmp_path, ())
    state.step = 4
    again.on_train_start(state)
    again.on_step_end(state, 4, TrainingBatch(), {"p": 40.0})
    again.close()
    assert {each.step for each in restarts(folder)} == {4}  # written twice: the slower loader ignores the first
    assert slow(folder) == {"train/p": [*points_of(range(4)), (4, 40.0)]}
    again.on_step_end(state, 6, TrainingBatch(), {"p": 6.0})
    again.on_step_end(state, 5, TrainingBatch(), {"p": 5.0})
    again.close()
    assert slow(folder) == {"train/p": [*points_of(range(4)), (4, 40.0), (5, 5.0), (6, 6.0)]}


def test_a_large_file_is_put_in_order_for_a_small_share_of_the_time(tmp_path):
    logger, state, folder = late_run(tmp_path, ())
    for step in range(3000):
        logger.on_step_end(state, step if step % 3 else max(0, step - 7), TrainingBatch(), {"p": 1.0})
    [path] = [each for each in folder.iterdir() if "tfevents" in each.name]
    assert int(path.name.split(".")[3]) < 3000 / 20
    logger.close()
    assert [step for step, _ in slow(folder)["train/p"]] == sorted(step for step, _ in slow(folder)["train/p"])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(rewind.EVENTS, min_size=1, max_size=25), st.frozensets(st.integers(1, 25)), rewind.LIVES, st.booleans())
def test_whatever_happens_every_point_is_there_once(events, commits, lives, over_all):
    in_memory = functools.partial(tempfile.TemporaryDirectory, dir=rewind.MEMORY)
    terms = {"commits": commits, "lives": lives, "over_all": over_all}
    with in_memory() as calm, in_memory() as rough:
        expected = rewind.deliver(tensorboard, events, Path(calm), read=content)
        assert rewind.deliver(tensorboard, events, Path(rough), **terms, read=content) == expected
