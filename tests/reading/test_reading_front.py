"""``evsys_bus.read`` of runs that `evsys_bus.run` recorded: rows in parts, later config, summary, content, alerts."""

import evsys_bus
from evsys_adapters.system_metrics import SystemMetrics
from evsys_bus import Envelope, LogContext
from evsys_bus.codec import encode
from evsys_bus.journal import JournalWriter

LOGGED_IN_PARTS = """
    import os, sys
    import evsys_bus
    run = evsys_bus.run(sys.argv[1], num_steps=9, output=False, environment=False)
    run.__enter__()
    for step in range(int(sys.argv[2]), int(sys.argv[3])):
        run.log({"loss": float(step)}, step=step)
        run.log({"acc": step / 8}, step=step)
    if len(sys.argv) > 4:
        run.checkpoint("half", state_path=__file__, step=step)
    os._exit(9)
"""


def rows_of(run):
    return {row.step: row.metrics for row in run.steps()}


def test_a_run_that_was_logged_has_rows_config_tags_summary_alerts_and_content(tmp_path):
    options = {"tags": ["night"], "notes": "first", "output": False, "environment": False}
    with evsys_bus.run(tmp_path / "ppo", config={"lr": 0.5, "opt": {"name": "adam"}}, **options) as run:
        for step in run.steps(4):
            run.log({"loss": 4.0 - step}, step=step)
            run.log({"acc": step / 4}, step=step)
        run.eval("val", {"f1": 0.5})
        run.config.update({"opt": {"beta": 0.9}, "new": 1})
        run.summary["answer"] = 42
        run.alert("hot", "the machine is hot", "error")
        run.text("note", "hello")
        live = evsys_bus.read(tmp_path / "ppo")
    read = evsys_bus.read(tmp_path / "ppo")
    assert (live.state, read.state, read.end_event) == ("running", "completed", "RunEnd")
    assert rows_of(live) == rows_of(read) == {step: {"loss": 4.0 - step, "acc": step / 4} for step in range(4)}
    assert (read.tags, read.notes, read.arm) == (["night"], "first", None)
    assert read.config == {"lr": 0.5, "opt": {"name": "adam", "beta": 0.9}, "new": 1}
    assert (read.summary["answer"], read.last("answer"), read.last("val/f1")) == (42, 42.0, 0.5)
    assert [(each.title, each.text, each.level) for each in read.alerts] == [("hot", "the machine is hot", "error")]
    assert [(each.item.kind, each.item.name) for each in read.contents] == [("text", "note")]


def test_parts_of_a_row_that_was_never_complete_are_there_after_a_kill(program, tmp_path):
    assert program(LOGGED_IN_PARTS, str(tmp_path / "ppo"), "0", "3").wait() == 9
    run = evsys_bus.read(tmp_path / "ppo")
    assert (run.state, run.num_steps) == ("killed", 9)
    assert rows_of(run) == {step: {"loss": float(step), "acc": step / 8} for step in range(3)}


def test_a_run_that_was_killed_and_started_again_is_one_with_each_step_once(program, tmp_path):
    assert program(LOGGED_IN_PARTS, str(tmp_path / "ppo"), "0", "4", "save").wait() == 9
    with evsys_bus.run(tmp_path / "ppo", output=False, environment=False) as run:
        steps = [*run.steps(6)]
        for step in steps:
            run.log({"loss": 10.0 + step}, step=step)
    read = evsys_bus.read(tmp_path / "ppo")
    assert steps == [4, 5]
    assert read.state == "completed"
    assert [row["loss"] for row in rows_of(read).values()] == [0.0, 1.0, 2.0, 3.0, 14.0, 15.0]
    assert read.checkpoints[0].name == "half"


def test_an_event_of_the_program_that_is_called_metrics_is_no_row(program, tmp_path):
    source = """
        import sys
        import evsys_bus
        from evsys_bus import *
        class Metrics(Event, frozen=True):
            state: LoopState
            step_idx: int
            metrics: dict[str, float]
        state = LoopState(0, 9, sys.argv[1])
        with EventBus([], journal=sys.argv[1] + "/journal") as bus:
            bus.publish(StepEnd(state, 0, TrainingBatch(), {"loss": 1.0}))
            bus.publish(Metrics(state, 7, {"other": 2.0}))
    """
    assert program(source, str(tmp_path / "own")).wait() == 0
    assert rows_of(evsys_bus.read(tmp_path / "own")) == {0: {"loss": 1.0}}


def test_samples_of_the_machine_are_by_time_and_apart_from_the_rows(tmp_path):
    with evsys_bus.run(tmp_path / "ppo", output=False, environment=False) as run:
        run.log({"loss": 1.0}, step=0)
    writer = JournalWriter(tmp_path / "ppo" / "journal", family="s").open()
    for time, percent in ((10.0, 0.25), (25.0, 0.75)):
        sample = SystemMetrics(LogContext(tmp_path, run_key="ppo"), {"cpu/percent": percent}, 0)
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, time, sample, "ppo")))
    writer.close()
    read = evsys_bus.read(tmp_path / "ppo")
    assert [list(each) for each in read.system["cpu/percent"]] == [[10.0, 25.0], [0.25, 0.75]]
    assert rows_of(read) == {0: {"loss": 1.0}}
    assert (read.started.year, read.state) == (read.ended.year, "completed")


def test_epochs_are_read_in_order_each_once_and_those_that_a_resumed_training_makes_anew_as_it_made_them(tmp_path):
    for first, last, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        run = evsys_bus.run(tmp_path / "a", first_step=first, output=False, environment=False).start()
        for step in run.steps(last):
            run.log({"loss": loss})
            if step % 2:
                run.epoch_end(step // 2, {"val_loss": loss + step})
        run.close("cancelled")
    epochs = evsys_bus.read(tmp_path / "a").epochs
    expected = [(0, {"val_loss": 2.0}), (1, {"val_loss": 4.0}), (2, {"val_loss": 7.0}), (3, {"val_loss": 9.0})]
    assert [(each.epoch, each.metrics) for each in epochs] == expected
    assert [each.time for each in epochs] == sorted(each.time for each in epochs)


def test_epochs_of_a_program_that_counts_its_steps_itself_are_void_with_the_steps_that_are_made_anew(tmp_path):
    for first, last, loss in ((0, 6, 1.0), (4, 5, 2.0)):
        run = evsys_bus.run(tmp_path / "a", first_step=first, output=False, environment=False).start()
        for step in range(first, last):
            run.log({"loss": loss}, step=step, commit=True)
            if step % 2:
                run.epoch_end(step // 2, {"val_loss": loss + step})
        run.close("cancelled")
    found = [(each.epoch, each.metrics) for each in evsys_bus.read(tmp_path / "a").epochs]
    assert found == [(0, {"val_loss": 2.0}), (1, {"val_loss": 4.0})]
