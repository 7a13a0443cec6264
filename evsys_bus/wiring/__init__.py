"""From names and params to callbacks: the registry, the checks, ``build_callbacks``.

spec       what stands in a list of callbacks, and the places within it
registry   which class a kind is; entry points of installed packages
fields     the keys that a Config (or a constructor) knows
params     params against a Config: values to pass, or findings
schema     a Config as JSON schema, and that schema in words
report     findings as errors that people can act on
build      all of it, over a whole list, in one pass
"""

from evsys_bus.wiring.build import build_callbacks
from evsys_bus.wiring.registry import Origin, Registry, callback_kinds, register_callback
from evsys_bus.wiring.schema import example, json_schema
from evsys_bus.wiring.spec import CallbackSpec

__all__ = [
    "CallbackSpec",
    "Origin",
    "Registry",
    "build_callbacks",
    "callback_kinds",
    "example",
    "json_schema",
    "register_callback",
]
