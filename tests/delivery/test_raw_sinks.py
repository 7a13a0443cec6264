"""Raw sinks: what they are given, and that their cursors, counts and dead letters are those of any other sink."""

import asyncio
import base64
import subprocess
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest

from evsys_bus import (
    BatchResult,
    BatchTooLargeError,
    EventBus,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    LogContext,
    LoopArtifacts,
    ParkedError,
    RawRecord,
    RejectedError,
    RunStart,
    Sink,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
    register_sink,
)
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import BrokenAdapterError, SinkMethodError
from evsys_bus.events import Envelope
from evsys_bus.journal import CursorStore, JournalReader, JournalWriter
from support.couriers import counted, deliver, read_dead_letters, read_status
from support.journals import read_records
from support.programs import EVSYS_BUS
from support.steps import state_of, step_end
from support.waiting import wait_until_async


class Decoded(Sink):
    """A sink that takes everything but what ``act`` makes of a batch, given the sequences."""

    def __init__(self, act=lambda sequences: None):
        self.act = act
        self.batches = []

    @property
    def items(self):
        return [each for batch in self.batches for each in batch]

    @property
    def identities(self):
        return [(each.stream, self.sequence_of(each)) for each in self.items]

    @staticmethod
    def sequence_of(item):
        return item.seq

    async def write(self, batch):
        result = self.act([self.sequence_of(each) for each in batch])
        self.batches.append(list(batch))
        return result


class Raw(Decoded):
    """The same, of records."""

    raw: ClassVar[bool] = True

    @staticmethod
    def sequence_of(item):
        return item.sequence


def record_experiment(journal, rank=0, *, ended=True, steps=40):
    """Record one run of an experiment in a stream of several segments."""
    writer = JournalWriter(journal, rank=rank, segment_bytes=3000).open()
    context, state = LogContext(output_dir=Path("/out"), run_key="run"), state_of("/out", num_steps=steps)

    def encoded(event, run="run"):
        return encode(Envelope(writer.stream, writer.next_sequence, 1.0, event, run, rank))

    writer.append(encoded(ExperimentStart(context), None), essential=True)
    writer.append(encoded(RunStart(context)), essential=True)
    writer.append(encoded(TrainStart(state)), essential=True)
    for step in range(steps):
        state.step = step
        writer.append(encoded(StepEnd(state, step, TrainingBatch(), {"loss": 1 / (step + 1)})))
    if ended:
        writer.append(encoded(TrainEnd(state, LoopArtifacts())))
        writer.append(encoded(ExperimentEnd(context, ExperimentResult("exp")), None), essential=True)
    writer.close()
    return writer.stream


def record_bytes(journal, *payloads):
    writer = JournalWriter(journal).open()
    for payload in payloads:
        writer.append(payload)
    writer.close()


def remove_segments(journal, count):
    segments = sorted(Path(journal).glob("r0-*/*.seg"))
    assert len(segments) > count + 1
    for segment in segments[:count]:
        segment.unlink()


async def deliver_both(journal, act=lambda sequences: None):
    """Deliver the journal to a decoded and to a raw sink; return both, with their couriers."""
    decoded, raw = Decoded(act), Raw(act)
    return [(sink, await deliver(journal, sink, name=name)) for sink, name in ((decoded, "decoded"), (raw, "raw"))]


async def test_a_raw_sink_is_given_each_record_of_the_journal_byte_for_byte_and_in_order(journal):
    streams = [record_experiment(journal, rank) for rank in range(2)]
    sink = Raw()
    await deliver(journal, sink)
    for stream in streams:
        records = [each for each in sink.items if each.stream == stream]
        assert records == [RawRecord(stream, *record) for record in JournalReader(journal).read(stream)]
        assert all(type(each) is RawRecord and type(each.payload) is bytes for each in records)
    assert len(sink.items) == len(read_records(journal))


async def test_nothing_on_the_way_decodes_a_record(journal):
    payloads = [b"no envelope", b"", bytes(range(256))]
    record_bytes(journal, *payloads)
    sink = Raw()
    courier = await deliver(journal, sink)
    assert [each.payload for each in sink.items] == payloads
    assert counted(courier) == (3, 0, 0)


