"""Removing a trainer's checkpoints from this machine, limited to files that belong to the run.

A checkpoint event may name any path: a shared base model, another run's files. `RemovalBounds` defines where files may
be removed, `plan_removal` selects the files of a checkpoint inside them, and `remove_path` follows no symbolic links.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from evsys_adapters.checkpoints.manifest import is_remote_uri
from evsys_adapters.checkpoints.source_files import OWN_NAMES, RUN_FILES, RUN_RECORD, SPOOL_FOLDER, local_path
from evsys_bus.context import ManifestRow
from evsys_bus.disk import OsDisk
from evsys_bus.journal import layout

_OUTSIDE: Final = "it lies outside the folders of the run and of its experiment"


class SkippedPath(NamedTuple):
    """A path that is not removed although its checkpoint is."""

    path: Path
    why: str
    outside: bool = False
    """Whether listing its folder in ``outside`` would allow the removal."""


class RemovablePath(NamedTuple):
    """A path that may be removed."""

    path: Path
    """Without symbolic links in its parents."""
    root: Path
    """The allowed folder that contains it."""
    status: os.stat_result
    """Its status when it was checked."""


class RemovalPlan(NamedTuple):
    """Which files of a checkpoint are removed."""

    removable: list[RemovablePath]
    skipped: list[SkippedPath]


class RemovalBounds:
    """Where files of one run's checkpoints may be removed: inside the folders of run and experiment, or listed ones.

    Excluded are journals, spools, folders of other runs, folders that contain any of these, and the current directory.

    Args:
        run_dir: The run's folder.
        experiment: The experiment's folder, if any.
        outside: Further allowed folders.
        other_runs: Folders of other runs.
    """

    def __init__(
        self,
        run_dir: Path,
        experiment: Path | None = None,
        outside: Iterable[Path] = (),
        other_runs: Iterable[Path] = (),
    ) -> None:
        roots = [each.resolve() for each in (run_dir, experiment, *outside) if each is not None]
        self.protected: Final = [each.resolve() for each in (run_dir, experiment) if each is not None]
        """Folders that must neither be a checkpoint nor be inside one."""
        self._roots: Final = [each for each in roots if each != each.parent]
        others = {each.resolve() for each in other_runs}
        self._other_runs: Final = [
            each for each in others if not any(folder.is_relative_to(each) for folder in self.protected)
        ]

    def root_of(self, path: Path) -> Path | None:
        """Return the innermost allowed folder that contains the path."""
        around = [root for root in self._roots if root in path.parents]
        return max(around, key=lambda root: len(root.parts), default=None)

    def reason_to_skip(self, path: Path) -> SkippedPath | None:
        """Return why the path may not be removed; None if it may.

        Args:
            path: Without symbolic links in its parents.
        """
        return next(self._reasons_to_skip(path), None)

    def _reasons_to_skip(self, path: Path) -> Iterator[SkippedPath]:
        root = self.root_of(path)
        if any(folder.is_relative_to(path) for folder in self.protected):
            yield SkippedPath(path, "it is or contains the run's folder")
        elif root is None:
            yield SkippedPath(path, _OUTSIDE, outside=True)
        with suppress(OSError):
            if Path.cwd().is_relative_to(path):
                yield SkippedPath(path, "it holds the current directory")
        if path.parent in self.protected and path.name in OWN_NAMES:
            yield SkippedPath(path, "evsys-bus keeps it")
        yield from (
            SkippedPath(path, f"{other} is the folder of another run")
            for other in self._other_runs
            if path.is_relative_to(other) or other.is_relative_to(path)
        )
        yield from (
            SkippedPath(path, f"{above} does not belong to this run") for above in self._foreign_around(path, root)
        )
        yield from (SkippedPath(path, f"{inner} in it is not part of a checkpoint") for inner in _foreign_inside(path))

    def _foreign_around(self, path: Path, root: Path | None) -> Iterator[Path]:
        """Yield the path and its parents that belong to a journal, a spool or another run."""
        marker_names = RUN_FILES if self.protected[0] not in path.parents else (RUN_RECORD,)
        for above in (path, *path.parents):
            if any(folder.is_relative_to(above) for folder in self.protected) or above == root:
                break
            if (
                above.name == SPOOL_FOLDER
                or _is_journal(above)
                or any((above / name).exists() for name in marker_names)
            ):
                yield above


def local_paths(row: ManifestRow) -> list[Path]:
    """Return the local files and directories of a checkpoint, whether or not they exist."""
    named = dict.fromkeys(path for path in (row.state_path, row.sampler_path) if path and not is_remote_uri(path))
    return [local_path(path).absolute() for path in named]


def is_whole(row: ManifestRow) -> bool:
    """Whether the checkpoint has local files, and all of them exist."""
    named = local_paths(row)
    return bool(named) and all(path.exists() for path in named)


def plan_removal(row: ManifestRow, others: Iterable[ManifestRow], bounds: RemovalBounds) -> RemovalPlan:
    """Select the files of a checkpoint to remove: inside the bounds and not used by another checkpoint.

    A symbolic link and its target are removed together, or both are skipped.
    """
    used = {real for other in others for path in local_paths(other) for real in _link_chain(path)}
    used = {each for each in used if not any(folder.is_relative_to(each) for folder in bounds.protected)}
    result = RemovalPlan([], [])
    for path in local_paths(row):
        reals = _link_chain(path)
        if any(each.is_relative_to(real) or real.is_relative_to(each) for each in used for real in reals):
            continue
        found: list[RemovablePath] = []
        for real in reversed(reals):  # the link last: its target can be found as long as it exists
            skipped = bounds.reason_to_skip(real)
            root = bounds.root_of(real)
            if skipped is not None or root is None:
                result.skipped.append(skipped or SkippedPath(real, _OUTSIDE, outside=True))
                break
            with suppress(FileNotFoundError, NotADirectoryError):
                found.append(RemovablePath(real, root, real.lstat()))
        else:
            result.removable.extend(found)
    return result


def remove_path(each: RemovablePath) -> None:
    """Remove a file, a link or a directory if it is unchanged since it was checked; a missing one is ignored.

    Raises:
        OSError: It cannot be removed, or it or one of its parents was replaced.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(each.root, flags)
    try:
        for part in each.path.relative_to(each.root).parts[:-1]:
            outer, folder = folder, os.open(part, flags, dir_fd=folder)
            os.close(outer)
        now = os.stat(each.path.name, dir_fd=folder, follow_symlinks=False)
        if not os.path.samestat(now, each.status) or stat.S_IFMT(now.st_mode) != stat.S_IFMT(each.status.st_mode):
            raise OSError(errno.ESTALE, "it was replaced meanwhile", str(each.path))
        if stat.S_ISDIR(now.st_mode):
            shutil.rmtree(each.path.name, dir_fd=folder)  # rmtree follows no symbolic links either
        else:
            os.unlink(each.path.name, dir_fd=folder)
    except FileNotFoundError:
        return
    finally:
        os.close(folder)


