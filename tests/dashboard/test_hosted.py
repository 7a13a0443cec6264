"""What EvSys' own clients send to the hosted service, answered by the dashboard."""

from contextlib import closing

import msgspec
import pytest

from evsys_adapters.dashboard import hosted, pages
from evsys_adapters.dashboard.hosted import HostedError
from evsys_adapters.dashboard.open_series import Changes
from support.dashboard_stores import Delivery, context, open_store, points, train

pytestmark = pytest.mark.usefixtures("each_database")

NOW = 5_000.0


@pytest.fixture
def store(tmp_path):
    with closing(open_store(tmp_path)) as opened:
        yield opened


@pytest.fixture
def call(store):
    """Send an operation, as JSON both ways."""

    def send(op, **args):
        given = msgspec.json.decode(msgspec.json.encode(args))
        return msgspec.json.decode(msgspec.json.encode(hosted.call(store, op, given, now=NOW)))

    return send


@pytest.fixture
def post(store):
    def send(path, body):
        status, answer = hosted.rest(store, f"/api/dashboard/api{path}", body, now=NOW)
        return status, msgspec.json.decode(msgspec.json.encode(answer))

    return send


def sweep(call):
    """An experiment as `evsys_logger` sends it: two arms with two seeds each."""
    experiment = call("create_experiment", experiment_name="lr", project_id="p1", hypothesis="h", tags=["a"])["id"]
    runs = {}
    for arm in ("low", "high"):
        group = call("create_group", experiment_id=experiment, name=arm)["id"]
        for seed in (0, 1):
            config = {"name": f"{arm}__s{seed}", "lr": 0.1 if arm == "low" else 0.2, "seed": seed}
            run = call(
                "create_run",
                experiment_id=experiment,
                group_id=group,
                recipe_kind="sft",
                run_config=config,
                seed=seed,
                status="running",
            )["id"]
            runs[arm, seed] = run
            for step in range(3):
                call("log_metrics", run_id=run, step=step, metrics={"loss": 3.0 - step + seed}, split="train")
            call("log_metrics", run_id=run, step=2, metrics={"val/acc": 0.5 + 0.1 * seed}, split="val")
            call("add_checkpoint", run_id=run, uri="s3://b/k", label="step_3", step=2, is_final=False)
            call("update_run", run_id=run, patch={"status": "completed"})
    return experiment, runs


