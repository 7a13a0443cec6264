"""Encoding of W&B's run files, and the records that `wandb_logger` writes.

    :W&B magic version · blocks of 32 KiB with chunks: checksum · length · kind · part of a ``Record`` message

This is the file that W&B's own service writes and `wandb sync` uploads. It is written in this process to be exact after
a crash: the service buffers rows and does not report when they are on disk. The message classes are W&B's.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import chain
from typing import Any, BinaryIO, Final, NamedTuple

from evsys_adapters.common.logged_values import json_of, stable_key

_FILE_HEADER: Final = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
_BLOCK_BYTES: Final = 1 << 15
_CHUNK_HEADER: Final = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_OLDEST_READER: Final = "0.40.0"
"""The oldest version of W&B that reads such records, as in files that W&B writes."""


_IGNORED_KEYS: Final = frozenset({"_step", "_runtime"})
"""Items of a row that depend on the start of the file."""


class RecordInfo(NamedTuple):
    """Properties of a record."""

    row: int
    """Number of a history row; -1 for any other record."""
    is_exit: bool
    """Whether it ends the run."""
    start_time: float | None
    """Start of the run, in seconds since the epoch; None for other records."""


def row_key(items: Mapping[str, str]) -> int:
    """Return a key that is equal for history rows with the same values and time; values are given as JSON."""
    pairs = sorted((name, value) for name, value in items.items() if name not in _IGNORED_KEYS)
    return stable_key("\0".join(chain.from_iterable(pairs)).encode(errors="surrogatepass"))


class Records:
    """Encodes and decodes records; an instance holds the imported message classes."""

    def __init__(self) -> None:
        # protobuf generates its classes at import, and wandb need not be installed for type checking
        self._messages: Any = import_module("wandb.proto.wandb_internal_pb2")
        self._producer: str = import_module("wandb").__version__

    def header(self) -> bytes:
        """Return the file's header."""
        return _FILE_HEADER

    def frame(self, payload: bytes, offset: int) -> bytes:
        """Encode a record, in as many chunks as the blocks require."""
        out = bytearray()
        rest = memoryview(payload)
        first = True
        while first or rest:
            free = _BLOCK_BYTES - (offset + len(out)) % _BLOCK_BYTES
            if free < _CHUNK_HEADER.size:
                out += bytes(free)
                free = _BLOCK_BYTES
            chunk, rest = rest[: free - _CHUNK_HEADER.size], rest[free - _CHUNK_HEADER.size :]
            kind = (_FIRST if rest else _FULL) if first else (_MIDDLE if rest else _LAST)
            out += _CHUNK_HEADER.pack(zlib.crc32(chunk, zlib.crc32(bytes([kind]))), len(chunk), kind) + chunk
            first = False
        return bytes(out)

    def scan(self, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
        """Yield every complete record with its end offset."""
        offset = len(file.read(len(_FILE_HEADER)))
        chunks: list[bytes] = []
        while True:
            free = _BLOCK_BYTES - offset % _BLOCK_BYTES
            if free < _CHUNK_HEADER.size:
                offset += len(file.read(free))
                continue
            head = file.read(_CHUNK_HEADER.size)
            if len(head) < _CHUNK_HEADER.size:
                return
            _, length, kind = _CHUNK_HEADER.unpack(head)
            chunk = file.read(length)
            if len(chunk) < length or not _FULL <= kind <= _LAST:
                return
            offset += _CHUNK_HEADER.size + length
            chunks.append(chunk)
            if kind in {_FULL, _LAST}:
                yield b"".join(chunks), offset
                chunks = []

    def version(self, run_id: str) -> bytes:
        """Encode the first record of a file."""
        versions = self._messages.VersionInfo(producer=self._producer, min_consumer=_OLDEST_READER)
        return self._record(run_id, header=self._messages.HeaderRecord(version_info=versions))

    def run(
        self, run_id: str, config: Mapping[str, Any], start_time: float, tags: Iterable[str] = (), **names: str | None
    ) -> bytes:
        """Encode the run's description. Names: project, entity, run_group, job_type, display_name, notes."""
        set_names = {key: value for key, value in names.items() if value}
        run = self._messages.RunRecord(run_id=run_id, tags=tags, **set_names)
        for key, value in config.items():
            run.config.update.add(key=key, value_json=json_of(value))
        run.start_time.seconds, run.start_time.nanos = int(start_time), int(start_time % 1 * 1e9)
        return self._record(run_id, run=run)

    def config(self, run_id: str, changed: Mapping[str, Any]) -> bytes:
        """Encode changed keys of the configuration."""
        config = self._messages.ConfigRecord()
        for key, value in changed.items():
            config.update.add(key=key, value_json=json_of(value))
        return self._record(run_id, config=config)

    def alert(self, run_id: str, title: str, text: str, level: str) -> bytes:
        """Encode an alert, of which W&B notifies the user."""
        level = {"info": "INFO", "error": "ERROR"}.get(level, "WARN")
        return self._record(run_id, alert=self._messages.AlertRecord(title=title, text=text or title, level=level))

    def metric(self, run_id: str, name: str, step_metric: str | None, *, replaces: bool = False) -> bytes:
        """Encode the definition of a metric with its step metric, or without one the definition of a step metric."""
        metric = self._messages.MetricRecord(name=_escaped(name), step_metric=_escaped(step_metric or ""))
        if replaces:
            metric._control.overwrite = True  # noqa: SLF001 # a field of W&B's message
        metric.options.defined = True
        metric.options.hidden = step_metric is None
        return self._record(run_id, metric=metric)

    def row(self, run_id: str, number: int, values: Mapping[str, Any]) -> bytes:
        """Encode a history row; its first value is the step."""
        history = self._messages.HistoryRecord()
        for key, value in values.items():
            history.item.add(nested_key=[key], value_json=json_of(value))
        history.item.add(nested_key=["_step"], value_json=str(number))
        history.step.num = number
        return self._record(run_id, history=history)

    def summary(self, run_id: str, values: Mapping[str, Any]) -> bytes:
        """Encode the run's summary, which lists of runs show."""
        summary = self._messages.SummaryRecord()
        for key, value in values.items():
            summary.update.add(nested_key=[key], value_json=json_of(value))
        return self._record(run_id, summary=summary)

    def file(self, run_id: str, path: str) -> bytes:
        """Encode that a file in the run's ``files`` folder belongs to the run."""
        files = self._messages.FilesRecord()
        files.files.add(path=path)
        return self._record(run_id, files=files)

    def exit(self, run_id: str, *, failed: bool) -> bytes:
        """Encode the end of the run."""
        return self._record(run_id, exit=self._messages.RunExitRecord(exit_code=int(failed)))

    def info(self, payload: bytes) -> RecordInfo:
        """Decode the properties of a record that continuing an existing file requires."""
        record = self._messages.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        row = int(record.history.step.num) if kind == "history" else -1
        start = record.run.start_time if kind == "run" else None
        return RecordInfo(row, kind == "exit", None if start is None else start.seconds + start.nanos / 1e9)

    def key_and_time(self, payload: bytes) -> tuple[int, float] | None:
        """Return the key and the time of a history row; None for any other record."""
        record = self._messages.Record.FromString(payload)
        if record.WhichOneof("record_type") != "history":
            return None
        items = {item.nested_key[0]: item.value_json for item in record.history.item}
        return row_key(items), float(items.get("_timestamp") or 0.0)

    def without_steps_from(self, first_step: float, payloads: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the records except for rows from this step on and the end of the run."""
        for payload in payloads:
            record = self._messages.Record.FromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "exit" or (kind == "history" and _step(record.history) >= first_step):
                continue
            yield payload

    def without_replaced_evals(self, payloads: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the records without values of evals that were replaced."""
        records = [self._messages.Record.FromString(payload) for payload in payloads]
        newest: dict[tuple[str, float, str], int] = {}
        for index, record in enumerate(records):
            newest |= dict.fromkeys(_evals_of(record), index)
        for index, record in enumerate(records):
            keys = list(_evals_of(record))
            if keys and all(newest[key] != index for key in keys):
                continue
            for key in keys:
                if newest[key] != index:
                    at = next(n for n, item in enumerate(record.history.item) if item.nested_key[0] == key[2])
                    del record.history.item[at]
            yield record.SerializeToString()

    def _record(self, run_id: str, **what: Any) -> bytes:
        record = self._messages.Record(**what)
        record._info.stream_id = run_id  # noqa: SLF001 # a field of W&B's message
        return record.SerializeToString()


def _step(history: Any) -> float:
    """Return the step of a row; -1 if it has none."""
    items = history.item
    return float(items[0].value_json) if items and items[0].nested_key[0].endswith("/step") else -1.0


def _evals_of(record: Any) -> Sequence[tuple[str, float, str]]:
    """Return eval name, step and metric of the eval values in a record."""
    items = record.history.item
    if not items or not items[0].nested_key[0].startswith("eval/"):
        return ()
    head, step = items[0].nested_key[0], _step(record.history)
    return [(head, step, item.nested_key[0]) for item in items[1:] if not item.nested_key[0].startswith("_")]


def _escaped(name: str) -> str:
    """Escape dots in the name of a defined metric, which would separate its parts."""
    return name.replace("\\", "\\\\").replace(".", "\\.")
