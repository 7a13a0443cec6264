"""Content of a run beside its metrics: stored once, as a file that is named after its digest, and described by a value.

`store_content` makes a `ContentItem` of what the program gives it. Files are in ``<run_dir>/media``. Nothing is cut:
what is too large or of the wrong type is an error with the fix.
"""

import errno
import hashlib
import importlib
import io
import math
import os
import stat
import struct
import sys
import wave
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, NamedTuple, NoReturn, cast

import msgspec

from evsys_bus.codec import to_builtins
from evsys_bus.codec.encode import find_nonfinite
from evsys_bus.codec.normalize import escape_surrogates
from evsys_bus.codec.redact import Redaction, current_redaction, redact, redact_text
from evsys_bus.context import ContentItem, ContentKind
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk, open_regular, write_all
from evsys_bus.errors import EventError
from evsys_bus.files import replace_file

MEDIA_DIR: Final = "media"  # in the run's directory
MANIFEST: Final = "manifest.json"
"""Name of the list of files, in the folder of a directory that was stored."""
MAX_CONTENT_BYTES: Final = 1 << 30
"""Maximum size of one file, and of all files of one directory."""
MAX_FILES: Final = 10_000  # in one directory
MAX_LISTED_NUMBERS: Final = 16  # an array among metrics with more of them becomes a histogram
MAX_BINS: Final = 512
MAX_SHOWN_BYTES: Final = 8192
"""Size of the text, or of the first rows of a table, that the event itself carries."""
_MAX_CHANNELS: Final = 64  # of audio


class _Format(NamedTuple):
    extension: str
    media_type: str


_PNG: Final = _Format(".png", "image/png")
_WAV: Final = _Format(".wav", "audio/wav")
_HTML: Final = _Format(".html", "text/html")
_JSON: Final = _Format(".json", "application/json")
_FILE: Final = _Format(".bin", "application/octet-stream")  # no browser shows it, whatever is in it

_MAGIC: Final[tuple[tuple[str, int, bytes, _Format], ...]] = (
    ("image figure", 0, b"\x89PNG\r\n\x1a\n", _PNG),
    ("image figure", 0, b"\xff\xd8\xff", _Format(".jpg", "image/jpeg")),
    ("image figure video", 0, b"GIF8", _Format(".gif", "image/gif")),
    ("image figure", 8, b"WEBP", _Format(".webp", "image/webp")),
    ("figure", 0, b"%PDF-", _Format(".pdf", "application/pdf")),
    ("audio", 8, b"WAVE", _WAV),
    ("audio", 0, b"fLaC", _Format(".flac", "audio/flac")),
    ("audio", 0, b"OggS", _Format(".ogg", "audio/ogg")),
    ("audio", 0, b"ID3", _Format(".mp3", "audio/mpeg")),
    ("audio", 0, b"\xff\xfb", _Format(".mp3", "audio/mpeg")),
    ("audio", 0, b"\xff\xf3", _Format(".mp3", "audio/mpeg")),
    ("video", 4, b"ftypqt", _Format(".mov", "video/quicktime")),
    ("video", 4, b"ftyp", _Format(".mp4", "video/mp4")),
    ("video", 0, b"\x1a\x45\xdf\xa3", _Format(".webm", "video/webm")),
    ("video", 8, b"AVI ", _Format(".avi", "video/x-msvideo")),
)
"""Kinds, offset, and the bytes that a file of the format has there."""
_ACCEPTED: Final = {
    "image": "a path, PNG, JPEG, GIF or WebP bytes, a Pillow image, or an array",
    "audio": "a path, WAV, FLAC, Ogg or MP3 bytes, or an array with sample_rate=",
    "video": "a path, or MP4, WebM, MOV, AVI or GIF bytes; imageio.mimwrite(path, frames, fps=30) writes frames",
    "figure": "a matplotlib or plotly figure, or a path to an image, a PDF or an HTML file",
    "html": "HTML as text, or a path",
    "artifact": "a path to a file or a directory",
    "text": "a str",
    "table": "columns= and rows, a data frame, or a list of dicts",
    "histogram": "numbers, or the pair (counts, edges)",
}


