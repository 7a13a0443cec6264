"""The registry of kinds: classes registered in this process, and entry points of installed packages.

Kinds of callbacks and sinks share one namespace, so that a kind alone identifies the class. An entry point is loaded
only when its kind is looked up, so a broken one does not affect others. An entry point may name extras,
``module:Class [extra]``: their packages are the optional dependencies of the adapter.
"""

import re
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from evsys_bus.callback import Callback
from evsys_bus.config.params_schema import Schema, adapter_schema, is_config, sample_value
from evsys_bus.config.spec import AdapterClass, CallbackSpec
from evsys_bus.errors import (
    BadSpecError,
    BrokenAdapterError,
    DuplicateKindError,
    Location,
    SinkMethodError,
    UnknownKindError,
    did_you_mean,
)
from evsys_bus.sink import Sink, check_sink

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUPS: Final = ("evsys_bus.callbacks", "evsys_bus.sinks")
"""The entry-point groups of an installed package's adapters: ``kind = "module:Class"``."""

_A = TypeVar("_A", Callback, Sink)
_C = TypeVar("_C", bound=Callback)
_S = TypeVar("_S", bound=Sink)


class Origin(msgspec.Struct, frozen=True):
    """Where a kind comes from."""

    target: str
    """``module:Class``."""
    packages: tuple[str, ...] = ()
    """The installed packages that offer it, with versions; empty if it was registered in this process. More than one is
    an error when the kind is looked up."""


def installed_entry_points() -> "Iterable[EntryPoint]":
    """Return the entry points of the groups. The import is local because it takes longer than all of this package's."""
    import importlib.metadata

    points = importlib.metadata.entry_points()
    return [point for group in ENTRY_POINT_GROUPS for point in points.select(group=group)]


