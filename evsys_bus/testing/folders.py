"""Folders for adapters under test, and comparison of their contents."""

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

Contents: TypeAlias = Callable[[Path], Mapping[str, Any]]
"""Returns what an adapter wrote into a folder, as comparable values by name."""


@contextmanager
def empty_folder() -> Generator[Path, None, None]:
    """Yield a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="conformance-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


def files_in(folder: Path) -> dict[str, str]:
    """Return the contents of all files except hidden ones, without the folder's own name."""
    return {
        str(path.relative_to(folder)): path.read_bytes().decode(errors="replace").replace(str(folder), "")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def difference(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """Describe the first difference."""
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name in expected else 'too many'}"
        lines = _lines(expected[name]), _lines(found[name])
        for number, (one, other) in enumerate(zip(*lines, strict=False), 1):
            if one != other:
                return f"line {number} of {name} is {other[:200]!r} and not {one[:200]!r}"
        if expected[name] != found[name]:
            same = len(lines[0]) == len(lines[1])
            return f"{name} differs" if same else f"{name} has {len(lines[1])} lines and not {len(lines[0])}"
    return "nothing differs"


def _lines(content: object) -> list[str]:
    """Return the lines of a text, the items of a list, or the repr of anything else."""
    if isinstance(content, str):
        return content.splitlines()
    if isinstance(content, list | tuple):
        return [str(each) for each in cast("Sequence[object]", content)]
    return [repr(content)]
