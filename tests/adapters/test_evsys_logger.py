"""evsys_logger: what reaches EvSys' API, compared with the journal; ids; what an embedder leaves out."""

import itertools
import json
import math
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest

from evsys_adapters import EvsysLoggerCallback
from evsys_adapters.evsys_api.creation import ServerObjectCreator
from evsys_adapters.evsys_api.delivery import EvsysRun, EvsysSink
from evsys_adapters.evsys_api.gateway import EvsysLoggerConfig, Gateway
from evsys_bus import (
    ArmResult,
    BenchmarkEval,
    Checkpoint,
    Envelope,
    EvalResult,
    EventBus,
    Experiment,
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
    dispatch,
)
from evsys_bus.context import LoopArtifacts
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import ConfigError
from evsys_bus.events import Eval, Summary
from evsys_bus.journal import layout
from evsys_bus.testing import conformance
from evsys_bus.training.plan import RunComponents
from support import evsys_server as evsys
from support.journals import read_envelopes
from support.programs import EVSYS_BUS
from support.training_parts import IndexBatches

server = evsys.server


def writes(server):
    return [(op, args) for op, args in server.operations if op not in evsys.READS]


def sync(journal):
    """As a person would, who waits where couriers of the program that has just ended are still at it."""
    command = [EVSYS_BUS, "sync", str(journal)]
    until = time.monotonic() + 15
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "EB905" not in done.stderr or time.monotonic() > until:
            break
        time.sleep(0.1)
    assert done.returncode == 0, done.stdout + done.stderr


# -- a whole experiment -----------------------------------------------------------------------------------------------


class Model:
    def __init__(self, params, seed, folder):
        self.value, self.rate, self.folder = float(seed), params["lr"], folder

    async def forward_backward(self, batch):
        return {"loss": self.value, "tokens": 128}

    async def optim_step(self):
        self.value += self.rate

    async def save_state(self, name):
        return f"file://{self.folder}/{name}.state"

    async def save_weights_for_sampler(self, name):
        return f"tinker://weights/{name}"

    async def load_state(self, path): ...


class Val:
    name, every = "val", 2

    async def evaluate(self, state):
        return {"accuracy": state.step / 8}


class Tasks:
    """In-loop and final."""

    name, every = "tasks", 3

    async def evaluate(self, state):
        return self.scored(0.25)

    async def score(self, backend):
        return self.scored(0.75)

    def scored(self, reward):
        rows = [
            {
                "task_id": f"t{n}",
                "instruction": f"Add {n}.",
                "expected": n + 1,
                "output": str(n),
                "reward": reward + n,
                "metadata": {"latency_s": 0.5, "completion_token_ids": [1, 2, n]},
                "prompt_tokens": 7,
            }
            for n in range(12)
        ]
        return EvalResult("tasks", "bench-1", {"pass@1": reward}, {"by_level": {"easy": reward}}, tags=["val"]), rows


CONFIG = {
    "name": "rates",
    "recipe": "",
    "run": {"algorithm": {"kind": "sft"}},
    "runs": {"low": {"lr": 0.1}, "mid": {"lr": 0.5}, "high": {"lr": 2.0}},
    "n_repeats": 2,
    "max_concurrent_runs": 1,
    "success_metric": {"name": "tasks/pass@1", "mode": "max"},
    "metadata": {"hypothesis": "A higher rate.", "tags": ["a", "b"]},
}


def recipe(params, run):
    return RunComponents(
        backend=Model(params, run.seed, run.run_dir),
        step_builder=IndexBatches(),
        num_steps=6,
        evaluators=[Val(), Tasks()],
        benchmarks=[Tasks()],
        save_every=4,
    )


