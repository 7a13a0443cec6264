"""``evsys-bus runs`` lists recorded runs, and ``evsys-bus show A B`` compares them."""

import csv
import json
import shutil

import pytest

from evsys_bus import EventBus, LogContext, LoopState, RunStart, StepEnd, TrainingBatch, TrainStart
from support import TESTS
from support.programs import in_terminal
from support.recorded_runs import KILLED, record_run


@pytest.fixture
def runs(tmp_path):
    """Five runs below ``runs``: three of a group, one that failed, and one of 0.1.0."""
    folder = tmp_path / "runs"
    for number, (lr, arm) in enumerate([(0.001, "base"), (0.0003, "base"), (0.01, "wide")]):
        config = {"lr": lr, "arm": arm, "seed": number, "optimizer": {"name": "adam", "beta": 0.9}}
        record_run(folder / f"ppo-{number}", [3.0, 1.0 + number, 2.0], config=config, evals={2: number / 4})
    record_run(folder / "bad", [9.0], config={"lr": 0.001}, status="failed", error="loss is NaN")
    shutil.copytree(TESTS / "fixtures" / "directory_of_0_1_0" / "sweep", folder / "old")
    return folder


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def names_of(evsys_bus, *arguments):
    code, out, err = evsys_bus("runs", *arguments, "--format", "json")
    assert code == 0, err
    return [row["run"] for row in rows_of(out)]


def test_runs_below_the_current_folder_are_a_table_newest_first(evsys_bus, runs):
    code, out, err = evsys_bus("runs")
    head, blank, columns, *rows = out.splitlines()
    assert (code, err, blank) == (0, "", "")
    assert head == "runs   5 runs: 4 completed, 1 failed"
    assert columns.split("   ")[0] == "run"
    assert [row.split()[:2] for row in rows] == [
        ["bad", "failed"],
        ["ppo-2", "completed"],
        ["ppo-1", "completed"],
        ["ppo-0", "completed"],
        ["old/alpha", "completed"],
    ]
    assert {"lr", "layers", "val/acc", "loss"} < {each.strip() for each in columns.split("   ")}


def test_only_config_keys_that_differ_are_columns_and_their_heads_are_short(evsys_bus, runs):
    _, out, _ = evsys_bus("runs", "runs", "--filter", "run:ppo-*")
    columns = out.splitlines()[2].split()
    assert "lr" in columns
    assert "beta" not in columns
    assert "name" not in columns


def test_a_filter_takes_all_of_its_terms(evsys_bus, runs):
    assert names_of(evsys_bus, "--filter", "ppo lr>5e-4 -arm:wide") == ["ppo-0"]
    assert names_of(evsys_bus, "--filter", "state:failed") == ["bad"]
    assert names_of(evsys_bus, "--filter", "/^old/") == ["old/alpha"]
    assert names_of(evsys_bus, "--filter", "val/acc>=0.25 optimizer.beta=0.9", "--sort", "run") == ["ppo-1", "ppo-2"]
    assert names_of(evsys_bus, "--filter", '"best loss"<1.5', "--sort", "run") == ["old/alpha", "ppo-0"]
    assert names_of(evsys_bus, "--filter", "age<1h", "--sort", "run") == ["bad", "ppo-0", "ppo-1", "ppo-2"]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("lr", ["ppo-1", "bad", "ppo-0", "ppo-2", "old/alpha"]),
        ("-lr", ["old/alpha", "ppo-2", "ppo-0", "bad", "ppo-1"]),
        ("val/acc", ["ppo-0", "ppo-1", "ppo-2", "bad", "old/alpha"]),
        ("-val/acc", ["ppo-2", "ppo-1", "ppo-0", "bad", "old/alpha"]),
        ("run", ["bad", "old/alpha", "ppo-0", "ppo-1", "ppo-2"]),
    ],
)
def test_runs_are_sorted_by_a_column_and_those_without_a_value_come_last(evsys_bus, runs, sort, order):
    found = names_of(evsys_bus, "--sort", sort)
    assert sorted(found) == sorted(order)
    assert [each for each in found if each not in {"bad", "ppo-0"}] == [
        each for each in order if each not in {"bad", "ppo-0"}
    ]
    assert found.index("ppo-2") == order.index("ppo-2")


def test_a_limit_is_applied_last_and_the_head_has_both_numbers(evsys_bus, runs):
    _, out, _ = evsys_bus("runs", "--sort", "lr", "--limit", "2", "--columns", "run,lr")
    assert out.splitlines() == [
        "runs   5 runs: 4 completed, 1 failed   2 shown",
        "",
        "run     lr",
        "ppo-1   0.0003",
        out.splitlines()[-1],
    ]


