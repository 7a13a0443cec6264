"""`UploadSink`: the delivery half of `checkpoint_upload`. Checkpoint events request uploads; the journal is the queue.

    1. every file of the entry     complete and verified, or not at all; parts that were sent are not sent again
    2. manifest.json               written and read back
    3. latest.json                 updated, unless it names a newer checkpoint
    4. CheckpointUploaded          published; only then the entry leaves the spool

Each step is idempotent, so the sequence may be restarted at any point.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple

import anyio
import msgspec

from evsys_adapters._params import checked
from evsys_adapters.checkpoints import durable
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.events import CheckpointConflict, CheckpointUploaded
from evsys_adapters.checkpoints.manifest import (
    FETCHED,
    MANIFEST,
    Manifest,
    StoredFile,
    checkpoint_folder,
    component,
)
from evsys_adapters.checkpoints.places import Places, has_placeholders, url_for
from evsys_adapters.checkpoints.spool import Done, Spool, SpooledFile, Waiting
from evsys_adapters.checkpoints.store import MOST_SMALL_BYTES, ConflictError, StoreError, UploadLedger
from evsys_adapters.checkpoints.upload_config import CheckpointUploadConfig
from evsys_adapters.checkpoints.upload_progress import Progress
from evsys_bus.diagnostics import log
from evsys_bus.errors import BatchTooLargeError, DeliveryError, RejectedError, RetryLaterError
from evsys_bus.events import Checkpoint, Envelope, ExperimentStart, RunStart
from evsys_bus.files import load_file
from evsys_bus.sink import Sink

STALL_SECONDS: Final = 300.0
"""An upload without progress for this long is restarted."""


class _Task(NamedTuple):
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
        self.config = checked(CheckpointUploadConfig, {"url": url, **params})
        self._places = Places(self.config.reach)
        self._swept: set[str] = set()
        self._refused: dict[tuple[str, int], str] = {}
        self._uploaded: set[tuple[str, int]] = set()

    async def open(self) -> None:
        """Check that the destination accepts writes with these credentials, so that errors appear at the start."""
        if not has_placeholders(self.config.url):
            await self._places.place(self.config.url)

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Upload the first checkpoint of the batch; events before it need no work."""
        for index, envelope in enumerate(batch):
            event = envelope.event
            if isinstance(event, ExperimentStart | RunStart):  # as in `open`, once the placeholders can be replaced
                await self._places.place(url_for(self.config.url, event.ctx))
            if not isinstance(event, Checkpoint) or not self.config.wants(event.row):
                continue
            if index:
                return index
            if (envelope.stream, envelope.seq) not in self._refused:
                await self._carry_out(envelope, event)
            self._reject(envelope, alone=len(batch) == 1)
            return 1
        return None

    async def close(self) -> None:
        """Close the destinations."""
        await self._places.close()

    def _reject(self, envelope: Envelope, *, alone: bool) -> None:
        why = self._refused.get((envelope.stream, envelope.seq))
        if why is None:
            return
        if not alone:  # a rejection applies to a whole batch, but only this event was processed
            raise BatchTooLargeError(why)
        del self._refused[envelope.stream, envelope.seq]
        raise RejectedError({0: why})

    async def _carry_out(self, envelope: Envelope, event: Checkpoint) -> None:
        run = component(envelope.run or Path(event.state.output_dir).name)
        url = url_for(self.config.url, event.state)
        place = await self._places.place(url)
        spool = Spool.of(event.state.output_dir, self.config.url)
        task = _Task(envelope, event, spool, url, Destination(place.store, place.prefix, run), run)
        try:
            with durable.needing_room(spool.folder):
                oldest = self._oldest(spool, event)
        except FileNotFoundError as error:
            # The event may be repeated long after the checkpoint was uploaded and removed.
            if not spool.done(event.row) and not await self._is_uploaded(task):
                self._refuse(task, f"{error.filename} is missing, and was not linked while it existed")
            return
        if oldest is None:
            return
        try:
            with durable.needing_room(spool.folder):  # for the ledger and the upload's record
                await self._upload(task, oldest)
        except StoreError as error:  # retrying does not help
            spool.set_aside(oldest)
            if isinstance(error, ConflictError):
                self.publish(CheckpointConflict(run, task.folder, event.row.batch, self._url(task), error.what))
            self._refuse(task, error.what)

    def _oldest(self, spool: Spool, event: Checkpoint) -> Waiting | None:
        """Return the entry to upload; None if it was uploaded. A checkpoint that was saved again has its own event.

        Raises:
            FileNotFoundError: Its files are missing.
        """
        waiting = spool.waiting(event.row)
        if waiting:
            try:
                return spool.mend(waiting[0], event.row, self.config.parts)
            except FileNotFoundError as error:
                log().warning("checkpoint.entry_lost", entry=str(waiting[0].folder), missing=error.filename)
                spool.set_aside(waiting[0])
        return spool.keep(event.row, self.config.parts)

    async def _is_uploaded(self, task: _Task) -> bool:
        """Whether the checkpoint is at the destination, if its record in the spool is unreadable."""
        markers = task.spool.unreadable(task.event.row)
        manifest = await task.destination.manifest(task.folder) if markers else None
        if manifest is None:
            return False
        task.spool.note(markers[0], Done(task.url, manifest, self.config.reach))
        return True

    async def _upload(self, task: _Task, waiting: Waiting) -> None:
        entry, destination = waiting.entry, task.destination
        assert entry is not None
        ledger = UploadLedger(task.spool.ledger)
        if destination.run_key not in self._swept:
            await destination.store.abort_abandoned(f"{destination.run_key}/", ledger)
            task.spool.sweep()
            self._swept.add(destination.run_key)
        progress = Progress(
            task.run,
            task.folder,
            sum(file.size for file in entry.files),
            url=self._url(task),
            every_seconds=self.config.progress_seconds,
            publish=self.publish,
        )
        files = await self._put_all(task, waiting, ledger, progress)
        changed = waiting.rewritten()
        if changed is not None:
            task.spool.drop(waiting)
            self._refuse(task, f"{changed} was modified after the checkpoint event")
            return
        manifest = Manifest(
            task.run, entry.row, task.envelope.stream, task.envelope.seq, files, entry.state, entry.sampler
        )
        manifest = msgspec.structs.replace(manifest, origin=task.spool.origin)
        manifest = await destination.publish(manifest, follows=_fetched_life(Path(task.event.state.output_dir)))
        intent = task.envelope.stream, task.envelope.seq
        if intent not in self._uploaded:  # only once: writing the record below is retried if the disk is full
            self._uploaded.add(intent)
            total = sum(file.size for file in files)
            seconds = round(progress.seconds, 3)
            self.publish(
                CheckpointUploaded(task.run, task.folder, entry.row.batch, self._url(task), len(files), total, seconds)
            )
        task.spool.finish(waiting, Done(task.url, manifest, self.config.reach))
        self._uploaded.discard(intent)

    async def _put_all(
        self, task: _Task, waiting: Waiting, ledger: UploadLedger, progress: Progress
    ) -> list[StoredFile]:
        """Upload all files of the entry concurrently; no file is started after a failure.

        Raises:
            DeliveryError, OSError: The first error.
        """
        files = iter(() if waiting.entry is None else waiting.entry.files)
        stored: list[StoredFile] = []
        failed: list[Exception] = []

        async def put(file: SpooledFile) -> None:
            def told(done_bytes: int, _: int) -> None:
                silence.deadline = anyio.current_time() + STALL_SECONDS
                progress.see(file.name, done_bytes)

            found = await task.destination.store.put_file(
                task.destination.key(task.folder, file.name), waiting.folder / file.name, ledger=ledger, told=told
            )
            assert found.sha256 is not None  # known for everything that was put
            stored.append(StoredFile(file.name, found.size, found.sha256))

        async def work() -> None:
            for file in files:  # shared: each worker takes the next one
                try:
                    await put(file)
                except (DeliveryError, OSError) as error:
                    failed.append(error)
                if failed:  # let the other workers finish: their files need not be sent again
                    return

        with anyio.move_on_after(STALL_SECONDS) as silence:
            async with anyio.create_task_group() as group:
                for _ in range(self.config.concurrency):
                    group.start_soon(work)
        if failed:
            raise failed[0]
        if silence.cancelled_caught:
            raise RetryLaterError(f"the upload of {task.folder} made no progress for {STALL_SECONDS:g} s")
        return sorted(stored, key=lambda file: file.name)

    def _refuse(self, task: _Task, why: str) -> None:
        self._refused[task.envelope.stream, task.envelope.seq] = why

    @staticmethod
    def _url(task: _Task) -> str:
        return f"{task.url.rstrip('/')}/{task.run}/{task.folder}"


def _fetched_life(run_dir: Path) -> int:
    """Return the largest life of the checkpoints fetched into the run's folder for a resume; -1 if there are none."""
    decode = msgspec.json.Decoder(Manifest).decode
    paths = (run_dir / FETCHED).glob(f"*/{MANIFEST}")
    found = (load_file(path, decode, set_aside=False, most_bytes=MOST_SMALL_BYTES) for path in paths)
    return max((each.life for each in found if each is not None), default=-1)
