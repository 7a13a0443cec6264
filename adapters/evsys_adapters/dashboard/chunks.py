"""A chunk: the points of a series in one range of steps, in memory, on disk, and summed up in three widths.

With scale k, chunk c has the steps from ``c << (11 + k)`` on, 2,048 << k of them. Its records sum up buckets of 32 << k
and 256 << k steps, and all of its steps. Buckets of different scales nest: every width is a power of two, and a bucket
begins at a multiple of it.
"""

import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import isfinite, nan
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from evsys_adapters.dashboard.database import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_BITS: Final = 11
"""Binary logarithm of the steps of a chunk of scale 0."""
MIDDLE_BITS: Final = 8
FINE_BITS: Final = 5

Steps: TypeAlias = "range | array[int]"
"""Strictly increasing steps; a range where the distance is always the same."""


class Record(NamedTuple):
    """The values of a bucket, summed up."""

    finite: int
    """Number of finite values."""
    bad: int
    """Number of NaN and infinite values."""
    low: float
    """Of the finite values, as `high` and `total`; NaN if there are none."""
    high: float
    total: float
    last: float
    """The value at the last step, as it is."""


RECORD: Final = struct.Struct("<IIdddd")
_HEAD: Final = struct.Struct("<BIqq")  # bytes of a step (0: a range), points, first step, distance or bytes of steps
_STEP_TYPES: Final = {1: "B", 2: "H", 4: "I", 8: "q"}


class Chunk:
    """The points of a chunk in memory."""

    __slots__ = ("_counted", "_record", "number", "steps", "values")

    def __init__(self, number: int, steps: Steps = range(0), values: "array[float] | None" = None) -> None:
        self.number = number
        self.steps = steps
        self.values: array[float] = array("d") if values is None else values
        self._record: Record | None = None
        self._counted = 0

    def put(self, steps: Steps, values: "array[float]") -> None:
        """Add points with strictly increasing steps. They replace those that have the same steps."""
        known = self.steps
        if not known:
            self.steps, self.values, self._record = steps[:], values[:], None  # others may have the same arrays
        elif steps[0] > known[-1]:
            self.steps = _joined(known, steps)
            self.values.extend(values)
        else:
            later = bisect_right(steps, known[-1])
            self._merge(steps[:later], values[:later])
            if later < len(steps):
                self.steps = _joined(self.steps, steps[later:])
                self.values.extend(values[later:])
            self._record = None

    def cut(self, step: int) -> None:
        """Remove the points from this step on."""
        end = bisect_left(self.steps, step)
        self.steps, self.values, self._record = self.steps[:end], self.values[:end], None

    def record(self) -> Record:
        """Sum up all points."""
        if self._record is None:
            self._record = summarize(self.values)
        elif self._counted < len(self.values):
            self._record = merge((self._record, summarize(self.values[self._counted :])))
        self._counted = len(self.values)
        return self._record

    def _merge(self, steps: Steps, values: "array[float]") -> None:
        start = bisect_left(self.steps, steps[0])
        if self.steps[start : start + len(steps)] == steps:  # as when a log is applied again
            self.values[start : start + len(steps)] = values
            return
        if len(steps) > 32:  # noqa: PLR2004 # sorting once takes less time than that many insertions
            points = dict(zip(self.steps, self.values, strict=True))
            points.update(zip(steps, values, strict=True))
            merged = sorted(points)
            self.steps, self.values = array("q", merged), array("d", map(points.__getitem__, merged))
            return
        for step, value in zip(steps, values, strict=True):
            at = bisect_left(self.steps, step)
            if at < len(self.steps) and self.steps[at] == step:
                self.values[at] = value
                continue
            if isinstance(self.steps, range):
                self.steps = array("q", self.steps)
            self.steps.insert(at, step)
            self.values.insert(at, value)


