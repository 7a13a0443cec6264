"""Reading runs from their journals, while they run or later: `read` one, `read_runs` of a folder.

Everything comes from the journal, whichever program has written it. Nothing is written, and a damaged journal is read
as far as possible; `RecordedRun.problems` has what is missing. This module finds journals and runs in folders;
`collector` makes runs of events.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from evsys_bus.errors import RunNotFoundError, closest_word
from evsys_bus.journal import OsDisk, layout
from evsys_bus.reading.collector import JOURNAL, JournalCollector, describe_damage
from evsys_bus.reading.recorded_run import (
    MetricSeries,
    MetricSummary,
    Mode,
    RecordedAlert,
    RecordedEpoch,
    RecordedEval,
    RecordedRun,
    RecordedStep,
    State,
    TimeSeries,
    better_mode,
    eval_series,
    flatten_config,
    summarize_series,
)

__all__ = [
    "JOURNAL",
    "JournalLocation",
    "MetricSeries",
    "MetricSummary",
    "Mode",
    "RecordedAlert",
    "RecordedEpoch",
    "RecordedEval",
    "RecordedRun",
    "RecordedStep",
    "State",
    "TimeSeries",
    "better_mode",
    "describe_damage",
    "eval_series",
    "find_journals",
    "flatten_config",
    "is_journal",
    "journal_below",
    "locate_journal",
    "read",
    "read_journal",
    "read_runs",
    "start_time",
    "summarize_series",
]

MAX_DEPTH: Final = 3
"""How many levels below a folder runs are searched."""
_MAX_NAMED: Final = 5
_MAX_SUGGESTED: Final = 100


class JournalLocation(NamedTuple):
    """An existing journal."""

    directory: Path
    run: str | None = None
    """The requested run, if the journal belongs to its whole experiment: its key, or the name of its folder."""


def read(path: str | os.PathLike[str]) -> RecordedRun:
    """Read the run in this folder.

    Args:
        path: The folder of a run, or a journal, or the folder that holds one, with a single run.

    Raises:
        RunNotFoundError: There is no run, or there are several.
    """
    location = locate_journal(Path(path))
    found = [] if location is None else read_journal(location)
    if len(found) == 1:
        return found[0]
    if not found:
        what = f"{path} holds no run" if Path(path).exists() else f"there is no {path}"
        raise RunNotFoundError(what, fix=_suggest_run(Path(path)))
    names = ", ".join(each.id for each in found[:_MAX_NAMED]) + (", ..." if len(found) > _MAX_NAMED else "")
    raise RunNotFoundError(
        f"{path} holds {len(found)} runs: {names}",
        fix=f"name one of them: {Path(path) / found[0].id}   or read all: evsys_bus.read_runs({os.fspath(path)!r})",
    )


def read_runs(path: str | os.PathLike[str]) -> list[RecordedRun]:
    """Read all runs in this folder and up to three levels below it, in the order in which they were started.

    Raises:
        RunNotFoundError: There is no such folder.
    """
    if not Path(path).is_dir():
        raise RunNotFoundError(f"there is no folder {path}", fix=_suggest_run(Path(path)))
    location = locate_journal(Path(path))
    locations = [*find_journals(Path(path))] if location is None or location.run is None else [location]
    return sorted((run for each in locations for run in read_journal(each)), key=start_time)


def start_time(run: RecordedRun) -> float:
    """Return when a run was started, in seconds since the epoch; 0 if that is not known."""
    return 0.0 if run.started is None else run.started.timestamp()


def locate_journal(folder: Path) -> JournalLocation | None:
    """Return the journal that this folder is or holds, or the one of the experiment whose run it holds; else None."""
    if is_journal(folder):
        return JournalLocation(folder)
    own = journal_below(folder)
    if own is not None:
        return JournalLocation(own)
    parent = folder.resolve().parent if folder.name in {"", ".."} else folder.parent
    shared = journal_below(parent) if folder.is_dir() and folder.name != JOURNAL else None
    return None if shared is None else JournalLocation(shared, folder.resolve().name)


def journal_below(folder: Path) -> Path | None:
    """Return the journal of a folder's runs: in it, or on a local disk if the folder's file system cannot hold one."""
    own = folder / JOURNAL
    substitute = Path(layout.local_substitute(str(own.absolute())))
    return next(filter(is_journal, (own, substitute)), None)


def is_journal(directory: Path) -> bool:
    """Return whether a directory is a journal."""
    return layout.is_journal(OsDisk(), str(directory))


def find_journals(folder: Path, depth: int = MAX_DEPTH) -> Iterator[JournalLocation]:
    """Yield the journals in a folder and below it, by name, each once; what is inside a journal is not searched."""
    yield from _find_journals(folder, depth, set())


def _find_journals(folder: Path, depth: int, visited: set[tuple[int, int]]) -> Iterator[JournalLocation]:
    try:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in visited:  # by a symbolic link
            return
        visited.add((status.st_dev, status.st_ino))
        if is_journal(folder):
            yield JournalLocation(folder)
            return
        own = journal_below(folder)
        if own is not None:
            yield JournalLocation(own)
        with os.scandir(folder) as entries:
            names = sorted(each.name for each in entries if each.is_dir() and not each.name.startswith("."))
    except OSError:  # no folder, or one that may not be read
        return
    for name in names if depth else ():
        if name != JOURNAL:
            yield from _find_journals(folder / name, depth - 1, visited)


def _suggest_run(path: Path) -> str:
    known = [each.directory.parent for each in itertools.islice(find_journals(path.absolute().parent), _MAX_SUGGESTED)]
    names = {each.name: str(each) for each in known}
    near = closest_word(path.name, names)
    return "name the folder of a run, or its journal" + ("" if near is None else f"; did you mean {names[near]}?")


def read_journal(location: JournalLocation, *, whole: bool = True) -> list[RecordedRun]:
    """Read the runs of a journal in the order in which they were started, or only the requested one.

    Args:
        location: The journal.
        whole: Whether to read all events. Otherwise a larger journal of a single run is read at its beginning and its
            end only, in a time that does not grow with it.
    """
    collector = JournalCollector(location.directory)
    if whole or not collector.read_ends():
        collector = JournalCollector(location.directory)
        collector.read_whole()
    runs = collector.runs()
    if location.run is None:
        return runs
    named = [each for each in runs if each.id == location.run]
    return named or [each for each in runs if each.folder.name == location.run]
