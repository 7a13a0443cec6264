"""``build_callbacks``: a list of specs, checked as a whole, then constructed in order.

All of it are callbacks, so that `dispatch` can call their hooks. What is followed carries how it is delivered to
(`evsys_bus.wiring.followed`), for the bus that it is given to.
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
"""A ready callback, or what to construct and with which arguments. Any: the arguments are the callback's own."""


def build_callbacks(
    specs: Iterable[object] | None, *, at: str = "$.callbacks", registry: Registry = REGISTRY
) -> list[Callback | Followed]:
    """Build the callbacks that specs describe, in their order; nothing is constructed unless all of them are right.

    A bus delivers to what is placed ``follow``, and to every sink, off the loop; an adapter with two halves runs
    inline, and its other half is delivered to. A sink stands in the list as a callback without hooks that carries it.

    Args:
        specs: Each a `CallbackSpec`, a mapping or any object with ``kind`` and ``params``; or a `Callback` or a
            `Followed`, which are passed through; or a `Sink`, which is followed. None is no callbacks.
        at: The JSON path of the list, for errors: ``error.where.path`` starts with it. Who knows the file sets
            ``error.where`` anew, with the line.
        registry: Where kinds are looked up.

    Callbacks of one kind without names of their own are called ``kind``, ``kind_2``, ``kind_3``, in their order.

    Raises:
        UnknownKindError: No callback has this kind.
        UnknownParamError: A key that the callback's Config does not have, whatever that Config says about extra keys.
        WrongParamError: A value of the wrong type or out of range, or a required one that is missing.
        BadSpecError: Not a spec, two of them with the same name, or a placement that the adapter cannot have.
        DuplicateKindError: Two installed packages offer the kind.
        BrokenAdapterError: The callback cannot be imported, or its constructor raised (chained).
        ConfigErrors: Several of these.
    """
    plans, held = _plan_all(specs, at, registry)
    return _construct_all(plans, at, set(held), registry)


def check_callbacks(specs: Iterable[object] | None, *, at: str = "$.callbacks", registry: Registry = REGISTRY) -> None:
    """Raise what `build_callbacks` would raise before it constructs anything."""
    _plan_all(specs, at, registry)


def _plan_all(specs: Iterable[object] | None, at: str, registry: Registry) -> tuple[list[_Plan], dict[str, str]]:
    """The plans, and the names that were given."""
    if specs is None:
        return [], {}
    if isinstance(specs, str | bytes | Mapping) or hasattr(specs, "kind") or not hasattr(specs, "__iter__"):
        what = f"callbacks must be a list of specs, not a {type(cast('object', specs)).__name__}"
        raise BadSpecError(what, where=Where(at), fix="wrap it in a list")
    errors: list[ConfigError] = []
    plans: list[_Plan] = []
    held: dict[str, str] = {}  # the names that were given, and where
    for index, item in enumerate(specs):
        path = join(at, index)
        try:
            if isinstance(item, Sink):
                check_sink(item)
                item = CarriedSink(item)  # noqa: PLW2901  # all that is built are callbacks
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
    """What the spec says beyond the arguments, for the bus that the callback is given to."""
    notes: dict[str, object] = {"evsys_subscription": followed}
    if spec.placement is not None:
        notes["placement"] = spec.placement
    if spec.ranks is not msgspec.UNSET:
        notes["ranks"] = spec.ranks or "all"
    for key, value in notes.items():
        try:
            object.__setattr__(callback, key, value)
        except AttributeError:
            pass  # slots: it is placed as its class says


def _plan(
    item: object, path: str, held: dict[str, str], registry: Registry
) -> tuple[CallbackSpec, AdapterClass, dict[str, Any]]:
    """What to construct and with which arguments. Any: the arguments are the callback's own."""
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
    """Two callbacks of one name would share a cursor and counters."""
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
    """The kind, or the first of kind_2, kind_3, … that nobody has yet."""
    candidates = itertools.chain([kind], (f"{kind}_{number}" for number in itertools.count(2)))
    label = next(each for each in candidates if each not in taken)
    taken.add(label)
    return label
