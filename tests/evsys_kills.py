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

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from evsys_bus import BenchmarkEval, Checkpoint, EvalResult, Experiment, ExperimentEnd, StepEnd, TrainingBatch
from evsys_bus.codec import decode
from evsys_bus.events import Eval
from evsys_bus.journal import JournalReader
from evsys_bus.training.plan import RunParts
from evsys_bus.wiring.build import build_callbacks
from support.programs import EVSYS_BUS

STEPS, STEP_SECONDS, SAVE_EVERY, EVAL_EVERY = 60, 0.005, 15, 10
TASKS = 5
PATIENCE_SECONDS = 60.0
VICTIMS = ("trainer", "courier", "both", "trainer, then courier")
CONFIG = {
    "name": "killed",
    "recipe": "",
    "runs": {"low": {"lr": 0.25}, "high": {"lr": 2.0}},
    "n_repeats": 2,
    "max_concurrent_runs": 1,
}


class Fault(Exception):  # noqa: N818 - names what was found, not an error of this program
    """Raised when the server's data is not as it should be."""


class Model:
    """A backend with one number, which grows by the rate at each step."""

    def __init__(self, rate: float, folder: Path) -> None:
        self.value, self.rate, self.folder = 0.0, rate, folder

    async def forward_backward(self, batch: TrainingBatch) -> dict[str, float]:
        await asyncio.sleep(STEP_SECONDS)
        return {"value": self.value, "n": batch.data[0]}

    async def optim_step(self) -> None:
        self.value += self.rate

    async def save_state(self, name: str) -> str:
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(self.value))
        path.with_suffix(".part").replace(path)
        return str(path)

    async def save_weights_for_sampler(self, name: str) -> None:
        return None

    async def load_state(self, path: str) -> None:
        self.value = json.loads(Path(path).read_text())  # noqa: ASYNC240 # a small file


class Batches:
    async def build_batch(self, step_idx: int) -> TrainingBatch:
        return TrainingBatch(data=[step_idx])


class Tasks:
    """A benchmark, with or without an id at the server."""

    every = EVAL_EVERY

    def __init__(self, name: str, benchmark_id: str | None, model: Model) -> None:
        self.name, self.benchmark_id, self.model = name, benchmark_id, model

    async def evaluate(self, state: object) -> tuple[EvalResult, list[dict[str, object]]]:
        return await self.score(state)

    async def score(self, _: object) -> tuple[EvalResult, list[dict[str, object]]]:
        rows = [{"task_id": f"t{n}", "reward": self.model.value + n} for n in range(TASKS)]
        return EvalResult(self.name, self.benchmark_id, {"pass": 0.5}), rows


def recipe(params: dict[str, float], run: object) -> RunParts:
    model = Model(params["lr"], run.run_dir / "saved")
    tasks = [Tasks("first", "b1", model), Tasks("second", None, model), Tasks("third", None, model)]
    return RunParts(
        backend=model,
        step_builder=Batches(),
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


class Weather:
    """Injects faults into the server."""

    def __init__(self, server: object, chance: random.Random) -> None:
        self.server, self.chance, self.counts = server, chance, collections.Counter()
        server.fault, server.lose = self.fault, self.lose
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill_now_and_then, daemon=True)
        self._thread.start()

    def fault(self, op: str, args: object) -> object:
        from support import evsys_server

        luck = self.chance.random()
        if luck < 0.02:
            self.counts["500 or cut"] += 1
            return "cut" if luck < 0.01 else evsys_server.answer(500)
        return None

    def lose(self, op: str, args: object) -> bool:
        from support import evsys_server

        lost = op not in evsys_server.READS and self.chance.random() < 0.02
        self.counts["replies lost"] += lost
        return lost

    def _kill_now_and_then(self) -> None:
        while not self._over.wait(self.chance.uniform(2.0, 8.0)):
            self.server.stop()
            self.counts["server killed"] += 1
            self._over.wait(self.chance.uniform(0.1, 0.6))
            self.server.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        self.server.fault = self.server.lose = None


