"""Importing journals, building a database anew, and removing what is old."""

import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import closing
from threading import Timer

import pytest

from evsys_adapters.dashboard import journals, pages
from evsys_adapters.dashboard.journals import import_journal
from evsys_adapters.dashboard.store import Store, StoreError
from evsys_bus import EventBus, LogContext, LoopState, RunStart, StepEnd, TrainStart
from evsys_bus.errors import RunNotFoundError
from evsys_bus.journal import JournalWriter
from evsys_bus.reading import read_runs
from support import ROOT
from support.dashboard_stores import START, Delivery, context, open_store, points, state_of, train
from support.recorded_runs import KILLED, record_run

DAY = 86_400.0


@pytest.fixture
def store(tmp_path):
    with closing(open_store(tmp_path)) as opened:
        yield opened


def runs_of(store):
    records = store.catalogue.records
    return {run.key: run for each in records.experiments() for run in records.runs(each.id)}


def losses_of(store, key):
    return points(store, runs_of(store)[key].id, "train/loss")


def test_a_journal_is_imported_with_progress(store, tmp_path):
    record_run(tmp_path / "runs/a", evals={1: 0.5})
    calls = []
    result = import_journal(store, tmp_path / "runs/a", lambda done, of: calls.append((done, of)))
    assert losses_of(store, "a") == {0: 3.0, 1: 1.0, 2: 2.0}
    assert runs_of(store)["a"].status == "completed"
    assert calls[-1] == (result.events, result.events)
    assert result.points == 3 * 2 + 1


def test_an_import_again_changes_nothing(store, tmp_path):
    record_run(tmp_path / "runs/a")
    import_journal(store, tmp_path / "runs/a")
    assert import_journal(store, tmp_path / "runs/a/journal").events == 0
    assert losses_of(store, "a") == {0: 3.0, 1: 1.0, 2: 2.0}


def test_all_journals_below_a_folder_are_imported(store, tmp_path):
    for name in ("a", "b"):
        record_run(tmp_path / "runs" / name, config={"arm": name})
    import_journal(store, tmp_path / "runs")
    (row,) = pages.home(store, START)["experiments"]
    assert (row["name"], row["arms"], row["runs"]["completed"]) == ("runs", 2, 2)


def test_a_resumed_run_is_imported_as_one(store, tmp_path):
    record_run(tmp_path / "runs/a", [5.0, 4.0, 3.0], status="failed", error="x")
    record_run(tmp_path / "runs/a", [2.0], first_step=2)
    import_journal(store, tmp_path / "runs/a")
    assert losses_of(store, "a") == {0: 5.0, 1: 4.0, 2: 2.0}
    assert runs_of(store)["a"].status == "completed"


def test_a_live_journal_is_imported_up_to_its_present_end_and_later_on(store, tmp_path):
    folder = tmp_path / "runs/live"
    ctx = LogContext(folder.parent, run_key="live")
    state = LoopState(0, 10, folder, ctx=ctx)
    with EventBus([], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        bus.publish(StepEnd(state, 0, metrics={"loss": 1.0}))
        deadline = 100
        while "live" not in runs_of(store) or not losses_of(store, "live"):
            import_journal(store, folder)
            deadline -= 1
            assert deadline
        assert runs_of(store)["live"].status is None
        bus.publish(StepEnd(state, 1, metrics={"loss": 2.0}))
    import_journal(store, folder)
    assert losses_of(store, "live") == {0: 1.0, 1: 2.0}


def test_the_journal_of_a_killed_program_is_imported(store, tmp_path):
    folder = tmp_path / "runs/killed"
    folder.mkdir(parents=True)
    program = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), folder], check=False, capture_output=True)
    assert program.returncode == -signal.SIGKILL
    import_journal(store, folder)
    run = runs_of(store)["killed"]
    assert (run.status, run.arm, run.seed, run.step) == (None, "killed", 3, 11)
    (row,) = pages.home(store, run.last + 61)["experiments"]
    assert row["state"] == "stalled"


def test_a_journal_of_the_first_version_is_imported_as_it_reads(store, tmp_path):
    shutil.copytree(ROOT / "tests/fixtures/directory_of_0_1_0", tmp_path / "old")
    result = import_journal(store, tmp_path / "old/sweep")
    assert result.events
    assert store.catalogue.unreadable_events == 0
    read = {run.id: run for run in read_runs(tmp_path / "old/sweep")}
    assert set(runs_of(store)) == set(read)
    for key, run in read.items():
        stored = runs_of(store)[key]
        for name, series in run.metrics.items():
            found = points(store, stored.id, name if "/" in name else f"train/{name}")
            expected = dict(zip(series.steps, series.values, strict=True))
            assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True), name
        assert (stored.num_steps, stored.checkpoints) == (run.num_steps, len(run.checkpoints))


