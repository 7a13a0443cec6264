"""A journal that a relay sends to JetStream, and the mirror that is written from it."""

import nats
import pytest

from evsys_adapters import NatsRelay
from evsys_adapters.jetstream.connection import ConnectionConfig
from evsys_adapters.jetstream.mirror import Mirror
from evsys_bus.journal import JournalReader, JournalWriter, verify
from support.couriers import counted, deliver, read_status


def record(journal, count, *, rank=0, size=100, stream=None):
    """Record events of which each payload differs, and return the name of their stream."""
    writer = JournalWriter(journal, rank=rank, segment_bytes=20_000).open()
    for _ in range(count):
        writer.append(b"%d " % writer.next_sequence + b"x" * size)
    writer.close()
    return writer.stream


def contents(journal):
    reader = JournalReader(journal)
    return {stream: list(reader.read(stream)) for stream in reader.streams("r", "s")}


def relay_to(server, **params):
    return NatsRelay(servers=[server.url], timeout_seconds=3, **params)


async def mirror_once(server, directory, **options):
    notes = []
    settings = {"stream": "EVSYS", "subject": "evsys.>", "ack_wait_seconds": 0.5, **options}
    mirror = Mirror(ConnectionConfig(servers=(server.url,)), directory, note=notes.append, **settings)
    await mirror.run(once=True)
    return mirror, notes


async def test_a_mirror_has_the_events_of_all_streams_byte_for_byte(server, tmp_path):
    for rank in range(3):
        record(tmp_path / "journal", 700, rank=rank)
    courier = await deliver(tmp_path / "journal", relay_to(server))
    assert counted(courier) == (2100, 0, 0)
    mirror, notes = await mirror_once(server, tmp_path / "mirror")
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")
    assert (mirror.journal.events, mirror.journal.missing, notes) == (2100, [], [])
    assert not any(each.missing_ranges or each.corrupt_ranges for each in verify(tmp_path / "mirror").streams)
