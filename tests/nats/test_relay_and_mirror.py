"""A journal that a relay sends to JetStream, and the mirror that is written from it."""

import asyncio

import nats
import pytest

from evsys_adapters import NatsRelay
from evsys_adapters.jetstream.connection import ConnectionConfig
from evsys_adapters.jetstream.mirror import Mirror
from evsys_bus.delivery.progress import read_progress
from evsys_bus.journal import JournalReader, JournalWriter, verify
from support.couriers import counted, deliver, read_status
from support.waiting import wait_until_async

pytestmark = [pytest.mark.long_on_uvloop, pytest.mark.servers]


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


async def test_a_batch_of_many_streams_is_one_message_for_each(server, tmp_path):
    writers = [JournalWriter(tmp_path / "journal", rank=rank).open() for rank in range(20)]
    for number in range(400):
        writers[number % 20].append(b"%d" % number)
    relay = relay_to(server)
    await deliver(tmp_path / "journal", relay)
    assert relay.max_batch_seconds == 0.2  # more streams, longer batches: messages a second are what a mirror costs
    mirror, _ = await mirror_once(server, tmp_path / "mirror")
    assert (mirror.messages, mirror.journal.events) == (20, 400)
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")
    for writer in writers:
        writer.close()


async def test_the_end_of_a_stream_reaches_the_mirror(server, tmp_path):
    closed = record(tmp_path / "journal", 3)
    writer = JournalWriter(tmp_path / "journal", rank=1).open()
    writer.append(b"its process is killed after this")
    live = JournalWriter(tmp_path / "journal", rank=2).open()
    live.append(b"more may come")
    writer.abandon(5)
    await deliver(tmp_path / "journal", relay_to(server))
    running = Mirror(ConnectionConfig(servers=(server.url,)), tmp_path / "mirror", stream="EVSYS", subject="evsys.>")
    task = asyncio.create_task(running.run())
    reader = JournalReader(tmp_path / "mirror")
    await wait_until_async(lambda: running.messages == 5)  # three batches and two ends
    assert {stream: reader.is_live(stream) for stream in reader.streams()} == {
        closed: False,
        writer.stream: False,
        live.stream: True,
    }
    running.stop()
    await task
    live.close()
    assert {each.stream: each.is_closed for each in verify(tmp_path / "mirror").streams} == {
        closed: True,
        writer.stream: False,
        live.stream: False,
    }


async def test_a_server_that_is_killed_and_started_again_loses_nothing(server, tmp_path):
    record(tmp_path / "journal", 15_000)
    relay = relay_to(server)
    relay.max_batch_events = 500
    task = asyncio.create_task(deliver(tmp_path / "journal", relay))
    await wait_until_async(lambda: any(each.delivered > 2000 for each in read_progress(tmp_path / "journal")))
    server.kill()
    await asyncio.to_thread(server.start)
    assert counted(await task) == (15_000, 0, 0)
    mirror, _ = await mirror_once(server, tmp_path / "mirror")
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")
    assert mirror.journal.missing == []


async def test_events_that_come_again_in_other_batches_after_the_dedupe_window_change_nothing(server, tmp_path):
    stream = record(tmp_path / "journal", 1200)
    client = await nats.connect(server.url)
    settings = {"subjects": ["evsys.>"], "retention": "workqueue", "discard": "new", "duplicate_window": 0.1}
    await client.jetstream().add_stream(name="EVSYS", **settings)
    for name, events in (("first", 500), ("second", 350), ("third", 500)):
        relay = relay_to(server)
        relay.max_batch_events = events
        await deliver(tmp_path / "journal", relay, name=name)  # from the first event on, as after a kill
        await asyncio.sleep(0.3)
    info = await client.jetstream().stream_info("EVSYS")
    await client.close()
    assert info.state.messages >= 3 + 4 + 3
    mirror, notes = await mirror_once(server, tmp_path / "mirror")
    assert (mirror.journal.events, mirror.journal.missing, notes) == (1200, [], [])
    assert [each.sequence for each in JournalReader(tmp_path / "mirror").read(stream)] == [*range(1, 1201)]


async def test_a_message_that_a_killed_mirror_had_comes_again_before_the_later_ones(server, tmp_path):
    record(tmp_path / "journal", 2000)
    await deliver(tmp_path / "journal", relay_to(server))
    client = await nats.connect(server.url)
    jetstream = client.jetstream()
    settings = {"filter_subject": "evsys.>", "ack_policy": "explicit", "ack_wait": 0.5, "max_ack_pending": 1}
    await jetstream.add_consumer("EVSYS", durable_name="mirror", **settings)
    subscription = await jetstream.pull_subscribe_bind("mirror", "EVSYS")
    await subscription.fetch(1)  # and no acknowledgement: it is killed here
    mirror, notes = await mirror_once(server, tmp_path / "mirror", consumer="mirror")
    await client.close()
    assert (mirror.journal.events, notes) == (2000, [])
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")


