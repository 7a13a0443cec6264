#!/usr/bin/env python3
"""Kill a trainer, its courier and the dashboard over and over; then compare the dashboard's database with the journal.

usage: uv run python tests/dashboard_kills.py --kills 50

An experiment of two arms, each a process of its own in the same directory, is killed by SIGKILL at random moments: a
trainer, a courier, the dashboard, or several of them. Now and then the dashboard does not respond for a while, or its
database is replaced by a new one. The next life of a trainer resumes. When both runs have ended, `evsys-bus sync`
delivers the rest. Then the database must have every event of the journal, one experiment, one run per arm, and each
point once, value by value. The seed repeats the choices, not the moments.
"""

import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from evsys_adapters import EvsysLoggerCallback
from evsys_adapters.dashboard.store import Store
from evsys_bus import Eval, EventBus, LogContext, LoopState, RunEnd, RunResult, RunStart, StepEnd, TrainStart
from evsys_bus.codec import decode
from evsys_bus.journal import JournalReader
from support.kill_scenarios import KillScenario, kill, require_equal, run_command
from support.programs import EVSYS_BUS
from support.violations import Violation

ARMS = ("low", "high")
STEPS, STEP_SECONDS, EVAL_EVERY = 4_000, 0.002, 50
TIMEOUT_SECONDS = 90.0
VICTIMS = (
    "dashboard",
    "trainer",
    "courier",
    "dashboard and courier",
    "trainer and dashboard",
    "all",
    "stop",
    "database",
)


def train(directory: Path, arm: str) -> int:
    """Run one life of a trainer; it resumes at the step in its file, which may lie before the last recorded one."""
    folder = directory / "killed"
    progress = folder / f"{arm}.step"
    folder.mkdir(exist_ok=True)
    first = int(progress.read_text()) if progress.exists() else 0
    ctx = LogContext(folder, run_key=f"{arm}-s0", config={"name": "killed"}, run_config={"arm": arm, "seed": 0})
    state = LoopState(first, STEPS, folder / f"{arm}-s0", ctx=ctx)
    with EventBus([EvsysLoggerCallback()], journal=folder / "journal") as bus:
        bus.publish(RunStart(ctx))
        bus.publish(TrainStart(state))
        for step in range(first, STEPS):
            bus.publish(StepEnd(state, step, metrics={"loss": (1 + first) / (1 + step), "first": first}))
            if step % EVAL_EVERY == 0:
                bus.publish(Eval(state, step, "val", {"accuracy": step / STEPS}))
            if step % 25 == 0:
                temporary = progress.with_suffix(".new")
                temporary.write_text(str(step))
                temporary.rename(progress)
            time.sleep(STEP_SECONDS)
        bus.publish(RunEnd(ctx, RunResult(f"{arm}-s0", status="completed")))
    return 0


