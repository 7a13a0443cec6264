"""The board and the views that read it, without a terminal."""

import contextlib
import io
import json
import logging
import math
import threading
import time

import numpy as np
import pytest
from rich.console import Console

from evsys_bus import (
    ArmResult,
    Callback,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    RunResult,
    TrainingBatch,
)
from evsys_bus.cli.output.capture import MAX_LINES, CapturedStream, LineBuffer
from evsys_bus.cli.output.deliveries import ProblemMonitor
from evsys_bus.cli.output.errors import show_warnings
from evsys_bus.cli.output.formatting import format_duration, format_mean_sd, format_number
from evsys_bus.cli.output.live import LiveView, arm_rows, choose_metrics, render, render_alert
from evsys_bus.cli.output.progress import LineView, format_json, format_plain
from evsys_bus.cli.output.run_state import MAX_PENDING_UPDATES, DrainStatus, PlannedRun, RunStateTracker
from evsys_bus.cli.output.screen import Screen
from evsys_bus.cli.output.transfers import no_uploads
from evsys_bus.context import Spread, spread_of
from evsys_bus.delivery.status_files import write_status
from evsys_bus.diagnostics import log
from evsys_bus.journal import OsDisk
from evsys_bus.tasks import DeliveryStatus
from support.files import parse_json_lines


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


PLAN = [PlannedRun(f"{arm}-s{seed}", arm, seed) for arm in ("calm", "wild") for seed in (0, 1)]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def board(clock):
    return RunStateTracker(PLAN, folder="runs/x", clock=clock)


def begin(board, tmp_path, key, *, step=0, num_steps=100):
    ctx = LogContext(output_dir=tmp_path, run_key=key)
    state = LoopState(step=step, num_steps=num_steps, output_dir=tmp_path / key, ctx=ctx)
    board.on_run_start(ctx)
    board.on_train_start(state)
    return state


def end(board, state, status="completed", error=None):
    board.on_train_end(state, LoopArtifacts())
    board.on_run_end(state.ctx, RunResult(status=status, error=error), ArmResult(name="calm", status=status))


def drawn(board, *, width=120, height=30, success_metric=None, troubles=()):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(render(board, "title", success_metric, width=width, height=height, problems=troubles))
    return console.file.getvalue()


def test_a_run_s_rate_counts_from_where_it_was_resumed(board, clock, tmp_path):
    state = begin(board, tmp_path, "calm-s0", step=50)
    clock.seconds = 5.0
    board.on_step_end(state, 59, TrainingBatch(), {"loss": 1.0})
    run = board.runs["calm-s0"]
    assert (run.step, run.rate(5.0), run.eta(5.0)) == (60, 2.0, 20.0)


def test_late_and_repeated_steps_do_not_set_a_run_back(board, tmp_path):
    state = begin(board, tmp_path, "calm-s0")
    for step_idx in (7, 3, 7):
        board.on_step_end(state, step_idx, TrainingBatch(), {})
    assert board.runs["calm-s0"].step == 8


def test_a_step_leaves_nothing_behind_however_many_there_are(board, tmp_path):
    state = begin(board, tmp_path, "calm-s0", num_steps=10**6)
    before = len(board.updates)
    for step_idx in range(1000):
        board.on_step_end(state, step_idx, TrainingBatch(), {"loss": 0.1})
    assert len(board.updates) == before


def test_news_that_nobody_takes_are_bounded_and_counted(board, clock, tmp_path):
    state = begin(board, tmp_path, "calm-s0")
    for _ in range(MAX_PENDING_UPDATES + 5):
        board.on_eval(state, 1, "val", {"acc": 0.5})
    assert len(board.updates) == MAX_PENDING_UPDATES
    written = io.StringIO()
    LineView(board, written, format_plain).tick()
    assert f"event=lines_dropped count={board.updates_dropped}" in written.getvalue()


def test_an_eval_has_its_own_step_though_the_run_is_far_ahead(board, tmp_path):
    state = begin(board, tmp_path, "calm-s0")
    board.on_step_end(state, 79, TrainingBatch(), {})
    board.on_eval(state, 9, "val", {"acc": 0.5})
    written = io.StringIO()
    LineView(board, written, format_json).tick()
    row = json.loads(written.getvalue().splitlines()[-1])
    assert (row["event"], row["step"], row["num_steps"]) == ("eval", 10, 100)


