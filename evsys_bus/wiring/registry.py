"""Which class a kind is: what was registered in this process, and what installed packages offer by entry point.

Kinds of callbacks and of sinks are in one namespace, so that a kind alone says which it is. An entry point is loaded
when its kind is asked for, never before, so a broken one harms nobody else.
"""

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.errors import (
    BadSpecError,
    BrokenAdapterError,
    DuplicateKindError,
    SinkMethodError,
    UnknownKindError,
    Where,
    did_you_mean,
)
from evsys_bus.sink import Sink, check_sink
from evsys_bus.wiring.extras import missing_packages, requirement
from evsys_bus.wiring.fields import is_config
from evsys_bus.wiring.spec import AdapterClass

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUPS: Final = ("evsys_bus.callbacks", "evsys_bus.sinks")
"""The entry-point groups of an installed package's adapters: ``kind = "module:Class"``."""

_A = TypeVar("_A", Callback, Sink)
_C = TypeVar("_C", bound=Callback)
_S = TypeVar("_S", bound=Sink)


class Origin(msgspec.Struct, frozen=True):
    """Where a kind comes from."""

    target: str
    """``module:Class``."""
    packages: tuple[str, ...] = ()
    """The installed packages that offer it, with versions; none if it was registered in this process. More than one is
    an error once the kind is asked for."""


def installed() -> "Iterable[EntryPoint]":
    """The entry points of the groups. The import is here because it takes longer than all of this package's."""
    import importlib.metadata

    points = importlib.metadata.entry_points()
    return [point for group in GROUPS for point in points.select(group=group)]


class Registry:
    """Kinds and their classes. Safe from any thread.

    Args:
        entry_points: Where installed callbacks are read from: once, at the first question.
    """

    def __init__(self, entry_points: "Callable[[], Iterable[EntryPoint]]" = installed) -> None:
        self._entry_points = entry_points
        self._offered: dict[str, list[EntryPoint]] | None = None
        self._registered: dict[str, AdapterClass] = {}
        self._lock = threading.Lock()

    def register(self, kind: str, *, replace: bool = False) -> Callable[[type[_C]], type[_C]]:
        """A class decorator; see `register_callback`."""
        return self._register(Callback, kind, replace=replace)

    def register_sink(self, kind: str, *, replace: bool = False) -> Callable[[type[_S]], type[_S]]:
        """A class decorator; see `register_sink`."""
        return self._register(Sink, kind, replace=replace)

    def _register(self, base: type[_A], kind: str, *, replace: bool) -> Callable[[type[Any]], type[Any]]:
        """Any: a class derived from ``base``."""
        if not isinstance(kind, str) or not kind:  # pyright: ignore[reportUnnecessaryIsInstance]  # @register without ()
            noun = base.__name__.lower()
            raise BadSpecError(
                f"a {noun} is registered under a kind, not under {kind!r:.60}",
                fix=f'write @register_{noun}("my_kind") above the class',
            )

        def decorate(cls: type[Any]) -> type[Any]:
            check_class(kind, cls, None, (base,))
            with self._lock:
                if not replace:
                    self._refuse_taken(kind, cls)
                self._registered[kind] = cls
            if "name" not in vars(cls):
                cls.name = kind
            return cls

        return decorate

    def kinds(self) -> dict[str, Origin]:
        """Every kind, sorted, and where it comes from. Loads nothing."""
        with self._lock:
            found = {kind: _origin(points) for kind, points in self._read().items()}
            found |= {kind: Origin(_target(cls)) for kind, cls in self._registered.items()}
        return dict(sorted(found.items()))

    def is_registered(self, kind: str) -> bool:
        """Whether the kind was registered in this process; another one may not know it, or may know it as another."""
        with self._lock:
            return kind in self._registered

    def find(self, kind: str, where: Where | None = None) -> AdapterClass:
        """The class of a kind.

        Raises:
            UnknownKindError: Nobody has it.
            DuplicateKindError: Two installed packages offer it.
            BrokenAdapterError: It cannot be imported, or is neither a callback's class nor a sink's.
        """
        with self._lock:
            registered = self._registered.get(kind)
            points = [] if registered else self._read().get(kind, [])
        if registered is not None:
            return registered
        if not points:
            hint = did_you_mean(kind, self.kinds())
            fix = f"{hint}   all kinds: evsys-bus adapters".strip()
            raise UnknownKindError(f'unknown callback kind "{kind}"', where=where, fix=fix)
        if len(points) > 1:
            raise DuplicateKindError(
                f'{len(points)} installed packages offer the callback kind "{kind}"',
                where=where,
                why="; ".join(_offer(point) for point in points),
                fix=f'uninstall all but one, or choose: register_callback("{kind}", replace=True)(TheClass)',
            )
        try:
            cls = points[0].load()
        except Exception as error:  # a wall: whatever a plugin's import raises is that plugin's fault
            raise self.broken(kind, error, where) from error
        check_class(kind, cls, where)
        return cls

    def broken(self, kind: str, error: Exception, where: Where | None) -> BrokenAdapterError:
        """The error for a callback that could not be imported or constructed; an ImportError says what to install."""
        point = self._point(kind)
        why = f"{type(error).__name__}: {error}"
        module = error.name if isinstance(error, ImportError) else None
        if module is None:
            what, fix = f'callback "{kind}" cannot be built', f"see the cause; its params: evsys-bus adapters {kind}"
        elif point is not None and f"{point.module}.".startswith(f"{module}."):
            what = f'callback "{kind}" cannot be imported'
            fix = f"reinstall or update the package that offers it: {_offer(point)}"
        else:
            wanted = requirement(module.partition(".")[0], point)
            what = f'callback "{kind}" needs a package that is not installed or does not fit: {module}'
            fix = f'pip install "{wanted}"   or: uv add "{wanted}"'
        return BrokenAdapterError(what, where=where, why=why, fix=fix)

    def missing(self, kind: str) -> list[str]:
        """The packages that an installed kind says it needs, and that are not installed here."""
        point = self._point(kind)
        return [] if point is None else missing_packages(point)

    def _point(self, kind: str) -> "EntryPoint | None":
        with self._lock:
            points = [] if kind in self._registered else self._read().get(kind, [])
        return points[0] if points else None

    def _read(self) -> "dict[str, list[EntryPoint]]":
        if self._offered is None:
            offered: dict[str, list[EntryPoint]] = {}
            for point in self._entry_points():
                offered.setdefault(point.name, []).append(point)
            self._offered = offered
        return self._offered

    def _refuse_taken(self, kind: str, cls: AdapterClass) -> None:
        holder = self._registered.get(kind)
        if holder is not None:
            held = [] if holder is cls else [_target(holder)]
        else:
            held = [_offer(point) for point in self._read().get(kind, []) if point.value != _target(cls)]
        if held:
            raise DuplicateKindError(
                f'callback kind "{kind}" is registered already',
                why=f"held by {'; '.join(held)}",
                fix=f'choose another kind, or take it over: register_callback("{kind}", replace=True)',
            )


