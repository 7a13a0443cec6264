"""`OutputWalk`: which rows of a file come again, after a follower without a cursor began anew over it.

What the journal still has may begin anywhere and have gaps, so nothing that stands in the file is cut in the hope that
it comes again. A pointer moves over the rows instead:

- A row that stands at the pointer or behind it is left out, and the pointer moves behind it.
- A row that does not is appended. If a start comes later, and then a row that stands, a start had made the appended row
  void long ago, and it is dropped again.
- A start waits for the row that follows. If that row stands, the start was carried out before. If it does not, although
  all rows before the start did, the journal has lost what stands behind the pointer, and the start cuts as ever.

The walk is over when the pointer is at the end, or when the first row is newer than all that stand.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Protocol

from evsys_adapters._step_tracker import StepTracker, Walk


class WalkedFile(Protocol):
    """A file of rows; its methods raise OSError where the disk refuses, and have changed nothing then."""

    def rows(self) -> Iterable[tuple[int, int | None]]:
        """For each row a number, the same for rows with the same step and content, and its step."""
        ...

    def keep(self, stays: Callable[[int, int | None], bool]) -> int:
        """Drop the rows that do not stay, by their number from 0 on and their step; how many are left."""
        ...

    def carry_out(self, first_step: int) -> None:
        """Drop the rows of that step and of later ones, as at a start."""
        ...


class OutputWalk:
    """The walk over the file of one run; what a mark has to know of it is in the run's `StepTracker`."""

    def __init__(self, course: StepTracker) -> None:
        self._course = course
        self._keys: list[int] | None = None
        """Of the rows that stood in the file when the walk began; None until they are asked for."""
        self._largest = -1
        """Their largest step."""
        self._places: dict[int, list[int]] = {}

    @property
    def is_on(self) -> bool:
        """Whether rows that come may stand in the file."""
        return self._course.walks

    def introduced(self) -> None:
        """A start is given again."""
        self._course.introduced()
        self._doubt()

    def starts(self, first_step: int) -> bool:
        """Training starts at this step; False where the next row decides whether anything is to be cut."""
        if not self.is_on:
            return self._course.starts(first_step)
        self._course.starts_pending(first_step)
        self._doubt()
        return False

    def stands(self, file: WalkedFile, key: int, step: int) -> bool:
        """Whether the row that comes is left out; else it is to be appended, and `appended` to be called.

        Raises:
            OSError: The file cannot be read or changed now; ask again.
        """
        if not self.is_on:
            return False
        walk, keys = self._look(file)
        place = self._place_of(key, walk, keys)
        if place is not None:
            self._found(file, walk)
            walk.passed = place + 1
            if walk.passed == walk.stood:
                self._end()
            return True
        first = self._course.pending
        if first is None:
            is_over = keys[walk.passed - 1] == keys[-1] if walk.passed else step > self._largest
            if is_over and not walk.appended:
                self._end()
        elif walk.passed and walk.appended:  # another start made void what came before this one, and maybe this one
            stood = walk.stood
            rows = file.keep(lambda number, step: number < stood or step is None or step < first)
            walk.appended = walk.doubtful = rows - stood
            self._course.pending = None
        else:
            file.carry_out(first)
            self._end()
        return False

    def appended(self) -> None:
        """The row was appended."""
        if self._course.walk is not None:
            self._course.walk.appended += 1

    def look_again(self) -> None:
        """The file was closed: another process may have changed it."""
        self._keys = None

    def _found(self, file: WalkedFile, walk: Walk) -> None:
        """A row stands: the starts before it were carried out, and voided what did not stand before them."""
        if walk.doubtful:
            void = range(walk.stood, walk.stood + walk.doubtful)
            file.keep(lambda number, _: number not in void)
            walk.appended -= walk.doubtful
            walk.doubtful = 0
        self._course.pending = None

    def _doubt(self) -> None:
        walk = self._course.walk
        if walk is not None:
            self._course.unplaced = False
            walk.doubtful = walk.appended

    def _look(self, file: WalkedFile) -> tuple[Walk, list[int]]:
        """How far the walk is, and the rows over which it goes."""
        walk = self._course.walk
        if walk is None or self._keys is None:
            rows = [*file.rows()]
            if walk is None or walk.stood + walk.appended != len(rows):  # somebody else has changed the file
                walk = self._course.walk = Walk(len(rows))
            self._course.unplaced = False
            self._keys = [key for key, _ in rows[: walk.stood]]
            self._largest = max((step for _, step in rows[: walk.stood] if step is not None), default=-1)
            self._places = {}
        return walk, self._keys

    def _place_of(self, key: int, walk: Walk, keys: list[int]) -> int | None:
        """Which row it is, at the pointer or behind it."""
        if walk.passed < walk.stood and keys[walk.passed] == key:
            return walk.passed
        if not self._places:
            for number, each in enumerate(keys):
                self._places.setdefault(each, []).append(number)
        places = self._places.get(key, [])
        found = bisect_left(places, walk.passed)
        return places[found] if found < len(places) else None

    def _end(self) -> None:
        self._course.walk = self._course.pending = None
        self._course.unplaced = False
        self._keys, self._places = None, {}
