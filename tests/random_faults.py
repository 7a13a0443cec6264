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
import selectors
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
from evsys_bus.delivery.accounts import accounts
from evsys_bus.delivery.batches import SinkReceiver
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.dead_letters import DeadLetter
from evsys_bus.delivery.followed import Followed, Terms
from evsys_bus.delivery.roster import enlist
from evsys_bus.errors import (
    BatchTooLargeError,
    CodecError,
    CourierBusyError,
    JournalOpenError,
    ParkedError,
    RejectedError,
    RetryLaterError,
)
from evsys_bus.journal import JournalReader, JournalWriter, Retain, layout
from evsys_bus.sink import Sink
from evsys_bus.testing import FailingCallback, FailingSink, MachineStopped, ManualClock, SimulatedDisk

JOURNAL = "/journal"
ROWS = "/rows"
CODES = (errno.EIO, errno.ENOSPC, errno.EMFILE)
SPARED = (".lock',)",)
"""Arguments of calls that never fail. A courier that cannot lock delivers all the same, and so may another one, which
is not tested here."""
AT_FAULT = (KeyError, RuntimeError, MemoryError, BatchTooLargeError)
"""Errors that end a courier if its adapter raises them when it is opened."""
SETTLE_SECONDS = 100_000.0


class Fault(Exception):  # noqa: N818 - names what was found, not an error of this program
    """Raised when a promise was not kept."""


