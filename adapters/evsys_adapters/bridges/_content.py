"""What programs log with W&B's client beside numbers: pictures, sounds, tables, files. Each knows how to be stored."""

# Figures, data frames and the like are of types that the checks do not have.
# pyright: basic

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Final, Self

from evsys_adapters.bridges._arrays import gif, is_array, pixels, to_array, to_scalar
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_bus.context import ContentItem

_PLAIN_CELLS: Final = (str, int, float, bool, type(None))


class Media:
    """Something to log that is stored as a file."""

    kind: ClassVar[str]

    def __init__(self, data: Any, caption: str | None = None, **options: Any) -> None:
        self._data = data
        self._options = options if caption is None else {"caption": caption, **options}

    def store(self, bridge: StepBridge, name: str, step: int | None) -> ContentItem:
        """Store it in the run."""
        return getattr(bridge.open(), self.kind)(name, self._data, step=step, **self._options)


class Image(Media):
    """A picture: a file, a Pillow image, a figure of matplotlib, or an array of 0..255, 0..1 or -1..1."""

    kind = "image"

    def __init__(
        self,
        data_or_path: Any,
        mode: str | None = None,
        caption: str | None = None,
        grouping: Any = None,
        classes: Any = None,
        boxes: Any = None,
        masks: Any = None,
        file_type: str | None = None,
        normalize: bool = True,
    ) -> None:
        del mode, grouping, classes, file_type, normalize
        self.has_overlays = bool(boxes or masks)
        super().__init__(_picture(data_or_path), caption)
        self.kind = "figure" if hasattr(data_or_path, "savefig") else "image"  # pyright: ignore[reportAttributeAccessIssue,reportIncompatibleVariableOverride] # of this one

    def store(self, bridge: StepBridge, name: str, step: int | None) -> ContentItem:
        """Store it in the run, without boxes and masks."""
        if self.has_overlays:
            bridge.warn_not_carried("boxes and masks of wandb.Image")
        return super().store(bridge, name, step)


class Video(Media):
    """A video: a file, or an array of shape (frames, channels, height, width), which needs Pillow."""

    kind = "video"

    def __init__(
        self,
        data_or_path: Any,
        caption: str | None = None,
        fps: int | None = None,
        format: str | None = None,  # noqa: A002 # the signature it replaces
    ) -> None:
        super().__init__(_read(data_or_path), caption)
        self._frames_per_second = fps or 4

    def store(self, bridge: StepBridge, name: str, step: int | None) -> ContentItem:
        """Store it in the run; an array as an animated GIF."""
        if is_array(self._data):
            self._data = gif(self._data, self._frames_per_second)
        return super().store(bridge, name, step)


class Audio(Media):
    """A sound: a file, or an array with its sample rate."""

    kind = "audio"

    def __init__(self, data_or_path: Any, sample_rate: int | None = None, caption: str | None = None) -> None:
        super().__init__(_read(data_or_path), caption, sample_rate=sample_rate)


class Html(Media):
    """HTML: a text, a file or the path of one."""

    kind = "html"

    def __init__(self, data: Any, inject: bool = True, data_is_not_path: bool = False) -> None:
        is_path = isinstance(data, str) and not data_is_not_path and data.endswith(".html") and os.path.exists(data)  # noqa: PTH110 # any text
        super().__init__(Path(data) if is_path else _read(data))


class Histogram(Media):
    """The distribution of values, or one as ``(counts, edges)``."""

    kind = "histogram"

    def __init__(self, sequence: Any = None, np_histogram: Any = None, num_bins: int = 64) -> None:
        values = tuple(np_histogram) if np_histogram is not None else sequence
        super().__init__(values, bins=min(num_bins, 512))


class Plotly(Media):
    """A figure of plotly."""

    kind = "figure"


