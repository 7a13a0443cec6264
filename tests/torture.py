#!/usr/bin/env python3
"""Real processes and disks with every kind of fault; afterwards, what reached the adapters is checked.

usage: uv run python tests/torture.py --minutes 30 [--seed N] [--only KIND ...] [--but KIND ...]

A directory is used by many lives of a training process (`torture_trainer.py`), each of which acknowledges through a
pipe what it has published. Faults occur at random: kills, signals, stops, limits, full disks, links, file modes,
damaged small files, clock jumps, a restart of the machine, failing system calls, concurrent commands, and changes of
the config. After a few lives the faults end, `evsys-bus sync` delivers the rest, and `torture_oracle.py` checks: every
acknowledged event is recorded, or pruned by retention, or counted as unrecorded; the files of the adapters contain
exactly what the lives published; all commands end; no process is left, and none was late. The seed repeats the choices,
not the moments. Nothing outside the temporary directory is changed, and at most two cores are used.
"""

import argparse
import contextlib
import itertools
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
import traceback
from collections import Counter
from pathlib import Path

from support import torture_faults as faults
from support import torture_oracle as oracle
from support.couriers import kill_couriers
from support.programs import processes_of
from support.torture_life import Life, NotEndedError
from support.torture_tools import Tools
from support.violations import Violation, require

START_SECONDS = 30.0
DRAIN_SECONDS = 3.0
LINGER_SECONDS = 1.5
SLACK_SECONDS = 12.0
"""Added to every deadline, because the machine is shared."""
SETTLE_SECONDS = 60.0
DISK_BYTES = 32 << 20
NAMES = ("table", "logs", "board", "lines")
"""The initial adapters, by the name of their cursor."""

SINK = """
import asyncio, os
from pathlib import Path

from evsys_bus import Sink, register_sink
from evsys_bus.errors import RetryLaterError


@register_sink("torture_lines")
class Lines(Sink):
    max_batch_seconds = 0.05

    def __init__(self, path):
        self.path = Path(path)

    async def write(self, batch):
        if self.path.with_name("away").exists():
            raise RetryLaterError("away")
        if self.path.with_name("slow").exists():
            await asyncio.sleep(0.05)
        data = "".join(f"\\n{each.stream} {each.seq} ." for each in batch).encode() + b"\\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.write(file, data) < len(data):
                raise OSError(28, "no room")
        finally:
            os.close(file)
"""


