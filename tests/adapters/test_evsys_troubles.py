"""evsys_logger while EvSys' API is away, busy, refuses or loses replies: nothing is lost, nothing is created twice."""

import asyncio
import json
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from starlette.responses import JSONResponse, RedirectResponse

from evsys_adapters import EvsysLoggerCallback
from evsys_adapters.evsys_api.delivery import EvsysSink
from evsys_bus import (
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    EvalResult,
    EventBus,
    ExperimentEnd,
    ExperimentResult,
    ExperimentStart,
    GroupStart,
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
    build_callbacks,
)
from evsys_bus.context import LoopArtifacts
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.sink_receiver import SinkReceiver
from evsys_bus.delivery.status_files import read_status
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.events import Eval
from evsys_bus.journal import OsDisk, layout
from evsys_bus.tasks import run_in_new_loop
from support import evsys_server as evsys
from support.files import read_json_lines

server = evsys.server
pytestmark = pytest.mark.long


STEPS = 6


def publish_experiment(bus, folder, predictions=3, metrics=lambda step: {"loss": step / 4}):
    """Two runs of one arm, with everything."""
    experiment = LogContext(folder, config={"name": "troubled"})
    bus.publish(ExperimentStart(experiment))
    bus.publish(GroupStart(experiment, "arm"))
    for key in ("arm-s0", "arm-s1"):
        ctx = experiment.for_run(key, {"seed": int(key[-1])}, "arm")
        state = LoopState(0, STEPS, ctx.run_dir, ctx=ctx)
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(STEPS):
            bus.publish(StepEnd(state, step, TrainingBatch(), metrics(step)))
            if step % 3 == 2:
                bus.publish(Checkpoint(state, ManifestRow(f"step_{step + 1}", step, state_path=f"s3://b/{key}/{step}")))
                bus.publish(Eval(state, step, "tasks", {"pass": 0.5}))
                rows = [{"task_id": f"t{n}", "reward": n} for n in range(predictions)]
                bus.publish(BenchmarkEval(ctx, EvalResult("tasks", "b1", {"pass": 0.5}), rows, step=step))
        bus.publish(TrainEnd(state, LoopArtifacts()))
        bus.publish(BenchmarkEval(ctx, EvalResult("final", "b1", {"pass": 1.0}), []))
        bus.publish(RunEnd(ctx, RunResult(), ArmResult("arm")))
    bus.publish(ExperimentEnd(experiment, ExperimentResult("troubled", best_score=1.0)))


def record(folder, **given):
    with EventBus([], journal=folder / "journal") as bus:
        publish_experiment(bus, folder, **given)
    return folder / "journal"


def all_there(server, predictions=3):
    """Everything once; a row of metrics may have been sent again, with the same value."""
    counts = {name: len(rows) for name, rows in server.tables.items()}
    assert counts == {"experiments": 1, "groups": 1, "runs": 2, "evals": 6}
    assert len(server.checkpoints) == 4
    assert sorted((row["eval_id"], row["task_id"]) for row in server.predictions) == sorted(
        (row["id"], f"t{n}") for row in server.tables["evals"].values() if "step" in row for n in range(predictions)
    )
    for run in server.tables["runs"].values():
        points = {(row["split"], row["step"], row["name"]): row["value"] for row in server.get_metrics(run["id"])}
        train = {("train", step, "loss"): step / 4 for step in range(STEPS)}
        assert points == train | {("val", step, "tasks/pass"): 0.5 for step in (2, 5)}
        assert run["status"] == "completed"
    [experiment] = server.tables["experiments"].values()
    assert (experiment["status"], experiment["best_score"]) == ("completed", 1.0)


class Delivery:
    """The delivery half behind its courier; pauses are noted, and take a hundredth of their time."""

    def __init__(self, journal, **params):
        self.pauses = []
        self.sink = EvsysSink(**params)
        self.receiver = SinkReceiver(self.sink, sleep=self.sleep)
        self.courier = Courier(journal, "evsys_logger", self.receiver, DeliveryPolicy(), poll_seconds=0.001)
        self.sink.evsys_attached = self.courier

    async def sleep(self, seconds):
        self.pauses.append(seconds)
        await asyncio.sleep(seconds / 100)

    def run(self):
        self.courier.finish()
        run_in_new_loop(self.courier.run)
        return self.courier.counts


