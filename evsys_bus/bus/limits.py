"""Validation of the bus's settings."""

from typing import Final

from evsys_bus.errors import SettingError

_MOST_SECONDS: Final = 1e8
"""Three years; system calls accept no longer timeouts."""


def seconds(name: str, value: float, least: float = 0.0) -> float:
    """Return a valid duration; infinity becomes three years.

    Raises:
        SettingError: It is less than ``least``, or not a number.
    """
    if not value >= least:  # NaN too
        raise SettingError(f"{name} is {value!r}", fix=f"give it seconds, at least {least:g}")
    return min(float(value), _MOST_SECONDS)
