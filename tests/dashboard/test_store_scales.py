"""Chunks fit the distances of a series' steps, and charts show what the points have."""

import math
from itertools import pairwise

import pytest

from evsys_adapters.dashboard.database import SqliteDatabase
from evsys_adapters.dashboard.schema import migrate
from evsys_adapters.dashboard.series import SeriesStore
from support.point_stores import brute_buckets, differing, info_of, open_store, points_of

pytestmark = pytest.mark.usefixtures("each_database")


def stored(tmp_path, steps, batch=1000):
    """A store with these steps of one series, added in batches, and the series' id."""
    store = open_store(tmp_path)
    for at in range(0, len(steps), batch):
        with store.transaction():
            for step in steps[at : at + batch]:
                store.series.add_row(1, 0, step, None, {"loss": math.sin(step)})
    store.checkpoint()
    return store, info_of(store, 1, "loss").id


def chunks(store):
    return store.database.query("SELECT COUNT(*) FROM raw")[0][0]


SHAPES = {
    "every step": (range(30_000), 15),
    "every thousandth": (range(0, 20_000_000, 1000), 20),
    "uneven tokens": ([step * 8192 + step % 7 * 100 for step in range(20_000)], 20),
    "first dense, then far apart": ([*range(100), *range(1000, 4_000_000, 1000)], 40),
    "first far apart, then dense": ([*range(0, 100_000, 1000), *range(100_000, 120_000)], 60),
    "bursts": ([burst * 10_000_000 + step for burst in range(5) for step in range(10_000)], 40),
    "below zero": (range(-5000, 5000), 6),
}


@pytest.mark.parametrize(("steps", "most"), SHAPES.values(), ids=SHAPES)
def test_the_number_of_chunks_follows_the_points_whatever_their_distance(tmp_path, steps, most):
    store, series = stored(tmp_path, steps)
    assert chunks(store) <= most
    expected = {step: math.sin(step) for step in steps}
    assert differing(points_of(store, series), expected) == []
    chart = store.series.read([series], buckets=500)
    line, brute = chart.lines[0], brute_buckets(expected, chart.width)
    assert 50 <= len(line.x) <= 500
    assert list(map(int, line.x)) == list(brute)
    assert list(line.min) == [each[1] for each in brute.values()]
    assert list(line.max) == [each[2] for each in brute.values()]
    store = store.reopen()
    assert differing(points_of(store, series), expected) == []


def test_points_written_before_a_series_got_its_scale_survive_a_kill(tmp_path):
    store, series = stored(tmp_path, range(50))
    for step in range(50, 150):
        with store.transaction():
            store.series.add_row(1, 0, step, None, {"loss": math.sin(step)})
    store = store.reopen()
    assert differing(points_of(store, series), {step: math.sin(step) for step in range(150)}) == []


def test_a_series_of_few_points_is_one_row(tmp_path):
    store, series = stored(tmp_path, [0, 10**12, 5])
    assert (chunks(store), len(points_of(store, series))) == (1, 3)


def test_a_spike_is_seen_at_every_width(tmp_path):
    store = open_store(tmp_path)
    with store.transaction():
        for step in range(20_000):
            store.series.add_row(1, 0, step, None, {"loss": 1000.0 if step == 12_345 else 1.0})
    series = info_of(store, 1, "loss").id
    for buckets in (10, 100, 1000, 100_000):
        line = store.series.read([series], buckets=buckets).lines[0]
        assert (line.max.max(), line.min.min(), line.count.sum()) == (1000, 1, 20_000)


def test_values_that_are_not_finite_are_counted_and_leave_a_gap(tmp_path):
    store = open_store(tmp_path)
    odd = {4000: math.nan, 4001: math.inf, 4002: -math.inf, **dict.fromkeys(range(4096, 4224), math.nan)}
    with store.transaction():
        for step in range(10_000):
            store.series.add_row(1, 0, step, None, {"loss": odd.get(step, 1.0)})
    info = info_of(store, 1, "loss")
    assert (info.n, info.bad, info.min, info.max, info.constant) == (10_000 - 131, 131, 1, 1, False)
    line = store.series.read([info.id], width=64).lines[0]
    gap = [int(x) for x, mean in zip(line.x, line.mean, strict=True) if math.isnan(mean)]
    assert (gap, line.bad.sum(), line.bad[4000 // 64]) == ([4096, 4160], 131, 3)


def test_all_series_of_a_chart_have_one_width_and_a_range_is_read_finer(tmp_path):
    store = open_store(tmp_path)
    with store.transaction():
        for run, count in ((1, 10_000), (2, 100)):
            for step in range(count):
                store.series.add_row(run, 0, step, None, {"loss": float(step)})
    ids = [info_of(store, run, "loss").id for run in (1, 2)]
    chart = store.series.read([*ids, 10**6], buckets=200)
    assert (chart.width, [len(line.x) for line in chart.lines]) == (64, [157, 2, 0])
    zoomed = store.series.read(ids, first=5000, last=5100, buckets=200)
    assert (zoomed.width, list(zoomed.lines[0].x)) == (1, list(range(5000, 5101)))
    assert len(zoomed.lines[1].x) == 0


@pytest.mark.parametrize(
    ("steps", "buckets", "width", "drawn"),
    [
        (range(1024), 240, 8, 128),
        (range(0, 16 * 32, 16), 30, 32, 16),
        (range(10**6, 10**6 + 16 * 100, 16), 60, 32, 50),
        (range(1900, 2100), 150, 2, 100),
        (range(100_000), 500, 256, 391),
        (range(9000), 500, 32, 282),
    ],
)
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "written"])
def test_a_width_is_the_finest_one_with_so_many_buckets(tmp_path, steps, buckets, width, drawn, is_open):
    store = open_store(tmp_path)
    with store.transaction():
        for step in steps:
            store.series.add_row(1, 0, step, None, {"loss": 0.5})
    if not is_open:
        store.close()
        store = open_store(tmp_path)
    chart = store.series.read([info_of(store, 1, "loss").id], buckets=buckets)
    assert (chart.width, len(chart.lines[0].x)) == (width, drawn)


