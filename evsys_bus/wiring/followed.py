"""Build subscriptions, and describe adapters so that another process can build them.

A `Recipe` of an adapter names its kind. If the kind was registered in this process instead of by an installed package,
it also names the class (``module:Class``). An adapter that another process cannot import or construct stays a live
object.
"""

import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import PurePath
from typing import Any, Final, Literal

import msgspec

from evsys_bus.attached import Ranks
from evsys_bus.callback import Callback, callback_name, check_hooks
from evsys_bus.codec.redaction import holds_credential
from evsys_bus.delivery.followed import Followed, OnFailure, Recipe, Terms, ranks_of
from evsys_bus.diagnostics import log
from evsys_bus.errors import BadSpecError, BrokenAdapterError, ConfigError, SinkMethodError, Where
from evsys_bus.sink import Sink, check_marks, check_sink, sink_name
from evsys_bus.where import decode_json, encode_json
from evsys_bus.wiring.construct import check_arguments, construct
from evsys_bus.wiring.params import check_params
from evsys_bus.wiring.registry import REGISTRY, Registry
from evsys_bus.wiring.spec import AdapterClass, CallbackSpec, Placement, join, together

_STOPS: Final = "it may stop the run, and only what runs inline, inside publish, sees the live run"


def follow(
    adapter: Callback | Sink,
    name: str | None = None,
    *,
    ranks: Ranks | None = (0,),
    on_failure: OnFailure = "count",
    required: bool = False,
    stop_after_seconds: float | None = None,
    max_staleness_seconds: float | None = None,
) -> Followed:
    """Subscribe this object: events are delivered to it off the loop, from the journal, on a thread of this process.

    Adapters that are delivered to off the loop anyway (``placement = "follow"``, sinks, delivery halves) need no
    wrapper: the courier process delivers to them if it can rebuild them, and can so resume delivery after a restart.

    Args:
        adapter: A callback or a sink; hooks receive detached objects.
        name: Key of its cursor and counts. Default: its spec's name, or its kind, or its class.
        ranks: This and the following arguments have the same meaning as in `CallbackSpec`.

    Raises:
        SettingError: ``ranks`` is invalid.
        BadSpecError: The callback may stop the run, or has a delivery half.
        HookError: A hook, or a method of a sink, could never be called.

    Example:
        >>> class Loss(Callback):
        ...     def on_step_end(self, state, step_idx, batch, metrics): ...
        >>> follow(Loss(), "loss").name
        'loss'
    """
    if isinstance(adapter, Sink):
        label = name or sink_name(adapter)
        check_sink(adapter)
    else:
        label = name or callback_name(adapter)
        check_hooks(adapter)
        check_marks(adapter)
        if _stops_runs(type(adapter)):
            raise BadSpecError(f'"{label}" cannot be followed', why=_STOPS, fix="give the callback itself to the bus")
        half = delivery_half(type(adapter))
        if half is not None:
            why = f"its hooks run inline, and its delivery half, {half.__name__}, is what is delivered to"
            fix = f"build it from a spec, or give the bus both: EventBus([callback], sinks=[{half.__name__}(...)])"
            raise BadSpecError(f'"{label}" cannot be followed as a whole', why=why, fix=fix)
    terms = Terms(ranks_of(ranks, None), on_failure, required, stop_after_seconds, max_staleness_seconds)
    return Followed(label, live=adapter, terms=terms)


def delivery_half(cls: AdapterClass) -> type[Sink] | None:
    """Return the sink class that a courier delivers to, for an adapter with two halves; else None."""
    half = getattr(cls, "delivery", None)
    return half if isinstance(half, type) and issubclass(half, Sink) else None


def placement_of(spec: CallbackSpec, cls: AdapterClass) -> Placement:
    """Return the placement of an adapter, or of its delivery half: from the spec, else from its class."""
    if issubclass(cls, Sink):
        return "follow"
    if delivery_half(cls) is not None:
        return spec.placement or "follow"
    return spec.placement or ("follow" if getattr(cls, "placement", None) == "follow" else "inline")


def check_placement(spec: CallbackSpec, cls: AdapterClass, path: str) -> list[ConfigError]:
    """Return errors of the placement and the delivery policy in a spec."""
    if issubclass(cls, Sink) and spec.placement == "inline":
        what = f'sink "{spec.kind}" cannot be placed inline'
        why = "a sink is async, and is delivered to from the journal"
        return [BadSpecError(what, where=Where(join(path, "placement")), why=why, fix="leave placement out")]
    if delivery_half(cls) is not None:
        return []
    if placement_of(spec, cls) == "follow":
        if _stops_runs(cls):
            what = f'callback "{spec.kind}" cannot be placed follow'
            fix = "leave placement out, or write placement: inline"
            return [BadSpecError(what, where=Where(join(path, "placement")), why=_STOPS, fix=fix)]
        if issubclass(cls, Sink) and spec.on_failure != "count":
            what = f'"on_failure" says what a hook that raises means, and sink "{spec.kind}" has no hooks'
            fix = "leave it out: what `write` raises says what becomes of the batch"
            return [BadSpecError(what, where=Where(join(path, "on_failure")), fix=fix)]
        return _wrong_marks(cls, path)
    return [
        BadSpecError(
            f'"{key}" of callback "{spec.kind}" is for callbacks that are followed, and this one runs inline',
            where=Where(join(path, key)),
            fix="leave it out, or add placement: follow",
        )
        for key in Terms.__struct_fields__
        if key != "ranks" and getattr(spec, key) != getattr(_USUAL, key)
    ]


