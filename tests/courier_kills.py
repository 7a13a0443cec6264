#!/usr/bin/env python3
"""Kill a trainer and its couriers over and over, together and apart; then look at what reached the adapters.

usage: uv run python tests/courier_kills.py --kills 100

A training process with three followed adapters (`csv_metrics`, `local_logger`, a sink that writes a line for every
event) and its courier process are ended by SIGKILL at random moments: the trainer, the couriers, both, or the couriers
while they linger. The next life resumes in the same directory, at times while couriers of the last one still linger.
After the last kill a life ends in peace, `evsys-bus sync` delivers the rest, and then: every event is in the sink's
file at least once, in the order of its stream; the CSV and JSONL files are those that an undisturbed replay of the same
journal writes; the accounts agree with the journal; and no process is left behind. The seed repeats the choices, not
the moments.
"""

import argparse
import asyncio
import filecmp
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evsys_bus import EventBus, TrainingLoop, build_callbacks
from evsys_bus.delivery.accounts import accounts
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.followed import Terms
from evsys_bus.journal import JournalReader
from evsys_bus.tasks import run_alone

SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).with_name("kills.py"))
assert SPEC is not None
assert SPEC.loader is not None
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)

STEPS_A_SECOND = 400
SAVE_EVERY = 100
LINGER_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
VICTIMS = ("trainer", "couriers", "both", "trainer, then couriers")

SINK = """
from pathlib import Path

from evsys_bus import Sink, register_sink


@register_sink("lines_of_the_kills")
class Lines(Sink):
    max_batch_seconds = 0.05

    def __init__(self, path):
        self.path = Path(path)

    async def write(self, batch):
        with self.path.open("a") as file:
            file.writelines(f"{each.stream} {each.seq}\\n" for each in batch)
"""


class Fault(Exception):  # noqa: N818 - the word for it here
    """Something did not reach an adapter as it was promised to."""


def specs(directory: Path) -> list[dict[str, object]]:
    """What is followed."""
    return [
        {"kind": "csv_metrics", "params": {"out_path": str(directory / "metrics.csv")}, "placement": "follow"},
        {"kind": "local_logger", "params": {"print_every": 1_000_000}, "placement": "follow"},
        {"kind": "lines_of_the_kills", "params": {"path": str(directory / "lines")}},
    ]


async def train(directory: Path) -> None:
    """One life."""
    importlib.import_module("sink_of_the_kills")
    adapters = build_callbacks(specs(directory))
    async with EventBus(adapters, journal=directory / "journal", linger_seconds=LINGER_SECONDS) as bus:
        run_dir = directory / "run"
        loop = TrainingLoop(
            kills.Line(run_dir / "checkpoints"),
            kills.Points(STEPS_A_SECOND),
            num_steps=10**9,
            output_dir=run_dir,
            bus=bus,
            save_every=SAVE_EVERY,
            resume=True,
        )
        await loop.run()


