"""`LocalLoggerCallback`: what lies in the folder after runs, repeats, resumes, strange results and full disks."""

import io
import json
import math
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest

from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_bus import EventBus, StepEnd, TrainStart
from evsys_bus.callback import check_hooks, dispatch
from evsys_bus.context import (
    ArmResult,
    DetachedLoopState,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunResult,
    TrainingBatch,
    detached,
)
from evsys_bus.errors import WrongParamError
from support.files import open_files, read_json_lines


def rows(folder, name):
    path = folder / "logs" / name
    return read_json_lines(path) if path.exists() else []


def context(folder, key="run", **more):
    return LogContext(folder, run_key=key, **more)


def state_of(ctx, step=0, num_steps=100):
    return LoopState(step=step, num_steps=num_steps, output_dir=ctx.output_dir / ctx.run_key, ctx=ctx)


def step(logger, ctx, step_idx, metrics):
    dispatch([logger], "on_step_end", state_of(ctx), step_idx, TrainingBatch(), metrics)


def evaluate(logger, ctx, name, step_idx, metrics):
    dispatch([logger], "on_eval", state_of(ctx), step_idx, name, metrics)


def benchmark(logger, ctx, result, predictions=(), step_idx=None):
    dispatch([logger], "on_benchmark_eval", ctx, result, list(predictions), step=step_idx)


def files(folder):
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


@pytest.mark.usefixtures("quiet")
def test_R9_the_layout_of_a_whole_experiment(tmp_path):
    logger = LocalLoggerCallback(print_every=0)
    check_hooks(logger)
    config = SimpleNamespace(metadata={"hypothesis": "Wider is better."})
    arms = []
    for key in ("wide", "narrow"):
        ctx = context(tmp_path, key, config=config, run_config={"seed": 7})
        dispatch([logger], "on_run_start", ctx)
        dispatch([logger], "on_train_start", state_of(ctx))
        step(logger, ctx, 0, {"loss": 0.5})
        benchmark(logger, ctx, EvalResult("v", metrics={"acc": 0.5}, tags=["val"]), [{"task_id": "1", "reward": 1}], 0)
        dispatch([logger], "on_train_end", state_of(ctx), LoopArtifacts())
        benchmark(logger, ctx, EvalResult("t", metrics={"acc": 0.75}), [{"task_id": "2"}, {"task_id": "3"}])
        arms.append(ArmResult(key, run_config={"seed": 7}, eval_metrics={"acc": 0.75}))
        dispatch([logger], "on_run_end", ctx, RunResult(metrics={"loss": 0.5}), arms[-1])
    result = ExperimentResult("widths", arms=arms, best_arm="wide", best_score=0.75, conclusion="It is.")
    dispatch([logger], "on_experiment_end", LogContext(tmp_path, config=config), result)
    names = [
        "conclusion.md",
        "hypothesis.md",
        "test/metrics.jsonl",
        "test/rollouts.jsonl",
        "training/metrics.jsonl",
        "validation/metrics.jsonl",
        "validation/rollouts.jsonl",
    ]
    assert files(tmp_path) == ["experiment.md", *(f"{key}/logs/{name}" for key in ("narrow", "wide") for name in names)]
    wide = tmp_path / "wide"
    assert rows(wide, "training/metrics.jsonl") == [{"step": 0, "loss": 0.5}]
    (validation,) = rows(wide, "validation/metrics.jsonl")
    assert (validation["benchmark"], validation["step"], validation["acc"]) == ("v", 0, 0.5)
    assert rows(wide, "validation/rollouts.jsonl") == [{"benchmark": "v", "step": 0, "task_id": "1", "reward": 1}]
    assert rows(wide, "test/metrics.jsonl") == [{"benchmark": "t", "step": None, "acc": 0.75}]
    assert [row["task_id"] for row in rows(wide, "test/rollouts.jsonl")] == ["2", "3"]
    assert (wide / "logs/hypothesis.md").read_text() == "# Hypothesis\n\nWider is better.\n"
    conclusion = (wide / "logs/conclusion.md").read_text()
    assert conclusion.startswith(
        "# Conclusion\n\nIt is.\n\n- experiment: widths (completed)\n- best arm: wide (0.75)\n"
    )
    assert "| acc | 0.75 |" in conclusion
    page = (tmp_path / "experiment.md").read_text()
    for said in (
        "# widths\n",
        "Wider is better.",
        "It is.",
        "- best arm: wide (0.75)",
        "| **wide** (best) | 1 completed | 7 | 0.75 |",
        "| [wide](wide/) | wide | completed | 0.75 |  |",
    ):
        assert said in page


