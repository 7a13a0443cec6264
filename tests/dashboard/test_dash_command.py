"""``evsys-bus dash`` and ``--dash``, with the real server: starting, finding, stopping, importing, and kills."""

import json
import os
import pty
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress

import pytest

from evsys_adapters import EvsysLoggerCallback
from evsys_adapters.dashboard.state_file import DashboardState, read_state, responds, state_path
from evsys_adapters.dashboard.store import Store
from evsys_bus import EventBus, LogContext, LoopState, RunEnd, RunResult, RunStart, StepEnd, TrainEnd, TrainStart
from evsys_bus.context import ArmResult, LoopArtifacts
from evsys_bus.delivery.progress import read_progress
from evsys_bus.journal import JournalReader
from support.journals import read_events
from support.programs import EVSYS_BUS, run_evsys_bus
from support.waiting import wait_until

EXPERIMENT = """\
name: sweep
recipe: toy_recipe:recipe
run: {steps: 4}
"""
RECIPE = """\
from evsys_bus import TrainingBatch
from evsys_bus.training.plan import RunComponents

class Descent:
    def __init__(self):
        self.x = 1.0
    async def forward_backward(self, batch):
        return {"loss": self.x}
    async def optim_step(self):
        self.x /= 2
    async def save_state(self, name):
        return None
    save_weights_for_sampler = save_state

class Steps:
    async def build_batch(self, step_idx):
        return TrainingBatch()

def recipe(params, run):
    return RunComponents(backend=Descent(), step_builder=Steps(), num_steps=params["steps"])
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without EvSys settings and without a dashboard; one that is running at the end is killed."""
    for name in [each for each in os.environ if each.startswith("EVSYS_")]:
        monkeypatch.delenv(name)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    yield tmp_path
    state = read_state()
    if state is not None:
        with suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGKILL)