def test_a_late_point_changes_its_bucket_and_no_other(tmp_path):
    store, series = stored(tmp_path, range(0, 20_000, 2))
    before = store.series.read([series], width=32).lines[0]
    with store.transaction() as changes:
        store.series.add_row(1, 0, 101, None, {"loss": 50.0})
    after = store.series.read([series], width=32).lines[0]
    differing = [int(x) for x, old, new in zip(after.x, before.mean, after.mean, strict=True) if old != new]
    assert (differing, changes.series) == ([96], {series: (101, 101)})
    assert (after.max[3], after.count[3]) == (50, 17)


def test_a_late_point_counts_in_what_is_known_of_the_series(tmp_path):
    store, series = stored(tmp_path, range(10_000))
    for step, value in ((9_999, 5.0), (10, 50.0), (5_000, -50.0)):
        with store.transaction():
            store.series.add_row(1, 0, step, None, {"loss": value})
        info = info_of(store, 1, "loss")
    assert (info.id, info.n, info.last_step, info.last, info.min, info.max) == (series, 10_000, 9_999, 5, -50, 50)


def test_late_points_of_one_series_leave_those_of_the_same_rows_as_they_are(tmp_path):
    store = open_store(tmp_path)
    steps = [step * 3 + step % 2 for step in range(40)]
    with store.transaction():
        for step in steps:
            store.series.add_row(1, 0, step, None, {"loss": 1.0, "other": 2.0})
    with store.transaction():
        store.series.add_row(1, 0, 2, None, {"loss": 5.0})
    assert points_of(store, info_of(store, 1, "other").id) == dict.fromkeys(steps, 2.0)
    assert points_of(store, info_of(store, 1, "loss").id) == {**dict.fromkeys(steps, 1.0), 2: 5.0}


def test_the_first_and_the_last_bucket_of_a_range_are_whole(tmp_path):
    store, series = stored(tmp_path, range(10_000))
    for width in (16, 64, 4096):
        line = store.series.read([series], first=3000, last=5000, width=width).lines[0]
        assert list(line.x) == list(range(3000 // width * width, 5001, width))
        assert set(line.count) == {width}


def test_a_cut_is_not_forgotten_when_the_process_ends(tmp_path):
    store, series = stored(tmp_path, range(10_000))
    with store.transaction():
        store.series.cut(1, 0, 3000)
    store = store.reopen()
    assert (info_of(store, 1, "loss").n, max(points_of(store, series))) == (3000, 2999)


def test_the_log_is_emptied_in_portions_once_it_is_long(tmp_path):
    store = open_store(tmp_path, checkpoint_points=5000)
    logged = []
    for step in range(300):
        with store.transaction():
            store.series.add_row(1, 0, step, None, {f"m{index}": float(step) for index in range(500)})
        logged.append(store.database.query("SELECT COUNT(*) FROM log")[0][0])
    assert max(logged) <= 150
    assert sum(later < earlier for earlier, later in pairwise(logged)) >= 1
    store = store.reopen()
    assert all(points_of(store, info.id) == {step: step for step in range(300)} for info in store.series.names(1)[:20])


@pytest.mark.parametrize("more", range(10))
def test_a_series_that_gets_its_scale_during_a_checkpoint_survives_a_kill(tmp_path, more):
    store = open_store(tmp_path, checkpoint_points=100)

    def add(runs, steps):
        with store.transaction():
            for run in runs:
                for step in steps:
                    store.series.add_row(run, 0, step, None, {"loss": float(step), "lr": 0.5})

    first = 1_000_000
    add(range(1, 61), range(first, first + 10))  # so many chunks that a checkpoint takes several transactions
    add([1], range(first + 10, first + 70))
    add([1], range(first + 70, first + 130))
    for step in range(first + 130, first + 130 + more):
        add([1], [step])
    store = store.reopen()
    assert [info.n for info in store.series.names(1)] == [130 + more, 130 + more]


def test_runs_that_rest_leave_the_memory_and_are_read_again(tmp_path):
    database = SqliteDatabase(tmp_path / "points.sqlite")
    migrate(database)
    series = SeriesStore(database, checkpoint_points=100, max_idle_series=5)
    for turn in range(3):
        for run in range(1, 9):
            with database.transaction():
                for step in range(200 * turn, 200 * turn + 200):
                    series.add_row(run, 0, step, None, {"loss": float(step), "other": -float(step)})
                series.flush()
    for run in range(1, 9):
        assert [(each.n, each.last_step, each.last) for each in series.names(run)] == [
            (600, 599, 599.0),
            (600, 599, -599.0),
        ]
    assert len({each.id for run in range(1, 9) for each in series.names(run)}) == 16
    database.close()
