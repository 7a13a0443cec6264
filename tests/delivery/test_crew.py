"""`CourierPool`: one thread per courier, and what each of them keeps to itself."""

import os
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from evsys_bus import Callback, Envelope, Eval, LoopState, Sink, StepEnd, TrainingBatch
from evsys_bus.codec import decode, encode
from evsys_bus.delivery.courier_pool import CourierPool, SwitchInterval
from evsys_bus.delivery.subscription import AdapterRef, DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import load_subscriptions, register
from evsys_bus.errors import BrokenAdapterError, RetryLaterError
from evsys_bus.journal import Cursor, CursorStore, JournalReader, JournalWriter, OsDisk, Position, layout
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.testing import SimulatedDisk
from support import ROOT
from support.waiting import wait_until

NOTHING: Callable[[AdapterRef], Callback | Sink] = {}.__getitem__  # builds nothing: all is live


@pytest.fixture
def crew(journal) -> Iterator[Callable[..., CourierPool]]:
    """Start one; what still runs at the end of the test is stopped."""
    started: list[CourierPool] = []

    def start(*followed: Subscription, build=NOTHING, **settings) -> CourierPool:
        started.append(CourierPool(journal, followed, build, poll_seconds=0.005, **settings))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()
        each.join(2.0)


def publish(journal: str, count: int, first: int = 0) -> None:
    writer = JournalWriter(journal).open()
    state = LoopState(step=first, num_steps=count, output_dir="run")
    for step in range(first, first + count):
        event = StepEnd(state, step, TrainingBatch(), {"loss": 0.5})
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 0.0, event, "run")))
    assert writer.close()


def state_of(journal: str, name: str) -> DeliveryStatus:
    return msgspec.json.decode(Path(layout.courier_path(journal, name, "state.json")).read_bytes(), type=DeliveryStatus)


class Steps(Callback):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.threads: set[int] = set()

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps.append(step_idx)
        self.threads.add(threading.get_ident())


