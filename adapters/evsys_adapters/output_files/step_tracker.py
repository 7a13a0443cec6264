"""`StepTracker`: the training progress of a run, for adapters that cut rows of steps that are run again.

`RowMatcher`: finds rows that are delivered again, for an output without a note whose adapter has no cursor.

The journal may have lost its beginning and have gaps, so no existing row is cut in the expectation that it is delivered
again. Instead, a pointer moves over the existing rows:

- A row that exists at the pointer or after it is skipped, and the pointer moves behind it.
- Any other row is appended. If later there is a start followed by an existing row, then a start had voided the appended
  row earlier, and it is removed again.
- A start is decided by the row after it. If that row exists, the start was applied before. If it does not, although all
  rows before the start did, the journal has lost the events of the rows behind the pointer, and the start cuts them.

Matching ends when the pointer reaches the end, or if the first row is newer than all existing ones.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Protocol

import msgspec

from evsys_bus.files import AppendFile


class MatchProgress(
    msgspec.Struct, omit_defaults=True, rename={"existing": "stood", "pointer": "passed", "unconfirmed": "doubtful"}
):
    """Progress of matching delivered rows with those in a file; see `evsys_adapters.output_files.step_tracker`."""

    existing: int
    """Rows in the file when matching began."""
    pointer: int = 0
    """Index of the row behind the last matched one."""
    appended: int = 0
    """Rows appended behind them since."""
    unconfirmed: int = 0
    """How many of the appended rows, the first ones, came before the last start."""


class StepTracker(
    msgspec.Struct,
    omit_defaults=True,
    rename={
        "has_started": "begun",
        "position_unknown": "unplaced",
        "match_progress": "walk",
        "pending_start": "pending",
    },
):
    """Training progress of a run; distinguishes a repeated start event from a new start."""

    has_started: bool = False
    """Whether a training has started, so that rows of steps to be run again are cut already."""
    rewound: bool = False
    """Whether there was no event of the run since it was rewound."""
    position_unknown: bool = False
    """Whether only a repeated start is known: rows that follow may be in the file."""
    match_progress: MatchProgress | None = None
    """Progress of the matching, once the first row was delivered."""
    pending_start: int | None = None
    """The step of a start during the matching: the next row decides whether it was applied already."""

    @property
    def is_matching(self) -> bool:
        """Whether rows that follow may be in the file."""
        return self.position_unknown or self.match_progress is not None

    def resume(self) -> None:
        """The run's start event is repeated before later events; nothing in the output is void.

        If the output was not rewound, the following rows are matched with those in it.
        """
        if not self.rewound or not self.has_started:
            self.position_unknown = True
        self.has_started, self.rewound = True, False

    def start_training(self) -> bool:
        """Training starts; returns True: rows from its first step on are void."""
        self.has_started, self.rewound, self.position_unknown = True, False, False
        self.pending_start = None
        return True

    def start_pending(self, first_step: int) -> None:
        """Training starts at this step; it is not known yet whether that was applied already."""
        self.pending_start = first_step if self.pending_start is None else min(self.pending_start, first_step)
        self.has_started, self.rewound = True, False

    def record_step(self) -> bool:
        """Record that there was a step; returns True if it is the first of a training."""
        is_first = not self.has_started
        self.has_started, self.rewound = True, False
        return is_first


class RowFile(Protocol):
    """A file of rows; its methods raise OSError where the disk refuses, and have changed nothing then."""

    def rows(self) -> Iterable[tuple[int, int | None]]:
        """Yield for each row a key, equal for rows with the same step and content, and its step."""
        ...

    def keep_rows(self, should_keep: Callable[[int, int | None], bool]) -> int:
        """Keep only the rows for which ``should_keep``, given number and step, is true; returns how many are left."""
        ...

    def drop_from_step(self, first_step: int) -> None:
        """Drop the rows of that step and of later ones, as at a start."""
        ...


def keep_lines(file: AppendFile, should_keep: Callable[[int, bytes], bool]) -> bytearray:
    """Keep only the lines for which ``should_keep``, given number and line, is true.

    Returns 1 for each line that remains, and 0 for each other. Raises OSError if the disk refuses.
    """
    retained = bytearray(should_keep(number, line) for number, line in enumerate(file.lines()))
    if not all(retained):
        file.rewrite(compress(file.lines(), retained))
    return retained


class RowMatcher:
    """Matches delivered rows with the file of one run; the progress is saved in the run's `StepTracker`."""

    def __init__(self, tracker: StepTracker) -> None:
        self._tracker = tracker
        self._keys: list[int] | None = None
        """Keys of the rows that existed when matching began; None until they are needed."""
        self._largest_step = -1
        """Their largest step."""
        self._indexes: dict[int, list[int]] = {}

    def resume(self) -> None:
        """The start event is repeated."""
        self._tracker.resume()
        self._mark_unconfirmed()

    def start_training(self, first_step: int) -> bool:
        """Training starts at this step; returns False if the next row decides whether rows are cut."""
        if not self._tracker.is_matching:
            return self._tracker.start_training()
        self._tracker.start_pending(first_step)
        self._mark_unconfirmed()
        return False

    def is_present(self, file: RowFile, key: int, step: int) -> bool:
        """Whether the row is in the file; if not, the caller appends it and calls `count_appended`.

        Raises:
            OSError: The file cannot be read or changed now; ask again.
        """
        if not self._tracker.is_matching:
            return False
        progress, keys = self._load(file)
        index = self._find(key, progress, keys)
        if index is not None:
            self._confirm_start(file, progress)
            progress.pointer = index + 1
            if progress.pointer == progress.existing:
                self._finish()
            return True
        first = self._tracker.pending_start
        if first is None:
            is_over = keys[progress.pointer - 1] == keys[-1] if progress.pointer else step > self._largest_step
            if is_over and not progress.appended:
                self._finish()
        elif progress.pointer and progress.appended:
            # another start voided what came before this one, and maybe this one
            existing = progress.existing
            rows = file.keep_rows(lambda number, step: number < existing or step is None or step < first)
            progress.appended = progress.unconfirmed = rows - existing
            self._tracker.pending_start = None
        else:
            file.drop_from_step(first)
            self._finish()
        return False

    def count_appended(self) -> None:
        """The row was appended."""
        if self._tracker.match_progress is not None:
            self._tracker.match_progress.appended += 1

    def invalidate(self) -> None:
        """The file was closed: another process may have changed it."""
        self._keys = None

    def _confirm_start(self, file: RowFile, progress: MatchProgress) -> None:
        """A row exists: the starts before it were applied, and voided the rows that did not exist before them."""
        if progress.unconfirmed:
            void = range(progress.existing, progress.existing + progress.unconfirmed)
            file.keep_rows(lambda number, _: number not in void)
            progress.appended -= progress.unconfirmed
            progress.unconfirmed = 0
        self._tracker.pending_start = None

    def _mark_unconfirmed(self) -> None:
        progress = self._tracker.match_progress
        if progress is not None:
            self._tracker.position_unknown = False
            progress.unconfirmed = progress.appended

    def _load(self, file: RowFile) -> tuple[MatchProgress, list[int]]:
        """Return the progress, and the keys of the rows to be matched."""
        progress = self._tracker.match_progress
        if progress is None or self._keys is None:
            rows = [*file.rows()]
            if progress is None or progress.existing + progress.appended != len(rows):  # else another process wrote it
                progress = self._tracker.match_progress = MatchProgress(len(rows))
            self._tracker.position_unknown = False
            self._keys = [key for key, _ in rows[: progress.existing]]
            self._largest_step = max((step for _, step in rows[: progress.existing] if step is not None), default=-1)
            self._indexes = {}
        return progress, self._keys

    def _find(self, key: int, progress: MatchProgress, keys: list[int]) -> int | None:
        """Return the index of the row, at the pointer or after it."""
        if progress.pointer < progress.existing and keys[progress.pointer] == key:
            return progress.pointer
        if not self._indexes:
            for number, each in enumerate(keys):
                self._indexes.setdefault(each, []).append(number)
        indexes = self._indexes.get(key, [])
        found = bisect_left(indexes, progress.pointer)
        return indexes[found] if found < len(indexes) else None

    def _finish(self) -> None:
        self._tracker.match_progress = self._tracker.pending_start = None
        self._tracker.position_unknown = False
        self._keys, self._indexes = None, {}
