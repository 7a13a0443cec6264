"""Events become experiments, runs, evals, predictions, checkpoints, contents, alerts and points."""

import math
import uuid
from contextlib import closing

import pytest

from evsys_adapters.dashboard import views
from evsys_adapters.dashboard.records import run_state
from evsys_adapters.system_metrics import SystemMetrics
from evsys_bus import (
    Alert,
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    ConfigUpdate,
    Content,
    ContentItem,
    Environment,
    EpochEnd,
    Eval,
    EvalResult,
    Event,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    GroupStart,
    LogContext,
    LoopState,
    ManifestRow,
    Metrics,
    Rollout,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    Summary,
    TrainEnd,
    TrainStart,
)
from evsys_bus.adapter import RunAnnotated
from evsys_bus.events import UnknownEvent
from support.dashboard_stores import (
    START,
    Delivery,
    context,
    only_run,
    open_store,
    points,
    series_names,
    state_of,
    train,
)

pytestmark = pytest.mark.usefixtures("each_database")


@pytest.fixture
def store(tmp_path):
    with closing(open_store(tmp_path)) as opened:
        yield opened


@pytest.fixture
def delivery(store):
    return Delivery(store)


def run_of(store):
    run = store.catalogue.records.run(only_run(store))
    assert run is not None
    return run


def run_named(store, key):
    (run,) = [
        run.id
        for each in store.catalogue.records.experiments()
        for run in store.catalogue.records.runs(each.id)
        if run.key == key
    ]
    return run


def experiment_of(store):
    (record,) = store.catalogue.records.experiments()
    return record


class TestPoints:
    def test_numbers_of_a_step_become_points_and_texts_stay_as_the_last_ones(self, store, delivery):
        state = state_of(context())
        row = {"loss": 1.5, "is_warm": True, "n": 3, "opt/lr": 0.1, "sub": {"a": 1, "b": {"c": 2.0}}, "phase": "warm"}
        delivery.send(StepEnd(state, 0, metrics=row), StepEnd(state, 1, metrics={"phase": "main", "loss": 1.0}))
        run = only_run(store)
        assert points(store, run, "train/loss") == {0: 1.5, 1: 1.0}
        assert points(store, run, "train/is_warm") == {0: 1.0}
        assert points(store, run, "opt/lr") == {0: 0.1}
        assert points(store, run, "train/sub/a") == {0: 1.0}
        assert points(store, run, "train/sub/b/c") == {0: 2.0}
        assert store.catalogue.details.texts(run) == {"train/phase": (1, "main")}

    def test_nan_and_infinities_are_bad_points(self, store, delivery):
        state = state_of(context())
        values = (1.0, math.nan, math.inf, -math.inf)
        delivery.send(*(StepEnd(state, step, metrics={"loss": value}) for step, value in enumerate(values)))
        (info,) = store.series.names(only_run(store))
        assert (info.n, info.bad) == (1, 3)

    def test_parts_of_a_row_and_the_row_are_the_same_points(self, store, delivery):
        state = state_of(context())
        result = delivery.send(
            Metrics(state, 0, {"loss": 5.0}),
            Metrics(state, 0, {"kl": 2.0}),
            StepEnd(state, 0, metrics={"loss": 1.0, "kl": 2.0}),
        )
        run = only_run(store)
        assert points(store, run, "train/loss") == {0: 1.0}
        assert points(store, run, "train/kl") == {0: 2.0}
        assert result.points == 4

    def test_evals_benchmarks_epochs_and_samples_have_series_of_their_own(self, store, delivery):
        ctx = context()
        state = state_of(ctx)
        delivery.send(
            StepEnd(state, 7, metrics={"loss": 1.0}),
            Eval(state, 7, "val", {"acc": 0.5}),
            BenchmarkEval(ctx, EvalResult("gsm", metrics={"pass": 0.25}), [], step=7),
            EpochEnd(state, 2, {"loss": 3.0}),
            SystemMetrics(ctx, {"cpu/percent": 12.0}, step=7),
        )
        run = only_run(store)
        assert points(store, run, "val/acc") == {7: 0.5}
        assert points(store, run, "gsm/pass") == {7: 0.25}
        assert points(store, run, "epoch/loss") == {2: 3.0}
        assert points(store, run, "system/cpu/percent") == {7: 12.0}

    def test_the_clock_of_a_run_comes_from_its_steps(self, store, delivery):
        state = state_of(context())
        delivery.send(StepEnd(state, 0, metrics={"loss": 1.0}), Eval(state, 0, "val", {"acc": 0.5}))
        delivery.send(StepEnd(state, 1, metrics={"loss": 1.0}))
        steps, seconds = store.series.wall_times(only_run(store), None, None, 1)
        assert [*steps] == [0, 1]
        assert [*seconds] == [START, START + 2]


