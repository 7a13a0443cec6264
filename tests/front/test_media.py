"""Content of a run: stored once, whole, under the name of its digest, and described by a small value."""

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evsys_bus import EvsysBusError
from evsys_bus.codec.redact import Redaction
from evsys_bus.errors import EventError
from evsys_bus.front import media
from evsys_bus.front.media import MANIFEST, MAX_CONTENT_BYTES, MAX_FILES, store_content, summarize_value
from support.foreign_values import Raising, RaisingAttributes, RaisingClass

PNG = b"\x89PNG\r\n\x1a\n" + b"the rest"
KEY = "sk-aB3dE6gH9jK2mN5pQ8sT1vW4xZ7"


def stored(run_dir: Path, item: media.ContentItem) -> bytes:
    """The content of an item, after a look at what its description promises."""
    data = (run_dir / item.path).read_bytes()
    assert item.path.startswith(f"media/{item.digest}.")
    assert item.digest == hashlib.sha256(data).hexdigest()
    assert item.size == len(data)
    return data


def media_files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "media").iterdir())


def pixels_of(run_dir: Path, item: media.ContentItem) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(stored(run_dir, item))))


# Texts, HTML, tables


def test_a_text_is_a_file_and_a_short_one_is_in_the_event_too(tmp_path):
    short = store_content(tmp_path, "text", "sample", "grüße", caption="from step 3")
    assert stored(tmp_path, short).decode() == "grüße"
    assert (short.kind, short.name, short.caption, short.media_type) == ("text", "sample", "from step 3", "text/plain")
    assert short.data == {"text": "grüße"}
    long = store_content(tmp_path, "text", "sample", "word " * 100_000)
    assert stored(tmp_path, long) == b"word " * 100_000
    assert long.data == {}


def test_equal_content_is_stored_once(tmp_path):
    first = store_content(tmp_path, "text", "a", "the same")
    modified = (tmp_path / first.path).stat().st_mtime_ns
    second = store_content(tmp_path, "text", "b", "the same")
    assert first.path == second.path
    assert media_files(tmp_path) == [f"{first.digest}.txt"]
    assert (tmp_path / first.path).stat().st_mtime_ns == modified


def test_a_file_that_a_power_cut_left_empty_is_written_again(tmp_path):
    item = store_content(tmp_path, "text", "a", "content")
    (tmp_path / item.path).write_bytes(b"")
    store_content(tmp_path, "text", "a", "content")
    assert stored(tmp_path, item) == b"content"


def test_no_credential_reaches_a_text_a_table_html_a_name_or_a_caption(tmp_path):
    items = [
        store_content(tmp_path, "text", f"of {KEY}", f"key {KEY}", caption=f"with {KEY}"),
        store_content(tmp_path, "html", "page", f"<p>{KEY}</p>"),
        store_content(tmp_path, "table", "t", [{"api_key": "hunter22", "note": f"uses {KEY}", "x": 1}]),
        store_content(tmp_path, "table", "t", [[1]], columns=[f"c {KEY}"]),
    ]
    everything = repr(items) + "".join(path.read_text() for path in (tmp_path / "media").iterdir())
    assert KEY not in everything
    assert "hunter22" not in everything
    assert everything.count("<redacted>") >= 7


def test_further_keys_of_the_bus_are_redacted_in_tables(tmp_path):
    redaction = Redaction.of(redact=["patient"])
    item = store_content(tmp_path, "table", "t", [{"patient": "Ann", "x": 1}], redaction=redaction)
    assert json.loads(stored(tmp_path, item))["rows"] == [["<redacted>", 1]]


def test_a_text_that_is_no_valid_unicode_is_escaped(tmp_path):
    assert stored(tmp_path, store_content(tmp_path, "text", "a\udc80", "b\udcff")) == b"b\\udcff"


