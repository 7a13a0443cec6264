"""Tasks that hooks of followed callbacks start, bare or spawned: waited for, counted, and named if they fail."""

import asyncio
import importlib
import json
import math
import signal
import textwrap
import time
from pathlib import Path

import pytest

from evsys_bus import Callback, Envelope, EventBus, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart, follow
from evsys_bus.codec import encode
from evsys_bus.context import LoopArtifacts
from evsys_bus.delivery.callback_receiver import CallbackReceiver
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.status_files import write_status_if_idle
from evsys_bus.delivery.subscription import DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import AsyncHookError
from evsys_bus.journal import JournalWriter, OsDisk
from evsys_bus.sink import Sink
from evsys_bus.tasks import DeliveryStatus
from support.couriers import deliver, read_status
from support.files import read_json_lines

STATE = LoopState(step=0, num_steps=9, output_dir=Path("/out/run-a"))


def envelope(event, sequence=1):
    return Envelope("r0-1", sequence, 1.0, event, "run-a", 0)


def step(number):
    return envelope(StepEnd(STATE, number, TrainingBatch(), {"loss": 0.5}), number + 1)


@pytest.fixture
def write(journal):
    writer = JournalWriter(journal).open()

    def append(*numbers):
        for number in numbers:
            writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1.0, step(number).event, "run-a")))

    yield append
    writer.close()


async def receiver_of(callback, **options):
    receiver = CallbackReceiver(callback, faults=FaultLog(), **options)
    await receiver.open(lambda _: None)
    return receiver


class Starts(Callback):
    """Starts a task at each step, in the way that is asked for."""

    def __init__(self, work, how):
        self.work = work
        self.how = how
        self.tasks = []

    def on_step_end(self, state, step_idx, batch, metrics):
        if self.how == "bare":
            self.tasks.append(asyncio.create_task(self.work(step_idx)))
        elif self.how == "ensure_future":
            self.tasks.append(asyncio.ensure_future(self.work(step_idx)))
        else:
            self.spawn(self.work, step_idx, name=f"work {step_idx}")


HOWS = ["bare", "ensure_future", "spawned"]


@pytest.mark.parametrize("how", HOWS)
async def test_a_batch_is_done_when_the_tasks_of_its_hooks_have_ended(how):
    release, ended = asyncio.Event(), []

    async def work(number):
        await release.wait()
        ended.append(number)

    receiver = await receiver_of(Starts(work, how))
    taking = asyncio.create_task(receiver.deliver([step(0), step(1)], [1, 1]))
    done, _ = await asyncio.wait([taking], timeout=0.05)
    assert not done
    release.set()
    assert (await taking).handled == 2
    assert sorted(ended) == [0, 1]
    await receiver.close()


@pytest.mark.parametrize("how", HOWS)
async def test_of_an_interrupted_batch_what_comes_before_an_unended_task_is_done(how):
    async def work(number):
        if number == 2:
            await asyncio.Event().wait()

    receiver = await receiver_of(Starts(work, how))
    taking = asyncio.create_task(receiver.deliver([step(each) for each in range(5)], [1] * 5))
    await asyncio.wait([taking], timeout=0.05)
    taking.cancel()
    await asyncio.wait([taking])
    assert receiver.interrupted_result().handled == 2
    await receiver.close(time.monotonic())


@pytest.mark.parametrize("how", HOWS)
async def test_of_a_stopped_courier_events_whose_tasks_were_cut_off_come_again(journal, write, how):
    write(0, 1, 2)
    seen, hanging = [], asyncio.Event()

    async def work(number):
        seen.append(number)
        if number == 1 and seen.count(1) == 1:
            hanging.set()
            await asyncio.Event().wait()

    courier = Courier(journal, "it", Starts(work, how), DeliveryPolicy())
    running = asyncio.create_task(courier.run())
    await asyncio.wait_for(hanging.wait(), 5)
    await asyncio.sleep(0)
    courier.stop()
    await asyncio.wait_for(running, 5)
    assert (read_status(journal).delivered, read_status(journal).pending) == (1, 2)
    await deliver(journal, Starts(work, how))
    assert read_status(journal).delivered == 3
    assert seen.count(1) == 2


