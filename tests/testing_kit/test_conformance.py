"""Every adapter that ships keeps its side of the contract; and the suite notices one that does not."""

import asyncio
import inspect
import json
import re
import sqlite3
import threading
from typing import ClassVar

import pytest

from evsys_adapters import (
    CsvMetricsCallback,
    DebugLoggerCallback,
    EarlyStoppingCallback,
    LocalLoggerCallback,
    PrintProgressCallback,
)
from evsys_bus import Callback, RawRecord
from evsys_bus.codec import decode
from evsys_bus.errors import RejectedError
from evsys_bus.sink import Sink
from evsys_bus.testing import RecordingCallback, RecordingSink, conformance

test_csv_metrics = conformance(lambda folder: CsvMetricsCallback(folder / "{run}.csv"))
test_debug_logger = conformance(lambda _: DebugLoggerCallback())
test_early_stopping = conformance(lambda _: EarlyStoppingCallback("accuracy"), follow=False)
test_local_logger = conformance(lambda _: LocalLoggerCallback())
test_print_progress = conformance(lambda _: PrintProgressCallback())
test_recording_callback = conformance(lambda _: RecordingCallback())
test_recording_sink = conformance(lambda _: RecordingSink())


class Lines(Callback):
    """A line per step, and as many ways to go wrong as there are tests."""

    def __init__(self, folder, wrong=""):
        self.path, self.wrong = folder / "lines", wrong
        self.run = None
        if wrong == "opens in init":
            self.path.touch()
        if wrong == "raises in init":
            raise ValueError("not today")
        if wrong == "has a thread":
            self.ending = threading.Event()
            threading.Thread(target=self.ending.wait, args=(2,), daemon=True).start()

    def on_train_start(self, state):
        self.run = state.output_dir.name
        if self.wrong == "begins anew":
            self.path.write_text("")

    def on_step_end(self, state, step_idx, batch, metrics):
        if self.wrong == "counts on floats":
            sum(metrics.values())
        if self.wrong == "counts on order":
            assert step_idx >= getattr(self, "last", 0)
            self.last = step_idx
        if self.wrong == "needs the loop":
            state.backend  # noqa: B018 # it raises where there is none
        if self.wrong == "spawns a task that raises":
            self.spawn(self.task)
        if self.wrong == "makes a bare task that raises":
            asyncio.create_task(self.task())  # adopted
        kind = type(state).__name__ if self.wrong == "tells live from detached" else ""
        if self.wrong == "looks for a context" and not state.ctx:
            self.path.with_name(type(state).__name__).touch()
        path = self.path.with_name(f"{self.run} lines") if self.wrong == "keeps its run bare" else self.path
        with path.open("a") as file:
            file.write(f"{state.output_dir.name} {step_idx} {kind}\n")

    async def task(self):
        raise KeyError("in a task")


class Marked(Lines):
    def mark(self):
        return {1} if self.wrong == "marks are no plain data" else None

    def rewind(self, mark):
        pass


class Strange(Callback):
    async def on_step_end(self, state, step_idx, batch, metrics):
        pass


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("opens in init", "touches no file when it is constructed"),
        ("raises in init", "can be constructed outside an event loop; it raised ValueError: not today"),
        ("has a thread", "starts no thread when it is constructed"),
        ("counts on floats", "on_step_end takes metrics with a text"),
        ("counts on order", "on_step_end takes late and repeated steps"),
        ("needs the loop", "on_step_end takes events read from a record; it raised DetachedError"),
        ("spawns a task that raises", "its task task takes a whole experiment, two runs at once; it raised KeyError"),
        (
            "makes a bare task that raises",
            "its task Lines.task takes a whole experiment, two runs at once; it raised KeyError",
        ),
        ("tells live from detached", "followed, it writes what it writes inline; line 1 of lines is"),
        (
            "looks for a context",
            "a loop by itself comes to the same as inline; DetachedLoopState is too many",
        ),
        ("keeps its run bare", "a run beside another is as one by itself; line 1 of narrow lines is"),
        ("begins anew", "repeated start events change nothing; "),
    ],
)
def test_a_callback_that_does_not_conform_is_told_so_in_a_sentence(wrong, said):
    with pytest.raises(AssertionError) as caught:
        conformance(lambda folder: Lines(folder, wrong))()
    assert said in str(caught.value)


