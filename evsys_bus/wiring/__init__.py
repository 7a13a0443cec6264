"""The name that 0.1 had for `evsys_bus.config`."""

from evsys_bus.deprecated import former_names

__getattr__ = former_names(
    __name__,
    {"arms_of": "expand_arms", "build_followed": "build_adapter", "seeds_of": "expand_seeds"},
    home="evsys_bus.config",
)
