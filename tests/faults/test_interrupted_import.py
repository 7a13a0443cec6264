"""Ctrl-C in the middle of ``import evsys_bus``, as it comes to programs that are stopped right after their start."""

import subprocess
import sys

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
    import evsys_bus
    from evsys_bus import EventBus
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_while_datetime_is_imported_ends_the_program_as_a_ctrl_c():
    """msgspec's C code imports it unchecked: it lost the interrupt, and crashed later where it made a decoder."""
    done = subprocess.run([sys.executable, "-S", "-c", PROGRAM], check=False, capture_output=True, env={
        "PYTHONPATH": ":".join(filter(None, sys.path))
    })  # fmt: skip
    assert done.returncode == 130, done.stderr.decode()
