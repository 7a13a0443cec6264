"""A database of SQLite that is full, locked, damaged, old or of others."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from evsys_adapters.dashboard.database import StoreError
from evsys_adapters.dashboard.store import Store
from support.point_stores import StepPoints, encoded_steps, info_of, open_store


def test_a_full_disk_refuses_a_batch_as_a_whole_and_the_store_opens_again(tmp_path):
    store = open_store(tmp_path)
    store.ingest("s", 0, encoded_steps(0, 100, loss=0.5))
    pages = store.database.query("PRAGMA page_count")[0][0]
    store.database.query(f"PRAGMA max_page_count = {pages}")
    values = {f"m{index}": 0.5 for index in range(200)}
    with pytest.raises(StoreError, match="disk is full") as caught:
        store.ingest("s", 100, encoded_steps(100, 50, seq=100, **values))
    assert (caught.value.problem, "free space" in caught.value.fix) == ("full", True)
    store = store.reopen()
    assert (store.watermark("s"), info_of(store, 1, "loss").n, store.catalogue.count()) == (100, 100, 100)
    assert store.ingest("s", 100, encoded_steps(100, 50, seq=100, **values)).points == 10_000


def test_a_database_that_another_program_has_locked_refuses_a_batch_until_it_is_free(tmp_path):
    store = open_store(tmp_path, timeout_seconds=0.05)
    other = sqlite3.connect(store.location, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as caught:
        store.ingest("s", 0, encoded_steps(0, 1, loss=0.5))
    assert (caught.value.problem, "close the program" in caught.value.fix) == ("locked", True)
    other.close()
    store = store.reopen()
    assert store.ingest("s", 0, encoded_steps(0, 1, loss=0.5)).sequence == 1


@pytest.mark.parametrize("damage", ["head", "pages"])
def test_a_damaged_database_is_refused_with_the_way_out(tmp_path, damage):
    store = open_store(tmp_path)
    store.ingest("s", 0, encoded_steps(0, 5000, loss=0.5))
    store.close()
    path = Path(store.location)
    data = bytearray(path.read_bytes())
    start = 0 if damage == "head" else 4096
    data[start : start + 40_000] = b"\xff" * 40_000
    path.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        open_store(tmp_path)
    assert (caught.value.problem, "import the journals again" in caught.value.fix) == ("corrupt", True)
    open_store(tmp_path / "other").close()


def test_a_database_of_another_program_stays_as_it_is(tmp_path):
    path = tmp_path / "dashboard.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE cats (name TEXT)")
    other.close()
    with pytest.raises(StoreError, match="not a database of the dashboard") as caught:
        open_store(tmp_path)
    assert (caught.value.problem, caught.value.why) == ("foreign", "it has the tables cats")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("cats",)]


def test_a_database_of_version_0_is_brought_to_this_one(tmp_path):
    store = open_store(tmp_path)
    store.ingest("s", 0, encoded_steps(0, 5000, loss=0.5))
    store.close()
    with sqlite3.connect(store.location) as older:  # version 0 had no summaries
        older.execute("ALTER TABLE series DROP COLUMN summary")
        older.execute("UPDATE meta SET value = '0' WHERE key = 'version'")
    older.close()
    store = open_store(tmp_path)
    loss = info_of(store, 1, "loss")
    assert (loss.n, loss.last_step, loss.last) == (5000, 4999, 0.5)
    assert store.ingest("s", 5000, encoded_steps(5000, 1, seq=5000, loss=0.5)).sequence == 5001


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught:
        Store.open(tmp_path / "file" / "dashboard.sqlite", catalogue=StepPoints)
    assert (caught.value.problem, "may write" in caught.value.fix) == ("refused", True)


def test_what_is_no_file_keeps_its_permissions(tmp_path):
    pipe = tmp_path / "dashboard.sqlite"
    os.mkfifo(pipe)
    pipe.chmod(0o666)
    with pytest.raises(StoreError):
        open_store(tmp_path)
    assert pipe.stat().st_mode & 0o777 == 0o666


def test_the_store_imports_no_server_numpy_or_psycopg():
    heavy = {"starlette", "numpy", "psycopg"}
    program = f"import evsys_adapters.dashboard.store, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