def expected(envelopes):  # noqa: C901 # a table
    """The operations of EvSys' own client for these events, by its table; ids as ours."""
    found, held = [], []

    def flush():
        found.extend(held)
        held.clear()

    for each in envelopes:
        event, run = each.event, each.run
        match event:
            case ExperimentStart():
                tags = ["a", "b", f"evsys-bus:{event.ctx.ids['experiment_id']}"]
                args = {"experiment_name": "rates", "project_id": "p-1", "hypothesis": "A higher rate.", "tags": tags}
                found.append(("create_experiment", args))
            case GroupStart():
                found.append(("create_group", {"experiment_id": "EXPERIMENT", "name": event.group_name}))
            case RunStart():
                config = {**event.ctx.run_config, "name": run, "evsys_bus_run_id": event.ctx.ids["run_id"]}
                args = {
                    "experiment_id": "EXPERIMENT",
                    "group_id": event.ctx.group_name,
                    "recipe_kind": "sft",
                    "run_config": config,
                    "seed": event.ctx.run_config["seed"],
                    "status": "running",
                }
                found.append(("create_run", args))
            case StepEnd():
                row = {"run_id": run, "step": event.step_idx, "metrics": event.metrics, "split": "train"}
                held.append(("log_metrics", row))
                flush()
            case Eval():
                named = {f"{event.eval_name}/{key}": value for key, value in event.metrics.items()}
                held.append(("log_metrics", {"run_id": run, "step": event.step_idx, "metrics": named, "split": "val"}))
            case Checkpoint():
                row = event.row
                args = {"run_id": run, "uri": row.sampler_path, "label": row.name, "step": row.batch, "is_final": False}
                found.append(("add_checkpoint", args))
            case BenchmarkEval():
                result, step = event.eval_result, {} if event.step is None else {"step": event.step}
                args = {"benchmark_id": "bench-1", "metrics": result.metrics, "breakdowns": result.breakdowns}
                found.append(("create_eval", {"run_id": run, **args, **step}))
                for index, row in enumerate(event.predictions):
                    args = {
                        "run_id": run,
                        "kind": "eval",
                        "eval_id": f"{run} {event.step}",
                        "task_id": row["task_id"],
                        "instruction": row["instruction"],
                        "model_output": row["output"],
                        "expected": row["expected"],
                        "reward": row["reward"],
                        "sample_idx": 0,
                        "metadata": {**row["metadata"], "prompt_tokens": 7, "evsys_bus_index": index},
                        **step,
                    }
                    found.append(("add_prediction", args))
            case RunEnd():
                flush()
                found.append(("update_run", {"run_id": run, "patch": {"status": event.run_result.status}}))
            case ExperimentEnd():
                result = event.result
                patch = {"status": result.status, "conclusion": result.conclusion, "best_score": result.best_score}
                found.append(("update_experiment", {"experiment_id": "EXPERIMENT", "patch": patch}))
    return found


def with_our_names(server):
    """What the server was sent, its ids replaced by names that the journal has."""
    names = {row["id"]: "EXPERIMENT" for row in server.tables["experiments"].values()}
    names |= {row["id"]: row["name"] for row in server.tables["groups"].values()}
    names |= {row["id"]: row["run_config"]["name"] for row in server.tables["runs"].values()}
    names |= {row["id"]: f"{names[row['run_id']]} {row.get('step')}" for row in server.tables["evals"].values()}
    ids = ("experiment_id", "group_id", "run_id", "eval_id")
    return [
        (op, {key: names[value] if key in ids else value for key, value in args.items()}) for op, args in writes(server)
    ]


def in_order(operations):
    """Rows that stand side by side and may be on their way together, by step."""
    found = []
    for op, group in itertools.groupby(operations, key=lambda each: each[0]):
        rows = list(group)
        if op == "add_prediction":
            rows.sort(key=lambda each: each[1]["metadata"]["evsys_bus_index"])
        found += rows
    return found


