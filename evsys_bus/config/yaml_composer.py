"""``compose``: YAML text to nodes, with limits on size and depth.

ruamel.yaml parses the text; values follow the core schema of YAML 1.2 (``1e-3`` is a number, ``yes`` is text, a date is
text). The nodes are built here from ruamel's events, because its own composer limits neither recursion nor aliases.
"""

import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from evsys_bus.config.spec import PathPart, join_path
from evsys_bus.config.yaml_nodes import Entry, Node, Scalar, Source, Token, mapping_node, sequence_node
from evsys_bus.errors import DocumentError, Location

MAX_NODES: Final = 100_000
"""Number of values in one document, with aliases expanded."""
MAX_DEPTH: Final = 50
"""Depth of nested mappings and lists."""
_BASES: Final = {"0b": 2, "0o": 8, "0x": 16}

_Path = tuple[PathPart, ...]


def compose(text: str, name: str, *, single_value: bool = False) -> Node:
    """Parse one YAML document to nodes; an empty document is null.

    Args:
        text: The document.
        name: Its name in errors.
        single_value: Whether the text is a single value, not a file; then errors show only its name, no line.

    Raises:
        DocumentError: The text is not YAML, or has tags, several documents, a duplicate key, a key that is not a
            scalar, or more nodes or depth than the limits allow.
    """
    source = Source(name, None if single_value else tuple(re.split(r"\r\n|\r|\n", text)))
    return _Composer(source, text).compose_document()


