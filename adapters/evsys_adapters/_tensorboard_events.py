"""TensorBoard's event files: how a record looks, and the events that a logger writes into them.

    length · checksum of it · an ``Event`` message · checksum of it        (TFRecord, all little-endian)

The messages are tensorboardX's, which needs neither torch nor TensorFlow; its writer is not used, because its thread
holds rows that nobody can wait for.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, BinaryIO, Final

from evsys_adapters._logged_values import EVAL

_LENGTHS: Final = struct.Struct("<QI")
_CHECKSUM: Final = struct.Struct("<I")


def needs_tensorboardx() -> None:
    """Check that tensorboardX is there, without importing it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if find_spec("tensorboardX") is None:
        raise ModuleNotFoundError(
            'tensorboard_logger needs tensorboardX; pip install "evsys-bus[tensorboard]"', name="tensorboardX"
        )


class Events:
    """Makes and reads the events; an instance holds the imported messages, and the clock that dates them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # Any: protobuf makes its classes when it is imported, and tensorboardX need not be there when this is checked.
        event_pb2: Any = import_module("tensorboardX.proto.event_pb2")
        summary_pb2: Any = import_module("tensorboardX.proto.summary_pb2")
        self._crc: Any = import_module("tensorboardX.crc32c").crc32c
        self._event: Any = event_pb2.Event
        self._session: Any = event_pb2.SessionLog
        self._summary: Any = summary_pb2.Summary
        self._metadata: Any = summary_pb2.SummaryMetadata
        self._tensor: Any = import_module("tensorboardX.proto.tensor_pb2").TensorProto
        self._shape: Any = import_module("tensorboardX.proto.tensor_shape_pb2").TensorShapeProto

    # -- the format ---------------------------------------------------------------------------------------------------

    def head(self) -> bytes:
        """The event that says which rules the file follows: those in which a restart is told, not guessed."""
        return self.frame(self._event(wall_time=self._clock(), file_version="brain.Event:2").SerializeToString(), 0)

    def frame(self, payload: bytes, at: int) -> bytes:
        """A record."""
        del at
        length = struct.pack("<Q", len(payload))
        return b"".join((length, _CHECKSUM.pack(self._masked(length)), payload, _CHECKSUM.pack(self._masked(payload))))

    def scan(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        """Every whole record but the first."""
        first = True
        while len(header := file.read(_LENGTHS.size)) == _LENGTHS.size:
            length, _ = _LENGTHS.unpack(header)
            body = file.read(length + _CHECKSUM.size)
            if len(body) < length + _CHECKSUM.size:
                return
            if not first:
                yield body[:length], file.tell()
            first = False

    # -- events -------------------------------------------------------------------------------------------------------

    def scalars(self, step: int, values: Mapping[str, float]) -> bytes:
        """One point for each tag."""
        value = self._summary.Value
        points = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        return self._at(step, summary=self._summary(value=points))

    def text(self, step: int, tag: str, text: str) -> bytes:
        """A text, Markdown."""
        plugin = self._metadata.PluginData(plugin_name="text")
        tensor = self._tensor(
            dtype="DT_STRING",
            string_val=[text.encode(errors="backslashreplace")],
            tensor_shape=self._shape(dim=[self._shape.Dim(size=1)]),
        )
        value = self._summary.Value(tag=tag, metadata=self._metadata(plugin_data=plugin), tensor=tensor)
        return self._at(step, summary=self._summary(value=[value]))

    def restart(self, step: int) -> bytes:
        """What was told of this step and later ones is void."""
        return self._at(step, session_log=self._session(status=self._session.START))

    def tidied(self, payloads: Iterable[bytes]) -> list[bytes]:
        """The same in order of steps, without what is void and without evals that were replaced.

        TensorBoard's fast loader takes a step that is smaller than the one before for a restart, and drops points.
        """
        events: list[Any] = []  # Any: as above
        for payload in payloads:
            event = self._event.FromString(payload)
            if event.HasField("session_log"):
                events = [each for each in events if each.step < event.step]
            else:
                events.append(event)
        newest = {(value.tag, each.step): index for index, each in enumerate(events) for value in each.summary.value}
        for index, each in enumerate(events):
            values = list(each.summary.value)
            kept = [one for one in values if not one.tag.startswith(EVAL) or newest[one.tag, each.step] == index]
            if len(kept) < len(values):
                each.summary.CopyFrom(self._summary(value=kept))
        told = [each for each in events if each.summary.value]
        return [each.SerializeToString() for each in sorted(told, key=lambda each: each.step)]

    def _at(self, step: int, **what: Any) -> bytes:
        return self._event(wall_time=self._clock(), step=step, **what).SerializeToString()

    def _masked(self, data: bytes) -> int:
        """TensorBoard's checksum: rotated, so that one of data with checksums inside does not cancel out."""
        crc = self._crc(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