@pytest.mark.parametrize(("placement", "in_flight"), [("follow", 1), ("follow", 8), ("inline", 8)])
@pytest.mark.timeout(60)
async def test_an_experiment_arrives_whole_in_the_order_and_with_the_fields_of_evsys_own_client(
    tmp_path, server, placement, in_flight
):
    params = {"project_id": "p-1", "in_flight": in_flight}
    callbacks = build_callbacks([{"kind": "evsys_logger", "placement": placement, "params": params}])
    experiment = Experiment(CONFIG, recipe=recipe, callbacks=callbacks, output_dir=tmp_path / "rates")
    result = await experiment.run()
    assert (result.status, len(result.arms)) == ("completed", 6)
    [delivery] = experiment.receipt.deliveries
    assert (delivery.complete, delivery.dead) == (True, 0), delivery
    envelopes = read_envelopes(tmp_path / "rates" / "journal")
    assert delivery.delivered == len(envelopes)
    sent, wanted = with_our_names(server), expected(envelopes)
    if in_flight == 1:
        # Batches end between an eval and the next step at times; its row then goes at once.
        assert [each for each in sent if each[1].get("split") != "val"] == [
            each for each in wanted if each[1].get("split") != "val"
        ]
    key = lambda each: json.dumps(each, sort_keys=True)  # noqa: E731
    assert sorted(sent, key=key) == sorted(wanted, key=key)
    others = [each for each in in_order(sent) if each[0] != "log_metrics"]
    assert others == [each for each in wanted if each[0] != "log_metrics"]
    assert len(server.connections) <= in_flight + 1
    if placement == "inline":
        tasks = experiment.receipt.tasks_by_owner["evsys_logger"]
        assert (tasks.spawned, tasks.completed) == (1, 1)
    # What later callbacks and the result read.
    ids = {each.event.ctx.ids["run_id"] for each in envelopes if isinstance(each.event, RunStart)}
    assert len(ids) == 6
    assert all(uuid.UUID(each).version == 7 for each in ids)
    assert result.experiment_id == experiment.ctx.ids["experiment_id"]
    assert {"group:low", "group:mid", "group:high"} < experiment.ctx.ids.keys()


# -- ids --------------------------------------------------------------------------------------------------------------


def contexts(folder):
    experiment = LogContext(folder, config={"name": "x"})
    return experiment, experiment.for_run("run", {"seed": 3}, "arm")


def test_ids_are_there_on_the_spot_and_later_hooks_parent_what_they_make_by_them(tmp_path, server):
    logger = EvsysLoggerCallback()
    experiment, run = contexts(tmp_path)
    dispatch([logger], "on_experiment_start", experiment)
    dispatch([logger], "on_group_start", experiment, "arm")
    run = experiment.for_run("run", {}, "arm")
    dispatch([logger], "on_run_start", run)
    assert run.ids.keys() == {"experiment_id", "group:arm", "run_id"}
    assert run.ids["experiment_id"] == experiment.ids["experiment_id"]
    assert "run_id" not in experiment.ids
    assert not server.request_count


def test_a_resumed_run_has_the_ids_that_it_had_and_another_run_has_others(tmp_path, server):
    def ids(folder, key="run"):
        ctx = LogContext(folder, run_key=key, group_name="arm")
        EvsysLoggerCallback().on_run_start(ctx)
        return ctx.ids

    first, other = ids(tmp_path / "a"), ids(tmp_path / "a", "other")
    assert ids(tmp_path / "a") == first
    assert {key for key in first if first[key] != other[key]} == {"run_id"}
    assert not set(ids(tmp_path / "b").values()) & set(first.values())


def test_one_context_for_several_runs_gets_a_new_run_id_and_an_id_of_the_program_stays(tmp_path, server):
    logger, ctx = EvsysLoggerCallback(), LogContext(tmp_path, ids={"experiment_id": "mine"})
    seen = []
    for key in ("one", "two", "one"):
        ctx.run_key = key
        logger.on_run_start(ctx)
        seen.append(ctx.ids["run_id"])
    assert (seen[0] == seen[2], seen[0] != seen[1], ctx.ids["experiment_id"]) == (True, True, "mine")


@pytest.mark.parametrize("content", [b"", b"019", b"\xff\xfe no id \x00"])
def test_an_id_whose_file_was_cut_short_is_made_anew_and_kept(tmp_path, server, content):
    file = tmp_path / "run" / ".evsys_ids" / "run"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    found = []
    for _ in range(2):
        ctx = LogContext(tmp_path, run_key="run")
        EvsysLoggerCallback().on_run_start(ctx)
        found.append(ctx.ids["run_id"])
    assert found[0] == found[1] == file.read_text().strip()


def test_where_the_folder_cannot_be_written_ids_are_good_for_this_process(tmp_path, server, caplog):
    (tmp_path / "file").write_text("in the way")
    logger = EvsysLoggerCallback()
    seen = []
    for _ in range(2):
        ctx = LogContext(tmp_path / "file", run_key="run")
        logger.on_run_start(ctx)
        seen.append(ctx.ids["run_id"])
    assert seen[0] == seen[1]
    assert "evsys.id_not_kept" in caplog.text


