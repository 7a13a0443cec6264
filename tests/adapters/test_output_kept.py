"""Receivers over existing output, when a follower begins anew: nothing is cut that does not come again.

A run with late rows and several rows a step is delivered; what tells the followers where they stand is lost, damaged,
or belongs to another name; the older segments are gone or still there. The files end as they were.
"""

import asyncio
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_adapters.output_files.output_lease import OutputLease, writer_of
from evsys_adapters.output_files.record_file import RecordLog
from evsys_adapters.tensorboard_logger import TensorBoardLoggerCallback
from evsys_adapters.wandb_files.records import Records
from evsys_adapters.wandb_logger import WandbLoggerCallback
from evsys_bus import Callback, EventBus, LogContext, LoopState, RunStart, StepEnd, TrainEnd, TrainingBatch, TrainStart
from evsys_bus.adapter import EventInfo
from evsys_bus.codec import encode
from evsys_bus.context import ExperimentResult, LoopArtifacts
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.subscription import DeliveryPolicy, Subscription
from evsys_bus.delivery.subscriptions import deregister, register
from evsys_bus.events import Envelope, Eval, Event, ExperimentEnd, Metrics
from evsys_bus.journal import JournalWriter, layout
from evsys_bus.savepoints import Savepoints
from evsys_bus.tasks import run_in_new_loop
from evsys_bus.testing import RecordingSink

ORDER = [step for base in range(0, 120, 4) for step in (base, base + 2, base + 1, base + 3, base + 3)]
"""Late rows, and two rows of every fourth step."""


class Life:
    """A journal, its run, and who is delivered to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.journal = str(root / "journal")
        self.ctx = LogContext(root / "out", run_key="digits")
        self.at = 1_700_000_000.0
        self.rows = 0

    def publish(self, events: Sequence[Event]) -> None:
        writer = JournalWriter(self.journal, segment_bytes=2500, flush_seconds=3600).open()
        for event in events:
            self.at += 0.25
            run = event.state.ctx.run_key if isinstance(event, TrainStart) else "digits"
            payload = encode(Envelope(writer.stream, writer.next_sequence, self.at, event, run))
            writer.append(payload, essential=isinstance(event, RunStart | TrainStart))
        assert writer.close()

    def state(self, step: int = 0) -> LoopState:
        return LoopState(step, 500, self.root / "out" / "digits", ctx=self.ctx)

    def starts(self, step: int = 0) -> list[Event]:
        return [RunStart(self.ctx), TrainStart(self.state(step))]

    def steps(self, steps: Sequence[int]) -> list[Event]:
        events: list[Event] = []
        for step in steps:
            self.rows += 1
            events.append(
                StepEnd(self.state(step), step, TrainingBatch(), {"loss": 1 / (1 + self.rows), "row": self.rows})
            )
        return events

    def deliver(self, adapter: Callback, name: str = "rows") -> Courier:
        register(self.journal, [Subscription(name)])
        adapter.spec_name = name
        courier = Courier(self.journal, name, adapter, DeliveryPolicy())
        courier.finish()
        run_in_new_loop(courier.run)
        return courier

    @property
    def segments(self) -> list[Path]:
        return sorted(Path(self.journal).glob("r0-*/*.seg"))

    def remove_older_segments(self, share: float = 0.6) -> None:
        segments = self.segments
        for each in segments[: int(len(segments) * share)]:
            each.unlink()


def csv_rows(root: Path) -> object:
    return {each.name: each.read_text() for each in sorted((root / "out").rglob("*.csv"))}


def json_lines(root: Path) -> object:
    return (root / "out/digits/logs/training/metrics.jsonl").read_bytes()


def scalars(root: Path) -> object:
    (file,) = (root / "out/tensorboard/digits").glob("events*")
    points: list[tuple[int, float, str, str]] = []
    for event in EventFileLoader(str(file)).Load():
        assert not event.HasField("session_log") or event.step == 0
        for each in event.summary.value:
            points += [(event.step, event.wall_time, each.tag, str(each.tensor.float_val))]
    return sorted(points)


def history(root: Path) -> object:
    (file,) = (root / "out/digits/wandb").rglob("*.wandb")
    records = Records()
    log = RecordLog(file, Savepoints(), records, 0)
    return [key for payload in log.records() if (key := records.key_and_time(payload)) is not None]


Make = Callable[[Path], Callback]
ADAPTERS: dict[str, tuple[Make, Callable[[Path], Any]]] = {
    "csv": (lambda root: CsvMetricsCallback("{run_dir}/rows.csv"), csv_rows),
    "jsonl": (lambda root: LocalLoggerCallback(print_every=0), json_lines),
    "tensorboard": (lambda root: TensorBoardLoggerCallback(), scalars),
    "wandb": (lambda root: WandbLoggerCallback("digits", mode="offline"), history),
}


def remove_notes(root: Path) -> None:
    """Have the output be as 0.1.0 left it, which did not note whose rows it holds."""
    for note in (root / "out").rglob(".*at"):
        note.unlink()


def halved(cursor: Path) -> None:
    os.truncate(cursor, cursor.stat().st_size // 2)


def made_a_directory(cursor: Path) -> None:
    cursor.unlink()
    cursor.mkdir()


def of_another_version(cursor: Path) -> None:
    cursor.write_text('{"version": 9, "streams": ["r0"]}')


LOSSES: dict[str, Callable[[Path], object]] = {
    "halved": halved,
    "empty": lambda cursor: os.truncate(cursor, 0),
    "a directory": made_a_directory,
    "of another version": of_another_version,
    "removed": lambda cursor: cursor.unlink(),
    "all removed": lambda cursor: shutil.rmtree(cursor.parent),
    "all removed, over output of 0.1.0": lambda cursor: (remove_notes(cursor.parents[2]), shutil.rmtree(cursor.parent)),
}


def two_parts(life: Life, *, ended: bool) -> tuple[list[Event], list[Event]]:
    """The events before a follower loses its cursor, and those after that."""
    if ended:
        end = [TrainEnd(life.state(120), LoopArtifacts())]
        return life.starts() + life.steps(ORDER) + end, [*life.starts(60), *life.steps([60, 62, 61])]
    return life.starts() + life.steps(ORDER), life.steps([124, 126, 125])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an adapter's output has of both parts if nothing is lost."""

    @functools.cache
    def rows(adapter: str, *, ended: bool) -> object:
        make, read = ADAPTERS[adapter]
        life = Life(tmp_path_factory.mktemp("undisturbed"))
        for part in two_parts(life, ended=ended):
            life.publish(part)
        life.deliver(make(life.root))
        return read(life.root)

    return rows


