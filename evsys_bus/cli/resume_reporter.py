"""Reports of the checkpoints that ``run --resume`` fetches or misses, as text, plain lines or JSON."""

import time
from collections.abc import Sequence
from typing import Final

from evsys_adapters.checkpoints.manifest import Manifest, checkpoint_folder
from evsys_bus.cli.fetched_checkpoints import describe_contents, total_bytes
from evsys_bus.cli.output.formatting import pluralize
from evsys_bus.cli.output.progress import Facts, ProgressMode, format_json, format_plain
from evsys_bus.cli.output.screen import Screen, printable

_MAX_NAMED: Final = 4


class ResumeReporter:
    """Reports on stderr, even with ``--progress off``: the starting point of a run is not progress."""

    def __init__(self, mode: ProgressMode, screen: Screen) -> None:
        self._format_line = {"json": format_json, "plain": format_plain}.get(mode)
        self._screen = screen

    def report_fetched(self, run: str, url: str, manifest: Manifest) -> None:
        """Report that the run continues from this checkpoint."""
        row, name = manifest.row, checkpoint_folder(manifest.row)
        contents = describe_contents(manifest)
        text = f"{run} goes on after step {row.batch:,}, from {name}: {contents}, fetched from {url}, verified"
        facts = {"run": run, "checkpoint": name, "batch": row.batch, "files": len(manifest.files)}
        self._report(text, "fetched", facts | {"bytes": total_bytes(manifest), "url": url})

    def report_from_start(self, runs: Sequence[str], urls: Sequence[str]) -> None:
        """Report that these runs start from scratch, because there is no checkpoint to continue from."""
        begin, their = ("begins", "its") if len(runs) == 1 else ("begin", "their")
        where = " or ".join(urls)
        text = (
            f"{join_names(runs)} {begin} from the start: no checkpoint with {their} full state is here, or at {where}"
        )
        self._report(text, "from_the_start", {"runs": ",".join(runs), "url": where})

    def _report(self, text: str, event: str, facts: Facts) -> None:
        if self._format_line is None:
            self._screen.note(printable(text))
        else:
            self._screen.note(self._format_line({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": event} | facts))


def join_names(runs: Sequence[str]) -> str:
    """Return ``low-s0, low-s1``, or the number of runs if there are many."""
    return ", ".join(runs) if len(runs) <= _MAX_NAMED else pluralize(len(runs), "run")
