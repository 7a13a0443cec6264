"""`CsvMetricsCallback`: the file on disk, read by the csv module after every kind of trouble."""

import csv
import io
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.output_files import csv_table
from evsys_bus.callback import check_hooks, dispatch
from evsys_bus.config import build_callbacks
from evsys_bus.context import (
    ContentItem,
    DetachedLoopState,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    TrainingBatch,
    detached,
)
from evsys_bus.errors import WrongParamError
from evsys_bus.files import use_disk
from evsys_bus.testing import SimulatedDisk
from support.steps import state_of


def read(path, delimiter=","):
    """The rows as dicts; every row must be as wide as the header."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter=delimiter, strict=True)
    assert len(set(header)) == len(header)
    assert {len(row) for row in rows} <= {len(header)}
    return [dict(zip(header, row, strict=True)) for row in rows]


def step(callback, state, step_idx, metrics):
    dispatch([callback], "on_step_end", state, step_idx, TrainingBatch(), metrics)


def end(callback, state):
    dispatch([callback], "on_train_end", state, LoopArtifacts())


@pytest.fixture
def out(tmp_path):
    return tmp_path / "made" / "on demand" / "metrics.csv"


@pytest.mark.usefixtures("quiet")
def test_R9_one_row_per_step_with_the_step_first_and_folders_made(tmp_path, out):
    table = CsvMetricsCallback(out)
    check_hooks(table)
    state = state_of(tmp_path)
    dispatch([table], "on_train_start", state)
    step(table, state, 0, {"loss": 0.5, "tokens": 12})
    step(table, state, 1, {"loss": 1e-7, "tokens": 13})
    assert out.read_text() == "step,loss,tokens\n0,0.5,12\n1,1e-07,13\n"
    end(table, state)
    assert out.read_text() == "step,loss,tokens\n0,0.5,12\n1,1e-07,13\n"


@pytest.mark.usefixtures("quiet")
def test_columns_that_appear_later_keep_every_row_as_wide_as_the_header_at_every_moment(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    for n in range(50):
        step(table, state, n, {f"m{k}": n + k / 10 for k in range(n % 7, n // 5 + 1)} | {"loss": n})
        assert [row["step"] for row in read(out)] == [str(each) for each in range(n + 1)]
    rows = read(out)
    assert rows[49]["m9"] == "49.9"
    assert rows[0]["m9"] == ""
    assert all(row["loss"] == str(n) for n, row in enumerate(rows))


@pytest.mark.usefixtures("quiet")
def test_a_new_column_at_every_step_of_a_large_file_is_copied_a_bounded_number_of_times(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    filler = {f"filler{n}": math.pi for n in range(100)}
    for n in range(300):
        step(table, state, n, filler)
    rewrites, before = 0, out.stat().st_ino
    assert out.stat().st_size > csv_table.CHEAP_BYTES
    for n in range(300, 600):
        step(table, state, n, filler | {f"late{n}": n})
        rewrites += out.stat().st_ino != before
        before = out.stat().st_ino
    assert 1 <= rewrites <= 12, "each one copies the whole file"
    middle = read(out)
    assert all(str(n) in {row.get(f"late{n}", ""), *_texts(row)} for n, row in enumerate(middle) if n >= 300)
    end(table, state)
    rows = read(out)
    assert [row["step"] for row in rows] == [str(n) for n in range(600)]
    assert all(rows[n][f"late{n}"] == str(n) for n in range(300, 600))
    assert "more_metrics" not in rows[0]
    assert list(rows[0])[-300:] == [f"late{n}" for n in range(300, 600)]


def _texts(row):
    return json.loads(row["more_metrics"]).values() if row.get("more_metrics") else ()


@pytest.mark.usefixtures("quiet")
def test_R13_late_and_repeated_steps_lose_nothing(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    dispatch([table], "on_train_start", state)
    for n in (0, 1, 1, 5, 3, 0):
        step(table, state, n, {"loss": n})
    assert [row["step"] for row in read(out)] == ["0", "1", "1", "5", "3", "0"]


@pytest.mark.usefixtures("quiet")
def test_a_resumed_run_continues_the_file_and_rows_that_are_run_again_replace_the_old_ones(tmp_path, out):
    first = CsvMetricsCallback(out)
    for n in range(10):
        step(first, state_of(tmp_path), n, {"loss": n, "old": 1})
    with out.open("ab") as file:
        file.write(b"10,torn")
    again, state = CsvMetricsCallback(out), state_of(tmp_path, step=6)
    dispatch([again], "on_train_start", state)
    for n in range(6, 9):
        step(again, state, n, {"loss": -n, "new": 2})
    rows = read(out)
    assert [row["step"] for row in rows] == [str(n) for n in range(9)]
    assert [row["loss"] for row in rows] == ["0", "1", "2", "3", "4", "5", "-6", "-7", "-8"]
    assert [row["new"] for row in rows] == [""] * 6 + ["2"] * 3


@pytest.mark.usefixtures("quiet")
def test_a_resumed_run_without_train_start_cuts_at_the_first_step_it_sees(tmp_path, out):
    first = CsvMetricsCallback(out)
    for n in range(10):
        step(first, state_of(tmp_path), n, {"loss": n})
    again = CsvMetricsCallback(out)
    for n in (7, 8, 3):
        step(again, state_of(tmp_path), n, {"loss": -n})
    assert [row["loss"] for row in read(out)] == ["0", "1", "2", "3", "4", "5", "6", "-7", "-8", "-3"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("out_path", ["{run_dir}/m.csv", "{root}/tables/m.csv"])
def test_a_run_that_is_resumed_through_a_symlink_continues_its_file(tmp_path, out_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to("disk")
    for root, first in (("disk", 0), ("home", 3), ("disk", 6)):
        state = state_of(tmp_path / root, step=first)
        table = CsvMetricsCallback(out_path.replace("{root}", str(tmp_path / root)))
        dispatch([table], "on_train_start", state)
        for n in range(first, first + 4):
            step(table, state, n, {"loss": first})
    (path,) = (tmp_path / "disk").rglob("*.csv")
    assert [row["loss"] for row in read(path)] == list("0003336666")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("out_path", ["{run_dir}/m.csv", "{root}/tables/m.csv"])
def test_a_run_whose_folder_was_moved_with_its_file_continues_it(tmp_path, out_path):
    for root, first in (("here", 0), ("there", 3)):
        state = state_of(tmp_path / root, step=first)
        table = CsvMetricsCallback(out_path.replace("{root}", str(tmp_path / root)))
        dispatch([table], "on_train_start", state)
        for n in range(first, first + 4):
            step(table, state, n, {"loss": first})
        if root == "here":
            (tmp_path / "here").rename(tmp_path / "there")
    (path,) = tmp_path.rglob("*.csv")
    assert [row["loss"] for row in read(path)] == list("0003333")


@pytest.mark.usefixtures("quiet")
def test_a_run_whose_key_no_path_can_hold_has_its_file(tmp_path, out):
    for first in (0, 1):
        table = CsvMetricsCallback(out)
        step(table, state_of(tmp_path, "a\0b/c"), first, {"loss": first})
    assert [row["loss"] for row in read(out)] == ["0", "1"]


@pytest.mark.usefixtures("quiet")
def test_a_row_that_a_kill_tore_does_not_join_the_next_one(tmp_path, out):
    first = CsvMetricsCallback(out)
    for n in range(3):
        step(first, state_of(tmp_path), n, {"loss": n})
    with out.open("ab") as file:
        file.write(b"3,0.12345")
    again = CsvMetricsCallback(out)
    dispatch([again], "on_train_start", state_of(tmp_path, step=3))
    step(again, state_of(tmp_path), 3, {"loss": -3})
    assert [row["loss"] for row in read(out)] == ["0", "1", "2", "-3"]


@pytest.mark.usefixtures("quiet")
def test_a_fresh_start_replaces_the_rows_and_the_columns_of_the_run_before(tmp_path, out):
    step(CsvMetricsCallback(out), state_of(tmp_path), 0, {"old": 1})
    again = CsvMetricsCallback(out)
    dispatch([again], "on_train_start", state_of(tmp_path))
    assert read(out) == []
    step(again, state_of(tmp_path), 0, {"new": 2})
    assert out.read_text() == "step,new\n0,2\n"


@pytest.mark.usefixtures("quiet")
def test_R13_values_that_are_no_finite_number_keep_their_row_and_no_text_runs_as_a_formula(tmp_path, out):
    class Hostile:
        def __float__(self):
            raise ValueError

        __repr__ = __str__ = __float__

    values = {
        "nan": math.nan,
        "inf": math.inf,
        "minus": -math.inf,
        "negative": -0.5,
        "none": None,
        "flag": True,
        "formula": '=HYPERLINK("http://x","y")',
        "plus": "+1+1",
        "at": "@SUM(A1)",
        "dash": "-cmd|' /C calc'!A0",
        "tab": "\t=1",
        "text number": "-1.5",
        "lines": "a\r\nb,c\0",
        "surrogate": "\udc80",
        "list": [1, "x"],
        "huge": 10**5000,
        "hostile": Hostile(),
        "=1+1": 1,
        "": 2,
        "step": 99,
        "more_metrics": 3,
        7: 4,
        "long" * 1_000: 5,
    }
    step(CsvMetricsCallback(out), state_of(tmp_path), 0, values)
    (row,) = read(out)
    assert out.read_bytes().count(b"\n") == 2
    got = {
        name: row[name] for name in ("step", "nan", "inf", "minus", "negative", "none", "flag", "text number", "list")
    }
    assert got == {
        "step": "0",
        "nan": "nan",
        "inf": "inf",
        "minus": "-inf",
        "negative": "-0.5",
        "none": "",
        "flag": "True",
        "text number": "-1.5",
        "list": '[1,"x"]',
    }
    assert row["formula"] == '\'=HYPERLINK("http://x","y")'
    assert [row[name][0] for name in ("plus", "at", "dash", "tab")] == ["'"] * 4
    assert row["lines"] == "a\\r\\nb,c\\x00"
    assert row["surrogate"] == "\\udc80"
    assert (row["'=1+1"], row["metrics."], row["metrics.step"], row["metrics.more_metrics"], row["7"]) == (
        "1",
        "2",
        "99",
        "3",
        "4",
    )
    assert all(len(name) < 300 for name in row)


@pytest.mark.usefixtures("quiet")
def test_a_hundred_thousand_metrics_in_one_row_do_not_make_every_later_row_pay(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    step(table, state, 0, {"loss": 1})
    step(table, state, 1, {f"m{n}": n for n in range(100_000)})
    step(table, state, 2, {"loss": 3})
    assert len(out.read_bytes().splitlines()[-1]) < 5_000
    end(table, state)
    csv.field_size_limit(10_000_000)
    try:
        rows = read(out)
    finally:
        csv.field_size_limit(131_072)
    assert "99999" in _texts({k: str(v) for k, v in rows[1].items()})
    assert rows[2]["loss"] == "3"


def test_the_column_of_metrics_without_a_column_goes_when_it_is_empty(tmp_path):
    path = tmp_path / "m.csv"
    table = csv_table.CsvTable(path, ";", cheap_bytes=0, max_copies=2)
    for n, names in enumerate(["a", "ab", "c", "d", *"a" * 20, "e"]):
        table.append(n, dict.fromkeys(names, str(n)))
        assert ("more_metrics" in read(path, ";")[0]) == (n >= 2)
    assert list(read(path, ";")[0]) == ["step", *"abcde", "more_metrics"]
    table.close()
    rows = read(path, ";")
    assert list(rows[0]) == ["step", *"abcde"]
    assert [rows[3]["d"], rows[24]["e"]] == ["3", "24"]


_NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f", "{", ',"{'])
_CELLS = st.dictionaries(_NAMES, st.sampled_from(["1", "", "x,y", '{"a":1}', ',"{""q""}"', '"']), max_size=4)
_ACTS = st.one_of(st.tuples(st.integers(0, 9), _CELLS), st.sampled_from(["close", "restart"]), st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(_ACTS, max_size=30),
    st.sampled_from([3, 5, 100]),
    st.sampled_from([0, 200]),
    st.sampled_from([0, 2, 4]),
    st.sampled_from([",", "\t"]),
)
def test_whatever_appears_when_the_table_holds_every_row_and_every_metric(
    acts, max_columns, cheap_bytes, max_copies, delimiter
):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "m.csv"

        def table():
            limits = {"max_columns": max_columns, "cheap_bytes": cheap_bytes, "max_copies": max_copies}
            return csv_table.CsvTable(path, delimiter, **limits)

        ours, model = table(), []
        for act in acts:
            if act == "close":
                ours.close()
            elif act == "restart":
                ours = table()
            elif isinstance(act, int):
                ours.cut(act)
                model = [row for row in model if row["step"] < act]
            else:
                ours.append(*act)
                model.append({"step": act[0]} | {name: text for name, text in act[1].items() if text})
            got = read(path, delimiter) if path.exists() else []
            assert [_flat(row) for row in got] == model
            assert not got or len(got[0]) <= max_columns + 1


def _flat(row):
    """A row with its ``more_metrics`` among the others, and without empty cells."""
    row = row | json.loads(row.pop("more_metrics", "") or "{}")
    return {name: int(text) if name == "step" else text for name, text in row.items() if text}


def test_runs_at_the_same_time_do_not_mix_and_the_second_file_is_named_after_its_run_with_one_warning(
    tmp_path, out, caplog
):
    table = CsvMetricsCallback(out)
    one, two = state_of(tmp_path, "wide"), state_of(tmp_path, "narrow")
    for n in range(5):
        step(table, one, n, {"loss": n})
        step(table, two, n, {"accuracy": -n})
    assert [row["loss"] for row in read(out)] == list("01234")
    assert [row["accuracy"] for row in read(out.with_name("metrics-narrow.csv"))] == ["0", "-1", "-2", "-3", "-4"]
    assert [record.message.split()[0] for record in caplog.records] == ["csv_metrics.second_run"]


def test_a_resumed_experiment_whose_second_run_comes_first_leaves_the_file_of_the_first_run_alone(tmp_path, out):
    table = CsvMetricsCallback(out)
    for n in range(5):
        step(table, state_of(tmp_path, "a"), n, {"loss": n})
    for n in range(5):
        step(table, state_of(tmp_path, "b"), n, {"loss": -n})
    before = out.read_bytes()
    again = CsvMetricsCallback(out)
    dispatch([again], "on_train_start", state_of(tmp_path, "b", step=0))
    step(again, state_of(tmp_path, "b"), 0, {"loss": 7})
    assert out.read_bytes() == before
    assert [row["loss"] for row in read(out.with_name("metrics-b.csv"))] == ["7"]


@pytest.mark.usefixtures("quiet")
def test_run_in_out_path_stands_for_the_key_of_the_run_which_leads_nowhere_else(tmp_path):
    table = CsvMetricsCallback(tmp_path / "tables" / "{run}.csv")
    for key in ("a", "b", "../../c", "x" * 300):
        step(table, state_of(tmp_path, key), 0, {"loss": 0})
    names = sorted(each.name for each in (tmp_path / "tables").glob("[!.]*"))
    assert names[:2] == ["a.csv", "b.csv"]
    assert len(names) == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tables"]


def test_run_dir_in_out_path_stands_for_the_folder_of_the_run(tmp_path):
    table = CsvMetricsCallback("{run_dir}/tables/{run}.csv")
    for key in ("a", "b"):
        step(table, state_of(tmp_path, key), 0, {"loss": 0})
    assert (tmp_path / "a" / "tables" / "a.csv").exists()
    assert (tmp_path / "b" / "tables" / "b.csv").exists()


@pytest.mark.usefixtures("quiet")
def test_a_detached_state_without_a_context_is_enough(tmp_path, out):
    state = detached(DetachedLoopState, {"step": 0, "num_steps": 2, "output_dir": tmp_path / "run"})
    table = CsvMetricsCallback(out)
    dispatch([table], "on_train_start", state)
    step(table, state, 0, {"loss": 1.0})
    end(table, state)
    assert len(read(out)) == 1


def test_a_file_that_is_no_table_of_steps_is_set_aside_and_not_destroyed(tmp_path, out, caplog):
    out.parent.mkdir(parents=True)
    out.write_text("my,precious\n1,2\n")
    step(CsvMetricsCallback(out), state_of(tmp_path), 0, {"loss": 1})
    assert len(read(out)) == 1
    assert out.with_name("metrics.csv.1.set-aside").read_text() == "my,precious\n1,2\n"
    assert "csv_metrics.file_set_aside" in caplog.text


@pytest.mark.usefixtures("quiet")
def test_a_file_that_is_removed_while_the_run_goes_on_is_made_anew_with_its_header(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    step(table, state, 0, {"loss": 1})
    step(table, state, 1, {"loss": 1})
    out.unlink()
    out.with_name(".metrics.csv.run").unlink()
    out.parent.rmdir()
    step(table, state, 2, {"loss": 2})
    assert [row["step"] for row in read(out)] == ["2"]


def test_rows_that_cannot_be_written_wait_are_counted_and_follow_in_order(tmp_path, out, caplog):
    (tmp_path / "made").write_text("a file where a folder should be")
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    for n in range(5):
        step(table, state, n, {"loss": n})
    assert table.waiting > 0
    assert [record.message.split()[0] for record in caplog.records] == ["rows.waiting"]
    (tmp_path / "made").unlink()
    step(table, state, 5, {"loss": 5, "late": 1})
    assert table.waiting == 0
    assert [row["step"] for row in read(out)] == list("012345")


def test_a_full_disk_tears_no_row_and_loses_none_once_there_is_space_again(tmp_path, out):
    program = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from evsys_adapters.csv_metrics import CsvMetricsCallback
        from evsys_bus.context import LoopArtifacts, LoopState, TrainingBatch
        out = Path(sys.argv[1])
        table = CsvMetricsCallback(out)
        state = LoopState(step=0, num_steps=400, output_dir=out.parent)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for n in range(200):
            table.on_step_end(state, n, TrainingBatch(), {"loss": n, "lr": 0.125})
        table.on_step_end(state, 200, TrainingBatch(), {"loss": 200, "lr": 0.125, "late": 1})
        text = out.read_text()
        assert len(text) <= 1000 and text.endswith("0.125\\n"), text[-50:]
        assert table.waiting > 50, table.waiting
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        table.on_step_end(state, 201, TrainingBatch(), {"loss": 201})
        table.on_train_end(state, LoopArtifacts())
        assert table.waiting == 0
    """)
    done = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = read(out)
    assert [row["step"] for row in rows] == [str(n) for n in range(202)]
    assert rows[200]["late"] == "1"