class Registry:
    """Kinds and their classes; thread-safe.

    Args:
        entry_points: Returns the entry points of installed adapters; called once, at the first look-up.
    """

    def __init__(self, entry_points: "Callable[[], Iterable[EntryPoint]]" = installed_entry_points) -> None:
        self._entry_points = entry_points
        self._installed: dict[str, list[EntryPoint]] | None = None
        self._registered: dict[str, AdapterClass] = {}
        self._lock = threading.Lock()

    def register(self, kind: str, *, replace: bool = False) -> Callable[[type[_C]], type[_C]]:
        """Return a class decorator; see `register_callback`."""
        return self._register(Callback, kind, replace=replace)

    def register_sink(self, kind: str, *, replace: bool = False) -> Callable[[type[_S]], type[_S]]:
        """Return a class decorator; see `register_sink`."""
        return self._register(Sink, kind, replace=replace)

    def _register(self, base: type[_A], kind: str, *, replace: bool) -> Callable[[type[Any]], type[Any]]:
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
                    self._check_not_taken(kind, cls)
                self._registered[kind] = cls
            if "name" not in vars(cls):
                cls.name = kind
            return cls

        return decorate

    def kinds(self) -> dict[str, Origin]:
        """Return all kinds, sorted, and their origins, without loading any."""
        with self._lock:
            found = {
                kind: Origin(points[0].value, tuple(map(_package_version, points)))
                for kind, points in self._read_entry_points().items()
            }
            found |= {kind: Origin(_class_path(cls)) for kind, cls in self._registered.items()}
        return dict(sorted(found.items()))

    def is_registered(self, kind: str) -> bool:
        """Whether the kind was registered in this process; in another process it may be unknown or another class."""
        with self._lock:
            return kind in self._registered

    def find(self, kind: str, where: Location | None = None) -> AdapterClass:
        """Return the class of a kind.

        Raises:
            UnknownKindError: The kind does not exist.
            DuplicateKindError: Two installed packages offer it.
            BrokenAdapterError: It cannot be imported, or is not the class of a callback or sink.
        """
        with self._lock:
            registered = self._registered.get(kind)
            points = [] if registered else self._read_entry_points().get(kind, [])
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
                why="; ".join(_describe_entry_point(point) for point in points),
                fix=f'uninstall all but one, or choose: register_callback("{kind}", replace=True)(TheClass)',
            )
        try:
            cls = points[0].load()
        except Exception as error:  # isolation: the import of a plugin may raise anything
            raise self.broken_adapter_error(kind, error, where) from error
        check_class(kind, cls, where)
        return cls

    def broken_adapter_error(self, kind: str, error: Exception, where: Location | None) -> BrokenAdapterError:
        """Return the error for an adapter that cannot be imported or constructed; an ImportError names a package."""
        point = self._entry_point(kind)
        why = f"{type(error).__name__}: {error}"
        module = error.name if isinstance(error, ImportError) else None
        if module is None:
            what, fix = f'callback "{kind}" cannot be built', f"see the cause; its params: evsys-bus adapters {kind}"
        elif point is not None and f"{point.module}.".startswith(f"{module}."):
            what = f'callback "{kind}" cannot be imported'
            fix = f"reinstall or update the package that offers it: {_describe_entry_point(point)}"
        else:
            package = install_requirement(module.partition(".")[0], point)
            what = f'callback "{kind}" needs a package that is not installed or does not fit: {module}'
            fix = f'pip install "{package}"   or: uv add "{package}"'
        return BrokenAdapterError(what, where=where, why=why, fix=fix)

    def uninstalled_packages(self, kind: str) -> list[str]:
        """Return the packages that an installed kind requires and that are not installed."""
        point = self._entry_point(kind)
        return [] if point is None else missing_packages(point)

    def _entry_point(self, kind: str) -> "EntryPoint | None":
        with self._lock:
            points = [] if kind in self._registered else self._read_entry_points().get(kind, [])
        return points[0] if points else None

    def _read_entry_points(self) -> "dict[str, list[EntryPoint]]":
        if self._installed is None:
            installed: dict[str, list[EntryPoint]] = {}
            for point in self._entry_points():
                installed.setdefault(point.name, []).append(point)
            self._installed = installed
        return self._installed

    def _check_not_taken(self, kind: str, cls: AdapterClass) -> None:
        current = self._registered.get(kind)
        if current is not None:
            owners = [] if current is cls else [_class_path(current)]
        else:
            owners = [
                _describe_entry_point(point)
                for point in self._read_entry_points().get(kind, [])
                if point.value != _class_path(cls)
            ]
        if owners:
            raise DuplicateKindError(
                f'callback kind "{kind}" is registered already',
                why=f"held by {'; '.join(owners)}",
                fix=f'choose another kind, or take it over: register_callback("{kind}", replace=True)',
            )


def check_class(
    kind: str, cls: object, where: Location | None, bases: tuple[AdapterClass, ...] = (Callback, Sink)
) -> None:
    """Raise `BrokenAdapterError` unless ``cls`` is the class of an adapter that can be built and delivered to."""
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


def _class_path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _package_version(point: "EntryPoint") -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "an unknown package"


def _describe_entry_point(point: "EntryPoint") -> str:
    return f"{_package_version(point)} ({point.value})"


REGISTRY: Final = Registry()
"""The registry of this process."""


def register_callback(kind: str, *, replace: bool = False) -> Callable[[type[_C]], type[_C]]:
    """Register a callback class under a kind, so that a spec can name it.

    The class may define two ClassVars: ``name`` (set to the kind if the class does not define it) and ``Config``, the
    class that params are validated against. The callback is built as ``cls(**params)``.

    Args:
        kind: The name in specs.
        replace: Replace an existing registration of the kind, for example when a notebook cell runs twice.

    Raises:
        DuplicateKindError: Another class, or an installed package, has this kind.
        BrokenAdapterError: The class is not a `Callback`, or params cannot be validated against its ``Config``.

    Example:
        >>> @register_callback("doctest_loss")
        ... class PrintLoss(Callback):
        ...     def __init__(self, every: int = 1) -> None:
        ...         self.every = every
        >>> from evsys_bus.config import build_callbacks
        >>> [callback] = build_callbacks([{"kind": "doctest_loss", "params": {"every": 5}}])
        >>> callback.every
        5
    """
    return REGISTRY.register(kind, replace=replace)


