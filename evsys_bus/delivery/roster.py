"""The subscriptions of a journal: which adapters are followed, stored so that any process can deliver, also later."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from evsys_bus.delivery.courier_lock import CourierLock
from evsys_bus.delivery.followed import Followed, Recipe, Terms
from evsys_bus.delivery.states import is_held, kept, read_state, state_file, write_state, write_state_of_idle
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.files import load_file, lock_file
from evsys_bus.journal import Cursor, Cursors, Disk, OsClock, OsDisk, layout
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.where import decode_json, encode_json


class Posted(msgspec.Struct, frozen=True):
    """The content of an adapter's ``spec.json``."""

    name: str
    recipe: Recipe | None = None
    """None if only the program that followed the adapter can build it."""
    terms: Terms = Terms()
    folder: str = ""
    """Working directory of that program, the base of relative paths in the params."""
    sys_path: tuple[str, ...] = ()
    """Import path of that program."""
    left_at: float | None = None
    """When the adapter was no longer followed (seconds since the epoch); None while it is followed."""

    def as_followed(self) -> Followed:
        """Convert to a `Followed`."""
        return Followed(self.name, self.recipe, terms=self.terms)


def posted(followed: Iterable[Followed]) -> list[Posted]:
    """Convert to records with this program's working directory and import path."""
    folder, path = current_folder(), import_path()
    return [Posted(each.name, each.recipe, each.terms, folder, path) for each in followed]


def current_folder() -> str:
    """The working directory; empty if it was removed."""
    try:
        return os.getcwd()  # noqa: PTH109  # a string is needed
    except OSError:
        return ""


def import_path() -> tuple[str, ...]:
    """``sys.path`` with absolute paths, so that it is valid in another process."""
    folder = current_folder()
    found = (os.path.join(folder, each) for each in map(str, sys.path))  # noqa: PTH118  # strings are needed
    return tuple(each for each in found if "\0" not in each)


def enlist(directory: str, followed: Iterable[Followed], disk: Disk | None = None) -> list[str]:
    """Store a record and a cursor for each adapter, so that retention keeps events for it from the first one on.

    Write errors are logged and do not prevent delivery.

    Returns:
        The names of the adapters that could not be registered.
    """
    disk = OsDisk() if disk is None else disk
    refused: list[str] = []
    for each in posted(followed):
        try:
            disk.make_directory(f"{directory}/{layout.COURIERS}")
            disk.replace(layout.courier_file(directory, each.name, "spec.json"), encode_json(_without_secrets(each)))
            _give_cursor(directory, each.name, disk)
        except (OSError, TypeError, ValueError) as error:
            log().warning("courier.not_enlisted", journal=directory, courier=each.name, exc_info=error)
            refused.append(each.name)
    return refused


def _without_secrets(each: Posted) -> Posted:
    """Drop a recipe that contains a credential before the record is stored; only the program itself has it then."""
    if each.recipe is None or not each.recipe.private:
        return each
    fix = "give it by the environment, and `evsys-bus sync` can deliver to it too"
    log().info("courier.recipe_withheld", courier=each.name, why="its params hold a credential", fix=fix)
    return msgspec.structs.replace(each, recipe=None)


def post_again(directory: str, posts: Iterable[Posted], disk: Disk | None = None) -> None:
    """Store records again whose files were removed, so that pending events can still be delivered."""
    disk = OsDisk() if disk is None else disk
    for each in posts:
        path = layout.courier_file(directory, each.name, "spec.json")
        try:
            if not _is_there(disk, path):
                disk.replace(path, encode_json(_without_secrets(each)))
        except (OSError, TypeError, ValueError) as error:
            log().warning("courier.not_enlisted", journal=directory, courier=each.name, exc_info=error)


