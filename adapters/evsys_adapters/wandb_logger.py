"""`WandbLoggerCallback`: a run of W&B for each run, in W&B's own file on disk, uploaded while it is written.

<output_dir>/<run_key>/wandb/offline-run-<time>-<id>/run-<id>.wandb     what `wandb sync` takes
                                                     files/media/table/…  predictions
                                                     upload.log         what the upload said
                                                     run-<id>.wandb.uploaded     how much of it the server has
                                                     .run-<id>.wandb.at     which events it has the rows of
"""

import contextlib
import operator
import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from evsys_adapters._logged_values import config_of
from evsys_adapters._output_positions import TrackedOutput, position_file_of
from evsys_adapters._params import validate_params
from evsys_adapters._result_fields import field
from evsys_adapters._run_logger import RunLogger
from evsys_adapters._runs import num_steps_of, output_dir_of, ranked_folder, run_context, run_folder, run_name
from evsys_adapters._wandb_records import Records, needs_wandb
from evsys_adapters._wandb_run import WandbRun, WandbRunState, random_id
from evsys_adapters._wandb_upload_process import Upload
from evsys_adapters._wandb_uploader import Uploader
from evsys_bus.adapter import RunAnnotated
from evsys_bus.callback import Callback
from evsys_bus.context import ArmResult, LogContext, LoopState, RunResult, TrainingBatch
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import EvsysBusError, NotAttachedError

_URL: Final = "wandb_url"
_TASK_RETRY_SECONDS: Final = 30.0
"""Before a task for an upload is asked for again that never began."""

Mode = Literal["online", "offline", "disabled"]


class WandbLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `WandbLoggerCallback` can be told."""

    project: Annotated[str, msgspec.Meta(min_length=1)]
    entity: str | None = None
    """Default: that of the login, or ``WANDB_ENTITY``."""
    name: str | None = None
    """How the run is called; its key is put behind it. Default: the key alone."""
    mode: Mode = "online"
    """``offline`` needs no account and no network; ``wandb sync`` uploads it one day. ``WANDB_MODE`` may say less."""
    log_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Log every so many steps, and the last."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Predictions in the table of one eval."""
    job_type: str = "train"
    base_url: str | None = None
    """Of a server of your own. Default: that of the login, or ``WANDB_BASE_URL``."""
    flush_secs: Annotated[float, msgspec.Meta(ge=0)] = 5
    """How long a row may wait in memory. Where a courier delivers it does not: a row is on disk before it counts."""


