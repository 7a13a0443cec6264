"""``evsys-bus explain``: shows the help page of an error code, offline."""

import click

from evsys_bus.cli.output.screen import color_option


@click.command("explain")
@click.argument("code", required=False)
@color_option
def command(code: str | None) -> None:
    """Show the help page of CODE, for example EB101; without CODE, list all codes."""
    if code is None:
        from evsys_bus.cli.output.formatting import format_columns

        rows = [[each, read_page(each).partition("\n")[0].partition("  ")[2]] for each in list_codes()]
        click.echo("\n".join(format_columns(rows)))
        return
    requested = code.strip().upper().removeprefix("ERROR[").removesuffix("]")
    requested = f"EB{requested}" if requested.isdigit() else requested
    if requested not in list_codes():
        from evsys_bus.errors import did_you_mean

        raise click.UsageError(f"there is no error code {code!r}; {did_you_mean(requested, list_codes())}")
    click.echo(read_page(requested).rstrip())


def list_codes() -> list[str]:
    """Return every code that has a page."""
    from importlib.resources import files

    return sorted(each.name.removesuffix(".md") for each in files("evsys_bus.cli").joinpath("pages").iterdir())


def read_page(code: str) -> str:
    """Return the page of a code; its first line is the code, two blanks and a summary of the error."""
    from importlib.resources import files

    return files("evsys_bus.cli").joinpath("pages", f"{code}.md").read_text(encoding="utf-8")
