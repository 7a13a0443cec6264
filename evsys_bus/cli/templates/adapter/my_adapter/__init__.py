"""An adapter of evsys-bus: writes the metrics of every step to an SQLite database."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from evsys_bus import Callback, LoopState, TrainingBatch

_CREATE = "CREATE TABLE IF NOT EXISTS steps (run, step, metrics, PRIMARY KEY (run, step))"


class MyAdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `MyAdapter`, which `evsys-bus check` validates."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    """The database file. A relative path is one in the working directory."""


class MyAdapter(Callback):
    """Writes the metrics of every step to an SQLite database.

    A courier delivers to it off the training loop, so its hooks may take their time. An event that was delivered
    shortly before a crash may come again; with the primary key it replaces its row.
    """

    name: ClassVar[str] = "my_adapter"
    placement: ClassVar[Any] = "follow"
    Config: ClassVar[type | None] = MyAdapterConfig

    def __init__(self, path: str) -> None:
        """Keep the parameters, and open nothing yet: an instance is also made where nothing is delivered."""
        self.path = Path(path)

    def on_step_end(
        self, state: LoopState, step_idx: int, batch: TrainingBatch | None, metrics: dict[str, Any]
    ) -> None:
        """Write one row. An exception is counted and logged, and ``RetryLaterError`` delivers the event again later."""
        row = (state.run_key, step_idx, json.dumps(metrics, default=str))
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(_CREATE)
            database.execute("INSERT OR REPLACE INTO steps VALUES (?, ?, ?)", row)
