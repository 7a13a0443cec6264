"""How the long tests report a promise that was not kept."""


class Violation(Exception):  # noqa: N818 - names what was found, not an error of this program
    """Raised when a promise was not kept."""


def require(condition: object, message: str) -> None:
    """Raise `Violation` unless the condition is true."""
    if not condition:
        raise Violation(message)
