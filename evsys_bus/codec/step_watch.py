"""What of a state must stay as it is for its record to stay as it is, but for some numbers; and the test of that.

The test costs a fraction of a microsecond: identity first, equality where that fails. No live object is held by it.
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
    """What of a state must stay as it is for a form to hold good."""

    test: Callable[[Any], Callable[[Any], bool]]
    """Given ``held``, what says whether a state still holds that. Any: a state of any class."""
    held: tuple[Any, ...]
    own: tuple[str, ...] = ()
    """The own fields that travel; their values may change."""
    kept: tuple[str, ...] = ()
    """The containers and texts among its own fields that do not, because of their size or of what is in them."""


def watched(state: Any) -> Watch | None:
    """What of a state must stay as it is; None where that cannot be watched, as with what can change in place.

    Own fields may change; of those that are live only the type is held. Any: a state of any class.
    """
    if state is None:
        return NOTHING
    kind: Any = type(state)  # pyright: ignore[reportUnknownVariableType] - as found
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
    """The tests of a state, and what it held."""

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.held: list[object] = []

    def add(self, test: str, value: object) -> None:
        """Add a test; its ``{}`` stand for the value."""
        self.tests.append(test.replace("{}", f"v{len(self.held)}"))
        self.held.append(value)

    def hold(self, of: object, place: str, names: tuple[str, ...]) -> bool:
        """Have these attributes stay as they are; False where one of them can change in place."""
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
    """The own fields that travel, and the containers that do not; of others the type is held."""
    own: list[str] = []
    kept: list[str] = []
    instance = getattr(state, "__dict__", None)
    if type(instance) is dict:
        tests.add("len(state.__dict__) == {}", len(cast("dict[Any, Any]", instance)))
    for name in own_names(state):
        value = getattr(state, name, ABSENT)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - as found
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
    """The own fields of a state that travel, copied.

    Raises:
        NotFlat: They are not the same as when the form was made.
        AttributeError: Likewise.
    """
    own: dict[str, Any] = {}
    for name in watch.own:
        value = getattr(state, name)
        kind: Any = type(value)  # pyright: ignore[reportUnknownVariableType] - as found
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
    """An object with what a state holds, live objects apart, and these numbers for what may change.

    Any: a state of any class.
    """
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
"""Of no state."""


@functools.lru_cache(maxsize=256)
def _compiled(tests: tuple[str, ...]) -> Callable[[Any], Callable[[Any], bool]]:
    # Written out, as dataclasses write their constructors: a loop over the names would take three times as long.
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
