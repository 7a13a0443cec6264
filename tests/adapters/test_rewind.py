"""csv_metrics and local_logger behind a courier that is killed anywhere: every row is there, and there once.

The model of the courier commits where it is told (the mark travels as JSON, as in a cursor), is killed where it is
told, and begins anew with another object. Files must end as if nothing had happened: the CSV file and the pages byte
for byte (as long as columns are cheap; larger files row for row), JSONL files row for row (a row that was replaced in
its place is padded with spaces).
"""

import contextlib
import csv as csv_module
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_bus.adapter import EventInfo, Rewindable
from evsys_bus.context import (
    ArmResult,
    EvalResult,
    ExperimentResult,
    LogContext,
    LoopArtifacts,
    LoopState,
    RunResult,
    TrainingBatch,
)
from support.files import parse_json_lines


class Killed(BaseException):
    """The process ends here; whatever is still tried ends as well."""


class Kill:
    """Ends at the n-th call to the file system, below a folder, while it is armed."""

    folder = ""
    left: int | None = None
    installed = False


def _audit(event, args):
    if Kill.left is None or not (event == "open" or event.startswith("os.")) or not args:
        return
    if isinstance(args[0], int) or os.fspath(args[0] or "").startswith(Kill.folder):
        Kill.left -= 1
        if Kill.left < 0:
            raise Killed


@contextlib.contextmanager
def killed_at(number, folder):
    """Die in that call to the file system, if there are so many; None for never."""
    if number is not None and not Kill.installed:
        sys.addaudithook(_audit)  # for ever, so only here; idle unless armed
        Kill.installed = True
    Kill.folder, Kill.left = str(folder), number
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        Kill.left = None


def call(callback, event, folder):
    hook, run, args, more = event
    ctx = LogContext(folder, run_key=run)
    handle = ctx
    if hook in {"on_train_start", "on_step_end", "on_eval", "on_train_end"}:
        step = args[0] if hook == "on_train_start" else 0
        handle = LoopState(step=step, num_steps=100, output_dir=folder / run, ctx=ctx)
        args = () if hook == "on_train_start" else args
    getattr(callback, hook)(handle, *args, **more)


def introduce(callback, events, folder, *, over_all):
    """What a courier does before it goes on: the start events of what is open, each once."""
    started, training, largest = {}, {}, {}
    for event in events:
        hook, run, args, _ = event
        if hook == "on_run_start":
            started[run] = event
        elif hook == "on_train_start":
            training[run] = args[0]
            if not over_all:
                largest.pop(run, None)
        elif hook == "on_step_end":
            largest[run] = max(args[0], largest.get(run, -1))
        elif hook == "on_train_end":
            training.pop(run, None)
        elif hook == "on_run_end":
            started.pop(run, None)
    callback.evsys_attached = (GivesAgain(),)
    for event in started.values():
        call(callback, event, folder)
    for run, first in training.items():
        call(callback, ("on_train_start", run, (largest.get(run, first - 1) + 1,), {}), folder)
    del callback.evsys_attached


class GivesAgain:
    """What a courier says of the events that it introduces."""

    def current_event(self):
        return EventInfo(0.0, carried=True)


class Life(NamedTuple):
    """How a courier ends."""

    events: int = 0
    """It delivers so many, and commits where it must."""
    unsaved: bool = False
    """Then it takes a mark, but never comes to save it."""
    more: int = 0
    """Then it delivers so many, without commits."""
    call: int | None = None
    """Then it dies in this call to the file system of the next event, or after it."""
    rewind_call: int | None = None
    """And the courier after it dies in this call of rewinding; the one after that rewinds again."""


def deliver(make, events, folder, *, commits=frozenset(), lives=(), over_all=False, read=None):
    """Deliver everything, dying as often as told; return what is left after the last courier's last marks."""
    callback = make(folder)
    assert isinstance(callback, Rewindable)
    saved, cursor = json.dumps(callback.mark()), 0
    for life in (*lives, None):
        at = cursor
        for event in events[at : None if life is None else at + life.events]:
            call(callback, event, folder)
            at += 1
            if at in commits:
                saved, cursor = json.dumps(callback.mark()), at
        if life is not None:
            if life.unsaved:
                callback.mark()
            for event in events[at : at + life.more]:
                call(callback, event, folder)
            with killed_at(life.call, folder):
                for event in events[at + life.more :][:1]:
                    call(callback, event, folder)
            with killed_at(life.rewind_call, folder):
                make(folder).rewind(json.loads(saved))
            callback = make(folder)
            callback.rewind(json.loads(saved))
            introduce(callback, events[:cursor], folder, over_all=over_all)
    callback.mark()
    callback.mark()  # the one before is on record
    return (read or files)(folder)


