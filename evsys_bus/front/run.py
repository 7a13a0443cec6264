"""`Run`: one run as an object that logs metrics, evals, checkpoints and content to a bus.

Every method publishes one event, which is on record when the method returns.
"""

import itertools
import os
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Self

import msgspec

from evsys_bus.bus import EventBus
from evsys_bus.bus.lifecycle import status_of
from evsys_bus.callback import dispatch
from evsys_bus.codec import error_text
from evsys_bus.codec.scalars import are_known_keys
from evsys_bus.context import (
    ArmResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunResult,
    Status,
    to_int,
)
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import BusNotOpenError, EvsysBusError, TrainingError
from evsys_bus.events import (
    Alert,
    Checkpoint,
    ConfigUpdate,
    Environment,
    EpochEnd,
    Eval,
    Event,
    Metrics,
    RunEnd,
    RunStart,
    StepEnd,
    Summary,
    TrainEnd,
    TrainStart,
)
from evsys_bus.front.content import PLAIN, ContentLogger
from evsys_bus.front.current import activated, add_open, find_open, open_runs, remove_open
from evsys_bus.front.mappings import RunConfig, RunSummary
from evsys_bus.front.resume import MANIFEST, RunFile, newest_checkpoint, now
from evsys_bus.front.rows import NO_BATCH, Row, RowPublisher, UnpublishedRows, rows_left_open, to_row
from evsys_bus.run_files import OUTPUT_FILE, RowFile, lock_folder, remove_error_file, write_error_file

Capture = Literal["auto", True, False]
_MAX_STEP: Final = (1 << 63) - 1
_MIN_STEP: Final = -_MAX_STEP
_TEXT: Final = frozenset({str})
_ENVIRONMENT_SECONDS: Final = 2.0
_EXIT_WAIT_SECONDS: Final = 0.5
"""How long leaving waits for the environment of a run that was shorter than its collection."""


