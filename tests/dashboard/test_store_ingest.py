"""What is delivered to a store is in it once, and what it cannot take is refused with a fix."""

import pytest

from evsys_adapters.dashboard.database import StoreError
from evsys_adapters.dashboard.store import BehindError
from support.point_stores import encoded_steps, info_of, open_store, points_of

pytestmark = pytest.mark.usefixtures("each_database")


def test_events_become_points_with_the_clock_of_their_run(tmp_path):
    store = open_store(tmp_path)
    done = store.ingest("s", 0, encoded_steps(0, 3, loss=0.5))
    assert (done.sequence, done.events, done.points, done.unreadable) == (3, 3, 3, 0)
    loss = info_of(store, 1, "loss")
    assert points_of(store, loss.id) == {0: 0.5, 1: 0.5, 2: 0.5}
    assert (loss.n, loss.bad, loss.last_step, loss.last, loss.min, loss.max, loss.constant) == (
        3,
        0,
        2,
        0.5,
        0.5,
        0.5,
        True,
    )
    x, seconds = store.series.wall_times(1)
    assert (list(x), list(seconds)) == ([0, 1, 2], [1000, 1001, 1002])
    assert [each.name for each in store.series.names(1)] == ["loss"]
    assert done.changed.runs == {1}
    assert done.changed.series[loss.id] == (0, 2)


def test_delivering_again_changes_nothing(tmp_path):
    store = open_store(tmp_path)
    events = encoded_steps(0, 10, loss=0.5)
    store.ingest("s", 0, events[:6])
    again = store.ingest("s", 0, events)
    assert (again.sequence, again.events, again.points) == (10, 4, 4)
    nothing = store.ingest("s", 3, events[3:])
    assert (nothing.sequence, nothing.events, nothing.changed.series) == (10, 0, {})
    assert store.catalogue.count() == 10


def test_a_gap_is_refused_with_the_watermark_and_changes_nothing(tmp_path):
    store = open_store(tmp_path)
    store.ingest("s", 0, encoded_steps(0, 2, loss=0.5))
    with store.transaction():
        with pytest.raises(BehindError, match=r"events 3 to 7 of the stream s") as caught:
            store.ingest("s", 7, encoded_steps(7, 2, seq=7, loss=0.5))
        store.ingest("t", 0, encoded_steps(0, 2, stream="t", loss=0.5))
    assert caught.value.watermark == 2
    assert "replay" in caught.value.fix
    assert (store.watermark("s"), store.watermark("t"), store.catalogue.count()) == (2, 2, 4)


def test_an_event_that_cannot_be_read_is_counted_and_not_asked_for_again(tmp_path):
    store = open_store(tmp_path)
    good = encoded_steps(0, 3, loss=0.5)
    without_event = b"\x82\xa3seq\x04\xa6stream\xa1s"
    done = store.ingest("s", 0, [*good, without_event, b"\xc1"])
    assert (done.sequence, done.events, done.unreadable) == (5, 3, 2)
    (beyond,) = encoded_steps(9, 1, seq=2**64 - 2, loss=0.5)
    assert store.ingest("s", 5, [beyond]).unreadable == 1
    assert store.ingest("s", 5, encoded_steps(5, 1, seq=5, loss=0.5)).sequence == 6


