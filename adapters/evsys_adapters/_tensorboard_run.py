"""`TensorBoardRun`: one run, as scalars and texts on their way to its event file.

TensorBoard's fast loader drops what a run logged at later steps when a row comes late. So a file with late rows is put
in order while the run goes on, at most for one hundredth of the time, and under a new name: a loader that is at work
takes the first point of a new file for a restart, and reads all of it in place of what it has.
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
from evsys_adapters._logged_values import Table, config_of, json_of, markdown, prefixed, split, text_of
from evsys_adapters._output_claim import OutputClaim
from evsys_adapters._output_notes import NotedOutput
from evsys_adapters._record_file import RecordLog
from evsys_adapters._result_fields import field
from evsys_adapters._run_logger import LoggedRun
from evsys_adapters._run_notes import RunNotes, key_of
from evsys_adapters._tensorboard_events import Events
from evsys_bus.context import LogContext
from evsys_bus.diagnostics import FaultLog
from evsys_bus.savepoints import Savepoints, hidden_name, names_beside

_NAME: Final = re.compile(r"events\.out\.tfevents\.(\d+)\.evsys-bus")
FIRST_NAME: Final = "events.out.tfevents.0.evsys-bus"
_SECONDS_BETWEEN: Final = 1.0
_SHARE: Final = 100
"""The file is put in order at most for one part in so many of the time."""


class EventFiles:
    """The event files in a run's folder: one, but for what a crash left; looked at when the run is first heard of.

    Args:
        folder: The run's.
        marks: What a crashed process left behind its last mark is undone first.
    """

    def __init__(self, folder: Path, marks: Savepoints) -> None:
        self._folder = folder
        known = self.names_in(folder)
        for name in known:
            marks.settle(os.path.abspath(folder / name))  # noqa: PTH100  # as the marks call it
            (folder / f"{hidden_name(name)}.new").unlink(missing_ok=True)
        self._number = max(map(_number, known), default=0)
        full = [name for name in known if _size(folder / name)]
        self.newest = folder / max(full, key=_number, default=FIRST_NAME)
        """The file that goes on."""
        self._empty = [folder / name for name in known if name not in full and name != self.newest.name]

    @staticmethod
    def names_in(folder: Path) -> set[str]:
        """The names of event files that are there, or of which an earlier version is."""
        try:
            there = {each.name for each in folder.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            there = set[str]()
        return {name for name in there | names_beside(folder) if _NAME.fullmatch(name)}

    @property
    def undone(self) -> bool:
        """Whether a file was put in order, but not for good: a loader that has read that one reads no name twice."""
        return bool(self._empty)

    def next_name(self) -> Path:
        """A name that no file here had."""
        self._number += 1
        return self._folder / f"events.out.tfevents.{self._number:010}.evsys-bus"

    def clean(self) -> None:
        """Remove the empty files of names that were given up."""
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


class TensorBoardRun(LoggedRun[RunNotes]):
    """A run, by the name of its folder."""

    def __init__(
        self,
        name: str,
        files: EventFiles,
        log: RecordLog,
        events: Events,
        notes: RunNotes,
        output: NotedOutput,
        lock: AbstractContextManager[object],
        keep_tidy: Callable[[], object],
    ) -> None:
        super().__init__(log, notes, output, lock)
        self.name = name
        self.claim: OutputClaim | None = None
        """Of its folder; None once it was given up."""
        self.result: object = None
        self.arm: object = None
        self._files = files
        self._events = events
        self._faults = FaultLog()
        self._keep_tidy = keep_tidy
        self._due = 0.0
        notes.untidy = notes.untidy or files.undone

    def describe(self, ctx: LogContext | None) -> None:
        """Write down configuration and hypothesis, once."""
        config = config_of(ctx)
        if self.notes.described or not config:
            return
        self.notes.described = True
        hypothesis = hypothesis_of(field(ctx, "config"))
        if hypothesis:
            self.tell(None, "hypothesis", hypothesis)
        self.tell(None, "config", _as_code(config))

    def tell(self, step: int | None, tag: str, text: str) -> None:
        """Write a text; one without a step stands at the last."""
        with self.lock:
            at = self.notes.last if step is None else step
            self._events.at = self.at
            self._add(self._events.text(at or 0, tag, text))

    def close(self, *, forget: bool = False) -> None:
        """Put the file in order, whenever that was done last; and write what waits."""
        with self.lock:
            self._tidy()
            self.log.close(forget=forget)
            self._faults.flush()

    def tidy_when_due(self) -> float | None:
        """Put the file in order if that is due. Seconds until it is; None if the file is in order."""
        with self.lock:
            if not self.notes.untidy:
                return None
            wait = self._due - time.monotonic()
            if wait <= 0:
                self._tidy()
                wait = self._due - time.monotonic()
            return max(wait, 0.0) if self.notes.untidy else None

    def _write(self, stream: str, step: int, values: Mapping[str, Any]) -> None:
        numbers, texts = split(values)
        tags = _tags(stream, values)
        if numbers:
            self._events.at = self.at
            self._add(self._events.scalars(step, {tags[key]: value for key, value in numbers.items()}))
        for key, text in texts.items():
            self.tell(step, tags[key], text)
        if self.tidy_when_due() is not None:
            self._keep_tidy()

    def _add(self, payload: bytes) -> None:
        if not (self.notes.course.unplaced and self._is_repeated(key_of(payload))):
            self.log.add(payload)

    def _rows_there(self) -> tuple[set[int], float]:
        newest = 0.0
        found: dict[int, int] = {}
        for payload in self.log.records():
            newest = max(newest, self._events.time_of(payload))
            step, is_restart = self._events.step_of(payload)
            if is_restart:  # what it made void is not there for anybody who reads the file
                found = {key: each for key, each in found.items() if each < step}
            else:
                found[key_of(payload)] = step
        return set(found), newest

    def _drop(self, keys: AbstractSet[int]) -> None:
        gone = frozenset(keys)
        self.log.rewrite(lambda payloads: (each for each in payloads if key_of(each) not in gone))

    def _is_there(self, stream: str, step: int, values: Mapping[str, Any]) -> bool:
        numbers, texts = split(values)
        tags = _tags(stream, values)
        self._events.at = self.at
        if numbers:
            payload = self._events.scalars(step, {tags[key]: value for key, value in numbers.items()})
        elif texts:
            payload = next(self._events.text(step, tags[key], text) for key, text in texts.items())
        else:
            return False
        return payload in self.log.records()

    def _conclude(self, head: str, values: Mapping[str, Any]) -> None:
        """Drawn at the last step, never at 0."""
        if self.notes.last is None:
            values = {key: text_of(value) for key, value in values.items()}
        self._write(head, self.notes.last or 0, values)

    def _show(self, step: int | None, head: str, what: str, shown: Table | object) -> None:
        self.tell(step, f"{head}/{what}", markdown(shown) if isinstance(shown, Table) else _as_code(shown))

    def _void(self, first_step: int) -> None:
        self._events.at = self.at
        self.log.add(self._events.restart(first_step))

    def _tidy(self) -> None:
        """Put the file in order, if it is not; what the disk refuses now is tried again."""
        if not self.notes.untidy:
            return
        began = time.monotonic()
        try:
            self.log.move(self._files.next_name(), self._events.in_order)
            self._files.clean()
            self.notes.untidy = False
        except OSError as error:
            self._faults.warn("rows.out_of_order", "refused", file=str(self.log.path), why=str(error))
        now = time.monotonic()
        self._due = now + max(_SECONDS_BETWEEN, (now - began) * _SHARE)


def _tags(stream: str, keys: Iterable[str]) -> dict[str, str]:
    """The tag of each key; two keys of a row never share one."""
    tags = {key: prefixed(stream, key) for key in keys}
    taken = {tag: key for key, tag in tags.items() if tag == key}
    return {key: tag if taken.get(tag, key) == key else f"{stream}/{stream}/{key}" for key, tag in tags.items()}


def _as_code(value: object) -> str:
    return f"```json\n{json_of(value)}\n```"
