"""Configurations of every usual class are recorded field by field, within limits."""

import argparse
import collections
import configparser
import dataclasses
import enum
import logging
import time
import types
from typing import ClassVar, NamedTuple

import attrs
import jsonargparse
import ml_collections
import msgspec
import numpy as np
import omegaconf
import pydantic
import pytest

from evsys_bus import EventBus, LogContext, RunStart
from support.journals import read_envelopes


@pytest.fixture
def record(tmp_path):
    """Return a function that publishes a run config, and returns it as recorded, with what was replaced."""

    def record(config):
        with EventBus([], journal=tmp_path / "journal") as bus:
            bus.publish(RunStart(LogContext(tmp_path, run_config=config)))
        [*_, envelope] = read_envelopes(tmp_path / "journal")
        return envelope.event.ctx.run_config, envelope.replaced

    return record


class Level(enum.Enum):
    HIGH = "high"
    LIVE = object()


@dataclasses.dataclass
class Optimizer:
    lr: float = 0.1
    item: str = "book"
    seed: dataclasses.InitVar[int] = 3
    kind: ClassVar[str] = "adam"
    betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.99])


@dataclasses.dataclass(slots=True)
class Slotted:
    lr: float = 0.1


class Row(msgspec.Struct):
    item: str = "book"


class Pair(NamedTuple):
    item: str = "book"
    lr: float = 0.1


@attrs.define
class Attrs:
    lr: float = 0.1
    opt: Optimizer = attrs.Factory(Optimizer)


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow", populate_by_name=True)
    lr: float = pydantic.Field(0.1, alias="learning_rate")
    secret_word: pydantic.SecretStr = pydantic.SecretStr("S3CRET")

    @pydantic.computed_field
    @property
    def twice(self) -> float:
        return 2 * self.lr


class Root(pydantic.RootModel[list[int]]):
    pass


class Args(argparse.Namespace):
    lr: float


class Inner:
    __slots__ = ("depth",)

    def __init__(self):
        self.depth = 2


class Plain:
    lr = 0.1

    def __init__(self):
        self.inner, self.act, self._cache = Inner(), len, {}


class ClassConfig:
    lr = 0.1
    level = Level.HIGH

    def method(self): ...


class ItemOfAClass:
    item = "book"
    model_fields = ("a", "b")


class ItemMethod:
    def __init__(self):
        self.lr = 0.1

    def item(self): ...


@dataclasses.dataclass
class OddNames:
    lr: float = 0.1
    _asdict: int = 1
    model_fields: int = 2


class KeysOnly:
    """Has what ``dict()`` asks for, and no ``__iter__``."""

    def keys(self):
        return ["lr"]

    def __getitem__(self, name):
        return {"lr": 0.1}[name]


def jsonargparsed():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--opt.lr", type=float, default=0.1)
    return parser.parse_args([])