def test_what_was_delivered_is_skipped_and_the_rest_is_imported(store, tmp_path):
    record_run(tmp_path / "runs/a", [float(n) for n in range(50)])
    batch = next(journals.read_batches(tmp_path / "runs/a/journal", lambda _: 0))
    store.ingest(batch.stream, 0, batch.payloads[:20])
    result = import_journal(store, tmp_path / "runs/a")
    assert result.events == len(batch.payloads) - 20
    assert losses_of(store, "a") == {n: float(n) for n in range(50)}


def test_only_what_is_missing_is_read(store, tmp_path):
    record_run(tmp_path / "runs/a", [float(n) for n in range(50)])
    journal = tmp_path / "runs/a/journal"
    (batch,) = journals.read_batches(journal, lambda _: 0)
    store.ingest(batch.stream, 0, batch.payloads[:20])
    (rest,) = journals.read_batches(journal, store.watermark)
    assert (rest.after, rest.payloads, rest.total) == (20, batch.payloads[20:], len(batch.payloads) - 20)
    store.ingest(*rest[:3])
    assert [*journals.read_batches(journal, store.watermark)] == []


@pytest.mark.parametrize("is_back", [True, False])
def test_a_segment_that_cannot_be_read_is_tried_again_before_it_is_skipped(store, tmp_path, is_back):
    journal = tmp_path / "runs/a/journal"
    ctx = LogContext(tmp_path / "runs", run_key="a")
    state = LoopState(0, 100, ctx.run_dir, ctx=ctx)
    with EventBus([], journal=JournalWriter(journal, segment_bytes=1_000)) as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(50):
            bus.publish(StepEnd(state, step, metrics={"loss": 1.0}))
    _, segment, *others = sorted(journal.rglob("*.seg"))
    assert others
    moved = segment.rename(tmp_path / "moved")
    segment.mkdir()  # an error of reading, as with too many open files

    def bring_back():
        segment.rmdir()
        moved.rename(segment)

    timer = Timer(0.2, bring_back) if is_back else Timer(0.0, lambda: None)
    timer.start()
    import_journal(store, journal)
    timer.join()
    assert (len(losses_of(store, "a")) == 50) == is_back
    assert max(losses_of(store, "a")) == 49


def test_a_path_without_journal_is_named_with_a_fix(store, tmp_path):
    with pytest.raises(RunNotFoundError, match="no journal"):
        import_journal(store, tmp_path / "dashboard.sqlite")


class TestRebuild:
    def test_a_new_database_takes_the_place_of_the_old_one(self, tmp_path):
        record_run(tmp_path / "runs/a")
        path = tmp_path / "dashboard.sqlite"
        with closing(Store.open(path)) as store:
            train(Delivery(store), context(key="only-in-the-old-one"))
        journals.rebuild(path, [tmp_path / "runs/a"])
        with closing(Store.open(path)) as store:
            assert set(runs_of(store)) == {"a"}
            assert losses_of(store, "a") == {0: 3.0, 1: 1.0, 2: 2.0}
        with closing(Store.open(tmp_path / "dashboard.sqlite.old")) as store:
            assert set(runs_of(store)) == {"only-in-the-old-one"}
        assert not (tmp_path / "dashboard.sqlite.new").exists()

    def test_a_missing_journal_changes_nothing(self, tmp_path):
        path = tmp_path / "dashboard.sqlite"
        Store.open(path).close()
        before = path.read_bytes()
        with pytest.raises(RunNotFoundError):
            journals.rebuild(path, [tmp_path / "nothing"])
        assert path.read_bytes() == before

    def test_an_open_database_is_refused(self, store, tmp_path):
        record_run(tmp_path / "runs/a")
        with pytest.raises(StoreError, match="open in another process"):
            journals.rebuild(store.location, [tmp_path / "runs/a"])