@pytest.mark.parametrize(("adapter", "loss"), [*product(ADAPTERS, ["halved"]), *product(["jsonl"], LOSSES)])
@pytest.mark.parametrize("shortened", [True, False], ids=["older segments removed", "all segments there"])
@pytest.mark.parametrize("ended", [True, False], ids=["after its end", "mid-run"])
def test_a_follower_whose_cursor_is_lost_cuts_nothing_that_does_not_come_again(
    tmp_path, adapter, loss, shortened, ended, undisturbed
):
    make, read = ADAPTERS[adapter]
    life = Life(tmp_path)
    first, second = two_parts(life, ended=ended)
    life.publish(first)
    life.deliver(make(tmp_path))
    before = read(tmp_path)
    LOSSES[loss](Path(layout.cursor_path(life.journal, "rows")))
    if shortened:
        life.remove_older_segments()
    life.deliver(make(tmp_path))
    assert read(tmp_path) == before
    life.publish(second)
    life.deliver(make(tmp_path))
    assert read(tmp_path) == undisturbed(adapter, ended=ended)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_cursor_that_is_older_than_what_was_removed_cuts_nothing_that_does_not_come_again(tmp_path, adapter, share):
    make, read = ADAPTERS[adapter]
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER[:20]))
    life.deliver(make(tmp_path))
    cursor = Path(layout.cursor_path(life.journal, "rows"))
    older = cursor.read_bytes()
    life.publish(life.steps(ORDER[20:]))
    life.deliver(make(tmp_path))
    before = read(tmp_path)
    cursor.write_bytes(older)
    life.remove_older_segments(share)
    life.deliver(make(tmp_path))
    assert read(tmp_path) == before


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_courier_without_a_cursor_that_begins_at_a_start_and_ends_early_has_cut_nothing(tmp_path, adapter, share):
    make, read = ADAPTERS[adapter]
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(make(tmp_path))
    before = read(tmp_path)
    Path(layout.cursor_path(life.journal, "rows")).unlink()
    segments = life.segments
    for each in segments[max(1, int(len(segments) * share)) :]:
        each.unlink()
    life.deliver(make(tmp_path))
    assert read(tmp_path) == before


def count_in_files(root: Path, text: bytes) -> int:
    files = [each for each in (root / "out").rglob("*") if each.is_file() and not each.name.startswith(".")]
    return sum(each.read_bytes().count(text) for each in files)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("loss", [None, "removed"])
@pytest.mark.parametrize("same_courier", [True, False], ids=["one courier", "a courier each"])
def test_a_row_that_a_kill_left_open_is_written_once_although_later_events_of_its_run_were(
    tmp_path, adapter, loss, same_courier
):
    make, read = ADAPTERS[adapter]
    life = Life(tmp_path)
    killed = [*life.starts(), *life.steps([0]), Metrics(life.state(1), 1, {"left_open": 0.5})]
    killed.append(Eval(life.state(1), 1, "val", {"accuracy": 0.25}))
    goes_on = [*life.starts(2), *life.steps([2, 3])]
    if same_courier:
        life.publish([*killed, *goes_on])
    else:
        life.publish(killed)
        life.deliver(make(tmp_path))
        life.publish(goes_on)
    life.deliver(make(tmp_path))
    found, counted = read(tmp_path), count_in_files(tmp_path, b"left_open")
    assert counted
    if loss is not None:
        LOSSES[loss](Path(layout.cursor_path(life.journal, "rows")))
        life.deliver(make(tmp_path))
        assert (read(tmp_path), count_in_files(tmp_path, b"left_open")) == (found, counted)


class Naive(Callback):
    """Somebody else's, which cuts at the step with which a training starts, and knows nothing of introductions."""

    def __init__(self, rows: dict[int, float]) -> None:
        self.rows = rows
        self.starts: list[tuple[int, bool]] = []

    def on_train_start(self, state: LoopState) -> None:
        self.starts.append((state.step, self.event.carried))
        for step in [each for each in self.rows if each >= state.step]:
            del self.rows[step]

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        self.rows[step_idx] = metrics["row"]


def test_an_adapter_that_cuts_at_the_first_step_cuts_only_what_the_journal_gives_again(tmp_path):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(range(150)))
    rows: dict[int, float] = {}
    life.deliver(Naive(rows))
    whole = dict(rows)
    shutil.rmtree(Path(life.journal, "cursors"))
    life.remove_older_segments()
    again = Naive(rows)
    life.deliver(again)
    assert rows == whole
    ((step, carried),) = again.starts
    assert carried
    assert 50 < step < 150
    life.publish([TrainStart(life.state(40)), *life.steps(range(40, 44))])
    life.deliver(again)
    assert again.starts[-1] == (40, False)
    assert sorted(rows) == [*range(44)]


