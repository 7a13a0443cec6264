"""`build_callbacks`: what may stand in the list, what is passed to the constructor, and that nothing wrong gets by."""

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import msgspec
import pydantic
import pytest

from evsys_bus.callback import Callback, callback_name
from evsys_bus.config import CallbackSpec, Registry, build_callbacks
from evsys_bus.errors import (
    BadSpecError,
    BrokenAdapterError,
    ConfigError,
    ConfigErrors,
    UnknownKindError,
    UnknownParamError,
    WrongParamError,
)


class Colour(enum.Enum):
    RED = "red"


class Target(msgspec.Struct, tag="target"):
    """Lenient on purpose: it does not forbid unknown fields."""

    host: str
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 80


class Extras(TypedDict, total=False):
    note: str


class StructConfig(msgspec.Struct):
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    rate: float = 0.5
    out: Path = Path("x.csv")
    colour: Colour = Colour.RED
    mode: Literal["online", "offline"] = "online"
    keys: list[str] = []
    target: Target | None = None
    targets: dict[str, list[Target]] = {}
    extras: Extras = {}
    on_full: Callable[[], None] | None = None


@dataclasses.dataclass
class DataTarget:
    host: str
    port: int = 80


@dataclasses.dataclass
class DataConfig:
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    rate: float = 0.5
    out: Path = Path("x.csv")
    colour: Colour = Colour.RED
    target: DataTarget | None = None
    computed: int = dataclasses.field(init=False, default=3)


class ModelTarget(pydantic.BaseModel):
    host: str
    port: int = 80


class ModelConfig(pydantic.BaseModel, extra="allow"):
    every: int = pydantic.Field(1, ge=1)
    rate: float = 0.5
    out: Path = Path("x.csv")
    colour: Colour = Colour.RED
    target: ModelTarget | None = None
    on_full: Callable[[], None] | None = None


@pydantic.dataclasses.dataclass
class ModelDataConfig:
    every: int = pydantic.Field(1, ge=1)
    rate: float = 0.5
    out: Path = Path("x.csv")
    colour: Colour = Colour.RED
    target: ModelTarget | None = None


CONFIGS = [StructConfig, DataConfig, ModelConfig, ModelDataConfig]


class Recorder(Callback):
    def __init__(self, **params: Any) -> None:
        self.params = params


def registry_with(*classes: type[Callback]) -> Registry:
    registry = Registry(entry_points=lambda: ())
    for cls in classes:
        registry.register(cls.__name__.lower())(cls)
    return registry


def registry_for(config: type | None) -> Registry:
    class Thing(Recorder):
        Config: ClassVar[type | None] = config

    return registry_with(Thing)


def built(config: type | None, **params: Any) -> dict[str, Any]:
    [callback] = build_callbacks([{"kind": "thing", "params": params}], registry=registry_for(config))
    assert isinstance(callback, Recorder)
    return callback.params


