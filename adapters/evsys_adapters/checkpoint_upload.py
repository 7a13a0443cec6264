"""`CheckpointUploadCallback`: copies every checkpoint to a bucket or another folder without blocking the loop.

The inline half creates hard links; the delivery half, `UploadSink`, uploads them.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, NamedTuple

import anyio
import msgspec

from evsys_adapters.checkpoints.copying import full_disk_as_retry
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.events import CheckpointConflict, CheckpointUploaded, UploadProgress
from evsys_adapters.checkpoints.manifest import (
    FETCHED,
    MANIFEST,
    PARTS,
    Manifest,
    PartName,
    StoredFile,
    checkpoint_folder,
    component,
)
from evsys_adapters.checkpoints.source_files import UnusableSourceError
from evsys_adapters.checkpoints.spool import PendingUpload, Spool, SpooledFile, UploadRecord, as_manifest_row
from evsys_adapters.checkpoints.store import (
    MAX_KEY_BYTES,
    MAX_SMALL_BYTES,
    ConflictError,
    RefusedError,
    StoreError,
    UploadLedger,
)
from evsys_adapters.checkpoints.store_urls import (
    ConnectionParams,
    StoreOptions,
    StorePool,
    StoreUrl,
    check_url,
    has_placeholders,
    join_url,
    url_for,
)
from evsys_adapters.common.params import validate_params
from evsys_bus.callback import Callback
from evsys_bus.context import LoopState, ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import BatchTooLargeError, DeliveryError, RejectedError, RetryLaterError
from evsys_bus.events import Checkpoint, Envelope, ExperimentStart, RunStart
from evsys_bus.files import load_file
from evsys_bus.sink import Sink

if TYPE_CHECKING:
    from evsys_bus.config import CallbackSpec

FINAL: Final = "final"
_MAX_SHOWN_LETTERS: Final = 50


class CheckpointUploadConfig(ConnectionParams, frozen=True, forbid_unknown_fields=True):
    """Parameters of `CheckpointUploadCallback`."""

    url: StoreUrl
    """Destination: ``s3://bucket/prefix`` or ``file:///folder``; a run's checkpoints go into a folder named after
    it. An S3 URL may end with ``?endpoint=https://host``, and ``region``, ``path_style`` or ``profile``, instead of the
    params below. ``{experiment}`` is replaced by the name of the experiment's folder, ``{output_dir}`` by its path."""
    checkpoints: Literal["all", "final"] | Annotated[int, msgspec.Meta(ge=1)] = "all"
    """Which checkpoints: ``all``, ``final``, or those saved after every this many steps and the final one."""
    what: Literal["state", "sampler", "both"] = "both"
    """The full state, the weights for inference, or both."""
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    """Maximum number of concurrent transfers of files and parts."""
    part_bytes: Annotated[int, msgspec.Meta(ge=5 << 20)] = 16 << 20
    """A larger file is sent in parts of this size; after a crash only unfinished parts are sent again."""
    progress_seconds: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """Interval of progress events during an upload."""

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def parts(self) -> tuple[PartName, ...]:
        """The parts of a checkpoint that are uploaded."""
        return PARTS if self.what == "both" else (self.what,)

    def wants(self, row: ManifestRow) -> bool:
        """Whether this checkpoint is uploaded."""
        if self.checkpoints == "all" or row.name == FINAL:
            return True
        return isinstance(self.checkpoints, int) and (row.batch + 1) % self.checkpoints == 0


_MIN_SECONDS = 1e-3


class ProgressReporter:
    """Counts the uploaded bytes of one checkpoint.

    Args:
        run: The run of the checkpoint.
        checkpoint: Its folder.
        total_bytes: The total to be uploaded.
        url: Its destination.
        every_seconds: Minimum interval between events.
        publish: Receives the events.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        run: str,
        checkpoint: str,
        total_bytes: int,
        *,
        url: str,
        every_seconds: float,
        publish: Callable[[UploadProgress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._done_by_file: dict[str, int] = {}  # by file, so that a repeated transfer counts once
        self._run = run
        self._checkpoint = checkpoint
        self._total_bytes = total_bytes
        self._url = url
        self._every_seconds = every_seconds
        self._publish = publish
        self._clock = clock
        self._start_time = self._last_report = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start_time

    def update(self, file: str, done_bytes: int) -> None:
        """Update the number of uploaded bytes of a file."""
        self._done_by_file[file] = done_bytes
        now = self._clock()
        if now - self._last_report < self._every_seconds:
            return
        self._last_report = now
        done = sum(self._done_by_file.values())
        rate = done / max(now - self._start_time, _MIN_SECONDS)
        remaining = max(0, self._total_bytes - done)
        eta = remaining / rate if rate > 0 else None
        self._publish(
            UploadProgress(self._run, self._checkpoint, done, self._total_bytes, round(rate, 1), eta, self._url)
        )


STALL_SECONDS: Final = 300.0
"""An upload without progress for this long is restarted."""


class _UploadTask(NamedTuple):
    """The upload requested by one event."""

    envelope: Envelope
    event: Checkpoint
    spool: Spool
    url: str
    """Destination of the run's checkpoints."""
    destination: Destination
    run: str

    @property
    def folder(self) -> str:
        return checkpoint_folder(self.event.row)


