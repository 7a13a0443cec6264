"""A journal over JetStream: relay and mirror beside nats-py's bare publish and consume of the same batches.

A real nats-server stores the messages in a temporary directory. The bare client publishes the encoded batches from
memory, one under way at a time, and consumes them one by one, without writing them anywhere. The durable client does
by hand what cannot be left out: it reads and verifies the journal, and on the other side appends each message to a file
and syncs that before the acknowledgement. Ours has a cursor, retries, streams and segments besides.
"""

import asyncio
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_adapters.jetstream.connection import ConnectionConfig
from evsys_adapters.jetstream.messages import AFTER, HEADER_BYTES, ID, Message
from evsys_adapters.jetstream.messages import EVENTS as EVENTS_HEADER
from evsys_adapters.jetstream.mirror import Mirror
from evsys_adapters.nats_relay import NatsRelay
from evsys_bus.bench.dispatch import publish_steps
from evsys_bus.bench.suite import Budget, Row, Table, TargetResult, rotate, spread_of
from evsys_bus.bus import EventBus
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.journal import JournalReader
from evsys_bus.tasks import run_in_new_loop

EVENTS: Final = 300_000
MESSAGE_BYTES: Final = (1 << 20) - HEADER_BYTES
MIN_SHARE: Final = 0.8
BARE: Final = "nats-py, from and to memory"
DURABLE: Final = "nats-py, from and to the disk"
OURS: Final = "evsys-bus"
_NAMES: Final = (BARE, DURABLE, OURS)
_STREAM: Final = "EVSYS"
_SUBJECT: Final = "evsys.>"
_MAX_ROUNDS: Final = 7
_POLL_SECONDS: Final = 0.005
_ARRAY_BYTES: Final = 5
"""What the body takes for each payload, and for itself."""


class RelaySuite:
    """The suite ``relay``."""

    name = "relay"
    promise = "Relay and mirror have 0.8 of the speed of nats-py's bare publish and consume of the same batches"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure sending, then receiving."""
        support = _nats_server_of_tests()
        if not importlib.util.find_spec("nats") or support.PROGRAM is None:
            absent = {BARE: "nats-py or nats-server is missing"}
            yield Table(title="over JetStream", unit="events/s", rows=[], absent=absent)
            return
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            journal = Path(directory, "journal")
            with EventBus([], journal=journal) as bus:
                publish_steps(bus, EVENTS)
            rounds = min(max(budget.process_rounds, 2), _MAX_ROUNDS)
            with support.NatsServer(Path(directory, "nats")) as server:
                seconds = run_in_new_loop(lambda: _measure(server.url, Path(directory), rounds))
        for title in ("sent", "received"):
            shares = {
                name: spread_of([a / b for a, b in zip(seconds[BARE, title], each, strict=True)])
                for (name, found), each in seconds.items()
                if found == title
            }
            share = shares[OURS].median
            yield Table(
                title=f"{EVENTS:,} events in messages of 1 MiB, {title}",
                unit="events/s",
                rows=[
                    Row(
                        name,
                        spread_of([EVENTS / each for each in seconds[name, title]]),
                        None if name == BARE else shares[name],
                        ours=name == OURS,
                    )
                    for name in _NAMES
                ],
                baseline=BARE,
                target_results=[
                    TargetResult(f"at least {MIN_SHARE} of the speed of {BARE}", share, share >= MIN_SHARE)
                ],
            )


async def _measure(url: str, directory: Path, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each candidate by round, for both directions."""
    import nats

    messages = list(_read_batches(directory / "journal"))
    seconds: dict[tuple[str, str], list[float]] = {
        (name, title): [] for name in _NAMES for title in ("sent", "received")
    }
    client: Any = await nats.connect(url)
    jetstream = client.jetstream()
    for turn in range(rounds):
        for name in rotate(_NAMES, turn):
            settings = {"subjects": [_SUBJECT], "retention": "workqueue", "discard": "new"}
            await jetstream.add_stream(name=_STREAM, **settings)
            started = time.perf_counter()
            if name == BARE:
                await _publish(jetstream, messages)
            elif name == DURABLE:
                await _publish(jetstream, _read_batches(directory / "journal"))
            else:
                await _relay(url, directory / "journal", f"relay-{turn}")
            sent = time.perf_counter()
            consumer = {"filter_subject": _SUBJECT, "ack_policy": "explicit", "max_ack_pending": 1}
            await jetstream.add_consumer(_STREAM, durable_name="mirror", **consumer)
            count = (await jetstream.stream_info(_STREAM)).state.messages
            consuming = time.perf_counter()
            if name == BARE:
                await _consume(jetstream, count, None)
            elif name == DURABLE:
                await _consume(jetstream, count, directory / f"messages-{turn}")
            else:
                await _mirror(url, directory / f"mirror-{turn}")
            received = time.perf_counter()
            seconds[name, "sent"].append(sent - started)
            seconds[name, "received"].append(received - consuming)
            await jetstream.delete_stream(_STREAM)
    await client.close()
    return seconds