def once_each(answer):
    """The first request of each kind is answered so, and the next of the same kind, that has got through, again."""
    seen = Counter()

    def fault(op, args):
        key = json.dumps([op, args], sort_keys=True)
        seen[key] += 1
        return answer() if seen[key] == 1 else None

    return fault


FAULTS = {
    "500": lambda: evsys.error_response(500),
    "503": lambda: evsys.error_response(503, Retry_After="0"),
    "502 of a proxy": lambda: evsys.html_response(502),
    "408": lambda: evsys.error_response(408),
    "a login page": lambda: evsys.html_response(200),
    "an empty answer": lambda: JSONResponse({}),
    "a list": lambda: JSONResponse([1, 2]),
    "an id that is none": lambda: JSONResponse({"result": {"id": None}}),
    "cut": lambda: "cut",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_fails_once_and_everything_is_there_once(tmp_path, server, fault):
    journal = record(tmp_path)
    server.fault = once_each(FAULTS[fault])
    if fault in {"an empty answer", "a list", "an id that is none"}:  # of what returns no id nobody can tell
        creations = ("create_experiment", "create_group", "create_run", "create_eval")
        inner = server.fault
        server.fault = lambda op, args: inner(op, args) if op in creations else None
    delivery = Delivery(journal)
    counts = delivery.run()
    assert (counts.dead, counts.pending) == (0, 0)
    assert delivery.pauses
    all_there(server)


def test_every_reply_is_lost_once_after_the_server_acted_and_nothing_is_there_twice(tmp_path, server):
    journal = record(tmp_path, predictions=20)
    seen = set()

    def lose(op, args):
        key = json.dumps([op, args], sort_keys=True)
        return op not in evsys.READS and not (key in seen or seen.add(key))

    server.should_drop_reply = lose
    counts = Delivery(journal).run()
    assert (counts.dead, counts.pending) == (0, 0)
    all_there(server, 20)


@pytest.mark.parametrize("fault", ["lost", "cut", "500"])
async def test_what_is_published_while_it_delivers_is_there_once_too(tmp_path, server, fault):
    """Its ids are younger than the courier, so nothing is looked up that no reply was lost of."""
    callback = EvsysLoggerCallback()
    callback.placement = "inline"
    seen = set()

    def first(op, args):
        key = json.dumps([op, args], sort_keys=True)
        return op.startswith(("create_", "add_")) and not (key in seen or seen.add(key))

    async with EventBus([callback], journal=tmp_path / "journal", drain_timeout=60) as bus:
        bus.publish(StepEnd(LoopState(0, 1, tmp_path / "other" / "run"), 0, TrainingBatch(), {"loss": 1.0}))
        while not server.metrics:
            await asyncio.sleep(0.001)
        server.reset()
        if fault == "lost":
            server.should_drop_reply = first
        else:
            server.fault = lambda op, args: FAULTS[fault]() if first(op, args) else None
        await asyncio.sleep(0.005)  # an id holds milliseconds
        publish_experiment(bus, tmp_path / "mine", predictions=2)
    assert bus.receipt.deliveries[0].complete, bus.receipt
    all_there(server, 2)


def test_a_server_that_hangs_costs_a_timeout_and_nothing_else(tmp_path, server):
    journal = record(tmp_path)
    server.fault = once_each(lambda: "hang")
    counts = Delivery(journal, timeout_seconds=0.15).run()
    assert (counts.dead, counts.pending) == (0, 0)
    all_there(server)


async def test_while_a_server_hangs_the_loop_that_delivers_to_it_goes_on(tmp_path, server):
    callbacks = build_callbacks([{"kind": "evsys_logger", "placement": "inline", "params": {"timeout_seconds": 0.4}}])
    server.fault = lambda op, args: "hang"
    took, late = [], []
    async with EventBus(callbacks, journal=tmp_path / "journal", drain_timeout=15) as bus:
        state = LoopState(0, 300, tmp_path / "run")
        for step in range(300):
            began = time.perf_counter()
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
            took.append(time.perf_counter() - began)
            began = time.perf_counter()
            await asyncio.sleep(0.003)
            late.append(time.perf_counter() - began - 0.003)
        assert not server.metrics
        server.fault = None
    assert bus.receipt.deliveries[0].complete, bus.receipt
    assert len(server.metrics) == 300
    for each in (took, late):
        assert sorted(each)[len(each) // 2] < 0.005
        assert max(each) < 0.5


@pytest.mark.parametrize("placement", ["follow", "inline"])
async def test_a_server_that_is_killed_and_comes_back_gets_everything_and_the_loop_never_waits(
    tmp_path, server, placement
):
    callbacks = build_callbacks([{"kind": "evsys_logger", "placement": placement, "params": {"timeout_seconds": 1}}])
    took = []
    async with EventBus(callbacks, journal=tmp_path / "journal", drain_timeout=15) as bus:

        class Timed:
            @staticmethod
            def publish(event):
                began = time.perf_counter()
                bus.publish(event)
                took.append(time.perf_counter() - began)

        publish_experiment(Timed, tmp_path)
        until = time.monotonic() + 10
        while not server.tables["runs"] and time.monotonic() < until:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(server.stop)
        await asyncio.sleep(0.7)
        server.start()
    assert bus.receipt.deliveries[0].complete, bus.receipt
    all_there(server)
    assert sorted(took)[len(took) // 2] < 0.005
    assert max(took) < 0.25


def test_retry_after_is_heeded_by_every_request(tmp_path, server):
    journal = record(tmp_path)
    asked = []

    def busy(op, args):
        asked.append(time.monotonic())
        return evsys.error_response(429, Retry_After="1") if len(asked) == 5 else None

    server.fault = busy
    delivery = Delivery(journal, in_flight=1)
    counts = delivery.run()
    assert (counts.dead, counts.pending) == (0, 0)
    assert delivery.pauses[0] >= 0.9
    assert asked[5] - asked[4] >= 1
    all_there(server)


def test_a_date_as_retry_after_is_understood(tmp_path, server):
    from email.utils import formatdate

    once = once_each(lambda: evsys.error_response(503, Retry_After=formatdate(time.time() + 2, usegmt=True)))
    server.fault = lambda op, args: once(op, args) if op == "create_experiment" else None
    delivery = Delivery(record(tmp_path))
    delivery.run()
    assert max(delivery.pauses) > 0.5
    all_there(server)


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_parks_it_with_the_fix_and_it_goes_on_when_it_is_taken(tmp_path, server, status, caplog):
    journal = record(tmp_path)
    asked = Counter()

    def refuse(op, args):
        asked[op] += 1
        return evsys.error_response(status) if op == "create_run" and asked[op] <= 3 else None

    server.fault = refuse
    delivery = Delivery(journal)
    assert delivery.run().pending == 0
    assert delivery.pauses == [60.0] * 3
    assert "sink.parked" in caplog.text
    all_there(server)


def test_a_key_that_becomes_another_is_used_from_then_on(tmp_path, server, monkeypatch):
    journal = record(tmp_path)
    server.keys = {"the-new-one"}
    delivery = Delivery(journal)
    sleep = delivery.sleep

    async def sleep_and_change(seconds):
        monkeypatch.setenv("EVSYS_API_KEY", "the-new-one")
        await sleep(seconds)

    delivery.receiver = SinkReceiver(delivery.sink, sleep=sleep_and_change)
    delivery.courier = Courier(journal, "evsys_logger", delivery.receiver, DeliveryPolicy())
    assert delivery.run().pending == 0
    assert delivery.pauses == [60.0]
    all_there(server)


# -- what the server will not have ------------------------------------------------------------------------------------


def letters(journal):
    [file] = (journal / "couriers").glob("evsys_logger*dead*")
    return read_json_lines(file)


def test_a_row_that_is_too_large_goes_in_parts(tmp_path, server):
    server.max_bytes = 2_000
    wide = {f"layer.{n}.grad_norm": float(n) for n in range(300)}
    with EventBus([], journal=tmp_path / "journal") as bus:
        state = LoopState(0, STEPS, tmp_path / "run")
        bus.publish(StepEnd(state, 4, TrainingBatch(), wide))
    assert Delivery(tmp_path / "journal").run().dead == 0
    [run] = server.tables["runs"]
    assert {row["name"]: row["value"] for row in server.get_metrics(run)} == wide


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prediction_that_is_refused_is_a_dead_letter_of_its_event_and_the_others_are_there(tmp_path, server, status):
    journal = record(tmp_path, predictions=4)

    def refuse(op, args):
        return evsys.error_response(status) if op == "add_prediction" and args["task_id"] == "t2" else None

    server.fault = refuse
    assert Delivery(journal).run().dead == 4
    assert Counter(row["task_id"] for row in server.predictions) == {"t0": 4, "t1": 4, "t3": 4}
    assert all(
        f"1 of 4 predictions, the first 2: add_prediction: {server.url}" in str(each) for each in letters(journal)
    )
    assert len(server.tables["evals"]) == 6


@pytest.mark.parametrize("status", [400, 422])
def test_one_event_that_is_refused_is_a_dead_letter_with_the_reason_and_no_other_suffers(tmp_path, server, status):
    journal = record(tmp_path)

    def refuse(op, args):
        wrong = op == "log_metrics" and args["step"] in {1, 4} and args["split"] == "train"
        return evsys.error_response(status) if wrong else None

    server.fault = refuse
    counts = Delivery(journal).run()
    assert (counts.dead, counts.pending) == (4, 0)
    assert all(f"answers {status}" in str(each) and "not today" in str(each) for each in letters(journal))
    for run in server.tables["runs"]:
        found = [row["step"] for row in server.get_metrics(run, split="train")]
        assert sorted(found) == [0, 2, 3, 5]


def test_while_one_event_is_refused_and_the_server_goes_away_both_come_out_right(tmp_path, server):
    journal = record(tmp_path)
    once = once_each(lambda: evsys.error_response(500))
    server.fault = lambda op, args: evsys.error_response(400) if args.get("step") == 1 else once(op, args)
    counts = Delivery(journal).run()
    assert (counts.dead, counts.pending) == (2, 0)
    server.fault = None
    for run in server.tables["runs"].values():
        server.log_metrics(run["id"], 1, {"loss": 0.25}, "train")
    all_there(server)


def test_an_experiment_that_is_refused_leaves_its_runs_without_one(tmp_path, server):
    journal = record(tmp_path)
    server.fault = lambda op, args: evsys.error_response(400) if op == "create_experiment" else None
    counts = Delivery(journal).run()
    assert counts.dead == 3  # its start, its group and its end
    assert [row.get("experiment_id") for row in server.tables["runs"].values()] == [None, None]
    assert len(server.metrics) == 2 * (STEPS + 2)


def test_a_run_that_is_refused_takes_its_own_events_with_it_and_no_other_runs(tmp_path, server):
    journal = record(tmp_path)
    server.fault = lambda op, args: evsys.error_response(422) if op == "create_run" and args["seed"] == 0 else None
    counts = Delivery(journal).run()
    assert counts.pending == 0
    assert counts.dead == len(letters(journal)) == 1 + STEPS + 2 * 3 + 1 + 1
    assert all("create_run" in each["why"] and "answers 422" in each["why"] for each in letters(journal))
    [run] = server.tables["runs"].values()
    assert (run["seed"], run["status"], len(server.get_metrics(run["id"]))) == (1, "completed", STEPS + 2)


def test_a_server_without_lists_gets_everything_all_the_same(tmp_path, server, caplog):
    journal = record(tmp_path)
    server.fault = lambda op, args: evsys.error_response(400) if op.startswith(("list_", "get_")) else None
    assert Delivery(journal).run().dead == 0
    all_there(server)
    assert "evsys.cannot_look_up" in caplog.text


def test_lists_that_say_little_are_completed_one_by_one(tmp_path, server):
    journal = record(tmp_path)
    Delivery(journal).run()
    Path(layout.cursor_path(str(journal), "evsys_logger")).unlink()
    real = server.execute

    def short(op, args):
        rows = real(op, args)
        hidden = {"list_experiments": "tags", "list_runs": "run_config"}.get(op)
        return rows if hidden is None else [{k: v for k, v in row.items() if k != hidden} for row in rows]

    server.execute = short
    Delivery(journal).run()
    all_there(server)


# -- redirects and wrong addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_on_the_same_host_is_followed_as_the_post_that_it_was(tmp_path, server, status):
    journal = record(tmp_path)
    server.redirect = status
    assert Delivery(journal, url=f"{server.url}/moved").run().pending == 0
    all_there(server)


def test_a_redirect_to_another_host_is_not_given_the_key(tmp_path, server, monkeypatch):
    journal = record(tmp_path)
    with evsys.EvsysServer() as other:
        path = f"{server.url}{evsys.PATH}"
        server.fault = lambda op, args: RedirectResponse(f"{other.url}{evsys.PATH}", 307)
        delivery = Delivery(journal)
        real = delivery.sleep

        states = []

        async def sleep(seconds):
            states.append(read_status(OsDisk(), str(journal), "evsys_logger"))
            server.fault = None
            await real(seconds)

        delivery.receiver = SinkReceiver(delivery.sink, sleep=sleep)
        delivery.courier = Courier(journal, "evsys_logger", delivery.receiver, DeliveryPolicy())
        delivery.run()
        assert other.request_count == 0
    assert states[0].state == "parked"
    assert f"to {other.url}" in states[0].fix
    assert path in states[0].error
    all_there(server)


def test_an_address_without_the_api_is_parked_with_the_fix(tmp_path, server, caplog):
    journal = record(tmp_path)
    delivery = Delivery(journal, url=f"{server.url}/elsewhere")

    async def sleep(seconds):
        delivery.pauses.append(seconds)
        delivery.courier.stop()
        await asyncio.sleep(5)

    delivery.receiver = SinkReceiver(delivery.sink, sleep=sleep)
    delivery.courier = Courier(journal, "evsys_logger", delivery.receiver, DeliveryPolicy())
    assert delivery.run().pending
    assert delivery.pauses == [60.0]
    assert "answers 404" in caplog.text


@pytest.mark.parametrize("url", ["http://user:pw@127.0.0.1:8000", "localhost:8000", "ftp://x", "http://"])
def test_an_environment_that_names_no_server_is_parked_with_the_fix(tmp_path, server, monkeypatch, url):
    monkeypatch.setenv("EVSYS_API_URL", url)
    callback = EvsysLoggerCallback()
    callback.placement = "inline"
    with EventBus([callback], journal=tmp_path / "journal", drain_timeout=1) as bus:
        bus.publish(StepEnd(LoopState(0, 3, tmp_path / "run"), 0, TrainingBatch(), {"loss": 1.0}))
    [delivery] = bus.receipt.deliveries
    assert delivery.pending == 1
    assert "set it to http" in delivery.fix
    assert "pw" not in f"{delivery.error} {delivery.fix}".replace("password", "")


def test_nobody_at_the_address_is_tried_again(tmp_path, server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setenv("EVSYS_API_URL", f"http://127.0.0.1:{port}")
    journal = record(tmp_path)
    delivery = Delivery(journal)
    late = evsys.EvsysServer(port)
    real = delivery.sleep

    async def sleep(seconds):
        if len(delivery.pauses) == 2:
            late.start()
        await real(seconds)

    delivery.receiver = SinkReceiver(delivery.sink, sleep=sleep)
    delivery.courier = Courier(journal, "evsys_logger", delivery.receiver, DeliveryPolicy())
    try:
        assert delivery.run().pending == 0
        all_there(late)
    finally:
        late.stop()


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_delivery_that_is_cut_off_after_every_request_and_begun_anew_makes_nothing_twice(tmp_path, server):
    """As kills at the worst moments: the server has acted, and no cursor says so."""
    journal = record(tmp_path)
    lives = 0
    while lives < 200:
        lives += 1
        delivery, number = Delivery(journal, in_flight=1), 0

        def lose(op, args, delivery=delivery):
            nonlocal number
            number += op not in evsys.READS
            if number == 2:
                delivery.courier.stop()
                return True
            return False

        server.should_drop_reply = lose
        counts = delivery.run()
        if not counts.pending:
            break
    assert 8 < lives < 200
    all_there(server)
