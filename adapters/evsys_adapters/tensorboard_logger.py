"""`TensorBoardLoggerCallback`: training, evals and predictions in TensorBoard's format, one folder per run.

<log_dir>/<run_key>/events.out.tfevents.<n>.evsys-bus      scalars ``train/<metric>``, ``eval/<name>/<metric>``; texts

n counts how often the file was sorted; see `_tensorboard_run`.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

import msgspec

from evsys_adapters._experiment_pages import conclusion_page
from evsys_adapters._logged_run_state import UNKNOWN_STEP, LoggedRunState
from evsys_adapters._output_lease import OutputCandidates, OutputLease, is_of_run, owner_of
from evsys_adapters._output_positions import TrackedOutput, position_file_in
from evsys_adapters._params import check_local_path, validate_params
from evsys_adapters._record_file import RecordLog
from evsys_adapters._run_logger import RunLogger
from evsys_adapters._runs import (
    digest,
    experiment_folder,
    ranked_folder,
    run_context,
    run_folder,
    run_key,
    run_name,
)
from evsys_adapters._tensorboard_events import Events, needs_tensorboardx
from evsys_adapters._tensorboard_run import FIRST_NAME, EventFiles, TensorBoardRun
from evsys_bus.context import ArmResult, ExperimentResult, LogContext, LoopState, RunResult
from evsys_bus.errors import EvsysBusError, RetryLaterError
from evsys_bus.location import local_path

FILE: Final = FIRST_NAME
"""The event file of a run, continued by every process that logs it; a file that was sorted has another number."""


class TensorBoardLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `TensorBoardLoggerCallback`."""

    log_dir: str | None = None
    """Parent of the runs' folders, a local path. Default: the folder ``tensorboard`` of the experiment."""
    flush_secs: Annotated[float, msgspec.Meta(ge=0)] = 30
    """How long a row may stay in memory. Behind a courier, rows are synced before they count as delivered."""
    max_pred_rows: Annotated[int, msgspec.Meta(ge=0)] = 100
    """Maximum number of predictions in the table of one eval."""

    def __post_init__(self) -> None:
        """Reject URLs and placeholders; none are replaced."""
        if self.log_dir is not None:
            check_local_path(self.log_dir, "log_dir")


