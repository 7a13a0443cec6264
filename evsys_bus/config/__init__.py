"""Configuration: experiment files and callback specs are validated and turned into experiments and callbacks.

spec                  callback specs, and JSON paths for errors
registry              kinds and their classes; entry points of installed packages
config_fields         the keys of a Config or of a constructor
convert               strict conversion of values to annotated types
validate              validation of params against a Config
schema                the JSON schema of a Config, and its description in words
issue_report          error messages for invalid params
construct             construction of one adapter from its class and params
subscription_builder  subscriptions, described so that another process can build the adapter
build                 validation and construction of a list of callbacks
extras                the optional dependencies of an adapter's package
experiment            the structure of an experiment file
yaml_nodes            values with their positions in a text
yaml_composer         YAML text to nodes, with limits
document              a YAML or JSON file with positions; ``--set``
recipe                ``module:function``, and its params
arms                  the arms and the seeds of an experiment
experiment_loader     a document to a validated experiment, all errors in one pass
courier_main          the courier process
"""

from evsys_bus.config.arms import Arm, expand_arms, expand_seeds
from evsys_bus.config.build import build_callbacks, check_callbacks
from evsys_bus.config.document import Document, read_document, with_overrides
from evsys_bus.config.experiment import ExperimentConfig, Stage, SuccessMetric
from evsys_bus.config.experiment_loader import load_experiment, read_experiment
from evsys_bus.config.recipe import Recipe, load_recipe
from evsys_bus.config.registry import Origin, Registry, callback_kinds, register_callback, register_sink
from evsys_bus.config.schema import example, json_schema
from evsys_bus.config.spec import CallbackSpec
from evsys_bus.config.subscription_builder import build_adapter, follow

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
    "build_adapter",
    "build_callbacks",
    "callback_kinds",
    "check_callbacks",
    "example",
    "expand_arms",
    "expand_seeds",
    "follow",
    "json_schema",
    "load_experiment",
    "load_recipe",
    "read_document",
    "read_experiment",
    "register_callback",
    "register_sink",
    "with_overrides",
]