def test_two_processes_that_begin_at_once_agree_on_the_id_of_their_experiment(tmp_path):
    program = (
        "import sys; from evsys_adapters import EvsysLoggerCallback; from evsys_bus import LogContext; input()\n"
        "ctx = LogContext(sys.argv[1]); EvsysLoggerCallback().on_experiment_start(ctx); print(ctx.ids)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = set()
    for each in both:
        each.stdin.write("\n")
        each.stdin.flush()
    for each in both:
        said.add(each.communicate()[0])
    assert len(said) == 1


# -- what an embedder leaves out --------------------------------------------------------------------------------------


def train(bus, state, steps=3):
    bus.publish(TrainStart(state))
    for step in range(steps):
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": step / 2}))
    bus.publish(TrainEnd(state, LoopArtifacts()))


@pytest.mark.parametrize("place", ["process", "thread", "loop"])
def test_train_events_alone_make_the_experiment_the_group_and_the_run(tmp_path, server, place):
    [logger] = build_callbacks([{"kind": "evsys_logger", "placement": "inline" if place == "loop" else "follow"}])
    couriers = "thread" if place == "thread" else "process"
    ctx = LogContext(
        tmp_path / "sweep",
        config={"name": "sweep"},
        run_key="arm-s1",
        run_config={"seed": 1, "lr": 0.5},
        group_name="arm",
    )
    state = LoopState(0, 3, tmp_path / "sweep" / "arm-s1", ctx=ctx)
    with EventBus([logger], journal=tmp_path / "journal", couriers=couriers) as bus:
        train(bus, state)
        assert bus.health().couriers == {"evsys_logger": place}
    assert bus.receipt.deliveries[0].complete, bus.receipt
    [experiment], [group], [run] = (list(server.tables[name].values()) for name in ("experiments", "groups", "runs"))
    assert (experiment["experiment_name"], experiment["tags"]) == ("sweep", [f"evsys-bus:{ctx.ids['experiment_id']}"])
    assert (group["name"], group["experiment_id"]) == ("arm", experiment["id"])
    assert run["run_config"] == {"seed": 1, "lr": 0.5, "name": "arm-s1", "evsys_bus_run_id": ctx.ids["run_id"]}
    assert (run["group_id"], run["status"]) == (group["id"], "completed")
    assert server.get_metrics(run["id"]) == [
        {"step": step, "name": "loss", "value": step / 2, "split": "train"} for step in range(3)
    ]
    assert [type(each.event) for each in read_envelopes(tmp_path / "journal")][:3] == [TrainStart, EvsysRun, StepEnd]


def test_a_bare_state_and_steps_without_any_start_are_a_run_too(tmp_path, server):
    state = LoopState(0, 3, tmp_path / "loose" / "run-7")
    other = LoopState(0, 3, tmp_path / "loose" / "run-8")
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
        train(bus, state)
        bus.publish(StepEnd(other, 5, TrainingBatch(), {"loss": 1.0}))
    [experiment] = server.tables["experiments"].values()
    assert experiment["experiment_name"] == "loose"
    runs = {row["run_config"]["name"]: row for row in server.tables["runs"].values()}
    assert {name: row["status"] for name, row in runs.items()} == {"run-7": "completed", "run-8": "running"}
    assert {row["experiment_id"] for row in runs.values()} == {experiment["id"]}
    assert [row["step"] for row in server.get_metrics(runs["run-8"]["id"])] == [5]


def test_late_rows_and_rows_of_a_step_that_was_run_before_keep_their_step_and_the_last_one_counts(tmp_path, server):
    _, ctx = contexts(tmp_path)
    state = LoopState(0, 9, tmp_path / "run", ctx=ctx)
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(ctx))
        for step, loss in ((0, 0.0), (3, 3.0), (1, 1.0), (3, 3.5), (2, 2.0), (3, 4.0)):
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": loss}))
    found = {row["step"]: row["value"] for row in server.get_metrics("r3")}
    assert found == {0: 0.0, 1: 1.0, 2: 2.0, 3: 4.0}