def refused(config: type | None, **params: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        built(config, **params)
    return caught.value


@pytest.mark.parametrize("specs", [None, [], (), iter([])])
def test_R7_no_specs_are_no_callbacks(specs):
    assert build_callbacks(specs) == []


@pytest.mark.parametrize(
    "spec",
    [
        CallbackSpec("thing", {"every": 2}),
        {"kind": "thing", "params": {"every": 2}},
        MappingProxyType({"kind": "thing", "params": MappingProxyType({"every": 2})}),
        SimpleNamespace(kind="thing", params={"every": 2}, unrelated=1),
    ],
)
def test_R7_a_spec_is_a_struct_a_mapping_or_any_object_with_kind_and_params(spec):
    [callback] = build_callbacks([spec], registry=registry_for(StructConfig))
    assert callback.params == {"every": 2}
    assert callback.spec_name == "thing"


def test_callbacks_of_one_kind_are_numbered_where_they_have_no_names_of_their_own():
    registry = Registry(entry_points=lambda: ())
    registry.register("thing")(type("Thing", (Callback,), {}))
    specs = [{"kind": "thing"}, {"kind": "thing", "name": "thing_2"}, {"kind": "thing"}]
    assert [each.spec_name for each in build_callbacks(specs, registry=registry)] == ["thing", "thing_2", "thing_3"]


def test_a_name_in_the_spec_is_what_the_callback_is_called():
    registry = registry_for(StructConfig)
    first, second = build_callbacks(
        [CallbackSpec("thing", name="a"), CallbackSpec("thing", name="b")], registry=registry
    )
    assert (callback_name(first), callback_name(second)) == ("a", "b")


def test_R4_a_ready_callback_is_passed_through_in_its_place():
    ready = Recorder()
    callbacks = build_callbacks([{"kind": "thing"}, ready, {"kind": "thing", "name": "b"}], registry=registry_for(None))
    assert callbacks[1] is ready
    assert [callback_name(each) for each in callbacks] == ["thing", "Recorder", "b"]


def test_a_callback_with_slots_is_built_without_the_name():
    class Slotted:
        __slots__ = ()

        def __setattr__(self, name, value):
            raise AttributeError(name)

    class Fixed(Slotted, Callback):
        pass

    [callback] = build_callbacks([{"kind": "fixed"}], registry=registry_with(Fixed))
    assert callback_name(callback) == "Fixed"


@pytest.mark.parametrize("config", CONFIGS)
def test_R7_the_constructor_gets_the_given_keys_as_the_config_converted_them(config):
    assert built(config, every=3, rate=1, out="run.csv", colour="red") == {
        "every": 3,
        "rate": 1.0,
        "out": Path("run.csv"),
        "colour": Colour.RED,
    }
    assert built(config, out=Path("y"), colour=Colour.RED) == {"out": Path("y"), "colour": Colour.RED}
    assert built(config) == {}
    assert isinstance(built(config, rate=1)["rate"], float)
    assert built(config, target={"host": "h"})["target"].port == 80


@pytest.mark.parametrize("config", [StructConfig, ModelConfig])
def test_a_live_object_given_from_python_stays_what_it_is(config):
    def on_full() -> None: ...

    assert built(config, on_full=on_full, every=2) == {"on_full": on_full, "every": 2}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("every", "1"),
        ("every", True),
        ("every", 1.5),
        ("every", None),
        ("every", 0),
        ("rate", "0.5"),
        ("rate", True),
        ("out", 3),
        ("colour", "blue"),
        ("target", 7),
        ("target", {"host": 1}),
    ],
)
def test_R7_a_wrong_type_or_a_value_out_of_range_fails_and_names_the_place(config, key, value):
    error = refused(config, **{key: value})
    assert isinstance(error, WrongParamError)
    assert error.where.path == f"$.callbacks[0].params.{key}" + (".host" if isinstance(value, dict) else "")


@pytest.mark.parametrize("config", CONFIGS)
def test_R7_unknown_key_fails_whatever_config_says(config):
    error = refused(config, evry=3)
    assert isinstance(error, UnknownParamError)
    assert error.where.path == "$.callbacks[0].params.evry"
    assert 'did you mean "every"?' in error.fix


@pytest.mark.parametrize("config", CONFIGS)
def test_R7_an_unknown_key_inside_a_nested_value_fails_whatever_config_says(config):
    error = refused(config, target={"host": "h", "prt": 1})
    assert isinstance(error, UnknownParamError)
    assert error.where.path == "$.callbacks[0].params.target.prt"
    assert 'did you mean "port"?' in error.fix


def test_R7_unknown_keys_are_found_in_lists_in_mappings_and_in_typed_dicts():
    error = refused(
        StructConfig, targets={"a": [{"host": "h"}, {"host": "h", "prt": 1}]}, extras={"note": "n", "nota": "m"}
    )
    assert isinstance(error, ConfigErrors)
    assert [each.where.path for each in error.errors] == [
        "$.callbacks[0].params.targets.a[1].prt",
        "$.callbacks[0].params.extras.nota",
    ]


