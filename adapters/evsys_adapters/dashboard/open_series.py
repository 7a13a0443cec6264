"""One series in memory: which chunks it has, those that the database lacks, its summary, and changes that wait."""

import struct
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from evsys_adapters.dashboard.chunks import RECORD, Chunk, Record, merge, reported_damage, unpack_points
from evsys_adapters.dashboard.database import Database, Row

MAX_CHUNK: Final = 1 << 30
"""Chunks are numbered from minus this to below this."""
_SUMMARY: Final = struct.Struct("<qqqdddd")  # last step, then the fields of a record


class Changes(msgspec.Struct):
    """What a batch changed, for those who show it live."""

    runs: set[int] = msgspec.field(default_factory=set[int])
    experiments: set[int] = msgspec.field(default_factory=set[int])
    series: dict[int, tuple[int, int]] = msgspec.field(default_factory=dict[int, tuple[int, int]])
    """Id of the series -> smallest and largest step with a change."""

    def add_steps(self, series: int, first: int, last: int) -> None:
        """Add a range of steps of a series."""
        known = self.series.get(series)
        self.series[series] = (first, last) if known is None else (min(first, known[0]), max(last, known[1]))

    def update(self, other: "Changes") -> None:
        """Add the changes of another batch."""
        self.runs |= other.runs
        self.experiments |= other.experiments
        for series, (first, last) in other.series.items():
            self.add_steps(series, first, last)


class SeriesInfo(NamedTuple):
    """A series of a run, as a whole."""

    id: int
    name: str
    rank: int
    n: int
    """Number of finite values."""
    bad: int
    """Number of values that are NaN or infinite."""
    last_step: int | None
    """None if it has no points, as `last`."""
    last: float | None
    """The value at the last step; NaN and infinities included."""
    min: float | None
    """Of the finite values, as `max`; None if there are none."""
    max: float | None
    constant: bool
    """Whether all values are finite and the same."""