@pytest.mark.parametrize(
    "act",
    [
        lambda sequences: None,
        lambda sequences: max(1, len(sequences) // 3),
        lambda sequences: BatchResult(
            sum(each % 7 != 0 for each in sequences),
            {index: f"not {each}" for index, each in enumerate(sequences) if each % 7 == 0},
        ),
    ],
    ids=["all", "a part of each batch", "some rejected"],
)
async def test_cursor_counts_and_dead_letters_are_those_of_a_decoded_sink(journal, act):
    for rank in range(3):
        record_experiment(journal, rank)
    (decoded, decoded_courier), (raw, raw_courier) = await deliver_both(journal, act)
    cursors = [CursorStore(str(journal)).load(name) for name in ("decoded", "raw")]
    assert cursors[0].streams
    assert cursors[0] == cursors[1]
    assert counted(decoded_courier) == counted(raw_courier)
    statuses = [read_status(journal, name) for name in ("decoded", "raw")]
    for field in ("recorded", "delivered", "dead", "pending", "state", "error", "hook_failures", "task_failures"):
        assert getattr(statuses[0], field) == getattr(statuses[1], field), field
    letters = [
        [{key: value for key, value in each.items() if key != "at"} for each in read_dead_letters(journal, name)]
        if statuses[0].dead
        else []
        for name in ("decoded", "raw")
    ]
    assert letters[0] == letters[1]
    assert len(letters[1]) == statuses[1].dead
    assert set(decoded.identities) == set(raw.identities)


async def test_while_a_training_is_open_its_position_and_counts_are_those_of_a_decoded_sink(journal):
    stream = record_experiment(journal, ended=False)
    await deliver_both(journal)
    decoded, raw = (CursorStore(str(journal)).load(name) for name in ("decoded", "raw"))
    assert decoded.streams == raw.streams
    assert raw.position(stream).sequence == 43
    assert decoded.steps == {"run": 39}
    assert raw.steps == {}  # steps are in the events, which a raw sink is given undecoded


async def test_a_second_courier_goes_on_behind_the_last_record(journal):
    record_experiment(journal, ended=False)
    first, second = Raw(), Raw()
    await deliver(journal, first)
    record_experiment(journal, steps=5)
    await deliver(journal, second)
    assert [*first.identities, *second.identities] == [*dict.fromkeys([*first.identities, *second.identities])]
    assert len(first.items) + len(second.items) == len(read_records(journal))


async def test_start_events_whose_segments_were_removed_come_first_and_are_not_counted(journal):
    record_experiment(journal, ended=False)
    remove_segments(journal, 2)
    (decoded, decoded_courier), (raw, raw_courier) = await deliver_both(journal)
    assert [sequence for _, sequence in raw.identities[:3]] == [1, 2, 3]
    assert raw.identities == decoded.identities
    assert counted(raw_courier) == counted(decoded_courier) == (len(raw.items) - 3, 0, 0)


async def test_a_batch_has_no_more_records_and_bytes_than_the_sink_takes(journal):
    record_bytes(journal, *[b"x" * 100] * 10, b"y" * 1000, *[b"x" * 100] * 3)
    sink = Raw()
    sink.max_batch_events, sink.max_batch_bytes = 4, 350
    await deliver(journal, sink)
    assert [[len(each.payload) for each in batch] for batch in sink.batches] == [
        *[[100] * 3] * 3,
        [100],
        [1000],
        [100] * 3,
    ]


async def test_in_slices_a_raw_sink_gets_everything_too(journal):
    record_experiment(journal)
    sink = Raw()
    await deliver(journal, sink, slice_seconds=1e-9)
    assert [sequence for _, sequence in sink.identities] == [*range(1, 46)]


async def test_a_record_that_is_too_large_for_the_destination_is_found_and_becomes_a_dead_letter(journal):
    record_bytes(journal, *[b"small"] * 5, b"no envelope, and far too large", *[b"small"] * 5)

    class Narrow(Raw):
        async def write(self, batch):
            if any(len(each.payload) > 10 for each in batch):
                raise BatchTooLargeError("too large")
            return await super().write(batch)

    sink = Narrow()
    courier = await deliver(journal, sink)
    assert counted(courier) == (10, 1, 0)
    [letter] = read_dead_letters(journal)
    assert (letter["seq"], base64.b64decode(letter["bytes"])) == (6, b"no envelope, and far too large")
    assert "too large" in letter["why"]


async def test_a_rejected_record_is_a_dead_letter_that_people_can_read(journal):
    record_experiment(journal)

    class Refuses(Raw):
        async def write(self, batch):
            raise RejectedError({index: "no" for index, each in enumerate(batch) if each.sequence == 4})

    courier = await deliver(journal, Refuses())
    assert counted(courier) == (44, 1, 0)
    [letter] = read_dead_letters(journal)
    assert letter["event"]["event"]["metrics"] == {"loss": 1.0}


async def test_a_raw_sink_is_parked_like_any_other(journal):
    record_experiment(journal)

    class NoKey(Raw):
        async def write(self, batch):
            raise ParkedError("no key", fix="export KEY=...")

    courier = Courier(journal, "it", NoKey(), DeliveryPolicy(ranks=None))
    running = asyncio.create_task(courier.run())
    await wait_until_async(lambda: [each.state for each in read_progress(journal)] == ["parked"])
    courier.stop()
    await running
    assert (read_status(journal).fix, read_status(journal).pending) == ("export KEY=...", 45)


def test_a_bus_delivers_to_a_raw_sink_and_counts_it_in_its_receipt(tmp_path):
    sink = Raw()
    with EventBus(sinks=[sink], journal=tmp_path / "journal") as bus:
        for step in range(100):
            bus.publish(step_end(tmp_path, step))
    [delivery] = bus.receipt.deliveries
    assert (delivery.recorded, delivery.delivered, delivery.dead, delivery.pending) == (100, 100, 0, 0)
    assert [(each.sequence, each.payload) for each in sink.items] == read_records(tmp_path / "journal")


PLUGIN = '''
    """A raw sink that writes the records it is given into a file, and ends its process now and then."""
    import os, signal
    from pathlib import Path
    from typing import ClassVar
    from evsys_bus import Event, Sink, register_sink

    HERE = Path(__file__).parent

    class Tick(Event, frozen=True):
        number: int

    @register_sink("relay")
    class Relay(Sink):
        raw: ClassVar[bool] = True
        max_batch_events = 7

        async def write(self, batch):
            with (HERE / "forwarded").open("a") as file:
                file.writelines(f"{each.stream} {each.sequence} {each.payload.hex()}\\n" for each in batch)
            for number in (3, 40, 77):
                mark = HERE / f"killed_{number}"
                if any(each.sequence == number for each in batch) and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
'''
PROGRAM = """
    from plugin import Tick
    from evsys_bus import EventBus, build_callbacks

    with EventBus(build_callbacks([{"kind": "relay"}]), journal="journal", drain_timeout=19) as bus:
        for number in range(100):
            bus.publish(Tick(number))
    for each in bus.receipt.deliveries:
        print(each.name, each.recorded, each.delivered, each.dead, each.pending)
"""


def test_no_record_is_lost_where_the_courier_is_killed(tmp_path, program):
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN))
    out, errors = program(PROGRAM).communicate(timeout=20)
    assert out.split() == ["relay", "100", "100", "0", "0"], errors
    lines = [line.split() for line in (tmp_path / "forwarded").read_text().splitlines()]
    forwarded = {int(sequence): bytes.fromhex(payload) for _, sequence, payload in lines}
    assert [*forwarded.items()] == read_records(tmp_path / "journal")  # in order, and what came twice was the same
    assert len(lines) > 100
    assert len(list(tmp_path.glob("killed_*"))) == 3


