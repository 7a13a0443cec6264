"""The description of the routes, for programs and people."""

from typing import Any, Final

DESCRIPTION: Final[dict[str, Any]] = {"openapi": "3.1.0"}
