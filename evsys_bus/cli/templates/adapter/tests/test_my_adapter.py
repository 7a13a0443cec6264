"""The conformance test of evsys-bus, for this adapter."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from evsys_bus.testing import conformance
from my_adapter import MyAdapter


def contents(folder: Path) -> dict[str, Any]:
    """Return what the adapter has written; the test compares it between runs with and without faults."""
    if not (folder / "steps.db").exists():
        return {}
    with closing(sqlite3.connect(folder / "steps.db")) as database:
        return {"steps": database.execute("SELECT * FROM steps ORDER BY run, step").fetchall()}


def make(folder: Path) -> MyAdapter:
    return MyAdapter(str(folder / "steps.db"))


test_my_adapter = conformance(make, contents=contents)
