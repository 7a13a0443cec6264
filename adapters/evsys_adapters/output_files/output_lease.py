"""`OutputCandidates`, `OutputLease`: which adapter and run own an output file or folder, now and in later processes.

A hidden owner file records it: ``.<name>.run`` beside a file, ``.run`` in a folder. It holds the run's path relative to
it, a zero byte, the adapter's name and a line end. (0.1.0 wrote only the run, for TensorBoard as an absolute path.)
While the output is written, the owner file is locked.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import ClassVar, Literal

from evsys_adapters.common.hook_arguments import names_other_run, run_id
from evsys_bus.callback import Callback, callback_name
from evsys_bus.diagnostics import log
from evsys_bus.disk import current_disk
from evsys_bus.files import DamagedFileError, FileLock, read_file
from evsys_bus.savepoints import Mark, Savepoints

Refusal = Literal["second_run", "in_use", "second_follower"]
"""Why an output cannot be used: it belongs to another run; another process or adapter is writing it now; or it
belongs to another adapter that is still subscribed."""


class OutputLease:
    """Exclusive use of one output while the object lives, against other processes and other adapters of this one.

    Args:
        adapter_name: The adapter's name.
        lock: Lock of the owner file; None if the output is not exclusive.
    """

    _leases: ClassVar["weakref.WeakValueDictionary[tuple[int, str], OutputLease]"] = weakref.WeakValueDictionary()
    _registry_lock: ClassVar = threading.Lock()

    def __init__(self, adapter_name: str = "", lock: FileLock | None = None) -> None:
        self.adapter_name = adapter_name
        self._lock = lock

    @property
    def is_held(self) -> bool:
        """Whether this process holds the lease; False in a child forked from the process that acquired it."""
        return self._lock is None or self._lock.is_held

    @classmethod
    def acquire(
        cls, owner_file: Path, run: str, adapter_name: str, is_subscribed: Callable[[str], bool] | None = None
    ) -> "OutputLease | Refusal":
        """Acquire the output for an adapter, and record the adapter as its owner.

        Args:
            owner_file: The owner file beside or in the output; its folder is created if needed.
            run: The result of `owner_of`.
            adapter_name: The adapter's name.
            is_subscribed: Whether the adapter with this name is still subscribed; None skips the check.

        Raises:
            OSError: The disk refuses it.
        """
        refusal = _refusal_reason(owner_file, run, adapter_name, is_subscribed)
        if refusal is not None:
            return refusal
        with cls._registry_lock:
            key = (id(current_disk()), os.path.realpath(owner_file))
            current = cls._leases.get(key)
            if current is not None and current.is_held:
                return current if current.adapter_name == adapter_name else "in_use"
            lock = FileLock.acquire(owner_file)
            refusal = _refusal_reason(
                owner_file, run, adapter_name, is_subscribed
            )  # it may have changed since the first check
            if refusal is not None:
                return refusal
            if lock is None:
                return "in_use"
            if writer_of(owner_file, run) != adapter_name:
                lock.write(_relative_run_bytes(owner_file, run) + b"\0" + os.fsencode(adapter_name) + b"\n")
            lease = cls._leases[key] = cls(adapter_name, lock)
        return lease


class OutputCandidates:
    """The candidate paths for one run's output of one callback.

    Does not keep the callback alive; the lease ends with it.

    Args:
        callback: The writer.
        run: The result of `owner_of`.
        paths: The file or folder, then alternatives in case it belongs to another run.
        savepoints: The callback's savepoints; files that they name were its own.
        fix: How users give each run an output of its own.
        is_folder: Whether the output is a folder.
    """

    def __init__(
        self,
        callback: Callback,
        run: str,
        paths: Sequence[Path],
        savepoints: Savepoints,
        fix: str,
        *,
        is_folder: bool = False,
    ) -> None:
        self.first = paths[0]
        self._callback = weakref.ref(callback)
        self._kind = callback.name or type(callback).__name__
        self._adapter_name = callback_name(callback)
        self._run = run
        self._paths = paths
        self._savepoints = savepoints
        self._fix = fix
        self._is_folder = is_folder

    def acquire(self) -> tuple[Path, OutputLease]:
        """Acquire the path that this adapter used before, else the first one without an active owner.

        Raises:
            OSError: The disk refuses it.
        """
        previous = self._previous_path()
        refusal: Refusal | None = None
        for path in self._paths:
            for each in chain([] if previous is None else [previous], [path], self._numbered(path)):
                lease = OutputLease.acquire(self._owner_file(each), self._run, self._adapter_name, self._is_subscribed)
                if isinstance(lease, OutputLease):
                    if refusal is not None:
                        self._warn(refusal, each)
                    return each, lease
                refusal = refusal or lease
                if lease == "second_run" and each is path and path is not self._paths[-1]:
                    break  # the next candidate has a distinct name for this run
        raise AssertionError("there is always another number")

    def acquire_if_followed(self) -> tuple[Path, OutputLease]:
        """Acquire a path if a courier delivers to the callback; otherwise return the first path without a lock.

        Raises:
            OSError: The disk refuses it.
        """
        if has_courier(self._callback()):
            return self.acquire()
        return self.first, OutputLease()

    def _is_subscribed(self, name: str) -> bool:
        """Whether an adapter of this name is subscribed to the same journal."""
        callback = self._callback()
        attached = () if callback is None else callback.evsys_attached
        checks = (getattr(each, "has_subscription", None) for each in attached)
        return any(callable(check) and check(name) for check in checks)

    def _previous_path(self) -> Path | None:
        """Find the path that this adapter used before, by its owner file or else by the mark."""
        existing: list[Path] = []
        for path in self._paths:
            for each in chain([path], self._numbered(path)):
                writer = writer_of(self._owner_file(each), self._run)
                if writer == self._adapter_name:
                    return each
                if writer is None and each is not path:
                    break
                existing.append(each)
        marked_files = [Path(os.path.realpath(file)) for file in self._savepoints.files]
        for each in existing:
            output = Path(os.path.realpath(each))
            if any(output in file.parents if self._is_folder else output == file for file in marked_files):
                return each
        return None

    def _owner_file(self, path: Path) -> Path:
        return path / ".run" if self._is_folder else path.with_name(f".{path.name}.run")

    def _numbered(self, path: Path) -> Iterator[Path]:
        stem, suffix = (path.name, "") if self._is_folder else (path.stem, path.suffix)
        return (path.with_name(f"{stem}-{number}{suffix}") for number in count(2))

    def _warn(self, refusal: Refusal, path: Path) -> None:
        fix = self._fix
        if refusal != "second_run":
            fix = "let only one process and one adapter write the files of a run, or give each its own output"
        names = {"taken": str(self.first), "file": str(path)}
        log().warning(f"{self._kind}.{refusal}", run=self._run, **names, fix=fix)


def has_courier(callback: Callback | None) -> bool:
    """Whether a courier delivers to the callback, so that events may be delivered twice."""
    return callback is not None and any(getattr(each, "has_courier", False) for each in callback.evsys_attached)


def without_foreign_files(mark: Mark, callback: Callback) -> dict[str, int]:
    """Return the files of the mark without those that another adapter has continued since."""
    adapter_name = callback_name(callback)
    return {file: size for file, size in mark.files.items() if _adapter_at(Path(file)) in {"", adapter_name}}


def owner_of(handle: object) -> str:
    """Return the run's folder with symbolic links resolved."""
    return os.path.realpath(run_id(handle).replace("\0", "\\0"))  # a key may contain a zero byte, which no path may


