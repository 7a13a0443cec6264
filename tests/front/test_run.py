"""`evsys_bus.run`: a run as one object, whose rows may be logged in parts."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest

import evsys_bus
from evsys_bus import Callback, EventBus, Metrics, RunEnd, RunStart, StepEnd, TrainEnd, TrainingLoop, TrainStart
from evsys_bus.errors import BusNotOpenError, HookSignatureError, TrainingError
from evsys_bus.events import Event
from tests.support.journals import read_envelopes
from tests.support.programs import EVSYS_BUS
from tests.support.training_parts import FixedEvaluator, IndexBatches, NumberBackend

QUIET = {"environment": False, "output": False}


class Rows(Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.ends: list[tuple[str, bool]] = []

    def on_step_end(self, state, step_idx, batch, metrics):
        self.rows.append((step_idx, dict(metrics)))

    def on_run_end(self, ctx, run_result, arm):
        self.ends.append((run_result.status, run_result.implied))


def test_a_row_that_is_logged_in_parts_reaches_callbacks_once(tmp_path):
    rows = Rows()
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        for step in run.steps(60):
            for part in range(5):
                run.log({f"m{part}": step + part / 10}, step=step)
            assert rows.rows == [(each, {f"m{part}": each + part / 10 for part in range(5)}) for each in range(step)]
    assert len(rows.rows) == 60
    assert rows.ends == [("completed", False)]


def test_a_part_is_on_record_when_log_returns(tmp_path):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        run.log({"loss": 0.5}, step=3)
        found = [each.event for each in read_envelopes(tmp_path / "a" / "journal")]
        assert [type(each) for each in found] == [RunStart, TrainStart, Metrics]
        assert found[-1].metrics == {"loss": 0.5}
    found = [type(each.event) for each in read_envelopes(tmp_path / "a" / "journal")]
    assert found == [RunStart, TrainStart, Metrics, StepEnd, TrainEnd, RunEnd]


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([({"a": 1.0}, 0, True), ({"b": 2.0}, 1, True)], [(0, {"a": 1.0}), (1, {"b": 2.0})]),
        ([({"a": 1.0}, None, False), ({"a": 2.0}, None, False)], [(0, {"a": 1.0}), (1, {"a": 2.0})]),
        ([({"a": 1.0}, 4, False), ({"a": 2.0}, 4, False)], [(4, {"a": 2.0})]),
        ([({"a": 1.0}, 4, False), ({"b": 2.0}, 5, False), ({"c": 3.0}, 4, False)],
         [(4, {"a": 1.0}), (4, {"c": 3.0}), (5, {"b": 2.0})]),
        ([({"a": 1.0}, 4.0, False), ({"b": 2.0}, 4, True), ({"c": 3.0}, None, False)],
         [(4, {"a": 1.0, "b": 2.0}), (5, {"c": 3.0})]),
    ],
)  # fmt: skip
def test_when_a_row_is_complete(tmp_path, calls, expected):
    rows = Rows()
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        for metrics, step, commit in calls:
            run.log(metrics, step=step, commit=commit)
    assert rows.rows == expected


def test_a_part_joins_the_row_that_other_code_publishes(tmp_path):
    rows = Rows()
    with EventBus([rows]) as bus, bus.run(tmp_path / "a", **QUIET) as run:
        evsys_bus.current_run().log({"inner": 1.0}, step=7)
        bus.publish(StepEnd(run.state, 7, metrics={"loss": 2.0}))
        assert rows.rows == [(7, {"loss": 2.0, "inner": 1.0})]
    assert len(rows.rows) == 1


def test_many_threads_lose_no_part(tmp_path):
    rows = Rows()
    with evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:

        def log(name: str) -> None:
            for step in range(200):
                run.log({name: float(step)}, step=step)

        threads = [threading.Thread(target=log, args=(f"t{number}",)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    merged: dict[int, dict] = {}
    for step, metrics in rows.rows:
        merged.setdefault(step, {}).update(metrics)
    assert merged == {step: {f"t{number}": float(step) for number in range(4)} for step in range(200)}


PROGRAM = """
import os, signal, sys
import evsys_bus
from evsys_bus import build_callbacks
folder, die_at = sys.argv[1], int(sys.argv[2])
specs = [
    {"kind": "csv_metrics", "params": {"out_path": folder + "/rows.csv"}, "placement": "follow"},
    {"kind": "local_logger", "placement": "follow"},
]
calls = 0
with evsys_bus.run(folder + "/run", callbacks=build_callbacks(specs), environment=False, output=False) as run:
    print("first", run.state.step, run.resumed and run.resumed.name)
    for step in run.steps(60):
        for part in range(5):
            run.log({f"m{part}": step + part / 10}, step=step)
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        if step % 10 == 9:
            open(f"{folder}/state-{step}", "w").close()
            run.checkpoint(f"step-{step}", state_path=f"{folder}/state-{step}", step=step)
