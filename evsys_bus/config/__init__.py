"""Configuration: experiment files and callback specs are validated and turned into experiments and callbacks.

spec                  callback specs, and JSON paths for errors
params_schema         the keys of a Config: as JSON schema, as an example and in words
registry              kinds and their classes; entry points and extras of installed packages
validate              params to values of a Config, or an error for each invalid key
subscription_builder  construction of adapters and their subscriptions, here or in another process
build                 validation and construction of a list of callbacks
yaml_nodes            YAML or JSON files as values with positions; ``--set``
experiment            experiment files: structure, arms, seeds, recipe, and validation in one pass
courier_main          the courier process
"""

from evsys_bus.config.build import build_callbacks, check_callbacks
from evsys_bus.config.experiment import (
    Arm,
    ExperimentConfig,
    Recipe,
    Stage,
    SuccessMetric,
    expand_arms,
    expand_seeds,
    load_experiment,
    load_recipe,
    read_experiment,
)
from evsys_bus.config.registry import (
    Origin,
    Registry,
    callback_kinds,
    example,
    json_schema,
    register_callback,
    register_sink,
)
from evsys_bus.config.spec import CallbackSpec
from evsys_bus.config.subscription_builder import build_adapter, follow
from evsys_bus.config.yaml_nodes import Document, read_document, with_overrides

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
