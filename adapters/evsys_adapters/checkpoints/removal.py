"""Removing a trainer's checkpoint from this machine, and nothing besides."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from evsys_adapters.checkpoints.manifest import is_elsewhere
from evsys_adapters.checkpoints.spool import local_path
from evsys_bus.context import ManifestRow


def places(row: ManifestRow) -> list[Path]:
    """The files and directories of a checkpoint that are on this machine's disks, or were."""
    named = dict.fromkeys(path for path in (row.state_path, row.sampler_path) if path and not is_elsewhere(path))
    return [local_path(path).absolute() for path in named]


def is_whole(row: ManifestRow) -> bool:
    """Whether it names something here, and all that it names is here."""
    named = places(row)
    return bool(named) and all(place.exists() for place in named)


def removable(row: ManifestRow, others: Iterable[ManifestRow], run_dir: Path) -> list[Path]:
    """What of a checkpoint can be removed: not what another one uses, and nothing that the run's folder lies in."""
    used = [place.resolve() for other in others for place in places(other)] + [run_dir.resolve(), Path.cwd()]
    found: list[Path] = []
    for place in places(row):
        real = place.parent.resolve() / place.name  # a link is removed, and what it leads to stays
        if os.path.lexists(place) and not any(
            each.is_relative_to(at) for each in used for at in {real, place.resolve()}
        ):
            found.append(place)
    return found


def remove(place: Path) -> None:
    """Remove a file, a link or a directory; one that is gone is fine.

    Raises:
        OSError: It cannot be removed.
    """
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
