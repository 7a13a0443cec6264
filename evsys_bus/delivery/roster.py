"""The roster of a journal: who is followed there, written down so that any process can deliver, also on another day."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

from evsys_bus.delivery.followed import CourierState, Followed, Recipe, Terms
from evsys_bus.delivery.states import is_held, state_file, write_state_of_idle
from evsys_bus.diagnostics import log
from evsys_bus.journal import Cursor, Cursors, Disk, OsDisk, layout


class Posted(msgspec.Struct, frozen=True):
    """Who is followed; what stands in an adapter's ``spec.json``."""

    name: str
    recipe: Recipe | None = None
    """None where only the program that followed it has the adapter."""
    terms: Terms = Terms()
    folder: str = ""
    """The current directory of that program: relative paths in the params are meant from there."""
    sys_path: tuple[str, ...] = ()
    """Where that program imported from."""
    left_at: float | None = None
    """Since when no program follows it any more (wall clock); None while it is followed."""

    def as_followed(self) -> Followed:
        """What a crew takes."""
        return Followed(self.name, self.recipe, terms=self.terms)


def posted(followed: Iterable[Followed]) -> list[Posted]:
    """Who is followed, and what building them takes besides."""
    folder, path = current_folder(), import_path()
    return [Posted(each.name, each.recipe, each.terms, folder, path) for each in followed]


def current_folder() -> str:
    """The current directory; empty where it was removed."""
    try:
        return os.getcwd()  # noqa: PTH109  # as text
    except OSError:
        return ""


def import_path() -> tuple[str, ...]:
    """``sys.path`` as it means the same to another process; without what no JSON can hold."""
    folder = current_folder()
    found = (os.path.join(folder, each) for each in map(str, sys.path))  # noqa: PTH118  # as text
    return tuple(each for each in found if each.isprintable())


def enlist(directory: str, followed: Iterable[Followed], disk: Disk | None = None) -> None:
    """Write down who is followed, and give each a cursor, so that retention waits for them from the first event on.

    What the disk refuses is logged, and keeps nobody from delivering.
    """
    disk = OsDisk() if disk is None else disk
    for each in posted(followed):
        try:
            disk.make_directory(f"{directory}/{layout.COURIERS}")
            disk.replace(layout.courier_file(directory, each.name, "spec.json"), _write(each))
            _give_cursor(directory, each.name, disk)
        except (OSError, TypeError, ValueError) as error:
            log().warning("courier.not_enlisted", journal=directory, courier=each.name, exc_info=error)


def post_again(directory: str, posts: Iterable[Posted], disk: Disk | None = None) -> None:
    """Write down again who was followed, where somebody removed that: what is there for them can be delivered yet."""
    disk = OsDisk() if disk is None else disk
    for each in posts:
        path = layout.courier_file(directory, each.name, "spec.json")
        try:
            if path.rpartition("/")[2] not in disk.names(f"{directory}/{layout.COURIERS}"):
                disk.replace(path, _write(each))
        except (OSError, TypeError, ValueError) as error:
            log().warning("courier.not_enlisted", journal=directory, courier=each.name, exc_info=error)


def strike_off(directory: str, followed: Collection[str], rank: int, disk: Disk | None = None) -> None:
    """Note who is followed no more: who is on the roster, and not among these, and delivered to by nobody.

    What is pending for it stays pending; but retention does not wait for it for ever (`evsys_bus.journal.retain`).

    Args:
        directory: The journal.
        followed: The names of those who are followed now.
        rank: Of the process that follows them; those of other ranks are the business of theirs.
        disk: The file system.
    """
    disk = OsDisk() if disk is None else disk
    for each in roster(directory, disk):
        serves = each.terms.ranks is None or rank in each.terms.ranks
        if each.name in followed or not serves or each.left_at is not None or is_held(disk, directory, each.name):
            continue
        command = shlex.join(["evsys-bus", "sync", directory, "--adapter", each.name])
        fix = "follow it again" if each.recipe is None else f"follow it again, or: {command}"
        state = CourierState("ended", os.getpid(), time.time(), error="it is not followed any more", fix=fix)
        try:
            left = msgspec.structs.replace(each, left_at=time.time())
            disk.replace(layout.courier_file(directory, each.name, "spec.json"), _write(left))
            write_state_of_idle(disk, directory, each.name, state)
        except OSError as error:
            log().warning("courier.not_struck_off", journal=directory, courier=each.name, exc_info=error)
            continue
        meaning = "what is pending stays so; a journal with retain lets go of it after a day, and it counts as dead"
        log().warning("courier.not_followed", journal=directory, courier=each.name, meaning=meaning, fix=fix)


def roster(directory: str, disk: Disk | None = None) -> list[Posted]:
    """Who is on it, by name; a spec that cannot be read is logged and left out."""
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
            found.append(_read(disk.read(path, 0, _MOST_BYTES)))
        except (OSError, msgspec.DecodeError) as error:
            log().warning("couriers.spec_unreadable", path=path, exc_info=error)
    return found


def _give_cursor(directory: str, name: str, disk: Disk) -> None:
    """Under the lock: where another process delivers, the cursor is its own to make, and the state is true.

    Where none does, the state is of another day: what was wrong then may have been mended.
    """
    lock = disk.lock(layout.courier_file(directory, name, "lock"))
    if lock is None:
        return
    try:
        if name not in layout.followers(disk, directory):
            Cursors(directory, disk).save(name, Cursor())
        with contextlib.suppress(FileNotFoundError):
            disk.remove(state_file(directory, name))
    finally:
        disk.close(lock)


_SPEC: Final = ".spec.json"
_MOST_BYTES: Final = 16 << 20
_read: Final = msgspec.json.Decoder(Posted).decode
_write: Final = msgspec.json.Encoder().encode