"""


def program(folder: Path, die_at: int, placement: str = "follow") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.replace('"follow"', repr(placement)), str(folder), str(die_at)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def csv_rows(folder: Path) -> list[str]:
    path = folder / "rows.csv"
    return path.read_text().splitlines()[1:] if path.exists() else []


def sync(folder: Path) -> None:
    subprocess.run([EVSYS_BUS, "sync", str(folder / "run")], check=True, capture_output=True)


def test_a_program_that_dies_between_two_parts_leaves_its_row(tmp_path):
    assert program(tmp_path, 127).returncode == -signal.SIGKILL
    sync(tmp_path)
    rows = csv_rows(tmp_path)
    assert len(rows) == 26
    assert rows[-1] == "25,25.0,25.1,,,"
    sync(tmp_path)
    assert csv_rows(tmp_path) == rows


@pytest.mark.parametrize("placement", ["follow", "inline"])
def test_a_killed_program_goes_on_as_one_run_with_each_row_once(tmp_path, placement):
    assert program(tmp_path, 127, placement).returncode == -signal.SIGKILL
    resumed = program(tmp_path, 1_000, placement)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.startswith("first 20 step-19")
    assert csv_rows(tmp_path) == [
        ",".join([str(step), *(str(step + part / 10) for part in range(5))]) for step in range(60)
    ]


def test_a_complete_run_is_left_alone(tmp_path, capsys):
    for expected in ("ppo", "ppo-2", "ppo-3"):
        with evsys_bus.run(tmp_path / "ppo", **QUIET) as run:
            assert run.path == tmp_path / expected
            run.log({"a": 1.0})


def test_resume_must_and_never(tmp_path):
    with pytest.raises(TrainingError, match="no run to resume"):
        evsys_bus.run(tmp_path / "a", resume="must")
    with pytest.raises(ZeroDivisionError), evsys_bus.run(tmp_path / "a", **QUIET):
        raise ZeroDivisionError
    with pytest.raises(TrainingError, match="holds a run already"):
        evsys_bus.run(tmp_path / "a", resume="never")
    with evsys_bus.run(tmp_path / "a", resume="must", **QUIET) as run:
        assert run.path == tmp_path / "a"


def test_a_checkpoint_whose_files_are_gone_is_not_resumed(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).touch()
    with pytest.raises(ZeroDivisionError), evsys_bus.run(tmp_path / "a", **QUIET) as run:
        run.checkpoint("one", state_path=tmp_path / "one", step=4)
        run.checkpoint("two", state_path=tmp_path / "two", step=9)
        raise ZeroDivisionError
    (tmp_path / "two").unlink()
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        assert run.resumed is not None
        assert run.resumed.name == "one"
        assert list(run.steps(7)) == [5, 6]


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "completed"), (ValueError("no"), "failed"), (KeyboardInterrupt(), "cancelled"),
     (SystemExit(143), "cancelled"), (SystemExit(0), "completed")],
)  # fmt: skip
def test_the_end_of_a_run_has_the_status_of_its_block(tmp_path, error, status):
    rows = Rows()
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, evsys_bus.run(tmp_path / "a", callbacks=[rows], **QUIET) as run:
        run.log({"a": 1.0}, step=1)
        if error is not None:
            raise error
    assert rows.ends == [(status, False)]
    assert rows.rows == [(1, {"a": 1.0})]
    assert (tmp_path / "a" / "error.txt").exists() == (status == "failed")


def test_a_bus_ends_the_runs_that_are_left_open(tmp_path):
    rows = Rows()
    with EventBus([rows]) as bus:
        bus.run(tmp_path / "a", **QUIET).start().log({"a": 1.0}, step=1)
    assert rows.rows == [(1, {"a": 1.0})]
    assert rows.ends == [("completed", True)]
    with pytest.raises(ZeroDivisionError), EventBus([rows]) as bus:
        bus.run(tmp_path / "b", **QUIET).start()
        raise ZeroDivisionError
    assert rows.ends[1:] == [("failed", True)]


def test_sigterm_ends_a_run_as_cancelled(tmp_path):
    code = (
        "import evsys_bus, os, signal, time\n"
        f"with evsys_bus.run({str(tmp_path / 'a')!r}, environment=False, output=False) as run:\n"
        "    run.log({'a': 1.0}, step=1)\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(30)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -signal.SIGTERM
    end = read_envelopes(tmp_path / "a" / "journal")[-1].event
    assert isinstance(end, RunEnd)
    assert end.run_result.status == "cancelled"


@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        ("", "completed", None),
        ("sys.exit()", "completed", None),
        ("sys.exit(0)", "completed", None),
        ("sys.exit(3)", "failed", "exit code 3"),
        ("sys.exit('no data')", "failed", "exit code 1"),
        ("sys.exit(130)", "cancelled", None),
        ("raise ValueError('nan')", "failed", "ValueError: nan"),
        ("raise KeyboardInterrupt", "cancelled", None),
        ("os.kill(os.getpid(), signal.SIGTERM)", "cancelled", None),
    ],
)
def test_a_program_that_never_closes_its_run_ends_it_as_it_ends_itself(tmp_path, end, status, text):
    code = (
        "import evsys_bus, os, signal, sys\n"
        f"run = evsys_bus.run({str(tmp_path / 'a')!r}, environment=False, output=False).start()\n"
        f"run.log({{'a': 1.0}}, step=1)\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False, capture_output=True)
    ends = [each.event.run_result for each in read_envelopes(tmp_path / "a" / "journal") if type(each.event) is RunEnd]
    assert [(each.status, each.implied) for each in ends] == [(status, True)], done.stderr
    error = tmp_path / "a" / "error.txt"
    assert error.exists() == (text is not None)
    assert text is None or text in error.read_text()


def test_an_exit_that_a_program_catches_before_it_opens_its_run_does_not_count(tmp_path):
    code = (
        "import evsys_bus, sys\n"
        f"evsys_bus.run({str(tmp_path / 'a')!r}, environment=False, output=False).start().close()\n"
        "try:\n    sys.exit(2)\nexcept SystemExit:\n    pass\n"
        f"evsys_bus.run({str(tmp_path / 'b')!r}, environment=False, output=False).start()\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
    end = read_envelopes(tmp_path / "b" / "journal")[-1].event
    assert end.run_result.status == "completed"


def test_async_with_works_the_same(tmp_path):
    rows = Rows()

    async def main() -> None:
        async with evsys_bus.run(tmp_path / "a", callbacks=[rows], num_steps=3, **QUIET) as run:
            for step in run.steps():
                evsys_bus.current_run().log({"a": float(step)})
                await asyncio.sleep(0)

    asyncio.run(main())
    assert rows.rows == [(0, {"a": 0.0}), (1, {"a": 1.0}), (2, {"a": 2.0})]
    assert rows.ends == [("completed", False)]


def test_the_current_run(tmp_path):
    with pytest.raises(TrainingError, match="no run is open"):
        evsys_bus.current_run()
    with EventBus() as bus:
        first, second = (bus.run(tmp_path / name, **QUIET) for name in "ab")
        with first:
            found = []
            threading.Thread(target=lambda: found.append(evsys_bus.current_run())).start()
            time.sleep(0.05)
            assert found == [first]
            with second:
                assert evsys_bus.current_run() is second
                with first.activate():
                    assert evsys_bus.current_run() is first
                errors = []

                def ask() -> None:
                    try:
                        evsys_bus.current_run()
                    except TrainingError as error:
                        errors.append(error.fix)

                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()
                assert "run.activate()" in errors[0]
            assert evsys_bus.current_run() is first


def test_a_forked_child_logs_nothing(tmp_path):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        run.log({"a": 1.0}, step=1)
        pid = os.fork()
        if not pid:
            try:
                run.log({"a": 2.0}, step=2)
                evsys_bus.current_run().log({"a": 2.0}, step=2)
                os._exit(0)
            except BaseException:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    assert [
        each.event.step_idx for each in read_envelopes(tmp_path / "a" / "journal") if isinstance(each.event, StepEnd)
    ] == [1]


def test_config_summary_tags_and_notes_are_recorded(tmp_path):
    class Facts(Callback):
        seen: ClassVar[list] = []

        def on_config_update(self, ctx, config):
            self.seen.append(("config", config, dict(ctx.extras)))

        def on_summary(self, ctx, values):
            self.seen.append(("summary", values))

        def on_alert(self, ctx, title, text, level):
            self.seen.append(("alert", title, level))

        def on_epoch_end(self, state, epoch, metrics):
            self.seen.append(("epoch", epoch, metrics))

    with evsys_bus.run(tmp_path / "a", config={"lr": 1e-3}, callbacks=[Facts()], tags=["x"], notes="n", **QUIET) as run:
        assert run.config.lr == 1e-3
        assert run.tags == ("x",)
        assert run.notes == "n"
        run.config.update({"batch": 8})
        run.summary["best"] = 0.9
        run.tags = (*run.tags, "y")
        run.alert("hot", level="error")
        run.epoch_end(0, {"loss": 1.0})
        assert dict(run.config) == {"lr": 1e-3, "batch": 8}
    extras = {"tags": ["x", "y"], "notes": "n"}
    assert Facts.seen == [
        ("config", {"batch": 8}, {"tags": ["x"], "notes": "n"}),
        ("summary", {"best": 0.9}),
        ("config", {}, extras),
        ("alert", "hot", "error"),
        ("epoch", 0, {"loss": 1.0}),
    ]
    start = read_envelopes(tmp_path / "a" / "journal")[0].event
    assert start.ctx.run_config == {"lr": 1e-3}
    assert start.ctx.extras == {"tags": ["x"], "notes": "n"}


def test_the_environment_and_the_output_are_kept(tmp_path):
    seen = []

    class Facts(Callback):
        def on_environment(self, ctx, facts):
            seen.append(facts)

    with evsys_bus.run(tmp_path / "a", callbacks=[Facts()], output=False) as run:
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert run.is_open
    assert seen[0]["python"]


def test_a_pickled_bus_is_a_handle(tmp_path):
    with EventBus() as bus:
        assert pickle.loads(pickle.dumps(bus)) is bus
        data = pickle.dumps(bus)
    handle = pickle.loads(data)
    with pytest.raises(BusNotOpenError, match="none is open"):
        handle.publish(StepEnd(None, 1))
    with EventBus() as other:
        handle.publish(StepEnd(None, 1))
        assert other.health().published == {"step_end": 1}


def test_an_older_callback_with_a_method_of_a_newer_name_goes_on_working(tmp_path):
    class Old(Callback):
        on_alert = "a text of its own"

        def on_summary(self):
            raise AssertionError

        def on_metric(self):
            raise AssertionError

        async def on_content(self, what):
            raise AssertionError

    with evsys_bus.run(tmp_path / "a", callbacks=[Old()], **QUIET) as run:
        run.summary["a"] = 1
        run.alert("x")
        run.log({"a": 1.0}, step=1)
        assert run.bus.health().hooks == () or not any(each.failures for each in run.bus.health().hooks)


def test_a_programs_own_event_wins_over_a_newer_one_of_that_name():
    code = """