def test_a_disk_that_refuses_the_whole_file_is_not_asked_to_take_it_with_every_row(tmp_path):
    disk = SimulatedDisk()
    disk.make_directory("/run")
    with use_disk(disk):
        table, state = CsvMetricsCallback("/run/metrics.csv"), state_of(tmp_path)
        step(table, state, 0, {"loss": 0})
        disk.room = 8
        step(table, state, 1, {"loss": 1, "late": 1})
        disk.room = None
        step(table, state, 2, {"loss": 2})
        assert table.waiting == 2
        for n in range(3, 80):
            step(table, state, n, {"loss": n})
        assert table.waiting == 0
        disk.room = 8
        step(table, state, 80, {"loss": 80, "later": 1})
        disk.room = None
        end(table, state)
    assert table.waiting == 0
    rows = csv.DictReader(io.StringIO(disk.contents("/run/metrics.csv").decode()))
    assert [row["loss"] for row in rows] == [str(n) for n in range(81)]


def test_what_waits_for_the_disk_is_bounded_and_what_is_given_up_is_said(tmp_path, caplog):
    (tmp_path / "made").write_text("")
    table, state = CsvMetricsCallback(tmp_path / "made" / "m.csv"), state_of(tmp_path)
    for n in range(300):
        step(table, state, n, {f"m{k}": "x" * 8_000 for k in range(20)})
    assert 50 < table.waiting < 150
    assert any(record.message.startswith("rows.lost") for record in caplog.records)


