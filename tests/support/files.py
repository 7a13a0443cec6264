"""Files as tests read them, and a small file system to fill."""

import contextlib
import csv
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def parse_json_lines(text: str) -> list[Any]:
    """The JSON of each line. Any: what tests look into."""
    return [json.loads(line) for line in text.splitlines()]


def read_json_lines(path: str | Path) -> list[Any]:
    """The JSON of each line of a file. Any: what tests look into."""
    return parse_json_lines(Path(path).read_text(encoding="utf-8"))


def read_ledger(experiment: str | Path) -> Any:
    """The ledger in an experiment's folder. Any: what tests look into."""
    return json.loads(Path(experiment, "experiment.json").read_text(encoding="utf-8"))


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """The rows of a table, by column."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    """A file system of such a size ('1m') in a new folder; the test is skipped where none may be mounted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # a test that fails may have files open there
