"""Encoding of TensorBoard's event files, and the events that `tensorboard_logger` writes.

    length · checksum of it · an ``Event`` message · checksum of it        (TFRecord, all little-endian)

The messages are those of tensorboardX, which needs neither torch nor TensorFlow. Its writer is not used, because it
buffers rows in a thread, and there is no way to wait for them.
"""

import io
import struct
import sys
import wave
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import chain
from typing import Any, BinaryIO, Final

from evsys_adapters.common.logged_content import image_size
from evsys_adapters.common.logged_values import EVAL

_LENGTHS: Final = struct.Struct("<QI")
_TIME: Final = struct.Struct("<d")
_CHECKSUM: Final = struct.Struct("<I")
_WALL_TIME, _STEP, _SUMMARY = 0x09, 0x10, b"\x2a"
"""The bytes before these fields of an event, in the order in which they are encoded."""
_WALL_TIME_END: Final = 9
_MAX_STEP_BYTES: Final = 9
"""Maximum length of an encoded step that is not negative."""
_EVAL: Final = EVAL.encode()
_RGB: Final = 3
_HPARAM_TYPES: Final[Mapping[type, str]] = {
    bool: "DATA_TYPE_BOOL",
    str: "DATA_TYPE_STRING",
    int: "DATA_TYPE_FLOAT64",
    float: "DATA_TYPE_FLOAT64",
}


