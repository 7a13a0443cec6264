"""`WandbRun`: one run of W&B in its file, and the rows on their way there."""

import hashlib
import math
import secrets
import string
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_adapters._experiment_pages import hypothesis_of
from evsys_adapters._logged_run_state import UNKNOWN_STEP, LoggedRunState
from evsys_adapters._logged_values import EVAL, TRAIN, Table, json_of, values_of
from evsys_adapters._output_positions import TrackedOutput
from evsys_adapters._record_file import RecordLog
from evsys_adapters._run_logger import LoggedRun
from evsys_adapters._runs import digest, safe_name
from evsys_adapters._wandb_records import Records, row_key
from evsys_adapters._wandb_upload_process import Upload
from evsys_bus.files import replace_file
from evsys_bus.savepoints import Savepoints

_ID_LETTERS: Final = string.ascii_lowercase + string.digits


def random_id() -> str:
    """As W&B makes them."""
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
    """What is known of a run besides what is in its file."""

    next_row: int = 0
    """The next row of the history."""
    start_time: float = 0.0
    """Seconds since the epoch."""
    defined_metrics: set[str] = msgspec.field(default_factory=set[str])
    """Those that were defined."""
    summary: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """The newest values. Any: plain values."""
    ended: bool = False
    """Whether the file says that the run has ended."""
    failed: bool | None = None
    """How the run ended, by the last event that said so; None while none has."""
    deferred_evals: tuple[int, dict[str, Any], float] | None = None
    """The newest step that was not due: its values and its time. It is logged if it stays the last one."""
    row_count: int = -1
    """Rows in the file; -1 where the file has to be asked."""
    path: str = ""
    """Where it is."""


