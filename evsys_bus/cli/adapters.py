"""``evsys-bus adapters``: lists the kinds of callbacks and their params."""

import sys
from typing import Any

import click

from evsys_bus.cli.output.formatting import format_facts
from evsys_bus.cli.output.screen import color_option, terminal_width


@click.command("adapters")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per kind.")
@color_option
def command(kind: str | None, as_json: bool) -> None:
    """List the kinds of callbacks; with KIND, show its schema, its defaults and an example."""
    if kind is not None:
        details = _load_details(kind)
        lines = [_json(details)] if as_json else _details_lines(details)
    else:
        entries = _list_kinds()
        lines = [_json(each) for each in entries] if as_json else _entry_lines(entries)
    click.echo("\n".join(lines), nl=bool(lines))


def _list_kinds() -> list[dict[str, Any]]:
    """Return an entry for every kind, with why it cannot be loaded, or what it lacks."""
    from evsys_bus.config import callback_kinds
    from evsys_bus.config.registry import REGISTRY
    from evsys_bus.errors import EvsysBusError

    entries: list[dict[str, Any]] = []
    for kind, origin in callback_kinds().items():
        entry: dict[str, Any] = {"kind": kind, "target": origin.target, "packages": origin.packages}
        try:
            entry["summary"] = _summary(kind)
        except EvsysBusError as error:
            entry["error"] = error.why or error.what
        missing = REGISTRY.uninstalled_packages(kind)
        if missing:
            entry["missing"] = ", ".join(missing)
            entry["fix"] = REGISTRY.broken_adapter_error(kind, ModuleNotFoundError(name=missing[0]), None).fix or ""
        entries.append({key: value for key, value in entry.items() if value != ""})
    return entries


def _entry_lines(entries: list[dict[str, Any]]) -> list[str]:
    """Return the list as text, with missing packages below each kind."""
    rows: list[list[str]] = []
    for entry in entries:
        summary = entry.get("summary") or f"cannot be loaded: {entry.get('error', '')}"
        rows.append([entry["kind"], summary])
        if "missing" in entry:
            rows.append(["", f"! not installed: {entry['missing']}   {entry.get('fix', '')}"])
    return format_facts(rows, terminal_width(sys.stdout))


def _load_details(kind: str) -> dict[str, Any]:
    """Return the details of a kind.

    Raises:
        UnknownKindError, BrokenAdapterError: There is no such kind, or it cannot be loaded.
    """
    from evsys_bus.config import callback_kinds, example, json_schema

    schema = json_schema(kind)
    origin = callback_kinds()[kind]
    spec = example(kind)
    return {
        "kind": kind,
        "target": origin.target,
        "packages": origin.packages,
        "summary": _summary(kind),
        "schema": schema,
        "defaults": {key: part["default"] for key, part in schema["properties"].items() if "default" in part},
        "example": {"kind": spec.kind, "params": spec.params},
    }


def _details_lines(details: dict[str, Any]) -> list[str]:
    """Return the details as text."""
    import msgspec

    schema = msgspec.json.format(_json(details["schema"]), indent=2)
    defaults, params = details["defaults"], details["example"]["params"]
    width = max(map(len, defaults), default=0)
    return [
        f"{details['kind']}   {details['summary']}",
        f"from {details['target']}   {', '.join(details['packages'])}".rstrip(),
        "\nschema of its params",
        schema,
        *(
            ["\ndefaults", *(f"  {key:<{width}}  {_json(value)}" for key, value in defaults.items())]
            if defaults
            else []
        ),
        "\nexample",
        f"  - kind: {details['kind']}",
        *([f"    params: {_json(params)}"] if params else []),
    ]


def _summary(kind: str) -> str:
    """Return the first line of the class's own docstring, not of an inherited one."""
    import inspect

    from evsys_bus.config.registry import REGISTRY

    cls = REGISTRY.find(kind)
    return inspect.cleandoc(cls.__dict__.get("__doc__") or cls.__name__).partition("\n")[0].replace("`", "")


def _json(value: object) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()
