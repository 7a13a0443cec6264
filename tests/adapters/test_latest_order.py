"""Which uploaded checkpoint is the newest: by the order of lives, whatever clocks say, on every kind of store."""

import json
from functools import partial

import anyio
import anyio.lowlevel
import msgspec
import pytest

from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.manifest import Latest, Manifest, StoredFile
from evsys_adapters.checkpoints.restore import choose_checkpoint, newest_state
from evsys_adapters.checkpoints.store_urls import StoreOptions, StorePool
from evsys_bus import ManifestRow
from evsys_bus.errors import ParkedError, RetryLaterError
from tests.adapters.test_checkpoint_upload import Upload

pytestmark = pytest.mark.long_on_uvloop  # the order of requests is the store's, not the loop's

FIRST = "r0-000001-20260302T090000-aaaaaaaa"
SECOND = "r0-000002-20260301T090000-bbbbbbbb"  # its clock is a day behind
THIRD = "r0-000003-20250101T000000-cccccccc"


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.servers)])
async def destination(request, tmp_path):
    if request.param == "file":
        places, url = StorePool(StoreOptions()), f"file://{tmp_path}/bucket"
    else:
        name, reach = request.getfixturevalue("s3_bucket")
        places, url = (
            StorePool(StoreOptions(**{name: reach[name] for name in ("endpoint", "region", "path_style")})),
            f"s3://{name}/prefix",
        )
    place = await places.get(url)
    yield Destination(place.store, place.prefix, "low")
    await places.close()


def manifest(batch, stream, seq=1, origin="here", name=None):
    file = StoredFile("state/w", 1, "0" * 64)
    row = ManifestRow(name or f"step-{batch:06d}", batch=batch)
    return Manifest("low", row, stream, seq, [file], state="state/w", origin=origin)


async def newest(destination):
    """By `latest`, by what fetch and resume choose, and by the manifests, which all say the same."""
    again = Destination(destination.store, destination.run_key.removesuffix("/low").removesuffix("low"), "low")
    latest = (await again.latest()).checkpoint
    assert (await choose_checkpoint(again, None)).row.name == latest
    assert (await newest_state(again)).row.name == latest
    assert (await again.manifests())[-1].row.name == latest
    return latest


async def test_a_life_whose_clock_is_behind_comes_after_the_one_before(destination):
    for batch in (9, 19):
        await destination.publish(manifest(batch, FIRST, batch))
    await destination.publish(manifest(29, SECOND))
    assert await newest(destination) == "step-000029"
    await destination.publish(manifest(24, THIRD))  # gone on from an earlier step
    assert await newest(destination) == "step-000024"
    await destination.publish(manifest(22, SECOND, 5))  # late
    assert await newest(destination) == "step-000024"
    found = [each.row.batch for each in await destination.manifests()]
    assert found == [9, 19, 29, 22, 24]


async def test_streams_of_one_journal_that_come_out_of_order_are_ordered_by_their_counters(destination):
    await destination.publish(manifest(29, SECOND))
    await destination.publish(manifest(39, FIRST))
    assert await newest(destination) == "step-000029"
    await destination.publish(manifest(14, THIRD))
    assert await newest(destination) == "step-000014"


async def test_another_machine_with_a_journal_of_its_own_goes_on(destination):
    await destination.publish(manifest(9, THIRD, 99, origin="here"))
    await destination.publish(manifest(19, FIRST, 1, origin="there"))
    assert await newest(destination) == "step-000019"
    await destination.publish(manifest(29, SECOND, 1, origin="there"))
    assert await newest(destination) == "step-000029"


async def test_what_a_machine_sends_late_that_was_gone_on_without_is_older(destination):
    await destination.publish(manifest(39, FIRST, 7, origin="there"))
    for batch in (9, 19, 29):
        await destination.publish(manifest(batch, THIRD, batch, origin="here"))
    assert await newest(destination) == "step-000039"
    assert [each.row.batch for each in await destination.manifests()] == [9, 19, 29, 39]
    await destination.publish(manifest(49, FIRST, 8, origin="there"))
    assert await newest(destination) == "step-000049"


async def test_a_run_that_went_back_to_a_checkpoint_it_has_fetched_is_newer(destination):
    first = await destination.publish(manifest(9, FIRST, 1, origin="here"))
    await destination.publish(manifest(99, FIRST, 2, origin="here"))
    await destination.publish(manifest(14, THIRD, 1, origin="there"), resumed_from=first.generation)
    assert await newest(destination) == "step-000014"


async def test_what_an_earlier_version_wrote_comes_before_and_in_its_own_order(destination):
    old = ["r0-20260131T120000-aaaaaaaa", "r0-20260201T120000-bbbbbbbb"]
    for batch, stream in ((19, old[0]), (14, old[1])):
        plain = msgspec.to_builtins(manifest(batch, stream))
        del plain["life"], plain["origin"]
        key = destination.key(f"step-{batch:06d}", "manifest.json")
        await destination.store.put_bytes(key, json.dumps(plain).encode())
    latest = json.dumps({"checkpoint": "step-000014", "stream": old[1], "seq": 1, "format": 1}).encode()
    await destination.store.put_bytes(destination.key("latest.json"), latest)
    assert await newest(destination) == "step-000014"
    await destination.publish(manifest(17, old[0], 5))  # of the old stream, late
    assert await newest(destination) == "step-000014"
    await destination.publish(manifest(12, "r0-000003-20200101T000000-cccccccc"))
    assert await newest(destination) == "step-000012"


