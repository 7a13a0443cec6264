"""``evsys-bus explain``: shows the help page of an error code, offline."""

from importlib.resources import files

import click

from evsys_bus.cli.output.formatting import format_columns
from evsys_bus.cli.output.screen import color_option
from evsys_bus.errors import did_you_mean


@click.command("explain")
@click.argument("code", required=False)
@color_option
def command(code: str | None) -> None:
    """Show the help page of CODE, for example EB101; without CODE, list all codes."""
    pages = read_pages()
    if code is None:
        rows = [[each, page.partition("\n")[0].partition("  ")[2]] for each, page in pages.items()]
        click.echo("\n".join(format_columns(rows)))
        return
    requested = code.strip().upper().removeprefix("ERROR[").removesuffix("]")
    requested = f"EB{requested}" if requested.isdigit() else requested
    if requested not in pages:
        raise click.UsageError(f"there is no error code {code!r}; {did_you_mean(requested, pages)}")
    click.echo(pages[requested])


def read_pages() -> dict[str, str]:
    """Return the page of every code; its first line is the code, two blanks and a summary of the error."""
    _, *sections = files("evsys_bus.cli").joinpath("errors.md").read_text(encoding="utf-8").split("\n## ")
    return {section.partition(" ")[0]: section.rstrip() for section in sections}
