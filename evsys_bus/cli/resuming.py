"""Fetching checkpoints before ``run --resume`` that ``checkpoint_upload`` has uploaded.

A run continues from the checkpoint of the latest step; if a local and a remote one have the same step, from the local
one. Fetched checkpoints are added to the run's record, where the loop finds them. Nothing is written to a destination.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from pathlib import Path
from typing import Final, NamedTuple

import anyio
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from evsys_adapters.checkpoint_upload import CheckpointUploadCallback
from evsys_adapters.checkpoints.copying import clear
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.manifest import FETCHED, Manifest, checkpoint_folder, is_elsewhere
from evsys_adapters.checkpoints.places import Reach, url_for
from evsys_adapters.checkpoints.restore import fetch, newest_state
from evsys_adapters.checkpoints.spool import local_path
from evsys_adapters.checkpoints.store import StoreError
from evsys_bus.cli.fetch_progress import Tell, fetches_shown
from evsys_bus.cli.fetching import put_on_record
from evsys_bus.cli.planned import Planned, earlier_page
from evsys_bus.cli.progress import ProgressMode
from evsys_bus.cli.progress.transfers import metered
from evsys_bus.cli.records import read_checkpoints
from evsys_bus.cli.resuming_notes import ResumeNotes, names_of
from evsys_bus.cli.screen import Screen
from evsys_bus.cli.store_options import at_store
from evsys_bus.cli.warnings_log import warnings_shown
from evsys_bus.context import LogContext, ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError
from evsys_bus.training.folder_lock import locked
from evsys_bus.training.plan import RunPlan
from evsys_bus.wiring.spec import read_spec

ATTEMPTS: Final = 3
"""Attempts to query a destination: a short outage should not end a job that a scheduler has restarted."""

_Showing = Callable[[], AbstractContextManager[Tell]]


def bring_newest(plan: Planned, mode: ProgressMode, screen: Screen) -> None:
    """Fetch the newest checkpoint of each run that was uploaded and is not local.

    Raises:
        DeliveryError: A destination cannot be reached, and a started run has no local checkpoint; or the remote one is
            damaged. Fetched files stay, and are not fetched again.
        TrainingError: Another process trains in the experiment's directory.
        OSError: The local disk failed.
    """
    sources = _sources(plan)
    runs = _unfinished(plan)
    if not sources or not runs:
        return
    with (
        locked(plan.folder.absolute(), "the experiment's directory"),
        warnings_shown(screen, as_json=mode == "json"),
    ):
        anyio.run(_bring, sources, runs, lambda: fetches_shown(mode, screen), ResumeNotes(mode, screen))


class _Source(NamedTuple):
    """A destination of uploads."""

    url: str
    reach: Reach


class _Run(NamedTuple):
    plan: RunPlan
    here: ManifestRow | None
    """The newest checkpoint whose full state is local."""
    began: bool
    """Whether the run has started, by the local record."""

    @property
    def key(self) -> str:
        return self.plan.run_key


class _There(NamedTuple):
    """The newest uploaded checkpoint of a run."""

    url: str
    destination: Destination
    manifest: Manifest


def _sources(plan: Planned) -> list[_Source]:
    specs = [read_spec(item, "$.callbacks") for item in plan.config.callbacks]
    uploads = [spec for spec in specs if spec.kind == CheckpointUploadCallback.name]
    configs = [CheckpointUploadCallback(**spec.params).config for spec in uploads]
    experiment = LogContext(plan.folder)
    return [_Source(url_for(config.url, experiment), config.reach) for config in configs]


def _unfinished(plan: Planned) -> list[_Run]:
    page = earlier_page(plan.folder)
    entries = {} if page is None else page.runs
    found: list[_Run] = []
    for run in plan.runs:
        entry = entries.get(run.run_key)
        if entry is None or entry.status != "completed":
            found.append(_Run(run, _newest_here(run.run_dir), entry is None or entry.status != "pending"))
    return found


def _newest_here(run_dir: Path) -> ManifestRow | None:
    """Return the checkpoint that the training loop would choose among those with a loadable state."""
    loadable = [
        row
        for row in read_checkpoints(run_dir)
        if row.state_path is not None and (is_elsewhere(row.state_path) or local_path(row.state_path).exists())
    ]
    return max(reversed(loadable), key=lambda row: row.batch, default=None)


async def _bring(sources: Sequence[_Source], runs: Sequence[_Run], showing: _Showing, notes: ResumeNotes) -> None:
    async with AsyncExitStack() as stores:
        newest, away = await _look(sources, runs, stores)
        lost = [run.key for run in runs if run.began and run.here is None and run.key not in newest]
        for url, error in away.items():
            if lost:
                raise _not_asked(url, lost, error) from error
            log().warning("resume.not_asked", url=url, error=_what(error), then="local checkpoints are used")
        for run in runs:
            there = newest.get(run.key)
            if there is not None and (run.here is None or run.here.batch < there.manifest.row.batch):
                with showing() as tell:
                    await _fetch(run, there, tell)
                notes.fetched(run.key, there.url, there.manifest)
    if lost:
        notes.from_the_start(lost, [source.url for source in sources])


async def _look(
    sources: Sequence[_Source], runs: Sequence[_Run], stores: AsyncExitStack
) -> tuple[dict[str, _There], dict[str, DeliveryError | OSError]]:
    """Return the newest uploaded checkpoint by run, and the errors of unreachable destinations by URL."""
    newest: dict[str, _There] = {}
    away: dict[str, DeliveryError | OSError] = {}
    for source in sources:
        try:
            destination_of = await stores.enter_async_context(at_store(source.url, source.reach))
            for run in runs:
                manifest = await _newest_there(destination_of(run.key))
                known = newest.get(run.key)
                if manifest is not None and (known is None or known.manifest.row.batch < manifest.row.batch):
                    newest[run.key] = _There(source.url, destination_of(run.key), manifest)
        except (DeliveryError, OSError) as error:
            away[source.url] = error
    return newest, away


async def _newest_there(destination: Destination) -> Manifest | None:
    async for attempt in AsyncRetrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        retry=retry_if_exception_type(RetryLaterError),
        reraise=True,
    ):
        with attempt:
            return await newest_state(destination)
    raise AssertionError  # tenacity reraises the error of the last attempt


async def _fetch(run: _Run, there: _There, tell: Tell) -> None:
    folder = run.plan.run_dir.absolute()
    checkpoint = checkpoint_folder(there.manifest.row)
    for other in (folder / FETCHED).glob("*"):
        if other.name != checkpoint:  # a partial download of another checkpoint is not continued, and takes space
            await anyio.to_thread.run_sync(clear, other)
    told = metered(run.key, checkpoint, tell)
    try:
        row = await fetch(there.destination, there.manifest, folder / FETCHED, told)
    except (RetryLaterError, ParkedError) as error:
        error.fix = "run the same command again once it can be reached: files that are here are not fetched again"
        raise
    await anyio.to_thread.run_sync(lambda: put_on_record(folder, row, as_last=True))


def _not_asked(url: str, runs: Sequence[str], error: DeliveryError | OSError) -> DeliveryError:
    if isinstance(error, StoreError):
        return error
    what = f"{url} cannot be asked for a checkpoint of {names_of(runs)}, and there is no local one"
    told = RetryLaterError(what) if isinstance(error, RetryLaterError) else ParkedError(what)
    mend = f"{error.fix}; then" if isinstance(error, ParkedError) else "once it can be reached,"
    told.why = _what(error)
    told.fix = f"{mend} run the same command again. To start over: without --resume, in another --output-dir"
    return told


def _what(error: DeliveryError | OSError) -> str:
    if isinstance(error, DeliveryError):
        return error.what
    return f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"
