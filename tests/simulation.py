#!/usr/bin/env python3
"""Random lives of a run on a simulated machine, after which the files of adapters are compared with what was published.

usage: uv run python tests/simulation.py --seeds 2000 [--first N] [--jobs 2]     many seeds
       uv run python tests/simulation.py --seed N [--without ACT ...]            one seed, with its trace

Trainers of several ranks publish runs to one journal, are killed or interrupted, and resume at or before the last step,
while couriers write the files of adapters. Everything may fail: see `Simulation`. The expected content of the files is
computed from what was published, by the rules in the README and without code of the product (`Owed`). The same seed
does the same again, call by call. `random_faults.py` tests destinations that are not files.
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

from simulated_followers import KINDS, Follower, Group, Owed
from simulated_machine import JOURNAL, THIRD, Fault, Machine, Process, VirtualLoop, seeded_system
from simulated_trainer import Trainer

from evsys_bus.delivery.accounts import accounts
from evsys_bus.delivery.followed import Followed, Recipe
from evsys_bus.delivery.roster import enlist, strike_off
from evsys_bus.errors import CourierBusyError, RetryLaterError
from evsys_bus.journal import Retain
from evsys_bus.testing import MachineStopped

DRAW = 3
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
        self.chance = chance = Random(f"{seed} lives")
        self.machine = Machine(Random(f"{seed} machine"), traced=traced)
        self.segment_bytes = chance.choice((1500, 4000, 1 << 20))
        self.retain = chance.choice((None, None, Retain(max_bytes=2000), Retain(max_age_seconds=3600.0)))
        self.published = []
        self.there = set()
        """The numbers of the events in the journal."""
        self.trainers = [Trainer(self, rank) for rank in range(chance.choice((1, 1, 1, 2, 3)))]
        self.followers = []
        self.groups = []
        self.troubles = []
        """Exceptions that nothing caught."""
        self.courier_process = None
        self.lives = 0
        self.inspections = 0

    @property
    def digest(self):
        """Digest of the trace; the same for the same seed."""
        return blake2b("\n".join(self.machine.trace).encode()).hexdigest()

    async def play(self):
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.troubles.append(context))
        self._add_followers()
        for _ in range(self.chance.randint(2, 6)):
            self.lives += 1
            self.machine.note("LIFE", self.lives)
            await self._live()
            if self.chance.random() < 0.5:
                await self.settle()
            self._between_lives()
        await self.settle(everybody=True)
        if self.troubles:
            raise Fault(f"not caught: {self.troubles[:3]}")

    # -- a life -------------------------------------------------------------------------------------------------------

    async def _live(self):
        self.enlist(Process(self.machine, self.chance))
        self.courier_process = None
        for follower in self.active():
            if self.chance.random() < 0.7:
                self._start(follower)
        acts = (
            *[self._publish] * 10,
            *[self._wait] * 6,
            *[self._start_or_stop] * 3,
            *[self._flush] * 3,
            *(self._kill_couriers, self._weather, self._weather, self._jump, self._start_twice),
        )
        for _ in range(self.chance.randint(4, 25)):
            act = self.chance.choice(acts)
            self.machine.note(act.__name__)
            if act.__name__ not in self.without:
                await act()
        await self._end()

    async def _end(self):
        ending = self.chance.choice(("close", "close", "kill", "kill trainers", "power"))
        self.machine.note("END", ending)
        if ending == "power":
            await self._power()
        elif ending == "kill":
            self.machine.inject("killed all")
            await self._stop_all()
        else:
            for trainer in self.trainers:
                if trainer.writer is not None:
                    if ending == "close":
                        self._as_program(trainer, trainer.close)
                    else:
                        self.machine.inject("killed trainer")
                        trainer.kill()
            for follower in self.active():
                if follower.task is not None and self.chance.random() < 0.7:
                    follower.finish()
            await asyncio.sleep(self.chance.choice((0.0, 0.2, 5.0)))
            await self._stop_all()
        self.look()

    async def _stop_all(self):
        for trainer in self.trainers:
            trainer.kill()
        for follower in self.followers:
            follower.kill()
        for follower in self.followers:
            await follower.end()
        if self.courier_process is not None:
            self.courier_process.kill()

    def _as_program(self, trainer, act, *args):
        """Run an action of a trainer, which may be killed or interrupted in it."""
        try:
            act(*args)
        except MachineStopped:
            trainer.kill()
        except KeyboardInterrupt:
            self._interrupted(trainer)
        if trainer.writer is not None and not trainer.process.alive:
            trainer.kill()
        self.look()

    def _interrupted(self, trainer):
        """Let an interrupted trainer continue, or close it, in which it may be interrupted again and killed."""
        chance = self.chance
        trainer.process.interrupt_at = None
        trainer.waiting = []  # an interrupted publish does not acknowledge
        if chance.random() < 0.3:
            return
        if chance.random() < 0.5:
            trainer.process.interrupt_at = trainer.process.calls + chance.randint(1, 10)
        try:
            trainer.close()
        except (KeyboardInterrupt, MachineStopped):
            trainer.kill()

    async def _publish(self):
        trainer = self.chance.choice(self.trainers)
        if trainer.writer is None:
            self._as_program(trainer, trainer.open)
        for _ in range(self.chance.randint(1, 4)):
            if trainer.writer is None:
                return
            self._as_program(trainer, trainer.publish, self.chance.choice((1, 3, 10)))
            if self.chance.random() < 0.3:
                await asyncio.sleep(self.chance.choice((0.0, 0.05, 1.0)))

    async def _flush(self):
        for trainer in self.trainers:
            if trainer.writer is not None:
                self._as_program(trainer, trainer.flush)

    async def _wait(self):
        await asyncio.sleep(self.chance.choice((0.0, 0.1, 1.0, 10.0, 400.0 if self.chance.random() < 0.1 else 1.0)))

    def _start(self, follower):
        chance, before = self.chance, self.courier_process
        if before is None or not before.alive:
            lives = chance.choice((None, None, chance.randint(1, 300)))
            self.courier_process = Process(self.machine, follower.chance, lives=lives)
        follower.start(self.courier_process)

    async def _start_or_stop(self):
        follower = self.chance.choice(self.active())
        if follower.task is None:
            self._start(follower)
        elif follower.task.done():
            await follower.end()
        elif self.chance.random() < 0.4:
            follower.stop()
            await follower.end()

    async def _start_twice(self):
        follower = self.chance.choice(self.active())
        if follower.task is None or follower.task.done() or not follower.process.alive or self.machine.failing:
            return
        await asyncio.sleep(0.1)
        process = Process(self.machine, self.chance, fine=True)
        if follower.task.done() or not self.machine.disk.is_locked(f"{JOURNAL}/couriers/{follower.name}.lock"):
            return
        self.machine.inject("second courier", follower.name)
        try:
            await follower.courier_in(process).run()
        except CourierBusyError:
            process.kill()
            return
        raise Fault(f"two couriers at once deliver to {follower.name}")

    async def _kill_couriers(self):
        self.machine.inject("killed couriers")
        for follower in self.followers:
            if follower.task is not None and self.chance.random() < 0.7:
                follower.kill()
                await follower.end()

    async def _weather(self):
        machine, chance = self.machine, self.chance
        machine.calm()
        kind = chance.choice(("fine", "fine", "full", "failing", "unreadable"))
        machine.note("weather", kind)
        if kind == "full":
            machine.disk.room = chance.choice((0, 500, 5000))
        elif kind == "failing":
            machine.failing = chance.choice((0.01, 0.1))
        elif kind == "unreadable":
            streams = sorted({path.rpartition("/")[0] for path in machine.disk.paths()})
            machine.disk.unreadable.add(chance.choice([JOURNAL, *streams]))

    async def _jump(self):
        seconds = self.chance.choice((-1, 1)) * self.chance.choice((2.0, 3600.0, self.chance.uniform(0, WEEK)))
        self.machine.inject("clock back" if seconds < 0 else "clock forward", round(seconds))
        self.machine.clock.jump(seconds)

    async def _power(self):
        """Cut the power in the middle of a random call."""
        machine, disk = self.machine, self.machine.disk
        machine.inject("power cut")
        disk.stop(disk.calls + self.chance.randint(1, 60), self.chance.random())
        trainer = self.chance.choice(self.trainers)
        if trainer.writer is not None:
            self._as_program(trainer, trainer.publish, 5)
        await asyncio.sleep(self.chance.choice((0.1, 1.0)))
        for each in self.trainers:
            each.kill()
        await self._stop_all()
        disk.restart("kill")
        self.look()
        before = set(self.there)
        machine.cut_power()
        data = self._bytes_of_journal()
        self.there = {number for number in before if self.published[number].frame in data}
        for number in sorted(before - self.there):
            one = self.published[number]
            if one.safe:
                raise Fault(f"a power cut removed a synced event: {one}")
            one.lost = True

    # -- between lives ------------------------------------------------------------------------------------------------

    def active(self):
        return [each for each in self.followers if not each.left]

    def enlist(self, process):
        """Register the subscriptions, as a program does at its start."""
        active = self.active()
        for group in {each.group: None for each in active if not each.group.enlisted}:
            group.enlisted = True
            group.excused |= {each.number for each in self.published if each.number not in self.there}
        try:
            strike_off(JOURNAL, [each.name for each in active], 0, process)
            enlist(JOURNAL, [Followed(each.name, Recipe("a"), terms=each.terms) for each in active], process)
        except OSError as error:
            self.machine.note("not registered", error)
        process.kill()

    def _add_followers(self):
        for kind in self.chance.choice((["csv"], ["jsonl"], [*KINDS])):
            self._add(kind)

    def _add(self, kind):
        ranks = self.chance.choice(((0,), None))
        group = Group(kind, len(self.groups), ranks)
        self.groups.append(group)
        self.followers.append(Follower(self, group.label, group))

    def _between_lives(self):
        acts = (
            *[self._damage] * 3,
            *(self._add_one, self._leave, self._rename, self._double, self._remove_output, self._remove_cursors),
            *(self._move_host, self._jump_now),
        )
        for _ in range(self.chance.choice((0, 0, 1, 1, 2))):
            act = self.chance.choice(acts)
            if act.__name__ not in self.without:
                act()
        self.machine.calm()

    def _add_one(self):
        if len(self.groups) < 4:
            self.machine.inject("follower added")
            self._add("csv")  # a second local_logger would use the files of the first

    def _leave(self):
        follower = self.chance.choice(self.followers)
        if follower.left:
            self.machine.inject("follower back", follower.name)
            follower.left = False
            follower.group.beside = True
        elif not follower.left and len(self.active()) > 1:
            self.machine.inject("follower removed", follower.name)
            follower.left = True

    def _rename(self):
        follower = self.chance.choice(self.active())
        name = f"{follower.group.label}-{len(self.followers)}"
        self.machine.inject("follower renamed", follower.name, name)
        follower.left = follower.group.beside = True
        self.followers.append(Follower(self, name, follower.group))

    def _double(self):
        """Add another subscription with the same output."""
        group = self.chance.choice(self.groups)
        if sum(each.group is group for each in self.active()) < 3:
            name = f"{group.label}-{len(self.followers)}"
            self.machine.inject("second follower", name)
            group.beside = True
            self.followers.append(Follower(self, name, group))

    def _remove_output(self):
        """Remove a file of rows, as a person might; its rows may be missing from then on."""
        group, one = self.chance.choice(self.groups), self.chance.choice(self.published or [None])
        if one is None:
            return
        files = group.kind.files(self.machine.disk, one.run, one.rank)[self.chance.choice(group.kind.rows)]
        if files:
            path = self.chance.choice(sorted(files))
            self.machine.inject("output removed", path)
            group.excused.update(files[path])
            self.machine.disk.put(path, b"")  # so that it is removed from the durable state as well
            self.machine.disk._files.pop(path)
            self.machine.disk._durable.pop(path)

    def _remove_cursors(self):
        self.machine.inject("cursors removed")
        self.machine.disk.take_away(f"{JOURNAL}/cursors")
        for group in self.groups:
            group.beside = True

    def _damage(self):
        chance, disk = self.chance, self.machine.disk
        small = [path for path in disk.paths() if path.startswith(f"{JOURNAL}/c") and path.endswith(".json")]
        if not small:
            return
        path = chance.choice(small)
        what = path[len(JOURNAL) + 1 :].partition("/")[0]
        kind = "cursor" if what == "cursors" else path.rpartition("/")[2].split(".")[-2]
        how = chance.choice(("cut", "empty", "zeros", "garbage", "other version", "removed", "directory"))
        self.machine.inject(f"{kind} {how}", path)
        if kind == "cursor":
            for follower in self.followers:
                if path.endswith(f"/{follower.name}.json"):
                    follower.group.beside = True
        data = disk.contents(path)
        if how in {"removed", "directory"}:
            del disk._files[path]
            disk._durable.pop(path, None)
            if how == "directory":
                disk._directories.add(path)
            return
        damaged = {
            "cut": bytes(data[: chance.randint(0, max(0, len(data) - 1))]),
            "empty": b"",
            "zeros": bytes(len(data)),
            "garbage": chance.randbytes(len(data)),
            "other version": b'{"version": 9, "streams": ["?"]}',
        }[how]
        data[:] = damaged
        disk._files[path].durable = damaged

    def _move_host(self):
        self.machine.inject("another host")
        self.machine.host += 1

    def _jump_now(self):
        seconds = self.chance.uniform(-WEEK, WEEK)
        self.machine.inject("clock back" if seconds < 0 else "clock forward", round(seconds))
        self.machine.clock.jump(seconds)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _in_journal(self):
        """Return the numbers of the events in the segments, found in their bytes."""
        data = self._bytes_of_journal()
        found = (struct.unpack(">d", each)[0] for each in NUMBER.findall(data))
        return {int(each) for each in found if 0 < each < 1e9 and int(each) + THIRD == each} | {
            each.number for each in self.published if each.kind not in {"step", "eval"} and each.frame in data
        }

    def _bytes_of_journal(self):
        disk = self.machine.disk
        return SEPARATOR.join(bytes(disk.contents(path)) for path in disk.paths() if path.endswith(".seg"))

    def look(self):
        """Update what is in the journal; every acknowledged event must be there."""
        there = self._in_journal()
        for each in self.published:
            if each.number in there:
                each.seen = True
            elif each.acknowledged and not each.seen and any(group.serves(each) for group in self.groups):
                raise Fault(f"acknowledged, and not in the journal: {each}")
        self.there = there

    def pruned(self):
        """Update what is in the journal after retention may have pruned it."""
        there = self._in_journal()
        gone = self.there - there
        if gone:
            self.machine.inject("retention", len(gone))
        self.there = there

    async def settle(self, *, everybody=False):
        """End all faults, let couriers deliver the rest, and check the files."""
        machine = self.machine
        machine.note("SETTLE")
        machine.calm()
        await self._stop_all()
        self.look()
        if everybody:
            for group in self.groups:
                mine = [each for each in self.followers if each.group is group]
                if all(each.left for each in mine):
                    mine[-1].left = False
        process = Process(machine, self.chance, fine=True)
        self.enlist(process)
        for follower in self.active():
            follower.start(Process(machine, self.chance, fine=True))
            follower.finish()
        for follower in self.active():
            try:
                await asyncio.wait_for(asyncio.shield(follower.task), SETTLE_SECONDS)
            except TimeoutError:
                raise Fault(f"{follower.name} makes no progress at {follower.courier.counts}") from None
            except (OSError, RetryLaterError) as error:
                raise Fault(f"{follower.name} cannot continue: {error!r}") from error
            await follower.end()
            follower.process.kill()
        self.inspect()

    def inspect(self):
        """Check all files and delivery statuses; raises `Fault`."""
        self.inspections += 1
        for group in self.groups:
            if any(each.group is group for each in self.active()):
                self._inspect_files(group)
        balance = {each.name: each for each in accounts(JOURNAL, self.machine.disk)}
        for follower in self.active():
            account = balance.get(follower.name)
            if account is None:
                raise Fault(f"there is no delivery status of {follower.name}")
            if account.pending or account.busy or account.recorded != account.delivered + account.dead:
                raise Fault(f"the delivery status is wrong: {account}")

    def _inspect_files(self, group):
        owed = {}
        for one in self.published:
            if group.serves(one) and one.seen:
                must = not one.lost and one.number not in group.excused
                for what in group.kind.rows:
                    owed.setdefault((one.rank, one.run, what), Owed(what)).take(one, must)
        for (rank, run, what), of_run in owed.items():
            files = group.kind.files(self.machine.disk, run, rank)[what]
            self._inspect_rows(f"{group.label}, {run}, {what}s", of_run.rows, files, beside=group.beside)

    def _inspect_rows(self, where, owed, files, *, beside):
        found = set()
        for path, lines in files.items():
            rows = [each for each in lines if each is not None]
            if beside:  # a row of a step before a start may have been written before or after that start
                rows = [*dict.fromkeys(each for each in rows if self.published[each].before_start)] + [
                    each for each in rows if not self.published[each].before_start
                ]
            if None in lines and any(owed.get(each) for each in lines[lines.index(None) :]):
                raise Fault(f"{where}: torn, with rows after it: {path}")
            if len(set(rows)) < len(rows):
                twice = sorted(each for each, count in Counter(rows).items() if count > 1)
                raise Fault(f"{where}: doubled in {path}: {self._named(twice)}")
            certain = [each for each in rows if owed.get(each) and not (beside and self.published[each].before_start)]
            if certain != sorted(certain):
                raise Fault(f"{where}: out of order in {path}: {rows}")
            found |= set(rows)
            stale = [each for each in rows if each not in owed]
            if stale and (len(files) == 1 or not beside):
                raise Fault(f"{where}: replaced by a later life, but still in {path}: {self._named(stale)}")
        lacks = [number for number, must in owed.items() if must and number not in found]
        if lacks:
            raise Fault(f"{where}: lost {len(lacks)} of {len(owed)}: {self._named(lacks)}")
        if len(files) > 1 and not beside:
            raise Fault(f"{where}: in several files: {sorted(files)}")

    def _named(self, numbers):
        return [self.published[each] for each in numbers[:5]]


gc.freeze()


def play(seed, *, traced=False, without=()):
    """Run one seed; raises `Fault`."""
    simulation = Simulation(seed, traced=traced, without=without)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # retries are logged, thousands of times
    gc.collect()
    gc.disable()  # the seed does not determine when it runs, and a finalizer may hold a lock
    hook, threading.excepthook = threading.excepthook, lambda args: _in_thread(simulation, args)
    try:
        loop = lambda: VirtualLoop(simulation.machine.clock)  # noqa: E731
        system = seeded_system(Random(f"{seed} entropy"), simulation.machine.clock)
        with system, asyncio.Runner(loop_factory=loop) as runner:
            runner.run(simulation.play())
    except Exception as error:
        error.simulation = simulation
        raise
    finally:
        gc.enable()
        threading.excepthook = hook
        logging.disable(before)
    return simulation


def _in_thread(simulation, args):
    if not issubclass(args.exc_type, MachineStopped):
        simulation.troubles.append(args.exc_value)


def _play_many(seeds, without=()):
    """Run these seeds; returns faults, lives, published events, inspections and failures."""
    faults, lives, published, inspections, failures = Counter(), 0, 0, 0, []
    for seed in seeds:
        try:
            simulation = play(seed, without=without)
        except Exception as error:  # reported at the end
            simulation = getattr(error, "simulation", None)
            failures.append((seed, f"{type(error).__name__}: {error}", simulation and simulation.machine.trace[-15:]))
            if not isinstance(error, Fault):
                failures[-1] = (seed, "".join(traceback.format_exception(error)[-6:]), None)
            if simulation is None:
                continue
        faults += simulation.machine.faults
        lives += simulation.lives
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
    asked = parser.parse_args()
    if asked.seed is not None:
        play(asked.seed, traced=True, without=asked.without)
        return 0
    began = time.monotonic()
    seeds = range(asked.first, asked.first + asked.seeds)
    parts = [seeds[start : start + 20] for start in range(0, len(seeds), 20)]
    faults, lives, published, inspections, failures = Counter(), 0, 0, 0, []
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for part in pool.imap(partial(_play_many, without=asked.without), parts):
            faults += part[0]
            lives += part[1]
            published += part[2]
            inspections += part[3]
            failures += part[4]
            for seed, why, _ in part[4]:
                print(f"seed {seed}: {why[:600]}", flush=True)
    print(f"{len(seeds)} seeds, {lives} lives, {published} events, {inspections} inspections of all files")
    print("faults:", ", ".join(f"{kind} {count}" for kind, count in sorted(faults.items())))
    print(f"{len(failures)} seeds failed, {time.monotonic() - began:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