def test_stages_of_a_continual_run_are_groups_and_benchmarks_without_a_step_come_after_training(tmp_path, server):
    experiment = LogContext(tmp_path, config={"name": "continual"})
    with EventBus([EvsysLoggerCallback(flush_every=4)], journal=tmp_path / "journal") as bus:
        bus.publish(ExperimentStart(experiment))
        for stage in ("base_stage0", "base_stage1"):
            bus.publish(GroupStart(experiment, stage))
            for seed in (1, 2):
                ctx = experiment.for_run(f"{stage}__s{seed}", {"seed": seed}, stage)
                bus.publish(RunStart(ctx))
                train(bus, LoopState(0, 3, ctx.run_dir, ctx=ctx))
                bus.publish(BenchmarkEval(ctx, EvalResult("b", None, {"pass": 0.5}), []))
                bus.publish(RunEnd(ctx, RunResult(status="failed", error="OSError: gone"), ArmResult("base")))
        bus.publish(ExperimentEnd(experiment, ExperimentResult("continual", best_score=math.nan)))
    assert bus.receipt.deliveries[0].complete
    assert [row["name"] for row in server.tables["groups"].values()] == ["base_stage0", "base_stage1"]
    names = {row["id"]: row["name"] for row in server.tables["groups"].values()}
    assert [names[row["group_id"]] for row in server.tables["runs"].values()] == ["base_stage0"] * 2 + [
        "base_stage1"
    ] * 2
    assert len(server.metrics) == 12
    assert all(args.keys() == {"run_id", "metrics"} for op, args in writes(server) if op == "create_eval")
    patches = [args["patch"] for op, args in writes(server) if op == "update_run"]
    assert patches == [{"status": "failed", "error_message": "OSError: gone"}] * 4
    assert writes(server)[-1][1]["patch"] == {"status": "completed", "conclusion": None}


def test_a_summary_is_sent_at_the_end_of_the_run(tmp_path, server):
    _, ctx = contexts(tmp_path)
    with EventBus(build_callbacks([{"kind": "evsys_logger"}]), journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(Summary(ctx, {"best": 0.5, "api_key": "secret-5"}))
        bus.publish(Summary(ctx, {"best": 0.25, "worst": math.nan}))
        bus.publish(RunEnd(ctx, RunResult(), ArmResult("arm")))
    assert bus.receipt.deliveries[0].complete
    [run] = server.tables["runs"].values()
    assert run["summary"]["best"] == 0.25
    assert run["summary"]["evsys_bus_left_out"] == {"summary/worst": 1}
    assert "secret-5" not in str(server.tables)


def test_what_json_cannot_hold_is_left_out_and_said_and_its_row_is_there(tmp_path, server, caplog):
    _, ctx = contexts(tmp_path)
    ctx.run_config = {"lr": math.inf, "betas": [0.9, math.nan], "seed": 3}
    state = LoopState(0, 9, tmp_path / "run", ctx=ctx)
    nan, inf = math.nan, -math.inf
    [logger] = build_callbacks([{"kind": "evsys_logger", "placement": "inline"}])
    with EventBus([logger], journal=tmp_path / "journal") as bus:
        bus.publish(RunStart(ctx))
        rows = ({"loss": nan, "n": 1}, {"loss": inf, "n": 2, "word": "x"}, {"loss": nan}, {"opt": {"m": 1, "v": nan}})
        for step, row in enumerate(rows):
            bus.publish(StepEnd(state, step, TrainingBatch(), row))
        result = EvalResult("b", None, {"pass": nan, "other": 1.0})
        bus.publish(BenchmarkEval(ctx, result, [{"task_id": "t", "reward": nan, "logprobs": [inf, 1.0]}]))
        bus.publish(RunEnd(ctx, RunResult(), ArmResult("arm")))
    assert bus.receipt.deliveries[0].dead == 0
    assert {(row["step"], row["name"], row["value"]) for row in server.metrics} == {
        (0, "n", 1.0),
        (1, "n", 2.0),
        (3, "opt/m", 1.0),
    }
    [run] = server.tables["runs"].values()
    assert run["run_config"]["betas"] == [0.9, None]
    assert run["run_config"]["evsys_bus_left_out"] == ["lr", "betas[1]"]
    assert run["summary"] == {"evsys_bus_left_out": {"loss": 3, "word": 1, "opt/v": 1, "b/pass": 1}}
    [scored] = server.tables["evals"].values()
    assert (scored["metrics"], scored["breakdowns"]) == ({"other": 1.0}, {"evsys_bus_left_out": ["pass"]})
    [prediction] = server.predictions
    assert prediction["metadata"]["logprobs"] == [None, 1.0]
    assert prediction["metadata"]["evsys_bus_left_out"] == ["reward", "logprobs[0]"]
    assert "evsys.values_left_out" in caplog.text


# -- a second life ----------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_run_and_what_is_scored_again_is_there_once(tmp_path, server):
    def life(first, last, status):
        experiment, _ = contexts(tmp_path)
        with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
            bus.publish(ExperimentStart(experiment))
            bus.publish(GroupStart(experiment, "arm"))
            ctx = experiment.for_run("run", {"seed": 3}, "arm")
            bus.publish(RunStart(ctx))
            state = LoopState(first, 9, tmp_path / "run", ctx=ctx)
            bus.publish(TrainStart(state))
            for step in range(first, last):
                bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))
                result = EvalResult("b", None, {"pass": step / 10 + first})
                bus.publish(BenchmarkEval(ctx, result, [{"task_id": "t"}], step=step))
                bus.publish(Checkpoint(state, ManifestRow(f"step-{step}", step, state_path=f"s3://b/{step}")))
            bus.publish(TrainEnd(state, LoopArtifacts()))
            bus.publish(BenchmarkEval(ctx, EvalResult("final", None, {"pass": 1.0}), []))
            bus.publish(RunEnd(ctx, RunResult(status=status), ArmResult("arm")))
            bus.publish(ExperimentEnd(experiment, ExperimentResult("x", status=status)))
        assert bus.receipt.deliveries[0].complete, bus.receipt

    life(0, 4, "cancelled")
    life(2, 6, "completed")
    assert [len(server.tables[name]) for name in ("experiments", "groups", "runs")] == [1, 1, 1]
    evals = [(row.get("step"), row["metrics"]["pass"]) for row in server.tables["evals"].values()]
    assert evals == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3), (None, 1.0), (4, 2.4), (5, 2.5), (None, 1.0)]
    assert len(server.predictions) == len(server.checkpoints) == 6
    statuses = [args["patch"]["status"] for op, args in writes(server) if op == "update_run"]
    assert statuses == ["cancelled", "running", "completed"]
    statuses = [args["patch"]["status"] for op, args in writes(server) if op == "update_experiment"]
    assert statuses == ["cancelled", "running", "completed"]


