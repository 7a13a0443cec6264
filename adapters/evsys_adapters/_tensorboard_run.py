"""`TensorBoardRun`: one run, whose rows are written to its event file as scalars and texts.

When a row comes late, TensorBoard's fast loader drops the run's points at later steps. So a file with late rows is
sorted while the run continues, at most one hundredth of the time, and gets a new name: a running loader takes the first
point of a new file for a restart, and reads the whole file in place of what it has.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from evsys_adapters._experiment_pages import hypothesis_of
from evsys_adapters._logged_run_state import LoggedRunState, stable_key
from evsys_adapters._logged_values import Table, config_of, json_of, markdown, prefixed, split_numbers, text_of
from evsys_adapters._output_lease import OutputLease
from evsys_adapters._output_positions import TrackedOutput
from evsys_adapters._record_file import RecordLog
from evsys_adapters._result_fields import field
from evsys_adapters._run_logger import LoggedRun
from evsys_adapters._tensorboard_events import Events
from evsys_bus.context import LogContext
from evsys_bus.diagnostics import FaultLog
from evsys_bus.savepoints import Savepoints, hidden_name, names_with_versions

_NAME: Final = re.compile(r"events\.out\.tfevents\.(\d+)\.evsys-bus")
FIRST_NAME: Final = "events.out.tfevents.0.evsys-bus"
_MIN_REORDER_SECONDS: Final = 1.0
_REORDER_TIME_SHARE: Final = 100
"""At most one part in this many of the time is spent on sorting files."""


class EventFiles:
    """The event files in a run's folder, as they were when the run was opened: one, except after a crash.

    Args:
        folder: The run's folder.
        savepoints: The callback's savepoints; what a crashed process wrote after its last mark is undone first.
    """

    def __init__(self, folder: Path, savepoints: Savepoints) -> None:
        self._folder = folder
        known = self.names_in(folder)
        for name in known:
            savepoints.recover(os.path.abspath(folder / name))  # noqa: PTH100  # savepoints use this form
            (folder / f"{hidden_name(name)}.new").unlink(missing_ok=True)
        self._number = max(map(_number, known), default=0)
        full = [name for name in known if _size(folder / name)]
        self.newest = folder / max(full, key=_number, default=FIRST_NAME)
        """The file to be continued."""
        self._empty = [folder / name for name in known if name not in full and name != self.newest.name]

    @staticmethod
    def names_in(folder: Path) -> set[str]:
        """Return the names of existing event files, and of those with an earlier version."""
        try:
            names = {each.name for each in folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            names = set[str]()
        return {name for name in names | names_with_versions(folder) if _NAME.fullmatch(name)}

    @property
    def has_unfinished_reorder(self) -> bool:
        """Whether a sorted file was undone; a loader may have read it, and reads no name twice."""
        return bool(self._empty)

    def next_name(self) -> Path:
        """Return a path that no file here has had."""
        self._number += 1
        return self._folder / f"events.out.tfevents.{self._number:010}.evsys-bus"

    def clean(self) -> None:
        """Remove the empty files whose names are no longer used."""
        for path in self._empty:
            if not _size(path):
                path.unlink(missing_ok=True)
        self._empty = []


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class TensorBoardRun(LoggedRun[LoggedRunState]):
    """One run; its name is that of its folder."""

    def __init__(
        self,
        name: str,
        files: EventFiles,
        log: RecordLog,
        events: Events,
        state: LoggedRunState,
        output: TrackedOutput,
        lock: AbstractContextManager[object],
        schedule_reorder: Callable[[], object],
    ) -> None:
        super().__init__(log, state, output, lock)
        self.name = name
        self.lease: OutputLease | None = None
        """Lease of its folder; None once it was released."""
        self.result: object = None
        self.arm: object = None
        self._files = files
        self._events = events
        self._faults = FaultLog()
        self._schedule_reorder = schedule_reorder
        self._reorder_due = 0.0
        state.needs_reorder = state.needs_reorder or files.has_unfinished_reorder

    def describe(self, ctx: LogContext | None) -> None:
        """Log configuration and hypothesis, once."""
        config = config_of(ctx)
        if self.notes.described or not config:
            return
        self.notes.described = True
        hypothesis = hypothesis_of(field(ctx, "config"))
        if hypothesis:
            self.add_text(None, "hypothesis", hypothesis)
        self.add_text(None, "config", _as_code(config))

    def add_text(self, step: int | None, tag: str, text: str) -> None:
        """Log a text; one without a step is logged at the last step."""
        with self.lock:
            at_step = self.notes.last_step if step is None else step
            self._events.event_time = self.event_time
            self._add(self._events.text(at_step or 0, tag, text))

    def close(self, *, forget: bool = False) -> None:
        """Sort the file if needed, whenever that was done last, and write buffered rows."""
        with self.lock:
            self._reorder()
            self.log.close(forget_file=forget)
            self._faults.flush()

    def reorder_when_due(self) -> float | None:
        """Sort the file if that is due; returns the seconds until it is, None if the file is in order."""
        with self.lock:
            if not self.notes.needs_reorder:
                return None
            wait = self._reorder_due - time.monotonic()
            if wait <= 0:
                self._reorder()
                wait = self._reorder_due - time.monotonic()
            return max(wait, 0.0) if self.notes.needs_reorder else None

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        numbers, texts = split_numbers(values)
        tags = _tags(stream, values)
        if numbers:
            self._events.event_time = self.event_time
            self._add(self._events.scalars(step, {tags[key]: value for key, value in numbers.items()}))
        for key, text in texts.items():
            self.add_text(step, tags[key], text)
        if self.reorder_when_due() is not None:
            self._schedule_reorder()

    def _add(self, payload: bytes) -> None:
        if not (self.notes.tracker.position_unknown and self._is_repeated(stable_key(payload))):
            self.log.add(payload)

    def _existing_rows(self) -> tuple[set[int], float]:
        newest = 0.0
        found: dict[int, int] = {}
        for payload in self.log.records():
            newest = max(newest, self._events.time_of(payload))
            step, is_restart = self._events.step_of(payload)
            if is_restart:  # readers do not see what it voids
                found = {key: each for key, each in found.items() if each < step}
            else:
                found[stable_key(payload)] = step
        return set(found), newest

    def _drop_rows(self, keys: AbstractSet[int]) -> None:
        dropped = frozenset(keys)
        self.log.rewrite(lambda payloads: (each for each in payloads if stable_key(each) not in dropped))

    def _has_row(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        numbers, texts = split_numbers(values)
        tags = _tags(stream, values)
        self._events.event_time = self.event_time
        if numbers:
            payload = self._events.scalars(step, {tags[key]: value for key, value in numbers.items()})
        elif texts:
            payload = next(self._events.text(step, tags[key], text) for key, text in texts.items())
        else:
            return False
        return payload in self.log.records()

    def _write_final_scores(self, head: str, values: Mapping[str, Any]) -> None:
        """Log them at the last step, never at 0."""
        if self.notes.last_step is None:
            values = {key: text_of(value) for key, value in values.items()}
        self._write(head, self.notes.last_step or 0, values)

    def _write_attachment(self, step: int | None, head: str, kind: str, content: Table | object) -> None:
        self.add_text(step, f"{head}/{kind}", markdown(content) if isinstance(content, Table) else _as_code(content))

    def _void_from(self, first_step: int) -> None:
        self._events.event_time = self.event_time
        self.log.add(self._events.restart(first_step))

    def _reorder(self) -> None:
        """Sort the file if needed; if the disk refuses that, it is tried again later."""
        if not self.notes.needs_reorder:
            return
        start = time.monotonic()
        try:
            self.log.move(self._files.next_name(), self._events.sorted_frames)
            self._files.clean()
            self.notes.needs_reorder = False
        except OSError as error:
            self._faults.warn("rows.out_of_order", "refused", file=str(self.log.path), why=str(error))
        now = time.monotonic()
        self._reorder_due = now + max(_MIN_REORDER_SECONDS, (now - start) * _REORDER_TIME_SHARE)


def _tags(stream: str, keys: Iterable[str]) -> dict[str, str]:
    """Return the tag of each key; two keys of a row never share one."""
    tags = {key: prefixed(stream, key) for key in keys}
    taken = {tag: key for key, tag in tags.items() if tag == key}
    return {key: tag if taken.get(tag, key) == key else f"{stream}/{stream}/{key}" for key, tag in tags.items()}


def _as_code(value: object) -> str:
    return f"```json\n{json_of(value)}\n```"