class _Composer:
    """Builds nodes from the events of ruamel.yaml, which are untyped."""

    def __init__(self, source: Source, text: str) -> None:
        from ruamel.yaml import YAML

        yaml = YAML(typ="safe", pure=True)
        self._source = source
        self._text = text
        self._resolver: Any = yaml.resolver
        self._events = self._parse_events(yaml)
        self._anchors: dict[str, Node] = {}
        self._node_count = 0

    def compose_document(self) -> Node:
        node: Node | None = None
        for event in self._events:
            match type(event).__name__:
                case "DocumentStartEvent" if node is not None:
                    what = "a second document begins here, and only one is read"
                    self._raise_error(
                        what, event, (), fix='remove the "---" and what follows it, or put it in another file'
                    )
                case "DocumentStartEvent":
                    if event.version not in {None, (1, 2)}:
                        self._raise_error("only YAML 1.2 is read", event, (), fix="remove the %YAML line")
                    node = self._compose_node(next(self._events), (), 1)
                case _:
                    pass
        return Node(Token(self._source, 0, 0, 0), None) if node is None else node

    def _compose_node(self, event: Any, path: _Path, depth: int) -> Node:
        kind = type(event).__name__
        if depth > MAX_DEPTH:
            self._raise_too_deep(event, path)
        if kind == "AliasEvent":
            return self._resolve_alias(event, path, depth)
        self._count_nodes(1, event, path)
        if event.tag is not None:
            fix = "remove the tag: text, numbers, true, false, null, lists and mappings need none"
            self._raise_error(f"tags are refused: {str(event.tag)!r:.60}", event, path, fix=fix)
        if kind == "ScalarEvent":
            node = Node(self._token(event), self._scalar_value(event, path))
        elif kind == "SequenceStartEvent":
            node = self._compose_sequence(event, path, depth)
        else:
            node = self._compose_mapping(event, path, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _compose_sequence(self, start: Any, path: _Path, depth: int) -> Node:
        items: list[Node] = []
        while type(event := next(self._events)).__name__ != "SequenceEndEvent":
            items.append(self._compose_node(event, (*path, len(items)), depth + 1))
        return sequence_node(self._token(start, width=1), tuple(items))

    def _compose_mapping(self, start: Any, path: _Path, depth: int) -> Node:
        entries: dict[str, Entry] = {}
        merged_nodes: list[Node] = []
        while type(event := next(self._events)).__name__ != "MappingEndEvent":
            key = self._compose_key(event, path)
            token = self._token(event)
            node = self._compose_node(next(self._events), (*path, key), depth + 1)
            if key == "<<" and event.implicit[0]:
                merged_nodes += self._merged_nodes(node, event, path)
            elif key in entries:
                lines = f"lines {entries[key].key.line + 1} and {token.line + 1}"
                what = f'the key "{key:.60}" is twice in one mapping' + (f": {lines}" if self._source.lines else "")
                self._raise_error(what, event, (*path, key), fix="remove one of them, or rename it")
            else:
                entries[key] = Entry(token, node)
        for node in merged_nodes:
            content = node.content
            assert isinstance(content, dict)
            for key, entry in content.items():
                entries.setdefault(key, entry)  # its nodes were counted with the alias
        width = 1 if start.flow_style or not entries else next(iter(entries.values())).key.width
        return mapping_node(self._token(start, width=width), entries)

    def _compose_key(self, event: Any, path: _Path) -> str:
        if type(event).__name__ != "ScalarEvent" or event.tag is not None:
            fix = 'write key: value, with plain or quoted text before the ":"'
            self._raise_error("a key must be text: no list, mapping, alias or tag", event, path, fix=fix)
        self._count_nodes(1, event, path)
        key = self._scalar_text(event, path)
        if event.anchor is not None:
            self._anchors[event.anchor] = Node(self._token(event), key)
        return key

    def _resolve_alias(self, event: Any, path: _Path, depth: int) -> Node:
        node = self._anchors.get(event.anchor)
        if node is None:
            what = f'nothing before this is anchored as "&{event.anchor:.60}"'
            fix = "anchor the value first, and never within itself; or write it out; or quote text that begins with *"
            self._raise_error(what, event, path, fix=fix)
        if depth + node.height - 1 > MAX_DEPTH:
            self._raise_too_deep(event, path)
        self._count_nodes(node.size, event, path)
        return node

    def _merged_nodes(self, node: Node, event: Any, path: _Path) -> list[Node]:
        nodes = list(node.content) if isinstance(node.content, tuple) else [node]
        if not all(isinstance(each.content, dict) for each in nodes):
            fix = "write <<: *anchor, where the anchor is on a mapping"
            self._raise_error('"<<" merges mappings, and this is none', event, path, fix=fix)
        return nodes

    def _scalar_value(self, event: Any, path: _Path) -> Scalar:
        from ruamel.yaml.nodes import ScalarNode

        text = self._scalar_text(event, path)
        tag = str(self._resolver.resolve(ScalarNode, text, event.implicit)).rpartition(":")[2]
        try:
            match tag:
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "float":
                    return float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
                case "int":
                    return _parse_integer(text.replace("_", "").lower())
                case _:
                    return text
        except ValueError:
            fix = "write a number that fits in 64 bits, or quote it if it is text"
            self._raise_error(f"{text!r:.60} is no number that can be held", event, path, fix=fix)

    def _scalar_text(self, event: Any, path: _Path) -> str:
        """Return the text of a scalar; surrogate pairs, which JSON escapes produce, are joined to one character."""
        try:
            return event.value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._raise_error(
                "half a character: \\ud800 to \\udfff come in pairs", event, path, fix="write the character"
            )

    def _token(self, event: Any, *, width: int | None = None) -> Token:
        start, end = event.start_mark, event.end_mark
        if width is None and start.line == end.line:
            width = end.column - start.column
        return Token(self._source, start.line, start.column, self._rest_of_line(start) if width is None else width)

    def _rest_of_line(self, mark: Any) -> int:
        lines, line = self._source.lines, int(mark.line)
        return len(lines[line].rstrip()) - mark.column if lines and line < len(lines) else 1

    def _count_nodes(self, nodes: int, event: Any, path: _Path) -> None:
        self._node_count += nodes
        if self._node_count > MAX_NODES:
            what = f"more than {MAX_NODES:,} values, aliases expanded"
            self._raise_error(
                what, event, path, fix="keep data in files of its own, and name them here", show_path=False
            )

    def _raise_too_deep(self, event: Any, path: _Path) -> NoReturn:
        what = f"more than {MAX_DEPTH} lists and mappings within each other"
        self._raise_error(what, event, path, fix="make it flatter", show_path=False)

    def _raise_error(self, what: str, event: Any, path: _Path, *, fix: str, show_path: bool = True) -> NoReturn:
        token = self._token(event)
        raise DocumentError(what, where=token.where(join_path("$", *path) if show_path else "$"), fix=fix)

    def _parse_events(self, yaml: Any) -> Iterator[Any]:
        from ruamel.yaml.error import MarkedYAMLError, YAMLError
        from ruamel.yaml.reader import ReaderError

        try:
            yield from yaml.parse(self._text)
        except ReaderError as error:
            raise self._invalid_character_error(error) from None
        except MarkedYAMLError as error:
            raise self._syntax_error(error) from None
        except (YAMLError, ValueError, OverflowError, LookupError) as error:
            fix = "look for escapes and directives that are no YAML"
            raise DocumentError(
                "this is not YAML", where=Location("$", self._source.name), why=str(error), fix=fix
            ) from None

    def _invalid_character_error(self, error: Any) -> DocumentError:
        before = self._text[: error.position].rpartition("\n")
        where = self._source.where("$", before[0].count("\n") + bool(before[1]), len(before[2]))
        what = f"a character that YAML does not allow: U+{error.character:04X}"
        return DocumentError(what, where=where, fix='remove it; within "double quotes" it may be written as an escape')

    def _syntax_error(self, error: Any) -> DocumentError:
        mark: Any = error.problem_mark or error.context_mark
        context_mark: Any = error.context_mark
        where = Location("$", self._source.name) if mark is None else self._source.where("$", mark.line, mark.column)
        why = error.context
        if why and context_mark and mark and self._source.lines is not None and context_mark.line != mark.line:
            why = f"{why} that begins in line {context_mark.line + 1}"
        fix = 'check the indentation and the brackets; put quotes around text with ": " or " #" in it'
        if "'\\t'" in (error.problem or ""):
            fix = "indent with spaces"
        return DocumentError(f"this is not YAML: {error.problem or 'it ends too early'}", where=where, why=why, fix=fix)


def _parse_integer(text: str) -> int:
    digits = text.lstrip("+-")
    base = _BASES.get(digits[:2])
    value = int(digits) if base is None else int(digits[2:], base)
    value = -value if text.startswith("-") else value
    if not -(2**63) <= value < 2**64:
        raise ValueError(text)
    return value
