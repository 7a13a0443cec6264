import math
import random
from pathlib import Path
from typing import Any, Literal

import msgspec
import pydantic
import pytest

from evsys_bus import Envelope, EvalResult, LogContext, LoopState, ManifestRow, StepEnd, TrainingBatch, TrainStart
from evsys_bus.codec import decode, encode, to_json
from evsys_bus.context import ArmResult, DetachedLoopState
from evsys_bus.errors import CodecError
from evsys_bus.events import Event, UnknownEvent


class Sampling(pydantic.BaseModel):
    temperature: float = 1.0


class Options(msgspec.Struct, rename="camel"):
    batch_size: int
    top_k: int = 0


class CodecProbe(Event):
    options: Options
    sampling: Sampling
    kind: Literal["a", "b"] = "a"
    paths: tuple[Path, ...] = ()
    note: str = "none"


class CodecStrict(Event):
    number: int

    def __post_init__(self):
        if self.number < 0:
            raise ValueError("negative")


def wire(event, **head):
    """An envelope as some other writer may have written it."""
    return msgspec.msgpack.encode({"stream": "s", "seq": 1, "time": 2.0, "event": event, **head})


def state_ref(**more):
    return {"step": 3, "num_steps": 10, "output_dir": "/runs/a", "stop_requested": False, **more}


def test_the_head_of_an_older_writer_takes_the_defaults():
    read = decode(wire({"type": "train_start", "state": state_ref()}))
    assert (read.run, read.rank, read.replaced) == (None, 0, {})


def test_what_a_newer_writer_adds_is_ignored():
    event = {
        "type": "step_end",
        "state": state_ref(phase="warmup", __class__="x", request_stop=True),
        "step_idx": 3,
        "batch": {"metrics": {}, "shard": 7},
        "metrics": {"loss": 0.5},
        "weather": "fine",
    }
    read = decode(wire(event, color="red"))
    assert type(read.event.state) is DetachedLoopState
    assert (read.event.state.step, read.event.state.output_dir) == (3, Path("/runs/a"))
    assert read.event.metrics == {"loss": 0.5}


def test_a_field_that_an_older_writer_lacked_takes_its_default():
    event = {"type": "benchmark_eval", "ctx": {"output_dir": "/runs"}, "eval_result": {"name": "b"}, "predictions": []}
    read = decode(wire(event)).event
    assert read.step is None
    assert read.eval_result == EvalResult("b")


def test_an_event_that_lacks_what_it_needs_is_kept_as_an_unknown_one():
    event = decode(wire({"type": "eval", "eval_name": "x", "metrics": {"a": 1.0}})).event
    assert event == UnknownEvent("eval", {"eval_name": "x", "metrics": {"a": 1.0}})


def test_an_event_that_its_own_class_refuses_is_kept_as_an_unknown_one():
    assert decode(wire({"type": "codec_strict", "number": 1})).event == CodecStrict(1)
    assert decode(wire({"type": "codec_strict", "number": -1})).event == UnknownEvent("codec_strict", {"number": -1})


def test_an_unknown_type_is_kept_as_it_is_and_written_again_as_it_was():
    data = wire({"type": "comet_sighted", "tail": [1, {"x": 2.5}]}, run=None, rank=0)
    event = decode(data).event
    assert event == UnknownEvent("comet_sighted", {"tail": [1, {"x": 2.5}]})
    assert decode(encode(decode(data))) == decode(data)
    assert b'"event":{"type":"comet_sighted","tail":[1,{"x":2.5}]}' in to_json(decode(data))


def test_an_event_that_is_declared_later_is_read_from_then_on():
    data = wire({"type": "codec_late_comer", "n": 1})
    assert type(decode(data).event) is UnknownEvent

    class CodecLateComer(Event):
        n: int

    first = decode(data).event
    assert first == CodecLateComer(1)

    class CodecLateComer(Event):  # again, as a notebook does it
        n: int
        m: int = 2

    assert decode(data).event == CodecLateComer(1, 2)


def test_an_event_whose_annotations_are_local_to_a_function_is_carried_by_value(tmp_path):
    class Secret(msgspec.Struct):
        n: int

    class CodecSecretive(Event):
        secret: "Secret"
        state: LoopState

    event = CodecSecretive(Secret(3), LoopState(1, 2, tmp_path, backend=object()))
    read = decode(encode(Envelope("s", 1, 2.0, event))).event
    assert read.secret == {"n": 3}
    assert (type(read.state), read.state.num_steps) == (DetachedLoopState, 2)


@pytest.mark.parametrize("value", ["three", None, 3.5, [3], {"a": 1}])
def test_a_value_of_the_wrong_type_is_kept_as_it_was_read(value):
    event = {"type": "step_end", "state": state_ref(), "step_idx": value, "batch": {}, "metrics": {"loss": value}}
    read = decode(wire(event)).event
    assert read.step_idx == value
    assert read.metrics == {"loss": value}


