"""``evsys-bus doctor``: reports on this machine's Python, packages, disk and environment; secrets are never shown."""

import os
import re
import sys
from pathlib import Path
from typing import Final

import click

from evsys_bus.cli.output.formatting import format_facts
from evsys_bus.cli.output.screen import Screen, color_option, json_option, terminal_width, wrap

VARIABLES: Final = (
    "PYTHONPATH",
    "PYTHONASYNCIODEBUG",
    "NO_COLOR",
    "FORCE_COLOR",
    "TERM",
    "TMPDIR",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "SLURM_JOB_ID",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
_PREFIXES: Final = ("EVSYS_", "AWS_", "S3_", "WANDB_")
_SECRET_WORDS: Final = ("AUTH", "CREDENTIAL", "KEY", "PASS", "SECRET", "TOKEN")


@click.command("doctor")
@json_option
@color_option
@click.pass_obj
def command(screen: Screen, as_json: bool) -> int:
    """Report on Python, packages, the event loop, the disk of the working directory, and the environment.

    Exits with 3 if something that evsys-bus needs does not work here.
    """
    required, extras = _requirements()
    names = sorted(name for name in os.environ if name in VARIABLES or name.startswith(_PREFIXES))
    sections = {
        "machine": _machine(),
        "packages": _versions(required),
        **{f"extra {name}": _versions(packages) for name, packages in extras.items()},
        "disk": _disk(Path.cwd()),
        "environment": {name: _redacted(name, os.environ[name]) for name in names},
    }
    faults = _faults(sections)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode({**sections, "faults": faults}))
        return 3 if faults else 0
    width = terminal_width(sys.stdout)
    for name, facts in sections.items():
        extra = name.removeprefix("extra ")
        hint = f"   install: pip install 'evsys-bus[{extra}]'   or   uv add 'evsys-bus[{extra}]'"
        note = hint if extra != name and "missing" in facts.values() else ""
        rows = [[key, value] for key, value in facts.items()]
        click.echo(
            "\n".join(
                [*wrap(f"{name}{note}", width), *(f"  {line}" for line in format_facts(rows, width and width - 2)), ""]
            )
        )
    for fault in faults:
        click.echo(f"{screen.style('!', sys.stdout, fg='red', bold=True)} {fault}")
    if not faults:
        click.echo("everything that evsys-bus needs works here")
    return 3 if faults else 0


def _machine() -> dict[str, str]:
    import asyncio
    import platform

    loop = asyncio.new_event_loop()
    loop.close()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "evsys-bus": _version("evsys-bus"),
        "python": f"{platform.python_version()} {platform.python_implementation()}   {sys.executable}",
        "platform": platform.platform(),
        "cores": f"{affinity} of {os.cpu_count()}",
        "event loop": f"{type(loop).__module__}.{type(loop).__name__}   (uvloop {_version('uvloop')})",
    }


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the required packages, and those of each extra except for extras that only combine other extras."""
    from importlib.metadata import PackageNotFoundError, requires

    from evsys_bus.config.registry import packages_by_extra

    try:
        lines = requires("evsys-bus") or []
    except PackageNotFoundError:  # the package is not installed
        lines = []
    required = [found[0] for line in lines if "extra ==" not in line and (found := re.match(r"[\w.-]+", line))]
    extras = packages_by_extra(lines)
    sets = {name: set(packages) for name, packages in extras.items()}
    parts = {name: [other for other in sets.values() if other < each] for name, each in sets.items()}
    composite = {name for name, each in sets.items() if each == set[str]().union(*parts[name])}
    return required, {name: packages for name, packages in extras.items() if name not in composite}


def _versions(packages: list[str]) -> dict[str, str]:
    return {package: _version(package) for package in packages}


def _disk(folder: Path) -> dict[str, str]:
    import shutil
    import tempfile

    facts = {"folder": str(folder)}
    try:
        facts["free"] = f"{shutil.disk_usage(folder).free / 2**30:,.1f} GiB"
    except OSError as error:
        facts["free"] = f"unknown: {error.strerror}"
    try:
        with tempfile.TemporaryDirectory(prefix=".evsys-bus-doctor-", dir=folder) as probe:
            facts["append"] = _append_works(os.path.join(probe, "append"))  # noqa: PTH118 # os.open takes a string
            facts["lock"] = _lock_works(os.path.join(probe, "lock"))  # noqa: PTH118 # as above
    except OSError as error:
        facts["write"] = f"fails: {error.strerror}"
    return facts


def _append_works(path: str) -> str:
    """Append from two descriptors in turns, as a writer and its successor do; some network file systems lose data."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    first, second = os.open(path, flags, 0o600), os.open(path, flags, 0o600)
    try:
        for file, part in ((first, b"a"), (second, b"b"), (first, b"c")):
            os.write(file, part)
    finally:
        os.close(first)
        os.close(second)
    return "works" if Path(path).read_bytes() == b"abc" else "fails: one writer overwrote the other"


def _lock_works(path: str) -> str:
    """Check that a second descriptor cannot take a lock that the first one holds."""
    from evsys_bus.disk import OsDisk

    disk, locks = OsDisk(), list[int]()
    try:
        locks += [lock for _ in range(2) if (lock := disk.lock(path)) is not None]
    except ImportError:
        return "fails: this platform has no flock"
    except OSError as error:
        return f"fails: {error.strerror}"
    finally:
        for lock in locks:
            disk.close(lock)
    return "works" if len(locks) == 1 else "fails: two writers hold one lock"


def _redacted(name: str, value: str) -> str:
    """Return the value without secrets: only its length if the name implies one, and texts without credentials."""
    from evsys_bus.codec.redact import is_secret_key, redact_text

    if is_secret_key(name) or any(word in name.upper() for word in _SECRET_WORDS):
        return f"set ({len(value)} characters, hidden)"
    return redact_text(re.sub(r"//[^/@\s]+@", "//(hidden)@", value))


def _faults(sections: dict[str, dict[str, str]]) -> list[str]:
    faults = [f"{name} is missing" for name, found in sections["packages"].items() if found == "missing"]
    disk = sections["disk"]
    faults += [f"{what} {found}: choose another directory" for what, found in disk.items() if found.startswith("fails")]
    return faults
