"""A database of PostgreSQL: what it cannot hold as SQLite does, who may open it, and what its errors say."""

import os
import random
from contextlib import closing

import psycopg
import pytest

from evsys_adapters.dashboard.database import StoreError
from evsys_adapters.dashboard.database_postgres import PostgresDatabase
from evsys_adapters.dashboard.journals import import_journal
from evsys_adapters.dashboard.pages import experiment, home
from evsys_adapters.dashboard.store import Store
from evsys_adapters.dashboard.store_reader import StoreReader
from evsys_bus.codec import encode
from evsys_bus.events import Envelope
from support.point_stores import StepPoints, differing, encoded_steps, info_of, points_of
from support.recorded_runs import record_run
from support.steps import step_end

pytestmark = [pytest.mark.servers, pytest.mark.long]


@pytest.fixture
def url(postgres):
    return postgres.create_schema()


def open_store(url, **options):
    return Store.open(url, catalogue=StepPoints, **options)


@pytest.mark.parametrize("text", ["", "a\0b", "\x1a", "\x1a0\0\x1a1\x1a", "a\u2400b", "é😀"])
def test_every_text_comes_back_as_it_was(url, text):
    database = PostgresDatabase(url)
    database.define("CREATE TABLE IF NOT EXISTS texts (body TEXT PRIMARY KEY)")
    database.execute("INSERT INTO texts (body) VALUES (?)", text)
    assert database.query("SELECT body FROM texts WHERE body = ?", text) == [(text,)]


def test_texts_are_sorted_by_their_bytes(url):
    database = PostgresDatabase(url)
    database.define("CREATE TABLE IF NOT EXISTS texts (body TEXT PRIMARY KEY)")
    database.executemany("INSERT INTO texts (body) VALUES (?)", [("a",), ("B",), ("_",), ("a\n",), ("aa",)])
    assert [body for (body,) in database.query("SELECT body FROM texts ORDER BY body")] == ["B", "_", "a", "a\n", "aa"]


def test_the_longest_names_are_stored(url):
    name = "".join(chr(random.randrange(0x10000, 0x20000)) for _ in range(5000))
    store = Store.open(url)
    store.ingest("s", 0, encoded_steps(0, 3, **{name: 0.5}))
    store.close()
    (series,) = Store.open(url).series.names(1)
    assert (series.n, name.startswith(series.name.removeprefix("train/"))) == (3, True)


def test_a_run_in_the_longest_path_is_found_again(url):
    paths = [f"/{os.urandom(2000).hex()}" for _ in range(2)]
    store = Store.open(url)
    for stream, path in zip("st", paths, strict=True):
        store.ingest(stream, 0, [encode(Envelope(stream, 1, 1.0, step_end(path, 0, "1", loss=0.5), "1"))])
    store.close()
    store = Store.open(url)
    for stream, path in zip("st", paths, strict=True):
        store.ingest(stream, 1, [encode(Envelope(stream, 2, 2.0, step_end(path, 1, "1", loss=0.5), "1"))])
    assert store.catalogue.records.run(3) is None
    assert [store.series.names(run)[0].n for run in (1, 2)] == [2, 2]


def test_points_are_stored_as_they_are(url):
    store = open_store(url)
    rows = store.database.query("SELECT attname, attstorage FROM pg_attribute WHERE attrelid = 'raw'::regclass")
    assert dict(rows)["body"] == "e"
    store.ingest("s", 0, encoded_steps(0, 5000, loss=0.5))
    store.close()
    store = open_store(url)
    assert points_of(store, info_of(store, 1, "loss").id) == dict.fromkeys(range(5000), 0.5)
    assert store.database.size_bytes() > 100_000


def test_an_int_without_a_place_is_an_error_of_the_program(url):
    database = PostgresDatabase(url)
    with pytest.raises(OverflowError):
        database.query("SELECT CAST(? AS BIGINT)", 1 << 63)
    assert database.query("SELECT CAST(? AS BIGINT)", -(1 << 63)) == [(-(1 << 63),)]


def test_an_error_that_was_caught_inside_of_a_transaction_undoes_it(url):
    store = open_store(url)
    with pytest.raises(StoreError, match="a part of this transaction") as caught, store.database.transaction():
        store.database.execute("UPDATE stream SET seq = 5")
        with pytest.raises(StoreError):
            store.database.query("SELECT nothing FROM nowhere")
    assert caught.value.problem == "failed"
    assert store.reopen().watermark("s") == 0


def test_a_table_that_another_session_has_locked_refuses_a_batch_until_it_is_free(url):
    store = open_store(url, timeout_seconds=0.05)
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE stream")
        with pytest.raises(StoreError) as caught:
            store.ingest("s", 0, encoded_steps(0, 1, loss=0.5))
    assert (caught.value.problem, "pg_stat_activity" in caught.value.fix) == ("locked", True)
    store = store.reopen()
    assert store.ingest("s", 0, encoded_steps(0, 1, loss=0.5)).sequence == 1


def test_the_schema_of_another_program_stays_as_it_is(url):
    with psycopg.connect(url) as other:
        other.execute("CREATE TABLE cats (name TEXT)")
    with pytest.raises(StoreError, match="not a database of the dashboard") as caught:
        open_store(url)
    assert (caught.value.problem, "a schema of its own" in caught.value.fix) == ("foreign", True)
    with psycopg.connect(url) as other:
        rows = other.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()").fetchall()
    assert rows == [("cats",)]


