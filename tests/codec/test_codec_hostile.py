import json
import sys
import threading
import time

import numpy as np
import pytest

from evsys_bus import Checkpoint, Envelope, Eval, LogContext, LoopState, ManifestRow, RunStart, StepEnd, TrainingBatch
from evsys_bus.codec import MAX_EVENT_BYTES, decode, encode, event_encoder, to_json
from evsys_bus.codec.scalars import MAX_DEPTH, MAX_KEY_CHARS, MAX_TEXT_CHARS
from evsys_bus.events import BenchmarkEval, UnknownEvent
from support.foreign_values import Interrupt, Raising, RaisingAttributes, RaisingClass

GOOD = {"loss": 0.5, "acc": 0.25}


class Rebellious:
    def item(self):
        raise Interrupt

    def __getattr__(self, name):
        raise Interrupt


def step(metrics, state=None, batch=None, step_idx=3):
    state = state or LoopState(3, 10, "/runs/a")
    return Envelope("s", 1, 2.0, StepEnd(state, step_idx, batch or TrainingBatch(), metrics), "a")


def bomb(depth, wrap=lambda inner: [inner]):
    value = 1.0
    for _ in range(depth):
        value = wrap(value)
    return value


def ring():
    value = {}
    value["self"] = value
    return value


BAD = {
    "raising": Raising,
    "raising attributes": RaisingAttributes,
    "rebellious": Rebellious,
    "liar": RaisingClass,
    "big": lambda: 2**70,
    "very big": lambda: 10**5000,
    "surrogate": lambda: "\udc80",
    "complex": lambda: 1j,
    "array": lambda: np.zeros(500),
    "complex scalar": lambda: np.complex128(1j),
    "lock": threading.Lock,
    "ring": ring,
    "deep": lambda: bomb(500),
    "very deep": lambda: bomb(100_000),
    "deep mapping": lambda: bomb(500, lambda inner: {"a": inner}),
}


@pytest.mark.parametrize("bad", BAD)
def test_the_good_metrics_of_a_row_survive_a_bad_one(bad):
    envelope = step({**GOOD, "bad": BAD[bad](), "last": np.float64(1.5)})
    read = decode(encode(envelope))
    assert read.event.metrics.items() >= {**GOOD, "last": 1.5}.items()
    assert list(read.event.metrics) == ["loss", "acc", "bad", "last"]
    assert read.event.state.step == 3
    assert read.replaced
    assert all(path.startswith("metrics.bad") for path in read.replaced)
    assert json.loads(to_json(envelope))["event"]["metrics"]["loss"] == 0.5


def test_keys_of_any_type_become_text():
    read = decode(encode(step({1: 1.0, None: 2.0, ManifestRow("x"): 3.0, np.str_("a"): 4.0})))
    assert list(read.event.metrics.values()) == [1.0, 2.0, 3.0, 4.0]
    assert list(read.event.metrics)[:2] == ["1", "None"]
    assert "a" in read.event.metrics


