"""What the tests and the commands in tests/ share: ``from support import ...`` finds it in both."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