class Scenario:
    """One directory, through all its lives."""

    def __init__(self, directory, seed, tools, counts, only=(), excluded=()):
        self.directory, self.tools, self.counts, self.only, self.excluded = directory, tools, counts, only, excluded
        self.rng = rng = random.Random(seed)
        self.notes, self.work = directory / "notes", directory / "work"
        self.notes.mkdir(parents=True)
        self.work.mkdir()
        self.disk = tools.mounts and self.is_allowed("disk_full") and rng.random() < 0.3
        if self.disk:
            line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.work)]
            subprocess.run(line, check=True)
        (self.notes / "torture_sink.py").write_text(SINK)
        self.clock = self.notes / "clock"
        self.set_clock(0)
        self.prefix = [] if tools.unprivileged is None else tools.unprivileged
        self.retain_bytes = rng.choice((None, None, 20_000, 100_000))
        self.segment_bytes = rng.choice((2_000, 10_000, 1 << 20)) if self.retain_bytes is None else 4_000
        self.couriers = rng.choice(("process",) * 9 + ("thread",))
        self.subscriptions = {name: name for name in NAMES}
        """Output -> the current name of the adapter that writes it."""
        self.unsubscribed, self.subscribed_since, self.output_since = set(), {}, {}
        """Outputs without an adapter now; the first life of each; and the first life with output after a removal."""
        self.old_names = {name: [] for name in NAMES}
        self.life_number = self.next_step = 0
        self.needs_life, self.latest_damaged_at = False, -1
        self.history = []
        self.expected = oracle.Expected()
        self.children = []

    # -- configuration ------------------------------------------------------------------------------------------------

    @property
    def journal(self):
        return self.work / "journal"

    def is_allowed(self, kind):
        return kind not in self.excluded and (not self.only or kind in self.only)

    def note(self, kind, text=""):
        self.counts[kind] += 1
        self.history.append(f"{time.monotonic():.2f} life {self.life_number}: {kind} {text}")

    def count_skipped(self, kind):
        self.counts[f"skipped: {kind}"] += 1

    def environment(self):
        python_path = os.environ.get("PYTHONPATH")
        variables = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.notes), *([python_path] if python_path else [])])
        }
        if self.tools.clock is not None:
            variables |= {"LD_PRELOAD": str(self.tools.clock), "TORTURE_CLOCK": str(self.clock)}
        return variables

    def set_clock(self, seconds):
        if not self.clock.exists():
            self.clock.write_bytes(bytes(8))
        with self.clock.open("r+b") as file:
            file.write(int(seconds).to_bytes(8, "little", signed=True))

    def specs(self):
        """Return the adapters of the next life."""
        out = self.work / "out"
        params = {
            "table": ("csv_metrics", {"out_path": str(out / "metrics.csv")}),
            "logs": ("local_logger", {"print_every": 0}),
            "board": ("tensorboard_logger", {"log_dir": str(out / "tensorboard")}),
        }
        specs = [{"kind": "checkpoint_upload", "params": {"url": f"file://{self.work}/store"}}]
        for label, name in self.subscriptions.items():
            kind, adapter_params = params.get(label, ("torture_lines", {"path": str(self.work / f"sink-{label}")}))
            if label not in self.unsubscribed:
                placement = {} if kind == "torture_lines" else {"placement": "follow"}
                specs.append({"kind": kind, "name": name, "params": adapter_params} | placement)
        return specs

    # -- one life -----------------------------------------------------------------------------------------------------

    def run_life(self, during, end=None):
        rng = self.rng
        self.life_number += 1
        self.counts["lives"] += 1
        first = self.next_step
        if rng.random() < 0.4:
            first = rng.choice((max(0, first - rng.randint(1, 60)), max(0, first - 1), 0))
        end = end or rng.choice([each for each in ENDS if self.is_allowed(each)] or ["end"])
        plan = {
            "work": str(self.work),
            "life": self.life_number,
            "first": first,
            "seconds": rng.uniform(0.2, 1.5) if end == "end" else 600.0,
            "pace_seconds": rng.choice((0.001, 0.003, 0.01)),
            "entry": rng.choice(("async", "uvloop", "sync")),
            "retain_bytes": self.retain_bytes,
            "segment_bytes": self.segment_bytes,
            "flush": rng.choice(("interval", "interval", "always", "never")),
            "save_every": rng.choice((25, 60)),
            "linger_seconds": LINGER_SECONDS,
            "drain_timeout": DRAIN_SECONDS,
            "couriers": self.couriers,
            "specs": self.specs(),
        }
        early = end in {"kill_early", "int_early", "term_early"}
        self.note(end, f"{plan['entry']} from step {first}")
        life = Life(self, plan)
        subscribed = self.subscriptions.keys() - self.unsubscribed
        try:
            if early:
                life.run_for(rng.uniform(0.0, 1.2))
            else:
                self._inject_faults(life, during)
            self._end_life(life, end)
            self._check_exit(life, end)
        finally:
            if life.alive:
                life.send(signal.SIGCONT)
                life.send(signal.SIGKILL)
                life.process.wait()
            life.finished.wait(10)
        if life.entered.is_set():
            self.subscribed_since = dict.fromkeys(subscribed, self.life_number) | self.subscribed_since
            self.needs_life = False
        self.expected.add_life(self.life_number, life, self.journal)
        self.counts["acknowledged"] += len(life.acks)
        steps = [ack["step"] for ack in life.acks if ack["what"] == "step"]
        self.next_step = steps[-1] + 1 if steps else first

    def _inject_faults(self, life, during):
        if not life.wait_entered(START_SECONDS):
            require(not life.alive, f"life {self.life_number} has not entered its bus after {START_SECONDS:g} s")
            return
        for fault in during:
            life.run_for(self.rng.uniform(0.0, 0.4))
            if not life.alive:
                break
            fault(self, life)
        if self.rng.random() < 0.8:
            life.run_for(self.rng.uniform(0.0, 0.6))

    def _end_life(self, life, end):
        started = time.monotonic()
        if end in {"kill", "kill_early"}:
            life.send(signal.SIGKILL)
        elif end in {"kill_all", "kill_then_couriers"}:
            life.send(signal.SIGKILL)
            if end == "kill_then_couriers":
                time.sleep(self.rng.uniform(0.0, 0.3))
            self.kill_couriers()
        elif end in {"term", "term_early"}:
            life.send(signal.SIGTERM)
        elif end in {"int", "int_early", "int_twice", "int_thrice"}:
            started = self._interrupt(life, end)
        else:
            started = None
        if started is not None:
            life.exit_requested_at = min(life.exit_requested_at or started, started)
        while (
            life.alive
            and life.exit_requested_at is None
            and time.monotonic() < (started or time.monotonic()) + START_SECONDS
        ):
            time.sleep(0.01)
        requested_at = life.exit_requested_at or time.monotonic()
        remaining = requested_at + DRAIN_SECONDS + 1.0 + SLACK_SECONDS + life.stopped_seconds - time.monotonic()
        life.wait_exit(max(remaining, 0.1))

    def _interrupt(self, life, end):
        """Send the SIGINTs of this end; return when the one that counts was sent."""
        started = time.monotonic()
        life.send(signal.SIGINT)
        for _ in range({"int_twice": 1, "int_thrice": 2}.get(end, 0)):
            life.run_for(self.rng.choice((0.0, 0.001, 0.02, 0.2)))
            life.send(signal.SIGINT)
        if end == "int_early":  # Python drops one that arrives in the callback of an import lock, for example
            life.run_for(DRAIN_SECONDS + SLACK_SECONDS / 2)
            if life.alive and "Exception ignored in" in life.log.read_text(errors="replace"):
                started = time.monotonic()
                life.send(signal.SIGINT)
        return started

    def _check_exit(self, life, end):
        """Check that the process ended as expected and raised nothing by itself."""
        code, stderr = life.process.returncode, life.log.read_text(errors="replace")
        raised = life.raised_report
        if raised is not None and end.startswith("int") and "KeyboardInterrupt" in raised["trace"]:
            return  # e.g. in the middle of an import, where Python turns it into another error
        if raised is not None and "/evsys_bus/" not in raised["trace"]:
            self.counts["raised by others"] += 1  # e.g. by uvloop when no more files can be opened
            return
        if raised is not None:
            is_refusal = raised["error"].startswith(("JournalOpenError", "OSError")) and not life.entered.is_set()
            require(is_refusal, f"life {self.life_number} raised: {raised['trace'] or raised['error']}")
            self.counts["entries refused"] += 1
            return
        expected_codes = {
            "end": {0},
            "term": {-signal.SIGTERM, 0},
            "term_early": {-signal.SIGTERM, 0},
        }.get(end, {0, 1, 130, -signal.SIGINT, -signal.SIGKILL, -signal.SIGTERM})
        require(code in expected_codes, f"life {self.life_number}, {end}, ended with {code}: {stderr[-3000:]}")

    def kill_couriers(self):
        self.counts["couriers killed"] += kill_couriers(self.directory)

    # -- the end ------------------------------------------------------------------------------------------------------

    def drain_and_check(self):
        """End all faults, deliver the rest, and check."""
        for name in ("away", "slow"):
            (self.work / name).unlink(missing_ok=True)
        if self.needs_life:
            self.counts["lives before a drain"] += 1
            self.run_life([], "end")
        environment = self.environment()
        if self.rng.random() < 0.5:
            oracle.wait_until_no_processes(self.directory, LINGER_SECONDS + SLACK_SECONDS)
        if not oracle.JournalReader(self.journal).streams():
            return  # no life has opened the journal
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            code, out, err = oracle.run_command(
                ["sync", self.journal], environment, seconds=SETTLE_SECONDS + SLACK_SECONDS
            )
            if code == 0:
                break
            require(time.monotonic() < deadline, f"sync still ends with {code}:\n{out}{err[-3000:]}")
            time.sleep(0.5)
        self.expected.positions |= self.expected.read(self.journal)
        self.check(environment)
        oracle.wait_until_no_processes(self.directory, LINGER_SECONDS + SLACK_SECONDS)

    def check(self, environment):
        """Check the status, all files and the commands; raises `Violation`."""
        journal, out = self.journal, self.work / "out"
        _, stdout, _ = oracle.run_command(["status", journal, "--json"], environment)
        for line in stdout.splitlines():
            row = json.loads(line)
            if row.get("type") in {"adapter", "delivery"} or "pending" in row:
                require(not row["pending"], f"not all was delivered: {row}")
                require(row["recorded"] == row["delivered"] + row["dead"], f"the status does not add up: {row}")
                self.counts["dead letters"] += row["dead"]
        rows = self.expected.rows()
        dead_letters = {label: self._read_dead_letters(label) for label in self.subscriptions}
        logs, board = out / "run" / "logs" / "training", out / "tensorboard"
        files = {
            "table": (out.glob("metrics*.csv*"), out / "metrics.csv", oracle.read_csv_rows),
            "logs": (out.glob("run/logs*/training/metrics*"), logs / "metrics.jsonl", oracle.read_jsonl_rows),
            "board": (board.glob("*"), board / "run", oracle.read_tensorboard_rows),
        }
        for label in self.subscribed_since:
            if label in files:
                self._compare_rows(label, rows, dead_letters[label], *files[label])
                continue
            # With retention, a new adapter gets only what was still there when it was added.
            first_life = self.subscribed_since[label] if self.retain_bytes else 0

            def is_excused(life, position, label=label, first_life=first_life):
                return life < first_life or position[1] <= dead_letters[label].get(position[0], 0)

            oracle.check_sink(label, self.expected, self.work / f"sink-{label}", is_excused)
        letters = oracle.read_dead_letters(journal, "checkpoint_upload")
        oracle.check_checkpoints(
            self.expected, self.work / "store", out / "run", letters, latest_since=self.latest_damaged_at + 1
        )
        for arguments in (["journal", "verify"], ["tail"], ["show"], ["status"]):
            code, stdout, err = oracle.run_command([*arguments, journal], environment)
            require(code == 0, f"{' '.join(arguments)} ended with {code}:\n{stdout[-1500:]}{err[-1500:]}")

    def _read_dead_letters(self, label):
        found = {}
        for name in (self.subscriptions[label], *self.old_names.get(label, ())):
            for stream, sequence in oracle.read_dead_letters(self.journal, name).items():
                found[stream] = max(sequence, found.get(stream, 0))
        return found

    def _compare_rows(self, label, rows, dead_letters, paths, main_path, read):
        """Check that the main file has all rows or, if a new file had to be used, that all files together do."""

        def is_excused(step):
            value, (stream, sequence), _ = rows[step]
            return value // 1000 < self.output_since.get(label, 0) or sequence <= dead_letters.get(stream, 0)

        try:
            oracle.compare_rows(f"{label} {main_path}", rows, read(main_path) if main_path.exists() else [], is_excused)
        except Violation:
            other_paths = [each for each in paths if each != main_path and not each.name.endswith(".run")]
            if not other_paths:
                raise
            expected = {
                (step, value) for step, (value, _, required) in rows.items() if required and not is_excused(step)
            }
            missing = expected - {pair for each in [*other_paths, main_path] if each.exists() for pair in read(each)}
            require(not missing, f"{label}: {sorted(missing)[:3]} are neither in {main_path} nor in {other_paths}")
            self.note("written beside", str(other_paths))

    def close(self, *, keep):
        (self.notes / "story").write_text("\n".join(self.history))
        if self.disk and keep:
            shutil.copytree(self.work, self.directory / "work-kept", symlinks=True, dirs_exist_ok=True)
        clean_up(self.directory)
        if not keep:
            shutil.rmtree(self.directory, ignore_errors=True)


