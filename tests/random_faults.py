#!/usr/bin/env python3
"""A random mix of all delivery faults, on virtual time and a simulated machine; a seed replays the same run.

usage: uv run python tests/random_faults.py --seeds 1000

Programs of several ranks publish, end, are killed and continue; couriers start, are stopped, are killed in the middle
of a write, and are started twice; disks fail, fill up and recover; the machine loses power; destinations are
unavailable, refuse, accept a part, never return, ignore cancellation, or store a batch and report an error. Then
everything is drained, and: every recorded event is delivered, or a dead letter, for every adapter that it is for; the
delivery status agrees with the journal; each stream was delivered in order; rewindable adapters have each event exactly
once. The event loop jumps to its next timer, so hours of outages take no time, and the same seed does the same again.
This tests destinations; `simulation.py` tests the lives of a run and the files of adapters.
"""

import argparse
import asyncio
import errno
import logging
import math
import sys
import time
from collections import defaultdict
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec

from evsys_bus import (
    ArmResult,
    Envelope,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
)
from evsys_bus.codec import decode, encode
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.delivery_store import DeadLetter
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.sink_receiver import SinkReceiver
from evsys_bus.delivery.subscription import DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.errors import (
    BatchTooLargeError,
    CodecError,
    CourierBusyError,
    JournalOpenError,
    ParkedError,
    RejectedError,
    RetryLaterError,
)
from evsys_bus.journal import JournalReader, JournalWriter, RetentionPolicy, layout
from evsys_bus.sink import Sink
from evsys_bus.testing import FailingCallback, FailingSink, MachineStopped, ManualClock, SimulatedDisk
from support.violations import Violation, require
from support.virtual_loop import VirtualLoop

JOURNAL = "/journal"
ROWS = "/rows"
CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE)
NEVER_FAILING = (".lock',)",)
"""Arguments of calls that never fail. A courier that cannot lock delivers all the same, and so may another one, which
is not tested here."""
OPENING_ERRORS = (KeyError, RuntimeError, MemoryError, BatchTooLargeError)
"""Errors that end a courier if its adapter raises them when it is opened."""
SETTLE_SECONDS = 100_000.0


class Process:
    """A process on the machine: its calls may fail or kill it, which closes its files.

    It is the `Disk` of the code that runs in it.
    """

    def __init__(self, disk, rng, *, failure_rate=0.0, death_rate=0.0):
        self.alive = True
        self._disk = disk
        self._rng = rng
        self._failure_rate = failure_rate
        self.death_rate = death_rate
        self._files = set()

    def __getattr__(self, name):
        return lambda *args: self._call(name, *args)

    def kill(self):
        self.alive = False
        for file in sorted(self._files):
            self._call_ignoring_errors("close", file)

    def _call(self, name, *args):
        if not self.alive:
            if name == "close":  # the system has closed its files
                return None
            raise MachineStopped
        if self._rng.random() < self.death_rate:
            if name == "write":
                self._call_ignoring_errors("write", args[0], args[1][: self._rng.randrange(len(args[1]) + 1)])
            self.kill()
            raise MachineStopped
        if self._rng.random() < self._failure_rate and not str(args[:1]).endswith(NEVER_FAILING):
            if name == "write" and self._rng.random() < 0.5:
                return self._disk.write(args[0], args[1][: self._rng.randrange(len(args[1]))])
            code = self._rng.choice(CODES)
            raise OSError(code, errno.errorcode[code])
        try:
            result = getattr(self._disk, name)(*args)
        except MachineStopped:
            self.alive = False
            raise
        if name in {"lock", "open_append"} and result is not None:
            self._files.add(result)
        elif name == "close":
            self._files.discard(args[0])
        return result

    def _call_ignoring_errors(self, name, *args):
        try:
            getattr(self._disk, name)(*args)
        except (OSError, MachineStopped):
            pass  # the process is being killed


# -- destinations -----------------------------------------------------------------------------------------------------


class LostReplyError(OSError):
    """The destination has stored the batch, but its response was lost."""


