"""The source files of both packages, parsed once."""

import ast
import functools

from support import ROOT


@functools.cache
def source_trees() -> dict[str, ast.Module]:
    """Return the syntax trees of all modules, by their paths in the project."""
    paths = [path for folder in ("evsys_bus", "adapters/evsys_adapters") for path in (ROOT / folder).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(paths)}
