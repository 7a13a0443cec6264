"""Each name of 0.1 that was renamed works in 0.2, and warns with the new name."""

import copy
import importlib

import msgspec
import pytest

from evsys_bus import EventBus, LoopState, Receipt
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


FORMER = [  # what 0.1 exported, and programs import
    ("evsys_bus", "Learnt", "evsys_bus", "RunAnnotated"),
    ("evsys_bus.journal", "Retain", "evsys_bus.journal", "RetentionPolicy"),
    ("evsys_bus.codec", "to_plain", "evsys_bus.codec", "to_builtins"),
    ("evsys_bus.tasks", "Draining", "evsys_bus.tasks", "DrainFuture"),
    ("evsys_bus.training", "RunParts", "evsys_bus.training", "RunComponents"),
    ("evsys_bus.wiring", "build_callbacks", "evsys_bus.config", "build_callbacks"),
    ("evsys_bus.wiring.followed", "build_followed", "evsys_bus.config", "build_adapter"),
    ("evsys_bus.wiring.document", "read_document", "evsys_bus.config", "read_document"),
    ("evsys_bus.delivery.followed", "Recipe", "evsys_bus.delivery.subscription", "AdapterRef"),
]


@pytest.mark.parametrize(("module", "name", "home", "present"), FORMER, ids=[".".join(each[:2]) for each in FORMER])
def test_a_former_name_is_imported_with_a_warning(module, name, home, present):
    with pytest.warns(DeprecationWarning, match=rf"{name} is called {home}\.{present} since 0\.2"):
        value = getattr(importlib.import_module(module), name)
    assert value is getattr(importlib.import_module(home), present)


@pytest.mark.parametrize("module", sorted({each[0] for each in FORMER}))
def test_a_name_that_never_was_is_no_attribute(module):
    with pytest.raises(AttributeError, match="nonsense"):
        importlib.import_module(module).nonsense  # noqa: B018
