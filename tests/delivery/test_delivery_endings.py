"""Fault rows 24 to 28 and 44, for delivery: destinations that never take an event, and programs that are ended.

Real buses, courier processes, signals and sockets; ten minutes without any destination on virtual time. In each case:
steps take what they took, closing keeps its deadline, the receipt agrees with the journal, nothing is left behind, and
what is pending is delivered by the next start or by `evsys-bus sync`.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import msgspec
import pytest
import random_faults

from evsys_bus.delivery.progress import read_progress
from evsys_bus.journal import JournalReader, layout
from evsys_bus.tasks import DeliveryStatus
from support.couriers import counted, courier_processes
from support.programs import EVSYS_BUS, processes_of
from support.waiting import wait_until

DESTINATIONS = '''
    """Sinks that fail until a file says that they are mended; then they write a line for every event."""
    import asyncio, os, time
    from pathlib import Path
    from evsys_bus import Sink, register_sink

    class Ending(Sink):
        write_timeout_seconds = 0.3
        max_batch_events = 20
        max_batch_seconds = 0.05

        def __init__(self, folder):
            self.folder = Path(folder)

        async def write(self, batch):
            if not (self.folder / "mended").exists():
                (self.folder / f"{type(self).__name__}.asked").touch()
                await self.fail()
            data = "".join(f"{each.stream} {each.seq}\\n" for each in batch)
            file = os.open(self.folder / type(self).__name__, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, data.encode())
            os.close(file)

        async def fail(self):
            pass

    class Fine(Ending):
        pass

    class Slow(Ending):
        async def fail(self):
            await asyncio.sleep(0.05)

    class Hangs(Ending):
        async def fail(self):
            await asyncio.Event().wait()

    class Deaf(Ending):
        async def fail(self):
            while True:
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    pass

    class Blocks(Ending):
        async def fail(self):
            time.sleep(1000)

    class Refused(Ending):
        async def fail(self):
            await asyncio.open_connection("127.0.0.1", int((self.folder / "port").read_text()))

    class Unnamed(Ending):
        async def fail(self):
            await asyncio.open_connection("no-such-host.invalid", 80)

    for each in (Fine, Slow, Hangs, Deaf, Blocks, Refused, Unnamed):
        register_sink(f"ending_{each.__name__}")(each)
'''

TRAINER = """
    import json, os, signal, sys, time
    from statistics import median
    import destinations
    from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch, build_callbacks

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    kinds, options, count, then = json.loads(sys.argv[1])
    here = os.getcwd()
    adapters = build_callbacks([{"kind": f"ending_{kind}", "params": {"folder": here}} for kind in kinds])

    def steps(bus, count):
        state = LoopState(step=0, num_steps=count, output_dir="run")
        taken = []
        for step in range(count):
            began = time.perf_counter()
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 0.5}))
            taken.append(time.perf_counter() - began)
            time.sleep(0.0005)
        return median(taken) if taken else 0.0

    def say(**facts):
        print(json.dumps(facts), flush=True)

    alone = 0.0
    if then == "leave":
        with EventBus([], journal="alone") as bus:
            alone = steps(bus, count)
    bus = EventBus(adapters, journal="journal", **options)
    began = time.monotonic()
    try:
        with bus:
            followed = steps(bus, count)
            say(published=count)
            if then == "wait":
                time.sleep(60)
            began = time.monotonic()
    finally:
        receipt = bus.receipt
        say(
            seconds=time.monotonic() - began, alone=alone, followed=followed, finish=receipt.resume_command,
            deliveries={each.name: [each.recorded, each.delivered, each.dead, each.pending]
                        for each in receipt.deliveries},
        )
