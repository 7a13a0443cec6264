"""Bridges from training frameworks to the bus, one module per framework, which imports it.

This package imports none of them. `RunBridge` and `isolated` are for bridges of your own; all bridges here share them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evsys_adapters.bridges._base import RunBridge, isolated

__all__ = ["RunBridge", "isolated"]


def __getattr__(name: str) -> Any:
    """Import what the bridges share on first access."""
    if name in __all__:
        from evsys_adapters.bridges import _base

        return getattr(_base, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
