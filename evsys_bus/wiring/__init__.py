"""From files, names and params to experiments and callbacks: the registry, the checks, ``build_callbacks``.

spec       what stands in a list of callbacks, and the places within it
registry   which class a kind is; entry points of installed packages
fields     the keys that a Config (or a constructor) knows
params     params against a Config: values to pass, or findings
schema     a Config as JSON schema, and that schema in words
report     findings as errors that people can act on
construct  one adapter from its class and its params
followed   what is followed, described so that another process can build it
build      all of it, over a whole list, in one pass
experiment what an experiment file says
nodes      values with the places where they stand in a text
compose    YAML text as nodes, bounded
document   a file as a plain value that knows its places; ``--set``
recipe     ``module:function``, and its params
arms       the arms and the seeds of an experiment
load       a document as a checked experiment, every error in one pass
courier_main  the courier process
"""

from evsys_bus.wiring.arms import Arm, arms_of, seeds_of
from evsys_bus.wiring.build import build_callbacks, check_callbacks
from evsys_bus.wiring.document import Document, read_document, with_overrides
from evsys_bus.wiring.experiment import ExperimentConfig, Stage, SuccessMetric
from evsys_bus.wiring.followed import build_followed, follow
from evsys_bus.wiring.load import load_experiment, read_experiment
from evsys_bus.wiring.recipe import Recipe, load_recipe
from evsys_bus.wiring.registry import Origin, Registry, callback_kinds, register_callback, register_sink
from evsys_bus.wiring.schema import example, json_schema
from evsys_bus.wiring.spec import CallbackSpec

__all__ = [
    "Arm",
    "CallbackSpec",
    "Document",
    "ExperimentConfig",
    "Origin",
    "Recipe",
    "Registry",
    "Stage",
    "SuccessMetric",
    "arms_of",
    "build_callbacks",
    "build_followed",
    "callback_kinds",
    "check_callbacks",
    "example",
    "follow",
    "json_schema",
    "load_experiment",
    "load_recipe",
    "read_document",
    "read_experiment",
    "register_callback",
    "register_sink",
    "seeds_of",
    "with_overrides",
]
