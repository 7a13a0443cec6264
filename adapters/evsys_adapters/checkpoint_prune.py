"""`CheckpointPrune`: removes checkpoints that the rules no longer retain, locally and at the destination.

It is a sink because it waits for uploads and calls the destination. It decides when to remove; `checkpoints.retention`
decides what. Nothing is removed before a newer checkpoint is verified: at the destination if there is a ``url``, else
on this machine.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeGuard

import msgspec

from evsys_adapters._params import checked
from evsys_adapters._runs import output_dir_of, run_context, run_folder
from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.events import CheckpointPruned
from evsys_adapters.checkpoints.manifest import checkpoint_folder, component
from evsys_adapters.checkpoints.places import Places, Reach, has_placeholders, url_for
from evsys_adapters.checkpoints.removal import Bounds, Left, Removable, is_whole, plan, remove
from evsys_adapters.checkpoints.retention import Best, Keep, LocalKeep, prunable
from evsys_adapters.checkpoints.spool import Spool
from evsys_adapters.checkpoints.store import StoreError
from evsys_adapters.checkpoints.upload_config import StoreUrl, check_url
from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Checkpoint, Envelope, Eval, RunStart, TrainEnd
from evsys_bus.journal.layout import order_of
from evsys_bus.sink import Sink
from evsys_bus.where import local_path

MOST_SCORES: Final = 1_000
AGAIN_SECONDS: Final = 0.2
"""Delay before checking again whether the last upload has finished."""


class CheckpointPruneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `CheckpointPrune`."""

    local: LocalKeep = LocalKeep()
    """Retention of the trainer's own files. Default: everything. Only files in the folder of the run or of its
    experiment, or in a folder listed in ``outside``, are ever removed."""
    remote: Keep = Keep()
    """Retention at the destination. Default: everything."""
    url: StoreUrl | None = None
    """The destination, same as in `checkpoint_upload`. With it, local files are removed only once a newer checkpoint
    is verified there; without it, once a newer one is complete on this machine."""
    dry_run: bool = False
    """Remove nothing; only record what would be removed."""
    endpoint: str | None = None
    """This and the following parameters are the same as in `checkpoint_upload`."""
    region: str | None = None
    path_style: bool | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None:
            check_url(self.url)


class _Known(msgspec.Struct):
    stream: str
    seq: int
    row: ManifestRow


class _Run(msgspec.Struct):
    """State of one run."""

    key: str
    run_dir: str
    url: str | None
    """The destination of its checkpoints."""
    known: list[_Known] = msgspec.field(default_factory=list[_Known])
    """Its checkpoints that may still be on this machine, oldest first."""
    local: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    """Scores for the local rules, by step."""
    remote: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    experiment: str | None = None
    """The experiment's folder, if the run's folder is inside it."""


