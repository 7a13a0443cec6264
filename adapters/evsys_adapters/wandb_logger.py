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
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from evsys_adapters._logged_values import config_of
from evsys_adapters._marks import Mark, Marks
from evsys_adapters._params import checked
from evsys_adapters._result_fields import field
from evsys_adapters._run_notes import packed, unpacked
from evsys_adapters._runs import run_context, run_folder, run_id, run_name
from evsys_adapters._wandb_records import Records, needs_wandb
from evsys_adapters._wandb_run import WandbNotes, WandbRun, random_id
from evsys_adapters._wandb_upload import Upload
from evsys_bus.callback import Callback
from evsys_bus.context import (
    ArmResult,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    Prediction,
    RunResult,
    TrainingBatch,
)
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import NotAttachedError

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


class _WandbMark(msgspec.Struct, frozen=True):
    files: Mark
    runs: dict[str, bytes]
    """Their notes."""


class WandbLoggerCallback(Callback):
    """Logs to W&B: training over ``train/step``, each eval over a step of its own, so nothing that is late is lost.

    W&B's own step only counts rows. A benchmark scored after training goes to the run's summary, as ``final/<name>/…``.
    The run's group is the run's, or else the experiment; its notes are the hypothesis. A resumed run is the same run of
    W&B, and what is run again replaces what was.

    Delivered means: in the run's file, on disk. That file is whole without an account, and where a courier delivers, a
    crash doubles no row in it and loses none: it is rewound to the last `mark`. In mode ``online`` W&B's own tool
    uploads it meanwhile. What keeps it (no login, no network, a server that refuses) is a WARNING with the fix; it is
    tried again, and ``wandb sync <folder>`` finishes it on any day. The run's URL is in ``ctx.extras["wandb_url"]``.

    Raises:
        ModuleNotFoundError: wandb is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "wandb_logger"
    Config: ClassVar[type | None] = WandbLoggerConfig
    placement: ClassVar[Literal["inline", "follow"]] = "follow"

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
    ) -> None:
        given = {key: value for key, value in locals().items() if key in WandbLoggerConfig.__struct_fields__}
        self._config = checked(WandbLoggerConfig, given)
        self._mode = _mode(self._config.mode)
        needs_wandb()
        self._clock = clock
        self._new_id = new_id
        self._marks = Marks()
        self._faults = FaultLog()
        self._runs: dict[str, WandbRun] = {}
        self._rewound: dict[str, WandbNotes] = {}
        """Runs that were known at the mark, and are still to be heard of."""

    def on_run_start(self, ctx: LogContext) -> None:
        """Begin a run of W&B, or go on with it."""
        if self._mode != "disabled":
            self._announce(self._run(ctx), ctx)

    def on_train_start(self, state: LoopState) -> None:
        """Drop what is about to be run again."""
        if self._mode != "disabled":
            run = self._run(state)
            run.begin(state.step)
            self._announce(run, state)

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Log the step's metrics, if they are due."""
        del batch
        step = operator.index(step_idx)
        if self._mode != "disabled":
            due = step % self._config.log_every == 0 or step + 1 == state.num_steps
            self._run(state).add_step(step, metrics if due else None)

    def on_eval(self, state: LoopState, step_idx: int, eval_name: str, metrics: dict[str, float]) -> None:
        """Log the eval's metrics."""
        if self._mode != "disabled":
            self._run(state).add_eval(operator.index(step_idx), str(eval_name), metrics)

    def on_benchmark_eval(
        self, ctx: LogContext, eval_result: EvalResult, predictions: list[Prediction], *, step: int | None = None
    ) -> None:
        """Log what the benchmark scored, and its predictions."""
        if self._mode != "disabled":
            at = field(eval_result, "step") if step is None else step
            self._run(ctx).add_benchmark(
                None if at is None else operator.index(at), eval_result, predictions, self._config.max_pred_rows
            )

    def on_train_end(self, state: LoopState, artifacts: LoopArtifacts) -> None:
        """Put the file in order; a run that nobody announced ends here."""
        del artifacts
        if self._mode != "disabled":
            run, ctx = self._run(state), run_context(state)
            run.notes.course.ends()
            if ctx is None or ctx.run_key is None:
                run.end(failed=getattr(state, "error", None) is not None)
            run.close()

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Close the run."""
        if self._mode != "disabled":
            run = self._run(ctx)
            status = field(run_result, "status") or field(arm, "status")
            error = field(run_result, "error") or field(arm, "error")
            run.summarize({key: value for key, value in {"status": status, "error": error}.items() if value})
            run.end(failed=bool(error))
            run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Forget the runs of the experiment."""
        del result
        inside = os.path.join(ctx.output_dir, "")  # noqa: PTH118  # with the separator, which a Path drops
        for key in [each for each in self._runs if each.startswith(inside)]:
            self._runs.pop(key).close(forget=True)
        self._rewound = {key: notes for key, notes in self._rewound.items() if not key.startswith(inside)}

    def mark(self) -> Any:
        """How far the files have got, as plain data (hence Any); their rows are on the medium.

        Raises:
            OSError: Rows wait because the disk refuses them, or were given up. There is no mark without them.
        """
        for run in self._runs.values():
            run.log.settle()
        notes = self._rewound | {key: run.notes for key, run in self._runs.items()}
        return msgspec.to_builtins(_WandbMark(self._marks.take(), packed(notes)))

    def rewind(self, mark: Any) -> None:
        """Have the files as they were at the mark. To be called first of all. Any: what `mark` returned.

        Raises:
            OSError: A file cannot be cut.
        """
        said = msgspec.convert(mark, _WandbMark)
        self._marks.rewind(said.files)
        self._rewound = unpacked(said.runs, WandbNotes)

    @cached_property
    def _records(self) -> Records:
        return Records()

    def _run(self, handle: LoopState | LogContext) -> WandbRun:
        key = run_id(handle)
        run = self._runs.get(key)
        if run is None:
            folder, notes = run_folder(handle) / "wandb", self._rewound.pop(key, None)
            parts = (folder, self._marks, self._records, self._config.flush_secs, notes, self._clock, self._new_id)
            run = self._runs[key] = WandbRun(*parts)
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
        extras: dict[str, Any] = {} if ctx is None else ctx.extras

        def heard(url: str) -> None:
            extras["wandb_url"] = url

        self._upload(run, heard)

    def _upload(self, run: WandbRun, heard: Callable[[str], None]) -> None:
        """Have the file uploaded while it is written, unless that is under way."""
        entity = self._config.entity or os.environ.get("WANDB_ENTITY")
        base = self._config.base_url or os.environ.get("WANDB_BASE_URL") or "https://wandb.ai"
        if self._mode != "online":
            return
        if entity:
            heard(f"{base.replace('://api.', '://').rstrip('/')}/{entity}/{self._config.project}/runs/{run.id}")
        if run.upload is not None and not run.upload.ended:
            return
        run.log.flush()
        upload = Upload(run.log.path, _environment(self._config.base_url), heard, self._faults)
        try:
            if self.spawn(upload.run, name=f"upload of {run.id}"):
                run.upload = upload
        except NotAttachedError:
            upload.warn("nobody runs the upload: the callback is on no bus")


def _mode(mode: Mode) -> Mode:
    """The environment may ask for less than the config, as everywhere with W&B."""
    said = os.environ.get("WANDB_MODE", "").lower()
    if mode == "disabled" or said == "disabled":
        return "disabled"
    return "offline" if mode == "offline" or said in {"offline", "dryrun"} else "online"


def _environment(base_url: str | None) -> Mapping[str, str]:
    """What keeps W&B's tool from asking, and from reporting its own errors to others."""
    return {"WANDB_ERROR_REPORTING": "false", **({"WANDB_BASE_URL": base_url} if base_url else {})}
