"""Validation of the bus's settings."""

from typing import Final

from evsys_bus.errors import SettingError

_MAX_SECONDS: Final = 1e8
"""Three years; system calls accept no longer timeouts."""


def validate_seconds(name: str, value: float, minimum: float = 0.0) -> float:
    """Return a valid duration; infinity becomes three years.

    Raises:
        SettingError: It is less than ``minimum``, or not a number.
    """
    if not value >= minimum:  # NaN too
        raise SettingError(f"{name} is {value!r}", fix=f"give it seconds, at least {minimum:g}")
    return min(float(value), _MAX_SECONDS)