def test_a_table_of_columns_and_rows_is_whole_and_its_first_rows_are_in_the_event(tmp_path):
    rows = [[index, f"text {index}"] for index in range(1000)]
    for item in (
        store_content(tmp_path, "table", "t", rows, columns=["step", "text"]),
        store_content(tmp_path, "table", "t", (["step", "text"], rows)),
        store_content(tmp_path, "table", "t", [{"step": step, "text": text} for step, text in rows]),
    ):
        assert json.loads(stored(tmp_path, item)) == {"columns": ["step", "text"], "rows": rows}
        assert item.data == {"columns": ["step", "text"], "rows": rows[:10], "row_count": 1000}
        assert item.media_type == "application/json"
    assert len(media_files(tmp_path)) == 1


def test_a_long_cell_is_whole_and_no_row_in_the_event_is_cut(tmp_path):
    rows = [["short"], ["x" * 1_000_000], ["short"]]
    item = store_content(tmp_path, "table", "t", rows, columns=["text"])
    assert json.loads(stored(tmp_path, item))["rows"] == rows
    assert item.data["rows"] == [["short"]]


def test_cells_of_any_type_are_recorded(tmp_path):
    cells = [np.float32(0.5), np.int64(3), None, True, 2**70, Path("/a"), [1, {"b": (2,)}], np.array([1, 2]), {"k": 1}]
    item = store_content(tmp_path, "table", "t", [cells], columns=[str(index) for index in range(len(cells))])
    recorded = json.loads(stored(tmp_path, item))["rows"][0]
    assert recorded == [0.5, 3, None, True, str(2**70), "/a", [1, {"b": [2]}], [1, 2], {"k": 1}]


def test_a_number_that_json_has_not_is_null_and_named_beside_the_rows(tmp_path):
    item = store_content(tmp_path, "table", "t", [[1.0, math.nan], [math.inf, 2.0]], columns=["a", "b"])
    assert json.loads(stored(tmp_path, item)) == {
        "columns": ["a", "b"],
        "rows": [[1.0, None], [None, 2.0]],
        "nonfinite": {"[0][1]": "nan", "[1][0]": "inf"},
    }


class ArrowTable:
    """The methods of pyarrow's Table that are used."""

    class schema:  # noqa: N801
        names = ("a", "b")

    def to_pydict(self):
        return {"a": [1, 2], "b": ["x", None]}


class PolarsFrame:
    columns = ("a", "b")

    def rows(self):
        return [(1, "x"), (2, None)]


class PandasFrame:
    columns = ("a", "b")

    def to_dict(self, orient):
        assert orient == "split"
        return {"columns": ["a", "b"], "data": [[1, "x"], [2, None]], "index": [0, 1]}


@pytest.mark.parametrize("frame", [ArrowTable(), PolarsFrame(), PandasFrame()])
def test_a_data_frame_is_a_table(tmp_path, frame):
    item = store_content(tmp_path, "table", "t", frame)
    assert json.loads(stored(tmp_path, item)) == {"columns": ["a", "b"], "rows": [[1, "x"], [2, None]]}


def test_a_table_without_rows_has_its_columns(tmp_path):
    item = store_content(tmp_path, "table", "t", [], columns=["a"])
    assert json.loads(stored(tmp_path, item)) == {"columns": ["a"], "rows": []}
    assert item.data["row_count"] == 0