def test_a_raw_sink_that_reopens_runs_is_refused_with_the_fix():
    class Reopens(Raw):
        def resume_runs(self, starts): ...

    with pytest.raises(SinkMethodError, match="Reopens has resume_runs") as caught:
        EventBus(sinks=[Reopens()])
    assert "raw" in caught.value.fix
    with pytest.raises(BrokenAdapterError, match="resume_runs"):
        register_sink("reopens")(Reopens)


@pytest.mark.parametrize("value", ["yes", 1, None, property(lambda self: True), lambda self: True])
def test_raw_is_true_or_false(value):
    odd = type("Odd", (Decoded,), {"raw": value})
    with pytest.raises(SinkMethodError, match=r"Odd\.raw is") as caught:
        EventBus(sinks=[odd()])
    assert "raw: ClassVar[bool] = True" in caught.value.fix


def test_a_sink_is_not_made_raw_by_an_object_of_its_class():
    sink = Decoded()
    sink.raw = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SinkMethodError, match=r"Decoded\.raw is"):
        EventBus(sinks=[sink])


@pytest.mark.parametrize("options", [[], ["--type", "step_end"], ["--run", "run"]])
def test_a_replay_which_selects_events_by_decoding_them_refuses_a_raw_sink_with_the_fix(tmp_path, journal, options):
    record_experiment(journal)
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN))
    command = [EVSYS_BUS, "replay", journal, "--to", "relay", "--plugin", "plugin", *options]
    ended = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2
    assert "EB205" in ended.stderr
    assert "evsys-bus follow" in ended.stderr
    assert not (tmp_path / "forwarded").exists()


def test_specs_build_raw_sinks(tmp_path):
    @register_sink("raw_by_spec", replace=True)
    class BySpec(Raw):
        def __init__(self):
            super().__init__()

    with EventBus(build_callbacks([{"kind": "raw_by_spec"}]), journal=tmp_path, couriers="thread") as bus:
        bus.publish(step_end(tmp_path))
    assert [each.delivered for each in bus.receipt.deliveries] == [1]
