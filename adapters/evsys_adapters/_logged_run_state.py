"""`LoggedRunState`: the state of a logged run that is not in its file; it is saved in marks.

It decides which rows are void because they are run again, and which values of an eval are new.
"""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, Final, TypeVar

import msgspec

from evsys_adapters._step_tracker import StepTracker

UNKNOWN_STEP: Final = 1 << 62
"""Larger than any step."""


class LoggedRunState(
    msgspec.Struct,
    omit_defaults=True,
    rename={"tracker": "course", "last_step": "last", "needs_reorder": "untidy", "largest_step": "top"},
):
    """State of one logged run."""

    tracker: StepTracker = msgspec.field(default_factory=StepTracker)
    last_step: int | None = None
    """The largest trained step."""
    evals: dict[str, tuple[int, dict[str, Any]]] = {}
    """The newest eval of each name: its step and values."""
    needs_reorder: bool = False
    """Whether steps came late or evals were repeated, so that the file has to be put in order."""
    described: bool = False
    """Whether the configuration was written."""
    largest_step: int = -1
    """The largest step in the file; `UNKNOWN_STEP` for a file of an earlier process."""
    unconfirmed_keys: list[int] = []
    """Keys of rows that were not in the file when they were delivered; a repeated start may show that they are void."""

    def start_training(self, first_step: int) -> bool:
        """Training starts at this step; returns whether it voids rows in the file."""
        return self.tracker.start_training(first_step) and self._void_from(first_step)

    def record_step(self, step: int) -> bool:
        """Record a step; returns whether it is the first of a training and voids rows in the file from it on."""
        is_late = self.last_step is not None and step < self.last_step
        void = self.tracker.record_step(step) and self._void_from(step)
        self.needs_reorder = self.needs_reorder or (is_late and not void)
        self.last_step = step if self.last_step is None else max(step, self.last_step)
        self.largest_step = max(self.largest_step, step)
        return void

    def new_values(self, name: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of an eval that were not logged yet; NaN equals NaN."""
        last_step, logged = self.evals.get(name, (step, {}))
        if last_step != step:
            logged = {}
        changed = {key: value for key, value in values.items() if key not in logged or repr(logged[key]) != repr(value)}
        self.needs_reorder = self.needs_reorder or last_step > step or any(key in logged for key in changed)
        if last_step <= step:
            self.evals[name] = (step, {**logged, **values})
        self.largest_step = max(self.largest_step, step)
        return changed

    def _void_from(self, first_step: int) -> bool:
        self.last_step = first_step - 1 if first_step > 0 else None
        if first_step > self.largest_step:
            return False
        self.largest_step = first_step - 1
        self.evals = {name: entry for name, entry in self.evals.items() if entry[0] < first_step}
        self.described = False
        return True


StateT = TypeVar("StateT", bound=LoggedRunState)


def encode_states(states: Mapping[str, LoggedRunState]) -> dict[str, bytes]:
    """Encode states for a mark, which is JSON and so cannot hold NaN."""
    return {key: msgspec.msgpack.encode(each) for key, each in states.items()}


def stable_key(data: bytes) -> int:
    """Return a hash of the data that is the same in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def encode_state(state: LoggedRunState) -> bytes:
    """Encode a state as JSON, for the note beside the run's output."""
    return msgspec.json.encode(msgspec.msgpack.encode(state))


def decode_state(encoded: bytes, kind: type[StateT]) -> StateT:
    """Decode the result of `encode_state`."""
    return msgspec.msgpack.decode(msgspec.json.decode(encoded, type=bytes), type=kind)


def decode_states(encoded: Mapping[str, bytes], kind: type[StateT]) -> dict[str, StateT]:
    """Decode the result of `encode_states`; the runs count as rewound."""
    found = {key: msgspec.msgpack.decode(each, type=kind) for key, each in encoded.items()}
    for each in found.values():
        each.tracker.rewound = True
    return found
