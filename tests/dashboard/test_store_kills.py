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

pytestmark = pytest.mark.usefixtures("each_database")


def killed(folder, seconds, first, *, after="opened"):
    """Store in another process, kill it some time after its first such line, and return the last acknowledged event."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.store_killed", str(folder), str(first)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    ) as process:
        lines = [process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith(after):
            lines.append(process.stdout.readline())
        time.sleep(seconds)
        process.kill()
        lines += process.stdout.read().splitlines()
    assert lines[0].startswith("opened")
    return max((int(number) for line in lines for number in line.split()[1:]), default=0)


def check(folder, acknowledged):
    store = open_store(folder)
    stored = store.watermark("s")
    assert stored >= acknowledged
    found = {info.name: points_of(store, info.id) for info in store.series.names(1)}
    expected = points_until(stored)
    assert {name: differing(found.get(name, {}), points) for name, points in expected.items()} == {
        name: [] for name in expected
    }
    assert [info.n for info in store.series.names(1)] == [len(points) for points in found.values()]
    store.close()
    return stored


def test_a_killed_process_has_lost_nothing_that_it_acknowledged(tmp_path):
    for turn in range(2):
        acknowledged = killed(tmp_path, random.uniform(0.01, 0.5), turn, after="acknowledged")
        assert check(tmp_path, acknowledged) > 0


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
