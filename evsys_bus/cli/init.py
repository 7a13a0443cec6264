"""``evsys-bus init``: writes the files of a new experiment, or of a package with an adapter."""

import keyword
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

import click

from evsys_bus.cli.output.screen import color_option
from evsys_bus.errors import DocumentError, Location

_NAME: Final = "my_adapter"
"""The name in the templates of an adapter package, which is replaced in each of its forms."""
_PATTERN: Final = re.compile(r"[a-z][a-z0-9_]*")


@click.command("init")
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option("--adapter", metavar="NAME", help="A package with an adapter of this kind, with its conformance test.")
@color_option
def command(folder: Path, adapter: str | None) -> None:
    """Write an experiment that runs as it is into FOLDER (default: the current one), to be replaced piece by piece.

    Files that exist are never overwritten.
    """
    if adapter is None:
        template, replacements = "experiment", {}
    else:
        template, replacements = "adapter", _name_forms(adapter)
    contents = {path: _replace(text, replacements) for path, text in _read_template(template, replacements).items()}
    existing = [path for path in contents if (folder / path).exists() or (folder / path).is_symlink()]
    if existing:
        what = f"{folder / existing[0]} exists"
        raise DocumentError(what, why="init overwrites nothing", fix="name another folder: evsys-bus init FOLDER")
    try:
        for path, text in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with (folder / path).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        what = f"{error.filename or folder} cannot be written"
        raise DocumentError(what, why=error.strerror, fix="name a folder that this user can write") from error
    enter = "" if folder == Path() else f"cd {folder} && "
    steps = (
        [f"{enter}evsys-bus check experiment.yaml", "evsys-bus run experiment.yaml", "evsys-bus show runs/first-sweep"]
        if adapter is None
        else [f"{enter}pip install -e . 'evsys-bus[testing]' pytest", "pytest", f"evsys-bus adapters {adapter}"]
    )
    click.echo(
        "\n".join([*(f"wrote {folder / path}" for path in contents), "", "next:", *(f"  {each}" for each in steps)])
    )


def _name_forms(name: str) -> dict[str, str]:
    """Return what the name in the templates is replaced by, in its forms: module, distribution and class.

    Raises:
        DocumentError: It cannot be the name of a module.
    """
    if not _PATTERN.fullmatch(name) or keyword.iskeyword(name):
        where = Location("$", file=f"--adapter {name}")
        fix = "use small letters, digits and _: evsys-bus init --adapter my_board"
        raise DocumentError(f"{name!r:.60} is no name for an adapter", where=where, fix=fix)
    title = "".join(part.capitalize() for part in name.split("_"))
    return {_NAME: name, "my-adapter": name.replace("_", "-"), "MyAdapter": title}


def _read_template(name: str, replacements: dict[str, str]) -> dict[Path, str]:
    """Return the files of a template, by relative path."""
    found: dict[Path, str] = {}

    def read(folder: Traversable, path: Path) -> None:
        for each in sorted(folder.iterdir(), key=lambda each: each.name):
            if each.name == "__pycache__":
                continue
            target = path / _replace(each.name, replacements)
            if each.is_dir():
                read(each, target)
            else:
                found[target] = each.read_text(encoding="utf-8")

    read(files("evsys_bus.cli").joinpath("templates", name), Path())
    return found


def _replace(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text
