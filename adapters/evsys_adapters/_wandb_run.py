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
from evsys_adapters._logged_values import EVAL, TRAIN, Table, json_of, values_of
from evsys_adapters._output_notes import NotedOutput
from evsys_adapters._record_file import RecordLog
from evsys_adapters._run_logger import LoggedRun
from evsys_adapters._run_notes import UNKNOWN, RunNotes
from evsys_adapters._runs import digest, safe_name
from evsys_adapters._wandb_records import Records, row_key
from evsys_adapters._wandb_upload import Upload
from evsys_bus.files import replace_file
from evsys_bus.savepoints import Savepoints

_ID_LETTERS: Final = string.ascii_lowercase + string.digits


def random_id() -> str:
    """As W&B makes them."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(8))


class WandbNotes(RunNotes, omit_defaults=True):
    """What is known of a run besides what is in its file."""

    row: int = 0
    """The next row of the history."""
    started: float = 0.0
    """Seconds since the epoch."""
    metrics: set[str] = msgspec.field(default_factory=set[str])
    """Those that were defined."""
    summary: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """The newest values. Any: plain values."""
    ended: bool = False
    """Whether the file says that the run has ended."""
    failed: bool | None = None
    """How the run ended, by the last event that said so; None while none has."""
    held: tuple[int, dict[str, Any], float] | None = None
    """The newest step that was not due: its values and its time. It is logged if it stays the last one."""
    lines: int = -1
    """Rows in the file; -1 where the file has to be asked."""
    file: str = ""
    """Where it is."""


class WandbRun(LoggedRun[WandbNotes]):
    """The run whose file lies in this folder, or is to lie there.

    Args:
        folder: ``…/wandb`` in the run's folder.
        marks: Of the callback.
        records: Makes the records.
        flush_seconds: How long a row may wait in memory.
        notes: What was known of the run at the mark.
        output: Which events the file has the rows of.
        look: Gives what the note beside the file says, if it is newer than the mark.
        clock: What time it is, instead of the times of the events.
        new_id: Names a run of W&B.
        at: When the event was published that made the run known.
    """

    def __init__(
        self,
        folder: Path,
        marks: Savepoints,
        records: Records,
        flush_seconds: float,
        notes: WandbNotes | None,
        output: NotedOutput,
        look: Callable[[NotedOutput, Path], WandbNotes | None],
        clock: Callable[[], float] | None,
        new_id: Callable[[], str],
        at: float,
    ) -> None:
        now = at if clock is None else clock()
        found = sorted(folder.glob("offline-run-*-*/run-*.wandb"))
        if found:
            path = found[0]
            self.id = path.stem.removeprefix("run-")
        else:
            self.id = new_id()
            began = time.strftime("%Y%m%d_%H%M%S", time.localtime(now))
            path = folder / f"offline-run-{began}-{self.id}" / f"run-{self.id}.wandb"
        log = RecordLog(path, marks, records, flush_seconds)
        super().__init__(log, look(output, path) or notes or _notes_of(log, records, now), output)
        self.at = at
        if self.notes.lines < 0:
            self.notes.lines = sum(records.outline(each).row >= 0 for each in log.records())
        self.notes.file = str(path)
        self.upload: Upload | None = None
        self._records = records
        self._clock = clock

    def describe(self, config: object, plain: Mapping[str, Any], **names: str | None) -> None:
        """Say what the run is, once. Any: plain values."""
        if self.notes.described:
            return
        self.notes.described = True
        if not self.notes.started:
            self.notes.started = self._now()
            self._add(self._records.version(self.id))
        of_run = plain.get("run_config")
        flat: dict[str, Any] = {} if of_run is None else {"run_config": of_run}
        if isinstance(of_run, dict):
            flat = dict(cast("dict[str, Any]", of_run))
        if "config" in plain:
            flat["experiment" if "experiment" not in flat else "experiment_config"] = plain["config"]
        names["notes"] = hypothesis_of(config)
        self._add(self._records.run(self.id, flat, self.notes.started, **names))

    def begin(self, first_step: int) -> None:
        """As for every run; and it has not ended any more."""
        self.notes.failed = None
        super().begin(first_step)
        if self.notes.ended and self.notes.course.pending is None:
            self._reopen()

    def hold(self, step: int, metrics: object) -> None:
        """A step that is not due; logged by `release` if no later one comes."""
        self.add_step(step, None)
        if self.notes.held is None or step >= self.notes.held[0]:
            self.notes.held = (step, values_of(metrics), self.at)

    def release(self) -> None:
        """Log the last step, if it was not."""
        if self.notes.held is not None:
            (step, values, at), now = self.notes.held, self.at
            self.at = at
            self._write(TRAIN, step, values)
            self.at = now

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Have the newest values stand for the run. Any: plain values."""
        self.notes.summary |= values
        self._add(self._records.summary(self.id, self.notes.summary))

    def conclude(self) -> None:
        """Nothing more is expected: log the last step, and that the run has ended, where an event has said how."""
        self.release()
        if self.notes.failed is not None and not self.notes.ended:
            self.summarize({})
            self._add(self._records.exit(self.id, failed=self.notes.failed))
            self._set_ended(ended=True)

    def follow(self, upload: Upload) -> None:
        """Have the upload know what is in the file."""
        self.upload = upload
        upload.known, upload.lines, upload.ended = True, self.notes.lines, self.notes.ended

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        """A row: the values of one stream over its own step."""
        over = f"{stream}/step"
        row = _row(stream, step, values)
        for name in row.keys() - self.notes.metrics:
            self._add(self._records.metric(self.id, name, None if name == over else over))
            self.notes.metrics.add(name)
        now = self._now()
        times = {"_timestamp": now, "_runtime": max(0.0, now - self.notes.started)}
        if not (self.notes.course.unplaced and self._is_repeated(self._key(row, now))):
            self._add(self._records.row(self.id, self.notes.row, row | times))
            self.notes.row += 1
            self._set_lines(self.notes.lines + 1)
        if stream == TRAIN and self.notes.held is not None and step >= self.notes.held[0]:
            self.notes.held = None
        self.notes.summary |= row
        if stream != TRAIN:
            self.summarize({})

    @staticmethod
    def _key(row: Mapping[str, Any], at: float) -> int:
        return row_key({name: json_of(value) for name, value in (*row.items(), ("_timestamp", at))})

    def _rows_there(self) -> tuple[set[int], float]:
        found = [each for payload in self.log.records() if (each := self._records.timed(payload)) is not None]
        return {key for key, _ in found}, max((at for _, at in found), default=0.0)

    def _drop(self, keys: AbstractSet[int]) -> None:
        gone, timed = frozenset(keys), self._records.timed

        def kept(payloads: Iterable[bytes]) -> Iterator[bytes]:
            return (each for each in payloads if (found := timed(each)) is None or found[0] not in gone)

        self._rewrite(kept)

    def _is_there(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        return self._key(_row(stream, step, values), self._now()) in self._rows_there()[0]

    def _conclude(self, head: str, values: Mapping[str, Any]) -> None:
        self.summarize({f"{head}/{key}": value for key, value in values.items()})

    def _show(self, step: int | None, head: str, what: str, shown: Table | object) -> None:
        value = self._table(head, step, shown) if isinstance(shown, Table) else json_of(values_of(shown))
        if step is None:
            self._conclude(head, {what: value})
        else:
            self.add_eval(step, head.removeprefix(EVAL), {what: value})

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

    def _void(self, first_step: int) -> None:
        self._rewrite(lambda payloads: self._records.before(first_step, payloads))
        if self.notes.held is not None and self.notes.held[0] >= first_step:
            self.notes.held = None
        self._set_ended(ended=False)

    def _tidy(self) -> None:
        self._rewrite(self._records.tidied)

    def _reopen(self) -> None:
        """The run has not ended after all: W&B reads no further than its end."""
        self._rewrite(lambda payloads: self._records.before(math.inf, payloads))
        self._set_ended(ended=False)

    def _add(self, payload: bytes) -> None:
        if self.notes.ended:
            self._reopen()
        self.log.add(payload)

    def _rewrite(self, change: Callable[[Iterable[bytes]], Iterable[bytes]]) -> None:
        """As `RecordLog.rewrite`; what the server has is another file then."""

        def counted(payloads: Iterable[bytes]) -> Iterator[bytes]:
            lines = 0
            for payload in change(payloads):
                lines += self._records.outline(payload).row >= 0
                yield payload
            self._set_lines(lines)

        self.log.rewrite(counted)
        Upload(self.log.path, self.id).forget()

    def _set_lines(self, lines: int) -> None:
        self.notes.lines = lines
        if self.upload is not None:
            self.upload.lines = lines

    def _set_ended(self, *, ended: bool) -> None:
        self.notes.ended = ended
        if self.upload is not None:
            self.upload.ended = ended

    def _now(self) -> float:
        return self.at if self._clock is None else self._clock()


def _row(stream: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one stream over its own step, by their names at W&B. Any: plain values."""
    row: dict[str, Any] = {f"{stream}/step": step}
    for key, value in values.items():
        name = _metric_name(stream, key)
        row[name if name not in row else f"{stream}/metrics.{key}"] = value
    return row


def _metric_name(stream: str, key: str) -> str:
    """What W&B calls a metric: the stream goes before its name, but not twice, and not before another prefix.

    Two metrics of one name, and one called as the step, get ``metrics.`` besides.
    """
    if key.startswith(f"{stream}/") or (stream == TRAIN and "/" in key):
        return key
    return f"{stream}/{key}"


def _notes_of(log: RecordLog, records: Records, now: float) -> WandbNotes:
    """What the file of an earlier day says."""
    rows, lines, ended, started, any_record = -1, 0, False, None, False
    for payload in log.records():
        any_record = True
        found = records.outline(payload)
        rows, lines = max(rows, found.row), lines + (found.row >= 0)
        ended = ended or found.ends
        started = found.started if started is None else started
    if not any_record:
        return WandbNotes(lines=0)
    return WandbNotes(row=rows + 1, top=UNKNOWN, ended=ended, started=started or now, lines=lines)