"""

ENDINGS = {signal.SIGTERM: (-signal.SIGTERM,), signal.SIGINT: (1, 130, -signal.SIGINT)}
"""Exit codes. By SIGTERM the program ends in the exit of its bus, so only a SIGINT leaves it its receipt."""
BAD = ("Hangs", "Deaf", "Blocks", "Refused", "Unnamed")


class Place:
    """A folder in which programs train, and what is left of them."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []
        (folder / "destinations.py").write_text(textwrap.dedent(DESTINATIONS))
        (folder / "trainer.py").write_text(textwrap.dedent(TRAINER))
        with socket.socket() as taken:  # nobody listens where somebody has just been
            taken.bind(("127.0.0.1", 0))
            (folder / "port").write_text(str(taken.getsockname()[1]))

    def train(self, *kinds, count=400, then="", **options):
        asked = json.dumps([kinds, options, count, then])
        command = [sys.executable, str(self.folder / "trainer.py"), asked]
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen(command, cwd=self.folder, stdout=pipe, stderr=pipe, text=True))
        return self.started[-1]

    def sync(self):
        command = [EVSYS_BUS, "sync", str(self.folder / "journal")]
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=15, check=False
        )

    def mend(self):
        (self.folder / "mended").touch()

    def recorded(self):
        """Counted in the journal itself."""
        reader = JournalReader(self.folder / "journal")
        return {(stream, record.sequence) for stream in reader.streams() for record in reader.read(stream)}

    def delivered(self, kind):
        try:
            lines = [line.split() for line in (self.folder / kind).read_text().splitlines()]
        except FileNotFoundError:
            return []
        return [(stream, int(sequence)) for stream, sequence in lines]

    def agrees(self, kind, *, pending):
        """What disk says of an adapter, against the journal and what its destination has."""
        there = self.recorded()
        (account,) = (each for each in read_progress(self.folder / "journal") if each.name == f"ending_{kind}")
        assert account.recorded == account.delivered + account.dead + account.pending == len(there)
        assert (account.dead, account.pending > 0) == (0, pending)
        if not pending:
            assert set(self.delivered(kind)) == there
        firsts = list(dict.fromkeys(self.delivered(kind)))
        assert firsts == sorted(firsts)


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    for each in place.started:
        each.kill()
        each.communicate()
    for pid in processes_of(place.folder):
        os.kill(pid, signal.SIGKILL)


def told(line):
    return json.loads(line)


