"""A process that delivers events to a store until it is killed: ``python -m support.store_killed FOLDER FIRST``."""

import random
import sys
from pathlib import Path

from evsys_bus.codec import encode
from evsys_bus.events import Envelope
from support.point_stores import open_store
from support.steps import step_end

NAMES = ("loss", "accuracy", "rate")


def change(seq: int) -> tuple[str, int, dict[str, float]]:
    """What event number ``seq`` does: ``put`` values at a step, or ``cut`` from a step on."""
    rng = random.Random(seq)
    kind = rng.random()
    if kind < 0.005:
        return "cut", max(0, seq - rng.randrange(3000)), {"cut": 1.0}
    step = seq if kind < 0.95 else max(0, seq - rng.randrange(5000))
    return "put", step, {name: rng.random() for name in NAMES[: rng.choice((2, 3, 3))]}


def points_until(last: int) -> dict[str, dict[int, float]]:
    """Name -> the points after that event."""
    points: dict[str, dict[int, float]] = {name: {} for name in NAMES}
    for seq in range(1, last + 1):
        kind, step, values = change(seq)
        if kind == "cut":
            points = {name: {each: value for each, value in had.items() if each < step} for name, had in points.items()}
            continue
        for name, value in values.items():
            points[name][step] = value
    return points


def payload(seq: int) -> bytes:
    _, step, values = change(seq)
    return encode(Envelope("s", seq, float(seq), step_end("/r", step, "1", **values), "1"))


def main() -> None:
    folder, first = Path(sys.argv[1]), int(sys.argv[2])
    store = open_store(folder, checkpoint_points=3000)
    rng = random.Random(first)
    after = store.watermark("s")
    print("opened", after, flush=True)
    while True:
        resent = max(0, after - rng.randrange(50))
        count = rng.choice((1, 5, 200, 1000))
        after = store.ingest("s", resent, [payload(seq) for seq in range(resent + 1, after + count + 1)]).sequence
        print("acknowledged", after, flush=True)


if __name__ == "__main__":
    main()