def test_with_another_journal_or_a_lost_cursor_what_is_there_is_found_and_nothing_is_created_again(tmp_path, server):
    def whole(bus, ctx):
        state = LoopState(0, 9, ctx.run_dir, ctx=ctx)
        bus.publish(RunStart(ctx))
        train(bus, state)
        bus.publish(Checkpoint(state, ManifestRow("final", 2, state_path="s3://b/final")))
        for name in ("one", "two"):  # alike in all that the API has of them
            bus.publish(BenchmarkEval(ctx, EvalResult(name, None, {"pass": 1.0}), [{"task_id": "t"}] * 3, step=2))

    for attempt in range(3):
        _, ctx = contexts(tmp_path)
        with EventBus([EvsysLoggerCallback()], journal=tmp_path / f"journal-{attempt // 2}") as bus:
            if attempt != 1:
                whole(bus, ctx)
        Path(layout.cursor_path(str(tmp_path / "journal-0"), "evsys_logger")).unlink(missing_ok=attempt == 2)
    counts = {name: len(rows) for name, rows in server.tables.items()}
    assert counts == {"experiments": 1, "groups": 1, "runs": 1, "evals": 2}
    assert (len(server.predictions), len(server.checkpoints)) == (6, 1)


def test_of_two_evals_that_look_alike_one_that_is_there_is_not_taken_for_the_other(tmp_path, server):
    for names in (["one"], ["one", "two"]):
        _, ctx = contexts(tmp_path)
        with EventBus([EvsysLoggerCallback()], journal=tmp_path / f"journal-{len(names)}") as bus:
            bus.publish(RunStart(ctx))
            for name in names:
                bus.publish(BenchmarkEval(ctx, EvalResult(name, None, {"pass": 1.0}), [{"task_id": name}], step=2))
    assert [row["task_id"] for row in server.predictions] == ["one", "two"]
    assert len(server.tables["evals"]) == 2


# -- settings ---------------------------------------------------------------------------------------------------------


