"""Events of one's own: what cannot be resolved costs only itself, and a process that does not know the class."""

import sys
import types
from typing import Any

import msgspec
import pytest

from evsys_bus import Envelope, Event, LogContext, LoopState, TrainingBatch
from evsys_bus.codec import RunContexts, decode, encode, to_json
from evsys_bus.context import DetachedLogContext, DetachedLoopState, DetachedTrainingBatch
from evsys_bus.events import UnknownEvent, declared_events

LATE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Optional

from evsys_bus import Event
if TYPE_CHECKING:
    import jax
    from evsys_bus import LoopState

class {name}(Event, frozen=True):
    loop: LoopState
    grads: jax.Array | None
    scores: list[float]
    other: Optional[LoopState] = None
"""


@pytest.fixture
def declare():
    """Run the source of a module; what it declares is forgotten afterwards, as in a process that never saw it."""
    names: list[str] = []

    def run(source: str, name: str) -> Any:
        module = types.ModuleType(f"own_events_{name}")
        sys.modules[module.__name__] = module
        names.append(module.__name__)
        exec(source.format(name=name), vars(module))
        return getattr(module, name)

    yield run
    for name in names:
        del sys.modules[name]


def test_an_annotation_that_cannot_be_resolved_costs_only_itself(declare, tmp_path):
    kind = declare(LATE, "GradientSeen")
    event = kind(LoopState(3, 9, tmp_path), {"norm": 0.5}, [1.0, 2.0], LoopState(4, 9, tmp_path))
    found = decode(encode(Envelope("s", 1, 2.0, event))).event
    assert type(found) is kind
    assert (type(found.loop), found.loop.step) == (DetachedLoopState, 3)
    assert (type(found.other), found.other.step) == (DetachedLoopState, 4)
    assert (found.grads, found.scores) == ({"norm": 0.5}, [1.0, 2.0])


def test_an_event_whose_class_is_not_known_has_its_fields_in_order_and_its_handles_detached(tmp_path):
    class LessonOver(Event, frozen=True):
        keywords = frozenset({"score", "absent"})

        name: str
        state: LoopState
        batch: TrainingBatch | None
        ctx: LogContext
        score: float
        loose: Any
        tail: list[int]

    ctx = LogContext(tmp_path, run_key="a", config={"token": "hf_1"})
    state = LoopState(3, 9, tmp_path / "a", ctx=ctx)
    event = LessonOver("sums", state, TrainingBatch(loss_fn="dpo"), ctx, 0.5, LoopState(8, 9, tmp_path), [1, 2])
    data = encode(Envelope("s", 1, 2.0, event, "a"))
    known = decode(data).event
    assert type(known) is LessonOver
    assert (type(known.loose), known.loose.step) == (DetachedLoopState, 8)
    data = data.replace(b"lesson_over", b"lesson_0ver")  # no class of this process has that tag
    contexts = RunContexts()
    contexts.add("a", str(tmp_path), shared := LogContext(tmp_path, run_key="a"))
    found = decode(data, contexts).event
    assert type(found) is UnknownEvent
    args, kwargs = found.arguments()
    assert [type(each) for each in args[1:5]] == [
        DetachedLoopState,
        DetachedTrainingBatch,
        DetachedLogContext,
        DetachedLoopState,
    ]
    assert (args[0], args[1].step, args[2].loss_fn, args[4].step, args[5]) == ("sums", 3, "dpo", 8, [1, 2])
    assert args[1].ctx is shared
    assert args[3].config == {"token": "<redacted>"}
    assert kwargs == {"score": 0.5}
    again = decode(encode(decode(data, contexts))).event
    assert (again.handles, again.keywords, again.fields["state"].step) == (found.handles, found.keywords, 3)
    assert b'"type":"lesson_0ver","name":"sums","state":{"step":3' in to_json(decode(data))


def test_what_ships_says_nothing_of_its_handles(tmp_path):
    values = {"ctx": LogContext(tmp_path), "state": LoopState(0, 1, tmp_path)}
    for kind in declared_events().values():
        if kind.__module__ == "evsys_bus.events":
            event = kind(*(values.get(name) for name in kind.__struct_fields__))
            assert {"handles", "keywords"}.isdisjoint(msgspec.msgpack.decode(encode(Envelope("s", 1, 2.0, event))))


def test_what_0_1_0_wrote_of_an_unknown_event_has_no_handles():
    written = {"stream": "s", "seq": 1, "time": 2.0, "event": {"type": "comet_seen", "state": {"step": 3}, "n": 1}}
    event = decode(msgspec.msgpack.encode(written)).event
    assert event == UnknownEvent("comet_seen", {"state": {"step": 3}, "n": 1})
    assert event.arguments() == ([{"step": 3}, 1], {})


def test_handles_that_are_no_handles_are_left_as_they_were_read():
    event = {"type": "comet_seen", "state": 5, "other": [1]}
    head = {"stream": "s", "seq": 1, "time": 2.0, "event": event}
    read = decode(msgspec.msgpack.encode({**head, "handles": {"state": "state", "other": "sail", "gone": "batch"}}))
    assert (type(read.event.fields["state"]), read.event.fields["other"]) == (DetachedLoopState, [1])
