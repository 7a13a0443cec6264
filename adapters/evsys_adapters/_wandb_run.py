"""`WandbRun`: one run of W&B in its file, and the rows on their way there."""

import hashlib
import secrets
import string
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_adapters._experiment_pages import hypothesis_of
from evsys_adapters._logged_values import EVAL, TRAIN, Table, json_of, values_of
from evsys_adapters._marks import Marks
from evsys_adapters._record_file import RecordLog
from evsys_adapters._run_logger import LoggedRun
from evsys_adapters._run_notes import UNKNOWN, RunNotes
from evsys_adapters._runs import digest, safe_name
from evsys_adapters._wandb_records import Records
from evsys_adapters._wandb_upload import Upload

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


class WandbRun(LoggedRun[WandbNotes]):
    """The run whose file lies in this folder, or is to lie there."""

    def __init__(
        self,
        folder: Path,
        marks: Marks,
        records: Records,
        flush_seconds: float,
        notes: WandbNotes | None,
        clock: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        found = sorted(folder.glob("offline-run-*-*/run-*.wandb"))
        if found:
            path = found[0]
            self.id = path.stem.removeprefix("run-")
        else:
            self.id = new_id()
            began = time.strftime("%Y%m%d_%H%M%S", time.localtime(clock()))
            path = folder / f"offline-run-{began}-{self.id}" / f"run-{self.id}.wandb"
        log = RecordLog(path, marks, records, flush_seconds)
        super().__init__(log, notes or _notes_of(log, records, clock))
        self.upload: Upload | None = None
        self._records = records
        self._clock = clock

    def describe(self, config: object, plain: Mapping[str, Any], **names: str | None) -> None:
        """Say what the run is, once. Any: plain values."""
        if self.notes.described:
            return
        self.notes.described = True
        if not self.notes.started:
            self.notes.started = self._clock()
            self.log.add(self._records.version(self.id))
        of_run = plain.get("run_config")
        flat: dict[str, Any] = {} if of_run is None else {"run_config": of_run}
        if isinstance(of_run, dict):
            flat = dict(cast("dict[str, Any]", of_run))
        if "config" in plain:
            flat["experiment" if "experiment" not in flat else "experiment_config"] = plain["config"]
        names["notes"] = hypothesis_of(config)
        self.log.add(self._records.run(self.id, flat, self.notes.started, **names))

    def begin(self, first_step: int) -> None:
        """As for every run; and it has not ended any more."""
        if self.notes.starts(first_step) or self.notes.ended:
            self._void(first_step)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Have the newest values stand for the run. Any: plain values."""
        self.notes.summary |= values
        self.log.add(self._records.summary(self.id, self.notes.summary))

    def end(self, *, failed: bool) -> None:
        """The run is over."""
        self.summarize({})
        self.log.add(self._records.exit(self.id, failed=failed))
        self.notes.ended = True

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        """A row: the values of one stream over its own step."""
        over = f"{stream}/step"
        row: dict[str, Any] = {over: step}
        row |= {f"{stream}/{key if key != 'step' else 'metrics.step'}": value for key, value in values.items()}
        for name in row.keys() - self.notes.metrics:
            self.log.add(self._records.metric(self.id, name, None if name == over else over))
            self.notes.metrics.add(name)
        now = self._clock()
        times = {"_timestamp": now, "_runtime": max(0.0, now - self.notes.started)}
        self.log.add(self._records.row(self.id, self.notes.row, row | times))
        self.notes.row += 1
        self.notes.summary |= row
        if stream != TRAIN:
            self.summarize({})

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
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        self.log.add(self._records.file(self.id, path))
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
        self.log.rewrite(lambda payloads: self._records.before(first_step, payloads))
        self.notes.ended = False
        synced = self.log.path.with_suffix(".wandb.synced")
        synced.unlink(missing_ok=True)

    def _tidy(self) -> None:
        self.log.rewrite(self._records.tidied)


def _notes_of(log: RecordLog, records: Records, clock: Callable[[], float]) -> WandbNotes:
    """What the file of an earlier day says."""
    rows, ended, any_record = -1, False, False
    for payload in log.records():
        any_record = True
        number, ends = records.outline(payload)
        rows, ended = max(rows, number), ended or ends
    if not any_record:
        return WandbNotes()
    return WandbNotes(row=rows + 1, top=UNKNOWN, ended=ended, started=clock())