ENDS = (
    *(
        "end",
        "end",
        "end",
        "kill",
        "kill",
        "kill",
        "kill_all",
        "kill_then_couriers",
        "kill_early",
        "term",
        "term",
        "term_early",
    ),
    *("int", "int_early", "int_twice", "int_twice", "int_thrice"),
)


def torture_directory(folder, seed, tools, only, excluded, lives=None):
    """Run all lives of one directory; returns its counts, and why it failed or None."""
    counts, fault = Counter(), None
    scenario = Scenario(folder, seed, tools, counts, only, excluded)
    number = scenario.rng.randint(6, 14) if lives is None else lives
    try:
        before_settling = scenario.rng.randint(2, 6)
        for turn in range(1, number + 1):
            scenario.run_life(faults.choose_faults(scenario, faults.DURING, (0, 1, 2, 3, 4)))
            for each in faults.choose_faults(scenario, faults.BETWEEN, (0, 1, 1, 2, 2)):
                each(scenario)
            if turn % before_settling == 0 or turn == number:
                scenario.drain_and_check()
        counts["directories"] += 1
    except (Violation, NotEndedError) as error:
        fault = str(error)
    except Exception:
        fault = traceback.format_exc()
    if fault is not None:
        (folder / "notes" / "fault").write_text(fault)
    scenario.close(keep=fault is not None)
    return counts, fault