class Scene:
    """One directory, from life to life."""

    def __init__(self, directory: Path, chance: random.Random) -> None:
        self.directory = directory
        self.chance = chance
        self.courier_deaths = self.trainer_deaths = 0
        (directory / "sink_of_the_kills.py").write_text(SINK)
        self.environment = os.environ | {"PYTHONPATH": str(directory)}

    def live(self, victim: str | None) -> None:
        """A life, and its end: by SIGKILL of the victim, or in peace."""
        command = [sys.executable, __file__, "--train", str(self.directory)]
        trainer = subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE)
        try:
            self._wait_for_steps(trainer)
            time.sleep(self.chance.uniform(0.0, 1.0))
            if victim in {"couriers", "both"}:
                self._kill_couriers()
                time.sleep(self.chance.uniform(0.0, 1.0) if victim == "couriers" else 0.0)
        finally:
            trainer.send_signal(signal.SIGTERM if victim is None else signal.SIGKILL)
            said = trainer.communicate(timeout=PATIENCE_SECONDS)[1].decode()
        self.trainer_deaths += 1
        if victim is None and trainer.returncode != -signal.SIGTERM:
            raise Fault(f"the last life ended with {trainer.returncode}: {said}")
        if victim == "trainer, then couriers":
            time.sleep(self.chance.uniform(0.0, 0.3))
            self._kill_couriers()
        time.sleep(self.chance.choice((0.0, 0.0, 0.5, LINGER_SECONDS + 0.5)))

    def _wait_for_steps(self, trainer: "subprocess.Popen[bytes]") -> None:
        """Until it has published a few more."""
        before, deadline = self._recorded(), time.monotonic() + PATIENCE_SECONDS
        while self._recorded() < before + 20:
            if trainer.poll() is not None or time.monotonic() > deadline:
                trainer.kill()
                said = trainer.communicate()[1].decode()
                raise Fault(f"the training ended by itself, or stood still: {said}")
            time.sleep(0.02)

    def _recorded(self) -> int:
        return sum(path.stat().st_size for path in (self.directory / "journal").glob("r*/*.seg")) // 400

    def processes(self) -> list[int]:
        """Those of ours that run: the couriers name the journal on their command line."""
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(self.directory).encode() in command and state != "Z" and int(path.name) != os.getpid():
                found.append(int(path.name))
        return found

    def _kill_couriers(self) -> None:
        for pid in self.processes():
            if b"courier_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.courier_deaths += 1

    def sync(self) -> None:
        """Deliver the rest, as a person would."""
        evsys_bus = Path(sys.executable).with_name("evsys-bus")
        command = [str(evsys_bus), "sync", str(self.directory / "journal")]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Fault(f"sync ended with {done.returncode}:\n{done.stdout}{done.stderr}")

    def inspect(self) -> int:
        """How many events there are, each of which has reached every adapter; a `Fault` otherwise."""
        reader = JournalReader(self.directory / "journal")
        there = {(stream, record.sequence) for stream in reader.streams() for record in reader.read(stream)}
        for account in accounts(self.directory / "journal"):
            _insist(account.recorded == account.delivered == len(there), f"{account} of {len(there)} events")
        lines = [line.split() for line in (self.directory / "lines").read_text().splitlines()]
        delivered = {(stream, int(sequence)) for stream, sequence in lines}
        _insist(delivered == there, f"the sink lacks {len(there - delivered)} of {len(there)} events")
        self._compare_with_replay()
        return len(there)

    def _compare_with_replay(self) -> None:
        again = self.directory / "again"
        shutil.rmtree(again, ignore_errors=True)
        (again / "run").mkdir(parents=True)
        written = self.directory / "run" / "logs"
        kept = written.rename(self.directory / "logs")
        try:
            for spec in specs(again)[:2]:
                (adapter,) = build_callbacks([{**spec, "placement": "inline"}])
                courier = Courier(self.directory / "journal", str(spec["kind"]), adapter, Terms(), keep=False)
                courier.finish()
                run_alone(courier.run)
            for undisturbed, disturbed in (
                (again / "metrics.csv", self.directory / "metrics.csv"),
                *((path, kept / path.relative_to(written)) for path in written.rglob("*.jsonl")),
            ):
                same = filecmp.cmp(undisturbed, disturbed, shallow=False)
                _insist(same, f"{disturbed} is not what a replay writes: see {undisturbed}")
        finally:
            written.rename(again / "logs")
            kept.rename(written)

    def wait_until_alone(self) -> None:
        """Nothing of ours is left behind."""
        deadline = time.monotonic() + LINGER_SECONDS + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        _insist(not left, f"left behind: {left}")


def _insist(fine: bool, why: str) -> None:
    if not fine:
        raise Fault(why)


def kill(number: int, *, seed: int, folder: Path, each: int = 10, tell=lambda _: None) -> tuple[int, int]:
    """So many ends by SIGKILL; how many events there were in all, and how many couriers were killed."""
    chance = random.Random(seed)
    events = couriers = 0
    for first in range(0, number, each):
        scene = Scene(folder / f"from-{first:04d}", chance) if not (folder / f"from-{first:04d}").mkdir() else None
        assert scene is not None
        for turn in range(first, min(first + each, number)):
            scene.live(VICTIMS[turn % len(VICTIMS)])
        scene.live(None)
        scene.wait_until_alone()
        scene.sync()
        found = scene.inspect()
        scene.wait_until_alone()
        events += found
        couriers += scene.courier_deaths
        tell(
            f"{min(first + each, number):>5} kills  {found:,} events, each where it belongs  couriers killed {couriers}"
        )
        shutil.rmtree(scene.directory)
    return events, couriers


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(description="Kill a trainer and its couriers over and over; see the file.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="courier-kills-"))
    try:
        events, couriers = kill(asked.kills, seed=asked.seed, folder=folder, tell=lambda text: print(text, flush=True))
    except Fault as fault:
        print(f"kept in {folder}: {fault}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(
        f"kills {asked.kills} of trainers, {couriers} of couriers, {events:,} events, lost 0, "
        f"{time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        asyncio.run(train(Path(sys.argv[2])))
    else:
        sys.exit(main())
