"""Configuration: experiment files and callback specs are validated and turned into experiments and callbacks.

spec          callback specs, and JSON paths for errors
registry      kinds and their classes; entry points of installed packages
fields        the keys of a Config or of a constructor
convert       strict conversion of values to annotated types
params        validation of params against a Config
schema        the JSON schema of a Config, and its description in words
report        error messages for invalid params
construct     construction of one adapter from its class and params
followed      subscriptions, described so that another process can build the adapter
build         validation and construction of a list of callbacks
extras        the optional dependencies of an adapter's package
experiment    the structure of an experiment file
nodes         values with their positions in a text
compose       YAML text to nodes, with limits
document      a YAML or JSON file with positions; ``--set``
recipe        ``module:function``, and its params
arms          the arms and the seeds of an experiment
load          a document to a validated experiment, all errors in one pass
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
