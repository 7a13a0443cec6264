#!/usr/bin/env python3
"""Kill a relay, a mirror and their server over and over; then compare the mirror with the journal.

usage: uv run python tests/nats_kills.py --kills 100 --events 1000000

Several ranks write a journal. A process with a courier relays it to a real nats-server, and `evsys-bus mirror` writes
it again. One of the three is killed by SIGKILL at random moments, and started again. With --max-bytes the stream is
full now and then, with --dedupe-window the server forgets the ids of messages quickly. In the end the mirror must have
every stream with every event, once, in order, byte for byte. The seed repeats the choices, not the moments.
"""

import argparse
import asyncio
import collections
import itertools
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nats

from evsys_adapters import NatsRelay
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.journal import JournalReader, JournalWriter, verify
from support.nats_server import NatsServer
from support.programs import EVSYS_BUS
from support.violations import Violation

VICTIMS = ("relay", "mirror", "server")
TIMEOUT_SECONDS = 120.0
PAYLOAD = b"x" * 340


async def relay(directory: Path, url: str, *, finish: bool) -> None:
    """Deliver the journal until all of it is delivered, or without end."""
    adapter = NatsRelay(servers=[url], timeout_seconds=2)
    adapter.max_batch_events = 500  # many messages
    courier = Courier(directory / "journal", "relay", adapter, DeliveryPolicy(ranks=None))
    if finish:
        courier.finish()
    await courier.run()


async def create_stream(url: str, max_bytes: int, dedupe_window: float) -> None:
    client = await nats.connect(url)
    settings = {"subjects": ["evsys.>"], "retention": "workqueue", "discard": "new", "max_bytes": max_bytes}
    await client.jetstream().add_stream(name="EVSYS", duplicate_window=dedupe_window, **settings)
    await client.close()


class Scenario:
    """One journal, one server, one mirror, through all lives of the processes."""

    def __init__(self, directory: Path, server: NatsServer, rng: random.Random, ranks: int) -> None:
        self.directory, self.server, self.rng = directory, server, rng
        self.writers = [JournalWriter(directory / "journal", rank=rank, flush="never").open() for rank in range(ranks)]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    def start(self, name: str) -> None:
        log = (self.directory / f"{name}.log").open("ab")
        with log:
            self.processes[name] = subprocess.Popen(self.command(name), stdout=log, stderr=log)

    def command(self, name: str) -> list[str | Path]:
        if name == "mirror":
            return [EVSYS_BUS, "mirror", self.server.url, self.directory / "mirror", "--ack-wait", "0.5"]
        return [sys.executable, __file__, "--relay", self.server.url, "--directory", self.directory]

    def write(self, count: int) -> None:
        for number in range(count):
            writer = self.writers[number % len(self.writers)]
            writer.append(b"%s %d " % (writer.stream.encode(), writer.next_sequence) + PAYLOAD)

    def kill_one(self) -> None:
        victim = self.rng.choice(VICTIMS)
        self.counts[victim] += 1
        if victim == "server":
            self.server.kill()
            time.sleep(self.rng.uniform(0, 0.3))
            self.server.start()
            return
        process = self.processes[victim]
        if process.poll() is not None:
            log = (self.directory / f"{victim}.log").read_text(encoding="utf-8")[-3000:]
            raise Violation(f"the {victim} has ended by itself: {log}")
        process.kill()
        process.wait()
        time.sleep(self.rng.uniform(0, 0.3))
        self.start(victim)

    def finish(self) -> None:
        """Deliver and mirror the rest."""
        for writer in self.writers:
            writer.close()
        self.stop("relay")
        self.run([*self.command("relay"), "--finish"])  # while the mirror empties the stream
        self.stop("mirror")
        self.run([*self.command("mirror"), "--once"])

    @staticmethod
    def run(command: list[str | Path]) -> None:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        if done.returncode:
            raise Violation(f"{command} ends with {done.returncode}: {done.stderr[-3000:]}")

    def stop(self, *names: str) -> None:
        for name in names or list(self.processes):
            process = self.processes.pop(name, None)
            if process is not None:
                process.kill()
                process.wait()

    def compare(self) -> int:
        """Return the number of events; raises `Violation` if the mirror differs."""
        original, mirror = (JournalReader(self.directory / name) for name in ("journal", "mirror"))
        if original.streams() != mirror.streams():
            raise Violation(f"streams: {original.streams()} and {mirror.streams()}")
        count = 0
        for stream in original.streams():
            for ours, theirs in itertools.zip_longest(original.read(stream), mirror.read(stream)):
                if ours != theirs:
                    raise Violation(f"{stream}: {str(ours)[:80]} is {str(theirs)[:80]} in the mirror")
                count += 1
        faults = [
            each for each in verify(self.directory / "mirror").streams if each.missing_ranges or each.corrupt_ranges
        ]
        if faults:
            raise Violation(f"the mirror has gaps or damage: {faults}")
        return count


def run(directory: Path, kills: int, events: int, seed: int, ranks: int, max_bytes: int, dedupe_window: float) -> str:
    """Run one scenario; returns a summary."""
    rng = random.Random(seed)
    with NatsServer(directory / "nats") as server:
        asyncio.run(create_stream(server.url, max_bytes, dedupe_window))
        scenario = Scenario(directory, server, rng, ranks)
        try:
            scenario.start("relay")
            scenario.start("mirror")
            for _ in range(kills):
                until = time.monotonic() + rng.uniform(0.3, 1.5)
                scenario.write(events // (kills + 1))
                time.sleep(max(0.0, until - time.monotonic()))
                scenario.kill_one()
            scenario.write(events - kills * (events // (kills + 1)))
            scenario.finish()
            count = scenario.compare()
        finally:
            scenario.stop()
            for writer in scenario.writers:
                writer.abandon()
    if count != events:
        raise Violation(f"{count} events are in both, {events} were written")
    killed = ", ".join(f"{name} {count}" for name, count in sorted(scenario.counts.items()))
    return f"{kills} kills ({killed}): {count:,} events in the mirror, none lost, doubled or out of order"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--max-bytes", type=int, default=-1, help="size of the stream; small: it is full now and then")
    parser.add_argument("--dedupe-window", type=float, default=120.0, help="seconds")
    parser.add_argument("--directory", type=Path, help="where to work; kept")
    parser.add_argument("--relay", help=argparse.SUPPRESS)
    parser.add_argument("--finish", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.relay:
        asyncio.run(relay(given.directory, given.relay, finish=given.finish))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.directory or Path(temporary)
        arguments = (given.kills, given.events, given.seed, given.ranks, given.max_bytes, given.dedupe_window)
        started = time.monotonic()
        print(f"{run(directory, *arguments)}, in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
