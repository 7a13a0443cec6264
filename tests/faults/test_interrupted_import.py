"""Ctrl-C in the middle of ``import evsys_bus``, as it comes to programs that are stopped right after their start."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys


class Interrupt:
    asked = False

    def find_spec(self, name, path=None, target=None):
        if name == "datetime" and not self.asked:
            self.asked = True
            raise KeyboardInterrupt


assert "datetime" not in sys.modules
sys.meta_path.insert(0, Interrupt())
try:
    exec(sys.argv[1])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("imports", ["from evsys_bus import EventBus", "from evsys_adapters import CsvMetricsCallback"])
def test_an_interrupt_while_datetime_is_imported_ends_the_program_as_a_ctrl_c(imports):
    """msgspec's C code imports it unchecked: it lost the interrupt, and crashed later where it made a decoder."""
    command = [sys.executable, "-S", "-c", PROGRAM, imports]
    path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, check=False, capture_output=True, env=path)
    assert done.returncode == 130, done.stderr.decode()
