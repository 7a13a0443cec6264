#!/usr/bin/env python3
"""Random lives of a run on a simulated machine, after which the files of adapters are compared with what was published.

usage: uv run python tests/simulation.py --seeds 2000 [--first N] [--jobs 2]     many seeds
       uv run python tests/simulation.py --seed N [--without ACT ...]            one seed, with its trace

Trainers of several ranks publish runs to one journal, are killed or interrupted, and resume at or before the last step,
while couriers write the files of adapters. Everything may fail: see `Simulation`. The expected content of the files is
computed from what was published, by the rules in the README and without code of the product (`ExpectedRows`). The same
seed does the same again, call by call. `random_faults.py` tests destinations that are not files.
"""

import argparse
import asyncio
import gc
import logging
import multiprocessing
import re
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from functools import partial
from hashlib import blake2b
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from simulated_followers import KINDS, ExpectedRows, SimulatedSubscription, SubscriptionGroup
from simulated_machine import JOURNAL, NUMBER_FRACTION, Machine, Process, seeded_system
from simulated_trainer import Trainer

from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import AdapterRef, Subscription
from evsys_bus.delivery.subscriptions import deregister, register
from evsys_bus.errors import CourierBusyError, RetryLaterError
from evsys_bus.journal import RetentionPolicy
from evsys_bus.testing import MachineStopped
from support.violations import Violation
from support.virtual_loop import VirtualLoop

DRAW_VERSION = 3
"""Version of how a seed is used. A seed gives the same life only with the same version, and only while the product
makes the same disk calls; so each bug found in the product also has its own test."""
WEEK = 604_800.0
SETTLE_SECONDS = 100_000.0
SEPARATOR = b"\xff" * 8
NUMBER = re.compile(rb"\xa6number\xcb(.{8})", re.DOTALL)


# -- the simulation ---------------------------------------------------------------------------------------------------