def outcomes(rng, share):
    """Yield the outcomes of calls of a sink, without end."""
    faults = (
        *(lambda: RetryLaterError("busy"), lambda: RetryLaterError("429", after_seconds=rng.choice((5, math.nan)))),
        *(ConnectionRefusedError, TimeoutError, LostReplyError, KeyError, MemoryError),
        *(SystemExit, KeyboardInterrupt, asyncio.CancelledError),
        *(lambda: ParkedError("401", fix="log in"), lambda: BatchTooLargeError("413")),
        *(lambda: RejectedError({0: "422"}), lambda: RejectedError({rng.randrange(9): "422", 700: "nobody"})),
        *(lambda: 0, lambda: 1, lambda: 3, lambda: "hang", lambda: "deaf"),
    )
    while True:
        yield rng.choice(faults)() if rng.random() < share else None


class Destination(FailingSink):
    """A sink whose data survives its process; stores events with the number of the life that delivered them."""

    write_timeout_seconds = 5.0

    def __init__(self, scenario, subscription, process, share):
        rng = subscription.rng
        opening = (each for each in outcomes(rng, share / 2) if not isinstance(each, int | RejectedError))
        super().__init__(outcomes(rng, share), opening=opening)
        self.max_batch_events = rng.choice((1, 7, 500))
        self.max_batch_bytes = rng.choice((900, 1 << 20))
        self.max_batch_seconds = rng.choice((0.0, 0.5))
        self.process = process
        self.subscription = subscription
        self.scenario = scenario

    async def write(self, batch):
        if not self.process.alive:
            raise MachineStopped
        try:
            count = await super().write(batch)
        except RejectedError as error:
            self.keep([each for index, each in enumerate(batch) if index not in error.reasons])
            raise
        except LostReplyError:
            self.keep(batch)
            raise
        return None if count is None else min(count, len(batch))

    def keep(self, batch):
        if self.process.alive:
            self.subscription.deliveries += [(self.subscription.generations, each.stream, each.seq) for each in batch]


class RewindableSink(Destination):
    """A rewindable sink that writes a row per event to a file."""

    def __init__(self, scenario, subscription, process, share):
        super().__init__(scenario, subscription, process, share)
        self._plan = (each for each in outcomes(subscription.rng, share) if not isinstance(each, LostReplyError))
        # A write that continues after its cancellation cannot be rewound.
        self._plan = (None if each == "deaf" else each for each in self._plan)
        self.file = RowFile(process, f"{ROWS}/{subscription.name}")

    async def open(self):
        await super().open()
        self.file.open()

    def keep(self, batch):
        self.file.add([(each.stream, each.seq) for each in batch])

    def mark(self):
        return self.file.mark()

    def rewind(self, mark):
        self.file.complete_bytes = mark


class CountingCallback(FailingCallback):
    """A callback delivered to by a courier, whose calls raise at random."""

    def __init__(self, scenario, subscription, process, share):
        errors = (KeyError("no"), OSError("no"), RuntimeError("no"))
        rng = subscription.rng
        super().__init__(rng.choice(errors) if rng.random() < share / 2 else None for _ in iter(int, 1))
        self.scenario, self.subscription, self.process = scenario, subscription, process

    def keep(self, event):
        if not self.process.alive:
            raise MachineStopped
        if self.subscription.policy.on_failure == "count" and isinstance(event, StepEnd):
            self.record_delivery(event)
        super().keep(event)
        if self.subscription.policy.on_failure != "count" and isinstance(event, StepEnd):
            self.record_delivery(event)

    def record_delivery(self, event):
        self.subscription.deliveries.append(
            (self.subscription.generations, *self.scenario.numbers[int(event.metrics["n"])])
        )


class RewindableCallback(CountingCallback):
    """A rewindable callback that writes a row per step to a file."""

    def __init__(self, scenario, subscription, process, share):
        super().__init__(scenario, subscription, process, share)
        self.file = RowFile(process, f"{ROWS}/{subscription.name}")

    def record_delivery(self, event):
        if self.file.file is None:
            self.file.open()
        self.file.add([self.scenario.numbers[int(event.metrics["n"])]])

    def mark(self):
        if self.file.file is None:
            self.file.open()
        return self.file.mark()

    def rewind(self, mark):
        self.file.complete_bytes = mark