def _wrong_marks(cls: AdapterClass, path: str) -> list[ConfigError]:
    try:
        check_marks(cls)
    except SinkMethodError as error:
        return [BadSpecError(error.what, where=Where(path), why=error.why, fix=error.fix)]
    return []


def as_followed(spec: CallbackSpec, cls: AdapterClass, label: str, registry: Registry = REGISTRY) -> Followed | None:
    """Return the subscription of a spec; None if it runs inline. Without a reference, the caller sets ``live``."""
    half = delivery_half(cls)
    if placement_of(spec, cls) != "follow" and half is None:
        return None
    recipe = _recipe(spec, cls, registry)
    if isinstance(recipe, str):
        log().info("adapter.follows_on_a_thread", adapter=label, why=recipe)
        recipe = None
    build = None if recipe is None else partial(build_followed, recipe, registry=registry)
    here = half is not None and spec.placement == "inline"
    return Followed(label, recipe, terms=spec.terms(cls), build=build, here=here)


def subscription_of(adapter: Callback | Sink, name: str, registry: Registry = REGISTRY) -> Followed:
    """Return the subscription of an object that was given to a bus.

    If the class has a ``Config`` that accepts the object's arguments, the courier process rebuilds the object and
    delivers to that; else events are delivered to the object itself, on a thread of this process.

    Args:
        adapter: A sink, a callback placed ``follow``, or one with a delivery half.
        name: Key of its cursor and counts.
        registry: Where kinds are looked up.

    Raises:
        HookError: A hook, or a method of a sink, could never be called.
        BadSpecError: The callback may stop the run, and so must run inline.
    """
    cls = type(adapter)
    half = delivery_half(cls)
    if isinstance(adapter, Sink):
        check_sink(adapter)
    elif half is None:
        check_hooks(adapter)
        check_marks(adapter)
        if _stops_runs(cls):
            raise BadSpecError(f'"{name}" cannot be followed', why=_STOPS, fix='leave out placement = "follow"')
    terms = Terms(ranks_of(adapter.ranks, (0,)))
    recipe = _recipe_of_object(adapter, registry)
    if not isinstance(recipe, str):
        return Followed(name, recipe, terms=terms, build=partial(build_followed, recipe, registry=registry))
    log().info("adapter.follows_on_a_thread", adapter=name, why=recipe)
    live = adapter
    if half is not None:
        live = half(*adapter.evsys_arguments.positional, **adapter.evsys_arguments.named)
        live.spec_name = name
    return Followed(name, live=live, terms=terms)


def _recipe_of_object(adapter: Callback | Sink, registry: Registry) -> Recipe | str:
    """Return the adapter reference, from the recorded arguments of the object, or the reason why there is none."""
    cls = type(adapter)
    if cls.Config is None:
        return "its class has no Config, so its arguments are not known to mean the same in another process"
    if not _is_importable(cls):
        return f"no other process can import {cls.__module__}:{cls.__qualname__}"
    try:
        bound = inspect.signature(cls).bind(*adapter.evsys_arguments.positional, **adapter.evsys_arguments.named)
    except (TypeError, ValueError) as error:
        return f"its arguments are not known: {error}"
    if any(
        each.kind is each.VAR_POSITIONAL for each in bound.signature.parameters.values() if each.name in bound.arguments
    ):
        return "it was constructed with *args"
    named: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        extra = bound.signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD
        named |= value if extra else {key: value}
    params = _portable(cls, {key: str(value) if isinstance(value, PurePath) else value for key, value in named.items()})
    if params is None:
        return "its arguments hold live objects, or its Config does not take them"
    half: Literal["whole", "delivery"] = "whole" if delivery_half(cls) is None else "delivery"
    private, environment = holds_credential(params), _from_environment(cls, usable=True)
    return Recipe(_kind_of_class(cls, registry), params, half=half, private=private, environment=environment)


def _kind_of_class(cls: AdapterClass, registry: Registry) -> str:
    """Return the kind if an installed package offers this class under it; else ``module:Class``."""
    try:
        known = cls.name and not registry.is_registered(cls.name) and registry.find(cls.name) is cls
    except ConfigError:
        known = False
    return cls.name if known else f"{cls.__module__}:{cls.__qualname__}"


