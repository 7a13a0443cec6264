"""A process that is killed while it stores loses, doubles and changes nothing that it acknowledged."""

import os
import random
import subprocess
import sys
import time

import pytest

from support import TESTS
from support.point_stores import differing, open_store, points_of
from support.store_killed import points_until


def killed(folder, seconds, first):
    """Store in another process, kill it after so many seconds of work, and return the last acknowledged event."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.store_killed", str(folder), str(first)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    ) as process:
        assert process.stdout.readline().startswith("opened")
        time.sleep(seconds)
        process.kill()
        lines = process.stdout.read().splitlines()
    return max((int(line.split()[1]) for line in lines if line[-1].isdigit()), default=0)


def check(folder, acknowledged):
    store = open_store(folder)
    stored = store.watermark("s")
    assert stored >= acknowledged
    found = {info.name: points_of(store, info.id) for info in store.series.names(1)}
    expected = points_until(stored)
    assert list(found) == (list(expected) if stored else [])
    assert {name: differing(points, expected[name]) for name, points in found.items()} == {name: [] for name in found}
    assert [info.n for info in store.series.names(1)] == [len(points) for points in found.values()]
    store.close()
    return stored


def test_a_killed_process_has_lost_nothing_that_it_acknowledged(tmp_path):
    for turn in range(2):
        acknowledged = killed(tmp_path, random.uniform(0.05, 0.5), turn)
        stored = check(tmp_path, acknowledged)
    assert stored > 0


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(6))
def test_many_kills_in_a_row_lose_double_and_change_nothing(tmp_path, seed):
    rng = random.Random(seed)
    for turn in range(10):
        acknowledged = killed(tmp_path, rng.uniform(0.01, 1.0), seed * 100 + turn)
        if turn % 3:  # the next process opens what the kill left
            check(tmp_path, acknowledged)
    check(tmp_path, 0)
