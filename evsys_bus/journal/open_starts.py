"""Which events open and close runs, decided from their envelopes, and the start events of what is open in a stream.

Each segment begins with these start events, so that a reader that begins there knows its runs.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Final, Generic, Literal, NamedTuple, TypeVar

import msgspec

from evsys_bus.codec.wire_types import ancestor
from evsys_bus.disk import Disk
from evsys_bus.files import DECODE_ERRORS
from evsys_bus.journal import frame
from evsys_bus.journal.frame import Frame
from evsys_bus.journal.layout import SegmentName
from evsys_bus.journal.reader import SegmentScan

T = TypeVar("T")
OpenKind = Literal["experiment", "group", "run", "train", "context"]


class OpenKey(NamedTuple):
    """Identifies what is open."""

    kind: OpenKind
    """``context`` is a run without start events; the event that introduces it has its context."""
    root: str
    """Output directory of the experiment; empty if the event has none."""
    run: str | None
    """The run key."""
    group: str | None = None


class Boundary(NamedTuple):
    """What an event opens or closes."""

    key: OpenKey
    is_start: bool


def may_be_boundary(payload: bytes) -> bool:
    """Whether the payload contains the end of the type of such an event, or the key of a context in a state."""
    return b"_start" in payload or b"n_end" in payload or b"t_end" in payload or b"\xa7context" in payload


def read_boundary(payload: bytes) -> Boundary | None:
    """What the event of an encoded envelope opens or closes; None for other events and damaged envelopes."""
    if not may_be_boundary(payload):  # most are not, and need not be decoded
        return None
    try:
        envelope = _decode(payload)
    except DECODE_ERRORS:
        return None
    event = envelope.event
    kind, is_start = _BOUNDARY_TYPES.get(event.type, ("context", True))
    if kind == "context" and (event.state is None or not event.state.has_context):
        return None
    if event.ctx is not None:
        root = event.ctx.root_of(None)
    else:
        root = "" if event.state is None else event.state.root_of(envelope.run)
    return Boundary(OpenKey(kind, root, envelope.run, event.group_name), is_start)


class OpenStarts(Generic[T]):
    """What is open in a stream, in the order in which it was opened, with a value for each start event."""

    def __init__(self) -> None:
        self._open: dict[OpenKey, T] = {}

    def __iter__(self) -> Iterator[T]:
        return iter([*self._open.values()])

    def items(self) -> list[tuple[OpenKey, T]]:
        """What is open, with the values."""
        return [*self._open.items()]

    def update(self, boundary: Boundary, value: T) -> None:
        """Open or close what the event opens or closes."""
        kind, root, run, _ = key = boundary.key
        if run is not None and not root:  # as in earlier events of the run
            root = next((each.root for each in reversed(self._open) if each.run == run), "")
            key = key._replace(root=root)
        if boundary.is_start:
            self._open.pop(key, None)
            self._open[key] = value
        elif kind == "experiment":
            self._open.clear()
        else:
            has_run_start = kind == "train" and OpenKey("run", root, run) in self._open
            for each in [each for each in self._open if each.run == run and each.root in {root, ""}]:
                if each.kind == "train" or (each.kind in {"run", "context"} and not has_run_start):
                    del self._open[each]  # after the end of a training its run may continue until its RunEnd


class StartRecord(NamedTuple):
    """A start event."""

    sequence: int
    payload: bytes


def restore_open_starts(disk: Disk, folder: str, names: Sequence[SegmentName]) -> OpenStarts[StartRecord]:
    """What is open at the end of a stream, from its last segment with events.

    Args:
        disk: The file system.
        folder: The stream's folder.
        names: Its segments in order.

    Raises:
        JournalVersionError: A newer version wrote it.
        OSError: It cannot be read.
    """
    open_starts = OpenStarts[StartRecord]()
    for name in reversed(names):
        is_empty = True
        for item in SegmentScan(disk, f"{folder}/{name}").frames():
            if isinstance(item, Frame) and item.kind in {frame.EVENT, frame.CARRIED}:
                is_empty = False
                payload = bytes(item.payload)
                boundary = read_boundary(payload)
                if boundary is not None:
                    open_starts.update(boundary, StartRecord(item.sequence, payload))
        if not is_empty:
            break
    return open_starts


_BOUNDARY_TYPES: Final[dict[str, tuple[OpenKind, bool]]] = {
    "experiment_start": ("experiment", True),
    "group_start": ("group", True),
    "run_start": ("run", True),
    "train_start": ("train", True),
    "train_end": ("train", False),
    "run_end": ("run", False),
    "experiment_end": ("experiment", False),
}
"""By the type of an event: what it opens or closes, and whether it opens it."""
_ABSENT: Final = msgspec.Raw()


class _Handle(msgspec.Struct):
    """A state or a context."""

    output_dir: object = None
    """As text, or as bytes if it is not UTF-8."""
    root: object = None
    run: object = None
    context: msgspec.Raw = _ABSENT

    @property
    def has_context(self) -> bool:
        return bytes(self.context) != b""

    def root_of(self, run: str | None) -> str:
        """The output directory of the experiment; of a state if the run is given."""
        if isinstance(self.root, str | bytes):
            return os.fsdecode(self.root)
        if not isinstance(self.output_dir, str | bytes):
            return ""
        folder = os.fsdecode(self.output_dir)
        if run is None:
            return folder
        return ancestor(folder, run.count("/") + 1) if self.run is not None or self.has_context else ""


class _Event(msgspec.Struct):
    type: str
    state: _Handle | None = None
    ctx: _Handle | None = None
    group_name: str | None = None


class _Envelope(msgspec.Struct):
    event: _Event
    run: str | None = None


_decode: Final = msgspec.msgpack.Decoder(_Envelope).decode