class MixedStruct(msgspec.Struct):
    out: str | Path = "x"
    places: dict[str, list[str | Path] | None] = {}
    pair: tuple[int | Path, ...] = ()
    colour: Colour | str | None = None
    limited: Annotated[int | Path, msgspec.Meta(description="either")] = 1
    target: Target | Path = Path("t")
    inner: "MixedStruct | None" = None
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    on_full: Callable[[], None] | str | None = None

    def __post_init__(self) -> None:
        if self.out == "forbidden":
            raise ValueError("out must not be forbidden")


@dataclasses.dataclass
class MixedData:
    out: str | Path = "x"
    places: dict[str, list[str | Path] | None] = dataclasses.field(default_factory=dict)
    pair: tuple[int | Path, ...] = ()
    colour: Colour | str | None = None
    limited: Annotated[int | Path, msgspec.Meta(description="either")] = 1
    target: DataTarget | Path = Path("t")
    inner: "MixedData | None" = None
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    on_full: Callable[[], None] | str | None = None

    def __post_init__(self) -> None:
        if self.out == "forbidden":
            raise ValueError("out must not be forbidden")


MIXED = [MixedStruct, MixedData]


@pytest.mark.parametrize("config", MIXED)
@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        ("out", "y", "y"),
        ("out", Path("y"), Path("y")),
        ("places", {"a": ["b", Path("c")], "d": None}, {"a": ["b", Path("c")], "d": None}),
        ("pair", [1, "p"], (1, Path("p"))),
        ("colour", "red", Colour.RED),
        ("colour", "mauve", "mauve"),
        ("colour", None, None),
        ("limited", 2, 2),
        ("limited", "p", Path("p")),
        ("target", "t", Path("t")),
        ("every", 3, 3),
        ("on_full", print, print),
        ("on_full", "stop", "stop"),
    ],
)
def test_R7_a_union_that_msgspec_refuses_takes_what_any_of_its_members_takes(config, key, value, made):
    got = built(config, **{key: value})[key]
    assert (got, type(got)) == (made, type(made))
    inner = built(config, inner={key: value})["inner"]
    assert (type(inner), getattr(inner, key)) == (config, made)


@pytest.mark.parametrize("config", MIXED)
@pytest.mark.parametrize(
    ("params", "place"),
    [
        ({"out": 5}, "out"),
        ({"out": None}, "out"),
        ({"out": ["y"]}, "out"),
        ({"places": {"a": ["b", 5]}}, "places.a[1]"),
        ({"pair": [1, True]}, "pair[1]"),
        ({"pair": [1.5]}, "pair[0]"),
        ({"colour": 1}, "colour"),
        ({"limited": True}, "limited"),
        ({"target": {"host": 1}}, "target"),
        ({"target": {}}, "target"),
        ({"every": 0}, "every"),
        ({"every": "1", "out": "y"}, "every"),
        ({"inner": {"out": 5}}, "inner.out"),
        ({"inner": 5}, "inner"),
        ({"inner": {"out": "forbidden"}}, "inner"),
        ({"on_full": 5}, "on_full"),
    ],
)
def test_R7_a_union_that_msgspec_refuses_stays_strict(config, params, place):
    error = refused(config, **params)
    assert isinstance(error, WrongParamError)
    assert error.where.path == f"$.callbacks[0].params.{place}"


@pytest.mark.parametrize("config", MIXED)
def test_R7_unknown_keys_beside_and_inside_a_union_that_msgspec_refuses_fail(config):
    assert refused(config, otu="y").where.path == "$.callbacks[0].params.otu"
    assert refused(config, inner={"otu": "y"}).where.path == "$.callbacks[0].params.inner.otu"
    error = refused(config, target={"host": "h", "prt": 1})
    assert isinstance(error, UnknownParamError)
    assert error.where.path == "$.callbacks[0].params.target.prt"
    assert refused(config, out="forbidden").why == "out must not be forbidden"