def test_a_callback_that_conforms_passes():
    conformance(Lines)()


def test_a_callback_that_writes_in_bare_tasks_and_at_its_close_passes():
    class Late(Callback):
        def __init__(self, folder):
            self.folder, self.rows = folder, []

        def on_step_end(self, state, step_idx, batch, metrics):
            asyncio.create_task(self.write(state.output_dir.name, step_idx))  # adopted

        async def write(self, run, step_idx):
            self.rows.append((run, step_idx))

        def close(self):
            for run in {run for run, _ in self.rows}:
                (self.folder / f"{run}.txt").write_text(str(sorted(each[1] for each in self.rows if each[0] == run)))

    conformance(Late)()


def test_a_close_that_raises_is_told():
    class Closes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics): ...

        def close(self):
            raise OSError("disk full")

    with pytest.raises(AssertionError, match="it can be closed after .* it raised OSError: disk full"):
        conformance(lambda _: Closes())()


def test_marks_that_do_not_rewind_are_noticed():
    with pytest.raises(AssertionError, match="after a crash its files are as without; lines has 12 lines and not 8"):
        conformance(Marked)()
    with pytest.raises(AssertionError, match="it can be marked, and rewound .* TypeError"):
        conformance(lambda folder: Marked(folder, "marks are no plain data"))()


def test_hooks_that_cannot_be_called_are_told_of_and_nothing_else():
    with pytest.raises(AssertionError, match="its hooks can be called as they are declared: .* is async") as caught:
        conformance(lambda _: Strange())()
    assert len(str(caught.value).split("\n- ")) == 2


class Wrong(Sink):
    def __init__(self, wrong):
        self.wrong = wrong
        if wrong == "loop in init":
            asyncio.get_running_loop()

    async def open(self):
        if self.wrong == "cannot open":
            raise OSError("no way")

    async def write(self, batch):
        if self.wrong == "rejects":
            raise RejectedError({0: "never"})
        if self.wrong == "counts wrongly":
            return len(batch) + 1
        if self.wrong == "knows all events":
            assert all(hasattr(each.event, "hook") for each in batch)
        return max(len(batch) // 2, 1) if self.wrong == "" else None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("loop in init", "can be constructed outside an event loop; it raised RuntimeError"),
        ("cannot open", "open, write and close take a whole experiment; it raised OSError: no way"),
        ("rejects", "take a whole experiment; it raised RejectedError"),
        ("counts wrongly", "write returns None or how many it took, 1 to 1; it returned 2"),
        ("knows all events", "take events of a type that is not known here; it raised AssertionError"),
    ],
)
def test_a_sink_that_does_not_conform_is_told_so_in_a_sentence(wrong, said):
    with pytest.raises(AssertionError) as caught:
        conformance(lambda _: Wrong(wrong))()
    assert said in str(caught.value)


def test_a_sink_may_take_a_part_of_a_batch():
    conformance(lambda _: Wrong(""))()


# -- what one cause comes to ------------------------------------------------------------------------------------------


class Raises(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, state, step_idx, batch, metrics):
        raise OSError(f"no room for {self.folder / str(step_idx)}")

    def on_eval(self, state, step_idx, eval_name, metrics):
        raise OSError("no room")


def test_one_cause_is_one_sentence_with_how_often_it_showed():
    with pytest.raises(AssertionError) as caught:
        conformance(Raises)()
    _, *sentences = str(caught.value).splitlines()
    assert len(sentences) == 2
    assert re.match(
        r"- on_step_end takes a whole experiment, two runs at once; it raised OSError: no room", sentences[0]
    )
    assert re.search(r"\(\d\d+ times, also with objects that hold the least and \d+ more\)$", sentences[0])
    assert sentences[1].startswith("- on_eval takes")


