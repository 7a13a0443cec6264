"""Faults inside the dashboard's server cost what they concern, and nothing beside it."""

import asyncio
import json
import sqlite3
import threading
from contextlib import closing, contextmanager

import anyio
import pytest
from starlette.requests import Request

from evsys_adapters.dashboard import journals, pages
from evsys_adapters.dashboard.catalogue import Catalogue
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.app import DashboardApp, DashboardSettings
from evsys_adapters.dashboard.server.columns import decode_columns
from evsys_adapters.dashboard.server.imports import JournalImports
from evsys_adapters.dashboard.server.ingest import Ingester
from evsys_adapters.dashboard.server.live import LiveHub, LiveLimits, Subscription, Viewer
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.server.view_routes import ViewRoutes
from evsys_adapters.dashboard.store import Store
from evsys_bus import EventBus, LogContext, LoopState, StepEnd
from evsys_bus.journal import JournalWriter
from support.running_dashboard import TOKEN, Trainer


class FragileCatalogue(Catalogue):
    """Fails when it writes an event of a run with "bad" in its key, as a bug would have it."""

    error: BaseException = OverflowError("Python int too large to convert to SQLite INTEGER")
    has_failed = False

    def apply(self, envelope, changes):
        self.has_failed |= "bad" in envelope.run
        return super().apply(envelope, changes)

    def flush(self):
        if self.has_failed:
            raise self.error
        super().flush()


@contextmanager
def opened(tmp_path, catalogue=Catalogue, thread=StoreThread):
    thread = thread(tmp_path / "dashboard.sqlite", lambda path: Store.open(path, catalogue=catalogue))
    thread.open()
    try:
        yield thread
    finally:
        thread.close()


# One event that cannot be stored.


@pytest.mark.parametrize("error", [OverflowError("too large"), sqlite3.ProgrammingError("type is not supported")])
async def test_an_event_that_cannot_be_stored_costs_no_other_event_and_no_other_body(tmp_path, caplog, error):
    class Fragile(FragileCatalogue):
        pass

    Fragile.error = error
    first, mixed, last = (Trainer(name, root="/runs/x") for name in ("a", "b", "c"))
    bodies = [each.start() + each.steps(5) for each in (first, mixed, last)]
    mixed.ctx, good = Trainer("bad", root="/runs/x").ctx, mixed.ctx
    bodies[1] += mixed.steps(1)
    mixed.ctx = good
    bodies[1] += mixed.steps(4)
    published = []
    with opened(tmp_path, Fragile) as thread:
        ingester = Ingester(thread, published.append)
        trainers = (first, mixed, last)
        done = await asyncio.gather(
            *(ingester.ingest(each.stream, 0, body) for each, body in zip(trainers, bodies, strict=True))
        )
        assert [tuple(each) for each in done] == [(7, 7, 5, 0), (12, 11, 9, 1), (7, 7, 5, 0)]
        assert len(set().union(*(each.runs for each in published))) == 3
        again = await ingester.ingest(mixed.stream, 0, bodies[1])
        assert tuple(again) == (12, 0, 0, 0)
    lines = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert len(lines) == 1
    assert "event_failed" in lines[0]
    assert mixed.stream in lines[0]


async def test_while_nothing_can_be_stored_no_event_is_skipped(tmp_path):
    class Broken(Catalogue):
        is_broken = True

        def flush(self):
            if Broken.is_broken:
                raise KeyError("a bug")
            super().flush()

    trainer = Trainer()
    body = trainer.start() + trainer.steps(5)
    with opened(tmp_path, Broken) as thread:
        ingester = Ingester(thread, lambda _: None)
        with pytest.raises(AnswerError) as refused:
            await ingester.ingest(trainer.stream, 0, body)
        assert refused.value.status == 500
        Broken.is_broken = False
        assert tuple(await ingester.ingest(trainer.stream, 0, body)) == (7, 7, 5, 0)


def fail(store):
    with store.transaction():
        raise sqlite3.ProgrammingError("type is not supported")


async def test_an_error_of_one_call_lets_the_next_one_read_and_write(tmp_path):
    trainer = Trainer()
    with opened(tmp_path) as thread:
        with pytest.raises(sqlite3.ProgrammingError):
            await thread.call(fail)
        done = await Ingester(thread, lambda _: None).ingest(trainer.stream, 0, trainer.start())
        assert done.events == 2


# Calls that fail while the database cannot be used.


