"""What is followed: what stands in the list instead of a callback, and that another process can build it."""

import subprocess
import sys
import textwrap
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import pytest

from evsys_bus import CallbackSpec, follow
from evsys_bus.callback import Callback
from evsys_bus.config import Registry, build_adapter, build_callbacks
from evsys_bus.delivery.subscription import AdapterRef, DeliveryPolicy, Subscription
from evsys_bus.errors import (
    AsyncHookError,
    BadSpecError,
    BrokenAdapterError,
    ConfigErrors,
    UnknownKindError,
    UnknownParamError,
)
from evsys_bus.testing import RecordingSink

PLUGIN = """
    from pathlib import Path
    import msgspec
    from evsys_bus.callback import Callback
    from evsys_bus.sink import Sink

    class Config(msgspec.Struct):
        out: Path = Path("x")
        every: int = 1

    class Lines(Sink):
        Config = Config
        built = 0
        def __init__(self, out=Path("x"), every=1):
            type(self).built += 1
            self.out, self.every = out, every
        async def write(self, batch): ...

    class Plain(Callback):
        built = 0
        def __init__(self, **params):
            type(self).built += 1
            self.params = params

    class Follows(Plain):
        placement = "follow"
        built = 0

    class Outer:
        class Inner(Plain):
            pass
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> types.ModuleType:
    """A module that another process can import as well."""
    name = f"evsys_plugin_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    return __import__(name)


@pytest.fixture
def registry(plugin) -> Registry:
    registry = Registry(entry_points=lambda: ())
    registry.register_sink("lines")(plugin.Lines)
    for cls in (plugin.Plain, plugin.Follows, plugin.Outer.Inner):
        registry.register(cls.__name__.lower())(cls)
    return registry


class Here(Callback):
    pass


def built_by(specs, registry=None):
    """How what the specs describe is delivered to."""
    built = build_callbacks(specs) if registry is None else build_callbacks(specs, registry=registry)
    assert all(isinstance(each, Callback) for each in built)
    return [each.evsys_subscription for each in built]


class Stops(Callback):
    stops_runs: ClassVar[bool] = True


def test_a_sink_and_a_followed_callback_stand_in_the_list_as_callbacks_that_say_how_they_are_delivered_to(
    registry, plugin
):
    specs = [
        {"kind": "plain"},
        {"kind": "lines", "params": {"out": "a"}},
        {"kind": "plain", "placement": "follow", "params": {"a": [1]}},
        {"kind": "follows"},
        {"kind": "follows", "placement": "inline"},
    ]
    inline, carried, *_, kept = build_callbacks(specs, registry=registry)
    assert (type(inline), type(carried.sink), type(kept)) == (plugin.Plain, plugin.Lines, plugin.Follows)
    none, lines, plain, follows, also_none = built_by(specs, registry)
    assert (none, also_none) == (None, None)
    assert (lines.name, lines.instance, lines.policy) == ("lines", None, DeliveryPolicy())
    assert lines.adapter_ref == AdapterRef("lines", {"out": "a"}, (f"{plugin.__name__}:Lines",))
    assert (plain.name, plain.adapter_ref.params, plain.instance) == ("plain_2", {"a": [1]}, None)
    assert (follows.name, follows.adapter_ref.plugins) == ("follows", (f"{plugin.__name__}:Follows",))


def test_an_installed_kind_needs_no_plugin():
    [followed] = built_by([{"kind": "csv_metrics", "placement": "follow", "params": {"out_path": "m.csv"}}])
    assert (followed.name, followed.adapter_ref) == ("csv_metrics", AdapterRef("csv_metrics", {"out_path": "m.csv"}))
    assert build_adapter(followed.adapter_ref).name == "csv_metrics"


def test_the_terms_of_a_spec_are_those_of_its_delivery(registry):
    terms = {
        "ranks": [0, 2],
        "on_failure": "retry",
        "required": True,
        "stop_after_seconds": 60,
        "max_staleness_seconds": 0.5,
    }
    [followed] = built_by([{"kind": "follows", **terms}], registry)
    assert followed.policy == DeliveryPolicy(
        (0, 2), "retry", required=True, stop_after_seconds=60, max_staleness_seconds=0.5
    )
    [followed] = built_by([SimpleNamespace(kind="lines", ranks=None)], registry)
    assert followed.policy == DeliveryPolicy(None)
    assert CallbackSpec("lines").delivery_policy(RecordingSink) == DeliveryPolicy()
    spec = CallbackSpec("lines", ranks=(1,), required=True)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=CallbackSpec) == spec


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ranks", 0),
        ("ranks", []),
        ("ranks", [-1]),
        ("ranks", [True]),
        ("ranks", ["0"]),
        ("on_failure", "drop"),
        ("on_failure", ["dead"]),
        ("required", 1),
        ("stop_after_seconds", 0),
        ("stop_after_seconds", True),
        ("stop_after_seconds", "60"),
        ("max_staleness_seconds", -1),
        ("placement", ["follow"]),
    ],
)
def test_a_term_that_makes_no_sense_is_refused_at_its_place(registry, key, value):
    with pytest.raises(BadSpecError) as caught:
        build_callbacks([{"kind": "follows", key: value}], registry=registry)
    assert caught.value.where.path == f"$.callbacks[0].{key}"


def test_params_of_what_is_followed_are_checked_all_the_same(registry, plugin):
    with pytest.raises(ConfigErrors) as caught:
        build_callbacks(
            [{"kind": "lines", "params": {"evry": 1}}, {"kind": "lines", "name": "b", "params": {"every": "1"}}],
            registry=registry,
        )
    first, second = caught.value.errors
    assert isinstance(first, UnknownParamError)
    assert 'sink "lines" has no param "evry"' in first.what
    assert second.where.path == "$.callbacks[1].params.every"
    assert plugin.Lines.built == 0


def test_what_may_stop_the_run_refuses_to_be_followed(registry):
    registry.register("stops")(Stops)
    with pytest.raises(BadSpecError, match='"stops" cannot be placed follow') as caught:
        build_callbacks([{"kind": "stops", "placement": "follow"}], registry=registry)
    assert caught.value.where.path == "$.callbacks[0].placement"
    assert "may stop the run" in caught.value.why
    assert isinstance(build_callbacks([{"kind": "stops"}], registry=registry)[0], Stops)
    with pytest.raises(BadSpecError, match="cannot be followed"):
        follow(Stops())


@pytest.mark.parametrize(
    ("spec", "place"),
    [
        ({"kind": "lines", "placement": "inline"}, "placement"),
        ({"kind": "lines", "on_failure": "dead"}, "on_failure"),
        ({"kind": "plain", "on_failure": "dead"}, "on_failure"),
        ({"kind": "plain", "required": True}, "required"),
    ],
)
def test_a_placement_or_a_term_that_the_adapter_cannot_have_is_not_passed_over(registry, spec, place):
    with pytest.raises(BadSpecError) as caught:
        build_callbacks([spec], registry=registry)
    assert caught.value.where.path == f"$.callbacks[0].{place}"


def test_two_that_are_followed_under_one_name_are_refused(registry):
    with pytest.raises(BadSpecError, match='two callbacks are called "a"'):
        build_callbacks([follow(Here(), "a"), {"kind": "lines", "name": "a"}], registry=registry)


def test_what_no_other_process_can_import_is_constructed_here(registry):
    class Local(Callback):
        pass

    main = type("Main", (Callback,), {"__module__": "__main__"})
    notebook = types.ModuleType("evsys_made_by_hand")
    notebook.__spec__ = ModuleSpec(notebook.__name__, None)
    sys.modules[notebook.__name__] = notebook
    notebook.ByHand = type("ByHand", (RecordingSink,), {"__module__": notebook.__name__})
    try:
        registry.register("local")(Local)
        registry.register("main")(main)
        registry.register_sink("by_hand")(notebook.ByHand)
        specs = [{"kind": "local", "placement": "follow"}, {"kind": "main", "placement": "follow"}, {"kind": "by_hand"}]
        built = built_by(specs, registry)
    finally:
        del sys.modules[notebook.__name__]
    assert [each.adapter_ref for each in built] == [None, None, None]
    assert [type(each.instance) for each in built] == [Local, main, notebook.ByHand]
    assert [each.instance.spec_name for each in built] == ["local", "main", "by_hand"]


def test_a_nested_class_that_can_be_imported_has_a_recipe(registry, plugin):
    [followed] = built_by([{"kind": "inner", "placement": "follow"}], registry)
    assert followed.adapter_ref.plugins == (f"{plugin.__name__}:Outer.Inner",)


@pytest.mark.parametrize("params", [{"sink": print}, {"sizes": (1, 2)}, {"out": Path("x")}, {"text": "\ud800"}])
def test_params_that_would_not_be_the_same_in_another_process_keep_the_adapter_here(registry, plugin, params):
    [followed] = built_by([{"kind": "follows", "params": params}], registry)
    assert followed.adapter_ref is None
    assert followed.instance.params == params


def test_a_path_that_the_config_takes_as_text_travels(registry):
    [followed] = built_by([{"kind": "lines", "params": {"out": Path("a/b")}}], registry)
    assert followed.adapter_ref.params == {"out": "a/b"}
    assert build_adapter(followed.adapter_ref, registry=registry).out == Path("a/b")


def test_in_a_frozen_program_everything_is_followed_here():
    program = """
        import sys
        from evsys_bus import build_callbacks
        spec = {"kind": "csv_metrics", "placement": "follow", "params": {"out_path": "x"}}
        sys.frozen = True
        print([(each.evsys_subscription.adapter_ref, type(each).__name__) for each in build_callbacks([spec])])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[(None, 'CsvMetricsCallback')]", done.stderr