def test_starts_that_are_given_again_are_not_counted_and_a_run_of_which_no_step_comes_is_cut_nowhere(tmp_path):
    life = Life(tmp_path)
    other = LogContext(tmp_path / "out", run_key="idle")
    idle = TrainStart(LoopState(0, 9, tmp_path / "out" / "idle", ctx=other))
    life.publish([idle, *life.starts(), *life.steps(range(100))])
    life.remove_older_segments()
    first = int(life.segments[0].stem.partition("-")[2])
    adapter = Naive({})
    life.deliver(adapter)
    assert len(adapter.rows) == len(life.steps(range(103 - first + 1)))
    assert sorted(adapter.starts)[1][0] > 10**15
    (account,) = read_progress(life.journal)
    assert (account.recorded, account.delivered, account.pending) == (103 - first + 1,) * 2 + (0,)
    assert account.absent == first - 1


def test_a_sink_gets_the_starts_before_what_follows_and_they_are_not_counted_either(tmp_path):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(range(100)))
    life.remove_older_segments()
    first = int(life.segments[0].stem.partition("-")[2])
    sink = RecordingSink()
    register(life.journal, [Subscription("rows")])
    courier = Courier(life.journal, "rows", sink, DeliveryPolicy())
    courier.finish()
    run_in_new_loop(courier.run)
    assert [each.seq for each in sink.envelopes] == [1, 2, *range(first, 103)]
    assert isinstance(sink.envelopes[1].event, TrainStart)
    assert sink.envelopes[1].event.state.step == first - 3
    counts = courier.counts
    assert (counts.delivered, counts.dead, counts.pending) == (103 - first, 0, 0)


class Interrupted(CsvMetricsCallback):
    """Calls something behind each row."""

    then: Callable[[], None]
    cursor: Path
    known: bytes = b""
    """The cursor as it was before the first row."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        self.known = self.known or self.cursor.read_bytes()
        super().on_step_end(state, step_idx, batch, metrics)
        self.then()


def test_a_follower_that_is_killed_behind_a_start_that_was_given_again_finds_its_place_again(tmp_path):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"))
    before = csv_rows(tmp_path)
    cursor = Path(layout.cursor_path(life.journal, "rows"))
    cursor.unlink()
    life.remove_older_segments()
    for _ in range(3):
        table = Interrupted("{run_dir}/rows.csv")
        table.spec_name = "rows"
        courier = Courier(life.journal, "rows", table, DeliveryPolicy(), slice_seconds=0.0)
        table.then = courier.stop
        courier.finish()
        table.cursor = cursor
        run_in_new_loop(courier.run)
        assert table.known
        cursor.write_bytes(table.known)  # as if it had been killed: what was written since is behind the mark
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"))
    assert csv_rows(tmp_path) == before


def reboot(life: Life) -> None:
    """Have the next life write a stream of its own, as after a restart of the machine."""
    for lock in Path(life.journal).glob("r*/lock"):
        owner = json.loads(lock.read_text().split("\n")[-1])
        lock.write_text(json.dumps(owner | {"boot": "another"}))


def keep_newest(life: Life, counts: Sequence[int]) -> None:
    """Remove segments in front of each stream, but for so many."""
    streams = sorted(Path(life.journal).glob("r0-*"))
    for stream, count in zip(streams, counts, strict=True):
        for each in sorted(stream.glob("*.seg"))[:-count]:
            each.unlink()


def training_rows(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Of each adapter's output: steps and numbers of the rows."""
    table = [line.split(",") for line in (root / "out/digits/rows.csv").read_text().splitlines()]
    at = table[0].index("row")
    lines = (root / "out/digits/logs/training/metrics.jsonl").read_text().splitlines()
    return {
        "csv": [(int(cells[0]), float(cells[at])) for cells in table[1:]],
        "jsonl": [(row["step"], row["row"]) for row in map(json.loads, lines)],
    }


def deliver_both(life: Life) -> dict[str, list[tuple[int, float]]]:
    for name in ("csv", "jsonl"):
        life.deliver(ADAPTERS[name][0](life.root), name)
    return training_rows(life.root)


def lose_cursors(life: Life, *, notes: bool = True) -> None:
    shutil.rmtree(Path(life.journal, "cursors"))
    if notes:
        remove_notes(life.root)


def evals(life: Life, steps: Sequence[int]) -> list[Event]:
    """A step each, and an eval behind every fifth."""
    events: list[Event] = []
    for step in steps:
        events += life.steps([step])
        if step % 5 == 0:
            events.append(Eval(life.state(step), step, "digits", {"score": float(life.rows)}))
    return events


def files_of(root: Path) -> dict[str, bytes]:
    """Every file of rows."""
    paths = [each for each in (root / "out").rglob("*") if each.suffix in {".csv", ".jsonl"}]
    return {str(each.relative_to(root)): each.read_bytes() for each in paths}


def restarted_often(root: Path) -> Life:
    """Six lives, each of which begins before the end of the one before; the followers have all of it."""
    life = Life(root)
    life.publish([*life.starts(), *evals(life, range(60))])
    for first, end in ((40, 70), (65, 90), (50, 55), (53, 80), (20, 75)):
        reboot(life)
        life.publish([TrainStart(life.state(first)), *evals(life, range(first, end))])
    deliver_both(life)
    return life


