"""The subscriptions of a journal: which adapters are followed, stored so that any process can deliver, also later."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from evsys_bus.delivery.status_files import (
    CourierLock,
    is_delivering,
    read_status,
    status_for_next_courier,
    status_path,
    write_status,
    write_status_if_idle,
)
from evsys_bus.delivery.subscription import AdapterRef, DeliveryPolicy, Subscription
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.files import load_file, lock_file
from evsys_bus.journal import Cursor, CursorStore, Disk, OsClock, OsDisk, layout
from evsys_bus.location import decode_json, encode_json
from evsys_bus.tasks import DeliveryStatus


class SubscriptionRecord(
    msgspec.Struct,
    frozen=True,
    rename={"adapter_ref": "recipe", "policy": "terms", "working_directory": "folder", "deregistered_at": "left_at"},
):
    """The content of an adapter's ``spec.json``."""

    name: str
    adapter_ref: AdapterRef | None = None
    """None if only the program that followed the adapter can build it."""
    policy: DeliveryPolicy = DeliveryPolicy()
    working_directory: str = ""
    """Working directory of that program, the base of relative paths in the params."""
    sys_path: tuple[str, ...] = ()
    """Import path of that program."""
    deregistered_at: float | None = None
    """When the adapter was no longer followed (seconds since the epoch); None while it is followed."""

    def to_subscription(self) -> Subscription:
        """Convert to a `Subscription`."""
        return Subscription(self.name, self.adapter_ref, policy=self.policy)


def to_records(subscriptions: Iterable[Subscription]) -> list[SubscriptionRecord]:
    """Convert to records with this program's working directory and import path."""
    directory, path = current_directory(), import_path()
    return [SubscriptionRecord(each.name, each.adapter_ref, each.policy, directory, path) for each in subscriptions]


def current_directory() -> str:
    """The working directory; empty if it was removed."""
    try:
        return os.getcwd()  # noqa: PTH109  # a string is needed
    except OSError:
        return ""


def import_path() -> tuple[str, ...]:
    """``sys.path`` with absolute paths, so that it is valid in another process."""
    directory = current_directory()
    found = (os.path.join(directory, each) for each in map(str, sys.path))  # noqa: PTH118  # strings are needed
    return tuple(each for each in found if "\0" not in each)


def register(directory: str, subscriptions: Iterable[Subscription], disk: Disk | None = None) -> list[str]:
    """Store a record and a cursor for each adapter, so that retention keeps events for it from the first one on.

    Write errors are logged and do not prevent delivery.

    Returns:
        The names of the adapters that could not be registered.
    """
    disk = OsDisk() if disk is None else disk
    failed: list[str] = []
    for each in to_records(subscriptions):
        try:
            disk.make_directory(f"{directory}/{layout.COURIERS}")
            disk.replace(layout.courier_path(directory, each.name, "spec.json"), encode_json(_without_secrets(each)))
            _ensure_cursor(directory, each.name, disk)
        except (OSError, TypeError, ValueError) as error:
            log().warning("courier.not_enlisted", journal=directory, courier=each.name, exc_info=error)
            failed.append(each.name)
    return failed


def _without_secrets(each: SubscriptionRecord) -> SubscriptionRecord:
    """Drop a recipe that contains a credential before the record is stored; only the program itself has it then."""
    if each.adapter_ref is None or not each.adapter_ref.has_credentials:
        return each
    fix = "give it by the environment, and `evsys-bus sync` can deliver to it too"
    log().info("courier.recipe_withheld", courier=each.name, why="its params hold a credential", fix=fix)
    return msgspec.structs.replace(each, adapter_ref=None)