class CheckpointPrune(Sink):
    """Removes checkpoints according to `CheckpointPruneConfig`, and publishes CheckpointPruned for each.

    The newest verified checkpoint and everything newer are always retained; so are files shared with a retained
    checkpoint, and everything at the destination unless ``remote`` has rules.
    """

    name: ClassVar[str] = "checkpoint_prune"
    Config: ClassVar[type | None] = CheckpointPruneConfig
    write_timeout_seconds: float = 600.0  # large directories, many objects

    def __init__(self, **params: Any) -> None:
        """Validate the parameters against `CheckpointPruneConfig`."""
        self.config = checked(CheckpointPruneConfig, params)
        self._runs: dict[str, _Run] = {}
        self._destinations: dict[str, Destination] = {}
        self._places = Places(
            Reach(self.config.endpoint, self.config.region, self.config.path_style, self.config.profile)
        )
        self._told: set[tuple[str, str, str]] = set()
        self._left: dict[str, int] = {}
        """Number of files per run that were not removed with their checkpoint."""

    async def open(self) -> None:
        """Check that the destination is available if remote rules need it."""
        if self.config.remote.has_rules and self.config.url is not None and not has_placeholders(self.config.url):
            await self._places.place(self.config.url)

    async def write(self, batch: Sequence[Envelope]) -> None:
        """Record checkpoints and evals, and remove what the rules allow."""
        touched: dict[str, _Run] = {}
        ended: list[_Run] = []
        for envelope in batch:
            event = envelope.event
            if isinstance(event, RunStart):  # so that the files in its folder are protected from pruning of other runs
                self._run(envelope, event.ctx)
            elif isinstance(event, Checkpoint | Eval | TrainEnd):
                run = self._run(envelope, event.state)
                touched[run.run_dir] = run
                self._learn(run, envelope, event)
                ended += [run] if isinstance(event, TrainEnd) else []
        awaited = [name for run in ended for name in self._uploading(run)]  # first: uploads may finish meanwhile
        for run in touched.values():
            self._prune_local(run)
            await self._prune_remote(run)
        if awaited:
            # The end of a training stays pending until its last upload is done: it may allow further removals.
            raise RetryLaterError(f"{awaited[-1]} is waiting to be uploaded", after_seconds=AGAIN_SECONDS)

    async def close(self) -> None:
        """Close the destinations, and log how many files were not removed."""
        for run_dir, count in self._left.items():
            if count > 1:
                log().warning(
                    "checkpoint.left", run=run_dir, left=count, meaning="files of pruned checkpoints were not removed"
                )
        self._left.clear()
        await self._places.close()

    def mark(self) -> Any:
        """Return the state of all runs as plain data, stored beside the cursor."""
        return msgspec.to_builtins(self._runs, str_keys=True)

    def rewind(self, mark: Any) -> None:
        """Restore the state from a mark."""
        self._runs = msgspec.convert(mark, dict[str, _Run], strict=False)

    def _run(self, envelope: Envelope, handle: object) -> _Run:
        """Return the run of a state or of a run's context."""
        run_dir = (
            local_path(output_dir_of(handle), "output_dir") if run_context(handle) is not handle else run_folder(handle)
        )
        key = component(envelope.run or run_dir.name)
        name = str(run_dir)
        if name in self._runs and self._runs[name].key != key:  # another run with the same folder
            name = f"{name}\0{key}"
        if name not in self._runs:
            url = None if self.config.url is None else url_for(self.config.url, handle)
            self._runs[name] = _Run(key, str(run_dir), url)
        run = self._runs[name]
        experiment = output_dir_of(run_context(handle))
        if experiment:
            folder = local_path(experiment, "output_dir")
            inside = run_dir.is_relative_to(folder) or run_dir.resolve().is_relative_to(folder.resolve())
            run.experiment = str(folder) if inside else None
        return run

    def _learn(self, run: _Run, envelope: Envelope, event: Checkpoint | Eval | TrainEnd) -> None:
        if isinstance(event, Checkpoint) and self.config.local.has_rules:
            names = {(each.row.name, each.row.batch) for each in run.known}
            if (event.row.name, event.row.batch) not in names:
                new = _Known(envelope.stream, envelope.seq, event.row)
                run.known = sorted([*run.known, new], key=lambda each: (order_of(each.stream), each.seq))
        elif isinstance(event, Eval):
            for scores, keep in ((run.local, self.config.local), (run.remote, self.config.remote)):
                best = keep.keep_best
                value = None if best is None else event.metrics.get(best.metric)
                if best is not None and best.eval_name in {None, event.eval_name} and _is_finite(value):
                    scores[event.step_idx] = float(value)
                    _bound(scores, best)

    def _prune_local(self, run: _Run) -> None:
        rows = [each.row for each in run.known]
        going = prunable(rows, self.config.local, run.local, self._newest_verified(run, rows))
        bounds = self._bounds(run) if going else None
        for row in going:
            assert bounds is not None
            found = plan(row, (each for each in self._rows() if each is not row), bounds)
            if self.config.dry_run:
                if found.removable:
                    self._tell(run, row, "local", [str(each.path) for each in found.removable])
                continue
            removed = [each for each in found.removable if _removed(each)]
            run.known = [each for each in run.known if each.row is not row]
            for left in found.left:
                self._report_left(run, row, left)
            if removed:
                self._tell(run, row, "local", [str(each.path) for each in removed])

    def _rows(self) -> Iterator[ManifestRow]:
        """Yield all checkpoints of all runs that may still be on this machine."""
        return (each.row for run in self._runs.values() for each in run.known)

    def _bounds(self, run: _Run) -> Bounds:
        others = [Path(each.run_dir) for each in self._runs.values() if each.run_dir != run.run_dir]
        experiment = None if run.experiment is None else Path(run.experiment)
        return Bounds(Path(run.run_dir), experiment, self.config.local.folders, others)

    def _report_left(self, run: _Run, row: ManifestRow, left: Left) -> None:
        """Count a file that is not removed; log the first of a run."""
        self._left[run.run_dir] = self._left.get(run.run_dir, 0) + 1
        if self._left[run.run_dir] == 1:
            opt_in = f"to have such files removed: local: {{outside: [{left.path.parent}]}}" if left.outside else None
            log().warning(
                "checkpoint.left",
                run=run.run_dir,
                checkpoint=row.name,
                path=str(left.path),
                why=left.why,
                meaning="it is not pruned, nor are other files of this run's checkpoints in the same situation",
                fix=opt_in or "remove it by hand, if it is no longer needed",
            )

    def _newest_verified(self, run: _Run, rows: Sequence[ManifestRow]) -> int:
        if self.config.url is None:
            return max((index for index, row in enumerate(rows) if is_whole(row)), default=-1)
        spool = Spool.of(run.run_dir, self.config.url)
        there = {checkpoint_folder(done.manifest.row) for done in spool.done()}
        return max((index for index, row in enumerate(rows) if checkpoint_folder(row) in there), default=-1)

    async def _prune_remote(self, run: _Run) -> None:
        if run.url is None or not self.config.remote.has_rules:
            return
        place = await self._places.place(run.url)
        destination = self._destinations.setdefault(run.run_dir, Destination(place.store, place.prefix, run.key))
        manifests = await destination.manifests()
        rows = [manifest.row for manifest in manifests]
        latest = await destination.latest()
        going = {id(row) for row in prunable(rows, self.config.remote, run.remote, len(rows) - 1)}
        for manifest in manifests:
            folder = checkpoint_folder(manifest.row)
            if id(manifest.row) not in going or latest is None or latest.checkpoint == folder:
                continue
            if not self.config.dry_run:
                try:
                    await destination.remove(manifest)
                except StoreError as error:
                    log().warning("checkpoint.not_removed", path=destination.key(folder), error=error.what)
                    continue
            self._tell(run, manifest.row, "remote", [f"{run.url.rstrip('/')}/{run.key}/{folder}"])

    def _uploading(self, run: _Run) -> list[str]:
        if self.config.url is None or self.config.dry_run:
            return []
        return [waiting.folder.name for waiting in Spool.of(run.run_dir, self.config.url).waiting()]

    def _tell(self, run: _Run, row: ManifestRow, where: Literal["local", "remote"], paths: list[str]) -> None:
        folder = checkpoint_folder(row)
        if self.config.dry_run:
            if (run.run_dir, folder, where) in self._told:
                return
            self._told.add((run.run_dir, folder, where))
        self.publish(CheckpointPruned(run.key, folder, row.batch, where, paths, self.config.dry_run))


def _removed(each: Removable) -> bool:
    try:
        remove(each)
    except OSError as error:
        log().warning("checkpoint.not_removed", path=str(each.path), error=str(error))
        return False
    return True


def _bound(scores: dict[int, float], best: Best) -> None:
    """Reduce a large number of scores to the best and the latest ones."""
    if len(scores) > 2 * MOST_SCORES:
        ranked = sorted(scores, key=lambda step: scores[step], reverse=best.mode == "max")
        kept = {*ranked[:MOST_SCORES], *sorted(scores)[-MOST_SCORES:]}
        for step in set(scores) - kept:
            del scores[step]


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)