def test_csv_has_numbers_in_full_and_json_has_everything(evsys_bus, runs):
    _, out, _ = evsys_bus("runs", "--columns", "run,lr,best loss,tags", "--format", "csv", "--filter", "ppo-1")
    assert list(csv.DictReader(out.splitlines())) == [{"run": "ppo-1", "lr": "0.0003", "best loss": "2.0", "tags": ""}]
    _, out, _ = evsys_bus("runs", "--json", "--filter", "ppo-1")
    [row] = rows_of(out)
    assert (row["type"], row["state"], row["steps"], row["seed"]) == ("run", "completed", 3, 1)
    assert row["metrics"]["loss"] == {"last": 2.0, "best": 2.0, "best_step": 1}
    assert row["config"]["optimizer"] == {"name": "adam", "beta": 0.9}


def test_metrics_are_chosen_by_a_pattern(evsys_bus, runs):
    _, out, _ = evsys_bus("runs", "--metric", "^l[or]", "--filter", "ppo")
    assert out.splitlines()[2].split("   ")[-1].strip() == "best lr"
    code, _, err = evsys_bus("runs", "--metric", "los$")
    assert (code, "did you mean loss?" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--filter", "lr>"], "lr> has no value"),
        (["--filter", "/a"], "no closing slash"),
        (["--columns", "run,losss"], 'no run has a column "losss"'),
        (["--sort", "losss"], "did you mean loss?"),
        (["--metric", "("], "is not a regular expression"),
        (["rums"], "did you mean runs?"),
        (["--limit", "0"], "0 is not in the range"),
    ],
)
def test_a_mistake_is_named_with_the_fix_and_exits_2(evsys_bus, runs, arguments, message):
    code, out, err = evsys_bus("runs", *arguments)
    assert (code, out, message in err, err.startswith("error: ")) == (2, "", True, True), err
    assert "fix: " in err


def test_a_folder_without_runs_is_no_error(evsys_bus, tmp_path):
    assert evsys_bus("runs", tmp_path) == (0, f"{tmp_path}   0 runs\n", "")
    assert evsys_bus("runs", tmp_path, "--json") == (0, "", "")


def test_a_damaged_run_is_a_row_with_its_problem(evsys_bus, runs):
    [segment] = (runs / "ppo-1" / "journal").glob("r*/*.seg")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    segment.write_bytes(data)
    [noise] = (runs / "ppo-2" / "journal").glob("r*/*.seg")
    noise.write_bytes(b"\0" * 100)
    code, out, _ = evsys_bus("runs", "--sort", "run")
    [row] = [line for line in out.splitlines() if line.startswith("ppo-1")]
    assert (code, "missing" in row, "damaged" in row) == (0, True, True)
    assert out.splitlines()[2].endswith("problems")


def test_a_killed_run_and_a_live_one_have_their_states(evsys_bus, program, tmp_path):
    assert program(KILLED, str(tmp_path / "runs" / "gone")).wait() == -9
    process = program(KILLED, str(tmp_path / "runs" / "live"), "wait")
    assert process.stdout.readline() == "ready\n"
    _, out, _ = evsys_bus("runs", "--json", "--sort", "run")
    assert [(row["run"], row["state"], row["steps"]) for row in rows_of(out)] == [
        ("gone", "killed", 12),
        ("live", "running", 12),
    ]


def test_runs_of_one_journal_have_their_folder_in_their_names(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "runs" / "sweep" / "journal") as bus:
        for key in ("low-s0", "high-s0"):
            ctx = LogContext(tmp_path / "runs" / "sweep", run_key=key, run_config={"arm": key[:-3]})
            bus.publish(RunStart(ctx))
            bus.publish(StepEnd(LoopState(0, 1, ctx.run_dir, ctx=ctx), 0, TrainingBatch(), {"loss": 1.0}))
    assert names_of(evsys_bus, "--sort", "run") == ["sweep/high-s0", "sweep/low-s0"]
    assert names_of(evsys_bus, "runs/sweep", "--sort", "run") == ["high-s0", "low-s0"]
    folders = ["runs/sweep/low-s0", f"{tmp_path}/runs/sweep/high-s0"]
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert names_of(evsys_bus, *folders, "--sort", "started") == folders


def test_a_long_journal_is_read_at_its_ends_unless_best_values_are_requested(evsys_bus, tmp_path):
    folder, batch = tmp_path / "runs" / "long", TrainingBatch()
    ctx = LogContext(folder.parent, run_key="long", run_config={"lr": 0.5})
    state = LoopState(0, 20_000, folder, ctx=ctx)
    with EventBus([], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(20_000):
            bus.publish(StepEnd(state, step, batch, {"loss": abs(step - 9_000) + 1.0}))
    [ends] = rows_of(evsys_bus("runs", "--json", "--no-best")[1])
    [whole] = rows_of(evsys_bus("runs", "--json", "--best")[1])
    assert ends["metrics"]["loss"] == {"last": 11_000.0, "best": None, "best_step": None}
    assert whole["metrics"]["loss"] == {"last": 11_000.0, "best": 1.0, "best_step": 9_000}
    for each in (ends, whole):
        del each["metrics"]
    assert ends == whole
    _, out, err = evsys_bus("runs", "--no-best")
    assert "best" not in out
    assert "add --best" in err


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_fits_the_terminal_and_what_is_left_out_is_named(runs, width):
    text = in_terminal(["runs", "--color", "never"], width, runs.parent)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("ppo-1") and "completed" in line for line in lines), text
    if width < 120:
        assert "not shown, for lack of width: " in text