@pytest.mark.usefixtures("quiet")
def test_a_delimiter_of_ones_own_and_text_that_contains_it(tmp_path, out):
    table, state = CsvMetricsCallback(out, delimiter=";"), state_of(tmp_path)
    for n in range(3):
        step(table, state, n, {"note": 'a;b"c'} | ({"late": 1} if n == 2 else {}))
    again = CsvMetricsCallback(out, delimiter=";")
    dispatch([again], "on_train_start", state_of(tmp_path, step=2))
    assert [row["note"] for row in read(out, ";")] == ['a;b"c'] * 2


@pytest.mark.parametrize("params", [{"delimiter": ""}, {"delimiter": "1"}, {"delimiter": "\n"}, {"delimiter": ",,"}])
def test_R9_a_delimiter_that_numbers_contain_is_an_error_at_construction(params):
    with pytest.raises(WrongParamError, match="EB103"):
        CsvMetricsCallback("metrics.csv", **params)


def test_construction_touches_no_disk(tmp_path, out):
    CsvMetricsCallback(out)
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_the_experiment_forgets_its_runs(tmp_path, out):
    table = CsvMetricsCallback(out)
    step(table, state_of(tmp_path), 0, {"loss": 1})
    assert table.mark()["positions"]
    dispatch([table], "on_experiment_end", LogContext(tmp_path), ExperimentResult("e"))
    table.mark()  # the last one with them
    assert not table.mark()["positions"]