class Scene:
    """One directory and one server, through all lives of the trainer."""

    def __init__(self, directory: Path, server: object, chance: random.Random) -> None:
        self.directory, self.server, self.chance = directory, server, chance
        self.journal = directory / "killed" / "journal"
        self.trainers = self.couriers = 0
        [key] = server.keys
        self.environment = os.environ | {"EVSYS_API_URL": server.url, "EVSYS_API_KEY": key, "EVSYS_OFFLINE": ""}

    def live(self, victim: str | None) -> bool:
        """Run one life; returns whether it ended by itself."""
        trainer = subprocess.Popen(
            [sys.executable, __file__, "--train", str(self.directory)], env=self.environment, stderr=subprocess.PIPE
        )
        try:
            if victim is None or self._ends_before_the_moment(trainer):
                said = trainer.communicate(timeout=PATIENCE_SECONDS)[1].decode()
                if trainer.returncode:
                    raise Fault(f"the training ended with {trainer.returncode}: {said}")
                return True
            if victim in {"courier", "both"}:
                self._kill_couriers()
                if victim == "courier":
                    time.sleep(self.chance.uniform(0.0, 0.5))
        finally:
            with contextlib.suppress(ProcessLookupError):
                trainer.send_signal(signal.SIGKILL)
            trainer.communicate()
        self.trainers += 1
        if victim == "trainer, then courier":
            time.sleep(self.chance.uniform(0.0, 0.3))
            self._kill_couriers()
        time.sleep(self.chance.choice((0.0, 0.0, 0.4)))
        return False

    def _ends_before_the_moment(self, trainer: "subprocess.Popen[bytes]") -> bool:
        before, deadline = self._recorded(), time.monotonic() + PATIENCE_SECONDS
        while self._recorded() < before + 2_000 and trainer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        end = time.monotonic() + self.chance.uniform(0.0, 1.2)
        while time.monotonic() < end and trainer.poll() is None:
            time.sleep(0.005)
        return trainer.poll() is not None

    def _recorded(self) -> int:
        return sum(path.stat().st_size for path in self.journal.glob("r*/*.seg"))

    def _kill_couriers(self) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes()
                if b"courier_main" in command and str(self.directory).encode() in command:
                    os.kill(int(path.name), signal.SIGKILL)
                    self.couriers += 1

    def sync(self) -> None:
        """Deliver the rest; retries while couriers are still in their grace period."""
        command = [EVSYS_BUS, "sync", str(self.journal)]
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            if "EB905" not in done.stderr or time.monotonic() > until:
                raise Fault(f"sync ended with {done.returncode}:\n{done.stdout}{done.stderr}")
            time.sleep(0.2)

    def inspect(self) -> tuple[int, int]:
        """Return how many points and evals there are; raises `Fault` if they differ from the journal."""
        tables, server = self.server.tables, self.server
        _same("experiments", ["killed"], [row["experiment_name"] for row in tables["experiments"].values()])
        _same("groups", ["high", "low"], sorted(row["name"] for row in tables["groups"].values()))
        runs = {row["id"]: row["run_config"]["name"] for row in tables["runs"].values()}
        _same("runs", ["high-s0", "high-s1", "low-s0", "low-s1"], sorted(runs.values()))
        _same("ends", {"completed"}, {row["status"] for row in [*tables["runs"].values()]})
        points, scored, saved = self._recorded_events()
        there = {
            (name, row["split"], row["step"], row["name"]): row["value"]
            for run, name in runs.items()
            for row in server._get_metrics(run)
        }
        _same("metrics", points, {key: value for key, value in there.items() if not key[3].endswith("_seconds")})
        evals = [(runs[row["run_id"]], row.get("benchmark_id"), row.get("step")) for row in tables["evals"].values()]
        _same("evals", scored, collections.Counter(evals))
        predictions = collections.Counter((row["eval_id"], row["task_id"]) for row in server.predictions)
        _same("predictions", {(each, f"t{n}"): 1 for each in tables["evals"] for n in range(TASKS)}, dict(predictions))
        checkpoints = [(runs[row["run_id"]], row["label"], row["step"]) for row in server.checkpoints]
        _same("checkpoints", dict.fromkeys(saved, 1), dict(collections.Counter(checkpoints)))
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
            raise Fault("the experiment has not ended")
        return points, {key: len(names) for key, names in scored.items()}, saved


def _same(what: str, wanted: object, found: object) -> None:
    if wanted != found:
        if isinstance(wanted, dict) and isinstance(found, dict):
            differing = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
            some = sorted(map(str, differing))[:5]
            raise Fault(
                f"{what}: {len(differing)} differ, {[(k, wanted.get(k), found.get(k)) for k in differing][:5]} {some}"
            )
        raise Fault(f"{what}: {found} instead of {wanted}")


def kill(number: int, *, seed: int, folder: Path, tell=lambda _: None) -> collections.Counter:
    """Kill ``number`` times; returns the totals."""
    from support.evsys_server import EvsysServer

    chance, counts, turn = random.Random(seed), collections.Counter(), 0
    while turn < number:
        directory = folder / f"from-{turn:04d}"
        directory.mkdir()
        server = EvsysServer().start()
        weather = Weather(server, random.Random(chance.random()))
        scene = Scene(directory, server, chance)
        try:
            over = False
            while turn < number and not over:
                over = scene.live(VICTIMS[turn % len(VICTIMS)])
                turn += not over
            if not over:
                scene.live(None)
        finally:
            weather.end()
        scene.sync()
        points, evals = scene.inspect()
        server.stop()
        counts += weather.counts
        counts.update({"experiments": 1, "points": points, "evals": evals, "requests": server.asked})
        counts.update({"trainers": scene.trainers, "couriers": scene.couriers})
        tell(f"{turn:>5} kills  {dict(counts)}")
        shutil.rmtree(directory)
    return counts


def main() -> int:
    """Run the long form of the test."""
    parser = argparse.ArgumentParser(description="Kill a trainer and its courier over and over; see the file.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="evsys-kills-"))
    try:
        counts = kill(asked.kills, seed=asked.seed, folder=folder, tell=lambda text: print(text, flush=True))
    except Fault as fault:
        print(f"kept in {folder}: {fault}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"{dict(counts)}: nothing twice, nothing lost, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(Path(sys.argv[2])))
    sys.exit(main())