class InterruptedThread(StoreThread):
    """A store's thread whose next calls fail, as those while another program has locked the database."""

    failures = 0

    async def call(self, work, *args, **kwargs):
        if self.failures:
            self.failures -= 1
            raise AnswerError(503, "store", "the database cannot be used now: locked", fix="close it")
        return await super().call(work, *args, **kwargs)


def home_id(store):
    return pages.home(store)["experiments"][0]["id"]


def lines(frames):
    """The last x of each run in the frames of a chart."""
    found = {}
    for header, numbers in map(decode_columns, frames):
        for line in header["chart"]["lines"]:
            offset, length = line["x"]
            found[line["run"]] = numbers[offset + length - 1]
    return sorted(found.values())


@pytest.mark.parametrize("is_known", [True, False], ids=["viewed", "joined"])
async def test_changes_whose_look_up_fails_are_in_the_next_frame(tmp_path, is_known):
    first, second = Trainer("a", root="/runs/x"), Trainer("b", root="/runs/x")
    with opened(tmp_path, thread=InterruptedThread) as thread:
        hub = LiveHub(thread, LiveLimits(chart_seconds=0.0))
        ingester = Ingester(thread, hub.publish)
        await ingester.ingest(first.stream, 0, first.start() + first.steps(5))
        topic = f"c/{await thread.call(home_id)}/members/1/train/loss"
        chart = [Subscription(topic, hub.number)]
        if is_known:
            assert await hub.poll(chart) == []
        await ingester.ingest(second.stream, 0, second.start() + second.steps(3))
        await hub.subscribe(Viewer(), chart)
        thread.failures = 1
        with pytest.raises(AnswerError):
            await hub.poll([Subscription("home")])
        assert lines(await hub.poll([Subscription(topic)])) == [2.0, 4.0]


def purge(store, public_id):
    journals.move_to_trash(store, public_id, 1_000.0)
    journals.purge_one(store, public_id)


async def test_frames_of_new_series_go_to_their_own_chart_after_a_purge_and_an_error(tmp_path):
    with opened(tmp_path) as thread:
        hub = LiveHub(thread, LiveLimits(chart_seconds=0.0, page_seconds=0.0))
        ingester = Ingester(thread, hub.publish)
        shown = []
        for name in ("removed", "new"):
            trainer = Trainer(root=f"/runs/{name}")
            await ingester.ingest(trainer.stream, 0, trainer.start() + trainer.steps(2))
            id_ = await thread.call(home_id)
            chart = Subscription(f"c/{id_}/members/1/train/loss")
            await hub.poll([chart, Subscription(f"e/{id_}")])
            await ingester.ingest(trainer.stream, 4, trainer.steps(2))
            shown.append((lines(await hub.poll([chart])), len(await hub.poll([Subscription(f"e/{id_}")]))))
            if name == "removed":
                await thread.call(purge, id_)
                with pytest.raises(sqlite3.ProgrammingError):
                    await thread.call(fail)
        assert shown == [([3.0], 1)] * 2


async def import_of(imports, journal):
    """Return the progress of an import that has ended."""
    id_ = imports.start(str(journal))
    task = asyncio.create_task(imports.run())
    try:
        async with asyncio.timeout(10):
            while (found := imports.progress(id_))["state"] in {"waiting", "running"}:
                assert found["error"] is None
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
    return found


@pytest.mark.parametrize("failures", [1, 2, 5])
async def test_an_import_goes_on_after_the_database_could_not_be_used(tmp_path, failures):
    journal = tmp_path / "run/journal"
    ctx = LogContext(tmp_path / "run", run_key="a")
    with EventBus([], journal=journal) as bus:
        for step in range(30):
            bus.publish(StepEnd(LoopState(step, 30, ctx.run_dir, ctx=ctx), step, metrics={"loss": 1.0}))
    with opened(tmp_path, thread=InterruptedThread) as thread:
        imports = JournalImports(thread, Ingester(thread, lambda _: None), retry_seconds=0.01)
        thread.failures = failures
        done = await import_of(imports, journal)
        assert (done["state"], done["error"], done["events"]) == ("completed", None, done["of"])
        assert done["events"] >= 30


async def test_an_import_shows_how_many_events_could_not_be_read(tmp_path):
    journal = tmp_path / "journal"
    with closing(JournalWriter(journal).open()) as writer:
        for payload in (b"no envelope", *Trainer().steps(2)):
            writer.append(payload)
    with opened(tmp_path) as thread:
        done = await import_of(JournalImports(thread, Ingester(thread, lambda _: None)), journal)
        assert (done["state"], done["events"], done["unreadable"]) == ("completed", 3, 1)


