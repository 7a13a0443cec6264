"""What a run stores beside numbers: texts, tables, pictures, files."""

import errno
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

from evsys_bus.bus import EventBus
from evsys_bus.codec import to_builtins
from evsys_bus.context import ContentItem, ContentKind, LoopState
from evsys_bus.diagnostics import FaultLog
from evsys_bus.errors import EventError
from evsys_bus.events import Content, Event
from evsys_bus.front.rows import Row

_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_DEPTH: Final = 32
PLAIN: Final = frozenset({float, int, bool, str, type(None)})
"""Types of metrics that are logged unchanged."""


class ContentLogger:
    """The methods of a `Run` that store content: once in ``<run>/media``, and by reference in the journal.

    On a full disk, content is not stored, with a WARNING, and the training continues.

    Raises:
        EventError: The content cannot be stored.
        OSError: A file that is given cannot be read.
    """

    bus: EventBus
    state: LoopState
    path: Path
    _faults: FaultLog

    @property
    @abstractmethod
    def name(self) -> str:
        """The run key."""

    def text(self, name: str, text: str, *, step: int | None = None) -> ContentItem:
        """Store a text."""
        return self._store("text", name, text, step)

    def table(
        self, name: str, rows: Any = None, *, columns: Iterable[str] | None = None, step: int | None = None
    ) -> ContentItem:
        """Store a table: rows with the names of their columns, a list of dicts, or a data frame."""
        return self._store("table", name, rows, step, columns=None if columns is None else [*columns])

    def histogram(self, name: str, values: Any, *, bins: int = 64, step: int | None = None) -> ContentItem:
        """Store the distribution of values, or one as ``(counts, edges)``."""
        return self._store("histogram", name, values, step, bins=bins)

    def image(self, name: str, image: Any, *, caption: str | None = None, step: int | None = None) -> ContentItem:
        """Store an image: a path, the bytes of a file, a Pillow image, or an array (HW, HWC or CHW; uint8 or 0..1)."""
        return self._store("image", name, image, step, caption=caption)

    def audio(
        self,
        name: str,
        audio: Any,
        *,
        sample_rate: int | None = None,
        caption: str | None = None,
        step: int | None = None,
    ) -> ContentItem:
        """Store a sound: a path, the bytes of a file, or an array with its sample rate in Hz."""
        return self._store("audio", name, audio, step, caption=caption, sample_rate=sample_rate)

    def video(self, name: str, video: Any, *, caption: str | None = None, step: int | None = None) -> ContentItem:
        """Store a video: a path, or the bytes of a file."""
        return self._store("video", name, video, step, caption=caption)

    def figure(self, name: str, figure: Any, *, caption: str | None = None, step: int | None = None) -> ContentItem:
        """Store a figure of matplotlib, as PNG, or of plotly, as HTML."""
        return self._store("figure", name, figure, step, caption=caption)

    def html(self, name: str, html: str | os.PathLike[str], *, step: int | None = None) -> ContentItem:
        """Store HTML: a text, or the path of a file."""
        return self._store("html", name, html, step)

    def artifact(self, name: str, path: str | os.PathLike[str], *, type: str | None = None) -> ContentItem:  # noqa: A002 # the field's word
        """Store a copy of a file or a directory, such as a data set."""
        return self._store("artifact", name, path, None, artifact_type=type)

    def _plain_part(self, part: Row, step: int | None) -> Row:
        """Return the part with numbers in place of arrays; large ones are stored as histograms."""
        plain: Row = {}
        for name, value in _flatten(part):
            plain_value = value if type(value) in PLAIN else self._plain_value(name, value)
            if isinstance(plain_value, ContentItem):
                self._publish(Content(self.state, self._step_of(step), plain_value))
            else:
                plain[name] = plain_value
        return plain

    def _plain_value(self, name: str, value: Any) -> Any:
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int | float):
            return int(value) if isinstance(value, int) else float(value)
        if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of numpy, torch, jax
            value = value.item()
            if type(value) in PLAIN:
                return value
        from evsys_bus.front.media import summarize_value  # most metrics are numbers

        try:
            return summarize_value(value, name=name)
        except EventError as error:  # one odd value must not end a training
            self._faults.warn("run.metric_not_a_number", name, run=self.name, metric=name, why=error.what)
            return to_builtins(value)[0]

    def _store(
        self, kind: ContentKind, name: str, value: Any, step: int | None, caption: str | None = None, **options: Any
    ) -> ContentItem:
        if not self._is_usable():
            return ContentItem(kind, name)
        from evsys_bus.front.media import store_content  # most runs store nothing

        try:
            item = store_content(self.path, kind, name, value, caption=caption, redaction=self.bus.redaction, **options)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            self._faults.warn("run.content_not_stored", kind, error=error, run=self.name, kind=kind, name=name)
            return ContentItem(kind, name)
        number = None if kind == "artifact" else self._step_of(step)
        self._publish(Content(self.state, number, item))
        return item

    @abstractmethod
    def _is_usable(self) -> bool: ...

    @abstractmethod
    def _publish(self, event: Event) -> None: ...

    @abstractmethod
    def _step_of(self, step: int | None) -> int: ...


def _flatten(metrics: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Iterate over names and values; those of a nested dict have a path as their name: ``val/acc``."""
    for key, value in metrics.items():
        name = prefix + (str.__str__(key) if isinstance(key, str) else str(key))
        if isinstance(value, Mapping) and depth < _MAX_DEPTH:
            yield from _flatten(cast("Mapping[Any, Any]", value), f"{name}/", depth + 1)
        else:
            yield name, value
