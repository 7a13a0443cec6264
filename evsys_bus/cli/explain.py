"""``evsys-bus explain``: shows the help page of an error code, offline."""

import click

from evsys_bus.cli.screen import color_option


@click.command("explain")
@click.argument("code", required=False)
@color_option
def command(code: str | None) -> None:
    """Show the help page of CODE, for example EB101; without CODE, list all codes."""
    if code is None:
        from evsys_bus.cli.tables import columns

        rows = [[each, page(each).partition("\n")[0].partition("  ")[2]] for each in codes()]
        click.echo("\n".join(columns(rows)))
        return
    wanted = code.strip().upper().removeprefix("ERROR[").removesuffix("]")
    wanted = f"EB{wanted}" if wanted.isdigit() else wanted
    if wanted not in codes():
        from evsys_bus.errors import did_you_mean

        raise click.UsageError(f"there is no error code {code!r}; {did_you_mean(wanted, codes())}")
    click.echo(page(wanted).rstrip())


def codes() -> list[str]:
    """Return every code that has a page."""
    from importlib.resources import files

    return sorted(each.name.removesuffix(".md") for each in files("evsys_bus.cli").joinpath("pages").iterdir())


def page(code: str) -> str:
    """Return the page of a code; its first line is the code, two blanks and a summary of the error."""
    from importlib.resources import files

    return files("evsys_bus.cli").joinpath("pages", f"{code}.md").read_text(encoding="utf-8")