async def test_of_one_that_is_rewound_mark_and_cursor_still_coincide(journal, write):
    write(0, 1, 2)
    hanging = asyncio.Event()

    class Marks(Callback):
        rows: list[int] = []  # noqa: RUF012 # it stands for a file
        hangs = True

        def on_step_end(self, state, step_idx, batch, metrics):
            self.rows.append(step_idx)
            if step_idx == 1 and self.hangs:
                asyncio.create_task(self.hang())  # adopted

        async def hang(self):
            hanging.set()
            await asyncio.Event().wait()

        def mark(self):
            return len(self.rows)

        def rewind(self, mark):
            del self.rows[mark:]

    courier = Courier(journal, "it", Marks(), DeliveryPolicy())
    running = asyncio.create_task(courier.run())
    await asyncio.wait_for(hanging.wait(), 5)
    courier.stop()
    await asyncio.wait_for(running, 5)
    Marks.hangs = False
    await deliver(journal, Marks())
    assert Marks.rows == [0, 1, 2]


@pytest.mark.parametrize("how", HOWS)
async def test_a_pump_that_ends_with_a_later_event_holds_no_delivery_up(caplog, how):
    class Pumps(Callback):
        def on_train_start(self, state):
            self.over = asyncio.Event()
            if how == "bare":
                asyncio.create_task(self.pump())  # adopted
            elif how == "ensure_future":
                asyncio.ensure_future(self.pump())  # adopted
            else:
                self.spawn(self.pump)

        async def pump(self):
            await self.over.wait()
            self.pumped = True

        def on_train_end(self, state, artifacts):
            self.over.set()

    pumps = Pumps()
    receiver = await receiver_of(pumps, task_wait_seconds=0.05)
    assert (await receiver.deliver([envelope(TrainStart(STATE))], [1])).handled == 1
    for number in range(3):
        assert (await receiver.deliver([step(number)], [1])).handled == 1
    assert [vars(each)["event"] for each in caplog.records] == ["task.outlasts_its_event"]
    assert "pump" in caplog.text
    assert "background=True" in caplog.text
    assert (await receiver.deliver([envelope(TrainEnd(STATE, LoopArtifacts()))], [1])).handled == 1
    await receiver.close(time.monotonic() + 5)
    assert pumps.pumped
    assert receiver.task_failures == 0


async def test_a_background_task_holds_nothing_up_and_is_cancelled_at_the_very_end():
    order = []

    class Watches(Callback):
        def on_train_start(self, state):
            self.spawn(self.watch, background=True)

        async def watch(self):
            try:
                await asyncio.Event().wait()
            finally:
                order.append("watch")

        def close(self):
            order.append("close")

        async def settle_owed(self, deadline):
            order.append("settle")

    receiver = await receiver_of(Watches(), task_wait_seconds=60)
    await asyncio.wait_for(receiver.deliver([envelope(TrainStart(STATE))], [1]), 5)
    await asyncio.sleep(0)
    await asyncio.wait_for(receiver.close(time.monotonic() + 60, confirm=True), 5)
    assert order == ["close", "settle", "watch"]
    assert receiver.task_failures == 0


