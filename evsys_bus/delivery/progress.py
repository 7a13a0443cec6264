"""`read_progress`: the delivery progress of every adapter of a journal.

Always ``recorded = delivered + dead + waiting + pending``. Everything is read from disk. The cursor holds all of these
counts but that of pending events: those after the cursor, counted by frames and checksums without decoding. So all
processes that read a journal get the same counts.
"""

import os
import threading
from collections.abc import Mapping
from typing import Final

import msgspec

from evsys_bus.codec import error_text
from evsys_bus.delivery.status_files import read_status
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.delivery.subscriptions import load_subscriptions
from evsys_bus.journal import CursorStore, Disk, OsDisk, Position, TailReader, layout
from evsys_bus.tasks import DeliveryStatus


class ProgressReader:
    """Reads the delivery progress of one journal repeatedly; events are counted only once.

    Args:
        directory: The journal.
        disk: The file system.
    """

    def __init__(self, directory: str | os.PathLike[str], disk: Disk | None = None) -> None:
        self._directory: Final = os.fspath(directory)
        self._disk: Final = OsDisk() if disk is None else disk
        self._pending_counters: dict[str, PendingCounter] = {}
        self.read_error: OSError | None = None
        """The error of the last `read`; None if it could read everything."""

    def read(self, last_sequences: Mapping[str, int] | None = None) -> list[DeliveryStatus]:
        """The status of every adapter that has a cursor, a spec or a courier, sorted by name.

        An adapter whose files cannot be read has the state ``unknown_status``.

        Args:
            last_sequences: The last sequence of each stream that the calling process writes; these streams are not
                read.
        """
        disk, directory = self._disk, self._directory
        policies: dict[str, DeliveryPolicy] = {}
        names: set[str] = set()
        self.read_error = None
        for collect in (
            lambda: policies.update({each.name: each.policy for each in load_subscriptions(directory, disk)}),
            lambda: names.update(layout.list_adapters(disk, directory)),
            lambda: names.update(_names_with_status(disk, directory)),
        ):
            try:
                collect()
            except OSError as error:
                self.read_error = error
        names |= policies.keys()
        if (error := self.read_error) is not None:  # the names found may be incomplete
            return [self.unknown_status(name, error) for name in sorted(names or {"(unknown)"})]
        return [
            self._status_or_unknown(name, policies.get(name, DeliveryPolicy()), last_sequences or {})
            for name in sorted(names)
        ]

    def unknown_status(self, name: str, error: OSError) -> DeliveryStatus:
        """The status of an adapter whose files cannot be read now."""
        why = f"its files cannot be read: {error_text(error)}"
        fix = f"run evsys-bus status {self._directory} once they can be read"
        return DeliveryStatus(name, state="unknown", error=why, fix=fix)

    def _status_or_unknown(
        self, name: str, policy: DeliveryPolicy, last_sequences: Mapping[str, int]
    ) -> DeliveryStatus:
        try:
            return self._status(name, policy, last_sequences)
        except OSError as error:
            self.read_error = error
            return self.unknown_status(name, error)

    def unregistered_status(self, name: str, policy: DeliveryPolicy) -> DeliveryStatus:
        """The status of an adapter whose files could not be written: all of its events are pending."""
        pending = PendingCounter(self._directory, policy.ranks, self._disk).count({})
        fix = "read the log; the disk may be full, or the name too long"
        error = "its cursor and state cannot be written"
        return DeliveryStatus(name, recorded=pending, pending=pending, state="failed", error=error, fix=fix)

    def _status(self, name: str, policy: DeliveryPolicy, last_sequences: Mapping[str, int]) -> DeliveryStatus:
        disk, directory = self._disk, self._directory
        # First the state, then the cursor, last the journal: what changes meanwhile is counted as pending.
        status = read_status(disk, directory, name)
        busy = disk.is_locked(layout.courier_path(directory, name, "lock"))
        cursor = CursorStore(directory, disk).load_readonly(name)
        delivered, dead, waiting = cursor.counts()
        positions = cursor.streams
        if name not in self._pending_counters:
            self._pending_counters[name] = PendingCounter(directory, policy.ranks, disk)
        pending = self._pending_counters[name].count(positions, last_sequences)
        status = status or DeliveryStatus()
        return msgspec.structs.replace(
            status,
            name=name,
            recorded=delivered + dead + waiting + pending,
            delivered=delivered,
            dead=dead,
            pending=pending,
            owed=min(status.owed, delivered),
            absent=self._pending_counters[name].count_absent(positions),
            waiting=waiting,
            busy=busy,
        )


def read_progress(directory: str | os.PathLike[str], disk: Disk | None = None) -> list[DeliveryStatus]:
    """The status of every adapter that has a cursor, a spec or a courier, sorted by name; counts all events again."""
    return ProgressReader(directory, disk).read()


def _names_with_status(disk: Disk, directory: str) -> list[str]:
    try:
        names = disk.names(f"{directory}/{layout.COURIERS}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        layout.decode_adapter_name(name.removesuffix(_STATUS_SUFFIX)) for name in names if name.endswith(_STATUS_SUFFIX)
    ]


class PendingCounter:
    """Counts the events after a cursor; reads each record only once. Safe from any thread.

    Args:
        directory: The journal.
        ranks: The ranks whose streams are counted, besides those in the cursor; None for all.
        disk: The file system.
    """

    def __init__(self, directory: str, ranks: tuple[int, ...] | None, disk: Disk) -> None:
        self._directory: Final = directory
        self._ranks: Final = ranks
        self._disk: Final = disk
        self._lock: Final = threading.Lock()
        self._tails: dict[str, tuple[TailReader, int]] = {}
        """By stream: what counts its events, and how many events were delivered or dead where counting started."""

    def count(self, positions: Mapping[str, Position], last_sequences: Mapping[str, int] = {}) -> int:
        """The number of events after these positions, which must not move back between calls.

        Args:
            positions: Position by stream.
            last_sequences: The last sequence of streams without gaps, which need not be read.
        """
        with self._lock:
            streams = {*self._served_streams(), *positions}
            return sum(
                self._pending_in_stream(name, positions.get(name, Position()), last_sequences.get(name))
                for name in streams
            )

    def count_absent(self, positions: Mapping[str, Position]) -> int:
        """The number of events that were removed from the journal before the adapter could get them."""
        with self._lock:
            return sum(
                self._absent_in_stream(name, positions.get(name, Position()))
                for name in {*self._served_streams(), *positions}
            )

    def _served_streams(self) -> list[str]:
        names = layout.list_streams_of(self._disk, self._directory, layout.DELIVERED_FAMILIES)
        return [name for name in names if self._ranks is None or layout.rank_of(name) in self._ranks]

    def _absent_in_stream(self, stream: str, position: Position) -> int:
        removed = layout.count_removed_events(layout.list_segments(self._disk, f"{self._directory}/{stream}"))
        return max(0, max(position.sequence, removed) - position.delivered - position.dead)

    def _pending_in_stream(self, stream: str, position: Position, last_sequence: int | None) -> int:
        if last_sequence is not None and position.sequence:
            return max(0, last_sequence - position.sequence)
        finished = position.delivered + position.dead
        tail, finished_before = self._tails.get(stream, (None, 0))
        if tail is None or tail.is_segment_removed():
            folder = f"{self._directory}/{stream}"
            tail = TailReader(self._disk, folder, position.sequence, count_only=True, skip_newer_formats=True)
            finished_before = finished
            self._tails[stream] = tail, finished_before
        for _ in tail.poll_runs():
            pass
        return max(0, tail.events - (finished - finished_before))


_STATUS_SUFFIX: Final = ".state.json"