def test_without_a_key_it_is_parked_with_the_fix_in_second_1_and_sync_sends_everything(
    tmp_path, server, monkeypatch, caplog
):
    monkeypatch.delenv("EVSYS_API_KEY")
    began = time.monotonic()
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", linger_seconds=0, drain_timeout=3) as bus:
        train(bus, LoopState(0, 3, tmp_path / "run"))
        while "EVSYS_API_KEY is not set" not in caplog.text:
            assert time.monotonic() < began + 10
            time.sleep(0.02)
    [delivery] = bus.receipt.deliveries
    assert (delivery.state, delivery.delivered, delivery.pending) == ("parked", 0, 5)
    assert "set EVSYS_API_KEY" in delivery.fix
    assert not server.request_count
    monkeypatch.setenv("EVSYS_API_KEY", evsys.KEY)
    sync(tmp_path / "journal")
    assert [row["value"] for row in server.metrics] == [0.0, 0.5, 1.0]


def test_the_key_may_appear_with_the_next_run(tmp_path, server, monkeypatch):
    for key in (None, evsys.KEY):
        monkeypatch.delenv("EVSYS_API_KEY", raising=False)
        if key:
            monkeypatch.setenv("EVSYS_API_KEY", key)
        callback = EvsysLoggerCallback()
        callback.placement = "inline"
        with EventBus([callback], journal=tmp_path / "journal", drain_timeout=5) as bus:
            train(bus, LoopState(0, 3, tmp_path / f"run-{key is None}"))
    assert bus.receipt.deliveries[0].complete
    assert len(server.tables["runs"]) == 2
    assert len(server.metrics) == 6


