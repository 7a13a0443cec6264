"""The short form of `torture.py`, and whether it would notice what it looks for; the long form is its command."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torture

pytestmark = [pytest.mark.long, pytest.mark.timeout(120)]


def test_three_lives_under_faults_by_chance_lose_nothing(tmp_path):
    counts, failures = torture.torture(
        120, seed=random.randrange(1_000_000), folder=tmp_path, max_directories=1, lives=3
    )
    assert failures == []
    assert counts["lives"] - counts["lives before a drain"] == 3


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A directory after two lives, a killed one and one that was ended by a signal; all is delivered."""
    folder = tmp_path_factory.mktemp("torture")
    tools = torture.Tools(folder)
    tools.mounts = False
    scene = torture.Scenario(folder / "scene", 3, tools, torture.Counter())
    scene.retain_bytes = None
    for end in ("kill", "term"):
        scene.only = {end}
        scene.run_life([])
    scene.drain_and_check()
    yield scene
    scene.close(keep=False)


def test_every_adapter_has_what_was_acknowledged_by_a_life_that_was_killed_and_by_the_next(scene):
    scene.check(scene.environment())
    assert scene.counts["acknowledged"] > 10


def without_last_line(content):
    return b"".join(content.splitlines(keepends=True)[:-1])


def with_last_line_twice(content):
    return content + content.splitlines(keepends=True)[-1]


def with_another_value(content):
    row = content.splitlines(keepends=True)[-1]
    return without_last_line(content) + row.replace(b".0", b"1.0", 1)


OUTPUT = ("out/metrics.csv", "out/run/logs/training/metrics.jsonl")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        *(
            (what, change)
            for what in OUTPUT
            for change in (without_last_line, with_last_line_twice, with_another_value)
        ),
        ("out/tensorboard/run/events.out.tfevents.0.evsys-bus", lambda content: content[: len(content) // 2]),
        ("sink-lines", lambda content: content[: len(content) // 2]),
        ("store/run/latest.json", lambda content: content.replace(b"life", b"live")),
    ],
)
def test_the_inspection_notices_what_is_missing_there_twice_or_another(scene, what, change):
    path = scene.work / what
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    try:
        with pytest.raises(torture.Violation):
            scene.check(scene.environment())
    finally:
        path.write_bytes(whole)


def test_the_inspection_notices_an_acknowledged_event_that_is_not_on_record(scene, tmp_path):
    journal = Path(shutil.copytree(scene.journal, tmp_path / "journal"))
    segment = max(journal.glob("r*/*.seg"))
    segment.write_bytes(segment.read_bytes()[: segment.stat().st_size // 2])

    acks = [
        {"what": kind, "step": step, "stream": place[0], "seq": place[1], "unrecorded": 0, "lost": 0, "name": ""}
        for (life, kind, step), place in scene.expected.positions.items()
        if life == scene.life_number
    ]
    life = SimpleNamespace(acks=acks, plan={"retain_bytes": None}, unrecorded_at_end=None)
    with pytest.raises(torture.Violation, match="not recorded"):
        torture.oracle.Expected().add_life(scene.life_number, life, journal)