class Announced(Callback):
    """Counts on the start of a run: what it is given of others it does not take."""

    def __init__(self):
        self.rows = {}

    def on_train_start(self, state):
        self.rows.setdefault(state.run_key, [])

    def on_step_end(self, state, step_idx, batch, metrics):
        self.rows[state.run_key].append(metrics["loss"] + 1)


def test_a_row_that_is_read_from_a_record_is_one_of_a_run_that_has_begun():
    with pytest.raises(AssertionError) as caught:
        conformance(lambda _: Announced())()
    keyless = next(each for each in str(caught.value).splitlines() if "KeyError: 'wide'" in each)
    assert keyless.startswith("- on_step_end takes steps of a run whose start was not seen; it raised")
    assert keyless.endswith("'wide'")


# -- state that is kept by run, as docs/callbacks.md has it -----------------------------------------------------------


class Smoothed(Callback):
    def __init__(self, folder):
        self.path = folder / "means"
        self.means = {}

    def on_step_end(self, state, step_idx, batch, metrics):
        loss = metrics.get("loss", 0.0)
        self.means[state.run_key] = (self.means.get(state.run_key, loss) + loss) / 2
        with self.path.open("a") as file:
            file.write(f"{state.run_key} {self.means[state.run_key]}\n")

    def on_train_end(self, state, artifacts):
        self.means.pop(state.run_key, None)


def test_state_that_is_kept_by_run_conforms_with_a_context_or_without_one():
    conformance(Smoothed)()


# -- other things than files ------------------------------------------------------------------------------------------


class Table(Callback):
    """Correct, and no two of its files are the same."""

    def __init__(self, folder, wrong=False):
        self.path, self.wrong = folder / "table.db", wrong

    def on_step_end(self, state, step_idx, batch, metrics):
        with sqlite3.connect(self.path) as database:
            database.execute("PRAGMA user_version = 1")
            database.execute("CREATE TABLE IF NOT EXISTS steps (run, step, salt, PRIMARY KEY (run, step))")
            kind = type(state).__name__ if self.wrong else ""
            salt = id(object()), threading.get_ident(), kind, self.path.name, str(self.path)
            database.execute("INSERT OR REPLACE INTO steps VALUES (?, ?, ?)", (state.run_key, step_idx, str(salt)))
            if self.wrong:
                database.execute("INSERT OR REPLACE INTO steps VALUES (?, -1, 0)", (kind,))
        database.close()


def rows(folder):
    database = sqlite3.connect(folder / "table.db")
    try:
        return {"steps": database.execute("SELECT run, step FROM steps ORDER BY run, step").fetchall()}
    except sqlite3.OperationalError:
        return {}
    finally:
        database.close()


@pytest.mark.long
def test_a_database_is_compared_by_its_rows():
    conformance(Table, contents=rows)()
    with pytest.raises(AssertionError, match=r"followed, it writes .* line 1 of steps is .*DetachedLoopState"):
        conformance(lambda folder: Table(folder, wrong=True), contents=rows)()


def test_contents_that_cannot_be_read_are_told_of():
    with pytest.raises(AssertionError, match="`contents` can read what it wrote; it raised FileNotFoundError"):
        conformance(Lines, contents=lambda folder: {"a": (folder / "none").read_text()})()


# -- two halves -------------------------------------------------------------------------------------------------------


class Halved(Callback):
    delivery: ClassVar = Wrong


def test_a_delivery_half_is_tried_as_a_sink_is():
    conformance(lambda _: Halved(), delivery=lambda _: Wrong("none"))()
    with pytest.raises(AssertionError, match="its delivery half: open, write and close take .* no way"):
        conformance(lambda _: Halved(), delivery=lambda _: Wrong("cannot open"))()


def test_a_delivery_half_that_is_not_given_is_asked_for():
    with pytest.raises(AssertionError, match=r"delivery=lambda folder: Wrong\(...\)"):
        conformance(lambda _: Halved())()


class MarkedSink(RecordingSink):
    def __init__(self, mark):
        super().__init__()
        self.kept = mark

    def mark(self):
        return self.kept

    def rewind(self, mark):
        pass


