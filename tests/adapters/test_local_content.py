"""local_logger: content, alerts, trajectories, training data and what a run sets, in files that people can read."""

import json

import pytest

from evsys_adapters import LocalLoggerCallback
from evsys_bus import LogContext
from evsys_bus.context import ExperimentResult
from support import loggers


class Run(loggers.Run):
    """A run that local_logger logs, with content."""

    def __init__(self, folder, **params):
        super().__init__(LocalLoggerCallback(**{"print_every": 0, **params}), folder, "run")
        self.path, self.logs = folder / "run", folder / "run" / "logs"

    def rows(self, name):
        self.logger.close()
        return [json.loads(line) for line in (self.path / name).read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    run = Run(tmp_path)
    run.start()
    return run


def test_every_content_is_a_row_with_the_path_of_its_file(run):
    item = run.content("html", "page", "<p>hello</p>", 3, caption="seen")
    run.content("histogram", "weights", [1.0, 2.0], 4)
    page, histogram = run.rows("logs/content.jsonl")
    assert page["step"] == 3
    assert (page["name"], page["kind"], page["caption"]) == ("page", "html", "seen")
    assert page["path"] == item.path
    assert (run.path / page["path"]).read_text() == "<p>hello</p>"
    assert sum(histogram["data"]["counts"]) == 2


def test_content_of_steps_that_are_run_again_is_there_once(run):
    for step in range(4):
        run.step(step, loss=1.0)
        run.content("text", "story", f"old {step}", step)
        run.logger.on_rollout(run.state, step, [{"text": f"old {step}"}])
        run.logger.on_epoch_end(run.state, step, {"accuracy": 0.5})
    run.start(2)
    for step in (2, 3):
        run.content("text", "story", f"new {step}", step)
        run.logger.on_rollout(run.state, step, [{"text": f"new {step}"}])
        run.step(step, loss=1.0)
        run.logger.on_epoch_end(run.state, step, {"accuracy": 0.75})
    expected = ["old 0", "old 1", "new 2", "new 3"]
    assert [row["data"]["text"] for row in run.rows("logs/content.jsonl")] == expected
    assert [row["text"] for row in run.rows("logs/training/rollouts.jsonl")] == expected
    epochs = [(row["epoch"], row["accuracy"]) for row in run.rows("logs/training/epochs.jsonl")]
    assert epochs == [(0, 0.5), (1, 0.5), (2, 0.75), (3, 0.75)]


def test_an_artifact_that_a_resumed_program_stores_again_is_there_once(run, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"12345")
    for _ in range(2):
        run.start()
        run.content("artifact", "weights", tmp_path / "weights.bin")
    assert [row["name"] for row in run.rows("logs/content.jsonl")] == ["weights"]


def test_trajectories_have_their_items_and_what_was_cut_is_counted(tmp_path):
    run = Run(tmp_path, max_rollouts=2)
    run.start()
    run.logger.on_rollout(run.state, 0, [{"reward": 1.0}, {"reward": 2.0}], ["a", "b"])
    run.logger.on_rollout(run.state, 1, [{"reward": each} for each in range(5)])
    assert run.rows("logs/training/rollouts.jsonl") == [
        {"step": 0, "reward": 1.0, "item": "a"},
        {"step": 0, "reward": 2.0, "item": "b"},
        {"step": 1, "reward": 0},
        {"step": 1, "reward": 1},
        {"step": 1, "omitted": 3, "total": 5},
    ]


def test_training_data_are_written_once_and_what_was_cut_is_counted(tmp_path):
    run = Run(tmp_path, max_train_rows=2)
    run.start()
    for _ in range(2):
        run.logger.on_train_data(run.ctx, [{"step": 7, "text": "a", "api_key": "secret-3"}, "plain", {"text": "c"}])
        run.start(1)
    first, *others = run.rows("data/training_data.jsonl")
    assert (first["step"], first["text"]) == (7, "a")
    assert "secret-3" not in str(first)
    assert others == [{"row": "plain"}, {"omitted": 1, "total": 3}]


def test_alerts_are_rows_and_lines(tmp_path, capsys):
    run = Run(tmp_path, print_every=1)
    run.start()
    run.logger.on_alert(run.ctx, "loss is NaN", "look at\nstep 6", "error")
    [row] = run.rows("logs/alerts.jsonl")
    assert (row["level"], row["title"], row["text"]) == ("error", "loss is NaN", "look at\nstep 6")
    assert row["time"] > 0
    assert capsys.readouterr().out == "ERROR  loss is NaN  look at step 6\n"


def test_the_conclusion_has_what_the_run_has_set(run):
    run.step(0, loss=1.0)
    run.logger.on_summary(run.ctx, {"best": 0.25, "nothing": float("nan")})
    run.logger.on_summary(run.ctx, {"best": 0.125})
    run.logger.on_config_update(run.ctx, {"layers": 3})
    again = LocalLoggerCallback(0)
    again.rewind(run.logger.mark())
    run.logger = again
    run.start(1)
    run.end()
    run.logger.on_experiment_end(run.ctx, ExperimentResult("trial"))
    page = (run.logs / "conclusion.md").read_text()
    assert "## Summary\n\n| name | value |\n| --- | --- |\n| best | 0.125 |\n| nothing | nan |" in page
    assert "| layers | 3 |" in page


def test_the_page_of_the_experiment_is_there_from_the_start(tmp_path):
    run = Run(tmp_path)
    ctx = LogContext(tmp_path, config=run.ctx.config)
    run.logger.on_experiment_start(ctx)
    run.start()
    page = (tmp_path / "experiment.md").read_text()
    assert "- status: running" in page
    assert "It learns." in page
    assert "[run](run/)" in page
    run.end()
    assert "completed" in (tmp_path / "experiment.md").read_text()
    run.logger.on_experiment_end(ctx, ExperimentResult("trial", conclusion="It did."))
    assert "It did." in (tmp_path / "experiment.md").read_text()


def test_a_run_without_an_experiment_has_no_such_page(run, tmp_path):
    run.step(0, loss=1.0)
    run.end()
    assert not (tmp_path / "experiment.md").exists()


def test_what_was_written_after_a_mark_is_undone(run):
    run.content("text", "story", "first", 0)
    run.logger.on_rollout(run.state, 0, [{"text": "first"}])
    mark = run.logger.mark()
    run.content("text", "story", "second", 1)
    run.logger.on_rollout(run.state, 1, [{"text": "second"}])
    run.logger.on_alert(run.ctx, "late", "", "info")
    run.logger.on_train_data(run.ctx, [{"text": "a"}])
    run.logger = LocalLoggerCallback(0)
    run.logger.rewind(mark)
    run.content("text", "story", "third", 1)
    run.logger.on_rollout(run.state, 1, [{"text": "third"}])
    run.logger.on_alert(run.ctx, "late", "", "info")
    run.logger.on_train_data(run.ctx, [{"text": "a"}])
    assert [row["data"]["text"] for row in run.rows("logs/content.jsonl")] == ["first", "third"]
    assert [row["text"] for row in run.rows("logs/training/rollouts.jsonl")] == ["first", "third"]
    assert len(run.rows("logs/alerts.jsonl")) == 1
    assert run.rows("data/training_data.jsonl") == [{"text": "a"}]