class WandbLoggerCallback(RunLogger[WandbRun, WandbRunState]):
    """Logs to W&B: training over ``train/step``, each eval over a step of its own, so nothing that is late is lost.

    W&B's own step only counts rows; a row's time is that of its event, however late it is delivered. A benchmark scored
    after training goes to the run's summary, as ``final/<name>/…``. The run's group is the run's, or else the
    experiment; its notes are the hypothesis. A resumed run is the same run of W&B, and what is run again replaces what
    was. Ranks above 0 are runs of their own, called ``<name>-rank<rank>``.

    A run has finished, or failed, at W&B as its RunEnd says, or else its TrainEnd, once nothing more is expected of it.
    Where neither came, nobody knows how the run ended, and nothing is made up: all rows are uploaded, and W&B shows the
    run as running, then as crashed, its word for one that stopped reporting. (``wandb sync`` would call it failed.)

    Delivered means: in the run's file, on disk. That file is whole without an account, and where a courier delivers, a
    crash doubles no row in it and loses none: it is rewound to the last `mark`. In mode ``online`` W&B's own tool
    uploads it meanwhile, and events are owed until the server has confirmed them: see `report_owed`. What keeps the
    upload (no login, no network, a server that refuses) is besides a WARNING with the fix; it is tried again, and
    ``evsys-bus sync``, or ``wandb sync <folder>``, finishes it on any day. Once the server has told the run's URL, it
    is printed as ``View run at …``, is in ``ctx.extras["wandb_url"]``, and on record as `RunAnnotated`.

    Raises:
        ModuleNotFoundError: wandb is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "wandb_logger"
    Config: ClassVar[type | None] = WandbLoggerConfig

    def __init__(
        self,
        project: str,
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
        needs_wandb()
        self._clock = clock
        self._new_id = new_id
        self._faults = FaultLog()
        self._uploader = Uploader(self._config.base_url, self.report_owed, self._faults, patience_seconds)
        self._last_counted: dict[str, int] = {}
        """Of each stream, the last event that was counted: starts of runs are given again after a crash."""
        super().__init__(WandbRunState, self._config.max_pred_rows)
        if self._mode == "disabled":
            _disable(self)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics, if they are due."""
        del batch
        step = _as_int(step_idx)
        run = self._run(state)
        is_due = step % self._config.log_every == 0 or step + 1 == num_steps_of(state)
        self._once(run, lambda: run.add_step(step, metrics) if is_due else run.defer_step(step, metrics))

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Close the run."""
        run = self._run(ctx)
        status = field(run_result, "status") or field(arm, "status")
        error = field(run_result, "error") or field(arm, "error")

        def ends() -> None:
            run.summarize({key: value for key, value in {"status": status, "error": error}.items() if value})
            run.notes.failed = bool(error)
            run.finish()

        self._once(run, ends)
        run.close()

    def close(self) -> None:
        """Have every file complete; a run that has trained to its end has ended, though nobody announced that."""
        for run in self._runs.values():
            run.finish()
            run.close()
        for key, (state, position) in list(self._rewound.items()):
            # What was written behind the mark, when an earlier courier closed.
            if state.path and (
                state.deferred_evals or state.needs_reorder or (state.failed is not None and not state.ended)
            ):
                at = state.deferred_evals[2] if state.deferred_evals else time.time()
                run = self._run_in(Path(state.path).parent.parent, state, TrackedOutput(self._savepoints, position), at)
                run.finish()
                run.close()
                self._left[key] = run
                self._rewound[key] = (run.notes, run.output.position)

    async def settle_owed(self, deadline: float) -> None:
        """Upload what the server does not have, also of runs of an earlier day that are in the mark."""
        if self._mode == "online":
            self.close()
            await self._uploader.upload_all(deadline, lambda upload: upload.scan_file(self._records))

    def mark(self) -> Any:
        """As for every logger; and what the server does not have."""
        mark = super().mark()
        if self._mode != "disabled":
            mark |= {"uploads": self._uploader.snapshot(), "counted": dict(self._last_counted)}
        return mark

    def rewind(self, mark: Any) -> None:
        """As for every logger; and what the server does not have is owed again."""
        super().rewind(mark)
        if self._mode != "online":
            self.report_owed(0)
            return
        self._last_counted = dict(mark.get("counted", {}))
        uploads = mark.get("uploads")
        if uploads is None:  # version 0.1.0 wrote it
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
        """Put the file in order; a run that nobody announced ends here."""
        super()._train_ends(run, state)
        run.close()
        run.log_deferred_step()
        run.notes.failed = field(state, "error") is not None
        if field(run_context(state), "run_key") is None:
            run.finish()

    @staticmethod
    def _note_of(place: Path) -> Path:
        return position_file_of(place)

    def _open(self, handle: LoopState | LogContext, state: WandbRunState | None, output: TrackedOutput) -> WandbRun:
        folder = ranked_folder(run_folder(handle), self._rank()) / "wandb"
        run = self._run_in(folder, state, output, self.event.time)
        self._describe_run(run, handle)
        return run

    def _run_in(self, folder: Path, state: WandbRunState | None, output: TrackedOutput, event_time: float) -> WandbRun:
        known = (state, output, self._known)
        return WandbRun(
            folder,
            self._savepoints,
            self._records,
            self._config.flush_secs,
            *known,
            self._clock,
            self._new_id,
            event_time,
        )

    def _describe_run(self, run: WandbRun, handle: LoopState | LogContext) -> None:
        """Say what the run is, where that is not said, and have it uploaded."""
        config, ctx, name = self._config, run_context(handle), run_name(handle)
        name += f"-rank{self._rank()}" if self._rank() else ""
        run.describe(
            field(ctx, "config"),
            config_of(ctx),
            project=config.project,
            entity=config.entity,
            run_group=field(ctx, "group_name") or Path(output_dir_of(ctx)).name or None,
            job_type=config.job_type,
            display_name=name if config.name is None else f"{config.name}-{name}",
        )
        if self._mode == "online":
            self._upload(run, handle)

    def _upload(self, run: WandbRun, handle: LoopState | LogContext) -> None:
        """Have the file uploaded while it is written, and its page made known."""
        ctx = run_context(handle)
        key = field(ctx, "run_key") or run_name(handle)
        extras: dict[str, Any] = field(ctx, "extras", {})
        path = os.path.abspath(run.log.path)  # noqa: PTH100 # as the marks call it
        upload = self._uploader.uploads.setdefault(path, Upload(run.log.path, key))
        if upload.url:
            extras.setdefault(_URL, upload.url)
        else:
            upload.on_url = self._url_handler(key, extras)
        run.log.flush()
        run.attach_upload(upload)
        self._start_upload_task(upload)

    def _start_upload_task(self, upload: Upload) -> None:
        """See to it that a task uploads the file, unless it is known that the server has all."""
        now = time.monotonic()
        is_requested = upload.task_requested_at and now < upload.task_requested_at + _TASK_RETRY_SECONDS
        if upload.has_task or upload.finished or is_requested:
            return
        upload.task_requested_at, self._uploader.is_finished = now, False
        try:
            self.spawn(self._uploader.upload_live, upload, name=f"upload of {upload.file.stem}", background=True)
        except NotAttachedError:
            self._uploader.warn(upload, "nobody runs the upload: the callback is on no bus")

    def _url_handler(self, key: str, extras: dict[str, Any]) -> Callable[[str], None]:
        """What makes the page of a run known."""

        def on_url(url: str) -> None:
            if extras.get(_URL) == url:  # a courier that begins anew has it there, from its journal
                return
            with contextlib.suppress(OSError, ValueError):  # a stdout that is closed
                print(f"View run at {url}", flush=True)  # noqa: T201 # for people
            try:
                self.publish(RunAnnotated(key, {_URL: url}))
            except EvsysBusError as error:  # the upload goes on
                self._faults.warn("wandb.url_not_recorded", key, error=error, url=url)
            extras[_URL] = url

        return on_url


def _disable(callback: Callback) -> None:
    """Give it the hooks that do nothing, in the place of those of a subclass too; no bus calls them."""
    for hook in vars(Callback):
        if hook.startswith("on_"):
            setattr(callback, hook, MethodType(vars(Callback)[hook], callback))


def _mode(mode: Mode) -> Mode:
    """The environment may ask for less than the config, as everywhere with W&B."""
    requested = os.environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or requested == "disabled":
        return "disabled"
    return "offline" if mode == "offline" or requested in {"offline", "dryrun"} else "online"


def _as_int(step: Any) -> int:
    """A step as an int; a float that is whole is one. Any: what a program counts with."""
    try:
        return operator.index(step)
    except TypeError:
        number = float(step)
        if not number.is_integer():
            raise
        return int(number)