def writer_of(owner_file: Path, run: str) -> str | None:
    """Return the adapter that owns the output; empty if only the run is recorded, None if it is not the run's."""
    content = _read_owner_file(owner_file)
    owner, _, adapter_name = content.removesuffix(b"\n").partition(b"\0")
    if owner not in _owner_names(owner_file, run):
        return None
    return os.fsdecode(adapter_name) if content.endswith(b"\n") else ""


def _adapter_at(file: Path) -> str:
    """Return the adapter named by the owner file of a file or of its folders; empty if there is none."""
    for owner_file in (file.with_name(f".{file.name}.run"), file.parent / ".run", file.parent.parent / ".run"):
        content = _read_owner_file(owner_file)
        adapter_name = content.removesuffix(b"\n").partition(b"\0")[2]
        if content.endswith(b"\n") and adapter_name:
            return os.fsdecode(adapter_name)
    return ""


def is_of_run(folder: Path, run: str) -> bool:
    """Whether the folder belongs to this run; a folder without owner is assigned to it."""
    owner_file = folder / ".run"
    if not _is_of_other_run(owner_file, run) and writer_of(owner_file, run) is None:
        try:
            lock = FileLock.acquire(owner_file)
            if lock is not None and writer_of(owner_file, run) is None and not _is_of_other_run(owner_file, run):
                lock.write(_relative_run_bytes(owner_file, run) + b"\n")
        except OSError:  # a disk that refuses this refuses rows as well, which are buffered
            pass
    return not _is_of_other_run(owner_file, run)


def relative_run_path(output: Path, run: str) -> str:
    """Return the run's path relative to the folder of the output: unchanged after both were moved together."""
    return os.path.relpath(run, os.path.realpath(output.parent))


def _relative_run_bytes(output: Path, run: str) -> bytes:
    return relative_run_path(output, run).encode(errors="surrogateescape")


def _owner_names(owner_file: Path, run: str) -> tuple[bytes, bytes]:
    """Return the names of the run in an owner file; the second form is the one that 0.1.0 wrote for TensorBoard."""
    return _relative_run_bytes(owner_file, run), run.encode(errors="surrogateescape")


def _is_of_other_run(owner_file: Path, run: str) -> bool:
    """Whether the output belongs to another run; a damaged owner file names no run."""
    content = _read_owner_file(owner_file)
    return all(names_other_run(content, name, owner_file.parent) for name in _owner_names(owner_file, run))


def _refusal_reason(
    owner_file: Path, run: str, adapter_name: str, is_subscribed: Callable[[str], bool] | None
) -> Refusal | None:
    """Return why the adapter must not write the output, apart from current locks."""
    if _is_of_other_run(owner_file, run):
        return "second_run"
    writer = writer_of(owner_file, run)
    if writer and writer != adapter_name and is_subscribed is not None and is_subscribed(writer):
        return "second_follower"
    return None


def _read_owner_file(owner_file: Path) -> bytes:
    """Return the content of the owner file; empty if it is missing or not a regular file."""
    try:
        return read_file(owner_file)
    except (FileNotFoundError, NotADirectoryError, DamagedFileError):
        return b""
