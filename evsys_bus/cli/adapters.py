"""``evsys-bus adapters``: the kinds of callbacks there are, and what each can be told."""

import inspect
from typing import Any

import click
import msgspec

from evsys_bus.cli.screen import color_option
from evsys_bus.errors import EvsysBusError
from evsys_bus.wiring import Origin, callback_kinds, example, json_schema
from evsys_bus.wiring.registry import REGISTRY


class _Entry(msgspec.Struct, omit_defaults=True):
    """One kind in the list."""

    kind: str
    target: str
    packages: tuple[str, ...]
    summary: str = ""
    error: str = ""
    """Why it cannot be loaded; the others can."""


class _Page(msgspec.Struct):
    """All about one kind. Any: JSON."""

    kind: str
    target: str
    packages: tuple[str, ...]
    summary: str
    schema: dict[str, Any]
    defaults: dict[str, Any]
    example: dict[str, Any]


@click.command("adapters")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per kind.")
@color_option
def command(kind: str | None, as_json: bool) -> None:
    """List the kinds of callbacks; with KIND, show its schema, its defaults and an example."""
    if kind is not None:
        page = _page(kind)
        click.echo(msgspec.json.encode(page) if as_json else _page_text(page))
        return
    entries = [_entry(each, origin) for each, origin in callback_kinds().items()]
    if as_json:
        for entry in entries:
            click.echo(msgspec.json.encode(entry))
        return
    width = max((len(entry.kind) for entry in entries), default=0)
    for entry in entries:
        click.echo(f"{entry.kind:<{width}}  {entry.summary or f'cannot be loaded: {entry.error}'}")


def _entry(kind: str, origin: Origin) -> _Entry:
    entry = _Entry(kind, origin.target, origin.packages)
    try:
        entry.summary = _summary(kind)
    except EvsysBusError as error:
        entry.error = error.why or error.what
    return entry


def _page(kind: str) -> _Page:
    schema = json_schema(kind)
    origin = callback_kinds()[kind]
    spec = example(kind)
    return _Page(
        kind=kind,
        target=origin.target,
        packages=origin.packages,
        summary=_summary(kind),
        schema=schema,
        defaults={key: part["default"] for key, part in schema["properties"].items() if "default" in part},
        example={"kind": spec.kind, "params": spec.params},
    )


def _page_text(page: _Page) -> str:
    schema = msgspec.json.format(msgspec.json.encode(page.schema), indent=2).decode()
    width = max(map(len, page.defaults), default=0)
    defaults = [f"  {key:<{width}}  {_json(value)}" for key, value in page.defaults.items()]
    return "\n".join(
        [
            f"{page.kind}   {page.summary}",
            f"from {page.target}   {', '.join(page.packages)}".rstrip(),
            "\nschema of its params",
            schema,
            *(["\ndefaults", *defaults] if defaults else []),
            "\nexample",
            f"  - kind: {page.kind}",
            *([f"    params: {_json(page.example['params'])}"] if page.example["params"] else []),
        ]
    )


def _summary(kind: str) -> str:
    """The first line of the class's docstring: its own, not the one it inherits."""
    cls = REGISTRY.find(kind)
    return inspect.cleandoc(cls.__dict__.get("__doc__") or cls.__name__).partition("\n")[0]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