class TestTrash:
    def test_what_is_in_the_trash_is_hidden_until_it_is_restored(self, store):
        delivery = Delivery(store)
        for key in ("a", "b"):
            train(delivery, context(key=key))
        public = runs_of(store)["a"].public
        assert journals.move_to_trash(store, public, START)
        assert set(runs_of(store)) == {"b"}
        assert journals.restore(store, public)
        assert set(runs_of(store)) == {"a", "b"}
        assert not journals.move_to_trash(store, "nothing", START)

    def test_old_experiments_expire_and_are_purged_after_their_days_in_the_trash(self, store):
        train(Delivery(store, "r0-old", start=START), context("/runs/old"))
        train(Delivery(store, "r0-new", start=START + 30 * DAY), context("/runs/new"))
        now = START + 31 * DAY
        assert journals.expire(store, 10, now) == journals.Removed(1, 1)
        assert [row["name"] for row in pages.home(store, now)["experiments"]] == ["new"]
        assert journals.purge(store, now + DAY, trash_days=7) == journals.Removed(0, 0)
        assert journals.purge(store, now + 8 * DAY, trash_days=7) == journals.Removed(1, 1)
        assert store.database.query("SELECT COUNT(*) FROM run") == [(1,)]
        assert store.database.query("SELECT COUNT(DISTINCT run) FROM series") == [(1,)]

    def test_an_experiment_that_has_expired_comes_back_when_a_run_of_it_goes_on(self, store):
        first = Delivery(store, "r0-old", start=START)
        train(first, context(), status=None)
        journals.expire(store, 10, START + 31 * DAY)
        late = StepEnd(state_of(context()), 3, metrics={"loss": 9.0})
        first.send(late)
        assert pages.home(store, START + 32 * DAY)["experiments"] == []
        resumed = Delivery(store, "r1-new", start=START + 40 * DAY)
        train(resumed, context(), first_step=3, status=None)
        [row] = pages.home(store, START + 40 * DAY)["experiments"]
        assert (row["state"], row["runs"]["total"]) == ("running", 1)
        assert losses_of(store, "a-s0") == {0: 3.0, 1: 2.0, 2: 1.0, 3: 3.0, 4: 2.0, 5: 1.0}
        with closing(store.reopen()) as reopened:
            assert len(pages.home(reopened, START + 40 * DAY)["experiments"]) == 1
            assert journals.purge(reopened, START + 99 * DAY, trash_days=30) == journals.Removed(0, 0)
            assert journals.expire(reopened, 10, START + 99 * DAY) == journals.Removed(1, 1)

    def test_an_experiment_that_a_person_moved_to_the_trash_stays_there_and_is_not_purged_while_it_goes_on(self, store):
        train(Delivery(store, "r0-old", start=START), context())
        journals.expire(store, 10, START + 31 * DAY)
        [expired] = store.catalogue.records.experiments(hidden=True)
        journals.move_to_trash(store, expired.public, START + 32 * DAY)
        resumed = Delivery(store, "r1-new", start=START + 40 * DAY)
        train(resumed, context(), first_step=3, status=None)
        assert pages.home(store, START + 40 * DAY)["experiments"] == []
        assert journals.purge(store, START + 63 * DAY, trash_days=30) == journals.Removed(0, 0)
        assert journals.purge(store, START + 71 * DAY, trash_days=30) == journals.Removed(1, 1)

    def test_events_that_come_after_a_purge_make_a_new_run(self, store):
        delivery = Delivery(store)
        ctx = context()
        train(delivery, ctx, status=None)
        journals.move_to_trash(store, runs_of(store)["a-s0"].public, START)
        journals.purge(store, START)
        delivery.send(StepEnd(LoopState(0, 9, ctx.run_dir, ctx=ctx), 3, metrics={"loss": 7.0}))
        assert losses_of(store, "a-s0") == {3: 7.0}

    def test_a_purge_and_a_reopened_store_leave_the_other_runs_whole(self, store):
        delivery = Delivery(store)
        for key in ("a", "b"):
            train(delivery, context(key=key))
        journals.move_to_trash(store, runs_of(store)["a"].public, START)
        journals.purge(store, START)
        reopened = store.reopen()
        assert losses_of(reopened, "b") == {0: 3.0, 1: 2.0, 2: 1.0}
        reopened.close()


def test_runs_of_one_name_in_several_experiments_are_several(store, tmp_path):
    for n, name in enumerate(("first", "second", "third")):
        folder = tmp_path / name
        ctx = LogContext(folder, run_key="same", run_config={"arm": name})
        state = LoopState(0, 3, ctx.run_dir, ctx=ctx)
        with EventBus([], journal=folder / "journal") as bus:
            if name != "first":  # whose context is in the state of its first step
                bus.publish(RunStart(ctx))
            for step in range(3):
                bus.publish(StepEnd(state, step, metrics={"loss": float(n)}))
        import_journal(store, folder)
    records = store.catalogue.records
    runs = [run for each in records.experiments() for run in records.runs(each.id)]
    assert [(run.arm, points(store, run.id, "train/loss")) for run in runs] == [
        ("first", dict.fromkeys(range(3), 0.0)),
        ("second", dict.fromkeys(range(3), 1.0)),
        ("third", dict.fromkeys(range(3), 2.0)),
    ]
