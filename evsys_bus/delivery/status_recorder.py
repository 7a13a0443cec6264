"""`StatusRecorder`: records in the couriers' stream how deliveries go, for programs that show a run from its journal.

It works from what its process has in memory, and reads the journal only to count pending events after a change: an idle
journal costs nothing. What it records is not delivered to adapters, so it changes no status.

How long the hooks of the bus take is known in another process, that of the program: the bus writes it to a small file
(`write_hook_times`), and the recorder copies it. A stream of the program's own would cost it a second writer with its
thread and its files.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import msgspec

from evsys_bus.adapter import DeliveryChanged, HookTimes
from evsys_bus.diagnostics import FaultLog
from evsys_bus.events import Event
from evsys_bus.files import load_file
from evsys_bus.journal import Disk, layout
from evsys_bus.tasks import DeliveryStatus

EVERY_SECONDS: Final = 5.0
"""The time between two records of an adapter whose state has changed, at least; also before the first one."""
COUNTS_SECONDS: Final = 30.0
"""The same where nothing but counts has changed, as all the time during a training."""
MAX_AGE_SHARE: Final = 0.002
"""Both grow with the age of the process, so that a month of training adds few records: counts are at most this share of
it old."""
_WORKING: Final = frozenset({None, "delivering", "idle"})
"""States that alternate while all is well."""
_UNCOUNTED: Final = DeliveryStatus()
_MAX_FILE_BYTES: Final = 1 << 20


class ObservedCourier(Protocol):
    """What is read of a courier, from another thread."""

    name: str

    @property
    def handled(self) -> int:
        """How many events it has handled; grows with each."""
        ...

    @property
    def last_status(self) -> DeliveryStatus | None:
        """Its state without counts of events; None before it has written one."""
        ...

    @property
    def counts(self) -> DeliveryStatus:
        """The counts of events; reads the journal."""
        ...


class HookTimesRecord(msgspec.Struct, frozen=True):
    """The content of the file with the hooks' times."""

    rank: int
    hooks: list[dict[str, Any]]


def hook_times_path(directory: str) -> str:
    """Path of the file with the hooks' times of the program that writes the journal."""
    return f"{directory}/{layout.COURIERS}/hooks.json"


def write_hook_times(disk: Disk, directory: str, rank: int, hooks: Sequence[msgspec.Struct]) -> None:
    """Replace the file with the hooks' times.

    Raises:
        OSError: It cannot be written.
    """
    record = HookTimesRecord(rank, [msgspec.to_builtins(each) for each in hooks])
    disk.replace(hook_times_path(directory), msgspec.json.encode(record))


class StatusRecorder:
    """Records what has changed.

    Args:
        directory: The journal.
        publish: Records an event in the couriers' stream.
        disk: The file system.
        every_seconds: See `EVERY_SECONDS`.
        counts_seconds: See `COUNTS_SECONDS`.
        monotonic: The clock.
    """

    def __init__(
        self,
        directory: str,
        publish: Callable[[Event], None],
        disk: Disk,
        *,
        every_seconds: float = EVERY_SECONDS,
        counts_seconds: float = COUNTS_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory: Final = directory
        self._publish: Final = publish
        self._disk: Final = disk
        self._every_seconds: Final = every_seconds
        self._counts_seconds: Final = counts_seconds
        self._monotonic: Final = monotonic
        self._started = monotonic()
        self._due = self._started + every_seconds
        self._recorded: Final[dict[str, _Recorded]] = {}
        self._hook_times: HookTimesRecord | None = None
        self._hook_times_due = 0.0
        self._faults: Final = FaultLog(every_seconds=60.0)

    def record(self, couriers: Iterable[ObservedCourier], *, final: bool = False) -> None:
        """Record what has changed, if that is due; one caller at a time, on a thread that no training waits for.

        Args:
            couriers: Those of this process.
            final: Whether they have ended: whatever has changed is recorded, if anything was recorded before.
        """
        now = self._monotonic()
        if now < self._due and not (final and self._recorded):
            return
        factor = max(1.0, MAX_AGE_SHARE * (now - self._started) / self._counts_seconds)
        self._due = now + factor * self._every_seconds
        counts_seconds = factor * self._counts_seconds
        try:
            for each in couriers:
                self._record_status(each, now, counts_seconds, final=final)
            if now >= self._hook_times_due or final:
                self._hook_times_due = now + counts_seconds
                self._record_hook_times()
        except Exception as error:  # isolation: the disk may fail in any way, and deliveries must continue
            self._faults.warn("courier.status_not_recorded", self._directory, error=error)

    def _record_status(self, courier: ObservedCourier, now: float, counts_seconds: float, *, final: bool) -> None:
        state = _comparable(courier.last_status)
        if state is None:
            return
        handled, recorded = courier.handled, self._recorded.get(courier.name)
        if recorded is not None and recorded.state == state and not final:
            # An adapter that is stuck handles nothing, while more and more is pending.
            may_differ = handled != recorded.handled or state.state is not None
            if not may_differ or now - recorded.at < counts_seconds:
                return
        counts = courier.counts
        status = msgspec.structs.replace(
            courier.last_status or _UNCOUNTED,
            name=courier.name,
            recorded=counts.recorded,
            delivered=counts.delivered,
            dead=counts.dead,
            pending=counts.pending,
            waiting=counts.waiting,
        )
        compared = (state, counts)
        is_new = recorded is None or recorded.compared != compared
        self._recorded[courier.name] = _Recorded(state, handled, compared, now)
        if is_new:
            shown = {
                name: value
                for name, value in msgspec.structs.asdict(status).items()
                if value != getattr(_UNCOUNTED, name)
            }
            self._publish(DeliveryChanged(courier.name, self._directory, shown))

    def _record_hook_times(self) -> None:
        found = load_file(
            hook_times_path(self._directory), _decode, quarantine=False, max_bytes=_MAX_FILE_BYTES, disk=self._disk
        )
        if found is not None and found != self._hook_times:
            self._hook_times = found
            self._publish(HookTimes(self._directory, found.rank, found.hooks))


class _Recorded(msgspec.Struct, frozen=True):
    """What was recorded last for an adapter."""

    state: DeliveryStatus
    handled: int
    compared: tuple[DeliveryStatus, DeliveryStatus]
    at: float


def _comparable(status: DeliveryStatus | None) -> DeliveryStatus | None:
    """The part of a state that counts as a change."""
    if status is None:
        return None
    state = None if status.state in _WORKING else status.state
    return msgspec.structs.replace(status, state=state, at=0.0, attempts=0)


def _decode(data: bytes) -> HookTimesRecord:
    return msgspec.json.decode(data, type=HookTimesRecord)