OPTIMIZER = {"lr": 0.1, "item": "book", "betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        (Optimizer(), OPTIMIZER),
        (Slotted(), {"lr": 0.1}),
        (Row(), {"item": "book"}),
        (Pair(), {"item": "book", "lr": 0.1}),
        (Attrs(), {"lr": 0.1, "opt": OPTIMIZER}),
        (Root([1, 2]), [1, 2]),
        (Args(lr=0.1), {"lr": 0.1}),
        (argparse.Namespace(opt=argparse.Namespace(lr=0.1)), {"opt": {"lr": 0.1}}),
        (jsonargparsed(), {"opt": {"lr": 0.1}}),
        (types.SimpleNamespace(lr=0.1), {"lr": 0.1}),
        (types.MappingProxyType({"lr": 0.1}), {"lr": 0.1}),
        (collections.UserDict(lr=0.1), {"lr": 0.1}),
        (omegaconf.OmegaConf.create({"a": 1, "b": "${a}", "c": [1, {"d": 2}]}), {"a": 1, "b": 1, "c": [1, {"d": 2}]}),
        (omegaconf.OmegaConf.structured(Slotted), {"lr": 0.1}),
        (ml_collections.ConfigDict({"a": 1, "b": {"c": 2}}).lock(), {"a": 1, "b": {"c": 2}}),
        ({"a": ml_collections.FieldReference(4)}, {"a": 4}),
        ({"a": Level.HIGH, "b": Level.LIVE}, {"a": "high", "b": "LIVE"}),
        ({"a": np.array([0.25, 0.5]), "b": np.float32(0.5)}, {"a": [0.25, 0.5], "b": 0.5}),
        (Plain(), {"lr": 0.1, "inner": {"depth": 2}}),
        (ClassConfig, {"lr": 0.1, "level": "high"}),
        (ItemOfAClass(), {"item": "book", "model_fields": ["a", "b"]}),
        (ItemMethod(), {"lr": 0.1}),
        (OddNames(), {"lr": 0.1, "_asdict": 1, "model_fields": 2}),
        (KeysOnly(), {"lr": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_configuration_is_recorded_field_by_field(record, config, recorded):
    found, replaced = record(config)
    assert found == recorded
    assert replaced == {}


def test_a_pydantic_model_gives_fields_extras_and_computed_fields_and_no_secret(record):
    found, _ = record(Model(lr=0.5, extra=3))
    assert found == {"lr": 0.5, "secret_word": "<redacted>", "extra": 3, "twice": 1.0}


@dataclasses.dataclass
class Raising:
    good: int = 1
    bad: int = 2

    def __getattribute__(self, name):
        if name == "bad":
            raise RuntimeError
        return object.__getattribute__(self, name)


def interpolated():
    parser = configparser.ConfigParser()
    parser.read_string("[a]\ngood=1\nbad=%(nowhere)s\n")
    return parser["a"]


@pytest.mark.parametrize(
    ("config", "recorded"),
    [
        (Raising(), {"good": 1, "bad": "<unreadable>"}),
        (interpolated(), {"good": "1", "bad": "<unreadable>"}),
        (omegaconf.OmegaConf.create({"good": 1, "bad": "???"}), {"good": 1, "bad": "<unreadable>"}),
        (omegaconf.OmegaConf.create({"good": 1, "bad": "${nowhere}"}), {"good": 1, "bad": "<unreadable>"}),
        (omegaconf.OmegaConf.create([1, "???", 3]), [1, "<unreadable>", 3]),
    ],
    ids=["dataclass", "configparser", "missing", "interpolation", "list"],
)
def test_a_value_that_raises_costs_only_itself_and_is_logged_once(record, caplog, config, recorded, request):
    for _ in range(2):
        found, replaced = record({request.node.name: config})
        assert found == {request.node.name: recorded}
        [why] = replaced.values()
        assert why.endswith("when it was read")
    lines = [each for each in caplog.records if each.getMessage().startswith("event.values_replaced")]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING


class Store(collections.abc.Mapping):
    def __len__(self):
        return 10**8

    def __iter__(self):
        return (f"sample-{number}" for number in range(10**8))

    def __getitem__(self, key):
        return 1.0


def test_of_a_lazy_mapping_the_first_entries_are_read_and_the_others_counted(record):
    began = time.monotonic()
    found, replaced = record({"data": Store(), "lr": 0.1})
    assert time.monotonic() - began < 10
    assert found["lr"] == 0.1
    assert 0 < len(found["data"]) <= 20_000
    assert "of 100000000 entries" in replaced["ctx.run_config.data"]


class Cut(Store):
    def __len__(self):
        return 3

    def __iter__(self):
        yield "lr"
        raise OSError


def test_a_mapping_whose_iteration_fails_keeps_the_entries_before(record):
    found, replaced = record({"data": Cut()})
    assert found == {"data": {"lr": 1.0}}
    assert replaced["ctx.run_config.data"].startswith("OSError after 1")


class Tree(Store):
    """Has another tree under each of its names."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter("ab")

    def __getitem__(self, key):
        time.sleep(0.001)
        return Tree()


def test_lazy_mappings_within_lazy_mappings_have_one_limit_of_time(record):
    began = time.monotonic()
    found, _ = record({"data": Tree(), "lr": 0.1})
    assert time.monotonic() - began < 10
    assert found["lr"] == 0.1
    assert found["data"]["a"]["a"]
