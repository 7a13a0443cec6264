"""Pictures, sounds and videos as frameworks hand them over, as the arrays and files that a run stores.

They need numpy, which every program that has such arrays has, and videos need Pillow.
"""

# Arrays and images are of types that the checks do not have.
# pyright: basic

import importlib
import io
from typing import Any, Final

from evsys_bus.errors import EventError

_CHANNELS: Final = {1, 2, 3, 4}
_GRID_COLUMNS: Final = 8
_MAX_BINS: Final = 512


def to_array(value: Any) -> Any:
    """Return a numpy array of a tensor, an array or nested lists; a new one if the tensor is not on the CPU."""
    numpy = importlib.import_module("numpy")
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    return numpy.asarray(value)


def to_scalar(value: Any) -> Any:
    """Return the number in a tensor or array of one number; anything else unchanged."""
    size = getattr(value, "numel", None) or getattr(value, "size", None)
    count = size() if callable(size) else size
    return value.item() if count == 1 and hasattr(value, "item") else value


def is_array(value: Any) -> bool:
    """Whether the value is an array or a tensor."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def pixels(value: Any, order: str = "") -> Any:
    """Return a new array of shape (height, width, channels) and type uint8.

    Args:
        value: An array in uint8 or from 0 to 1; other numbers are cut off there.
        order: The order of its dimensions, such as ``CHW``. Default: channels last, or first if only that fits.
    """
    array = to_array(value)
    if order:
        array = array.transpose([order.upper().index(each) for each in "HWC" if each in order.upper()])
    elif array.ndim == 3 and array.shape[0] in _CHANNELS and (array.shape[-1] not in _CHANNELS or is_tensor(value)):  # noqa: PLR2004
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array  # noqa: PLR2004
    return to_uint8(array)


def is_tensor(value: Any) -> bool:
    """Whether the value is a tensor of torch, whose pictures have their channels first."""
    return hasattr(value, "detach")


def to_uint8(array: Any) -> Any:
    """Return a new array of bytes: of numbers from 0 to 255, or of floats from 0 to 1."""
    if array.dtype.kind == "b":
        return array.astype("uint8") * 255
    if array.dtype.kind == "f":
        array = array * 255 + 0.5
        array = importlib.import_module("numpy").nan_to_num(array)
    return array.clip(0, 255).astype("uint8")


def grid(value: Any, order: str) -> Any:
    """Return several pictures of one size as one, in rows of eight."""
    numpy = importlib.import_module("numpy")
    order = order.upper()
    each_picture = numpy.moveaxis(to_array(value), order.index("N"), 0)
    pictures = [pixels(each, order.replace("N", "")) for each in each_picture]
    columns = min(_GRID_COLUMNS, len(pictures))
    empty = numpy.zeros_like(pictures[0])
    pictures += [empty] * (-len(pictures) % columns)
    lines = [numpy.concatenate(pictures[at : at + columns], axis=1) for at in range(0, len(pictures), columns)]
    return numpy.concatenate(lines, axis=0)


def gif(value: Any, frames_per_second: float = 4) -> bytes:
    """Return a video as an animated GIF.

    Args:
        value: An array of shape (frames, channels, height, width), or with several videos before that, of which the
            first is taken.
        frames_per_second: Its speed.

    Raises:
        EventError: Pillow is not installed, or the array has another shape.
    """
    try:
        image: Any = importlib.import_module("PIL.Image")
    except ImportError:
        raise EventError("a video of an array needs Pillow", fix="pip install pillow, or give a file") from None
    array = to_array(value)
    array = array[0] if array.ndim == 5 else array  # noqa: PLR2004
    if array.ndim != 4 or array.shape[1] not in _CHANNELS:  # noqa: PLR2004
        raise EventError(f"a video has the shape {array.shape}", fix="give (frames, channels, height, width)")
    array = to_uint8(array.transpose(0, 2, 3, 1))
    frames = [image.fromarray(each[..., 0] if each.shape[-1] in {1, 2} else each[..., :3]) for each in array]
    file = io.BytesIO()
    duration = max(1, round(1000 / frames_per_second))
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
    return file.getvalue()


def bins_of_limits(low: float, high: float, limits: Any, counts: Any) -> tuple[list[float], list[float]]:
    """Return counts and edges of a histogram that is given by the upper limits of its bins, as TensorBoard has it.

    Empty bins at both ends are left out, and neighbours are merged if there are more than 512.
    """
    limits, counts = [float(each) for each in to_array(limits)], [float(each) for each in to_array(counts)]
    filled = [index for index, count in enumerate(counts) if count]
    first, last = (filled[0], filled[-1]) if filled else (0, 0)
    edges = [limits[first - 1] if first else min(low, limits[0]), *limits[first : last + 1]]
    edges[-1] = max(min(edges[-1], high), edges[-2])
    edges[0] = min(max(edges[0], low), edges[1])
    counts = counts[first : last + 1]
    width = -(-len(counts) // _MAX_BINS)
    merged: list[float] = [sum(counts[at : at + width]) for at in range(0, len(counts), width)]
    return merged, [*edges[: len(counts) : width], edges[-1]]
