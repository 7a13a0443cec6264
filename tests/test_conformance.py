"""Every adapter that ships keeps its side of the contract; and the suite notices one that does not."""

import asyncio
import threading

import pytest

from evsys_adapters import (
    CsvMetricsCallback,
    DebugLoggerCallback,
    EarlyStoppingCallback,
    LocalLoggerCallback,
    PrintProgressCallback,
)
from evsys_bus import Callback
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
        kind = type(state).__name__ if self.wrong == "tells live from detached" else ""
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
        ("tells live from detached", "followed, it writes what it writes inline; line 1 of lines is"),
        ("keeps its run bare", "a run beside another is as one by itself; line 1 of narrow lines is"),
        ("begins anew", "start events that are told again change nothing; "),
    ],
)
def test_a_callback_that_does_not_conform_is_told_so_in_a_sentence(wrong, said):
    with pytest.raises(AssertionError) as caught:
        conformance(lambda folder: Lines(folder, wrong))()
    assert said in str(caught.value)


def test_a_callback_that_conforms_passes():
    conformance(Lines)()


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