def test_html_is_text_or_a_path(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<p>hello</p>")
    by_text = store_content(tmp_path, "html", "p", "<p>hello</p>")
    assert store_content(tmp_path, "html", "p", page).path == by_text.path
    assert store_content(tmp_path, "html", "p", str(page)).path == by_text.path
    assert by_text.media_type == "text/html"


# Images, figures, audio, video


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(12).reshape(3, 4)),
        (np.arange(24, dtype=np.uint8).reshape(2, 4, 3), np.arange(24).reshape(2, 4, 3)),
        (np.arange(60, dtype=np.uint8).reshape(3, 4, 5), np.arange(60).reshape(3, 4, 5).transpose(1, 2, 0)),
        (np.arange(48, dtype=np.int64).reshape(3, 4, 4), np.arange(48).reshape(3, 4, 4)),
        (np.array([[0.0, 1.0], [0.5, 0.25]]), np.array([[0, 255], [128, 64]])),
        (np.array([[0.0, 1.0]], dtype=np.float16), np.array([[0, 255]])),
        (np.array([[True, False]]), np.array([[255, 0]])),
        (np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.arange(8).reshape(2, 2, 2)),
        (np.arange(12, dtype=np.uint8).reshape(3, 4).T, np.arange(12).reshape(3, 4).T),
        ([[0, 255], [255, 0]], np.array([[0, 255], [255, 0]])),
    ],
)
def test_an_array_becomes_a_png_that_pillow_reads(tmp_path, array, expected):
    item = store_content(tmp_path, "image", "a", array)
    assert np.array_equal(pixels_of(tmp_path, item), expected)
    assert (item.data["height"], item.data["width"]) == expected.shape[:2]
    assert (item.media_type, item.path) == ("image/png", f"media/{item.digest}.png")


class Tensor:
    """What is used of a torch tensor: its channels come first."""

    dtype = "torch.float32"

    def __init__(self, array):
        self._values = array

    def detach(self):
        return self

    def cpu(self):
        return self._values

    def __iter__(self):
        return iter(self._values)


def test_a_tensor_has_its_channels_first(tmp_path):
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    item = store_content(tmp_path, "image", "a", Tensor(array))
    assert np.array_equal(pixels_of(tmp_path, item), array.transpose(1, 2, 0))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "CMYK"])
def test_a_pillow_image_becomes_a_png(tmp_path, mode):
    image = Image.new("RGB", (5, 4), "red").convert(mode)
    item = store_content(tmp_path, "image", "a", image)
    assert Image.open(io.BytesIO(stored(tmp_path, item))).size == (5, 4)
    assert item.data == {"width": 5, "height": 4}


@pytest.mark.parametrize(
    ("format_name", "extension", "media_type"),
    [
        ("PNG", "png", "image/png"),
        ("JPEG", "jpg", "image/jpeg"),
        ("GIF", "gif", "image/gif"),
        ("WEBP", "webp", "image/webp"),
    ],
)
def test_bytes_and_files_of_images_are_stored_as_given_by_what_is_in_them(tmp_path, format_name, extension, media_type):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, format=format_name)
    path = tmp_path / "misnamed.exe"
    path.write_bytes(buffer.getvalue())
    for value in (buffer.getvalue(), bytearray(buffer.getvalue()), path, str(path)):
        item = store_content(tmp_path, "image", "a", value)
        assert stored(tmp_path, item) == buffer.getvalue()
        assert (item.media_type, Path(item.path).suffix) == (media_type, f".{extension}")


@pytest.mark.parametrize(
    ("samples", "width", "channels", "frames"),
    [
        (np.array([0.0, 0.5, -1.0]), 2, 1, np.array([0, 16384, -32767], "<i2")),
        (np.array([[1, 2], [3, 4], [5, 6]], np.int16), 2, 2, np.array([1, 2, 3, 4, 5, 6], "<i2")),
        (np.array([[1, 2, 3], [4, 5, 6]], np.int16), 2, 2, np.array([1, 4, 2, 5, 3, 6], "<i2")),
        (np.array([1, 2], ">i4"), 4, 1, np.array([1, 2], "<i4")),
    ],
)
def test_samples_become_a_wav_file(tmp_path, samples, width, channels, frames):
    item = store_content(tmp_path, "audio", "a", samples, sample_rate=8000)
    with wave.open(io.BytesIO(stored(tmp_path, item))) as file:
        assert (file.getsampwidth(), file.getnchannels(), file.getframerate()) == (width, channels, 8000)
        assert file.readframes(100) == frames.tobytes()
    assert item.data == {"seconds": len(frames) / channels / 8000}
    assert store_content(tmp_path, "audio", "b", stored(tmp_path, item)).path == item.path


