"""``evsys-bus schema``: prints a JSON schema of experiment files, for editors."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click

from evsys_bus.cli.output.screen import color_option

Schema = dict[str, Any]


@click.command("schema")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@color_option
def command(file: Path | None) -> None:
    """Print the JSON schema of experiment files, with the params of every installed kind of callback.

    With FILE, an experiment file, also the params of its recipe and the kinds of its plugins. Editors then complete
    keys and mark errors:

    \b
      evsys-bus schema > evsys.schema.json
      # yaml-language-server: $schema=evsys.schema.json     (first line of an experiment file)
    """  # noqa: D301 # click reads the backspace as: do not wrap
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(experiment_schema(file)), indent=2).decode())


def experiment_schema(file: Path | None = None) -> Schema:
    """Return the schema, in the dialect 2020-12.

    Args:
        file: An experiment file, whose recipe defines the params of ``run`` and whose plugins define kinds.

    Raises:
        ConfigError: The file cannot be read, or its recipe or a plugin cannot be imported.
    """
    from evsys_bus.config.experiment import EXTENSION_PREFIX, ExperimentConfig, Stage, SuccessMetric

    definitions: dict[str, Schema] = {}
    recipe_config = None if file is None else _import_parts(file)
    schema = _embed(_described(ExperimentConfig), "experiment", definitions)
    properties = schema["properties"]
    for cls in (Stage, SuccessMetric):
        definitions[f"experiment.{cls.__name__}"] = _described(cls)
    properties["callbacks"]["items"] = _callback_schema(definitions)
    if recipe_config is not None:
        params = _embed(_described(recipe_config), "recipe", definitions)
        definitions["params"] = params | {"required": []}  # those of `run` and of an arm are merged
        properties["run"] |= {"$ref": "#/$defs/params"}
        properties["runs"]["additionalProperties"] = {"$ref": "#/$defs/params"}
        definitions["experiment.Stage"]["properties"]["params"] = {"$ref": "#/$defs/params"}
        properties["matrix"] |= {
            "properties": {
                key: {"type": "array", "items": {"$ref": f"#/$defs/params/properties/{key}"}}
                for key in params["properties"]
            },
            "additionalProperties": False,
        }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "patternProperties": {f"^{EXTENSION_PREFIX}": {}},
        "$defs": definitions,
    }


def _import_parts(file: Path) -> type | None:
    """Import the plugins and the recipe of a file, which may be incomplete; return the recipe's Config."""
    from evsys_bus.cli.check import find_modules_of
    from evsys_bus.config.experiment import import_module, load_recipe
    from evsys_bus.config.spec import join_path
    from evsys_bus.config.yaml_nodes import read_document

    document = read_document(file)
    find_modules_of(file)
    plugins: Any = document.value.get("plugins") or ()
    for index, plugin in enumerate(plugins):
        import_module(str(plugin), document.where(join_path("$.plugins", index)), "plugin")
    recipe = document.value.get("recipe")
    return load_recipe(recipe, at="$.recipe").config if isinstance(recipe, str) and recipe else None


def _callback_schema(definitions: dict[str, Schema]) -> Schema:
    """Return the schema of a callback spec: its ``kind`` decides which params it has."""
    from evsys_bus.config.registry import REGISTRY, callback_kinds
    from evsys_bus.config.spec import CallbackSpec
    from evsys_bus.errors import ConfigError

    schema = _described(CallbackSpec)
    kinds: list[Schema] = []
    rules: list[Schema] = []
    for kind in callback_kinds():
        try:
            cls = REGISTRY.find(kind)
            params = _embed(_described(cls), kind, definitions)
        except ConfigError:  # its package is not installed
            kinds.append({"const": kind})
            continue
        definitions[kind] = params
        kinds.append({"const": kind, "description": _first_line(cls.__dict__.get("__doc__") or kind)})
        rules.append(
            {
                "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
                "then": {
                    "properties": {"params": {"$ref": f"#/$defs/{kind}"}},
                    "required": ["params"] if params["required"] else [],
                },
            }
        )
    schema["properties"]["kind"] = {"oneOf": kinds, "description": schema["properties"]["kind"].get("description", "")}
    schema["properties"]["params"] = {"type": ["object", "null"]}
    return schema | {"allOf": rules}


def _described(cls: type[Any]) -> Schema:
    """Return the schema of a Config, or of an adapter's params, with the docstrings of its fields as descriptions."""
    from evsys_bus.callback import Callback
    from evsys_bus.config.params_schema import adapter_schema, config_schema
    from evsys_bus.sink import Sink

    config: Any = cls
    if issubclass(cls, Callback | Sink):
        schema, config = adapter_schema(cls), cls.Config or cls
    else:
        schema = config_schema(config)
    for name, text in _field_docs(config).items():
        if name in schema["properties"]:
            schema["properties"][name].setdefault("description", text)
    return schema


def _field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class and its bases, where their source is there."""
    docs: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):
            continue
        docs |= {
            field.target.id: inspect.cleandoc(text.value.value)
            for field, text in itertools.pairwise(cast("ast.ClassDef", tree.body[0]).body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
    return docs


def _embed(schema: Schema, name: str, definitions: dict[str, Schema]) -> Schema:
    """Move the definitions of a schema to others, below a name of their own; return the schema without them."""
    inner: Mapping[str, Schema] = schema.pop("$defs", {})

    def redirect(part: Any) -> Any:
        if isinstance(part, dict):
            found = cast("Schema", part)
            return {
                key: f"#/$defs/{name}.{each.rpartition('/')[2]}" if key == "$ref" else redirect(each)
                for key, each in found.items()
            }
        return [redirect(each) for each in cast("list[Any]", part)] if isinstance(part, list) else part

    definitions |= {f"{name}.{key}": redirect(part) for key, part in inner.items()}
    return redirect(schema)


def _first_line(text: str) -> str:
    return inspect.cleandoc(text).partition("\n")[0]
