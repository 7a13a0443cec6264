"""wandb_logger: the content of a run has W&B's data types in its file, and W&B's own client uploads the files."""

import hashlib
import json

import numpy as np
import pytest

import evsys_bus
from evsys_adapters import WandbLoggerCallback
from evsys_bus.front.media import store_content
from support import wandb_server as wandb

server, login = wandb.server, wandb.login


class Run(wandb.Run):
    """A run that wandb_logger logs, with content."""

    def __init__(self, folder, **params):
        super().__init__(folder, **params)
        self.path = folder / "run"
        self.path.mkdir()

    def media(self):
        """The values of content, by name: (step, value)."""
        self.logger.close()
        return wandb.metric_series(wandb.rows_in(self.file), "media")

    def records(self, kind):
        self.logger.close()
        return [getattr(each, kind) for each in wandb.records_in(self.file) if each.HasField(kind)]

    def file_paths(self):
        return [each.path for record in self.records("files") for each in record.files]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    run.start()
    return run


def content_of(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.txt").write_text("part")
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    pixels = np.zeros((5, 7, 3), np.uint8)
    return {
        "image-file": run.content("image", "samples", pixels, 1, caption="red"),
        "audio-file": run.content("audio", "tone", np.zeros(800), 1, sample_rate=8000),
        "video-file": run.content("video", "clip", b"\0\0\0\x18ftypmp42" + bytes(100), 2),
        "html-file": run.content("html", "page", "<p>hello</p>", 2),
    }


def test_media_have_the_types_of_wandb_and_their_files_are_those_of_the_run(run, tmp_path):
    items = content_of(run, tmp_path)
    found = {value["_type"]: (step, value) for [(step, value)] in run.media().values()}
    assert found.keys() == items.keys()
    for kind, (step, value) in found.items():
        data = (run.file.parent / "files" / value["path"]).read_bytes()
        assert step == {"image-file": 1, "audio-file": 1}.get(kind, 2)
        assert (value["sha256"], value["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
        assert value["sha256"] == items[kind].digest
        assert value["path"] in run.file_paths()
    image = found["image-file"][1]
    assert (image["width"], image["height"], image["format"], image["caption"]) == (7, 5, "png", "red")
    folders = {kind: value["path"].split("/")[1] for kind, (_, value) in found.items()}
    assert folders == {"image-file": "images", "audio-file": "audio", "video-file": "videos", "html-file": "html"}


def test_a_histogram_is_in_the_row(run):
    counts, edges = np.histogram(np.arange(100), bins=10)
    run.content("histogram", "weights", (counts, edges), 3)
    [(step, value)] = run.media()["weights"]
    assert (step, value) == (3, {"_type": "histogram", "values": counts.tolist(), "bins": edges.tolist()})


def test_a_table_is_whole(run):
    rows = [[index, f"word {index}"] for index in range(1000)]
    run.content("table", "samples", rows, 3, columns=["n", "text"])
    [(step, value)] = run.media()["samples"]
    table = json.loads((run.file.parent / "files" / value["path"]).read_bytes())
    assert (step, value["_type"], value["nrows"], value["ncols"]) == (3, "table-file", 1000, 2)
    assert (table["columns"], table["data"]) == (["n", "text"], rows)


def test_a_text_is_a_page_and_that_is_logged_once(run, caplog):
    with caplog.at_level("INFO"):
        for step in range(3):
            run.content("text", "story", f"a < b {step}", step)
    values = run.media()["story"]
    assert [step for step, _ in values] == [0, 1, 2]
    page = (run.file.parent / "files" / values[1][1]["path"]).read_text()
    assert page == "<pre>a &lt; b 1</pre>"
    assert caplog.text.count("wandb.content_as_file") == 1
    assert "W&B has no texts" in caplog.text


def test_an_artifact_is_among_the_files_of_the_run(run, tmp_path):
    content_of(run, tmp_path)
    run.content("artifact", "weights", tmp_path / "weights.bin", artifact_type="model")
    run.content("artifact", "data set", tmp_path / "data")
    paths = [path for path in run.file_paths() if path.startswith("media/artifact/")]
    assert [path.split("/")[-1] for path in paths] == ["weights.bin", "part.txt"]
    files = [(run.file.parent / "files" / path).read_bytes() for path in paths]
    assert files == [bytes(1000), b"part"]
    assert json.loads(run.media()["artifact/weights"][0][1])["type"] == "model"


def test_a_missing_file_is_named(run):
    item = store_content(run.path, "html", "page", "<p>hello</p>")
    (run.path / item.path).unlink()
    run.logger.on_content(run.state, 1, item)
    [(_, value)] = run.media()["html/page"]
    assert "missing" in value
    assert item.path in value


def test_alerts_summary_and_changes_of_the_configuration_are_records(run):
    run.step(0, loss=0.5)
    run.logger.on_alert(run.ctx, "loss is NaN", "look", "warning")
    run.logger.on_summary(run.ctx, {"best": 0.25})
    run.logger.on_config_update(run.ctx, {"layers": 3, "api_key": "secret-9"})
    run.logger.on_epoch_end(run.state, 2, {"accuracy": 0.5})
    [alert] = run.records("alert")
    assert (alert.title, alert.text, alert.level) == ("loss is NaN", "look", "WARN")
    [config] = run.records("config")
    assert [(each.key, each.value_json) for each in config.update if each.key == "layers"] == [("layers", "3")]
    assert "secret-9" not in str(config)
    summary = {each.nested_key[0]: json.loads(each.value_json) for each in run.records("summary")[-1].update}
    assert summary["best"] == 0.25
    epochs = wandb.metric_series(wandb.rows_in(run.file), "epoch")
    assert epochs == {"epoch": [(0, 2)], "accuracy": [(0, 0.5)]}


def test_content_and_epochs_of_steps_that_are_run_again_are_there_once(run):
    for step in range(4):
        run.step(step, loss=1.0)
        run.content("text", "story", f"old {step}", step)
        run.state.step = step
        run.logger.on_epoch_end(run.state, step, {"accuracy": step})
    run.start(2)
    for step in (2, 3):
        run.content("text", "story", f"new {step}", step)
        run.step(step, loss=1.0)
        run.state.step = step
        run.logger.on_epoch_end(run.state, step, {"accuracy": step + 10})
    values = run.media()["story"]
    pages = [(run.file.parent / "files" / value["path"]).read_text() for _, value in values]
    assert [step for step, _ in values] == [0, 1, 2, 3]
    assert pages == [f"<pre>{word}</pre>" for word in ("old 0", "old 1", "new 2", "new 3")]
    epochs = wandb.metric_series(wandb.rows_in(run.file), "epoch")
    assert epochs["accuracy"] == [(0, 0), (1, 1), (2, 12), (3, 13)]


def test_content_after_the_last_row_is_void_when_its_step_is_run_again(run):
    run.step(0, loss=1.0)
    run.content("text", "story", "old", 1)  # killed before the row of step 1
    run.start(1)
    run.content("text", "story", "new", 1)
    [(step, value)] = run.media()["story"]
    assert step == 1
    assert (run.file.parent / "files" / value["path"]).read_text() == "<pre>new</pre>"


def test_artifacts_that_a_resumed_program_stores_again_are_there_once_and_new_ones_too(run, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"12345")
    for step in (0, 1):
        run.start(step)
        run.content("artifact", "weights", tmp_path / "weights.bin")
        run.step(step, loss=1.0)
    (tmp_path / "weights.bin").write_bytes(b"123456")
    run.content("artifact", "weights", tmp_path / "weights.bin")
    assert [json.loads(value)["size"] for _, value in run.media()["artifact/weights"]] == [5, 6]


def test_tags_notes_and_axes_of_a_run_are_those_that_it_had_last(tmp_path):
    logger = WandbLoggerCallback("p", mode="offline")
    with evsys_bus.run(tmp_path / "run", callbacks=[logger], tags=["a"], notes="first", output=False) as run:
        run.log({"loss": 1.0, "tokens": 100}, step=0)
        run.tags = ["a", "b"]
        run.notes = "second"
        run.define_metric("loss", x="tokens")
        run.config.update({"layers": 3})
        run.log({"loss": 0.5, "tokens": 200}, step=1)
    [file] = wandb.wandb_files_of(tmp_path)
    records = wandb.records_in(file)
    described = [each.run for each in records if each.HasField("run")]
    assert (list(described[0].tags), described[0].notes) == (["a"], "first")
    assert (list(described[-1].tags), described[-1].notes) == (["a", "b"], "second")
    metrics = {each.metric.name: each.metric.step_metric for each in records if each.HasField("metric")}
    assert metrics["train/loss"] == "train/tokens"
    assert metrics["train/tokens"] == "train/step"
    updates = [
        json.loads(item.value_json) for each in records if each.HasField("config") for item in each.config.update
    ]
    assert updates[-1] == 3


@pytest.mark.servers
def test_wandb_itself_uploads_the_files_and_the_rows(tmp_path, server, login):
    run = Run(tmp_path, mode="offline")
    run.start()
    items = content_of(run, tmp_path)
    run.content("artifact", "weights", tmp_path / "weights.bin")
    run.content("table", "rows", [[1, 2]], 2, columns=["a", "b"])
    run.logger.on_alert(run.ctx, "loss is NaN", "look", "warning")
    run.logger.on_config_update(run.ctx, {"layers": 3})
    run.ctx.extras["tags"] = ["late"]
    run.logger.on_config_update(run.ctx, {})
    run.step(2, loss=1.0)
    run.end()
    run.logger.close()
    wandb.sync_files(run.file)
    sent = wandb.metric_series(server.rows(wandb.run_id_of(run.file)), "media")
    assert {value["_type"] for points in sent.values() for _, value in points if isinstance(value, dict)} == {
        *items,
        "table-file",
    }
    for points in sent.values():
        for _, value in points:
            if isinstance(value, dict):
                assert hashlib.sha256(server.files[value["path"]]).hexdigest() == value["sha256"]
    assert bytes(1000) in server.files.values()
    upserts = server.runs[wandb.run_id_of(run.file)]
    assert any("late" in (each.get("tags") or ()) for each in upserts)
    assert any('"layers"' in str(each.get("config")) for each in upserts)
    assert any(b"loss is NaN" in each for each in server.received)