def store_content(
    run_dir: str | os.PathLike[str],
    kind: ContentKind,
    name: str,
    value: Any,
    *,
    caption: str | None = None,
    columns: Sequence[str] | None = None,
    bins: int = 64,
    sample_rate: int | None = None,
    artifact_type: str | None = None,
    redaction: Redaction | None = None,
) -> ContentItem:
    """Write content to ``<run_dir>/media`` unless it is there already, and return its description.

    The file is complete and synced when this returns. Texts, tables, HTML given as text, names and captions are
    redacted; files, images and figures are stored as they are.

    Args:
        run_dir: The run's directory.
        kind: What the content is.
        name: Its name in the run. It never becomes part of a path.
        value: The content. A table is a data frame of pandas, polars or pyarrow, a list of dicts, the
            pair (columns, rows), or rows with ``columns``. An image is a path, bytes, a Pillow image, or an array of
            shape (height, width), (height, width, channels) or (channels, height, width), in uint8 or floats from 0
            to 1. Audio is a path, bytes, or an array of shape (samples,) or (samples, channels), in integers or floats
            from -1 to 1. A directory is stored as a list of its files, `MANIFEST`, and each file as an artifact.
        caption: Shown below it.
        columns: The names of the columns of a table.
        bins: How many bins a histogram has, at most 512.
        sample_rate: Samples per second of an array.
        artifact_type: What an artifact is, such as ``dataset``.
        redaction: Which keys are redacted; by default as the bus of this process does it.

    Raises:
        EventError: The value cannot be stored as this kind, or is too large.
        OSError: The file cannot be written.
    """
    if kind not in _ACCEPTED:
        raise EventError(f"there is no content of the kind {kind!r}", fix=f"give one of {', '.join(_ACCEPTED)}")
    policy = current_redaction() if redaction is None else redaction
    store = _Store(Path(run_dir), kind, _clean_text(str(name), policy), policy)
    try:
        if kind == "histogram":
            item = _histogram_item(store.name, value, bins)
        elif kind == "table":
            item = store.table(value, columns)
        elif kind == "audio":
            item = store.audio(value, sample_rate)
        else:
            item = getattr(store, kind, store.media)(value)
    except (EventError, OSError):
        raise
    except Exception as error:  # raised by the value's own code
        raise store.error(value, why=f"{type(error).__name__}: {error}") from error
    return msgspec.structs.replace(
        item,
        caption=None if caption is None else _clean_text(str(caption), policy),
        artifact_type=None if artifact_type is None else _clean_text(str(artifact_type), policy),
    )


def summarize_value(value: Any, *, name: str = "") -> float | list[float] | ContentItem:
    """Return what to record of an array among metrics: a number, at most 16 numbers, or a histogram without a file.

    Raises:
        EventError: It does not consist of numbers.
    """
    numbers = _to_numbers(value, name)
    if len(numbers) <= MAX_LISTED_NUMBERS:
        listed = [float(each) for each in numbers]
        return listed[0] if len(listed) == 1 and _is_scalar(value) else listed
    return _histogram_item(_clean_text(name, current_redaction()), value, 64)


