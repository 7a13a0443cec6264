"""Interrupts at random moments: SIGINT, once or twice, while short buses are entered, published to and left.

    uv run python tests/interrupts.py --count 5000 [--seed 1]

Each child process has one form of entering a bus and its own journals; a system timer interrupts it between any two
instructions. After each bus, everything acknowledged must be in the journal once, and nothing may be left behind: no
lock, thread or signal handler, and no later KeyboardInterrupt. After some buses, the CSV file of an adapter must have
every row once. The seed determines the moments as far as that is possible with real processes.

An interrupt may break asyncio itself, even without a bus: a loop that had taken a task's next step from its queue never
runs it, and ``Runner.close`` waits for that task forever. Such a runner gets a third Ctrl-C, as a person would do, and
is counted. Any other hang is a failure: the child is ended, and another one continues with its journal.
"""

import argparse
import asyncio
import collections
import csv
import json
import logging
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from evsys_bus import Callback, Eval, EventBus, LoopState, StepEnd, TrainingBatch, build_callbacks
from evsys_bus.codec import decode
from evsys_bus.disk import OsDisk
from evsys_bus.journal import JournalReader, layout

FORMS = ("with", "with in asyncio", "with in uvloop", "async with asyncio", "async with uvloop")
HANG_SECONDS = 30
STUCK_SECONDS = 2
"""How long a loop must wait, with a task that nothing will ever wake, to count as broken."""
MAX_WRONG = 20
BUSES_PER_JOURNAL = 10
EVENTS_PER_BUS = 200
COUNTS = ("interrupts", "buses", "not_left", "torn_runners", "lost_steps")
COUNTERS = ("phases", "lines", "raised")