def build_followed(recipe: Recipe, *, registry: Registry = REGISTRY) -> Callback | Sink:
    """Build an adapter from its reference, in a courier.

    Args:
        recipe: Describes the adapter.
        registry: Where kinds are looked up.

    Raises:
        ConfigError: Like `build_callbacks`, or a plugin cannot be imported.
    """
    # One after another: two threads that import one package may each find it half imported. The timeout is there
    # because an adapter that hangs in its import must not block the others for ever.
    alone = _building.acquire(timeout=BUILD_SECONDS)
    try:
        for plugin in recipe.plugins:
            _plug_in(recipe.kind, plugin, registry)
        cls = _imported(recipe.kind, recipe.kind) if ":" in recipe.kind else registry.find(recipe.kind)
        spec = CallbackSpec(recipe.kind, _with_environment(recipe, cls))
        arguments, errors = check_arguments(cls, spec, "$", registry)
        if errors:
            raise together(errors)
        half = delivery_half(cls) if recipe.half == "delivery" else None
        return construct(recipe.kind, half or cls, arguments, spec.label, "$", registry)
    finally:
        if alone:
            _building.release()


def _stops_runs(cls: AdapterClass) -> bool:
    return getattr(cls, "stops_runs", False) is True


def _recipe(spec: CallbackSpec, cls: AdapterClass, registry: Registry) -> Recipe | str:
    """Return the adapter reference of a spec, or the reason why there is none."""
    if not sys.executable or getattr(sys, "frozen", False):
        return "this program has no interpreter that could be started again"
    plugins = ()
    if registry.is_registered(spec.kind):
        if not _is_importable(cls):
            return f"no other process can import {cls.__module__}:{cls.__qualname__}"
        plugins = (f"{cls.__module__}:{cls.__qualname__}",)
    half: Literal["whole", "delivery"] = "whole" if delivery_half(cls) is None else "delivery"
    params = _portable(cls, spec.params)
    if params is None:
        return "its params hold live objects"
    return Recipe(spec.kind, params, plugins, half, environment=_from_environment(cls, usable=True))


def _from_environment(cls: AdapterClass, *, usable: bool = False) -> dict[str, Any]:
    """Return the params that ``Config.from_environment`` of the class reads from this process's environment.

    Args:
        cls: The class of the adapter.
        usable: Return only params with a value, and none at all if one of them is a credential.
    """
    find: Callable[[], dict[str, Any]] | None = getattr(cls.Config, "from_environment", None)
    found = {} if find is None else find()
    if usable:
        found = {name: value for name, value in found.items() if value is not None}
        found = {} if holds_credential(found) else found
    return found


def _with_environment(recipe: Recipe, cls: AdapterClass) -> dict[str, Any]:
    """Return the params, completed by those that only the program's environment had."""
    here = _from_environment(cls) if recipe.environment else {}
    kept = {name: value for name, value in recipe.environment.items() if name not in here}
    return kept | {name: value for name, value in recipe.params.items() if value is not None or name not in kept}


def _portable(cls: AdapterClass, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the params as they are read back from JSON, if the Config then gives the same result; else None."""
    try:
        plain: dict[str, Any] = decode_json(encode_json(msgspec.to_builtins(params, enc_hook=_as_text)), dict[str, Any])
        before, _ = check_params(cls, params)
        after, findings = check_params(cls, plain)
        same = not findings and msgspec.to_builtins(before, enc_hook=_as_text) == msgspec.to_builtins(
            after, enc_hook=_as_text
        )
    except Exception:  # isolation: a Config, or the __eq__ of a value, may raise anything
        return None
    if cls.Config is None:  # without a Config nothing converts them back
        same = same and plain == params
    return plain if same else None


def _as_text(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError


def _is_importable(cls: type) -> bool:
    """Whether another process with the same import path would import this very class."""
    module = sys.modules.get(cls.__module__)
    if cls.__module__ == "__main__" or module is None or not _is_found(cls.__module__):
        return False
    found: object = module
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def _is_found(module: str) -> bool:
    """Whether the import system finds the file of a module; not so for modules created by a notebook or a test."""
    spec = getattr(sys.modules[module], "__spec__", None)
    parent = module.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if spec is None or (parent and (path is None or not _is_found(parent))):
        return False
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    found = next((each for finder in finders if finder and (each := finder(module, path))), None)
    return found is not None and found.origin == spec.origin


def _plug_in(kind: str, plugin: str, registry: Registry) -> None:
    """Import the module of a plugin; if that does not register the kind, register the class that the plugin names."""
    path = plugin.partition(":")[2]
    found = _imported(kind, plugin)
    if path and not registry.is_registered(kind):
        register: Literal["register", "register_sink"] = "register_sink" if _is_sink(found) else "register"
        getattr(registry, register)(kind, replace=True)(found)


def _imported(kind: str, place: str) -> Any:
    """Import the class that ``module:Class`` names, or the module."""
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in filter(None, path.split(".")):
            found = getattr(found, part)
    except Exception as error:  # isolation: the import of a plugin may raise anything
        raise BrokenAdapterError(
            f'"{place}", which offers the callback "{kind}", cannot be imported',
            why=f"{type(error).__name__}: {error}",
            fix=f'see the cause: python -c "import {module}"',
        ) from error
    return found


def _is_sink(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Sink)


_USUAL: Final = CallbackSpec("")

BUILD_SECONDS: Final = 10.0
"""Time that an adapter may take to be built before the next one is built concurrently."""
_building: Final = threading.Lock()
