"""What tests of the dashboard share."""

from contextlib import suppress

import pytest

from evsys_adapters.dashboard.database import SqliteDatabase, StoreError


@pytest.fixture(autouse=True)
def _databases_are_closed(monkeypatch):
    """Close the databases that a test has left open: from Python 3.13 on, that is a warning."""
    opened = []
    open_database = SqliteDatabase.__init__

    def open_and_note(self, *args, **options):
        open_database(self, *args, **options)
        opened.append(self)

    monkeypatch.setattr(SqliteDatabase, "__init__", open_and_note)
    yield
    for each in opened:
        with suppress(StoreError):
            each.close()
