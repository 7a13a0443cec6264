"""What is collected here: the docstrings' examples, without those of bridges whose framework is not installed."""

from importlib.util import find_spec
from pathlib import Path

_BRIDGES = Path(__file__).parent / "evsys_adapters" / "bridges"

collect_ignore = [
    str(path) for path in _BRIDGES.glob("*.py") if not path.stem.startswith("_") and find_spec(path.stem) is None
]