@pytest.mark.parametrize("kept", [(1, 1, 1, 1, 1, 1), (99, 1, 99, 1, 2, 1), (2, 99, 99, 99, 99, 1), (99,) * 6])
def test_after_many_restarts_with_gaps_the_output_itself_tells_what_it_holds(tmp_path, kept):
    life = restarted_often(tmp_path)
    before = files_of(tmp_path)
    lose_cursors(life, notes=False)
    keep_newest(life, kept)
    deliver_both(life)
    assert files_of(tmp_path) == before
    life.publish([TrainStart(life.state(70)), *evals(life, range(70, 77))])
    after = deliver_both(life)
    for name in after:
        assert [step for step, _ in after[name]] == [*range(77)]


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_old_cursor_that_a_person_puts_back_in_a_life_that_was_void_since_loses_no_row(tmp_path, at):
    life, olds = Life(tmp_path), list[dict[Path, bytes]]()
    for first, end in ((0, 60), (40, 70), (65, 90), (50, 55), (20, 75)):
        if first:
            reboot(life)
        life.publish([*(life.starts(first) if not first else [TrainStart(life.state(first))])])
        life.publish(evals(life, range(first, end)))
        deliver_both(life)
        olds.append({each: each.read_bytes() for each in Path(life.journal, "cursors").iterdir()})
    before = files_of(tmp_path)
    for cursor, content in olds[at - 1].items():
        cursor.write_bytes(content)
    deliver_both(life)
    assert files_of(tmp_path) == before
    life.publish(evals(life, range(75, 80)))
    after = deliver_both(life)
    for name in after:
        assert [step for step, _ in after[name]] == [*range(80)]


def points(root: Path) -> object:
    events = EventAccumulator(str(root / "out/tensorboard/digits"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


RECORD_FILES: dict[str, Callable[[Path], object]] = {"tensorboard": points, "wandb": history}


def restarted_often_for(name: str, root: Path) -> Life:
    """As `restarted_often`, for one adapter; the cursor as it was after each life is in ``olds``."""
    life = Life(root)
    for number, (first, end) in enumerate(((0, 60), (40, 70), (65, 90), (50, 55), (53, 80), (20, 75))):
        if number:
            reboot(life)
        life.publish([*(life.starts() if not number else [TrainStart(life.state(first))])])
        life.publish(evals(life, range(first, end)))
        life.deliver(ADAPTERS[name][0](root))
        (root / f"cursor-{number}").write_bytes(Path(layout.cursor_path(life.journal, "rows")).read_bytes())
    return life


@pytest.mark.parametrize("name", RECORD_FILES)
@pytest.mark.parametrize(
    "kept",
    [
        (1, 1, 1, 1, 1, 1),
        *(
            pytest.param(each, marks=pytest.mark.long)
            for each in ((99, 1, 99, 1, 2, 1), (2, 99, 99, 99, 99, 1), (99,) * 6)
        ),
    ],
)
def test_after_many_restarts_with_gaps_a_file_of_records_tells_what_it_holds(tmp_path, name, kept):
    life, read = restarted_often_for(name, tmp_path), RECORD_FILES[name]
    before = read(tmp_path)
    lose_cursors(life, notes=False)
    keep_newest(life, kept)
    life.deliver(ADAPTERS[name][0](tmp_path))
    assert read(tmp_path) == before
    other = restarted_often_for(name, tmp_path / "other")
    for each in (life, other):
        each.publish([TrainStart(each.state(70)), *evals(each, range(70, 77))])
        each.deliver(ADAPTERS[name][0](each.root))
    assert read(tmp_path) == read(other.root) != before


@pytest.mark.parametrize("name", RECORD_FILES)
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_an_old_cursor_that_a_person_puts_back_loses_no_record(tmp_path, name, number):
    life, read = restarted_often_for(name, tmp_path), RECORD_FILES[name]
    before = read(tmp_path)
    Path(layout.cursor_path(life.journal, "rows")).write_bytes((tmp_path / f"cursor-{number}").read_bytes())
    life.deliver(ADAPTERS[name][0](tmp_path))
    assert read(tmp_path) == before


def test_an_eval_behind_a_start_is_there_though_no_step_follows(tmp_path):
    life = Life(tmp_path)
    life.publish([*life.starts(), Eval(life.state(), 0, "digits", {"score": 0.5})])
    life.deliver(ADAPTERS["jsonl"][0](tmp_path))
    file = tmp_path / "out/digits/logs/validation/metrics.jsonl"
    assert [json.loads(line)["score"] for line in file.read_text().splitlines()] == [0.5]


def test_evals_keep_their_order_when_a_person_removes_the_rows_of_the_training_and_the_cursors(tmp_path):
    life = restarted_often(tmp_path)
    file = tmp_path / "out/digits/logs/validation/metrics.jsonl"
    before = file.read_bytes()
    (tmp_path / "out/digits/logs/training/metrics.jsonl").unlink()
    shutil.rmtree(Path(life.journal, "cursors"))
    life.deliver(ADAPTERS["jsonl"][0](tmp_path), "jsonl")
    assert file.read_bytes() == before


def test_output_that_is_removed_with_the_cursors_is_made_anew(tmp_path):
    life = restarted_often(tmp_path)
    before = files_of(tmp_path)
    shutil.rmtree(Path(life.journal, "cursors"))
    for file in before:
        (tmp_path / file).unlink()  # and what lies hidden beside them stays
    deliver_both(life)
    assert files_of(tmp_path) == before


def test_output_that_was_begun_by_0_1_0_is_noted_from_then_on(tmp_path):
    life = Life(tmp_path)
    life.publish([*life.starts(), *evals(life, range(60))])
    deliver_both(life)
    remove_notes(tmp_path)
    for cursor in Path(life.journal, "cursors").iterdir():
        said = json.loads(cursor.read_text())
        said["mark"].pop("positions", None)
        for run in said["mark"]["runs"].values():
            run.pop("position", None)
        cursor.write_text(json.dumps(said))
    reboot(life)
    life.publish([TrainStart(life.state(40)), *evals(life, range(40, 75))])
    before = deliver_both(life)
    assert [step for step, _ in before["csv"]] == [*range(75)]
    files = files_of(tmp_path)
    lose_cursors(life, notes=False)
    deliver_both(life)
    assert files_of(tmp_path) == files


def test_a_file_that_a_person_has_edited_is_compared_row_by_row(tmp_path):
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(60))])
    life.deliver(ADAPTERS["csv"][0](tmp_path), "csv")
    file = tmp_path / "out/digits/rows.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:20] + lines[30:]))  # without the steps from 19 to 28
    lose_cursors(life, notes=False)
    life.publish(life.steps(range(60, 65)))
    life.deliver(ADAPTERS["csv"][0](tmp_path), "csv")
    steps = [int(line.partition(",")[0]) for line in file.read_text().splitlines()[1:]]
    assert steps[:49] == [*range(19), *range(29, 60)][:49]
    assert sorted(steps) == [*range(65)]


