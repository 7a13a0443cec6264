"""Reports of the checkpoints that ``run --resume`` fetches or misses, as text, plain lines or JSON."""

import time
from collections.abc import Sequence
from typing import Final

from evsys_adapters.checkpoints.manifest import Manifest, checkpoint_folder
from evsys_bus.cli.fetching import contents, total_bytes
from evsys_bus.cli.progress import ProgressMode
from evsys_bus.cli.progress.lines import Facts, as_json, plain
from evsys_bus.cli.screen import Screen, printable
from evsys_bus.cli.tables import counted

_MOST_NAMED: Final = 4


class ResumeNotes:
    """Reports on stderr, even with ``--progress off``: the starting point of a run is not progress."""

    def __init__(self, mode: ProgressMode, screen: Screen) -> None:
        self._form = {"json": as_json, "plain": plain}.get(mode)
        self._screen = screen

    def fetched(self, run: str, url: str, manifest: Manifest) -> None:
        """Report that the run continues from this checkpoint."""
        row, name = manifest.row, checkpoint_folder(manifest.row)
        words = (
            f"{run} goes on after step {row.batch:,}, from {name}: {contents(manifest)}, fetched from {url}, verified"
        )
        facts = {"run": run, "checkpoint": name, "batch": row.batch, "files": len(manifest.files)}
        self._tell(words, "fetched", facts | {"bytes": total_bytes(manifest), "url": url})

    def from_the_start(self, runs: Sequence[str], urls: Sequence[str]) -> None:
        """Report that these runs start from scratch, because there is no checkpoint to continue from."""
        begin, their = ("begins", "its") if len(runs) == 1 else ("begin", "their")
        where = " or ".join(urls)
        words = f"{names_of(runs)} {begin} from the start: no checkpoint with {their} full state is here, or at {where}"
        self._tell(words, "from_the_start", {"runs": ",".join(runs), "url": where})

    def _tell(self, words: str, event: str, facts: Facts) -> None:
        if self._form is None:
            self._screen.note(printable(words))
        else:
            self._screen.note(self._form({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": event} | facts))


def names_of(runs: Sequence[str]) -> str:
    """Return ``low-s0, low-s1``, or the number of runs if there are many."""
    return ", ".join(runs) if len(runs) <= _MOST_NAMED else counted(len(runs), "run")