class TestGateway:
    def test_a_sweep_is_an_experiment_with_arms_and_seeds(self, store, call):
        experiment, runs = sweep(call)
        page = pages.experiment(store, experiment, NOW)
        assert (page["name"], page["hypothesis"], page["tags"]) == ("lr", "h", ["a"])
        assert [(arm["name"], arm["n"], arm["state"]) for arm in page["arms"]] == [
            ("low", 2, "completed"),
            ("high", 2, "completed"),
        ]
        assert [each["name"] for each in page["headlines"]] == ["val/acc", "train/loss"]
        assert page["arms"][0]["values"][1]["mean"] == 1.5
        assert page["runs"][0]["config"] == {"name": "low__s0", "lr": 0.1}
        assert [run["checkpoints"] for run in page["runs"]] == [1] * 4
        assert {run["id"] for run in page["runs"]} == set(runs.values())

    def test_texts_of_a_megabyte_as_names_leave_the_list_of_experiments_small(self, store, call):
        text = "x" * 1_000_000
        experiment = call("create_experiment", experiment_name=text, hypothesis=text, tags=[text])["id"]
        run = call("create_run", experiment_id=experiment, run_config={"name": text, "arm": text})["id"]
        call("log_metrics", run_id=run, step=0, metrics={text: 1.0, text[:5_000]: 2.0}, split="val")
        assert call("get_metrics", run_id=run) != []
        assert len(msgspec.json.encode(pages.home(store, NOW))) < 3_000
        [series] = [each.name for each in store.series.names(store.catalogue.run_id(run))]
        assert len(series) <= 640 + len("val/")

    def test_creations_answer_an_object_with_a_text_as_id(self, call):
        experiment = call("create_experiment", experiment_name="e")
        run = call("create_run", experiment_id=experiment["id"])
        rows = [
            experiment,
            run,
            call("create_project", name="p"),
            call("create_group", experiment_id=experiment["id"], name="g"),
            call("create_eval", run_id=run["id"], metrics={}),
            call("add_prediction", run_id=run["id"], kind="eval", task_id="t"),
            call("add_checkpoint", run_id=run["id"], uri="u"),
            call("create_dataset", name="d"),
            call("create_benchmark", name="b"),
            call("set_goal", project_id="p", goal="g"),
        ]
        assert all(isinstance(row["id"], str) and row["id"] for row in rows)
        assert (experiment["experiment_name"], run["status"]) == ("e", "pending")

    def test_metrics_come_back_with_exactly_their_four_fields_and_the_last_value_counts(self, call):
        run = call("create_run")["id"]
        assert call("log_metrics", run_id=run, step=1, metrics={"loss": 5.0, "lr": 0.1}, split="train") == []
        call("log_metrics", run_id=run, step=1, metrics={"loss": 4.0}, split="train")
        call("log_metrics", run_id=run, step=0, metrics={"loss": 9.0}, split="train")
        call("log_metric", run_id=run, step=7, name="loss", value=1.0, split="val")
        assert call("get_metrics", run_id=run, name="loss", split="train") == [
            {"step": 0, "name": "loss", "value": 9.0, "split": "train"},
            {"step": 1, "name": "loss", "value": 4.0, "split": "train"},
        ]
        assert call("get_metrics", run_id=run, split="val") == [
            {"step": 7, "name": "loss", "value": 1.0, "split": "val"}
        ]

    def test_the_same_name_in_two_splits_is_two_series(self, store, call):
        run = call("create_run")["id"]
        call("log_metrics", run_id=run, step=0, metrics={"a/b": 1.0}, split="train")
        call("log_metrics", run_id=run, step=0, metrics={"a/b": 2.0}, split="val")
        assert {(row["split"], row["value"]) for row in call("get_metrics", run_id=run)} == {
            ("train", 1.0),
            ("val", 2.0),
        }
        id_ = store.catalogue.run_id(run)
        assert points(store, id_, "a/b") == {0: 1.0}
        assert points(store, id_, "val/a/b") == {0: 2.0}

    def test_names_that_would_be_one_series_are_two(self, call):
        run = call("create_run")["id"]
        for name in ("train/loss", "loss", "train/train/loss"):
            call("log_metrics", run_id=run, step=0, metrics={name: float(len(name))})
        rows = {(row["name"], row["value"]) for row in call("get_metrics", run_id=run)}
        assert rows == {("train/loss", 10.0), ("loss", 4.0), ("train/train/loss", 16.0)}

    def test_evals_and_predictions_come_back_as_they_were_sent(self, store, call):
        run = call("create_run")["id"]
        during = call("create_eval", run_id=run, benchmark_id="b1", metrics={"pass@3": 0.5}, step=4)
        after = call(
            "create_eval", run_id=run, benchmark_id="b1", metrics={"pass@3": 0.7}, breakdowns={"x": 1}, model_ref="m"
        )
        sent = {
            "run_id": run,
            "kind": "eval",
            "eval_id": after["id"],
            "task_id": "t1",
            "instruction": "q" * 1_000,
            "model_output": "answer",
            "expected": {"any": ["json"]},
            "reward": 1.0,
            "sample_idx": 0,
            "metadata": {"completion_token_ids": [*range(500)], "latency_s": 0.5},
        }
        call("add_prediction", **sent)
        call("add_prediction", run_id=run, kind="train", task_id="group-1", step=3, metadata={"group_idx": 1})
        rows = call("list_evals", run_id=run)
        assert [(row["id"], row["benchmark_id"], row["step"], row["metrics"]) for row in rows] == [
            (during["id"], "b1", 4, {"pass@3": 0.5}),
            (after["id"], "b1", None, {"pass@3": 0.7}),
        ]
        assert (rows[1]["breakdowns"], rows[1]["model_ref"]) == ({"x": 1}, "m")
        (prediction,) = call("list_predictions", run_id=run, kind="eval")
        assert {key: prediction[key] for key in sent} == sent
        (rollout,) = call("list_predictions", run_id=run, kind="train")
        assert (rollout["task_id"], rollout["step"], rollout["eval_id"]) == ("group-1", 3, None)
        assert points(store, store.catalogue.run_id(run), "b1/pass@3") == {4: 0.5}
        assert store.catalogue.records.run(store.catalogue.run_id(run)).finals == {"b1/pass@3": 0.7}

    def test_a_repeated_eval_replaces_the_first_and_keeps_its_predictions_coming(self, call):
        run = call("create_run")["id"]
        first = call("create_eval", run_id=run, benchmark_id="b", metrics={"a": 1}, step=1)["id"]
        call("create_eval", run_id=run, benchmark_id="b", metrics={"a": 2}, step=1)
        call("add_prediction", run_id=run, kind="eval", eval_id=first, task_id="t")
        assert [row["metrics"] for row in call("list_evals", run_id=run)] == [{"a": 2}]
        assert len(call("list_predictions", run_id=run)) == 1

    def test_patches_change_status_error_summary_and_keep_unknown_fields(self, store, call):
        experiment = call("create_experiment", experiment_name="e", colour="red")["id"]
        run = call("create_run", experiment_id=experiment, tensorboard_path="/tb")["id"]
        patch = {"status": "failed", "error_message": "ValueError: x", "summary": {"best_score": 0.5}, "odd": None}
        call("update_run", run_id=run, patch=patch)
        found = call("get_run", run_id=run)
        assert {key: found[key] for key in patch} == patch
        assert found["tensorboard_path"] == "/tb"
        call(
            "update_experiment",
            experiment_id=experiment,
            patch={"status": "completed", "conclusion": "c", "best_score": 0.5},
        )
        found = call("get_experiment", experiment_id=experiment)
        assert (found["status"], found["conclusion"], found["best_score"], found["colour"]) == (
            "completed",
            "c",
            0.5,
            "red",
        )
        page = pages.experiment(store, experiment, NOW)
        assert (page["state"], page["runs"][0]["state"], page["runs"][0]["error"]) == (
            "completed",
            "failed",
            "ValueError: x",
        )

    def test_a_status_of_null_leaves_a_run_open(self, store, call):
        run = call("create_run", status="running")["id"]
        call("update_run", run_id=run, patch={"status": None})
        assert call("get_run", run_id=run)["status"] == "running"

    def test_a_run_without_experiment_and_rows_of_unknown_ids_are_kept(self, store, call):
        call("log_metrics", run_id="lost", step=0, metrics={"loss": 1.0}, split="train")
        run = call("create_run", run_config={"name": "alone"})["id"]
        assert points(store, store.catalogue.run_id("lost"), "train/loss") == {0: 1.0}
        (experiment,) = call("list_experiments")
        assert (experiment["experiment_name"], experiment["n_runs"]) == ("hosted runs", 2)
        assert {row["id"] for row in call("list_runs")} == {"lost", run}

    def test_a_killed_run_stalls_by_the_age_of_its_last_call(self, store, call):
        experiment = call("create_experiment", experiment_name="e")["id"]
        run = call("create_run", experiment_id=experiment, status="running")["id"]
        call("log_metrics", run_id=run, step=0, metrics={"loss": 1.0}, split="train")
        assert pages.experiment(store, experiment, NOW + 59)["state"] == "running"
        assert pages.experiment(store, experiment, NOW + 61)["state"] == "stalled"

    def test_a_pending_run_runs_with_its_first_metrics(self, call):
        run = call("create_run")["id"]
        call("log_metrics", run_id=run, step=0, metrics={"loss": 1.0}, split="train")
        assert call("get_run", run_id=run)["status"] == "running"

    def test_the_detail_of_an_experiment_has_groups_runs_and_their_rows(self, call):
        experiment, runs = sweep(call)
        call("create_run", experiment_id=experiment, run_config={"name": "single"})
        detail = call("experiment_detail", experiment_id=experiment, include_metrics=True)
        assert detail["experiment"]["experiment_name"] == "lr"
        assert [group["name"] for group in detail["groups"]] == ["low", "high"]
        run = detail["groups"][0]["runs"][0]
        assert (run["id"], run["run_config"]["name"], run["recipe_kind"]) == (runs["low", 0], "low__s0", "sft")
        assert {"step": 0, "split": "train", "name": "loss", "value": 3.0} in run["metrics"]
        assert [(row["label"], row["step"], row["uri"], row["is_final"]) for row in run["checkpoints"]] == [
            ("step_3", 2, "s3://b/k", False)
        ]
        assert [row["run_config"]["name"] for row in detail["ungrouped_runs"]] == ["single"]

    def test_projects_goals_data_sets_and_benchmarks_are_kept(self, call):
        project = call("create_project", name="p", description="d")["id"]
        assert call("get_project", project_id=project)["description"] == "d"
        assert call("get_project", project_id="other") is None
        for goal in ("first", "second"):
            call("set_goal", project_id=project, goal=goal)
        assert [row["goal"] for row in call("list_goals", project_id=project)] == ["first", "second"]
        assert call("current_goal", project_id=project)["goal"] == "second"
        data = call("create_dataset", project_id=project, name="d", format="jsonl", version=1, transform=["t"])["id"]
        rows = call("add_dataset_rows", dataset_id=data, rows=[{"a": n} for n in range(150)])
        assert len(rows) == 150
        call("add_dataset_rows", dataset_id=data, rows=[{"a": "new"}], start_idx=149)
        assert [row["a"] for row in call("get_dataset_rows", dataset_id=data)] == [*range(100)]
        assert call("get_dataset_rows", dataset_id=data, limit=5, offset=148)[-1]["a"] == "new"
        assert call("get_dataset", dataset_id=data)["transform"] == ["t"]
        benchmark = call("create_benchmark", name="b")["id"]
        call("add_benchmark_rows", benchmark_id=benchmark, rows=[{"q": 1}], start_idx=0)
        assert [row["q"] for row in call("get_benchmark_rows", benchmark_id=benchmark)] == [1]
        assert [row["name"] for row in call("list_datasets", project_id=project)] == ["d"]
        assert [row["name"] for row in call("list_benchmarks")] == ["b"]
        assert call("delete_project", project_id=project) == {"deleted": True}
        assert call("delete_project", project_id=project) == {"deleted": False}
        assert call("get_project", project_id=project) is None

    def test_experiments_are_listed_newest_first_by_project(self, store):
        for n, project in enumerate(("p", "q", "p")):
            hosted.call(store, "create_experiment", {"experiment_name": str(n), "project_id": project}, now=NOW + n)
        rows = hosted.call(store, "experiment_summaries", {"project_id": "p", "valid_only": False})
        assert [row["experiment_name"] for row in rows] == ["2", "0"]
        assert hosted.call(store, "get_project", {"project_id": "q"})["id"] == "q"

    def test_a_deleted_experiment_is_gone(self, call):
        experiment = call("create_experiment", experiment_name="e")["id"]
        assert call("delete_experiment", experiment_id=experiment) == {"deleted": True}
        assert call("get_experiment", experiment_id=experiment) is None
        assert call("list_experiments") == []

    def test_what_our_own_runs_have_is_readable_too(self, store, call):
        train(Delivery(store), context(key="a-s0"), evals={1: 0.5})
        (experiment,) = call("list_experiments")
        (run,) = call("list_runs", experiment_id=experiment["id"])
        rows = call("get_metrics", run_id=run["id"], name="loss", split="train")
        assert [row["value"] for row in rows] == [3.0, 2.0, 1.0]
        assert call("get_metrics", run_id=run["id"], name="val/acc")[0]["split"] == "val"


