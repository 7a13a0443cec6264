"""Values with the places where they stand in a text: what a document is made of."""

from typing import Any, Final, NamedTuple

import msgspec

from evsys_bus.errors import Where

_MAX_LINE: Final = 400
"""Characters of a line that is shown; a longer one is not."""

Scalar = str | int | float | bool | None


class Source(msgspec.Struct, frozen=True):
    """The text that nodes stand in."""

    name: str
    """The file, or what was written on the command line."""
    lines: tuple[str, ...] | None = None
    """None: a single value, whose name says all."""

    def where(self, path: str, line: int, column: int, width: int = 1) -> Where:
        """A place in it; line and column are 0-based here and 1-based there."""
        if self.lines is None:
            return Where(path, self.name)
        text = self.lines[line] if line < len(self.lines) else ""
        shown = "".join(each if each.isprintable() else " " for each in text) if len(text) <= _MAX_LINE else None
        return Where(path, self.name, line + 1, column + 1, shown, max(1, width))


class Token(msgspec.Struct, frozen=True):
    """Where a key or a value stands."""

    source: Source
    line: int
    """0-based, as the column."""
    column: int
    width: int
    """0 for a value that is not written out, such as the one in ``key:``."""

    def where(self, path: str) -> Where:
        """This place, called by its path."""
        return self.source.where(path, self.line, self.column, self.width)


class Node(msgspec.Struct, frozen=True):
    """A value, and where it stands. What an alias stands for is the anchored node itself."""

    token: Token
    content: "Scalar | tuple[Node, ...] | dict[str, Entry]"
    size: int = 1
    """Nodes in it, itself included."""
    height: int = 1
    """Mappings and lists within each other, down to its deepest value."""

    def plain(self) -> Any:
        """The value alone, made anew. Any: it is whatever was written."""
        if isinstance(self.content, dict):
            return {key: entry.node.plain() for key, entry in self.content.items()}
        if isinstance(self.content, tuple):
            return [node.plain() for node in self.content]
        return self.content


class Entry(NamedTuple):
    """One key of a mapping and its value."""

    key: Token
    node: Node


def listing(token: Token, items: tuple[Node, ...]) -> Node:
    """A list of nodes."""
    return Node(token, items, 1 + sum(each.size for each in items), 1 + max((each.height for each in items), default=0))


def mapping(token: Token, entries: dict[str, Entry]) -> Node:
    """A mapping of keys to nodes."""
    nodes = [entry.node for entry in entries.values()]
    return Node(
        token, entries, 1 + sum(each.size for each in nodes), 1 + max((each.height for each in nodes), default=0)
    )