def register_sink(kind: str, *, replace: bool = False) -> Callable[[type[_S]], type[_S]]:
    """Register a sink class under a kind, so that a spec can name it; works like `register_callback`.

    Callbacks and sinks share one namespace of kinds.

    Args:
        kind: The name in specs.
        replace: Replace an existing registration of the kind, for example when a notebook cell runs twice.

    Raises:
        DuplicateKindError: Another class, or an installed package, has this kind.
        BrokenAdapterError: The class is not a `Sink`, params cannot be validated against its ``Config``, or a courier
            could not call its methods.

    Example:
        >>> @register_sink("doctest_lines")
        ... class Lines(Sink):
        ...     def __init__(self, path: str) -> None:
        ...         self.path = path
        ...
        ...     async def write(self, batch):
        ...         print(len(batch), "events for", self.path)
        >>> from evsys_bus.config import build_callbacks
        >>> [carrier] = build_callbacks([{"kind": "doctest_lines", "params": {"path": "lines.txt"}}])
        >>> carrier.spec_name
        'doctest_lines'
    """
    return REGISTRY.register_sink(kind, replace=replace)


def callback_kinds() -> dict[str, Origin]:
    """Return all kinds of callbacks and sinks, sorted, and their origins, without loading any."""
    return REGISTRY.kinds()


def json_schema(kind: str, *, registry: Registry = REGISTRY) -> Schema:
    """Return the JSON schema of a kind's params. It forbids unknown keys, as `build_callbacks` always does.

    Raises:
        ConfigError: The kind is unknown, or cannot be loaded.
    """
    return adapter_schema(registry.find(kind))


def example(kind: str, *, registry: Registry = REGISTRY) -> CallbackSpec:
    """Return a spec of a kind with the defaults of its params, and sample values for the required ones.

    Raises:
        ConfigError: The kind is unknown, or cannot be loaded.
    """
    schema = adapter_schema(registry.find(kind))
    parts: Schema = schema["properties"]
    shown_keys = [key for key, part in parts.items() if key in schema["required"] or part.get("default") is not None]
    return CallbackSpec(kind, {key: sample_value(parts[key], schema) for key in shown_keys})


def missing_packages(point: "EntryPoint") -> list[str]:
    """Return the packages of the entry point's extras that are not installed, without platform-specific ones."""
    import importlib.metadata

    if not point.extras or point.dist is None:
        return []
    requested = set(map(normalized_name, point.extras))
    missing: list[str] = []
    for extra, packages in packages_by_extra(point.dist.requires or ()).items():
        for package in packages if normalized_name(extra) in requested else ():
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                missing.append(package)
    return missing


def install_requirement(module: str, point: "EntryPoint | None") -> str:
    """Return what to install for a missing module: the smallest extra that includes it, else the module's own name."""
    if point is None or point.dist is None:
        return module
    if point.extras:
        return f"{point.dist.name}[{','.join(point.extras)}]"
    extras = packages_by_extra(point.dist.requires or ())
    providing = [
        extra for extra, packages in extras.items() if normalized_name(module) in map(normalized_name, packages)
    ]
    smallest = min(providing, key=lambda extra: len(extras[extra]), default=None)
    return module if smallest is None else f"{point.dist.name}[{smallest}]"


def packages_by_extra(requires: Iterable[str]) -> dict[str, list[str]]:
    """Parse the requirements in a package's metadata: extra -> its packages, without platform-specific ones."""
    extras: dict[str, list[str]] = {}
    for line in requires:
        match = re.match(r"""([\w.-]+)[^;]*;\s*extra\s*==\s*['"]([^'"]+)['"]\s*$""", line)
        if match:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def normalized_name(name: str) -> str:
    """Normalize a package name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()