def _link_chain(path: Path) -> list[Path]:
    """Follow the path through all symbolic links; each result has no links in its parents."""
    found: list[Path] = []
    while (real := _resolve_parent(path)) not in found:
        found.append(real)
        if not real.is_symlink():
            break
        path = real.parent / real.readlink()
    return found


def _resolve_parent(path: Path) -> Path:
    if path.name in {"", ".."}:
        return path.resolve()
    return path.parent.resolve() / path.name


def _is_journal(folder: Path) -> bool:
    """Whether the folder looks like a journal or a part of one."""
    try:
        names = [each.name for each in folder.iterdir()]
    except OSError:
        return False
    parts = {layout.CURSORS, layout.COURIERS} & set(names) or any(name.endswith(".seg") for name in names)
    return bool(parts) or layout.is_journal(OsDisk(), str(folder))


def _foreign_inside(path: Path) -> Iterator[Path]:
    """Yield what does not belong in a checkpoint directory: a run's record, a journal, another file system."""
    if path.is_symlink() or not path.is_dir():
        return
    device = path.lstat().st_dev
    for above, folders, files in os.walk(path):
        here = Path(above)
        if here.lstat().st_dev != device:
            yield here
        if (
            RUN_RECORD in files
            or (SPOOL_FOLDER in folders and any((here / SPOOL_FOLDER).glob("*/*@*")))
            or _is_journal(here)
        ):
            yield here
