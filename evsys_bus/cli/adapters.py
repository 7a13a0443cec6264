"""``evsys-bus adapters``: lists the kinds of callbacks and their params."""

import click

from evsys_bus.cli.screen import color_option


@click.command("adapters")
@click.argument("kind", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per kind.")
@color_option
def command(kind: str | None, as_json: bool) -> None:
    """List the kinds of callbacks; with KIND, show its schema, its defaults and an example."""
    from evsys_bus.cli.kinds import entries, entry_lines, page_of, page_text

    if kind is not None:
        page = page_of(kind)
        lines = [_json(page)] if as_json else [page_text(page)]
    else:
        found = entries()
        lines = [_json(each) for each in found] if as_json else entry_lines(found)
    for line in lines:
        click.echo(line)


def _json(value: object) -> str:
    import msgspec

    return msgspec.json.encode(value).decode()
