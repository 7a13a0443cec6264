"""What computes the frames of live topics: one source for each topic, marked by changes.

Marking happens on the loop, computing on the store's thread; `take` passes the marks from one to the other.
"""

import time
from collections.abc import Callable
from typing import Any, ClassVar, Final, NamedTuple, TypeAlias

import msgspec

from evsys_adapters.dashboard import pages
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.server.charts import ChartQuery, Lines, add_chart, read_chart
from evsys_adapters.dashboard.server.columns import ColumnWriter
from evsys_adapters.dashboard.store import Store

MAX_LIVE_BUCKETS: Final = 64
"""A frame with more buckets would take long for every viewer; they read the chart again instead."""

Content: TypeAlias = "dict[str, Any] | None"
"""The header of a frame, without topic and number; None if there is nothing new."""


class Views(msgspec.Struct):
    """What has changed, in the terms of topics."""

    experiments: set[str] = msgspec.field(default_factory=set[str])
    charts: dict[tuple[str, str], dict[int, tuple[int, int]]] = msgspec.field(
        default_factory=dict[tuple[str, str], dict[int, tuple[int, int]]]
    )
    """Experiment and metric -> id of a series -> its smallest and largest changed step, also one that was removed."""


class Place(NamedTuple):
    """Where a series is drawn."""

    experiment: str
    metric: str


class Places:
    """Which topics a batch concerns. Remembers series and experiments, whose ids are fixed while a store is open."""

    def __init__(self) -> None:
        self._times_opened = 0
        self._series: Final[dict[int, Place]] = {}
        self._experiments: Final[dict[int, str]] = {}

    def check(self, times_opened: int) -> None:
        """Forget all if the store was opened again (`StoreThread.times_opened`)."""
        if times_opened != self._times_opened:
            self._times_opened = times_opened
            self._series.clear()
            self._experiments.clear()

    def unknown(self, changes: Changes) -> tuple[set[int], set[int]]:
        """Return the series and experiments to look up first."""
        return changes.series.keys() - self._series.keys(), changes.experiments - self._experiments.keys()

    def look_up(self, store: Store, series: set[int], experiments: set[int]) -> None:
        """Look them up, on the store's thread."""
        records = store.catalogue.records
        for id_ in experiments:
            found = records.experiment(id_)
            if found is not None:
                self._experiments[id_] = found.public
        for id_ in series:
            for run, metric in store.database.query("SELECT run, name FROM series WHERE id = ?", id_):
                record = records.run(run)
                experiment = None if record is None else records.experiment(record.experiment)
                if experiment is not None:
                    self._series[id_] = Place(experiment.public, metric)

    def add(self, changes: Changes, views: Views) -> None:
        """Add the topics that a batch concerns."""
        views.experiments.update(self._experiments[each] for each in changes.experiments if each in self._experiments)
        for id_, steps in changes.series.items():
            place = self._series.get(id_)
            if place is not None:
                _add_steps(views.charts.setdefault(place, {}), id_, steps)


class FrameSource:
    """Computes the frames of a topic."""

    is_page: ClassVar[bool] = True
    """Whether its frames are built from a page, which time changes too."""
    is_whole: ClassVar[bool] = False
    """Whether each frame replaces all earlier ones."""

    def __init__(self) -> None:
        self.is_changed = False
        self._is_complete = False

    def start_from(self, page: dict[str, Any]) -> None:
        """Send only what differs from a page that the viewer has read, before the first frame."""
        raise NotImplementedError

    def mark(self, views: Views) -> None:
        """Note a change that concerns the topic."""
        raise NotImplementedError

    def mark_all(self) -> None:
        """Have everything sent again."""
        self.is_changed = self._is_complete = True

    def take(self) -> Callable[[Store, ColumnWriter], Content]:
        """Return what computes the next frame on the store's thread; the topic is unmarked."""
        is_complete, self._is_complete, self.is_changed = self._is_complete, False, False
        return lambda store, _: self._compute(store, is_complete=is_complete)

    def _compute(self, store: Store, *, is_complete: bool) -> Content:
        raise NotImplementedError