def test_every_thirty_seconds_each_run_under_way_has_a_line_and_a_finished_one_has_none(board, clock, tmp_path):
    written = io.StringIO()
    view = LineView(board, written, format_plain)
    done, running = begin(board, tmp_path, "calm-s0"), begin(board, tmp_path, "wild-s1")
    end(board, done)
    clock.seconds = 10.0
    board.on_step_end(running, 19, TrainingBatch(), {"loss": 0.25, "note": "two words"})
    view.tick()
    assert "event=progress" not in written.getvalue()
    clock.seconds = 30.0
    view.tick()
    view.tick()
    (line,) = [line for line in written.getvalue().splitlines() if "event=progress" in line]
    assert line.partition(" ")[2] == (
        'event=progress run=wild-s1 step=20/100 loss=0.25 note="two words" steps_per_second=0.67 eta_seconds=120'
    )


def test_a_metric_that_is_called_like_a_fact_does_not_take_its_place():
    assert format_plain({"run": "a", "metrics": {"run": 3.0, "x": 1.0}}) == "run=a x=1"


def test_text_from_outside_cannot_steer_the_terminal_or_break_the_line():
    assert format_plain({"error": "a\x1b[2Jb\nc", "x": "\x07"}) == r'error="a\u001b[2Jb\nc" x=\x07'


def test_an_arm_s_figures_are_over_its_runs_without_the_failed_ones(board, clock, tmp_path):
    for seed, loss in ((0, 0.2), (1, 0.4)):
        state = begin(board, tmp_path, f"calm-s{seed}")
        board.on_step_end(state, 9 + 10 * seed, TrainingBatch(), {"loss": np.float32(loss)})
    failed = begin(board, tmp_path, "wild-s0")
    board.on_step_end(failed, 4, TrainingBatch(), {"loss": math.inf})
    end(board, failed, "failed", "boom")
    clock.seconds = 10.0
    calm, wild = arm_rows(board, choose_metrics(board, None), 10.0)
    assert (round(calm.train.mean, 3), round(calm.train.sd or 0, 3), calm.train.n) == (0.3, 0.141, 2)
    assert (calm.completed, calm.running, calm.step, calm.num_steps) == (0, 2, 15, 100)
    assert calm.eta == pytest.approx((90 + 80) / 3)
    assert (wild.failed, wild.train.mean, wild.step) == (1, None, 5)


def test_an_arm_of_which_a_seed_is_not_finite_shows_no_mean(board, tmp_path):
    for seed, loss in ((0, 0.25), (1, math.nan)):
        board.on_step_end(begin(board, tmp_path, f"calm-s{seed}"), 9, TrainingBatch(), {"loss": np.float32(loss)})
    text = drawn(board)
    assert "nan" in text
    assert "0.250" not in text


def test_the_headline_is_the_success_metric_as_soon_as_it_is_seen(board, tmp_path):
    state = begin(board, tmp_path, "calm-s0")
    board.on_step_end(state, 0, TrainingBatch(), {"epoch": 0, "entropy": 1.0})
    assert choose_metrics(board, "val/acc") == ("entropy", None)
    board.on_step_end(state, 1, TrainingBatch(), {"entropy": 1.0, "loss": 1.0})
    board.on_eval(state, 1, "quick", {"f1": 0.1, "acc": 0.2})
    assert choose_metrics(board, "val/acc") == ("loss", ("quick", "acc"))
    board.on_eval(state, 1, "val", {"acc": 0.2})
    assert choose_metrics(board, "val/acc") == ("loss", ("val", "acc"))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.812, "0.812"), (12.345, "12.35"), (12345.6, "12,346"), (1e-5, "1.00e-05"), (math.nan, "nan")],
)
def test_numbers_are_short_and_never_look_like_zero(value, text):
    assert format_number(value) == text


def test_a_spread_of_one_run_has_no_deviation_and_one_of_none_is_a_dash():
    assert format_mean_sd(spread_of([0.5])) == "0.500"
    assert format_mean_sd(spread_of([])) == "-"
    assert format_mean_sd(Spread(0.812, 0.0114, 4)) == "0.812 ± 0.011"
    assert format_mean_sd(Spread(0.812, 0.0114, 4), sd=False) == "0.812"