def test_R7_the_member_of_a_union_that_has_a_place_for_every_key_is_taken():
    @dataclasses.dataclass
    class Other:
        host: str
        user: str = "me"

    @dataclasses.dataclass
    class Either:
        target: DataTarget | Other | None = None

    assert built(Either, target={"host": "h", "user": "you"})["target"] == Other("h", "you")
    assert built(Either, target={"host": "h", "port": 1})["target"] == DataTarget("h", 1)


def test_the_tag_tells_the_structs_of_a_union_apart_where_msgspec_refuses_it():
    class First(msgspec.Struct, tag=1):
        out: str | Path = "x"

    class Second(msgspec.Struct, tag=2):
        out: str | Path = "x"

    class Tagged(msgspec.Struct):
        part: First | Second | Path = Path("p")

    assert built(Tagged, part={"type": 2, "out": "y"})["part"] == Second("y")
    assert built(Second, type=2, out="y") == {"out": "y"}
    assert isinstance(refused(Tagged, part={"type": 3}), WrongParamError)


def test_a_required_key_that_is_missing_beside_a_union_that_msgspec_refuses_is_named():
    class Needy(msgspec.Struct):
        out: str | Path
        every: int

    error = refused(Needy, out="y")
    assert 'needs "every"' in error.what


def test_a_pydantic_root_model_has_no_keys_of_its_own():
    class Weights(pydantic.RootModel[dict[str, ModelTarget]]):
        pass

    class Weighted(pydantic.BaseModel):
        weights: Weights

    assert built(Weighted, weights={"any": {"host": "h"}})["weights"].root["any"].host == "h"
    error = refused(Weighted, weights={"any": {"host": "h", "prt": 1}})
    assert error.where.path == "$.callbacks[0].params.weights.any.prt"


def test_the_tag_of_a_struct_is_no_unknown_key():
    assert built(StructConfig, target={"type": "target", "host": "h"})["target"] == Target("h")
    assert built(Target, type="target", host="h") == {"host": "h"}


def test_a_pydantic_alias_is_the_key_and_the_field_is_the_argument():
    class Aliased(pydantic.BaseModel):
        every_steps: int = pydantic.Field(1, alias="every")

    assert built(Aliased, every=4) == {"every_steps": 4}
    assert isinstance(refused(Aliased, every_steps=4), UnknownParamError)


def test_a_renamed_struct_field_is_given_by_its_renamed_key():
    class Renamed(msgspec.Struct, rename="camel"):
        flush_seconds: float = 1.0

    assert built(Renamed, flushSeconds=2) == {"flush_seconds": 2.0}


def test_a_field_that_the_dataclass_computes_cannot_be_given():
    assert isinstance(refused(DataConfig, computed=4), UnknownParamError)


def test_a_check_of_the_whole_config_is_reported_at_the_params():
    class Ordered(msgspec.Struct):
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low must not exceed high")

    error = refused(Ordered, low=3)
    assert isinstance(error, WrongParamError)
    assert (error.where.path, error.why) == ("$.callbacks[0].params", "low must not exceed high")


def test_every_wrong_param_is_found_in_one_pass():
    for config in CONFIGS:
        error = refused(config, every=0, rate="fast", colur="red")
        assert isinstance(error, ConfigErrors)
        assert sorted(each.where.path.rpartition(".")[2] for each in error.errors) == ["colur", "every", "rate"]


def test_every_missing_param_is_found_beside_the_wrong_ones():
    class Both(msgspec.Struct):
        host: str
        user: str
        port: int = 80

    error = refused(Both, port="x")
    assert isinstance(error, ConfigErrors)
    assert [each.what.partition('"thing" ')[2][:12] for each in error.errors] == [
        'needs "host"',
        'needs "user"',
        "must be an i",
    ]


