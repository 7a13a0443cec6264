"""Reading files in tests, and a small file system to fill."""

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
    """Parse the JSON of each line."""
    return [json.loads(line) for line in text.splitlines()]


def read_json_lines(path: str | Path) -> list[Any]:
    """Parse the JSON of each line of a file."""
    return parse_json_lines(Path(path).read_text(encoding="utf-8"))


def read_experiment(experiment: str | Path) -> Any:
    """Return the content of ``experiment.json`` in the folder of an experiment."""
    return json.loads(Path(experiment, "experiment.json").read_text(encoding="utf-8"))


def read_csv(path: str | Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, as dicts by column."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def open_files(folder: Path) -> list[Path]:
    """Return the files in a folder that this process has open; skips the test where the system does not list them."""
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the open files of a process are not listed here")
    found = [each.resolve() for each in descriptors.iterdir()]
    return sorted(each for each in found if each.is_relative_to(folder.resolve()))


@contextlib.contextmanager
def small_file_system(path: Path, size: str) -> Iterator[Path]:
    """Mount a file system of this size ('1m') in a new folder; skips the test where mounting is not permitted."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # a failed test may have files open there