class TestIdentity:
    def test_a_run_has_the_uuids_of_its_context(self, store, delivery):
        experiment_id, run_id = str(uuid.uuid4()), str(uuid.uuid4())
        ctx = context(ids={"experiment_id": experiment_id, "run_id": run_id})
        train(delivery, ctx)
        run = run_of(store)
        assert run.public == run_id
        assert store.catalogue.run_id(run_id) == run.id
        assert store.catalogue.experiment_id(experiment_id) == run.experiment
        assert points(store, run.id, "train/loss") == {0: 3.0, 1: 2.0, 2: 1.0}

    def test_a_run_without_uuid_has_a_digest_of_its_place(self, store, delivery):
        train(delivery, context("/runs/lr", "a-s0"))
        public = run_of(store).public
        assert len(public) == 16
        assert set(public) <= set("0123456789abcdef")

    def test_a_run_that_gets_a_uuid_later_stays_the_same(self, store, delivery):
        state = state_of(context())
        delivery.send(StepEnd(state, 0, metrics={"loss": 1.0}))
        first = run_of(store)
        ctx = context(ids={"run_id": str(uuid.uuid4()), "experiment_id": str(uuid.uuid4())})
        delivery.send(RunStart(ctx))
        assert run_of(store).id == first.id
        assert store.catalogue.run_id(ctx.ids["run_id"]) == first.id
        assert store.catalogue.run_id(first.public) == first.id

    def test_two_runs_in_the_same_directory_of_two_machines_are_two(self, store):
        for machine in ("one", "two"):
            ctx = context(ids={"run_id": str(uuid.uuid4()), "experiment_id": str(uuid.uuid4())})
            train(Delivery(store, f"r0-{machine}"), ctx, [1.0] if machine == "one" else [2.0, 3.0])
        experiments = store.catalogue.records.experiments()
        runs = [run for each in experiments for run in store.catalogue.records.runs(each.id)]
        assert len(experiments) == 2
        assert [points(store, run.id, "train/loss") for run in runs] == [{0: 1.0}, {0: 2.0, 1: 3.0}]

    def test_steps_of_two_machines_that_alternate_go_to_their_own_runs(self, store):
        deliveries = [Delivery(store, f"r0-{machine}") for machine in ("one", "two")]
        contexts = [context(ids={"run_id": str(uuid.uuid4()), "experiment_id": str(uuid.uuid4())}) for _ in deliveries]
        for each, ctx in zip(deliveries, contexts, strict=True):
            each.send(RunStart(ctx))
        for step in range(3):
            for n, each in enumerate(deliveries):
                each.send(StepEnd(state_of(contexts[n]), step, metrics={"loss": float(n)}))
        for n, ctx in enumerate(contexts):
            run = store.catalogue.run_id(ctx.ids["run_id"])
            assert points(store, run, "train/loss") == dict.fromkeys(range(3), float(n))

    def test_a_run_is_found_again_after_the_store_was_opened_again(self, store, tmp_path):
        ctx = context(ids={"run_id": str(uuid.uuid4())})
        delivery = Delivery(store)
        delivery.send(RunStart(ctx), StepEnd(state_of(ctx), 0, metrics={"loss": 1.0}))
        reopened = store.reopen()
        delivery.store = reopened
        delivery.send(StepEnd(state_of(ctx), 1, metrics={"loss": 2.0}))
        run = run_of(reopened)
        assert (run.public, run.step, run.last) == (ctx.ids["run_id"], 1, START + 2)
        assert points(reopened, run.id, "train/loss") == {0: 1.0, 1: 2.0}
        reopened.close()

    def test_a_state_without_context_names_its_run_by_its_directory(self, store, delivery):
        delivery.send(StepEnd(LoopState(0, 5, "/runs/alone"), 0, metrics={"loss": 1.0}))
        run = run_of(store)
        assert (run.key, run.path, experiment_of(store).path) == ("alone", "/runs/alone", "/runs")

    def test_events_delivered_again_change_nothing(self, store):
        first = Delivery(store)
        ctx = context()
        train(first, ctx, evals={1: 0.5})
        first.send(Alert(ctx, "t"), Content(state_of(ctx), 1, ContentItem("text", "c")))
        before = [store.database.query(f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("run", "alert", "content")]
        second = Delivery(store)
        train(second, ctx, evals={1: 0.5})
        second.send(Alert(ctx, "t"), Content(state_of(ctx), 1, ContentItem("text", "c")))
        after = [store.database.query(f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("run", "alert", "content")]
        assert after == before


class TestResume:
    def test_a_resumed_run_is_the_same_run_cut_at_its_first_step(self, store):
        ctx = context()
        first = Delivery(store, "r0-first")
        train(first, ctx, [5.0, 4.0, 3.0, 2.0], evals={1: 0.1, 3: 0.3}, status="failed", error="ValueError: x")
        state = state_of(ctx)
        first.send(Checkpoint(state, ManifestRow("step_2", 1)), Checkpoint(state, ManifestRow("step_4", 3)))
        train(Delivery(store, "r0-second"), ctx, [30.0], first_step=2, status=None)
        run = run_of(store)
        assert points(store, run.id, "train/loss") == {0: 5.0, 1: 4.0, 2: 30.0}
        assert points(store, run.id, "val/acc") == {1: 0.1}
        assert [each["name"] for each in store.catalogue.details.checkpoints(run.id)] == ["step_2"]
        assert [each.step for each in store.catalogue.evals.of_run(run.id)] == [1]
        assert (run.status, run.error, run.step, run.checkpoints) == (None, None, 2, 1)

    def test_a_resume_of_one_rank_leaves_the_points_of_another(self, store):
        ctx = context()
        zero, one = Delivery(store, "r0-a"), Delivery(store, "r1-a", rank=1)
        train(zero, ctx, status=None)
        one.send(StepEnd(state_of(ctx), 2, metrics={"loss": 9.0}))
        train(Delivery(store, "r0-b"), ctx, [7.0], first_step=1, status=None)
        run = run_of(store)
        assert points(store, run.id, "train/loss") == {0: 3.0, 1: 7.0}
        assert points(store, run.id, "train/loss", rank=1) == {2: 9.0}
        assert run.rank == 0

    def test_an_earlier_attempt_that_comes_late_does_not_undo_the_later_one(self, store):
        ctx = context(config={"lr": 0.1})
        second = Delivery(store, "r0-000002-20260102T000000-0000abcd", start=START + 100)
        train(second, ctx, [30.0, 40.0], first_step=2, evals={2: 0.9})
        first = Delivery(store, "r0-000001-20260101T000000-0000abcd", start=START)
        train(
            first,
            context(config={"lr": 9.0}),
            [5.0, 4.0, 3.0, 2.0, 1.0],
            evals={1: 0.1, 2: 0.2},
            status="failed",
            error="x",
        )
        first.send(
            Checkpoint(state_of(ctx), ManifestRow("step_2", 1)), Checkpoint(state_of(ctx), ManifestRow("step_5", 4))
        )
        run = run_of(store)
        assert points(store, run.id, "train/loss") == {0: 5.0, 1: 4.0, 2: 30.0, 3: 40.0}
        assert points(store, run.id, "val/acc") == {1: 0.1, 2: 0.9}
        assert (run.status, run.error, run.step, run.config) == ("completed", None, 3, {"lr": 0.1})
        assert [each["name"] for each in store.catalogue.details.checkpoints(run.id)] == ["step_2"]

    def test_an_earlier_attempt_that_comes_late_leaves_the_epochs_and_texts_of_the_later_one(self, store):
        ctx = context()
        second = Delivery(store, "r0-000002-20260102T000000-0000abcd", start=START + 100)
        train(second, ctx, [30.0], first_step=4, status=None)
        second.send(
            EpochEnd(state_of(ctx, 4), 1, {"loss": 30.0}), StepEnd(state_of(ctx, 4), 5, metrics={"note": "later"})
        )
        first = Delivery(store, "r0-000001-20260101T000000-0000abcd", start=START)
        train(first, ctx, [3.0], status=None)
        first.send(
            EpochEnd(state_of(ctx), 0, {"loss": 3.0}),
            EpochEnd(state_of(ctx), 1, {"loss": 2.0, "acc": 0.5}),
            StepEnd(state_of(ctx), 1, metrics={"note": "earlier"}),
        )
        run = only_run(store)
        assert points(store, run, "epoch/loss") == {0: 3.0, 1: 30.0}
        assert points(store, run, "epoch/acc") == {1: 0.5}
        assert store.catalogue.details.texts(run) == {"train/note": (5, "later")}

    def test_a_resume_removes_the_texts_after_it(self, store, delivery):
        ctx = context()
        delivery.send(RunStart(ctx), TrainStart(state_of(ctx)))
        delivery.send(*(StepEnd(state_of(ctx), step, metrics={f"at_{step}": "text"}) for step in range(3)))
        delivery.send(TrainStart(state_of(ctx, 1)), StepEnd(state_of(ctx, 1), 1, metrics={"at_2": "anew"}))
        assert store.catalogue.details.texts(only_run(store)) == {"train/at_0": (0, "text"), "train/at_2": (1, "anew")}

    def test_the_summary_of_a_resumed_run_has_the_results_of_its_last_attempt(self, store):
        ctx, state = context(), state_of(context())
        for number, loss in enumerate((5.0, 1.0)):
            delivery = Delivery(store, f"r0-00000{number}-20260101T000000-0000abcd", start=START + 100 * number)
            delivery.send(RunStart(ctx), TrainStart(state))
            delivery.send(*(Summary(ctx, {"best": 0.5}) for _ in range(1 - number)))
            metrics = {"loss": loss, "best": 9.0}
            delivery.send(TrainEnd(state), RunEnd(ctx, RunResult(status="completed", metrics=metrics), ArmResult("")))
        assert run_of(store).summary == {"loss": 1.0, "best": 0.5}

    @pytest.mark.parametrize(
        ("stream", "start"),
        [("r0-000003-20260101T000000-0000abcd", START - 500), ("r0-000001-20260103T000000-0000abcd", START + 500)],
    )
    def test_a_resume_with_another_clock_or_a_new_journal_counts_as_the_newest(self, store, stream, start):
        ctx = context()
        train(Delivery(store, "r0-000002-20260102T000000-0000abcd"), ctx, [5.0, 4.0, 3.0], status="failed", error="x")
        train(Delivery(store, stream, start=start), ctx, [7.0], first_step=1)
        assert points(store, run_of(store).id, "train/loss") == {0: 5.0, 1: 7.0}
        assert run_of(store).status == "completed"


class TestStates:
    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
    def test_a_run_ends_with_its_status(self, store, delivery, status):
        train(delivery, context(), status=status, error="boom" if status == "failed" else None)
        run = run_of(store)
        assert run_state(run, 1e12) == status
        assert run.error == ("boom" if status == "failed" else None)

    def test_a_run_without_events_stalls_after_twenty_usual_intervals(self, store, delivery):
        train(delivery, context(), [1.0] * 30, status=None)
        run = run_of(store)
        last = run.last
        assert run_state(run, last + 59) == "running"
        assert run_state(run, last + 61) == "stalled"
        delivery.time += 600
        delivery.send(StepEnd(state_of(context()), 30, metrics={"loss": 1.0}))
        assert run.pace == pytest.approx(0.9 + 60.1)
        assert run_state(run, run.last + 1_000) == "running"

    def test_samples_of_the_machine_do_not_keep_a_stalled_run_alive(self, store, delivery):
        ctx = context()
        train(delivery, ctx, status=None)
        last = run_of(store).last
        delivery.time += 500
        delivery.send(SystemMetrics(ctx, {"cpu/percent": 1.0}, step=2))
        assert run_of(store).last == last

    def test_a_run_that_a_callback_has_stopped_counts_as_stopped(self, store, delivery):
        ctx = context()
        state = state_of(ctx)
        state.request_stop("no progress")
        delivery.send(RunStart(ctx), TrainEnd(state), RunEnd(ctx, RunResult(), ArmResult("a")))
        assert (run_of(store).status, run_of(store).stop_reason) == ("stopped", "no progress")

    def test_a_training_without_run_events_ends_with_its_loop(self, store, delivery):
        state = LoopState(0, 5, "/runs/alone")
        delivery.send(TrainStart(state), StepEnd(state, 0, metrics={"loss": 1.0}), TrainEnd(state))
        assert run_of(store).status == "completed"
        state.error = ValueError("x")
        delivery.send(TrainStart(state), TrainEnd(state))
        assert run_of(store).status == "failed"
        assert "x" in run_of(store).error


class TestRanks:
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_the_lowest_rank_that_trains_ends_the_run(self, store, order):
        ctx = context()
        ranks = {rank: Delivery(store, f"r{rank}-a", rank=rank) for rank in (0, 1)}
        for rank in order:
            train(ranks[rank], ctx, status=None)
        ranks[1].send(RunEnd(ctx, RunResult(), ArmResult("a")))
        assert (run_of(store).status, run_of(store).rank) == (None, 0)
        ranks[0].send(RunEnd(ctx, RunResult(), ArmResult("a")))
        ranks[1].send(RunStart(ctx))
        assert run_of(store).status == "completed"

    def test_the_error_of_another_rank_is_shown(self, store):
        ctx = context()
        train(Delivery(store), ctx, status=None)
        train(Delivery(store, "r3-a", rank=3), ctx, status="failed", error="CUDA out of memory")
        assert (run_of(store).status, run_of(store).error) == (None, "rank 3: CUDA out of memory")


class TestRunFacts:
    def test_config_updates_summaries_environment_and_annotations_are_kept(self, store, delivery):
        ctx = context(
            config={"lr": 0.1, "opt": {"a": 1}, "arm": "low", "seed": 4}, extras={"tags": ["x"], "unit": "tokens"}
        )
        delivery.send(
            RunStart(ctx),
            ConfigUpdate(ctx, {"opt": {"b": 2}, "lr": 0.2}),
            Summary(ctx, {"best": 1}),
            Summary(ctx, {"best": 2, "other": "text"}),
            Environment(ctx, {"commit": "abc"}),
        )
        delivery.send(RunAnnotated("a-s0", {"wandb_url": "https://w"}))
        run = run_of(store)
        assert run.config == {"lr": 0.2, "opt": {"a": 1, "b": 2}, "arm": "low", "seed": 4}
        assert (run.arm, run.seed, run.tags, run.unit) == ("low", 4, ["x"], "tokens")
        assert run.summary == {"best": 2, "other": "text"}
        assert run.environment == {"commit": "abc"}
        assert run.extras["wandb_url"] == "https://w"

    def test_alerts_come_newest_first(self, store, delivery):
        ctx = context()
        delivery.send(Alert(ctx, "first", "text", "info"), Alert(ctx, "second", level="error"))
        alerts = store.catalogue.details.alerts([only_run(store)])
        assert [(each.title, each.level, each.time) for each in alerts] == [
            ("second", "error", START + 1),
            ("first", "info", START),
        ]

    def test_contents_are_read_without_a_look_at_their_files_and_a_picture_is_shown_where_its_file_is(
        self, store, delivery, tmp_path
    ):
        ctx = context(str(tmp_path), "run")
        digests = {name: letter * 64 for name, letter in (("here", "a"), ("gone", "b"))}
        (tmp_path / "run/media").mkdir(parents=True)
        (tmp_path / f"run/media/{digests['here']}.png").write_bytes(b"x")
        for step in range(400):
            for name, digest in digests.items():
                delivery.send(Content(state_of(ctx), step, ContentItem("image", name, f"media/{digest}.png")))
        run = only_run(store)
        newest = store.catalogue.details.contents(run, limit=3)
        assert [(each["name"], each["step"]) for each in newest] == [("gone", 398), ("here", 399), ("gone", 399)]
        assert newest[2]["file"] == str(tmp_path / f"run/media/{digests['gone']}.png")
        page = views.run(store, store.catalogue.records.run(run).public)
        assert [(each["name"], each["step"], each["earlier"], each["picture"]) for each in page["shown_contents"]] == [
            ("here", 399, 399, digests["here"]),
            ("gone", 399, 399, None),
        ]
        assert [each["step"] for each in page["contents"]] == [n // 2 for n in range(500, 800)]

    def test_events_of_a_program_are_counted_and_kept_by_type(self, store, delivery):
        class CurriculumMoved(Event, frozen=True):
            ctx: LogContext
            level: int

        class ClusterMessage(Event, frozen=True):
            text: str

        ctx = context()
        delivery.send(*(CurriculumMoved(ctx, level) for level in range(3)), ClusterMessage("hello"))
        run = only_run(store)
        details = store.catalogue.details
        assert details.event_counts(run) == {"curriculum_moved": 3}
        assert [each["fields"] for each in details.kept_events(run, "curriculum_moved", 2)] == [
            {"level": 2},
            {"level": 1},
        ]
        assert details.kept_events(0, "cluster_message")[0]["fields"] == {"text": "hello"}

    def test_an_event_that_names_only_the_key_of_its_run_belongs_to_that_run(self, store, delivery):
        class PageUpdated(Event, frozen=True):
            page: str

        delivery.send(RunStart(context()))
        Delivery(store, "c0-courier").send(PageUpdated("p"), run="a-s0")
        assert store.catalogue.details.event_counts(only_run(store)) == {"page_updated": 1}

    def test_an_event_that_names_only_its_run_belongs_to_that_of_its_own_stream(self, store):
        class PageTurned(Event, frozen=True):
            page: int

        programs = [Delivery(store, f"r0-{n}") for n in range(2)]
        for n, program in enumerate(programs):
            program.send(RunStart(context(f"/runs/{n}")))
        for page in range(3):
            for program in programs:
                program.send(PageTurned(page), run="a-s0")
        records = store.catalogue.records
        runs = [run for each in records.experiments() for run in records.runs(each.id)]
        assert [store.catalogue.details.event_counts(run.id) for run in runs] == [{"page_turned": 3}] * 2

    def test_a_level_of_an_alert_that_is_none_of_ours_is_a_warning(self, store, delivery):
        delivery.send(Alert(context(), "t", level="x" * 1_000))  # pyright: ignore[reportArgumentType] # a test's text
        assert [each.level for each in store.catalogue.details.alerts([only_run(store)])] == ["warning"]

    def test_an_event_of_a_courier_that_comes_before_its_run_waits_for_it_and_makes_no_experiment(
        self, store, delivery
    ):
        class PageAdded(Event, frozen=True):
            page: str

        courier = Delivery(store, "c0-courier")
        courier.send(PageAdded("first"), PageAdded("second"), run="a-s0")
        courier.send(RunAnnotated("a-s0", {"url": "https://example.org"}))
        assert store.catalogue.records.experiments() == []
        delivery.send(RunStart(context()))
        run, details = only_run(store), store.catalogue.details
        assert [each["fields"] for each in details.kept_events(run, "page_added")] == [
            {"page": "second"},
            {"page": "first"},
        ]
        assert store.catalogue.records.run(run).extras == {"url": "https://example.org"}
        assert [each.name for each in store.catalogue.records.experiments()] == ["lr"]
        courier.send(PageAdded("third"), run="a-s0")
        assert details.event_counts(run) == {"page_added": 3}
        assert details.event_counts(0) == {}

    def test_statuses_of_deliveries_belong_to_the_experiment_of_their_journal(self, store, delivery):
        def changed(kind, **fields):
            return UnknownEvent(f"run.{kind}", {"journal": "/runs/lr/journal", **fields})

        delivery.send(RunStart(context()))
        for pending in (5, 0):
            delivery.send(
                changed("delivery_changed", adapter="wandb_logger", status={"state": "live", "pending": pending})
            )
        delivery.send(changed("hook_times", rank=0, hooks=[{"callback": "c", "calls": 3}]))
        status, hooks = store.catalogue.statuses_of(experiment_of(store).id)
        assert (status.name, status.body) == ("wandb_logger", {"state": "live", "pending": 0})
        assert (hooks.kind, hooks.body) == ("hooks", [{"callback": "c", "calls": 3}])
        earlier = Delivery(store, "c0-earlier", start=START - 100)
        earlier.send(changed("delivery_changed", adapter="wandb_logger", status={"state": "live", "pending": 9}))
        status, _ = store.catalogue.statuses_of(experiment_of(store).id)
        assert status.body == {"state": "live", "pending": 0}

    def test_an_annotation_belongs_to_the_run_of_its_time_where_two_have_the_name(self, store):
        for root, start in (("/runs/old", START), ("/runs/new", START + 1_000)):
            train(Delivery(store, f"r0-{start}", start=start), context(root))
        for time in (START + 10, START + 1_010):
            Delivery(store, f"c0-{time}", start=time).send(RunAnnotated("a-s0", {"url": time}))
        experiments = store.catalogue.records.experiments()
        urls = [run.extras["url"] for each in experiments for run in store.catalogue.records.runs(each.id)]
        assert urls == [START + 10, START + 1_010]

    def test_events_of_a_courier_belong_to_the_run_of_its_journal_where_two_at_one_time_have_the_name(self, store):
        class PageAdded(Event, frozen=True):
            page: str

        for first in ("courier", "trainer"):  # whichever events come first
            for root in (f"/runs/{first}-a", f"/runs/{first}-b"):
                trainer = Delivery(store, f"r0-{root}", journal=f"{root}/journal")
                courier = Delivery(store, f"c0-{root}", start=START + 5, journal=f"{root}/journal")
                if first == "trainer":
                    train(trainer, context(root))
                courier.send(RunAnnotated("a-s0", {"url": root}), PageAdded(root), run="a-s0")
                if first == "courier":
                    train(trainer, context(root))
        found = {
            each.path: (run.extras["url"], store.catalogue.details.kept_events(run.id, "page_added"))
            for each in store.catalogue.records.experiments()
            for run in store.catalogue.records.runs(each.id)
        }
        assert len(found) == 4
        for path, (url, pages) in found.items():
            assert url == path
            assert [each["fields"] for each in pages] == [{"page": path}]

    def test_a_row_of_a_step_that_no_chart_can_have_is_counted_and_is_no_progress(self, store, delivery):
        state = state_of(context())
        result = delivery.send(*(StepEnd(state, step, metrics={"loss": 1.0}) for step in (2, 1 << 53)))
        assert (result.points, store.catalogue.unreadable_events, run_of(store).step) == (1, 1, 2)

    def test_odd_fields_are_counted_and_do_not_stop_the_batch(self, store, delivery):
        state = state_of(context())
        delivery.send(
            StepEnd(state, "three", metrics={"loss": 1.0}),
            StepEnd(state, 1, metrics=None),
            Checkpoint(state, None),
            Eval(state, None, "val", "no mapping"),
            *(EpochEnd(state, epoch, {f"note {epoch}": "text"}) for epoch in (1 << 63, [1], None, "first")),
            RunEnd(None, None, None),
            BenchmarkEval(None, None, None),
            StepEnd(state, 2, metrics={"loss": 2.0}),
        )
        assert store.catalogue.unreadable_events
        assert points(store, run_of(store).id, "train/loss") == {2: 2.0}


CONFIG = {
    "name": "lr sweep",
    "recipe": "m:f",
    "matrix": {"lr": [0.1, 0.2]},
    "n_repeats": 3,
    "success_metric": {"name": "val/acc"},
    "metadata": {"hypothesis": "more is better", "tags": ["sweep"]},
}


class TestExperiments:
    def test_an_experiment_has_its_plan_its_groups_and_its_end(self, store, delivery):
        ctx = LogContext("/runs/lr", config=CONFIG)
        delivery.send(ExperimentStart(ctx), GroupStart(ctx, "lr=0.1"))
        record = experiment_of(store)
        assert (record.name, record.hypothesis, record.tags) == ("lr sweep", "more is better", ["sweep"])
        assert (record.planned, record.planned_arms, record.groups) == (6, ["lr=0.1", "lr=0.2"], ["lr=0.1"])
        assert (record.success_metric, record.success_mode) == ("val/acc", "max")
        result = ExperimentResult("lr sweep", "completed", [], "lr=0.2", 0.9, "lr=0.2 is best.")
        delivery.send(ExperimentEnd(ctx, result))
        assert (record.status, record.best_arm, record.best_score) == ("completed", "lr=0.2", 0.9)
        assert record.conclusion == "lr=0.2 is best."

    def test_an_earlier_attempt_that_comes_late_does_not_end_an_experiment(self, store):
        ctx = LogContext("/runs/lr", config=CONFIG)
        Delivery(store, "r0-000002-20260102T000000-0000abcd", start=START + 100).send(ExperimentStart(ctx))
        earlier = Delivery(store, "r0-000001-20260101T000000-0000abcd")
        earlier.send(ExperimentStart(ctx), ExperimentEnd(ctx, ExperimentResult("lr sweep", "cancelled")))
        assert (experiment_of(store).status, experiment_of(store).ended) == (None, None)

    def test_runs_belong_to_the_experiment_of_their_directory(self, store, delivery):
        ctx = LogContext("/runs/lr", config=CONFIG)
        delivery.send(ExperimentStart(ctx))
        train(delivery, ctx.for_run("lr=0.1-s0", {"lr": 0.1, "arm": "lr=0.1", "seed": 0}, "lr=0.1"))
        assert [row.arm for row in store.catalogue.runs_of(experiment_of(store).id)] == ["lr=0.1"]

    def test_a_config_of_another_program_has_no_plan(self, store, delivery):
        delivery.send(ExperimentStart(LogContext("/runs/x", config={"runs": ["a", "b"], "n_repeats": "three"})))
        assert experiment_of(store).planned is None


class TestPredictions:
    def predictions(self, count, right=lambda n: n % 2 == 0):
        return [
            {
                "task_id": f"t{n}",
                "instruction": f"q{n} " + "x" * 5_000,
                "output": f"answer {n}",
                "reward": float(right(n)),
            }
            for n in range(count)
        ]

    def send(self, store, delivery, count=10, right=lambda n: n % 2 == 0, key="a-s0"):
        ctx = context(key=key)
        delivery.send(BenchmarkEval(ctx, EvalResult("gsm", "b1", {"pass": 0.5}), self.predictions(count, right)))
        (row,) = store.catalogue.evals.of_run(run_named(store, key))
        return row

    def test_pages_follow_one_another_without_gap(self, store, delivery):
        row = self.send(store, delivery, 25)
        assert (row.benchmark, row.predictions, row.step) == ("b1", 25, None)
        found, after = [], None
        while True:
            page = store.catalogue.evals.predictions(row.id, after, 10)
            found += [each["task_id"] for each in page["rows"]]
            after = page["next"]
            if after is None:
                break
        assert found == [f"t{n}" for n in range(25)]

    def test_a_long_text_is_stored_once_and_previewed(self, store, delivery):
        row = self.send(store, delivery, 3)
        self.send(store, delivery, 3, key="b-s0")
        assert store.database.query("SELECT COUNT(*) FROM long_text") == [(3,)]
        first = store.catalogue.evals.predictions(row.id, limit=1)["rows"][0]
        assert len(first["instruction"]) == 300
        assert first["lengths"] == {"instruction": 5_003}
        assert len(store.catalogue.evals.prediction(first["id"])["instruction"]) == 5_003

    def test_filters_find_texts_rewards_and_tasks_that_another_arm_fails(self, store, delivery):
        evals = store.catalogue.evals
        a = self.send(store, delivery, 10, right=lambda n: n < 6)
        b = self.send(store, delivery, 10, right=lambda n: n % 2 == 0, key="b-s0")
        right = evals.predictions(a.id, filter={"min_reward": 0.5, "worse_in": b.id})
        assert [each["task_id"] for each in right["rows"]] == ["t1", "t3", "t5"]
        for absent in (1 << 62, -1):
            assert evals.predictions(a.id, filter={"min_reward": 0.5, "worse_in": absent})["rows"] == []
        assert [each["task_id"] for each in evals.predictions(a.id, filter={"below_reward": 0.5})["rows"]] == [
            "t6",
            "t7",
            "t8",
            "t9",
        ]
        assert [each["task_id"] for each in evals.predictions(a.id, filter={"text": "Q7 XX"})["rows"]] == ["t7"]
        assert evals.predictions(a.id, filter={"text": "nothing has this"}) == {
            "rows": [],
            "next": None,
            "searched": 10,
        }

    def test_a_search_finds_texts_with_quotes_and_no_names_of_fields(self, store, delivery):
        rows = [{"output": 'he "said" \\ so'}, {"said": 1}, {"metadata": {"a": "deep Word"}}, {"output": "é" * 500}]
        delivery.send(BenchmarkEval(context(), EvalResult("gsm"), rows))
        (row,) = store.catalogue.evals.of_run(only_run(store))
        ids = [row.id << 24 | n for n in range(4)]
        expected = {'"SAID" \\': [ids[0]], "said": [ids[0]], "word": [ids[2]], "É" * 400: [ids[3]]}
        for text, found in expected.items():
            page = store.catalogue.evals.predictions(row.id, filter={"text": text})
            assert [each["id"] for each in page["rows"]] == found, text

    def test_a_search_without_a_match_ends_after_fifty_thousand_and_goes_on_from_there(self, store, delivery):
        rows = [{"task_id": n, "reward": 0.0} for n in range(50_010)] + [{"task_id": "last", "reward": 1.0}]
        evals = store.catalogue.evals
        delivery.send(StepEnd(state_of(context()), 0))
        with store.transaction():
            id_ = evals.add(only_run(store), 0, "benchmark", "big", None, START, {}, rows)
        for conditions, ends in (({"min_reward": 0.5}, [50_000]), ({"text": "LAST"}, [20_000, 40_000])):
            after = None
            for end in ends:
                page = evals.predictions(id_, after, limit=5, filter=conditions)
                assert (page["rows"], page["searched"]) == ([], end)
                after = page["next"]
            page = evals.predictions(id_, after, limit=5, filter=conditions)
            assert ([row["task_id"] for row in page["rows"]], page["next"], page["searched"]) == (
                ["last"],
                None,
                50_011,
            )

    def test_nested_values_and_odd_predictions_come_back_whole(self, store, delivery):
        given = [{"metadata": {"steps": [*range(500)]}, "reward": None}, "a text only", {"reward": math.nan}]
        delivery.send(BenchmarkEval(context(), EvalResult("gsm"), given))
        (row,) = store.catalogue.evals.of_run(only_run(store))
        whole = [*store.catalogue.evals.whole_predictions(row.id)]
        assert whole[0]["metadata"] == {"steps": [*range(500)]}
        assert whole[1]["output"] == "a text only"
        assert whole[2]["reward"] is None

    def test_an_eval_repeated_at_a_step_replaces_its_predictions(self, store, delivery):
        self.send(store, delivery, 10)
        row = self.send(store, delivery, 4)
        assert store.database.query("SELECT COUNT(*) FROM prediction") == [(4,)]
        assert row.predictions == 4

    def test_rollouts_are_kept_with_their_items(self, store, delivery):
        state = state_of(context())
        delivery.send(Rollout(state, 3, [{"text": "a", "reward": 1.0}, "b"], ["item 1", "item 2"]))
        (row,) = store.catalogue.evals.of_run(only_run(store))
        page = store.catalogue.evals.predictions(row.id)
        assert (row.kind, row.step) == ("rollout", 3)
        assert [(each.get("text"), each.get("output"), each["item"]) for each in page["rows"]] == [
            ("a", None, "item 1"),
            (None, "b", "item 2"),
        ]


def test_a_run_from_the_start_begins_its_epochs_anew(store, delivery):
    ctx = context()
    train(delivery, ctx, status=None)
    delivery.send(*(EpochEnd(state_of(ctx), epoch, {"loss": 1.0}) for epoch in range(3)))
    train(delivery, ctx, status=None)
    delivery.send(EpochEnd(state_of(ctx), 0, {"loss": 2.0}))
    assert points(store, only_run(store), "epoch/loss") == {0: 2.0}


def test_removing_a_run_leaves_nothing_of_it(store, delivery):
    ctx = context()
    train(delivery, ctx, evals={1: 0.5})
    delivery.send(Alert(ctx, "t"), BenchmarkEval(ctx, EvalResult("gsm"), [{"output": "x" * 1_000}]))
    for folder in ("/runs/lr/a-s0", "/runs/lr"):
        status = {"journal": f"{folder}/journal", "adapter": "csv_metrics", "status": {}}
        Delivery(store, f"c0-{folder}").send(UnknownEvent("run.delivery_changed", status))
    run = only_run(store)
    with store.transaction():
        store.catalogue.remove_experiment(run_of(store).experiment)
        store.catalogue.evals.remove_unused_texts()
    tables = sorted(store.database.tables() - {"meta", "stream"})
    assert {table: store.database.query(f"SELECT COUNT(*) FROM {table}")[0][0] for table in tables} == dict.fromkeys(
        tables, 0
    )
    assert series_names(store, run) == []