def compact(steps: Sequence[int]) -> Steps:
    """Return strictly increasing steps as a range if they are one, else as an array."""
    if isinstance(steps, range):
        return steps
    if len(steps) == 1:
        return range(steps[0], steps[0] + 1)
    if steps:
        distance = steps[1] - steps[0]
        if steps[-1] - steps[0] == distance * (len(steps) - 1):
            candidate = range(steps[0], steps[-1] + distance, distance)
            if all(map(int.__eq__, candidate, steps)):
                return candidate
    return steps if isinstance(steps, array) else array("q", steps)


def _joined(known: Steps, steps: Steps) -> Steps:
    """Append later steps."""
    if isinstance(known, range) and isinstance(steps, range):
        distance = steps[0] - known[-1]
        if (len(known) == 1 or known.step == distance) and (len(steps) == 1 or steps.step == distance):
            return range(known[0], steps[-1] + distance, distance)
    joined = known if isinstance(known, array) else array("q", known)
    joined.extend(steps)
    return joined


def median_distance(steps: Sequence[int]) -> int:
    """Return the median of the distances between steps, at least 1."""
    distances = sorted(later - earlier for earlier, later in pairwise(steps))
    return distances[len(distances) // 2] if distances else 1


def summarize(values: "array[float]") -> Record:
    """Sum up the values of at least one point."""
    total = sum(values)
    if isfinite(total):
        return Record(len(values), 0, min(values), max(values), total, values[-1])
    finite = [value for value in values if isfinite(value)]
    if not finite:
        return Record(0, len(values), nan, nan, 0.0, values[-1])
    return Record(len(finite), len(values) - len(finite), min(finite), max(finite), sum(finite), values[-1])


def merge(records: Iterable[Record]) -> Record:
    """Sum up records in the order of their steps."""
    count = bad = 0
    low, high, total, last = nan, nan, 0.0, nan
    for record in records:
        if record.finite:
            low = record.low if count == 0 or record.low < low else low
            high = record.high if count == 0 or record.high > high else high
            total += record.total
        count += record.finite
        bad += record.bad
        last = record.last
    return Record(count, bad, low, high, total, last)


def roll_up(chunk: Chunk, scale: int) -> tuple[Record, bytes, bytes]:
    """Sum up a chunk with points: wholly, and its middle and fine buckets in the form that `unpack_records` reads."""
    start, bits, steps, values = chunk.number << (CHUNK_BITS + scale), FINE_BITS + scale, chunk.steps, chunk.values
    fine: dict[int, Record] = {}
    at = 0
    while at < len(steps):
        bucket = (steps[at] - start) >> bits
        boundary = start + ((bucket + 1) << bits)
        if isinstance(steps, range):
            end = min(len(steps), at - (steps[at] - boundary) // steps.step)
        else:
            end = bisect_left(steps, boundary, at)
        fine[bucket] = summarize(values[at:end])
        at = end
    middle: dict[int, list[Record]] = {}
    for bucket, record in fine.items():
        middle.setdefault(bucket >> (MIDDLE_BITS - FINE_BITS), []).append(record)
    merged = {bucket: merge(records) for bucket, records in middle.items()}
    return merge(merged.values()), _pack_records(merged, MIDDLE_BITS), _pack_records(fine, FINE_BITS)


def _pack_records(records: dict[int, Record], bits: int) -> bytes:
    """Records back to back; before them the numbers of the buckets, unless every bucket of the chunk has points."""
    full = len(records) == 1 << (CHUNK_BITS - bits)
    return (b"" if full else bytes(records)) + b"".join([RECORD.pack(*record) for record in records.values()])


def record_dtype() -> Any:  # numpy's types of structured arrays say nothing
    """Return numpy's type of a `Record`."""
    import numpy as np

    return np.dtype(
        {
            "names": list(Record._fields),
            "formats": ["<u4", "<u4", "<f8", "<f8", "<f8", "<f8"],
            "itemsize": RECORD.size,
        }
    )


@contextmanager
def reported_damage() -> Generator[None]:
    """Raise `StoreError` where the block finds that stored bytes are not what was written."""
    try:
        yield
    except (zlib.error, struct.error, ValueError, msgspec.MsgspecError) as error:
        raise StoreError(
            "the database has stored points that cannot be read",
            problem="corrupt",
            why=f"{type(error).__name__}: {error}",
            fix="move the database away and import the journals again, or restore a copy",
        ) from error


@reported_damage()
def unpack_records(rows: Sequence[tuple[int, bytes]], bits: int, scale: int) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Return the first step of each bucket, and an array of `record_dtype`.

    Args:
        rows: Chunk number and packed records of each chunk, in order.
        bits: `MIDDLE_BITS` or `FINE_BITS`.
        scale: The scale of the series.
    """
    import numpy as np

    full = 1 << (CHUNK_BITS - bits)
    every = np.arange(full, dtype=np.int64)
    numbers: list[NDArray[Any]] = []
    bodies: list[bytes] = []
    for number, body in rows:
        count = full if len(body) == full * RECORD.size else len(body) // (RECORD.size + 1)
        numbers.append(number * full + (every if count == full else np.array(list(body[:count]), dtype=np.int64)))
        bodies.append(body if count == full else body[count:])
    starts = np.concatenate(numbers) << (bits + scale)
    return starts, np.frombuffer(b"".join(bodies), dtype=record_dtype())


def pack_points(steps: Steps, values: "array[float]") -> bytes:
    """Encode points: a head, the distances of their steps if these differ, the values; bytes of equal rank together."""
    steps = compact(steps)
    if isinstance(steps, range):
        head = _HEAD.pack(0, len(steps), steps[0] if steps else 0, steps.step)
        return head + zlib.compress(_shuffled(values.tobytes(), 8), 1)
    distances = [later - earlier for earlier, later in pairwise(steps)]
    largest = max(distances)
    size = next(size for size in _STEP_TYPES if size == 8 or largest < 1 << (8 * size))  # noqa: PLR2004 # bytes
    body = zlib.compress(_shuffled(array(_STEP_TYPES[size], distances).tobytes(), size), 1)
    head = _HEAD.pack(size, len(steps), steps[0], len(body))
    return head + body + zlib.compress(_shuffled(values.tobytes(), 8), 1)


@reported_damage()
def unpack_points(body: bytes) -> tuple[Steps, "array[float]"]:
    """Decode what `pack_points` encoded."""
    size, count, first, extra = _HEAD.unpack_from(body)
    at = _HEAD.size + (extra if size else 0)
    values = array("d", _unshuffled(zlib.decompress(body[at:]), 8))
    if len(values) != count:
        raise ValueError(f"{len(values)} values instead of {count}")
    if not size:
        return range(first, first + count * extra, extra), values
    steps = array("q", [first])
    for distance in array(_STEP_TYPES[size], _unshuffled(zlib.decompress(body[_HEAD.size : at]), size)):
        steps.append(steps[-1] + distance)
    return steps, values


@reported_damage()
def point_arrays(body: bytes) -> "tuple[NDArray[Any], NDArray[Any]]":
    """Decode what `pack_points` encoded as arrays: steps (int64), values (float64)."""
    import numpy as np

    size, count, first, extra = _HEAD.unpack_from(body)
    at = _HEAD.size + (extra if size else 0)
    shuffled = np.frombuffer(zlib.decompress(body[at:]), dtype=np.uint8)
    values = np.ascontiguousarray(shuffled.reshape(8, count).T).view("<f8").reshape(count)
    if not size:
        return np.arange(first, first + count * extra, extra, dtype=np.int64), values
    packed = _unshuffled(zlib.decompress(body[_HEAD.size : at]), size)
    steps = np.empty(count, dtype=np.int64)
    steps[0] = first
    steps[1:] = first + np.cumsum(np.frombuffer(packed, dtype=f"<{'i' if size == 8 else 'u'}{size}"), dtype=np.int64)  # noqa: PLR2004 # bytes
    return steps, values


def _shuffled(data: bytes, size: int) -> bytes:
    return b"".join([data[at::size] for at in range(size)])


def _unshuffled(data: bytes, size: int) -> bytes:
    count = len(data) // size
    plain = bytearray(len(data))
    for at in range(size):
        plain[at::size] = data[at * count : (at + 1) * count]
    return bytes(plain)
