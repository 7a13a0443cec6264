"""`WandbLoggerCallback`: a run of W&B for each run, in W&B's own file on disk, uploaded while it is written.

<output_dir>/<run_key>/wandb/offline-run-<time>-<id>/run-<id>.wandb     what `wandb sync` takes
                                                     files/media/table/…  predictions
                                                     upload.log         what the upload said
"""

import operator
import os
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec

from evsys_adapters._logged_values import config_of
from evsys_adapters._params import checked
from evsys_adapters._result_fields import field
from evsys_adapters._run_logger import RunLogger
from evsys_adapters._runs import run_context, run_folder, run_name
from evsys_adapters._wandb_records import Records, needs_wandb
from evsys_adapters._wandb_run import WandbNotes, WandbRun, random_id
from evsys_adapters._wandb_upload import Upload
from evsys_bus.attached import Learnt
from evsys_bus.callback import Callback
from evsys_bus.context import ArmResult, LogContext, LoopArtifacts, LoopState, RunResult, TrainingBatch
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import EvsysBusError, NotAttachedError

_URL: Final = "wandb_url"

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


class WandbLoggerCallback(RunLogger[WandbRun, WandbNotes]):
    """Logs to W&B: training over ``train/step``, each eval over a step of its own, so nothing that is late is lost.

    W&B's own step only counts rows. A benchmark scored after training goes to the run's summary, as ``final/<name>/…``.
    The run's group is the run's, or else the experiment; its notes are the hypothesis. A resumed run is the same run of
    W&B, and what is run again replaces what was.

    Delivered means: in the run's file, on disk. That file is whole without an account, and where a courier delivers, a
    crash doubles no row in it and loses none: it is rewound to the last `mark`. In mode ``online`` W&B's own tool
    uploads it meanwhile. What keeps it (no login, no network, a server that refuses) is a WARNING with the fix; it is
    tried again, and ``wandb sync <folder>`` finishes it on any day. Once the server has told the run's URL, it is in
    ``ctx.extras["wandb_url"]``, and on record as `Learnt`.

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
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = random_id,
        patience_seconds: float = 5,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in WandbLoggerConfig.__struct_fields__}
        self._config = checked(WandbLoggerConfig, given)
        self._mode = _mode(self._config.mode)
        needs_wandb()
        self._clock = clock
        self._new_id = new_id
        self._patience_seconds = patience_seconds
        self._faults = FaultLog()
        super().__init__(WandbNotes, self._config.max_pred_rows)
        if self._mode == "disabled":
            _disable(self)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics, if they are due."""
        del batch
        step = operator.index(step_idx)
        due = step % self._config.log_every == 0 or step + 1 == state.num_steps
        self._run(state).add_step(step, metrics if due else None)

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Put the file in order; a run that nobody announced ends here."""
        ctx = run_context(state)
        if ctx is None or ctx.run_key is None:
            self._run(state).end(failed=getattr(state, "error", None) is not None)
        super().on_train_end(state, artifacts)

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Close the run."""
        run = self._run(ctx)
        status = field(run_result, "status") or field(arm, "status")
        error = field(run_result, "error") or field(arm, "error")
        run.summarize({key: value for key, value in {"status": status, "error": error}.items() if value})
        run.end(failed=bool(error))
        run.close()

    @cached_property
    def _records(self) -> Records:
        return Records()

    def _open(self, handle: LoopState | LogContext, key: str, notes: WandbNotes | None) -> WandbRun:
        del key
        folder = run_folder(handle) / "wandb"
        parts = (folder, self._marks, self._records, self._config.flush_secs, notes, self._clock, self._new_id)
        run = WandbRun(*parts)
        self._announce(run, handle)
        return run

    def _announce(self, run: WandbRun, handle: LoopState | LogContext) -> None:
        """Say what the run is, where that is not said, and have it uploaded."""
        config, ctx, name = self._config, run_context(handle), run_name(handle)
        run.describe(
            getattr(ctx, "config", None),
            config_of(ctx),
            project=config.project,
            entity=config.entity,
            run_group=getattr(ctx, "group_name", None) or (Path(ctx.output_dir).name if ctx is not None else None),
            job_type=config.job_type,
            display_name=name if config.name is None else f"{config.name}-{name}",
        )
        if self._mode == "online" and (run.upload is None or run.upload.ended):
            self._upload(run, handle)

    def _upload(self, run: WandbRun, handle: LoopState | LogContext) -> None:
        """Have the file uploaded while it is written, and its page made known."""
        ctx = run_context(handle)
        key = getattr(ctx, "run_key", None) or run_name(handle)
        extras: dict[str, Any] = {} if ctx is None else ctx.extras

        def heard(url: str) -> None:
            if extras.get(_URL) == url:  # a courier that begins anew has it there, from its journal
                return
            try:
                self.publish(Learnt(key, {_URL: url}))
            except EvsysBusError as error:  # the upload goes on
                self._faults.warn("wandb.url_not_recorded", key, error=error, url=url)
            extras[_URL] = url

        run.log.flush()
        upload = Upload(run.log.path, _environment(self._config.base_url), heard, self._faults, self._patience_seconds)
        try:
            if self.spawn(upload.run, name=f"upload of {run.id}"):
                run.upload = upload
        except NotAttachedError:
            upload.warn("nobody runs the upload: the callback is on no bus")


def _disable(callback: Callback) -> None:
    """Give it the hooks that do nothing, in the place of those of a subclass too; no bus calls them."""
    for hook in vars(Callback):
        if hook.startswith("on_"):
            setattr(callback, hook, MethodType(vars(Callback)[hook], callback))


def _mode(mode: Mode) -> Mode:
    """The environment may ask for less than the config, as everywhere with W&B."""
    said = os.environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or said == "disabled":
        return "disabled"
    return "offline" if mode == "offline" or said in {"offline", "dryrun"} else "online"


def _environment(base_url: str | None) -> Mapping[str, str]:
    """What keeps W&B's tool from asking, and from reporting its own errors to others."""
    return {"WANDB_ERROR_REPORTING": "false", **({"WANDB_BASE_URL": base_url} if base_url else {})}