class Simulation:
    """One seed: all lives of one experiment, with their faults."""

    def __init__(self, seed, *, traced=False, without=()):
        self.seed = seed
        self.without = without
        self.rng = rng = Random(f"{seed} lives")
        self.machine = Machine(Random(f"{seed} machine"), traced=traced)
        self.segment_bytes = rng.choice((1500, 4000, 1 << 20))
        self.retain = rng.choice((None, None, RetentionPolicy(max_bytes=2000), RetentionPolicy(max_age_seconds=3600.0)))
        self.published = []
        self.recorded = set()
        """The numbers of the events in the journal."""
        self.trainers = [Trainer(self, rank) for rank in range(rng.choice((1, 1, 1, 2, 3)))]
        self.subscriptions = []
        self.groups = []
        self.uncaught_errors = []
        """Exceptions that nothing caught."""
        self.courier_process = None
        self.generations = 0
        self.inspections = 0

    @property
    def digest(self):
        """Digest of the trace; the same for the same seed."""
        return blake2b("\n".join(self.machine.trace).encode()).hexdigest()

    async def run(self):
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.uncaught_errors.append(context))
        self._add_subscriptions()
        for _ in range(self.rng.randint(2, 6)):
            self.generations += 1
            self.machine.note("LIFE", self.generations)
            await self._run_life()
            if self.rng.random() < 0.5:
                await self.drain_and_check()
            self._between_lives()
        await self.drain_and_check(include_removed=True)
        if self.uncaught_errors:
            raise Violation(f"not caught: {self.uncaught_errors[:3]}")

    # -- a life -------------------------------------------------------------------------------------------------------

    async def _run_life(self):
        self.register_subscriptions(Process(self.machine, self.rng))
        self.courier_process = None
        for subscription in self.active_subscriptions():
            if self.rng.random() < 0.7:
                self._start_courier(subscription)
        actions = (
            *[self._publish] * 10,
            *[self._wait] * 6,
            *[self._start_or_stop] * 3,
            *[self._flush] * 3,
            *(self._kill_couriers, self._change_faults, self._change_faults, self._jump, self._start_twice),
        )
        for _ in range(self.rng.randint(4, 25)):
            action = self.rng.choice(actions)
            self.machine.note(action.__name__)
            if action.__name__ not in self.without:
                await action()
        await self._end_life()

    async def _end_life(self):
        ending = self.rng.choice(("close", "close", "kill", "kill trainers", "power"))
        self.machine.note("END", ending)
        if ending == "power":
            await self._cut_power()
        elif ending == "kill":
            self.machine.count_fault("killed all")
            await self._stop_all()
        else:
            for trainer in self.trainers:
                if trainer.writer is not None:
                    if ending == "close":
                        self._run_as_trainer(trainer, trainer.close)
                    else:
                        self.machine.count_fault("killed trainer")
                        trainer.kill()
            for subscription in self.active_subscriptions():
                if subscription.task is not None and self.rng.random() < 0.7:
                    subscription.finish_courier()
            await asyncio.sleep(self.rng.choice((0.0, 0.2, 5.0)))
            await self._stop_all()
        self.update_recorded()

    async def _stop_all(self):
        for trainer in self.trainers:
            trainer.kill()
        for subscription in self.subscriptions:
            subscription.kill_courier()
        for subscription in self.subscriptions:
            await subscription.wait_for_courier()
        if self.courier_process is not None:
            self.courier_process.kill()

    def _run_as_trainer(self, trainer, action, *args):
        """Run an action of a trainer, which may be killed or interrupted in it."""
        try:
            action(*args)
        except MachineStopped:
            trainer.kill()
        except KeyboardInterrupt:
            self._handle_interrupt(trainer)
        if trainer.writer is not None and not trainer.process.alive:
            trainer.kill()
        self.update_recorded()

    def _handle_interrupt(self, trainer):
        """Let an interrupted trainer continue, or close it, in which it may be interrupted again and killed."""
        rng = self.rng
        trainer.process.interrupt_at = None
        trainer.unacknowledged = []  # an interrupted publish does not acknowledge
        if rng.random() < 0.3:
            return
        if rng.random() < 0.5:
            trainer.process.interrupt_at = trainer.process.calls + rng.randint(1, 10)
        try:
            trainer.close()
        except (KeyboardInterrupt, MachineStopped):
            trainer.kill()

    async def _publish(self):
        trainer = self.rng.choice(self.trainers)
        if trainer.writer is None:
            self._run_as_trainer(trainer, trainer.open)
        for _ in range(self.rng.randint(1, 4)):
            if trainer.writer is None:
                return
            self._run_as_trainer(trainer, trainer.publish, self.rng.choice((1, 3, 10)))
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.choice((0.0, 0.05, 1.0)))

    async def _flush(self):
        for trainer in self.trainers:
            if trainer.writer is not None:
                self._run_as_trainer(trainer, trainer.flush)

    async def _wait(self):
        await asyncio.sleep(self.rng.choice((0.0, 0.1, 1.0, 10.0, 400.0 if self.rng.random() < 0.1 else 1.0)))

    def _start_courier(self, subscription):
        rng, before = self.rng, self.courier_process
        if before is None or not before.alive:
            max_calls = rng.choice((None, None, rng.randint(1, 300)))
            self.courier_process = Process(self.machine, subscription.rng, max_calls=max_calls)
        subscription.start_courier(self.courier_process)

    async def _start_or_stop(self):
        subscription = self.rng.choice(self.active_subscriptions())
        if subscription.task is None:
            self._start_courier(subscription)
        elif subscription.task.done():
            await subscription.wait_for_courier()
        elif self.rng.random() < 0.4:
            subscription.stop_courier()
            await subscription.wait_for_courier()

    async def _start_twice(self):
        subscription = self.rng.choice(self.active_subscriptions())
        if (
            subscription.task is None
            or subscription.task.done()
            or not subscription.process.alive
            or self.machine.failure_rate
        ):
            return
        await asyncio.sleep(0.1)
        process = Process(self.machine, self.rng, without_faults=True)
        if subscription.task.done() or not self.machine.disk.is_locked(f"{JOURNAL}/couriers/{subscription.name}.lock"):
            return
        self.machine.count_fault("second courier", subscription.name)
        try:
            await subscription.make_courier(process).run()
        except CourierBusyError:
            process.kill()
            return
        raise Violation(f"two couriers at once deliver to {subscription.name}")

    async def _kill_couriers(self):
        self.machine.count_fault("killed couriers")
        for subscription in self.subscriptions:
            if subscription.task is not None and self.rng.random() < 0.7:
                subscription.kill_courier()
                await subscription.wait_for_courier()

    async def _change_faults(self):
        machine, rng = self.machine, self.rng
        machine.clear_faults()
        kind = rng.choice(("fine", "fine", "full", "failing", "unreadable"))
        machine.note("weather", kind)
        if kind == "full":
            machine.disk.room = rng.choice((0, 500, 5000))
        elif kind == "failing":
            machine.failure_rate = rng.choice((0.01, 0.1))
        elif kind == "unreadable":
            streams = sorted({path.rpartition("/")[0] for path in machine.disk.paths()})
            machine.disk.unreadable.add(rng.choice([JOURNAL, *streams]))

    async def _jump(self):
        seconds = self.rng.choice((-1, 1)) * self.rng.choice((2.0, 3600.0, self.rng.uniform(0, WEEK)))
        self.machine.count_fault("clock back" if seconds < 0 else "clock forward", round(seconds))
        self.machine.clock.jump(seconds)

    async def _cut_power(self):
        """Cut the power in the middle of a random call."""
        machine, disk = self.machine, self.machine.disk
        machine.count_fault("power cut")
        disk.stop(disk.calls + self.rng.randint(1, 60), self.rng.random())
        trainer = self.rng.choice(self.trainers)
        if trainer.writer is not None:
            self._run_as_trainer(trainer, trainer.publish, 5)
        await asyncio.sleep(self.rng.choice((0.1, 1.0)))
        for each in self.trainers:
            each.kill()
        await self._stop_all()
        disk.restart("kill")
        self.update_recorded()
        before = set(self.recorded)
        machine.cut_power()
        data = self._bytes_of_journal()
        self.recorded = {number for number in before if self.published[number].frame in data}
        for number in sorted(before - self.recorded):
            record = self.published[number]
            if record.safe:
                raise Violation(f"a power cut removed a synced event: {record}")
            record.lost = True

    # -- between lives ------------------------------------------------------------------------------------------------

    def active_subscriptions(self):
        return [each for each in self.subscriptions if not each.is_removed]

    def register_subscriptions(self, process):
        """Register the subscriptions, as a program does at its start."""
        active = self.active_subscriptions()
        for group in {each.group: None for each in active if not each.group.is_registered}:
            group.is_registered = True
            group.excused |= {each.number for each in self.published if each.number not in self.recorded}
        try:
            deregister(JOURNAL, [each.name for each in active], 0, process)
            register(
                JOURNAL, [Subscription(each.name, AdapterRef("a"), policy=each.policy) for each in active], process
            )
        except OSError as error:
            self.machine.note("not registered", error)
        process.kill()

    def _add_subscriptions(self):
        for kind in self.rng.choice((["csv"], ["jsonl"], [*KINDS])):
            self._add_subscription(kind)

    def _add_subscription(self, kind):
        ranks = self.rng.choice(((0,), None))
        group = SubscriptionGroup(kind, len(self.groups), ranks)
        self.groups.append(group)
        self.subscriptions.append(SimulatedSubscription(self, group.label, group))

    def _between_lives(self):
        actions = (
            *[self._damage] * 3,
            *(
                self._add_csv_subscription,
                self._remove_or_restore,
                self._rename,
                self._duplicate,
                self._remove_output,
                self._remove_cursors,
            ),
            *(self._move_host, self._jump_now),
        )
        for _ in range(self.rng.choice((0, 0, 1, 1, 2))):
            action = self.rng.choice(actions)
            if action.__name__ not in self.without:
                action()
        self.machine.clear_faults()

    def _add_csv_subscription(self):
        if len(self.groups) < 4:
            self.machine.count_fault("follower added")
            self._add_subscription("csv")  # a second local_logger would use the files of the first

    def _remove_or_restore(self):
        subscription = self.rng.choice(self.subscriptions)
        if subscription.is_removed:
            self.machine.count_fault("follower back", subscription.name)
            subscription.is_removed = False
            subscription.group.may_split_files = True
        elif not subscription.is_removed and len(self.active_subscriptions()) > 1:
            self.machine.count_fault("follower removed", subscription.name)
            subscription.is_removed = True

    def _rename(self):
        subscription = self.rng.choice(self.active_subscriptions())
        name = f"{subscription.group.label}-{len(self.subscriptions)}"
        self.machine.count_fault("follower renamed", subscription.name, name)
        subscription.is_removed = subscription.group.may_split_files = True
        self.subscriptions.append(SimulatedSubscription(self, name, subscription.group))

    def _duplicate(self):
        """Add another subscription with the same output."""
        group = self.rng.choice(self.groups)
        if sum(each.group is group for each in self.active_subscriptions()) < 3:
            name = f"{group.label}-{len(self.subscriptions)}"
            self.machine.count_fault("second follower", name)
            group.may_split_files = True
            self.subscriptions.append(SimulatedSubscription(self, name, group))

    def _remove_output(self):
        """Remove a file of rows, as a person might; its rows may be missing from then on."""
        group, record = self.rng.choice(self.groups), self.rng.choice(self.published or [None])
        if record is None:
            return
        files = group.kind.read_files(self.machine.disk, record.run, record.rank)[self.rng.choice(group.kind.rows)]
        if files:
            path = self.rng.choice(sorted(files))
            self.machine.count_fault("output removed", path)
            group.excused.update(files[path])
            self.machine.disk.take_away(path)

    def _remove_cursors(self):
        self.machine.count_fault("cursors removed")
        self.machine.disk.take_away(f"{JOURNAL}/cursors")
        for group in self.groups:
            group.may_split_files = True

    def _damage(self):
        rng, disk = self.rng, self.machine.disk
        small_files = [path for path in disk.paths() if path.startswith(f"{JOURNAL}/c") and path.endswith(".json")]
        if not small_files:
            return
        path = rng.choice(small_files)
        folder = path[len(JOURNAL) + 1 :].partition("/")[0]
        kind = "cursor" if folder == "cursors" else path.rpartition("/")[2].split(".")[-2]
        how = rng.choice(("cut", "empty", "zeros", "garbage", "other version", "removed", "directory"))
        self.machine.count_fault(f"{kind} {how}", path)
        if kind == "cursor":
            for subscription in self.subscriptions:
                if path.endswith(f"/{subscription.name}.json"):
                    subscription.group.may_split_files = True
        data = disk.contents(path)
        if how in {"removed", "directory"}:
            disk.take_away(path)
            if how == "directory":
                disk.make_directory(path)
            return
        damaged = {
            "cut": bytes(data[: rng.randint(0, max(0, len(data) - 1))]),
            "empty": b"",
            "zeros": bytes(len(data)),
            "garbage": rng.randbytes(len(data)),
            "other version": b'{"version": 9, "streams": ["?"]}',
        }[how]
        disk.put(path, damaged)

    def _move_host(self):
        self.machine.count_fault("another host")
        self.machine.host += 1

    def _jump_now(self):
        seconds = self.rng.uniform(-WEEK, WEEK)
        self.machine.count_fault("clock back" if seconds < 0 else "clock forward", round(seconds))
        self.machine.clock.jump(seconds)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _in_journal(self):
        """Return the numbers of the events in the segments, found in their bytes."""
        data = self._bytes_of_journal()
        found = (struct.unpack(">d", each)[0] for each in NUMBER.findall(data))
        return {int(each) for each in found if 0 < each < 1e9 and int(each) + NUMBER_FRACTION == each} | {
            each.number for each in self.published if each.kind not in {"step", "eval"} and each.frame in data
        }

    def _bytes_of_journal(self):
        disk = self.machine.disk
        return SEPARATOR.join(bytes(disk.contents(path)) for path in disk.paths() if path.endswith(".seg"))

    def update_recorded(self):
        """Update what is in the journal; every acknowledged event must be there."""
        recorded = self._in_journal()
        for each in self.published:
            if each.number in recorded:
                each.seen = True
            elif each.acknowledged and not each.seen and any(group.serves(each) for group in self.groups):
                raise Violation(f"acknowledged, and not in the journal: {each}")
        self.recorded = recorded

    def note_pruned(self):
        """Update what is in the journal after retention may have pruned it."""
        recorded = self._in_journal()
        gone = self.recorded - recorded
        if gone:
            self.machine.count_fault("retention", len(gone))
        self.recorded = recorded

    async def drain_and_check(self, *, include_removed=False):
        """End all faults, let couriers deliver the rest, and check the files."""
        machine = self.machine
        machine.note("SETTLE")
        machine.clear_faults()
        await self._stop_all()
        self.update_recorded()
        if include_removed:
            for group in self.groups:
                members = [each for each in self.subscriptions if each.group is group]
                if all(each.is_removed for each in members):
                    members[-1].is_removed = False
        process = Process(machine, self.rng, without_faults=True)
        self.register_subscriptions(process)
        for subscription in self.active_subscriptions():
            subscription.start_courier(Process(machine, self.rng, without_faults=True))
            subscription.finish_courier()
        for subscription in self.active_subscriptions():
            try:
                await asyncio.wait_for(asyncio.shield(subscription.task), SETTLE_SECONDS)
            except TimeoutError:
                raise Violation(f"{subscription.name} makes no progress at {subscription.courier.counts}") from None
            except (OSError, RetryLaterError) as error:
                raise Violation(f"{subscription.name} cannot continue: {error!r}") from error
            await subscription.wait_for_courier()
            subscription.process.kill()
        self.check()

    def check(self):
        """Check all files and delivery statuses; raises `Violation`."""
        self.inspections += 1
        for group in self.groups:
            if any(each.group is group for each in self.active_subscriptions()):
                self._check_files(group)
        statuses = {each.name: each for each in read_progress(JOURNAL, self.machine.disk)}
        for subscription in self.active_subscriptions():
            status = statuses.get(subscription.name)
            if status is None:
                raise Violation(f"there is no delivery status of {subscription.name}")
            if status.pending or status.busy or status.recorded != status.delivered + status.dead:
                raise Violation(f"the delivery status is wrong: {status}")

    def _check_files(self, group):
        expected = {}
        for record in self.published:
            if group.serves(record) and record.seen:
                required = not record.lost and record.number not in group.excused
                for row_kind in group.kind.rows:
                    expected.setdefault((record.rank, record.run, row_kind), ExpectedRows(row_kind)).add(
                        record, required
                    )
        for (rank, run, row_kind), of_run in expected.items():
            files = group.kind.read_files(self.machine.disk, run, rank)[row_kind]
            self._check_rows(
                f"{group.label}, {run}, {row_kind}s", of_run.rows, files, may_split_files=group.may_split_files
            )

    def _check_rows(self, label, expected, files, *, may_split_files):
        found = set()
        for path, lines in files.items():
            rows = [each for each in lines if each is not None]
            if may_split_files:  # a row of a step before a start may have been written before or after that start
                rows = [*dict.fromkeys(each for each in rows if self.published[each].before_start)] + [
                    each for each in rows if not self.published[each].before_start
                ]
            if None in lines and any(expected.get(each) for each in lines[lines.index(None) :]):
                raise Violation(f"{label}: torn, with rows after it: {path}")
            if len(set(rows)) < len(rows):
                duplicates = sorted(each for each, count in Counter(rows).items() if count > 1)
                raise Violation(f"{label}: doubled in {path}: {self._examples(duplicates)}")
            certain = [
                each
                for each in rows
                if expected.get(each) and not (may_split_files and self.published[each].before_start)
            ]
            if certain != sorted(certain):
                raise Violation(f"{label}: out of order in {path}: {rows}")
            found |= set(rows)
            stale = [each for each in rows if each not in expected]
            if stale and (len(files) == 1 or not may_split_files):
                raise Violation(f"{label}: replaced by a later life, but still in {path}: {self._examples(stale)}")
        missing = [number for number, required in expected.items() if required and number not in found]
        if missing:
            raise Violation(f"{label}: lost {len(missing)} of {len(expected)}: {self._examples(missing)}")
        if len(files) > 1 and not may_split_files:
            raise Violation(f"{label}: in several files: {sorted(files)}")

    def _examples(self, numbers):
        return [self.published[each] for each in numbers[:5]]


