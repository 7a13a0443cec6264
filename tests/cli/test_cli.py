"""What each command says and how it exits; in this process, but where a test is about the process itself."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from evsys_bus.cli import COMMANDS, run
from evsys_bus.cli.explain import read_pages
from evsys_bus.errors import EvsysBusError
from evsys_bus.training.experiment_store import ExperimentStore, read_result
from support.files import parse_json_lines


def in_a_process(*arguments, before="", cwd=None):
    """The command in a process of its own; ``before`` runs first in it."""
    program = f"import sys\n{before}\nfrom evsys_bus.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.fixture
def evsys_bus(capsys):
    """The command line in this process, told and answering as ``in_a_process``."""

    def command(*arguments, cwd=None):
        with contextlib.chdir(cwd or Path.cwd()):
            code = run([*map(str, arguments)])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return command


HEAVY = [
    "anyio",
    "asyncio",
    "rich",
    "ruamel",
    "importlib.metadata",
    "msgspec",
    "numpy",
    "structlog",
    "evsys_adapters",
    "evsys_bus.bus",
    "evsys_bus.config",
]


@pytest.mark.parametrize("heavy", [HEAVY])
def test_help_lists_every_command_without_importing_what_they_need(heavy):
    done = in_a_process(
        "--help", before=f"import atexit; atexit.register(lambda: print(set({heavy}) & set(sys.modules)))"
    )
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"\n  {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_is_listed_has_help_of_its_own(evsys_bus, command):
    done = evsys_bus(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: evsys-bus {command}")


def test_version_is_the_installed_one(evsys_bus):
    done = evsys_bus("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "evsys-bus")
    assert done.stdout.split()[1][0].isdigit()


@pytest.mark.parametrize(
    "arguments", [["dmeo"], ["demo", "--stpes", "3"], ["run"], ["run", "x", "--seed", "-1"], ["demo", "--resume"]]
)
def test_a_usage_error_says_what_is_wrong_on_stderr_and_exits_2(evsys_bus, arguments):
    done = evsys_bus(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("slip", "near"), [("rum", "did you mean run?   "), ("statsu", "did you mean status?   "), ("x", "")]
)
def test_a_command_that_is_not_there_is_told_with_the_nearest(evsys_bus, slip, near):
    done = evsys_bus(slip)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f'error: there is no command "{slip}"'
    assert done.stderr.splitlines()[1] == f"fix: {near}all commands: evsys-bus --help"


def test_an_unknown_kind_is_told_in_our_shape_and_exits_2(evsys_bus):
    done = evsys_bus("adapters", "print_progres")
    assert done.returncode == 2
    assert done.stderr == (
        'error[EB101]: unknown callback kind "print_progres"\n'
        'fix: did you mean "print_progress"?   all kinds: evsys-bus adapters\n'
    )


@pytest.mark.parametrize("module", ["numpy", "sklearn"])
def test_a_missing_package_of_the_demo_names_the_install_command_and_exits_3(tmp_path, module):
    done = in_a_process("demo", "--output-dir", tmp_path, before=f"sys.modules[{module!r}] = None")
    assert done.returncode == 3
    assert f"error[EB701]: the demo needs {module}" in done.stderr
    assert "pip install 'evsys-bus[demo]'" in done.stderr
    assert "uv add 'evsys-bus[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_command_line_itself_raises_exits_1_with_its_traceback():
    done = in_a_process(
        "explain", before="import evsys_bus.cli.explain as e\ndef no(): raise ZeroDivisionError\ne.read_pages = no"
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError")


def test_an_os_error_is_the_machine_s_fault_and_exits_3():
    before = (
        "import evsys_bus.cli.explain as e\n"
        "def no(): raise OSError(28, 'No space left on device', 'x')\n"
        "e.read_pages = no"
    )
    done = in_a_process("explain", before=before)
    assert (done.returncode, done.stderr) == (3, "error: No space left on device: x\n")


def test_a_reader_of_stdout_that_leaves_early_is_no_error(tmp_path):
    program = f"{sys.executable} -c 'from evsys_bus.cli import main; main()' explain EB101; echo $? > {tmp_path}/code"
    done = subprocess.run(["bash", "-c", f"({program}) | true"], capture_output=True, text=True, check=False)
    assert (done.stderr, (tmp_path / "code").read_text()) == ("", "0\n")


def subclasses(error):
    return {error, *(each for child in error.__subclasses__() for each in subclasses(child))}


def test_every_error_code_has_a_page_of_help_and_every_page_a_code():
    import evsys_adapters.checkpoints.store  # noqa: F401 # has errors of its own

    ours = ("evsys_bus.errors", "evsys_adapters.")
    raised = {each.code for each in subclasses(EvsysBusError) if each.__module__.startswith(ours)}
    assert set(read_pages()) == raised
    for code, page in read_pages().items():
        head, blank, *body = page.splitlines()
        assert head.startswith(f"{code}  ")
        assert (blank, body[0]) == ("", "What happened")
        assert "What to do" in body
        assert max(map(len, [head, *body])) <= 120


@pytest.mark.parametrize("code", ["EB101", "eb101", "101", "error[EB101]"])
def test_a_page_is_found_however_its_code_is_written(evsys_bus, code):
    done = evsys_bus("explain", code)
    page = read_pages()["EB101"].replace("`", "")
    assert (done.returncode, done.stdout) == (0, f"{page}\n")


def test_explain_without_a_code_lists_them_and_with_an_unknown_one_names_the_nearest(evsys_bus):
    assert [line[:5] for line in evsys_bus("explain").stdout.splitlines()] == [*read_pages()]
    done = evsys_bus("explain", "EB110")
    assert done.returncode == 2
    assert 'did you mean "EB10' in done.stderr


def test_doctor_reports_and_hides_secrets():
    secrets = "import os; os.environ.update(WANDB_API_KEY='hush-hush', HTTPS_PROXY='http://me:hush-hush@proxy:1')"
    done = in_a_process("doctor", before=secrets)
    assert done.returncode == 0, done.stdout
    assert "hush-hush" not in done.stdout
    assert "WANDB_API_KEY set (9 characters, hidden)" in " ".join(done.stdout.split())
    assert "http://(hidden)@proxy:1" in done.stdout
    report = json.loads(in_a_process("doctor", "--json", before=secrets).stdout)
    assert "hush-hush" not in str(report)
    assert (report["disk"]["append"], report["disk"]["lock"], report["faults"]) == ("works", "works", [])
    assert report["machine"]["python"].startswith(f"{sys.version_info.major}.")


def test_doctor_looks_for_everything_that_the_package_and_its_extras_need():
    report = json.loads(in_a_process("doctor", "--json").stdout)
    assert {"anyio", "msgspec", "ruamel-yaml", "tenacity", "uvloop"} <= set(report["packages"])
    extras = {name.removeprefix("extra "): list(found) for name, found in report.items() if name.startswith("extra ")}
    assert sorted(extras) == [
        "dashboard",
        "demo",
        "evsys",
        "mlflow",
        "nats",
        "postgres",
        "s3",
        "system",
        "tensorboard",
        "testing",
        "wandb",
        "webhook",
    ]
    assert (extras["s3"], extras["wandb"]) == (["aiobotocore"], ["wandb"])


def test_doctor_names_the_install_command_of_what_is_missing_and_leaves_nothing_behind(tmp_path):
    hidden = "import importlib.metadata as m; v = m.version\n"
    hidden += "def version(name):\n if name == 'numpy': raise m.PackageNotFoundError(name)\n return v(name)\n"
    hidden += "m.version = version"
    done = in_a_process("doctor", before=hidden, cwd=tmp_path)
    assert "extra demo   install: pip install 'evsys-bus[demo]'   or   uv add 'evsys-bus[demo]'" in done.stdout
    assert list(tmp_path.iterdir()) == []


DEEP = b'{"name":"x","q":' + b"[" * 200_000
NOT_TEXT = b'{"name":"\xff"}'
HUGE = b"9" * 400
LONGEST = b"9" * 5_000


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b'{"name":1}',
        b'{"name":"x","best_score":%b}' % HUGE,
        pytest.param(DEEP, id="deep"),
        pytest.param(NOT_TEXT, id="not text"),
    ],
)
def test_show_says_what_is_wrong_with_a_folder_that_it_cannot_read(evsys_bus, tmp_path, content):
    if content is not None:
        (tmp_path / "experiment.json").write_bytes(content)
    done = evsys_bus("show", tmp_path)
    assert done.returncode in {1, 2}
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_show_reads_a_lone_run_with_nan_and_torn_lines(evsys_bus, tmp_path):
    rows = [
        '{"step":0,"loss":2.0}',
        '{"step":1,"loss":null,"nonfinite":{"loss":"nan"}}',
        '{"step":2,"loss":0.5}',
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    done = evsys_bus("show", tmp_path)
    assert done.returncode == 0, done.stderr
    (loss,) = [line.split() for line in done.stdout.splitlines() if line.startswith("loss")]
    assert loss == ["loss", "3", "(1", "NaN)", "2.000", "0.500", "0.500", "2", "2.000", "0"]
    row = json.loads(evsys_bus("show", tmp_path, "--json").stdout)
    assert (row["type"], row["last_step"], row["metrics"][0]["nonfinite"]) == ("run", 2, 1)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(DEEP, id="deep"),
        pytest.param(NOT_TEXT, id="not text"),
        pytest.param(b'{"name":"x","metrics":{"loss":%b}}' % HUGE, id="huge"),
        pytest.param(b'{"step":1,"loss":%b}' % LONGEST, id="longest"),
    ],
)
def test_show_passes_over_what_is_damaged_in_the_files_of_a_run(evsys_bus, tmp_path, damage):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "experiment.json").write_bytes(damage)
    (run / "metrics.jsonl").write_bytes(b'{"step":0,"loss":2.0}\n' + damage + b'\n{"step":2,"loss":1.0}\n')
    (run / "checkpoints.jsonl").write_bytes(damage + b'\n{"name":"final","batch":2,"state_path":"mem:final"}\n')
    (run / "result.json").write_bytes(damage)
    done = evsys_bus("show", run)
    assert done.returncode == 0, done.stderr[-500:]
    assert "Traceback" not in done.stderr
    (loss,) = [line.split() for line in done.stdout.splitlines() if line.startswith("loss")]
    assert loss == ["loss", "2", "2.000", "1.000", "1.000", "2", "2.000", "0"]
    assert "final" in done.stdout
    assert json.loads(evsys_bus("show", run, "--json").stdout)["rows"] >= 2


def test_show_counts_a_number_that_no_float_can_hold_as_not_finite(evsys_bus, tmp_path):
    rows = [b'{"step":0,"loss":2}', b'{"step":1,"loss":%b}' % HUGE, b'{"step":2,"loss":-%b}' % HUGE]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*rows, b""]))
    done = evsys_bus("show", tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    (loss,) = json.loads(evsys_bus("show", tmp_path, "--json").stdout)["metrics"]
    assert (loss["rows"], loss["nonfinite"], loss["least"], loss["greatest"]) == (3, 2, 2.0, 2.0)


@pytest.mark.parametrize("damage", [pytest.param(DEEP, id="deep"), pytest.param(NOT_TEXT, id="not text")])
def test_a_damaged_ledger_is_made_anew_on_resume_and_a_damaged_result_runs_again(tmp_path, damage, caplog):
    (tmp_path / "experiment.json").write_bytes(damage)
    ExperimentStore(tmp_path, "x", (), resume=True)
    assert "file.damaged" in caplog.text
    assert (tmp_path / "experiment.json.damaged").read_bytes() == damage
    (tmp_path / "result.json").write_bytes(damage)
    assert read_result(tmp_path) is None


def test_show_suggests_the_nearest_name_below_runs(evsys_bus, tmp_path):
    for name in ("baseline-s0", "wide-s0"):
        (tmp_path / "runs" / "digits" / name).mkdir(parents=True)
        (tmp_path / "runs" / "digits" / name / "metrics.jsonl").write_text("")
    done = evsys_bus("show", "wied-s0", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: there is no run wied-s0\nfix: did you mean wide-s0?" in done.stderr
    assert evsys_bus("show", "digits/wide-s0", cwd=tmp_path).returncode == 0


def test_adapters_lists_kinds_with_a_summary_line_each(evsys_bus):
    done = evsys_bus("adapters")
    assert done.returncode == 0
    assert re.search("^print_progress +Prints one line per step", done.stdout, re.MULTILINE)
    rows = parse_json_lines(evsys_bus("adapters", "--json").stdout)
    (row,) = [row for row in rows if row["kind"] == "print_progress"]
    assert row["target"] == "evsys_adapters.print_progress:PrintProgressCallback"


def test_an_adapter_that_cannot_be_loaded_does_not_hide_the_others(tmp_path):
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[evsys_bus.callbacks]\nbroken = no_such_module:Thing\n")
    done = in_a_process("adapters", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert done.returncode == 0
    assert "cannot be loaded: ModuleNotFoundError" in done.stdout
    assert "print_progress  " in done.stdout


def test_adapters_with_a_kind_gives_its_schema_as_json(evsys_bus):
    page = json.loads(evsys_bus("adapters", "print_progress", "--json").stdout)
    assert page["schema"]["properties"]["every"]["minimum"] == 1
    assert page["defaults"] == {"every": 1, "keys": None}
    assert page["example"]["kind"] == "print_progress"


def test_a_closed_stdout_changes_no_exit_code(tmp_path):
    command = f"{sys.executable} -c 'from evsys_bus.cli import main; main()' explain EB101 >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def other_package(tmp_path):
    """A folder of installed packages, one of which brings a command."""
    (tmp_path / "guests-1.0.dist-info").mkdir()
    points = "[console_scripts]\nguests = guests:main\n\n[evsys_bus.commands]\ngreet = guests.hello:command [extra]\n"
    points += "\n[x]\ny = z:z\n"
    (tmp_path / "guests-1.0.dist-info" / "entry_points.txt").write_text(points)
    (tmp_path / "guests").mkdir()
    (tmp_path / "guests" / "__init__.py").touch()
    (tmp_path / "guests" / "hello.py").write_text(
        "import click\n\n@click.command()\ndef command():\n    click.echo('hello')\n"
    )
    return f"sys.path.append({str(tmp_path)!r})"


def test_a_command_of_another_package_is_listed_without_importing_it(other_package):
    done = in_a_process(
        "--help", before=f"{other_package}; import atexit; atexit.register(lambda: print('guests' in sys.modules))"
    )
    assert "\n  greet        a command of guests\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_a_command_of_another_package_runs_and_is_suggested(other_package):
    assert in_a_process("greet", before=other_package).stdout == "hello\n"
    assert "did you mean greet?" in in_a_process("gret", before=other_package).stderr


def test_a_command_of_ours_cannot_be_replaced_by_another_package(tmp_path):
    (tmp_path / "a-1.dist-info").mkdir()
    (tmp_path / "a-1.dist-info" / "entry_points.txt").write_text("[evsys_bus.commands]\nexplain = no.such:command\n")
    done = in_a_process("explain", "EB101", before=f"sys.path.insert(0, {str(tmp_path)!r})")
    assert (done.returncode, done.stdout[:5]) == (0, "EB101")