def test_a_video_is_stored_by_its_first_bytes(tmp_path):
    item = store_content(tmp_path, "video", "v", b"\0\0\0\x18ftypisom")
    assert (item.media_type, Path(item.path).suffix) == ("video/mp4", ".mp4")


class Figure:
    """The methods of a figure of matplotlib that are used."""

    def savefig(self, file, *, format):  # noqa: A002
        Image.new("RGB", (5, 4), "red").save(file, format=format)


class Axes:
    figure = Figure()


class Chart:
    """The methods of a figure of plotly that are used."""

    def to_html(self):
        return "<html>chart</html>"


def test_a_figure_becomes_a_png_or_html(tmp_path):
    for value in (Figure(), Axes(), Image.new("RGB", (5, 4), "red")):
        assert store_content(tmp_path, "figure", "f", value).media_type == "image/png"
    item = store_content(tmp_path, "figure", "f", Chart())
    assert (item.media_type, stored(tmp_path, item)) == ("text/html", b"<html>chart</html>")


@pytest.mark.parametrize(
    ("content", "extension"), [(PNG, "png"), (b"%PDF-1.7", "pdf"), (b"<?xml?><svg></svg>", "svg"), (b" <HTML>", "html")]
)
def test_a_figure_may_be_a_file(tmp_path, content, extension):
    path = tmp_path / "figure"
    path.write_bytes(content)
    assert Path(store_content(tmp_path, "figure", "f", path).path).suffix == f".{extension}"


# Histograms and arrays among metrics


@pytest.mark.parametrize("make", [list, np.array, tuple, iter, lambda values: np.array(values).reshape(2, -1)])
def test_values_are_counted_into_bins(tmp_path, make):
    item = store_content(tmp_path, "histogram", "h", make([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 4.0]), bins=4)
    assert item.data == {"edges": [0.0, 1.0, 2.0, 3.0, 4.0], "counts": [2, 2, 1, 3]}
    assert (item.path, item.kind) == (None, "histogram")
    assert not (tmp_path / "media").exists()


def test_what_is_not_finite_is_counted_apart():
    values = [1.0, 2.0, math.nan, math.nan, math.inf, -math.inf]
    for each in (values, np.array(values), np.array(values, np.float16)):
        data = store_content("unused", "histogram", "h", each, bins=2).data
        assert data == {"edges": [1.0, 1.5, 2.0], "counts": [1, 1], "nonfinite": {"nan": 2, "inf": 1, "-inf": 1}}


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [5, 5, 5],
        [-1e308, 1e308],
        [1.7e308, 1.7e308],
        [5e-324, 0.0],
        [1.0, 1.0 + 2**-52],
        [math.nan],
        [1e300],
    ],
)
def test_every_finite_value_is_in_a_bin(values):
    for each in (values, np.array(values, np.float64)):
        data = store_content("unused", "histogram", "h", each).data
        assert sum(data["counts"]) == sum(map(math.isfinite, values))
        assert len(data["edges"]) == len(data["counts"]) + 1 == 65
        assert data["edges"] == sorted(data["edges"])
        assert all(map(math.isfinite, data["edges"]))


def test_numpy_and_plain_python_count_alike(tmp_path):
    source = """
        import json, random, sys
        from evsys_bus.front.media import store_content
        random.seed(7)
        values = [random.gauss(0, 3) for _ in range(5000)]
        plain = store_content("unused", "histogram", "h", values).data
        assert "numpy" not in sys.modules
        import numpy
        assert store_content("unused", "histogram", "h", values).data == plain
        ours, theirs = plain["counts"], numpy.histogram(values, bins=64)[0].tolist()
        assert sum(map(lambda a, b: abs(a - b), ours, theirs)) <= 2
    """
    source = "\n".join(line.strip() for line in source.splitlines())
    subprocess.run([sys.executable, "-c", source], check=True, cwd=tmp_path)