class RowFile:
    """A file of rows on the simulated disk; an incomplete batch is removed before the next access."""

    def __init__(self, disk, path):
        self.disk, self.path, self.file, self.complete_bytes = disk, path, None, 0

    def open(self):
        if self.file is None:
            self.disk.make_directory(ROWS)
            self.file = self.disk.lock(self.path)

    def add(self, rows):
        self._truncate()
        data = rest = b"".join(b"%s %d\n" % (stream.encode(), sequence) for stream, sequence in rows)
        while rest:
            rest = rest[self.disk.write(self.file, rest) :]
        self.complete_bytes += len(data)

    def mark(self):
        self._truncate()
        self.disk.sync(self.file)
        self.disk.sync_path(ROWS)
        return self.complete_bytes

    def _truncate(self):
        if self.disk.length(self.file) > self.complete_bytes:
            self.disk.truncate(self.file, self.complete_bytes)


# -- programs and couriers --------------------------------------------------------------------------------------------


class Publisher:
    """The program of one rank, through all its lives."""

    def __init__(self, scenario, rank):
        self.scenario, self.rank = scenario, rank
        self.rng = Random(f"{scenario.seed} publisher {rank}")
        self.writer = self.process = None
        self.runs = self.step = 0

    def open(self, *, without_faults=False):
        scenario, rng = self.scenario, self.rng
        death_rate = 0.0 if without_faults else rng.choice((0.0, 0.0, 0.002))
        self.process = Process(
            scenario.disk,
            rng,
            failure_rate=0.0 if without_faults else scenario.failure_rate(rng),
            death_rate=death_rate,
        )
        self.writer = JournalWriter(
            JOURNAL,
            rank=self.rank,
            flush=rng.choice(("always", "interval")),
            flush_seconds=math.inf,
            segment_bytes=rng.choice((1500, 4000, 1 << 20)),
            retain=RetentionPolicy(max_bytes=2000) if scenario.retains else None,
            reserve_bytes=rng.choice((0, 4096)),
            disk=self.process,
            clock=scenario.clock,
        )
        try:
            self.writer.open()
        except JournalOpenError:
            self.process.kill()
            self.writer = None
            return
        if not self.runs or rng.random() < 0.5:
            self.runs += 1
            self.step = 0
        self.run = f"run-{self.rank}-{self.runs}"
        ctx = LogContext(output_dir=Path("/out"), run_key=self.run)
        self.state = LoopState(step=self.step, num_steps=99_999, output_dir=Path("/out", self.run), ctx=ctx)
        self._append(RunStart(ctx), essential=True)
        self._append(TrainStart(self.state), essential=True)

    def publish(self, count):
        for _ in range(count):
            if self.rng.random() < 0.01:
                self.writer.append(b"no envelope")
                continue
            self.scenario.number += 1
            self._append(StepEnd(self.state, self.step, TrainingBatch(), {"n": self.scenario.number}))
            self.step += 1

    def end_run(self):
        self._append(TrainEnd(self.state, LoopArtifacts()))
        self._append(RunEnd(self.state.ctx, RunResult(), ArmResult("arm")), essential=True)

    def close(self):
        self.process.death_rate = 0.0  # the last maintenance runs on a thread, which must not be killed
        self.writer.close()
        self.process.kill()
        self.writer = None

    def kill(self):
        if self.writer is not None:
            self.process.kill()
            self.writer.abandon()
            self.writer = None

    def _append(self, event, *, essential=False):
        writer, scenario = self.writer, self.scenario
        if isinstance(event, StepEnd):
            scenario.numbers[scenario.number] = (writer.stream, writer.next_sequence)
        payload = encode(
            Envelope(writer.stream, writer.next_sequence, scenario.clock.wall(), event, self.run, self.rank)
        )
        writer.append(payload, essential=essential)