gc.freeze()


def run_seed(seed, *, traced=False, without=()):
    """Run one seed; raises `Violation`."""
    simulation = Simulation(seed, traced=traced, without=without)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # retries are logged, thousands of times
    gc.collect()
    gc.disable()  # the seed does not determine when it runs, and a finalizer may hold a lock
    hook, threading.excepthook = threading.excepthook, lambda args: _on_thread_exception(simulation, args)
    try:
        loop = lambda: VirtualLoop(simulation.machine.clock)  # noqa: E731
        system = seeded_system(Random(f"{seed} entropy"), simulation.machine.clock)
        with system, asyncio.Runner(loop_factory=loop) as runner:
            runner.run(simulation.run())
    except Exception as error:
        error.simulation = simulation
        raise
    finally:
        gc.enable()
        threading.excepthook = hook
        logging.disable(before)
    return simulation


def _on_thread_exception(simulation, args):
    if not issubclass(args.exc_type, MachineStopped):
        simulation.uncaught_errors.append(args.exc_value)


def _run_seeds(seeds, without=()):
    """Run these seeds; returns faults, lives, published events, inspections and failures."""
    faults, lives, published, inspections, failures = Counter(), 0, 0, 0, []
    for seed in seeds:
        try:
            simulation = run_seed(seed, without=without)
        except Exception as error:  # reported at the end
            simulation = getattr(error, "simulation", None)
            failures.append((seed, f"{type(error).__name__}: {error}", simulation and simulation.machine.trace[-15:]))
            if not isinstance(error, Violation):
                failures[-1] = (seed, "".join(traceback.format_exception(error)[-6:]), None)
            if simulation is None:
                continue
        faults += simulation.machine.faults
        lives += simulation.generations
        published += len(simulation.published)
        inspections += simulation.inspections
    return faults, lives, published, inspections, failures


