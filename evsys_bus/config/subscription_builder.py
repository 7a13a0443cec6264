"""Construct adapters, and describe them so that another process can construct them: their subscriptions.

The `AdapterRef` of an adapter names its kind. If the kind was registered in this process instead of by an installed
package, it also names the class (``module:Class``). An adapter that another process cannot import or construct stays a
live object. Errors of an adapter's own code are wrapped.
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

from evsys_bus.adapter import Ranks
from evsys_bus.callback import Callback, callback_name, check_hooks
from evsys_bus.codec.redact import has_credential
from evsys_bus.config.registry import REGISTRY, Registry
from evsys_bus.config.spec import AdapterClass, CallbackSpec, Placement, combine_errors, join_path
from evsys_bus.config.validate import callback_context, check_params, param_errors
from evsys_bus.delivery.subscription import AdapterRef, DeliveryPolicy, OnFailure, Subscription, normalize_ranks
from evsys_bus.diagnostics import log
from evsys_bus.errors import BadSpecError, BrokenAdapterError, ConfigError, Location, SinkMethodError
from evsys_bus.location import decode_json, encode_json
from evsys_bus.sink import Sink, check_marks, check_sink, sink_name

_MUST_RUN_INLINE: Final = "it may stop the run, and only what runs inline, inside publish, sees the live run"


def follow(
    adapter: Callback | Sink,
    name: str | None = None,
    *,
    ranks: Ranks | None = (0,),
    on_failure: OnFailure = "count",
    required: bool = False,
    stop_after_seconds: float | None = None,
    max_staleness_seconds: float | None = None,
) -> Subscription:
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
            raise BadSpecError(
                f'"{label}" cannot be followed', why=_MUST_RUN_INLINE, fix="give the callback itself to the bus"
            )
        half = delivery_half(type(adapter))
        if half is not None:
            why = f"its hooks run inline, and its delivery half, {half.__name__}, is what is delivered to"
            fix = f"build it from a spec, or give the bus both: EventBus([callback], sinks=[{half.__name__}(...)])"
            raise BadSpecError(f'"{label}" cannot be followed as a whole', why=why, fix=fix)
    policy = DeliveryPolicy(
        normalize_ranks(ranks, None), on_failure, required, stop_after_seconds, max_staleness_seconds
    )
    return Subscription(label, instance=adapter, policy=policy)


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
        return [BadSpecError(what, where=Location(join_path(path, "placement")), why=why, fix="leave placement out")]
    if delivery_half(cls) is not None:
        return []
    if placement_of(spec, cls) == "follow":
        if _stops_runs(cls):
            what = f'callback "{spec.kind}" cannot be placed follow'
            fix = "leave placement out, or write placement: inline"
            return [BadSpecError(what, where=Location(join_path(path, "placement")), why=_MUST_RUN_INLINE, fix=fix)]
        if issubclass(cls, Sink) and spec.on_failure != "count":
            what = f'"on_failure" is about hooks that raise, and sink "{spec.kind}" has no hooks'
            fix = "leave it out: the error that `write` raises decides what becomes of the batch"
            return [BadSpecError(what, where=Location(join_path(path, "on_failure")), fix=fix)]
        return _mark_errors(cls, path)
    return [
        BadSpecError(
            f'"{key}" of callback "{spec.kind}" is for callbacks that are followed, and this one runs inline',
            where=Location(join_path(path, key)),
            fix="leave it out, or add placement: follow",
        )
        for key in DeliveryPolicy.__struct_fields__
        if key != "ranks" and getattr(spec, key) != getattr(_DEFAULT_SPEC, key)
    ]


def _mark_errors(cls: AdapterClass, path: str) -> list[ConfigError]:
    try:
        check_marks(cls)
    except SinkMethodError as error:
        return [BadSpecError(error.what, where=Location(path), why=error.why, fix=error.fix)]
    return []


def to_subscription(
    spec: CallbackSpec, cls: AdapterClass, label: str, registry: Registry = REGISTRY
) -> Subscription | None:
    """Return the subscription of a spec; None if it runs inline. Without a reference, the caller sets ``live``."""
    half = delivery_half(cls)
    if placement_of(spec, cls) != "follow" and half is None:
        return None
    adapter_ref = _adapter_ref_of_spec(spec, cls, registry)
    if isinstance(adapter_ref, str):
        log().info("adapter.follows_on_a_thread", adapter=label, why=adapter_ref)
        adapter_ref = None
    build = None if adapter_ref is None else partial(build_adapter, adapter_ref, registry=registry)
    runs_inline = half is not None and spec.placement == "inline"
    return Subscription(label, adapter_ref, policy=spec.delivery_policy(cls), build=build, on_program_loop=runs_inline)


def subscription_for(adapter: Callback | Sink, name: str, registry: Registry = REGISTRY) -> Subscription:
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
            raise BadSpecError(
                f'"{name}" cannot be followed', why=_MUST_RUN_INLINE, fix='leave out placement = "follow"'
            )
    policy = DeliveryPolicy(normalize_ranks(adapter.ranks, (0,)))
    adapter_ref = _adapter_ref_of_object(adapter, registry)
    if not isinstance(adapter_ref, str):
        return Subscription(
            name, adapter_ref, policy=policy, build=partial(build_adapter, adapter_ref, registry=registry)
        )
    log().info("adapter.follows_on_a_thread", adapter=name, why=adapter_ref)
    live = adapter
    if half is not None:
        live = half(*adapter.evsys_arguments.positional, **adapter.evsys_arguments.named)
        live.spec_name = name
    return Subscription(name, instance=live, policy=policy)


def _adapter_ref_of_object(adapter: Callback | Sink, registry: Registry) -> AdapterRef | str:
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
    params = _portable_params(
        cls, {key: str(value) if isinstance(value, PurePath) else value for key, value in named.items()}
    )
    if params is None:
        return "its arguments hold live objects, or its Config does not take them"
    half: Literal["whole", "delivery"] = "whole" if delivery_half(cls) is None else "delivery"
    private, environment = has_credential(params), _from_environment(cls, usable=True)
    return AdapterRef(
        _kind_of_class(cls, registry), params, half=half, has_credentials=private, environment=environment
    )


def _kind_of_class(cls: AdapterClass, registry: Registry) -> str:
    """Return the kind if an installed package offers this class under it; else ``module:Class``."""
    try:
        known = cls.name and not registry.is_registered(cls.name) and registry.find(cls.name) is cls
    except ConfigError:
        known = False
    return cls.name if known else f"{cls.__module__}:{cls.__qualname__}"


def build_adapter(adapter_ref: AdapterRef, *, registry: Registry = REGISTRY) -> Callback | Sink:
    """Build an adapter from its reference, in a courier.

    Args:
        adapter_ref: Describes the adapter.
        registry: Where kinds are looked up.

    Raises:
        ConfigError: Like `build_callbacks`, or a plugin cannot be imported.
    """
    # One after another: two threads that import one package may each find it half imported. The timeout is there
    # because an adapter that hangs in its import must not block the others for ever.
    has_lock = _build_lock.acquire(timeout=BUILD_SECONDS)
    try:
        for plugin in adapter_ref.plugins:
            path = plugin.partition(":")[2]
            found = _import_object(adapter_ref.kind, plugin)  # which registers the kind, or is the class itself
            if path and not registry.is_registered(adapter_ref.kind):
                is_sink = isinstance(found, type) and issubclass(found, Sink)
                getattr(registry, "register_sink" if is_sink else "register")(adapter_ref.kind, replace=True)(found)
        cls = (
            _import_object(adapter_ref.kind, adapter_ref.kind)
            if ":" in adapter_ref.kind
            else registry.find(adapter_ref.kind)
        )
        # The params are completed by those that only the program's environment had.
        local_names = _from_environment(cls) if adapter_ref.environment else {}
        inherited = {name: value for name, value in adapter_ref.environment.items() if name not in local_names}
        spec = CallbackSpec(
            adapter_ref.kind,
            inherited
            | {name: value for name, value in adapter_ref.params.items() if value is not None or name not in inherited},
        )
        arguments, errors = check_arguments(cls, spec, "$", registry)
        if errors:
            raise combine_errors(errors)
        half = delivery_half(cls) if adapter_ref.half == "delivery" else None
        return construct(adapter_ref.kind, half or cls, arguments, spec.label, "$", registry)
    finally:
        if has_lock:
            _build_lock.release()


def _stops_runs(cls: AdapterClass) -> bool:
    return getattr(cls, "stops_runs", False) is True


def _adapter_ref_of_spec(spec: CallbackSpec, cls: AdapterClass, registry: Registry) -> AdapterRef | str:
    """Return the adapter reference of a spec, or the reason why there is none."""
    if not sys.executable or getattr(sys, "frozen", False):
        return "this program has no interpreter that could be started again"
    plugins = ()
    if registry.is_registered(spec.kind):
        if not _is_importable(cls):
            return f"no other process can import {cls.__module__}:{cls.__qualname__}"
        plugins = (f"{cls.__module__}:{cls.__qualname__}",)
    half: Literal["whole", "delivery"] = "whole" if delivery_half(cls) is None else "delivery"
    params = _portable_params(cls, spec.params)
    if params is None:
        return "its params hold live objects"
    return AdapterRef(spec.kind, params, plugins, half, environment=_from_environment(cls, usable=True))


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
        found = {} if has_credential(found) else found
    return found


def _portable_params(cls: AdapterClass, params: dict[str, Any]) -> dict[str, Any] | None:
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
    if cls.__module__ == "__main__" or module is None or not _is_findable(cls.__module__):
        return False
    found: object = module
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls


def _is_findable(module: str) -> bool:
    """Whether the import system finds the file of a module; not so for modules created by a notebook or a test."""
    spec = getattr(sys.modules[module], "__spec__", None)
    parent = module.rpartition(".")[0]
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    if spec is None or (parent and (path is None or not _is_findable(parent))):
        return False
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    found = next((each for finder in finders if finder and (each := finder(module, path))), None)
    return found is not None and found.origin == spec.origin


def _import_object(kind: str, target: str) -> Any:
    """Import the class that ``module:Class`` names, or the module."""
    module, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in filter(None, path.split(".")):
            found = getattr(found, part)
    except Exception as error:  # isolation: the import of a plugin may raise anything
        raise BrokenAdapterError(
            f'"{target}", which offers the callback "{kind}", cannot be imported',
            why=f"{type(error).__name__}: {error}",
            fix=f'see the cause: python -c "import {module}"',
        ) from error
    return found


_DEFAULT_SPEC: Final = CallbackSpec("")

BUILD_SECONDS: Final = 10.0
"""Time that an adapter may take to be built before the next one is built concurrently."""
_build_lock: Final = threading.Lock()


def check_arguments(
    cls: AdapterClass, spec: CallbackSpec, path: str, registry: Registry
) -> tuple[dict[str, Any], list[ConfigError]]:
    """Convert the params of a spec to keyword arguments; return them, and errors of params and missing packages.

    Raises:
        BrokenAdapterError: The adapter's Config raised (chained).
    """
    params_path = join_path(path, "params")
    try:
        arguments, issues = check_params(cls, spec.params)
        issue_errors: list[ConfigError] = []
        if issues:
            context = callback_context(spec.kind, cls)
            issue_errors = param_errors(context, spec.params, issues, lambda path: join_path(params_path, *path))
    except Exception as error:  # isolation: a Config may run its author's code, which may raise anything
        raise registry.broken_adapter_error(spec.kind, error, Location(params_path)) from error
    return arguments, [*_missing_package_errors(spec.kind, path, registry), *issue_errors]


def _missing_package_errors(kind: str, path: str, registry: Registry) -> list[ConfigError]:
    """Report missing packages of the kind now, before its constructor fails, perhaps in another process."""
    missing = registry.uninstalled_packages(kind)
    if not missing:
        return []
    cause = ModuleNotFoundError(f"{' and '.join(missing)} not installed", name=missing[0])
    error = registry.broken_adapter_error(kind, cause, Location(join_path(path, "kind")))
    error.__cause__ = cause
    return [error]


def construct(
    kind: str, cls: AdapterClass, arguments: dict[str, Any], label: str, path: str, registry: Registry
) -> Callback | Sink:
    """Construct an adapter and set its name to the label.

    Raises:
        BrokenAdapterError: Its constructor raised (chained).
    """
    try:
        adapter = cls(**arguments)
    except Exception as error:  # isolation: a constructor may raise anything
        raise registry.broken_adapter_error(kind, error, Location(path)) from error
    try:
        adapter.spec_name = label
    except AttributeError:
        pass  # slots or frozen: the name of its class is used
    return adapter
