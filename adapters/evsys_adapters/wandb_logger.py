"""`WandbLoggerCallback`: logs each run to a local file in W&B's format, which is uploaded while it is written.

<output_dir>/<run_key>/wandb/offline-run-<time>-<id>/run-<id>.wandb     the file that `wandb sync` uploads
                                                     files/media/table/…  predictions, and other content of the run
                                                     upload.log         output of the upload
                                                     run-<id>.wandb.uploaded     size that the server has
                                                     .run-<id>.wandb.at     which events it has the rows of
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from evsys_adapters.common.hook_arguments import (
    field,
    fields,
    num_steps_of,
    output_dir_of,
    ranked_folder,
    run_context,
    run_folder,
    run_name,
    step_of,
)
from evsys_adapters.common.logged_values import config_of
from evsys_adapters.common.params import require_package, validate_params
from evsys_adapters.output_files.output_positions import TrackedOutput, position_file_of
from evsys_adapters.output_files.run_logger import RunLogger
from evsys_adapters.wandb_files.records import Records
from evsys_adapters.wandb_files.run import WandbRun, WandbRunState, random_id
from evsys_adapters.wandb_files.upload_process import Upload
from evsys_adapters.wandb_files.uploader import Uploader
from evsys_bus.adapter import RunAnnotated
from evsys_bus.callback import Callback
from evsys_bus.context import ArmResult, LogContext, LoopState, RunResult, TrainingBatch
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import EvsysBusError, NotAttachedError

_URL: Final = "wandb_url"
_MAX_PROJECT_CHARS: Final = 128
_TASK_RETRY_SECONDS: Final = 30.0
"""Delay before a task for an upload that never started is requested again."""

Mode = Literal["online", "offline", "disabled"]


class WandbLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `WandbLoggerCallback`."""

    project: (
        Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$", examples=["my-project"])]
        | None
    ) = None
    """W&B accepts up to 128 characters without ``/ \\ # ? % :``; a team is the ``entity``. Default: ``WANDB_PROJECT``,
    else the name of the experiment's directory, or of the run's if there is no experiment; it is logged once."""
    entity: str | None = None
    """Default: that of the login, or ``WANDB_ENTITY``."""
    name: str | None = None
    """Prefix of the run's display name, before its key. Default: the key alone."""
    mode: Mode = "online"
    """``offline`` needs no account and no network; ``wandb sync`` uploads it later. ``WANDB_MODE`` may restrict it."""
    log_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Log one step in this many, and the last."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Maximum number of predictions in the table of one eval."""
    job_type: str = "train"
    base_url: str | None = None
    """URL of a self-hosted server. Default: that of the login, or ``WANDB_BASE_URL``."""
    flush_secs: Annotated[float, msgspec.Meta(ge=0)] = 5
    """How long a row may stay in memory. Behind a courier, rows are synced before they count as delivered."""


