"""`evsys-bus mirror` as a program of its own, a trainer whose courier process relays, and the relay as any adapter."""

import json
import signal
import subprocess

import pytest

from evsys_adapters import NatsRelay
from evsys_bus import Eval, EventBus, build_callbacks
from evsys_bus.journal import JournalReader
from evsys_bus.testing import conformance
from support.journals import read_events, read_records
from support.programs import EVSYS_BUS
from support.waiting import wait_until

pytestmark = pytest.mark.servers


def publish(journal, server, count):
    callbacks = build_callbacks([{"kind": "nats_relay", "params": {"servers": [server.url]}}])
    with EventBus(callbacks, journal=journal) as bus:
        for step in range(count):
            bus.publish(Eval(None, step, "val", {"accuracy": step / 100}))
    [delivery] = bus.receipt.deliveries
    assert (delivery.delivered, delivery.pending, delivery.error) == (count, 0, None)


def test_a_running_mirror_takes_what_comes_and_ends_cleanly_by_sigterm(server, tmp_path):
    command = [EVSYS_BUS, "mirror", server.url, tmp_path / "mirror", "--json"]
    mirror = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    publish(tmp_path / "journal", server, 30)
    reader = JournalReader(tmp_path / "mirror")
    wait_until(lambda: len(read_records(tmp_path / "mirror")) == 30 and not reader.is_live(reader.streams()[0]))
    mirror.send_signal(signal.SIGTERM)
    report, lines = mirror.communicate(timeout=10)
    assert mirror.returncode == 0, lines
    found = json.loads(report)
    assert (found["type"], found["events"], found["missing"]) == ("mirrored", 30, [])
    assert read_records(tmp_path / "mirror") == read_records(tmp_path / "journal")
    assert [event.step_idx for event in read_events(tmp_path / "mirror")] == [*range(30)]


def test_a_mirror_without_its_server_ends_with_the_fix_if_it_runs_once(server, tmp_path):
    server.kill()
    command = [EVSYS_BUS, "mirror", server.url, tmp_path / "mirror", "--once"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=15)
    assert done.returncode != 0
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


test_the_relay_conforms = conformance(lambda folder, nats_url: NatsRelay(servers=[nats_url]))