@pytest.mark.parametrize("couriers", ["process", pytest.param("thread", marks=pytest.mark.long)])
def test_whatever_a_destination_does_not_do_the_others_and_the_steps_notice_nothing_and_closing_keeps_its_deadline(
    place, couriers
):
    options = {"couriers": couriers, "drain_timeout": 1.0, "linger_seconds": 1.0}
    trainer = place.train("Fine", *BAD, then="leave", **options)
    out, err = trainer.communicate(timeout=18)
    assert trainer.returncode == 0, err
    said = told(out.splitlines()[-1])
    assert said["seconds"] < 2.0
    assert said["followed"] < 5 * said["alone"]
    assert said["deliveries"].pop("ending_Fine") == [400, 400, 0, 0]
    assert said["deliveries"] == {f"ending_{kind}": [400, 0, 0, 400] for kind in BAD}
    assert said["finish"].startswith("evsys-bus sync ")
    for kind in BAD:
        assert (place.folder / f"{kind}.asked").exists()
    wait_until(lambda: not processes_of(place.folder), 4.0)
    for kind in BAD:
        place.agrees(kind, pending=True)
    place.mend()
    done = place.sync()
    assert done.returncode == 0, done.stderr
    for kind in ("Fine", *BAD):
        place.agrees(kind, pending=False)
        assert len(place.delivered(kind)) == 400
    assert not processes_of(place.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_while_deliveries_are_pending_has_them_delivered_first(place, number):
    trainer = place.train("Slow", then="wait", drain_timeout=15.0)
    assert told(trainer.stdout.readline()) == {"published": 400}
    wait_until(lambda: place.delivered("Slow"))
    trainer.send_signal(number)
    out, err = trainer.communicate(timeout=18)  # a scheduler's grace is 30 s
    assert trainer.returncode in ENDINGS[number], err
    if number == signal.SIGINT:
        assert told(out)["deliveries"] == {"ending_Slow": [400, 400, 0, 0]}
        assert told(out)["finish"] is None
    assert "delivery.pending" not in err
    place.agrees("Slow", pending=False)
    wait_until(lambda: not processes_of(place.folder), 4.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_with_a_destination_that_never_returns_costs_the_deadline_and_no_more(place, number):
    trainer = place.train("Hangs", count=50, then="wait", drain_timeout=0.5, linger_seconds=0.5)
    trainer.stdout.readline()
    wait_until((place.folder / "Hangs.asked").exists)
    began = time.monotonic()
    trainer.send_signal(number)
    out, err = trainer.communicate(timeout=18)
    assert time.monotonic() - began < 0.5 + 1 + 0.5, err  # and the end of an interpreter
    assert trainer.returncode in ENDINGS[number], err
    assert "delivery.pending" in err
    if number == signal.SIGINT:
        assert told(out)["deliveries"] == {"ending_Hangs": [50, 0, 0, 50]}
    wait_until(lambda: not processes_of(place.folder), 4.0)
    place.mend()
    place.train("Hangs", count=0).communicate(timeout=15)  # the next start
    place.agrees("Hangs", pending=False)
    assert len(place.delivered("Hangs")) == 50


def test_a_second_ctrl_c_ends_the_wait_for_deliveries_and_what_is_pending_is_safe(place):
    trainer = place.train("Hangs", count=50, then="wait", drain_timeout=3600.0, linger_seconds=0.5)
    trainer.stdout.readline()
    wait_until((place.folder / "Hangs.asked").exists)
    while trainer.poll() is None:  # the first one begins the drain, any later one ends it
        trainer.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert trainer.returncode != 0
    wait_until(lambda: not processes_of(place.folder), 4.0)
    place.agrees("Hangs", pending=True)
    place.mend()
    assert place.sync().returncode == 0
    place.agrees("Hangs", pending=False)
    assert len(place.delivered("Hangs")) == 50


def drain(place):
    """A training that has published everything, and leaves its bus, while deliveries go on; its couriers."""
    trainer = place.train("Slow", drain_timeout=15.0, linger_seconds=10.0)
    trainer.stdout.readline()
    wait_until(lambda: len(place.delivered("Slow")) >= 40)
    (courier,) = courier_processes(place.folder)
    assert len(place.delivered("Slow")) < 400
    return trainer, courier


def test_a_trainer_that_is_killed_while_it_drains_leaves_the_rest_to_its_couriers(place):
    trainer, courier = drain(place)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not processes_of(place.folder))
    place.agrees("Slow", pending=False)
    assert len(place.delivered("Slow")) == 400
    assert courier not in processes_of(place.folder)


def test_couriers_that_are_killed_while_the_trainer_drains_are_started_again_and_finish(place):
    trainer, courier = drain(place)
    os.kill(courier, signal.SIGKILL)
    out, err = trainer.communicate(timeout=18)
    assert trainer.returncode == 0, err
    assert told(out)["deliveries"] == {"ending_Slow": [400, 400, 0, 0]}
    place.agrees("Slow", pending=False)
    wait_until(lambda: not processes_of(place.folder), 4.0)


@pytest.mark.parametrize("then", ["the next start", "sync"])
def test_what_is_pending_after_both_were_killed_while_they_drained_is_delivered_by(place, then):
    trainer, courier = drain(place)
    trainer.kill()
    os.kill(courier, signal.SIGKILL)
    trainer.wait()
    wait_until(lambda: not processes_of(place.folder), 4.0)
    place.agrees("Slow", pending=True)
    if then == "sync":
        assert place.sync().returncode == 0
    else:
        out, err = place.train("Slow", count=0, drain_timeout=15.0).communicate(timeout=18)
        assert told(out.splitlines()[-1])["deliveries"] == {"ending_Slow": [400, 400, 0, 0]}, err
    place.agrees("Slow", pending=False)
    wait_until(lambda: not processes_of(place.folder), 4.0)


# -- on virtual time --------------------------------------------------------------------------------------------------


AWAY = (ConnectionRefusedError("nobody listens"), socket.gaierror(-2, "Name or service not known"), TimeoutError())


def test_all_destinations_are_away_for_ten_minutes_and_then_have_everything_in_order():
    scene = random_faults.Scenario(0)
    names = ("refused", "unnamed", "silent")

    class Away(random_faults.Destination):
        async def write(self, batch):
            self.calls += 1
            if scene.clock.monotonic() < 600:
                raise AWAY[names.index(self.subscription.name)]
            self.keep(batch)

        async def open(self):
            pass

    posts = [random_faults.SimulatedSubscription(scene, name, Away, random_faults.DeliveryPolicy()) for name in names]

    async def train():
        publisher = scene.publishers[0]
        publisher.open(without_faults=True)
        for post in posts:
            post.start(without_faults=True)
        for _ in range(700):
            publisher.publish(1)
            before = scene.clock.monotonic()
            await asyncio.sleep(1.0)
            if 590 < before < 599:
                for post in posts:
                    state = state_of(scene, post.name)
                    assert (state.state, post.deliveries) == ("retrying", [])
                    assert 580 < scene.clock.wall() - state.failing_since < 600
        publisher.close()
        scene.update_recorded()
        for post in posts:
            post.courier.finish()
            await post.task
            assert 20 < post.adapter.calls < 1000
            letters = 700 - len(post.deliveries) + 2
            assert [each[2] for each in post.deliveries] == sorted(each[2] for each in post.deliveries)
            assert counted(post.courier) == (len(post.deliveries), letters, 0)
            assert len(post.deliveries) + letters == len(scene.recorded)

    with asyncio.Runner(loop_factory=lambda: random_faults.VirtualLoop(scene.clock)) as runner:
        runner.run(train())
    assert 700 < scene.clock.monotonic() < 800


def state_of(scene, name):
    path = layout.courier_path(random_faults.JOURNAL, name, "state.json")
    return msgspec.json.decode(scene.disk.read(path, 0, 10_000), type=DeliveryStatus)