WRITER = textwrap.dedent("""
    import os, sys
    from evsys_adapters.csv_metrics import CsvMetricsCallback
    from evsys_bus.context import LogContext, LoopState, TrainingBatch

    out, folder, value = sys.argv[1:4]
    state = LoopState(0, 100, f"{folder}/run", ctx=LogContext(folder, run_key="run"))
    table = CsvMetricsCallback(out)
    table.on_train_start(state)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "step":
            table.on_step_end(state, int(argument), TrainingBatch(), {"loss": value})
        elif command == "close":
            table.close()
        elif command == "fork":
            lives, began = os.pipe()
            if not os.fork():
                os.write(began, b"!")  # it has let go by now of what it has from its parent
                os.close(1)
                sys.stdin.read()  # until the test lets go of the pipe
                os._exit(0)
            os.read(lives, 1)
        print("done", flush=True)
""")


class Writer:
    """Another process that writes rows of the same run."""

    def __init__(self, out, folder, value):
        command = [sys.executable, "-c", WRITER, str(out), str(folder), value]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *commands):
        for command in commands:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()
        self.process.stdin.close()


@pytest.mark.parametrize("name", ["metrics.csv", "{run}.csv", "{run_dir}/table"])
def test_a_process_that_starts_the_same_run_while_another_writes_it_writes_beside_it(tmp_path, caplog, name):
    out_path = str(tmp_path / name) if "run_dir" not in name else name
    with Writer(out_path, tmp_path, "1st") as first:
        first("step 0", "step 1")
        table, state = CsvMetricsCallback(out_path), state_of(tmp_path)
        dispatch([table], "on_train_start", state)
        for n in range(2):
            step(table, state, n, {"loss": "2nd"})
        first("step 2")
        with Writer(out_path, tmp_path, "3rd") as third:
            third("step 0")
            end(table, state)
    stem = {"metrics.csv": "metrics{}.csv", "{run}.csv": "run{}.csv", "{run_dir}/table": "run/table{}"}[name]
    assert [row["loss"] for row in read(tmp_path / stem.format(""))] == ["1st"] * 3
    assert [row["loss"] for row in read(tmp_path / stem.format("-2"))] == ["2nd"] * 2
    assert [row["loss"] for row in read(tmp_path / stem.format("-3"))] == ["3rd"]
    [record] = caplog.records
    assert record.getMessage().startswith("csv_metrics.in_use")
    assert stem.format("-2") in record.getMessage()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("how", ["close", "kill", "kill with a child that lives on"])