class UploadSink(Sink):
    """Uploads the checkpoints named by Checkpoint events. Its parameters are those of `CheckpointUploadConfig`."""

    name: ClassVar[str] = "checkpoint_upload"
    Config: ClassVar[type | None] = CheckpointUploadConfig
    write_timeout_seconds: float = 7 * 86_400.0  # checkpoints may be large; see `STALL_SECONDS`

    def __init__(self, url: str, **params: Any) -> None:
        """Validate the parameters against `CheckpointUploadConfig`."""
        self.config = validate_params(CheckpointUploadConfig, {"url": url, **params})
        self._stores = StorePool(StoreOptions.of(self.config))
        self._cleaned_runs: set[str] = set()
        self._rejected: dict[tuple[str, int], str] = {}
        self._uploaded: set[tuple[str, int]] = set()

    async def open(self) -> None:
        """Check that the destination accepts writes with these credentials, so that errors appear at the start."""
        if not has_placeholders(self.config.url):
            await self._stores.get(self.config.url)

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Upload the first checkpoint of the batch; events before it need no work."""
        for index, envelope in enumerate(batch):
            event = envelope.event
            if isinstance(event, ExperimentStart | RunStart):  # as in `open`, once the placeholders can be replaced
                await self._stores.get(url_for(self.config.url, event.ctx))
            if not isinstance(event, Checkpoint) or not self.config.wants(event.row):
                continue
            if index:
                return index
            if (envelope.stream, envelope.seq) not in self._rejected:
                await self._process(envelope, event)
            self._reject(envelope, alone=len(batch) == 1)
            return 1
        return None

    async def close(self) -> None:
        """Close the destinations."""
        await self._stores.close()

    def _reject(self, envelope: Envelope, *, alone: bool) -> None:
        why = self._rejected.get((envelope.stream, envelope.seq))
        if why is None:
            return
        if not alone:  # a rejection applies to a whole batch, but only this event was processed
            raise BatchTooLargeError(why)
        del self._rejected[envelope.stream, envelope.seq]
        raise RejectedError({0: why})

    async def _process(self, envelope: Envelope, event: Checkpoint) -> None:
        run = component(envelope.run or Path(event.state.output_dir).name)
        url = url_for(self.config.url, event.state)
        opened = await self._stores.get(url)
        spool = Spool.of(event.state.output_dir, self.config.url)
        task = _UploadTask(envelope, event, spool, url, Destination(opened.store, opened.prefix, run), run)
        try:
            with full_disk_as_retry(spool.folder):
                pending = self._next_pending(spool, event)
        except FileNotFoundError as error:
            # The event may be repeated long after the checkpoint was uploaded and removed.
            if not spool.uploaded(event.row) and not await self._is_uploaded(task):
                self._mark_rejected(task, f"{error.filename} is missing, and was not linked while it existed")
            return
        except UnusableSourceError as error:
            self._mark_rejected(task, f"{error.filename} cannot be uploaded: {error.strerror}")
            return
        if pending is None:
            return
        try:
            with full_disk_as_retry(spool.folder):  # for the ledger and the upload's record
                await self._upload(task, pending)
        except StoreError as error:  # retrying does not help
            spool.quarantine(pending)
            if isinstance(error, ConflictError):
                self.publish(CheckpointConflict(run, task.folder, event.row.batch, self._url(task), error.what))
            self._mark_rejected(task, error.what)

    def _next_pending(self, spool: Spool, event: Checkpoint) -> PendingUpload | None:
        """Return the entry to upload; None if it was uploaded. A checkpoint that was saved again has its own event.

        Raises:
            FileNotFoundError: Its files are missing.
        """
        pending = spool.pending(event.row)
        if pending:
            try:
                return spool.repair(pending[0], event.row, self.config.parts)
            except FileNotFoundError as error:
                log().warning("checkpoint.entry_lost", entry=str(pending[0].folder), missing=error.filename)
                spool.quarantine(pending[0])
        return spool.add(event.row, self.config.parts)

    async def _is_uploaded(self, task: _UploadTask) -> bool:
        """Whether the checkpoint is at the destination, if its record in the spool is unreadable."""
        unreadable = task.spool.unreadable(task.event.row)
        manifest = await task.destination.manifest(task.folder) if unreadable else None
        if manifest is None:
            return False
        task.spool.write_record(unreadable[0], UploadRecord(task.url, manifest, StoreOptions.of(self.config)))
        return True

    async def _upload(self, task: _UploadTask, pending: PendingUpload) -> None:
        entry, destination = pending.entry, task.destination
        assert entry is not None
        ledger = UploadLedger(task.spool.ledger)
        if destination.run_key not in self._cleaned_runs:
            await destination.store.abort_abandoned(f"{destination.run_key}/", ledger)
            task.spool.remove_stale()
            self._cleaned_runs.add(destination.run_key)
        progress = ProgressReporter(
            task.run,
            task.folder,
            sum(file.size for file in entry.files),
            url=self._url(task),
            every_seconds=self.config.progress_seconds,
            publish=self.publish,
        )
        files = await self._put_all(task, pending, ledger, progress)
        changed = pending.changed_files()
        blocking = next((file.name for file in changed if not pending.is_growing_log(file)), None)
        if blocking is None and len(changed) == len(entry.files) and changed:
            blocking = changed[0].name
        if blocking is not None:
            task.spool.remove(pending)
            self._mark_rejected(task, f"{blocking} was modified after the checkpoint event")
            return
        grown = {file.name: "it has grown since the checkpoint event" for file in changed}
        if grown:
            log().warning("checkpoint.files_left_out", checkpoint=task.folder, files=len(grown), why=grown)
            files = [file for file in files if file.name not in grown]
        unreadable = [file for file in entry.files if file.name in entry.left_out]
        if unreadable and not files:
            raise RefusedError(f"none of its files can be read, as {unreadable[0].name}", fix="save readable files")
        if len(files) + len(grown) + len(unreadable) != len(entry.files):
            raise RetryLaterError(f"files of {task.folder} changed while they were sent")
        manifest = Manifest(
            task.run, entry.row, task.envelope.stream, task.envelope.seq, files, entry.state, entry.sampler
        )
        manifest = msgspec.structs.replace(manifest, origin=task.spool.origin, left_out=entry.left_out | grown)
        manifest = await destination.publish(
            manifest, resumed_from=_fetched_generation(Path(task.event.state.output_dir))
        )
        intent = task.envelope.stream, task.envelope.seq
        if intent not in self._uploaded:  # only once: writing the record below is retried if the disk is full
            self._uploaded.add(intent)
            total = sum(file.size for file in files)
            seconds = round(progress.seconds, 3)
            self.publish(
                CheckpointUploaded(task.run, task.folder, entry.row.batch, self._url(task), len(files), total, seconds)
            )
        task.spool.finish(pending, UploadRecord(task.url, manifest, StoreOptions.of(self.config)))
        self._uploaded.discard(intent)

    async def _put_all(
        self, task: _UploadTask, pending: PendingUpload, ledger: UploadLedger, progress: ProgressReporter
    ) -> list[StoredFile]:
        """Upload all files of the entry concurrently; no file is started after a failure.

        Raises:
            DeliveryError, OSError: The first error.
        """
        files = iter(() if pending.entry is None else pending.entry.files)
        stored: list[StoredFile] = []
        errors: list[Exception] = []

        async def put(file: SpooledFile) -> None:
            def on_progress(done_bytes: int, _: int) -> None:
                stall_scope.deadline = anyio.current_time() + STALL_SECONDS
                progress.update(file.name, done_bytes)

            found = await _put_file(task, pending, file, ledger, on_progress)
            stored.extend([] if found is None else [found])

        async def work() -> None:
            for file in files:  # shared: each worker takes the next one
                try:
                    await put(file)
                except (DeliveryError, OSError) as error:
                    errors.append(error)
                if errors:  # let the other workers finish: their files need not be sent again
                    return

        with anyio.move_on_after(STALL_SECONDS) as stall_scope:
            async with anyio.create_task_group() as group:
                for _ in range(self.config.concurrency):
                    group.start_soon(work)
        if errors:
            raise errors[0]
        if stall_scope.cancelled_caught:
            raise RetryLaterError(f"the upload of {task.folder} made no progress for {STALL_SECONDS:g} s")
        return sorted(stored, key=lambda file: file.name)

    def _mark_rejected(self, task: _UploadTask, why: str) -> None:
        self._rejected[task.envelope.stream, task.envelope.seq] = why

    @staticmethod
    def _url(task: _UploadTask) -> str:
        return join_url(task.url, task.run, task.folder)


async def _put_file(
    task: _UploadTask,
    pending: PendingUpload,
    file: SpooledFile,
    ledger: UploadLedger,
    on_progress: Callable[[int, int], None],
) -> StoredFile | None:
    """Upload one file; returns None if it is not what the event announced, which is for the caller to judge."""
    if not pending.is_as_announced(file):
        return None
    key = _short_name(file.name, task.destination.key(task.folder, file.name))
    try:
        uploaded = await task.destination.store.put_file(
            task.destination.key(task.folder, key or file.name),
            pending.folder / file.name,
            ledger=ledger,
            on_progress=on_progress,
        )
    except RetryLaterError:
        if pending.is_as_announced(file):
            raise
        return None
    except PermissionError as error:
        if pending.entry is None or error.filename != str(pending.folder / file.name):
            raise
        pending.entry.left_out[file.name] = str(error.strerror)
        return None
    assert uploaded.sha256 is not None  # known for everything that was put
    return StoredFile(file.name, uploaded.size, uploaded.sha256, key)


def _short_name(name: str, key: str) -> str:
    """Return a name to store the file under if its key would be too long; else an empty one."""
    if len(key.encode()) <= MAX_KEY_BYTES:
        return ""
    part, base = name.partition("/")[0], name.rpartition("/")[2]
    return f"{part}/{hashlib.sha256(name.encode()).hexdigest()[:32]}-{base[-_MAX_SHOWN_LETTERS:].lstrip('.')}"


def _fetched_generation(run_dir: Path) -> int:
    """Return the largest life of the checkpoints fetched into the run's folder for a resume; -1 if there are none."""
    decode = msgspec.json.Decoder(Manifest).decode
    paths = (run_dir / FETCHED).glob(f"*/{MANIFEST}")
    found = (load_file(path, decode, quarantine=False, max_bytes=MAX_SMALL_BYTES) for path in paths)
    return max((each.generation for each in found if each is not None), default=-1)


