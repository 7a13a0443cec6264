"""The build of the dashboard's page, as pip and uv run it."""

import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from support import ROOT

PAGE = "adapters/evsys_adapters/dashboard/_web"
NO_REGISTRY = "http://127.0.0.1:9"  # the port of `discard`: nobody listens


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git has, with all changes, in a directory of its own; enough for a build."""
    listed = subprocess.run(
        "git ls-files -co --exclude-standard web evsys_bus adapters pyproject.toml README.md LICENSE".split(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "clone" / name)
    return tmp_path / "clone"


def build(source: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if not os.environ.get("CI") and shutil.which("uv") is None:
        pytest.skip("there is no uv")
    environ = {name: value for name, value in os.environ.items() if name != "EVSYS_BUS_REQUIRE_PAGE"}
    return subprocess.run(
        ["uv", "build", *options, "--out-dir", str(source.parent / "dist"), str(source)],
        env={**environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def pages_in(names: list[str]) -> set[str]:
    """The endings of the names of the page's files."""
    return {name.rsplit(".", 1)[-1].rsplit("/", 1)[-1] for name in names if f"{PAGE}/" in f"adapters/{name}"}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_fresh_clone_becomes_a_wheel_and_an_sdist_with_the_page(clone: Path) -> None:
    done = build(clone)
    assert done.returncode == 0, done.stderr
    dist = clone.parent / "dist"
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    page = {"html", "js", "css", "built-from"}
    assert pages_in(zipfile.ZipFile(wheel).namelist()) == page
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
        archive.extractall(clone.parent, filter="data")
    assert pages_in([name.split("/adapters/", 1)[-1] for name in names]) == page
    assert not [name for name in names if "node_modules" in name]

    # The sdist carries the page: a wheel is built from it without npm.
    shutil.rmtree(dist)
    unpacked = clone.parent / sdist.name.removesuffix(".tar.gz")
    done = build(unpacked, "--wheel", npm_config_registry=NO_REGISTRY, EVSYS_BUS_REQUIRE_PAGE="1")
    assert done.returncode == 0, done.stderr
    [wheel] = dist.glob("*.whl")
    assert pages_in(zipfile.ZipFile(wheel).namelist()) == page


@pytest.mark.long
@pytest.mark.timeout(300)
def test_without_npm_the_package_installs_and_records_why_it_has_no_page(clone: Path) -> None:
    offline = {"npm_config_registry": NO_REGISTRY, "npm_config_cache": str(clone.parent / "cache")}
    done = build(clone, "--wheel", **offline)
    assert done.returncode == 0, done.stderr
    [wheel] = (clone.parent / "dist").glob("*.whl")
    reason = zipfile.ZipFile(wheel).read("evsys_adapters/dashboard/_web/not-built.txt").decode()
    assert "npm could not install" in reason
    assert "uv sync --reinstall-package evsys-bus" in reason

    done = build(clone, "--wheel", EVSYS_BUS_REQUIRE_PAGE="1", **offline)
    assert done.returncode != 0
    assert "npm could not install" in done.stderr


def test_the_lock_of_the_page_names_no_registry() -> None:
    lock = (ROOT / "web" / "package-lock.json").read_text(encoding="utf-8")
    assert '"resolved"' not in lock
    assert lock.count('"integrity"') > 5


def test_git_has_only_the_sources_of_the_page() -> None:
    command = ["git", "ls-files", "web", PAGE]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = {".npmrc", "package-lock.json", "package.json", "tsconfig.json"}
    assert {name.split("/")[1] for name in names} == {*settings, "build.mjs", "hatch_build.py", "src"}
    assert {Path(name).suffix for name in names if "/src/" in name} == {".ts", ".tsx", ".css", ".html"}