class TestErrors:
    def test_an_unknown_operation_is_named_with_the_nearest(self, call):
        with pytest.raises(HostedError, match="unknown op 'log_metrix'.*log_metric") as raised:
            call("log_metrix", run_id="r")
        assert raised.value.status == 400

    @pytest.mark.parametrize(
        ("op", "args", "message"),
        [
            ("log_metrics", {"step": 0, "metrics": {}}, "needs run_id"),
            ("log_metrics", {"run_id": "r", "step": "x", "metrics": {}}, "no whole number"),
            ("log_metrics", {"run_id": "r", "step": 0.5, "metrics": {}}, "no whole number"),
            ("log_metrics", {"run_id": "r", "step": 1 << 53, "metrics": {"loss": 1.0}}, "more than 53 bits"),
            ("update_run", {"patch": {}}, "needs run_id"),
            ("create_group", {}, "needs name"),
        ],
    )
    def test_what_could_not_be_meant_is_a_400(self, call, op, args, message):
        with pytest.raises(HostedError, match=message):
            call(op, **args)

    def test_odd_values_do_not_cost_the_store(self, store, call):
        run = call("create_run", run_config="no mapping", seed="42", tags=3)["id"]
        call("log_metrics", run_id=run, step="3", metrics={"loss": 1.0, "text": "x", "none": None, "deep": {"a": 2}})
        call("create_eval", run_id=run, metrics="no mapping", step=2)
        call("add_prediction", run_id=run, kind=["odd"], reward="high", eval_id="unknown", step=1)
        call("update_run", run_id=run, patch="no mapping")
        call("add_checkpoint", run_id=run, uri=None, step=None)
        rows = call("get_metrics", run_id=run)
        assert {(row["name"], row["step"]) for row in rows} == {("loss", 3), ("deep/a", 3)}

    def test_a_call_inside_a_transaction_that_fails_leaves_the_others(self, store):
        with store.transaction():
            hosted.call(store, "create_experiment", {"experiment_name": "kept"})
            with pytest.raises(HostedError):
                hosted.call(store, "nothing", {})
        assert [row["experiment_name"] for row in hosted.call(store, "list_experiments", {})] == ["kept"]


