"""Another kind of adapter under the name of an earlier one: it is another adapter, and gets everything itself."""

import json
from pathlib import Path

from evsys_bus import EventBus, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart, build_callbacks, follow
from evsys_bus.errors import RejectedError
from evsys_bus.journal import CursorStore, layout
from evsys_bus.testing import RecordingSink


def trained(folder: Path, kind: str, params: dict[str, object], steps: range) -> dict[str, object]:
    """Publish some steps, with one adapter followed, under a name that is always the same; its row of the receipt."""
    spec = {"kind": kind, "name": "table", "placement": "follow", "params": params}
    with EventBus(build_callbacks([spec]), journal=folder / "journal") as bus:
        state = LoopState(step=steps.start, num_steps=steps.stop, output_dir=folder / "run")
        bus.publish(TrainStart(state))
        for state.step in steps:
            bus.publish(StepEnd(state, state.step, TrainingBatch(), {"loss": 0.5}))
        bus.publish(TrainEnd(state, None))
    [delivery] = bus.receipt.deliveries
    return {key: getattr(delivery, key) for key in ("recorded", "delivered", "dead", "pending", "last_error")}


def told(count: int) -> dict[str, object]:
    return {"recorded": count, "delivered": count, "dead": 0, "pending": 0, "last_error": None}


def test_another_kind_under_the_same_name_begins_anew_and_no_file_has_to_be_removed_by_hand(tmp_path):
    table = {"out_path": str(tmp_path / "metrics.csv")}
    assert trained(tmp_path, "csv_metrics", table, range(2)) == told(4)
    assert trained(tmp_path, "local_logger", {}, range(2, 4)) == told(8)
    [rows] = tmp_path.glob("run/**/metrics.jsonl")
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == [0, 1, 2, 3]
    assert trained(tmp_path, "csv_metrics", table, range(4, 5)) == told(11)
    steps = [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "3", "4"]
    aside = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "journal" / "cursors").glob("table.json.*"))
    assert aside == ["table.json.csv_metrics", "table.json.local_logger"]
    assert CursorStore(str(tmp_path / "journal")).list_adapters() == ["table"]


class Marks(RecordingSink):
    """Leaves marks of its own."""

    rewound: object = None

    def mark(self):
        return {"marks": len(self.envelopes)}

    def rewind(self, mark):
        self.rewound = mark["marks"]


class Notes(RecordingSink):
    """Leaves none."""


def numbers(folder: Path, sink: RecordingSink) -> list[int]:
    """What it is given, as "board", of a journal in which one event more is published."""
    with EventBus(sinks=[follow(sink, "board")], journal=folder) as bus:
        bus.publish(TrainEnd(None, None))
    assert [each.pending for each in bus.receipt.deliveries] == [0]
    return [each.seq for each in sink.envelopes]


def test_a_live_object_without_marks_is_who_its_name_says_it_is(tmp_path):
    assert numbers(tmp_path, RecordingSink()) == [1]
    assert numbers(tmp_path, Notes()) == [2]
    assert numbers(tmp_path, marks := Marks()) == [3]  # nobody left a mark that it would have to understand
    assert marks.rewound is None
    assert numbers(tmp_path, marks := Marks()) == [4]
    assert marks.rewound == 1
    assert numbers(tmp_path, Notes()) == [1, 2, 3, 4, 5]


def test_the_dead_letters_of_the_other_kind_are_set_aside_with_its_cursor(tmp_path):
    class Refuses(Marks):
        async def write(self, batch):
            raise RejectedError(dict.fromkeys(range(len(batch)), "it is full"))

    assert numbers(tmp_path, Refuses()) == []
    letters = Path(layout.courier_path(str(tmp_path), "board", "dead.jsonl"))
    before = letters.read_text()
    assert numbers(tmp_path, Marks()) == [1, 2]
    assert not letters.exists()
    [aside] = letters.parent.glob("board.dead.jsonl.Refuses-*")
    assert aside.read_text() == before