@pytest.mark.parametrize("mark", [{"at": (1, 2)}, {1: "a"}, {"set": {1}}])
def test_a_mark_of_a_sink_that_does_not_survive_a_file_is_noticed(mark):
    conformance(lambda _: MarkedSink(json.loads('{"at": [1, 2]}')))()
    with pytest.raises(AssertionError, match="its mark is plain data; it raised"):
        conformance(lambda _: MarkedSink(mark))()


def test_a_sink_that_cannot_be_called_is_told_so_and_nothing_else():
    class Sync(Sink):
        def write(self, batch): ...

    with pytest.raises(AssertionError, match=r"as they are declared: .*Sync.write is not async") as caught:
        conformance(lambda _: Sync())()
    assert len(str(caught.value).split("\n- ")) == 2


class RawLines(Sink):
    raw: ClassVar[bool] = True

    def __init__(self, wrong=""):
        self.wrong = wrong

    async def write(self, batch):
        assert all(type(each) is RawRecord for each in batch)
        if self.wrong == "decodes":
            assert [each.sequence for each in batch] == [decode(each.payload).seq for each in batch]
        if self.wrong == "steps only":
            assert all(b"step" in each.payload for each in batch)


test_raw_sink = conformance(lambda _: RawLines())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("decodes", "open, write and close take a record that is not an envelope; it raised CodecError"),
        ("steps only", "open, write and close take a whole experiment; it raised AssertionError"),
    ],
)
def test_a_raw_sink_is_checked_with_records(wrong, sentence):
    with pytest.raises(AssertionError) as caught:
        conformance(lambda _: RawLines(wrong))()
    assert sentence in str(caught.value)


# -- with fixtures, and inside a loop ---------------------------------------------------------------------------------


@pytest.fixture(params=["a", "b"])
def prefix(request):
    return request.param


class Prefixed(Callback):
    def __init__(self, folder, prefix, wrong=""):
        self.folder, self.prefix, self.wrong = folder, prefix, wrong

    def on_step_end(self, state, step_idx, batch, metrics):
        with (self.folder / f"{self.prefix}-{state.run_key}").open("a") as file:
            file.write(f"{step_idx}\n")


def prefixed_files(folder, prefix):
    return {path.name: path.read_text() for path in folder.glob(f"{prefix}-*")}


test_an_adapter_is_constructed_with_a_fixture = conformance(Prefixed)
test_what_it_wrote_is_read_with_a_fixture = conformance(Prefixed, contents=prefixed_files)
test_a_delivery_half_has_fixtures_too = conformance(
    lambda _: Halved(), delivery=lambda _, prefix: Wrong(f"no {prefix}")
)


def test_fixtures_are_the_parameters_without_a_default():
    test = conformance(Prefixed, delivery=lambda folder, *, tmp_path: None)
    assert [*inspect.signature(test).parameters] == ["prefix", "tmp_path"]
    assert [*inspect.signature(conformance(lambda folder, wrong="", **_: None)).parameters] == []
    with pytest.raises(TypeError, match="prefix"):
        test(tmp_path=1)


async def test_an_adapter_is_tried_inside_a_loop_as_it_is_outside():
    conformance(Lines)()
    conformance(lambda _: RecordingSink())()
    with pytest.raises(AssertionError, match="take a whole experiment; it raised RejectedError"):
        conformance(lambda _: Wrong("rejects"))()
    with pytest.raises(AssertionError, match="its task Lines.task takes a whole experiment"):
        conformance(lambda folder: Lines(folder, "makes a bare task that raises"))()


async def test_a_sink_may_need_a_server_on_the_loop_of_the_test():
    async def count(reader, writer):
        writer.write(b"%d\n" % len(await reader.readline()))
        writer.close()
        await writer.wait_closed()

    class Posts(Sink):
        def __init__(self, port):
            self.port = port

        async def write(self, batch):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(b"x" * len(batch) + b"\n")
            assert int(await reader.readline()) == len(batch) + 1
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(count, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await asyncio.to_thread(conformance(lambda _: Posts(port)))