@pytest.mark.usefixtures("quiet")
def test_R12_an_in_loop_benchmark_fires_twice_and_leaves_one_row_and_a_repeat_replaces_it(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    for attempt in ("first", "second", "x"):
        for n in (3, 7):
            evaluate(logger, ctx, "digits", n, {"acc": n, "attempt": attempt})
            result = EvalResult("digits", metrics={"acc": n, "attempt": attempt}, tags=["val"], eval_seconds=1.5)
            benchmark(logger, ctx, result, [{"task_id": k, "attempt": attempt} for k in range(n)], n)
    run = tmp_path / "run"
    got = rows(run, "validation/metrics.jsonl")
    assert [(row["benchmark"], row["step"], row["attempt"], row["eval_seconds"]) for row in got] == [
        ("digits", 3, "x", 1.5),
        ("digits", 7, "x", 1.5),
    ]
    rollouts = rows(run, "validation/rollouts.jsonl")
    assert {row["attempt"] for row in rollouts} == {"x"}
    assert sorted(row["step"] for row in rollouts) == [3] * 3 + [7] * 7


@pytest.mark.usefixtures("quiet")
def test_R12_a_repeat_replaces_the_row_also_after_a_restart_and_after_training(tmp_path):
    for attempt in (1, 2):
        logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
        benchmark(logger, ctx, EvalResult("a", metrics={"n": attempt}), [{"n": attempt}])
        benchmark(logger, ctx, EvalResult("b", metrics={"n": attempt}), [{"n": attempt}] * (3 - attempt))
        benchmark(logger, ctx, EvalResult("b", metrics={"n": attempt}), [{"n": attempt}], 5)
    run = tmp_path / "run"
    got = rows(run, "test/metrics.jsonl")
    assert sorted((row["benchmark"], row["step"] or 0, row["n"]) for row in got) == [
        ("a", 0, 2),
        ("b", 0, 2),
        ("b", 5, 2),
    ]
    assert len(rows(run, "test/rollouts.jsonl")) == 3


@pytest.mark.usefixtures("quiet")
def test_R12_a_repeat_that_is_shorter_leaves_nothing_of_the_longer_one_and_the_file_is_not_written_again(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    path = tmp_path / "run/logs/validation/metrics.jsonl"
    inodes = set()
    for n in range(5):
        evaluate(logger, ctx, "v", n, {"note": "x" * 500, "acc": 0})
        benchmark(logger, ctx, EvalResult("v", metrics={"acc": 1}, tags=["val"]), step_idx=n)
        inodes.add(path.stat().st_ino)
    assert [(row["step"], row["acc"]) for row in rows(tmp_path / "run", "validation/metrics.jsonl")] == [
        (n, 1) for n in range(5)
    ]
    assert len(inodes) == 1


@pytest.mark.usefixtures("quiet")
def test_a_run_that_starts_again_in_the_same_process_cuts_and_goes_on(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    for mark, first in ((1, 0), (2, 3)):
        dispatch([logger], "on_train_start", state_of(ctx, first))
        for n in (3, 4, 5) if first == 0 else (5,):
            step(logger, ctx, n, {"mark": mark})
            evaluate(logger, ctx, "v", n, {"mark": mark})
    for name in ("training", "validation"):
        assert [(row["step"], row["mark"]) for row in rows(tmp_path / "run", f"{name}/metrics.jsonl")] == [(5, 2)]


@pytest.mark.usefixtures("quiet")
def test_R12_an_eval_of_a_test_benchmark_leaves_no_row_in_validation(tmp_path):
    for _ in range(2):
        logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
        for n in range(3):
            evaluate(logger, ctx, "held out", n, {"acc": n})
            benchmark(logger, ctx, EvalResult("held out", metrics={"acc": n}), [], n)
    assert rows(tmp_path / "run", "validation/metrics.jsonl") == []
    assert [row["acc"] for row in rows(tmp_path / "run", "test/metrics.jsonl")] == [0, 1, 2]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("with_train_start", [True, False])
def test_a_resumed_run_cuts_what_is_run_again_and_keeps_the_evals_after_training(tmp_path, with_train_start):
    ctx = context(tmp_path)

    def train(first, last, mark):
        logger = LocalLoggerCallback(print_every=0)
        if with_train_start:
            dispatch([logger], "on_train_start", state_of(ctx, first))
        for n in range(first, last):
            step(logger, ctx, n, {"loss": mark})
            evaluate(logger, ctx, "plain", n, {"acc": mark})
            benchmark(logger, ctx, EvalResult("v", metrics={"acc": mark}, tags=["val"]), [{"reward": mark}], n)
        return logger

    benchmark(train(0, 10, 1), ctx, EvalResult("t", metrics={"acc": 1}))
    run = tmp_path / "run"
    with (run / "logs/training/metrics.jsonl").open("ab") as file:
        file.write(b'{"step":10,"lo')
    train(6, 8, 2)
    assert [(row["step"], row["loss"]) for row in rows(run, "training/metrics.jsonl")] == [
        *((n, 1) for n in range(6)),
        (6, 2),
        (7, 2),
    ]
    for name in ("plain", "v"):
        got = [row for row in rows(run, "validation/metrics.jsonl") if row["benchmark"] == name]
        assert [(row["step"], row["acc"]) for row in got] == [*((n, 1) for n in range(6)), (6, 2), (7, 2)]
    assert [row["step"] for row in rows(run, "validation/rollouts.jsonl")] == list(range(8))
    assert len(rows(run, "test/metrics.jsonl")) == 1


@pytest.mark.usefixtures("quiet")
def test_evals_that_come_alone_cut_nothing_and_those_before_the_first_step_stay(tmp_path):
    ctx = context(tmp_path)
    first = LocalLoggerCallback(print_every=0)
    for n in range(5):
        step(first, ctx, n, {"loss": n})
    later = LocalLoggerCallback(print_every=0)
    evaluate(later, ctx, "plain", 2, {"acc": 0.5})
    assert len(rows(tmp_path / "run", "training/metrics.jsonl")) == 5
    step(later, ctx, 2, {"loss": -1})
    assert [row["loss"] for row in rows(tmp_path / "run", "training/metrics.jsonl")] == [0, 1, -1]
    assert len(rows(tmp_path / "run", "validation/metrics.jsonl")) == 1


@pytest.mark.usefixtures("quiet")
def test_R13_late_and_repeated_steps_lose_no_training_row(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    dispatch([logger], "on_train_start", state_of(ctx))
    for n in (0, 1, 1, 5, 3, 0):
        step(logger, ctx, n, {"loss": n})
        evaluate(logger, ctx, "plain", 10 - n, {"acc": n})
    assert [row["step"] for row in rows(tmp_path / "run", "training/metrics.jsonl")] == [0, 1, 1, 5, 3, 0]
    assert sorted(row["step"] for row in rows(tmp_path / "run", "validation/metrics.jsonl")) == [5, 7, 9, 10]


@pytest.mark.usefixtures("quiet")
def test_R13_runs_at_the_same_time_do_not_mix(tmp_path):
    logger = LocalLoggerCallback(print_every=0)
    for n in range(4):
        for key in ("a", "b"):
            step(logger, context(tmp_path, key), n, {"of": key})
            benchmark(logger, context(tmp_path, key), EvalResult("v", metrics={"of": key}, tags=["val"]), step_idx=n)
    for key in ("a", "b"):
        for name in ("training", "validation"):
            assert [(row["step"], row["of"]) for row in rows(tmp_path / key, f"{name}/metrics.jsonl")] == [
                (n, key) for n in range(4)
            ]


class _Bare:
    """A result without anything."""


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "result",
    [
        None,
        _Bare(),
        {},
        {"name": "b", "metrics": None, "tags": None},
        {
            "name": "b",
            "metrics": {"acc": math.nan, "bad": object(), "step": 4},
            "tags": ("val",),
            "breakdowns": {1: {2}},
        },
        SimpleNamespace(name="b", metrics=0.5),
        SimpleNamespace(name=3, metrics=SimpleNamespace(acc=1), tags={"val"}),
    ],
)
def test_results_that_lack_fields_are_logged_as_far_as_they_go(tmp_path, result):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path, config=result)
    predictions = [None, {}, {"output": object(), "step": 9}, SimpleNamespace(task_id=1), "text", 3]
    benchmark(logger, ctx, result, predictions, 1)
    dispatch([logger], "on_benchmark_eval", ctx, result, None)
    dispatch([logger], "on_run_end", ctx, result, result)
    dispatch([logger], "on_experiment_end", ctx, result)
    run = tmp_path / "run"
    every = [row for name in ("validation", "test") for row in rows(run, f"{name}/metrics.jsonl")]
    assert len(every) == 2
    assert all(row["benchmark"] for row in every)
    rollouts = [row for name in ("validation", "test") for row in rows(run, f"{name}/rollouts.jsonl")]
    assert [row["step"] for row in rollouts] == [1] * 6
    assert rollouts[2]["prediction.step"] == 9
    assert (run / "logs/conclusion.md").exists()
    assert (tmp_path / "experiment.md").exists()


@pytest.mark.usefixtures("quiet")
def test_one_bad_value_costs_neither_its_row_nor_its_neighbours(tmp_path):
    class Hostile:
        def __float__(self):
            raise ValueError

        __repr__ = __str__ = __float__

    logger, ctx = LocalLoggerCallback(), context(tmp_path)
    metrics = {"loss": 0.5, "nan": math.nan, "bad": Hostile(), "huge": 10**400, 7: 1, "\udc80": "\udc80", "step": 9}
    step(logger, ctx, 0, metrics)
    (row,) = rows(tmp_path / "run", "training/metrics.jsonl")
    assert (row["step"], row["loss"], row["nan"], row["metrics.step"]) == (0, 0.5, None, 9)


def test_run_keys_that_lead_elsewhere_stay_inside_the_output_dir(tmp_path, caplog):
    inside, outside = tmp_path / "in" / "experiment", tmp_path / "outside"
    inside.mkdir(parents=True)
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    logger = LocalLoggerCallback(print_every=0)
    keys = ["../x", "../../x", "/abs", "x" * 300, "a\0b", "..", "", "link", "\udc80", "a/../../../x", "nested/fine"]
    for key in keys:
        step(logger, context(inside, key), 0, {"key": key})
    found = list(tmp_path.rglob("metrics.jsonl"))
    assert len(found) == len(keys)
    assert all(each.is_relative_to(inside) and not each.is_relative_to(inside / "link") for each in found)
    assert (inside / "nested/fine/logs/training/metrics.jsonl") in found
    assert list(outside.iterdir()) == []
    assert {record.message.split()[0] for record in caplog.records} == {"run.folder_renamed"}


@pytest.mark.usefixtures("quiet")
def test_a_detached_state_without_a_context_logs_to_the_folder_of_its_run(tmp_path):
    logger, ctx = LocalLoggerCallback(), context(tmp_path)
    state = detached(DetachedLoopState, {"step": 0, "num_steps": 2, "output_dir": tmp_path / "run"})
    dispatch([logger], "on_train_start", state)
    dispatch([logger], "on_step_end", state, 0, None, {"loss": 1})
    benchmark(logger, ctx, EvalResult("v", metrics={"acc": 1}), step_idx=0)
    dispatch([logger], "on_train_end", state, LoopArtifacts())
    assert files(tmp_path) == ["run/logs/test/metrics.jsonl", "run/logs/training/metrics.jsonl"]


@pytest.mark.usefixtures("quiet")
def test_a_run_that_ended_on_an_earlier_day_gets_its_conclusion_and_its_link_too(tmp_path):
    before = LocalLoggerCallback(print_every=0)
    for key in ("wide-0", "wide-1"):
        step(before, context(tmp_path, key), 0, {"loss": 1})
    after = LocalLoggerCallback(print_every=0)
    artifacts = [LoopArtifacts(str(tmp_path / key)) for key in ("wide-0", "wide-1")]
    arms = [
        ArmResult("wide", {"seed": n}, metrics={"loss": n}, run_result=RunResult(artifacts=each))
        for n, each in enumerate(artifacts)
    ]
    dispatch([after], "on_experiment_end", LogContext(tmp_path), ExperimentResult("e", arms=arms, conclusion="Done."))
    page = (tmp_path / "experiment.md").read_text()
    assert "[wide-0](wide-0/)" in page
    assert "[wide-1](wide-1/)" in page
    assert "| wide | 2 completed | 0, 1 | 0.5 ± 0.71 |" in page
    assert "Done." in (tmp_path / "wide-1/logs/conclusion.md").read_text()


@pytest.mark.usefixtures("quiet")
def test_runs_that_ended_alike_are_linked_to_their_own_folders(tmp_path):
    logger = LocalLoggerCallback(print_every=0)
    arms = [ArmResult("wide", metrics={"loss": 1}) for _ in range(2)]
    for n, arm in enumerate(arms):
        step(logger, context(tmp_path, f"wide-{n}"), 0, {"loss": 1})
        dispatch([logger], "on_run_end", context(tmp_path, f"wide-{n}"), RunResult(), arm)
    dispatch([logger], "on_experiment_end", LogContext(tmp_path), ExperimentResult("e", arms=arms))
    page = (tmp_path / "experiment.md").read_text()
    assert [page.count(f"[wide-{n}](wide-{n}/)") for n in range(2)] == [1, 1]


@pytest.mark.usefixtures("quiet")
def test_names_do_not_break_out_of_the_table(tmp_path):
    name = "x | y\n<script>alert(1)</script> [a](javascript:b) `c`"
    arms = [ArmResult(name, metrics={name: 1.0}, status="failed", error="first line\nsecond | line")]
    dispatch([LocalLoggerCallback()], "on_experiment_end", LogContext(tmp_path), ExperimentResult(name, arms=arms))
    page = (tmp_path / "experiment.md").read_text()
    assert "\\<script\\>" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 6
    assert {line.replace("\\|", "").count("|") for line in tables} <= {5, 6}


def test_print_every_and_keys_choose_what_is_printed(tmp_path, capsys):
    logger, ctx = LocalLoggerCallback(print_every=3, keys=["loss", "absent"]), context(tmp_path)
    for n in range(8):
        dispatch([logger], "on_step_end", state_of(ctx, num_steps=8), n, TrainingBatch(), {"loss": n / 7, "lr": 1})
    assert capsys.readouterr().out.splitlines() == [
        "step 3/8  loss 0.28571",
        "step 6/8  loss 0.71429",
        "step 8/8  loss 1",
    ]
    LocalLoggerCallback(print_every=0).on_step_end(state_of(ctx), 0, TrainingBatch(), {"loss": 1})
    assert capsys.readouterr().out == ""


def test_rows_and_pages_that_cannot_be_written_wait_are_counted_and_follow_in_order(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the run's folder should be")
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path, config={"metadata": {"hypothesis": "h"}})
    for n in range(5):
        step(logger, ctx, n, {"loss": n})
        benchmark(logger, ctx, EvalResult("v", metrics={"n": n}, tags=["val"]), [{"n": n}], n % 2)
    assert logger.waiting > 10
    assert {record.message.split()[0] for record in caplog.records} == {"rows.waiting"}
    (tmp_path / "run").unlink()
    dispatch([logger], "on_train_end", state_of(ctx), LoopArtifacts())
    assert logger.waiting == 0
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run, "training/metrics.jsonl")] == list(range(5))
    assert sorted((row["step"], row["n"]) for row in rows(run, "validation/metrics.jsonl")) == [(0, 4), (1, 3)]
    assert len(rows(run, "validation/rollouts.jsonl")) == 2
    assert (run / "logs/hypothesis.md").exists()


