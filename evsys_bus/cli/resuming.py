"""What ``run --resume`` has to bring here first: checkpoints that ``checkpoint_upload`` sent elsewhere.

Of what is here and what is there, a run goes on from the one of the later step; of two of the same step, from the one
here. What is fetched comes on the run's record, where the loop finds it. Nothing is written at a destination.
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
"""To ask a destination: what is away for a moment should not end a job that was started anew by a machine."""

_Showing = Callable[[], AbstractContextManager[Tell]]


def bring_newest(plan: Planned, mode: ProgressMode, screen: Screen) -> None:
    """Have in each run's folder what it is to go on from, where that was uploaded and is not here.

    Raises:
        DeliveryError: A destination cannot be asked, and a run that had begun has nothing here to go on from; or what
            is there is damaged. What was fetched stays, and is not fetched again.
        TrainingError: Somebody trains in the experiment's directory.
        OSError: This machine's disk.
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
    """A destination of uploads, to be fetched from."""

    url: str
    reach: Reach


class _Run(NamedTuple):
    plan: RunPlan
    here: ManifestRow | None
    """Its newest checkpoint whose full state is here."""
    began: bool
    """Not so where it waits for its first turn, by what is on record here."""

    @property
    def key(self) -> str:
        return self.plan.run_key


class _There(NamedTuple):
    """The newest checkpoint of a run that is elsewhere."""

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
    """As the loop would choose it, of those whose state it could load."""
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
            log().warning("resume.not_asked", url=url, error=_what(error), then="what is here is gone on from")
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
    """The newest of each run that is elsewhere, by run; and why destinations could not be asked, by URL."""
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
    raise AssertionError  # tenacity raised what the last attempt did


async def _fetch(run: _Run, there: _There, tell: Tell) -> None:
    folder = run.plan.run_dir.absolute()
    checkpoint = checkpoint_folder(there.manifest.row)
    for other in (folder / FETCHED).glob("*"):
        if other.name != checkpoint:  # what was begun of it is not gone on with, and takes room
            await anyio.to_thread.run_sync(clear, other)
    told = metered(run.key, checkpoint, tell)
    try:
        row = await fetch(there.destination, there.manifest, folder / FETCHED, told)
    except (RetryLaterError, ParkedError) as error:
        error.fix = "say the same again, once it can be reached: what is here already is not fetched again"
        raise
    await anyio.to_thread.run_sync(lambda: put_on_record(folder, row, as_last=True))


def _not_asked(url: str, runs: Sequence[str], error: DeliveryError | OSError) -> DeliveryError:
    if isinstance(error, StoreError):
        return error
    what = f"{url} cannot be asked for a checkpoint of {names_of(runs)}, and none is here"
    told = RetryLaterError(what) if isinstance(error, RetryLaterError) else ParkedError(what)
    mend = f"{error.fix}; then" if isinstance(error, ParkedError) else "once it can be reached,"
    told.why = _what(error)
    told.fix = f"{mend} say the same again. To begin from the start: without --resume, in an --output-dir of its own"
    return told


def _what(error: DeliveryError | OSError) -> str:
    if isinstance(error, DeliveryError):
        return error.what
    return f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"
