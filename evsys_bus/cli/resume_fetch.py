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
from evsys_adapters.checkpoints.copying import remove_partials
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.manifest import FETCHED, Manifest, checkpoint_folder, is_remote_uri
from evsys_adapters.checkpoints.restore import fetch_checkpoint, newest_state
from evsys_adapters.checkpoints.spool import local_path
from evsys_adapters.checkpoints.store import StoreError
from evsys_adapters.checkpoints.stores import StoreOptions, url_for
from evsys_bus.cli.experiment_plan import ExperimentPlan, load_previous_experiment
from evsys_bus.cli.fetched_checkpoints import record_checkpoint
from evsys_bus.cli.output.errors import show_warnings
from evsys_bus.cli.output.progress import OnTransfer, ProgressMode, show_fetches
from evsys_bus.cli.output.screen import Screen
from evsys_bus.cli.output.transfers import make_byte_counter
from evsys_bus.cli.records import read_checkpoints
from evsys_bus.cli.resume_reporter import ResumeReporter, join_names
from evsys_bus.cli.store_options import open_store
from evsys_bus.config.spec import read_spec
from evsys_bus.context import LogContext, ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError
from evsys_bus.training.folder_lock import lock_folder
from evsys_bus.training.plan import RunPlan

ATTEMPTS: Final = 3
"""Attempts to query a destination: a short outage should not end a job that a scheduler has restarted."""

_ShowFetches = Callable[[], AbstractContextManager[OnTransfer]]


def fetch_newest(plan: ExperimentPlan, mode: ProgressMode, screen: Screen) -> None:
    """Fetch the newest checkpoint of each run that was uploaded and is not local.

    Raises:
        DeliveryError: A destination cannot be reached, and a started run has no local checkpoint; or the remote one is
            damaged. Fetched files stay, and are not fetched again.
        TrainingError: Another process trains in the experiment's directory.
        OSError: The local disk failed.
    """
    sources = _upload_sources(plan)
    runs = _unfinished_runs(plan)
    if not sources or not runs:
        return
    with (
        lock_folder(plan.folder.absolute(), "the experiment's directory"),
        show_warnings(screen, as_json=mode == "json"),
    ):
        anyio.run(_fetch_missing, sources, runs, lambda: show_fetches(mode, screen), ResumeReporter(mode, screen))


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


def _upload_sources(plan: ExperimentPlan) -> list[_Source]:
    specs = [read_spec(item, "$.callbacks") for item in plan.config.callbacks]
    uploads = [spec for spec in specs if spec.kind == CheckpointUploadCallback.name]
    configs = [CheckpointUploadCallback(**spec.params).config for spec in uploads]
    experiment = LogContext(plan.folder)
    return [_Source(url_for(config.url, experiment), config.store_options) for config in configs]


def _unfinished_runs(plan: ExperimentPlan) -> list[_UnfinishedRun]:
    previous = load_previous_experiment(plan.folder)
    entries = {} if previous is None else previous.runs
    found: list[_UnfinishedRun] = []
    for run in plan.runs:
        entry = entries.get(run.run_key)
        if entry is None or entry.status != "completed":
            found.append(_UnfinishedRun(run, _newest_local(run.run_dir), entry is None or entry.status != "pending"))
    return found


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
    for source in sources:
        try:
            destination_of = await stores.enter_async_context(open_store(source.url, source.options))
            for run in runs:
                manifest = await _newest_remote(destination_of(run.key))
                known = newest.get(run.key)
                if manifest is not None and (known is None or known.manifest.row.batch < manifest.row.batch):
                    newest[run.key] = _RemoteCheckpoint(source.url, destination_of(run.key), manifest)
        except (DeliveryError, OSError) as error:
            unreachable[source.url] = error
    return newest, unreachable


async def _newest_remote(destination: Destination) -> Manifest | None:
    async for attempt in AsyncRetrying(
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.5, max=5),
        retry=retry_if_exception_type(RetryLaterError),
        reraise=True,
    ):
        with attempt:
            return await newest_state(destination)
    raise AssertionError  # tenacity reraises the error of the last attempt


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
