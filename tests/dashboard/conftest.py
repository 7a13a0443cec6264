"""What tests of the dashboard share."""

import os
from contextlib import suppress

import pytest

from evsys_adapters.dashboard.database import SqliteDatabase, StoreError
from evsys_adapters.dashboard.database_postgres import PostgresDatabase
from support.database_places import put_in_postgres
from support.postgres import programs, running_server

POSTGRES = pytest.param("postgres", marks=[pytest.mark.servers, pytest.mark.long])


@pytest.fixture(autouse=True)
def _databases_are_closed(monkeypatch):
    """Close the databases that a test has left open: from Python 3.13 on, that is a warning."""
    opened = []
    for driver in (SqliteDatabase, PostgresDatabase):

        def open_and_note(self, *args, open_database=driver.__init__, **options):
            open_database(self, *args, **options)
            opened.append(self)

        monkeypatch.setattr(driver, "__init__", open_and_note)
    yield
    for each in opened:
        with suppress(StoreError):
            each.close()


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server. Skips where there is none, but in CI fails."""
    if programs() is None and not os.environ.get("CI"):
        pytest.skip("no PostgreSQL on this machine")
    with running_server() as server:
        yield server


@pytest.fixture(params=["sqlite", POSTGRES])
def each_database(request, tmp_path):
    """Have `open_store` of the test's folder open a database of each kind; return which."""
    if request.param == "postgres":
        put_in_postgres(tmp_path, request.getfixturevalue("postgres").create_schema())
    return request.param


@pytest.fixture
def new_postgres_folder(postgres, tmp_path_factory):
    """A function that returns a folder whose store is a new database in PostgreSQL."""

    def create():
        folder = tmp_path_factory.mktemp("store")
        put_in_postgres(folder, postgres.create_schema())
        return folder

    return create


@pytest.fixture(params=["sqlite", POSTGRES])
def new_folder(request, tmp_path_factory):
    """A function that returns a folder whose store is a new database, of each kind."""
    if request.param == "postgres":
        return request.getfixturevalue("new_postgres_folder")
    return lambda: tmp_path_factory.mktemp("store")