def test_counts_may_be_given():
    counts, edges = np.histogram([1, 2, 2, 3], bins=2)
    assert store_content("unused", "histogram", "h", (counts, edges)).data == {"edges": [1, 2, 3], "counts": [1, 3]}
    with pytest.raises(EventError, match="2 counts and 2 edges"):
        store_content("unused", "histogram", "h", ([1, 2], [1, 2]))
    with pytest.raises(EventError, match="ascending"):
        store_content("unused", "histogram", "h", ([1, 2], [1, 3, 2]))


def test_an_array_among_metrics_becomes_a_number_a_short_list_or_a_histogram():
    assert summarize_value(np.float32(0.5)) == 0.5
    assert summarize_value(np.array(3)) == 3.0
    assert summarize_value([1, 2.5]) == [1.0, 2.5]
    assert summarize_value(np.arange(4).reshape(2, 2)) == [0.0, 1.0, 2.0, 3.0]
    assert summarize_value(np.arange(16)) == list(map(float, range(16)))
    item = summarize_value(np.arange(17), name="grads")
    assert (item.kind, item.name, sum(item.data["counts"])) == ("histogram", "grads", 17)
    assert summarize_value(Tensor(np.array([1.0]))) == [1.0]
    with pytest.raises(EventError, match="'loss' does not consist of numbers"):
        summarize_value("a text", name="loss")


# Artifacts


def test_a_file_is_copied_and_may_change_afterwards(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"v1")
    item = store_content(tmp_path, "artifact", "weights", path, artifact_type="model")
    path.write_bytes(b"version 2")
    assert stored(tmp_path, item) == b"v1"
    assert (item.artifact_type, item.data, item.media_type) == (
        "model",
        {"file_name": "weights.pt"},
        "application/octet-stream",
    )
    assert item.path == f"media/{item.digest}.bin"


def test_a_directory_is_a_list_of_files_that_are_stored_once(tmp_path):
    run_dir, source = tmp_path / "run", tmp_path / "data"
    (source / "inner").mkdir(parents=True)
    (source / "a.txt").write_text("same")
    (source / "inner" / "b.txt").write_text("same")
    (source / "manifest.json").write_text("mine")
    item = store_content(run_dir, "artifact", "data", source)
    manifest = json.loads((run_dir / item.path / MANIFEST).read_bytes())
    names = {each["path"]: (run_dir / each["stored"]).read_text() for each in manifest["files"]}
    assert names == {"a.txt": "same", "inner/b.txt": "same", "manifest.json": "mine"}
    assert item.path == f"media/{item.digest}/"
    assert item.digest == hashlib.sha256((run_dir / item.path / MANIFEST).read_bytes()).hexdigest()
    assert (item.size, item.data) == (12, {"file_name": "data", "file_count": 3})
    assert len(media_files(run_dir)) == 3
    assert store_content(run_dir, "artifact", "again", source).path == item.path


def test_what_is_not_copied_of_a_directory_is_named(tmp_path, caplog):
    source = tmp_path / "data"
    source.mkdir()
    (source / "real").write_text("content")
    (source / "link").symlink_to("real")
    (source / "up").symlink_to(tmp_path, target_is_directory=True)
    (source / "gone").symlink_to("nothing")
    os.mkfifo(source / "fifo")
    item = store_content(tmp_path, "artifact", "data", source)
    manifest = json.loads((tmp_path / item.path / MANIFEST).read_bytes())
    assert [each["path"] for each in manifest["files"]] == ["link", "real"]
    assert manifest["skipped"] == ["fifo", "gone", "up"]
    assert item.data["skipped"] == 3
    assert "content.skipped" in caplog.text