async def test_a_task_of_a_task_group_stays_with_its_group():
    class Groups(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(self.work)

        async def work(self):
            async with asyncio.TaskGroup() as group:
                group.create_task(self.fail())

        async def fail(self):
            raise ValueError("one of a group")

    receiver = await receiver_of(Groups())
    await receiver.deliver([step(0)], [1])
    await receiver.close()
    assert receiver.task_failures == 1  # the task that was spawned; not once more for the one in the group


async def test_tasks_that_are_late_at_the_close_are_counted_and_named(caplog):
    async def work(number):
        await asyncio.Event().wait()

    receiver = await receiver_of(Starts(work, "bare"), task_wait_seconds=0.01)
    await receiver.deliver([step(0), step(1)], [1, 1])
    await asyncio.wait_for(receiver.close(time.monotonic() + 0.05), 3)
    assert receiver.task_failures == 2
    (said,) = [each for each in caplog.records if vars(each)["event"] == "tasks.cancelled"]
    assert vars(said)["count"] == 2
    assert "work" in vars(said)["tasks"]
    assert receiver.last_failure.startswith("task test_tasks_that_are_late")


async def test_at_the_close_tasks_get_what_is_left_of_the_deadline(journal, write):
    write(0)
    ended = []

    async def work(number):
        await asyncio.sleep(0.3)
        ended.append(number)

    courier = Courier(journal, "it", Starts(work, "spawned"), DeliveryPolicy())
    courier.finish(time.monotonic() + 8)
    await asyncio.wait_for(courier.run(), 10)
    assert ended == [0]


async def test_close_is_called_once_after_the_tasks_and_not_where_no_hook_was_called():
    class Closes(Callback):
        def __init__(self):
            self.order = []

        def on_step_end(self, state, step_idx, batch, metrics):
            asyncio.create_task(self.work())  # adopted

        async def work(self):
            await asyncio.sleep(0.02)
            self.order.append("task")

        def close(self):
            self.order.append("close")
            raise OSError("disk full")

    used, unused = Closes(), Closes()
    for callback, batch in ((used, [step(0)]), (unused, [])):
        receiver = await receiver_of(callback, task_wait_seconds=0.001)
        if batch:
            await receiver.deliver(batch, [1])
        await receiver.close(time.monotonic() + 5)
        assert (receiver.failures, receiver.last_failure) == ((1, "close: OSError: disk full") if batch else (0, None))
    assert (used.order, unused.order) == (["task", "close"], [])


class Owes:
    """What is owed is settled at the end."""

    def settles(self):
        self.calls = [*getattr(self, "calls", []), "settle"]
        self.report_owed(0)


class OwingSink(Owes, Sink):
    async def write(self, batch):
        self.report_owed(len(batch), "not confirmed", "log in")

    async def settle_owed(self, deadline):
        assert math.isfinite(deadline)
        self.settles()

    async def close(self):
        self.calls.append("close")


class OwingCallback(Owes, Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        self.report_owed(1, "not confirmed", "log in")

    async def settle_owed(self, deadline):
        self.settles()

    def close(self):
        self.calls = ["close"]


@pytest.mark.parametrize(("adapter", "calls"), [(OwingSink, ["settle", "close"]), (OwingCallback, ["close", "settle"])])
async def test_what_is_owed_is_settled_when_all_was_delivered(journal, write, adapter, calls):
    write(0, 1)
    it = adapter()
    await deliver(journal, it)
    assert it.calls == calls
    assert read_status(journal).owed == 0


async def test_what_is_owed_is_not_settled_by_a_courier_that_is_stopped_and_stays_owed(journal, write):
    write(0)
    sink = OwingSink()
    courier = Courier(journal, "it", sink, DeliveryPolicy())
    running = asyncio.create_task(courier.run())
    deadline = time.monotonic() + 5
    while not sum(each.owed for each in read_progress(journal)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    sink.calls = []
    courier.stop()
    await asyncio.wait_for(running, 5)
    assert sink.calls == ["close"]
    register(journal, [Subscription("it")])  # the next program begins
    kept = read_status(journal)
    assert (kept.owed, kept.owed_fix, kept.error) == (1, "log in", "not confirmed")


async def test_what_is_owed_may_be_reported_from_another_thread(journal, write):
    class Uploads(Sink):
        async def write(self, batch):
            await asyncio.to_thread(self.report_owed, len(batch), "the far side is slow")

    write(0, 1)
    await deliver(journal, Uploads())
    assert (read_status(journal).owed, read_status(journal).error) == (2, "the far side is slow")


@pytest.mark.parametrize(
    ("report", "owed", "error"),
    [
        ((1.5, "half of it"), 2, "half of it"),
        ((3, OSError("no route")), 3, "OSError: no route"),
        ((10**30, "more than there was"), 3, "more than there was"),
        ((2, "key \ud800"), 2, "key ?"),
        ((2, "x" * 3_000_000), 2, "x" * 2000),
        ((-1, "nothing"), 0, None),
        ((0, "nothing"), 0, None),
    ],
)
async def test_whatever_is_reported_as_owed_stands_in_a_state_that_can_be_read(journal, write, report, owed, error):
    class Reports(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.report_owed(*report)

    write(0, 1, 2)
    await deliver(journal, Reports())
    assert (read_status(journal).owed, read_status(journal).error, read_status(journal).state) == (owed, error, "ended")


@pytest.mark.parametrize("report", [None, math.nan, "2", math.inf])
async def test_a_report_of_what_is_owed_that_is_no_number_is_a_failure_of_the_hook(journal, write, report):
    class Reports(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.report_owed(report)

    write(0)
    await deliver(journal, Reports())
    assert (read_status(journal).hook_failures, read_status(journal).owed, read_status(journal).state) == (
        1,
        0,
        "ended",
    )


@pytest.mark.parametrize("kept", [True, False])
def test_what_an_inline_callback_owes_is_on_the_receipt_however_little_else_it_overrides(tmp_path, kept):
    class Reports(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.report_owed(2, "no key", "log in")

    with EventBus([Reports()], journal=tmp_path / "journal" if kept else None) as bus:
        bus.publish(step(0).event)
    (status,) = bus.receipt.deliveries
    assert (status.name, status.owed, status.error, status.fix) == ("Reports", 2, "no key", "log in")
    assert status.recorded == status.delivered + status.dead + status.pending
    assert not status.complete


async def test_a_settling_that_fails_or_lasts_too_long_is_a_wall(journal, write, caplog):
    class Hangs(Callback):
        def on_step_end(self, state, step_idx, batch, metrics): ...

        async def settle_owed(self, deadline):
            await asyncio.Event().wait()

    write(0)
    courier = Courier(journal, "it", Hangs(), DeliveryPolicy())
    courier.finish(time.monotonic() + 0.2)
    await asyncio.wait_for(courier.run(), 5)
    assert "owed.not_settled" in caplog.text
    assert read_status(journal).state == "ended"


# -- failures are counted, told and kept ------------------------------------------------------------------------------


async def test_a_courier_continues_the_counts_that_it_finds(journal, write):
    class Fails(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            asyncio.create_task(self.upload())  # adopted
            raise LookupError(f"no\ncolumn {step_idx}")

        async def upload(self):
            raise ConnectionError("refused")

    write(0, 1)
    await deliver(journal, Fails(), log_path="/somewhere/process.log")
    first = read_status(journal)
    assert (first.hook_failures, first.task_failures, first.log) == (2, 2, "/somewhere/process.log")
    assert "ConnectionError: refused" in first.last_failure
    register(journal, [Subscription("it")])
    write_status_if_idle(OsDisk(), journal, "it", DeliveryStatus(state="failed", error="it cannot be built"))
    write(2)

    class FailsOnce(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise LookupError(f"no\ncolumn {step_idx}")

    await deliver(journal, FailsOnce())
    after = read_status(journal)
    assert (after.hook_failures, after.task_failures) == (3, 2)
    assert after.last_failure == "on_step_end: LookupError: no column 2"


def test_failures_of_an_earlier_program_are_not_those_of_this_one(journal):
    class Fails(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise LookupError("no column")

    for _ in range(2):
        with EventBus([follow(Fails(), "it")], journal=journal) as bus:
            bus.publish(StepEnd(STATE, 0, TrainingBatch(), {}))
        assert [each.hook_failures for each in bus.receipt.deliveries] == [1]
    assert read_status(journal).hook_failures == 2


@pytest.mark.parametrize("how", HOWS)
async def test_a_task_is_named_by_its_coroutine_and_a_timeout_is_told_in_one_line(how, caplog):
    class Uploads(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            if how == "bare":
                asyncio.create_task(self.upload())  # adopted
            elif how == "ensure_future":
                asyncio.ensure_future(self.upload())  # adopted
            else:
                self.spawn(self.upload, timeout=0.05)

        async def upload(self):
            if how == "spawned":
                await asyncio.Event().wait()
            raise ConnectionError("refused")

    receiver = await receiver_of(Uploads())
    await receiver.deliver([step(0)], [1])
    await receiver.close()
    (said,) = [each for each in caplog.records if vars(each)["event"] == "task.failed"]
    assert vars(said)["task"].endswith("upload")
    if how == "spawned":
        assert receiver.last_failure == "task upload: TimeoutError: timed out after 0.05 s"
        assert "CancelledError" not in caplog.text
    else:
        assert receiver.last_failure.endswith("Uploads.upload: ConnectionError: refused")


async def test_a_hook_that_returns_a_coroutine_or_a_generator_has_failed(caplog, recwarn):
    async def upload(): ...

    def rows(number):
        yield number

    async def pages():
        yield 1

    returned = [upload, lambda: rows(1), pages]

    class Returns(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            return returned[step_idx]()

    receiver = await receiver_of(Returns())
    await receiver.deliver([step(each) for each in range(3)], [1] * 3)
    await receiver.close()
    assert receiver.failures == 3
    assert receiver.last_failure.startswith("on_step_end: AsyncHookError")
    assert {type(each.exc_info[1]) for each in caplog.records} == {AsyncHookError}
    assert "self.spawn" in caplog.text
    assert not [each for each in recwarn if "never awaited" in str(each.message)]


async def test_a_hook_that_returns_a_task_or_a_value_is_fine():
    class Returns(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            return asyncio.create_task(asyncio.sleep(0.001)) if step_idx else 5

    receiver = await receiver_of(Returns())
    await receiver.deliver([step(0), step(1)], [1, 1])
    await receiver.close()
    assert receiver.failures == receiver.task_failures == 0


async def test_dead_letters_are_warnings_with_the_reason_and_the_file(journal, write, caplog):
    class Refuses(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise ValueError(f"row {step_idx} is not wanted")

    write(0, 1)
    courier = Courier(journal, "it", Refuses(), DeliveryPolicy(on_failure="dead"))
    courier.finish()
    await courier.run()
    said = [vars(each) for each in caplog.records if vars(each)["event"] == "delivery.dead_letter"]
    assert [each["count"] for each in said] == [1, 2]
    assert said[0]["adapter"] == "it"
    assert "row 0 is not wanted" in said[0]["why"]
    assert read_json_lines(said[0]["file"])[0]["seq"] == said[0]["seq"]


# -- real programs ----------------------------------------------------------------------------------------------------

PLUGIN = """
    import asyncio, os, sys
    from evsys_bus import Callback, register_callback

    @register_callback("last_hook")
    class LastHook(Callback):
        def __init__(self, out, bare, seconds):
            self.out, self.bare, self.seconds = out, bare, seconds

        def on_step_end(self, state, step_idx, batch, metrics):
            for _ in range(200):
                asyncio.create_task(self.work()) if self.bare else self.spawn(self.work)
            open(self.out + ".ready", "w").close()

        async def work(self):
            await asyncio.sleep(self.seconds)
            file = os.open(self.out, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, b".")
            os.close(file)
"""

PROGRAM = """
    import json, sys, time
    import plugin
    from evsys_bus import EventBus, StepEnd, build_callbacks

    how, bare, couriers, seconds, wait = sys.argv[1], sys.argv[2] == "bare", sys.argv[3], *map(float, sys.argv[4:])
    spec = {"kind": "last_hook", "params": {"out": "out", "bare": bare, "seconds": seconds}, "placement": "follow"}
    bus = EventBus(build_callbacks([spec]), journal="journal", couriers=couriers, drain_timeout=wait, linger_seconds=0)
    try:
        with bus:
            bus.publish(StepEnd(None, 0, None, {}))
            if how == "raises":
                raise ValueError("training failed")
            if how == "signal":
                time.sleep(30)
    finally:
        (one,) = bus.receipt.deliveries
        print(json.dumps([one.delivered, one.pending, one.task_failures, one.last_failure]))
"""


@pytest.fixture
def ends(program, tmp_path):
    """Run the program to its end: what it printed of its delivery, how many tasks ended, its stderr, its exit code."""
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")

    def run(how, bare, couriers, seconds=0.05, wait=15):
        process = program(PROGRAM, how, bare, couriers, str(seconds), str(wait))
        if how == "signal":
            end = time.monotonic() + 15
            while not (tmp_path / "out.ready").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=25)
        if how == "signal":  # the program ends by it, and prints nothing more
            (one,) = read_progress(tmp_path / "journal")
            out = json.dumps([one.delivered, one.pending, one.task_failures, one.last_failure])
        ended = (tmp_path / "out").read_text() if (tmp_path / "out").exists() else ""
        return json.loads(out), len(ended), err, process.returncode

    return run


@pytest.mark.parametrize("couriers", ["thread", "process"])
@pytest.mark.parametrize("bare", ["bare", pytest.param("spawned", marks=pytest.mark.long)])
@pytest.mark.parametrize(("how", "code"), [("normal", 0), ("raises", 1), ("signal", -signal.SIGTERM)])
def test_R2_all_200_tasks_of_a_followed_callback_complete(ends, how, code, bare, couriers):
    told, ended, err, exit_code = ends(how, bare, couriers)
    assert (told, ended, exit_code) == ([1, 0, 0, None], 200, code), err


@pytest.mark.parametrize("couriers", ["thread", "process"])
@pytest.mark.parametrize("bare", [pytest.param("bare", marks=pytest.mark.long), "spawned"])
def test_R2_tasks_that_the_deadline_cuts_off_are_counted_and_their_event_comes_again(ends, bare, couriers):
    told, ended, err, _ = ends("normal", bare, couriers, 60, 3)
    delivered, pending, failures, last = told
    assert (ended, delivered, pending) == (0, 0, 1), err
    if couriers == "thread":
        assert failures == 200
        assert "work: cancelled" in last


class FailsAndMarks(Callback):
    """Its hooks raise, or their tasks do; each mark notes what is on disk of that, while the cursor is still behind."""

    def __init__(self, journal, how):
        self.journal = journal
        self.how = how
        self.failed = 0
        self.noted = []

    def on_step_end(self, state, step_idx, batch, metrics):
        self.failed += 1
        if self.how == "hook":
            raise KeyError(step_idx)
        self.spawn(self.work)

    async def work(self):
        raise ConnectionError("it is away")

    def mark(self):
        (status,) = [each for each in read_progress(self.journal) if each.name == "it"]
        self.noted.append((self.failed, status.hook_failures + status.task_failures))

    def rewind(self, mark): ...


@pytest.mark.parametrize("how", ["hook", "task"])
async def test_failures_are_on_disk_before_the_cursor_is_so_that_a_kill_hides_none(journal, write, how):
    callback = FailsAndMarks(journal, how)
    courier = Courier(journal, "it", callback, DeliveryPolicy())
    running = asyncio.create_task(courier.run())
    for number in range(3):  # within a second, in which the state is written once where nothing is urgent
        write(number)
        async with asyncio.timeout(10):
            while callback.failed == number or callback.noted[-1][0] == number:  # until it is marked
                await asyncio.sleep(0.01)
    courier.finish()
    await running
    assert {failed for failed, _ in callback.noted} >= {1, 2, 3}
    assert all(failed == on_disk for failed, on_disk in callback.noted)


UPLOADS = """
    import asyncio, time
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path
    import msgspec
    from evsys_bus import Callback

    class Uploads(Callback):
        placement = "follow"

        class Config(msgspec.Struct):
            folder: str
            how: str

        def __init__(self, folder, how):
            self.folder, self.how = Path(folder), how
            self.pool = None

        def on_step_end(self, state, step_idx, batch, metrics):
            if self.how == "pool":
                self.pool = self.pool or ThreadPoolExecutor(1)
                self.pool.submit(self.upload, step_idx)
            else:
                asyncio.get_running_loop().run_in_executor(None, self.upload, step_idx)

        def upload(self, step_idx):
            until = time.monotonic() + 0.4
            while time.monotonic() < until and self.how != "hangs":
                time.sleep(0.01)
            while self.how == "hangs":
                time.sleep(0.01)
            (self.folder / f"{step_idx}.done").touch()
"""


def uploads(tmp_path, monkeypatch, how):
    name = f"uploads_of_{tmp_path.name}"  # one that was imported before is found where it was
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(UPLOADS))
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name).Uploads(str(tmp_path), how)


@pytest.mark.parametrize(("how", "couriers"), [("pool", "process"), ("executor", "process"), ("executor", "thread")])
def test_work_that_followed_hooks_hand_to_threads_is_done_when_the_bus_is_left(tmp_path, monkeypatch, how, couriers):
    callback = uploads(tmp_path, monkeypatch, how)
    with EventBus([callback], journal=tmp_path / "journal", couriers=couriers) as bus:
        for number in range(3):
            bus.publish(step(number).event)
    assert sorted(each.name for each in tmp_path.glob("*.done")) == ["0.done", "1.done", "2.done"]
    (status,) = bus.receipt.deliveries
    assert status.complete


def test_calls_in_the_executor_that_hang_are_counted_and_told(tmp_path, monkeypatch, caplog):
    callback = uploads(tmp_path, monkeypatch, "hangs")
    with EventBus([callback], journal=tmp_path / "journal", drain_timeout=2, linger_seconds=0.1) as bus:
        bus.publish(step(0).event)
    (status,) = bus.receipt.deliveries
    assert (status.delivered, status.task_failures) == (1, 1)
    assert status.last_failure == "1 calls in the executor have not ended"
    assert "delivery.not_ended adapter=Uploads" in caplog.text