@pytest.fixture
def dashboard(home):
    """A dashboard in the foreground of another process, at any port."""
    process = subprocess.Popen(
        [EVSYS_BUS, "dash", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.url = process.stdout.readline().strip()
    yield process
    process.kill()
    process.communicate()


def evsys_bus(*arguments):
    """Run the command; returns its exit code, stdout and stderr."""
    done = run_evsys_bus(*arguments)
    return done.returncode, done.stdout, done.stderr


def experiments():
    """The experiments on the home page of the running dashboard."""
    state = read_state()
    request = urllib.request.Request(f"{state.url}/api/home", headers={"Authorization": f"Bearer {state.token}"})
    with urllib.request.urlopen(request, timeout=10) as reply:  # our own server
        return json.loads(reply.read())["experiments"]


def waiting_events(folder):
    """How many events `evsys_logger` has delivered, and how many wait."""
    [status] = [each for each in read_progress(folder / "journal") if each.name == "evsys_logger"]
    return status.delivered, status.waiting


def record(folder, steps=20):
    """Record an experiment with one run that nobody delivers."""
    ctx = LogContext(folder, run_key="low-s0", config={"name": folder.name})
    state = LoopState(0, steps, folder / "low-s0", ctx=ctx)
    with EventBus([], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(steps):
            bus.publish(StepEnd(state, step, metrics={"loss": 1.0 / (1 + step)}))
        bus.publish(TrainEnd(state, LoopArtifacts()))
        bus.publish(RunEnd(ctx, RunResult("low-s0"), ArmResult("low")))
    return folder


def test_it_shows_its_url_with_the_token_is_found_the_second_time_and_stops(dashboard):
    state = read_state()
    assert dashboard.url == f"{state.url}/#token={state.token}"
    code, out, err = evsys_bus("dash")
    assert (code, out.strip()) == (0, dashboard.url)
    assert "it runs already" in err
    code, out, err = evsys_bus("dash", "--status")
    assert (code, out.strip()) == (0, dashboard.url)
    assert state.store in err
    assert json.loads(evsys_bus("dash", "--status", "--json")[1])["pid"] == dashboard.pid
    code, _, err = evsys_bus("dash", "--stop")
    assert (code, dashboard.wait(10)) == (0, 0)
    assert state.url in err
    assert not state_path().exists()


@pytest.mark.usefixtures("home")
def test_without_a_dashboard_status_exits_with_3_and_stop_with_0(home):
    code, out, err = evsys_bus("dash", "--status")
    assert (code, out) == (3, "")
    assert "evsys-bus dash" in err
    assert evsys_bus("dash", "--stop")[0] == 0


def test_ctrl_c_ends_it_and_removes_its_state_file(dashboard):
    dashboard.send_signal(signal.SIGINT)
    assert dashboard.wait(10) == 0
    assert not state_path().exists()


def test_another_database_than_that_of_the_running_one_is_an_error_that_names_both(dashboard, tmp_path):
    code, _, err = evsys_bus("dash", "--db", tmp_path / "other.sqlite")
    assert code == 3
    assert read_state().store in err
    assert "evsys-bus dash --stop" in err


def test_a_run_is_imported_once_into_a_running_dashboard(dashboard, tmp_path):
    folder = record(tmp_path / "sweep")
    code, _, err = evsys_bus("dash", "--import", folder)
    assert code == 0
    assert "imported" in err
    assert "24 events" in err
    assert [each["name"] for each in experiments()] == ["sweep"]
    assert "0 events" in evsys_bus("dash", "--import", folder / "journal")[2]


def test_what_is_no_run_is_an_error_before_anything_starts(home):
    code, _, err = evsys_bus("dash", "--import", "nothing")
    assert code == 2
    assert "there is no run nothing" in err
    assert read_state() is None


def test_a_dashboard_that_starts_imports_the_runs_that_it_is_given(home, tmp_path):
    folder = record(tmp_path / "sweep")
    command = [EVSYS_BUS, "dash", "--port", "0", "--import", folder]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        assert any("imported" in line for line in lines)
        assert [each["name"] for each in experiments()] == ["sweep"]
        process.terminate()


@pytest.mark.long
@pytest.mark.timeout(90)
def test_what_a_run_records_after_the_dashboard_was_stopped_is_there_when_it_is_started_again(dashboard, tmp_path):
    folder = tmp_path / "sweep"
    ctx = LogContext(folder, run_key="low-s0", config={"name": "sweep"})
    state = LoopState(0, 40, folder / "low-s0", ctx=ctx)
    with EventBus([EvsysLoggerCallback()], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(40):
            bus.publish(StepEnd(state, step, metrics={"loss": 1.0 / (1 + step)}))
            if step == 20:
                wait_until(lambda: experiments() and waiting_events(folder) == (23, 0))
                assert evsys_bus("dash", "--stop")[0] == 0
        bus.publish(TrainEnd(state, LoopArtifacts()))
        bus.publish(RunEnd(ctx, RunResult("low-s0"), ArmResult("low")))
    [delivery] = bus.receipt.deliveries
    assert (delivery.delivered, delivery.waiting, delivery.pending) == (23, 21, 0)
    assert f"evsys-bus dash --import {folder / 'journal'}" in str(bus.receipt)
    with subprocess.Popen([EVSYS_BUS, "dash", "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            process.stdout.readline()
            wait_until(lambda: experiments()[0]["state"] == "completed")
            wait_until(lambda: waiting_events(folder) == (44, 0), 40)
        finally:
            process.terminate()
    check_database(tmp_path / "data" / "evsys-bus" / "dashboard.sqlite", folder / "journal")


def test_an_import_ends_the_waiting_of_the_run(dashboard, tmp_path):
    folder = tmp_path / "sweep"
    state_path().rename(tmp_path / "hidden.json")
    ctx = LogContext(folder, run_key="low-s0", config={"name": "sweep"})
    with EventBus([EvsysLoggerCallback()], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
    assert waiting_events(folder) == (0, 2)
    (tmp_path / "hidden.json").rename(state_path())
    assert evsys_bus("dash", "--import", folder)[0] == 0
    assert waiting_events(folder) == (2, 0)
    assert "nothing is pending" in evsys_bus("sync", folder)[2]


@pytest.mark.long
def test_a_file_that_a_killed_dashboard_has_left_is_replaced(dashboard):
    dashboard.kill()
    dashboard.wait()
    assert state_path().exists()
    assert evsys_bus("dash", "--status")[0] == 3
    with subprocess.Popen([EVSYS_BUS, "dash", "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        assert read_state().pid == process.pid
        process.terminate()


def test_stop_leaves_a_process_alone_that_is_not_the_dashboard(home):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        import socket

        from evsys_adapters.dashboard.state_file import write_state

        write_state(DashboardState("http://127.0.0.1:9", "t", other.pid, socket.gethostname(), "/db", 1.0))
        code, _, err = evsys_bus("dash", "--stop")
        assert code == 3
        assert f"kill {other.pid}" in err
        assert other.poll() is None
        state_path().unlink()
        other.communicate(b"\n")


@pytest.fixture
def experiment(home):
    (home / "toy_recipe.py").write_text(RECIPE)
    (home / "sweep.yaml").write_text(EXPERIMENT)
    return home / "sweep.yaml"


def test_run_with_dash_starts_it_sends_the_run_and_leaves_it_running(experiment):
    code, out, err = evsys_bus("run", experiment, "--dash", "--progress", "off", "--strict")
    assert code == 0, out + err
    state = read_state()
    assert responds(state.url)
    assert state.url in err
    assert state.token not in out + err  # it may be the log of a job, which others may read
    assert "evsys-bus dash --stop" in err
    [shown] = experiments()
    assert (shown["name"], shown["state"], shown["runs"]["completed"]) == ("sweep", "completed", 1)
    assert state_path().with_name("dashboard.log").stat().st_mode & 0o77 == 0


@pytest.mark.long
def test_run_with_dash_uses_the_dashboard_that_runs(dashboard, experiment):
    state = read_state()
    code, out, err = evsys_bus("run", experiment, "--dash", "--progress", "off")
    assert code == 0, out + err
    assert read_state() == state
    assert [each["name"] for each in experiments()] == ["sweep"]


def test_where_the_dashboard_cannot_start_the_run_does_not_begin_and_the_reason_is_shown(experiment, home):
    (home / "data").write_text("no folder")
    code, _, err = evsys_bus("run", experiment, "--dash")
    assert code == 3
    assert "EB907" in err
    assert "dashboard.log" in err
    assert not (home / "runs").exists()


@pytest.mark.long
def test_with_a_key_of_the_hosted_service_a_run_with_dash_still_goes_to_the_dashboard(experiment, monkeypatch):
    monkeypatch.setenv("EVSYS_API_KEY", "evk-of-the-service")
    code, out, err = evsys_bus("run", experiment, "--dash", "--progress", "off", "--strict")
    assert code == 0, out + err
    assert [each["name"] for each in experiments()] == ["sweep"]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.long
def test_the_browser_is_opened_on_a_terminal_unless_it_is_not_to_be(dashboard, home, monkeypatch, wanted):
    browser = home / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {home}/opened\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setenv("TERM", "xterm")
    terminal, end = pty.openpty()
    arguments = [] if wanted else ["--no-browser"]
    subprocess.run([EVSYS_BUS, "dash", *arguments], stderr=end, stdout=subprocess.DEVNULL, check=True)
    os.close(end)
    os.close(terminal)
    if wanted:
        wait_until((home / "opened").exists)
        wait_until(lambda: (home / "opened").read_text().strip() == dashboard.url)
    else:
        assert not (home / "opened").exists()


TRAINER = """
import sys, time
from evsys_adapters import EvsysLoggerCallback
from evsys_bus import EventBus, LogContext, LoopState, RunStart, StepEnd, TrainStart
folder, first = sys.argv[1], int(sys.argv[2])
with EventBus([EvsysLoggerCallback()], journal=folder + "/journal") as bus:
    ctx = LogContext(folder, run_key="low-s0", config={"name": "sweep"})
    state = LoopState(first, 10**6, folder + "/low-s0", ctx=ctx)
    bus.publish(RunStart(ctx))
    bus.publish(TrainStart(state))
    print("ready", flush=True)
    for step in range(first, 10**6):
        bus.publish(StepEnd(state, step, metrics={"loss": step}))
        time.sleep(0.002)
"""


@pytest.mark.long
@pytest.mark.timeout(120)
def test_kills_of_the_program_its_courier_and_the_dashboard_leave_every_step_in_the_database_once(home, tmp_path):
    folder, database = tmp_path / "sweep", tmp_path / "data" / "evsys-bus" / "dashboard.sqlite"
    dash = [EVSYS_BUS, "dash", "--port", "0"]

    def start_dashboard():
        process = subprocess.Popen(dash, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline()
        return process

    def courier():
        [status] = [each for each in read_progress(folder / "journal") if each.name == "evsys_logger"] or [None]
        return status.pid if status is not None and status.busy else 0

    def recorded_events():
        reader = JournalReader(folder / "journal")
        return sum(sum(len(run.payloads) for run in reader.tail(each).poll_runs()) for each in reader.streams("r"))

    dashboard = start_dashboard()
    for first in (0, 100_000):
        trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(folder), str(first)], stdout=subprocess.PIPE)
        trainer.stdout.readline()
        for victim in ("courier", "dashboard", "courier", "dashboard"):
            before = recorded_events()
            wait_until(lambda: recorded_events() > before + 200)  # noqa: B023 # called before the next turn
            if victim == "courier":
                wait_until(courier)
                os.kill(courier(), signal.SIGKILL)
            else:
                dashboard.kill()
                dashboard.communicate()
                dashboard = start_dashboard()
        trainer.kill()
        trainer.communicate()
    wait_until(lambda: run_evsys_bus("sync", folder / "journal").returncode == 0, 40)
    run_evsys_bus("dash", "--stop")
    dashboard.communicate()

    check_database(database, folder / "journal")


@pytest.mark.long
@pytest.mark.timeout(60)
def test_a_dashboard_that_comes_during_a_run_has_all_of_it_and_another_database_too(home, tmp_path):
    folder = tmp_path / "sweep"
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, str(folder), "0"], stdout=subprocess.PIPE)
    trainer.stdout.readline()
    wait_until(lambda: [each.state for each in read_progress(folder / "journal")] == ["waiting"])
    for name in ("first.sqlite", "second.sqlite"):
        database = tmp_path / name
        command = [EVSYS_BUS, "dash", "--port", "0", "--db", database]
        dashboard = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert dashboard.stdout.readline()
        wait_until(lambda: [each["state"] for each in experiments()] == ["running"])
        if name == "second.sqlite":
            trainer.kill()
            trainer.communicate()
            wait_until(lambda: run_evsys_bus("sync", folder / "journal").returncode == 0, 40)
        dashboard.terminate()
        dashboard.communicate()
    check_database(database, folder / "journal")


def check_database(database, journal):
    """Check that the database has every event of the journal, and every step once."""
    store = Store.open(database)
    reader = JournalReader(journal)
    for stream in reader.streams("r"):
        assert store.watermark(stream) == sum(len(run.payloads) for run in reader.tail(stream).poll_runs())
    records = store.catalogue.records
    [run] = [run for each in records.experiments() for run in store.catalogue.runs_of(each.id)]
    [loss] = [each for each in store.series.names(run.id) if each.name == "train/loss"]
    assert loss.n == sum(isinstance(each, StepEnd) for each in read_events(journal))
    store.close()