STRANGERS = {
    "none": lambda: None,
    "number": lambda: 5,
    "text": lambda: "text",
    "list": lambda: [("a", 1.0)],
    "object": object,
    "raising": Raising,
    "raising attributes": RaisingAttributes,
    "rebellious": Rebellious,
    "liar": RaisingClass,
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_metrics_that_are_no_mapping_do_not_cost_the_event(stranger):
    assert decode(encode(step(STRANGERS[stranger]()))).event.step_idx == 3


@pytest.mark.parametrize("name", ["state", "batch"])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_in_the_place_of_a_handle_does_not_cost_the_metrics(name, stranger):
    handles = {"state": LoopState(3, 10, "/runs/a"), "batch": TrainingBatch(), name: STRANGERS[stranger]()}
    event = StepEnd(step_idx=3, metrics=GOOD, **handles)
    read = decode(encode(Envelope("s", 1, 2.0, event)))
    assert read.event.metrics == GOOD
    assert (getattr(read.event, name) is None) == (stranger == "none")


def test_a_state_of_somebody_elses_class_travels_by_its_attributes():
    class Loop:
        step, num_steps, output_dir, backend = 3, 10, "/runs/a", Raising()

    read = decode(encode(step(GOOD, state=Loop())))
    assert (read.event.state.step, read.event.state.num_steps) == (3, 10)
    assert read.event.state.stop_reason is None  # what is not said is as nearly always


def test_a_state_with_attributes_of_the_wrong_types_is_carried_as_well_as_it_can():
    state = LoopState(np.int64(3), 2**70, "/runs/\ud800", stop_reason="x" * 1_000_000, error=Raising())
    read = decode(encode(step(GOOD, state=state)))
    assert read.event.state.step == 3
    assert read.event.state.error.startswith("Raising")
    assert set(read.replaced) == {"state.num_steps", "state.output_dir", "state.stop_reason"}


def test_an_error_whose_text_raises_is_named_by_its_type():
    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    assert decode(encode(step(GOOD, state=LoopState(0, 1, "/r", error=MuteError())))).event.state.error == "MuteError"


def test_a_nested_container_on_the_wire_is_never_deeper_than_the_bound():
    deep = decode(encode(step({"a": bomb(100)}))).event.metrics["a"]
    depth = 0
    while type(deep) is list:
        (deep,) = deep
        depth += 1
    assert depth <= MAX_DEPTH
    for event in (Checkpoint(None, ManifestRow(bomb(500))), Eval(LoopState(3, 10, "/runs/a"), bomb(500), "x", GOOD)):
        (why,) = decode(encode(Envelope("s", 1, 2.0, event))).replaced.values()
        assert "deeper" in why


def test_names_and_texts_of_a_megabyte_are_cut():
    envelope = Envelope("s", 1, 2.0, Eval(None, 3, "e" * 1_000_000, {"n" * 1_000_000: 1.0, **GOOD}))
    read = decode(encode(envelope))
    assert len(read.event.eval_name) == MAX_TEXT_CHARS
    assert read.event.metrics.items() >= GOOD.items()
    assert max(map(len, read.event.metrics)) == MAX_KEY_CHARS


def test_a_name_that_is_too_long_is_the_same_in_flat_rows_and_others():
    name = "n" * (MAX_KEY_CHARS + 1)
    names = {next(iter(decode(encode(step({name: 1.0, **more}))).event.metrics)) for more in ({}, {"x": [1]})}
    assert len(names) == 1
    beside = decode(encode(step(GOOD, batch=TrainingBatch(metrics={name: 1.0})))).event.batch.metrics
    assert set(beside) == names


def test_a_hundred_thousand_metrics_travel_whole():
    metrics = {f"layer_{n}/norm": n / 7 for n in range(100_000)}
    read = decode(encode(step(metrics)))
    assert read.event.metrics == metrics
    assert read.replaced == {}


def test_predictions_larger_than_an_event_are_cut_and_the_rest_of_the_event_stays(tmp_path):
    predictions = [{"task_id": str(n), "output": "x" * 100_000, "reward": 1.0} for n in range(400)]
    event = BenchmarkEval(LogContext(tmp_path), None, predictions, step=7)
    data = encode(Envelope("s", 1, 2.0, event))
    read = decode(data)
    assert len(data) <= MAX_EVENT_BYTES
    assert read.event.step == 7
    assert read.event.predictions[0] == predictions[0]
    assert any("too large" in why for why in read.replaced.values())


@pytest.mark.parametrize("most", [300, 1000, 10_000, 100_000])
def test_a_smaller_limit_is_kept_and_numbers_go_first(most):
    metrics = {"texts": ["é" * 1000] * 1000, "many": list(range(100_000)), **GOOD, "bad": [object()] * 1000}
    data = encode(step(metrics), max_event_bytes=most)
    assert len(data) <= most
    assert len(encode(step({str(n): float(n) for n in range(10_000)}), max_event_bytes=most)) <= most
    read = decode(data)
    assert read.replaced
    if most >= 10_000:
        assert read.event.metrics.items() >= GOOD.items()
        assert read.event.step_idx == 3


def test_an_envelope_whose_own_names_are_no_text_is_written_too():
    envelope = Envelope("s\udc80", 1, 2.0, UnknownEvent("odd\udc80", {"a": [object()]}), "run\udc80")
    read = decode(encode(envelope))
    assert (read.stream, read.run, read.event.type) == ("s\\udc80", "run\\udc80", "odd\\udc80")


def test_a_config_of_any_kind_is_carried(tmp_path):
    ctx = LogContext(tmp_path, config={"model": object(), "lr": 0.1}, run_key="a", extras={"live": Raising()})
    read = decode(encode(Envelope("s", 1, 2.0, RunStart(ctx), "a")))
    assert read.event.ctx.config["lr"] == 0.1
    assert set(read.replaced) == {"ctx.config.model", "ctx.extras.live"}


def test_encoding_deep_in_the_callers_recursion_does_not_raise():
    def deeper(left):
        return encode(step({**GOOD, "bad": [object()]})) if left == 0 else deeper(left - 1)

    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1
    assert decode(deeper(sys.getrecursionlimit() - depth - 100)).event.metrics["loss"] == 0.5


def change(metrics, ended):
    """Grow and shrink the row itself, as a careless thread does."""
    while not ended.is_set():
        for number in range(500):
            metrics[f"extra_{number}"] = float(number)
        for number in range(500):
            del metrics[f"extra_{number}"]


def change_nested(metrics, ended):
    """Grow and shrink every container in the row."""
    while not ended.is_set():
        for number in range(100):
            metrics["nested"]["a"].extend(range(100))
            metrics["nested"][f"key_{number}"] = [number]
            metrics["tags"].add(number)
        metrics["nested"]["a"].clear()
        metrics["nested"].clear()
        metrics["nested"]["a"] = []
        metrics["tags"].clear()


@pytest.mark.parametrize("nested", [True, False])
def test_a_thread_that_changes_metrics_while_they_are_encoded_costs_only_its_own_changes(nested):
    metrics = {**GOOD, "nested": {"a": []}, "tags": set()} if nested else dict(GOOD)
    ended = threading.Event()
    thread = threading.Thread(target=change_nested if nested else change, args=(metrics, ended))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    until, rows = time.monotonic() + 0.7, 0
    encode_step = event_encoder(StepEnd, "s", 0, lambda _: "a")
    thread.start()
    try:
        while time.monotonic() < until or rows <= 10:
            envelope = step(metrics, batch=TrainingBatch(metrics=metrics))
            for data in (encode(envelope), encode_step(envelope.event, 1, 2.0)):
                assert decode(data).event.metrics.items() >= GOOD.items()
            rows += 1
    finally:
        ended.set()
        sys.setswitchinterval(interval)
        thread.join()


def test_a_long_list_is_whole_where_there_is_room_for_it_and_cut_by_the_bound_of_the_event_where_not():
    for length in (2_000, 100_000):
        read = decode(encode(step({**GOOD, "long": [0.5] * length})))
        assert (len(read.event.metrics["long"]), read.replaced) == (length, {})
    read = decode(encode(step({**GOOD, "long": [0.5] * 3_000_000, "other": [object()]})))
    assert 1_000_000 < len(read.event.metrics["long"]) < 3_000_000
    assert "cut after" in read.replaced["metrics.long"]
