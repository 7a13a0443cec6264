"""`RunConfig` and `RunSummary`: dicts of a run whose changes are recorded."""

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

from evsys_bus.codec import to_builtins

Record = Callable[[dict[str, Any]], None]


class RunSummary(dict[str, Any]):
    """Values of a run as a whole. Setting one records it.

    Args:
        record: Called with what was set.
    """

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __setitem__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, values: Mapping[str, Any] = {}, /, **more: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] # not changed
        """Set several at once, as one event."""
        changed = {**values, **more}
        super().update(changed)
        self._record(changed)

    def __ior__(self, values: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride] # a dict's has overloads
        self.update(values)
        return self

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return a value; one that is not there is set to the default first."""
        if name not in self:
            self[name] = default
        return self[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is not recorded


class RunConfig(RunSummary):
    """The settings of a run as plain data, also as attributes: ``run.config.lr``.

    Args:
        record: Called with keys that are added or changed.
        config: The configuration as the program has it.
    """

    def __init__(self, record: Record, config: Any) -> None:
        super().__init__(record)
        plain: Any = None if config is None else to_builtins(config)[0]
        if type(plain) is dict:
            dict[str, Any].update(self, cast("dict[str, Any]", plain))

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}", name=name, obj=self) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self[name] = value

    def update(self, values: Any = {}, /, **more: Any) -> None:  # noqa: B006 # not changed
        """Add or change keys, from a mapping or any object that holds settings."""
        is_mapping = isinstance(values, Mapping)
        super().update(cast("Mapping[str, Any]", values if is_mapping else to_builtins(values)[0]), **more)
