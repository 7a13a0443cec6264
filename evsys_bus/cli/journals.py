"""Finding the journal of a command line: its directory, the folder of a run or experiment, or a name below ./runs."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

RUNS: Final = Path("runs")
JOURNAL: Final = "journal"
_MAX_NAMED: Final = 5


class JournalLocation(NamedTuple):
    """An existing journal."""

    directory: Path
    run: str | None = None
    """The requested run, if the journal belongs to its whole experiment."""


def find_journal(requested: Path | None) -> JournalLocation:
    """Find the requested journal; None means the newest one below ``./runs``.

    Raises:
        click.UsageError: There is none, or several match.
    """
    if requested is None:
        newest = max(_find_below(RUNS), key=_last_write_time, default=None)
        if newest is None:
            raise click.UsageError(f"there is no journal below {RUNS.absolute()}; name a run")
        return JournalLocation(newest)
    for folder in (requested, RUNS / requested):
        journal = _journal_in(folder)
        if journal is not None:
            return journal
    from evsys_bus.cli.records import find_runs

    named = [journal for each in find_runs(RUNS) if each.name == str(requested) and (journal := _journal_in(each))]
    if len(named) == 1:
        return named[0]
    if named:
        raise click.UsageError(f"several runs are called {requested}; name the folder of one")
    what = f"{requested} holds no journal" if requested.exists() else f"there is no run {requested}"
    raise click.UsageError(f"{what}{_suggest(requested)}")


def list_journals_newest_first() -> list[Path]:
    """Return the journals below ``./runs``, most recently written first."""
    return sorted(_find_below(RUNS), key=_last_write_time, reverse=True)


def _journal_in(folder: Path) -> JournalLocation | None:
    if _is_journal(folder):
        return JournalLocation(folder)
    if _is_journal(folder / JOURNAL):
        return JournalLocation(folder / JOURNAL)
    parent = folder.resolve().parent if folder.name in {"", ".."} else folder.parent
    if folder.is_dir() and folder.name != JOURNAL and _is_journal(parent / JOURNAL):
        return JournalLocation(parent / JOURNAL, folder.resolve().name)
    return None


def _is_journal(directory: Path) -> bool:
    from evsys_bus.journal import OsDisk, layout

    return layout.is_journal(OsDisk(), str(directory))


def _find_below(root: Path) -> Iterator[Path]:
    for pattern in (JOURNAL, f"*/{JOURNAL}", f"*/*/{JOURNAL}"):
        yield from filter(_is_journal, root.glob(pattern))


def _last_write_time(directory: Path) -> float:
    """Return the time of the last append."""
    return max((each.stat().st_mtime for each in directory.glob("*/*.seg")), default=directory.stat().st_mtime)


def _suggest(requested: Path) -> str:
    from evsys_bus.cli.records import find_runs

    known = {str(each.parent) for each in _find_below(RUNS)} | {str(each) for each in find_runs(RUNS)}
    near = difflib.get_close_matches(str(requested), [*known, *(Path(each).name for each in known)], n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(sorted(known)[:_MAX_NAMED])}" if known else ""
