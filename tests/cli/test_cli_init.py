"""``evsys-bus init``: what it writes runs as it is, and nothing that exists is touched."""

import os
import subprocess
import sys

import pytest

from support.programs import run_evsys_bus


def test_the_experiment_that_it_writes_checks_runs_and_shows(tmp_path):
    done = run_evsys_bus("init", "new", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "new"
    assert "cd new && evsys-bus check experiment.yaml" in done.stdout
    for command in (["check", "experiment.yaml"], ["run", "experiment.yaml", "--progress", "off", "--strict"]):
        done = run_evsys_bus(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    shown = run_evsys_bus("show", "runs/first-sweep", cwd=folder).stdout
    assert "fast" in shown
    assert "completed" in shown
    assert len((folder / "runs" / "first-sweep" / "fast-s1" / "metrics.csv").read_text().splitlines()) == 201


@pytest.mark.long
def test_the_adapter_package_that_it_writes_passes_its_own_conformance_test(tmp_path):
    done = run_evsys_bus("init", "--adapter", "score_board", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    tested = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert "1 passed" in tested.stdout, tested.stdout
    from_plugin = ["follow", ".", "--to", "score_board", "--plugin", "score_board", "--help"]
    assert run_evsys_bus(*from_plugin, cwd=tmp_path).returncode == 0
    assert "my_adapter" not in "".join(each.read_text() for each in tmp_path.rglob("*.*") if each.suffix != ".pyc")


@pytest.mark.parametrize("name", ["my-board", "Board", "class", "../x", "9", ""])
def test_a_name_that_is_no_module_is_an_error(tmp_path, name):
    done = run_evsys_bus("init", "--adapter", name, cwd=tmp_path)
    assert done.returncode == 2
    assert "no name for an adapter" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_exists_is_overwritten(tmp_path):
    (tmp_path / "recipe.py").symlink_to(tmp_path / "elsewhere.py")
    done = run_evsys_bus("init", cwd=tmp_path)
    assert done.returncode == 2
    assert "recipe.py exists" in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.py"]