def test_two_streams_that_both_have_a_gap_in_front_wipe_no_row_between(tmp_path):
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(70))])
    reboot(life)
    life.publish([TrainStart(life.state(70)), *life.steps(range(70, 90)), TrainStart(life.state(90))])
    reboot(life)
    life.publish([TrainStart(life.state(90)), *life.steps(range(90, 150)), TrainEnd(life.state(150), LoopArtifacts())])
    before = deliver_both(life)
    assert [step for step, _ in before["csv"]] == [*range(150)]
    lose_cursors(life)
    keep_newest(life, (1, 1, 2))
    assert deliver_both(life) == before


@pytest.mark.parametrize("kept", [(2, 1), (1, 2), (2, 99)])
def test_rows_that_a_later_start_made_void_do_not_come_back(tmp_path, kept):
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(100))])
    reboot(life)
    life.publish([TrainStart(life.state(60)), *life.steps(range(60, 130))])
    before = deliver_both(life)
    lose_cursors(life)
    keep_newest(life, kept)
    assert deliver_both(life) == before
    reboot(life)
    life.publish([*life.starts(125), *life.steps(range(125, 131))])
    after = deliver_both(life)
    for name in after:
        assert after[name][:125] == before[name][:125]
        assert [step for step, _ in after[name]] == [*range(131)]


def test_two_restarts_one_behind_the_other_void_nothing_twice(tmp_path):
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(100))])
    reboot(life)
    life.publish([TrainStart(life.state(80)), *life.steps(range(80, 90))])
    reboot(life)
    life.publish([TrainStart(life.state(70)), *life.steps(range(70, 140))])
    before = deliver_both(life)
    lose_cursors(life)
    keep_newest(life, (6, 99, 2))
    assert deliver_both(life) == before


def test_a_start_behind_records_that_the_journal_has_lost_is_carried_out(tmp_path):
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(100))])
    deliver_both(life)
    life.segments[-1].unlink()  # the newest records, of which the followers have the rows
    lose_cursors(life)
    keep_newest(life, (3,))
    reboot(life)
    life.publish([TrainStart(life.state(80)), *life.steps(range(80, 97))])
    after = deliver_both(life)
    for rows in after.values():
        assert [step for step, _ in rows] == [*range(97)]
        assert rows[80:] == [(step, 101 + step - 80) for step in range(80, 97)]


def test_evals_that_a_later_start_made_void_do_not_come_back(tmp_path):
    life = Life(tmp_path)

    def evals(steps: Sequence[int], score: float) -> list[Event]:
        events: list[Event] = []
        for step in steps:
            events += life.steps([step])
            if step % 10 == 0:
                events.append(Eval(life.state(step), step, "digits", {"score": score}))
        return events

    life.publish([*life.starts(), *evals(range(101), 0.25)])
    reboot(life)
    life.publish([TrainStart(life.state(60)), *evals(range(60, 99), 0.75)])
    before = {name: deliver_both(life)[name] for name in ("csv", "jsonl")}
    file = tmp_path / "out/digits/logs/validation/metrics.jsonl"
    scores = file.read_bytes()
    assert [json.loads(line)["step"] for line in scores.splitlines()] == [*range(0, 91, 10)]
    lose_cursors(life)
    keep_newest(life, (3, 99))
    assert deliver_both(life) == before
    assert file.read_bytes() == scores


@pytest.mark.parametrize("kept", [(1, 1), pytest.param((2, 99), marks=pytest.mark.long)])
def test_a_follower_that_is_killed_in_the_middle_of_a_walk_goes_on_with_it(tmp_path, kept):
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(100))])
    reboot(life)
    life.publish([TrainStart(life.state(60)), *life.steps(range(60, 100))])
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"))
    before = csv_rows(tmp_path)
    cursor = Path(layout.cursor_path(life.journal, "rows"))
    cursor.unlink()
    keep_newest(life, kept)
    copy = tmp_path / "copy"
    for number in range(60):
        table = Interrupted("{run_dir}/rows.csv")
        table.spec_name = "rows"
        courier = Courier(life.journal, "rows", table, DeliveryPolicy(), slice_seconds=0.0)

        def stop(courier: Courier = courier) -> None:
            courier.stop()
            if not copy.exists():
                shutil.copytree(tmp_path / "out", copy / "out")
                shutil.copytree(cursor.parent, copy / "cursors")

        table.then = stop
        courier.finish()
        table.cursor = cursor
        run_in_new_loop(courier.run)
        if number % 3 == 0 and copy.exists():  # as if it had been killed behind its first row
            for name, place in (("out", tmp_path / "out"), ("cursors", cursor.parent)):
                shutil.rmtree(place)
                shutil.copytree(copy / name, place)
        shutil.rmtree(copy, ignore_errors=True)
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"))
    assert csv_rows(tmp_path) == before


@pytest.mark.parametrize("twice", [99, 97])
def test_rows_that_are_alike_are_no_reason_to_leave_out_new_ones(tmp_path, twice):
    life = Life(tmp_path)

    def alike(steps: Sequence[int]) -> list[Event]:
        return [StepEnd(life.state(step), step, TrainingBatch(), {"row": 7}) for step in steps]

    life.publish([*life.starts(), *alike([*range(100), twice])])
    before = deliver_both(life)
    lose_cursors(life)
    keep_newest(life, (1,))
    life.publish(alike(range(100, 110)))
    after = deliver_both(life)
    for name, rows in after.items():
        assert rows == before[name] + [(step, 7) for step in range(100, 110)]


