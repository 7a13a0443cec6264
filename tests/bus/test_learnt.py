"""What a follower learns of a run: on record in the couriers' own stream, and in `ctx.extras` of later hooks."""

import threading
import time

import pytest

from evsys_bus import Callback, Envelope, EventBus, RunAnnotated, RunStart, Sink, StepEnd, follow
from evsys_bus.cli import run
from evsys_bus.codec import encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import NotAttachedError
from evsys_bus.events import UnknownEvent
from evsys_bus.journal import JournalWriter
from evsys_bus.tasks import run_in_new_loop
from evsys_bus.testing.timeline import Timeline
from support.journals import read_annotations, read_events

PAGE = {"page": "http://host/wide"}


class Learns(Callback):
    def on_run_start(self, ctx):
        if ctx.run_key == "wide":
            self.publish(RunAnnotated("wide", PAGE))


class LearnsInBatches(Sink):
    async def write(self, batch):
        for each in batch:
            if isinstance(each.event, RunStart) and each.run == "wide":
                self.publish(RunAnnotated("wide", PAGE))


class Sees(Callback):
    """Keeps the extras of each run, as its hooks see them last."""

    def __init__(self):
        self.at_start, self.at_step, self.at_end = {}, {}, {}
        self.stepped = threading.Semaphore(0)

    def on_run_start(self, ctx):
        self.at_start[ctx.run_key] = dict(ctx.extras)

    def on_step_end(self, state, step_idx, batch, metrics):
        self.at_step[state.ctx.run_key] = dict(state.ctx.extras)
        self.stepped.release()

    def on_run_end(self, ctx, run_result, arm):
        self.at_end[ctx.run_key] = dict(ctx.extras)


def publish(bus, events):
    return sum(bus.publish(event) is None for event in events)


def replayed(journal, callback):
    courier = Courier(journal, "replay", callback, DeliveryPolicy(), persistent=False)
    courier.finish()
    run_in_new_loop(courier.run)
    return callback


@pytest.mark.parametrize("learns", [Learns, LearnsInBatches])
def test_it_reaches_the_later_hooks_of_other_followers_and_of_no_other_run(tmp_path, learns):
    timeline, sees = Timeline(tmp_path), Sees()
    with EventBus([follow(sees, "sees"), follow(learns(), "learns")], journal=tmp_path / "journal") as bus:
        published, step, deadline = publish(bus, timeline.start_events()), 0, time.monotonic() + 10
        while sees.at_step.get("wide") != PAGE:
            assert time.monotonic() < deadline
            published += publish(bus, timeline.step_events(step))
            step += 1
            assert all(sees.stepped.acquire(timeout=5) for _ in timeline.contexts)
        published += publish(bus, timeline.end_events())
    assert sees.at_end == {"wide": PAGE, "narrow": {}}
    assert sees.at_step["narrow"] == {}
    assert read_annotations(tmp_path / "journal") == [RunAnnotated("wide", PAGE)]
    assert [(each.recorded, each.delivered) for each in bus.receipt.deliveries] == [(published, published)] * 2


def test_who_comes_on_another_day_has_it_from_the_start_of_the_run(tmp_path):
    with EventBus([follow(Learns(), "learns")], journal=tmp_path / "journal") as bus:
        publish(bus, Timeline(tmp_path).all_events())
    sees = replayed(tmp_path / "journal", Sees())
    assert sees.at_start == sees.at_step == sees.at_end == {"wide": PAGE, "narrow": {}}


def test_what_a_callback_publishes_inline_is_an_event_of_the_bus_and_followers_have_it(tmp_path):
    class Hears(Callback):
        def on_learnt(self, run, extras):
            self.heard = run, extras

    hears = Hears()
    with EventBus([Learns(), hears], journal=tmp_path / "journal") as bus:
        publish(bus, Timeline(tmp_path).all_events())
    assert hears.heard == ("wide", PAGE)
    assert read_events(tmp_path / "journal", family="c") == []
    assert replayed(tmp_path / "journal", Sees()).at_step == {"wide": PAGE, "narrow": {}}


def test_the_newest_counts_and_what_is_not_as_promised_is_passed_over(tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        publish(bus, Timeline(tmp_path).all_events())
    writer = JournalWriter(tmp_path / "journal", family="c").open()
    odd = [UnknownEvent("learnt", {"run": 3, "extras": {}}), UnknownEvent("learnt", {"run": "wide", "extras": None})]
    for event in [
        RunAnnotated("wide", {"page": "old", "more": 1}),
        *odd,
        RunAnnotated("wide", PAGE),
        RunAnnotated("unheard of", PAGE),
    ]:
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 0.0, event)))
    writer.append(b"a learnt record that is no envelope")
    writer.close()
    assert replayed(tmp_path / "journal", Sees()).at_end == {
        "wide": {"page": "http://host/wide", "more": 1},
        "narrow": {},
    }


def test_what_a_follower_wrote_by_itself_stays_its_own(tmp_path):
    class Writes(Sees):
        def on_run_start(self, ctx):
            ctx.extras["page"] = "mine"

    with EventBus([follow(Learns(), "learns")], journal=tmp_path / "journal") as bus:
        publish(bus, Timeline(tmp_path).all_events())
    assert replayed(tmp_path / "journal", Writes()).at_end["wide"] == {"page": "mine"}
    assert replayed(tmp_path / "journal", Sees()).at_end["wide"] == PAGE


def test_without_a_bus_there_is_nowhere_to_publish():
    with pytest.raises(NotAttachedError, match=r"Callback\.publish"):
        Callback().publish(StepEnd(None, 0, None, {}))


def test_tail_tells_it_among_the_events_of_its_run(tmp_path, capsys):
    with EventBus([follow(Learns(), "learns")], journal=tmp_path / "journal") as bus:
        publish(bus, Timeline(tmp_path).all_events())
    for options in (["--type", "learnt"], ["--type", "learnt", "--run", "wide"], ["--since", "1h", "--type", "learnt"]):
        assert run(["tail", str(tmp_path), *options]) == 0
        [line] = capsys.readouterr().out.splitlines()
        assert line.split()[-5:] == ["wide", "learnt", "-", "page", "http://host/wide"]
