"""Names that 0.1 had for attributes, classes and modules: each works in 0.2 only, with a DeprecationWarning."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


class Renamed:
    """A data descriptor for an attribute's former name: reads and sets the attribute with its present one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._former_name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._former_name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        _warn(f"{type(instance).__name__}.{self._former_name}", self._name)
        return getattr(instance, self._name)

    def __set__(self, instance: object, value: object) -> None:
        _warn(f"{type(instance).__name__}.{self._former_name}", self._name)
        setattr(instance, self._name, value)


def former_names(module: str, names: Mapping[str, str], *, home: str | None = None) -> Callable[[str], Any]:
    """Return a module's ``__getattr__``, which finds what it has under former names.

    Args:
        module: The module.
        names: Former names, and what each is called now.
        home: The module that has replaced this one, in which its other names are found.
    """

    def get_attribute(name: str) -> Any:
        if name not in names and (home is None or name.startswith("__")):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        present = importlib.import_module(home or module)
        value = getattr(present, names.get(name, name))
        _warn(f"{module}.{name}", f"{present.__name__}.{names.get(name, name)}")
        return value

    return get_attribute


def _warn(former_name: str, name: str) -> None:
    """Warn the caller of the calling function that the name has changed."""
    warnings.warn(f"{former_name} is called {name} since 0.2", DeprecationWarning, stacklevel=3)
