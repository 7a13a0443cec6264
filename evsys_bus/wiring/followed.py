"""The name that 0.1 had for a part of `evsys_bus.config`."""

from evsys_bus.deprecated import former_names

__getattr__ = former_names(__name__, {"build_followed": "build_adapter"}, home="evsys_bus.config")