from evsys_bus import Callback, EventBus, Event
import evsys_bus
class Alert(Event, frozen=True):
    number: int
class Hears(Callback):
    def on_alert(self, number): print("own", number)
    def on_run_alert(self, ctx, title, text, level): print("ours", title)
with EventBus([Hears()]) as bus:
    bus.publish(Alert(3))
    bus.publish(evsys_bus.Alert(None, "hot"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "own 3\nours hot\n"
    assert done.stderr.count("event.hook_renamed") == 1


def test_a_wrong_hook_of_the_first_version_is_still_refused():
    class Wrong(Callback):
        def on_eval(self, state):
            pass

    with pytest.raises(HookSignatureError):
        EventBus([Wrong()])


def test_a_step_that_is_no_number_is_an_error_at_the_call(tmp_path):
    with evsys_bus.run(tmp_path / "a", **QUIET) as run:
        with pytest.raises(TrainingError, match="no whole number"):
            run.log({"a": 1.0}, step=1.5)
        with pytest.raises(TrainingError, match="no whole number"):
            run.log({"a": 1.0}, step="x")
    with pytest.raises(TrainingError, match="not open"):
        run.log({"a": 1.0})
    assert issubclass(StepEnd, Event)


async def test_code_inside_a_training_loop_logs_to_its_run(tmp_path):
    rows = Rows()

    class Extra(Callback):
        def on_eval(self, state, step_idx, eval_name, metrics):
            evsys_bus.current_run().log({"late": 1.0})

    class Logs(NumberBackend):
        async def forward_backward(self, batch):
            evsys_bus.current_run().log({"inside": 2.0})
            return await super().forward_backward(batch)

    loop = TrainingLoop(
        Logs(tmp_path / "states"),
        IndexBatches(),
        num_steps=3,
        output_dir=tmp_path / "a",
        callbacks=[rows, Extra()],
        evaluators=[FixedEvaluator("val", 1, {"score": 1.0})],
    )
    await loop.run()
    merged: dict[int, dict] = {}
    for step, metrics in rows.rows:
        merged.setdefault(step, {}).update(metrics)
    assert {step: (row["inside"], row["late"]) for step, row in merged.items()} == dict.fromkeys(range(3), (2.0, 1.0))
    assert all("inside" in metrics or metrics == {"late": 1.0} for _, metrics in rows.rows)


@pytest.mark.parametrize("placement", ["inline", "follow"])
def test_the_row_that_a_kill_left_open_reaches_each_callback_of_the_next_process_once(tmp_path, placement):
    source = f"""
import os, signal, sys, evsys_bus
csv = {{"out_path": {str(tmp_path / "rows.csv")!r}}}
specs = [{{"kind": "csv_metrics", "params": csv, "placement": {placement!r}}}]
kill = sys.argv[1] == "kill"
first = None if kill else 5
with evsys_bus.run({str(tmp_path / "a")!r}, callbacks=evsys_bus.build_callbacks(specs), first_step=first,
                   environment=False, output=False) as run:
    for step in range(0 if kill else 5, 8):
        run.log({{"a": float(step)}}, step=step)
        run.log({{"b": float(step)}}, step=step)
        if kill and step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", source, "kill"], timeout=60, check=False).returncode == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", source, "go on"], timeout=60, check=True)
    assert csv_rows(tmp_path) == [f"{step},{float(step)},{float(step)}" for step in range(8)]