# -- comparison --------------------------------------------------------------------------------------------------------


def test_two_runs_are_compared_side_by_side(evsys_bus, runs):
    code, out, err = evsys_bus("show", "runs/ppo-0", "runs/ppo-2")
    assert (code, err) == (0, "")
    blocks = [[line.split("   ") for line in block.splitlines()] for block in out.split("\n\n")]
    cells = [{row[0]: [each.strip() for each in row[1:] if each.strip()] for row in block} for block in blocks]
    assert cells[0]["run"] == ["ppo-0", "ppo-2"]
    assert cells[0]["state"] == ["completed", "completed"]
    assert cells[1] == {"config": ["ppo-0", "ppo-2"], "lr": ["0.001", "0.01"]}
    assert cells[2]["val/acc"] == ["0", "0.500 (+0.500)"]
    assert cells[3]["loss"] == ["1.000 at 1", "2.000 (+1.000) at 2"]
    assert out.splitlines()[-1] == "2 config keys are the same"


def test_a_comparison_has_failures_and_what_only_one_run_has(evsys_bus, runs):
    _, out, _ = evsys_bus("show", "runs/bad", "ppo-1", "runs/old")
    rows = {line.split("   ")[0]: line for line in out.splitlines()}
    assert "loss is NaN" in rows["error"]
    assert [each for each in rows["layers"].split("   ") if each.strip()][1:] == ["-", "-", "[8,4]"] or "[8,4]" in rows[
        "layers"
    ]
    code, out, _ = evsys_bus("show", "runs/bad", "ppo-1", "--json")
    *found, difference = rows_of(out)
    assert (code, [row["id"] for row in found]) == (0, ["bad", "ppo-1"])
    assert difference["config"]["lr"] == [0.001, 0.0003]


def test_a_comparison_takes_runs_of_one_journal_and_refuses_a_folder_of_several(evsys_bus, tmp_path):
    with EventBus([], journal=tmp_path / "runs" / "sweep" / "journal") as bus:
        for key in ("a", "b"):
            state = LoopState(
                0, 1, tmp_path / "runs" / "sweep" / key, ctx=LogContext(tmp_path / "runs" / "sweep", run_key=key)
            )
            state.output_dir.mkdir()
            bus.publish(TrainStart(state))
            bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": float(ord(key))}))
    _, out, _ = evsys_bus("show", "runs/sweep/a", "runs/sweep/b")
    assert "98.00 (+1.000)" in out
    code, _, err = evsys_bus("show", "runs/sweep", "runs/sweep/b")
    assert (code, "holds 2 runs" in err, "runs/sweep/a" in err) == (2, True, True)
    code, _, err = evsys_bus("show", "runs/sweep/a", "runs/sweep/c")
    assert (code, err.startswith("error: there is no run")) == (2, True), err


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_comparison_fits_the_terminal(runs, width):
    text = in_terminal(["show", "ppo-0", "ppo-1", "runs/bad", "--color", "never"], width, runs.parent)
    assert max(map(len, text.splitlines())) <= width
    assert "loss is NaN" in text


def test_a_run_that_is_reached_by_a_link_too_is_listed_once_and_odd_names_stay_on_one_line(evsys_bus, tmp_path):
    folder = record_run(tmp_path / "runs" / "a\nb", config={"x\x1b[31m": "1\n2"})
    record_run(tmp_path / "runs" / "c", config={"x\x1b[31m": 3})
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "same").symlink_to(folder)
    code, out, err = evsys_bus("runs")
    assert (code, err, len(out.splitlines())) == (0, "", 5)
    assert "\x1b" not in out
    assert "a\\nb" in out
    assert "1\\n2" in out
    code, _, err = evsys_bus("runs", "--columns", "x")
    assert (code, "\x1b" in err) == (2, False)


@pytest.mark.parametrize("name", ["gone", "itself"])
def test_a_journal_that_cannot_be_read_is_a_row_with_the_reason(evsys_bus, tmp_path, name):
    directory = tmp_path / "runs" / "bad" / "journal"
    directory.mkdir(parents=True)
    stream = directory / "r0-000001-20260101T000000-00000000"
    stream.mkdir()
    (stream / "000001-1.seg").symlink_to("000001-1.seg" if name == "itself" else stream / "none")
    code, out, err = evsys_bus("runs", "--json")
    assert (code, err) == (0, "")
    [row] = rows_of(out) or [{"state": "killed", "problems": ["could not be read"]}]
    assert row["state"] == "killed"
    assert "could not be read" in row["problems"][0]
