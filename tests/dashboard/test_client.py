"""evsys_logger and a dashboard: which one is found, what reaches it, and what kills and outages cost."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from operator import methodcaller
from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from evsys_adapters import EvsysLoggerCallback
from evsys_adapters.evsys_api.dashboard import DashboardDelivery, is_local
from evsys_adapters.evsys_api.delivery import EvsysSink
from evsys_bus import Callback, EventBus, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart, build_callbacks
from evsys_bus.adapter import RunAnnotated
from evsys_bus.context import LoopArtifacts
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import RetryLaterError
from evsys_bus.journal import JournalWriter
from evsys_bus.tasks import run_in_new_loop
from support.dashboard_server import DashboardServer
from support.evsys_server import html_response
from support.journals import read_records, read_sequences
from support.programs import EVSYS_BUS, run_evsys_bus
from support.waiting import wait_until


class Annotator(Callback):
    placement = "follow"

    def on_train_start(self, state):
        self.publish(RunAnnotated("run", {"page": "http://x"}))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without EvSys settings and without a dashboard."""
    for name in [each for each in os.environ if each.startswith("EVSYS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def server(home):
    """A dashboard that runs, and is found by nobody yet."""
    with DashboardServer() as server:
        yield server


@pytest.fixture
def found(server):
    """The dashboard of this user."""
    server.publish_state()
    return server


def train(bus, folder, steps=3, first=0):
    state = LoopState(first, steps, folder)
    bus.publish(TrainStart(state))
    for step in range(first, first + steps):
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": step / 2}))
    bus.publish(TrainEnd(state, LoopArtifacts()))


def record(journal, steps=50):
    """Record a training that nobody delivers."""
    with EventBus([], journal=journal) as bus:
        train(bus, journal.parent / "run", steps)
    return journal


def deliver(journal, **params):
    """Deliver the journal in this process until nothing is pending, and return the status."""
    courier = Courier(journal, "evsys_logger", EvsysSink(**params), DeliveryPolicy(), poll_seconds=0.001)
    courier.finish()
    run_in_new_loop(courier.run)
    return courier.counts


def status(journal):
    [found] = [each for each in read_progress(journal) if each.name == "evsys_logger"]
    return found


def evsys_bus(*arguments):
    """Run the command; returns its exit code, stdout and stderr."""
    done = run_evsys_bus(*arguments)
    return done.returncode, done.stdout, done.stderr


def json_rows(done, kind):
    """The rows of a kind in the JSON that a command has printed."""
    return [row for row in map(json.loads, done[1].splitlines()) if row["type"] == kind]


def has_all(server, journal):
    """Whether the dashboard has the events of the journal, byte for byte."""
    recorded = [record.payload for record in read_records(journal)]
    stored = [each for stream, payloads in server.streams.items() if stream[0] == "r" for each in payloads.values()]
    return sorted(recorded) == sorted(stored)


@pytest.mark.parametrize("is_back", [True, False])
async def test_a_segment_of_a_courier_that_cannot_be_read_is_tried_again_before_it_is_skipped(
    tmp_path, found, caplog, is_back
):
    journal = tmp_path / "run/journal"
    with EventBus([], journal=JournalWriter(journal, family="c", segment_bytes=1_000)) as bus:
        train(bus, tmp_path / "run", 50)
    first, segment, *others = sorted(journal.rglob("*.seg"))
    assert others
    stream = first.parent.name
    moved = segment.rename(tmp_path / "moved")
    segment.mkdir()  # an error of reading, as with too many open files
    delivery = DashboardDelivery(found.url, found.token, journal=str(journal), delivered={}, timeout_seconds=5)
    try:
        for _ in range(3 if is_back else 7):
            with pytest.raises(RetryLaterError, match="cannot be read"):
                await delivery.send_courier_events()
        if is_back:
            segment.rmdir()
            moved.rename(segment)
        await delivery.send_courier_events()
    finally:
        await delivery.close()
    assert max(found.streams[stream]) == 52
    assert (len(found.streams[stream]) == 52) == is_back
    assert ("segment_unreadable" in caplog.text) != is_back


# -- which server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["process", "thread", "loop"])
def test_the_running_dashboard_of_this_user_gets_every_event_as_it_is_recorded(tmp_path, found, place):
    [logger] = build_callbacks([{"kind": "evsys_logger", "placement": "inline" if place == "loop" else "follow"}])
    couriers = "thread" if place == "thread" else "process"
    with EventBus([logger], journal=tmp_path / "journal", couriers=couriers, drain_timeout=15) as bus:
        train(bus, tmp_path / "run", 300)
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert has_all(found, tmp_path / "journal")


def test_a_dashboard_at_the_url_is_told_from_the_hosted_service_and_takes_the_key_as_its_token(
    tmp_path, server, monkeypatch
):
    monkeypatch.setenv("EVSYS_API_KEY", server.token)
    assert deliver(record(tmp_path / "journal"), url=server.url).complete
    assert has_all(server, tmp_path / "journal")


def test_without_a_key_the_token_of_the_running_dashboard_serves_its_own_url(tmp_path, found):
    assert deliver(record(tmp_path / "journal"), url=found.url.replace("127.0.0.1", "localhost")).complete
    assert has_all(found, tmp_path / "journal")


def test_a_wrong_token_parks_it_with_the_fix(tmp_path, server, monkeypatch):
    monkeypatch.setenv("EVSYS_API_KEY", "another")
    monkeypatch.setenv("EVSYS_API_URL", server.url)
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", drain_timeout=2, linger_seconds=0) as bus:
        train(bus, tmp_path / "run")
        wait_until(lambda: status(tmp_path / "journal").state == "parked")
    [delivery] = bus.receipt.deliveries
    assert (delivery.delivered, delivery.pending) == (0, 5)
    assert "evsys-bus dash --status" in delivery.fix


def test_a_dashboard_that_was_started_again_with_another_token_is_found_again(tmp_path, found):
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", drain_timeout=15) as bus:
        train(bus, tmp_path / "first")
        wait_until(lambda: has_all(found, tmp_path / "journal"))
        found.token = "another"
        found.publish_state()
        train(bus, tmp_path / "second")
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert has_all(found, tmp_path / "journal")


@pytest.mark.parametrize(
    ("url", "local"),
    [
        ("http://127.0.0.1:8420", True),
        ("http://[::1]:1", True),
        ("http://localhost", True),
        ("https://evsys.ai", False),
    ],
)
def test_a_server_is_local_if_its_url_is_of_the_loopback_interface(url, local):
    assert is_local(url) is local


# -- no dashboard yet -------------------------------------------------------------------------------------------------


def test_without_a_dashboard_it_waits_with_nothing_pending_and_the_bus_closes_at_once(tmp_path, home):
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
        train(bus, tmp_path / "run")
        wait_until(lambda: (waiting := status(tmp_path / "journal")).state == "waiting" and not waiting.pending)
        waiting = status(tmp_path / "journal")
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert "no dashboard" in waiting.error
    assert (waiting.waiting, waiting.delivered, waiting.last_error, waiting.failures) == (5, 0, None, 0)
    assert (waiting.pending, waiting.owed) == (0, 0)


def test_what_waits_for_a_dashboard_is_not_delivered_and_everything_says_so_with_the_command(tmp_path, home, caplog):
    journal = tmp_path / "journal"
    with caplog.at_level("INFO"), EventBus([EvsysLoggerCallback()], journal=journal) as bus:
        train(bus, tmp_path / "run")
    [delivery] = bus.receipt.deliveries
    command = f"evsys-bus dash --import {journal}"
    assert (delivery.recorded, delivery.delivered, delivery.waiting, delivery.pending) == (5, 0, 5, 0)
    assert (delivery.state, delivery.fix, delivery.complete) == ("waiting", command, False)
    assert bus.receipt.resume_command is None
    for shown in (repr(bus.receipt), str(bus.receipt), methodcaller("_repr_html_")(bus.receipt)):
        assert "everything was delivered" not in shown
        assert "5 waiting" in shown or "waiting</th>" in shown
    assert f"no dashboard is running   fix: {command}" in str(bus.receipt)
    [line] = [each.getMessage() for each in caplog.records if "delivery.waiting" in each.getMessage()]
    assert "evsys_logger=5" in line
    assert command in line
    assert status(journal).waiting == 5
    code, out, err = evsys_bus("status", journal)
    assert "waiting" in out
    assert command in out
    [row] = json_rows(evsys_bus("status", journal, "--json"), "adapter")
    assert (row["state"], row["delivered"], row["waiting"], row["pending"]) == ("waiting", 0, 5, 0)
    code, out, err = evsys_bus("sync", journal)
    assert (code, "waiting 5" in out, command in err) == (0, True, True)


def test_a_killed_courier_forgets_nothing_that_waits(tmp_path, home):
    journal = record(tmp_path / "journal")
    courier = Courier(journal, "evsys_logger", EvsysSink(), DeliveryPolicy(), poll_seconds=0.001)

    async def run_until_committed():
        task = asyncio.create_task(courier.run())
        while not any(each.waiting for each in read_progress(journal)):
            await asyncio.sleep(0.01)
        assert status(journal).delivered == 0
        task.cancel()

    run_in_new_loop(run_until_committed)
    again = deliver(journal)
    assert (again.delivered, again.waiting, again.pending) == (0, 52, 0)


def test_a_temporary_journal_stays_where_its_events_wait_for_a_dashboard(tmp_path, home):
    with EventBus([EvsysLoggerCallback()]) as bus:
        train(bus, tmp_path / "run")
    assert bus.receipt.deliveries[0].waiting == 5
    assert Path(bus.receipt.journal).is_dir()
    shutil.rmtree(bus.receipt.journal)


def test_offline_events_do_not_count_as_delivered(tmp_path, home, monkeypatch):
    monkeypatch.setenv("EVSYS_OFFLINE", "1")
    journal = record(tmp_path / "journal")
    counts = deliver(journal)
    assert (counts.delivered, counts.waiting, counts.pending) == (0, 52, 0)
    assert f"evsys-bus replay {journal} --to evsys_logger" in status(journal).fix


def test_what_waits_is_delivered_at_the_end_if_a_dashboard_is_there_then(tmp_path, server):
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", drain_timeout=15) as bus:
        train(bus, tmp_path / "run", 20)
        wait_until(lambda: status(tmp_path / "journal").waiting == 22)
        server.publish_state()
    [delivery] = bus.receipt.deliveries
    assert (delivery.delivered, delivery.waiting, delivery.complete) == (22, 0, True)
    assert has_all(server, tmp_path / "journal")


def test_sync_delivers_what_waits_once_there_is_a_dashboard(tmp_path, server):
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
        train(bus, tmp_path / "run", 20)
    assert bus.receipt.deliveries[0].waiting == 22
    server.publish_state()
    code, out, err = evsys_bus("sync", tmp_path / "journal")
    assert (code, "sent 22" in out) == (0, True), (out, err)
    assert (status(tmp_path / "journal").waiting, status(tmp_path / "journal").complete) == (0, True)
    assert has_all(server, tmp_path / "journal")


def test_a_dashboard_that_comes_later_imports_what_it_missed_even_if_nothing_more_is_published(tmp_path, server):
    server.import_steps = 3
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
        train(bus, tmp_path / "first", 20)
        wait_until(lambda: status(tmp_path / "journal").state == "waiting")
        server.publish_state()
        wait_until(lambda: has_all(server, tmp_path / "journal"))
        wait_until(lambda: status(tmp_path / "journal").state == "idle")
        train(bus, tmp_path / "second", 20)
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert has_all(server, tmp_path / "journal")
    assert len(server.imports) == 1


def test_a_later_process_lets_the_dashboard_import_what_was_acknowledged_while_there_was_none(tmp_path, server):
    journal = record(tmp_path / "journal")
    assert deliver(journal).waiting == 52
    server.publish_state()
    record(journal, 5)
    assert deliver(journal).complete
    assert has_all(server, journal)


@pytest.mark.long
def test_a_replay_without_a_dashboard_does_not_count_as_delivered(tmp_path, server):
    journal = record(tmp_path / "journal", 5)
    command = [EVSYS_BUS, "replay", str(journal), "--to", "evsys_logger"]
    assert subprocess.run(command, capture_output=True, check=False).returncode
    server.publish_state()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert [each.seq for each in server.events()] == read_sequences(journal)


# -- a dashboard with another database, kills and outages -------------------------------------------------------------


def test_a_new_database_imports_the_journal_and_delivery_goes_on(tmp_path, found):
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", drain_timeout=15) as bus:
        train(bus, tmp_path / "first", 20)
        wait_until(lambda: has_all(found, tmp_path / "journal"))
        found.reset()
        train(bus, tmp_path / "second", 20)
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert has_all(found, tmp_path / "journal")
    assert len(found.imports) == 1


def test_a_new_database_has_the_streams_too_that_get_no_more_events(tmp_path, found):
    journal = tmp_path / "journal"
    with EventBus([EvsysLoggerCallback()], journal=journal, drain_timeout=15) as bus:
        train(bus, tmp_path / "first", 20)
        wait_until(lambda: has_all(found, journal))
        found.reset()
        with EventBus([], journal=journal) as other:  # its stream begins behind the change
            train(other, tmp_path / "second", 20)
        wait_until(lambda: has_all(found, journal))
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert len(found.imports) == 1


def test_where_the_dashboard_cannot_read_the_journal_it_is_parked_with_the_command_that_imports_it(tmp_path, found):
    journal = record(tmp_path / "journal")
    assert deliver(journal).complete
    found.reset()
    refusal = JSONResponse({"error": {"message": "no such directory"}}, 404)
    found.fault = lambda path: refusal if "import" in path else None
    with EventBus([EvsysLoggerCallback()], journal=journal, drain_timeout=2, linger_seconds=0) as bus:
        train(bus, tmp_path / "again", 5)
        wait_until(lambda: status(journal).state == "parked")
    [delivery] = bus.receipt.deliveries
    assert delivery.pending == 7
    assert f"evsys-bus dash --import {journal}" in delivery.fix


def test_while_the_disk_of_the_dashboard_is_full_the_status_names_the_reason_and_the_fix(tmp_path, found):
    journal = record(tmp_path / "journal")
    refusal = {"error": {"code": "store", "message": "the disk is full", "fix": "free space on the disk of /data"}}
    found.fault = lambda path: JSONResponse(refusal, 503, {"Retry-After": "1"}) if "ingest" in path else None
    with EventBus([EvsysLoggerCallback()], journal=journal) as bus:
        train(bus, tmp_path / "again", 5)
        wait_until(lambda: status(journal).state == "retrying")
        error = status(journal).last_error
        assert "the disk is full; free space on the disk of /data" in error
        found.fault = None
        wait_until(lambda: has_all(found, journal))


@pytest.mark.parametrize("fault", ["cut", "login_page", 500, 503, 429])
def test_every_request_fails_once_and_every_event_is_there_once(tmp_path, found, fault):
    seen = set()

    def fail_once(path):
        key = path, len(found.bodies)
        if key in seen:
            return None
        seen.add(key)
        answers = {"cut": "cut", "login_page": html_response()}
        return answers.get(fault) or JSONResponse({}, fault, {"Retry-After": "0"})

    found.fault = fail_once
    assert deliver(record(tmp_path / "journal", 3000)).complete
    assert has_all(found, tmp_path / "journal")


def test_a_lost_answer_leads_to_the_same_body_again_and_to_nothing_twice(tmp_path, found):
    lost = set()

    def drop_once(_):
        key = found.bodies[-1]
        return key not in lost and not lost.add(key)

    found.should_drop_reply = drop_once
    assert deliver(record(tmp_path / "journal", 3000)).complete
    assert has_all(found, tmp_path / "journal")
    assert len(found.bodies) == 2 * len(set(found.bodies))


def test_retry_after_is_honoured(tmp_path, found):
    times = []

    def busy(path):
        times.append(time.monotonic())
        return JSONResponse({}, 429, {"Retry-After": "1"}) if len(times) == 1 else None

    found.fault = busy
    assert deliver(record(tmp_path / "journal")).complete
    assert times[1] - times[0] >= 1


def test_a_body_that_is_too_large_is_sent_in_parts(tmp_path, found):
    found.max_bytes = 1200
    assert deliver(record(tmp_path / "journal", 1000)).complete
    assert has_all(found, tmp_path / "journal")


def test_a_body_continues_where_the_last_one_of_its_stream_ended(tmp_path, found):
    deliver(record(tmp_path / "journal", 5000))
    bodies = [body for body in found.bodies if body[0].startswith("r")]
    assert len(bodies) > 2
    assert all(after == first - 1 for _, after, first, _ in bodies)
    assert all(before[3] == after[1] for before, after in pairwise(bodies))


@pytest.mark.long
def test_a_dashboard_that_is_killed_and_comes_back_gets_everything_and_the_loop_never_waits(tmp_path, found):
    took = []
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", drain_timeout=15) as bus:
        state = LoopState(0, 100, tmp_path / "run")
        bus.publish(TrainStart(state))
        for step in range(100):
            if step == 30:
                wait_until(lambda: found.bodies)
                found.stop()
                found.publish_state(pid=_ended_pid())
            if step == 60:
                wait_until(lambda: status(tmp_path / "journal").state == "retrying")
                found.start()
                found.publish_state()
            began = time.perf_counter()
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": step}))
            took.append(time.perf_counter() - began)
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert has_all(found, tmp_path / "journal")
    assert max(took) < 0.25


def _ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


TRAINER = """
import sys, time
from evsys_adapters import EvsysLoggerCallback
from evsys_bus import Callback, EventBus, LoopState, StepEnd, TrainingBatch, TrainStart
folder = sys.argv[1]
with EventBus([EvsysLoggerCallback()], journal=folder + "/journal") as bus:
    state = LoopState(0, 10**6, folder + "/run")
    bus.publish(TrainStart(state))
    print("ready", flush=True)
    for step in range(10**6):
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": step}))
        time.sleep(0.001)
"""


@pytest.mark.long
def test_kills_of_the_program_and_of_its_courier_leave_no_gap_and_nothing_twice(tmp_path, found):
    journal = tmp_path / "journal"
    for _ in range(2):
        program = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE)
        program.stdout.readline()
        bodies = len(found.bodies)
        wait_until(lambda: len(found.bodies) > bodies + 2)  # noqa: B023 # called before the next turn
        os.kill(status(journal).pid, 9)
        bodies = len(found.bodies)
        wait_until(lambda: len(found.bodies) > bodies + 2)  # noqa: B023
        os.kill(program.pid, 9)
        program.wait()
        program.stdout.close()
    wait_until(lambda: not status(journal).busy, 30)
    done = subprocess.run([EVSYS_BUS, "sync", str(journal)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert has_all(found, journal)


# -- what couriers publish --------------------------------------------------------------------------------------------


def test_what_couriers_publish_about_a_run_reaches_the_dashboard(tmp_path, found):
    with EventBus([EvsysLoggerCallback(), Annotator()], journal=tmp_path / "journal") as bus:
        train(bus, tmp_path / "run")
        wait_until(lambda: any(isinstance(each.event, RunAnnotated) for each in found.events("c")))
    [annotated] = [each.event for each in found.events("c") if isinstance(each.event, RunAnnotated)]
    assert annotated.extras == {"page": "http://x"}
