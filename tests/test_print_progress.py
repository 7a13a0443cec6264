import io

import msgspec
import numpy as np
import pytest

from evsys_adapters.print_progress import PrintProgressCallback, PrintProgressConfig, _fmt_value
from evsys_bus.context import LogContext, LoopArtifacts, LoopState, TrainingBatch


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
def test_values_are_compact_and_what_is_not_zero_never_looks_like_zero(value, text):
    assert _fmt_value(value) == text


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
