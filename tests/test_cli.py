import json
import subprocess
import sys

import pytest


def evsys_bus(*arguments, before="", cwd=None):
    """The command in a process of its own; ``before`` runs first in it."""
    program = f"import sys\n{before}\nfrom evsys_bus.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


HEAVY = ["anyio", "asyncio", "importlib.metadata", "msgspec", "numpy", "structlog", "evsys_bus.bus", "evsys_bus.wiring"]


@pytest.mark.parametrize("heavy", [HEAVY])
def test_help_lists_every_command_without_importing_what_they_need(heavy):
    done = evsys_bus("--help", before=f"import atexit; atexit.register(lambda: print(set({heavy}) & set(sys.modules)))")
    assert done.returncode == 0
    for command in ("demo", "adapters", "bench"):
        assert f"\n  {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", ["demo", "adapters", "bench"])
def test_every_command_that_is_listed_has_help_of_its_own(command):
    done = evsys_bus(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: evsys-bus {command}")


def test_version_is_the_installed_one():
    done = evsys_bus("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "evsys-bus")
    assert done.stdout.split()[1][0].isdigit()


@pytest.mark.parametrize(
    "arguments", [["dmeo"], ["demo", "--stpes", "3"], ["demo", "--steps", "0"], ["demo", "--resume"]]
)
def test_a_usage_error_says_what_is_wrong_on_stderr_and_exits_2(arguments):
    done = evsys_bus(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert done.stdout == ""


def test_an_unknown_kind_is_told_in_our_shape_and_exits_2():
    done = evsys_bus("adapters", "print_progres")
    assert done.returncode == 2
    assert done.stderr == (
        'error[EB101]: unknown callback kind "print_progres"\n'
        'fix: did you mean "print_progress"?   all kinds: evsys-bus adapters\n'
    )


@pytest.mark.parametrize("module", ["numpy", "sklearn"])
def test_a_missing_package_of_the_demo_names_the_install_command_and_exits_3(tmp_path, module):
    done = evsys_bus("demo", "--output-dir", tmp_path, before=f"sys.modules[{module!r}] = None")
    assert done.returncode == 3
    assert f"error[EB701]: the demo needs {module}" in done.stderr
    assert "pip install 'evsys-bus[demo]'" in done.stderr
    assert "uv add 'evsys-bus[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_dir_that_cannot_be_made_exits_3(tmp_path):
    (tmp_path / "file").write_text("")
    done = evsys_bus("demo", "--steps", 2, "--output-dir", tmp_path / "file" / "run")
    assert done.returncode == 3
    assert "error[EB701]: the run's directory" in done.stderr
    assert "fix: choose another output_dir" in done.stderr


def test_an_output_dir_that_holds_a_run_is_refused_with_2_and_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step":0}\n')
    done = evsys_bus("demo", "--steps", 2, "--output-dir", tmp_path)
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step":0}\n'


def test_what_training_code_raises_exits_1_with_its_traceback(tmp_path):
    raises = "from evsys_bus.demo.digits import DigitNetwork\n"
    raises += "async def no(self): raise ZeroDivisionError('x')\nDigitNetwork.optim_step = no"
    done = evsys_bus("demo", "--output-dir", tmp_path, before=raises)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: x")


def test_ctrl_c_exits_130_after_the_step_and_its_final_checkpoint(tmp_path):
    soon = "import signal\nfrom evsys_adapters.print_progress import PrintProgressCallback as P\n"
    soon += "P.on_checkpoint = lambda self, state, row: row.name == 'final' or signal.raise_signal(signal.SIGINT)"
    done = evsys_bus("demo", "--steps", 60, "--output-dir", tmp_path, before=soon)
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted\n")
    assert json.loads((tmp_path / "checkpoints.jsonl").read_text().splitlines()[-1])["name"] == "final"


def test_the_default_output_dir_is_a_new_one_under_runs(tmp_path):
    done = evsys_bus("demo", "--steps", 2, cwd=tmp_path)
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("demo-")
    assert str(run_dir) in done.stderr


def test_adapters_lists_kinds_with_a_summary_line_each():
    done = evsys_bus("adapters")
    assert done.returncode == 0
    assert "print_progress  Prints one line per step" in done.stdout
    rows = [json.loads(line) for line in evsys_bus("adapters", "--json").stdout.splitlines()]
    (row,) = [row for row in rows if row["kind"] == "print_progress"]
    assert row["target"] == "evsys_adapters.print_progress:PrintProgressCallback"


def test_an_adapter_that_cannot_be_loaded_does_not_hide_the_others(tmp_path):
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evsys_bus.callbacks]\nbroken = no_such_module:Thing\n")
    done = evsys_bus("adapters", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert done.returncode == 0
    assert "cannot be loaded: ModuleNotFoundError" in done.stdout
    assert "print_progress  " in done.stdout


def test_adapters_with_a_kind_shows_schema_defaults_and_an_example():
    text = evsys_bus("adapters", "print_progress").stdout
    assert '"additionalProperties": false' in text
    assert "defaults\n  every  1\n  keys   null\n" in text
    assert "  - kind: print_progress\n" in text
    page = json.loads(evsys_bus("adapters", "print_progress", "--json").stdout)
    assert page["schema"]["properties"]["every"]["minimum"] == 1
    assert page["defaults"] == {"every": 1, "keys": None}
    assert page["example"]["kind"] == "print_progress"
