"""`TensorBoardLoggerCallback`: training, evals and predictions as TensorBoard shows them, one folder for each run.

<log_dir>/<run_key>/events.out.tfevents.0.evsys-bus      scalars ``train/<metric>``, ``eval/<name>/<metric>``; texts
"""

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Final

import msgspec

from evsys_adapters._experiment_pages import conclusion_page
from evsys_adapters._params import checked
from evsys_adapters._record_file import RecordLog
from evsys_adapters._run_logger import RunLogger
from evsys_adapters._run_notes import UNKNOWN, RunNotes
from evsys_adapters._runs import digest, run_context, run_folder, run_name
from evsys_adapters._tensorboard_events import Events, needs_tensorboardx
from evsys_adapters._tensorboard_run import TensorBoardRun
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, LoopState, RunResult

FILE: Final = "events.out.tfevents.0.evsys-bus"
"""One file for each run, whatever becomes of the processes that write it."""


class TensorBoardLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `TensorBoardLoggerCallback` can be told."""

    log_dir: str | None = None
    """Each run gets a folder in it. Default: the folder ``tensorboard`` of the experiment."""
    flush_secs: Annotated[float, msgspec.Meta(ge=0)] = 30
    """How long a row may wait in memory. Where a courier delivers it does not: a row is on disk before it counts."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Predictions in the table of one eval."""


class TensorBoardLoggerCallback(RunLogger[TensorBoardRun, RunNotes]):
    """Writes what TensorBoard reads: scalars for numbers, texts for anything else, tables of predictions.

    A benchmark that was scored after training is drawn at the last step that was trained, as ``final/<name>/…``; where
    no step is known it is a text. Scalars are 32-bit floats there. A step that comes late or again is kept; when the
    training ends the file is put in order, and of an eval that was repeated the newest remains. A resumed run continues
    its file, and what is run again is void there.

    Raises:
        ModuleNotFoundError: tensorboardX is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "tensorboard_logger"
    Config: ClassVar[type | None] = TensorBoardLoggerConfig

    def __init__(
        self,
        log_dir: str | os.PathLike[str] | None = None,
        flush_secs: float = 30,
        max_pred_rows: int = 100,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        given = {"log_dir": None if log_dir is None else os.fspath(log_dir), "flush_secs": flush_secs}
        self._config = checked(TensorBoardLoggerConfig, given | {"max_pred_rows": max_pred_rows})
        self._root = None if log_dir is None else Path.cwd() / log_dir
        needs_tensorboardx()
        self._clock = clock
        super().__init__(RunNotes, self._config.max_pred_rows)

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Remember how the run ended."""
        run = self._run(ctx)
        run.result, run.arm = run_result, arm
        run.close()

    def on_experiment_end(self, ctx: LogContext, result: ExperimentResult) -> None:
        """Write the conclusion beside every run; then forget them."""
        for run in self._leave(ctx):
            run.tell(None, "conclusion", conclusion_page(result, run.name, run.result, run.arm))
            run.close(forget=True)

    @cached_property
    def _events(self) -> Events:
        return Events(self._clock)

    def _open(self, handle: LoopState | LogContext, key: str, notes: RunNotes | None) -> TensorBoardRun:
        log = RecordLog(self._folder(handle, key) / FILE, self._marks, self._events, self._config.flush_secs)
        notes = notes or RunNotes(top=UNKNOWN if any(log.records()) else -1)
        return TensorBoardRun(run_name(handle), log, self._events, notes)

    def _announce(self, run: TensorBoardRun, handle: LoopState | LogContext) -> None:
        run.describe(run_context(handle))

    def _folder(self, handle: LoopState | LogContext, key: str) -> Path:
        """The run's folder: TensorBoard calls a run by its folder's path."""
        ctx = run_context(handle)
        if self._root is None:
            if ctx is None or ctx.run_key is None:
                return run_folder(handle) / "tensorboard"
            return Path(ctx.output_dir) / "tensorboard" / run_folder(handle).relative_to(ctx.output_dir)
        name, owner = run_name(handle), os.path.realpath(key.replace("\0", "\\0"))
        folder = self._root / name
        return folder if _claim(folder, owner) else self._root / f"{name}-{digest(owner)}"


def _claim(folder: Path, owner: str) -> bool:
    """Whether the folder is this run's, now or since an earlier day; runs of other experiments may be called alike."""
    mark = folder / ".run"
    words = os.fsencode(owner)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mark.exists() and mark.read_bytes():
            return mark.read_bytes() == words
        mark.write_bytes(words)
    except OSError:  # a disk that refuses this refuses rows as well, which wait
        pass
    return True
