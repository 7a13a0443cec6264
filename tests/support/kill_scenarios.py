"""What the commands share that kill a trainer and its couriers over and over and then compare what two places have."""

import argparse
import contextlib
import inspect
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.couriers import kill_couriers
from support.programs import EVSYS_BUS
from support.violations import Violation


class KillScenario:
    """A directory with an experiment that is killed; its trainers run this very command with ``--train``.

    Args:
        directory: Where it all is; the experiment's own folder is ``killed``.
        rng: Chooses what is random.
        environment: Variables of the trainers and of `sync`, besides those of this process.
    """

    def __init__(self, directory: Path, rng: random.Random, environment: dict[str, str]) -> None:
        self.directory, self.rng = directory, rng
        self.folder = directory / "killed"
        self.journal = self.folder / "journal"
        self.environment = {**os.environ, **environment}
        self.counts: Counter[str] = Counter()

    def start_trainer(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        """Start a trainer."""
        command = [sys.executable, inspect.getfile(type(self)), "--train", str(self.directory), *arguments]
        return subprocess.Popen(command, env=self.environment, **options)

    def wait_until_recorded(self, is_training: Callable[[], bool], timeout: float) -> None:
        """Wait until more is on record than now, or the training has ended."""
        size, deadline = self._recorded_bytes(), time.monotonic() + timeout
        while self._recorded_bytes() < size + 2_000 and is_training() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _recorded_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.journal.glob("r*/*.seg"))

    def kill_couriers(self) -> None:
        """Kill those of this experiment."""
        self.counts["couriers"] += kill_couriers(self.directory)

    def sync(self, timeout: float, *, repeat_on: str = "") -> None:
        """Deliver the rest; again while it fails with this text on stderr."""
        deadline = time.monotonic() + timeout
        while True:
            command = [EVSYS_BUS, "sync", str(self.journal)]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return
            if repeat_on not in done.stderr or time.monotonic() > deadline:
                raise Violation(f"sync ended with {done.returncode}:\n{done.stdout}{done.stderr}")
            time.sleep(0.2)


def kill(process: "subprocess.Popen[Any]") -> None:
    """Kill a process, which may be stopped or have ended, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    process.communicate()


def require_equal(what: str, expected: object, actual: object) -> None:
    """Raise `Violation` unless they are equal; of mappings it has the differing items."""
    if expected == actual:
        return
    if isinstance(expected, dict) and isinstance(actual, dict):
        differing = [key for key in {**expected, **actual} if expected.get(key) != actual.get(key)]
        examples = [(key, expected.get(key), actual.get(key)) for key in differing[:5]]
        raise Violation(f"{what}: {len(differing)} of {len(expected)} differ: {examples}")
    raise Violation(f"{what}: {actual} instead of {expected}")


def run_command(kill_repeatedly: Callable[..., "Counter[str]"], kills: int) -> int:
    """Run the long form of a test: parse the command line, kill, and print the totals; return the exit code."""
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser(description="Kill programs over and over; see the file.")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    started, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix=f"{script.stem}-"))
    try:
        counts = kill_repeatedly(
            args.kills, seed=args.seed, folder=folder, on_progress=lambda text: print(text, flush=True)
        )
    except Violation as fault:
        print(f"kept in {folder}: {fault}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    print(f"{dict(counts)}: nothing twice, nothing lost, {time.monotonic() - started:.0f} s")
    return 0