class Scenario(KillScenario):
    """One directory, its dashboard and its trainers."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        super().__init__(directory, rng, {"XDG_STATE_HOME": str(directory / "state"), "EVSYS_OFFLINE": ""})
        self.database = directory / "dashboard.sqlite"
        for name in ("EVSYS_API_URL", "EVSYS_API_KEY"):
            self.environment.pop(name, None)
        self.trainers: dict[str, subprocess.Popen[bytes]] = {}
        self.dashboard: subprocess.Popen[bytes] | None = None

    def start_dashboard(self) -> None:
        command = [EVSYS_BUS, "dash", "--no-browser", "--port", "0", "--db", str(self.database)]
        with (self.directory / "dashboard.err").open("ab") as errors:
            self.dashboard = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=errors)
        assert self.dashboard.stdout is not None
        if not self.dashboard.stdout.readline():
            raise Violation(f"the dashboard does not start: {(self.directory / 'dashboard.err').read_text()[-2000:]}")

    def start_trainers(self) -> bool:
        """Start those that have not ended; returns whether one is left."""
        for arm in ARMS:
            process = self.trainers.get(arm)
            if process is None or process.poll() not in {None, 0}:
                self.trainers[arm] = self.start_trainer(arm, stderr=subprocess.DEVNULL)
        return self._is_training()

    def kill_one(self, victim: str) -> None:
        self.wait_until_recorded(self._is_training, TIMEOUT_SECONDS)
        time.sleep(self.rng.uniform(0.0, 1.5))
        if victim == "database" and not self._is_training():
            victim = "dashboard"  # after the last event nobody notices that it is gone: `dash --import` is for that
        assert self.dashboard is not None
        if victim == "stop":
            self.dashboard.send_signal(signal.SIGSTOP)
            time.sleep(self.rng.uniform(0.5, 3.0))
            self.dashboard.send_signal(signal.SIGCONT)
        if "trainer" in victim or victim == "all":
            kill(self.rng.choice([*self.trainers.values()]))
        if "courier" in victim or victim == "all":
            self.kill_couriers()
        if "dashboard" in victim or victim in {"all", "database"}:
            kill(self.dashboard)
            time.sleep(self.rng.choice((0.0, 0.0, 1.0)))
            if victim == "database":
                for path in self.directory.glob("dashboard.sqlite*"):
                    path.unlink()
            self.start_dashboard()
        self.counts[victim] += 1

    def _is_training(self) -> bool:
        return any(each.poll() is None for each in self.trainers.values())

    def finish(self) -> None:
        """Let the trainers end, deliver the rest, and stop the dashboard."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self.start_trainers():
            if time.monotonic() > deadline:
                raise Violation("the trainers do not end")
            time.sleep(0.1)
        self.sync(TIMEOUT_SECONDS)  # again while the dashboard is on its way
        self.stop()

    def stop(self) -> None:
        for each in [*self.trainers.values()]:
            kill(each)
        if self.dashboard is not None:
            self.dashboard.terminate()
            self.dashboard.communicate(timeout=30)

    def check(self) -> tuple[int, int]:
        """Return how many events and points there are; raises `Violation` if the database differs from the journal."""
        store = Store.open(self.database)
        try:
            expected, events = self._recorded_points(store)
            stored: dict[tuple[str, str], dict[int, float]] = {}
            experiments = store.catalogue.records.experiments()
            require_equal("experiments", ["killed"], [each.name for each in experiments])
            runs = store.catalogue.records.runs(experiments[0].id)
            require_equal("runs", sorted(f"{arm}-s0" for arm in ARMS), sorted(each.key for each in runs))
            require_equal("ends", {"completed"}, {each.status for each in runs})
            for run in runs:
                for info in store.series.names(run.id):
                    line = store.series.read([info.id], width=1).lines[0]
                    require_equal(f"points of {run.key} {info.name} at one step", 1, int(line.count.max()))
                    stored[run.key, info.name] = dict(zip(map(int, line.x), map(float, line.last), strict=True))
            require_equal("series", sorted(expected), sorted(stored))
            for key, points in expected.items():
                require_equal(f"{key}", points, stored[key])
            return events, sum(map(len, expected.values()))
        finally:
            store.close()

    def _recorded_points(self, store: Store) -> tuple[dict[tuple[str, str], dict[int, float]], int]:
        """Return the points of the journal, where a resumed run replaces its rows from that step on."""
        reader, recorded, events = JournalReader(self.journal), list[object](), 0
        for stream in reader.streams():
            last = 0
            for record in reader.read(stream):
                last = record.sequence
                events += 1
                recorded.append(decode(record.payload))
            require_equal(f"watermark of {stream}", last, store.watermark(stream))
        points: dict[tuple[str, str], dict[int, float]] = collections.defaultdict(dict)
        for envelope in sorted(recorded, key=lambda each: each.time):
            event, run = envelope.event, envelope.run
            if isinstance(event, TrainStart):
                for key in [key for key in points if key[0] == run]:
                    points[key] = {step: value for step, value in points[key].items() if step < event.state.step}
            elif isinstance(event, StepEnd | Eval):
                prefix = event.eval_name if isinstance(event, Eval) else "train"
                for name, value in event.metrics.items():
                    points[run, f"{prefix}/{name}"][event.step_idx] = float(value)
        return {key: values for key, values in points.items() if values}, events


def kill_repeatedly(number: int, *, seed: int, folder: Path, on_progress=lambda _: None) -> collections.Counter[str]:
    """Kill ``number`` times; returns the totals."""
    rng, counts, done = random.Random(seed), collections.Counter[str](), 0
    while done < number:
        directory = folder / f"from-{done:04d}"
        directory.mkdir()
        scenario = Scenario(directory, rng)
        try:
            scenario.start_dashboard()
            while done < number and scenario.start_trainers():
                scenario.kill_one(VICTIMS[done % len(VICTIMS)])
                done += 1
            scenario.finish()
        finally:
            scenario.stop()
        events, points = scenario.check()
        counts += scenario.counts
        counts.update({"experiments": 1, "events": events, "points": points})
        on_progress(f"{done:>5} kills  {json.dumps(counts)}")
        shutil.rmtree(directory)
    return counts


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        sys.exit(train(Path(sys.argv[2]), sys.argv[3]))
    sys.exit(run_command(kill_repeatedly, 50))