def test_errors_of_several_specs_come_in_one_pass_and_nothing_is_constructed():
    made = []

    class Thing(Callback):
        def __init__(self, every: int = 1) -> None:
            made.append(every)

    specs = [{"kind": "thing"}, {"kind": "think"}, {"kind": "thing", "name": "b", "params": {"evry": 1}}, 3]
    with pytest.raises(ConfigErrors) as caught:
        build_callbacks(specs, at="$.logging.callbacks", registry=registry_with(Thing))
    assert [(type(each), each.where.path) for each in caught.value.errors] == [
        (UnknownKindError, "$.logging.callbacks[1].kind"),
        (UnknownParamError, "$.logging.callbacks[2].params.evry"),
        (BadSpecError, "$.logging.callbacks[3]"),
    ]
    assert made == []


def test_R7_without_a_config_the_keys_are_those_of_the_constructor():
    class Plain(Callback):
        def __init__(self, path: str, *, every: int = 1) -> None:
            self.got = (path, every)

    registry = registry_with(Plain)
    [callback] = build_callbacks([{"kind": "plain", "params": {"path": "p"}}], registry=registry)
    assert callback.got == ("p", 1)
    with pytest.raises(ConfigErrors) as caught:
        build_callbacks([{"kind": "plain", "params": {"evry": 2}}], registry=registry)
    assert [type(each) for each in caught.value.errors] == [UnknownParamError, WrongParamError]
    assert built(None, anything=1) == {"anything": 1}, "a constructor with **kwargs takes any key"


def test_a_misspelt_required_key_is_one_error_and_not_two():
    error = refused(Target, hots="h")
    assert isinstance(error, UnknownParamError)
    nested = refused(StructConfig, target={"hots": "h"})
    assert isinstance(nested, UnknownParamError)
    assert nested.fix.startswith('did you mean "host"?')


def test_a_constructor_that_raises_is_a_broken_adapter_with_its_cause():
    class Picky(Callback):
        def __init__(self) -> None:
            raise RuntimeError("no such device")

    with pytest.raises(BrokenAdapterError) as caught:
        build_callbacks([{"kind": "picky"}], registry=registry_with(Picky))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.where.path == "$.callbacks[0]"


def test_a_config_that_raises_something_odd_is_a_broken_adapter():
    class Odd(msgspec.Struct):
        def __post_init__(self) -> None:
            raise KeyError("odd")

    assert isinstance(refused(Odd), BrokenAdapterError)


@pytest.mark.parametrize("specs", ["thing", {"kind": "thing"}, CallbackSpec("thing"), 3])
def test_something_else_than_a_list_is_refused(specs):
    with pytest.raises(BadSpecError) as caught:
        build_callbacks(specs, registry=registry_for(None))
    assert caught.value.where.path == "$.callbacks"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"kind": ""}, ".kind"),
        ({"kind": 3}, ".kind"),
        ({"params": {}}, ""),
        ({"kind": "thing", "params": [1]}, ".params"),
        ({"kind": "thing", "name": 3}, ".name"),
        ({"kind": "thing", "placement": "online"}, ".placement"),
        ({"kind": "thing", "placement": ["inline"]}, ".placement"),
        ({"kind": "thing", "every": 3}, ".every"),
        ({"kind": "thing", 3: 3}, '["3"]'),
        (CallbackSpec("thing", placement="beside"), ".placement"),
        (Recorder, ""),
    ],
)
def test_R7_a_malformed_spec_fails_and_names_the_place(spec, path):
    with pytest.raises(BadSpecError) as caught:
        build_callbacks([spec], registry=registry_for(StructConfig))
    assert caught.value.where.path == f"$.callbacks[0]{path}"


def test_a_ready_callback_that_was_built_from_a_spec_holds_its_name():
    registry = registry_for(None)
    [ready] = build_callbacks([{"kind": "thing"}], registry=registry)
    assert [each.spec_name for each in build_callbacks([{"kind": "thing"}, ready], registry=registry)] == [
        "thing_2",
        "thing",
    ]
    with pytest.raises(BadSpecError, match=r"\$\.callbacks\[0\] and \$\.callbacks\[1\]"):
        build_callbacks([ready, {"kind": "thing", "name": "thing"}], registry=registry)