class _Store:
    """Stores one content."""

    def __init__(self, run_dir: Path, kind: ContentKind, name: str, redaction: Redaction | None) -> None:
        self._media: Final = run_dir / MEDIA_DIR
        self._kind: Final = kind
        self.name: Final = name
        self._redaction: Final = redaction

    def text(self, value: Any) -> ContentItem:
        if not isinstance(value, str):
            raise self.error(value, fix="give str(value); the content of a file is path.read_text()")
        text = _clean_text(value, self._redaction)
        encoded = text.encode()
        shown = {"text": text} if len(encoded) <= MAX_SHOWN_BYTES else {}
        return self._bytes(encoded, _Format(".txt", "text/plain"), shown)

    def html(self, value: Any) -> ContentItem:
        if isinstance(value, str) and "<" in value:
            return self._bytes(_clean_text(value, self._redaction).encode(), _HTML)
        if isinstance(value, str | os.PathLike):
            return self._file(cast("str | os.PathLike[str]", value), lambda _: _HTML)
        raise self.error(value)

    def figure(self, value: Any) -> ContentItem:
        figure: Any = value if hasattr(value, "savefig") else getattr(value, "figure", None)  # of an Axes
        if hasattr(figure, "savefig"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            return self._bytes(buffer.getvalue(), _PNG)
        to_html = getattr(value, "to_html", None)
        if callable(to_html):
            return self._bytes(escape_surrogates(str(to_html())).encode(), _HTML)
        return self.image(value) if hasattr(value, "convert") else self.media(value)

    def image(self, value: Any) -> ContentItem:
        if hasattr(value, "convert") and hasattr(value, "save"):  # of Pillow
            image = value if value.mode in {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"} else value.convert("RGB")
            buffer = io.BytesIO()
            image.save(buffer, format="PNG", compress_level=1)
            return self._bytes(buffer.getvalue(), _PNG, {"width": value.width, "height": value.height})
        if isinstance(value, str | bytes | bytearray | memoryview | os.PathLike):
            return self.media(cast("Any", value))
        pixels = self._pixels(self._array(value), prefers_channels_first=hasattr(value, "detach"))
        height, width = pixels.shape[:2]
        return self._bytes(_encode_png(pixels), _PNG, {"width": int(width), "height": int(height)})

    def audio(self, value: Any, sample_rate: int | None) -> ContentItem:
        if isinstance(value, str | bytes | bytearray | memoryview | os.PathLike):
            return self.media(cast("Any", value))
        if type(sample_rate) is not int or sample_rate <= 0:
            raise self.error(value, why="it has no sample rate", fix="give sample_rate=, in samples per second: 16000")
        samples = self._samples(self._array(value))
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(samples.shape[1])
            file.setsampwidth(samples.dtype.itemsize)
            file.setframerate(sample_rate)
            file.writeframes(samples.tobytes())
        return self._bytes(buffer.getvalue(), _WAV, {"seconds": samples.shape[0] / sample_rate})

    def media(self, value: Any) -> ContentItem:
        """Store a path or bytes of a format that is recognised by its first bytes."""
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(cast("bytes", value))
            return self._bytes(data, self._recognize(data[:512]))
        if isinstance(value, str | os.PathLike):
            return self._file(cast("str | os.PathLike[str]", value), self._recognize)
        raise self.error(value)

    def table(self, value: Any, columns: Sequence[str] | None) -> ContentItem:
        found = _frame(value) or self._plain_rows(value, columns)
        names, rows = [str(each) for each in (found[0] if columns is None else columns)], list(found[1])
        if len(set(names)) < len(names):
            raise self.error(value, why="two of its columns have one name", fix="give each column a name of its own")
        for index, row in enumerate(rows):
            if isinstance(row, str) or not hasattr(row, "__len__") or len(row) != len(names):
                why = f"row {index} is no list of {len(names)} values, one for each column"
                raise self.error(value, why=why, fix="give a list for each row; None where there is no value")
        cells = [[_to_cell(each) for each in row] for row in rows]
        if self._redaction is not None:
            entries = [dict(zip(names, row, strict=True)) for row in cells] or [dict.fromkeys(names)]
            redact({"rows": entries}, self._redaction)
            names, cells = list(entries[0]), [list(each.values()) for each in entries[: len(cells)]]
        file: dict[str, Any] = {"columns": names, "rows": cells}
        if nonfinite := find_nonfinite(cells):
            file["nonfinite"] = nonfinite  # JSON has none: they are null in the rows
        first, sizes = cells[:10], accumulate(len(msgspec.json.encode(row)) for row in cells)
        shown = [row for row, size in zip(first, sizes, strict=False) if size <= MAX_SHOWN_BYTES]
        data = {"columns": names, "rows": shown, "row_count": len(cells)}
        return self._bytes(msgspec.json.encode(file), _JSON, data)

    def _plain_rows(self, value: Any, columns: Sequence[str] | None) -> tuple[Iterable[Any], Iterable[Any]]:
        if columns is None and type(value) is tuple and len(cast("tuple[Any, ...]", value)) == 2:  # noqa: PLR2004
            columns, value = cast("tuple[Any, Any]", value)
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise self.error(value)
        rows: list[Any] = list(cast("Iterable[Any]", value))
        if rows and all(isinstance(row, Mapping) for row in rows):
            names = list(dict.fromkeys(key for row in rows for key in row)) if columns is None else list(columns)
            return names, [[row.get(each) for each in names] for row in rows]
        if columns is None:
            raise self.error(value, why="its rows have no column names", fix='give columns=["step", "text"]')
        return columns, rows

    def artifact(self, value: Any) -> ContentItem:
        if not isinstance(value, str | os.PathLike):
            raise self.error(value, fix="write it to a file and give the path")
        path = Path(os.fsdecode(cast("str | os.PathLike[str]", value)))
        if path.is_dir():
            return self._directory(path)
        return self._file(path, lambda _: _FILE, {"file_name": _clean_text(path.name, self._redaction)})

    def _bytes(self, content: bytes, found: _Format, data: dict[str, Any] | None = None) -> ContentItem:
        if len(content) > MAX_CONTENT_BYTES:
            raise self._size_error(len(content))
        digest = hashlib.sha256(content).hexdigest()
        path = _make_folder(self._media) / f"{digest}{found.extension}"
        if not _is_stored(path, len(content)):
            replace_file(path, content, mode=0o666, disk=OsDisk())
        return self._item(f"{MEDIA_DIR}/{path.name}", digest, found.media_type, len(content), data)

    def _file(
        self, path: str | os.PathLike[str], recognize: Callable[[bytes], _Format], data: dict[str, Any] | None = None
    ) -> ContentItem:
        """Copy a file that the program may change or remove later."""
        source_path = os.fsdecode(path)
        try:
            source = open_regular(source_path, os.O_RDONLY)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            fix = "download it first, and give its path" if "://" in source_path else None
            raise self.error(path, why=f"{redact_text(source_path)!r} cannot be read: {error}", fix=fix) from error
        try:
            found = recognize(os.pread(source, 512, 0))
            if (size := os.fstat(source).st_size) > MAX_CONTENT_BYTES:
                raise self._size_error(size)
            name, digest, size = self._copy(source, found.extension)
        finally:
            os.close(source)
        return self._item(f"{MEDIA_DIR}/{name}", digest, found.media_type, size, data)

    def _copy(self, source: int, extension: str) -> tuple[str, str, int]:
        """Copy an open file into the folder. Returns its name there, its digest and its size."""
        folder, disk = _make_folder(self._media), OsDisk()
        incoming = f"{folder}/incoming.new"  # a killed process may leave one; the next copy removes it
        while (target := disk.open_new(incoming, 0o666)) is None:  # another thread or process is copying
            incoming = f"{folder}/incoming.{token_hex(8)}.new"
        hasher, size, is_moved = hashlib.sha256(), 0, False
        try:
            while block := os.read(source, 1 << 20):
                size += len(block)
                if size > MAX_CONTENT_BYTES:
                    raise self._size_error(size)
                hasher.update(block)
                write_all(disk, target, block)
            path = folder / f"{hasher.hexdigest()}{extension}"
            if not _is_stored(path, size):
                disk.sync(target)
                disk.rename(incoming, str(path))
                is_moved = True
                disk.sync_path(str(folder))
        finally:
            if not is_moved:
                with suppress(OSError):  # the next copy removes it
                    disk.remove(incoming)
            disk.close(target)
        return path.name, hasher.hexdigest(), size

    def _directory(self, source: Path) -> ContentItem:
        """Copy the files of a directory, and write a list of them to a folder that is named after the list."""
        try:
            paths, skipped = self._walk(source)
            total = sum(each.stat().st_size for each in paths)
        except OSError as error:
            raise self.error(source, why=f"{redact_text(str(source))!r} cannot be read: {error}") from error
        if total > MAX_CONTENT_BYTES:
            raise self._size_error(total)
        names = {each: _clean_text(each.relative_to(source).as_posix(), self._redaction) for each in (*paths, *skipped)}
        items = [(names[path], self._file(path, lambda _: _FILE)) for path in paths]
        files = [{"path": name, "digest": item.digest, "size": item.size, "stored": item.path} for name, item in items]
        omitted = [names[path] for path in skipped]
        manifest = msgspec.json.encode({"files": files, "skipped": omitted})
        digest = hashlib.sha256(manifest).hexdigest()
        folder = _make_folder(self._media / digest)
        if not _is_stored(folder / MANIFEST, len(manifest)):
            replace_file(folder / MANIFEST, manifest, mode=0o666, disk=OsDisk())
        data: dict[str, Any] = {"file_name": _clean_text(source.name, self._redaction), "file_count": len(files)}
        if omitted:
            data["skipped"] = len(omitted)
            why = "links to directories, and what is no regular file, are not copied"
            log().warning("content.skipped", name=self.name, count=len(omitted), first=omitted[0], why=why)
        size = sum(item.size for _, item in items)
        return self._item(f"{MEDIA_DIR}/{digest}/", digest, "application/x-directory", size, data)

    def _walk(self, source: Path) -> tuple[list[Path], list[Path]]:
        """Return the files of a directory, and what is not copied. Raises OSError."""
        files: list[Path] = []
        skipped: list[Path] = []
        media = os.path.realpath(self._media)
        for folder, folders, names in os.walk(source, onerror=_raise):
            skipped += [Path(folder, each) for each in folders if Path(folder, each).is_symlink()]
            folders[:] = [each for each in folders if os.path.realpath(Path(folder, each)) != media]
            for path in (Path(folder, each) for each in names):
                (files if path.is_file() else skipped).append(path)
            if len(files) > MAX_FILES:
                fix = "pack them into one file (tar), or upload the directory with the adapter checkpoint_upload"
                raise self.error(source, why=f"it has more than {MAX_FILES:,} files", fix=fix)
        return sorted(files), sorted(skipped)

    def _recognize(self, head: bytes) -> _Format:
        for kinds, offset, magic, found in _MAGIC:
            is_there = head[offset : offset + len(magic)] == magic and (offset != 8 or head[:4] == b"RIFF")  # noqa: PLR2004
            if is_there and self._kind in kinds:
                return found
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if self._kind == "figure" and start.startswith(b"<"):
            return _Format(".svg", "image/svg+xml") if b"<svg" in start and b"<html" not in start else _HTML
        why = f"its first bytes {head[:8]!r} are of no known format" if head else "it is empty"
        raise self.error(head, why=why, fix=f"give {_ACCEPTED[self._kind]}; or record the file with artifact")

    def _item(self, path: str, digest: str, media_type: str, size: int, data: dict[str, Any] | None) -> ContentItem:
        return ContentItem(self._kind, self.name, path, digest, media_type, size, data=data or {})

    def _array(self, value: Any) -> Any:
        """Return a numpy array of numbers."""
        try:
            numpy: Any = importlib.import_module("numpy")
        except ImportError:
            raise self.error(value, why="an array needs numpy", fix="pip install numpy, or give a file") from None
        array = _to_array(numpy, value)
        if array is None or array.dtype.kind not in "buif" or array.size == 0:
            raise self.error(value)
        return array

    def _pixels(self, array: Any, *, prefers_channels_first: bool) -> Any:
        """Return uint8 pixels of shape (height, width, channels)."""
        shape = array.shape if array.ndim != 2 else (*array.shape, 1)  # noqa: PLR2004
        is_first, is_last = shape[0] in {1, 3, 4}, shape[-1] in {1, 2, 3, 4}
        if len(shape) != 3 or not (is_first or is_last):  # noqa: PLR2004
            fix = "give one image of shape (height, width), (height, width, channels) or (channels, height, width)"
            raise self.error(array, why=f"its shape is {tuple(shape)}", fix=fix)
        is_transposed = is_first and array.ndim == 3 and (prefers_channels_first or not is_last)  # noqa: PLR2004
        array = array.transpose(1, 2, 0) if is_transposed else array.reshape(shape)
        if array.dtype.kind == "b":
            return array.astype("uint8") * 255
        is_float = array.dtype.kind == "f"
        fix = "give uint8, or floats from 0 to 1 without NaN: (x - x.min()) / (x.max() - x.min())"
        self._check_range(array, 0, 1 if is_float else 255, fix)
        return (array * 255 + 0.5 if is_float else array).astype("uint8")

    def _samples(self, array: Any) -> Any:
        """Return little-endian samples of shape (samples, channels), of a type that WAV files have."""
        if array.ndim == 2 and array.shape[0] < array.shape[1] and array.shape[0] <= _MAX_CHANNELS:  # noqa: PLR2004
            array = array.T
        array = array[:, None] if array.ndim == 1 else array
        if array.ndim != 2 or array.shape[1] > _MAX_CHANNELS:  # noqa: PLR2004
            fix = "give an array of shape (samples,) or (samples, channels)"
            raise self.error(array, why=f"its shape is {tuple(array.shape)}", fix=fix)
        if array.dtype.kind == "f":
            self._check_range(array, -1, 1, "give int16, or floats from -1 to 1 without NaN: x / abs(x).max()")
            return (array * 32767).round().astype("<i2")
        if array.dtype.name not in {"uint8", "int16", "int32"}:
            fix = "give uint8, int16, int32, or floats from -1 to 1"
            raise self.error(array, why=f"it is an array of {array.dtype.name}", fix=fix)
        return array.astype(array.dtype.newbyteorder("<"))

    def _check_range(self, array: Any, least: int, most: int, fix: str) -> None:
        low, high = float(array.min()), float(array.max())
        if not (least <= low and high <= most):  # also of NaN
            raise self.error(array, why=f"its values are from {low:.4g} to {high:.4g}", fix=fix)

    def error(self, value: Any, *, why: str | None = None, fix: str | None = None) -> EventError:
        what = f"{self._kind} {self.name!r} cannot be stored: {why or f'it is a {type(value).__name__}'}"
        return EventError(what, fix=fix or f"give {_ACCEPTED[self._kind]}")

    def _size_error(self, size: int) -> EventError:
        why = f"it has {size:,} bytes, and at most {MAX_CONTENT_BYTES:,} are stored"
        return self.error(
            None, why=why, fix="upload large files with the adapter checkpoint_upload; record where they are"
        )


def _make_folder(path: Path) -> Path:
    """Create a folder with its parents, and return it. A link there is refused: its target may be anywhere."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        if not stat.S_ISDIR(path.lstat().st_mode):
            why = "content is stored in a directory, and not through a link: remove what is there"
            raise NotADirectoryError(errno.ENOTDIR, why, str(path)) from None
    return path


def _is_stored(path: Path, size: int) -> bool:
    """Whether a file is there, and complete: one of the right size that is no link."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def _raise(error: OSError) -> NoReturn:
    raise error


def _clean_text(text: str, redaction: Redaction | None) -> str:
    return escape_surrogates(text if redaction is None else redact_text(text))


def _frame(value: Any) -> tuple[Iterable[Any], Iterable[Any]] | None:
    """Return the columns and rows of a data frame; None if it is none."""
    value = value.collect() if hasattr(value, "collect_schema") and hasattr(value, "collect") else value  # polars, lazy
    if callable(getattr(value, "to_pydict", None)):  # pyarrow
        return value.schema.names, zip(*value.to_pydict().values(), strict=True)
    if hasattr(value, "columns") and callable(getattr(value, "rows", None)):  # polars
        return value.columns, value.rows()
    if hasattr(value, "columns") and callable(getattr(value, "to_dict", None)):  # pandas
        has_named_index = any(name is not None for name in getattr(getattr(value, "index", None), "names", ()))
        split = (value.reset_index() if has_named_index else value).to_dict("split")
        return split["columns"], split["data"]
    return None


def _to_cell(value: Any, depth: int = 8) -> Any:  # noqa: PLR0911 - one line for each kind of value
    """Copy a value of a table into built-in types, whole."""
    kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
    if kind is float or kind is bool or value is None:
        return value
    if kind is str:
        return value if value.isascii() else escape_surrogates(value)
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if depth and kind in {list, tuple}:
        return [_to_cell(each, depth - 1) for each in value]
    if depth and kind is dict:
        return {escape_surrogates(str(key)): _to_cell(each, depth - 1) for key, each in value.items()}
    if kind.__name__ in {"NAType", "NaTType"}:  # pandas: no value
        return None
    if depth and hasattr(kind, "dtype") and hasattr(kind, "tolist"):
        return _to_cell(value.tolist(), depth - 1)
    return to_builtins(value)[0]


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == () or not hasattr(value, "__iter__")


def _to_array(numpy: Any, value: Any) -> Any:
    """Return a numpy array of what numpy, torch, jax or nested lists hold; None if it is none."""
    try:
        if hasattr(value, "detach"):  # torch
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return numpy.asarray(value)
    except (TypeError, ValueError, RuntimeError):  # ragged lists; a tensor without data
        return None


def _encode_png(pixels: Any) -> bytes:
    """Encode uint8 pixels of shape (height, width, channels). Not by Pillow: equal pixels make equal files."""
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    lines = rows.copy()
    lines[1:] -= rows[:-1]  # each line as the difference to the one above, which compresses better
    filtered = b"".join(b"\x02" + line.tobytes() for line in lines)
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks
    )


def _histogram_item(name: str, value: Any, bins: int) -> ContentItem:
    if type(bins) is not int or not 1 <= bins <= MAX_BINS:
        raise EventError(f"histogram {name!r}: bins={bins!r}", fix=f"give a whole number from 1 to {MAX_BINS}")
    is_pair = type(value) is tuple and len(cast("tuple[Any, ...]", value)) == 2 and not _is_scalar(value[0])  # noqa: PLR2004
    data = _counted(name, *value) if is_pair else _count(_to_numbers(value, name), bins)
    encoded = msgspec.json.encode(data)
    digest = hashlib.sha256(encoded).hexdigest()
    return ContentItem("histogram", name, None, digest, _JSON.media_type, len(encoded), data=data)


def _to_numbers(value: Any, name: str) -> Any:
    """Return a flat numpy array or, if the program does not use numpy, a list of floats."""
    numpy: Any = sys.modules.get("numpy")
    try:
        whole: Any = list(cast("Iterable[Any]", value)) if isinstance(value, Iterator | set) else value
        array = None if numpy is None else _to_array(numpy, whole)
        if array is not None and array.dtype.kind in "buif":
            return array.reshape(-1).astype("float64")
        return [float(each) for each in _flatten(whole.tolist() if hasattr(whole, "tolist") else whole)]
    except Exception as error:  # text, or raised by the value's own code
        what = f"{name!r} does not consist of numbers: it is a {type(cast('Any', value)).__name__}"
        raise EventError(what, fix=f"give {_ACCEPTED['histogram']}") from error


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, str | bytes | Mapping):
        raise TypeError
    if isinstance(value, Iterable):
        yield from chain.from_iterable(map(_flatten, cast("Iterable[Any]", value)))
    else:
        yield value


