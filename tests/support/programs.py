"""Running the installed command, or Python source, in a process of its own."""

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from evsys_bus.cli import run

EVSYS_BUS = str(Path(sys.executable).with_name("evsys-bus"))
"""The installed command."""


def run_evsys_bus(*arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run the installed command to its end; ``options`` go to `subprocess.run`."""
    return _run_command([EVSYS_BUS, *map(str, arguments)], options)


def command_in(folder: Path, capsys: pytest.CaptureFixture[str]) -> "Callable[..., subprocess.CompletedProcess[str]]":
    """Return a function that runs the command line in this process, with this current folder."""

    def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
        with contextlib.chdir(folder):
            code = run([str(each) for each in arguments])
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return command


def run_python(source: str, *arguments: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python source to its end; ``options`` go to `subprocess.run`."""
    return _run_command([sys.executable, "-c", source, *map(str, arguments)], options)


def in_terminal(arguments: Sequence[str], columns: int, cwd: Path) -> str:
    """Run the installed command in a terminal of this width, and return its screen as text."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen(
        [EVSYS_BUS, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=cwd
    )
    os.close(slave)
    parts: list[bytes] = []
    with suppress(OSError):  # EIO: the other side is closed
        while part := os.read(master, 1 << 16):
            parts.append(part)
    os.close(master)
    assert process.wait() == 0, b"".join(parts)
    return b"".join(parts).decode().replace("\r\n", "\n")


def running_processes() -> list[tuple[int, str]]:
    """Return the pid and the command line of every process of this machine; zombies do not count."""
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-A", "-ww", "-o", "pid=,stat=,args="]
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
        rows = [line.split(maxsplit=2) for line in listing.stdout.splitlines()]
        return [(int(row[0]), row[2]) for row in rows if "Z" not in row[1]]
    found: list[tuple[int, str]] = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            line, stat = (path / "cmdline").read_bytes(), (path / "stat").read_text(errors="replace")
            if stat.rpartition(")")[2].split()[0] != "Z":
                found.append((int(path.name), os.fsdecode(line.replace(b"\0", b" "))))
    return found


def processes_of(folder: str | Path) -> dict[int, str]:
    """Return the command lines, by pid, of the other processes with this folder on their command line."""
    return {pid: command for pid, command in running_processes() if str(folder) in command and pid != os.getpid()}


def _run_command(command: list[str], options: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, **{"capture_output": True, "text": True, **options})  # noqa: PLW1510  # options may contain check