class Delivering:
    """What an adapter is attached to while a courier delivers."""

    has_courier = True

    def __init__(self) -> None:
        self.sequence = 0

    def has_subscription(self, name: str) -> bool:
        return False

    def current_event(self) -> EventInfo:
        return EventInfo(1_700_000_000.0 + self.sequence, "r0-000001-20260101T000000-aaaaaaaa", self.sequence)


def test_a_file_that_was_put_in_order_behind_the_cursor_but_before_the_note_is_there_once(tmp_path):
    life, events = Life(tmp_path), Delivering()
    steps = [0, 1, 2, 5, 6, 3]

    def logger() -> Any:
        adapter = TensorBoardLoggerCallback()
        adapter.evsys_attached = (events,)
        return adapter

    def deliver(adapter: Any, first: int) -> None:
        for events.sequence in range(first, len(steps) + 1):
            step = steps[events.sequence - 1]
            adapter.on_step_end(life.state(step), step, TrainingBatch(), {"row": step})

    first = logger()
    steps, late = steps[:-1], steps[-1:]
    deliver(first, 1)
    cursor = first.mark()
    first.mark()
    steps += late
    deliver(first, 6)
    first.close()  # which puts it in order, under another name
    first.mark()  # the process is killed before this one is on record
    second = logger()
    second.rewind(cursor)
    deliver(second, 6)
    second.mark()
    second.close()
    found = [each.name for each in (tmp_path / "out/tensorboard/digits").glob("events*") if each.stat().st_size]
    assert len(found) == 1
    assert points(tmp_path) == {"train/row": [(step, float(step)) for step in (0, 1, 2, 3, 5, 6)]}


@pytest.mark.parametrize("name", RECORD_FILES)
def test_a_follower_of_records_of_0_1_0_that_is_stopped_behind_each_row_remembers_which_ones_are_doubtful(
    tmp_path, name, monkeypatch
):
    make, read = ADAPTERS[name][0], RECORD_FILES[name]
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(100))])
    reboot(life)
    life.publish([TrainStart(life.state(60)), *life.steps(range(60, 130))])
    life.deliver(make(tmp_path))
    before = read(tmp_path)
    lose_cursors(life)
    keep_newest(life, (2, 99))  # in front are rows that the second start made void
    adapter: Any = make(tmp_path)
    add_step, couriers = adapter.on_step_end, list[Courier]()

    def add_and_stop(self: Callback, *args: Any) -> None:
        add_step.__func__(self, *args)
        couriers[-1].stop()

    monkeypatch.setattr(type(adapter), "on_step_end", add_and_stop)
    for _ in range(20):
        adapter = make(tmp_path)
        adapter.spec_name = "rows"
        couriers.append(Courier(life.journal, "rows", adapter, DeliveryPolicy(), slice_seconds=0.0))
        couriers[-1].finish()
        run_in_new_loop(couriers[-1].run)
    monkeypatch.undo()
    life.deliver(make(tmp_path))
    assert read(tmp_path) == before


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_start_that_was_carried_out_makes_nothing_void_when_it_comes_again(tmp_path, name):
    make, read = ADAPTERS[name][0], RECORD_FILES[name]
    life = Life(tmp_path)
    life.publish([*life.starts(), *life.steps(range(70))])
    reboot(life)
    life.publish([*life.steps(range(70, 90)), TrainStart(life.state(80)), *life.steps(range(80, 95))])
    reboot(life)
    life.publish([*life.steps(range(95, 140)), TrainEnd(life.state(140), LoopArtifacts())])
    life.deliver(make(tmp_path))
    before = read(tmp_path)
    lose_cursors(life)
    keep_newest(life, (1, 99, 1))
    life.deliver(make(tmp_path))
    assert read(tmp_path) == before


def test_a_follower_under_a_new_name_goes_on_with_the_file_of_the_one_that_left(tmp_path, caplog):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"), "before")
    before = csv_rows(tmp_path)
    life.remove_older_segments()
    deregister(life.journal, {"after"}, 0)
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"), "after")
    assert csv_rows(tmp_path) == before
    assert "rows-2.csv" not in caplog.text


def test_two_followers_of_one_path_have_a_file_each_and_the_same_one_on_every_day(tmp_path, caplog):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"), "first")
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv", delimiter=";"), "second")
    assert "csv_metrics.second_follower" in caplog.text
    assert "rows-2.csv" in caplog.text
    before = csv_rows(tmp_path)
    assert isinstance(before, dict)
    assert sorted(before) == ["rows-2.csv", "rows.csv"]
    assert before["rows-2.csv"].replace(";", ",") == before["rows.csv"]
    shutil.rmtree(Path(life.journal, "cursors"))
    life.remove_older_segments()
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv", delimiter=";"), "second")  # in the other order
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"), "first")
    assert csv_rows(tmp_path) == before
    life.deliver(CsvMetricsCallback("{run_dir}/rows.csv"), "third")
    after = csv_rows(tmp_path)
    assert isinstance(after, dict)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == ["rows-2.csv", "rows-3.csv", "rows.csv"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_follower_that_comes_back_leaves_alone_what_another_one_has_gone_on_with(tmp_path, kind):
    make, read = ADAPTERS[kind]
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(range(40)))
    life.deliver(make(tmp_path), "before")
    deregister(life.journal, {"after"}, 0)
    life.publish(life.steps(range(40, 60)))
    life.deliver(make(tmp_path), "after")
    kept = read(tmp_path)
    life.publish(life.steps(range(60, 70)))
    life.deliver(make(tmp_path), "before")  # beside "after", with a mark of the file that this one writes now
    life.deliver(make(tmp_path), "after")
    calm = Life(tmp_path / "calm")
    calm.publish(calm.starts() + calm.steps(range(70)))
    calm.deliver(make(calm.root))
    now, expected = read(tmp_path), read(calm.root)
    if kind == "csv":
        kept, now, expected = kept["rows.csv"], now["rows.csv"], expected["rows.csv"]
    assert now.startswith(kept)
    assert now == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_behind_a_mark_of_an_output_that_a_person_removed_since_do_not_come_twice(tmp_path, kind):
    make, _ = ADAPTERS[kind]
    life = Life(tmp_path)

    def row(adapter: Callback, step: int) -> None:
        adapter.on_step_end(life.state(), step, TrainingBatch(), {"loss": 0.5})

    first: Any = make(tmp_path)
    first.on_train_start(life.state())
    for step in range(9):
        row(first, step)
    mark = first.mark()
    (output,) = [each for each in (tmp_path / "out").rglob("*") if each.name in {"rows.csv", "metrics.jsonl"}]
    output.unlink()
    for _ in range(3):  # each is killed before its mark is on record
        again: Any = make(tmp_path)
        again.rewind(mark)
        row(again, 9)
    assert output.read_text().count("0.5") == 1