class Program:
    """One child: enters and leaves buses, and records what went wrong."""

    def __init__(self, form: str, seed: int, folder: Path) -> None:
        self.form, self.folder = form, folder
        self.random = random.Random(f"{form} {seed}")
        self.wrong: list[str] = []
        self.phases: collections.Counter[str] = collections.Counter()
        self.lines: collections.Counter[str] = collections.Counter()
        self.raised: collections.Counter[str] = collections.Counter()
        self.interrupts = self.buses = self.not_left = self.torn_runners = self.lost_steps = self.step = 0
        self.runner: asyncio.Runner | None = None
        self.journal = self.out = Path()
        self.acknowledged: list[tuple[str, int]] = []
        self.second_after: float | None = None
        self.waits_for_body = False
        self.started = self.entry_seconds = self.body_seconds = 0.0
        self.interrupt_sites: list[str] = []
        self.ignored: list[object] = []
        sys.unraisablehook = lambda unraisable: self.ignored.append(unraisable.object)
        self.deadline = float("inf")
        threading.Thread(target=self._watch, daemon=True).start()
        self.threads = set(threading.enumerate())
        signal.signal(signal.SIGALRM, self._raise_interrupt)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

    # -- the interrupts -----------------------------------------------------------------------------------------------

    def _raise_interrupt(self, number: int, frame) -> None:
        after, self.second_after = self.second_after, None
        if after is not None:
            signal.setitimer(signal.ITIMER_REAL, after)
        phase, line = locate(frame)
        self.phases[phase] += 1
        self.lines[line] += 1
        self.interrupt_sites.append(f"{phase} {line}")
        self.interrupts += 1
        signal.raise_signal(signal.SIGINT)

    def schedule_interrupt(self, max_delay: float) -> None:
        """Schedule an interrupt: 40 % in the body, 40 % before the exit, 20 % at any time; half of them twice."""
        self.second_after = self.random.uniform(1e-5, 0.01) if self.random.random() < 0.5 else None
        position = self.random.random()
        self.waits_for_body = position < 0.4
        if not self.waits_for_body:
            limit = self.entry_seconds + 1.1 * self.body_seconds if position < 0.8 else max_delay
            signal.setitimer(signal.ITIMER_REAL, max(1e-5, self.random.uniform(0.0, limit)))

    def cancel_interrupt(self) -> None:
        self.second_after, self.waits_for_body = None, False
        signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _watch(self) -> None:
        """Interrupt a stuck runner again, as a person would, and end a child that hangs."""
        still_ticks = 0
        while True:
            time.sleep(0.1)
            still_ticks = still_ticks + 1 if self._is_torn() else 0
            if still_ticks > 10 * STUCK_SECONDS:
                still_ticks = 0
                self.lost_steps += 1
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            if time.monotonic() > self.deadline:
                stacks = [traceback.format_stack(frame)[-9:] for frame in sys._current_frames().values()]
                self.wrong.append(f"hangs; interrupted at {self.interrupt_sites}; {self._tasks()}: {stacks}")
                self.report(unchecked=[str(self.journal), str(self.out), self.acknowledged])
                os._exit(70)

    def _tasks(self) -> list[asyncio.Task]:
        loop = getattr(self.runner, "_loop", None)
        try:
            return [] if loop is None else list(asyncio.all_tasks(loop))
        except RuntimeError:
            return []  # the set of tasks changed during the iteration

    def _is_torn(self) -> bool:
        """Return whether the loop waits for a task whose next step is not scheduled anywhere."""
        frame = sys._current_frames().get(threading.main_thread().ident)
        names = set()
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        if "_cancel_all_tasks" not in names or ("_run_once" in names and "select" not in names):
            return False
        waits = [getattr(each, "_fut_waiter", None) for each in self._tasks()]
        return any(each is None or each.done() for each in waits)

    # -- one bus ------------------------------------------------------------------------------------------------------

    def make_bus(self, journal: Path, out: Path, couriers: str = "thread") -> EventBus:
        program = self

        class Hooks(Callback):
            def on_step_end(self, state, step_idx, batch, metrics):
                metrics["more"] = sum(range(50))
                if step_idx % 4 == 0:
                    bus.publish(Eval(state, step_idx, "nested", {"v": 1.0}))
                    program.acknowledged.append(("eval", step_idx))
                if step_idx % 8 == 0:
                    self.spawn(asyncio.sleep, 0.0)

        specs = [{"kind": "csv_metrics", "params": {"out_path": str(out)}, "placement": "follow"}]
        followed = build_callbacks(specs)
        bus = EventBus([Hooks(), *followed], journal=journal, couriers=couriers, drain_timeout=5, linger_seconds=5)
        return bus  # named, because the hook refers to it

    def publish(self, bus: EventBus, state: LoopState) -> None:
        self.step += 1
        step = self.step
        bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 1.0 / step}))
        self.acknowledged.append(("step", step))

    def sync_body(self, bus: EventBus, state: LoopState) -> None:
        with bus:
            self.on_body_start()
            for _ in range(EVENTS_PER_BUS):
                self.publish(bus, state)
            self.on_body_end()

    def on_body_start(self) -> None:
        self.entry_seconds = time.monotonic() - self.started
        if self.waits_for_body:
            signal.setitimer(signal.ITIMER_REAL, max(1e-5, self.random.uniform(0.0, 1.1 * self.body_seconds)))

    def on_body_end(self) -> None:
        self.body_seconds = time.monotonic() - self.started - self.entry_seconds

    async def sync_body_in_loop(self, bus: EventBus, state: LoopState) -> None:
        self.sync_body(bus, state)

    async def async_body(self, bus: EventBus, state: LoopState) -> None:
        async with bus:
            self.on_body_start()
            for _ in range(EVENTS_PER_BUS):
                self.publish(bus, state)
                await asyncio.sleep(0)
            self.on_body_end()

    def run(self, bus: EventBus, state: LoopState) -> None:
        if self.form == "with":
            self.sync_body(bus, state)
            return
        factory = asyncio.new_event_loop
        if self.form.endswith("uvloop"):
            import uvloop

            factory = uvloop.new_event_loop
        main = self.async_body if self.form.startswith("async") else self.sync_body_in_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            self.runner = runner
            runner.get_loop()
            runner.run(main(bus, state))

    def run_bus(self, journal: Path, out: Path, max_delay: float | None, couriers: str) -> float:
        """Run one bus, interrupted unless ``max_delay`` is None; returns how long it took."""
        self.journal, self.out = journal, out
        state = LoopState(self.step, 10**9, journal.parent / "run")
        bus = self.make_bus(journal, out, couriers)
        self.started = started = time.monotonic()
        self.deadline = started + HANG_SECONDS
        raised, before = "nothing", self.interrupts
        self.interrupt_sites, self.ignored = [], []
        try:
            if max_delay is not None:
                self.schedule_interrupt(max_delay)
            self.run(bus, state)
            self.cancel_interrupt()
        except BaseException as error:
            self.cancel_interrupt()
            raised = type(error).__name__
            if max_delay is None:
                self.wrong.append(f"raised {error!r} without an interrupt")
        elapsed = time.monotonic() - started
        if self.interrupts > before:
            # Python ignores exceptions of finalizers and weak reference callbacks.
            raised = "nothing; Python ignored it" if raised == "nothing" and self.ignored else raised
            self.raised[raised] += 1
            if raised == "nothing":
                self.wrong.append(f"an interrupt was swallowed; interrupted at {self.interrupt_sites}")
        for _ in range(3):  # gives a late exception the chance to be raised here
            time.sleep(0)
        if elapsed > HANG_SECONDS / 2:
            self.wrong.append(f"took {elapsed:.1f} s; interrupted at {self.interrupt_sites}")
        self.buses += 1
        self.runner = None
        self.check(bus, journal)
        self.deadline = float("inf")
        return elapsed

    def check(self, bus: EventBus, journal: Path) -> None:
        if bus.health().state == "open" or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            # The interrupt came before the first instruction of the exit or at its very end, or it broke the loop. A
            # program would leave the bus at its end, as here.
            self.not_left += 1
            bus.__exit__(None, None, None)
        deadline = time.monotonic() + 5
        while (leftover := self.leftover_threads()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if leftover:
            names = {each.ident: each.name for each in threading.enumerate() if each not in self.threads}
            stacks = [
                traceback.format_stack(frame)[-6:] for ident, frame in sys._current_frames().items() if ident in names
            ]
            self.wrong.append(f"threads left: {leftover}: {stacks}; interrupted at {self.interrupt_sites}")
            self.threads |= set(threading.enumerate())
        for stream in JournalReader(journal).streams() if journal.exists() else ():
            if OsDisk().is_locked(f"{journal}/{stream}/{layout.LOCK}"):
                self.wrong.append(f"{stream} is locked")
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            self.wrong.append("the handler of SIGTERM is not what it was")
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # the interrupt broke `asyncio.Runner`
            self.torn_runners += 1
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def leftover_threads(self) -> list[str]:
        return [each.name for each in threading.enumerate() if each not in self.threads and each.is_alive()]

    def check_journal(self, journal: Path, out: Path) -> None:
        """Check that everything acknowledged was recorded once and delivered once."""
        reader = JournalReader(journal)
        found: collections.Counter[tuple[str, int]] = collections.Counter()
        for stream in reader.streams():
            for record in reader.read(stream):
                event = decode(record.payload).event
                if isinstance(event, StepEnd):
                    found["step", event.step_idx] += 1
                elif isinstance(event, Eval):
                    found["eval", event.step_idx] += 1
        lost = [each for each in self.acknowledged if not found[each]]
        duplicates = [each for each, count in found.items() if count > 1]
        if lost:
            self.wrong.append(f"acknowledged and not in the journal: {lost}")
        if duplicates:
            self.wrong.append(f"recorded twice: {duplicates}")
        rows = [int(row["step"]) for row in csv.DictReader(out.open())] if out.exists() else []
        undelivered = sorted({step for kind, step in found if kind == "step"} - set(rows))
        if undelivered:
            self.wrong.append(f"in the journal and not in the file: {undelivered}")
        if len(rows) != len(set(rows)) or rows != sorted(rows):
            self.wrong.append(f"rows doubled or out of order: {[row for row in rows if rows.count(row) > 1]}")
        if unexpected := set(rows) - {step for _, step in found}:
            self.wrong.append(f"in the file and not in the journal: {unexpected}")
        self.acknowledged.clear()

    def report(self, **more: object) -> None:
        print(json.dumps({key: getattr(self, key) for key in (*COUNTS, "wrong", *COUNTERS)} | more), flush=True)

    def run_all(self, count: int) -> None:
        while self.interrupts < count and len(self.wrong) < MAX_WRONG:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            journal, out = folder / "journal", folder / "m.csv"
            # The first measures how long a bus takes, the last delivers the rest; both detect late exceptions.
            max_delay = 1.1 * self.run_bus(journal, out, None, "thread")
            couriers = "process" if self.random.random() < 0.02 else "thread"
            for _ in range(2 if couriers == "process" else BUSES_PER_JOURNAL):
                self.run_bus(journal, out, max_delay if couriers == "thread" else 0.5, couriers)
            self.run_bus(journal, out, None, "thread")
            self.check_journal(journal, out)
            shutil.rmtree(folder, ignore_errors=True)


def locate(frame) -> tuple[str, str]:
    """Return the phase of the bus that the frame belongs to, and the innermost line of evsys_bus."""
    phase, line = "", ""
    while frame is not None:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not line and ("evsys_" in file or file.startswith("<evsys-bus")):
            line = f"{Path(file).name if '/' in file else '<publish>'}:{frame.f_lineno} {name}"
        if not phase:
            if name == "on_step_end":
                phase = "hook"
            elif "/codec/" in file:
                phase = "encode"
            elif "/journal/" in file:
                phase = "write"
            elif name in {"__aexit__", "__exit__"} and "event_bus" in file:
                phase = "exit"
            elif name in {"__aenter__", "__enter__", "_open"} and "event_bus" in file:
                phase = "entry"
            elif file.startswith("<evsys-bus"):
                phase = "publish"
        frame = frame.f_back
    return phase or "the program, or its loop", line or "(elsewhere)"


def run_child(form: str, count: int, seed: int, folder: Path) -> None:
    logging.disable(logging.CRITICAL)
    program = Program(form, seed, folder)
    program.run_all(count)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program.report()


def check_after_hang(arguments: list[str]) -> None:
    """Check the journal of a child that hung: everything acknowledged is there and can be delivered."""
    logging.disable(logging.CRITICAL)
    journal, out, acknowledged = json.loads(arguments[0])
    program = Program("with", 0, Path(journal).parent)
    program.run_bus(Path(journal), Path(out), None, "thread")
    program.acknowledged = [tuple(each) for each in acknowledged]
    program.check_journal(Path(journal), Path(out))
    program.report()


def interrupt_all_forms(count: int, seed: int, per_child: int = 250) -> dict[str, dict]:
    """Interrupt ``count`` times, divided among the forms; returns the results by form."""
    with ThreadPoolExecutor(2) as pool:
        totals = pool.map(lambda form: _interrupt_form(form, -(-count // len(FORMS)), seed, per_child), FORMS)
        return dict(zip(FORMS, totals, strict=True))


def _interrupt_form(form: str, share: int, seed: int, per_child: int) -> dict:
    total = dict.fromkeys(COUNTS, 0) | {"wrong": []}
    counters = {key: collections.Counter() for key in COUNTERS}
    round_ = 0
    while total["interrupts"] < share and len(total["wrong"]) < MAX_WRONG:
        number = seed * 1000 + round_
        round_ += 1
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            child_report = _run_script("--child", form, str(min(per_child, share)), str(number), folder)
            unchecked = child_report.pop("unchecked", None)
            if unchecked is not None:
                child_report["wrong"] += [
                    f"after it: {each}" for each in _run_script("--after", json.dumps(unchecked))["wrong"]
                ]
        total["wrong"] += [f"seed {number}: {each}" for each in child_report["wrong"]]
        for key in COUNTS:
            total[key] += child_report.get(key, 0)
        for key, counter in counters.items():
            counter.update(child_report.get(key, {}))
    return total | counters


def _run_script(*arguments: str) -> dict:
    """Run this script in a process; returns its report."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=900, check=False
    )
    try:
        child_report = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        child_report = {"wrong": []}
    if done.returncode and not child_report["wrong"]:
        child_report["wrong"].append(f"exit {done.returncode}: {done.stderr[-3000:]}")
    return child_report


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
        return 0
    if sys.argv[1:2] == ["--after"]:
        check_after_hang(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    started, wrong_count = time.monotonic(), 0
    for form, total in interrupt_all_forms(args.count, args.seed).items():
        print(f"{form}: {total['interrupts']} interrupts, {total['buses']} buses, {len(total['wrong'])} wrong")
        print(
            f"  raised: {dict(total['raised'])}; not left by themselves: {total['not_left']}, "
            f"runners of asyncio torn: {total['torn_runners']}, and stuck: {total['lost_steps']}"
        )
        print(f"  hit: {dict(total['phases'].most_common())}; {len(total['lines'])} lines, most often:")
        for line, count in total["lines"].most_common(8):
            print(f"    {count:5} {line}")
        for each in total["wrong"]:
            print(f"  WRONG: {each}")
        wrong_count += len(total["wrong"])
    print(f"seed {args.seed}, {time.monotonic() - started:.0f} s, {wrong_count} wrong")
    return 1 if wrong_count else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    sys.exit(main())