class WandbRun(LoggedRun[WandbRunState]):
    """The run whose file lies in this folder, or is to lie there.

    Args:
        folder: ``…/wandb`` in the run's folder.
        savepoints: Of the callback.
        records: Makes the records.
        flush_seconds: How long a row may wait in memory.
        state: What was known of the run at the mark.
        output: Which events the file has the rows of.
        look: Gives what the note beside the file says, if it is newer than the mark.
        clock: What time it is, instead of the times of the events.
        new_id: Names a run of W&B.
        event_time: When the event was published that made the run known.
    """

    def __init__(
        self,
        folder: Path,
        savepoints: Savepoints,
        records: Records,
        flush_seconds: float,
        state: WandbRunState | None,
        output: TrackedOutput,
        look: Callable[[TrackedOutput, Path], WandbRunState | None],
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
        super().__init__(log, look(output, path) or state or _state_from_file(log, records, now), output)
        self.event_time = event_time
        if self.notes.row_count < 0:
            self.notes.row_count = sum(records.info(each).row >= 0 for each in log.records())
        self.notes.path = str(path)
        self.upload: Upload | None = None
        self._records = records
        self._clock = clock

    def describe(self, config: object, plain: Mapping[str, Any], **names: str | None) -> None:
        """Say what the run is, once. Any: plain values."""
        if self.notes.described:
            return
        self.notes.described = True
        if not self.notes.start_time:
            self.notes.start_time = self._now()
            self._add(self._records.version(self.id))
        of_run = plain.get("run_config")
        flat: dict[str, Any] = {} if of_run is None else {"run_config": of_run}
        if isinstance(of_run, dict):
            flat = dict(cast("dict[str, Any]", of_run))
        if "config" in plain:
            flat["experiment" if "experiment" not in flat else "experiment_config"] = plain["config"]
        names["notes"] = hypothesis_of(config)
        self._add(self._records.run(self.id, flat, self.notes.start_time, **names))

    def begin(self, first_step: int) -> None:
        """As for every run; and it has not ended any more."""
        self.notes.failed = None
        super().begin(first_step)
        if self.notes.ended and self.notes.tracker.pending_start is None:
            self._reopen()

    def defer_step(self, step: int, metrics: object) -> None:
        """A step that is not due; logged by `log_deferred_step` if no later one comes."""
        self.add_step(step, None)
        if self.notes.deferred_evals is None or step >= self.notes.deferred_evals[0]:
            self.notes.deferred_evals = (step, values_of(metrics), self.event_time)

    def log_deferred_step(self) -> None:
        """Log the last step, if it was not."""
        if self.notes.deferred_evals is not None:
            (step, values, event_time), now = self.notes.deferred_evals, self.event_time
            self.event_time = event_time
            self._write(TRAIN, step, values)
            self.event_time = now

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Have the newest values stand for the run. Any: plain values."""
        self.notes.summary |= values
        self._add(self._records.summary(self.id, self.notes.summary))

    def finish(self) -> None:
        """Nothing more is expected: log the last step, and that the run has ended, where an event has said how."""
        self.log_deferred_step()
        if self.notes.failed is not None and not self.notes.ended:
            self.summarize({})
            self._add(self._records.exit(self.id, failed=self.notes.failed))
            self._set_ended(ended=True)

    def attach_upload(self, upload: Upload) -> None:
        """Have the upload know what is in the file."""
        self.upload = upload
        upload.is_tracked, upload.row_count, upload.ended = True, self.notes.row_count, self.notes.ended

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        """A row: the values of one stream over its own step."""
        step_name = f"{stream}/step"
        row = _row(stream, step, values)
        for name in row.keys() - self.notes.defined_metrics:
            self._add(self._records.metric(self.id, name, None if name == step_name else step_name))
            self.notes.defined_metrics.add(name)
        now = self._now()
        times = {"_timestamp": now, "_runtime": max(0.0, now - self.notes.start_time)}
        if not (self.notes.tracker.position_unknown and self._is_repeated(self._key(row, now))):
            self._add(self._records.row(self.id, self.notes.next_row, row | times))
            self.notes.next_row += 1
            self._set_row_count(self.notes.row_count + 1)
        if stream == TRAIN and self.notes.deferred_evals is not None and step >= self.notes.deferred_evals[0]:
            self.notes.deferred_evals = None
        self.notes.summary |= row
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
        """Put the predictions into a file of the run; what names it in a row. Any: plain values."""
        data = json_of({"columns": table.columns, "data": table.rows, "caption": table.caption}).encode()
        name = f"{safe_name(head)}-{digest(head)}_{'final' if step is None else step}.table.json"
        path = f"media/table/{name}"
        file = self.log.path.parent / "files" / path
        replace_file(file, data, mode=0o666)
        self._add(self._records.file(self.id, path))
        return {
            "_type": "table-file",
            "path": path,
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "ncols": len(table.columns),
            "nrows": len(table.rows),
            "caption": table.caption,
        }

    def _void_from(self, first_step: int) -> None:
        self._rewrite(lambda payloads: self._records.without_steps_from(first_step, payloads))
        if self.notes.deferred_evals is not None and self.notes.deferred_evals[0] >= first_step:
            self.notes.deferred_evals = None
        self._set_ended(ended=False)

    def _reorder(self) -> None:
        self._rewrite(self._records.without_replaced_evals)

    def _reopen(self) -> None:
        """The run has not ended after all: W&B reads no further than its end."""
        self._rewrite(lambda payloads: self._records.without_steps_from(math.inf, payloads))
        self._set_ended(ended=False)

    def _add(self, payload: bytes) -> None:
        if self.notes.ended:
            self._reopen()
        self.log.add(payload)

    def _rewrite(self, change: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """As `RecordLog.rewrite`; what the server has is another file then."""

        def counted(payloads: Iterable[bytes]) -> Iterator[bytes]:
            row_count = 0
            for payload in change(payloads):
                row_count += self._records.info(payload).row >= 0
                yield payload
            self._set_row_count(row_count)

        self.log.rewrite(counted)
        Upload(self.log.path, self.id).clear_markers()

    def _set_row_count(self, row_count: int) -> None:
        self.notes.row_count = row_count
        if self.upload is not None:
            self.upload.row_count = row_count

    def _set_ended(self, *, ended: bool) -> None:
        self.notes.ended = ended
        if self.upload is not None:
            self.upload.ended = ended

    def _now(self) -> float:
        return self.event_time if self._clock is None else self._clock()


def _row(stream: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one stream over its own step, by their names at W&B. Any: plain values."""
    row: dict[str, Any] = {f"{stream}/step": step}
    for key, value in values.items():
        name = _metric_name(stream, key)
        row[name if name not in row else f"{stream}/metrics.{key}"] = value
    return row


def _metric_name(stream: str, key: str) -> str:
    """What W&B calls a metric: the stream goes before its name, but not twice, and not before another prefix.

    Two metrics of one name, and one called as the step, get ``defined_metrics.`` besides.
    """
    if key.startswith(f"{stream}/") or (stream == TRAIN and "/" in key):
        return key
    return f"{stream}/{key}"


def _state_from_file(log: RecordLog, records: Records, now: float) -> WandbRunState:
    """What the file of an earlier day says."""
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