def strike_off(directory: str, followed: Collection[str], rank: int, disk: Disk | None = None) -> None:
    """Mark registered adapters that are no longer followed and that no courier delivers to.

    Their pending events stay pending, and retention keeps these until ``evsys-bus forget`` is run.

    Args:
        directory: The journal.
        followed: Names of the adapters that are followed now.
        rank: Rank of this process; adapters that serve only other ranks are not marked.
        disk: The file system.
    """
    disk = OsDisk() if disk is None else disk
    try:
        posts = roster(directory, disk)
    except OSError as refusal:
        log().warning("courier.not_struck_off", journal=directory, exc_info=refusal)
        return
    for each in posts:
        serves = each.terms.ranks is None or rank in each.terms.ranks
        if each.name in followed or not serves or each.left_at is not None or is_held(disk, directory, each.name):
            continue
        commands = [] if each.recipe is None else [shlex.join(["evsys-bus", "sync", directory, "--adapter", each.name])]
        commands.append(shlex.join(["evsys-bus", "forget", each.name, directory]))
        fix = f"follow it again, or: {', or: '.join(commands)}"
        error = "it is not followed any more"
        state = DeliveryStatus(state="ended", pid=os.getpid(), at=time.time(), error=error, fix=fix)
        try:
            left = msgspec.structs.replace(each, left_at=time.time())
            disk.replace(layout.courier_file(directory, each.name, "spec.json"), encode_json(left))
            write_state_of_idle(disk, directory, each.name, state)
        except OSError as refusal:
            log().warning("courier.not_struck_off", journal=directory, courier=each.name, exc_info=refusal)
            continue
        meaning = "pending events stay pending, and retention keeps them, until evsys-bus forget is run with its name"
        log().warning("courier.not_followed", journal=directory, courier=each.name, meaning=meaning, fix=fix)


def forget(directory: str, name: str, disk: Disk | None = None) -> None:
    """Delete the spec, cursor and state of an adapter; its dead letters are kept.

    Retention no longer waits for it. If it is followed again, it starts with the oldest event in the journal.

    Raises:
        CourierBusyError: A courier delivers to it.
        OSError: A file could not be deleted; call again to delete the rest.
    """
    disk = OsDisk() if disk is None else disk
    lock = CourierLock(directory, name, disk, OsClock())
    lock.take()
    try:
        cursor = layout.cursor_file(directory, name)
        for path in (layout.courier_file(directory, name, "spec.json"), state_file(directory, name), cursor):
            with contextlib.suppress(FileNotFoundError):
                disk.remove(path)
    finally:
        lock.let_go()


def roster(directory: str, disk: Disk | None = None) -> list[Posted]:
    """Load the records of all registered adapters, sorted by name; logs and skips those that cannot be read."""
    disk = OsDisk() if disk is None else disk
    found: list[Posted] = []
    try:
        names = sorted(disk.names(f"{directory}/{layout.COURIERS}"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if not name.endswith(_SPEC):
            continue
        path = f"{directory}/{layout.COURIERS}/{name}"
        try:
            each = load_file(path, _decode, set_aside=False, most_bytes=_MOST_BYTES, disk=disk)
        except OSError as error:
            _FAULTS.warn("couriers.spec_unreadable", path, error=error, path=path)
        else:
            found += [] if each is None else [each]
    return found


def _decode(data: bytes) -> Posted:
    return decode_json(data, Posted)


def _is_there(disk: Disk, path: str) -> bool:
    try:
        disk.size(path)
    except FileNotFoundError:
        return False
    return True


def is_followed(directory: str, name: str, disk: Disk) -> bool:
    """Whether an adapter of this name is registered and still followed; True if the file cannot be read now."""
    try:
        return (
            decode_json(disk.read(layout.courier_file(directory, name, "spec.json"), 0, _MOST_BYTES), Posted).left_at
            is None
        )
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, msgspec.DecodeError):
        return True


def _give_cursor(directory: str, name: str, disk: Disk) -> None:
    """Create the cursor if it is missing and reset the state to its counts, unless a courier holds the lock.

    A state without a courier is from an earlier run, whose error may have been fixed since.
    """
    lock = lock_file(layout.courier_file(directory, name, "lock"), disk=disk)
    if lock is None:
        return
    try:
        if not _is_there(disk, layout.cursor_file(directory, name)):
            Cursors(directory, disk).save(name, Cursor())
        stays = kept(read_state(disk, directory, name))
        if stays != DeliveryStatus():
            write_state(disk, directory, name, stays)
        else:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                disk.remove(state_file(directory, name))
    finally:
        disk.close(lock)


_SPEC: Final = ".spec.json"
_MOST_BYTES: Final = 16 << 20
_FAULTS: Final = FaultLog(every_seconds=60.0)