class Table:
    """A table that grows by `add_data`; each time it is logged, it is stored as it is then."""

    def __init__(
        self,
        columns: Sequence[Any] | None = None,
        data: Any = None,
        rows: Any = None,
        dataframe: Any = None,
        **kwargs: Any,
    ) -> None:
        frame = dataframe if dataframe is not None else data if hasattr(data, "columns") else None
        if frame is not None:
            self.columns: list[Any] = [*frame.columns]
            self.data: list[list[Any]] = [[*row] for row in frame.itertuples(index=False)]
        else:
            given: Any = data if data is not None else rows
            self.data = [] if given is None else [[*row] for row in given]
            self.columns = [*columns] if columns is not None else ["Input", "Output", "Expected"]

    def add_data(self, *data: Any) -> None:
        """Add a row."""
        self.data.append([*data])

    def add_row(self, *row: Any) -> None:
        """Add a row, also given as one list."""
        self.data.append([*row[0]] if len(row) == 1 and isinstance(row[0], list | tuple) else [*row])

    def add_column(self, name: str, data: Iterable[Any]) -> None:
        """Add a column to every row."""
        values = [*data]
        if not self.data and not self.columns:
            self.data = [[] for _ in values]
        for row, value in zip(self.data, values, strict=True):
            row.append(value)
        self.columns.append(name)

    def get_column(self, name: Any, convert_to: str | None = None) -> Any:
        """Return the values of a column."""
        values = [row[self.columns.index(name)] for row in self.data]
        return to_array(values) if convert_to == "numpy" else values

    def iterrows(self) -> Iterator[tuple[int, list[Any]]]:
        """Iterate over the rows with their numbers."""
        return iter([*enumerate(self.data)])

    def store(self, bridge: StepBridge, name: str, step: int | None) -> ContentItem:
        """Store it in the run; pictures in its cells are stored apart, and the cell has their path."""
        names = [str(each) for each in self.columns]

        def cell(value: Any, column: str) -> Any:
            if isinstance(value, Media):
                return value.store(bridge, f"{name}/{column}", step).path
            value = to_scalar(value)
            return value if isinstance(value, (*_PLAIN_CELLS, list, dict)) else str(value)

        rows = [[cell(value, column) for value, column in zip(row, names, strict=False)] for row in self.data]
        return bridge.open().table(name, rows, columns=names, step=step)


class Artifact:
    """Files to be stored together, such as a data set or a model; `log_artifact` stores them."""

    def __init__(
        self,
        name: str,
        type: str,  # noqa: A002 # the signature it replaces
        description: str | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.name, self.type, self.description = name, type, description
        self.metadata: dict[str, Any] = metadata or {}
        self.references: list[str] = []
        """What `add_reference` was given; only the address is stored."""
        self.item: ContentItem | None = None
        """What is stored, once it was logged."""
        self._entries: dict[str, Path] = {}
        self._made: Path | None = None

    def add_file(self, local_path: Any, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Add a file; it must exist until the artifact is logged."""
        path = Path(local_path)
        self._entries[name or path.name] = path

    def add_dir(self, local_path: Any, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Add a directory with all that is in it; without a name, its content."""
        self._entries[name or "."] = Path(local_path)

    def add_reference(self, uri: Any, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Add an address; what is there is not copied."""
        self.references.append(str(uri))

    @contextmanager
    def new_file(self, name: str, mode: str = "w", encoding: str | None = None, **kwargs: Any) -> Iterator[IO[Any]]:
        """Open a new file of the artifact for writing."""
        if self._made is None:
            self._made = Path(tempfile.mkdtemp(prefix="evsys-artifact-"))
            weakref.finalize(self, shutil.rmtree, self._made, ignore_errors=True)
        path = self._made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text_encoding = encoding or (None if "b" in mode else "utf-8")
        with path.open(mode.replace("x", "w"), encoding=text_encoding) as file:
            yield file
        self._entries[name] = path

    @property
    def aliases(self) -> list[str]:
        """Its names of versions: none."""
        return []

    def has_files(self) -> bool:
        """Whether any file or directory was added."""
        return bool(self._entries)

    def wait(self, timeout: Any = None) -> Self:
        """Return at once: what is logged is stored."""
        return self

    def store(self, bridge: StepBridge, name: str | None = None, _: int | None = None) -> ContentItem:
        """Store it in the run."""
        with tempfile.TemporaryDirectory(prefix="evsys-artifact-") as folder:
            self.item = bridge.open().artifact(name or self.name, self._gather(Path(folder)), type=self.type)
        return self.item

    def _gather(self, folder: Path) -> Path:
        """Return the only file or directory, or a directory with links to all of them."""
        if len(self._entries) == 1:
            (name, only), *_ = self._entries.items()
            if name in {".", only.name}:
                return only
        for name, path in self._entries.items():
            target = folder / name
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True, copy_function=_link)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(str(path), str(target))
        return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _read(value: Any) -> Any:
    return value.read() if hasattr(value, "read") else value


def _picture(value: Any) -> Any:
    """Return what a run stores as a picture. Arrays are copied, because programs use them again for the next frame."""
    if not is_array(value):
        return value
    try:
        array = to_array(value)
        if array.dtype.kind == "f":
            low, high = float(array.min()), float(array.max())
            if low < 0:
                array = (array - low) / ((high - low) or 1.0)
            elif high > 1:
                array = array / 255
        elif array.dtype.kind in "iu" and array.size and int(array.max()) <= 1:
            array = array * 255
        channels_first = hasattr(value, "detach") and array.ndim == 3  # noqa: PLR2004 # as tensors have them
        return pixels(array, "CHW" if channels_first and array.shape[0] <= array.shape[-1] else "")
    except Exception:  # isolated: storing it reports the error
        return value


def is_content(value: Any) -> bool:
    """Whether a value is stored apart from the metrics: one of the classes here, a figure, or a list of them."""
    if isinstance(value, list | tuple):
        return bool(value) and is_content(value[0])
    return isinstance(value, Media | Table | Artifact) or hasattr(value, "savefig") or hasattr(value, "write_html")
