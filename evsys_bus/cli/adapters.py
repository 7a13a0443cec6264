"""``evsys-bus adapters``: lists the kinds of callbacks and their params."""

import click

from evsys_bus.cli.output.screen import color_option


@click.command("adapters")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per kind.")
@color_option
def command(kind: str | None, as_json: bool) -> None:
    """List the kinds of callbacks; with KIND, show its schema, its defaults and an example."""
    from evsys_bus.cli.kinds import entry_lines, format_details, list_kinds, load_details

    if kind is not None:
        details = load_details(kind)
        lines = [_json(details)] if as_json else [format_details(details)]
    else:
        found = list_kinds()
        lines = [_json(each) for each in found] if as_json else entry_lines(found)
    for line in lines:
        click.echo(line)


def _json(value: object) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()
