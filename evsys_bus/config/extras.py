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
    for package in _required_packages(point):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    return missing


def install_requirement(module: str, point: "EntryPoint | None") -> str:
    """Return what to install for a missing module: the smallest extra that includes it, else the module's own name."""
    if point is None or point.dist is None:
        return module
    if point.extras:
        return f"{point.dist.name}[{','.join(point.extras)}]"
    extras = packages_by_extra(point.dist.requires or ())
    providing = [
        extra for extra, packages in extras.items() if normalized_name(module) in map(normalized_name, packages)
    ]
    smallest = min(providing, key=lambda extra: len(extras[extra]), default=None)
    return module if smallest is None else f"{point.dist.name}[{smallest}]"


def packages_by_extra(requires: Iterable[str]) -> dict[str, list[str]]:
    """Parse the requirements in a package's metadata: extra -> its packages, without platform-specific ones."""
    extras: dict[str, list[str]] = {}
    for line in requires:
        match = re.match(r"""([\w.-]+)[^;]*;\s*extra\s*==\s*['"]([^'"]+)['"]\s*$""", line)
        if match:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def normalized_name(name: str) -> str:
    """Normalize a package name as package indexes do."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _required_packages(point: "EntryPoint") -> list[str]:
    if not point.extras or point.dist is None:
        return []
    requested = set(map(normalized_name, point.extras))
    extras = packages_by_extra(point.dist.requires or ())
    return [
        package for extra, packages in extras.items() if normalized_name(extra) in requested for package in packages
    ]
