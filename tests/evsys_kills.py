#!/usr/bin/env python3
"""Kill a trainer and the courier of `evsys_logger` over and over; then compare EvSys' server with the journal.

usage: uv run python tests/evsys_kills.py --kills 100

An experiment of two arms with two seeds, with in-loop and final benchmarks, predictions and checkpoints, is killed by
SIGKILL at random moments: the trainer, its courier, both, or the courier in its grace period. Now and then the server
responds 500, cuts a connection, drops the response to an executed request, or is itself killed and restarted. The next
life resumes. When the experiment has ended, `evsys-bus sync` delivers the rest. Then the server must have one
experiment, one group per arm, one run per run, each eval once with each prediction once, each checkpoint once, and
every metric of the journal, value by value. The seed repeats the choices, not the moments.
"""

import asyncio
import collections
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from evsys_bus import BenchmarkEval, Checkpoint, EvalResult, Experiment, ExperimentEnd, StepEnd, TrainingBatch
from evsys_bus.codec import decode
from evsys_bus.config.build import build_callbacks
from evsys_bus.events import Eval
from evsys_bus.journal import JournalReader
from evsys_bus.training.plan import RunComponents
from support.kill_scenarios import KillScenario, kill, require_equal, run_command
from support.training_parts import IndexBatches, NumberBackend
from support.violations import Violation

STEPS, STEP_SECONDS, SAVE_EVERY, EVAL_EVERY = 60, 0.005, 15, 10
TASKS = 5
TIMEOUT_SECONDS = 60.0
VICTIMS = ("trainer", "courier", "both", "trainer, then courier")
CONFIG = {
    "name": "killed",
    "recipe": "",
    "runs": {"low": {"lr": 0.25}, "high": {"lr": 2.0}},
    "n_repeats": 2,
    "max_concurrent_runs": 1,
}


class Model(NumberBackend):
    """A backend whose steps take time and have their own number as a metric."""

    async def forward_backward(self, batch: TrainingBatch) -> dict[str, float]:
        await asyncio.sleep(STEP_SECONDS)
        return {"n": batch.data[0], **await super().forward_backward(batch)}


class TaskBenchmark:
    """A benchmark, with or without an id at the server."""

    every = EVAL_EVERY

    def __init__(self, name: str, benchmark_id: str | None, model: Model) -> None:
        self.name, self.benchmark_id, self.model = name, benchmark_id, model

    async def evaluate(self, state: object) -> tuple[EvalResult, list[dict[str, object]]]:
        return await self.score(state)

    async def score(self, _: object) -> tuple[EvalResult, list[dict[str, object]]]:
        rows = [{"task_id": f"t{n}", "reward": self.model.value + n} for n in range(TASKS)]
        return EvalResult(self.name, self.benchmark_id, {"pass": 0.5}), rows


def recipe(params: dict[str, float], run: object) -> RunComponents:
    model = Model(run.run_dir / "saved", params["lr"])
    tasks = [
        TaskBenchmark("first", "b1", model),
        TaskBenchmark("second", None, model),
        TaskBenchmark("third", None, model),
    ]
    return RunComponents(
        backend=model,
        step_builder=IndexBatches(),
        num_steps=STEPS,
        evaluators=tasks,
        benchmarks=tasks,
        save_every=SAVE_EVERY,
    )


def train(directory: Path) -> int:
    """Run one life of the trainer."""
    callbacks = build_callbacks([{"kind": "evsys_logger", "params": {"timeout_seconds": 5}}])
    folder = directory / "killed"
    experiment = Experiment(CONFIG, recipe=recipe, callbacks=callbacks, output_dir=folder, resume=True)
    return 0 if asyncio.run(experiment.run()).status == "completed" else 1


class ServerFaults:
    """Injects faults into the server."""

    def __init__(self, server: object, rng: random.Random) -> None:
        self.server, self.rng, self.counts = server, rng, collections.Counter()
        server.fault, server.lose = self.fault, self.should_drop_reply
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._kill_at_random_times, daemon=True)
        self._thread.start()

    def fault(self, op: str, args: object) -> object:
        from support import evsys_server

        draw = self.rng.random()
        if draw < 0.02:
            self.counts["500 or cut"] += 1
            return "cut" if draw < 0.01 else evsys_server.error_response(500)
        return None

    def should_drop_reply(self, op: str, args: object) -> bool:
        from support import evsys_server

        lost = op not in evsys_server.READS and self.rng.random() < 0.02
        self.counts["replies lost"] += lost
        return lost

    def _kill_at_random_times(self) -> None:
        while not self._stopped.wait(self.rng.uniform(2.0, 8.0)):
            self.server.stop()
            self.counts["server killed"] += 1
            self._stopped.wait(self.rng.uniform(0.1, 0.6))
            self.server.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self.server.fault = self.server.lose = None