class SilentThread(StoreThread):
    """A store's thread whose answer about one stream is waited for, as for a file on a share that is away."""

    silent_stream = ""

    def __init__(self, *args):
        super().__init__(*args)
        self.answered = anyio.Event()

    async def call(self, work, *args, **kwargs):
        if args[:1] == (self.silent_stream,):
            with anyio.CancelScope(shield=True):
                await self.answered.wait()
        return await super().call(work, *args, **kwargs)


async def test_a_journal_that_is_not_read_in_time_keeps_no_other_from_being_imported(tmp_path, caplog):
    with opened(tmp_path, thread=SilentThread) as thread:
        ingester = Ingester(thread, lambda _: None)
        folders = [tmp_path / name for name in ("silent", "sound")]
        for folder in folders:
            writer = JournalWriter(folder).open()
            payloads = Trainer(root=f"/runs/{folder.name}").start()
            for payload in payloads:
                writer.append(payload)
            writer.close()
            await ingester.ingest(folder.name, 0, payloads[:1], str(folder))
        thread.silent_stream = next(folders[0].rglob("*.seg")).parent.name
        imports = JournalImports(thread, ingester, look_seconds=0.3)
        try:
            with anyio.fail_after(10):
                await imports.start_missing()
        finally:
            thread.answered.set()
        assert [each["journal"] for each in imports.progress_of_all()["imports"]] == [str(folders[1])]
    assert "not read within" in caplog.text


# Views.


class MistakenCatalogue(Catalogue):
    """Looks up runs by a wrong key."""

    def run_id(self, public):
        return {}[public]


@pytest.mark.parametrize("catalogue", [MistakenCatalogue, Catalogue])
@pytest.mark.parametrize("path", ["/api/runs/{id}", "/api/runs/{id}/events"])
async def test_only_what_is_not_there_is_a_404_and_a_fault_is_an_error(tmp_path, catalogue, path):
    with opened(tmp_path, catalogue) as thread:
        [route] = [each for each in ViewRoutes(thread, lambda: 0).routes() if each.path == path]
        scope = {"type": "http", "path_params": {"id": "none"}, "headers": [], "query_string": b""}
        with pytest.raises((AnswerError, KeyError)) as raised:
            await route.endpoint(Request(scope))
    if catalogue is MistakenCatalogue:
        assert raised.type is KeyError
    else:
        assert raised.value.status == 404


# A store's thread that is busy.


async def request(app, method, path, body=b""):
    """Return the status and the body of an answer."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {TOKEN}".encode())],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    await app.asgi(scope, receive, send)
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:])


async def test_health_is_answered_while_the_store_is_busy(tmp_path):
    release = threading.Event()
    with opened(tmp_path) as thread:
        app = DashboardApp(thread, DashboardSettings(token=TOKEN))
        busy = asyncio.create_task(thread.call(lambda _: release.wait(20)))
        try:
            status, body = await asyncio.wait_for(request(app, "GET", "/health"), 5)
        finally:
            release.set()
            await busy
        assert (status, json.loads(body)["store"]) == (200, await thread.call(lambda store: store.id))


class CountingThread(StoreThread):
    calls = 0

    async def call(self, work, *args, **kwargs):
        self.calls += 1
        return await super().call(work, *args, **kwargs)


@pytest.mark.parametrize("axis", ["step", "relative"])
async def test_each_chart_of_a_request_is_a_turn_of_its_own_on_the_thread(tmp_path, axis):
    trainer = Trainer()
    with opened(tmp_path, thread=CountingThread) as thread:
        app = DashboardApp(thread, DashboardSettings(token=TOKEN))
        await Ingester(thread, lambda _: None).ingest(trainer.stream, 0, trainer.start() + trainer.steps(4, lr=2.0))
        charts = [{"metric": metric, "x": axis} for metric in ("train/loss", "train/lr", "none", "train/loss")]
        query = json.dumps({"experiment": await thread.call(home_id), "charts": charts}).encode()
        thread.calls = 0
        status, body = await request(app, "POST", "/api/charts", query)
        assert (status, thread.calls) == (200, 4)
        header, numbers = decode_columns(body)
        assert [each["total"] for each in header["charts"]] == [4, 4, 0, 4]
        offset, length = header["charts"][3]["lines"][0]["x"]
        assert numbers[offset : offset + length].tolist() == [0.0, 1.0, 2.0, 3.0]
