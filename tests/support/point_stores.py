"""Stores of points for tests: a catalogue that knows only the metrics of steps, and the brute force to compare with."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.open_series import Changes, SeriesInfo
from evsys_adapters.dashboard.series import SeriesStore
from evsys_adapters.dashboard.store import Store
from evsys_bus.codec import encode
from evsys_bus.events import Envelope, StepEnd
from support.database_places import location_in
from support.steps import step_end


class StepPoints:
    """Each run key is a run, whose id it is, and each metric of a step is a point. One with ``cut`` cuts."""

    TABLES = ("CREATE TABLE IF NOT EXISTS applied (events INTEGER NOT NULL)",)

    def __init__(self, database: Database, series: SeriesStore) -> None:
        self.database = database
        self.series = series

    def apply(self, envelope: Envelope, changes: Changes) -> int:
        if not isinstance(envelope.event, StepEnd):
            return 0
        run, event = int(envelope.run or 0), envelope.event
        changes.runs.add(run)
        self.database.execute("INSERT INTO applied (events) VALUES (1)")
        if "cut" in event.metrics:
            self.series.cut(run, envelope.rank, event.step_idx)
            return 0
        return self.series.add_row(run, envelope.rank, event.step_idx, envelope.time, event.metrics)

    def flush(self) -> None:
        """What is applied is in the database at once."""

    def evict(self, experiments: object, runs: object) -> None:
        """It has nothing in memory."""

    def count(self) -> int:
        return self.database.query("SELECT COUNT(*) FROM applied")[0][0]


def open_store(path: Path, **options: Any) -> Store:
    return Store.open(location_in(path), catalogue=StepPoints, **options)


def encoded_steps(
    first: int, count: int, *, stream: str = "s", run: int = 1, seq: int = 0, **metrics: float
) -> list[bytes]:
    """Encoded envelopes of steps from ``first`` on, with sequence numbers after ``seq``."""
    return [
        encode(
            Envelope(
                stream, seq + index + 1, 1000.0 + index, step_end("/r", first + index, str(run), **metrics), str(run)
            )
        )
        for index in range(count)
    ]


def points_of(store: Store, series: int) -> dict[int, float]:
    line = store.series.read([series], width=1).lines[0]
    return dict(zip(map(int, line.x), map(float, line.last), strict=True))


def differing(found: Mapping[int, float], expected: Mapping[int, float], most: int = 5) -> list[tuple[int, Any, Any]]:
    """The first steps whose values differ, with both; NaN is equal to NaN. A diff of large dicts takes minutes."""
    steps = (
        step for step in sorted(found.keys() | expected.keys()) if repr(found.get(step)) != repr(expected.get(step))
    )
    return [(step, found.get(step), expected.get(step)) for step in itertools.islice(steps, most)]


def info_of(store: Store, run: int, name: str, rank: int = 0) -> SeriesInfo:
    return next(each for each in store.series.names(run) if (each.name, each.rank) == (name, rank))


def brute_buckets(points: Mapping[int, float], width: int) -> dict[int, tuple[float, ...]]:
    """First step -> mean, min, max, last, finite, bad."""
    buckets: dict[int, list[float]] = {}
    for step in sorted(points):
        buckets.setdefault(step // width * width, []).append(points[step])
    found = {}
    for start, values in buckets.items():
        finite = [value for value in values if math.isfinite(value)]
        mean = math.fsum(value / len(finite) for value in finite) if finite else math.nan
        low, high = (min(finite), max(finite)) if finite else (math.nan, math.nan)
        found[start] = (mean, low, high, values[-1], len(finite), len(values) - len(finite))
    return found