@pytest.mark.parametrize(
    "content", [None, b"", b'{"checkpoint": "step-0000', b"\x00" * 64, b'{"checkpoint": "gone"}', b"[1]"]
)
async def test_a_damaged_latest_is_made_anew_of_the_manifests(destination, content):
    for batch, stream in ((9, FIRST), (19, SECOND)):
        await destination.publish(manifest(batch, stream))
    key = destination.key("latest.json")
    if content is None:
        await destination.store.delete(key)
    else:
        await destination.store.put_bytes(key, content, replace=True)
    assert (await choose_checkpoint(destination, None)).row.batch == 19
    assert (await newest_state(destination)).row.batch == 19
    await destination.publish(manifest(14, FIRST, 2))  # late
    assert await newest(destination) == "step-000019"
    await destination.publish(manifest(12, THIRD))
    assert await newest(destination) == "step-000012"


async def test_uploaders_at_the_same_time_never_set_latest_back(destination):
    streams = [FIRST, SECOND, THIRD]
    for number, stream in enumerate(streams):
        await destination.publish(manifest(number, stream))

    async def upload(stream, first):
        mine = Destination(destination.store, destination.run_key.removesuffix("low"), "low")
        for batch in range(first, first + 4):
            while True:
                try:
                    await mine.publish(manifest(batch, stream, batch))
                    break
                except RetryLaterError:  # as a courier does
                    await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        for number, stream in enumerate(streams):
            group.start_soon(upload, stream, 10 * (3 - number))
    assert await newest(destination) == "step-000013"
    latest = await destination.latest()
    assert {stream: life.number for stream, life in latest.generations.items()} == {FIRST: 1, SECOND: 2, THIRD: 3}


async def test_a_store_that_replaces_without_looking_is_looked_at_afterwards(tmp_path):
    class Blind:
        """A store whose other user is faster, once, between the look and the writing."""

        def __init__(self, store, between):
            self.store, self.between = store, between

        def __getattr__(self, name):
            return getattr(self.store, name)

        async def change_bytes(self, key, change):
            try:
                before = await self.store.get_bytes(key)
            except Exception:  # whatever: nothing is there
                before = None
            between, self.between = self.between, None
            if between is not None:
                await between()
            changed = change(before)
            if changed is not None:
                await self.store.put_bytes(key, changed, replace=True)
            return changed is None

    places = StorePool(StoreOptions())
    place = await places.get(f"file://{tmp_path}/bucket")
    other = Destination(place.store, place.prefix, "low")
    await other.publish(manifest(1, FIRST))
    faster = partial(other.publish, manifest(29, SECOND))
    await Destination(Blind(place.store, faster), place.prefix, "low").publish(manifest(9, FIRST, 2))
    assert await newest(other) == "step-000029"


async def test_who_may_not_list_goes_by_latest(tmp_path):
    class Unlisted:
        def __init__(self, store):
            self.store = store

        def __getattr__(self, name):
            return getattr(self.store, name)

        async def names(self, prefix):
            raise ParkedError("not yours to list", fix="ask")

    places = StorePool(StoreOptions())
    place = await places.get(f"file://{tmp_path}/bucket")
    destination = Destination(Unlisted(place.store), place.prefix, "low")
    for number, stream in enumerate((FIRST, SECOND)):
        await destination.publish(manifest(number, stream))
    assert (await destination.latest()).checkpoint == "step-000001"


async def test_a_late_sync_of_another_machines_journal_leaves_latest(tmp_path):
    url = f"file://{tmp_path}/bucket"
    first, second = Upload(tmp_path / "first", url), Upload(tmp_path / "second", url)
    late = [first.announce(first.save(f"step-{batch:06d}", batch)) for batch in (9, 19)]
    for batch in (29, 39):
        envelope = second.announce(second.save(f"step-{batch:06d}", batch))
        await second.deliver(msgspec.structs.replace(envelope, stream="r0-000001-20200101T000000-dddddddd"))
    await first.deliver(*late)
    destination = await second.destination()
    assert await newest(destination) == "step-000039"
    assert [each.row.batch for each in await destination.manifests()] == [9, 19, 29, 39]
    again = second.announce(second.save("step-000024", 24))  # its own journal, gone back
    await second.deliver(msgspec.structs.replace(again, stream="r0-000002-20190101T000000-eeeeeeee"))
    assert await newest(destination) == "step-000024"


def test_what_latest_says_is_read_by_those_who_do_not_know_lives():
    told = msgspec.json.decode(msgspec.json.encode(Latest("step-1", FIRST, 3, generation=2, batch=1)))
    assert {name: told[name] for name in ("checkpoint", "stream", "seq", "format")} == {
        "checkpoint": "step-1",
        "stream": FIRST,
        "seq": 3,
        "format": 1,
    }
