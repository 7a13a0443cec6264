"""Nodes of a document: values with their positions in a text."""

from typing import Any, Final, NamedTuple

import msgspec

from evsys_bus.errors import Location

_MAX_LINE_CHARS: Final = 400
"""Length of a line that errors show; longer lines are not shown."""

Scalar = str | int | float | bool | None


class Source(msgspec.Struct, frozen=True):
    """The text that nodes were parsed from."""

    name: str
    """The file, or the option on the command line."""
    lines: tuple[str, ...] | None = None
    """None for a single value, which is identified by its name alone."""

    def where(self, path: str, line: int, column: int, width: int = 1) -> Location:
        """Return a position in the text; ``line`` and ``column`` are 0-based, those of `Location` 1-based."""
        if self.lines is None:
            return Location(path, self.name)
        text = self.lines[line] if line < len(self.lines) else ""
        printable = (
            "".join(each if each.isprintable() else " " for each in text) if len(text) <= _MAX_LINE_CHARS else None
        )
        return Location(path, self.name, line + 1, column + 1, printable, max(1, width))


class Token(msgspec.Struct, frozen=True):
    """The position of a key or a value."""

    source: Source
    line: int
    """0-based, as the column."""
    column: int
    width: int
    """0 for a value without text, such as the one in ``key:``."""

    def where(self, path: str) -> Location:
        """Return this position, for the value at a JSON path."""
        return self.source.where(path, self.line, self.column, self.width)


class Node(msgspec.Struct, frozen=True):
    """A value and its position. An alias is the anchored node itself."""

    token: Token
    content: "Scalar | tuple[Node, ...] | dict[str, Entry]"
    size: int = 1
    """Number of nodes in it, including itself."""
    height: int = 1
    """Number of levels, down to its deepest value."""

    def to_builtins(self) -> Any:
        """Return the value as built-in types, without positions."""
        if isinstance(self.content, dict):
            return {key: entry.node.to_builtins() for key, entry in self.content.items()}
        if isinstance(self.content, tuple):
            return [node.to_builtins() for node in self.content]
        return self.content


class Entry(NamedTuple):
    """One key of a mapping and its value."""

    key: Token
    node: Node


def sequence_node(token: Token, items: tuple[Node, ...]) -> Node:
    """Return the node of a list."""
    return Node(token, items, 1 + sum(each.size for each in items), 1 + max((each.height for each in items), default=0))


def mapping_node(token: Token, entries: dict[str, Entry]) -> Node:
    """Return the node of a mapping."""
    nodes = [entry.node for entry in entries.values()]
    return Node(
        token, entries, 1 + sum(each.size for each in nodes), 1 + max((each.height for each in nodes), default=0)
    )
