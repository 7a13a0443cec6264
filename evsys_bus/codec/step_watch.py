"""Test whether a state is unchanged, apart from some numbers, so that a byte template still fits it.

The test takes a fraction of a microsecond: it compares identity first, and equality where that fails. It keeps no
reference to live objects.
"""

import functools
from collections.abc import Callable
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

from evsys_bus.codec.flat import SCALARS, NotFlat
from evsys_bus.codec.own_fields import ABSENT, CONTAINERS, own_names, own_part
from evsys_bus.codec.references import is_held
from evsys_bus.context import DetachedLoopState, LoopState


class Watch(NamedTuple):
    """The values of a state that must stay the same for a template to fit."""

    test: Callable[[Any], Callable[[Any], bool]]
    """Given ``held``, returns the function that tests whether a state still has these values."""
    held: tuple[Any, ...]
    own: tuple[str, ...] = ()
    """The custom fields that are encoded; their values may change."""
    kept: tuple[str, ...] = ()
    """The custom fields with texts and containers that are not encoded, because of their size or content."""


def watched(state: Any) -> Watch | None:
    """Return the values of a state that must stay the same; None if they cannot be compared, such as mutable values.

    Custom fields may change; of live objects only the type is compared.
    """
    if state is None:
        return NOTHING
    kind: Any = type(state)  # pyright: ignore[reportUnknownVariableType] - untyped
    if issubclass(kind, dict | DetachedLoopState):
        return None
    tests = _Tests()
    tests.add("type(state) is {}", kind)
    ctx = getattr(state, "ctx", None)
    if ctx is None:
        tests.add("getattr(state, 'ctx', None) is {}", None)
    if not tests.hold(state, "state", _HELD) or (
        ctx is not None and not tests.hold(ctx, "state.ctx", _HELD_OF_CONTEXT)
    ):
        return None
    own, kept = ([], []) if kind is LoopState else _watch_own(state, tests)
    return Watch(_compiled(tuple(tests.tests)), tuple(tests.held), tuple(own), tuple(kept))


_HELD: Final = ("num_steps", "output_dir", "stop_requested", "stop_reason", "error")
_HELD_OF_CONTEXT: Final = ("run_key", "output_dir")


class _Tests:
    """Collects the tests of a state and the expected values."""

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.held: list[object] = []

    def add(self, test: str, value: object) -> None:
        """Add a test, in which ``{}`` is a placeholder for the value."""
        self.tests.append(test.replace("{}", f"v{len(self.held)}"))
        self.held.append(value)

    def hold(self, of: object, place: str, names: tuple[str, ...]) -> bool:
        """Add tests that these attributes stay the same; False if one of them is mutable."""
        for name in names:
            value = getattr(of, name, ABSENT)
            at = f"{place}.{name}"
            if name == "output_dir" and not (_is_absolute(value) or is_held(value)):
                return False
            if isinstance(value, PurePath):
                self.add(f"({at} is {{}} or str({at}) == str({{}}))", value)
            elif type(value) in SCALARS:
                self.add(f"({at} is {{}} or (type({at}) is type({{}}) and {at} == {{}}))", value)
            elif value is not ABSENT:
                return False
        return True


def _watch_own(state: object, tests: _Tests) -> tuple[list[str], list[str]]:
    """Return the encoded custom fields and the excluded ones; add tests of the type for live objects."""
    own: list[str] = []
    kept: list[str] = []
    instance = getattr(state, "__dict__", None)
    if type(instance) is dict:
        tests.add("len(state.__dict__) == {}", len(cast("dict[Any, Any]", instance)))
    for name in own_names(state):
        value = getattr(state, name, ABSENT)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if own_part(value, name) is not ABSENT:
            own.append(name)
        elif kind in CONTAINERS or kind in SCALARS:
            kept.append(name)
        else:
            tests.add(f"type(getattr(state, {name!r}, ABSENT)) is {{}}", kind)
    return own, kept


def _is_absolute(path: Any) -> bool:
    return path is ABSENT or (isinstance(path, PurePath) and path.is_absolute()) or str(path).startswith("/")


def own_fields(state: object, watch: Watch) -> dict[str, Any]:
    """Copy the custom fields of a state that are encoded.

    Raises:
        NotFlat: They are not the same fields as when the template was built.
        AttributeError: A field is missing.
    """
    own: dict[str, Any] = {}
    for name in watch.own:
        value = getattr(state, name)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind is not float and kind is not bool and value is not None:
            value = own_part(value, name)
            if value is ABSENT:
                raise NotFlat
        own[name] = value
    for name in watch.kept:
        if own_part(getattr(state, name), name) is not ABSENT:
            raise NotFlat
    return own


def stand_in_for(state: Any, watch: Watch, step: int, own: int) -> SimpleNamespace:
    """Return an object with the values of a state, without live objects, and placeholders for what may change."""
    parts: dict[str, Any] = dict.fromkeys(() if type(state) is LoopState else own_names(state), _LIVE)
    parts |= dict.fromkeys(watch.own, own)
    for name in _HELD:
        value = getattr(state, name, ABSENT)
        if value is not ABSENT:
            parts[name] = value
    ctx = getattr(state, "ctx", None)
    if ctx is not None:
        parts["ctx"] = SimpleNamespace(**{name: getattr(ctx, name) for name in _HELD_OF_CONTEXT if hasattr(ctx, name)})
    return SimpleNamespace(step=step, **parts)


_LIVE: Final = object()


def _is_none(_: object) -> Callable[[object], bool]:
    return lambda state: state is None


NOTHING: Final = Watch(_is_none, ())
"""For steps that are published without a state."""


@functools.lru_cache(maxsize=256)
def _compiled(tests: tuple[str, ...]) -> Callable[[Any], Callable[[Any], bool]]:
    # Generated code, like the constructors of dataclasses: a loop over the names would take three times as long.
    names = ", ".join(f"v{number}" for number in range(len(tests)))
    source = f"""def test(held):
    ({names},) = held
    def fits(state):
        try:
            return {" and ".join(tests)}
        except AttributeError:
            return False
    return fits
"""
    space: dict[str, Any] = {"ABSENT": ABSENT}
    exec(source, space)  # noqa: S102 - made of identifiers
    return space["test"]
