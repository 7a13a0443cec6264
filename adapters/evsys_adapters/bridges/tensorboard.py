"""`SummaryWriter`: the writer of ``torch.utils.tensorboard`` and of tensorboardX, which writes a run.

    from evsys_adapters.bridges.tensorboard import SummaryWriter

    writer = SummaryWriter("runs/first")
    writer.add_scalar("train/loss", loss, step)

A row is on record when the call returns. The tags of one step are one row.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from evsys_adapters.bridges._arrays import bins_of_limits, gif, grid, is_array, pixels, to_array, to_scalar
from evsys_adapters.bridges._base import isolated
from evsys_adapters.bridges.step_bridge import StepBridge
from evsys_adapters.common.hook_arguments import list_or_empty

_DEFAULT_PATH: Final = "runs/training"


class SummaryWriter:
    """Writes scalars, evals, texts, pictures and histograms to a run; nothing raises into the training.

    Signatures are those of torch and tensorboardX, and the keyword form of skrl (``tag``, ``value``, ``timestep``).
    Metrics with the prefix of an eval (``val/``, ``eval_``) are that eval's. A value without a step belongs to the step
    with the number of values that its tag has had. Graphs, embeddings, meshes and curves are not carried, which is
    logged once.

    Args:
        log_dir: The run's directory. Default: ``EVSYS_BUS_RUN_DIR``, else ``runs/training`` and the comment.
        comment: Appended to the default directory.
        purge_step: The first step to come, after a crash: recorded rows from there on are replaced. Default: the step
            of the first row.
        max_queue: Without effect: every call is on record when it returns, as are ``flush_secs`` and
            ``filename_suffix``.
        logdir: As ``log_dir``.
        write_to_disk: Whether to write at all.
        comet_config: Without effect.
        options: Passed to `evsys_bus.run`: ``callbacks``, ``config``, ``tags``, ``notes`` and others.
    """

    def __init__(
        self,
        log_dir: Any = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
        write_to_disk: bool = True,
        *,
        logdir: Any = None,
        comet_config: Any = None,
        **options: Any,
    ) -> None:
        self.bridge: Final = StepBridge(log_dir or logdir, **options)
        self.bridge.default_path = f"{_DEFAULT_PATH}{comment}"
        self._counts: dict[str, int] = {}
        if not write_to_disk:
            self.bridge.start(is_rank_zero=False)
        elif purge_step is not None:
            self._purge(purge_step)

    @isolated
    def _purge(self, step: int) -> None:
        self.bridge.open(step)

    @property
    def log_dir(self) -> str:
        """The run's directory."""
        return self.get_logdir()

    def get_logdir(self) -> str:
        """Return the run's directory."""
        return str(self.bridge.path)

    @isolated
    def add_scalar(
        self,
        tag: str,
        scalar_value: Any = None,
        global_step: Any = None,
        *args: Any,
        value: Any = None,
        timestep: Any = None,
        **kwargs: Any,
    ) -> None:
        """Record one metric of a step."""
        step = global_step if timestep is None else timestep
        self._log({tag: scalar_value if value is None else value}, self._step_of(tag, step))

    @isolated
    def add_scalars(
        self, main_tag: str, tag_scalar_dict: Mapping[str, Any], global_step: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Record several metrics of a step, as ``<main_tag>/<tag>``."""
        metrics = {f"{main_tag}/{tag}": value for tag, value in tag_scalar_dict.items()}
        self._log(metrics, self._step_of(main_tag, global_step))

    @isolated
    def add_tensor(self, tag: str, tensor: Any, global_step: Any = None, *args: Any, **kwargs: Any) -> None:
        """Record an array among the metrics: a short one as its numbers, else as their distribution."""
        self._log({tag: to_array(tensor)}, self._step_of(tag, global_step))

    @isolated
    def add_histogram(
        self, tag: str, values: Any, global_step: Any = None, bins: Any = "tensorflow", *args: Any, **kwargs: Any
    ) -> None:
        """Record the distribution of values."""
        count = bins if isinstance(bins, int) else 64
        array = to_array(values) if is_array(values) else values
        self._content("histogram", tag, array, global_step, bins=count)

    @isolated
    def add_histogram_raw(
        self,
        tag: str,
        min: float,  # noqa: A002 # the signature it replaces
        max: float,  # noqa: A002
        num: float,
        sum: float,  # noqa: A002
        sum_squares: float,
        bucket_limits: Any,
        bucket_counts: Any,
        global_step: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Record a distribution that was counted already."""
        counted = bins_of_limits(float(min), float(max), bucket_limits, bucket_counts)
        self._content("histogram", tag, counted, global_step)

    @isolated
    def add_text(self, tag: str, text_string: Any, global_step: Any = None, *args: Any, **kwargs: Any) -> None:
        """Store a text."""
        self._content("text", tag, str(text_string), global_step)

    @isolated
    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: Any = None,
        walltime: Any = None,
        dataformats: str = "CHW",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Store a picture: bytes from 0 to 255, or floats from 0 to 1."""
        order = "HW" if len(img_tensor.shape) == 2 else dataformats  # noqa: PLR2004
        self._content("image", tag, pixels(img_tensor, order), global_step)

    @isolated
    def add_images(
        self,
        tag: str,
        img_tensor: Any,
        global_step: Any = None,
        walltime: Any = None,
        dataformats: str = "NCHW",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Store several pictures of one size as one."""
        self._content("image", tag, grid(img_tensor, dataformats), global_step)

    @isolated
    def add_image_with_boxes(
        self,
        tag: str,
        img_tensor: Any,
        box_tensor: Any,
        global_step: Any = None,
        *args: Any,
        dataformats: str = "CHW",
        **kwargs: Any,
    ) -> None:
        """Store a picture, without its boxes."""
        self.bridge.warn_not_carried("boxes of add_image_with_boxes")
        self._content("image", tag, pixels(img_tensor, dataformats), global_step)

    @isolated
    def add_figure(self, tag: str, figure: Any, global_step: Any = None, close: bool = True, *args: Any) -> None:
        """Store a figure of matplotlib, or several."""
        several = list_or_empty(figure)
        for index, each in enumerate(several or [figure]):
            self._content("figure", f"{tag}/{index}" if several else tag, each, global_step)
            pyplot = sys.modules.get("matplotlib.pyplot")
            if close and pyplot is not None:
                pyplot.close(each)

    @isolated
    def add_video(self, tag: str, vid_tensor: Any, global_step: Any = None, fps: float = 4, *args: Any) -> None:
        """Store a video, as an animated GIF; of several the first. It needs Pillow."""
        self._content("video", tag, gif(vid_tensor, fps), global_step)

    @isolated
    def add_audio(
        self, tag: str, snd_tensor: Any, global_step: Any = None, sample_rate: int = 44100, *args: Any, **kwargs: Any
    ) -> None:
        """Store a sound: floats from -1 to 1."""
        samples = to_array(snd_tensor)
        samples = samples.clip(-1, 1) if samples.dtype.kind == "f" else samples
        self._content("audio", tag, samples, global_step, sample_rate=sample_rate)

    @isolated
    def add_hparams(
        self, hparam_dict: Mapping[str, Any], metric_dict: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Add settings to the run's config, and results to its summary."""
        self.bridge.update_config({name: to_scalar(value) for name, value in hparam_dict.items()})
        if metric_dict:
            self.bridge.open().summary.update({name: to_scalar(value) for name, value in metric_dict.items()})

    def flush(self) -> None:
        """Do nothing: every call is on record when it returns."""

    @isolated
    def close(self) -> None:
        """Complete the run."""
        self.bridge.complete()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._close(error)

    @isolated
    def _close(self, error: BaseException | None) -> None:
        if error is None:
            self.bridge.complete()
        else:
            self.bridge.finish(error)

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        self.bridge.log({tag: to_scalar(value) for tag, value in metrics.items()}, step)

    def _content(self, kind: str, tag: str, value: Any, step: Any, **options: Any) -> None:
        number = None if step is None else int(to_scalar(step))
        getattr(self.bridge.open(), kind)(tag, value, step=number, **options)

    def _step_of(self, tag: str, step: Any) -> int:
        number = self._counts.get(tag, 0) if step is None else int(to_scalar(step))
        self._counts[tag] = number + 1
        return number

    def __repr__(self) -> str:
        return f"<SummaryWriter in {str(Path(self.get_logdir()))!r}>"


def _not_carried(name: str) -> Callable[..., None]:
    def method(self: SummaryWriter, *args: Any, **kwargs: Any) -> None:
        self.bridge.warn_not_carried(f"SummaryWriter.{name}")

    method.__name__ = name
    method.__doc__ = "Do nothing; that it is not carried is logged once."
    return method


for _name in (
    "add_graph",
    "add_onnx_graph",
    "add_openvino_graph",
    "add_embedding",
    "add_mesh",
    "add_pr_curve",
    "add_pr_curve_raw",
    "add_custom_scalars",
    "add_custom_scalars_multilinechart",
    "add_custom_scalars_marginchart",
):
    setattr(SummaryWriter, _name, _not_carried(_name))