def _read_batches(journal: Path) -> Iterator[Message]:
    """Read a journal in batches, verified, as a program for nothing else would."""
    reader = JournalReader(journal)
    [stream] = reader.streams()
    batch: list[bytes] = []
    sequence, size = 0, _ARRAY_BYTES
    encode = msgspec.msgpack.Encoder().encode

    def message() -> Message:
        first = sequence - len(batch) + 1
        id_ = f"{first}-{sequence}"
        return Message({ID: f"{stream}/{id_}", EVENTS_HEADER: id_, AFTER: str(first - 1)}, encode(batch))

    for run in reader.tail(stream).poll_runs():
        for sequence, payload in enumerate(run.payloads, run.first_sequence):  # used in `message`
            if size + len(payload) + _ARRAY_BYTES > MESSAGE_BYTES:
                sequence -= 1  # noqa: PLW2901
                yield message()
                sequence += 1  # noqa: PLW2901
                batch.clear()
                size = _ARRAY_BYTES
            batch.append(payload)
            size += len(payload) + _ARRAY_BYTES
    yield message()


async def _publish(jetstream: Any, messages: Iterable[Message]) -> None:
    for each in messages:
        await jetstream.publish("evsys.bare.stream", each.body, headers=each.headers)


async def _relay(url: str, journal: Path, name: str) -> None:
    courier = Courier(journal, name, NatsRelay(servers=[url]), DeliveryPolicy(ranks=None))
    courier.finish()
    await courier.run()


async def _consume(jetstream: Any, count: int, path: Path | None) -> None:
    subscription = await jetstream.pull_subscribe_bind("mirror", _STREAM)
    file = None if path is None else os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for _ in range(count):
        [message] = await subscription.fetch(1)
        if file is not None:
            await asyncio.to_thread(_append, file, message.data)
        await message.ack()
    if file is not None:
        os.close(file)


def _append(file: int, data: bytes) -> None:
    os.write(file, data)
    os.fdatasync(file)


async def _mirror(url: str, directory: Path) -> None:
    mirror = Mirror(ConnectionConfig(servers=(url,)), directory, stream=_STREAM, subject=_SUBJECT, consumer="mirror")
    loop = asyncio.get_running_loop()

    def stop_at_end() -> None:
        if mirror.journal.events >= EVENTS:
            mirror.stop()
        else:
            loop.call_later(_POLL_SECONDS, stop_at_end)

    stop_at_end()
    await mirror.run()  # not `once`, which asks the server whether there is more
    if mirror.journal.events != EVENTS:
        raise RuntimeError(f"{mirror.journal.events} events arrived: {json.dumps(mirror.journal.missing)}")


def _nats_server_of_tests() -> Any:
    """Load the module of the tests from its file, because the tests are not a package."""
    path = Path(__file__).parent.parent / "tests" / "support" / "nats_server.py"
    spec = importlib.util.spec_from_file_location("nats_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