def _count(numbers: Any, bins: int) -> dict[str, Any]:
    """Count numbers into bins of the same width. NaN and infinities are counted apart."""
    is_list = isinstance(numbers, list)
    if is_list:
        listed = cast("list[float]", numbers)
        finite: Any = [each for each in listed if math.isfinite(each)]
        nonfinite = [each for each in listed if not math.isfinite(each)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
    else:
        is_finite = abs(numbers) < math.inf
        finite, nonfinite = numbers[is_finite], cast("list[float]", numbers[~is_finite].tolist())
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    edges = _edges(low, high, bins)
    if is_list:
        counts = [0] * bins
        for each in finite:
            counts[bisect_right(edges, each, 1, bins) - 1] += 1
    else:
        numpy: Any = sys.modules["numpy"]
        indices = numpy.searchsorted(numpy.asarray(edges[1:-1]), finite, side="right")
        counts = numpy.bincount(indices, minlength=bins).tolist()
    data: dict[str, Any] = {"edges": edges, "counts": counts}
    above, below = nonfinite.count(math.inf), nonfinite.count(-math.inf)
    tally = {"nan": len(nonfinite) - above - below, "inf": above, "-inf": below}
    if nonfinite:
        data["nonfinite"] = {name: count for name, count in tally.items() if count}
    return data


def _edges(low: float, high: float, bins: int) -> list[float]:
    """Return the edges of the bins, in ascending order; of equal numbers, around them."""
    if low == high:
        pad = max(0.5, abs(low) * 1e-3)
        low, high = max(low - pad, -sys.float_info.max), min(high + pad, sys.float_info.max)
    # Not low + i * (high - low) / bins: the difference of two large numbers may be infinite.
    edges = (low * (1 - index / bins) + high * (index / bins) for index in range(1, bins))
    return [low, *accumulate((min(max(low, each), high) for each in edges), max), high]


def _counted(name: str, counts: Any, edges: Any) -> dict[str, Any]:
    """Check counts that the program made itself, such as those of ``numpy.histogram``."""
    numbers, limits = (list(map(float, _to_numbers(each, name))) for each in (counts, edges))
    is_valid = all(map(math.isfinite, (*numbers, *limits))) and all(low <= high for low, high in pairwise(limits))
    if len(limits) != len(numbers) + 1 or not 1 <= len(numbers) <= MAX_BINS or not is_valid:
        fix = f"give at most {MAX_BINS} finite counts, and one more finite edge, ascending"
        raise EventError(f"histogram {name!r}: {len(numbers)} counts and {len(limits)} edges", fix=fix)
    return {"edges": limits, "counts": [int(each) if each.is_integer() else each for each in numbers]}