def test_several_batches_in_one_transaction_are_one_commit(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(RuntimeError), store.transaction():
        store.ingest("s", 0, encoded_steps(0, 2, loss=0.5))
        raise RuntimeError
    with pytest.raises(StoreError) as caught:
        store.ingest("s", 2, [])
    assert caught.value.problem == "failed"
    store = store.reopen()
    assert (store.watermark("s"), store.series.names(1)) == (0, [])
    with store.transaction() as changes:
        store.ingest("s", 0, encoded_steps(0, 2, loss=0.5))
        store.ingest("t", 0, encoded_steps(5, 2, stream="t", run=2, loss=0.5))
    assert (changes.runs, sorted(changes.series.values())) == ({1, 2}, [(0, 1), (0, 1), (5, 6), (5, 6)])


def test_a_part_of_a_transaction_that_failed_is_not_committed_because_its_error_was_caught(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(StoreError), store.transaction():
        store.ingest("s", 0, encoded_steps(0, 2, loss=0.5))
        with pytest.raises(TypeError):
            store.ingest("s", 2, encoded_steps(2, 1, seq=2, loss="high"))
    store = store.reopen()
    with pytest.raises(StoreError), store.transaction():
        store.ingest("s", 0, encoded_steps(0, 2, loss=0.5))
        with pytest.raises(KeyError), store.transaction():
            raise KeyError
    assert store.reopen().watermark("s") == 0


def test_a_row_with_a_value_that_is_no_number_adds_nothing(tmp_path):
    store = open_store(tmp_path)
    with store.transaction():
        store.series.add_row(1, 0, 1, 5.0, {"a": 1.0, "b": 2.0})
        with pytest.raises(TypeError):
            store.series.add_row(1, 0, 2, 6.0, {"a": 1.0, "b": "high"})
        with pytest.raises(OverflowError):
            store.series.add_row(1, 0, 2, 6.0, {"a": 1.0, "b": 10**400})
        store.series.add_row(1, 0, 3, 7.0, {"a": 3.0, "b": True})
        with pytest.raises(TypeError):
            store.series.add_row(1, 0, 4.5, 8.0, {"a": 1.0})
        assert store.series.add_row(1, 0, 2**60, 7.0, {"a": 3.0}) == 0
        assert store.series.add(1, 2**63, "a", 5, 3.0, None) == 0
        assert points_of(store, info_of(store, 1, "b").id) == {1: 2.0, 3: 1.0}
    assert points_of(store, info_of(store, 1, "a").id) == {1: 1.0, 3: 3.0}
    assert store.series.refused == 2


def test_a_cut_removes_the_steps_of_its_rank_and_spares_epochs(tmp_path):
    store = open_store(tmp_path)
    with store.transaction():
        for rank in (0, 1):
            for step in range(3000):
                store.series.add_row(1, rank, step, None, {"loss": 0.5})
            for epoch in range(3):
                store.series.add_row(1, rank, epoch, None, {"epoch/loss": 0.5})
    with store.transaction() as changes:
        store.series.cut(1, 0, 1)
    loss = info_of(store, 1, "loss").id
    assert changes.series == {loss: (1, 2999)}
    assert points_of(store, loss) == {0: 0.5}
    assert info_of(store, 1, "loss", rank=1).n == 3000
    assert info_of(store, 1, "epoch/loss").n == 3
    with store.transaction():
        store.series.cut(1, 0, 2, epochs=True)
    assert (info_of(store, 1, "epoch/loss").n, info_of(store, 1, "loss").n) == (2, 1)


def test_a_removed_run_leaves_nothing_behind_and_its_ids_to_nobody(tmp_path):
    store = open_store(tmp_path)
    store.ingest("s", 0, encoded_steps(0, 3000, loss=0.5))
    store.ingest("t", 0, encoded_steps(0, 3, stream="t", run=2, loss=0.5))
    with store.transaction():
        store.series.remove(1)
    store = store.reopen()
    assert store.series.names(1) == []
    assert info_of(store, 2, "loss").n == 3
    assert store.database.query("SELECT COUNT(*) FROM raw") == [(2,)]


def test_a_database_is_the_same_one_when_it_is_opened_again(tmp_path):
    store = open_store(tmp_path)
    store_id = store.id
    store.ingest("s", 0, encoded_steps(0, 100, loss=0.5))
    store.close()
    store.close()
    store = open_store(tmp_path)
    assert (store.id, store.watermark("s"), info_of(store, 1, "loss").n) == (store_id, 100, 100)
    assert store.database.query("SELECT COUNT(*) FROM log") == [(0,)]


def test_a_database_belongs_to_one_process(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(StoreError, match="open in another process") as caught:
        open_store(tmp_path)
    assert (caught.value.problem, "give another" in caught.value.fix) == ("locked", True)
    store.close()
    open_store(tmp_path).close()


@pytest.mark.parametrize("table", ["raw", "log"])
def test_damaged_points_are_reported_where_they_are_read(tmp_path, table):
    store = open_store(tmp_path)
    store.ingest("s", 0, encoded_steps(0, 5000, loss=0.5))
    store.database.execute(f"UPDATE {table} SET body = substr(body, 1, length(body) - 5)")
    with pytest.raises(StoreError, match="cannot be read") as caught:
        store = store.reopen()
        points_of(store, info_of(store, 1, "loss").id)
    assert (caught.value.problem, "import the journals again" in caught.value.fix) == ("corrupt", True)


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    store = open_store(tmp_path)
    store.database.execute("UPDATE meta SET value = '1000' WHERE key = 'version'")
    store.close()
    with pytest.raises(StoreError, match="layout 1000") as caught:
        open_store(tmp_path)
    assert (caught.value.problem, "update evsys-bus" in caught.value.fix) == ("newer", True)
