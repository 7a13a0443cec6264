"""A receiver that gives on what was chosen: what it says of a batch, also of one that was cut off."""

import asyncio

from evsys_bus import Callback, Envelope, Eval, LoopState, StepEnd, TrainingBatch
from evsys_bus.cli.replay import FilteredReceiver
from evsys_bus.sink import BatchResult, Sink


def batch(*kinds: type) -> list[Envelope]:
    state = LoopState(0, 9, "run")
    events = [
        StepEnd(state, at, TrainingBatch(), {}) if kind is StepEnd else Eval(state, at, "val", {})
        for at, kind in enumerate(kinds)
    ]
    return [Envelope("r0-x", at, 1.0, event, "run") for at, event in enumerate(events, start=1)]


class Slow(Sink):
    """Does not end before it is cancelled; then it has taken all, or is cut off."""

    def __init__(self, *, finishes: bool) -> None:
        self.finishes = finishes
        self.begun = asyncio.Event()

    async def write(self, batch):
        self.begun.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            if not self.finishes:
                raise
            return len(batch)


async def cut_off(events: FilteredReceiver, sink: Slow, given: list[Envelope]) -> BatchResult | None:
    await events.open(lambda _: None)
    taking = asyncio.ensure_future(events.deliver(given, [1] * len(given)))
    await sink.begun.wait()
    taking.cancel()
    await asyncio.wait([taking])
    known = events.interrupted_result()
    await events.close()
    return known


async def test_of_a_batch_that_was_cut_off_what_the_sink_took_is_counted_and_what_stood_between():
    sink = Slow(finishes=True)
    events = FilteredReceiver(sink, types=frozenset({"eval"}))
    assert await cut_off(events, sink, batch(StepEnd, Eval, StepEnd, Eval, StepEnd)) == BatchResult(5)
    assert (dict(events.sent), events.skipped, events.last_sequences) == ({"eval": 2}, 3, {"r0-x": 5})


async def test_of_a_write_that_was_cut_off_nothing_is_counted():
    sink = Slow(finishes=False)
    events = FilteredReceiver(sink, types=frozenset({"eval"}))
    assert await cut_off(events, sink, batch(StepEnd, Eval)) is None
    assert (dict(events.sent), events.processed) == ({}, 0)


async def test_a_wait_for_the_next_event_that_was_cut_off_counts_no_event_twice():
    class Sees(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            pass

    clock = [0.0]
    events = FilteredReceiver(Sees(), speed=1.0, monotonic=lambda: clock[0])
    await events.open(lambda _: None)
    first, second = batch(StepEnd), [Envelope("r0-x", 2, 99.0, batch(StepEnd)[0].event, "run")]
    assert await events.deliver(first, [1]) == BatchResult(1)
    taking = asyncio.ensure_future(events.deliver(second, [1]))
    while not events.is_waiting:
        await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait([taking])
    assert (events.interrupted_result(), events.processed) == (None, 1)
    await events.close()
