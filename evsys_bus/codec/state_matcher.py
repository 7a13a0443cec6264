"""Test whether a state is unchanged, apart from some numbers, so that a byte template still fits it.

The test takes a fraction of a microsecond: it compares identity first, and equality where that fails. It keeps no
reference to live objects.
"""

import functools
from collections.abc import Callable
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any, Final, NamedTuple, cast

from evsys_bus.codec.custom_fields import ABSENT, CONTAINERS, custom_field_names, custom_field_value
from evsys_bus.codec.scalars import SCALARS, NeedsNormalizing
from evsys_bus.codec.wire_types import is_pinned_path
from evsys_bus.context import DetachedLoopState, LoopState


class StateMatcher(NamedTuple):
    """The values of a state that must stay the same for a template to fit."""

    build_test: Callable[[Any], Callable[[Any], bool]]
    """Given ``expected``, returns the function that tests whether a state still has these values."""
    expected: tuple[Any, ...]
    custom_fields: tuple[str, ...] = ()
    """The custom fields that are encoded; their values may change."""
    excluded_fields: tuple[str, ...] = ()
    """The custom fields with texts and containers that are not encoded, because of their size or content."""


def matcher_for(state: Any) -> StateMatcher | None:
    """Return the values of a state that must stay the same; None if they cannot be compared, such as mutable values.

    Custom fields may change; of live objects only the type is compared.
    """
    if state is None:
        return NO_STATE
    kind: Any = type(state)  # pyright: ignore[reportUnknownVariableType] - untyped
    if issubclass(kind, dict | DetachedLoopState):
        return None
    tests = _TestBuilder()
    tests.add("type(state) is {}", kind)
    ctx = getattr(state, "ctx", None)
    if ctx is None:
        tests.add("getattr(state, 'ctx', None) is {}", None)
    if not tests.add_fields(state, "state", _compared_fields(state)) or (
        ctx is not None and not tests.add_fields(ctx, "state.ctx", _COMPARED_CONTEXT_FIELDS)
    ):
        return None
    custom_fields, excluded_fields = ([], []) if kind is LoopState else _test_custom_fields(state, tests)
    return StateMatcher(
        _compile(tuple(tests.tests)), tuple(tests.expected), tuple(custom_fields), tuple(excluded_fields)
    )


_COMPARED_FIELDS: Final = ("num_steps", "output_dir", "stop_requested", "stop_reason", "error")
_COMPARED_CONTEXT_FIELDS: Final = ("run_key", "output_dir")


def _compared_fields(state: object) -> tuple[str, ...]:
    """Return the fields that must stay the same; a state without a directory may name its run itself."""
    return _COMPARED_FIELDS if hasattr(state, "output_dir") else (*_COMPARED_FIELDS, "run_key")


class _TestBuilder:
    """Collects the tests of a state and the expected values."""

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.expected: list[object] = []

    def add(self, test: str, value: object) -> None:
        """Add a test, in which ``{}`` is a placeholder for the value."""
        self.tests.append(test.replace("{}", f"v{len(self.expected)}"))
        self.expected.append(value)

    def add_fields(self, source: object, expression: str, names: tuple[str, ...]) -> bool:
        """Add tests that these attributes stay the same; False if one of them is mutable."""
        for name in names:
            value = getattr(source, name, ABSENT)
            attribute = f"{expression}.{name}"
            if name == "output_dir" and not (_is_absolute(value) or is_pinned_path(value)):
                return False
            if isinstance(value, PurePath):
                self.add(f"({attribute} is {{}} or str({attribute}) == str({{}}))", value)
            elif type(value) in SCALARS:
                self.add(f"({attribute} is {{}} or (type({attribute}) is type({{}}) and {attribute} == {{}}))", value)
            elif value is not ABSENT:
                return False
        return True


def _test_custom_fields(state: object, tests: _TestBuilder) -> tuple[list[str], list[str]]:
    """Return the encoded custom fields and the excluded ones; add tests of the type for live objects."""
    custom_fields: list[str] = []
    excluded_fields: list[str] = []
    instance = getattr(state, "__dict__", None)
    if type(instance) is dict:
        tests.add("len(state.__dict__) == {}", len(cast("dict[Any, Any]", instance)))
    for name in custom_field_names(state):
        value = getattr(state, name, ABSENT)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if custom_field_value(value, name) is not ABSENT:
            custom_fields.append(name)
        elif kind in CONTAINERS or kind in SCALARS:
            excluded_fields.append(name)
        else:
            tests.add(f"type(getattr(state, {name!r}, ABSENT)) is {{}}", kind)
    return custom_fields, excluded_fields


def _is_absolute(path: Any) -> bool:
    return path is ABSENT or (isinstance(path, PurePath) and path.is_absolute()) or str(path).startswith("/")


def read_custom_fields(state: object, matcher: StateMatcher) -> dict[str, Any]:
    """Copy the custom fields of a state that are encoded.

    Raises:
        NotFlat: They are not the same fields as when the template was built.
        AttributeError: A field is missing.
    """
    values: dict[str, Any] = {}
    for name in matcher.custom_fields:
        value = getattr(state, name)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - untyped
        if kind is not float and kind is not bool and value is not None:
            value = custom_field_value(value, name)
            if value is ABSENT:
                raise NeedsNormalizing
        values[name] = value
    for name in matcher.excluded_fields:
        if custom_field_value(getattr(state, name), name) is not ABSENT:
            raise NeedsNormalizing
    return values


def placeholder_state(state: Any, matcher: StateMatcher, step: int, custom_value: int) -> SimpleNamespace:
    """Return an object with the values of a state, without live objects, and placeholders for what may change."""
    parts: dict[str, Any] = dict.fromkeys(() if type(state) is LoopState else custom_field_names(state), _LIVE_OBJECT)
    parts |= dict.fromkeys(matcher.custom_fields, custom_value)
    for name in _compared_fields(state):
        value = getattr(state, name, ABSENT)
        if value is not ABSENT:
            parts[name] = value
    ctx = getattr(state, "ctx", None)
    if ctx is not None:
        parts["ctx"] = SimpleNamespace(
            **{name: getattr(ctx, name) for name in _COMPARED_CONTEXT_FIELDS if hasattr(ctx, name)}
        )
    return SimpleNamespace(step=step, **parts)


_LIVE_OBJECT: Final = object()


def _is_none(_: object) -> Callable[[object], bool]:
    return lambda state: state is None


NO_STATE: Final = StateMatcher(_is_none, ())
"""For steps that are published without a state."""


@functools.lru_cache(maxsize=256)
def _compile(tests: tuple[str, ...]) -> Callable[[Any], Callable[[Any], bool]]:
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
    namespace: dict[str, Any] = {"ABSENT": ABSENT}
    exec(source, namespace)  # noqa: S102 - made of identifiers
    return namespace["test"]