class HomeFrame(FrameSource):
    """The experiments of the home page whose rows differ from the last frame."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, dict[str, Any]] = {}

    def start_from(self, page: dict[str, Any]) -> None:
        """Send only the rows that differ from those of this page."""
        self._rows = {row["id"]: row for row in page["experiments"]}

    def mark(self, views: Views) -> None:
        """Note a change of any experiment."""
        if views.experiments:
            self.is_changed = True

    def _compute(self, store: Store, *, is_complete: bool) -> Content:
        rows = {row["id"]: row for row in pages.home(store)["experiments"]}
        changed = [row for id_, row in rows.items() if is_complete or self._rows.get(id_) != row]
        removed = sorted(self._rows.keys() - rows.keys())
        self._rows = rows
        if not changed and not removed and not is_complete:
            return None
        return {"kind": "data", "home": {"now": time.time(), "experiments": changed, "removed": removed}}


class ExperimentFrame(FrameSource):
    """The page of an experiment, without its metrics unless these have changed."""

    is_whole = True

    def __init__(self, experiment: str) -> None:
        super().__init__()
        self._experiment = experiment
        self._sent: dict[str, Any] | None = None

    def start_from(self, page: dict[str, Any]) -> None:
        """Send nothing while the page is this one, and its metrics only once they differ."""
        self._sent = {name: value for name, value in page.items() if name != "now"}

    def mark(self, views: Views) -> None:
        """Note a change of the experiment."""
        if self._experiment in views.experiments:
            self.is_changed = True

    def _compute(self, store: Store, *, is_complete: bool) -> Content:
        page = pages.experiment(store, self._experiment)
        if page is None:
            return {"kind": "refetch"}
        page = {name: value for name, value in page.items() if name != "now"}
        sent, self._sent = self._sent, page
        if sent == page and not is_complete:
            return None
        is_same = not is_complete and sent is not None and _names(sent) == _names(page)
        return {
            "kind": "data",
            "experiment": {k: v for k, v in page.items() if not (is_same and k == "metrics")} | {"now": time.time()},
        }


class ChartFrame(FrameSource):
    """The last buckets of a chart, from the first changed one on."""

    is_page = False

    def __init__(self, experiment: str, lines: Lines, width: int, metric: str) -> None:
        super().__init__()
        self._experiment = experiment
        self._metric = metric
        self._lines: Lines = lines
        self._width = width
        self._steps: dict[int, tuple[int, int]] = {}

    def mark(self, views: Views) -> None:
        """Note changed steps of the chart."""
        for id_, steps in views.charts.get((self._experiment, self._metric), {}).items():
            _add_steps(self._steps, id_, steps)
            self.is_changed = True

    def take(self) -> Callable[[Store, ColumnWriter], Content]:
        """Return what computes the next frame."""
        steps, self._steps = self._steps, {}
        is_complete, self._is_complete, self.is_changed = self._is_complete, False, False
        return lambda store, writer: self._compute_chart(store, writer, {} if is_complete else steps)

    def _compute_chart(self, store: Store, writer: ColumnWriter, steps: dict[int, tuple[int, int]]) -> Content:
        refetch: dict[str, Any] = {"kind": "refetch"}
        if not steps:
            return refetch
        # The bucket before tells whether the last one is complete enough to be shown.
        first = (min(first for first, _ in steps.values()) // self._width - 1) * self._width
        query = ChartQuery(self._metric, lines=self._lines, first=first, buckets=MAX_LIVE_BUCKETS)
        chart = read_chart(store, self._experiment, query, self._width)
        for each in chart.drawn:
            _, last = steps.get(each.member.series, (0, None))
            if len(each.curve.x) > MAX_LIVE_BUCKETS or (
                # A run that was resumed has removed steps, which a frame cannot express.
                last is not None and (each.last is None or each.last + self._width <= last)
            ):
                return refetch
        return {"kind": "data", "chart": add_chart(chart, writer)}


def _add_steps(found: dict[int, tuple[int, int]], series: int, steps: tuple[int, int]) -> None:
    known = found.get(series, steps)
    found[series] = min(known[0], steps[0]), max(known[1], steps[1])


def _names(page: dict[str, Any]) -> list[Any]:
    """Return what of the metrics is sent again when it differs; their numbers of points always do."""
    return [(each["name"], each.get("section"), each.get("constant")) for each in page["metrics"]]
