"""Finding the journal of a command line: its directory, the folder of a run or experiment, or a name below ./runs."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

RUNS: Final = Path("runs")
JOURNAL: Final = "journal"
_MOST_NAMED: Final = 5


class Found(NamedTuple):
    """An existing journal."""

    directory: Path
    run: str | None = None
    """The requested run, if the journal belongs to its whole experiment."""


def found(asked: Path | None) -> Found:
    """Find the requested journal; None means the newest one below ``./runs``.

    Raises:
        click.UsageError: There is none, or several match.
    """
    if asked is None:
        newest = max(_below(RUNS), key=_written, default=None)
        if newest is None:
            raise click.UsageError(f"there is no journal below {RUNS.absolute()}; name a run")
        return Found(newest)
    for folder in (asked, RUNS / asked):
        journal = _journal_of(folder)
        if journal is not None:
            return journal
    from evsys_bus.cli.records import found_runs

    named = [journal for each in found_runs(RUNS) if each.name == str(asked) and (journal := _journal_of(each))]
    if len(named) == 1:
        return named[0]
    if named:
        raise click.UsageError(f"several runs are called {asked}; name the folder of one")
    what = f"{asked} holds no journal" if asked.exists() else f"there is no run {asked}"
    raise click.UsageError(f"{what}{_others(asked)}")


def newest_first() -> list[Path]:
    """Return the journals below ``./runs``, most recently written first."""
    return sorted(_below(RUNS), key=_written, reverse=True)


def _journal_of(folder: Path) -> Found | None:
    if _is_journal(folder):
        return Found(folder)
    if _is_journal(folder / JOURNAL):
        return Found(folder / JOURNAL)
    parent = folder.resolve().parent if folder.name in {"", ".."} else folder.parent
    if folder.is_dir() and folder.name != JOURNAL and _is_journal(parent / JOURNAL):
        return Found(parent / JOURNAL, folder.resolve().name)
    return None


def _is_journal(directory: Path) -> bool:
    from evsys_bus.journal import OsDisk, layout

    return layout.is_journal(OsDisk(), str(directory))


def _below(root: Path) -> Iterator[Path]:
    for pattern in (JOURNAL, f"*/{JOURNAL}", f"*/*/{JOURNAL}"):
        yield from filter(_is_journal, root.glob(pattern))


def _written(directory: Path) -> float:
    """Return the time of the last append."""
    return max((each.stat().st_mtime for each in directory.glob("*/*.seg")), default=directory.stat().st_mtime)


def _others(asked: Path) -> str:
    from evsys_bus.cli.records import found_runs

    known = {str(each.parent) for each in _below(RUNS)} | {str(each) for each in found_runs(RUNS)}
    near = difflib.get_close_matches(str(asked), [*known, *(Path(each).name for each in known)], n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(sorted(known)[:_MOST_NAMED])}" if known else ""
