"""``evsys-bus adapters``: lists the kinds of callbacks and their params."""

import inspect
from typing import Any

import click
import msgspec

from evsys_bus.cli.output.screen import color_option
from evsys_bus.config import Origin, callback_kinds, example, json_schema
from evsys_bus.config.registry import REGISTRY
from evsys_bus.errors import EvsysBusError


@click.command("adapters")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per kind.")
@color_option
def command(kind: str | None, as_json: bool) -> None:
    """List the kinds of callbacks; with KIND, show its schema, its defaults and an example."""
    if kind is not None:
        details = load_details(kind)
        lines = [_json(details)] if as_json else [format_details(details)]
    else:
        found = list_kinds()
        lines = [_json(each) for each in found] if as_json else entry_lines(found)
    for line in lines:
        click.echo(line)


class KindEntry(msgspec.Struct, omit_defaults=True):
    """An entry of the list."""

    kind: str
    target: str
    packages: tuple[str, ...]
    summary: str = ""
    error: str = ""
    """Why the kind cannot be loaded."""
    missing: str = ""
    """Required packages that are not installed."""
    fix: str = ""


class KindDetails(msgspec.Struct):
    """The details of one kind."""

    kind: str
    target: str
    packages: tuple[str, ...]
    summary: str
    schema: dict[str, Any]
    defaults: dict[str, Any]
    example: dict[str, Any]


def list_kinds() -> list[KindEntry]:
    """Return an entry for every kind."""
    return [_make_entry(kind, origin) for kind, origin in callback_kinds().items()]


def entry_lines(entries: list[KindEntry]) -> list[str]:
    """Return the list as text, with missing packages below each kind."""
    width = max((len(entry.kind) for entry in entries), default=0)
    lines: list[str] = []
    for entry in entries:
        lines.append(f"{entry.kind:<{width}}  {entry.summary or f'cannot be loaded: {entry.error}'}")
        if entry.missing:
            lines.append(f"{'':<{width}}  ! not installed: {entry.missing}   {entry.fix}")
    return lines


def _make_entry(kind: str, origin: Origin) -> KindEntry:
    entry = KindEntry(kind, origin.target, origin.packages)
    missing = REGISTRY.uninstalled_packages(kind)
    if missing:
        entry.missing = ", ".join(missing)
        entry.fix = REGISTRY.broken_adapter_error(kind, ModuleNotFoundError(name=missing[0]), None).fix or ""
    try:
        entry.summary = _summary(kind)
    except EvsysBusError as error:
        entry.error = error.why or error.what
    return entry


def load_details(kind: str) -> KindDetails:
    """Return the details of a kind.

    Raises:
        UnknownKindError, BrokenAdapterError: There is no such kind, or it cannot be loaded.
    """
    schema = json_schema(kind)
    origin = callback_kinds()[kind]
    spec = example(kind)
    return KindDetails(
        kind=kind,
        target=origin.target,
        packages=origin.packages,
        summary=_summary(kind),
        schema=schema,
        defaults={key: part["default"] for key, part in schema["properties"].items() if "default" in part},
        example={"kind": spec.kind, "params": spec.params},
    )


def format_details(details: KindDetails) -> str:
    """Return the details as text."""
    schema = msgspec.json.format(msgspec.json.encode(details.schema), indent=2).decode()
    width = max(map(len, details.defaults), default=0)
    defaults = [f"  {key:<{width}}  {_json(value)}" for key, value in details.defaults.items()]
    return "\n".join(
        [
            f"{details.kind}   {details.summary}",
            f"from {details.target}   {', '.join(details.packages)}".rstrip(),
            "\nschema of its params",
            schema,
            *(["\ndefaults", *defaults] if defaults else []),
            "\nexample",
            f"  - kind: {details.kind}",
            *([f"    params: {_json(details.example['params'])}"] if details.example["params"] else []),
        ]
    )


def _summary(kind: str) -> str:
    """Return the first line of the class's own docstring, not of an inherited one."""
    cls = REGISTRY.find(kind)
    return inspect.cleandoc(cls.__dict__.get("__doc__") or cls.__name__).partition("\n")[0]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
