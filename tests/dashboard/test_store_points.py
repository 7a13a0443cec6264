"""The points of a store are those of a dict, whatever happened to it, and its buckets those of brute force."""

import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evsys_adapters.dashboard.store_reader import StoreReader
from support.database_places import location_in
from support.point_stores import StepPoints, brute_buckets, differing, open_store, points_of

VALUES = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0])
STARTS = st.integers(0, 5000) | st.sampled_from([-3000, -1, 2047, 2048, 10**6, 10**12])
STRIDES = st.sampled_from([1, 1, 1, 2, 7, 100, 1000])
ROWS = st.tuples(
    st.just("rows"), STARTS, STRIDES, st.integers(1, 300), st.sampled_from(["sorted", "shuffled", "twice"]), VALUES
)
ONE = st.tuples(st.just("one"), STARTS, VALUES)
CUT = st.tuples(st.just("cut"), STARTS)
OTHER = st.sampled_from([("commit",), ("commit",), ("checkpoint",), ("reopen",), ("kill",)])
CHECKPOINTS = st.sampled_from([1, 300, 10**6])
HISTORIES = st.lists(ROWS | ROWS | ONE | ONE | CUT | OTHER, max_size=30)


class History:
    """A store and the dict that it must equal. What is not committed when it is killed is forgotten by both."""

    def __init__(self, folder, checkpoint_points):
        self.folder, self.options = folder, {"checkpoint_points": checkpoint_points}
        self.store = open_store(folder, **self.options)
        self.points = {"loss": {}, "other": {}}
        self.pending = []

    def play(self, op):
        kind = op[0]
        if kind in {"rows", "one", "cut"}:
            self.pending.append(op)
        else:
            if kind != "kill":
                self.commit()
            getattr(self, kind, lambda: None)()

    def commit(self):
        with self.store.transaction():
            for kind, *rest in self.pending:
                getattr(self, kind)(*rest)
        self.pending = []

    def rows(self, start, stride, count, order, value):
        steps = [start + stride * index for index in range(count)]
        if order == "shuffled":
            random.Random(start).shuffle(steps)
        if order == "twice":
            steps = [step for step in steps for _ in range(2)]
        for index, step in enumerate(steps):
            self.add(step, value if index == count // 2 else index / 3)

    def one(self, step, value):
        self.add(step, value, names=("loss",))

    def add(self, step, value, names=("loss", "other")):
        self.store.series.add_row(1, 0, step, None, dict.fromkeys(names, value))
        for name in names:
            self.points[name][step] = float(value)

    def cut(self, step):
        self.store.series.cut(1, 0, step)
        for points in self.points.values():
            for later in [each for each in points if each >= step]:
                del points[later]

    def checkpoint(self):
        self.store.checkpoint()

    def reopen(self):
        self.store.close()
        self.store = open_store(self.folder, **self.options)

    def kill(self):
        self.pending = []
        self.store = self.store.reopen()

    def check(self):
        for info in self.store.series.names(1):
            expected = self.points[info.name]
            assert differing(points_of(self.store, info.id), expected) == []
            self.check_info(info, expected)
            for width in (2, 32, 256, 4096, 2**20):
                self.check_buckets(info.id, expected, width)
            chart = self.store.series.read([info.id], buckets=50)
            assert len(chart.lines[0].x) <= 50
            if chart.width > 1:
                self.check_buckets(info.id, expected, chart.width)

    def check_info(self, info, expected):
        finite = [value for value in expected.values() if math.isfinite(value)]
        assert (info.n, info.bad) == (len(finite), len(expected) - len(finite))
        assert (info.min, info.max) == ((min(finite), max(finite)) if finite else (None, None))
        assert info.last_step == (max(expected) if expected else None)
        if expected:
            assert repr(info.last) == repr(float(expected[max(expected)]))

    def check_buckets(self, series, expected, width):
        line = self.store.series.read([series], width=width).lines[0]
        brute = brute_buckets(expected, width)
        assert [int(each) for each in line.x] == list(brute)
        columns = zip(line.mean, line.min, line.max, line.last, line.count, line.bad, strict=True)
        for found, (mean, *others) in zip(columns, brute.values(), strict=True):
            assert found[1:] == pytest.approx(tuple(others), rel=0, abs=0, nan_ok=True)
            scale = max(abs(others[0]), abs(others[1])) if others[3] else 0.0
            exact = 1e-12 if scale < 1e300 else 1.0  # a sum that is no float has no exact mean
            assert math.isnan(mean) or abs(found[0] / 2 - mean / 2) <= scale / 2 * exact


def play(history, checkpoint_points, folder):
    played = History(folder, checkpoint_points)
    for op in history:
        played.play(op)
    played.commit()
    played.check()
    played.store.checkpoint()
    played.check()
    played.kill()
    played.check()
    played.store.close()


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=HISTORIES, checkpoint_points=CHECKPOINTS)
def test_any_history_leaves_the_points_of_a_dict(history, checkpoint_points, tmp_path_factory):
    play(history, checkpoint_points, tmp_path_factory.mktemp("store"))


@pytest.mark.servers
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))  # each creates all the tables
@given(history=HISTORIES, checkpoint_points=CHECKPOINTS)
def test_any_history_in_postgres_leaves_the_points_of_a_dict(history, checkpoint_points, new_postgres_folder):
    play(history, checkpoint_points, new_postgres_folder())


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=HISTORIES, checkpoint_points=CHECKPOINTS)
def test_many_histories_leave_the_points_of_a_dict(history, checkpoint_points, new_folder):
    play(history, checkpoint_points, new_folder())


class FollowedHistory(History):
    """A history that a reader follows: after each commit it has the same points."""

    def __init__(self, folder, checkpoint_points):
        super().__init__(folder, checkpoint_points)
        self.reader = StoreReader.open(location_in(folder), catalogue=StepPoints)

    def play(self, op):
        super().play(op)
        if op[0] not in {"rows", "one", "cut"} and not self.pending:
            self.check_reader()

    def check_reader(self):
        with self.reader.reading():
            infos = self.reader.series.names(1)
            assert infos == self.store.series.names(1) or any(math.isnan(each.last or 0.0) for each in infos)
            for info in infos:
                assert differing(points_of(self.reader, info.id), points_of(self.store, info.id)) == []


def follow(history, checkpoint_points, folder):
    played = FollowedHistory(folder, checkpoint_points)
    try:
        for op in history:
            played.play(op)
        played.commit()
        played.check_reader()
        played.checkpoint()
        played.check_reader()
    finally:
        played.store.close()
        played.reader.close()


@pytest.mark.servers
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=HISTORIES, checkpoint_points=CHECKPOINTS)
def test_a_reader_of_postgres_has_the_points_of_the_writer(history, checkpoint_points, new_postgres_folder):
    follow(history, checkpoint_points, new_postgres_folder())


@pytest.mark.long
@pytest.mark.servers
@pytest.mark.timeout(600)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=HISTORIES, checkpoint_points=CHECKPOINTS)
def test_a_reader_follows_many_histories(history, checkpoint_points, new_postgres_folder):
    follow(history, checkpoint_points, new_postgres_folder())