def test_a_process_that_let_go_of_the_file_or_died_leaves_it_to_the_resumed_run(tmp_path, out, how):
    with Writer(out, tmp_path, "1st") as first:
        first("step 0", "step 1", "step 2", *(["fork"] if "child" in how else ()))
        first("close") if how == "close" else first.kill()
        table, state = CsvMetricsCallback(out), state_of(tmp_path, step=1)
        dispatch([table], "on_train_start", state)
        step(table, state, 1, {"loss": "2nd"})
    assert [row["loss"] for row in read(out)] == ["1st", "2nd"]


def test_a_run_that_was_closed_and_taken_over_goes_on_beside_it(tmp_path, out, caplog):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    step(table, state, 0, {"loss": "1st"})
    table.close()
    with Writer(out, tmp_path, "2nd") as second:
        second("step 5")
        step(table, state, 1, {"loss": "late"})
    assert [row["loss"] for row in read(out)] == ["2nd"]
    assert [row["loss"] for row in read(out.with_name("metrics-2.csv"))] == ["late"]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["csv_metrics.in_use"]


@pytest.mark.usefixtures("quiet")
def test_after_it_was_closed_a_later_step_goes_on_without_doubling_and_the_rows_are_there_before(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    dispatch([table], "on_train_start", state)
    table.close()  # nothing to close yet
    for n in range(4):
        step(table, state, n, {"loss": n, f"late{n}": 1})
        table.close()
        table.close()
        assert [row["step"] for row in read(out)] == [str(each) for each in range(n + 1)]
    end(table, state)
    assert list(read(out)[0]) == ["step", "loss", "late0", "late1", "late2", "late3"]


@pytest.mark.usefixtures("quiet")
def test_a_mark_that_was_taken_before_it_was_closed_is_good_after_a_crash(tmp_path, out):
    table, state = CsvMetricsCallback(out), state_of(tmp_path)
    dispatch([table], "on_train_start", state)
    step(table, state, 0, {"loss": 0})
    mark = table.mark()
    step(table, state, 1, {"loss": 1, "late": 1})
    table.close()
    again = CsvMetricsCallback(out)
    again.rewind(mark)
    assert [row["step"] for row in read(out)] == ["0"]
    for n in (1, 2):
        step(again, state, n, {"loss": n})
    again.close()
    mark = again.mark()
    step(again, state, 3, {"loss": 3})
    third = CsvMetricsCallback(out)
    third.rewind(mark)
    step(third, state, 3, {"loss": 3})
    assert [row["step"] for row in read(out)] == ["0", "1", "2", "3"]


def test_events_of_another_rank_get_a_file_of_their_own_unless_the_path_has_the_rank(tmp_path, out, caplog):
    tables = [CsvMetricsCallback(out), CsvMetricsCallback(tmp_path / "{rank}" / "m.csv")]
    state = state_of(tmp_path)
    for rank, first in ((0, 0), (12, 0), (0, 1), (12, 1)):
        for table in tables:
            table.event = SimpleNamespace(time=1.0, stream=f"r{rank}-20260131T120000-5f3a91c2", sequence=1)
            if not first:
                dispatch([table], "on_train_start", state)
            step(table, state, first, {"loss": rank})
    for zero, twelve in [(out, out.with_name("metrics-rank12.csv")), (tmp_path / "0/m.csv", tmp_path / "12/m.csv")]:
        assert [row["loss"] for row in read(zero)] == ["0", "0"]
        assert [row["loss"] for row in read(twelve)] == ["12", "12"]
    assert [record.getMessage().split()[0] for record in caplog.records] == ["csv_metrics.rank_apart"]


def test_a_relative_path_lies_where_the_callback_was_made_and_the_home_directory_is_expanded(tmp_path, monkeypatch):
    here, there, home = (tmp_path / name for name in ("here", "there", "home"))
    for each in (here, there):
        each.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    tables = [CsvMetricsCallback(path) for path in ("tables/{run}.csv", "~/m.csv", Path("~") / "{run}" / "m.csv")]
    monkeypatch.chdir(there)
    for table in tables:
        step(table, state_of(tmp_path / "runs", "a"), 0, {"loss": 1})
    assert (here / "tables/a.csv").exists()
    assert (home / "m.csv").exists()
    assert (home / "a/m.csv").exists()
    assert list(there.iterdir()) == []


@pytest.mark.parametrize(
    ("out_path", "what"),
    [
        (
            "tables/{run_key}.csv",
            r"\{run_key\} is not a placeholder; the placeholders are \{run_dir\}, \{run\}, \{rank\}",
        ),
        ("{experiment}/m.csv", r"\{experiment\} is not a placeholder"),
        ("{{run}}/m.csv", "is not a placeholder"),
        ("{}.csv", r"\{\} is not a placeholder"),
        ("a}b.csv", r"\} is not a placeholder"),
        ("gs://bucket/m.csv", "give a local directory"),
        ("~nobody-here/m.csv", "write the directory out"),
    ],
)
def test_a_path_that_would_lie_elsewhere_than_meant_is_an_error_of_the_config_and_of_the_constructor(out_path, what):
    with pytest.raises(WrongParamError, match=what):
        CsvMetricsCallback(out_path)
    for placement in ("inline", "follow"):
        with pytest.raises(WrongParamError, match=what) as caught:
            build_callbacks([{"kind": "csv_metrics", "placement": placement, "params": {"out_path": out_path}}])
        assert caught.value.where.path == "$.callbacks[0].params.out_path"


def test_a_path_object_that_was_a_url_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is a URL"):
        CsvMetricsCallback(Path("s3://bucket/m.csv"))


def test_content_that_the_file_does_not_show_is_logged_once_per_kind(tmp_path, caplog):
    table = CsvMetricsCallback(tmp_path / "m.csv")
    state = LoopState(0, 3, tmp_path / "run")
    with caplog.at_level("INFO"):
        for step in range(3):
            table.on_content(state, step, ContentItem("image", "samples", f"media/{step}.png"))
            table.on_content(state, step, ContentItem("table", "rows", f"media/{step}.json"))
    said = [each for each in caplog.text.splitlines() if "csv_metrics.content_omitted" in each]
    assert len(said) == 2
    assert "media/0.png" in said[0]
    assert not (tmp_path / "m.csv").exists()