class SimulatedSubscription:
    """One adapter, and its couriers through all their lives."""

    def __init__(self, scenario, name, kind, policy):
        self.scenario, self.name, self.kind, self.policy = scenario, name, kind, policy
        self.rng = Random(f"{scenario.seed} {name}")
        self.generations = 0
        self.deliveries = []
        """Life, stream and sequence of what reached a destination that survives its process."""
        self.task = self.courier = self.process = self.adapter = None

    def start(self, *, without_faults=False):
        scenario, rng = self.scenario, self.rng
        self.generations += 1
        death_rate = 0.0 if without_faults else rng.choice((0.0, 0.0, 0.002, 0.02))
        self.process = Process(
            scenario.disk,
            rng,
            failure_rate=0.0 if without_faults else scenario.failure_rate(rng),
            death_rate=death_rate,
        )
        self.adapter = self.kind(scenario, self, self.process, 0.0 if without_faults else rng.choice((0.0, 0.1, 0.5)))
        self.courier = self._make_courier(self.adapter, self.process)
        self.task = asyncio.get_running_loop().create_task(self.courier.run())

    def _make_courier(self, adapter, process):
        if isinstance(adapter, Sink):
            seed = Random(self.rng.random())
            adapter = SinkReceiver(adapter, random=seed, grace_seconds=0.5, close_seconds=1.0)
        options = {"disk": process, "clock": self.scenario.clock, "poll_seconds": self.rng.choice((0.1, 0.5))}
        return Courier(JOURNAL, self.name, adapter, self.policy, **options)

    async def check_exclusive(self):
        """Check that no other courier can deliver while this one does."""
        disk = self.scenario.disk
        process = Process(disk, self.rng)
        adapter = self.kind(self.scenario, self, process, 0.0)
        if self.task is None or not disk.is_locked(layout.courier_path(JOURNAL, self.name, "lock")):
            return
        try:
            await self._make_courier(adapter, process).run()
        except CourierBusyError:
            process.kill()
            return
        raise Violation(f"two couriers at once deliver to {self.name}")

    async def kill(self):
        if self.task is not None:
            self.process.kill()
            self.task.cancel()
            await self.end()

    async def end(self):
        """Wait for the courier, and check that it ended without an unexpected error."""
        await asyncio.wait([self.task])
        error = None if self.task.cancelled() else self.task.exception()
        expected_errors = (MachineStopped, OSError, *OPENING_ERRORS)
        require(error is None or isinstance(error, expected_errors), f"the courier of {self.name} ended with {error!r}")
        self.process.kill()
        if isinstance(self.adapter, FailingSink):
            self.adapter.release()
        self.task = None


