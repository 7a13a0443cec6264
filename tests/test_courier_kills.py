"""The short form of `courier_kills.py`, and whether it would notice what it looks for; the long form is its command."""

import importlib.util
import random
import shutil
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("courier_kills", Path(__file__).with_name("courier_kills.py"))
assert SPEC is not None
assert SPEC.loader is not None
courier_kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(courier_kills)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A trainer, its couriers and both were killed, and the last life ended in peace."""
    scene = courier_kills.Scene(tmp_path_factory.mktemp("killed"), random.Random())
    for victim in ("both", "couriers", None):
        scene.live(victim)
    scene.wait_until_alone()
    scene.sync()
    return scene


def test_every_adapter_has_every_event_after_trainer_and_couriers_were_killed(scene):
    assert scene.inspect() > 40
    assert scene.courier_deaths >= 1


@pytest.mark.parametrize("what", ["metrics.csv", "lines", "run/logs/training/metrics.jsonl"])
def test_the_inspection_notices_a_row_that_is_missing(scene, what):
    path = scene.directory / what
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    try:
        with pytest.raises(courier_kills.Fault):
            scene.inspect()
    finally:
        path.write_bytes(whole)
        shutil.rmtree(scene.directory / "again", ignore_errors=True)


def test_the_inspection_notices_a_row_that_came_twice(scene):
    path = scene.directory / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[-1])
    try:
        with pytest.raises(courier_kills.Fault):
            scene.inspect()
    finally:
        path.write_bytes(whole)