def test_offline_events_wait_and_are_not_owed_and_replay_sends_them_one_day(tmp_path, server, monkeypatch):
    monkeypatch.setenv("EVSYS_OFFLINE", "Yes")
    monkeypatch.delenv("EVSYS_API_KEY")
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal") as bus:
        train(bus, LoopState(0, 3, tmp_path / "run"))
    [delivery] = bus.receipt.deliveries
    assert (delivery.delivered, delivery.waiting, delivery.owed, server.request_count) == (0, delivery.recorded, 0, 0)
    assert (delivery.unfinished, delivery.fix) == (False, f"evsys-bus replay {tmp_path / 'journal'} --to evsys_logger")
    monkeypatch.delenv("EVSYS_OFFLINE")
    monkeypatch.setenv("EVSYS_API_KEY", evsys.KEY)
    command = [
        EVSYS_BUS,
        "replay",
        str(tmp_path / "journal"),
        "--to",
        "evsys_logger",
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(server.tables["runs"]) == 1
    assert len(server.get_metrics("r2")) == 3


def test_params_go_before_the_environment_and_the_key_is_no_param(tmp_path, server, monkeypatch):
    monkeypatch.setenv("EVSYS_API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("EVSYS_PROJECT_ID", "from-environment")
    monkeypatch.setenv("TEAM_KEY", evsys.KEY)
    monkeypatch.delenv("EVSYS_API_KEY")
    for number, project in enumerate(("mine", None)):
        params = {"url": f"{server.url}/", "api_key_env": "TEAM_KEY"} | ({"project_id": project} if project else {})
        with EventBus(
            build_callbacks([{"kind": "evsys_logger", "params": params}]), journal=tmp_path / str(number)
        ) as bus:
            train(bus, LoopState(0, 3, tmp_path / f"exp-{number}" / "run"))
    projects = [row["project_id"] for row in server.tables["experiments"].values()]
    assert projects == ["mine", "from-environment"]
    for params in ({"api_key": "evk-secret"}, {"url": "ftp://x"}, {"url": "http://user:pw@host"}, {"flush_every": 0}):
        with pytest.raises(ConfigError) as raised:
            build_callbacks([{"kind": "evsys_logger", "params": params}])
        assert "evk-secret" not in str(raised.value)
    assert evsys.KEY not in "".join(file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())


def test_sync_from_a_shell_that_names_no_server_goes_to_the_one_that_was_used(tmp_path, server, monkeypatch):
    server.fault = lambda op, args: evsys.error_response(503)
    monkeypatch.setenv("EVSYS_PROJECT_ID", "p-of-the-program")
    # The courier is ended as it starts: what `sync` needs must be on disk without it.
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", linger_seconds=0, drain_timeout=0) as bus:
        train(bus, LoopState(0, 3, tmp_path / "run"))
    assert bus.receipt.deliveries[0].pending
    server.fault = None
    monkeypatch.delenv("EVSYS_API_URL")
    monkeypatch.delenv("EVSYS_PROJECT_ID")
    sync(tmp_path / "journal")
    assert len(server.get_metrics("r2")) == 3
    assert {each["project_id"] for each in server.tables["experiments"].values()} == {"p-of-the-program"}
    spec = (tmp_path / "journal/couriers/evsys_logger.spec.json").read_text()
    assert server.url in spec
    assert evsys.KEY not in spec


def test_a_server_that_the_shell_of_sync_names_goes_before_the_one_that_was_used(tmp_path, server, monkeypatch):
    monkeypatch.setenv("EVSYS_API_URL", "http://127.0.0.1:9")
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", linger_seconds=0, drain_timeout=0) as bus:
        train(bus, LoopState(0, 3, tmp_path / "run"))
    assert bus.receipt.deliveries[0].pending
    monkeypatch.setenv("EVSYS_API_URL", server.url)
    sync(tmp_path / "journal")
    assert len(server.get_metrics("r2")) == 3


def test_an_address_with_a_password_in_the_environment_is_not_kept(tmp_path, server, monkeypatch):
    monkeypatch.setenv("EVSYS_API_URL", "http://me:hunter2@127.0.0.1:9")
    with EventBus([EvsysLoggerCallback()], journal=tmp_path / "journal", linger_seconds=0, drain_timeout=0) as bus:
        train(bus, LoopState(0, 3, tmp_path / "run"))
    assert bus.receipt.deliveries[0].pending
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]


def test_neither_the_class_nor_its_module_imports_the_client_or_asks_the_network(tmp_path):
    program = (
        "import sys; from evsys_adapters import EvsysLoggerCallback; EvsysLoggerCallback(); "
        "print([m for m in ('aiohttp', 'yarl', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.timeout(120)
def test_both_halves_keep_to_the_contract_of_adapters(server):
    # Ids are others each time, and nothing else is written.
    half = lambda _: EvsysSink(url=server.url)  # noqa: E731
    conformance(lambda _: EvsysLoggerCallback(), contents=lambda _: {}, delivery=half)()


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel"])
def test_a_key_that_cannot_be_one_is_parked_and_not_shown(tmp_path, server, monkeypatch, caplog, key):
    monkeypatch.setenv("EVSYS_API_KEY", key)
    callback = EvsysLoggerCallback()
    callback.placement = "inline"
    with EventBus([callback], journal=tmp_path / "journal", drain_timeout=1) as bus:
        train(bus, LoopState(0, 3, tmp_path / "run"))
    [delivery] = bus.receipt.deliveries
    assert "has characters that no key has" in delivery.error
    assert key not in caplog.text + str(delivery)


async def test_where_more_has_ended_than_is_kept_the_oldest_are_looked_up_when_they_go_on(tmp_path, server):
    gateway = Gateway(EvsysLoggerConfig(), server.url)
    creation = ServerObjectCreator(gateway.call, FaultLog(), max_ended=2)
    for key in (*(f"run-{n}" for n in range(9)), "run-0", "run-8", "run-9"):
        ctx = LogContext(tmp_path / "exp", run_key=key)
        EvsysLoggerCallback().on_run_start(ctx)
        run = creation.run_of(ctx, Envelope("r0-x", 1, time.time(), RunStart(ctx), key))
        await creation.ensure_run(run, ctx, None)
        run.ended = True
        creation.prune()
    await gateway.close()
    assert len(server.tables["runs"]) == 10
    assert len(server.tables["experiments"]) == 1
    assert Counter(op for op, _ in server.operations)["list_runs"] == 1


def test_without_a_bus_hooks_make_ids_and_nothing_else(tmp_path, server):
    ctx = LogContext(tmp_path, run_key="run")
    dispatch([EvsysLoggerCallback()], "on_train_start", LoopState(0, 3, tmp_path / "run", ctx=ctx))
    assert ctx.ids.keys() == {"experiment_id", "run_id"}


def test_without_the_client_it_is_an_error_that_names_the_extra(tmp_path):
    program = (
        "import sys; sys.modules['aiohttp'] = None\n"
        "from evsys_bus import build_callbacks; build_callbacks([{'kind': 'evsys_logger'}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "aiohttp" in done.stderr
    assert "evsys-bus[evsys]" in done.stderr