class Scenario:
    """One machine, and everything that runs on it."""

    def __init__(self, seed):
        self.seed = seed
        self.clock = ManualClock()
        self.disk = SimulatedDisk()
        self.rng = rng = Random(f"{seed} scene")
        self.retains = rng.random() < 0.3
        self.fault_level = 0.0
        self.number = 0
        self.numbers = {}
        """Number of a step -> its stream and sequence."""
        self.recorded = {}
        """Stream and sequence of each event that was ever seen in the journal -> whether it is a step."""
        self.lost = set()
        """Those of them that a power cut removed."""
        self.power_cuts = 0
        self.trace_digest = blake2b()
        self.publishers = [Publisher(self, rank) for rank in range(rng.randint(1, 3))]
        ranks = (None, (0,))
        self.subscriptions = [
            SimulatedSubscription(self, "sink", Destination, DeliveryPolicy(rng.choice(ranks))),
            SimulatedSubscription(self, "rows", RewindableSink, DeliveryPolicy(rng.choice(ranks))),
            SimulatedSubscription(
                self,
                "hooks",
                CountingCallback,
                DeliveryPolicy(rng.choice(ranks), rng.choice(("count", "dead", "retry"))),
            ),
            SimulatedSubscription(
                self, "hook rows", RewindableCallback, DeliveryPolicy(rng.choice(ranks), rng.choice(("dead", "retry")))
            ),
        ]

    def failure_rate(self, rng):
        return rng.choice((0.0, 0.0, 0.01, 0.1)) * self.fault_level

    def trace(self, *what):
        """Add to the trace, with the time; a replay must give the same trace."""
        self.trace_digest.update(f"{self.clock.monotonic():.6f} {what}\n".encode())

    async def run(self):
        """Run all actions, then drain and check."""
        register(
            JOURNAL,
            [Subscription(subscription.name, policy=subscription.policy) for subscription in self.subscriptions],
            self.disk,
        )
        actions = (
            *[self.publish] * 8,
            *[self.wait] * 5,
            *[self.start_or_stop] * 6,
            *(self.kill_courier, self.kill_publisher, self.change_fault_level, self.fill_disk, self.start_twice),
            self.flush,
            *([self.cut_power] if self.rng.random() < 0.5 else []),
        )
        for _ in range(self.rng.randint(10, 60)):
            action = self.rng.choice(actions)
            self.trace(
                action.__name__, self.disk.calls, *(len(subscription.deliveries) for subscription in self.subscriptions)
            )
            await action()
        await self.drain_and_check()
        self.check()

    # -- acts ---------------------------------------------------------------------------------------------------------

    async def publish(self):
        publisher = self.rng.choice(self.publishers)
        try:
            if publisher.writer is None:
                publisher.open()
            if publisher.writer is None:
                return
            for _ in range(self.rng.randint(1, 4)):
                publisher.publish(self.rng.choice((1, 5, 40)))
                if self.rng.random() < 0.3:
                    await asyncio.sleep(self.rng.choice((0.0, 0.05, 1.0)))
                    if publisher.writer is None:
                        return
            if self.rng.random() < 0.2:
                publisher.end_run()
                publisher.close()
        except MachineStopped:
            publisher.kill()
        self.update_recorded()

    async def wait(self):
        await asyncio.sleep(self.rng.choice((0.0, 0.1, 1.0, 10.0, 30.0)))

    async def start_or_stop(self):
        subscription = self.rng.choice(self.subscriptions)
        if subscription.task is None:
            subscription.start()
            return
        if self.rng.random() < 0.3:
            subscription.courier.finish()
            await asyncio.sleep(self.rng.choice((0.0, 1.0)))
        if subscription.task.done() or self.rng.random() < 0.3:
            subscription.courier.stop()
            await subscription.end()

    async def start_twice(self):
        await self.rng.choice(self.subscriptions).check_exclusive()

    async def kill_courier(self):
        await self.rng.choice(self.subscriptions).kill()

    async def kill_publisher(self):
        self.rng.choice(self.publishers).kill()
        self.update_recorded()

    async def change_fault_level(self):
        self.fault_level = self.rng.choice((0.0, 1.0))

    async def fill_disk(self):
        self.disk.room = self.rng.choice((0, 500, 5000, None, None))

    async def flush(self):
        for publisher in self.publishers:
            if publisher.writer is not None:
                self.update_recorded()  # before anything is pruned
                try:
                    publisher.writer.flush()
                except MachineStopped:
                    publisher.kill()

    async def cut_power(self):
        """Cut the power in the middle of a random call."""
        self.update_recorded()
        self.disk.stop(self.disk.calls + self.rng.randint(1, 100), self.rng.random())
        await asyncio.sleep(self.rng.choice((0.1, 1.0)))
        for subscription in self.subscriptions:
            await subscription.kill()
        for publisher in self.publishers:
            publisher.kill()
        self.disk.restart("kill")
        self.update_recorded()
        before = self._read_recorded()
        self.disk.restart("power", keep=self.rng.choice((0.0, 0.5, 1.0)))
        self.lost |= before.keys() - self._read_recorded().keys()
        self.power_cuts += 1
        await asyncio.sleep(2.0)  # the names of streams contain the second

    # -- the end ------------------------------------------------------------------------------------------------------

    async def drain_and_check(self):
        """Stop everything, end the faults, and let couriers deliver the rest."""
        self.fault_level, self.disk.room = 0.0, None
        for subscription in self.subscriptions:
            await subscription.kill()
        for publisher in self.publishers:
            publisher.kill()
        self.update_recorded()
        for subscription in self.subscriptions:
            subscription.start(without_faults=True)
            subscription.courier.finish()
        for subscription in self.subscriptions:
            try:
                await asyncio.wait_for(asyncio.shield(subscription.task), SETTLE_SECONDS)
            except TimeoutError:
                raise Violation(f"{subscription.name} makes no progress at {subscription.courier.counts}") from None
            await subscription.end()

    def update_recorded(self):
        """Update what is known to be recorded."""
        self.recorded |= self._read_recorded()

    def _read_recorded(self):
        reader = JournalReader(JOURNAL, self.disk)
        records = {}
        for stream in reader.streams():
            for record in reader.read(stream):
                try:
                    records[stream, record.sequence] = isinstance(decode(record.payload).event, StepEnd)
                except CodecError:
                    records[stream, record.sequence] = False
        return records

    def check(self):
        """Check every adapter; raises `Violation`."""
        for subscription in self.subscriptions:
            ranks = subscription.policy.ranks
            in_scope = {each for each in self.recorded if ranks is None or layout.rank_of(each[0]) in ranks}
            steps = {each for each in in_scope if self.recorded[each]}
            expected = steps if isinstance(subscription.adapter, CountingCallback) else in_scope
            self._check_subscription(subscription, in_scope, expected)

    def _check_subscription(self, subscription, in_scope, expected):
        dead_letters = self._read_dead_letters(subscription)
        if isinstance(subscription.adapter, RewindableSink | RewindableCallback):
            rows = [
                tuple(row.split()) for row in self.disk.contents(f"{ROWS}/{subscription.name}").decode().splitlines()
            ]
            deliveries = [(0, stream, int(sequence)) for stream, sequence in rows]
            require(
                len(set(deliveries)) == len(deliveries),
                f"{subscription.name} has {len(deliveries) - len(set(deliveries))} rows twice",
            )
        else:
            deliveries = subscription.deliveries
        reached = {each[1:] for each in deliveries}
        required = expected - self.lost
        require(
            required <= reached | dead_letters,
            f"{subscription.name} lacks {sorted(required - reached - dead_letters)[:5]} of {len(required)}",
        )
        require(
            reached | dead_letters <= in_scope,
            f"{subscription.name} has unpublished events: {sorted((reached | dead_letters) - in_scope)[:5]}",
        )
        orders = defaultdict(list)
        for life, stream, sequence in dict.fromkeys(deliveries):
            orders[life, stream].append(sequence)
        for (life, stream), order in orders.items():
            misordered = next((each for each in pairwise(order) if each[0] > each[1]), None)
            require(
                misordered is None,
                f"{subscription.name}, in life {life}, received {misordered} of {stream} in this order",
            )
        (status,) = (each for each in read_progress(JOURNAL, self.disk) if each.name == subscription.name)
        require(status.pending == 0 and not status.busy, f"not all was delivered: {status}")
        minimum, maximum = len(in_scope - self.lost), len(in_scope)
        is_balanced = minimum <= status.recorded == status.delivered + status.dead <= maximum
        require(is_balanced, f"{status}, where {minimum} to {maximum} events are recorded")
        require(status.dead <= len(dead_letters), f"{status}, and {len(dead_letters)} dead letters")
        if type(subscription.adapter) is RewindableSink:
            require(status.delivered == len(deliveries), f"{status}, and {len(deliveries)} rows")
        self.trace(subscription.name, status.delivered, status.dead, [(life, seq) for life, _, seq in deliveries])

    def _read_dead_letters(self, subscription):
        path = layout.courier_path(JOURNAL, subscription.name, "dead.jsonl")
        if path not in self.disk.paths():
            return set()
        complete_lines = bytes(self.disk.contents(path)).split(b"\n")[:-1]  # a kill may have truncated the last one
        try:
            letters = [msgspec.json.decode(line, type=DeadLetter) for line in complete_lines]
        except msgspec.DecodeError as error:
            raise Violation(f"{subscription.name} has a dead letter that cannot be read: {error}") from error
        return {(letter.stream, letter.seq) for letter in letters}


