"""Helpers shared by the tests and the commands in tests/: both import them by ``from support import ...``."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
