"""Charts: the lines of a metric over the runs of an experiment, as columns.

A line is a run (``member``) or the mean of an arm with the spread over its seeds (``band``). All lines of a chart have
the same bucket width, so that a band compares the same steps of its seeds. The band's spread is that of the buckets'
means: it changes with the width.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from evsys_adapters.dashboard.levels import SeriesColumns
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.columns import ColumnWriter, round_numbers
from evsys_adapters.dashboard.store import Store

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[Any]

Lines: TypeAlias = Literal["band", "members", "both"]
Axis: TypeAlias = Literal["step", "relative", "wall"]

MAX_CHARTS: Final = 100
_MAX_BUCKETS: Final = 5_000
_LIVE_EDGE_SHARE: Final = 4
"""The last bucket of a run under way is left out while it has less than this part of the points of the one before."""


class ChartQuery(msgspec.Struct, frozen=True):
    """One chart."""

    metric: str
    runs: list[str] | None = None
    """Ids of the runs to draw; None for all."""
    lines: Lines = "band"
    first: int | None = msgspec.field(default=None, name="from")
    """The range of steps, both ends included."""
    last: int | None = msgspec.field(default=None, name="to")
    buckets: Annotated[int, msgspec.Meta(ge=1, le=_MAX_BUCKETS)] = 500
    x: Axis = "step"
    rank: int | None = None
    """None for the lowest rank of each run."""


class ChartsQuery(msgspec.Struct, frozen=True):
    """All charts that a page shows now."""

    experiment: str
    charts: Annotated[list[ChartQuery], msgspec.Meta(max_length=MAX_CHARTS)]


class Member(NamedTuple):
    """A series to draw: the metric of one run."""

    series: int
    run: int
    public: str
    arm: str
    seed: int | None
    is_running: bool


class Curve(NamedTuple):
    """Buckets of a series or of a band; ``x`` is the first step of each."""

    x: "Numbers"
    mean: "Numbers"
    min: "Numbers | None"
    max: "Numbers | None"
    points: "Numbers"
    """Number of finite values."""
    bad: "Numbers"
    sd: "Numbers | None" = None


class Drawn(NamedTuple):
    """A member with its curve."""

    member: Member
    curve: Curve
    last: float | None
    """The last bucket that was read, which may be left out of the curve; None if the range has none."""
    points: int
    """Finite values of the whole series."""
    bad: int
    """Its other values."""


class Clock(NamedTuple):
    """When a run reached its steps."""

    steps: "Numbers"
    seconds: "Numbers"
    start: float


class ClockKey(NamedTuple):
    """What a clock was read for."""

    run: int
    first: int | None
    last: int | None
    width: int
    x: Axis


class Chart(NamedTuple):
    """What was read for a chart."""

    query: ChartQuery
    width: int
    """Steps of a bucket."""
    drawn: list[Drawn]
    clocks: dict[int, Clock]
    """Run -> clock, where the axis is time."""


def write_chart(
    store: Store, experiment: str, query: ChartQuery, writer: ColumnWriter, clocks: dict[ClockKey, Clock]
) -> dict[str, Any]:
    """Read a chart, add its columns, and return its part of the header.

    Args:
        store: The store.
        experiment: The id of the experiment.
        query: Which chart.
        writer: Receives the columns.
        clocks: Those that were read for other charts of the request; new ones are added.

    Raises:
        AnswerError: The experiment does not exist.
    """
    return add_chart(read_chart(store, experiment, query, clocks=clocks), writer)


def read_chart(
    store: Store,
    experiment: str,
    query: ChartQuery,
    width: int | None = None,
    *,
    clocks: dict[ClockKey, Clock] | None = None,
) -> Chart:
    """Read the series of a chart.

    Args:
        store: The store.
        experiment: The id of the experiment.
        query: Which chart.
        width: Steps of a bucket; None for the finest width with at most ``query.buckets`` of them.
        clocks: Those that are known; new ones are added.

    Raises:
        AnswerError: The experiment does not exist.
    """
    members = find_members(store, experiment, query)
    ids = [each.series for each in members]
    found = store.series.read(ids, first=query.first, last=query.last, buckets=query.buckets, width=width)
    drawn: list[Drawn] = []
    for member, line, (points, bad) in zip(members, found.lines, store.series.counts(ids), strict=True):
        curve = _curve(line, found.width, is_running=member.is_running)
        last = float(line.x[-1]) if len(line.x) else None
        drawn.append(Drawn(member, curve, last, points, bad))
    clocks = {} if clocks is None else clocks
    used: dict[int, Clock] = {}
    for each in () if query.x == "step" else members:
        key = ClockKey(each.run, query.first, query.last, found.width, query.x)
        if key not in clocks:
            clocks[key] = _read_clock(store, each.run, query, found.width)
        used[each.run] = clocks[key]
    return Chart(query, found.width, drawn, used)


def add_chart(chart: Chart, writer: ColumnWriter) -> dict[str, Any]:
    """Add the columns of a chart, and return its part of the header."""
    query = chart.query
    drawn = [each for each in chart.drawn if each.points + each.bad]
    lines: list[dict[str, Any]] = []

    def add_line(curve: Curve, of: Sequence[Drawn], **about: object) -> None:
        if len(curve.x):
            # Points are sent as they were logged; means need not be that precise.
            curve = curve if chart.width == 1 and len(of) == 1 else _rounded(curve)
            lines.append(about | {"n": len(of)} | _columns(writer, curve, of, chart.clocks, query.x))

    if query.lines != "members":
        by_arm: dict[str, list[Drawn]] = {}
        for each in drawn:
            by_arm.setdefault(each.member.arm, []).append(each)
        for arm, seeds in by_arm.items():
            add_line(join_seeds([each.curve for each in seeds]), seeds, kind="band", arm=arm, run=None, seed=None)
    if query.lines != "band":
        for each in drawn:
            member = each.member
            add_line(each.curve, [each], kind="member", arm=member.arm, run=member.public, seed=member.seed)
    total = sum(each.points + each.bad for each in drawn)
    return {"metric": query.metric, "width": chart.width, "total": total, "lines": lines}


def find_members(store: Store, experiment: str, query: ChartQuery) -> list[Member]:
    """Return the series of a chart, in the order of the runs. Raises AnswerError if the experiment does not exist."""
    known = store.catalogue.experiment_id(experiment)
    if known is None:
        raise AnswerError(404, "experiment", "no such experiment", fix="look at the home page; it may be in the trash")
    members: list[Member] = []
    for each in store.catalogue.runs_of(known, time.time()):
        if query.runs is None or each.public in query.runs:
            for (series,) in store.database.query(
                "SELECT id FROM series WHERE run = ? AND rank = ? AND name = ?",
                *(each.id, each.rank if query.rank is None else query.rank, query.metric),
            ):
                members.append(Member(series, each.id, each.public, each.arm, each.seed, each.state == "running"))
    return members


def join_seeds(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds and their standard deviation, for every bucket that any of them has.

    The deviation is NaN where only one seed has a bucket. One seed alone is returned as it is.
    """
    import numpy as np

    if len(curves) == 1:
        return curves[0]
    first = curves[0].x
    if all(len(each.x) == len(first) and bool((each.x == first).all()) for each in curves):
        x = first
    else:
        x = np.unique(np.concatenate([each.x for each in curves]))

    def matrix(name: str, missing: float) -> Any:
        rows = np.full((len(curves), len(x)), missing)
        for row, curve in zip(rows, curves, strict=True):
            row[np.searchsorted(x, curve.x)] = getattr(curve, name)
        return rows

    means = matrix("mean", np.nan)
    valid = np.isfinite(means)
    n = valid.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.where(valid, means, 0.0).sum(axis=0) / n
        deviations = np.where(valid, means - mean, 0.0)
        sd = np.sqrt((deviations**2).sum(axis=0) / (n - 1.0))
    sd[n < 2] = np.nan  # noqa: PLR2004 # one seed has no spread
    return Curve(
        x,
        mean,
        None,
        None,
        matrix("points", 0.0).sum(axis=0),
        matrix("bad", 0.0).sum(axis=0),
        sd,
    )


