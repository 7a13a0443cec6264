"""`WandbRun`: one W&B run and the rows on their way to its file."""

import math
import secrets
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_adapters.common.hook_arguments import field, fields, list_or_empty
from evsys_adapters.common.logged_content import Content
from evsys_adapters.common.logged_values import EVAL, TRAIN, Table, json_of, prefixed, values_of
from evsys_adapters.output_files.experiment_pages import hypothesis_of
from evsys_adapters.output_files.output_positions import TrackedOutput
from evsys_adapters.output_files.record_file import RecordLog
from evsys_adapters.output_files.run_logger import UNKNOWN_STEP, LoggedRun, LoggedRunState
from evsys_adapters.wandb_files.media import media_of, write_table
from evsys_adapters.wandb_files.records import Records, row_key
from evsys_adapters.wandb_files.upload_process import Upload
from evsys_bus.diagnostics import log
from evsys_bus.savepoints import Savepoints

_ID_LETTERS: Final = string.ascii_lowercase + string.digits


MEDIA: Final = "media"
"""The stream of content."""


def random_id() -> str:
    """Return a random run ID in W&B's format."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(8))


class WandbRunState(
    LoggedRunState,
    omit_defaults=True,
    rename={
        "next_row": "row",
        "start_time": "started",
        "defined_metrics": "metrics",
        "row_count": "lines",
        "path": "file",
    },
):
    """State of a run that is not in its file."""

    next_row: int = 0
    """Number of the next history row."""
    start_time: float = 0.0
    """Seconds since the epoch."""
    defined_metrics: set[str] = msgspec.field(default_factory=set[str])
    """Metrics that are defined in the file."""
    summary: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """The newest values."""
    ended: bool = False
    """Whether the file contains the end of the run."""
    failed: bool | None = None
    """Whether the run failed, from the last event that ended it; None before one did."""
    deferred_evals: tuple[int, dict[str, Any], float] | None = None
    """The newest step that was not due, with its values and time; logged if no later one follows."""
    row_count: int = -1
    """Rows in the file; -1 if they have to be counted."""
    path: str = ""
    """Path of the file."""
    axes: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    """The x axis of metrics, by name or by a beginning with ``*``, as the program has defined them."""
    config_updates: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """All changes of the configuration so far."""
    remarks: set[str] = msgspec.field(default_factory=set[str])
    """What was logged about content that W&B does not show as it is."""


class WandbRun(LoggedRun[WandbRunState]):
    """A run whose file is in this folder, or will be created there.

    Args:
        folder: ``…/wandb`` in the run's folder.
        savepoints: The callback's savepoints.
        records: Encodes the records.
        flush_seconds: How long a row may stay in memory.
        state: The run's state from the mark.
        output: Which events the file has the rows of.
        load_state: Returns the state from the note beside the file if it is newer than the mark.
        clock: The wall time of rows. Default: the times of the events.
        new_id: Returns an ID for a new run.
        event_time: Publication time of the run's first event.
    """

    def __init__(
        self,
        folder: Path,
        savepoints: Savepoints,
        records: Records,
        flush_seconds: float,
        state: WandbRunState | None,
        output: TrackedOutput,
        load_state: Callable[[TrackedOutput, Path], WandbRunState | None],
        clock: Callable[[], float] | None,
        new_id: Callable[[], str],
        event_time: float,
    ) -> None:
        now = event_time if clock is None else clock()
        found = sorted(folder.glob("offline-run-*-*/run-*.wandb"))
        if found:
            path = found[0]
            self.id = path.stem.removeprefix("run-")
        else:
            self.id = new_id()
            start = time.strftime("%Y%m%d_%H%M%S", time.localtime(now))
            path = folder / f"offline-run-{start}-{self.id}" / f"run-{self.id}.wandb"
        log = RecordLog(path, savepoints, records, flush_seconds)
        super().__init__(log, load_state(output, path) or state or _state_from_file(log, records, now), output)
        self.event_time = event_time
        if self.state.row_count < 0:
            self.state.row_count = sum(records.info(each).row >= 0 for each in log.records())
        self.state.path = str(path)
        self.upload: Upload | None = None
        self._records = records
        self._clock = clock

    def describe(
        self, config: object, plain: Mapping[str, Any], extras: Mapping[str, Any], **names: str | None
    ) -> None:
        """Log the run's description, once."""
        if self.state.described:
            return
        self.state.described = True
        if not self.state.start_time:
            self.state.start_time = self._now()
            self._add(self._records.version(self.id))
        of_run = plain.get("run_config")
        flat: dict[str, Any] = {} if of_run is None else {"run_config": of_run}
        if isinstance(of_run, dict):
            flat = dict(cast("dict[str, Any]", of_run))
        if "config" in plain:
            flat["experiment" if "experiment" not in flat else "experiment_config"] = plain["config"]
        names["notes"] = str(extras.get("notes") or "") or hypothesis_of(config)
        tags = [str(each) for each in list_or_empty(extras.get("tags"))]
        self._add(self._records.run(self.id, flat, self.state.start_time, tags, **names))
        if self.state.config_updates:
            self._add(self._records.config(self.id, self.state.config_updates))
        self.set_axes(extras.get("axes"))

    def set_axes(self, axes: object) -> None:
        """Set the x axis of metrics; those that are defined already are defined again with their next row."""
        named = {str(name): str(axis) for name, axis in fields(axes).items()}
        if named != self.state.axes:
            self.state.axes = named
            self.state.defined_metrics = {name for name in self.state.defined_metrics if not self._axes_of(name)}

    def add_config(self, changed: Mapping[str, Any], ctx: object) -> None:
        """See `LoggedRun.add_config`."""
        self.set_axes(field(field(ctx, "extras"), "axes"))
        if changed:
            values = values_of(changed)
            self.state.config_updates |= values
            self._add(self._records.config(self.id, values))

    def add_summary(self, values: object) -> None:
        """See `LoggedRun.add_summary`; the names are those that the program has given."""
        self.summarize(values_of(values))

    def add_alert(self, title: str, text: str, level: str) -> None:
        """See `LoggedRun.add_alert`; W&B notifies the user when the record is uploaded."""
        self._add(self._records.alert(self.id, title, text, level))

    def begin(self, first_step: int) -> None:
        """See `LoggedRun.begin`; a run that had ended continues."""
        self.state.failed = None
        super().begin(first_step)
        if self.state.ended and self.state.tracker.pending_start is None:
            self._void_from(math.inf)

    def defer_step(self, step: int, metrics: object) -> None:
        """Record a step that is not due; `log_deferred_step` logs it if no later one follows."""
        self.add_step(step, None)
        if self.state.deferred_evals is None or step >= self.state.deferred_evals[0]:
            self.state.deferred_evals = (step, values_of(metrics), self.event_time)

    def log_deferred_step(self) -> None:
        """Log the last step if it was not due."""
        if self.state.deferred_evals is not None:
            (step, values, event_time), now = self.state.deferred_evals, self.event_time
            self.event_time = event_time
            self._write(TRAIN, step, values)
            self.event_time = now

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Add values to the run's summary."""
        self.state.summary |= values
        self._add(self._records.summary(self.id, self.state.summary))

    def finish(self) -> None:
        """Log the last step, and the end of the run if an event has announced it."""
        self.log_deferred_step()
        if self.state.failed is not None and not self.state.ended:
            self.summarize({})
            self._add(self._records.exit(self.id, failed=self.state.failed))
            self.state.ended = True
            self._update_upload()

    def attach_upload(self, upload: Upload) -> None:
        """Attach the file's upload, which needs the number of rows."""
        self.upload = upload
        upload.is_tracked = True
        self._update_upload()

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        """See `LoggedRun._write`; a row has the values of one stream and its own step."""
        step_name = f"{stream}/step"
        row = _row(stream, step, values)
        for name in row.keys() - self.state.defined_metrics:
            axis = next((each for each in self._axes_of(name) if each in row and each != name), None)
            step_metric = axis or (None if name == step_name else step_name)
            self._add(self._records.metric(self.id, name, step_metric, replaces=axis is not None))
            self.state.defined_metrics.add(name)
        now = self._now()
        times = {"_timestamp": now, "_runtime": max(0.0, now - self.state.start_time)}
        if not (self.state.tracker.position_unknown and self._is_repeated(self._key(row, now))):
            self._add(self._records.row(self.id, self.state.next_row, row | times))
            self.state.next_row += 1
            self.state.row_count += 1
            self._update_upload()
        if stream == TRAIN and self.state.deferred_evals is not None and step >= self.state.deferred_evals[0]:
            self.state.deferred_evals = None
        self.state.summary |= row
        if stream != TRAIN:
            self.summarize({})

    @staticmethod
    def _key(row: Mapping[str, Any], at: float) -> int:
        return row_key({name: json_of(value) for name, value in (*row.items(), ("_timestamp", at))})

    def _existing_rows(self) -> tuple[set[int], float]:
        found = [each for payload in self.log.records() if (each := self._records.key_and_time(payload)) is not None]
        return {key for key, _ in found}, max((at for _, at in found), default=0.0)

    def _drop_rows(self, keys: AbstractSet[int]) -> None:
        dropped, key_and_time = frozenset(keys), self._records.key_and_time

        def retained(payloads: Iterable[bytes]) -> Iterator[bytes]:
            return (each for each in payloads if (found := key_and_time(each)) is None or found[0] not in dropped)

        self._rewrite(retained)

    def _has_row(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        return self._key(_row(stream, step, values), self._now()) in self._existing_rows()[0]

    def _write_final_scores(self, head: str, values: Mapping[str, Any]) -> None:
        self.summarize({f"{head}/{key}": value for key, value in values.items()})

    def _write_attachment(self, step: int | None, head: str, kind: str, content: Table | object) -> None:
        value = self._table(head, step, content) if isinstance(content, Table) else json_of(values_of(content))
        if step is None:
            self._write_final_scores(head, {kind: value})
        else:
            self.add_eval(step, head.removeprefix(EVAL), {kind: value})

    def _table(self, head: str, step: int | None, table: Table) -> dict[str, Any]:
        """Write the predictions to a file of the run; returns the row value that refers to it."""
        value = write_table(self._media_root, head, step, table)
        self._add(self._records.file(self.id, value["path"]))
        return value

    def _write_content(self, step: int, content: Content) -> None:
        """See `LoggedRun._write_content`; a row of the stream ``media``, and the files that it refers to."""
        found = media_of(self._media_root, step, content)
        name = content.name if isinstance(found.value, dict) else f"{content.kind}/{content.name}"  # one type per name
        values = {name: found.value}
        if self.state.tracker.pending_start is not None:
            self._resolve_pending_start(is_logged=self._has_row(MEDIA, step, values))
        if found.remark and found.remark not in self.state.remarks:
            self.state.remarks.add(found.remark)
            log().info("wandb.content_as_file", run=self.id, name=content.name, why=found.remark)
        for path in found.files:
            self._add(self._records.file(self.id, path))
        self._write(MEDIA, step, values)

    @property
    def _media_root(self) -> Path:
        return self.log.path.parent / "files"

    def _axes_of(self, name: str) -> list[str]:
        """Return the possible names of the axis that the program has defined for a metric."""
        for pattern, axis in self.state.axes.items():
            for each in (pattern, prefixed(TRAIN, pattern)):
                if name.startswith(each[:-1]) if each.endswith("*") else name == each:
                    return [axis, prefixed(TRAIN, axis)]
        return []

    def add_sample(self, step: int, values: object) -> None:
        """See `LoggedRun.add_sample`; one that comes after the end of the run is left out, and does not reopen it."""
        with self.lock:
            if not self.state.ended:
                super().add_sample(step, values)

    def _void_from(self, first_step: float) -> None:
        """See `LoggedRun._void_from`; also removes the end of the run, because W&B reads no further."""
        self._rewrite(lambda payloads: self._records.without_steps_from(first_step, payloads))
        if self.state.deferred_evals is not None and self.state.deferred_evals[0] >= first_step:
            self.state.deferred_evals = None
        self.state.ended = False
        self._update_upload()

    def _reorder(self) -> None:
        self._rewrite(self._records.without_replaced_evals)
        self.state.needs_reorder = False

    def _add(self, payload: bytes) -> None:
        if self.state.ended:
            self._void_from(math.inf)
        self.log.add(payload)

    def _rewrite(self, change: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """See `RecordLog.rewrite`; the server then has an outdated file."""

        def counted(payloads: Iterable[bytes]) -> Iterator[bytes]:
            row_count = 0
            for payload in change(payloads):
                row_count += self._records.info(payload).row >= 0
                yield payload
            self.state.row_count = row_count
            self._update_upload()

        self.log.rewrite(counted)
        Upload(self.log.path, self.id).clear_markers()

    def _update_upload(self) -> None:
        if self.upload is not None:
            self.upload.row_count, self.upload.ended = self.state.row_count, self.state.ended

    def _now(self) -> float:
        return self.event_time if self._clock is None else self._clock()


def _row(stream: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of one stream and its step, by their names at W&B."""
    row: dict[str, Any] = {f"{stream}/step": step}
    for key, value in values.items():
        name = prefixed(stream, key)
        row[name if name not in row else f"{stream}/metrics.{key}"] = value
    return row


def _state_from_file(log: RecordLog, records: Records, now: float) -> WandbRunState:
    """Determine the state of a run from its existing file."""
    last_row, row_count, ended, start_time, any_record = -1, 0, False, None, False
    for payload in log.records():
        any_record = True
        found = records.info(payload)
        last_row, row_count = max(last_row, found.row), row_count + (found.row >= 0)
        ended = ended or found.is_exit
        start_time = found.start_time if start_time is None else start_time
    if not any_record:
        return WandbRunState(row_count=0)
    return WandbRunState(
        next_row=last_row + 1, largest_step=UNKNOWN_STEP, ended=ended, start_time=start_time or now, row_count=row_count
    )