class CheckpointUploadCallback(Callback):
    """Uploads the files and directories named by Checkpoint events, in a courier.

    They are hard-linked into ``spool/`` in the run's folder when the event is published, so the trainer may remove its
    own files at once; but it must write every checkpoint to new files, never into those of an earlier one. A checkpoint
    is complete at the destination once its ``manifest.json`` exists; ``latest.json`` names the newest. Paths that are
    remote URIs are recorded in the manifest and not uploaded.

    Example:
        >>> upload = CheckpointUploadCallback("s3://bucket/{experiment}", checkpoints=1000, what="state")
        >>> [upload.config.wants(ManifestRow(name, batch=batch)) for name, batch in [("a", 499), ("b", 999)]]
        [False, True]
    """

    name: ClassVar[str] = "checkpoint_upload"
    Config: ClassVar[type | None] = CheckpointUploadConfig
    delivery: ClassVar[type | None] = UploadSink

    def __init__(self, url: str, **params: Any) -> None:
        """Validate the parameters against `CheckpointUploadConfig`."""
        self.config = validate_params(CheckpointUploadConfig, {"url": url, **params})

    def on_checkpoint(self, state: LoopState, row: ManifestRow) -> None:
        """Link the checkpoint's files before the trainer can remove them."""
        if not isinstance(row, ManifestRow):  # pyright: ignore[reportUnnecessaryIsInstance] # a host's own
            row = as_manifest_row(row)
        if not self.config.wants(row):
            return
        try:
            Spool.of(state.output_dir, self.config.url).add(row, self.config.parts)
        except OSError as error:  # the delivery half tries again, and rejects the event if it fails too
            log().warning("checkpoint.not_linked", checkpoint=row.name, error=str(error))

    @staticmethod
    def fetch_before_resume(specs: "Sequence[CallbackSpec]", *args: Any) -> None:
        """Fetch what runs continue from; ``evsys-bus run --resume`` calls it once with all specs and runs."""
        from evsys_adapters.commands.resume import fetch_newest

        own_specs = [spec for spec in specs if spec.kind == CheckpointUploadCallback.name]
        configs = [CheckpointUploadCallback(**spec.params).config for spec in own_specs]
        fetch_newest([(config.url, StoreOptions.of(config)) for config in configs], *args)