class Scenario(KillScenario):
    """One directory and one server, through all lives of the trainer."""

    def __init__(self, directory: Path, server: object, rng: random.Random) -> None:
        [key] = server.keys
        super().__init__(directory, rng, {"EVSYS_API_URL": server.url, "EVSYS_API_KEY": key, "EVSYS_OFFLINE": ""})
        self.server = server

    def run_life(self, victim: str | None) -> bool:
        """Run one life; returns whether it ended by itself."""
        trainer = self.start_trainer(stderr=subprocess.PIPE)
        try:
            if victim is None or self._ends_before_kill(trainer):
                stderr = trainer.communicate(timeout=TIMEOUT_SECONDS)[1].decode()
                if trainer.returncode:
                    raise Violation(f"the training ended with {trainer.returncode}: {stderr}")
                return True
            if victim in {"courier", "both"}:
                self.kill_couriers()
                if victim == "courier":
                    time.sleep(self.rng.uniform(0.0, 0.5))
        finally:
            kill(trainer)
        self.counts["trainers"] += 1
        if victim == "trainer, then courier":
            time.sleep(self.rng.uniform(0.0, 0.3))
            self.kill_couriers()
        time.sleep(self.rng.choice((0.0, 0.0, 0.4)))
        return False

    def _ends_before_kill(self, trainer: "subprocess.Popen[bytes]") -> bool:
        self.wait_until_recorded(lambda: trainer.poll() is None, TIMEOUT_SECONDS)
        end = time.monotonic() + self.rng.uniform(0.0, 1.2)
        while time.monotonic() < end and trainer.poll() is None:
            time.sleep(0.005)
        return trainer.poll() is not None

    def check(self) -> tuple[int, int]:
        """Return how many points and evals there are; raises `Violation` if they differ from the journal."""
        tables, server = self.server.tables, self.server
        require_equal("experiments", ["killed"], [row["experiment_name"] for row in tables["experiments"].values()])
        require_equal("groups", ["high", "low"], sorted(row["name"] for row in tables["groups"].values()))
        runs = {row["id"]: row["run_config"]["name"] for row in tables["runs"].values()}
        require_equal("runs", ["high-s0", "high-s1", "low-s0", "low-s1"], sorted(runs.values()))
        require_equal("ends", {"completed"}, {row["status"] for row in [*tables["runs"].values()]})
        points, scored, saved = self._recorded_events()
        stored = {
            (name, row["split"], row["step"], row["name"]): row["value"]
            for run, name in runs.items()
            for row in server.get_metrics(run)
        }
        require_equal(
            "metrics", points, {key: value for key, value in stored.items() if not key[3].endswith("_seconds")}
        )
        evals = [(runs[row["run_id"]], row.get("benchmark_id"), row.get("step")) for row in tables["evals"].values()]
        require_equal("evals", scored, collections.Counter(evals))
        predictions = collections.Counter((row["eval_id"], row["task_id"]) for row in server.predictions)
        require_equal(
            "predictions", {(each, f"t{n}"): 1 for each in tables["evals"] for n in range(TASKS)}, dict(predictions)
        )
        checkpoints = [(runs[row["run_id"]], row["label"], row["step"]) for row in server.checkpoints]
        require_equal("checkpoints", dict.fromkeys(saved, 1), dict(collections.Counter(checkpoints)))
        return len(points), len(evals)

    def _recorded_events(self) -> tuple[dict[object, float], dict[object, int], set[object]]:
        """Return what is in the journal: points, the number of evals by run, benchmark and step, checkpoints."""
        reader = JournalReader(self.journal)
        points, scored, saved, ended = {}, collections.defaultdict(set), set(), False
        for stream in reader.streams():
            for record in reader.read(stream):
                envelope = decode(record.payload)
                run, event = envelope.run, envelope.event
                if isinstance(event, StepEnd):
                    points |= {
                        (run, "train", event.step_idx, key): float(value)
                        for key, value in event.metrics.items()
                        if not key.endswith("_seconds")  # differs each time the step is run
                    }
                elif isinstance(event, Eval):
                    points |= {
                        (run, "val", event.step_idx, f"{event.eval_name}/{k}"): v for k, v in event.metrics.items()
                    }
                elif isinstance(event, BenchmarkEval):
                    scored[run, event.eval_result.benchmark_id, event.step].add(event.eval_result.name)
                elif isinstance(event, Checkpoint):
                    saved.add((run, event.row.name, event.row.batch))
                ended = ended or isinstance(event, ExperimentEnd)
        if not ended:
            raise Violation("the experiment has not ended")
        return points, {key: len(names) for key, names in scored.items()}, saved


def kill_repeatedly(number: int, *, seed: int, folder: Path, on_progress=lambda _: None) -> collections.Counter:
    """Kill ``number`` times; returns the totals."""
    from support.evsys_server import EvsysServer

    rng, counts, kill_count = random.Random(seed), collections.Counter(), 0
    while kill_count < number:
        directory = folder / f"from-{kill_count:04d}"
        directory.mkdir()
        server = EvsysServer().start()
        faults = ServerFaults(server, random.Random(rng.random()))
        scenario = Scenario(directory, server, rng)
        try:
            finished = False
            while kill_count < number and not finished:
                finished = scenario.run_life(VICTIMS[kill_count % len(VICTIMS)])
                kill_count += not finished
            if not finished:
                scenario.run_life(None)
        finally:
            faults.stop()
        scenario.sync(TIMEOUT_SECONDS, repeat_on="EB905")  # couriers in their grace period
        points, evals = scenario.check()
        server.stop()
        counts += faults.counts + scenario.counts
        counts.update({"experiments": 1, "points": points, "evals": evals, "requests": server.request_count})
        on_progress(f"{kill_count:>5} kills  {dict(counts)}")
        shutil.rmtree(directory)
    return counts


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(Path(sys.argv[2])))
    sys.exit(run_command(kill_repeatedly, 100))