def _curve(line: SeriesColumns, width: int, *, is_running: bool) -> Curve:
    """Return what to draw of a series."""
    end = len(line.x)
    if width > 1 and is_running and end > 1:
        points = line.count + line.bad
        end -= bool(points[-1] * _LIVE_EDGE_SHARE < points[-2])
    return Curve(*(each[:end] for each in (line.x, line.mean, line.min, line.max, line.count, line.bad)))


def _rounded(curve: Curve) -> Curve:
    mean, low, high, sd = (
        None if each is None else round_numbers(each) for each in (curve.mean, curve.min, curve.max, curve.sd)
    )
    return curve._replace(mean=mean, min=low, max=high, sd=sd)


def _columns(
    writer: ColumnWriter, curve: Curve, drawn: Sequence[Drawn], clocks: Mapping[int, Clock], axis: Axis
) -> dict[str, Any]:
    x = curve.x if axis == "step" else _seconds(curve.x, [clocks[each.member.run] for each in drawn], axis)
    columns: dict[str, Any] = {
        "points": sum(each.points for each in drawn),
        "bad": sum(each.bad for each in drawn),
        "end": float(curve.x[-1]),
        "x": writer.add(x),
        "mean": writer.add(curve.mean),
    }
    for name, values in (("min", curve.min), ("max", curve.max), ("sd", curve.sd)):
        if values is not None:
            columns[name] = writer.add(values)
    if (curve.bad > 0).any():
        columns["badAt"] = writer.add(x[curve.bad > 0])
    if axis != "step":
        columns["steps"] = writer.add(curve.x)
    return columns


def _read_clock(store: Store, run: int, query: ChartQuery, width: int) -> Clock:
    steps, seconds = store.series.wall_times(run, query.first, query.last, width)
    start = float(seconds[0]) if len(seconds) else 0.0
    if query.first is not None and query.x == "relative":
        _, beginning = store.series.wall_times(run, None, None, _MAX_BUCKETS * width)
        start = float(beginning[0]) if len(beginning) else start
    return Clock(steps, seconds, start)


def _seconds(x: "Numbers", clocks: Sequence[Clock], axis: Axis) -> "Numbers":
    """Return the time of each step: the mean over the runs of a band."""
    import numpy as np

    rows = [
        np.interp(x, clock.steps, clock.seconds) - (clock.start if axis == "relative" else 0.0)
        if len(clock.steps)
        else np.full(len(x), np.nan)
        for clock in clocks
    ]
    return np.mean(rows, axis=0)