def test_results_keep_metrics_of_any_plain_type_and_stay_structs():
    result = {
        "name": "b",
        "metrics": {"acc": 0.5, "note": "ok", "by_class": [1, 2]},
        "breakdowns": {"x": {"y": 1}},
        "newer": 1,
        "tags": ["val"],
    }
    arm = {"name": "a", "metrics": {"note": "ok"}, "evals": [result, {"no": "name"}], "status": "exploded"}
    run = {"artifacts": {"checkpoints": [{"name": "final", "batch": "seven"}]}}
    ctx = {"output_dir": "/runs"}
    read = decode(wire({"type": "run_end", "ctx": ctx, "run_result": run, "arm": arm})).event
    first, second = read.arm.evals
    assert type(read.arm) is ArmResult
    assert read.arm.status == "exploded"
    assert first == EvalResult("b", metrics=result["metrics"], breakdowns={"x": {"y": 1}}, tags=["val"])
    assert second == {"no": "name"}
    assert read.run_result.artifacts.checkpoints == [ManifestRow("final", "seven")]


def test_types_of_the_users_own_come_back_as_themselves(tmp_path):
    event = CodecProbe(Options(8, top_k=5), Sampling(temperature=0.5), "b", (tmp_path,))
    assert decode(encode(Envelope("s", 1, 2.0, event))).event == event


def test_integers_in_metrics_keep_every_digit(tmp_path):
    event = StepEnd(LoopState(0, 1, tmp_path), 0, TrainingBatch(), {"tokens": 2**62 + 1})
    assert decode(encode(Envelope("s", 1, 2.0, event))).event.metrics == {"tokens": 2**62 + 1}


@pytest.mark.parametrize("where", ["state", "batch"])
@pytest.mark.parametrize("wrong", ["text", 5, [1], {}])
def test_what_stands_in_the_place_of_a_handle_is_no_error(where, wrong):
    event = {"type": "step_end", "state": state_ref(), "step_idx": 3, "batch": {}, "metrics": {"loss": 0.5}}
    assert decode(wire({**event, where: wrong})).event.metrics == {"loss": 0.5}
    assert decode(wire({**event, "state": {"run": wrong}}), {}).event.metrics == {"loss": 0.5}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"{}",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({"stream": "s", "seq": 1, "time": 2.0}),
        wire({"no": "type"}),
        wire({"state": {}, "step_idx": 3, "batch": {}, "metrics": {}}),
        memoryview(bytes(200))[::2],
        wire({"type": 5}),
        wire({"type": "step_end"}, stream=5),
        wire([]),
        wire({"type": "x"}) + b"x",
        b"\x91" * 100_000,
        b"\x81\xa5event" * 5000,
    ],
)
def test_bytes_that_are_no_envelope_say_so_and_what_to_do(data):
    with pytest.raises(CodecError, match="no envelope") as caught:
        decode(data)
    assert caught.value.fix
    assert caught.value.why


def test_bytes_that_were_cut_or_changed_are_read_or_refused_and_never_anything_else(tmp_path):
    ctx = LogContext(tmp_path, run_key="a")
    state = LoopState(3, 10, tmp_path, ctx=ctx)
    data = encode(Envelope("s", 1, 2.0, StepEnd(state, 3, TrainingBatch(), {"loss": 0.5}), "a"))
    for end in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:end])
    dice = random.Random(1)
    for _ in range(3000):
        changed = bytearray(data)
        changed[dice.randrange(len(data))] = dice.randrange(256)
        try:
            decode(bytes(changed), {"a": ctx})
        except CodecError:
            continue


def test_reading_does_not_share_anything_between_envelopes(tmp_path):
    data = encode(Envelope("s", 1, 2.0, TrainStart(LoopState(3, 10, tmp_path))))
    first, second = decode(data), decode(data)
    first.event.state.step = 99
    first.replaced["x"] = "y"
    assert second.event.state.step == 3
    assert second.replaced == decode(data).replaced == {}


class PretrainingStep(Event, frozen=True):
    """With the fields of `StepEnd`, but not its fast path."""

    state: LoopState
    step_idx: int
    batch: TrainingBatch
    metrics: dict[str, Any]


@pytest.mark.parametrize("batch", [TrainingBatch(), TrainingBatch(loss_fn="ppo", metrics={"tokens": 7})])
@pytest.mark.parametrize("ctx", [None, LogContext(Path("out"), run_key="group/run")])
def test_a_step_is_read_as_any_other_event_is(batch, ctx):
    state = LoopState(3, 9, Path("out/group/run"), stop_requested=True, stop_reason="enough", ctx=ctx)
    metrics = {"loss": math.nan, "n": 2**70, "why": "text", "deep": {"a": [1, None]}, "odd": object()}

    def read(kind: type[Event]) -> list[str]:
        envelope = decode(encode(Envelope("r0-x", 4, 1.5, kind(state, 3, batch, metrics), "group/run", 2)))
        step = envelope.event
        assert type(step) is kind
        parts = [
            (envelope, ("stream", "seq", "time", "run", "rank", "replaced")),
            (step, ("step_idx", "metrics")),
            (step.state, ("step", "num_steps", "output_dir", "stop_requested", "stop_reason", "error")),
            (step.batch, ("loss_fn", "loss_fn_config", "metrics")),
        ]
        run = None if step.state.ctx is None else step.state.ctx.run_key
        return [repr(run), *(repr(getattr(part, name)) for part, names in parts for name in names)]

    assert read(StepEnd) == read(PretrainingStep)