def main():
    """Run the long form of the test."""
    parser = argparse.ArgumentParser(description="Random lives of a run on a simulated machine; see the file.")
    parser.add_argument("--seeds", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="to replay: the one that failed, with its trace")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--without", nargs="*", default=(), help="actions to leave out, such as _jump, to find the cause"
    )
    args = parser.parse_args()
    if args.seed is not None:
        run_seed(args.seed, traced=True, without=args.without)
        return 0
    started = time.monotonic()
    seeds = range(args.first, args.first + args.seeds)
    parts = [seeds[start : start + 20] for start in range(0, len(seeds), 20)]
    done = 0
    faults, lives, published, inspections, failures = Counter(), 0, 0, 0, []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for seeds_of_part, part in zip(parts, pool.imap(partial(_run_seeds, without=args.without), parts), strict=True):
            faults += part[0]
            lives += part[1]
            published += part[2]
            inspections += part[3]
            failures += part[4]
            for seed, why, _ in part[4]:
                print(f"seed {seed}: {why[:600]}", flush=True)
            done += len(seeds_of_part)
            if done % 100 == 0:
                print(f"{done} seeds, {len(failures)} failed, {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(f"{len(seeds)} seeds, {lives} lives, {published} events, {inspections} inspections of all files")
    print("faults:", ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items())))
    print(f"{len(failures)} seeds failed, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