class Hangs(Steps):
    """In its first hook, until the test is over."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps.append(step_idx)
        self.over.wait(20)


class Lines(Sink):
    def __init__(self) -> None:
        self.seen: list[int] = []

    async def write(self, batch):
        self.seen += [each.seq for each in batch]


class Away(Sink):
    async def write(self, batch):
        raise RetryLaterError("the destination is away")


class Tells(Lines):
    async def write(self, batch):
        await super().write(batch)
        state = LoopState(step=0, num_steps=1, output_dir="run")
        self.publish(Eval(state, 0, "learnt", {"count": len(batch)}))


def test_each_adapter_gets_every_event_on_a_thread_of_its_own(journal, crew):
    publish(journal, 50)
    first, second, lines = Steps(), Steps(), Lines()
    running = crew(
        Subscription("a", instance=first), Subscription("b", instance=second), Subscription("c", instance=lines)
    )
    wait_until(lambda: len(first.steps) == len(second.steps) == 50)
    publish(journal, 10, 50)
    running.finish()
    assert running.join(10)
    assert (first.steps, second.steps, lines.seen) == (list(range(60)), list(range(60)), list(range(1, 61)))
    assert (len(first.threads | second.threads), threading.get_ident() in first.threads) == (2, False)
    assert (running.running, running.failed) == ([], [])
    for name in "abc":
        [place] = CursorStore(journal).load(name).streams.values()
        assert place == Position(60, 60, 0)


def test_an_adapter_that_hangs_for_ever_holds_up_nobody_and_is_left_behind(journal, crew):
    publish(journal, 5)
    hangs, steps = Hangs(), Steps()
    running = crew(Subscription("hangs", instance=hangs), Subscription("steps", instance=steps))
    running.finish()
    began = time.monotonic()
    assert not running.join(0.5)
    running.stop()
    assert not running.join(0.2)
    assert time.monotonic() - began < 1.5
    assert running.running == ["hangs"]
    assert steps.steps == [0, 1, 2, 3, 4]
    hangs.over.set()
    assert running.join(10)


def test_one_that_is_stopped_ends_where_its_cursor_stands(journal, crew):
    publish(journal, 5)
    running = crew(Subscription("away", instance=Away()))
    running.finish()
    assert not running.join(0.3)
    running.stop()
    assert running.join(10)
    assert CursorStore(journal).load("away").streams == {}


def test_an_adapter_that_cannot_be_built_says_why_and_the_others_go_on(journal, crew):
    def build(recipe: AdapterRef) -> Callback:
        if recipe.kind == "broken":
            raise BrokenAdapterError("it cannot be imported", fix="install it")
        if recipe.kind == "faulty":
            raise RuntimeError("out of order")
        return Steps()

    publish(journal, 5)
    names = ("broken", "faulty", "sound")
    running = crew(*(Subscription(each, AdapterRef(each)) for each in names), build=build)
    running.finish()
    assert running.join(10)
    assert running.failed == ["broken", "faulty"]
    state = state_of(journal, "broken")
    assert (state.state, state.pid, state.fix) == ("failed", os.getpid(), "install it")
    assert state.error == "BrokenAdapterError: it cannot be imported"
    assert state_of(journal, "faulty").error == "RuntimeError: out of order"
    assert [place.delivered for place in CursorStore(journal).load("sound").streams.values()] == [5]


def test_a_delivery_that_broke_down_is_begun_again_with_a_new_adapter(journal, crew):
    made: list[Steps] = []

    class Late(Lines):
        async def open(self):
            if len(made) < 2:
                raise ValueError("not yet")

    def build(_: AdapterRef) -> Sink:
        made.append(Late())
        return made[-1]

    publish(journal, 5)
    running = crew(Subscription("late", AdapterRef("late")), build=build, restart_seconds=0.05)
    wait_until(lambda: made and made[-1].seen)
    running.finish()
    assert running.join(10)
    assert made[-1].seen == [1, 2, 3, 4, 5]
    assert running.failed == []


@pytest.mark.parametrize(("failing", "seen", "failed"), [(1, [1, 2, 3, 4, 5], []), (9, [], ["late"])])
def test_one_that_is_asked_to_finish_while_it_pauses_after_a_failure_tries_once_more_at_once(
    journal, crew, failing, seen, failed
):
    made: list[Steps] = []

    class Fails(Lines):
        async def open(self):
            if len(made) <= failing:
                raise ValueError("not yet")

    publish(journal, 5)
    running = crew(
        Subscription("late", AdapterRef("late")),
        build=lambda _: made.append(Fails()) or made[-1],
        restart_seconds=600.0,
    )
    wait_until(lambda: running.failed, 15.0)
    running.finish()
    assert running.join(15.0)
    assert (len(made), made[-1].seen, running.failed) == (2, seen, failed)


def test_one_whose_lock_another_holds_takes_over_when_that_one_ends(journal, crew):
    publish(journal, 5)
    register(journal, [Subscription("steps", AdapterRef("steps"))])
    lock = OsDisk().lock(layout.courier_path(journal, "steps", "lock"))
    assert lock is not None
    built: list[Steps] = []
    running = crew(Subscription("steps", AdapterRef("steps")), build=lambda _: built.append(Steps()) or built[-1])
    running.finish()
    assert not running.join(0.2)
    assert (built, running.failed) == ([], ["steps"])
    assert not Path(layout.courier_path(journal, "steps", "state.json")).exists()
    os.close(lock)
    assert running.join(10)
    assert built[0].steps == [0, 1, 2, 3, 4]
    assert running.failed == []


def test_who_is_followed_is_written_down_for_the_owner_alone(journal, crew):
    terms = DeliveryPolicy(None, "dead", required=True)
    recipe = AdapterRef("steps", {"token": "t"}, ("somewhere:Steps",))
    crew(Subscription("a/b", recipe, policy=terms), Subscription("live", instance=Steps()), build=lambda _: Steps())
    posted, live = load_subscriptions(journal)
    assert (posted.name, posted.adapter_ref, posted.policy, posted.working_directory) == (
        "a/b",
        recipe,
        terms,
        str(Path.cwd()),
    )
    assert str(ROOT) in posted.sys_path
    assert (live.name, live.adapter_ref) == ("live", None)
    assert posted.to_subscription() == Subscription("a/b", recipe, policy=terms)
    for each in Path(journal, "couriers").glob("*.spec.json"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600
    assert CursorStore(journal).list_adapters() == ["a/b", "live"]


def test_a_cursor_that_is_there_is_left_alone_and_a_spec_that_cannot_be_read_is_left_out(journal):
    CursorStore(journal).save("steps", Cursor({"r0-x": Position(7, 7)}))
    register(journal, [Subscription("steps", AdapterRef("steps")), Subscription("other", AdapterRef("other"))])
    assert CursorStore(journal).load("steps").position("r0-x") == Position(7, 7)
    Path(layout.courier_path(journal, "other", "spec.json")).write_text("{")
    assert [each.name for each in load_subscriptions(journal)] == ["steps"]
    assert load_subscriptions(f"{journal}/nowhere") == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[[[[", b'{"name": 3}'])
def test_a_damaged_spec_is_logged_once_however_often_the_roster_is_read(journal, caplog, content):
    register(journal, [Subscription("other", AdapterRef("other"))])
    Path(layout.courier_path(journal, "other", "spec.json")).write_bytes(content)
    assert [load_subscriptions(journal) for _ in range(8)] == [[]] * 8
    assert [record.event for record in caplog.records] == ["file.damaged"]


def test_a_cursor_or_spec_that_cannot_be_read_now_is_logged_once_however_often_it_is_asked_for(tmp_path, caplog):
    disk = SimulatedDisk()
    journal = "/run/journal"
    register(journal, [Subscription("other", AdapterRef("other"))], disk)
    disk.unreadable |= {
        layout.courier_path(journal, "other", "spec.json"),
        layout.cursor_path(journal, "other"),
    }
    for _ in range(8):
        assert CursorStore(journal, disk).load("other") == Cursor()
        assert load_subscriptions(journal, disk) == []
    assert [record.event for record in caplog.records] == ["journal.cursor_unreadable", "couriers.spec_unreadable"]


def test_a_disk_that_cannot_be_written_keeps_nobody_from_beginning(tmp_path, caplog):
    (tmp_path / "journal").write_text("a file")
    register(str(tmp_path / "journal"), [Subscription("steps", AdapterRef("steps"))])
    assert "courier.not_enlisted" in caplog.text


def test_what_sinks_learn_goes_into_one_stream_that_is_made_when_there_is_something(journal, crew):
    publish(journal, 5)
    silent, reader = Lines(), JournalReader(journal)
    running = crew(Subscription("silent", instance=silent))
    wait_until(lambda: len(silent.seen) == 5)
    assert reader.streams("c") == []
    running.finish()
    assert running.join(10)
    running = crew(Subscription("a", instance=Tells()), Subscription("b", instance=Tells()))
    running.finish()
    assert running.join(10)
    [stream] = reader.streams("c")
    learnt = [decode(record.payload) for record in reader.read(stream)]
    assert [each.seq for each in learnt] == list(range(1, len(learnt) + 1))
    assert sum(each.event.metrics["count"] for each in learnt) == 10
    assert {each.stream for each in learnt} == {stream}
    assert not reader.is_live(stream)


def test_an_adapter_is_called_by_the_name_that_it_is_followed_under(journal, crew):
    steps = Steps()
    crew(Subscription("mine", instance=steps))
    wait_until(lambda: steps.spec_name == "mine")


def test_a_forked_child_has_no_business_with_the_threads_of_its_parent(journal, crew):
    publish(journal, 5)
    running = crew(Subscription("away", instance=Away()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: this process has threads
        child = os.fork()
    if not child:
        running.finish()
        running.stop()
        os._exit(0 if running.join(5) else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert running.running == ["away"]


def test_while_a_courier_lives_on_a_thread_no_other_thread_waits_long_for_the_interpreter(crew, journal):
    before = sys.getswitchinterval()
    running = crew(
        Subscription("one", instance=Callback()), Subscription("two", instance=Callback()), slice_seconds=0.0002
    )
    wait_until(lambda: sys.getswitchinterval() == pytest.approx(0.0002))
    running.finish()
    assert running.join(10.0)
    assert sys.getswitchinterval() == before


def test_a_switch_interval_that_the_program_sets_meanwhile_is_left_as_it_is():
    before = sys.getswitchinterval()
    interval = SwitchInterval()
    try:
        with interval.at_most(0.0002), interval.at_most(0.0001):
            assert sys.getswitchinterval() == pytest.approx(0.0002)
            sys.setswitchinterval(0.003)
        assert sys.getswitchinterval() == pytest.approx(0.003)
        with interval.at_most(0.01):
            assert sys.getswitchinterval() == pytest.approx(0.003)
    finally:
        sys.setswitchinterval(before)


class Asked(OsDisk):
    """Somebody else asks whether the couriers' locks are held, each time that a courier does, for so many times."""

    def __init__(self, times):
        self.times = times

    def is_locked(self, path):
        self.times -= 1
        return self.times >= 0 or super().is_locked(path)


@pytest.mark.parametrize(("times", "told"), [(1, False), (2, True)])
def test_who_only_asks_for_a_lock_is_not_told_of_as_another_courier(journal, crew, caplog, times, told):
    publish(journal, 5)
    steps = Steps()
    running = crew(Subscription("steps", instance=steps), disk=Asked(times))
    running.finish()
    assert running.join(10)
    assert steps.steps == [*range(5)]
    assert ("courier.busy" in caplog.text) == told