def _insist(fine, why):
    if not fine:
        raise Fault(why)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to its next timer instead of waiting."""

    def __init__(self, clock):
        super().__init__(_Jumping(clock))
        self._clock = clock

    def time(self):
        return self._clock.monotonic()


class _Jumping(selectors.DefaultSelector):
    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def select(self, timeout=None):
        if timeout:
            self._clock.advance(timeout)
        return super().select(None if timeout is None else 0)


class Process:
    """A process on the machine: its calls may fail or kill it, which closes its files.

    It is the `Disk` of the code that runs in it.
    """

    def __init__(self, disk, chance, *, failing=0.0, dying=0.0):
        self.alive = True
        self._disk = disk
        self._chance = chance
        self._failing = failing
        self._dying = dying
        self._files = set()

    def __getattr__(self, name):
        return lambda *args: self._call(name, *args)

    def kill(self):
        self.alive = False
        for file in sorted(self._files):
            self._quietly("close", file)

    def _call(self, name, *args):
        if not self.alive:
            if name == "close":  # the system has closed its files
                return None
            raise MachineStopped
        if self._chance.random() < self._dying:
            if name == "write":
                self._quietly("write", args[0], args[1][: self._chance.randrange(len(args[1]) + 1)])
            self.kill()
            raise MachineStopped
        if self._chance.random() < self._failing and not str(args[:1]).endswith(SPARED):
            if name == "write" and self._chance.random() < 0.5:
                return self._disk.write(args[0], args[1][: self._chance.randrange(len(args[1]))])
            code = self._chance.choice(CODES)
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

    def _quietly(self, name, *args):
        try:
            getattr(self._disk, name)(*args)
        except (OSError, MachineStopped):
            pass  # the process is being killed


# -- destinations -----------------------------------------------------------------------------------------------------


class LostReplyError(OSError):
    """The destination has stored the batch, but its response was lost."""


def outcomes(chance, share):
    """Yield the outcomes of calls of a sink, without end."""
    faults = (
        *(lambda: RetryLaterError("busy"), lambda: RetryLaterError("429", after_seconds=chance.choice((5, math.nan)))),
        *(ConnectionRefusedError, TimeoutError, LostReplyError, KeyError, MemoryError),
        *(SystemExit, KeyboardInterrupt, asyncio.CancelledError),
        *(lambda: ParkedError("401", fix="log in"), lambda: BatchTooLargeError("413")),
        *(lambda: RejectedError({0: "422"}), lambda: RejectedError({chance.randrange(9): "422", 700: "nobody"})),
        *(lambda: 0, lambda: 1, lambda: 3, lambda: "hang", lambda: "deaf"),
    )
    while True:
        yield chance.choice(faults)() if chance.random() < share else None


class Destination(FailingSink):
    """A sink whose data survives its process; stores events with the number of the life that delivered them."""

    write_timeout_seconds = 5.0

    def __init__(self, scene, post, process, share):
        chance = post.chance
        opening = (each for each in outcomes(chance, share / 2) if not isinstance(each, int | RejectedError))
        super().__init__(outcomes(chance, share), opening=opening)
        self.max_batch_events = chance.choice((1, 7, 500))
        self.max_batch_bytes = chance.choice((900, 1 << 20))
        self.max_batch_seconds = chance.choice((0.0, 0.5))
        self.process = process
        self.post = post
        self.scene = scene

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
            self.post.got += [(self.post.lives, each.stream, each.seq) for each in batch]


class Rows(Destination):
    """A rewindable sink that writes a row per event to a file."""

    def __init__(self, scene, post, process, share):
        super().__init__(scene, post, process, share)
        self._plan = (each for each in outcomes(post.chance, share) if not isinstance(each, LostReplyError))
        # A write that continues after its cancellation cannot be rewound.
        self._plan = (None if each == "deaf" else each for each in self._plan)
        self.file = RowFile(process, f"{ROWS}/{post.name}")

    async def open(self):
        await super().open()
        self.file.open()

    def keep(self, batch):
        self.file.add([(each.stream, each.seq) for each in batch])

    def mark(self):
        return self.file.mark()

    def rewind(self, mark):
        self.file.whole = mark


class Hooks(FailingCallback):
    """A callback delivered to by a courier, whose calls raise at random."""

    def __init__(self, scene, post, process, share):
        errors = (KeyError("no"), OSError("no"), RuntimeError("no"))
        chance = post.chance
        super().__init__(chance.choice(errors) if chance.random() < share / 2 else None for _ in iter(int, 1))
        self.scene, self.post, self.process = scene, post, process

    def keep(self, event):
        if not self.process.alive:
            raise MachineStopped
        if self.post.terms.on_failure == "count" and isinstance(event, StepEnd):
            self.got(event)
        super().keep(event)
        if self.post.terms.on_failure != "count" and isinstance(event, StepEnd):
            self.got(event)

    def got(self, event):
        self.post.got.append((self.post.lives, *self.scene.numbers[int(event.metrics["n"])]))


class HookRows(Hooks):
    """A rewindable callback that writes a row per step to a file."""

    def __init__(self, scene, post, process, share):
        super().__init__(scene, post, process, share)
        self.file = RowFile(process, f"{ROWS}/{post.name}")

    def got(self, event):
        if self.file.file is None:
            self.file.open()
        self.file.add([self.scene.numbers[int(event.metrics["n"])]])

    def mark(self):
        if self.file.file is None:
            self.file.open()
        return self.file.mark()

    def rewind(self, mark):
        self.file.whole = mark


class RowFile:
    """A file of rows on the simulated disk; an incomplete batch is removed before the next access."""

    def __init__(self, disk, path):
        self.disk, self.path, self.file, self.whole = disk, path, None, 0

    def open(self):
        if self.file is None:
            self.disk.make_directory(ROWS)
            self.file = self.disk.lock(self.path)

    def add(self, rows):
        self._cut()
        data = rest = b"".join(b"%s %d\n" % (stream.encode(), sequence) for stream, sequence in rows)
        while rest:
            rest = rest[self.disk.write(self.file, rest) :]
        self.whole += len(data)

    def mark(self):
        self._cut()
        self.disk.sync(self.file)
        self.disk.sync_path(ROWS)
        return self.whole

    def _cut(self):
        if self.disk.length(self.file) > self.whole:
            self.disk.truncate(self.file, self.whole)


# -- programs and couriers --------------------------------------------------------------------------------------------


class Publisher:
    """The program of one rank, through all its lives."""

    def __init__(self, scene, rank):
        self.scene, self.rank = scene, rank
        self.chance = Random(f"{scene.seed} publisher {rank}")
        self.writer = self.process = None
        self.runs = self.step = 0

    def open(self, *, fine=False):
        scene, chance = self.scene, self.chance
        dying = 0.0 if fine else chance.choice((0.0, 0.0, 0.002))
        self.process = Process(scene.disk, chance, failing=0.0 if fine else scene.failing(chance), dying=dying)
        self.writer = JournalWriter(
            JOURNAL,
            rank=self.rank,
            flush=chance.choice(("always", "interval")),
            flush_seconds=math.inf,
            segment_bytes=chance.choice((1500, 4000, 1 << 20)),
            retain=Retain(max_bytes=2000) if scene.retains else None,
            reserve_bytes=chance.choice((0, 4096)),
            disk=self.process,
            clock=scene.clock,
        )
        try:
            self.writer.open()
        except JournalOpenError:
            self.process.kill()
            self.writer = None
            return
        if not self.runs or chance.random() < 0.5:
            self.runs += 1
            self.step = 0
        self.run = f"run-{self.rank}-{self.runs}"
        ctx = LogContext(output_dir=Path("/out"), run_key=self.run)
        self.state = LoopState(step=self.step, num_steps=99_999, output_dir=Path("/out", self.run), ctx=ctx)
        self._append(RunStart(ctx), "append_start")
        self._append(TrainStart(self.state), "append_start")

    def publish(self, count):
        for _ in range(count):
            if self.chance.random() < 0.01:
                self.writer.append(b"no envelope")
                continue
            self.scene.number += 1
            self._append(StepEnd(self.state, self.step, TrainingBatch(), {"n": self.scene.number}))
            self.step += 1

    def end_run(self):
        self._append(TrainEnd(self.state, LoopArtifacts()))
        self._append(RunEnd(self.state.ctx, RunResult(), ArmResult("arm")), "append_end")

    def close(self):
        self.process._dying = 0.0  # the last maintenance runs on a thread, which must not be killed
        self.writer.close()
        self.process.kill()
        self.writer = None

    def kill(self):
        if self.writer is not None:
            self.process.kill()
            self.writer._upkeep.abandon()
            self.writer = None

    def _append(self, event, how="append"):
        writer, scene = self.writer, self.scene
        if isinstance(event, StepEnd):
            scene.numbers[scene.number] = (writer.stream, writer.next_sequence)
        payload = encode(Envelope(writer.stream, writer.next_sequence, scene.clock.wall(), event, self.run, self.rank))
        getattr(writer, how)(payload, *([self.run] if how != "append" else []))


class Post:
    """One adapter, and its couriers through all their lives."""

    def __init__(self, scene, name, kind, terms):
        self.scene, self.name, self.kind, self.terms = scene, name, kind, terms
        self.chance = Random(f"{scene.seed} {name}")
        self.lives = 0
        self.got = []
        """Life, stream and sequence of what reached a destination that survives its process."""
        self.task = self.courier = self.process = self.adapter = None

    def start(self, *, fine=False):
        scene, chance = self.scene, self.chance
        self.lives += 1
        dying = 0.0 if fine else chance.choice((0.0, 0.0, 0.002, 0.02))
        self.process = Process(scene.disk, chance, failing=0.0 if fine else scene.failing(chance), dying=dying)
        self.adapter = self.kind(scene, self, self.process, 0.0 if fine else chance.choice((0.0, 0.1, 0.5)))
        self.courier = self._courier(self.adapter, self.process)
        self.task = asyncio.get_running_loop().create_task(self.courier.run())

    def _courier(self, adapter, process):
        if isinstance(adapter, Sink):
            seed = Random(self.chance.random())
            adapter = SinkReceiver(adapter, random=seed, grace_seconds=0.5, close_seconds=1.0)
        options = {"disk": process, "clock": self.scene.clock, "poll_seconds": self.chance.choice((0.1, 0.5))}
        return Courier(JOURNAL, self.name, adapter, self.terms, **options)

    async def refuse_another(self):
        """Check that no other courier can deliver while this one does."""
        disk = self.scene.disk
        process = Process(disk, self.chance)
        adapter = self.kind(self.scene, self, process, 0.0)
        if self.task is None or not disk.is_locked(layout.courier_file(JOURNAL, self.name, "lock")):
            return
        try:
            await self._courier(adapter, process).run()
        except CourierBusyError:
            process.kill()
            return
        raise Fault(f"two couriers at once deliver to {self.name}")

    async def kill(self):
        if self.task is not None:
            self.process.kill()
            self.task.cancel()
            await self.end()

    async def end(self):
        """Wait for the courier, and check that it ended without an unexpected error."""
        await asyncio.wait([self.task])
        error = None if self.task.cancelled() else self.task.exception()
        known = (MachineStopped, OSError, *AT_FAULT)
        _insist(error is None or isinstance(error, known), f"the courier of {self.name} ended with {error!r}")
        self.process.kill()
        if isinstance(self.adapter, FailingSink):
            self.adapter.release()
        self.task = None


class Scene:
    """One machine, and everything that runs on it."""

    def __init__(self, seed):
        self.seed = seed
        self.clock = ManualClock()
        self.disk = SimulatedDisk()
        self.chance = chance = Random(f"{seed} scene")
        self.retains = chance.random() < 0.3
        self.weather = 0.0
        self.number = 0
        self.numbers = {}
        """Number of a step -> its stream and sequence."""
        self.on_record = {}
        """Stream and sequence of each event that was ever seen in the journal -> whether it is a step."""
        self.lost = set()
        """Those of them that a power cut removed."""
        self.power_cuts = 0
        self.told = blake2b()
        self.publishers = [Publisher(self, rank) for rank in range(chance.randint(1, 3))]
        ranks = (None, (0,))
        self.posts = [
            Post(self, "sink", Destination, Terms(chance.choice(ranks))),
            Post(self, "rows", Rows, Terms(chance.choice(ranks))),
            Post(self, "hooks", Hooks, Terms(chance.choice(ranks), chance.choice(("count", "dead", "retry")))),
            Post(self, "hook rows", HookRows, Terms(chance.choice(ranks), chance.choice(("dead", "retry")))),
        ]

    def failing(self, chance):
        return chance.choice((0.0, 0.0, 0.01, 0.1)) * self.weather

    def tell(self, *what):
        """Add to the trace, with the time; a replay must give the same trace."""
        self.told.update(f"{self.clock.monotonic():.6f} {what}\n".encode())

    async def play(self):
        """Run all actions, then drain and check."""
        enlist(JOURNAL, [Followed(post.name, terms=post.terms) for post in self.posts], self.disk)
        acts = (
            *[self.publish] * 8,
            *[self.wait] * 5,
            *[self.start_or_stop] * 6,
            *(self.kill_courier, self.kill_publisher, self.change_weather, self.fill_disk, self.start_twice),
            self.flush,
            *([self.cut_power] if self.chance.random() < 0.5 else []),
        )
        for _ in range(self.chance.randint(10, 60)):
            act = self.chance.choice(acts)
            self.tell(act.__name__, self.disk.calls, *(len(post.got) for post in self.posts))
            await act()
        await self.settle()
        self.inspect()

    # -- acts ---------------------------------------------------------------------------------------------------------

    async def publish(self):
        publisher = self.chance.choice(self.publishers)
        try:
            if publisher.writer is None:
                publisher.open()
            if publisher.writer is None:
                return
            for _ in range(self.chance.randint(1, 4)):
                publisher.publish(self.chance.choice((1, 5, 40)))
                if self.chance.random() < 0.3:
                    await asyncio.sleep(self.chance.choice((0.0, 0.05, 1.0)))
                    if publisher.writer is None:
                        return
            if self.chance.random() < 0.2:
                publisher.end_run()
                publisher.close()
        except MachineStopped:
            publisher.kill()
        self.look()

    async def wait(self):
        await asyncio.sleep(self.chance.choice((0.0, 0.1, 1.0, 10.0, 30.0)))

    async def start_or_stop(self):
        post = self.chance.choice(self.posts)
        if post.task is None:
            post.start()
            return
        if self.chance.random() < 0.3:
            post.courier.finish()
            await asyncio.sleep(self.chance.choice((0.0, 1.0)))
        if post.task.done() or self.chance.random() < 0.3:
            post.courier.stop()
            await post.end()

    async def start_twice(self):
        await self.chance.choice(self.posts).refuse_another()

    async def kill_courier(self):
        await self.chance.choice(self.posts).kill()

    async def kill_publisher(self):
        self.chance.choice(self.publishers).kill()
        self.look()

    async def change_weather(self):
        self.weather = self.chance.choice((0.0, 1.0))

    async def fill_disk(self):
        self.disk.room = self.chance.choice((0, 500, 5000, None, None))

    async def flush(self):
        for publisher in self.publishers:
            if publisher.writer is not None:
                self.look()  # before anything is pruned
                try:
                    publisher.writer.flush()
                except MachineStopped:
                    publisher.kill()

    async def cut_power(self):
        """Cut the power in the middle of a random call."""
        self.look()
        self.disk.stop(self.disk.calls + self.chance.randint(1, 100), self.chance.random())
        await asyncio.sleep(self.chance.choice((0.1, 1.0)))
        for post in self.posts:
            await post.kill()
        for publisher in self.publishers:
            publisher.kill()
        self.disk.restart("kill")
        self.look()
        before = self._there()
        self.disk.restart("power", keep=self.chance.choice((0.0, 0.5, 1.0)))
        self.lost |= before.keys() - self._there().keys()
        self.power_cuts += 1
        await asyncio.sleep(2.0)  # the names of streams contain the second

    # -- the end ------------------------------------------------------------------------------------------------------

    async def settle(self):
        """Stop everything, end the faults, and let couriers deliver the rest."""
        self.weather, self.disk.room = 0.0, None
        for post in self.posts:
            await post.kill()
        for publisher in self.publishers:
            publisher.kill()
        self.look()
        for post in self.posts:
            post.start(fine=True)
            post.courier.finish()
        for post in self.posts:
            try:
                await asyncio.wait_for(asyncio.shield(post.task), SETTLE_SECONDS)
            except TimeoutError:
                raise Fault(f"{post.name} makes no progress at {post.courier.counts}") from None
            await post.end()

    def look(self):
        """Update what is known to be recorded."""
        self.on_record |= self._there()

    def _there(self):
        reader = JournalReader(JOURNAL, self.disk)
        there = {}
        for stream in reader.streams():
            for record in reader.read(stream):
                try:
                    there[stream, record.sequence] = isinstance(decode(record.payload).event, StepEnd)
                except CodecError:
                    there[stream, record.sequence] = False
        return there

    def inspect(self):
        """Check every adapter; raises `Fault`."""
        for post in self.posts:
            ranks = post.terms.ranks
            mine = {each for each in self.on_record if ranks is None or layout.rank_of(each[0]) in ranks}
            steps = {each for each in mine if self.on_record[each]}
            owed = steps if isinstance(post.adapter, Hooks) else mine
            self._inspect_one(post, mine, owed)

    def _inspect_one(self, post, mine, owed):
        dead = self._letters(post)
        if isinstance(post.adapter, Rows | HookRows):
            rows = [tuple(row.split()) for row in self.disk.contents(f"{ROWS}/{post.name}").decode().splitlines()]
            got = [(0, stream, int(sequence)) for stream, sequence in rows]
            _insist(len(set(got)) == len(got), f"{post.name} has {len(got) - len(set(got))} rows twice")
        else:
            got = post.got
        reached = {each[1:] for each in got}
        must = owed - self.lost
        _insist(must <= reached | dead, f"{post.name} lacks {sorted(must - reached - dead)[:5]} of {len(must)}")
        _insist(reached | dead <= mine, f"{post.name} has unpublished events: {sorted((reached | dead) - mine)[:5]}")
        orders = defaultdict(list)
        for life, stream, sequence in dict.fromkeys(got):
            orders[life, stream].append(sequence)
        for (life, stream), order in orders.items():
            at = next((each for each in pairwise(order) if each[0] > each[1]), None)
            _insist(at is None, f"{post.name}, in life {life}, received {at} of {stream} in this order")
        (account,) = (each for each in accounts(JOURNAL, self.disk) if each.name == post.name)
        _insist(account.pending == 0 and not account.busy, f"not all was delivered: {account}")
        least, most = len(mine - self.lost), len(mine)
        right = least <= account.recorded == account.delivered + account.dead <= most
        _insist(right, f"{account}, where {least} to {most} events are recorded")
        _insist(account.dead <= len(dead), f"{account}, and {len(dead)} dead letters")
        if type(post.adapter) is Rows:
            _insist(account.delivered == len(got), f"{account}, and {len(got)} rows")
        self.tell(post.name, account.delivered, account.dead, [(life, seq) for life, _, seq in got])

    def _letters(self, post):
        path = layout.courier_file(JOURNAL, post.name, "dead.jsonl")
        if path not in self.disk.paths():
            return set()
        whole = bytes(self.disk.contents(path)).split(b"\n")[:-1]  # a kill may have truncated the last one
        try:
            letters = [msgspec.json.decode(line, type=DeadLetter) for line in whole]
        except msgspec.DecodeError as error:
            raise Fault(f"{post.name} has a dead letter that cannot be read: {error}") from error
        return {(letter.stream, letter.seq) for letter in letters}


def play(seed):
    """Run one seed; raises `Fault`."""
    scene = Scene(seed)
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # retries are logged, thousands of times
    try:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(scene.clock)) as runner:
            runner.run(scene.play())
    finally:
        logging.disable(before)
    return scene


def main():
    """Run the long form of the test."""
    parser = argparse.ArgumentParser(description="A random mix of all faults of delivery; see the file.")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=time.time_ns() % 10**9, help="to replay: the seed that failed")
    asked = parser.parse_args()
    began = time.monotonic()
    events = seconds = cuts = lives = 0
    for seed in range(asked.first, asked.first + asked.seeds):
        try:
            scene = play(seed)
        except Exception as error:
            print(f"seed {seed}: {error!r}", file=sys.stderr)
            print(f"replay: python {__file__} --seeds 1 --first {seed}", file=sys.stderr)
            if asked.seeds == 1:
                raise
            return 1
        events += len(scene.on_record)
        seconds += scene.clock.monotonic()
        cuts += scene.power_cuts
        lives += sum(post.lives for post in scene.posts)
    print(f"seeds {asked.first} to {asked.first + asked.seeds - 1}, {events:,} events, {lives:,} lives of couriers,")
    print(f"{cuts:,} power cuts, {seconds / 3600:,.0f} virtual hours, lost 0, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
