"""Names that 0.1 had for attributes and classes: each works in 0.2, with a DeprecationWarning, and not after it."""

import warnings
from typing import Any, Final

RENAMED_CLASSES: Final = {"Learnt": "RunAnnotated"}
"""Names that were importable from `evsys_bus`."""


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
        warn(f"{type(instance).__name__}.{self._former_name}", self._name)
        return getattr(instance, self._name)

    def __set__(self, instance: object, value: object) -> None:
        warn(f"{type(instance).__name__}.{self._former_name}", self._name)
        setattr(instance, self._name, value)


def warn(former_name: str, name: str) -> None:
    """Warn the caller of the calling function that the name has changed."""
    warnings.warn(f"{former_name} is called {name} since 0.2", DeprecationWarning, stacklevel=3)
