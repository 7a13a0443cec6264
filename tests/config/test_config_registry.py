"""The registry: who may hold a kind, and what installed packages bring, with real packages on disk."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from evsys_bus.callback import Callback
from evsys_bus.config import Origin, Registry, build_callbacks
from evsys_bus.config.registry import ENTRY_POINT_GROUPS, installed_entry_points
from evsys_bus.errors import BadSpecError, BrokenAdapterError, DuplicateKindError, UnknownKindError
from evsys_bus.sink import Sink


class First(Callback):
    pass


class Second(Callback):
    pass


class Drain(Sink):
    async def write(self, batch): ...


def install(
    site: Path, package: str, entry_points: str, *, requires: str = "", group: str = ENTRY_POINT_GROUPS[0]
) -> None:
    """Put a distribution there, as an installer does."""
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    requires = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n{requires}")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry_points}\n")


def registry_of(site: Path) -> Registry:
    def entry_points():
        found = importlib.metadata.distributions(path=[str(site)])
        return [
            point for each in found for group in ENTRY_POINT_GROUPS for point in each.entry_points.select(group=group)
        ]

    return Registry(entry_points)


def empty() -> Registry:
    return Registry(entry_points=lambda: ())


def run(code: str, site: Path) -> str:
    """Run code in a Python that has the packages of ``site`` installed."""
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_R8_a_registered_class_is_built_by_its_kind():
    registry = empty()
    assert registry.register("mine")(First) is First
    [callback] = build_callbacks([{"kind": "mine"}], registry=registry)
    assert type(callback) is First


def test_R8_the_name_is_the_kind_unless_the_class_has_its_own():
    class Own(Callback):
        name = "own"

    class Heir(Own):
        pass

    class Nameless(Callback):
        pass

    registry = empty()
    for kind, cls in {"a": Own, "b": Heir, "c": Nameless}.items():
        registry.register(kind)(cls)
    assert (Own.name, Heir.name, Nameless.name, Callback.name) == ("own", "b", "c", "")


def test_R8_a_kind_is_held_by_one_class_unless_replaced():
    registry = empty()
    registry.register("mine")(First)
    registry.register("mine")(First)
    with pytest.raises(DuplicateKindError):
        registry.register("mine")(Second)
    assert registry.find("mine") is First
    registry.register("mine", replace=True)(Second)
    assert registry.find("mine") is Second


@pytest.mark.parametrize("kind", ["", None, First])
def test_a_kind_is_a_string_that_is_not_empty(kind):
    with pytest.raises(BadSpecError, match="register_callback"):
        empty().register(kind)


@pytest.mark.parametrize("thing", [First(), dict, print])
def test_what_is_no_callback_class_cannot_be_registered(thing):
    with pytest.raises(BrokenAdapterError):
        empty().register("mine")(thing)


def test_a_config_that_nothing_can_be_validated_against_cannot_be_registered():
    class Bad(Callback):
        Config = dict

    with pytest.raises(BrokenAdapterError, match="Config"):
        empty().register("mine")(Bad)


def test_R8_an_installed_package_registers_through_an_entry_point_and_only_the_one_asked_for_is_loaded(tmp_path):
    install(tmp_path, "a-plugin", "good = good_plugin:Good\nbroken = broken_plugin:Broken")
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('at import')")
    (tmp_path / "good_plugin.py").write_text(
        "from evsys_bus.callback import Callback\n"
        "class Good(Callback):\n"
        "    def __init__(self, every=1):\n"
        "        self.every = every\n"
    )
    out = run(
        "from evsys_bus.config import build_callbacks, callback_kinds\n"
        "from evsys_bus.errors import BrokenAdapterError\n"
        "kinds = callback_kinds()\n"
        "assert 'good_plugin' not in sys.modules\n"
        "[callback] = build_callbacks([{'kind': 'good', 'params': {'every': 7}}])\n"
        "try:\n"
        "    build_callbacks([{'kind': 'broken'}])\n"
        "except BrokenAdapterError as error:\n"
        "    cause = repr(error.__cause__)\n"
        "print(callback.every, kinds['broken'].target, kinds['good'].packages, cause)",
        tmp_path,
    )
    assert out == "7 broken_plugin:Broken ('a-plugin 1.0',) RuntimeError('at import')"


def test_R8_the_kind_of_an_installed_package_is_taken(tmp_path):
    install(tmp_path, "a-plugin", "mine = somewhere:Thing")
    registry = registry_of(tmp_path)
    with pytest.raises(DuplicateKindError, match=r"a-plugin 1\.0 \(somewhere:Thing\)"):
        registry.register("mine")(First)
    registry.register("mine", replace=True)(First)
    assert registry.find("mine") is First


def test_a_class_may_be_registered_under_the_kind_that_its_own_entry_point_has(tmp_path):
    install(tmp_path, "a-plugin", f"mine = {First.__module__}:First")
    registry = registry_of(tmp_path)
    registry.register("mine")(First)
    assert registry.kinds() == {"mine": Origin(f"{First.__module__}:First")}


def test_two_packages_with_one_kind_are_an_error_when_it_is_asked_for(tmp_path):
    install(tmp_path, "a-plugin", "mine = a:Thing\nother = collections:OrderedDict")
    install(tmp_path, "b-plugin", "mine = b:Thing")
    registry = registry_of(tmp_path)
    assert sorted(registry.kinds()["mine"].packages) == ["a-plugin 1.0", "b-plugin 1.0"]
    with pytest.raises(DuplicateKindError) as caught:
        build_callbacks([{"kind": "mine"}], registry=registry)
    assert "a-plugin 1.0 (a:Thing)" in caught.value.why
    assert "b-plugin 1.0 (b:Thing)" in caught.value.why
    assert caught.value.where.path == "$.callbacks[0].kind"
    with pytest.raises(BrokenAdapterError, match="not a class derived from Callback"):
        registry.find("other")


@pytest.mark.parametrize(
    ("entry_point", "requires", "install_command"),
    [
        ("vendor_thing:Logger", 'vendor-thing>=1; extra == "vendor"', 'uv add "a-plugin[vendor]"'),
        ("vendor_thing:Logger [cloud]", "", 'uv add "a-plugin[cloud]"'),
        ("vendor_thing:Logger", "", 'uv add "vendor_thing_sdk"'),
    ],
)
def test_a_missing_vendor_package_names_the_install_command(tmp_path, entry_point, requires, install_command):
    install(tmp_path, "a-plugin", f"mine = adapter_{entry_point}", requires=requires.replace("thing", "thing-sdk"))
    (tmp_path / "adapter_vendor_thing.py").write_text("import vendor_thing_sdk.deep")
    out = run(
        "from evsys_bus.config import build_callbacks\n"
        "from evsys_bus.errors import BrokenAdapterError\n"
        "try:\n"
        "    build_callbacks([{'kind': 'mine'}])\n"
        "except BrokenAdapterError as error:\n"
        "    print(error.fix)",
        tmp_path,
    )
    assert out.endswith(install_command)


def test_an_entry_point_to_a_module_that_is_not_there_is_the_packages_own_fault(tmp_path):
    install(tmp_path, "a-plugin", "mine = evsys_no_such_module.deep:Thing")
    with pytest.raises(BrokenAdapterError) as caught:
        registry_of(tmp_path).find("mine")
    assert caught.value.fix == (
        "reinstall or update the package that offers it: a-plugin 1.0 (evsys_no_such_module.deep:Thing)"
    )


def test_R7_an_unknown_kind_names_the_nearest_of_all_kinds(tmp_path):
    install(tmp_path, "a-plugin", "wandb_logger = nowhere:Thing")
    with pytest.raises(UnknownKindError, match='did you mean "wandb_logger"'):
        registry_of(tmp_path).find("wanbd_logger")


def test_installed_packages_are_read_once():
    reads = []
    registry = Registry(entry_points=lambda: reads.append(1) or [])
    registry.kinds()
    registry.register("mine")(First)
    registry.find("mine")
    assert reads == [1]


def test_importing_the_config_loads_neither_pydantic_nor_package_metadata(tmp_path):
    out = run(
        "before = set(sys.modules)\n"
        "import evsys_bus.config\n"
        "print([each for each in ('pydantic', 'importlib.metadata', 'structlog') if each in sys.modules])",
        tmp_path,
    )
    assert out == "[]"


def test_a_msgspec_config_never_imports_pydantic(tmp_path):
    install(tmp_path, "a-plugin", "mine = plugin_module:Thing")
    (tmp_path / "plugin_module.py").write_text(
        "import msgspec\n"
        "from evsys_bus.callback import Callback\n"
        "class Thing(Callback):\n"
        "    class Config(msgspec.Struct):\n"
        "        every: int = 1\n"
        "    def __init__(self, every=1): ...\n"
    )
    out = run(
        "from evsys_bus.config import build_callbacks, json_schema\n"
        "build_callbacks([{'kind': 'mine', 'params': {'every': 3}}])\n"
        "json_schema('mine')\n"
        "print('pydantic' in sys.modules)",
        tmp_path,
    )
    assert out == "False"


def test_a_spec_is_a_frozen_value_whose_label_defaults_to_the_kind():
    from evsys_bus.config import CallbackSpec

    spec = CallbackSpec("print_progress")
    assert (spec.params, spec.name, spec.placement, spec.label) == ({}, None, None, "print_progress")
    assert CallbackSpec("print_progress", name="p").label == "p"
    assert msgspec.json.decode(msgspec.json.encode(spec), type=CallbackSpec) == spec


def test_a_registered_sink_is_found_by_its_kind_and_gets_it_as_its_name():
    class Nameless(Sink):
        async def write(self, batch): ...

    registry = empty()
    assert registry.register_sink("lines")(Nameless) is Nameless
    assert (registry.find("lines"), Nameless.name, Sink.name) == (Nameless, "lines", "")


def test_a_kind_is_a_callbacks_or_a_sinks_and_never_both():
    registry = empty()
    registry.register("mine")(First)
    with pytest.raises(DuplicateKindError):
        registry.register_sink("mine")(Drain)
    registry.register_sink("drain")(Drain)
    with pytest.raises(DuplicateKindError):
        registry.register("drain")(First)


def test_a_package_may_offer_sinks_and_a_kind_that_is_both_is_an_error(tmp_path):
    target = f"{Drain.__module__}:Drain"
    install(tmp_path, "a-plugin", f"drain = {target}\nboth = {target}", group="evsys_bus.sinks")
    install(tmp_path, "b-plugin", f"both = {First.__module__}:First")
    registry = registry_of(tmp_path)
    assert registry.find("drain").__name__ == "Drain"
    assert registry.kinds()["drain"] == Origin(target, ("a-plugin 1.0",))
    with pytest.raises(DuplicateKindError):
        registry.find("both")


def test_both_groups_are_read_from_what_is_installed(tmp_path, monkeypatch):
    install(tmp_path, "a-plugin", "drain = nowhere:Drain", group="evsys_bus.sinks")
    monkeypatch.syspath_prepend(tmp_path)
    assert {"drain", "csv_metrics"} <= {point.name for point in installed_entry_points()}


@pytest.mark.parametrize(("decorate", "cls"), [("register", Drain), ("register_sink", First)])
def test_a_class_of_the_other_sort_is_refused(decorate, cls):
    with pytest.raises(BrokenAdapterError, match="not a class derived from"):
        getattr(empty(), decorate)("mine")(cls)


def test_a_sink_decorator_without_a_kind_says_how_to_write_it():
    with pytest.raises(BadSpecError, match="a sink is registered under a kind") as caught:
        empty().register_sink(Drain)
    assert "@register_sink(" in caught.value.fix