@pytest.mark.parametrize(("seconds", "text"), [(42, "0:42"), (3723, "1:02:03"), (273900, "3d 04:05"), (None, "-")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("width", "height"), [(120, 30), (60, 20), (60, 12)])
def test_the_table_fits_the_terminal_with_a_hundred_arms_and_many_failures(clock, tmp_path, width, height):
    board = RunStateTracker([PlannedRun(f"arm-{arm:03d}-s0", f"arm-{arm:03d}", 0) for arm in range(100)], clock=clock)
    for arm in range(40, 60):
        state = begin(board, tmp_path, f"arm-{arm:03d}-s0")
        board.on_step_end(state, 12_399, TrainingBatch(), {"loss": 0.123})
        if arm % 2:
            end(board, state, "failed", "RuntimeError: " + "x" * 300)
    lines = drawn(board, width=width, height=height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert any("arm-040" in line for line in lines), "what runs is shown before what waits"
    assert any("more arms" in line for line in lines)
    assert any("more failed runs" in line for line in lines)


def test_captured_lines_keep_their_order_and_a_flood_is_cut_and_counted():
    captured = LineBuffer()
    out, err = CapturedStream(io.StringIO(), captured.add), CapturedStream(io.StringIO(), captured.add)
    print("one", file=out)
    print("half", end="", file=out, flush=True)
    print("two", file=err)
    print(" a line\rdrawn anew", file=out)
    assert captured.drain() == ["one", "two", "drawn anew"]
    out.write("\n".join(map(str, range(MAX_LINES + 11))) + "\n")
    lines = captured.drain()
    assert lines[0] == "(11 lines were printed too fast to show)"
    assert (lines[1], lines[-1], len(lines)) == ("11", str(MAX_LINES + 10), MAX_LINES + 1)


def test_lines_of_several_threads_stay_whole_and_none_is_lost_when_the_table_goes():
    captured, terminal = LineBuffer(), io.StringIO()
    stream = CapturedStream(terminal, captured.add)
    stream.write("step 1 of")
    other = threading.Thread(target=lambda: [stream.write("epoch "), stream.write("3\n"), stream.write("acc ")])
    other.start()
    other.join()
    stream.write(" 9\n10%\r20%\r30%")
    assert captured.drain() == ["epoch 3", "step 1 of 9"]
    stream.write("\r40%\r\n")
    stream.write("bye")
    stream.finish()
    assert captured.drain() == ["40%", "acc ", "bye"]
    print("later", file=stream, flush=True)
    assert (captured.drain(), terminal.getvalue()) == ([], "later\n"), "who kept the stream still reaches the terminal"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_courier_s_warning_has_its_facts_on_one_line_and_its_traceback_below(capsys, as_json):
    trace = "Traceback (most recent call last):\n  File \"mine.py\", line 3, in on_eval\n    x\nKeyError: 'acc'"
    with show_warnings(Screen(), as_json=as_json):
        for count in (1, 7):
            log().warning(
                "hook.failed", adapter="csv", hook="on_eval", count=count, traceback=f"\n{trace}", fix="mend it"
            )
        log().warning("hook.failed", adapter="csv", traceback=trace.replace("KeyError", "ValueError"))
        log().warning("delivery.parked", adapter="wandb", why="401\nno key", fix="wandb login")
        logging.getLogger("urllib3").warning("%s", f"retrying (2 times)\n{trace}")
    err = capsys.readouterr().err
    if as_json:
        rows = parse_json_lines(err)
        assert [row["message"] for row in rows[:2]] == [
            "hook.failed adapter=csv hook=on_eval count=1 fix=mend it",
            "hook.failed adapter=csv hook=on_eval count=7 fix=mend it",
        ]
        assert [row.get("traceback") for row in rows] == [
            trace,
            "KeyError: 'acc'",
            trace.replace("KeyError", "ValueError"),
            None,
            trace,
        ]
        return
    below = "".join(f"\n  {line}" for line in trace.splitlines())
    assert err == (
        f"warning: hook.failed adapter=csv hook=on_eval count=1 fix=mend it{below}\n"
        "warning: hook.failed adapter=csv hook=on_eval count=7 fix=mend it\n  KeyError: 'acc'\n"
        f"warning: hook.failed adapter=csv{below.replace('KeyError', 'ValueError')}\n"
        "warning: delivery.parked adapter=wandb why=401\n  no key fix=wandb login\n"
        f"warning: retrying (2 times){below}\n"
    )


def test_a_warning_whose_error_shows_a_credential_has_its_redacted_traceback_the_first_time(capsys):
    with show_warnings(Screen()):
        for _ in range(2):
            try:
                raise ValueError("401 for https://me:S3CRET@host/v1")
            except ValueError:
                log().warning("hook.failed", callback="mine", exc_info=True)
    first, second = capsys.readouterr().err.split("warning: hook.failed callback=mine\n")[1:]
    assert first.startswith("  Traceback (most recent call last):\n")
    assert first.endswith("  ValueError: 401 for https://me:<redacted>@host/v1\n")
    assert second == "  ValueError: 401 for https://me:<redacted>@host/v1\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 200])
def test_marks_below_a_line_of_source_are_left_out_where_the_terminal_would_break_them(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with contextlib.redirect_stderr(Terminal()) as terminal, show_warnings(Screen()):
        try:
            _ = ["a long line of source, wider than a narrow terminal", 1 / 0]
        except ArithmeticError as error:
            error.__context__ = None  # a browser's test before may have left one: it switches between stacks
            log().warning("run.failed", run="a", exc_info=True)
    lines = terminal.getvalue().splitlines()
    assert any("a long line" in line for line in lines)
    assert any(set(line) <= set(" ~^") for line in lines) == (columns == 200)


def test_frames_between_publish_and_a_hook_are_not_shown(capsys, step_end):
    class Raises(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            raise KeyError("reward")

    with show_warnings(Screen()), EventBus([Raises()]) as bus:
        bus.publish(step_end(0))
    shown = capsys.readouterr().err
    assert "in on_step_end" in shown
    assert "<evsys-bus" not in shown


def test_plain_lines_have_no_credentials_in_names_and_texts():
    facts = {"event": "eval", "eval": "held_out", "metrics": {"hf_S3CRETabcdefghij1": 1.0, "url": "redis://:S3CRET@h"}}
    assert format_plain(facts) == "event=eval eval=held_out <redacted>=1 url=redis://:<redacted>@h"


def test_a_checkpoint_and_a_stop_are_news(board, tmp_path):
    state = begin(board, tmp_path, "calm-s0")
    board.on_checkpoint(state, ManifestRow("final", 9))
    state.request_stop("val/acc has not improved")
    board.on_train_end(state, LoopArtifacts())
    updates = [(each.event, each.step) for each in board.updates]
    assert updates == [
        ("run_started", 0),
        ("checkpoint", 10),
        ("stopped", 0),
    ]
    assert board.updates[-1].facts == {"reason": "val/acc has not improved"}


@pytest.mark.parametrize(("width", "height"), [(120, 24), (60, 14), (40, 12)])
def test_the_table_says_whole_what_is_waited_for_at_the_end(clock, width, height):
    board = RunStateTracker([PlannedRun(f"arm-{arm}-s0", f"arm-{arm}", 0) for arm in range(30)], clock=clock)
    board.notice = "SIGINT: stopping after the steps in hand"
    told = [DeliveryStatus("csv", 3, 3, 0, 0), DeliveryStatus("halved", 60, 2, 0, 58)]
    board.drain_status = DrainStatus(lambda: (0, told), 20.0, clock=clock)
    clock.seconds = 6.0
    lines = drawn(board, width=width, height=height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = " ".join(line.rstrip() for line in lines)
    assert "waiting for halved: 58 events, at most 14 s more; Ctrl-C leaves them to sync" in text
    assert "stopping" not in text
    del told[1]
    clock.seconds = 7.0
    assert "waiting for" not in drawn(board)


def test_tasks_that_are_waited_for_are_told_too(clock):
    waiting = DrainStatus(lambda: (2, [DeliveryStatus("halved", 60, 2, 0, 58)]), 20.0, clock=clock)
    assert waiting.text() == "waiting for 2 tasks, halved: 58 events, at most 20 s more; Ctrl-C twice ends it at once"
    assert waiting.facts() == {
        "event": "waiting",
        "tasks": 2,
        "adapters": "halved",
        "events": 58,
        "at_most_seconds": 20,
        "hint": "Ctrl-C twice ends it at once",
    }


def test_the_wait_at_the_end_says_what_is_owed_and_what_failed_with_the_fix(clock):
    owing = DeliveryStatus("wandb", 120, 120, owed=120, error="no key", owed_fix="wandb login", state="idle")
    raising = DeliveryStatus("csv", 120, 118, 2, hook_failures=1, task_failures=3, state="idle")
    waiting = DrainStatus(lambda: (0, [owing, raising]), 20.0, clock=clock)
    assert waiting.text() == (
        "waiting for wandb: 120 owed (no key; fix: wandb login), at most 20 s more; Ctrl-C leaves them to sync"
        "; csv: 2 dead, 1 hook failure, 3 task failures"
    )
    facts = waiting.facts()
    assert (facts["adapters"], facts["events"], facts["owed"]) == ("wandb", 0, 120)
    assert (facts["dead"], facts["hook_failures"], facts["task_failures"]) == (2, 1, 3)
    assert (facts["adapter"], facts["why"], facts["fix"]) == ("wandb", "no key", "wandb login")
    assert DrainStatus(lambda: (0, [raising]), 20.0, clock=clock).text() is None, "nothing is waited for"


@pytest.mark.parametrize(("width", "height"), [(120, 24), (80, 24), (60, 14), (40, 12)])
def test_while_a_run_goes_on_the_table_has_what_a_person_must_do_for_a_delivery(clock, tmp_path, width, height):
    directory = tmp_path / "journal"
    (directory / "couriers").mkdir(parents=True)
    states = {
        "wandb": DeliveryStatus(state="idle", owed=7, owed_fix="wandb login", error="no key is set for api.wandb.ai"),
        "board": DeliveryStatus(state="parked", error="ParkedError: 402 over quota", fix="ask the owner of the board"),
        "slow": DeliveryStatus(state="retrying", error="503", failing_since=time.time() - 1),
        "old": DeliveryStatus(state="ended", error="it is not followed any more"),
        "well": DeliveryStatus(state="delivering", owed=3),
    }
    watch = ProblemMonitor(directory, clock=clock)
    assert watch.poll() == []
    for name, state in states.items():
        write_status(OsDisk(), str(directory), name, state)
    assert watch.poll() == [], "it was asked for a moment ago"
    clock.seconds += 2.0
    assert [each.name for each in watch.poll()] == ["board", "wandb"]
    board = RunStateTracker([PlannedRun(f"arm-{arm}-s0", f"arm-{arm}", 0) for arm in range(30)], clock=clock)
    lines = drawn(board, width=width, height=height, troubles=watch.poll()).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    if height > 12:
        assert "board parked: ParkedError: 402 over quota fix: ask the owner of the board" in text
        assert "wandb 7 owed no key is set for api.wandb.ai fix: wandb login" in text
    else:
        assert "2 more with problems: evsys-bus status" in text


def test_an_alert_is_a_line_of_its_own_without_credentials(tmp_path, clock):
    board, stream = RunStateTracker([], clock=clock), io.StringIO()
    ctx = LogContext(tmp_path, run_key="a")
    board.on_alert(ctx, "loss is NaN", "see https://me:hunter2@host/x", "error")
    LineView(board, stream, format_plain).close()
    [line] = stream.getvalue().splitlines()
    assert 'event=alert run=a level=error title="loss is NaN"' in line
    assert "hunter2" not in line
    shown = render_alert(board.alerts.popleft())
    assert shown.plain.startswith("a  ERROR  loss is NaN  see https://")
    assert "hunter2" not in shown.plain
    assert str(shown.style) == "red"


def test_the_live_view_prints_an_alert_above_its_table(tmp_path, clock, monkeypatch):
    stream = io.StringIO()
    board = RunStateTracker([], clock=clock)
    view = LiveView(
        board,
        stream,
        title="trial",
        success_metric=None,
        color=True,
        poll_uploads=no_uploads,
        poll_problems=list,
    )
    board.on_alert(LogContext(tmp_path, run_key="a"), "loss is NaN", "look", "warning")
    view.tick()
    view.close()
    assert stream.getvalue().count("a  WARNING  loss is NaN  look") == 1
    assert not board.alerts