def files(folder):
    """What people see, as they read it."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != ".metrics.csv.run" and path.suffix != ".new":  # a kill may leave one
            text = path.read_text()
            seen[name] = parse_json_lines(text) if path.suffix == ".jsonl" else text
    return json.dumps(seen)  # NaN equals NaN as text


def csv(folder):
    return CsvMetricsCallback(folder / "{run}" / "metrics.csv")


def local(_):
    return LocalLoggerCallback(print_every=0)


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A file system whose fsync costs nothing: thousands are made."""
BOTH = pytest.mark.parametrize("make", [csv, local])
RUNS = st.sampled_from(["a", "b"])
STEPS = st.integers(0, 6)
METRICS = st.dictionaries(st.sampled_from("pqrs"), st.sampled_from([0.5, math.nan, 2]), max_size=3)
PREDICTIONS = st.lists(st.fixed_dictionaries({"task_id": st.sampled_from("xyz")}), max_size=2)
NAMES = st.sampled_from(["u", "v"])
TAGS = st.sampled_from([[], ["val"]])
SCORES = st.builds(lambda name, metrics, tags: EvalResult(name, metrics=metrics, tags=tags), NAMES, METRICS, TAGS)
EVENTS = st.one_of(
    st.tuples(st.just("on_step_end"), RUNS, st.tuples(STEPS, st.just(TrainingBatch()), METRICS), st.just({})),
    st.tuples(st.just("on_step_end"), RUNS, st.tuples(STEPS, st.just(TrainingBatch()), METRICS), st.just({})),
    st.tuples(st.just("on_run_start"), RUNS, st.just(()), st.just({})),
    st.tuples(st.just("on_train_start"), RUNS, st.tuples(STEPS), st.just({})),
    st.tuples(st.just("on_train_end"), RUNS, st.just((LoopArtifacts(),)), st.just({})),
    st.tuples(st.just("on_eval"), RUNS, st.tuples(STEPS, NAMES, METRICS), st.just({})),
    st.tuples(
        st.just("on_benchmark_eval"),
        RUNS,
        st.tuples(SCORES, PREDICTIONS),
        st.fixed_dictionaries({"step": st.none() | STEPS}),
    ),
    st.builds(
        lambda run, metrics: ("on_run_end", run, (RunResult(metrics=metrics), ArmResult(run, metrics=metrics)), {}),
        RUNS,
        METRICS,
    ),
)
LIVES = st.lists(
    st.builds(
        Life,
        st.integers(0, 12),
        st.booleans(),
        st.integers(0, 3),
        st.none() | st.integers(0, 25),
        st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=4,
)
END = ("on_experiment_end", None, (ExperimentResult("e", conclusion="So it is."),), {})


@BOTH
@pytest.mark.parametrize(
    "part", [0, *(pytest.param(each, marks=pytest.mark.long) for each in range(1, 4))]
)  # each in a few seconds: an example replaces small files many times
def test_whatever_happens_every_row_is_there_once(make, part):
    @seed(part)
    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(EVENTS, min_size=1, max_size=25), st.frozensets(st.integers(1, 25)), LIVES, st.booleans())
    def every_row_is_there_once(events, commits, lives, over_all):
        events = [*events, END]
        with tempfile.TemporaryDirectory(dir=MEMORY) as calm, tempfile.TemporaryDirectory(dir=MEMORY) as rough:
            expected = deliver(make, events, Path(calm))
            assert deliver(make, events, Path(rough), commits=commits, lives=lives, over_all=over_all) == expected

    every_row_is_there_once()


def row(step, **metrics):
    return ("on_step_end", "a", (step, TrainingBatch(), metrics), {})


def start(step):
    return ("on_train_start", "a", (step,), {})


@BOTH
@pytest.mark.parametrize(
    "events",
    [
        pytest.param([start(5), ("on_eval", "a", (5, "u", {"p": 1}), {}), row(5)], id="an eval before the first step"),
        pytest.param([*map(row, range(5)), start(5), row(3), row(6)], id="only a late step since the start"),
        pytest.param([*map(row, range(5)), start(2), row(1), row(2)], id="a late step behind a cut"),
        pytest.param([row(0, p=1), row(1, q=2), row(2, r=3), start(1), row(1, s=4)], id="columns, then a cut"),
    ],
)
def test_it_does_not_matter_where_the_courier_was_killed(make, events, tmp_path):
    expected = deliver(make, events, tmp_path / "calm")
    for committed in range(len(events) + 1):
        for more in range(len(events) - committed + 1):
            folder = tmp_path / f"{committed} {more}"
            lives = [Life(committed, more=more)]
            assert deliver(make, events, folder, commits=frozenset([committed]), lives=lives) == expected


def test_a_start_that_is_no_repetition_cuts_also_where_nobody_introduced_the_run(tmp_path):
    before = csv(tmp_path)
    for event in [start(0), *map(row, range(5))]:
        call(before, event, tmp_path)
    after = csv(tmp_path)
    after.rewind(before.mark())
    call(after, start(2), tmp_path)
    assert (tmp_path / "a" / "metrics.csv").read_text() == "step\n0\n1\n"