def test_a_live_object_is_followed_under_its_name_and_on_its_terms(registry):
    here, lines = Here(), registry.find("lines")()
    assert follow(here) == Subscription("Here", instance=here)
    assert follow(here, "mine", ranks=None, required=True).policy == DeliveryPolicy(None, required=True)
    carried, followed = build_callbacks([lines, follow(here, "mine")])
    assert (carried.sink, followed) == (lines, Subscription("mine", instance=here))


def test_a_hook_that_could_never_be_called_shows_when_it_is_to_be_followed():
    class Wrong(Callback):
        async def on_step_end(self, state, step_idx, batch, metrics): ...

    with pytest.raises(AsyncHookError):
        follow(Wrong())


def test_a_recipe_is_built_in_a_process_that_never_saw_the_registration(registry, plugin):
    [followed] = built_by([{"kind": "lines", "params": {"every": 3}}], registry)
    program = """
        import sys
        import msgspec
        from evsys_bus.delivery.subscription import AdapterRef
        from evsys_bus.config import build_adapter
        built = build_adapter(msgspec.json.decode(sys.argv[1], type=AdapterRef))
        print(type(built).__name__, built.every, built.name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), msgspec.json.encode(followed.adapter_ref).decode()],
        capture_output=True,
        text=True,
        cwd=Path(plugin.__file__).parent,
        check=False,
    )
    assert done.stdout.split() == ["Lines", "3", "lines"], done.stderr


def test_a_recipe_that_cannot_be_built_says_why():
    registry = Registry(entry_points=lambda: ())
    with pytest.raises(UnknownKindError):
        build_adapter(AdapterRef("nowhere"), registry=registry)
    with pytest.raises(BrokenAdapterError, match="cannot be imported"):
        build_adapter(AdapterRef("mine", plugins=("evsys_no_such_module:Mine",)), registry=registry)
    with pytest.raises(UnknownParamError):
        build_adapter(AdapterRef("csv_metrics", {"out_path": "x", "path": "y"}))