def test_two_followers_at_work_at_once_in_one_process_do_not_mix_their_rows(tmp_path):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    tables = {name: CsvMetricsCallback("{run_dir}/rows.csv") for name in ("first", "second")}
    couriers: list[Courier] = []
    for name, table in tables.items():
        table.spec_name = name
        register(life.journal, [Subscription(name)])
        couriers.append(Courier(life.journal, name, table, DeliveryPolicy()))
        couriers[-1].finish()

    async def both() -> None:
        await asyncio.gather(*(each.run() for each in couriers))

    run_in_new_loop(both)
    found = csv_rows(tmp_path)
    assert isinstance(found, dict)
    assert sorted(found) == ["rows-2.csv", "rows.csv"]
    assert found["rows.csv"] == found["rows-2.csv"]
    assert found["rows.csv"].count("\n") == len(ORDER) + 1


def test_a_journal_that_was_copied_without_its_cursors_goes_on_over_copied_output(tmp_path):
    life = Life(tmp_path / "here")
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(CsvMetricsCallback(tmp_path / "here" / "out" / "{run}" / "rows.csv"))
    before = csv_rows(tmp_path / "here")
    life.remove_older_segments()
    shutil.rmtree(Path(life.journal, "cursors"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = Life(tmp_path / "there")
    moved.deliver(CsvMetricsCallback(tmp_path / "here" / "out" / "{run}" / "rows.csv"))
    assert csv_rows(tmp_path / "here") == before
    shutil.rmtree(tmp_path / "there" / "journal" / "cursors")
    moved.deliver(CsvMetricsCallback("{run_dir}/other.csv"))  # where there was no file it begins with what there is
    assert "other.csv" in str(sorted(each.name for each in (tmp_path / "here/out/digits").iterdir()))


def test_steps_without_any_start_continue_a_file_by_the_row_that_comes(tmp_path):
    life = Life(tmp_path)
    for make, read in (ADAPTERS["csv"], ADAPTERS["jsonl"], ADAPTERS["tensorboard"]):
        life = Life(tmp_path / read.__name__)
        life.publish(life.steps([0, 1, 1, 2, 2, 3, 3, *range(4, 90), 90, 90, 91]))
        life.deliver(make(life.root))
        before = read(life.root)
        shutil.rmtree(Path(life.journal, "cursors"))
        life.remove_older_segments()
        life.deliver(make(life.root))
        assert read(life.root) == before


def jsonl_folders(root: Path) -> dict[str, bytes]:
    return {each.parts[-3]: each.read_bytes() for each in (root / "out/digits").glob("logs*/training/metrics.jsonl")}


def event_folders(root: Path) -> dict[str, list[tuple[int, str]]]:
    found: dict[str, list[tuple[int, str]]] = {}
    for file in (root / "out/tensorboard").glob("digits*/events*"):
        events = EventFileLoader(str(file)).Load()
        points = [(event.step, f"{each.tag} {each.tensor}") for event in events for each in event.summary.value]
        found.setdefault(file.parent.name.replace("digits", "logs"), []).extend(sorted(points))
    return found


FOLDERS: dict[str, tuple[Make, Callable[[Path], dict[str, Any]]]] = {
    "local_logger": (ADAPTERS["jsonl"][0], jsonl_folders),
    "tensorboard_logger": (ADAPTERS["tensorboard"][0], event_folders),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_two_followers_of_one_folder_have_one_each_and_the_same_one_on_every_day(tmp_path, caplog, kind):
    make, read = FOLDERS[kind]
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(make(tmp_path), "first")
    alone = read(tmp_path)
    assert list(alone) == ["logs"]
    life.deliver(make(tmp_path), "second")
    assert f"{kind}.second_follower" in caplog.text
    before = read(tmp_path)
    assert before == {"logs": alone["logs"], "logs-2": alone["logs"]}
    life.publish(life.steps(range(120, 125)))
    life.deliver(make(tmp_path), "second")  # in the other order
    life.deliver(make(tmp_path), "first")
    longer = read(tmp_path)
    assert sorted(longer) == ["logs", "logs-2"]
    assert longer["logs"] == longer["logs-2"] != before["logs"]
    shutil.rmtree(Path(life.journal, "cursors"))
    life.remove_older_segments()
    life.deliver(make(tmp_path), "second")
    life.deliver(make(tmp_path), "first")
    assert read(tmp_path) == longer


@pytest.mark.parametrize("kind", FOLDERS)
def test_two_followers_at_work_at_once_do_not_mix_their_folders(tmp_path, kind):
    make, read = FOLDERS[kind]
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    couriers: list[Courier] = []
    for name in ("first", "second"):
        adapter = make(tmp_path)
        adapter.spec_name = name
        register(life.journal, [Subscription(name)])
        couriers.append(Courier(life.journal, name, adapter, DeliveryPolicy(), slice_seconds=0.0))
        couriers[-1].finish()

    async def both() -> None:
        await asyncio.gather(*(each.run() for each in couriers))

    run_in_new_loop(both)
    found = read(tmp_path)
    assert sorted(found) == ["logs", "logs-2"]
    assert found["logs"] == found["logs-2"]


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_renamed_follower_goes_on_in_the_folder_of_the_one_that_left(tmp_path, caplog, kind):
    make, read = FOLDERS[kind]
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps(ORDER))
    life.deliver(make(tmp_path), "before")
    before = read(tmp_path)
    life.remove_older_segments()
    deregister(life.journal, {"after"}, 0)
    life.deliver(make(tmp_path), "after")
    assert read(tmp_path) == before
    assert "second_follower" not in caplog.text


def test_the_pages_of_a_second_local_logger_stand_beside(tmp_path):
    life = Life(tmp_path)
    ended = [*life.starts(), *life.steps([0, 1]), ExperimentEnd(life.ctx, ExperimentResult(name="toys"))]
    life.publish(ended)
    for name in ("first", "second"):
        life.deliver(LocalLoggerCallback(print_every=0), name)
    assert {each.name for each in (tmp_path / "out").glob("*.md")} == {"experiment.md", "experiment-2.md"}
    assert len(list((tmp_path / "out/digits").glob("logs*/conclusion.md"))) == 2


def test_inline_loggers_and_those_that_are_shown_events_share_the_folder_as_ever(tmp_path):
    state = Life(tmp_path).state()
    for step in range(2):
        with EventBus([LocalLoggerCallback(print_every=0)]) as bus:
            bus.publish(StepEnd(state, step, TrainingBatch(), {"loss": 0.5}))
    assert list((tmp_path / "out/digits").iterdir()) == [tmp_path / "out/digits/logs"]
    assert jsonl_folders(tmp_path)["logs"].count(b"\n") == 2
    assert not (tmp_path / "out/digits/logs/.run").exists()


def test_a_note_of_0_1_0_in_an_event_folder_is_read(tmp_path):
    life = Life(tmp_path)
    life.publish(life.starts() + life.steps([0, 1, 2]))
    note = tmp_path / "tb" / "digits" / ".run"
    note.parent.mkdir(parents=True)
    note.write_bytes(os.fsencode(os.path.realpath(tmp_path / "out" / "digits")))
    life.deliver(TensorBoardLoggerCallback(tmp_path / "tb"), "first")
    life.deliver(TensorBoardLoggerCallback(tmp_path / "tb"), "second")
    assert sorted(each.name for each in (tmp_path / "tb").iterdir()) == ["digits", "digits-2"]


def test_of_two_new_followers_that_race_for_one_output_one_gets_it(tmp_path):
    """The first takes it, and gives it up again, between the look of the second at it and its lock."""
    note, run = tmp_path / ".rows.csv.run", str(tmp_path / "digits")
    claim = OutputLease.acquire(note, run, "left")
    assert isinstance(claim, OutputLease)
    del claim

    def is_followed(name: str) -> bool:
        if name == "left":
            assert isinstance(OutputLease.acquire(note, run, "first", lambda name: name != "left"), OutputLease)
        return name != "left"

    assert OutputLease.acquire(note, run, "second", is_followed) == "second_follower"
    assert writer_of(note, run) == "first"


def test_of_many_new_followers_that_race_for_one_output_one_gets_it(tmp_path):
    note, run = tmp_path / "logs" / ".run", str(tmp_path)
    barrier = threading.Barrier(8)
    got: list[str] = []

    def take(name: str) -> None:
        barrier.wait()
        claim = OutputLease.acquire(note, run, name, lambda name: True)
        got.append(claim if isinstance(claim, str) else claim.adapter_name)
        del claim  # given up at once

    threads = [threading.Thread(target=take, args=(f"f{number}",)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    (winner,) = [each for each in got if each not in {"in_use", "second_follower"}]
    assert writer_of(note, run) == winner


FULL_DISK_PROGRAM = """
import resource, sys
from pathlib import Path
from evsys_adapters.{module} import {logger}
from evsys_bus import EventBus, LoopState, StepEnd, TrainEnd, TrainingBatch
from evsys_bus.context import LoopArtifacts
folder = Path(sys.argv[1])
logger = {logger}({arguments})
logger.placement = "inline"
state = LoopState(0, 500, folder / "run")
with EventBus([logger]) as bus:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    for step in range(500):
        bus.publish(StepEnd(state, step, TrainingBatch(), {{"loss": 0.5}}))
    bus.publish(TrainEnd(state, LoopArtifacts()))
print([(hook.failures) for hook in bus.health().hooks if hook.hook == "close"])
"""


@pytest.mark.parametrize(
    ("module", "logger", "arguments"),
    [
        ("csv_metrics", "CsvMetricsCallback", 'folder / "metrics.csv"'),
        ("local_logger", "LocalLoggerCallback", ""),
        ("tensorboard_logger", "TensorBoardLoggerCallback", ""),
        ("wandb_logger", "WandbLoggerCallback", '"p", mode="offline"'),
    ],
)
def test_rows_that_an_inline_logger_could_not_write_until_the_end_are_a_failure_of_its_close(
    tmp_path, module, logger, arguments
):
    program = FULL_DISK_PROGRAM.format(module=module, logger=logger, arguments=arguments)
    command = [sys.executable, "-B", "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[1]"], done.stdout[-300:] + done.stderr[-2000:]
