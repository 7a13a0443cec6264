"""``build_callbacks``: validate a list of specs as a whole, then construct them in order.

The results are callbacks, so that `dispatch` can call their hooks. An adapter that is delivered to off the loop carries
its subscription (`evsys_bus.config.subscription_builder`) for the bus.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.config.registry import REGISTRY, Registry
from evsys_bus.config.spec import AdapterClass, CallbackSpec, combine_errors, individual_errors, join_path, read_spec
from evsys_bus.config.subscription_builder import (
    check_arguments,
    check_placement,
    construct,
    delivery_half,
    to_subscription,
)
from evsys_bus.delivery.subscription import SinkCallback, Subscription
from evsys_bus.errors import BadSpecError, ConfigError, Location
from evsys_bus.sink import Sink, check_sink

_BuildPlan = Callback | Subscription | tuple[CallbackSpec, AdapterClass, dict[str, Any]]
"""A callback that is ready, or the class to construct and its arguments."""


def build_callbacks(
    specs: Iterable[object] | None, *, at: str = "$.callbacks", registry: Registry = REGISTRY
) -> list[Callback | Subscription]:
    """Build callbacks from specs, in order; nothing is constructed unless all specs are valid.

    A bus delivers off the loop to adapters placed ``follow`` and to every sink. The hooks of an adapter with a delivery
    half run inline, and the bus delivers to the other half. A sink is wrapped in a callback without hooks.

    Callbacks of one kind without explicit names are named ``kind``, ``kind_2``, ``kind_3``, in order.

    Args:
        specs: Each a `CallbackSpec`, a mapping or any object with ``kind`` and ``params``; or a `Callback` or a
            `Subscription`, which are passed through; or a `Sink`. None means no callbacks.
        at: JSON path of the list; ``error.where.path`` starts with it. A caller that knows the file can replace
            ``error.where`` by a position with the line.
        registry: Where kinds are looked up.

    Raises:
        UnknownKindError: No callback has this kind.
        UnknownParamError: A key that the callback's Config does not have, even if that Config allows extra keys.
        WrongParamError: A value of the wrong type or out of range, or a required one that is missing.
        BadSpecError: Not a spec, a duplicate name, or a placement that the adapter does not support.
        DuplicateKindError: Two installed packages offer the kind.
        BrokenAdapterError: The callback cannot be imported, or its constructor raised (chained).
        ConfigErrors: Several of these.
    """
    plans, names = _plan_builds(specs, at, registry)
    return _construct_all(plans, at, set(names), registry)


def check_callbacks(specs: Iterable[object] | None, *, at: str = "$.callbacks", registry: Registry = REGISTRY) -> None:
    """Validate specs like `build_callbacks`, without constructing anything."""
    _plan_builds(specs, at, registry)


def _plan_builds(
    specs: Iterable[object] | None, at: str, registry: Registry
) -> tuple[list[_BuildPlan], dict[str, str]]:
    """Return the plans, and the explicit names with their paths."""
    if specs is None:
        return [], {}
    if isinstance(specs, str | bytes | Mapping) or hasattr(specs, "kind") or not hasattr(specs, "__iter__"):
        what = f"callbacks must be a list of specs, not a {type(cast('object', specs)).__name__}"
        raise BadSpecError(what, where=Location(at), fix="wrap it in a list")
    errors: list[ConfigError] = []
    plans: list[_BuildPlan] = []
    names: dict[str, str] = {}  # explicit name -> path
    for index, item in enumerate(specs):
        path = join_path(at, index)
        try:
            if isinstance(item, Sink):
                check_sink(item)
                item = SinkCallback(item)  # noqa: PLW2901  # the result holds only callbacks
            if isinstance(item, Callback | Subscription):
                _reserve_name(names, item.name if isinstance(item, Subscription) else item.spec_name, path, path)
                plans.append(item)
            else:
                plans.append(_plan_build(item, path, names, registry))
        except ConfigError as error:
            errors.extend(individual_errors(error))
    if errors:
        raise combine_errors(errors)
    return plans, names


def _construct_all(
    plans: list[_BuildPlan], at: str, taken: set[str], registry: Registry
) -> list[Callback | Subscription]:
    errors: list[ConfigError] = []
    built: list[Callback | Subscription] = []
    for index, plan in enumerate(plans):
        if isinstance(plan, Callback | Subscription):
            built.append(plan)
            continue
        spec, cls, arguments = plan
        label = spec.name or _unique_name(spec.kind, taken)
        subscription, half, spec_path = (
            to_subscription(spec, cls, label, registry),
            delivery_half(cls),
            join_path(at, index),
        )
        try:
            adapter = construct(spec.kind, cls, arguments, label, spec_path, registry)
            if subscription is not None and subscription.adapter_ref is None:
                live = adapter if half is None else construct(spec.kind, half, arguments, label, spec_path, registry)
                subscription = msgspec.structs.replace(subscription, instance=live)
            callback = SinkCallback(adapter) if isinstance(adapter, Sink) else adapter
            attributes: dict[str, object] = {"evsys_subscription": subscription}
            if spec.placement is not None:
                attributes["placement"] = spec.placement
            if spec.ranks is not msgspec.UNSET:
                attributes["ranks"] = spec.ranks or "all"
            for key, value in attributes.items():
                try:
                    object.__setattr__(callback, key, value)
                except AttributeError:
                    pass  # slots: the placement of its class applies
            built.append(callback)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise combine_errors(errors)
    return built


def _plan_build(
    item: object, path: str, names: dict[str, str], registry: Registry
) -> tuple[CallbackSpec, AdapterClass, dict[str, Any]]:
    """Validate one spec, and return its class and arguments."""
    spec = read_spec(item, path)
    errors: list[ConfigError] = []
    try:
        _reserve_name(names, spec.name, path, join_path(path, "name"))
    except BadSpecError as error:
        errors.append(error)
    try:
        cls = registry.find(spec.kind, Location(join_path(path, "kind")))
        errors += check_placement(spec, cls, path)
        arguments, wrong = check_arguments(cls, spec, path, registry)
        errors += wrong
        if not errors:
            return spec, cls, arguments
    except ConfigError as error:
        errors.append(error)
    raise combine_errors(errors)


def _reserve_name(names: dict[str, str], label: str | None, path: str, name_path: str) -> None:
    """Register an explicit name; raise BadSpecError if it is taken, because both would share a cursor and counters."""
    if label is None:
        return
    if label in names:
        raise BadSpecError(
            f'two callbacks are called "{label}": {names[label]} and {path}',
            where=Location(name_path),
            why="the name keys a callback's cursor and counters (default: its kind)",
            fix=f'give one of them a name of its own: name: "{label}_2"',
        )
    names[label] = path


def _unique_name(kind: str, taken: set[str]) -> str:
    """Return the kind, or the first of kind_2, kind_3, … that is not taken."""
    candidates = itertools.chain([kind], (f"{kind}_{number}" for number in itertools.count(2)))
    label = next(each for each in candidates if each not in taken)
    taken.add(label)
    return label
