import json
import subprocess
import sys
import textwrap
from pathlib import Path

from evsys_bus.training import RowFile


def test_rows_read_back_in_order(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    for step in range(3):
        file.append({"step": step})
    assert [row["step"] for row in file.rows()] == [0, 1, 2]
    assert file.pending == 0


def test_a_value_that_json_cannot_hold_does_not_cost_the_row(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"step": 0, "loss": float("nan"), "lock": object(), "good": 1.5})
    row = json.loads(file.path.read_bytes())
    assert row["step"] == 0
    assert row["loss"] is None
    assert row["good"] == 1.5


def test_a_torn_last_line_is_passed_over_and_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1}\n{"ste')
    file = RowFile(path)
    assert [row["step"] for row in file.rows()] == [0, 1]
    assert file.retain(lambda row: True) == 1
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n'


def test_a_damaged_line_in_the_middle_costs_only_itself(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":0}\n\xff\x00{\n[1]\n{"step":3}\n')
    assert [row["step"] for row in RowFile(path).rows()] == [0, 3]


def test_a_file_with_nothing_to_cut_is_left_alone(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"step": 0})
    before = file.path.stat()
    assert file.retain(lambda row: row["step"] < 5) == 0
    assert file.path.stat().st_ino == before.st_ino


def test_rows_wait_while_the_directory_is_gone_and_go_out_in_order_with_the_next(tmp_path, caplog):
    folder = tmp_path / "run"
    file = RowFile(folder / "rows.jsonl")
    for step in range(3):
        file.append({"step": step})
    assert file.pending == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"], "one warning, not one per row"
    folder.mkdir()
    file.append({"step": 3})
    assert file.pending == 0
    assert [row["step"] for row in file.rows()] == [0, 1, 2, 3]


def test_the_queue_is_bounded_and_what_it_gives_up_is_counted_and_said(tmp_path, caplog):
    file = RowFile(tmp_path / "nowhere" / "rows.jsonl", max_pending_bytes=2 * len(b'{"step":0}\n'))
    for step in range(5):
        file.append({"step": step})
    assert (file.pending, file.lost) == (2, 3)
    file.flush()
    assert "rows.unwritten" in caplog.text


def test_a_row_is_not_joined_to_what_a_kill_left_of_the_one_before(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step":0}\n{"ste')
    RowFile(path).append({"step": 1})
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n'


def test_a_file_that_was_flushed_is_closed_and_takes_further_rows(tmp_path):
    file, before = RowFile(tmp_path / "rows.jsonl"), set(Path("/dev/fd").iterdir())
    for step in range(3):
        file.append({"step": step})
        file.flush()
    assert set(Path("/dev/fd").iterdir()) == before
    assert [row["step"] for row in file.rows()] == [0, 1, 2]


def test_a_row_goes_to_the_file_at_the_path_also_after_that_was_replaced(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    for step in range(3):
        file.append({"step": step})
    assert file.retain(lambda row: row["step"] != 1) == 1
    file.append({"step": 3})
    assert [row["step"] for row in file.rows()] == [0, 2, 3]


def test_a_full_disk_costs_no_row_and_joins_none(tmp_path):
    """A real limit on the file's size makes the disk take part of a row, then nothing; then there is room again."""
    program = textwrap.dedent(
        """
        import json, pathlib, resource, sys
        from evsys_bus.training import RowFile

        file = RowFile(pathlib.Path(sys.argv[1]))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        for step in range(50):
            file.append({"step": step, "text": "x" * 40})
        whole = [row["step"] for row in file.rows()]
        assert whole == list(range(len(whole))), whole
        assert 0 < len(whole) < 50
        assert file.path.read_bytes().endswith(b"}\\n"), "half a row was left in the file"
        assert file.pending == 50 - len(whole)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        file.append({"step": 50})
        assert file.pending == 0
        assert [row["step"] for row in file.rows()] == list(range(51))
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "rows.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("rows.waiting") == 1
