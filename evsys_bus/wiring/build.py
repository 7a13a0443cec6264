"""``build_callbacks``: validate a list of specs as a whole, then construct them in order.

The results are callbacks, so that `dispatch` can call their hooks. An adapter that is delivered to off the loop carries
its subscription (`evsys_bus.wiring.followed`) for the bus.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.delivery.followed import CarriedSink, Followed
from evsys_bus.errors import BadSpecError, ConfigError, Where
from evsys_bus.sink import Sink, check_sink
from evsys_bus.wiring.construct import check_arguments, construct
from evsys_bus.wiring.followed import as_followed, check_placement, delivery_half
from evsys_bus.wiring.registry import REGISTRY, Registry
from evsys_bus.wiring.spec import AdapterClass, CallbackSpec, each_of, join, read_spec, together

_Plan = Callback | Followed | tuple[CallbackSpec, AdapterClass, dict[str, Any]]
"""A callback that is ready, or the class to construct and its arguments."""


def build_callbacks(
    specs: Iterable[object] | None, *, at: str = "$.callbacks", registry: Registry = REGISTRY
) -> list[Callback | Followed]:
    """Build callbacks from specs, in order; nothing is constructed unless all specs are valid.

    A bus delivers off the loop to adapters placed ``follow`` and to every sink. The hooks of an adapter with a delivery
    half run inline, and the bus delivers to the other half. A sink is wrapped in a callback without hooks.

    Callbacks of one kind without explicit names are named ``kind``, ``kind_2``, ``kind_3``, in order.

    Args:
        specs: Each a `CallbackSpec`, a mapping or any object with ``kind`` and ``params``; or a `Callback` or a
            `Followed`, which are passed through; or a `Sink`. None means no callbacks.
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
    plans, held = _plan_all(specs, at, registry)
    return _construct_all(plans, at, set(held), registry)


def check_callbacks(specs: Iterable[object] | None, *, at: str = "$.callbacks", registry: Registry = REGISTRY) -> None:
    """Validate specs like `build_callbacks`, without constructing anything."""
    _plan_all(specs, at, registry)


def _plan_all(specs: Iterable[object] | None, at: str, registry: Registry) -> tuple[list[_Plan], dict[str, str]]:
    """Return the plans, and the explicit names with their paths."""
    if specs is None:
        return [], {}
    if isinstance(specs, str | bytes | Mapping) or hasattr(specs, "kind") or not hasattr(specs, "__iter__"):
        what = f"callbacks must be a list of specs, not a {type(cast('object', specs)).__name__}"
        raise BadSpecError(what, where=Where(at), fix="wrap it in a list")
    errors: list[ConfigError] = []
    plans: list[_Plan] = []
    held: dict[str, str] = {}  # explicit name -> path
    for index, item in enumerate(specs):
        path = join(at, index)
        try:
            if isinstance(item, Sink):
                check_sink(item)
                item = CarriedSink(item)  # noqa: PLW2901  # the result holds only callbacks
            if isinstance(item, Callback | Followed):
                _hold(held, item.name if isinstance(item, Followed) else item.spec_name, path, path)
                plans.append(item)
            else:
                plans.append(_plan(item, path, held, registry))
        except ConfigError as error:
            errors.extend(each_of(error))
    if errors:
        raise together(errors)
    return plans, held


def _construct_all(plans: list[_Plan], at: str, taken: set[str], registry: Registry) -> list[Callback | Followed]:
    errors: list[ConfigError] = []
    built: list[Callback | Followed] = []
    for index, plan in enumerate(plans):
        if isinstance(plan, Callback | Followed):
            built.append(plan)
            continue
        spec, cls, arguments = plan
        label = spec.name or _number(spec.kind, taken)
        followed, half, place = as_followed(spec, cls, label, registry), delivery_half(cls), join(at, index)
        try:
            adapter = construct(spec.kind, cls, arguments, label, place, registry)
            if followed is not None and followed.recipe is None:
                live = adapter if half is None else construct(spec.kind, half, arguments, label, place, registry)
                followed = msgspec.structs.replace(followed, live=live)
            callback = CarriedSink(adapter) if isinstance(adapter, Sink) else adapter
            _note(callback, spec, followed)
            built.append(callback)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise together(errors)
    return built


def _note(callback: Callback, spec: CallbackSpec, followed: Followed | None) -> None:
    """Attach the subscription, placement and ranks of a spec to the callback, for the bus."""
    notes: dict[str, object] = {"evsys_subscription": followed}
    if spec.placement is not None:
        notes["placement"] = spec.placement
    if spec.ranks is not msgspec.UNSET:
        notes["ranks"] = spec.ranks or "all"
    for key, value in notes.items():
        try:
            object.__setattr__(callback, key, value)
        except AttributeError:
            pass  # slots: the placement of its class applies


def _plan(
    item: object, path: str, held: dict[str, str], registry: Registry
) -> tuple[CallbackSpec, AdapterClass, dict[str, Any]]:
    """Validate one spec, and return its class and arguments."""
    spec = read_spec(item, path)
    errors: list[ConfigError] = []
    try:
        _hold(held, spec.name, path, join(path, "name"))
    except BadSpecError as error:
        errors.append(error)
    try:
        cls = registry.find(spec.kind, Where(join(path, "kind")))
        errors += check_placement(spec, cls, path)
        arguments, wrong = check_arguments(cls, spec, path, registry)
        errors += wrong
        if not errors:
            return spec, cls, arguments
    except ConfigError as error:
        errors.append(error)
    raise together(errors)


def _hold(held: dict[str, str], label: str | None, path: str, place: str) -> None:
    """Register an explicit name; raise BadSpecError if it is taken, because both would share a cursor and counters."""
    if label is None:
        return
    if label in held:
        raise BadSpecError(
            f'two callbacks are called "{label}": {held[label]} and {path}',
            where=Where(place),
            why="the name keys a callback's cursor and counters (default: its kind)",
            fix=f'give one of them a name of its own: name: "{label}_2"',
        )
    held[label] = path


def _number(kind: str, taken: set[str]) -> str:
    """Return the kind, or the first of kind_2, kind_3, … that is not taken."""
    candidates = itertools.chain([kind], (f"{kind}_{number}" for number in itertools.count(2)))
    label = next(each for each in candidates if each not in taken)
    taken.add(label)
    return label
