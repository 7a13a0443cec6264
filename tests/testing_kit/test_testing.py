"""The callbacks and sinks for tests: they keep what they get, wait for it, and fail by plan."""

import asyncio
import threading

import pytest

from evsys_bus import Callback
from evsys_bus.events import Envelope, UnknownEvent, declared_events
from evsys_bus.testing import FailingCallback, FailingSink, RecordingCallback, RecordingSink
from evsys_bus.testing.timeline import Timeline, minimal_events


def envelopes(*numbers):
    return [Envelope("s", each, 0.0, UnknownEvent("tick", {})) for each in numbers]


def call(callback, events):
    for event in events:
        values = {name: getattr(event, name) for name in event.__struct_fields__}
        named = {name: values.pop(name) for name in event.keywords}
        getattr(callback, event.hook)(*values.values(), **named)


def test_a_recording_callback_keeps_every_event_as_it_was_published(tmp_path):
    callback, events = RecordingCallback(), [*Timeline(tmp_path).all_events(facts=True)]
    call(callback, events)
    assert callback.events == events
    assert {event.__name__ for event in declared_events().values() if event.__module__ == "evsys_bus.events"} == {
        type(event).__name__ for event in callback.events
    }
    assert {each for each in dir(Callback) if each.startswith("on_")} == set(callback.hooks)


def test_metrics_are_kept_as_they_were_then(tmp_path):
    callback, metrics = RecordingCallback(), {"loss": 1.0}
    callback.on_step_end(None, 0, None, metrics)
    metrics["loss"] = 2.0
    assert callback.events[0].metrics == {"loss": 1.0}


@pytest.mark.parametrize("kept", [RecordingCallback, RecordingSink])
async def test_until_waits_for_what_comes_on_another_thread_and_says_how_much_came(kept):
    one = kept()

    def deliver():
        if isinstance(one, RecordingSink):
            asyncio.run(one.write(envelopes(1, 2)))
        else:
            one.on_group_start(None, "a")
            one.on_group_start(None, "b")

    thread = threading.Thread(target=deliver)
    waiting = asyncio.ensure_future(one.until(2))
    await asyncio.sleep(0)
    thread.start()
    await waiting
    thread.join()
    await one.until(1)
    with pytest.raises(TimeoutError, match="2 of 3 events came within"):
        await one.until(3, timeout=0.01)


async def test_a_recording_sink_counts_what_is_asked_of_it():
    sink = RecordingSink()
    await sink.open()
    await sink.write(envelopes(1))
    await sink.write(envelopes(2, 3))
    await sink.close()
    assert [len(each) for each in sink.batches] == [1, 2]
    assert [each.seq for each in sink.envelopes] == [1, 2, 3]
    assert (sink.opened, sink.closed) == (1, 1)


def test_a_failing_callback_fails_in_whatever_hook_is_called_and_keeps_the_rest(tmp_path):
    callback = FailingCallback([None, KeyError("k"), None, asyncio.CancelledError()])
    raised = []
    for event in minimal_events(tmp_path):
        try:
            call(callback, [event])
        except BaseException as error:
            raised.append((event.hook, type(error)))
    assert raised == [("on_group_start", KeyError), ("on_train_start", asyncio.CancelledError)]
    assert callback.calls == 11
    assert len(callback.events) == 9


async def test_a_failing_sink_goes_by_its_plan():
    sink = FailingSink([OSError("away"), 1, "hang", None], opening=[ValueError("shut")])
    with pytest.raises(ValueError, match="shut"):
        await sink.open()
    await sink.open()
    with pytest.raises(OSError, match="away"):
        await sink.write(envelopes(1, 2))
    assert await sink.write(envelopes(1, 2)) == 1
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await sink.write(envelopes(2))
    assert await sink.write(envelopes(2)) is None
    assert await sink.write(envelopes(3)) is None
    assert [each.seq for each in sink.envelopes] == [1, 2, 3]
    assert (sink.calls, sink.cancellations, sink.opened) == (5, 1, 1)


async def test_a_deaf_write_outlives_cancellation_until_it_is_released():
    sink = FailingSink(["deaf"])
    task = asyncio.ensure_future(sink.write(envelopes(1)))
    for _ in range(3):
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=0.02)
    assert not task.done()
    assert sink.cancellations == 3
    sink.release()
    await asyncio.wait_for(task, 5)