class Events:
    """Encodes and decodes the events of one file; an instance holds the imported message classes.

    Args:
        clock: The wall time of events. Default: `event_time`.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.event_time = 0.0
        """Wall time of the events to be encoded; seconds since the epoch."""
        self._clock = clock
        self._start_time: float | None = None
        # protobuf generates its classes at import, and tensorboardX need not be installed for type checking
        event_pb2: Any = import_module("tensorboardX.proto.event_pb2")
        summary_pb2: Any = import_module("tensorboardX.proto.summary_pb2")
        self._crc: Any = import_module("tensorboardX.crc32c").crc32c
        self._damaged: Any = import_module("google.protobuf.message").DecodeError
        self._event: Any = event_pb2.Event
        self._session: Any = event_pb2.SessionLog
        self._summary: Any = summary_pb2.Summary
        self._metadata: Any = summary_pb2.SummaryMetadata
        self._tensor: Any = import_module("tensorboardX.proto.tensor_pb2").TensorProto
        self._shape: Any = import_module("tensorboardX.proto.tensor_shape_pb2").TensorShapeProto
        self._hparams: Any = import_module("tensorboardX.proto.plugin_hparams_pb2")
        self._hparams_api: Any = import_module("tensorboardX.proto.api_pb2")

    def header(self) -> bytes:
        """Return the file's version event, for the version in which restarts are explicit events."""
        time = self._now() if self._start_time is None else self._start_time
        return self.frame(self._event(wall_time=time, file_version="brain.Event:2").SerializeToString(), 0)

    def frame(self, payload: bytes, offset: int) -> bytes:
        """Encode a record."""
        del offset
        length = struct.pack("<Q", len(payload))
        return b"".join(
            (
                length,
                _CHECKSUM.pack(self._masked_checksum(length)),
                payload,
                _CHECKSUM.pack(self._masked_checksum(payload)),
            )
        )

    def scan(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        """Yield every complete record except for the first, with its end offset."""
        frames = _frames(file)
        next(frames, None)
        end = file.tell()
        for frame in frames:
            end += len(frame)
            yield frame[_LENGTHS.size : -_CHECKSUM.size], end

    def scalars(self, step: int, values: Mapping[str, float]) -> bytes:
        """Encode an event with one point per tag."""
        value = self._summary.Value
        points = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        return self._encode_event(step, summary=self._summary(value=points))

    def text(self, step: int, tag: str, text: str) -> bytes:
        """Encode an event with a Markdown text."""
        plugin = self._metadata.PluginData(plugin_name="text")
        tensor = self._tensor(
            dtype="DT_STRING",
            string_val=[text.encode(errors="backslashreplace")],
            tensor_shape=self._shape(dim=[self._shape.Dim(size=1)]),
        )
        value = self._summary.Value(tag=tag, metadata=self._metadata(plugin_data=plugin), tensor=tensor)
        return self._encode_event(step, summary=self._summary(value=[value]))

    def image(self, step: int, tag: str, data: bytes) -> bytes:
        """Encode an event with a PNG, JPEG or GIF image."""
        width, height = image_size(data)
        image = self._summary.Image(height=height, width=width, colorspace=_RGB, encoded_image_string=data)
        return self._encode_event(step, summary=self._summary(value=[self._summary.Value(tag=tag, image=image)]))

    def audio(self, step: int, tag: str, data: bytes) -> bytes | None:
        """Encode an event with a WAV sound; None if it is damaged."""
        try:
            with wave.open(io.BytesIO(data)) as file:
                facts = {
                    "sample_rate": file.getframerate(),
                    "num_channels": file.getnchannels(),
                    "length_frames": file.getnframes(),
                }
        except (wave.Error, EOFError):  # also for floats, which browsers play, but which have no known length
            return None
        audio = self._summary.Audio(encoded_audio_string=data, content_type="audio/wav", **facts)
        return self._encode_event(step, summary=self._summary(value=[self._summary.Value(tag=tag, audio=audio)]))

    def histogram(self, step: int, tag: str, edges: Sequence[float], counts: Sequence[float]) -> bytes:
        """Encode an event with a histogram: one edge more than counts."""
        plugin = self._metadata.PluginData(plugin_name="histograms")
        buckets = array("d", chain.from_iterable(zip(edges, edges[1:], counts, strict=False)))
        if sys.byteorder == "big":
            buckets.byteswap()
        dim = self._shape.Dim
        tensor = self._tensor(
            dtype="DT_DOUBLE",
            tensor_content=buckets.tobytes(),
            tensor_shape=self._shape(dim=[dim(size=len(buckets) // 3), dim(size=3)]),
        )
        value = self._summary.Value(tag=tag, metadata=self._metadata(plugin_data=plugin), tensor=tensor)
        return self._encode_event(step, summary=self._summary(value=[value]))

    def session_start(self, step: int, hparams: Mapping[str, bool | float | str]) -> bytes:
        """Encode the start of a run with its hyperparameters."""
        now = self._now()
        start = self._hparams.SessionStartInfo(start_time_secs=now)
        for name, value in hparams.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, str):
                start.hparams[name].string_value = value
            else:
                start.hparams[name].number_value = value
        return self._encode_hparams(step, "session_start_info", start, now)

    def experiment(self, step: int, hparams: Mapping[str, bool | float | str], metric_tags: Iterable[str]) -> bytes:
        """Encode which hyperparameters and metrics the table of runs has."""
        api = self._hparams_api
        now = self._now()
        infos = [api.HParamInfo(name=name, type=_HPARAM_TYPES[type(value)]) for name, value in hparams.items()]
        metrics = [api.MetricInfo(name=api.MetricName(tag=tag)) for tag in metric_tags]
        return self._encode_hparams(step, "experiment", api.Experiment(hparam_infos=infos, metric_infos=metrics), now)

    def session_end(self, step: int, *, failed: bool) -> bytes:
        """Encode the end of a run."""
        status = "STATUS_FAILURE" if failed else "STATUS_SUCCESS"
        now = self._now()
        end = self._hparams.SessionEndInfo(status=status, end_time_secs=now)
        return self._encode_hparams(step, "session_end_info", end, now)

    def time_of(self, payload: bytes) -> float:
        """Return the wall time of an event; 0 if it has none."""
        is_dated = len(payload) >= _WALL_TIME_END and payload[0] == _WALL_TIME
        return float(_TIME.unpack_from(payload, 1)[0]) if is_dated else 0.0

    def step_of(self, payload: bytes) -> tuple[int, bool]:
        """Return the step of an event, and whether it voids that step and later ones; step 0 if it is damaged."""
        step = _step_of_scalars(payload)
        if step is not None:
            return step, False
        event = self._parsed(payload)
        return (0, False) if event is None else (event.step, event.HasField("session_log"))

    def restart(self, step: int) -> bytes:
        """Encode an event that voids this step and later ones."""
        return self._encode_event(step, session_log=self._session(status=self._session.START))

    def sorted_frames(self, file: BinaryIO) -> Iterator[bytes]:
        """Yield the file's records in order of steps, without void ones and without evals that were replaced.

        TensorBoard's fast loader takes a step that is smaller than the one before for a restart, and drops points.
        """
        frames = _frames(file)
        yield next(frames, b"")
        starts, steps, sizes = array("Q"), array("q"), array("Q")
        offset, is_valid = file.tell(), bytearray()
        newest: dict[tuple[str, int], int] = {}
        """Number of the event with the newest value of an eval."""
        evals: dict[int, list[str]] = {}
        """Tags of the events of evals, by number."""
        for frame in frames:
            payload = frame[_LENGTHS.size : -_CHECKSUM.size]
            step, event = _step_of_scalars(payload), None
            if step is None:
                event = self._parsed(payload)  # a damaged one stays where it is
                step = event.step if event is not None else steps[-1] if steps else 0
            if event is not None:
                if event.HasField("session_log"):
                    for number, each in enumerate(steps):
                        is_valid[number] = is_valid[number] and each < step
                tags = [value.tag for value in event.summary.value]
                is_valid.append(bool(tags))
                if tags and tags[0].startswith(EVAL):
                    evals[len(steps)] = tags
                    newest.update(((tag, step), len(steps)) for tag in tags)
            else:
                is_valid.append(True)
            starts.append(offset)
            steps.append(step)
            sizes.append(len(frame))
            offset += len(frame)
        for number in sorted((each for each in range(len(steps)) if is_valid[each]), key=steps.__getitem__):
            file.seek(starts[number])
            frame = file.read(sizes[number])
            tags = evals.get(number, [])
            is_current = [newest[tag, steps[number]] == number for tag in tags]
            if all(is_current):
                yield frame
            elif any(is_current):
                event = self._event.FromString(frame[_LENGTHS.size : -_CHECKSUM.size])
                values = [value for value, keeps in zip(list(event.summary.value), is_current, strict=True) if keeps]
                event.summary.CopyFrom(self._summary(value=values))
                yield self.frame(event.SerializeToString(), 0)

    def _encode_hparams(self, step: int, name: str, message: Any, now: float) -> bytes:
        content = self._hparams.HParamsPluginData(version=0, **{name: message}).SerializeToString()
        metadata = self._metadata(plugin_data=self._metadata.PluginData(plugin_name="hparams", content=content))
        value = self._summary.Value(tag=f"_hparams_/{name}", metadata=metadata)
        return self._encode_event(step, now, summary=self._summary(value=[value]))

    def _parsed(self, payload: bytes) -> Any:
        """Decode an event; None if it is damaged."""
        try:
            return self._event.FromString(payload)
        except self._damaged:
            return None

    def _encode_event(self, step: int, now: float | None = None, **what: Any) -> bytes:
        now = self._now() if now is None else now
        self._start_time = now if self._start_time is None else self._start_time
        return self._event(wall_time=now, step=step, **what).SerializeToString()

    def _now(self) -> float:
        return self.event_time if self._clock is None else self._clock()

    def _masked_checksum(self, data: bytes) -> int:
        """Return TensorBoard's checksum: rotated, so that checksums inside the data do not cancel out."""
        crc = self._crc(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _frames(file: BinaryIO) -> Iterator[bytes]:
    """Yield every complete record with its length and checksums; a torn one ends the iteration."""
    while len(header := file.read(_LENGTHS.size)) == _LENGTHS.size:
        length, _ = _LENGTHS.unpack(header)
        body = file.read(length + _CHECKSUM.size)
        if len(body) < length + _CHECKSUM.size:
            return
        yield header + body


def _step_of_scalars(payload: bytes) -> int | None:
    """Decode only the step of an event with values that are not of an eval; None for any other event."""
    if len(payload) <= _WALL_TIME_END or payload[0] != _WALL_TIME or _EVAL in payload:
        return None
    at, step = _WALL_TIME_END, 0
    if payload[at] == _STEP:
        for position, byte in enumerate(payload[at + 1 : at + 1 + _MAX_STEP_BYTES]):
            step |= (byte & 0x7F) << 7 * position
            if byte == byte & 0x7F:  # the last one
                at += 2 + position
                break
    return step if payload[at : at + 1] == _SUMMARY else None
