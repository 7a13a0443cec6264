"""What couriers record about their deliveries, and about the times of hooks: on change, seldom, and never in a loop."""

import os
import subprocess
import sys
import time

import pytest

from evsys_bus import Callback, EventBus, LoopState, Sink, StepEnd, TrainingBatch, TrainStart
from evsys_bus.adapter import DeliveryChanged, HookTimes
from evsys_bus.bus import HookHealth
from evsys_bus.delivery.status_recorder import StatusRecorder, write_hook_times
from evsys_bus.errors import ParkedError
from evsys_bus.journal import OsDisk
from evsys_bus.tasks import DeliveryStatus
from support.dashboard_server import DashboardServer
from support.journals import read_events
from support.programs import EVSYS_BUS
from support.waiting import wait_until


class Observed:
    """A courier as the recorder sees it."""

    name = "csv"

    def __init__(self):
        self.handled, self.pending, self.last_status = 0, 0, DeliveryStatus(state="idle", pid=7)

    @property
    def counts(self):
        return DeliveryStatus("csv", recorded=self.handled + self.pending, delivered=self.handled, pending=self.pending)


class Recording:
    """A recorder on a clock that the test moves, and what it has recorded."""

    def __init__(self, directory):
        self.now, self.events, self.courier = 0.0, [], Observed()
        self.recorder = StatusRecorder(str(directory), self.events.append, OsDisk(), monotonic=lambda: self.now)

    def after(self, seconds, **options):
        self.now += seconds
        recorded = len(self.events)
        self.recorder.record([self.courier], **options)
        return [each.status if isinstance(each, DeliveryChanged) else each for each in self.events[recorded:]]


@pytest.fixture
def recording(tmp_path):
    (tmp_path / "couriers").mkdir()
    return Recording(tmp_path)


def test_a_status_is_recorded_with_its_counts_and_without_defaults(recording):
    recording.courier.handled = 3
    assert recording.after(5) == [{"name": "csv", "state": "idle", "pid": 7, "recorded": 3, "delivered": 3}]


def test_a_short_run_records_nothing(recording):
    assert recording.after(4.9) == []
    assert recording.after(0, final=True) == []


def test_a_new_problem_is_recorded_within_five_seconds_and_what_is_the_same_is_not(recording):
    recording.after(5)
    recording.courier.last_status = DeliveryStatus(state="parked", error="no key", attempts=1)
    assert recording.after(1) == []
    assert [each["state"] for each in recording.after(4)] == ["parked"]
    recording.courier.last_status = DeliveryStatus(state="parked", error="no key", attempts=2)
    assert [recording.after(5) for _ in range(100)] == [[]] * 100


def test_counts_alone_are_recorded_every_half_a_minute(recording):
    recorded = []
    for handled in range(60):
        recording.courier.handled = handled
        recording.courier.last_status = DeliveryStatus(state="idle" if handled % 2 else "delivering")
        recorded += recording.after(5)
    assert len(recorded) == 10


def test_a_month_of_training_adds_a_few_thousand_records(recording):
    recorded = 0
    for handled in range(30 * 86_400 // 5):
        recording.courier.handled = handled
        recorded += len(recording.after(5))
    assert 1000 < recorded < 5000


def test_what_piles_up_behind_an_adapter_that_is_stuck_is_recorded(recording):
    recording.courier.last_status = DeliveryStatus(state="parked", error="no key")
    recording.after(5)
    recording.courier.pending = 100
    assert [each["pending"] for each in recording.after(30)] == [100]


def test_the_last_status_is_recorded_at_the_end(recording):
    recording.after(5)
    recording.courier.last_status = DeliveryStatus(state="ended")
    assert [each["state"] for each in recording.after(0.1, final=True)] == ["ended"]


def test_the_times_of_hooks_are_copied_while_they_change(recording, tmp_path):
    hook = HookHealth("Csv", "on_step_end", 10, 0, 0, 0.001, 0.002)
    write_hook_times(OsDisk(), str(tmp_path), 0, [hook])
    recording.after(5)
    assert [recording.after(30) for _ in range(10)] == [[]] * 10
    [times] = [each for each in recording.events if isinstance(each, HookTimes)]
    assert (times.rank, times.hooks[0]["hook"], times.hooks[0]["mean_seconds"]) == (0, "on_step_end", 0.001)


def test_a_folder_that_is_gone_ends_nothing(recording, tmp_path, caplog):
    (tmp_path / "couriers").rmdir()
    recording.after(5)
    (tmp_path / "couriers").write_text("")
    recording.after(30)


class Parked(Sink):
    async def write(self, batch):
        raise ParkedError("no key", fix="set one")


class Counting(Callback):
    def on_step_end(self, *_):
        pass


PROGRAM = """
import sys, time
from evsys_adapters import CsvMetricsCallback, EvsysLoggerCallback
from evsys_bus import Callback, EventBus, LoopState, StepEnd, TrainingBatch, TrainStart

class Counting(Callback):
    def on_step_end(self, *_):
        pass

folder, seconds = sys.argv[1], float(sys.argv[2])
csv = CsvMetricsCallback(folder + "/metrics.csv")
csv.placement = "follow"
with EventBus([Counting(), EvsysLoggerCallback(), csv], journal=folder + "/journal") as bus:
    state = LoopState(0, 10, folder + "/run")
    bus.publish(TrainStart(state))
    for step in range(10):
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
    time.sleep(seconds)
"""


@pytest.mark.long
@pytest.mark.timeout(60)
def test_an_idle_program_records_each_status_once_also_while_a_dashboard_gets_these_records(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for name in [each for each in os.environ if each.startswith("EVSYS_")]:
        monkeypatch.delenv(name)
    with DashboardServer() as server:
        server.publish_state()
        program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), "29"])
        time.sleep(25)
        events = read_events(tmp_path / "journal", family="c")
        received = [each.event for each in server.events("c")]
        program.wait()
    statuses = [each for each in events if isinstance(each, DeliveryChanged)]
    assert sorted(each.adapter for each in statuses) == ["csv_metrics", "evsys_logger"], events
    assert {each.status["delivered"] for each in statuses} == {11}
    [times] = [each for each in events if isinstance(each, HookTimes)]
    assert {each["hook"]: each["calls"] for each in times.hooks if each["callback"] == "Counting"} == {
        "on_step_end": 10
    }
    assert received == events
    done = subprocess.run([EVSYS_BUS, "tail", str(tmp_path / "journal")], capture_output=True, text=True, check=True)
    assert "delivery_changed" not in done.stdout
    asked = [EVSYS_BUS, "tail", str(tmp_path / "journal"), "--type", "run.delivery_changed"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.count("delivery_changed") >= 2


@pytest.mark.long
def test_couriers_on_threads_record_too(tmp_path):
    journal = tmp_path / "journal"

    def statuses():
        return [each for each in read_events(journal, family="c") if isinstance(each, DeliveryChanged)]

    with EventBus([Counting()], sinks=[Parked()], couriers="thread", journal=journal, drain_timeout=0.1) as bus:
        state = LoopState(0, 10, tmp_path / "run")
        bus.publish(TrainStart(state))
        bus.publish(StepEnd(state, 0, TrainingBatch(), {}))
        wait_until(statuses)
    first = statuses()[0]
    assert (first.adapter, first.status["state"], first.status["pending"]) == ("Parked", "parked", 2)
    assert first.status["fix"] == "set one"
