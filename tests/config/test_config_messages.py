"""What people read when a list of callbacks is wrong: the whole text, in the one shape."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
import pytest

from evsys_bus.callback import Callback
from evsys_bus.config import Registry, build_callbacks
from evsys_bus.errors import ConfigError, Location


class Config(msgspec.Struct):
    project: str
    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    mode: Literal["online", "offline"] = "online"
    api_key: str = ""


class Logger(Callback):
    Config: ClassVar[type | None] = Config

    def __init__(self, **params: Any) -> None:
        if params["project"] == "gone":
            raise RuntimeError("no such project")
        if params["project"] == "missing":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")


def errors_of(*specs: object) -> str:
    registry = Registry(entry_points=lambda: ())
    registry.register("wandb_logger")(Logger)
    with pytest.raises(ConfigError) as caught:
        build_callbacks(specs, registry=registry)
    return str(caught.value)


def with_params(**params: Any) -> str:
    return errors_of({"kind": "wandb_logger", "params": {"project": "p"} | params})


def test_unknown_kind():
    assert errors_of({"kind": "wandb_logger", "params": {"project": "p"}}, {"kind": "wanbd_logger"}) == (
        'error[EB101]: unknown callback kind "wanbd_logger"\n'
        " --> $.callbacks[1].kind\n"
        'fix: did you mean "wandb_logger"?   all kinds: evsys-bus adapters'
    )


def test_unknown_param():
    assert with_params(evry=2) == (
        'error[EB102]: callback "wandb_logger" has no param "evry"\n'
        " --> $.callbacks[0].params.evry\n"
        'fix: did you mean "every"?   (an integer >= 1; for example every: 1)   '
        "all params: evsys-bus adapters wandb_logger"
    )


def test_unknown_param_that_is_near_no_other():
    assert with_params(zz=2) == (
        'error[EB102]: callback "wandb_logger" has no param "zz"\n'
        " --> $.callbacks[0].params.zz\n"
        "fix: known: api_key, every, mode, project   all params: evsys-bus adapters wandb_logger"
    )


def test_wrong_type():
    assert with_params(every="10") == (
        'error[EB103]: "every" of callback "wandb_logger" must be an integer >= 1, not "10"\n'
        " --> $.callbacks[0].params.every\n"
        "why: Expected `int`, got `str`\n"
        "fix: for example every: 1   all params: evsys-bus adapters wandb_logger"
    )


def test_out_of_range():
    assert with_params(every=0) == (
        'error[EB103]: "every" of callback "wandb_logger" must be an integer >= 1, not 0\n'
        " --> $.callbacks[0].params.every\n"
        "why: Expected `int` >= 1\n"
        "fix: for example every: 1   all params: evsys-bus adapters wandb_logger"
    )


def test_not_one_of_the_choices():
    assert with_params(mode="ofline") == (
        'error[EB103]: "mode" of callback "wandb_logger" must be one of "offline", "online", not "ofline"\n'
        " --> $.callbacks[0].params.mode\n"
        "why: Invalid enum value 'ofline'\n"
        'fix: did you mean "offline"?   for example mode: "online"   all params: evsys-bus adapters wandb_logger'
    )


def test_missing_required_param():
    assert errors_of({"kind": "wandb_logger"}) == (
        'error[EB103]: callback "wandb_logger" needs "project": a string\n'
        " --> $.callbacks[0].params\n"
        'fix: add project: "..."   all params: evsys-bus adapters wandb_logger'
    )


def test_not_a_spec():
    assert errors_of(3) == (
        "error[EB104]: int 3 is not a callback spec\n"
        " --> $.callbacks[0]\n"
        "fix: give a spec ({kind: print_progress, params: {every: 10}}) or an instance of a subclass of Callback "
        "or Sink"
    )


def test_params_beside_the_kind_instead_of_under_params():
    assert errors_of({"kind": "wandb_logger", "params": {"project": "p"}, "every": 3}) == (
        'error[EB104]: a callback spec has no key "every"\n'
        " --> $.callbacks[0].every\n"
        "fix: known: kind, max_staleness_seconds, name, on_failure, params, placement, ranks, required, "
        "stop_after_seconds   the callback's own parameters go under params: {every: ...}"
    )


def test_duplicate_name():
    spec = {"kind": "wandb_logger", "params": {"project": "p"}, "name": "ours"}
    assert errors_of(spec, spec) == (
        'error[EB104]: two callbacks are called "ours": $.callbacks[0] and $.callbacks[1]\n'
        " --> $.callbacks[1].name\n"
        "why: the name keys a callback's cursor and counters (default: its kind)\n"
        'fix: give one of them a name of its own: name: "ours_2"'
    )


def test_duplicate_kind():
    registry = Registry(entry_points=lambda: ())
    registry.register("wandb_logger")(Logger)
    with pytest.raises(ConfigError) as caught:
        registry.register("wandb_logger")(type("Other", (Logger,), {}))
    assert str(caught.value) == (
        'error[EB105]: callback kind "wandb_logger" is registered already\n'
        f"why: held by {__name__}:Logger\n"
        'fix: choose another kind, or take it over: register_callback("wandb_logger", replace=True)'
    )


def test_broken_adapter():
    assert with_params(project="gone") == (
        'error[EB106]: callback "wandb_logger" cannot be built\n'
        " --> $.callbacks[0]\n"
        "why: RuntimeError: no such project\n"
        "fix: see the cause; its params: evsys-bus adapters wandb_logger"
    )


def test_missing_package():
    assert with_params(project="missing") == (
        'error[EB106]: callback "wandb_logger" needs a package that is not installed or does not fit: wandb\n'
        " --> $.callbacks[0]\n"
        "why: ModuleNotFoundError: No module named 'wandb'\n"
        'fix: pip install "wandb"   or: uv add "wandb"'
    )


def test_a_credential_is_not_repeated_and_a_long_value_is_cut():
    assert "12345" not in with_params(api_key=12345)
    assert len(with_params(every="x" * 5000)) < 400


def test_who_knows_the_file_can_say_the_line():
    registry = Registry(entry_points=lambda: ())
    with pytest.raises(ConfigError) as caught:
        build_callbacks([{"kind": "nope"}], at="$.callbacks", registry=registry)
    error = caught.value
    error.where = Location(error.where.path, "sweep.yaml", 14, 11, "  - kind: nope", 4)
    assert str(error).startswith(
        'error[EB101]: unknown callback kind "nope"\n --> sweep.yaml:14:11   $.callbacks[0].kind\n'
    )