def test_schemas_of_one_database_are_databases_apart(postgres):
    first, second = (open_store(postgres.create_schema()) for _ in range(2))
    first.ingest("s", 0, encoded_steps(0, 3, loss=0.5))
    assert first.id != second.id
    assert (first.watermark("s"), second.watermark("s")) == (3, 0)


def read_points(reader):
    with reader.reading():
        return {info.name: points_of(reader, info.id) for info in reader.series.names(1)}


@pytest.fixture
def writer_and_reader(url):
    writer = open_store(url)
    writer.ingest("s", 0, encoded_steps(0, 10, loss=0.5))
    reader = StoreReader.open(url, catalogue=StepPoints)
    assert read_points(reader) == {"loss": dict.fromkeys(range(10), 0.5)}
    return writer, reader


def test_a_reader_has_what_was_logged_and_written_while_it_did_not_look(writer_and_reader):
    writer, reader = writer_and_reader
    writer.ingest("s", 10, encoded_steps(10, 40, seq=10, loss=0.5))
    writer.checkpoint()
    assert read_points(reader) == {"loss": dict.fromkeys(range(50), 0.5)}
    writer.ingest("s", 50, encoded_steps(50, 9000, seq=50, loss=0.5, other=1.0))
    assert read_points(reader)["loss"] == dict.fromkeys(range(9050), 0.5)
    assert read_points(reader)["other"] == dict.fromkeys(range(50, 9050), 1.0)


def test_a_reader_has_a_series_whose_chunks_were_divided_anew(url):
    writer, reader, points = open_store(url), None, {}
    steps = [*range(100), *range(1000, 400_000, 1000)]
    for at in range(0, len(steps), 25):
        with writer.transaction():
            for step in steps[at : at + 25]:
                points[step] = float(step)
                writer.series.add_row(1, 0, step, None, {"loss": points[step]})
        if reader is None and at >= 150:
            writer.checkpoint()
            reader = StoreReader.open(url, catalogue=StepPoints)
        if reader is not None:
            assert differing(read_points(reader)["loss"], points) == []
    assert info_of(writer, 1, "loss").n == len(steps)
    assert writer.database.query("SELECT scale FROM series")[0][0] > 2


def test_a_reader_has_no_run_any_more_that_was_removed(writer_and_reader):
    writer, reader = writer_and_reader
    with writer.transaction():
        writer.series.remove(1)
    assert read_points(reader) == {}


def test_a_reader_goes_on_after_its_writer_was_replaced_by_another_one(writer_and_reader):
    writer, reader = writer_and_reader
    writer.close()
    with pytest.raises(StoreError, match="only reads"):
        reader.ingest("s", 10, encoded_steps(10, 1, seq=10, loss=0.5))
    other = open_store(writer.location)
    other.ingest("s", 10, encoded_steps(10, 5, seq=10, loss=0.5))
    assert read_points(reader) == {"loss": dict.fromkeys(range(15), 0.5)}


def test_one_call_of_a_reader_reads_one_state(writer_and_reader):
    writer, reader = writer_and_reader
    with reader.reading():
        before = reader.series.names(1)
        writer.ingest("s", 10, encoded_steps(10, 5000, seq=10, loss=0.5))
        with writer.transaction():
            writer.series.remove(1)
        assert reader.series.names(1) == before
        assert points_of(reader, before[0].id) == dict.fromkeys(range(10), 0.5)


def test_journals_move_from_sqlite_to_postgres_and_back(url, tmp_path):
    for name in ("a", "b"):
        record_run(tmp_path / "runs" / name, config={"arm": name}, evals={1: 0.5})
    shown = []
    for location in (tmp_path / "old.sqlite", url, tmp_path / "new.sqlite"):
        with closing(Store.open(location)) as store:
            assert import_journal(store, tmp_path / "runs").unreadable == 0
            assert import_journal(store, tmp_path / "runs").events == 0
            (row,) = home(store, 2e9)["experiments"]
            page = experiment(store, row["id"], 2e9)
            shown.append(
                (
                    row,
                    page,
                    [run_points(store, run) for run in (1, 2)],
                )
            )
    assert shown[0] == shown[1] == shown[2]


def run_points(store, run):
    return {info.name: points_of(store, info.id) for info in store.series.names(run)}


def test_a_database_that_no_writer_has_created_cannot_be_read(url):
    with pytest.raises(StoreError, match="not created yet") as caught:
        StoreReader.open(url)
    assert caught.value.problem == "read only"


def test_a_server_that_is_not_there_is_named_with_the_fix():
    with pytest.raises(StoreError, match=r"postgresql://somebody@127\.0\.0\.1:1/x cannot be reached") as caught:
        Store.open("postgresql://somebody@127.0.0.1:1/x")
    assert (caught.value.problem, "PGPASSWORD" in caught.value.fix) == ("lost", True)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:s3cret@127.0.0.1:1/x",
        "postgresql://u@127.0.0.1:1/x?password=s3cret",
        "postgresql://u:s3c/ret@127.0.0.1:1/x",
        "postgresql://u:%zzs3cret@127.0.0.1/x",
    ],
)
def test_a_password_is_never_shown(url):
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert caught.value.problem == "refused"
    shown = f"{caught.value} {caught.value.what} {caught.value.why} {caught.value.fix} {caught.value.__cause__}"
    assert ("s3c" in shown, "URL" in shown) == (False, True)


def test_a_schema_that_does_not_exist_is_refused(postgres):
    with pytest.raises(StoreError, match="no schema") as caught:
        Store.open(postgres.url("nowhere"))
    assert caught.value.problem == "refused"
