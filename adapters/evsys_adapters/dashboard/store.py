"""The database of a dashboard: what is delivered to it, in transactions that survive a power cut, and what is read.

A store is used by one thread. Events are identified by their stream and sequence number, so that delivering them again
changes nothing. After any other error than `BehindError` inside a transaction the store is of no use; `reopen` returns
a new one with all that was acknowledged.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec

from evsys_adapters.dashboard.catalogue import Catalogue
from evsys_adapters.dashboard.database import Database, SqliteDatabase, StoreError, is_url
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.schema import migrate
from evsys_adapters.dashboard.series import SeriesStore
from evsys_bus.codec import decode
from evsys_bus.errors import CodecError, EvsysBusError

if TYPE_CHECKING:
    from typing import Self


class BehindError(EvsysBusError, ValueError):
    """The client continues after an event that this database does not have.

    Attributes:
        watermark: The sequence number of the last event of the stream that is stored; 0 if there is none.
    """

    def __init__(self, stream: str, after: int, watermark: int) -> None:
        super().__init__(
            f"events {watermark + 1} to {after} of the stream {stream} were not delivered to this database",
            fix="deliver them again: evsys-bus replay",
        )
        self.watermark: Final = watermark


class Ingested(msgspec.Struct, frozen=True):
    """What a batch of events added."""

    sequence: int
    """The sequence number of the last event of the stream that is stored."""
    events: int
    """Events that were new and could be read."""
    points: int
    changed: Changes
    unreadable: int = 0
    """Events that were new and could not be read; they are skipped for good."""


class _Head(msgspec.Struct):
    seq: int


_MAX_SEQUENCE: Final = (1 << 63) - 1
"""The largest integer of a column."""
_MAX_NOTIFIED_BYTES: Final = 7_900
_decode_head: Final = msgspec.msgpack.Decoder(_Head).decode


class Store:
    """The database of a dashboard. It belongs to one process at a time, which closes it."""

    is_writer: ClassVar[bool] = True
    """False if another process writes; then reads belong into `reading`."""

    def __init__(
        self,
        database: Database,
        store_id: str,
        catalogue: Callable[[Database, SeriesStore], Catalogue],
        checkpoint_points: int,
        timeout_seconds: float,
    ) -> None:
        self.id: Final = store_id
        """A UUID of this database."""
        self.database: Final = database
        self.series = self._open_series(database, checkpoint_points)
        self.catalogue = catalogue(database, self.series)
        self._factory: Final = catalogue
        self._checkpoint_points: Final = checkpoint_points
        self._timeout_seconds: Final = timeout_seconds
        self._watermarks: Final[dict[str, int]] = {}
        self._changes: Changes | None = None
        self._failed = False
        self._closed = False

    def _open_series(self, database: Database, checkpoint_points: int) -> SeriesStore:
        return SeriesStore(database, checkpoint_points=checkpoint_points)

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        catalogue: Callable[[Database, SeriesStore], Catalogue] = Catalogue,
        checkpoint_points: int = 400_000,
        timeout_seconds: float = 1.0,
    ) -> "Self":
        """Open a database, created if needed, bring it to this version, and apply the log that a kill left.

        Args:
            location: The path of a file of SQLite, whose folder is created; or as a str the URL of a PostgreSQL
                database, see `PostgresDatabase`.
            catalogue: Makes what events are applied to. Its attribute ``TABLES``, if any, has statements that create
                its tables where they do not exist.
            checkpoint_points: See `SeriesStore`.
            timeout_seconds: How long a statement waits for another program that has locked the database.

        Raises:
            StoreError: It cannot be opened; the error has the fix.
        """
        database = _open_database(location, timeout_seconds)
        with ExitStack() as stack:
            stack.callback(database.close)
            store_id = migrate(database, getattr(catalogue, "TABLES", ()))
            store = cls(database, store_id, catalogue, checkpoint_points, timeout_seconds)
            stack.pop_all()
        return store

    @property
    def location(self) -> str:
        """The path of the file, or the URL of the database."""
        return self.database.location

    def reopen(self) -> "Self":
        """Close this store, whatever state it is in, and open it again."""
        self._close_database()
        return type(self).open(
            self.location,
            catalogue=self._factory,
            checkpoint_points=self._checkpoint_points,
            timeout_seconds=self._timeout_seconds,
        )

    def abandon(self) -> None:
        """Close the database without a checkpoint; the log has what is in memory."""
        self._close_database()

    def may_take_over(self) -> bool:
        """Return whether another process was the writer, and is no more."""
        return False

    def take_followed(self) -> Changes:
        """Return what another process has changed since the last call: nothing, if this one is the writer."""
        return Changes()

    @contextmanager
    def reading(self) -> Generator[None]:
        """Read in the block one state of the database."""
        yield

    @contextmanager
    def transaction(self) -> Generator[Changes]:
        """Commit what the block does at once, together with the points that it added.

        Blocks inside a block join it: several calls of `ingest` cost one sync of the disk. The changes are complete
        after the block. If it raises, the store is of no use: check what may be refused before the block.

        Raises:
            StoreError: The disk refused the transaction, or an earlier one has failed: `reopen` the store.
        """
        self._check_usable()
        completed = False
        if self._changes is not None:
            try:
                yield self._changes
                completed = True
            finally:
                self._failed = self._failed or not completed
            return
        changes = self._changes = Changes()
        try:
            with self.database.transaction():
                yield changes
                self._check_usable()  # the block may have caught the error of a part of it
                self._flush()
                changes.update(self.series.take_changes())
                if changes.runs or changes.experiments or changes.series:
                    self.database.notify(changed_ids(changes))
            completed = True
        finally:
            self._changes = None
            self._failed = self._failed or not completed

    def ingest(
        self, stream: str, after: int, payloads: Sequence[bytes | memoryview], journal: str | None = None
    ) -> Ingested:
        """Store encoded envelopes of one stream, in one transaction, or in the one that is open.

        Events up to the watermark are skipped. One that cannot be read is counted, and never delivered again.

        Args:
            stream: The name of the stream.
            after: The sequence number of the event before the first one; it may lie below the watermark.
            payloads: What `evsys_bus.codec.encode` returned, in the order of sequence numbers.
            journal: Path of the journal that holds the stream; None if unknown.

        Raises:
            BehindError: Events before these were not delivered. Nothing has changed, and the store remains usable.
            StoreError: The disk refused the transaction: `reopen` the store.
        """
        watermark = self.watermark(stream)
        if after > watermark:
            raise BehindError(stream, after, watermark)
        changes = Changes()
        sequence, events, points, unreadable = watermark, 0, 0, 0
        previous, completed = after, False
        with self.transaction() as outer:
            try:
                if journal is not None:
                    self.catalogue.records.set_journal(stream, journal)
                for payload in payloads:
                    try:
                        envelope = decode(payload)
                    except CodecError:
                        previous = _sequence_of(payload, previous + 1)
                        unreadable += previous > sequence
                        sequence = max(sequence, previous)
                        continue
                    if not 0 < envelope.seq <= _MAX_SEQUENCE:
                        unreadable += 1
                        continue
                    previous = envelope.seq
                    if previous <= sequence:
                        continue
                    sequence = previous
                    events += 1
                    points += self.catalogue.apply(envelope, changes)
                if sequence > watermark:
                    self.database.execute(
                        "INSERT INTO stream (name, seq) VALUES (?, ?)"
                        " ON CONFLICT (name) DO UPDATE SET seq = excluded.seq",
                        stream,
                        sequence,
                    )
                    self._watermarks[stream] = sequence
                self._flush()
                completed = True
            finally:
                self._failed = self._failed or not completed
            changes.update(self.series.take_changes())
            outer.update(changes)
        return Ingested(sequence, events, points, changes, unreadable)

    def skip(self, stream: str, after: int, payloads: Sequence[bytes | memoryview]) -> Ingested:
        """Count events as unreadable, and do not read them. Arguments and errors are those of `ingest`."""
        sequences: list[int] = []
        for payload in payloads:
            sequences.append(_sequence_of(payload, (sequences[-1] if sequences else after) + 1))
        return self.ingest(stream, after, [msgspec.msgpack.encode(_Head(each)) for each in sequences])

    def watermark(self, stream: str) -> int:
        """Return the sequence number of the last event of the stream that is stored, 0 if there is none."""
        known = self._watermarks.get(stream)
        if known is None:
            rows = self.database.query("SELECT seq FROM stream WHERE name = ?", stream)
            known = self._watermarks[stream] = rows[0][0] if rows else 0
        return known

    def checkpoint(self) -> None:
        """Write what is in memory into its tables, and empty the log."""
        with self.transaction():
            self.series.checkpoint()

    def close(self) -> None:
        """Write a checkpoint, and close the database. Without one, as after an error, nothing is lost either.

        Raises:
            StoreError: The disk refused the checkpoint. The store is closed.
        """
        if self._closed:
            return
        try:
            if not self._failed:
                self.checkpoint()
        finally:
            self._close_database()

    def _flush(self) -> None:
        self.catalogue.flush()
        self.series.flush()

    def _check_usable(self) -> None:
        if self._failed or self._closed:
            raise StoreError(
                "this store is closed, or an error has interrupted a transaction",
                problem="failed",
                fix="open the store again, and repeat what was not acknowledged",
            )

    def _close_database(self) -> None:
        if not self._closed:
            self._closed = True
            self.database.close()


def changed_ids(changes: Changes) -> str:
    """Return which runs and experiments have changed, for `Database.notify`; nothing if there are too many."""
    text = msgspec.json.encode([sorted(changes.experiments), sorted(changes.runs)]).decode()
    return text if len(text) <= _MAX_NOTIFIED_BYTES else ""


def _open_database(location: str | Path, timeout_seconds: float) -> Database:
    if isinstance(location, str) and is_url(location):
        try:
            from evsys_adapters.dashboard.database_postgres import PostgresDatabase
        except ImportError as error:
            raise StoreError(
                "PostgreSQL needs psycopg",
                problem="refused",
                why=str(error),
                fix="pip install 'evsys-bus[postgres]'   or   uv add 'evsys-bus[postgres]'",
            ) from error
        return PostgresDatabase(location, timeout_seconds=timeout_seconds)
    path = Path(location)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the folder of the database {path} cannot be created",
            problem="refused",
            why=error.strerror,
            fix="give a path in a folder that you may write",
        ) from error
    return SqliteDatabase(path, timeout_seconds=timeout_seconds)


def _sequence_of(payload: bytes | memoryview, otherwise: int) -> int:
    """Return the sequence number of an envelope that cannot be read as a whole."""
    try:
        sequence = _decode_head(payload).seq
    except (msgspec.MsgspecError, RecursionError):
        return otherwise
    return sequence if 0 < sequence <= _MAX_SEQUENCE else otherwise
