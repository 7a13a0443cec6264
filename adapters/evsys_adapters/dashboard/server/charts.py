"""Charts: the lines of a metric over the runs of an experiment, as columns.

A line is a run (``member``) or the mean of an arm with the spread over its seeds (``band``). All lines of a chart have
the same bucket width, so that a band compares the same steps of its seeds. The band's spread is that of the buckets'
means: it changes with the width.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.columns import ColumnWriter
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
    min: "Numbers"
    max: "Numbers"
    points: "Numbers"
    """Number of finite values."""
    bad: "Numbers"
    sd: "Numbers | None" = None


def read_charts(store: Store, query: ChartsQuery, frame: int) -> bytes:
    """Return the columns of charts. Raises AnswerError if the experiment does not exist.

    Args:
        store: The store.
        query: Which charts.
        frame: The number of the last live frame; later ones have what has changed since.
    """
    writer = ColumnWriter()
    charts = [read_chart(store, query.experiment, each, writer) for each in query.charts]
    return writer.encode({"charts": charts, "frame": frame})


def read_chart(
    store: Store, experiment: str, query: ChartQuery, writer: ColumnWriter, width: int | None = None
) -> dict[str, Any]:
    """Add the columns of a chart, and return its part of the header.

    Args:
        store: The store.
        experiment: The id of the experiment.
        query: Which chart.
        writer: Receives the columns.
        width: Steps of a bucket; None for the finest width with at most ``query.buckets`` of them.

    Raises:
        AnswerError: The experiment does not exist.
    """
    members = find_members(store, experiment, query)
    found = store.series.read(
        [each.series for each in members], first=query.first, last=query.last, buckets=query.buckets, width=width
    )
    curves = [
        (member, _without_live_edge(_curve(columns), found.width, member))
        for member, columns in zip(members, found.lines, strict=True)
    ]
    curves = [(member, curve) for member, curve in curves if len(curve.x)]
    lines: list[dict[str, Any]] = []
    clocks = {} if query.x == "step" else {m.run: _clock(store, m.run, query, found.width) for m, _ in curves}
    if query.lines != "members":
        by_arm: dict[str, list[tuple[Member, Curve]]] = {}
        for member, curve in curves:
            by_arm.setdefault(member.arm, []).append((member, curve))
        for arm, seeds in by_arm.items():
            about = {"kind": "band", "arm": arm, "run": None, "seed": None, "n": len(seeds)}
            band = join_seeds([curve for _, curve in seeds])
            lines.append({**about, **_columns(writer, band, [m.run for m, _ in seeds], clocks, query.x)})
    if query.lines != "band":
        for member, curve in curves:
            about = {"kind": "member", "arm": member.arm, "run": member.public, "seed": member.seed, "n": 1}
            lines.append({**about, **_columns(writer, curve, [member.run], clocks, query.x)})
    total = sum(int(curve.points.sum() + curve.bad.sum()) for _, curve in curves)
    return {"metric": query.metric, "width": found.width, "total": total, "lines": lines}


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
    """Return the mean over seeds, their spread, and their extremes, for every bucket that any of them has."""
    import numpy as np

    if len(curves) == 1:
        curve = curves[0]
        return curve._replace(sd=np.full(len(curve.x), np.nan))
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
        np.fmin.reduce(matrix("min", np.nan), axis=0),
        np.fmax.reduce(matrix("max", np.nan), axis=0),
        matrix("points", 0.0).sum(axis=0),
        matrix("bad", 0.0).sum(axis=0),
        sd,
    )


def _curve(columns: Any) -> Curve:
    return Curve(columns.x, columns.mean, columns.min, columns.max, columns.count, columns.bad)


def _without_live_edge(curve: Curve, width: int, member: Member) -> Curve:
    if width == 1 or not member.is_running or len(curve.x) < 2:  # noqa: PLR2004 # the last bucket and one before it
        return curve
    points = curve.points[-2:] + curve.bad[-2:]
    if points[1] * _LIVE_EDGE_SHARE >= points[0]:
        return curve
    return Curve(*(each[:-1] for each in curve if each is not None))


def _columns(
    writer: ColumnWriter, curve: Curve, runs: Sequence[int], clocks: Mapping[int, "_Clock"], axis: Axis
) -> dict[str, Any]:
    x = curve.x if axis == "step" else _seconds(curve.x, [clocks[run] for run in runs], axis)
    columns: dict[str, Any] = {
        "points": int(curve.points.sum()),
        "bad": int(curve.bad.sum()),
        "end": float(curve.x[-1]),
        "x": writer.add(x),
        "mean": writer.add(curve.mean),
        "min": writer.add(curve.min),
        "max": writer.add(curve.max),
    }
    if curve.sd is not None:
        columns["sd"] = writer.add(curve.sd)
    if columns["bad"]:
        columns["badAt"] = writer.add(x[curve.bad > 0])
    if axis != "step":
        columns["steps"] = writer.add(curve.x)
    return columns


class _Clock(NamedTuple):
    """When a run reached its steps."""

    steps: "Numbers"
    seconds: "Numbers"
    start: float


def _clock(store: Store, run: int, query: ChartQuery, width: int) -> _Clock:
    steps, seconds = store.series.wall_times(run, query.first, query.last, width)
    start = float(seconds[0]) if len(seconds) else 0.0
    if query.first is not None and query.x == "relative":
        _, beginning = store.series.wall_times(run, None, None, _MAX_BUCKETS * width)
        start = float(beginning[0]) if len(beginning) else start
    return _Clock(steps, seconds, start)


def _seconds(x: "Numbers", clocks: Sequence[_Clock], axis: Axis) -> "Numbers":
    """Return the time of each step: the mean over the runs of a band."""
    import numpy as np

    rows = [
        np.interp(x, clock.steps, clock.seconds) - (clock.start if axis == "relative" else 0.0)
        if len(clock.steps)
        else np.full(len(x), np.nan)
        for clock in clocks
    ]
    return np.mean(rows, axis=0)