class WandbLoggerCallback(RunLogger[WandbRun, WandbRunState]):
    """Logs runs to W&B: training over ``train/step``, each eval over its own step, so late rows are not lost.

    W&B's own step only counts rows; a row's time is that of its event, however late it is delivered. A benchmark scored
    after training goes to the run's summary, as ``final/<name>/…``. The W&B group is the run's group, or else the
    experiment; the notes are the hypothesis. A resumed run is the same W&B run; steps that are run again replace the
    earlier ones. Ranks above 0 are separate runs named ``<name>-rank<rank>``.

    Content is logged over ``media/step`` with W&B's data types. Texts are pages of HTML; artifacts, and files that W&B
    has no type for, are files of the run, in ``media/artifact``.

    The run's state at W&B, finished or failed, comes from its RunEnd, or else its TrainEnd, once no more events are
    expected. Without either the state is unknown: all rows are uploaded, and W&B shows the run as running, then as
    crashed, its state for a run that stopped reporting. (``wandb sync`` would mark it as failed.)

    An event is delivered once its rows are in the run's file, synced to disk. The file is complete without an account;
    behind a courier, a crash neither duplicates nor loses a row: it is rewound to the last `mark`. In mode ``online``
    W&B's own tool uploads it meanwhile, and events are pending until the server has confirmed them: see `report_owed`.
    A failing upload (no login, no network, a server that rejects it) is logged as a WARNING with the fix, and retried;
    ``evsys-bus sync`` or ``wandb sync <folder>`` can finish it later. Once the server has assigned the run's URL, it is
    printed as ``View run at …``, set as ``ctx.extras["wandb_url"]``, and recorded as `RunAnnotated`.

    Raises:
        ModuleNotFoundError: wandb is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "wandb_logger"
    Config: ClassVar[type | None] = WandbLoggerConfig

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        mode: Mode = "online",
        log_every: int = 1,
        max_pred_rows: int = 100,
        job_type: str = "train",
        base_url: str | None = None,
        flush_secs: float = 5,
        *,
        clock: Callable[[], float] | None = None,
        new_id: Callable[[], str] = random_id,
        patience_seconds: float = 5,
    ) -> None:
        params = {key: value for key, value in locals().items() if key in WandbLoggerConfig.__struct_fields__}
        self._config = validate_params(WandbLoggerConfig, params)
        self._mode = _mode(self._config.mode)
        require_package(self.name, "wandb", "wandb")
        self._clock = clock
        self._new_id = new_id
        self._faults = FaultLog()
        self._uploader = Uploader(self._config.base_url, self.report_owed, self._faults, patience_seconds)
        self._logged_project = ""
        self._last_counted: dict[str, int] = {}
        """The last counted event of each stream: starts of runs are repeated after a crash."""
        super().__init__(WandbRunState, self._config.max_pred_rows, position_file_of)
        if self._mode == "disabled":
            for hook in vars(Callback):  # also in place of those of a subclass: the empty ones, which no bus calls
                if hook.startswith("on_"):
                    setattr(self, hook, MethodType(vars(Callback)[hook], self))

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics, if they are due."""
        del batch
        step = step_of(step_idx)
        run = self._run(state)
        is_due = step % self._config.log_every == 0 or step + 1 == num_steps_of(state)
        self._once(run, lambda: run.add_step(step, metrics) if is_due else run.defer_step(step, metrics))

    def on_config_update(self, ctx: LogContext, config: dict[str, Any]) -> None:
        """Log changed keys of the configuration; if there are none, the tags, notes or axes have changed."""
        run = self._run(ctx)

        def update() -> None:
            run.add_config(config, ctx)
            if not config:
                run.state.described = False
                self._describe_run(run, ctx)

        self._once(run, update)

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Close the run."""
        run = self._run(ctx)
        status = field(run_result, "status") or field(arm, "status")
        error = field(run_result, "error") or field(arm, "error")

        def ends() -> None:
            run.summarize({key: value for key, value in {"status": status, "error": error}.items() if value})
            run.state.failed = bool(error)
            run.finish()

        self._once(run, ends)
        run.close()

    def close(self) -> None:
        """Complete every file; a run whose training has ended counts as ended even without a RunEnd.

        Raises:
            OSError: See `RunLogger.close`.
        """
        self._complete_files()
        self._runs.check_written(self)

    def _complete_files(self) -> None:
        for run in self._runs.open.values():
            run.finish()
            run.close()
        for key, (state, position) in list(self._runs.rewound.items()):
            # Written after the mark, when an earlier courier closed.
            if state.path and (
                state.deferred_evals or state.needs_reorder or (state.failed is not None and not state.ended)
            ):
                at = state.deferred_evals[2] if state.deferred_evals else time.time()
                output = TrackedOutput(self._runs.savepoints, position)
                run = self._run_in(Path(state.path).parent.parent, state, output, at)
                run.finish()
                run.close()
                self._runs.ended[key] = run
                self._runs.rewound[key] = (run.state, run.output.position)

    async def settle_owed(self, deadline: float) -> None:
        """Upload what the server does not have, including earlier runs that are in the mark."""
        if self._mode == "online":
            self._complete_files()
            await self._uploader.upload_all(deadline, lambda upload: upload.scan_file(self._records))

    def mark(self) -> Any:
        """See `RunLogger.mark`; includes what the server does not have."""
        mark = super().mark()
        if self._mode != "disabled":
            mark |= {"uploads": self._uploader.snapshot(), "counted": dict(self._last_counted)}
        return mark

    def rewind(self, mark: Any) -> None:
        """See `RunLogger.rewind`; what the server does not have is pending again."""
        super().rewind(mark)
        if self._mode != "online":
            self.report_owed(0)
            return
        self._last_counted = dict(mark.get("counted", {}))
        uploads = mark.get("uploads")
        if uploads is None:  # written by 0.1.0
            uploads = {path: (Path(path).parents[2].name, 0, "") for path in mark["files"]["files"]}
        for path, (run, events, url) in uploads.items():
            upload = Upload(Path(path), run, events, None if url else self._url_handler(run, {}))
            upload.url = url
            if not path.endswith(".wandb") or upload.done:
                continue
            if not events:
                upload.scan_file(self._records)
                upload.events = upload.events_at_mark = max(1, upload.row_count)
            self._uploader.uploads[path] = upload
        self._uploader.takes_marks = True
        self._uploader.report_pending()

    @cached_property
    def _records(self) -> Records:
        return Records()

    def _run(self, handle: LoopState | LogContext) -> WandbRun:
        run = super()._run(handle)
        if run.upload is not None:
            event = self.event
            if not event.sequence or event.sequence > self._last_counted.get(event.stream, 0):
                if event.sequence:
                    self._last_counted[event.stream] = event.sequence
                run.upload.count_event()
            self._start_upload_task(run.upload)
        return run

    def _remove_runs(self, ctx: LogContext) -> Iterator[WandbRun]:
        for run in super()._remove_runs(ctx):
            run.finish()
            yield run

    def _train_ends(self, run: WandbRun, state: LoopState) -> None:
        """Close the file; a run without RunStart ends here."""
        super()._train_ends(run, state)
        run.close()
        run.log_deferred_step()
        run.state.failed = field(state, "error") is not None
        if field(run_context(state), "run_key") is None:
            run.finish()

    def _open(self, handle: LoopState | LogContext, state: WandbRunState | None, output: TrackedOutput) -> WandbRun:
        folder = ranked_folder(run_folder(handle), self._rank()) / "wandb"
        run = self._run_in(folder, state, output, self.event.time)
        self._describe_run(run, handle)
        return run

    def _run_in(self, folder: Path, state: WandbRunState | None, output: TrackedOutput, event_time: float) -> WandbRun:
        return WandbRun(
            folder,
            self._runs.savepoints,
            self._records,
            self._config.flush_secs,
            state,
            output,
            self._known,
            self._clock,
            self._new_id,
            event_time,
        )

    def _describe_run(self, run: WandbRun, handle: LoopState | LogContext) -> None:
        """Log the run's description if it is missing, and start its upload."""
        config, ctx, name = self._config, run_context(handle), run_name(handle)
        name += f"-rank{self._rank()}" if self._rank() else ""
        run.describe(
            field(ctx, "config"),
            config_of(ctx),
            fields(field(ctx, "extras")),
            project=config.project or self._default_project(handle),
            entity=config.entity,
            run_group=field(ctx, "group_name") or Path(output_dir_of(ctx)).name or None,
            job_type=config.job_type,
            display_name=name if config.name is None else f"{config.name}-{name}",
        )
        if self._mode == "online":
            self._upload(run, handle)

    def _default_project(self, handle: LoopState | LogContext) -> str:
        name = os.environ.get("WANDB_PROJECT") or Path(output_dir_of(run_context(handle))).name or run_name(handle)
        project = re.sub(r"[/\\#?%:]", "-", name)[:_MAX_PROJECT_CHARS]
        if self._logged_project != project:
            self._logged_project = project
            log().info("wandb.project", project=project, why="none was given", fix="WandbLoggerCallback(project=...)")
        return project

    def _upload(self, run: WandbRun, handle: LoopState | LogContext) -> None:
        """Start the upload of the file, and publish its URL once it is known."""
        ctx = run_context(handle)
        key = field(ctx, "run_key") or run_name(handle)
        extras: dict[str, Any] = field(ctx, "extras", {})
        path = os.path.abspath(run.log.path)  # noqa: PTH100 # the form that marks use
        upload = self._uploader.uploads.setdefault(path, Upload(run.log.path, key))
        if upload.url:
            extras.setdefault(_URL, upload.url)
        else:
            upload.on_url = self._url_handler(key, extras)
        run.log.flush()
        run.attach_upload(upload)
        self._start_upload_task(upload)

    def _start_upload_task(self, upload: Upload) -> None:
        """Ensure that a task uploads the file, unless the server has all of it."""
        now = time.monotonic()
        is_requested = upload.task_requested_at and now < upload.task_requested_at + _TASK_RETRY_SECONDS
        if upload.has_task or upload.finished or is_requested:
            return
        upload.task_requested_at, self._uploader.is_finished = now, False
        try:
            self.spawn(self._uploader.upload_live, upload, name=f"upload of {upload.file.stem}", background=True)
        except NotAttachedError:
            self._uploader.warn(upload, "nothing runs the upload: the callback is on no bus")

    def _url_handler(self, key: str, extras: dict[str, Any]) -> Callable[[str], None]:
        """Return the function that publishes the URL of a run."""

        def on_url(url: str) -> None:
            if extras.get(_URL) == url:  # a restarted courier has it from its journal
                return
            with contextlib.suppress(OSError, ValueError):  # stdout is closed
                print(f"View run at {url}", flush=True)  # noqa: T201 # for the user
            try:
                self.publish(RunAnnotated(key, {_URL: url}))
            except EvsysBusError as error:  # the upload goes on
                self._faults.warn("wandb.url_not_recorded", key, error=error, url=url)
            extras[_URL] = url

        return on_url


def _mode(mode: Mode) -> Mode:
    """Return the mode; the environment may restrict the configured one, as usual with W&B."""
    requested = os.environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or requested == "disabled":
        return "disabled"
    return "offline" if mode == "offline" or requested in {"offline", "dryrun"} else "online"
