"""mlflow_logger: what a store and a real tracking server have afterwards, compared with what was published."""

import asyncio
import contextlib
import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import evsys_bus
from evsys_adapters import MlflowLoggerCallback, SystemMetricsCallback
from evsys_adapters.mlflow_logger import MlflowSink
from evsys_bus import (
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    EvalResult,
    EventBus,
    LogContext,
    LoopState,
    ManifestRow,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.context import ContentItem, LoopArtifacts
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.errors import ConfigError, ParkedError, RetryLaterError
from evsys_bus.events import Alert, Content, Environment, Eval, Summary
from evsys_bus.front.media import store_content
from evsys_bus.journal import JournalReader
from evsys_bus.testing import conformance
from support.couriers import counted, deliver, read_dead_letters
from support.http_server import HttpServer
from support.journals import read_envelopes, read_records, record

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of MLflow and its packages
    pytest.mark.asyncio(loop_factories=["asyncio"]),
    pytest.mark.timeout(120),  # a new database takes MLflow many seconds
    pytest.mark.servers,
]
ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MLFLOW")]:
        monkeypatch.delenv(name)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """A database with MLflow's tables, which take seconds to create."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    program = f"import mlflow; mlflow.MlflowClient('sqlite:///{path}').search_experiments()"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | ENVIRONMENT, capture_output=True)
    return path


@pytest.fixture
def store(tmp_path, empty_database, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a database's artifacts go
    shutil.copy(empty_database, tmp_path / "runs.db")
    client(f"sqlite:///{tmp_path}/runs.db").search_experiments()  # the first import of MLflow takes seconds
    return f"sqlite:///{tmp_path}/runs.db"


def client(store):
    import mlflow

    return mlflow.MlflowClient(store)


def only_run(store, experiment="lab"):
    [run] = all_runs(store, experiment)
    return run


def all_runs(store, experiment="lab"):
    found = client(store).get_experiment_by_name(experiment)
    return [] if found is None else client(store).search_runs([found.experiment_id])


def history(store, run, key):
    return [(each.step, each.value) for each in client(store).get_metric_history(run.info.run_id, key)]


def artifact(store, run, file):
    return Path(client(store).download_artifacts(run.info.run_id, file)).read_text(encoding="utf-8")


def files_of(store, run, folder):
    """The files of a folder of artifacts and of those below."""
    for each in client(store).list_artifacts(run.info.run_id, folder):
        yield from files_of(store, run, each.path) if each.is_dir else [each.path]


def contexts(folder, key="ppo"):
    ctx = LogContext(folder / "lab", config={"optimizer": {"lr": 0.1, "name": "adam"}, "layers": [1, 2]})
    ctx = ctx.for_run(key, {"seed": 7}, "seeds")
    return ctx, LoopState(0, 10, ctx.run_dir, ctx=ctx)


def training(folder, steps=range(3), key="ppo", *, status="completed", error=None):
    ctx, state = contexts(folder, key)
    state.step = steps[0]
    yield RunStart(ctx)
    yield TrainStart(state)
    for step in steps:
        yield StepEnd(state, step, TrainingBatch(), {"loss": 1.0 / (step + 1), "env/reward": step})
        yield Eval(state, step, "val", {"accuracy": step / 8})
    yield Checkpoint(state, ManifestRow("final", steps[-1], state_path="/weights/final"))
    yield TrainEnd(state, LoopArtifacts())
    yield RunEnd(ctx, RunResult(status=status, error=error), ArmResult(key, status=status, error=error))


def sink(store, **params):
    return MlflowSink("lab", store, **params)


async def test_a_run_has_its_metrics_params_tags_and_status(store, tmp_path, journal):
    record(journal, training(tmp_path))
    courier = await deliver(journal, sink(store, tags={"team": "rl"}))
    assert counted(courier) == (11, 0, 0)
    run = only_run(store)
    assert history(store, run, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert history(store, run, "env/reward") == [(0, 0), (1, 1), (2, 2)]
    assert history(store, run, "eval/val/accuracy") == [(0, 0), (1, 0.125), (2, 0.25)]
    assert run.data.params == {"optimizer.lr": "0.1", "optimizer.name": "adam", "layers": "[1, 2]", "seed": "7"}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "ppo")
    assert (run.data.tags["team"], run.data.tags["group"]) == ("rl", "seeds")
    assert json.loads(run.data.tags["checkpoint.final"])["state_path"] == "/weights/final"
    envelopes = client(store).get_metric_history(run.info.run_id, "train/loss")
    assert all(abs(each.timestamp / 1000 - time.time()) < 60 for each in envelopes)


@pytest.mark.parametrize(("status", "shown"), [("failed", "FAILED"), ("cancelled", "KILLED")])
async def test_a_run_that_did_not_complete_says_so(store, tmp_path, journal, status, shown):
    record(journal, training(tmp_path, status=status, error="out of memory"))
    await deliver(journal, sink(store))
    run = only_run(store)
    assert (run.info.status, run.data.tags["error"]) == (shown, "out of memory")


@pytest.mark.parametrize("kind", ["database", "folder"])
async def test_a_batch_that_is_delivered_again_changes_nothing(store, tmp_path, journal, kind):
    store = store if kind == "database" else (tmp_path / "mlruns").as_uri()
    record(journal, training(tmp_path))
    await deliver(journal, sink(store), name="first")
    before = client(store).get_run(only_run(store).info.run_id).to_dictionary()
    await deliver(journal, sink(store), name="again")
    run = only_run(store)
    assert history(store, run, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    after = run.to_dictionary()
    assert {key: after["data"][key] for key in ("metrics", "params", "tags")} == {
        key: before["data"][key] for key in ("metrics", "params", "tags")
    }


async def test_a_resumed_run_continues_the_run_and_shows_changed_params(store, tmp_path, journal):
    record(journal, training(tmp_path, range(2), status="failed", error="killed"))
    await deliver(journal, sink(store))
    events = [*training(tmp_path, range(2, 4))]
    events[0].ctx.run_config["seed"] = 8
    record(journal, events)
    await deliver(journal, sink(store))
    run = only_run(store)
    assert [step for step, _ in history(store, run, "train/loss")] == [0, 1, 2, 3]
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "7"
    assert json.loads(run.data.tags["evsys_bus.changed_params"]) == {"seed": "8"}


async def test_a_run_without_its_start_is_created_and_ends_at_its_train_end(store, tmp_path, journal):
    state = LoopState(0, 10, tmp_path / "lab" / "alone")
    record(journal, [StepEnd(state, 3, TrainingBatch(), {"loss": 2}), TrainEnd(state, LoopArtifacts())])
    await deliver(journal, sink(store))
    run = only_run(store)
    assert (run.info.run_name, run.info.status) == ("alone", "FINISHED")
    assert history(store, run, "train/loss") == [(3, 2)]


async def test_odd_names_and_values_arrive_in_a_form_that_mlflow_takes(store, tmp_path, journal):
    _, state = contexts(tmp_path)
    odd = {"pass@1": 1, "pass#1": 2, "../up": 3, "x" * 400: 4, "a//b": 5, "nan": math.nan, "inf": math.inf}
    record(journal, [StepEnd(state, 0, TrainingBatch(), odd | {"note": "y" * 9000, "flag": True})])
    courier = await deliver(journal, sink(store))
    assert counted(courier) == (1, 0, 0)
    metrics = only_run(store).data.metrics
    assert metrics["train/pass_1"] == 1
    assert metrics["up"] == 3
    assert metrics["a/b"] == 5
    assert metrics["train/flag"] == 1
    assert math.isnan(metrics["train/nan"])
    assert metrics["train/inf"] == sys.float_info.max
    assert len([key for key in metrics if key.startswith("train/pass_1")]) == 2
    assert sum(key.startswith("train/xxx") for key in metrics) == 1
    tags = only_run(store).data.tags
    assert tags["train/note"].endswith("…")
    assert json.loads(tags["evsys_bus.renamed"])["train/pass_1"] == "train/pass@1"


async def test_rows_with_more_metrics_than_a_request_takes_are_sent_whole(store, tmp_path, journal):
    _, state = contexts(tmp_path)
    record(journal, [StepEnd(state, 0, TrainingBatch(), {f"m{n}": n for n in range(2500)})])
    await deliver(journal, sink(store))
    metrics = only_run(store).data.metrics
    assert metrics == {f"train/m{n}": n for n in range(2500)}


async def test_large_configurations_are_bounded_and_the_tag_says_so(store, tmp_path, journal):
    ctx = LogContext(
        tmp_path / "lab", config={f"p{n}": "z" * 7000 for n in range(3)} | {f"q{n}": n for n in range(1200)}
    )
    record(journal, [RunStart(ctx.for_run("ppo"))])
    await deliver(journal, sink(store))
    run = only_run(store)
    assert len(run.data.params) == 1000
    assert len(run.data.params["p0"]) == 6000
    assert run.data.tags["evsys_bus.params_left_out"] == "203"


async def test_predictions_are_an_artifact(store, tmp_path, journal):
    ctx, _ = contexts(tmp_path)
    rows = [{"task_id": "t1", "output": "42"}, {"task_id": "t2", "output": "43"}]
    record(journal, [RunStart(ctx), BenchmarkEval(ctx, EvalResult("digits", metrics={"acc": 0.5}), rows, step=4)])
    await deliver(journal, sink(store, max_pred_rows=1))
    run = only_run(store)
    assert history(store, run, "eval/digits/acc") == [(4, 0.5)]
    table = json.loads(artifact(store, run, "eval/digits/step-4/predictions.json"))
    assert table["data"] == [["t1", "42"]]
    assert table["caption"] == "1 of 2 predictions"


async def test_what_the_front_door_logs_is_there(store, tmp_path):
    path = tmp_path / "lab" / "ppo"
    (tmp_path / "notes.md").write_text("# notes")
    with evsys_bus.run(
        path, config={"lr": 0.1}, tags=["rl", "small"], notes="a first try", output=False, environment=False
    ) as run:
        run.log({"loss": 1.0}, step=0)
        run.log({"reward": 2.0}, step=0)
        run.config.update({"device": "cpu"})
        run.text("sample", "once upon a time", step=0)
        run.histogram("weights", [0.0, 0.5, 1.0], bins=2, step=0)
        run.table("answers", columns=["question", "answer"], rows=[["6 * 7", 42]], step=0)
        run.artifact("notes", tmp_path / "notes.md")
        run.epoch_end(0, {"loss": 0.75})
        run.summary["best"] = 0.93
    courier = await deliver(path / "journal", sink(store))
    assert counted(courier)[1:] == (0, 0)
    found = only_run(store)
    metrics = {"train/loss": 1.0, "train/reward": 2.0, "epoch/loss": 0.75, "summary/best": 0.93}
    assert found.data.metrics == metrics
    assert found.data.params == {"lr": "0.1", "device": "cpu"}
    assert found.data.tags["tags"] == "rl, small"
    assert found.data.tags["mlflow.note.content"] == "a first try"
    assert found.info.status == "FINISHED"
    folders = ("text/sample/step-0", "table/answers/step-0", "artifact/notes")
    [text], [table], [file] = ([*files_of(store, found, each)] for each in folders)
    assert "once upon a time" in artifact(store, found, text)
    assert "42" in artifact(store, found, table)
    assert artifact(store, found, file) == "# notes"
    histogram = json.loads(artifact(store, found, "histogram/weights/step-0/histogram.json"))
    assert histogram["counts"] == [1, 2]


async def test_the_environment_is_an_artifact_and_the_commit_has_mlflows_name(store, tmp_path, journal):
    ctx, _ = contexts(tmp_path)
    facts = {"python": "3.13", "command": ["train.py", "--lr", "1"], "git": {"commit": "abc", "branch": None}}
    record(journal, [RunStart(ctx), Environment(ctx, facts)])
    await deliver(journal, sink(store))
    run = only_run(store)
    assert run.data.tags["mlflow.source.git.commit"] == "abc"
    assert run.data.tags["mlflow.source.name"] == "train.py --lr 1"
    assert json.loads(artifact(store, run, "environment.json"))["python"] == "3.13"


async def test_steps_may_be_thinned(store, tmp_path, journal):
    _, state = contexts(tmp_path)
    record(journal, [StepEnd(state, step, TrainingBatch(), {"loss": step}) for step in range(10)])
    await deliver(journal, sink(store, log_every=4))
    assert [step for step, _ in history(store, only_run(store), "train/loss")] == [0, 4, 8, 9]


def test_a_courier_process_sends_samples_of_the_machine_apart_from_the_training(store, tmp_path):
    callbacks = [MlflowLoggerCallback("lab", store), SystemMetricsCallback(0.05)]
    with EventBus(callbacks, journal=tmp_path / "journal", drain_timeout=90) as bus:
        for event in training(tmp_path):
            bus.publish(event)
            if isinstance(event, StepEnd) and event.step_idx == 2:
                event.state.step = 2
                until = time.monotonic() + 20
                while not read_records(tmp_path / "journal", family="s"):
                    assert time.monotonic() < until
                    time.sleep(0.01)
    run = only_run(store)
    assert [step for step, _ in history(store, run, "train/loss")] == [0, 1, 2]
    assert run.data.metrics["system/memory/percent"] > 0
    assert run.data.params["seed"] == "7"
    assert run.data.tags["group"] == "seeds"
    reader = JournalReader(tmp_path / "journal")
    published = b"".join(each.payload for stream in reader.streams("c") for each in reader.read(stream))
    assert b"mlflow_run_id" in published
    assert run.info.run_id.encode() in published


async def test_content_whose_file_is_gone_is_a_dead_letter_and_the_rest_arrives(store, tmp_path, journal):
    _, state = contexts(tmp_path)
    item = ContentItem("image", "sample", "media/gone.png")
    events = [*training(tmp_path)]
    record(journal, [*events[:4], Content(state, 0, item), *events[4:]])
    assert counted(await deliver(journal, sink(store))) == (11, 1, 0)
    assert "gone.png is missing" in str(read_dead_letters(journal))
    assert history(store, only_run(store), "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]


async def test_errors_show_no_password_of_a_uri(tmp_path, journal, monkeypatch, store):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2hunter2@127.0.0.1:1")
    record(journal, training(tmp_path))
    logger = MlflowSink("lab")
    await logger.open()
    with pytest.raises(RetryLaterError) as caught:
        await logger.write(read_envelopes(journal))
    assert "MLflow at 127.0.0.1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "error"),
    [(401, ParkedError), (403, ParkedError), (404, ParkedError), (429, RetryLaterError), (502, RetryLaterError)],
)
async def test_what_a_server_answers_decides_what_happens(tmp_path, journal, status, error, store):
    class Refusing(HttpServer):
        def respond(self, request):
            return status, b"", {}

    with Refusing() as server:
        record(journal, training(tmp_path))
        logger = sink(server.url)
        await logger.open()
        with pytest.raises(error, match="MLflow at 127.0.0.1"):
            await logger.write(read_envelopes(journal))


async def test_a_run_that_was_deleted_is_created_anew(store, tmp_path, journal):
    record(journal, training(tmp_path, range(2)))
    await deliver(journal, sink(store))
    client(store).delete_run(only_run(store).info.run_id)
    record(journal, training(tmp_path, range(2, 4)))
    await deliver(journal, sink(store))
    assert [step for step, _ in history(store, only_run(store), "train/loss")] == [2, 3]


async def test_a_deleted_experiment_parks_the_adapter(store, tmp_path, journal):
    experiment = client(store).create_experiment("lab")
    client(store).delete_experiment(experiment)
    logger = sink(store)
    await logger.open()
    record(journal, training(tmp_path))
    with pytest.raises(ParkedError, match="'lab' was deleted"):
        await logger.write(read_envelopes(journal))


async def test_a_store_that_takes_too_long_is_retried_and_the_call_goes_on(store, tmp_path, journal):
    record(journal, training(tmp_path))
    logger = sink(store, timeout_seconds=0.2)
    await logger.open()
    blocker = sqlite3.connect(tmp_path / "runs.db", isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    envelopes = read_envelopes(journal)
    with pytest.raises(RetryLaterError, match="has not answered for"):
        await logger.write(envelopes)
    blocker.execute("ROLLBACK")
    blocker.close()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(RetryLaterError):
            await logger.write(envelopes)
            break
    await logger.close()
    assert history(store, only_run(store), "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]


@pytest.mark.parametrize("params", [{"tracking_uri": "http://user:pass@host"}, {"log_every": 0}, {"experiment": ""}])
def test_wrong_params_are_refused(params):
    with pytest.raises(ConfigError):
        MlflowLoggerCallback(**params)


def test_a_uri_with_a_password_in_the_environment_is_recorded_nowhere(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@host")
    assert MlflowLoggerCallback.Config.from_environment() == {"tracking_uri": None}


test_conforms = pytest.mark.filterwarnings("ignore")(
    conformance(
        lambda _: MlflowLoggerCallback("lab", "http://127.0.0.1:1"), delivery=lambda _, store: MlflowSink("lab", store)
    )
)


# -- a real server ----------------------------------------------------------------------------------------------------


class Server:
    """`mlflow server` on a free port, which can be stopped and started again."""

    def __init__(self, folder, database):
        self.folder, self.store = folder, f"sqlite:///{database}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self):
        program = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--backend-store-uri", self.store]
        program += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        program += ["--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                program, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, cwd=self.folder, start_new_session=True
            )
        until = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < until, (self.folder / "server.log").read_text()
                time.sleep(0.1)

    def stop(self):
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)  # its own session: the server and its worker
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path, store):
    one = Server(tmp_path, tmp_path / "runs.db")
    yield one
    one.stop()


@pytest.mark.long
@pytest.mark.timeout(300)
async def test_a_server_that_is_away_gets_everything_once_it_is_back(server, tmp_path, journal):
    ctx, _ = contexts(tmp_path)
    digits = BenchmarkEval(ctx, EvalResult("digits", metrics={"acc": 0.5}), [{"task_id": "t1"}], step=1)
    record(journal, [*training(tmp_path, range(2)), digits])
    await deliver_while_the_server_starts(journal, server)
    run = only_run(server.url)
    assert history(server.url, run, "train/loss") == [(0, 1.0), (1, 0.5)]
    assert client(server.url).list_artifacts(run.info.run_id, "eval/digits/step-1")
    server.stop()
    record(journal, training(tmp_path, range(2, 5)))
    courier = await deliver_while_the_server_starts(journal, server)
    assert counted(courier)[1:] == (0, 0)
    run = only_run(server.url)
    assert [step for step, _ in history(server.url, run, "train/loss")] == [0, 1, 2, 3, 4]
    assert run.info.status == "FINISHED"


async def deliver_while_the_server_starts(journal, server):
    """Deliver to a server that is started once the delivery shows as retrying, with pending events."""
    courier = Courier(journal, "it", sink(server.url), DeliveryPolicy(ranks=None))
    courier.finish()

    async def start():
        while not any(each.state == "retrying" and each.pending for each in read_progress(journal)):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(server.start)

    async with asyncio.timeout(240), asyncio.TaskGroup() as group:
        group.create_task(start())
        group.create_task(courier.run())
    return courier


async def test_content_is_an_artifact_alerts_are_tags_and_a_summary_is_metrics(store, tmp_path, journal):
    ctx, state = contexts(tmp_path)
    ctx.run_dir.mkdir(parents=True)
    page = store_content(ctx.run_dir, "html", "page", "<p>hello</p>")
    events = [RunStart(ctx), TrainStart(state), Content(state, 3, page)]
    events += [Alert(ctx, "loss is NaN", "look", "error"), Summary(ctx, {"best": 0.5})]
    record(journal, events)
    await deliver(journal, sink(store))
    run = only_run(store)
    assert artifact(store, run, f"html/page/step-3/{Path(page.path).name}") == "<p>hello</p>"
    assert run.data.tags["alert.loss is NaN"] == "error: look"
    assert history(store, run, "summary/best") == [(0, 0.5)]