class Run(ContentLogger):
    """One run on a bus. Made by `evsys_bus.run` and `EventBus.run`; used as a context manager.

    All methods may be called from any thread. In a forked child they do nothing.

    Raises:
        TrainingError: A method is called before the run was entered, or after it was left.
    """

    def __init__(
        self,
        bus: EventBus,
        state: LoopState,
        *,
        owns_bus: bool = False,
        first_step: int | None = None,
        environment: bool = True,
        output: bool = True,
        previous: RunFile | None = None,
    ) -> None:
        assert state.ctx is not None
        self.bus = bus
        self.state = state
        """Passed to hooks; ``state.step`` is the current step."""
        self.ctx: Final = state.ctx
        self.path = state.output_dir
        """The run's directory, absolute."""
        self.resumed: ManifestRow | None = None
        """The newest recorded checkpoint whose files exist, if an earlier attempt goes on."""
        self.is_open = False
        self.is_forked = False
        config = self.ctx.run_config
        self.config: Final = RunConfig(self._update_config, config)
        """The settings as plain data. ``run.config.update({...})`` records what is known only later."""
        self.summary: Final = RunSummary(self._set_summary)
        """Values of the run as a whole: ``run.summary["best"] = 0.93`` records one."""
        self._owns_bus: Final = owns_bus
        self._is_attached = False
        self._environment: Final = environment
        self._output: Final = output
        self._first_step: Final = first_step
        self._file = RunFile() if previous is None else previous
        self._is_continued: Final = previous is not None
        self._was_entered = False
        self._manifest: Final = RowFile(self.path / MANIFEST)
        self._checkpoints: Final[list[ManifestRow]] = []
        self._rows: Final = UnpublishedRows()
        self._row_publisher: Final = RowPublisher(bus, state, self._rows)
        self._next_step = 0
        self._loop_step: int | None = None
        self._first_loop_step: int | None = None
        self._is_ending = False
        self._stack: Final = ExitStack()
        self._background: threading.Thread | None = None
        self._faults = FaultLog()

    # -- what a program logs ------------------------------------------------------------------------------------------

    def log(self, metrics: Mapping[str, Any], step: int | None = None, *, commit: bool = False) -> None:
        """Log metrics of a step; may be called several times for one step, and adds to its row each time.

        The row is complete, and reaches the callbacks, with ``commit=True``, when a later step comes, or at the end.

        Args:
            metrics: Numbers by name; a large array is stored as a histogram.
            step: The step. Default: that of the loop over `steps`; without one, each call is a step of its own.
            commit: Whether this was the last part of the step.
        """
        if not (self.is_open or self._is_usable()):
            return
        try:
            part: Row = {**metrics}
        except TypeError:  # not a mapping, or with keys that are no texts
            part = to_row(metrics)
        if type(step) is not int or not _MIN_STEP <= step <= _MAX_STEP:
            step, commit = self._find_step(step, commit=commit)
        if step >= self._next_step:
            self._next_step = step + 1
        has_plain_keys = are_known_keys(part) or _TEXT.issuperset(map(type, part))
        if not (has_plain_keys and PLAIN.issuperset(map(type, part.values()))):
            part = self._plain_part(part, step)
        complete = self._rows.add(step, part, commit=commit)
        if complete is None:
            complete = self._row_publisher.add_after_left(step, part, commit=commit)
            if complete is None:
                return
        if not complete:
            self.bus.publish(Metrics(self.state, step, part))
            return
        publisher = self._row_publisher
        row = complete[-1]
        if len(complete) > 1:
            publisher.publish(complete[0])
        # Before the part, so that a run has one open row on record at most.
        publisher.publish(row, None if row.step == step else Metrics(self.state, step, part))

    def eval(self, name: str, metrics: Mapping[str, Any], *, step: int | None = None) -> None:
        """Log the result of an evaluation."""
        number = self._step_of(step)
        if self._is_usable():
            self.bus.publish(Eval(self.state, number, name, self._plain_part(to_row(metrics), number)))

    def checkpoint(
        self,
        name: str,
        *,
        state_path: str | os.PathLike[str] | None = None,
        sampler_path: str | os.PathLike[str] | None = None,
        step: int | None = None,
        epoch: int = 0,
    ) -> ManifestRow:
        """List a checkpoint in ``checkpoints.jsonl`` and publish it, once its files are complete.

        Args:
            name: Unique within the run.
            state_path: The full state, to resume from; a relative path is relative to the working directory.
            sampler_path: The weights alone.
            step: The step after which it was saved.
            epoch: The epoch, 0-based.
        """
        row = ManifestRow(name, self._step_of(step), epoch, _location(state_path), _location(sampler_path))
        if self._is_usable():
            fields = msgspec.structs.asdict(row)
            del fields["stopped"]
            self._manifest.append(fields)
            self._checkpoints.append(row)
            self._row_publisher.publish_open()
            self.bus.publish(Checkpoint(self.state, row))
        return row

    def epoch_end(self, epoch: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Log the end of a pass over the data; epochs are 0-based."""
        if self._is_usable():
            self.bus.publish(EpochEnd(self.state, _whole(epoch), self._plain_part(to_row(metrics or {}), None)))

    def alert(self, title: str, text: str = "", level: Literal["info", "warning", "error"] = "warning") -> None:
        """Log something that a person should see."""
        self._publish(Alert(self.ctx, title, text, level))

    def define_metric(self, name: str, x: str) -> None:
        """Draw a metric, or all that begin with ``name`` without a final ``*``, over another metric than the step."""
        self.ctx.extras["axes"] = {**self.ctx.extras.get("axes", {}), name: x}
        self._update_config({})

    def publish(self, event: Event) -> None:
        """Publish an event of your own, or one that has no method here."""
        self._publish(event)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def steps(self, num_steps: int | None = None) -> Generator[int]:
        """Yield the steps of the training, until a stop is requested; a resumed run begins behind its checkpoint.

        A second loop of the same run continues behind the last step of the first.

        Args:
            num_steps: How many steps the run has in all. Default: as given to `run`; if None too, without end.
        """
        if not self._is_usable():
            return
        if num_steps is not None:
            self.state.num_steps = num_steps
        first_step, end = self._first_loop_step, self.state.num_steps
        if first_step is None:
            first_step = self.state.step
        numbers: Iterator[int] = itertools.count(first_step) if end is None else iter(range(first_step, end))  # pyright: ignore[reportUnnecessaryComparison]
        if end is not None and first_step >= end:  # pyright: ignore[reportUnnecessaryComparison]
            fix = "give the number of steps of the whole run, those of earlier attempts and loops included"
            log().warning("run.no_steps_left", run=self.name, num_steps=end, next_step=first_step, fix=fix)
        try:
            for step in numbers:
                if self.state.stop_requested:
                    return
                self.state.step = self._loop_step = step
                self._first_loop_step = step + 1
                yield step
                self._row_publisher.publish_open()
        finally:
            self._loop_step = None

    @property
    def stop_requested(self) -> bool:
        """Whether a stop was requested, by `request_stop` or a callback."""
        return self.state.stop_requested

    def request_stop(self, reason: str | None = None) -> None:
        """Ask the loop to stop after the current step."""
        self.state.request_stop(reason)

    # -- facts --------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The run key: the name under which every record has the run."""
        return self.state.run_key

    @property
    def tags(self) -> tuple[str, ...]:
        """Short words to find the run by; assign to change them."""
        return tuple(self.ctx.extras.get("tags", ()))

    @tags.setter
    def tags(self, tags: Iterable[str]) -> None:
        self.ctx.extras["tags"] = [*tags]
        self._update_config({})

    @property
    def notes(self) -> str | None:
        """A text about the run; assign to change it."""
        return self.ctx.extras.get("notes")

    @notes.setter
    def notes(self, notes: str | None) -> None:
        self.ctx.extras["notes"] = notes
        self._update_config({})

    def activate(self) -> AbstractContextManager["Run"]:
        """Make this the run that `current_run` returns inside the block, where several are open."""
        return activated(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the run itself in this process and its forked children; elsewhere as one that does nothing."""
        return find_run, (os.getpid(), id(self), self.path)

    def __repr__(self) -> str:
        return f"<Run {self.name!r}, {'open' if self.is_open else 'not open'}, in {str(self.path)!r}>"

    # -- starting and ending ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._lock()
        if self._owns_bus:
            try:
                self._stack.enter_context(self.bus)
            except BaseException:
                self._stack.close()
                raise
        return self._enter()

    def __exit__(self, _: object = None, error: BaseException | None = None, __: object = None) -> None:
        try:
            self.finish(status_of(error), error)
        finally:
            self._stack.__exit__(None if error is None else type(error), error, None)

    async def __aenter__(self) -> Self:
        self._lock()
        if self._owns_bus:
            try:
                await self.bus.__aenter__()
            except BaseException:
                self._stack.close()
                raise
        try:
            return self._enter()
        except BaseException as error:
            if self._owns_bus:
                await self.bus.__aexit__(type(error), error, error.__traceback__)
            raise

    async def __aexit__(self, _: object = None, error: BaseException | None = None, __: object = None) -> None:
        try:
            self.__exit__(None, error)
        finally:
            if self._owns_bus:
                await self.bus.__aexit__(None if error is None else type(error), error, None)

    def start(self) -> Self:
        """Enter the run where no ``with`` is possible; `close` leaves it again."""
        return self.__enter__()

    def close(self, status: Status = "completed", error: BaseException | None = None) -> None:
        """Leave a run that was entered with `start`."""
        try:
            self.finish(status, error)
        finally:
            self._stack.close()

    def _lock(self) -> None:
        """Take the directory before anything is opened in it."""
        if self._was_entered:
            raise TrainingError("a run is entered once; this one was entered before", fix="open another run")
        if not (self._owns_bus or self.bus.may_call_hooks()):
            raise BusNotOpenError(
                f"the bus of the run {self.name!r} is not open", fix="`with EventBus(...) as bus:` first"
            )
        if find_open(self.path) is not None:
            raise TrainingError(
                f"this program has the run in {self.path} open already",
                why="in a notebook, a cell that was run before has opened it",
                fix="close that one first: evsys_bus.current_run().close()",
            )
        self._was_entered = True
        if not self.bus.rank:
            self._stack.enter_context(lock_folder(self.path, "the run's directory"))

    def _enter(self) -> Self:
        try:
            self._open()
            self._stack.enter_context(activated(self))
        except BaseException as error:
            with suppress(Exception):  # the error that counts is the first one
                self.finish(status_of(error), error)
            self._stack.__exit__(type(error), error, None)
            raise
        return self

    @contextmanager
    def attached(self) -> Generator[Self]:
        """Make this the current run inside the block, for a loop that publishes its starts, rows and ends itself."""
        self.is_open = self._is_attached = True
        self._rows.writer = self.bus.journal_writer
        add_open(self)
        try:
            with activated(self):
                yield self
        finally:
            self._row_publisher.publish_open()
            self.is_open = False
            remove_open(self)

    def _open(self) -> None:
        config = self.ctx.run_config
        if config is None or isinstance(config, Mapping):
            self.ctx.run_config = self.config  # so that hooks see what is added later
        if not self.bus.rank:
            if self._output:
                self._capture_output()
            self._save_start()
        self._find_first_step()
        self._rows.writer = self.bus.journal_writer
        self.is_open = True
        add_open(self)
        self.bus.runs.append(self)
        self.bus.publish(RunStart(self.ctx))
        if self._environment:
            self._background = threading.Thread(
                target=self._record_environment, name="evsys-bus-environment", daemon=True
            )
            self._background.start()
        self.bus.publish(TrainStart(self.state))
        journal = self.bus.health().journal
        if self._is_continued and journal is not None:
            for each in rows_left_open(journal.directory, self.bus.rank, self.name):
                row: Any = each.event
                dispatch(self.bus.callbacks, StepEnd.hook, self.state, row.step_idx, NO_BATCH, row.metrics)

    def _save_start(self) -> None:
        started_at = self._file.started_at or now()
        self._file = RunFile(attempts=self._file.attempts + self._is_continued, started_at=started_at)
        self._file.save(self.path)

    def _find_first_step(self) -> None:
        if self._is_continued:
            self.resumed = newest_checkpoint(self._manifest)
        first_step = self._first_step
        if first_step is None:
            first_step = 0 if self.resumed is None else self.resumed.batch + 1
        self.state.step = self._next_step = first_step
        if self._is_continued:
            log().info("run.resumed", run=self.name, first_step=first_step, attempt=self._file.attempts)

    def finish(
        self, status: Status = "completed", error: BaseException | None = None, *, implied: bool = False
    ) -> None:
        """Publish the last row and the ends of the run; its bus stays open. Does nothing if the run has ended.

        Args:
            status: How it ended.
            error: The exception that ended it; its traceback goes to ``error.txt`` unless the run was cancelled.
            implied: Whether the bus ends a run that the program has left open.
        """
        if not self.is_open or self._is_ending:
            return
        self._is_ending = True
        try:
            self._row_publisher.publish_open()
            self._row_publisher.publish_left(of_all_threads=True)
            self._join_background()
            self.state.error = error
            self._manifest.flush()
            self._publish_ends(status, error, implied=implied)
        finally:
            self.is_open = False
            remove_open(self)
            self.bus.runs.remove(self)
            if not self.bus.rank:
                self._save_end(status, error)

    def _publish_ends(self, status: Status, error: BaseException | None, *, implied: bool) -> None:
        artifacts = LoopArtifacts(
            str(self.path), str(self._manifest.path), self._checkpoints, self.state.num_steps or self._next_step
        )
        self.bus.publish(TrainEnd(self.state, artifacts))
        self._row_publisher.publish_open()  # which hooks of the end have logged
        result = RunResult(
            status=status,
            metrics=self._row_publisher.last_metrics,
            artifacts=artifacts,
            error=None if error is None else error_text(error),
            implied=implied,
        )
        arm = ArmResult(
            name=self.ctx.group_name or self.name,
            run_config=self.ctx.run_config,
            status=status,
            metrics=self._row_publisher.last_metrics,
            error=result.error,
            run_result=result,
        )
        self.bus.publish(RunEnd(self.ctx, result, arm))

    def end_implied(self, error: BaseException | None) -> None:
        """End the run because its bus is left."""
        try:
            self.finish(status_of(error), error, implied=True)
        finally:
            self._stack.close()

    def _save_end(self, status: Status, error: BaseException | None) -> None:
        if status == "failed" and error is not None:
            write_error_file(self.path, error)
        elif status == "completed":
            remove_error_file(self.path)
        # A run that was stopped before its last step goes on when the program is started again.
        stopped_early = status == "completed" and self.state.stopped_early
        self._file.status = "stopped" if stopped_early else status
        self._file.ended_at = now()
        self._file.save(self.path)

    def _is_usable(self) -> bool:
        if self.is_open:
            return True
        if self.is_forked:
            self._faults.warn(
                "run.forked", "fork", run=self.name, why="only the process that opened the run logs to it"
            )
            return False
        raise TrainingError(f"the run {self.name!r} is not open", fix="log inside its `with` block")

    def _publish(self, event: Event) -> None:
        if self._is_usable():
            self.bus.publish(event)

    def _find_step(self, step: int | None, *, commit: bool) -> tuple[int, bool]:
        """Return the step of a part, and whether its row is complete with it: a part without a step may be a row."""
        if step is not None:
            return _whole(step), commit
        step = self.state.step if self._is_attached else self._loop_step
        return (self._next_step, True) if step is None else (step, commit)

    def _step_of(self, step: int | None) -> int:
        if step is not None:
            return _whole(step)
        return self._loop_step if self._loop_step is not None else max(self._next_step - 1, 0)

    def _update_config(self, changed: dict[str, Any]) -> None:
        if self.is_open:
            self._publish(ConfigUpdate(self.ctx, changed))

    def _set_summary(self, values: dict[str, Any]) -> None:
        self._publish(Summary(self.ctx, values))

    def _capture_output(self) -> None:
        from evsys_bus.front.output import OutputCapture  # only where output is captured

        capture = OutputCapture(self.path / OUTPUT_FILE)
        capture.start()
        self._stack.callback(capture.stop)

    def _record_environment(self) -> None:
        from evsys_bus.front.environment import collect_environment  # on this thread: its imports take a while

        try:
            facts = collect_environment(timeout=_ENVIRONMENT_SECONDS)
            diff = facts.pop("diff", None)
            if diff:
                (self.path / "diff.patch").write_text(diff, encoding="utf-8", errors="replace")
            if self.is_open:
                self.bus.publish(Environment(self.ctx, facts))
        except (OSError, EvsysBusError) as error:
            log().warning("run.environment_not_recorded", run=self.name, error=error_text(error))

    def _join_background(self) -> None:
        if self._background is not None:
            self._background.join(_EXIT_WAIT_SECONDS)


def find_run(pid: int, number: int, path: Path) -> Run:
    """Return the open run if it is one of this process or its parent, else a run that does nothing."""
    for each in open_runs():
        if id(each) == number and (pid == os.getpid() or each.is_forked):
            return each
    state = LoopState(step=0, num_steps=None, output_dir=path, ctx=LogContext(path.parent, run_key=path.name))
    run = Run(EventBus(), state)
    run.is_forked = True
    return run


def _whole(step: Any) -> int:
    try:
        number = to_int(step)
        if isinstance(step, bool) or abs(number) > _MAX_STEP:
            raise OverflowError  # noqa: TRY301 # a bool is most likely meant as `commit`
        return number  # noqa: TRY300 # as above
    except Exception as error:
        raise TrainingError(
            f"the step is {step!r:.80}, which is no whole number of at most 63 bits",
            why="rows, files and charts are keyed by the step",
            fix="give an int: run.log(metrics, step=int(...))",
        ) from error


def _location(path: str | os.PathLike[str] | None) -> str | None:
    """Return a path as an absolute one, and a URL unchanged."""
    if path is None:
        return None
    text = os.fspath(path)
    return text if "://" in text else str(Path(text).expanduser().absolute())
