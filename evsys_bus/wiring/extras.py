"""The extras of an entry point, ``module:Class [extra]``: their packages, and which of those are not installed."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


def missing_packages(point: "EntryPoint") -> list[str]:
    """Return the packages of the entry point's extras that are not installed, without platform-specific ones."""
    import importlib.metadata

    missing: list[str] = []
    for package in _brought(point):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def requirement(module: str, point: "EntryPoint | None") -> str:
    """Return what to install for a missing module: the smallest extra that includes it, else the module's own name."""
    if point is None or point.dist is None:
        return module
    if point.extras:
        return f"{point.dist.name}[{','.join(point.extras)}]"
    extras = extras_of(point.dist.requires or ())
    bringing = [extra for extra, packages in extras.items() if plain_name(module) in map(plain_name, packages)]
    least = min(bringing, key=lambda extra: len(extras[extra]), default=None)
    return module if least is None else f"{point.dist.name}[{least}]"


def extras_of(requires: Iterable[str]) -> dict[str, list[str]]:
    """Parse the requirements in a package's metadata: extra -> its packages, without platform-specific ones."""
    extras: dict[str, list[str]] = {}
    for line in requires:
        each = re.match(r"""([\w.-]+)[^;]*;\s*extra\s*==\s*['"]([^'"]+)['"]\s*$""", line)
        if each:
            extras.setdefault(each[2], []).append(each[1])
    return extras


def plain_name(name: str) -> str:
    """Normalize a package name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _brought(point: "EntryPoint") -> list[str]:
    if not point.extras or point.dist is None:
        return []
    wanted = set(map(plain_name, point.extras))
    extras = extras_of(point.dist.requires or ())
    return [package for extra, packages in extras.items() if plain_name(extra) in wanted for package in packages]
