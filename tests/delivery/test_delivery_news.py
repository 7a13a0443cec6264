"""A courier's trouble shows where people look, while the program runs: in its own log, once."""

import itertools
import json
import logging
import os
import textwrap
import time
from pathlib import Path

import pytest

from evsys_bus.bus.delivery_log import PERSISTENT_FAILURE_SECONDS, DeliveryLog
from evsys_bus.delivery.status_files import status_path, write_status
from evsys_bus.journal import OsDisk, layout
from evsys_bus.tasks import DeliveryStatus

PLUGIN = '''
    """A sink that parks as long as there is no key."""
    from pathlib import Path
    from evsys_bus import Event, Sink, register_sink
    from evsys_bus.errors import ParkedError

    HERE = Path(__file__).parent

    class Tick(Event, frozen=True):
        number: int

    @register_sink("keyed")
    class Keyed(Sink):
        async def open(self):
            if (HERE / "refuses").exists():
                raise ParkedError("401 wrong key", fix="export KEY=...")

        async def write(self, batch):
            with (HERE / "rows").open("a") as file:
                file.writelines(f"{each.seq}\\n" for each in batch)
'''

PROGRAM = """
    import json, logging, sys, time
    from plugin import HERE, Tick
    from evsys_bus import EventBus, build_callbacks

    said = []

    class Lines(logging.Handler):
        def emit(self, record):
            if record.msg.startswith("delivery."):
                facts = [getattr(record, each, None) for each in ("adapter", "why", "fix")]
                said.append([record.levelname, record.msg.split()[0], *facts])

    logger = logging.getLogger("evsys_bus")
    logger.setLevel(logging.INFO)
    logger.addHandler(Lines())
    logger.propagate = False
    bus = EventBus(build_callbacks([{"kind": "keyed"}]), journal="journal", drain_timeout=0.1, linger_seconds=0)
    with bus:
        bus.publish(Tick(1))
        deadline = time.monotonic() + 15
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        early = list(said)
        time.sleep(1.5)  # several looks later it is not said again
    print(json.dumps({"early": early, "said": said}))
"""


def test_an_adapter_that_is_parked_is_told_at_once_with_why_and_what_to_do_and_only_once(program, tmp_path):
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
    (tmp_path / "refuses").touch()
    process = program(PROGRAM)
    out, err = process.communicate(timeout=18)
    assert (process.returncode, err) == (0, "")
    told = json.loads(out)
    parked = ["WARNING", "delivery.parked", "keyed", "ParkedError: 401 wrong key", "export KEY=..."]
    assert told["early"] == [parked]
    assert [each[1] for each in told["said"]] == ["delivery.parked", "delivery.pending"]


class Scene:
    """An adapter's state on disk, a clock, and what is said of it."""

    def __init__(self, folder, caplog):
        self.now = 0.0
        self.news = DeliveryLog(str(folder), ["it"], every_seconds=0.5, monotonic=lambda: self.now)
        self._folder = folder
        self._caplog = caplog
        self._ticks = itertools.count(time.time_ns(), 1_000_000)

    def write(self, state, tick=None, **facts):
        write_status(
            OsDisk(), str(self._folder), "it", DeliveryStatus(state=state, pid=os.getpid(), at=time.time(), **facts)
        )
        at = next(self._ticks) if tick is None else tick  # two changes may come in one tick of the file system's clock
        os.utime(self._folder / layout.COURIERS, ns=(at, at))

    def said(self):
        said = [(record.levelname, record.msg.split()[0]) for record in self._caplog.records]
        self._caplog.clear()
        return said

    def until_said(self):
        """Look as often as a watchdog does; how long it took until something was said."""
        began = self.now
        while not self._caplog.records and self.now < began + 100:
            self.now += 0.25
            self.news.poll()
        return self.now - began


@pytest.fixture
def scene(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="evsys_bus")
    (tmp_path / layout.COURIERS).mkdir()
    return Scene(tmp_path, caplog)


@pytest.fixture
def tell(scene):
    """Write a state down, look when it is time, and give out what was said of it."""

    def tell(state, **facts):
        scene.write(state, **facts)
        scene.now += 0.8
        scene.news.poll()
        scene.news.poll()
        return scene.said()

    return tell


def test_what_passes_is_not_told_what_lasts_is_and_that_it_goes_on(tell):
    assert tell("delivering") == []
    assert tell("retrying", error="503", failing_since=time.time()) == []
    assert tell("retrying", error="503", failing_since=time.time() - PERSISTENT_FAILURE_SECONDS) == [
        ("WARNING", "delivery.retrying")
    ]
    assert tell("parked", error="401", fix="a key", failing_since=0.0) == [("WARNING", "delivery.parked")]
    assert tell("idle") == [("INFO", "delivery.goes_on")]
    assert tell("ended") == []


def test_a_change_that_looks_like_the_one_before_is_seen_a_little_later(scene):
    scene.write("parked", tick=1_000, error="401")
    assert scene.until_said() <= 0.5
    assert scene.said() == [("WARNING", "delivery.parked")]
    scene.write("idle", tick=1_000)
    assert 1.0 <= scene.until_said() <= 2.0
    assert scene.said() == [("INFO", "delivery.goes_on")]


def test_looks_are_rare_while_nothing_changes_and_frequent_again_when_something_does(scene):
    rare, frequent = [], []
    for turn in range(8):
        scene.write("delivering")
        scene.until_said()  # a hundred seconds
        for _ in range(turn):
            scene.now += 0.25
            scene.news.poll()
        scene.write("parked", error="401")
        rare.append(scene.until_said())
        scene.said()
        scene.write("idle")
        frequent.append(scene.until_said())
        assert scene.said() == [("INFO", "delivery.goes_on")]
    assert 1.0 < max(rare) <= 2.25
    assert max(frequent) <= 0.75


def test_a_state_that_cannot_be_read_now_is_read_again(scene, tmp_path):
    path = Path(status_path(str(tmp_path), "it"))
    scene.write("parked", error="401")
    path.rename(path.with_name("aside"))
    os.utime(path.parent, ns=(1_000, 1_000))
    scene.now += 1
    scene.news.poll()
    path.with_name("aside").rename(path)
    os.utime(path.parent, ns=(1_000, 1_000))
    scene.until_said()
    assert scene.said() == [("WARNING", "delivery.parked")]


def test_what_came_just_before_the_end_is_told_at_the_end(scene):
    scene.write("delivering")
    scene.until_said()
    scene.write("parked", error="401")
    scene.news.poll()
    assert scene.said() == []
    scene.news.poll(final=True)
    assert scene.said() == [("WARNING", "delivery.parked")]


def test_an_adapter_that_parks_just_before_the_program_ends_is_told(program, tmp_path):
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
    (tmp_path / "refuses").touch()
    last_words = """bus._delivery_manager._delivery_log._next_poll_at = float("inf")
        state = pathlib.Path("journal/couriers/keyed.state.json")
        while not state.exists() or b"parked" not in state.read_bytes():
            time.sleep(0.01)
        deadline = 0"""
    source = PROGRAM.replace("deadline = time.monotonic() + 15", last_words).replace(
        "import json", "import pathlib, json"
    )
    process = program(source.replace("time.sleep(1.5)", "pass"))
    out, err = process.communicate(timeout=18)
    assert (process.returncode, err) == (0, "")
    told = json.loads(out)
    assert (told["early"], [each[1] for each in told["said"]]) == ([], ["delivery.parked", "delivery.pending"])
