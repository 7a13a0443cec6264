"""Charts of series: the finest width at which none has too many buckets, and each series in buckets of that width.

Widths are powers of two. A width is made of the widest stored buckets that fit into it, or of points where none do.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from evsys_adapters.dashboard.chunks import (
    CHUNK_BITS,
    FINE_BITS,
    MIDDLE_BITS,
    RECORD,
    Chunk,
    Record,
    Steps,
    point_arrays,
    record_dtype,
    unpack_records,
)
from evsys_adapters.dashboard.database import Database
from evsys_adapters.dashboard.open_series import Series

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ALL_STEPS: Final = 1 << 60
_EXACT_CHUNKS: Final = 2
"""The buckets of so few chunks are counted by their points, those of more chunks are estimated by their records."""


class SeriesColumns(msgspec.Struct, frozen=True):
    """Buckets of a series, in the order of steps; only those that have points. All columns are float64 arrays."""

    id: int
    x: "NDArray[np.float64]"
    """The first step of the bucket: a multiple of the width."""
    mean: "NDArray[np.float64]"
    """Of the finite values, as `min` and `max`; NaN where there are none."""
    min: "NDArray[np.float64]"
    max: "NDArray[np.float64]"
    last: "NDArray[np.float64]"
    """The value at the last step; NaN and infinities included."""
    count: "NDArray[np.float64]"
    """Number of finite values."""
    bad: "NDArray[np.float64]"
    """Number of values that are NaN or infinite."""


class ChartColumns(msgspec.Struct, frozen=True):
    """Several series in buckets of one width."""

    width: int
    """Steps of a bucket; 1: points as they are."""
    lines: list[SeriesColumns]
    """In the order in which they were requested."""


def read_columns(
    database: Database,
    series: Sequence[Series],
    *,
    first: int | None,
    last: int | None,
    buckets: int,
    width: int | None = None,
) -> ChartColumns:
    """Read series at the finest width at which none has more than so many buckets, or at a width.

    Buckets are whole: those of which a part lies between `first` and `last`, both included.
    """
    low = -_ALL_STEPS if first is None else max(first, -_ALL_STEPS)
    high = _ALL_STEPS if last is None else min(last, _ALL_STEPS)
    if width is not None:
        bits = max(0, width - 1).bit_length()
    else:
        bits = 0
        for each in series:
            bits = _fitting_bits(database, each, low, high, max(1, buckets), bits)
    low = low >> bits << bits
    high = ((high >> bits) + 1 << bits) - 1
    return ChartColumns(1 << bits, [_columns(database, each, low, high, bits) for each in series])


def _fitting_bits(database: Database, series: Series, low: int, high: int, buckets: int, bits: int) -> int:
    """Return the smallest width from ``1 << bits`` on at which the series has no more buckets, as its logarithm."""
    import numpy as np

    shift = CHUNK_BITS + series.scale
    numbers = [each for each in series.numbers(database) if low >> shift <= each <= high >> shift]
    records = [series.record(database, each) for each in numbers]
    counts = np.array([record.finite + record.bad for record in records], dtype=np.int64)
    if counts.sum() <= buckets:
        return bits
    if len(numbers) <= _EXACT_CHUNKS:  # they may have points in a few of their steps only
        chunks = [series.chunk(database, each) for each in numbers]
        steps = np.concatenate([_step_array(_points_in_range(chunk, low, high)[0]) for chunk in chunks])
        while len(np.unique(steps >> bits)) > buckets:
            bits += 1
        return bits
    ends = (np.array(numbers, dtype=np.int64) + 1 << shift) - 1
    ends = np.minimum(ends, min(high, series.last_step(database)))
    starts = np.maximum(np.array(numbers, dtype=np.int64) << shift, low)
    while True:
        if bits < shift:
            found = int(np.minimum(counts, (ends >> bits) - (starts >> bits) + 1).sum())
        else:
            found = len(np.unique(starts >> bits))
        if found <= buckets:
            return bits
        bits += 1


def _columns(database: Database, series: Series, low: int, high: int, bits: int) -> SeriesColumns:
    import numpy as np

    shift = CHUNK_BITS + series.scale
    numbers = [each for each in series.numbers(database) if low >> shift <= each <= high >> shift]
    parts: list[tuple[NDArray[Any], NDArray[Any]]] = []
    if bits >= shift:
        packed = b"".join([RECORD.pack(*series.record(database, number)) for number in numbers])
        parts.append((np.array(numbers, dtype=np.int64) << shift, _table(np.frombuffer(packed, dtype=record_dtype()))))
    else:
        stored = [number for number in numbers if number not in series.chunks]
        if stored:
            parts += _stored_parts(database, series, stored, bits - series.scale)
        open_chunks = [series.chunks[number] for number in numbers if number in series.chunks]
        for steps, values in (_points_in_range(chunk, low, high) for chunk in open_chunks):
            parts.append((_step_array(steps), _table_of_points(np.array(values))))
    return _bucketed(series.id, parts, low, high, bits)


def _stored_parts(
    database: Database, series: Series, numbers: Sequence[int], bits: int
) -> "list[tuple[NDArray[Any], NDArray[Any]]]":
    """Read these chunks in their widest buckets of at most ``1 << bits`` steps of scale 0, as parts of `_bucketed`."""
    column, table = ("r256", "rollup") if bits >= MIDDLE_BITS else ("r32", "rollup")
    if bits < FINE_BITS:
        column, table = "body", "raw"
    known = set(numbers)
    rows = [
        (series.number_of(row_id), body)
        for row_id, body in database.query(
            f"SELECT id, {column} FROM {table} WHERE id BETWEEN ? AND ? ORDER BY id",  # noqa: S608 # of the names above
            series.row_id(numbers[0]),
            series.row_id(numbers[-1]),
        )
        if series.number_of(row_id) in known
    ]
    if table == "raw":
        return [(steps, _table_of_points(values)) for steps, values in (point_arrays(body) for _, body in rows)]
    starts, records = unpack_records(rows, MIDDLE_BITS if bits >= MIDDLE_BITS else FINE_BITS, series.scale)
    return [(starts, _table(records))]


def _points_in_range(chunk: Chunk, low: int, high: int) -> "tuple[Steps, array[float]]":
    begin, end = bisect_left(chunk.steps, low), bisect_right(chunk.steps, high)
    return chunk.steps[begin:end], chunk.values[begin:end]


def _step_array(steps: Steps) -> "NDArray[np.int64]":
    import numpy as np

    if isinstance(steps, range):
        return np.arange(steps.start, steps.stop, steps.step, dtype=np.int64)
    return np.array(steps, dtype=np.int64)


def _table(records: "NDArray[Any]") -> "NDArray[np.float64]":
    """Return records as an array with a row for each field of `Record`."""
    import numpy as np

    return np.stack([records[name].astype(np.float64) for name in Record._fields])


def _table_of_points(values: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return points as `_table` does records, with one value each."""
    import numpy as np

    finite = np.isfinite(values)
    if finite.all():
        ones = np.ones(len(values))
        return np.stack([ones, np.zeros(len(values)), values, values, values, values])
    shown = np.where(finite, values, np.nan)
    return np.stack([finite, ~finite, shown, shown, np.where(finite, values, 0.0), values])