async def test_a_full_stream_makes_the_journal_wait_until_a_mirror_empties_it(server, tmp_path):
    record(tmp_path / "journal", 2000, size=200)
    task = asyncio.create_task(deliver(tmp_path / "journal", relay_to(server, max_bytes=1 << 16)))
    await wait_until_async(lambda: any(each.state == "retrying" for each in read_progress(tmp_path / "journal")))
    status = read_status(tmp_path / "journal")
    assert "the stream EVSYS" in status.error
    assert "is full" in status.error
    assert status.pending > 1000
    running = Mirror(ConnectionConfig(servers=(server.url,)), tmp_path / "mirror", stream="EVSYS", subject="evsys.>")
    mirroring = asyncio.create_task(running.run())
    assert counted(await task) == (2000, 0, 0)
    await wait_until_async(lambda: running.journal.events == 2000)
    running.stop()
    await mirroring
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")


async def test_an_event_larger_than_a_message_is_sent_in_parts(server, tmp_path):
    writer = JournalWriter(tmp_path / "journal").open()
    payloads = [b"before", b"a" * 2_500_000 + b"b", b"after", b"c" * 1_100_000]
    for each in payloads:
        writer.append(each)
    writer.close()
    await deliver(tmp_path / "journal", relay_to(server))
    mirror, notes = await mirror_once(server, tmp_path / "mirror")
    assert [each.payload for each in JournalReader(tmp_path / "mirror").read(writer.stream)] == payloads
    assert (mirror.journal.events, notes) == (4, [])
    assert not list(tmp_path.glob("mirror/mirror/*.part"))


async def test_messages_that_the_server_has_lost_are_a_gap_with_its_range(server, tmp_path):
    stream = record(tmp_path / "journal", 500)
    await deliver(tmp_path / "journal", relay_to(server))
    await mirror_once(server, tmp_path / "mirror", consumer="mirror")
    record(tmp_path / "journal", 600)
    await deliver(tmp_path / "journal", relay_to(server))
    client = await nats.connect(server.url)
    await client.jetstream().purge_stream("EVSYS")
    await client.close()
    record(tmp_path / "journal", 10)
    await deliver(tmp_path / "journal", relay_to(server))
    mirror, notes = await mirror_once(server, tmp_path / "mirror", consumer="mirror")
    assert mirror.journal.missing == [(stream, 501, 1100)]
    assert notes == [f"{stream}: events 501 to 1100 are missing: the server has lost or removed them"]
    assert verify(tmp_path / "mirror").streams[0].missing_ranges == [(501, 1100)]


async def test_a_gap_of_the_original_is_one_of_the_mirror(server, tmp_path):
    stream = record(tmp_path / "journal", 400)
    segments = sorted(tmp_path.glob("journal/r0-*/*.seg"))
    segments[1].unlink()
    await deliver(tmp_path / "journal", relay_to(server))
    mirror, notes = await mirror_once(server, tmp_path / "mirror")
    [(_, first, last)] = mirror.journal.missing
    assert notes == [f"{stream}: events {first} to {last} are missing: the original lacks them"]
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")


async def test_a_mirror_continues_where_it_was_and_refuses_messages_of_others(server, tmp_path):
    record(tmp_path / "journal", 10)
    await deliver(tmp_path / "journal", relay_to(server))
    await mirror_once(server, tmp_path / "mirror")
    record(tmp_path / "journal", 10)
    client = await nats.connect(server.url)
    await client.jetstream().publish("evsys.0.r0-000001-20260131T120000-5f3a91c2", b"of somebody else")
    headers = {"Evsys-Events": "1-1", "Evsys-After": "0"}
    await client.jetstream().publish("evsys.0.lock", b"\x91\xc4\x01x", headers=headers)
    await client.close()
    await deliver(tmp_path / "journal", relay_to(server))
    mirror, [note, other] = await mirror_once(server, tmp_path / "mirror")
    assert "which no journal can have" in other
    assert note.startswith(
        "refused: evsys.0.r0-000001-20260131T120000-5f3a91c2 has a message that is not of nats_relay"
    )
    assert mirror.journal.events == 10
    assert contents(tmp_path / "mirror") == contents(tmp_path / "journal")
