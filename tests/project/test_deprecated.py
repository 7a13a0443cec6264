"""Each name of 0.1 that was renamed works in 0.2, and warns with the new name."""

import copy

import msgspec
import pytest

import evsys_bus
from evsys_bus import EventBus, LoopState, Receipt, RunAnnotated, training
from evsys_bus.tasks import DeliveryStatus, TaskCounts

COUNTS = TaskCounts(completed=2)
RECEIPT = Receipt(COUNTS, {"a": COUNTS}, ("a:push",), dropped=3, resume_command="evsys-bus sync runs")


@pytest.mark.parametrize(
    ("former", "name", "value"),
    [
        ("total", "tasks", COUNTS),
        ("owners", "tasks_by_owner", {"a": COUNTS}),
        ("left", "unfinished", ("a:push",)),
        ("refused", "dropped", 3),
        ("finish", "resume_command", "evsys-bus sync runs"),
    ],
)
def test_a_receipt_has_its_former_names(former, name, value):
    with pytest.warns(DeprecationWarning, match=rf"Receipt\.{former} is called {name} since 0\.2") as warned:
        assert getattr(RECEIPT, former) == value == getattr(RECEIPT, name)
    assert warned[0].filename == __file__


@pytest.mark.parametrize(("former", "name"), [("handed_over", "deferred"), ("refused", "dropped")])
def test_health_has_its_former_names(former, name):
    with EventBus() as bus:
        health = msgspec.structs.replace(bus.health(), deferred=4, dropped=5)
    with pytest.warns(DeprecationWarning, match=rf"Health\.{former} is called {name}"):
        assert getattr(health, former) == getattr(health, name)


def test_a_delivery_has_its_trouble():
    delivery = DeliveryStatus("csv", state="parked", error="no login")
    with pytest.warns(DeprecationWarning, match=r"DeliveryStatus\.trouble is called last_error"):
        assert delivery.trouble == "no login" == delivery.last_error


def test_a_state_has_unfinished_to_read_and_to_set():
    state = LoopState(step=0, num_steps=1, output_dir="run")
    with pytest.warns(DeprecationWarning, match=r"LoopState\.unfinished is called stopped_early"):
        state.unfinished = True
    assert state.stopped_early
    with pytest.warns(DeprecationWarning, match=r"LoopState\.unfinished is called stopped_early"):
        assert state.unfinished


def test_a_frozen_value_is_frozen_under_its_former_name_too():
    with pytest.raises(AttributeError, match="immutable"):
        RECEIPT.left = ()


def test_a_former_name_is_no_field():
    assert {"total", "left", "owners", "refused", "finish"}.isdisjoint(Receipt.__struct_fields__)
    assert b"left" not in msgspec.json.encode(RECEIPT)
    assert copy.copy(RECEIPT) == RECEIPT


def test_classes_have_their_former_names():
    with pytest.warns(DeprecationWarning, match=r"evsys_bus\.Learnt is called RunAnnotated"):
        assert evsys_bus.Learnt is RunAnnotated
    with pytest.warns(DeprecationWarning, match=r"evsys_bus\.training\.RunParts is called RunComponents"):
        assert training.RunParts is training.RunComponents
    for module in (evsys_bus, training):
        with pytest.raises(AttributeError, match="has no attribute 'Never'"):
            _ = module.Never