@BOTH
def test_rewinding_gives_back_what_was_there_at_the_mark(make, tmp_path):
    before = make(tmp_path)
    for event in [row(0), ("on_eval", "a", (0, "u", {"p": 1}), {})]:
        call(before, event, tmp_path)
    mark, seen = before.mark(), files(tmp_path)
    for event in [("on_eval", "a", (0, "u", {"p": 2}), {}), row(1, q=1), ("on_train_end", "a", (LoopArtifacts(),), {})]:
        call(before, event, tmp_path)
    assert files(tmp_path) != seen
    make(tmp_path).rewind(mark)
    assert files(tmp_path) == seen


def test_a_large_table_with_columns_to_come_has_every_row_once(tmp_path):
    filler = {f"filler{n}": math.pi for n in range(200)}
    events = [("on_train_start", "a", (0,), {})]
    for n in range(300):
        metrics = filler | ({f"late{n}": n} if n > 100 else {})
        events.append(("on_step_end", "a", (n, TrainingBatch(), metrics), {}))
    events.append(("on_train_end", "a", (LoopArtifacts(),), {}))
    seen = []
    for name, lives in (("calm", ()), ("rough", [Life(120, more=60), Life(90, unsaved=True, more=40, call=2)])):
        deliver(csv, events, tmp_path / name, commits=frozenset(range(0, 300, 7)), lives=lives)
        with (tmp_path / name / "a" / "metrics.csv").open(newline="") as file:
            seen.append([{key: cell for key, cell in row.items() if cell} for row in csv_module.DictReader(file)])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 300


@BOTH
def test_there_is_no_mark_while_rows_wait(make, tmp_path):
    callback = make(tmp_path)
    before = callback.mark()
    (tmp_path / "a").write_text("in the way")
    call(callback, ("on_step_end", "a", (0, TrainingBatch(), {"p": 1}), {}), tmp_path)
    with pytest.raises(
        OSError,
        match="2 writes pending",  # the cut before the first row, and the row
    ):
        callback.mark()
    (tmp_path / "a").unlink()
    assert callback.mark() != before
    assert "p" in files(tmp_path)


@BOTH
def test_there_is_no_mark_while_rows_of_an_experiment_that_has_ended_wait(make, tmp_path):
    callback = make(tmp_path)
    callback.mark()
    (tmp_path / "a").write_text("in the way")
    call(callback, ("on_step_end", "a", (0, TrainingBatch(), {"p": 1}), {}), tmp_path)
    call(callback, END, tmp_path)
    with pytest.raises(OSError, match="writes pending"):
        callback.mark()
    (tmp_path / "a").unlink()
    callback.mark()
    rows = [each for each in (tmp_path / "a").rglob("metrics.*") if each.suffix in {".csv", ".jsonl"}]
    assert [each.read_text() for each in rows if each.stat().st_size] in (
        ["step,p\n0,1\n"],
        ['{"step":0,"p":1}\n'],
    )


@BOTH
def test_where_no_courier_asks_for_marks_nothing_is_kept(make, tmp_path):
    for _ in range(2):
        callback = make(tmp_path)
        for event in [
            ("on_train_start", "a", (0,), {}),
            ("on_step_end", "a", (0, TrainingBatch(), {"p": 1}), {}),
            ("on_step_end", "a", (1, TrainingBatch(), {"q": 1}), {}),
            ("on_eval", "a", (1, "u", {"p": 2}), {}),
            ("on_eval", "a", (1, "v", {"p": 2}), {}),
            ("on_eval", "a", (1, "u", {"p": 3}), {}),
        ]:
            call(callback, event, tmp_path)
    assert not [each for each in tmp_path.rglob(".*") if each.suffix != ".run"]


@BOTH
def test_a_file_that_somebody_shortened_is_told_of_and_goes_on(make, tmp_path, caplog):
    callback = make(tmp_path)
    for n in range(3):
        call(callback, ("on_step_end", "a", (n, TrainingBatch(), {"p": 1}), {}), tmp_path)
    mark = callback.mark()
    for each in tmp_path.rglob("metrics.*"):
        os.truncate(each, each.stat().st_size - 4)
    again = make(tmp_path)
    again.rewind(mark)
    assert "rewind.bytes_missing" in caplog.text
    call(again, ("on_step_end", "a", (3, TrainingBatch(), {"p": 4}), {}), tmp_path)
    assert ("3,4" if make is csv else '"step": 3, "p": 4') in files(tmp_path)


def test_how_a_run_ended_is_remembered_for_the_page_also_where_it_is_not_ours(tmp_path):
    before = local(None)
    before.mark()
    call(before, ("on_run_end", "a", ({"metrics": {"loss": math.nan}}, {"name": "a", "status": "odd"}), {}), tmp_path)
    after = local(None)
    after.rewind(json.loads(json.dumps(before.mark())))
    call(after, END, tmp_path)
    assert "| loss | nan |" in (tmp_path / "a" / "logs" / "conclusion.md").read_text()
    assert "(odd)" in (tmp_path / "a" / "logs" / "conclusion.md").read_text()