class TensorBoardLoggerCallback(RunLogger[TensorBoardRun, LoggedRunState]):
    """Logs runs in TensorBoard's format: scalars for numbers, texts for anything else, tables of predictions.

    A benchmark that was scored after training is logged at the last trained step, as ``final/<name>/…``; if no step is
    known, as a text. Scalars are 32-bit floats. Wall times are those of the events, whenever they are delivered. A
    training metric whose key contains a ``/`` has that key as its tag.

    Rows of late or repeated steps are retained; of a repeated eval only the newest one is. TensorBoard's fast loader,
    the default on Linux and macOS with x86 processors, drops the points before a late row. So a file with late rows is
    sorted while the run continues, and gets a new name, which that loader then reads. The other loader
    (``--load_fast=false``) does not need this: started later, it shows every point; already running, it stays with the
    old name and shows the rest after a restart, or with TensorFlow installed shows each point twice.

    A resumed run continues its file; steps that are run again are void there. Ranks above 0 are separate runs, in a
    subfolder ``rank<rank>``. If two adapters log one run, the second one's folder is ``<run>-2``, also in later
    processes; a WARNING names it. An adapter with a new name continues in the folder of one that is no longer
    subscribed.

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
        clock: Callable[[], float] | None = None,
    ) -> None:
        params = {"log_dir": None if log_dir is None else os.fspath(log_dir), "flush_secs": flush_secs}
        root = None if log_dir is None else local_path(log_dir, "log_dir")
        self._config = validate_params(TensorBoardLoggerConfig, params | {"max_pred_rows": max_pred_rows})
        self._root = root
        needs_tensorboardx()
        self._clock = clock
        self._lock = threading.RLock()
        self._reorder_scheduled = False
        super().__init__(LoggedRunState, self._config.max_pred_rows)

    def on_run_end(self, ctx: LogContext, run_result: RunResult, arm: ArmResult) -> None:
        """Remember how the run ended."""
        run = self._run(ctx)
        run.result, run.arm = run_result, arm
        run.close()

    def close(self) -> None:
        """Sort every file if needed, write buffered rows, and close it; a later hook continues."""
        with self._lock:
            self._reorder_scheduled = False
            super().close()
            for run in self._runs.values():
                run.lease = None

    def mark(self) -> Any:
        """See `RunLogger.mark`; files with late rows are sorted first if that is due."""
        with self._lock:
            self._reorder_when_due()
            return super().mark()

    def rewind(self, mark: Any) -> None:
        """See `RunLogger.rewind`; a file that was sorted after the mark is replaced by its predecessor."""
        with self._lock:
            super().rewind(mark)
            for folder in {Path(file).parent for file in self._savepoints.files}:
                EventFiles(folder, self._savepoints)

    def _run(self, handle: LoopState | LogContext) -> TensorBoardRun:
        with self._lock:
            run = super()._run(handle)
            if run.lease is None or not run.lease.is_held:
                run = self._renew_lease(handle, run)
            return run

    def _renew_lease(self, handle: LoopState | LogContext, run: TensorBoardRun) -> TensorBoardRun:
        """Acquire the run's folder again after it was released; another adapter may write it by now."""
        try:
            folder, run.lease = self._candidates(handle).acquire_if_followed()
            previous = self._known_in(folder, run.output)
            if previous is not None or folder != run.log.path.parent:
                again = self._opened(run.name, folder, run.lease, previous or run.notes, run.output)
                again.result, again.arm, again.event_time = run.result, run.arm, run.event_time
                run = self._runs[self._key(handle)] = again
        except OSError as error:
            run.lease = None
            raise RetryLaterError(f"the folder of {run.name} cannot be claimed: {error}") from error
        return run

    def _open(
        self, handle: LoopState | LogContext, state: LoggedRunState | None, output: TrackedOutput
    ) -> TensorBoardRun:
        folder, lease = self._candidates(handle).acquire_if_followed()
        known = self._known_in(folder, output)
        return self._opened(run_name(handle), folder, lease, known or state, output)

    def _known_in(self, folder: Path, output: TrackedOutput) -> LoggedRunState | None:
        return self._known(output, folder, [folder / name for name in EventFiles.names_in(folder)])

    def _opened(
        self, name: str, folder: Path, claim: OutputLease, notes: LoggedRunState | None, output: TrackedOutput
    ) -> TensorBoardRun:
        files, events = EventFiles(folder, self._savepoints), Events(self._clock)
        log = RecordLog(files.newest, self._savepoints, events, self._config.flush_secs)
        notes = notes or LoggedRunState(largest_step=UNKNOWN_STEP if any(log.records()) else -1)
        run = TensorBoardRun(name, files, log, events, notes, output, self._lock, self._schedule_reorder)
        run.lease = claim
        return run

    def _experiment_ends(self, run: TensorBoardRun, result: ExperimentResult) -> None:
        """Log the conclusion."""
        run.add_text(None, "conclusion", conclusion_page(result, run.name, run.result, run.arm))

    @staticmethod
    def _note_of(place: Path) -> Path:
        return position_file_in(place)

    def _candidates(self, handle: LoopState | LogContext) -> OutputCandidates:
        folder = ranked_folder(self._folder(handle), self._rank())
        return OutputCandidates(
            self, owner_of(handle), [folder], self._savepoints, "give each run a log_dir of its own", is_folder=True
        )

    def _schedule_reorder(self) -> None:
        """Have files with late rows sorted once that is due, even if no further row comes."""
        if self._reorder_scheduled or not self.evsys_attached:
            return
        try:
            self._reorder_scheduled = self.spawn(self._reorder_later, name="order of event files", background=True)
        except EvsysBusError:  # the bus is closing, and closes the files
            pass

    async def _reorder_later(self) -> None:
        wait: float | None = 0.0
        try:
            while wait is not None:
                await asyncio.sleep(wait)
                with self._lock:
                    wait = self._reorder_when_due()
                    self._reorder_scheduled = wait is not None
        except asyncio.CancelledError:
            self._reorder_scheduled = False
            raise

    def _reorder_when_due(self) -> float | None:
        """Sort files if that is due; returns the seconds until the next one is, None if all are in order."""
        waits = [wait for run in self._runs.values() if (wait := run.reorder_when_due()) is not None]
        return min(waits, default=None)

    def _describe_run(self, run: TensorBoardRun, handle: LoopState | LogContext) -> None:
        run.describe(run_context(handle))

    def _folder(self, handle: LoopState | LogContext) -> Path:
        """Return the run's folder: TensorBoard names a run by the path of its folder."""
        if self._root is None:
            own = run_folder(handle)
            if run_key(handle) is None:
                return own / "tensorboard"
            root = experiment_folder(handle)
            return root / "tensorboard" / own.relative_to(root)
        name, owner = run_name(handle), owner_of(handle)
        folder = self._root / name
        return folder if is_of_run(folder, owner) else self._root / f"{name}-{digest(owner)}"
