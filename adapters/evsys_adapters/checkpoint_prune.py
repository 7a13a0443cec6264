"""`CheckpointPrune`: removes checkpoints that the rules no longer retain, locally and at the destination.

It is a sink because it waits for uploads and calls the destination. `prunable` applies the rules, independent of files
and buckets. Nothing is removed before a newer checkpoint is verified: at the destination if there is a ``url``, else on
this machine.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from evsys_adapters.checkpoints.destination import Destination
from evsys_adapters.checkpoints.events import CheckpointPruned
from evsys_adapters.checkpoints.manifest import checkpoint_folder, component
from evsys_adapters.checkpoints.removal import (
    RemovablePath,
    RemovalBounds,
    SkippedPath,
    is_whole,
    plan_removal,
    remove_path,
)
from evsys_adapters.checkpoints.spool import Spool
from evsys_adapters.checkpoints.store import StoreError
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
from evsys_adapters.common.hook_arguments import output_dir_of, run_context, run_folder
from evsys_adapters.common.params import validate_params
from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import RetryLaterError
from evsys_bus.events import Checkpoint, Envelope, Eval, RunStart, TrainEnd
from evsys_bus.journal.layout import stream_sort_key
from evsys_bus.location import local_path
from evsys_bus.sink import Sink

Scores = Mapping[int, float]
"""The metric's value by 0-based step."""


class BestCheckpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Selection by evals at the step after which a checkpoint was saved, even if they arrive late."""

    metric: Annotated[str, msgspec.Meta(min_length=1)]
    eval_name: str | None = None
    """Default: any eval with the metric; the last one counts."""
    mode: Literal["max", "min"] = "max"
    count: Annotated[int, msgspec.Meta(ge=1)] = 1


class RetentionRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules for which checkpoints are retained: those that match any rule. Without rules all are."""

    keep_last: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """The newest ones."""
    keep_every: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Those saved after every this many steps."""
    keep_best: BestCheckpoints | None = None
    """The best ones, and those newer than the last eval, whose evals may be pending."""

    @property
    def has_rules(self) -> bool:
        """Whether any checkpoint is ever removed."""
        return (self.keep_last, self.keep_every, self.keep_best) != (None, None, None)


class LocalRetentionRules(RetentionRules, frozen=True, forbid_unknown_fields=True):
    """Rules for checkpoints on this machine."""

    outside: list[str] = []
    """Folders besides those of the run and its experiment from which checkpoints may be removed."""

    def __post_init__(self) -> None:
        for folder in self.outside:
            local_path(folder, "local.outside")

    @property
    def folders(self) -> list[Path]:
        """The folders in ``outside`` as paths."""
        return [local_path(folder, "local.outside") for folder in self.outside]


def prunable(rows: Sequence[ManifestRow], rules: RetentionRules, scores: Scores, verified: int) -> list[ManifestRow]:
    """Return the checkpoints that may be removed.

    Args:
        rows: All checkpoints, oldest first.
        rules: The rules.
        scores: For `RetentionRules.keep_best`.
        verified: Index of the newest verified checkpoint, -1 for none. It and everything newer are retained.
    """
    if not rules.has_rules:
        return []
    retained = set(range(max(verified, 0), len(rows)))
    if rules.keep_last is not None:
        retained.update(range(max(0, len(rows) - rules.keep_last), len(rows)))
    if rules.keep_every is not None:
        retained.update(index for index, row in enumerate(rows) if (row.batch + 1) % rules.keep_every == 0)
    if rules.keep_best is not None:
        retained.update(_best_indexes(rows, rules.keep_best, scores))
    return [row for index, row in enumerate(rows) if index not in retained]


def _best_indexes(rows: Sequence[ManifestRow], best: BestCheckpoints, scores: Scores) -> list[int]:
    last = max(scores, default=-1)
    scored = [index for index, row in enumerate(rows) if row.batch in scores]
    sign = -1 if best.mode == "max" else 1
    ranked = sorted(scored, key=lambda index: (sign * scores[rows[index].batch], index))
    return [*ranked[: best.count], *(index for index, row in enumerate(rows) if row.batch > last)]


MAX_SCORES: Final = 1_000
RETRY_SECONDS: Final = 0.2
"""Delay before checking again whether the last upload has finished."""


class CheckpointPruneConfig(ConnectionParams, frozen=True, forbid_unknown_fields=True):
    """Parameters of `CheckpointPrune`."""

    local: LocalRetentionRules = LocalRetentionRules()
    """Retention of the trainer's own files. Default: everything. Only files in the folder of the run or of its
    experiment, or in a folder listed in ``outside``, are ever removed."""
    remote: RetentionRules = RetentionRules()
    """Retention at the destination. Default: everything."""
    url: StoreUrl | None = None
    """The destination, same as in `checkpoint_upload`. With it, local files are removed only once a newer checkpoint
    is verified there; without it, once a newer one is complete on this machine."""
    dry_run: bool = False
    """Remove nothing; only record what would be removed."""

    def __post_init__(self) -> None:
        if self.url is not None:
            check_url(self.url)


class _KnownCheckpoint(msgspec.Struct):
    stream: str
    seq: int
    row: ManifestRow


class _Run(msgspec.Struct, rename={"checkpoints": "known", "local_scores": "local", "remote_scores": "remote"}):
    """State of one run."""

    key: str
    run_dir: str
    url: str | None
    """The destination of its checkpoints."""
    checkpoints: list[_KnownCheckpoint] = msgspec.field(default_factory=list[_KnownCheckpoint])
    """Its checkpoints that may still be on this machine, oldest first."""
    local_scores: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    """Scores for the local rules, by step."""
    remote_scores: dict[int, float] = msgspec.field(default_factory=dict[int, float])
    experiment: str | None = None
    """The experiment's folder, if the run's folder is inside it."""


class CheckpointPrune(Sink):
    """Removes checkpoints according to `CheckpointPruneConfig`, and publishes CheckpointPruned for each.

    The newest verified checkpoint and everything newer are always retained; so are files shared with a retained
    checkpoint, and everything at the destination unless ``remote_scores`` has rules.
    """

    name: ClassVar[str] = "checkpoint_prune"
    Config: ClassVar[type | None] = CheckpointPruneConfig
    write_timeout_seconds: float = 600.0  # large directories, many objects

    def __init__(self, **params: Any) -> None:
        """Validate the parameters against `CheckpointPruneConfig`."""
        self.config = validate_params(CheckpointPruneConfig, params)
        self._runs: dict[str, _Run] = {}
        self._destinations: dict[str, Destination] = {}
        self._stores = StorePool(StoreOptions.of(self.config))
        self._reported_dry_runs: set[tuple[str, str, str]] = set()
        self._skipped_counts: dict[str, int] = {}
        """Number of files per run that were not removed with their checkpoint."""

    async def open(self) -> None:
        """Check that the destination is available if remote rules need it."""
        if self.config.remote.has_rules and self.config.url is not None and not has_placeholders(self.config.url):
            await self._stores.get(self.config.url)

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
                self._record_event(run, envelope, event)
                ended += [run] if isinstance(event, TrainEnd) else []
        awaited = [name for run in ended for name in self._uploading(run)]  # first: uploads may finish meanwhile
        for run in touched.values():
            self._prune_local(run)
            await self._prune_remote(run)
        if awaited:
            # The end of a training stays pending until its last upload is done: it may allow further removals.
            what = f"{awaited[-1]} is waiting to be uploaded"
            raise RetryLaterError(what, after_seconds=RETRY_SECONDS, waiting=True)

    async def close(self) -> None:
        """Close the destinations, and log how many files were not removed."""
        for run_dir, count in self._skipped_counts.items():
            if count > 1:
                log().warning(
                    "checkpoint.left", run=run_dir, left=count, meaning="files of pruned checkpoints were not removed"
                )
        self._skipped_counts.clear()
        await self._stores.close()

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

    def _record_event(self, run: _Run, envelope: Envelope, event: Checkpoint | Eval | TrainEnd) -> None:
        if isinstance(event, Checkpoint) and self.config.local.has_rules:
            names = {(each.row.name, each.row.batch) for each in run.checkpoints}
            if (event.row.name, event.row.batch) not in names:
                new = _KnownCheckpoint(envelope.stream, envelope.seq, event.row)
                run.checkpoints = sorted(
                    [*run.checkpoints, new], key=lambda each: (stream_sort_key(each.stream), each.seq)
                )
        elif isinstance(event, Eval):
            for scores, rules in ((run.local_scores, self.config.local), (run.remote_scores, self.config.remote)):
                best = rules.keep_best
                if best is None or best.eval_name not in {None, event.eval_name}:
                    continue
                value: object = event.metrics.get(best.metric)
                if isinstance(value, int | float) and math.isfinite(value):
                    scores[event.step_idx] = float(value)
                    _trim_scores(scores, best)

    def _prune_local(self, run: _Run) -> None:
        rows = [each.row for each in run.checkpoints]
        to_remove = prunable(rows, self.config.local, run.local_scores, self._newest_verified(run, rows))
        bounds = self._bounds(run) if to_remove else None
        for row in to_remove:
            assert bounds is not None
            remaining = [each.row for known in self._runs.values() for each in known.checkpoints if each.row is not row]
            removal_plan = plan_removal(row, remaining, bounds)
            if self.config.dry_run:
                if removal_plan.removable:
                    self._publish_pruned(run, row, "local", [str(each.path) for each in removal_plan.removable])
                continue
            removed = [each for each in removal_plan.removable if _try_remove(each)]
            run.checkpoints = [each for each in run.checkpoints if each.row is not row]
            for skipped in removal_plan.skipped:
                self._report_skipped(run, row, skipped)
            if removed:
                self._publish_pruned(run, row, "local", [str(each.path) for each in removed])

    def _bounds(self, run: _Run) -> RemovalBounds:
        others = [Path(each.run_dir) for each in self._runs.values() if each.run_dir != run.run_dir]
        experiment = None if run.experiment is None else Path(run.experiment)
        return RemovalBounds(Path(run.run_dir), experiment, self.config.local.folders, others)

    def _report_skipped(self, run: _Run, row: ManifestRow, skipped: SkippedPath) -> None:
        """Count a file that is not removed; log the first of a run."""
        self._skipped_counts[run.run_dir] = self._skipped_counts.get(run.run_dir, 0) + 1
        if self._skipped_counts[run.run_dir] == 1:
            opt_in_fix = (
                f"to have such files removed: local: {{outside: [{skipped.path.parent}]}}" if skipped.outside else None
            )
            log().warning(
                "checkpoint.left",
                run=run.run_dir,
                checkpoint=row.name,
                path=str(skipped.path),
                why=skipped.why,
                meaning="it is not pruned, nor are other files of this run's checkpoints in the same situation",
                fix=opt_in_fix or "remove it by hand, if it is no longer needed",
            )

    def _newest_verified(self, run: _Run, rows: Sequence[ManifestRow]) -> int:
        if self.config.url is None:
            return max((index for index, row in enumerate(rows) if is_whole(row)), default=-1)
        spool = Spool.of(run.run_dir, self.config.url)
        uploaded_folders = {checkpoint_folder(record.manifest.row) for record in spool.uploaded()}
        return max((index for index, row in enumerate(rows) if checkpoint_folder(row) in uploaded_folders), default=-1)

    async def _prune_remote(self, run: _Run) -> None:
        if run.url is None or not self.config.remote.has_rules:
            return
        opened = await self._stores.get(run.url)
        destination = self._destinations.setdefault(run.run_dir, Destination(opened.store, opened.prefix, run.key))
        manifests = await destination.manifests()
        rows = [manifest.row for manifest in manifests]
        latest = await destination.latest()
        ids_to_remove = {id(row) for row in prunable(rows, self.config.remote, run.remote_scores, len(rows) - 1)}
        for manifest in manifests:
            folder = checkpoint_folder(manifest.row)
            if id(manifest.row) not in ids_to_remove or latest is None or latest.checkpoint == folder:
                continue
            if not self.config.dry_run:
                try:
                    await destination.remove(manifest)
                except StoreError as error:
                    log().warning("checkpoint.not_removed", path=destination.key(folder), error=error.what)
                    continue
            self._publish_pruned(run, manifest.row, "remote", [join_url(run.url, run.key, folder)])

    def _uploading(self, run: _Run) -> list[str]:
        if self.config.url is None or self.config.dry_run:
            return []
        return [pending.folder.name for pending in Spool.of(run.run_dir, self.config.url).pending()]

    def _publish_pruned(self, run: _Run, row: ManifestRow, where: Literal["local", "remote"], paths: list[str]) -> None:
        folder = checkpoint_folder(row)
        if self.config.dry_run:
            if (run.run_dir, folder, where) in self._reported_dry_runs:
                return
            self._reported_dry_runs.add((run.run_dir, folder, where))
        self.publish(CheckpointPruned(run.key, folder, row.batch, where, paths, self.config.dry_run))


def _try_remove(each: RemovablePath) -> bool:
    try:
        remove_path(each)
    except OSError as error:
        log().warning("checkpoint.not_removed", path=str(each.path), error=str(error))
        return False
    return True


def _trim_scores(scores: dict[int, float], best: BestCheckpoints) -> None:
    """Reduce a large number of scores to the best and the latest ones."""
    if len(scores) > 2 * MAX_SCORES:
        ranked = sorted(scores, key=lambda step: scores[step], reverse=best.mode == "max")
        retained = {*ranked[:MAX_SCORES], *sorted(scores)[-MAX_SCORES:]}
        for step in set(scores) - retained:
            del scores[step]
