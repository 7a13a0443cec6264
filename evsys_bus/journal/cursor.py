"""Cursors: the position of each adapter in each stream, in one small file per adapter that is replaced atomically."""

from typing import Any, Final, NamedTuple

import msgspec

from evsys_bus.diagnostics import FaultLog
from evsys_bus.disk import Disk, OsDisk
from evsys_bus.files import load_file
from evsys_bus.journal import layout
from evsys_bus.location import decode_json, encode_json


class Position(msgspec.Struct, frozen=True, array_like=True):
    """The position of an adapter in one stream."""

    sequence: int = 0
    """Of the last event that the adapter is finished with: delivered, or a dead letter."""
    delivered: int = 0
    dead: int = 0
    """How many of the events up to the position became dead letters."""


class Cursor(msgspec.Struct, omit_defaults=True):
    """The positions of one adapter in all streams, with the state that belongs to them."""

    streams: dict[str, Position] = {}
    steps: dict[str, int] = {}
    """The largest step that was delivered, by run, for the runs that are open at this position."""
    rows: dict[str, int] = {}
    """The sequence of the oldest part of a row that is not complete at this position, by stream."""
    mark: Any = None
    """What the adapter's ``mark()`` returned at this position: plain data."""
    kind: str = ""
    """The kind of adapter that wrote the mark. Empty if unknown; any adapter with this name may then use it."""
    waiting: int = 0
    """How many of the events that count as delivered in ``streams`` wait for a destination: `Sink.report_waiting`."""

    def position(self, stream: str) -> Position:
        """The position in this stream."""
        return self.streams.get(stream, _INITIAL_POSITION)

    def counts(self) -> tuple[int, int, int]:
        """How many events were delivered, are dead letters, and wait for a destination."""
        positions = list(self.streams.values())
        accepted = sum(each.delivered for each in positions)
        waiting = min(self.waiting, accepted)
        return accepted - waiting, sum(each.dead for each in positions), waiting

    def finished_sequence(self, stream: str) -> int:
        """The last event that no courier reads again: parts of a row are read until the row is complete."""
        sequence, first_part = self.position(stream).sequence, self.rows.get(stream)
        return sequence if first_part is None else min(sequence, first_part - 1)


class CursorStore:
    """Reads and writes the cursors of one journal. Only one process at a time may save the cursor of an adapter."""

    def __init__(self, directory: str, disk: Disk | None = None) -> None:
        self._directory = directory
        self._disk = OsDisk() if disk is None else disk

    def list_adapters(self) -> list[str]:
        """The names of all adapters that have a cursor."""
        return layout.list_adapters(self._disk, self._directory)

    def registered_adapters(self) -> set[str]:
        """The names of all adapters that have a cursor or a spec. Retention waits for these.

        Raises:
            OSError: A folder cannot be listed now.
        """
        found: set[str] = set()
        for folder, suffix in ((layout.CURSORS, _CURSOR_SUFFIX), (layout.COURIERS, _SPEC_SUFFIX)):
            try:
                names = self._disk.names(f"{self._directory}/{folder}")
            except FileNotFoundError:
                continue
            found |= {layout.decode_adapter_name(name.removesuffix(suffix)) for name in names if name.endswith(suffix)}
        return found

    def load(self, adapter: str) -> Cursor:
        """Load a cursor. A missing one starts at the beginning of every stream.

        An unreadable one counts as missing: what was delivered is delivered again.
        """
        try:
            return self.load_readonly(adapter)
        except OSError as error:
            _FAULTS.warn("journal.cursor_unreadable", self._path(adapter), error=error, path=self._path(adapter))
            return Cursor()

    def load_readonly(self, adapter: str) -> Cursor:
        """Load a cursor without changing any file. A damaged one counts as missing.

        Raises:
            OSError: The file cannot be read now.
        """
        return self._load(adapter, quarantine=False)

    def load_for_update(self, adapter: str) -> Cursor:
        """Load a cursor in order to save it later. A damaged file is quarantined.

        Raises:
            OSError: The file cannot be read now. Do not start from the beginning because of this.
        """
        return self._load(adapter, quarantine=True)

    def acknowledged_sequence(self, adapter: str, stream: str) -> int:
        """The sequence of the last event in the stream that the adapter is finished with; 0 without a cursor.

        Raises:
            OSError: The cursor cannot be read now.
        """
        return self._load(adapter, quarantine=False).position(stream).sequence

    def load_spec_summary(self, adapter: str) -> "SpecSummary":
        """Load what the journal needs from the adapter's spec. Without a valid spec it may receive every stream.

        Raises:
            OSError: The spec cannot be read now.
        """
        path = layout.courier_path(self._directory, adapter, "spec.json")
        spec = load_file(
            path, lambda data: decode_json(data, _Spec), quarantine=False, max_bytes=_MAX_BYTES, disk=self._disk
        )
        return SpecSummary(None) if spec is None else SpecSummary(spec.policy.ranks, spec.unsubscribed_at)

    def _load(self, adapter: str, *, quarantine: bool) -> Cursor:
        path = self._path(adapter)
        found = load_file(
            path, lambda data: decode_json(data, Cursor), quarantine=quarantine, max_bytes=_MAX_BYTES, disk=self._disk
        )
        return Cursor() if found is None else found

    def _path(self, adapter: str) -> str:
        return layout.cursor_path(self._directory, adapter)

    def save(self, adapter: str, cursor: Cursor) -> None:
        """Save the cursor. It is synced to disk when this returns."""
        self._disk.make_directory(f"{self._directory}/{layout.CURSORS}")
        self._disk.replace(self._path(adapter), encode_json(cursor))

    def max_acknowledged_sequence(self, stream: str) -> int:
        """The largest sequence in this stream that any adapter is finished with; 0 if there is none."""
        return max((self.load(each).position(stream).sequence for each in self.list_adapters()), default=0)


class SpecSummary(NamedTuple):
    """The part of an adapter's spec that the journal needs."""

    ranks: tuple[int, ...] | None
    """The ranks whose streams it receives; None for all."""
    unsubscribed_at: float | None = None
    """When the adapter was removed from the config, in seconds since the epoch; None while it is in use."""

    def includes_stream(self, stream: str) -> bool:
        """Whether the adapter receives this stream."""
        return self.ranks is None or layout.rank_of(stream) in self.ranks


class _SpecPolicy(msgspec.Struct, frozen=True):
    ranks: tuple[int, ...] | None = (0,)


class _Spec(msgspec.Struct, rename={"policy": "terms", "unsubscribed_at": "left_at"}):
    policy: _SpecPolicy = _SpecPolicy()
    unsubscribed_at: float | None = None


_INITIAL_POSITION: Final = Position()
_FAULTS: Final = FaultLog(every_seconds=60.0)
_MAX_BYTES: Final = 16 << 20
_CURSOR_SUFFIX: Final = ".json"
_SPEC_SUFFIX: Final = ".spec.json"
