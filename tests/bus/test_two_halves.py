"""Adapters with two halves: one inline, one that a courier delivers to; and what the bus does with who is followed."""

import sys
from pathlib import Path
from typing import ClassVar

import pytest

from evsys_bus import (
    Callback,
    CallbackSpec,
    Checkpoint,
    Event,
    EventBus,
    LoopState,
    ManifestRow,
    Sink,
    StepEnd,
    TrainingBatch,
    build_callbacks,
    follow,
    register_callback,
)
from evsys_bus.codec import decode
from evsys_bus.errors import SettingError
from evsys_bus.journal import JournalReader
from evsys_bus.testing import FailingSink, RecordingSink

HALVES = """
from pathlib import Path
from evsys_bus import Callback, Sink, register_callback


class Half(Sink):
    def __init__(self, folder):
        self.path = Path(folder, "delivered")

    async def write(self, batch):
        with self.path.open("a") as file:
            file.writelines(f"{each.event.row.name}\\n" for each in batch if type(each.event).__name__ == "Checkpoint")


@register_callback("two_halves", replace=True)
class Two(Callback):
    delivery = Half

    def __init__(self, folder):
        self.path = Path(folder, "inline")

    def on_checkpoint(self, state, row):
        with self.path.open("a") as file:
            file.write(f"{row.name}\\n")
"""


class Sent(Event, frozen=True):
    name: str
    run: str | None = None


def checkpoint(tmp_path, name="final"):
    return Checkpoint(LoopState(step=1, num_steps=2, output_dir=tmp_path / "run"), ManifestRow(name))


@pytest.mark.parametrize("placement", ["follow", "inline"])
def test_both_halves_get_the_event_wherever_the_second_one_runs(tmp_path, monkeypatch, placement):
    (tmp_path / "halves_of_a_test.py").write_text(HALVES)
    monkeypatch.syspath_prepend(tmp_path)
    import halves_of_a_test  # noqa: F401

    try:
        spec = CallbackSpec("two_halves", {"folder": str(tmp_path)}, placement=placement)
        with EventBus(build_callbacks([spec]), journal=tmp_path / "journal") as bus:
            bus.publish(checkpoint(tmp_path))
            assert (tmp_path / "inline").read_text() == "final\n"
            where = "process" if placement == "follow" else "loop"
            assert bus.health().couriers == {"two_halves": where}
        assert (tmp_path / "delivered").read_text() == "final\n"
        (delivery,) = bus.receipt.deliveries
        assert (delivery.recorded, delivery.delivered, delivery.pending) == (1, 1, 0)
        assert bus.receipt.resume_command is None
    finally:
        del sys.modules["halves_of_a_test"]


def test_what_a_delivery_learns_is_on_record_in_the_couriers_own_stream(tmp_path):
    class Half(Sink):
        async def write(self, batch):
            for each in batch:
                self.publish(Sent(each.event.row.name, each.run))

    @register_callback("learns_in_a_test", replace=True)
    class Two(Callback):
        delivery: ClassVar = Half

    with EventBus(build_callbacks([CallbackSpec("learns_in_a_test")]), journal=tmp_path / "journal") as bus:
        bus.publish(checkpoint(tmp_path))
    reader = JournalReader(tmp_path / "journal")
    (stream,) = reader.streams("c")
    (record,) = reader.read(stream)
    envelope = decode(record.payload)
    assert (envelope.event, envelope.run) == (Sent("final", "run"), "run")


def test_a_live_sink_gets_what_is_published_and_the_receipt_counts_it(tmp_path):
    sink = RecordingSink()
    with EventBus(sinks=[sink], journal=tmp_path / "journal") as bus:
        for step in range(5):
            bus.publish(step_end(tmp_path, step))
    assert [each.event.step_idx for each in sink.envelopes] == [0, 1, 2, 3, 4]
    assert [(each.delivered, each.pending) for each in bus.receipt.deliveries] == [(5, 0)]


async def test_leaving_an_async_bus_waits_for_deliveries_without_holding_up_the_loop(tmp_path):
    sink = RecordingSink()
    async with EventBus([follow(Callback(), "quiet")], sinks=[sink], journal=tmp_path / "journal") as bus:
        bus.publish(step_end(tmp_path, 0))
    assert len(sink.envelopes) == 1
    assert {each.name: each.delivered for each in bus.receipt.deliveries} == {"quiet": 1, "RecordingSink": 1}


def test_a_sink_that_never_returns_costs_the_deadline_and_no_more_and_the_receipt_says_what_is_pending(tmp_path):
    sink = FailingSink(["hang"] * 3)
    with EventBus(sinks=[sink], journal=tmp_path / "journal", drain_timeout=0.3) as bus:
        bus.publish(step_end(tmp_path, 0))
    (delivery,) = bus.receipt.deliveries
    assert (delivery.recorded, delivery.delivered, delivery.pending) == (1, 0, 1)
    assert bus.receipt.resume_command == f"evsys-bus sync {tmp_path / 'journal'}"
    assert bus.receipt.seconds < 1.3


def test_without_a_journal_followers_get_one_that_goes_when_all_is_delivered(tmp_path):
    sink = RecordingSink()
    with EventBus(sinks=[sink]) as bus:
        bus.publish(step_end(tmp_path, 0))
        directory = Path(bus.health().journal.directory)
        assert directory.is_dir()
    assert len(sink.envelopes) == 1
    assert not directory.exists()


def test_without_a_journal_what_is_pending_stays_where_the_receipt_says(tmp_path):
    with EventBus(sinks=[FailingSink(["hang"])], drain_timeout=0.1) as bus:
        bus.publish(step_end(tmp_path, 0))
    assert sum(1 for stream in JournalReader(bus.receipt.journal).streams()) == 1
    assert bus.receipt.journal in bus.receipt.resume_command


def test_two_of_one_name_are_refused(tmp_path):
    with pytest.raises(SettingError, match="RecordingSink"):
        EventBus(sinks=[RecordingSink(), RecordingSink()])


def test_a_required_sink_that_is_parked_stops_the_run(tmp_path):
    from evsys_bus.errors import ParkedError

    sink = FailingSink([ParkedError("who are you?", fix="give a key")] * 100)
    state = LoopState(step=0, num_steps=2, output_dir=tmp_path / "run")
    with EventBus(
        [follow(sink, "needed", required=True)],
        journal=tmp_path / "journal",
        drain_timeout=0.1,
        blocked_hook_seconds=0.2,
    ) as bus:
        step = 0
        while not state.stop_requested:
            bus.publish(StepEnd(state, step, TrainingBatch(), {}))
            step += 1
    assert '"needed" is required' in state.stop_reason
    assert "who are you?" in state.stop_reason
    assert state.stopped_early


def step_end(tmp_path, step):
    return StepEnd(LoopState(step=step, num_steps=9, output_dir=tmp_path / "run"), step, TrainingBatch(), {"loss": 0.5})