def check_class(
    kind: str, cls: object, where: Where | None, bases: tuple[AdapterClass, ...] = (Callback, Sink)
) -> None:
    """Raise `BrokenAdapterError` unless ``cls`` is an adapter's class that can be built and delivered to."""
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        names = " or ".join(base.__name__ for base in bases)
        raise BrokenAdapterError(
            f'callback kind "{kind}" is not a class derived from {names}',
            where=where,
            why=f"it is {cls!r:.100}",
            fix=f"derive it from evsys_bus.{bases[0].__name__} and register the class itself",
        )
    config = cast("object", cls.Config)  # a plugin may have put anything there
    if config is not None and not (isinstance(config, type) and is_config(config)):
        raise BrokenAdapterError(
            f'the Config of callback "{kind}" is nothing that params can be validated against',
            where=where,
            why=f"it is {config!r:.100}",
            fix="make it a msgspec Struct, a dataclass or a pydantic model, or leave it out",
        )
    sink = cast("object", cls if issubclass(cls, Sink) else cls.delivery)
    if sink is None:
        return
    if not (isinstance(sink, type) and issubclass(sink, Sink)):
        what, why = f'the delivery half of callback "{kind}" is no class derived from Sink', f"it is {sink!r:.100}"
        raise BrokenAdapterError(what, where=where, why=why, fix="write `delivery = TheSink`, its class")
    try:
        check_sink(sink)
    except SinkMethodError as error:
        raise BrokenAdapterError(f'sink "{kind}": {error.what}', where=where, why=error.why, fix=error.fix) from error


def _target(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _package(point: "EntryPoint") -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def _offer(point: "EntryPoint") -> str:
    return f"{_package(point)} ({point.value})"


def _origin(points: "list[EntryPoint]") -> Origin:
    return Origin(points[0].value, tuple(_package(point) for point in points))


REGISTRY: Final = Registry()
"""The registry of this process."""


def register_callback(kind: str, *, replace: bool = False) -> Callable[[type[_C]], type[_C]]:
    """Register a callback class under a kind, so that a spec can name it.

    The contract is two ClassVars: ``name`` (set to the kind if the class has none of its own) and ``Config``, what the
    params are validated against. The callback is built as ``cls(**params)``.

    Args:
        kind: The name in specs.
        replace: Take the kind over from whoever holds it, as a notebook does when a cell runs twice.

    Raises:
        DuplicateKindError: Another class, or an installed package, holds the kind.
        BrokenAdapterError: The class is no `Callback`, or its ``Config`` is nothing that can be validated against.

    Example:
        >>> @register_callback("doctest_loss")
        ... class PrintLoss(Callback):
        ...     def __init__(self, every: int = 1) -> None:
        ...         self.every = every
        >>> from evsys_bus.wiring import build_callbacks
        >>> [callback] = build_callbacks([{"kind": "doctest_loss", "params": {"every": 5}}])
        >>> callback.every
        5
    """
    return REGISTRY.register(kind, replace=replace)


def register_sink(kind: str, *, replace: bool = False) -> Callable[[type[_S]], type[_S]]:
    """Register a sink class under a kind, so that a spec can name it; the rules are those of `register_callback`.

    A kind is a callback's or a sink's, never both.

    Args:
        kind: The name in specs.
        replace: Take the kind over from whoever holds it, as a notebook does when a cell runs twice.

    Raises:
        DuplicateKindError: Another class, or an installed package, holds the kind.
        BrokenAdapterError: The class is no `Sink`, its ``Config`` is nothing that can be validated against, or a
            courier could not call its methods.

    Example:
        >>> @register_sink("doctest_lines")
        ... class Lines(Sink):
        ...     def __init__(self, path: str) -> None:
        ...         self.path = path
        ...
        ...     async def write(self, batch):
        ...         print(len(batch), "events for", self.path)
        >>> from evsys_bus.wiring import build_callbacks
        >>> [carrier] = build_callbacks([{"kind": "doctest_lines", "params": {"path": "lines.txt"}}])
        >>> carrier.spec_name
        'doctest_lines'
    """
    return REGISTRY.register_sink(kind, replace=replace)


def callback_kinds() -> dict[str, Origin]:
    """Every kind that a spec may name, sinks' included, sorted, and where it comes from. Loads nothing."""
    return REGISTRY.kinds()
