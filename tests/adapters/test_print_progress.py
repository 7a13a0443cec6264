import errno
import io
import math
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from evsys_adapters.print_progress import PrintProgressCallback, PrintProgressConfig
from evsys_bus import EventBus, StepEnd
from evsys_bus.adapter import EventInfo
from evsys_bus.callback import dispatch
from evsys_bus.context import LogContext, LoopArtifacts, LoopState, TrainingBatch
from evsys_bus.errors import WrongParamError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self):
        return self.now


def state(tmp_path, name="run", num_steps=10, step=0):
    return LoopState(
        step=step,
        num_steps=num_steps,
        output_dir=tmp_path / name,
        ctx=LogContext(output_dir=tmp_path, run_key=name),
    )


def steps(progress, run, indices, seconds=None, clock=None, **metrics):
    for index in indices:
        if clock is not None:
            clock.now += seconds
        progress.on_step_end(run, index, TrainingBatch(), dict(metrics))


def test_a_line_has_the_step_the_metrics_the_rate_and_what_is_left(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(clock=clock)
    run = state(tmp_path)
    progress.on_train_start(run)
    steps(progress, run, [0, 1], 0.5, clock, loss=0.43125, accuracy=0.87)
    assert capsys.readouterr().out.splitlines() == [
        "step 1/10  loss 0.4313  accuracy 0.87  2 steps/s  eta 0:00:04",
        "step 2/10  loss 0.4313  accuracy 0.87  2 steps/s  eta 0:00:04",
    ]


def test_slow_steps_are_told_in_seconds_per_step(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(clock=clock)
    run = state(tmp_path)
    progress.on_train_start(run)
    steps(progress, run, [0], 90, clock)
    assert capsys.readouterr().out == "step 1/10  90 s/step  eta 0:13:30\n"


def test_every_is_honoured_and_the_first_and_the_last_step_are_always_printed(tmp_path, capsys):
    progress = PrintProgressCallback(every=4, clock=Clock())
    run = state(tmp_path)
    progress.on_train_start(run)
    steps(progress, run, range(10))
    assert capsys.readouterr().out == "step 1/10\nstep 4/10\nstep 8/10\nstep 10/10\n"


def test_the_last_step_of_a_run_that_stopped_early_is_printed_too(tmp_path, capsys):
    progress = PrintProgressCallback(every=4, clock=Clock())
    run = state(tmp_path)
    progress.on_train_start(run)
    steps(progress, run, range(6), loss=1.0)
    progress.on_train_end(run, LoopArtifacts())
    assert capsys.readouterr().out.splitlines()[-1] == "step 6/10  loss 1"


def test_a_resumed_run_starts_with_a_line_and_its_rate_counts_only_its_own_steps(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(every=5, clock=clock)
    run = state(tmp_path, step=6)
    progress.on_train_start(run)
    steps(progress, run, [6], 1, clock)
    assert capsys.readouterr().out == "step 7/10  1 steps/s  eta 0:00:03\n"


def test_keys_choose_and_order_and_a_missing_one_is_left_out(tmp_path, capsys):
    progress = PrintProgressCallback(keys=["b", "missing", "a"], clock=Clock())
    steps(progress, state(tmp_path), [0], a=1, b=2, c=3)
    assert capsys.readouterr().out == "step 1/10  b 2  a 1\n"


def test_late_and_repeated_steps_print_and_do_not_set_the_pace_back(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(clock=clock)
    run = state(tmp_path)
    progress.on_train_start(run)
    steps(progress, run, [0, 1, 2, 3], 1, clock)
    steps(progress, run, [1, 1], 0, clock)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "step 2/10  1 steps/s  eta 0:00:06"
    assert len(lines) == 6


def test_two_runs_at_once_are_named_and_keep_their_own_pace(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(clock=clock)
    a, b = state(tmp_path, "a"), state(tmp_path, "b")
    progress.on_train_start(a)
    clock.now += 10
    progress.on_train_start(b)
    steps(progress, a, [0], 0, clock)
    steps(progress, b, [0, 1], 1, clock)
    progress.on_train_end(a, LoopArtifacts())
    steps(progress, b, [2], 1, clock)
    assert capsys.readouterr().out.splitlines() == [
        "a  step 1/10  10 s/step  eta 0:01:30",
        "b  step 1/10  1 steps/s  eta 0:00:09",
        "b  step 2/10  1 steps/s  eta 0:00:08",
        "b  step 3/10  1 steps/s  eta 0:00:07",
    ]


@pytest.mark.parametrize("fault", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_stdout_that_is_gone_is_said_once_and_kills_nothing(tmp_path, caplog, fault):
    class Gone(io.StringIO):
        def write(self, text):
            raise fault

    progress = PrintProgressCallback(stream=Gone())
    steps(progress, state(tmp_path), range(3))
    assert [record.message.split()[0] for record in caplog.records] == ["print_progress.closed"]


class Hostile:
    def __float__(self):
        raise RuntimeError("no")

    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.43125, "0.4313"),
        (1e-5, "1e-05"),
        (5e-324, "4.941e-324"),
        (0.0, "0"),
        (-0.00001234567, "-1.235e-05"),
        (12345.678, "12346"),
        (1.5e12, "1.5e+12"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (12, "12"),
        (True, "True"),
        (np.float32(0.5), "0.5"),
        (np.array(0.25), "0.25"),
        (np.arange(3), "[0 1 2]"),
        (None, "None"),
        ("two\nlines", "two lines"),
        ("x" * 100, "x" * 39 + "…"),
        (Hostile(), "<Hostile>"),
    ],
)
def test_values_are_compact_and_what_is_not_zero_never_looks_like_zero(tmp_path, capsys, value, text):
    steps(PrintProgressCallback(), state(tmp_path), [0], value=value)
    assert capsys.readouterr().out == f"step 1/10  value {text}\n"


@pytest.mark.parametrize("params", [{"every": 0}, {"evry": 2}, {"keys": "loss"}, {"every": "2"}])
def test_the_config_refuses_what_the_callback_could_not_use(params):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(params, PrintProgressConfig)


def test_in_an_experiment_every_line_names_its_run(tmp_path, capsys):
    progress = PrintProgressCallback(clock=lambda: 0.0)
    ctx = LogContext(output_dir=tmp_path)
    progress.on_experiment_start(ctx)
    state = LoopState(step=0, num_steps=1, output_dir=tmp_path / "a-s0", ctx=ctx.for_run("a-s0"))
    progress.on_step_end(state, 0, TrainingBatch(), {"loss": 1.0})
    assert capsys.readouterr().out == "a-s0  step 1/1  loss 1\n"


@pytest.mark.parametrize("unknown", [None, 0, -1, sys.maxsize, math.inf, math.nan, "many"], ids=str)
def test_where_nobody_knows_how_many_steps_there_are_a_line_has_neither_total_nor_eta(tmp_path, capsys, unknown):
    clock = Clock()
    progress = PrintProgressCallback(every=2, clock=clock)
    run = state(tmp_path, num_steps=unknown)
    progress.on_train_start(run)
    steps(progress, run, range(5), 0.5, clock, loss=1.0)
    progress.on_train_end(run, LoopArtifacts())
    assert capsys.readouterr().out.splitlines() == [f"step {step}  loss 1  2 steps/s" for step in (1, 2, 4, 5)]


def test_a_horizon_beyond_all_time_has_no_eta(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(clock=clock)
    run = state(tmp_path, num_steps=1 << 52)
    progress.on_train_start(run)
    steps(progress, run, [0], 1e6, clock)
    assert capsys.readouterr().out == f"step 1/{1 << 52}  1000000 s/step\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "step 2/10  f1_\\xfc 2  \\u96e8 3"),
        ("latin-1", "step 2/10  f1_ü 2  \\u96e8 3"),
        ("utf-8", "step 2/10  f1_ü 2  雨 3"),
        ("cp437", "step 2/10  f1_ü 2  \\u96e8 3"),
    ],
)
def test_what_the_encoding_of_stdout_cannot_take_stands_as_an_escape_and_later_steps_go_on(
    tmp_path, caplog, encoding, shown
):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    progress = PrintProgressCallback(clock=Clock(), stream=out)
    run = state(tmp_path)
    for index, metrics in enumerate([{}, {"f1_ü": 2, "雨": 3}, {}]):
        progress.on_step_end(run, index, TrainingBatch(), metrics)
    assert out.buffer.getvalue().decode(encoding).splitlines() == ["step 1/10", shown, "step 3/10"]
    assert caplog.records == []


def test_a_stream_that_says_no_encoding_gets_ascii(tmp_path):
    class Strict:
        def __init__(self):
            self.text = ""

        def write(self, text):
            text.encode("ascii")
            self.text += text

        def flush(self):
            pass

    out = Strict()
    steps(PrintProgressCallback(clock=Clock(), stream=out), state(tmp_path, "größe"), [0, 1], Δ=1)
    assert out.text == "step 1/10  \\u0394 1\nstep 2/10  \\u0394 1\n"


def test_names_move_no_cursor_and_colour_nothing(tmp_path, capsys):
    progress = PrintProgressCallback(clock=Clock())
    progress.on_experiment_start(LogContext(tmp_path))
    steps(progress, state(tmp_path, "a\x1b[2J"), [0], **{"\x1b]0;title\x07": "\x9b31m", "a\u202eb": "\udc80"})
    line = "a\\x1b[2J  step 1/10  \\x1b]0;title\\x07 \\x9b31m  a\\u202eb \\udc80\n"
    assert capsys.readouterr().out == line


def test_a_disk_that_is_full_for_a_while_costs_the_lines_of_that_while(tmp_path, caplog):
    class Full(io.StringIO):
        full = False

        def write(self, text):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    out = Full()
    progress, run = PrintProgressCallback(clock=Clock(), stream=out), state(tmp_path)
    for index in range(6):
        out.full = index in {2, 3}
        steps(progress, run, [index])
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/10", "2/10", "5/10", "6/10"]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["print.failed"]


def test_the_stdout_of_the_moment_is_printed_on_also_after_an_earlier_one_was_closed(tmp_path, caplog):
    progress, run = PrintProgressCallback(clock=Clock()), state(tmp_path)
    first, second = io.StringIO(), io.StringIO()
    with redirect_stdout(first):
        steps(progress, run, [0])
        assert first.getvalue() == "step 1/10\n"
        first.close()
        steps(progress, run, [1, 2])
    with redirect_stdout(second):
        steps(progress, run, [3])
    with redirect_stdout(None):
        steps(progress, run, [4])
    assert second.getvalue() == "step 4/10\n"
    assert [record.getMessage().split()[0] for record in caplog.records] == ["print_progress.closed"]


def test_rate_and_eta_are_those_of_the_events_however_late_they_are_delivered(tmp_path, capsys):
    progress, run = PrintProgressCallback(), state(tmp_path)

    def deliver(time, hook, *args):
        progress.event = SimpleNamespace(time=time, stream="r0-20260131T120000-5f3a91c2", sequence=1)
        dispatch([progress], hook, run, *args)

    deliver(1_700_000_000.0, "on_train_start")
    deliver(1_700_000_004.0, "on_step_end", 0, TrainingBatch(), {})
    deliver(1_700_000_008.0, "on_step_end", 1, TrainingBatch(), {})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/10  4 s/step  eta 0:00:36",
        "step 2/10  4 s/step  eta 0:00:32",
    ]


def test_a_courier_that_starts_again_during_a_run_prints_the_rate_of_the_steps_it_sees(tmp_path, capsys):
    progress, run = PrintProgressCallback(), state(tmp_path, num_steps=1000, step=900)

    def deliver(time, hook, *args, carried=False):
        progress.event = EventInfo(time, "r0-20260131T120000-5f3a91c2", 1, carried=carried)
        dispatch([progress], hook, run, *args)

    deliver(1_700_000_000.0, "on_train_start", carried=True)
    for offset in range(3):
        deliver(1_700_003_600.0 + 4 * offset, "on_step_end", 900 + offset, TrainingBatch(), {})
    assert capsys.readouterr().out.splitlines() == [
        "step 901/1000",
        "step 902/1000  4 s/step  eta 0:06:32",
        "step 903/1000  4 s/step  eta 0:06:28",
    ]


def test_the_last_line_of_a_run_that_stopped_early_has_the_rate_at_its_step(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(every=5, clock=clock)
    run = state(tmp_path)
    progress.on_train_start(run)
    steps(progress, run, range(3), 1, clock)
    clock.now += 1000  # the final checkpoint
    progress.on_train_end(run, LoopArtifacts())
    assert capsys.readouterr().out.splitlines()[-1] == "step 3/10  1 steps/s  eta 0:00:07"


def test_closing_prints_what_was_not_due_once_and_a_later_step_goes_on(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(every=4, clock=clock)
    a, b = state(tmp_path, "a"), state(tmp_path, "b")
    for run in (a, b):
        progress.on_train_start(run)
        steps(progress, run, range(3), 1, clock)
    progress.close()
    progress.close()
    steps(progress, a, [3], 1, clock)
    progress.on_train_end(a, LoopArtifacts())
    ends = [line.partition("  ")[::2] for line in capsys.readouterr().out.splitlines()]
    assert [(run, rest.split("  ")[0]) for run, rest in ends] == [
        *[("step 1/10", "1 steps/s")],
        *[("b", "step 1/10"), ("a", "step 3/10"), ("b", "step 3/10"), ("a", "step 4/10")],
    ]


@pytest.mark.parametrize("params", [{"every": 0}, {"every": 2.5}, {"keys": "loss"}, {"keys": [1]}])
def test_a_parameter_that_could_not_be_used_is_an_error_at_construction(params):
    with pytest.raises(WrongParamError):
        PrintProgressCallback(**params)


def test_two_runs_whose_states_have_one_folder_keep_their_own_pace(tmp_path, capsys):
    clock = Clock()
    progress = PrintProgressCallback(clock=clock)
    a, b = (LoopState(0, 10, tmp_path, ctx=LogContext(tmp_path, run_key=key)) for key in "ab")
    progress.on_train_start(a)
    clock.now += 7
    progress.on_train_start(b)
    steps(progress, b, [0], 1, clock)
    assert capsys.readouterr().out == "b  step 1/10  1 steps/s  eta 0:00:09\n"


def test_texts_among_the_metrics_are_printed_without_credentials(tmp_path, capsys):
    with EventBus([PrintProgressCallback()]) as bus:
        state = LoopState(0, 1, tmp_path / "run")
        metrics = {"loss": 1.5, "note": "failed: https://me:hunter2@host/x", "api_key": "plain-as-day", "word": "up"}
        bus.publish(StepEnd(state, 0, None, metrics))
    printed = capsys.readouterr().out
    assert "hunter2" not in printed
    assert "plain-as-day" not in printed
    assert "loss 1.5" in printed
    assert "word up" in printed


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("level", "color"), [("info", 36), ("warning", 33), ("error", 31)])
def test_an_alert_is_a_line_with_its_level_in_colour_on_a_terminal_only(tmp_path, monkeypatch, level, color):
    monkeypatch.delenv("NO_COLOR", raising=False)
    ctx, line = LogContext(tmp_path, run_key="a"), f"{level.upper()}  loss is NaN  look at step 6"
    terminal, pipe, plain = Terminal(), io.StringIO(), Terminal()
    for stream in (terminal, pipe):
        PrintProgressCallback(stream=stream).on_alert(ctx, "loss is NaN", "look at\nstep 6", level)
    monkeypatch.setenv("NO_COLOR", "1")
    PrintProgressCallback(stream=plain).on_alert(ctx, "loss is NaN", "look at\nstep 6", level)
    assert terminal.getvalue() == f"\x1b[{color}m{line}\x1b[0m\n"
    assert pipe.getvalue() == plain.getvalue() == f"{line}\n"


def test_an_alert_names_its_run_in_an_experiment_and_has_no_credentials(tmp_path):
    stream, ctx = io.StringIO(), LogContext(tmp_path, run_key="a")
    progress = PrintProgressCallback(stream=stream)
    progress.on_experiment_start(LogContext(tmp_path))
    progress.on_alert(ctx, "upload", "failed: https://me:hunter2@host/x\x1b[2J", "warning")
    assert stream.getvalue().startswith("a  WARNING  upload  failed: https://")
    assert "hunter2" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
