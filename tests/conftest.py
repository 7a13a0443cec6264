"""Fixtures for all tests: both event loops, and real programs in separate processes."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from evsys_bus import LoopState, StepEnd, TrainingBatch
from support.programs import command_in

# The tests start hundreds of interpreters. Where this is set (as in container images), each compiles everything that it
# imports, which is most of the work of a short program.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Three workers run the tests, which wait for a third of their time, on two cores; so do the processes that they start.
if sys.platform == "linux":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
# The dashboard of the person who runs the tests must get none of their events.
os.environ["XDG_STATE_HOME"] = tempfile.gettempdir() + "/evsys-bus-tests-no-dashboard"
# A process that a script starts in the background ignores SIGINT, and so would its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = ["support", *(path.name for path in Path(__file__).parent.glob("*.py"))]
"""Commands and helpers: they contain no tests, and `--doctest-modules` would import each a second time."""


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run async tests once on asyncio's own loop and once on uvloop."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


ONE_PYTHON = """
    adapters/test_adapters_simulated adapters/test_evsys_logger adapters/test_latest_order adapters/test_mlflow_logger
    adapters/test_object_stores adapters/test_output_kept adapters/test_rewind adapters/test_spool_damage
    adapters/test_tensorboard_logger adapters/test_wandb_logger bench/ bridges/test_loggers_without_frameworks
    bridges/test_wandb_programs cli/test_checkpoints_cli cli/test_cli_check cli/test_cli_choices cli/test_cli_delivery
    cli/test_cli_golden cli/test_cli_init dashboard/test_build dashboard/test_client dashboard/test_dash_command
    dashboard/test_page dashboard/test_store_scales delivery/test_delivery_faults delivery/test_raw_sinks
    faults/test_disk_full faults/test_random_faults faults/test_simulation files/ journal/test_journal_faults
    journal/test_journal_damage project/
""".split()
"""The tests of the marker ``one_python``, by the beginnings of their paths in this folder."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make `long` what is on uvloop only; define the classes of docstring examples in ``__main__``.

    There, an event of an example belongs to no package.
    """
    here = Path(__file__).parent
    if gone := [each for each in ONE_PYTHON if not any(here.glob(f"{each}*"))]:
        raise pytest.UsageError(f"ONE_PYTHON names tests that do not exist: {gone}")
    one_python = tuple(f"{here}/{each}" for each in ONE_PYTHON)
    for item in items:
        if str(item.path).startswith(one_python):
            item.add_marker(pytest.mark.one_python)
        if "[uvloop" in item.name and item.get_closest_marker("long_on_uvloop"):
            item.add_marker(pytest.mark.long)
        if isinstance(item, pytest.DoctestItem) and item.dtest is not None:
            item.dtest.globs["__name__"] = "__main__"


@pytest.fixture
def state(tmp_path: Path) -> LoopState:
    return LoopState(step=0, num_steps=10, output_dir=tmp_path)


@pytest.fixture
def journal(tmp_path: Path) -> str:
    """The path of a journal directory that does not exist yet."""
    return str(tmp_path / "journal")


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test if a WARNING was logged, as for every hook that raises."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.fixture
def step_end(state: LoopState) -> Callable[..., StepEnd]:
    def make(step_idx: int = 0, **metrics: float) -> StepEnd:
        return StepEnd(state, step_idx, TrainingBatch(), metrics)

    return make


@pytest.fixture
def evsys_bus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process, in tmp_path; returns exit code, stdout and stderr."""

    run_here = command_in(tmp_path, capsys)

    def command(*arguments: object) -> tuple[int, str, str]:
        done = run_here(*arguments)
        return done.returncode, done.stdout, done.stderr

    return command


Program = subprocess.Popen[str]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start Python programs in separate processes; those still running at the end of the test are killed."""
    started: list[Program] = []

    def start(source: str, *args: str, **environment: str) -> Program:
        script = tmp_path / f"program_{len(started)}.py"
        script.write_text(textwrap.dedent(source), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, str(script), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> Iterator[None]:
    """Escape what a test printed or logged: only text that can be encoded can be sent between the workers."""
    del item, call
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Run a real S3 server, the `S3Server` of tests/support/s3_server.py; imported only where it can run."""
    if not os.environ.get("CI"):
        pytest.importorskip("swift")
        pytest.importorskip("aiobotocore")
    from support.s3_server import S3Server

    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Create a bucket on the S3 server; returns its name and the params with which an adapter uses it."""
    from support.s3_client import create_bucket

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    return create_bucket(s3), {"endpoint": s3.endpoint, "region": s3.region, "path_style": True}
