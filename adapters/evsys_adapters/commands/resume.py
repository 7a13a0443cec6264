"""Fetching checkpoints before ``run --resume`` that ``checkpoint_upload`` has uploaded.

A run continues from the checkpoint of the latest step; if a local and a remote one have the same step, from the local
one. Fetched checkpoints are added to the run's record, where the loop finds them. Nothing is written to a destination.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Final, NamedTuple

import anyio

from evsys_adapters.checkpoints.copying import remove_partials
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.manifest import FETCHED, Manifest, checkpoint_folder, is_remote_uri
from evsys_adapters.checkpoints.restore import fetch_checkpoint, newest_state
from evsys_adapters.checkpoints.spool import local_path
from evsys_adapters.checkpoints.store import StoreError, retrying
from evsys_adapters.checkpoints.store_urls import StoreOptions, url_for
from evsys_adapters.commands.checkpoints import open_store
from evsys_adapters.commands.fetch import describe_contents, record_checkpoint, total_bytes
from evsys_bus.cli.output.errors import show_warnings
from evsys_bus.cli.output.formatting import pluralize
from evsys_bus.cli.output.progress import Facts, OnTransfer, ProgressMode, format_json, format_plain, show_fetches
from evsys_bus.cli.output.screen import Screen, printable
from evsys_bus.cli.output.transfers import line_facts, make_byte_counter
from evsys_bus.cli.records import load_previous_experiment, read_checkpoints
from evsys_bus.context import LogContext, ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError
from evsys_bus.run_files import lock_folder
from evsys_bus.training.plan import RunPlan

ATTEMPTS: Final = 3
"""Attempts to query a destination: a short outage should not end a job that a scheduler has restarted."""

_ShowFetches = Callable[[], AbstractContextManager[OnTransfer]]
_MAX_NAMED: Final = 4


class _Source(NamedTuple):
    """A destination of uploads."""

    url: str
    options: StoreOptions


class _UnfinishedRun(NamedTuple):
    plan: RunPlan
    local: ManifestRow | None
    """The newest checkpoint whose full state is local."""
    has_started: bool
    """Whether the run has started, by the local record."""

    @property
    def key(self) -> str:
        return self.plan.run_key


class _RemoteCheckpoint(NamedTuple):
    """The newest uploaded checkpoint of a run."""

    url: str
    destination: Destination
    manifest: Manifest


class ResumeReporter:
    """Reports on stderr, even with ``--progress off``: the starting point of a run is not progress."""

    def __init__(self, mode: ProgressMode, screen: Screen) -> None:
        self._format_line = {"json": format_json, "plain": format_plain}.get(mode)
        self._screen = screen

    def report_fetched(self, run: str, url: str, manifest: Manifest) -> None:
        """Report that the run continues from this checkpoint."""
        row, name = manifest.row, checkpoint_folder(manifest.row)
        contents = describe_contents(manifest)
        text = f"{run} continues after step {row.batch:,}, from {name}: {contents}, fetched from {url}, verified"
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
            self._screen.note(self._format_line(line_facts(event) | facts), wrapped=False)


def fetch_newest(
    uploads: Sequence[tuple[str, StoreOptions]],
    folder: Path,
    runs: Sequence[RunPlan],
    mode: ProgressMode,
    screen: Screen,
) -> None:
    """Fetch the newest checkpoint of each run that was uploaded and is not local.

    Args:
        uploads: URL, with or without placeholders, and options of each destination of uploads.
        folder: The experiment's directory.
        runs: Its runs.
        mode: How progress is shown.
        screen: The terminal.

    Raises:
        DeliveryError: A destination cannot be reached, and a started run has no local checkpoint; or the remote one is
            damaged. Fetched files stay, and are not fetched again.
        TrainingError: Another process trains in the experiment's directory.
        OSError: The local disk failed.
    """
    sources = [_Source(url_for(url, LogContext(folder)), options) for url, options in uploads]
    previous = load_previous_experiment(folder)
    entries = {} if previous is None else previous.runs
    unfinished: list[_UnfinishedRun] = []
    for run in runs:
        entry = entries.get(run.run_key)
        if entry is None or entry.status != "completed":
            unfinished.append(
                _UnfinishedRun(run, _newest_local(run.run_dir), entry is None or entry.status != "pending")
            )
    if not sources or not unfinished:
        return
    with (
        lock_folder(folder.absolute(), "the experiment's directory"),
        show_warnings(screen, as_json=mode == "json"),
    ):
        anyio.run(_fetch_missing, sources, unfinished, lambda: show_fetches(mode, screen), ResumeReporter(mode, screen))


def _newest_local(run_dir: Path) -> ManifestRow | None:
    """Return the checkpoint that the training loop would choose among those with a loadable state."""
    loadable = [
        row
        for row in read_checkpoints(run_dir)
        if row.state_path is not None and (is_remote_uri(row.state_path) or local_path(row.state_path).exists())
    ]
    return max(reversed(loadable), key=lambda row: row.batch, default=None)


async def _fetch_missing(
    sources: Sequence[_Source], runs: Sequence[_UnfinishedRun], start_display: _ShowFetches, reporter: ResumeReporter
) -> None:
    async with AsyncExitStack() as stores:
        newest, unreachable = await _find_newest_remote(sources, runs, stores)
        without_checkpoint = [
            run.key for run in runs if run.has_started and run.local is None and run.key not in newest
        ]
        for url, error in unreachable.items():
            if without_checkpoint:
                raise _unreachable_error(url, without_checkpoint, error) from error
            log().warning("resume.not_asked", url=url, error=_describe_error(error), then="local checkpoints are used")
        for run in runs:
            remote = newest.get(run.key)
            if remote is not None and (run.local is None or run.local.batch < remote.manifest.row.batch):
                with start_display() as on_transfer:
                    await _fetch_checkpoint(run, remote, on_transfer)
                reporter.report_fetched(run.key, remote.url, remote.manifest)
    if without_checkpoint:
        reporter.report_from_start(without_checkpoint, [source.url for source in sources])


async def _find_newest_remote(
    sources: Sequence[_Source], runs: Sequence[_UnfinishedRun], stores: AsyncExitStack
) -> tuple[dict[str, _RemoteCheckpoint], dict[str, DeliveryError | OSError]]:
    """Return the newest uploaded checkpoint by run, and the errors of unreachable destinations by URL."""
    newest: dict[str, _RemoteCheckpoint] = {}
    unreachable: dict[str, DeliveryError | OSError] = {}
    policy = retrying(attempts=ATTEMPTS, first_pause_seconds=0.5, max_pause_seconds=5.0, max_requested_seconds=60.0)
    for source in sources:
        try:
            destination_of = await stores.enter_async_context(open_store(source.url, source.options))
            for run in runs:
                manifest: Manifest | None = await policy(newest_state, destination_of(run.key))
                known = newest.get(run.key)
                if manifest is not None and (known is None or known.manifest.row.batch < manifest.row.batch):
                    newest[run.key] = _RemoteCheckpoint(source.url, destination_of(run.key), manifest)
        except (DeliveryError, OSError) as error:
            unreachable[source.url] = error
    return newest, unreachable


async def _fetch_checkpoint(run: _UnfinishedRun, remote: _RemoteCheckpoint, on_transfer: OnTransfer) -> None:
    folder = run.plan.run_dir.absolute()
    checkpoint = checkpoint_folder(remote.manifest.row)
    for other in (folder / FETCHED).glob("*"):
        if other.name != checkpoint:  # a partial download of another checkpoint is not continued, and takes space
            await anyio.to_thread.run_sync(remove_partials, other)
    on_bytes = make_byte_counter(run.key, checkpoint, on_transfer)
    try:
        row = await fetch_checkpoint(remote.destination, remote.manifest, folder / FETCHED, on_bytes)
    except (RetryLaterError, ParkedError) as error:
        error.fix = "run the same command again once it can be reached: files that are here are not fetched again"
        raise
    await anyio.to_thread.run_sync(lambda: record_checkpoint(folder, row, replace_later=True))


def _unreachable_error(url: str, runs: Sequence[str], error: DeliveryError | OSError) -> DeliveryError:
    if isinstance(error, StoreError):
        return error
    what = f"{url} cannot be asked for a checkpoint of {join_names(runs)}, and there is no local one"
    unreachable = RetryLaterError(what) if isinstance(error, RetryLaterError) else ParkedError(what)
    advice = f"{error.fix}; then" if isinstance(error, ParkedError) else "once it can be reached,"
    unreachable.why = _describe_error(error)
    unreachable.fix = f"{advice} run the same command again. To start over: without --resume, in another --output-dir"
    return unreachable


def _describe_error(error: DeliveryError | OSError) -> str:
    if isinstance(error, DeliveryError):
        return error.what
    return f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"


def join_names(runs: Sequence[str]) -> str:
    """Return ``low-s0, low-s1``, or the number of runs if there are many."""
    return ", ".join(runs) if len(runs) <= _MAX_NAMED else pluralize(len(runs), "run")