def test_a_full_disk_tears_no_row_and_loses_none_once_there_is_space_again(tmp_path):
    program = textwrap.dedent("""
        import json, resource, sys
        from pathlib import Path
        from evsys_adapters.local_logger import LocalLoggerCallback
        from evsys_bus.context import EvalResult, LogContext, LoopArtifacts, LoopState, TrainingBatch
        root = Path(sys.argv[1])
        ctx = LogContext(root, run_key="run")
        state = LoopState(step=0, num_steps=200, output_dir=root / "run", ctx=ctx)
        logger = LocalLoggerCallback(print_every=0)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for n in range(200):
            logger.on_step_end(state, n, TrainingBatch(), {"loss": n})
            logger.on_eval(state, n, "v", {"acc": 1})
            logger.on_benchmark_eval(ctx, EvalResult("v", metrics={"acc": 2}, tags=["val"]), [{"n": n}], step=n)
        for path in root.rglob("*.jsonl"):
            assert path.stat().st_size <= 1000
            for line in path.read_bytes().splitlines(keepends=True):
                assert line.endswith(b"\\n") and json.loads(line)
        assert logger.waiting > 300
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        logger.on_train_end(state, LoopArtifacts())
        assert logger.waiting == 0
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert [row["step"] for row in rows(run, "training/metrics.jsonl")] == list(range(200))
    assert [(row["step"], row["acc"]) for row in rows(run, "validation/metrics.jsonl")] == [(n, 2) for n in range(200)]
    assert [row["n"] for row in rows(run, "validation/rollouts.jsonl")] == list(range(200))


def test_a_reader_that_left_does_not_stop_the_logging(tmp_path):
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from evsys_adapters.local_logger import LocalLoggerCallback
        from evsys_bus.context import LoopState, TrainingBatch
        state = LoopState(step=0, num_steps=9, output_dir=Path(sys.argv[1]))
        logger = LocalLoggerCallback()
        for n in range(9):
            logger.on_step_end(state, n, TrainingBatch(), {"loss": n})
        sys.stdout = None
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        process.wait()
    assert len(rows(tmp_path, "training/metrics.jsonl")) == 9


def test_the_files_are_open_only_while_the_run_goes_on(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    step(logger, ctx, 0, {"loss": 1})
    assert [each.name for each in open_files(tmp_path)] == ["metrics.jsonl"]
    dispatch([logger], "on_train_end", state_of(ctx), LoopArtifacts())
    assert open_files(tmp_path) == []
    assert str(tmp_path) in str(logger.mark())
    dispatch([logger], "on_experiment_end", LogContext(tmp_path), None)
    logger.mark()  # the last one with these files
    assert str(tmp_path) not in str(logger.mark())


def test_construction_touches_no_disk_and_print_every_is_checked(tmp_path):
    LocalLoggerCallback()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WrongParamError, match="EB103"):
        LocalLoggerCallback(print_every=-1)


@pytest.mark.usefixtures("quiet")
def test_after_it_was_closed_a_later_hook_goes_on_without_doubling_and_the_files_are_shut_meanwhile(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    logger.close()  # nothing to close yet
    dispatch([logger], "on_train_start", state_of(ctx))
    for n in range(3):
        step(logger, ctx, n, {"loss": n})
        evaluate(logger, ctx, "held out", n, {"loss": n})
        evaluate(logger, ctx, "held out", 0, {"loss": -n})  # a repeat, of a row before what was closed
        logger.close()
        logger.close()
        assert open_files(tmp_path) == []
        assert [row["step"] for row in rows(tmp_path / "run", "training/metrics.jsonl")] == list(range(n + 1))
        assert sorted(row["step"] for row in rows(tmp_path / "run", "validation/metrics.jsonl")) == list(range(n + 1))
    dispatch([logger], "on_run_end", ctx, RunResult(), ArmResult("run"))
    logger.close()
    dispatch([logger], "on_experiment_end", LogContext(tmp_path), ExperimentResult("e"))
    assert "this run: run (completed)" in (tmp_path / "run" / "logs" / "conclusion.md").read_text()


@pytest.mark.usefixtures("quiet")
def test_a_mark_that_was_taken_after_it_was_closed_is_good_after_a_crash(tmp_path):
    logger, ctx = LocalLoggerCallback(print_every=0), context(tmp_path)
    dispatch([logger], "on_train_start", state_of(ctx))
    step(logger, ctx, 0, {"loss": 0})
    logger.close()
    mark = logger.mark()
    step(logger, ctx, 1, {"loss": 1})
    logger.close()
    again = LocalLoggerCallback(print_every=0)
    again.rewind(mark)
    for n in (1, 2):
        step(again, ctx, n, {"loss": n})
    assert [row["step"] for row in rows(tmp_path / "run", "training/metrics.jsonl")] == [0, 1, 2]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("unknown", [None, 0, -7, 1 << 63, math.inf, math.nan], ids=str)
def test_where_nobody_knows_how_many_steps_there_are_a_line_has_no_total(tmp_path, capsys, unknown):
    logger, ctx = LocalLoggerCallback(print_every=2), context(tmp_path)
    for n in range(4):
        dispatch([logger], "on_step_end", state_of(ctx, num_steps=unknown), n, TrainingBatch(), {"loss": n})
    assert capsys.readouterr().out == "step 2  loss 1\nstep 4  loss 3\n"


@pytest.mark.usefixtures("quiet")
def test_a_line_is_printed_whatever_stdout_can_take_and_moves_no_cursor(tmp_path):
    logger, ctx = LocalLoggerCallback(), context(tmp_path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(out):
        step(logger, ctx, 0, {"Zähler": 1.0, "\x1b[31mred": "a|b"})
        step(logger, ctx, 1, {"loss": None})
    assert out.buffer.getvalue().decode().splitlines() == [
        "step 1/100  Z\\xe4hler 1  \\x1b[31mred a|b",
        "step 2/100  loss ",
    ]


def test_rows_of_a_run_whose_folder_is_a_link_to_itself_wait_until_it_is_one(tmp_path):
    away = tmp_path / "out" / "run"
    away.parent.mkdir()
    away.symlink_to("run")
    state = LoopState(step=0, num_steps=9, output_dir=away, ctx=LogContext(tmp_path / "out", run_key="run"))
    with EventBus([LocalLoggerCallback(print_every=0)]) as bus:
        bus.publish(TrainStart(state))
        for step in range(9):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
        away.unlink()
    assert not any(each.failures for each in bus.health().hooks)
    rows = (away / "logs" / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(9))