class TestRest:
    def test_a_run_by_the_older_routes(self, store, call, post):
        status, answer = post(
            "/sdk/experiments/", {"experiment_name": "e", "project_id": "p", "plan": "x", "is_valid": True}
        )
        experiment = answer["experiment"]["id"]
        assert status == 201
        status, answer = post(
            "/sdk/runs", {"experiment_id": experiment, "status": "running", "seed": 1, "run_config": {}}
        )
        run = answer["run"]["id"]
        assert status == 201
        assert post(
            f"/sdk/runs/{run}/metrics/", {"step": 0, "split": "train", "metrics": {"loss": 1.0}, "accuracy": 0.5}
        ) == (
            200,
            {"ok": True},
        )
        status, answer = post(f"/sdk/runs/{run}/evals/", {"metrics": {"acc": 0.5}, "benchmark_id": "b"})
        assert isinstance(answer["id"], str)
        predictions = [
            {"kind": "eval", "eval_id": answer["id"], "instruction": "q", "model_output": "a", "reward": 1.0}
        ] * 2
        assert post(f"/sdk/runs/{run}/predictions/", {"predictions": predictions})[1] == {"ok": True, "inserted": 2}
        post(f"/sdk/runs/{run}/checkpoints/", {"uri": "u", "is_final": True, "step": 9})
        done = {"status": "completed", "summary": {"best_score": 0.5}}
        assert post(f"/sdk/runs/{run}/", done) == (200, {"run_id": run, "patched": ["status", "summary"]})
        assert post(f"/sdk/experiments/{experiment}/", {"status": "completed"})[1]["patched"] == ["status"]
        assert {row["name"] for row in call("get_metrics", run_id=run)} == {"loss", "accuracy"}
        assert len(call("list_predictions", run_id=run)) == 2
        assert call("list_checkpoints", run_id=run)[0]["is_final"] is True
        page = pages.experiment(store, experiment, NOW)
        assert (page["state"], page["headlines"][0]["name"]) == ("completed", "best_score")

    def test_the_gateway_is_a_route_too(self, post):
        status, answer = post("/sdk/data/", {"op": "create_experiment", "args": {"experiment_name": "e"}})
        assert (status, answer["result"]["experiment_name"]) == (200, "e")

    def test_an_unknown_route_is_a_404(self, post):
        with pytest.raises(HostedError, match="no route") as raised:
            post("/sdk/nothing/", {})
        assert raised.value.status == 404


def test_live_viewers_get_what_a_call_changes(store):
    changes = Changes()
    run = hosted.call(store, "create_run", {}, changes)["id"]
    hosted.call(store, "log_metrics", {"run_id": run, "step": 3, "metrics": {"loss": 1.0}}, changes)
    id_ = store.catalogue.run_id(run)
    assert changes.runs == {id_}
    assert len(changes.experiments) == 1
    assert set(changes.series.values()) == {(3, 3)}


def test_what_clients_have_sent_outlives_the_process(store):
    run = hosted.call(store, "create_run", {"run_config": {"name": "r"}}, now=NOW)["id"]
    hosted.call(store, "log_metrics", {"run_id": run, "step": 0, "metrics": {"loss": 1.0}}, now=NOW)
    reopened = store.reopen()  # without a checkpoint, as after a kill
    assert hosted.call(reopened, "get_metrics", {"run_id": run})[0]["value"] == 1.0
    assert hosted.call(reopened, "get_run", {"run_id": run})["run_config"] == {"name": "r"}
    reopened.close()