def _bucketed(
    series: int, parts: "Sequence[tuple[NDArray[Any], NDArray[Any]]]", low: int, high: int, bits: int
) -> SeriesColumns:
    """Merge parts, each with its first steps and a table of records, into buckets."""
    import numpy as np

    if not parts:
        return SeriesColumns(series, *(np.empty(0) for _ in range(7)))
    starts = np.concatenate([start for start, _ in parts])
    table = np.concatenate([rows for _, rows in parts], axis=1)
    if len(parts) > 1 and (starts[1:] < starts[:-1]).any():  # chunks in memory that lie between those on disk
        order = np.argsort(starts, kind="stable")
        starts, table = starts[order], table[:, order]
    if len(starts) and (starts[0] < low or starts[-1] > high):
        begin, end = np.searchsorted(starts, low), np.searchsorted(starts, high, side="right")
        starts, table = starts[begin:end], table[:, begin:end]
    if not len(starts):
        return SeriesColumns(series, *(np.empty(0) for _ in range(7)))
    keys = starts >> bits
    at = np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1))
    count, bad, lows, highs, totals, lasts = table
    if len(at) < len(keys):
        with np.errstate(over="ignore", invalid="ignore"):
            count, bad, totals = (np.add.reduceat(column, at) for column in (count, bad, totals))
            lows, highs = np.fmin.reduceat(lows, at), np.fmax.reduceat(highs, at)
        lasts = lasts[np.concatenate((at[1:], [len(keys)])) - 1]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        means = totals / count
        means = np.where((count > 0) & ~np.isfinite(means), lows / 2 + highs / 2, means)  # their sum is no float
    return SeriesColumns(series, (keys[at] << bits).astype(np.float64), means, lows, highs, lasts, count, bad)
