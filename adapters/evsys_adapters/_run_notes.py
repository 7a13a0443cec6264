"""`RunNotes`: the state of a logged run that is not in its file; it is saved in marks.

It decides which rows are void because they are run again, and which values of an eval are new.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, TypeVar

import msgspec

from evsys_adapters._step_tracker import StepTracker

UNKNOWN: Final = 1 << 62
"""Larger than any step."""


class RunNotes(msgspec.Struct, omit_defaults=True):
    """State of one logged run."""

    course: StepTracker = msgspec.field(default_factory=StepTracker)
    last: int | None = None
    """The largest trained step."""
    evals: dict[str, tuple[int, dict[str, Any]]] = {}
    """The newest eval of each name: its step and values."""
    untidy: bool = False
    """Whether steps came late or evals were repeated, so that the file has to be put in order."""
    described: bool = False
    """Whether the configuration was written."""
    top: int = -1
    """The largest step in the file; `UNKNOWN` for a file of an earlier process."""
    doubtful: list[int] = []
    """Keys of rows added among repeated ones: a repeated start may show that they are void."""

    def starts(self, first_step: int) -> bool:
        """Training starts at this step; returns whether it voids rows in the file."""
        return self.course.starts(first_step) and self._voids(first_step)

    def steps(self, step: int) -> bool:
        """Record a step; returns whether it is the first of a training and voids rows in the file from it on."""
        late = self.last is not None and step < self.last
        void = self.course.steps(step) and self._voids(step)
        self.untidy = self.untidy or (late and not void)
        self.last = step if self.last is None else max(step, self.last)
        self.top = max(self.top, step)
        return void

    def news(self, name: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of an eval that were not logged yet; NaN equals NaN."""
        at, said = self.evals.get(name, (step, {}))
        if at != step:
            said = {}
        changed = {key: value for key, value in values.items() if key not in said or repr(said[key]) != repr(value)}
        self.untidy = self.untidy or at > step or any(key in said for key in changed)
        if at <= step:
            self.evals[name] = (step, {**said, **values})
        self.top = max(self.top, step)
        return changed

    def _voids(self, first_step: int) -> bool:
        self.last = first_step - 1 if first_step > 0 else None
        if first_step > self.top:
            return False
        self.top = first_step - 1
        self.evals = {name: said for name, said in self.evals.items() if said[0] < first_step}
        self.described = False
        return True


NotesT = TypeVar("NotesT", bound=RunNotes)


def packed(notes: Mapping[str, RunNotes]) -> dict[str, bytes]:
    """Encode states for a mark, which is JSON and so cannot hold NaN."""
    return {key: msgspec.msgpack.encode(each) for key, each in notes.items()}


def key_of(data: bytes) -> int:
    """A hash of the data, the same in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def noted(notes: RunNotes) -> bytes:
    """Notes of a run for the note beside its output, as JSON."""
    return msgspec.json.encode(msgspec.msgpack.encode(notes))


def notes_in(encoded: bytes, kind: type[NotesT]) -> NotesT:
    """What `noted` made."""
    return msgspec.msgpack.decode(msgspec.json.decode(encoded, type=bytes), type=kind)


def unpacked(notes: Mapping[str, bytes], kind: type[NotesT]) -> dict[str, NotesT]:
    """Decode the result of `packed`; the runs count as rewound."""
    found = {key: msgspec.msgpack.decode(each, type=kind) for key, each in notes.items()}
    for each in found.values():
        each.course.rewound = True
    return found