class Series:
    """A series, and those of its chunks that are in memory.

    Attributes:
        scale: See `chunks`.
        chunks: Number -> chunk in memory, which counts instead of the one in the database. It may be empty: then the
            one in the database is to be removed.
        tails_left: How often a later chunk followed the last one.
        may_widen: Whether a larger scale may be tried; not again after one was too large.
    """

    __slots__ = (
        "_before_tail",
        "_heads",
        "_stored_last",
        "_summary",
        "_tail",
        "chunks",
        "id",
        "may_widen",
        "name",
        "rank",
        "run",
        "scale",
        "tails_left",
    )

    def __init__(
        self,
        series: int,
        run: int,
        rank: int,
        name: str,
        *,
        scale: int,
        summary: bytes | None = None,
        is_new: bool = False,
    ) -> None:
        self.id: Final = series
        self.run: Final = run
        self.rank: Final = rank
        self.name: Final = name
        self.scale = scale
        self.chunks: dict[int, Chunk] = {}
        self.tails_left = 0
        self.may_widen = True
        self._heads: dict[int, Record] | None = (
            {} if is_new else None
        )  # number of a chunk in the database -> its record
        self._tail: int | None = None  # number of the last chunk with points, if known
        self._stored_last: tuple[int, int] | None = (
            None  # number of the last chunk and its last step, from the database
        )
        self._before_tail: Record | None = None  # the record of all chunks before that one, if known
        self._summary: tuple[int, Record] | None = None  # last step and record as the database has them
        if summary:
            with reported_damage():
                last_step, *record = _SUMMARY.unpack(summary)
            self._summary = last_step, Record(*record)

    def row_id(self, number: int) -> int:
        """Return the primary key of a chunk."""
        return (self.id << 31) + number + MAX_CHUNK

    def number_of(self, row_id: int) -> int:
        """Return the number of the chunk with this primary key."""
        return row_id - (self.id << 31) - MAX_CHUNK

    @property
    def row_ids(self) -> tuple[int, int]:
        """The smallest and the largest primary key that a chunk may have."""
        return self.row_id(-MAX_CHUNK), self.row_id(MAX_CHUNK - 1)

    @property
    def is_idle(self) -> bool:
        """Whether nothing of it is in memory but its summary."""
        return self._heads is None and not self.chunks

    def heads(self, database: Database) -> dict[int, Record]:
        """Return the records of the chunks in the database by number, read once."""
        if self._heads is None:
            self.set_heads(
                database.query("SELECT id, whole FROM rollup WHERE id BETWEEN ? AND ? ORDER BY id", *self.row_ids)
            )
        assert self._heads is not None
        return self._heads

    def set_heads(self, rows: Sequence[Row]) -> None:
        """Note what `heads` would read: primary key and record of each chunk in the database."""
        with reported_damage():
            self._heads = {self.number_of(row_id): Record(*RECORD.unpack(whole)) for row_id, whole in rows}

    def numbers(self, database: Database) -> list[int]:
        """Return the numbers of the chunks that have points, in order."""
        absent = {number for number, chunk in self.chunks.items() if not chunk.steps}
        return sorted((self.heads(database).keys() | self.chunks.keys()) - absent)

    def record(self, database: Database, number: int) -> Record:
        """Return the record of a chunk that has points."""
        chunk = self.chunks.get(number)
        return self.heads(database)[number] if chunk is None else chunk.record()

    def tail(self, database: Database) -> int | None:
        """Return the number of the last chunk that has points."""
        if self._tail is None:
            self._tail = max(self.numbers(database), default=None)
        return self._tail

    def last_step(self, database: Database) -> int:
        """Return the last step. The series must have points."""
        tail = self.tail(database)
        assert tail is not None
        if tail in self.chunks:
            return self.chunks[tail].steps[-1]
        if self._stored_last is None or self._stored_last[0] != tail:
            self._stored_last = tail, self.chunk(database, tail).steps[-1]
        return self._stored_last[1]

    def chunk(self, database: Database, number: int) -> Chunk:
        """Return a chunk from memory or from the database; a new one where there is none."""
        chunk = self.chunks.get(number)
        if chunk is not None:
            return chunk
        if number not in self.heads(database):
            return Chunk(number)
        return Chunk(
            number, *unpack_points(database.query("SELECT body FROM raw WHERE id = ?", self.row_id(number))[0][0])
        )

    def put_into(self, number: int) -> None:
        """Note that a chunk got points."""
        if self._tail is None or number == self._tail:
            return
        self._before_tail = None
        self._tail = max(number, self._tail)

    def cut(self) -> None:
        """Note that chunks lost points."""
        self._tail = self._before_tail = self._stored_last = None

    def clear(self, scale: int) -> None:
        """Note that the database has no chunk of it any more, and continue with another scale."""
        self.scale = scale
        self.chunks, self._heads = {}, {}
        self._tail = self._before_tail = self._stored_last = None

    def rest(self) -> None:
        """Leave nothing in memory but the summary. The database must have all of it."""
        self.chunks, self._heads = {}, None
        self._tail = self._before_tail = self._stored_last = None

    def written(self, number: int, record: Record | None) -> None:
        """Note the record of a chunk that the database has now, None if it was removed there."""
        if self._heads is not None:
            if record is None:
                self._heads.pop(number, None)
            else:
                self._heads[number] = record

    def summary(self, database: Database) -> tuple[int, Record] | None:
        """Return the last step and the record of all points, None if there are none."""
        if self.is_idle and self._summary is not None:
            return self._summary
        tail = self.tail(database)
        if tail is None:
            return None
        if self._before_tail is None:
            earlier = [self.record(database, number) for number in self.numbers(database) if number != tail]
            self._before_tail = merge(earlier)
        return self.last_step(database), merge((self._before_tail, self.record(database, tail)))

    def pack_summary(self, database: Database) -> bytes | None:
        """Return the summary as the database has it from now on."""
        self._summary = self.summary(database)
        return None if self._summary is None else _SUMMARY.pack(self._summary[0], *self._summary[1])


class Rows:
    """Rows with values for the same series, one after another."""

    __slots__ = ("names", "series", "steps", "values")

    def __init__(self, names: tuple[str, ...], series: list[Series]) -> None:
        self.names = names
        self.series = series
        self.steps: list[int] = []
        self.values: array[float] = array("d")


class Cut(NamedTuple):
    """The points of these series from a step on are removed."""

    series: list[Series]
    step: int


class Lane:
    """The series of one rank of a run, and the rows to which the next one may be added."""

    __slots__ = ("rows", "series")

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}
        self.rows: Rows | None = None
