"""tensorboard_logger: TensorBoard's own reader finds the content of a run, value by value."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util import tensor_util

from evsys_adapters import TensorBoardLoggerCallback
from evsys_bus.context import RunResult
from evsys_bus.front.media import store_content
from support import loggers

ALL = dict.fromkeys(("scalars", "tensors", "images", "audio", "histograms"), 0)


class Run(loggers.Run):
    """A run that tensorboard_logger logs, with content."""

    def __init__(self, folder, **params):
        super().__init__(TensorBoardLoggerCallback(**params), folder, "run")
        self.path, self.folder = folder / "run", folder / "tensorboard" / "run"
        self.path.mkdir()

    def read(self):
        self.logger.close()
        found = EventAccumulator(str(self.folder), size_guidance=ALL)
        return found.Reload()

    def texts(self, tag):
        return [(each.step, each.tensor_proto.string_val[0].decode()) for each in self.read().Tensors(tag)]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    run.start()
    return run


def encoded_image(name, size=(7, 5)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (255, 0, 0)).save(buffer, format=name)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF"])
def test_an_image_is_the_file_with_its_size(run, name):
    run.content("image", "samples", data := encoded_image(name), 3)
    [image] = run.read().Images("image/samples")
    assert (image.step, image.encoded_image_string) == (3, data)
    assert (image.width, image.height) == (7, 5)


@pytest.mark.parametrize(("kind", "suffix"), [("image", "WEBP"), ("html", None), ("video", None), ("artifact", None)])
def test_what_tensorboard_does_not_show_is_a_line_with_the_path_of_the_file(run, kind, suffix, tmp_path):
    values = {
        "image": lambda: encoded_image(suffix),
        "html": lambda: "<p>hello</p>",
        "video": lambda: b"\0\0\0\x18ftypmp42" + bytes(100),
        "artifact": lambda: tmp_path / "weights.bin",
    }
    (tmp_path / "weights.bin").write_bytes(b"12345")
    item = run.content(kind, "it", values[kind](), 2, caption="seen")
    [(step, text)] = run.texts(f"{kind}/it")
    assert step == 2
    assert item.path in text
    assert "seen" in text
    assert "\n" not in text
    assert ("TensorBoard does not show" in text) == (kind != "artifact")


def test_the_buckets_of_a_histogram_are_its_edges_and_counts(run):
    counts, edges = np.histogram(np.random.default_rng(1).normal(size=1000), bins=20)
    run.content("histogram", "weights", (counts, edges), 4)
    [tensor] = run.read().Tensors("histogram/weights")
    expected = np.stack([edges[:-1], edges[1:], counts], axis=1)
    assert tensor.step == 4
    assert np.array_equal(tensor_util.make_ndarray(tensor.tensor_proto), expected)


def test_a_sound_is_the_wav_file(run):
    item = run.content("audio", "tone", np.sin(np.linspace(0, 100, 800)), 1, sample_rate=8000)
    data = (run.path / item.path).read_bytes()
    [sound] = run.read().Audio("audio/tone")
    assert (sound.encoded_audio_string, sound.sample_rate, sound.length_frames) == (data, 8000, 800)


def test_a_table_is_shown_whole_up_to_a_thousand_rows(run):
    rows = [[index, f"word {index}"] for index in range(1000)]
    run.content("table", "samples", rows, 5, columns=["n", "text"])
    [(step, text)] = run.texts("table/samples")
    lines = text.splitlines()
    assert step == 5
    assert lines[:2] == ["| n | text |", "| --- | --- |"]
    assert lines[2:1002] == [f"| {index} | word {index} |" for index in range(1000)]
    assert "1000 of 1000 rows" in text


def test_rows_beyond_the_limit_are_counted(tmp_path):
    run = Run(tmp_path, max_table_rows=3)
    run.start()
    item = run.content("table", "samples", [[index] for index in range(20)], 0, columns=["n"])
    [(_, text)] = run.texts("table/samples")
    assert "3 of 20 rows" in text
    assert item.path in text
    assert "| 3 |" not in text


@pytest.mark.parametrize("length", [10, 50_000])
def test_a_text_is_whole(run, length):
    run.content("text", "story", "ü" * length, 2)
    assert run.texts("text/story") == [(2, "ü" * length)]


def test_alerts_epochs_and_summaries_are_shown(run):
    run.step(6, loss=0.5)
    run.logger.on_alert(run.ctx, "loss is NaN", "look at step 6", "error")
    run.logger.on_epoch_end(run.state, 2, {"accuracy": 0.5})
    run.logger.on_summary(run.ctx, {"best": 0.25, "note": "fine"})
    found = run.read()
    assert run.texts("alert/loss is NaN") == [(6, "**error** look at step 6")]
    assert [(each.step, each.value) for each in found.Scalars("epoch/accuracy")] == [(6, 0.5)]
    assert [(each.step, each.value) for each in found.Scalars("epoch/epoch")] == [(6, 2.0)]
    assert [(each.step, each.value) for each in found.Scalars("summary/best")] == [(6, 0.25)]
    assert run.texts("summary/note") == [(6, "fine")]


def hparams_of(found, name):
    content = found.SummaryMetadata(f"_hparams_/{name}").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_the_configuration_is_a_session_of_the_hparams_plugin(run):
    run.ctx.run_config = None
    run.logger.on_config_update(run.ctx, {"model": {"layers": 3}, "bias": True, "name": "x"})
    run.step(0, loss=0.5)
    run.logger.on_config_update(run.ctx, {"late": 1})
    run.step(1, loss=0.25, word="up")
    run.end()
    found = run.read()
    start = hparams_of(found, "session_start_info").session_start_info.hparams
    assert start["model/layers"].number_value == 3
    assert start["bias"].bool_value
    assert start["name"].string_value == "x"
    assert start["lr"].number_value == 0.1
    assert "secret" not in str(start)
    experiment = hparams_of(found, "experiment").experiment
    assert [each.name.tag for each in experiment.metric_infos] == ["train/loss"]
    assert {each.name for each in experiment.hparam_infos} == set(start)
    assert hparams_of(found, "session_end_info").session_end_info.status == 1  # a success
    (_, text) = run.texts("config update")[-1]
    updates = json.loads(text.removeprefix("```json\n").removesuffix("\n```"))
    assert updates == {"model": {"layers": 3}, "bias": True, "name": "x", "late": 1}


def test_a_failed_run_is_a_failed_session(run):
    run.step(0, loss=0.5)
    run.logger.on_run_end(run.ctx, RunResult(status="failed", error="boom"), None)
    assert hparams_of(run.read(), "session_end_info").session_end_info.status == 2


def test_content_of_steps_that_are_run_again_is_there_once(run):
    for step in range(4):
        run.step(step, loss=1.0)
        run.content("image", "samples", encoded_image("PNG", (4 + step, 5)), step)
    run.start(2)
    for step in (2, 3):
        run.content("image", "samples", encoded_image("PNG", (14 + step, 5)), step)
        run.step(step, loss=1.0)
    found = [(each.step, each.width) for each in run.read().Images("image/samples")]
    assert found == [(0, 4), (1, 5), (2, 16), (3, 17)]


def test_the_slower_loader_shows_what_is_run_again_once_too(run):
    for step in range(4):
        run.step(step, loss=1.0)
        run.content("text", "story", f"old {step}", step)
        run.content("histogram", "weights", ([step, 1], [0.0, 1.0, 2.0]), step)
    run.start(2)
    for step in (2, 3):
        run.step(step, loss=1.0)
        run.content("text", "story", f"new {step}", step)
        run.content("histogram", "weights", ([step + 10, 1], [0.0, 1.0, 2.0]), step)
    run.logger.close()
    found = plugin_event_accumulator.EventAccumulator(str(run.folder), size_guidance={"tensors": 0}).Reload()
    texts = [(each.step, each.tensor_proto.string_val[0].decode()) for each in found.Tensors("text/story")]
    assert texts == [(0, "old 0"), (1, "old 1"), (2, "new 2"), (3, "new 3")]
    counts = [tensor_util.make_ndarray(each.tensor_proto)[0, 2] for each in found.Tensors("histogram/weights")]
    assert counts == [0, 1, 12, 13]
    assert [each.step for each in found.Tensors("train/loss")] == [0, 1, 2, 3]


def test_a_missing_file_is_named(run):
    item = store_content(run.path, "image", "samples", encoded_image("PNG"))
    (run.path / item.path).unlink()
    run.logger.on_content(run.state, 1, item)
    [(_, text)] = run.texts("image/samples")
    assert item.path in text
    assert "missing" in text
