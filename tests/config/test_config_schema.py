"""The JSON schema of a kind, and an example that can be built."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pydantic
import pytest

from evsys_bus.callback import Callback
from evsys_bus.config import Registry, build_callbacks, example, json_schema
from evsys_bus.config.params_schema import describe
from evsys_bus.errors import ConfigError


class Target(msgspec.Struct):
    host: str


class StructConfig(msgspec.Struct):
    target: Target
    fraction: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    project: Annotated[str, msgspec.Meta(examples=["digits"])]
    every: Annotated[int, msgspec.Meta(ge=5)]
    level: Literal["low", "high"]
    out: Path = Path("x.csv")
    on_full: Callable[[], None] | None = None
    retry: int | None = None


@dataclasses.dataclass
class DataConfig:
    target: Target
    every: int = 2
    out: Path = Path("x.csv")


class ModelTarget(pydantic.BaseModel):
    host: str


class ModelConfig(pydantic.BaseModel):
    target: ModelTarget
    every: int = pydantic.Field(ge=5)
    out: Path = Path("x.csv")
    on_full: Callable[[], None] | None = None
    opaque: Any = pydantic.Field(default_factory=object)


def registry_for(config: type | None) -> Registry:
    class Thing(Callback):
        Config: ClassVar[type | None] = config

        def __init__(self, **params: Any) -> None:
            self.params = params

    registry = Registry(entry_points=lambda: ())
    registry.register("thing")(Thing)
    return registry


@pytest.mark.parametrize("config", [StructConfig, DataConfig, ModelConfig])
def test_the_schema_forbids_unknown_keys_at_every_depth(config):
    schema = json_schema("thing", registry=registry_for(config))
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    [nested] = schema["$defs"].values()
    assert nested["additionalProperties"] is False
    assert "target" in schema["required"]
    assert schema["properties"]["out"] | {"title": ""} == {
        "type": "string",
        "format": "path",
        "default": "x.csv",
        "title": "",
    }
    msgspec.json.encode(schema)


@pytest.mark.parametrize("config", [StructConfig, DataConfig, ModelConfig])
def test_the_example_can_be_built(config):
    registry = registry_for(config)
    spec = example("thing", registry=registry)
    [callback] = build_callbacks([spec], registry=registry)
    assert set(callback.params) == set(spec.params)
    assert {"target", "out"} <= set(spec.params)


def test_the_example_takes_ranges_choices_and_given_examples_into_account():
    params = example("thing", registry=registry_for(StructConfig)).params
    assert (params["fraction"], params["every"], params["project"]) == (0.5, 5, "digits")
    assert params["level"] in ("low", "high")


def test_without_a_config_the_schema_has_the_names_and_defaults_of_the_constructor():
    class Plain(Callback):
        def __init__(self, path, *, every=2, clock=print) -> None: ...

    registry = Registry(entry_points=lambda: ())
    registry.register("plain")(Plain)
    schema = json_schema("plain", registry=registry)
    assert schema == {
        "title": "Plain",
        "type": "object",
        "properties": {"path": {}, "every": {"default": 2}, "clock": {}},
        "required": ["path"],
        "additionalProperties": False,
    }


def test_a_constructor_that_takes_anything_has_an_open_schema():
    assert json_schema("thing", registry=registry_for(None))["additionalProperties"] is True


class MixedConfig(msgspec.Struct):
    out: str | Path
    where: Path | int | None = None
    target: Target | Path = Path("x")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("out", "a string or a path"),
        ("where", "a path or an integer or null"),
        ("target", "a mapping with host or a path"),
    ],
)
def test_a_union_that_msgspec_refuses_is_told_by_its_members(key, words):
    schema = json_schema("thing", registry=registry_for(MixedConfig))
    assert describe(schema["properties"][key], schema) == words


def test_a_param_that_takes_text_or_a_path_says_so_where_it_is_wrong():
    with pytest.raises(ConfigError, match=r'"out" of callback "thing" must be a string or a path, not 3'):
        build_callbacks([{"kind": "thing", "params": {"out": 3}}], registry=registry_for(MixedConfig))
    assert example("thing", registry=registry_for(MixedConfig)).params["out"] == "..."
