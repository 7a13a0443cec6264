"""A store that reads what another process writes to PostgreSQL.

Each call reads one state of the database: a snapshot, to which what is in memory is brought first. Points that are in
no chunk yet come from the log. Which runs and experiments have changed, the writer notifies.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from evsys_adapters.dashboard.catalogue import Catalogue
from evsys_adapters.dashboard.database import Database, StoreError
from evsys_adapters.dashboard.database_postgres import PostgresDatabase
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.schema import check
from evsys_adapters.dashboard.series import SeriesStore
from evsys_adapters.dashboard.store import Store

if TYPE_CHECKING:
    from typing import Self

_decode_ids: Final = msgspec.json.Decoder(tuple[list[int], list[int]]).decode


class StoreReader(Store):
    """A database of PostgreSQL of which another process is the writer. Reads belong into `reading`."""

    is_writer = False

    def __init__(self, database: PostgresDatabase, *args: Any) -> None:  # those of `Store`
        super().__init__(database, *args)
        self._postgres: Final = database
        self._followed = Changes()

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        catalogue: Callable[[Database, SeriesStore], Catalogue] = Catalogue,
        checkpoint_points: int = 400_000,
        timeout_seconds: float = 1.0,
    ) -> "Self":
        """Open a database that a writer has created. Raises StoreError."""
        database = PostgresDatabase(str(location), timeout_seconds=timeout_seconds, is_writer=False)
        with ExitStack() as stack:
            stack.callback(database.close)
            with database.snapshot():
                store = cls(database, check(database), catalogue, checkpoint_points, timeout_seconds)
                store.series.take_changes()
            stack.pop_all()
        return store

    @contextmanager
    def reading(self) -> Generator[None]:
        """Bring what is in memory to the newest state of the database, and read this one in the block."""
        with self._postgres.snapshot() as payloads:
            if "" in payloads or not self.series.follow():
                self.series = self._open_series(self.database, self._checkpoint_points)
                self.catalogue = self._factory(self.database, self.series)
            changes = self.series.take_changes()
            for experiments, runs in map(_decode_ids, filter(None, payloads)):
                self.catalogue.evict(experiments, runs)
                changes.experiments.update(experiments)
                changes.runs.update(runs)
            self._followed.update(changes)
            yield

    def take_followed(self) -> Changes:
        """Return what the writer has changed since the last call, as far as `reading` has read it."""
        changes, self._followed = self._followed, Changes()
        return changes

    def may_take_over(self) -> bool:
        """Return whether no process writes any more, and this one may."""
        return self._postgres.may_take_over()

    @contextmanager
    def transaction(self) -> Generator[Changes]:
        """Raise StoreError: another process writes."""
        raise StoreError(
            f"this dashboard only reads the database {self.location}: another one writes to it",
            problem="read only",
            fix="send events to that one, or stop it; then this one takes over",
        )
        yield Changes()

    def watermark(self, stream: str) -> int:
        """Return the sequence number of the last event of the stream that is stored, 0 if there is none."""
        rows = self.database.query("SELECT seq FROM stream WHERE name = ?", stream)
        return int(rows[0][0]) if rows else 0

    def close(self) -> None:
        """Close the connection."""
        self._close_database()

    def _open_series(self, database: Database, checkpoint_points: int) -> SeriesStore:
        return SeriesStore(database, checkpoint_points=checkpoint_points, is_reader=True)
