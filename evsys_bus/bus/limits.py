"""What the bus's settings may be."""

from typing import Final

from evsys_bus.errors import SettingError

_MOST_SECONDS: Final = 1e8
"""Three years: what waits longer waits for ever, and the system's calls take no more."""


def seconds(name: str, value: float, least: float = 0.0) -> float:
    """A duration within what clocks take; infinity is three years.

    Raises:
        SettingError: It is less than ``least``, or no number.
    """
    if not value >= least:  # NaN too
        raise SettingError(f"{name} is {value!r}", fix=f"give it seconds, at least {least:g}")
    return min(float(value), _MOST_SECONDS)
