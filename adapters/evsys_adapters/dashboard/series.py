"""The points of all series: open chunks in memory, written ones in the database, and a log of what these lack.

Every change is "this step has this value" or "from this step on there is nothing", so that applying the log again to
any later state gives that state. A change is logged in the transaction that acknowledges it. A chunk is written when
its series goes on to the next one, and all of them in portions once the log is long; then the log is emptied. Reads
take a chunk from memory if it is there, else from the database.

A new series puts all its points into one chunk. When it has 64 or some more, the median distance of their steps gives
its scale (see `chunks`). A scale that later proves wrong is changed, and the series written anew.
"""

from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from operator import index
from typing import Any, Final

import msgspec

from evsys_adapters.dashboard.chunks import (
    CHUNK_BITS,
    RECORD,
    Chunk,
    Steps,
    compact,
    median_distance,
    pack_points,
    reported_damage,
    roll_up,
)
from evsys_adapters.dashboard.database import Database, Row
from evsys_adapters.dashboard.levels import ChartColumns, SeriesColumns, read_columns
from evsys_adapters.dashboard.open_series import MAX_CHUNK, Changes, Cut, Lane, Rows, Series, SeriesInfo

TIME: Final = "_time"
"""Name of the series of a run's wall clock: seconds since the epoch, once for each step."""
EPOCH: Final = "epoch/"
"""Prefix of the series whose steps are epochs."""
MAX_STEP: Final = 1 << 53
"""Steps are above minus this and below this."""

_NEW_SCALE: Final = 42
"""Scale of a series with few points: one chunk has all steps."""
_NEW_POINTS: Final = 64
"""With so many points, or up to twice as many, a series gets its scale."""
_DENSE_POINTS: Final = 8_192
"""With so many points in a chunk, its scale is too large."""
_SPARSE_POINTS: Final = 64
"""With fewer points in each of so many chunks, their scale is too small."""
_LOADED_SERIES: Final = 500
_PORTION: Final = 16
"""Chunks that a transaction writes for a checkpoint under way; one for each 100 of its points if that is more."""

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[tuple[Any, ...]]).decode


