"""The files of a checkpoint where the trainer saved them: which are uploaded, under which names, and which are not.

A checkpoint's folder may hold anything: sockets, links to nothing, files that may not be read. None of these is
uploaded, and none keeps the other files from it. A model may also be saved into the run's own folder, where files of
evsys-bus are left out: its journal, spools, and outputs of adapters, which change all the time.
"""

import os
import stat
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

from evsys_adapters.checkpoints.manifest import MAX_FOLDERS
from evsys_adapters.common.hook_arguments import safe_name
from evsys_bus.disk import OsDisk
from evsys_bus.journal import layout
from evsys_bus.location import short_digest

SPOOL_FOLDER: Final = "spool"
RUN_RECORD: Final = "checkpoints.jsonl"
RUN_FILES: Final = (RUN_RECORD, SPOOL_FOLDER, "metrics.jsonl", "metrics.csv", "result.json", "fetched")
"""A run's folder contains at least one of these."""
OWN_NAMES: Final = frozenset({*RUN_FILES, "journal", "error.txt", "experiment.json"})
"""Names that we create in a run's or an experiment's folder."""
_OWNER_FILE: Final = ".run"
_MAX_OWNER_BYTES: Final = 4096


class UnusableSourceError(OSError):
    """The path of a checkpoint exists, but cannot be read."""


class SourceFile(NamedTuple):
    """A file to upload."""

    path: str
    """Resolved path, without symbolic links."""
    status: os.stat_result


_MAX_NESTED_LINKS: Final = 3
"""Directories that are linked to each other have a number of paths that grows without bound."""


class _Entry(NamedTuple):
    path: str
    """Resolved if it is a link."""
    name: str
    """Below the checkpoint's folder."""
    is_link: bool
    links: int
    """Followed links on the way."""
    ancestors: tuple[tuple[int, int], ...]


def local_path(path: str) -> Path:
    """Return the local path of a path, in which ``~`` is the home directory, or of a ``file://`` URI."""
    if path.startswith("file://"):
        return Path(unquote(urlsplit(path).path))
    return Path(os.path.expanduser(path))  # noqa: PTH111 # pathlib raises for a folder called ~name


def files_of(root: Path, run_dir: Path) -> Iterator[tuple[str, SourceFile | str]]:
    """Yield the files below a directory with their relative names; for a file, itself with an empty name.

    Instead of a file that cannot be uploaded, the reason is yielded.

    Args:
        root: The file or the directory.
        run_dir: The run's folder.

    Raises:
        FileNotFoundError: It does not exist, or a file vanished since its directory was listed.
        UnusableSourceError: It is neither a file nor a directory, or may not be read.
    """
    try:
        status = os.stat(root)  # noqa: PTH116 # strings from here on: for many files, a Path costs more than its link
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableSourceError(error.errno, error.strerror, str(root)) from error
    if not stat.S_ISDIR(status.st_mode):
        found = _file_or_reason(os.path.realpath(root), status)
        if isinstance(found, str):
            raise UnusableSourceError(0, found, str(root))
        yield "", found
        return
    for name, found in _files_below(os.fspath(root), run_dir):
        if not name:
            raise UnusableSourceError(0, str(found), str(root))
        yield name, found


def safe_file_name(name: str) -> str:
    """Return a file's name as one component of a key; hidden files keep their name."""
    bare = name.removeprefix(".")
    return name if safe_name(bare) == bare else f"{safe_name(name)}-{short_digest(name)}"


def _is_journal(folder: str, names: AbstractSet[str]) -> bool:
    """Whether a folder with these names in it is a journal."""
    return not names.isdisjoint({layout.JOURNAL_FILE, layout.CURSORS, layout.COURIERS}) and layout.is_journal(
        OsDisk(), folder
    )


def _files_below(folder: str, run_dir: Path) -> Iterator[tuple[str, SourceFile | str]]:
    """Walk a directory in the order of the names; not recursively, since it may be nested deeply."""
    run_folder, root = os.path.realpath(run_dir), Path(os.path.realpath(folder))
    pending = [_Entry(folder, "", is_link=False, links=0, ancestors=())]
    while pending:
        path, name, is_link, links, ancestors = entry = pending.pop()
        try:
            status = os.stat(path)  # noqa: PTH116 # as above
            if not stat.S_ISDIR(status.st_mode):
                yield name, _file_or_reason(path, status)
            elif (status.st_dev, status.st_ino) in ancestors:  # a link leads back up
                continue
            elif len(ancestors) >= MAX_FOLDERS - 5:  # some are above the checkpoint's folder
                yield name, f"it is within {len(ancestors)} folders"
            elif is_link and (links > _MAX_NESTED_LINKS or root.is_relative_to(path)):
                yield name, f"it leads to {path}, around the checkpoint or through too many links"
            else:
                pending += reversed(_listed(entry, status, run_folder))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not is_link:
                raise
            yield name, f"it leads to {path}: {error.strerror}" if is_link else str(error.strerror)


def _listed(folder: _Entry, status: os.stat_result, run_folder: str) -> list[_Entry]:
    """List a directory without files of evsys-bus."""
    with os.scandir(folder.path) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    if _is_journal(folder.path, names) or (_OWNER_FILE in names and _is_owner_file(f"{folder.path}/{_OWNER_FILE}")):
        return []
    ancestors = (*folder.ancestors, (status.st_dev, status.st_ino))
    prefix = f"{folder.name}/" if folder.name else ""
    is_run = RUN_RECORD in names or os.path.realpath(folder.path) == run_folder
    owners = {name for name in names if name.startswith(".") and name.endswith(_OWNER_FILE)}
    result: list[_Entry] = []
    for entry in entries:
        owner = f".{entry.name}{_OWNER_FILE}"
        if (
            (is_run and entry.name in OWN_NAMES)
            or (entry.name in owners and _is_owner_file(entry.path))
            or (owner in owners and _is_owner_file(f"{folder.path}/{owner}"))
            or (entry.name == SPOOL_FOLDER and any(Path(entry.path).glob("*/*@*")))
        ):
            continue
        is_link = entry.is_symlink()
        path = os.path.realpath(entry.path) if is_link else entry.path  # os.link would link the link
        result.append(_Entry(path, f"{prefix}{safe_file_name(entry.name)}", is_link, folder.links + is_link, ancestors))
    return result


def _file_or_reason(path: str, status: os.stat_result) -> SourceFile | str:
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    return SourceFile(path, status) if os.access(path, os.R_OK) else "it may not be read"


def _is_owner_file(path: str) -> bool:
    """Whether this is the file in which an adapter records that an output is its own."""
    with suppress(OSError):
        status = os.stat(path, follow_symlinks=False)  # noqa: PTH116 # as above
        if stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_OWNER_BYTES:
            content = Path(path).read_bytes()
            return b"\0" in content and content.endswith(b"\n")
    return False
