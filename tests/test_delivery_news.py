"""A courier's trouble shows where people look, while the program runs: in its own log, once."""

import itertools
import json
import logging
import os
import textwrap
import time

import pytest

from evsys_bus.bus.news import LASTING_SECONDS, News
from evsys_bus.delivery.followed import CourierState
from evsys_bus.delivery.states import write_state
from evsys_bus.journal import OsDisk, layout

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


@pytest.fixture
def tell(tmp_path, caplog):
    """Write a state down, look, and give out what was said of it."""
    caplog.set_level(logging.INFO, logger="evsys_bus")
    (tmp_path / layout.COURIERS).mkdir()
    news = News(str(tmp_path), ["it"], every_seconds=0.0)
    ticks = itertools.count(time.time_ns(), 1_000_000)

    def tell(state, tick=None, **facts):
        caplog.clear()
        write_state(OsDisk(), str(tmp_path), "it", CourierState(state, os.getpid(), time.time(), **facts))
        at = next(ticks) if tick is None else tick  # two changes may come in one tick of the file system's clock
        os.utime(tmp_path / layout.COURIERS, ns=(at, at))
        news.look()
        news.look()
        return [(record.levelname, record.msg.split()[0]) for record in caplog.records]

    return tell


def test_what_passes_is_not_told_what_lasts_is_and_that_it_goes_on(tell):
    assert tell("delivering") == []
    assert tell("retrying", error="503", failing_since=time.time()) == []
    assert tell("retrying", error="503", failing_since=time.time() - LASTING_SECONDS) == [
        ("WARNING", "delivery.retrying")
    ]
    assert tell("parked", error="401", fix="a key", failing_since=0.0) == [("WARNING", "delivery.parked")]
    assert tell("idle") == [("INFO", "delivery.goes_on")]
    assert tell("ended") == []


def test_a_change_that_looks_like_the_one_before_is_seen_a_little_later(tell, monkeypatch):
    assert tell("parked", tick=1_000, error="401") == [("WARNING", "delivery.parked")]
    assert tell("idle", tick=1_000) == []
    later = time.time_ns() + 2_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert tell("idle", tick=1_000) == [("INFO", "delivery.goes_on")]