def run_seed(seed):
    """Run one seed; raises `Violation`."""
    scenario = Scenario(seed)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # retries are logged, thousands of times
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(scenario.clock)) as runner:
            runner.run(scenario.run())
    finally:
        logging.disable(before)
    return scenario


def main():
    """Run the long form of the test."""
    parser = argparse.ArgumentParser(description="A random mix of all faults of delivery; see the file.")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=time.time_ns() % 10**9, help="to replay: the seed that failed")
    args = parser.parse_args()
    started = time.monotonic()
    events = seconds = cuts = lives = 0
    for seed in range(args.first, args.first + args.seeds):
        try:
            scenario = run_seed(seed)
        except Exception as error:
            print(f"seed {seed}: {error!r}", file=sys.stderr)
            print(f"replay: python {__file__} --seeds 1 --first {seed}", file=sys.stderr)
            if args.seeds == 1:
                raise
            return 1
        events += len(scenario.recorded)
        seconds += scenario.clock.monotonic()
        cuts += scenario.power_cuts
        lives += sum(subscription.generations for subscription in scenario.subscriptions)
    print(f"seeds {args.first} to {args.first + args.seeds - 1}, {events:,} events, {lives:,} lives of couriers,")
    print(f"{cuts:,} power cuts, {seconds / 3600:,.0f} virtual hours, lost 0, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