def deregister(directory: str, active_names: Collection[str], rank: int, disk: Disk | None = None) -> None:
    """Mark registered adapters that are no longer followed and that no courier delivers to.

    Their pending events stay pending, and retention keeps these until ``evsys-bus forget`` is run.

    Args:
        directory: The journal.
        active_names: Names of the adapters that are followed now.
        rank: Rank of this process; adapters that serve only other ranks are not marked.
        disk: The file system.
    """
    disk = OsDisk() if disk is None else disk
    try:
        records = load_subscriptions(directory, disk)
    except OSError as write_error:
        log().warning("courier.not_struck_off", journal=directory, exc_info=write_error)
        return
    for each in records:
        is_served = each.policy.ranks is None or rank in each.policy.ranks
        if (
            each.name in active_names
            or not is_served
            or each.deregistered_at is not None
            or is_delivering(disk, directory, each.name)
        ):
            continue
        commands = (
            [] if each.adapter_ref is None else [shlex.join(["evsys-bus", "sync", directory, "--adapter", each.name])]
        )
        commands.append(shlex.join(["evsys-bus", "forget", each.name, directory]))
        fix = f"follow it again, or: {', or: '.join(commands)}"
        error = "it is not followed any more"
        status = DeliveryStatus(state="ended", pid=os.getpid(), at=time.time(), error=error, fix=fix)
        try:
            updated = msgspec.structs.replace(each, deregistered_at=time.time())
            disk.replace(layout.courier_path(directory, each.name, "spec.json"), encode_json(updated))
            write_status_if_idle(disk, directory, each.name, status)
        except OSError as write_error:
            log().warning("courier.not_struck_off", journal=directory, courier=each.name, exc_info=write_error)
            continue
        meaning = "pending events stay pending, and retention keeps them, until evsys-bus forget is run with its name"
        log().warning("courier.not_followed", journal=directory, courier=each.name, meaning=meaning, fix=fix)


def forget(directory: str, name: str, disk: Disk | None = None) -> None:
    """Delete the spec, cursor and state of an adapter; its dead letters remain.

    Retention no longer waits for it. If it is followed again, it starts with the oldest event in the journal.

    Raises:
        CourierBusyError: A courier delivers to it.
        OSError: A file could not be deleted; call again to delete the rest.
    """
    disk = OsDisk() if disk is None else disk
    lock = CourierLock(directory, name, disk, OsClock())
    lock.acquire()
    try:
        cursor = layout.cursor_path(directory, name)
        for path in (layout.courier_path(directory, name, "spec.json"), status_path(directory, name), cursor):
            with contextlib.suppress(FileNotFoundError):
                disk.remove(path)
    finally:
        lock.release()


def load_subscriptions(directory: str, disk: Disk | None = None) -> list[SubscriptionRecord]:
    """Load the records of all registered adapters, sorted by name; logs and skips those that cannot be read."""
    disk = OsDisk() if disk is None else disk
    found: list[SubscriptionRecord] = []
    try:
        names = sorted(disk.names(f"{directory}/{layout.COURIERS}"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if not name.endswith(_SPEC_SUFFIX):
            continue
        path = f"{directory}/{layout.COURIERS}/{name}"
        try:
            each = load_file(path, _decode_record, quarantine=False, max_bytes=_MAX_SPEC_BYTES, disk=disk)
        except OSError as error:
            _FAULTS.warn("couriers.spec_unreadable", path, error=error, path=path)
        else:
            found += [] if each is None else [each]
    return found


def _decode_record(data: bytes) -> SubscriptionRecord:
    return decode_json(data, SubscriptionRecord)


def _exists(disk: Disk, path: str) -> bool:
    try:
        disk.size(path)
    except FileNotFoundError:
        return False
    return True


def is_subscribed(directory: str, name: str, disk: Disk) -> bool:
    """Whether an adapter of this name is registered and still followed; True if the file cannot be read now."""
    try:
        return (
            decode_json(
                disk.read(layout.courier_path(directory, name, "spec.json"), 0, _MAX_SPEC_BYTES), SubscriptionRecord
            ).deregistered_at
            is None
        )
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, msgspec.DecodeError):
        return True


def _ensure_cursor(directory: str, name: str, disk: Disk) -> None:
    """Create the cursor if it is missing and reset the state to its counts, unless a courier holds the lock.

    A state without a courier is from an earlier run, whose error may have been fixed since.
    """
    lock = lock_file(layout.courier_path(directory, name, "lock"), disk=disk)
    if lock is None:
        return
    try:
        if not _exists(disk, layout.cursor_path(directory, name)):
            CursorStore(directory, disk).save(name, Cursor())
        carried = status_for_next_courier(read_status(disk, directory, name))
        if carried != DeliveryStatus():
            write_status(disk, directory, name, carried)
        else:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                disk.remove(status_path(directory, name))
    finally:
        disk.close(lock)


_SPEC_SUFFIX: Final = ".spec.json"
_MAX_SPEC_BYTES: Final = 16 << 20
_FAULTS: Final = FaultLog(every_seconds=60.0)
