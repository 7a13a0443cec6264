"""``evsys-bus explain``: shows the help page of an error code, offline."""

import sys
from importlib.resources import files
from typing import Final

import click

from evsys_bus.cli.output.formatting import format_columns
from evsys_bus.cli.output.screen import color_option, terminal_width, wrap
from evsys_bus.errors import did_you_mean

_PAGE_COLUMNS: Final = 116
"""The pages are filled up to about this width: a shorter line ends its paragraph."""


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
    click.echo("\n".join(_fit(pages[requested], terminal_width(sys.stdout))))


def _fit(page: str, width: int | None) -> list[str]:
    """Return the lines of a page without the marks of Markdown, and wrapped to the width."""
    lines: list[str] = []
    previous = ""
    for line in page.replace("`", "").split("\n"):
        text = line.strip()
        was_full = len(previous) + len(f" {text.partition(' ')[0]}") > _PAGE_COLUMNS
        if width is not None and previous and text and was_full:
            lines[-1] += f" {text}"
        else:
            lines.append(line)
        previous = line
    fitted: list[str] = []
    for line in lines:
        text = line.lstrip()
        first, *more = wrap(text, width, indent=" " * (len(line) - len(text)))
        fitted += [first, *(more if text.startswith("- ") else [each[2:] for each in more])]
    return fitted


def read_pages() -> dict[str, str]:
    """Return the page of every code; its first line is the code, two blanks and a summary of the error."""
    _, *sections = files("evsys_bus.cli").joinpath("errors.md").read_text(encoding="utf-8").split("\n## ")
    return {section.partition(" ")[0]: section.rstrip() for section in sections}