def torture(
    seconds,
    *,
    seed,
    folder,
    only=(),
    excluded=(),
    first=0,
    max_directories=None,
    lives=None,
    jobs=1,
    on_progress=lambda _: None,
):
    """Run for this time, or for ``max_directories`` directories, ``jobs`` at a time; return counts and failures."""
    counts, failures, numbers = Counter(), [], itertools.count(first)
    tools, deadline, lock = Tools(folder), time.monotonic() + seconds, threading.Lock()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a background job of a shell; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def worker():
        while time.monotonic() < deadline and ((number := next(numbers)) - first < (max_directories or 10**9)):
            directory = folder / f"from-{number:04d}"
            directory_counts, fault = torture_directory(directory, f"{seed} {number}", tools, only, excluded, lives)
            with lock:
                counts.update(directory_counts)
                if fault is not None:
                    failures.append((number, fault))
                    on_progress(
                        f"FAILED --seed {seed} --first {number} --directories 1, kept in {directory}:\n{fault[:1500]}"
                    )
                on_progress(
                    f"{counts['lives']:>6} lives  {counts['acknowledged']:,} acknowledged  {len(failures)} failures"
                )

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(jobs)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return counts, failures


def clean_up(folder):
    """Kill the processes that work in the folder, and unmount what is mounted there."""
    for pid in processes_of(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", line.split()[1]], check=False)


def report_lines(counts, failures):
    """Yield the lines that are printed at the end."""
    headline = ("lives", "directories", "acknowledged", "entries refused", "written beside", "dead letters")
    yield "  ".join(f"{name} {counts[name]:,}" for name in headline)
    for name, count in sorted(counts.items()):
        if name not in headline:
            yield f"  {name:<28} {count:>7,}"
    yield f"failures {len(failures)}"


def main():
    parser = argparse.ArgumentParser(description="Real processes and disks under all faults; see the file.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first directory")
    parser.add_argument("--directories", type=int, help="stop after this many directories")
    parser.add_argument("--jobs", type=int, default=2, help="directories at a time")
    parser.add_argument("--only", nargs="*", default=[], metavar="KIND", help="only these kinds of faults and ends")
    parser.add_argument("--but", nargs="*", default=[], metavar="KIND", help="not these kinds of faults and ends")
    parser.add_argument("--folder", help="where the directories go; default: the system's temporary directory")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=args.folder))
    started = time.monotonic()
    try:
        counts, failures = torture(
            args.minutes * 60,
            seed=args.seed,
            folder=folder,
            only=args.only,
            excluded=args.but,
            first=args.first,
            max_directories=args.directories,
            jobs=args.jobs,
            on_progress=lambda text: print(text, flush=True),
        )
    except KeyboardInterrupt:
        clean_up(folder)
        os._exit(130)  # the threads would continue
    print(f"seed {args.seed}, {time.monotonic() - started:.0f} s")
    print("\n".join(report_lines(counts, failures)))
    for number, fault in failures:
        print(f"kept: {folder / f'from-{number:04d}'}: {fault.strip().splitlines()[0][:300]}")
    if not failures:
        shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
