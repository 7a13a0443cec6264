"""Content of a run as files and row values of W&B's data types.

<wandb run>/files/media/images/…, audio/…, videos/…, html/…, table/…      shown in the run's charts
<wandb run>/files/media/artifact/<name>/…                                  shown in the run's files
"""

import errno
import hashlib
import html
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import msgspec

from evsys_adapters.common.hook_arguments import safe_name
from evsys_adapters.common.logged_content import Content, image_size
from evsys_adapters.common.logged_values import Table, json_of
from evsys_bus.disk import current_disk
from evsys_bus.errors import RetryLaterError
from evsys_bus.files import replace_file
from evsys_bus.location import short_digest

_MAX_TABLE_ROWS: Final = 200_000  # of W&B
_MAX_BINS: Final = 512  # of W&B
_FOLDERS: Final[Mapping[str, tuple[str, str]]] = {
    "image": ("images", "image-file"),
    "audio": ("audio", "audio-file"),
    "video": ("videos", "video-file"),
    "html": ("html", "html-file"),
}
_IMAGE_TYPES: Final = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_NO_LINK: Final = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES})


class Media(NamedTuple):
    """A content as W&B shows it."""

    value: dict[str, Any] | str
    """What the row has."""
    files: list[str]
    """Files of the run that it refers to, relative to ``files``."""
    remark: str | None = None
    """What is not shown as it is, in words."""


def media_of(files: Path, step: int, content: Content) -> Media:
    """Add the files of a content to the run's, and return the value of its row.

    Args:
        files: The folder ``files`` of the W&B run.
        step: The step, which is part of the name of the file of a table.
        content: The content.

    Raises:
        RetryLaterError: A file cannot be read or written now.
    """
    try:
        return _media(files, step, content)
    except FileNotFoundError:
        return Media(content.line("its file is missing"), [])
    except OSError as error:
        raise RetryLaterError(f"{content.file} cannot be added to {files}: {error}") from error


def write_table(files: Path, head: str, step: int | None, table: Table) -> dict[str, Any]:
    """Write a table to a file of the run; returns the row value that refers to it.

    Raises:
        OSError: The disk refuses it.
    """
    data = json_of({"columns": table.columns, "data": table.rows, "caption": table.caption}).encode()
    name = f"{safe_name(head)}-{short_digest(head)}_{'final' if step is None else step}.table.json"
    path = f"media/table/{name}"
    replace_file(files / path, data, mode=0o666)
    return {
        "_type": "table-file",
        "path": path,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "ncols": len(table.columns),
        "nrows": len(table.rows),
        "caption": table.caption,
    }


def _media(files: Path, step: int, content: Content) -> Media:
    if content.kind == "histogram":
        edges, counts = content.data.get("edges", []), content.data.get("counts", [])
        return Media({"_type": "histogram", "values": counts[:_MAX_BINS], "bins": edges[: _MAX_BINS + 1]}, [])
    if content.kind == "table":
        value = write_table(files, f"media/{content.name}", step, content.table(_MAX_TABLE_ROWS))
        return Media(value, [value["path"]])
    if content.kind == "text":
        return _text(files, content)
    kind = "html" if content.media_type == "text/html" else "image" if content.kind == "figure" else content.kind
    if kind not in _FOLDERS or (kind == "image" and content.media_type not in _IMAGE_TYPES):
        return _artifact(files, content)
    folder, value_type = _FOLDERS[kind]
    assert content.file is not None
    path = f"media/{folder}/{_file_name(content, content.file.suffix)}"
    _place(content.file, files / path)
    value: dict[str, Any] = {
        "_type": value_type,
        "path": path,
        "sha256": content.digest,
        "size": content.size,
    }
    if kind == "image":
        width, height = (content.data.get(name) for name in ("width", "height"))
        if not (width and height):
            width, height = image_size(content.read() or b"")
        value["format"] = content.media_type.removeprefix("image/")
        value |= {"width": width, "height": height} if width and height else {}
    return Media(value | ({"caption": content.caption} if content.caption else {}), [path])


def _text(files: Path, content: Content) -> Media:
    text = content.text()
    if text is None:
        raise FileNotFoundError
    data = f"<pre>{html.escape(text)}</pre>".encode()
    path = f"media/html/{_file_name(content, '.html')}"
    replace_file(files / path, data, mode=0o666)
    value: dict[str, Any] = {
        "_type": "html-file",
        "path": path,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    return Media(value, [path], "W&B has no texts: they are pages of HTML")


def _artifact(files: Path, content: Content) -> Media:
    """Add a file or a directory to the files of the run."""
    if content.file is None:
        raise FileNotFoundError
    folder = f"media/artifact/{safe_name(content.name)}-{content.digest[:8]}"
    paths: list[str] = []
    for name, source in _files_of(content):
        path = f"{folder}/{name}"
        _place(source, files / path)
        paths.append(path)
    facts = {"path": folder, "size": content.size, "sha256": content.digest, "type": content.artifact_type}
    value = {key: each for key, each in facts.items() if each is not None}
    where = "they are in the files of the run, under media/artifact"
    what = "artifacts are not uploaded as W&B artifacts" if content.kind == "artifact" else content.media_type
    return Media(json_of(value | {"caption": content.caption} if content.caption else value), paths, f"{what}: {where}")


def _files_of(content: Content) -> Iterator[tuple[str, Path]]:
    """Yield the files of an artifact with their names in it."""
    assert content.file is not None
    assert content.path is not None
    if not content.path.endswith("/"):
        yield safe_name(str(content.data.get("file_name") or content.file.name)), content.file
        return
    run_folder = content.file.parents[1]
    manifest = msgspec.json.decode((content.file / "manifest.json").read_bytes())
    for each in manifest["files"]:
        name, stored = str(each["path"]), PurePosixPath(str(each["stored"]))
        if ".." not in (*PurePosixPath(name).parts, *stored.parts) and not stored.is_absolute():
            yield name.lstrip("/"), run_folder / stored


def _file_name(content: Content, suffix: str) -> str:
    return f"{safe_name(content.name)[:100]}_{content.digest[:20]}{suffix}"


def _place(source: Path, target: Path) -> None:
    """Make the file available under a second name; content never changes, so a link is enough where there is one.

    Raises:
        OSError: The disk refuses it.
    """
    disk = current_disk()
    disk.make_directory(str(target.parent), 0o777)
    size = disk.size(str(source))
    try:
        disk.hard_link(str(source), str(target))
    except FileExistsError:
        if disk.size(str(target)) == size:
            return
        replace_file(target, source.read_bytes(), mode=0o666)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        replace_file(target, source.read_bytes(), mode=0o666)
    disk.sync_path(str(target.parent))