class SeriesStore:
    """The series of all runs. Changes are made inside a transaction of the database, and `flush` ends them.

    After an error in a transaction, what is in memory is of no use any more: open the store again.

    Args:
        database: The database, with the tables of `schema`.
        checkpoint_points: A checkpoint begins when the log has more points than this, or than 100 for each open chunk
            up to ten times this.
        max_idle_series: With more series in memory than this, those of idle runs leave it at the end of a checkpoint.
        is_reader: Whether another process makes the changes, which `follow` reads.
    """

    def __init__(
        self,
        database: Database,
        *,
        checkpoint_points: int = 400_000,
        max_idle_series: int = 50_000,
        is_reader: bool = False,
    ) -> None:
        self._database: Final = database
        self._max_idle_series: Final = max_idle_series
        self._checkpoint_points: Final = checkpoint_points
        self.refused = 0
        """Points without a place: their step is too far from all others, or no int of 53 bits."""
        self._lanes: dict[int, dict[int, Lane]] = {}  # run -> rank -> lane
        self._by_id: dict[int, Series] = {}
        self._next_id: int = database.query("SELECT COALESCE(MAX(id), 0) + 1 FROM series")[0][0]
        self._new: list[Series] = []  # created in this transaction, and not in the database yet
        self._pending: list[Rows | Cut] = []  # changes of this transaction
        self._applied = 0  # how many of them are in the chunks
        self._open_lanes: list[Lane] = []  # those with rows that may grow
        self._changes = Changes()
        self._unwritten: dict[int, tuple[Series, int]] = {}  # row id of a chunk that the database lacks -> its place
        self._written_tails: dict[int, tuple[Series, int]] = {}  # in memory although the database has them
        self._idle_tails: dict[int, tuple[Series, int]] = {}  # those that had been written before the last checkpoint
        self._due: set[int] = set()  # row ids of chunks to write in this transaction
        self._is_reader: Final = is_reader
        self._generation, self._log_id = self._read_generation()
        self._log_points = 0
        self._checkpoint: tuple[list[int], int, int] | None = None  # rows to write; last log id, points of the log then
        if is_reader:
            self._replay_log(self._database.query("SELECT id, body FROM log ORDER BY id"))
        else:
            self._replay()

    def follow(self) -> bool:
        """Apply what the writer has logged since the last call, inside a snapshot.

        Returns:
            Whether that was enough. If not, chunks of this object may be gone in the database: read it anew.
        """
        if self._read_generation()[0] != self._generation:
            return False
        self._replay_log(self._database.query("SELECT id, body FROM log WHERE id > ? ORDER BY id", self._log_id))
        return True

    def add_row(self, run: int, rank: int, step: int, time: float | None, values: Mapping[str, float]) -> int:
        """Add the values of one step, which replace those that it has, and return how many were added.

        A row whose step or rank is too large is refused, and counted.

        Args:
            run: Id of the run.
            rank: Rank of the process that published the row.
            step: The step.
            time: When it was published (seconds since the epoch); None leaves the clock of the run as it is.
            values: Name -> value. Names with the prefix `EPOCH` have epochs as steps.

        Raises:
            TypeError: The step is no int, or a value no number. Nothing of the row was added.
            OverflowError: A value is an int that no float can be. Nothing of the row was added.
        """
        if type(step) is not int:
            step = index(step)
        if not (-MAX_STEP < step < MAX_STEP and -MAX_STEP < rank < MAX_STEP):
            self.refused += len(values)
            return 0
        lane = self._lane(run, rank)
        names = tuple(values) if time is None else (*values, TIME)
        rows = lane.rows
        if rows is None or rows.names != names:
            rows = self._new_rows(lane, run, rank, names)
        size = len(rows.values)
        try:
            rows.values.extend(values.values())
            if time is not None:
                rows.values.append(time)
        except (TypeError, OverflowError):
            del rows.values[size:]
            raise
        rows.steps.append(step)
        return len(values)

    def add(self, run: int, rank: int, name: str, step: int, value: float, time: float | None) -> int:
        """Add one point, as `add_row` does, and return the id of its series; 0 if the point was refused."""
        return self._lane(run, rank).series[name].id if self.add_row(run, rank, step, time, {name: value}) else 0

    def cut(self, run: int, rank: int, step: int, *, epochs: bool = False) -> None:
        """Remove the points of a rank from this step on, or with `epochs` those of its epochs from this epoch on."""
        self._apply()
        lane = self._lane(run, rank)
        series = [each for name, each in lane.series.items() if name.startswith(EPOCH) == epochs]
        summaries = [(each, each.summary(self._database)) for each in series]
        longer = [each for each, summary in summaries if summary is not None and summary[0] >= step]
        if longer:
            self._pending.append(Cut(longer, step))

    def names(self, run: int) -> list[SeriesInfo]:
        """Return the series of a run in the order in which they were created, without its clock."""
        self._apply()
        lanes = self._lanes_of(run)
        found = [each for lane in lanes.values() for name, each in lane.series.items() if name != TIME]
        return [self._info(each) for each in sorted(found, key=lambda each: each.id)]

    def names_at(self, run: int, rank: int, step: int) -> set[str]:
        """Return the names of those series of a rank that have a point at a step."""
        found = [info for info in self.names(run) if info.rank == rank]
        lines = self.read([info.id for info in found], first=step, last=step, width=1).lines
        return {info.name for info, line in zip(found, lines, strict=True) if len(line.x)}

    def read(
        self,
        ids: Sequence[int],
        *,
        first: int | None = None,
        last: int | None = None,
        buckets: int = 500,
        width: int | None = None,
    ) -> ChartColumns:
        """Read series in buckets of one width: the finest one at which none has more than so many buckets.

        Args:
            ids: Ids of series; an unknown one reads as a series without points.
            first: The smallest step, None for all. Buckets are whole: those of which a part lies in the range.
            last: The largest step, None for all.
            buckets: How many a series may have.
            width: Steps of a bucket (the next power of two is taken) instead of the finest width.
        """
        self._apply()
        series = [self._find(each) or Series(each, 0, 0, "", scale=0, is_new=True) for each in ids]
        return read_columns(self._database, series, first=first, last=last, buckets=buckets, width=width)

    def counts(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return how many finite and how many other values each of these series has in all."""
        self._apply()
        found: list[tuple[int, int]] = []
        for each in (self._find(id_) or Series(id_, 0, 0, "", scale=0, is_new=True) for id_ in ids):
            records = [each.record(self._database, number) for number in each.numbers(self._database)]
            found.append((sum(record.finite for record in records), sum(record.bad for record in records)))
        return found

    def wall_times(
        self, run: int, first: int | None = None, last: int | None = None, width: int = 1
    ) -> tuple[Any, Any]:  # arrays of numpy, which this module does not import
        """Return the first step of each bucket of this width, and when it began (seconds since the epoch), as arrays.

        The clock is that of the lowest rank.
        """
        self._apply()
        lanes = self._lanes_of(run)
        clocks = [lane.series[TIME] for _, lane in sorted(lanes.items()) if TIME in lane.series]
        line: SeriesColumns = self.read(
            [clock.id for clock in clocks[:1]] or [0], first=first, last=last, width=width
        ).lines[0]
        return line.x, line.min

    def remove(self, run: int) -> None:
        """Remove all points of a run, inside a transaction. The whole log is emptied with them."""
        self.checkpoint()
        for lane in self._lanes_of(run).values():
            for series in lane.series.values():
                for table in ("raw", "rollup"):
                    self._database.execute(f"DELETE FROM {table} WHERE id BETWEEN ? AND ?", *series.row_ids)  # noqa: S608 # one of two
                self._by_id.pop(series.id, None)
        self._database.execute("DELETE FROM series WHERE run = ?", run)
        self._lanes.pop(run, None)

    def flush(self) -> None:
        """Log and apply the changes of this transaction, and write the chunks that are due."""
        if self._new:
            self._database.executemany(
                "INSERT INTO series (id, run, rank, name, scale, summary) VALUES (?, ?, ?, ?, ?, NULL)",
                [(each.id, each.run, each.rank, each.name, each.scale) for each in self._new],
            )
            self._new = []
        logged = self._log_points
        if self._pending:
            self._apply()
            self._log()
            self._pending, self._applied = [], 0
        if self._checkpoint is None and self._log_points >= max(
            self._checkpoint_points, min(100 * len(self._unwritten), 10 * self._checkpoint_points)
        ):
            self._checkpoint = list(self._unwritten), self._log_id, self._log_points
        if self._checkpoint is not None:
            rows, portion = self._checkpoint[0], max(_PORTION, (self._log_points - logged) // 100)
            self._due.update(rows[-portion:])
            del rows[-portion:]
        self._write(self._due)
        self._due = set()
        if self._checkpoint is not None and not self._checkpoint[0]:
            self._end_checkpoint(*self._checkpoint[1:])

    def checkpoint(self) -> None:
        """End the changes of this transaction as `flush` does, write all open chunks, and empty the log."""
        self.flush()
        self._write(list(self._unwritten))
        self._end_checkpoint(self._log_id, self._log_points)

    def take_changes(self) -> Changes:
        """Return which steps changed since the last call."""
        changes, self._changes = self._changes, Changes()
        return changes

    # -- series

    def _lanes_of(self, run: int) -> dict[int, Lane]:
        lanes = self._lanes.get(run)
        return self._read_lanes(run) if lanes is None else lanes

    def _read_lanes(self, run: int) -> dict[int, Lane]:
        """Add the series of a run that are not in memory yet."""
        lanes = self._lanes.setdefault(run, {})
        rows = self._database.query("SELECT id, rank, name, scale, summary FROM series WHERE run = ?", run)
        for series_id, rank, name, scale, summary in rows:
            if series_id not in self._by_id:
                series = self._by_id[series_id] = Series(series_id, run, rank, name, scale=scale, summary=summary)
                lanes.setdefault(rank, Lane()).series[name] = series
        return lanes

    def _lane(self, run: int, rank: int) -> Lane:
        lanes = self._lanes.get(run) or self._lanes_of(run)
        lane = lanes.get(rank)
        if lane is None:
            lane = lanes[rank] = Lane()
        return lane

    def _new_rows(self, lane: Lane, run: int, rank: int, names: tuple[str, ...]) -> Rows:
        series: list[Series] = []
        for name in names:
            each = lane.series.get(name)
            if each is None:
                each = lane.series[name] = Series(self._next_id, run, rank, name, scale=_NEW_SCALE, is_new=True)
                self._by_id[each.id] = each
                self._new.append(each)
                self._next_id += 1
            series.append(each)
        rows = lane.rows = Rows(names, series)
        self._pending.append(rows)
        self._open_lanes.append(lane)
        return rows

    def _find(self, series_id: int) -> Series | None:
        if series_id not in self._by_id:
            for (run,) in self._database.query("SELECT run FROM series WHERE id = ?", series_id):
                self._read_lanes(run)
        return self._by_id.get(series_id)

    def _info(self, series: Series) -> SeriesInfo:
        summary = series.summary(self._database)
        if summary is None:
            return SeriesInfo(series.id, series.name, series.rank, 0, 0, None, None, None, None, constant=False)
        last_step, record = summary
        low, high = (record.low, record.high) if record.finite else (None, None)
        constant = not record.bad and low == high
        return SeriesInfo(
            series.id, series.name, series.rank, record.finite, record.bad, last_step, record.last, low, high, constant
        )

    # -- changes

    def _apply(self) -> None:
        """Bring the changes of this transaction into the chunks."""
        for lane in self._open_lanes:
            lane.rows = None
        self._open_lanes = []
        for change in self._pending[self._applied :]:
            if isinstance(change, Cut):
                self._remove_steps(change.series, change.step)
            elif change.steps:
                self._put_rows(change)
        self._applied = len(self._pending)

    def _put_rows(self, rows: Rows) -> None:
        steps, count = rows.steps, len(rows.series)
        order: list[int] | None = None
        if not all(earlier < later for earlier, later in pairwise(steps)):
            newest = {step: at for at, step in enumerate(steps)}
            steps = sorted(newest)
            order = [newest[step] * count for step in steps]
        packed = compact(steps)
        first, last = packed[0], packed[-1]
        for place, series in enumerate(rows.series):
            values = rows.values[place::count]
            if order is not None:
                values = array("d", [rows.values[at + place] for at in order])
            self._put(series, packed, values)
            self._changes.add_steps(series.id, first, last)

    def _put(self, series: Series, steps: Steps, values: "array[float]") -> None:
        """Add points with increasing steps to the chunks they belong to."""
        at, shift = 0, CHUNK_BITS + series.scale
        number = steps[0] >> shift
        if number == steps[-1] >> shift:
            self._put_chunk(series, number, steps, values)
            return
        while at < len(steps):
            if series.scale + CHUNK_BITS != shift:  # the scale was changed because of the former part
                self._put(series, steps[at:], values[at:])
                return
            number = steps[at] >> shift
            end = bisect_left(steps, (number + 1) << shift, at)
            self._put_chunk(series, number, steps[at:end], values[at:end])
            at = end

    def _put_chunk(self, series: Series, number: int, steps: Steps, values: "array[float]") -> None:
        if not -MAX_CHUNK <= number < MAX_CHUNK:
            self.refused += len(steps)
            return
        tail = series.tail(self._database)
        if tail is not None and number > tail and self._leave_tail(series, tail):
            self._put(series, steps, values)
            return
        chunk = series.chunks.get(number)
        if chunk is None:
            chunk = series.chunks[number] = series.chunk(self._database, number)
        chunk.put(steps, values)
        series.put_into(number)
        self._unwritten[series.row_id(number)] = series, number
        points = len(chunk.values)
        if series.scale == _NEW_SCALE and points >= _NEW_POINTS + series.id % _NEW_POINTS:  # not all in one transaction
            self._change_scale(series, min(median_distance(chunk.steps).bit_length(), _NEW_SCALE) - 1)
        elif points > _DENSE_POINTS:
            series.may_widen = False
            self._change_scale(series, min(median_distance(chunk.steps).bit_length() - 1, series.scale - 1))

    def _leave_tail(self, series: Series, tail: int) -> bool:
        """Have the last chunk written, for a later one follows; or return True if the series got another scale."""
        series.tails_left += 1
        if series.may_widen and series.tails_left % _SPARSE_POINTS == 0:
            numbers = series.numbers(self._database)
            records = [series.record(self._database, number) for number in numbers]
            points = sum(record.finite + record.bad for record in records)
            if points < _SPARSE_POINTS * len(numbers):
                distance = (numbers[-1] - numbers[0] + 1 << (CHUNK_BITS + series.scale)) // points
                self._change_scale(series, min(max(distance.bit_length() - 1, series.scale + 1), _NEW_SCALE - 1))
                return True
        if series.row_id(tail) in self._unwritten:
            self._due.add(series.row_id(tail))
        elif tail in series.chunks:
            del series.chunks[tail]
        return False

    def _change_scale(self, series: Series, scale: int) -> None:
        """Divide the points of a series into chunks of another scale, which this transaction writes."""
        steps: array[int] = array("q")
        values: array[float] = array("d")
        for number in series.numbers(self._database):
            chunk = series.chunk(self._database, number)
            steps.extend(chunk.steps)
            values.extend(chunk.values)
        for number in list(series.chunks):
            self._unwritten.pop(series.row_id(number), None)
            self._due.discard(series.row_id(number))
        stored = bool(series.heads(self._database))
        if stored and not self._is_reader:
            self._next_generation()
            for table in ("raw", "rollup"):
                self._database.execute(f"DELETE FROM {table} WHERE id BETWEEN ? AND ?", *series.row_ids)  # noqa: S608 # one of two
        series.clear(scale)
        if not self._is_reader:
            self._database.execute("UPDATE series SET scale = ? WHERE id = ?", scale, series.id)
        self._put(series, compact(steps), values)
        if stored:  # the log may lack its points
            self._due.update(map(series.row_id, series.chunks))
        elif self._checkpoint is not None:  # its end removes them from the log
            self._checkpoint[0].extend(map(series.row_id, series.chunks))

    def _remove_steps(self, series: Sequence[Series], step: int) -> None:
        for each in series:
            summary = each.summary(self._database)
            if summary is None or summary[0] < step:
                continue
            for number in each.numbers(self._database):
                if (number + 1) << (CHUNK_BITS + each.scale) > step:
                    chunk = each.chunks[number] = each.chunk(self._database, number)
                    chunk.cut(step)
                    self._unwritten[each.row_id(number)] = each, number
            each.cut()
            self._changes.add_steps(each.id, step, summary[0])

    # -- the database

    def _log(self) -> None:
        body: list[Row] = []
        for change in self._pending:
            ids = [each.id for each in change.series]
            if isinstance(change, Cut):
                body.append((ids, change.step))
            elif change.steps:
                body.append((ids, array("q", change.steps).tobytes(), change.values.tobytes()))
                self._log_points += len(change.values)
        if body:
            self._log_id += 1
            self._database.execute("INSERT INTO log (id, body) VALUES (?, ?)", self._log_id, _encode(body))

    def _replay(self) -> None:
        """Apply the log, without logging again."""
        with self._database.transaction():
            self._replay_log(self._database.query("SELECT id, body FROM log ORDER BY id"))
            self._write(self._due)
            self._due = set()
        self._changes = Changes()

    def _replay_log(self, rows: Sequence[Row]) -> None:
        with reported_damage():
            logged = [(ids, change) for _, body in rows for ids, *change in _decode(body)]
            self._load_heads({series_id for ids, _ in logged for series_id in ids})
            for ids, change in logged:
                self._replay_change(ids, change)
        self._apply()
        self._pending, self._applied = [], 0
        if rows:
            self._log_id = rows[-1][0]

    def _read_generation(self) -> tuple[int, int]:
        """Return how often chunks were removed, and the last id of the log then, after which its next ones come."""
        rows = self._database.query("SELECT value FROM meta WHERE key = 'generation'")
        generation, log_id = map(int, rows[0][0].split()) if rows else (0, 0)
        return generation, log_id

    def _next_generation(self) -> None:
        """Note that those who follow must read anew."""
        self._generation += 1
        self._database.execute(
            "INSERT INTO meta (key, value) VALUES ('generation', ?) ON CONFLICT (key)"
            " DO UPDATE SET value = excluded.value",
            f"{self._generation} {self._log_id}",
        )

    def _load_heads(self, ids: set[int]) -> None:
        """Read the heads of many series, with few statements: each waits for a server."""
        ordered = sorted(ids - self._by_id.keys())
        for start in range(0, len(ordered), _LOADED_SERIES):
            part = ordered[start : start + _LOADED_SERIES]
            found: dict[int, list[Row]] = {series_id: [] for series_id in part}
            for row_id, whole in self._database.query(
                "SELECT rollup.id, rollup.whole FROM series JOIN rollup ON rollup.id BETWEEN (series.id << 31)"  # noqa: S608 # marks only
                f" AND (series.id << 31) + 2147483647 WHERE series.id IN ({', '.join('?' * len(part))})",
                *part,
            ):
                found[row_id >> 31].append((row_id, whole))
            for series_id, rows in found.items():
                series = self._find(series_id)
                if series is not None:
                    series.set_heads(rows)

    def _replay_change(self, ids: Sequence[int], change: Sequence[Any]) -> None:
        series = [each for each in map(self._find, ids) if each is not None]
        if len(series) < len(ids):
            raise ValueError("the log has a series that does not exist")
        run, rank = series[0].run, series[0].rank
        lane = self._lane(run, rank)
        if len(change) == 1:
            lane.rows = None
            self._pending.append(Cut(series, change[0]))
            return
        names = tuple([each.name for each in series])
        rows = lane.rows  # rows of many transactions are applied as one, which takes a fraction of the time
        if rows is None or rows.names != names:
            rows = self._new_rows(lane, run, rank, names)
        rows.steps.extend(array("q", change[0]))
        rows.values.frombytes(change[1])
        self._log_points += len(change[1]) // rows.values.itemsize

    def _write(self, row_ids: Sequence[int] | set[int]) -> None:
        """Write chunks, and the summaries of their series. Those before the last one of a series leave the memory."""
        rollups: list[Row] = []
        raws: list[Row] = []
        empty: list[Row] = []
        touched: dict[int, Series] = {}
        for row_id in row_ids:
            place = self._unwritten.pop(row_id, None)
            if place is None:
                continue
            series, number = place
            touched[series.id] = series
            chunk: Chunk = series.chunks[number]
            if chunk.steps:
                record, middle, fine = roll_up(chunk, series.scale)
                rollups.append((row_id, RECORD.pack(*record), middle, fine))
                raws.append((row_id, pack_points(chunk.steps, chunk.values)))
                series.written(number, record)
            else:
                empty.append((row_id,))
                series.written(number, None)
            if number == series.tail(self._database):
                self._written_tails[row_id] = series, number
            else:
                del series.chunks[number]
        if empty:
            self._database.executemany("DELETE FROM raw WHERE id = ?", empty)
            self._database.executemany("DELETE FROM rollup WHERE id = ?", empty)
        if raws:
            self._database.executemany(
                "INSERT INTO raw (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body", raws
            )
            self._database.executemany(
                "INSERT INTO rollup (id, whole, r256, r32) VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE"
                " SET whole = excluded.whole, r256 = excluded.r256, r32 = excluded.r32",
                rollups,
            )
        if touched:
            self._database.executemany(
                "UPDATE series SET summary = ? WHERE id = ?",
                [(each.pack_summary(self._database), each.id) for each in touched.values()],
            )

    def _end_checkpoint(self, log_id: int, points: int) -> None:
        self._checkpoint = None
        self._database.execute("DELETE FROM log WHERE id <= ?", log_id)
        self._next_generation()
        self._log_points -= points
        busy = {series.id for series, _ in self._unwritten.values()}
        for row_id, (series, _) in self._idle_tails.items():
            if series.id not in busy and row_id not in self._written_tails:
                series.rest()
        self._idle_tails, self._written_tails = self._written_tails, {}
        if len(self._by_id) <= self._max_idle_series:
            return
        busy_runs = {series.run for series, _ in self._unwritten.values()}
        for run in self._lanes.keys() - busy_runs:
            for lane in self._lanes.pop(run).values():
                for series in lane.series.values():
                    del self._by_id[series.id]