def test_a_runs_own_directory_may_be_given_and_its_media_are_left_out(tmp_path):
    store_content(tmp_path, "text", "t", "text")
    (tmp_path / "own").write_text("own")
    item = store_content(tmp_path, "artifact", "run", tmp_path)
    manifest = json.loads((tmp_path / item.path / MANIFEST).read_bytes())
    assert [each["path"] for each in manifest["files"]] == ["own"]


def test_what_is_too_large_is_refused_before_it_is_copied(tmp_path):
    huge = tmp_path / "data" / "huge"
    huge.parent.mkdir()
    with huge.open("wb") as file:
        file.truncate(MAX_CONTENT_BYTES + 1)
    halves = tmp_path / "halves"
    halves.mkdir()
    for name in "ab":
        with (halves / name).open("wb") as file:
            file.truncate(MAX_CONTENT_BYTES // 2 + 1)
    for value in (huge, huge.parent, halves):
        with pytest.raises(EventError, match="checkpoint_upload"):
            store_content(tmp_path, "artifact", "huge", value)
    assert not (tmp_path / "media").exists()


def test_a_directory_of_very_many_files_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for index in range(MAX_FILES + 1):
        (tmp_path / "data" / str(index)).touch()
    with pytest.raises(EventError, match="more than 10,000 files"):
        store_content(tmp_path, "artifact", "data", tmp_path / "data")


def test_five_megabytes_take_well_under_fifty_milliseconds(tmp_path):
    path = tmp_path / "file"
    seconds = []
    for _ in range(5):
        path.write_bytes(os.urandom(5 << 20))
        started = time.thread_time()  # of this thread: other helpers of the machine do not count
        store_content(tmp_path, "artifact", "file", path)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.05


# Errors, links, kills


@pytest.mark.parametrize(
    ("kind", "value", "why", "fix"),
    [
        ("text", 3, "it is a int", "give str(value)"),
        ("image", np.zeros((2, 3, 4, 5)), "its shape is (2, 3, 4, 5)", "one image"),
        ("image", np.array([[0.0, 2.0]]), "its values are from 0 to 2", "floats from 0 to 1"),
        ("image", np.array([[0.0, np.nan]]), "its values are from nan to nan", "floats from 0 to 1"),
        ("image", np.array([[0, 256]]), "its values are from 0 to 256", "uint8"),
        ("image", np.zeros((0, 3)), "it is a ndarray", "a path"),
        ("image", b"no image", "of no known format", "record the file with artifact"),
        ("image", b"", "it is empty", "PNG"),
        ("image", "https://example.com/a.png", "cannot be read", "download it first"),
        ("image", "missing.png", "No such file", "give a path"),
        ("image", "null\0byte", "cannot be read", "give a path"),
        ("image", object(), "it is a object", "a Pillow image"),
        ("audio", np.zeros(3), "no sample rate", "sample_rate="),
        ("video", np.zeros((3, 4, 5, 3)), "it is a ndarray", "imageio.mimwrite"),
        ("figure", 3, "it is a int", "a matplotlib or plotly figure"),
        ("html", 3, "it is a int", "HTML as text"),
        ("table", [[1]], "no column names", "columns="),
        ("table", (["a", "a"], [[1, 2]]), "two of its columns have one name", "a name of its own"),
        ("table", (["a", "b"], [[1, 2], [1]]), "row 1 is no list of 2 values", "None where"),
        ("table", (["a"], ["b"]), "row 0 is no list", "a list for each row"),
        ("table", 3, "it is a int", "a data frame"),
        ("histogram", "text", "does not consist of numbers", "numbers"),
        ("histogram", ["a"], "does not consist of numbers", "numbers"),
        ("artifact", b"bytes", "it is a bytes", "write it to a file"),
        ("artifact", "missing", "No such file", "a directory"),
        ("picture", 3, "no content of the kind 'picture'", "image"),
    ],
)
def test_an_error_says_what_is_wrong_and_what_to_do(tmp_path, kind, value, why, fix):
    with pytest.raises(EvsysBusError) as caught:
        store_content(tmp_path, kind, "x", value)
    assert why in caught.value.what
    assert fix in caught.value.fix
    assert not (tmp_path / "media").exists()


def test_more_errors_of_audio_and_histograms(tmp_path):
    for samples, fix in (([0.0, 2.0], "-1 to 1"), (np.zeros((3, 3, 3)), "(samples,"), (np.zeros(3, np.int64), "int16")):
        with pytest.raises(EventError) as caught:
            store_content(tmp_path, "audio", "x", samples, sample_rate=8000)
        assert fix in caught.value.fix
    with pytest.raises(EventError, match="from 1 to 512"):
        store_content(tmp_path, "histogram", "x", [1.0], bins=0)


@pytest.mark.parametrize("make", [Raising, RaisingAttributes, RaisingClass, lambda: [Raising()]])
def test_an_error_of_the_values_own_code_is_one_in_words(tmp_path, make):
    value = make()
    for kind in ("image", "audio", "video", "figure", "html", "text", "histogram", "artifact"):
        with pytest.raises((EventError, OSError)):
            store_content(tmp_path, kind, "x", value)
    with pytest.raises(EventError, match="does not consist of numbers"):
        summarize_value(value)


def test_a_fifo_is_refused_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(EventError, match="cannot be read"):
        store_content(tmp_path, "image", "x", tmp_path / "fifo")


def test_a_name_never_becomes_part_of_a_path(tmp_path):
    run_dir = tmp_path / "run"
    item = store_content(run_dir, "text", "../../../etc/passwd\0", "text", caption="/../x")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert media_files(run_dir) == [f"{item.digest}.txt"]


def test_nothing_is_written_through_a_link(tmp_path):
    run_dir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run_dir.mkdir()
    (run_dir / "media").symlink_to(elsewhere, target_is_directory=True)
    source = tmp_path / "file"
    source.write_bytes(b"content")
    for kind, value in (("text", "text"), ("artifact", source)):
        with pytest.raises(NotADirectoryError, match="not through a link"):
            store_content(run_dir, kind, "x", value)
    (run_dir / "media").unlink()
    victim = elsewhere / "victim"
    victim.write_bytes(b"victim!")
    digest = hashlib.sha256(b"content").hexdigest()
    (run_dir / "media").mkdir()
    for name in (f"{digest}.txt", f"{digest}.bin", f"{digest}.txt.new", "incoming.new"):
        (run_dir / "media" / name).symlink_to(victim)
    store_content(run_dir, "text", "x", "content")
    store_content(run_dir, "artifact", "x", source)
    assert victim.read_bytes() == b"victim!"
    for name in (f"{digest}.txt", f"{digest}.bin"):
        assert not (run_dir / "media" / name).is_symlink()
        assert (run_dir / "media" / name).read_bytes() == b"content"


def test_many_threads_store_the_same_and_other_files(tmp_path):
    paths = [tmp_path / str(index) for index in range(4)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * 300_000)
    items: list[media.ContentItem] = []
    threads = [
        threading.Thread(target=lambda path: items.append(store_content(tmp_path, "artifact", "x", path)), args=(path,))
        for path in paths * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(items) == 16
    assert {stored(tmp_path, item)[:1] for item in items} == {b"\0", b"\1", b"\2", b"\3"}
    assert len(media_files(tmp_path)) == 4  # and no half file beside them


def test_the_half_file_of_a_killed_process_is_removed_by_the_next_copy(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "incoming.new").write_bytes(b"half")
    (tmp_path / "file").write_bytes(b"whole")
    item = store_content(tmp_path, "artifact", "x", tmp_path / "file")
    assert media_files(tmp_path) == [f"{item.digest}.bin"]
