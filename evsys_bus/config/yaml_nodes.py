"""Nodes of a document: values with their positions, composed from YAML text or a file, and replaced by ``--set``.

`read_document` reads a file, `with_overrides` replaces values by those of the command line, and errors show where each
value came from. ruamel.yaml parses the text; values follow the core schema of YAML 1.2 (``1e-3`` is a number, ``yes``
is text, a date is text). The nodes are built here from ruamel's events, because its own composer limits neither
recursion nor aliases.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import msgspec

from evsys_bus.config.spec import PathPart, combine_errors, display_path, join_path, split_path
from evsys_bus.errors import ConfigError, DocumentError, Location, did_you_mean

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


MAX_NODES: Final = 100_000
"""Number of values in one document, with aliases expanded."""
MAX_DEPTH: Final = 50
"""Depth of nested mappings and lists."""
_MAX_MISTAKES: Final = 20
"""After so many, composing a document ends."""
_BASES: Final = {"0b": 2, "0o": 8, "0x": 16}

_Path = tuple[PathPart, ...]


def compose(text: str, name: str, *, single_value: bool = False, mistakes: list[DocumentError] | None = None) -> Node:
    """Parse one YAML document to nodes; an empty document is null.

    Args:
        text: The document.
        name: Its name in errors.
        single_value: Whether the text is a single value, not a file; then errors show only its name, no line.
        mistakes: Gets the errors of single keys and values, which then do not keep the rest from being composed: a
            duplicate key is left out, a value that cannot be held is null. None to raise the first.

    Raises:
        DocumentError: The text is not YAML, or has tags, several documents, a duplicate key, a key that is not a
            scalar, or more nodes or depth than the limits allow.
    """
    source = Source(name, None if single_value else tuple(re.split(r"\r\n|\r|\n", text)))
    return _Composer(source, text, mistakes).compose_document()


class _Composer:
    """Builds nodes from the events of ruamel.yaml, which are untyped."""

    def __init__(self, source: Source, text: str, mistakes: list[DocumentError] | None) -> None:
        from ruamel.yaml import YAML

        yaml = YAML(typ="safe", pure=True)
        self._source = source
        self._text = text
        self._resolver: Any = yaml.resolver
        self._events = self._parse_events(yaml)
        self._anchors: dict[str, Node] = {}
        self._node_count = 0
        self._mistakes = mistakes

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
            self._add_mistake(f"tags are refused: {str(event.tag)!r:.60}", event, path, fix=fix)
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
                nodes = list(node.content) if isinstance(node.content, tuple) else [node]
                if not all(isinstance(each.content, dict) for each in nodes):
                    fix = "write <<: *anchor, where the anchor is on a mapping"
                    self._add_mistake('"<<" merges mappings, and this is none', event, path, fix=fix)
                merged_nodes += [each for each in nodes if isinstance(each.content, dict)]
            elif key in entries:
                lines = f"lines {entries[key].key.line + 1} and {token.line + 1}"
                what = f'the key "{key:.60}" is twice in one mapping' + (f": {lines}" if self._source.lines else "")
                self._add_mistake(what, event, (*path, key), fix="remove one of them, or rename it")
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
            self._add_mistake(what, event, path, fix=fix)
            return Node(self._token(event), None)
        if depth + node.height - 1 > MAX_DEPTH:
            self._raise_too_deep(event, path)
        self._count_nodes(node.size, event, path)
        return node

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
                    return _parse_float(text.replace("_", "").lower())
                case "int":
                    return _parse_integer(text.replace("_", "").lower())
                case _:
                    return text
        except ValueError:
            fix = "write a number that fits in 64 bits, or quote it if it is text"
            self._add_mistake(f"{text!r:.60} is no number that can be held", event, path, fix=fix)
            return None

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

    def _add_mistake(self, what: str, event: Any, path: _Path, *, fix: str) -> None:
        """Add an error that does not keep the rest of the document from being composed."""
        error = DocumentError(what, where=self._token(event).where(join_path("$", *path)), fix=fix)
        if self._mistakes is None or len(self._mistakes) >= _MAX_MISTAKES:
            raise error
        self._mistakes.append(error)

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


def _parse_float(text: str) -> float:
    """Raises ValueError for a number that is too large; infinity is written as ``.inf``."""
    value = float(re.sub(r"\.(?=inf|nan)", "", text))
    if math.isinf(value) and "inf" not in text:
        raise ValueError
    return value


def _parse_integer(text: str) -> int:
    digits = text.lstrip("+-")
    base = _BASES.get(digits[:2])
    value = int(digits) if base is None else int(digits[2:], base)
    value = -value if text.startswith("-") else value
    if not -(2**63) <= value < 2**64:
        raise ValueError(text)
    return value


MAX_BYTES: Final = 1 << 20
"""Size limit of a file."""


class Document(msgspec.Struct, frozen=True):
    """A parsed mapping with positions."""

    root: Node

    @property
    def value(self) -> dict[str, Any]:
        """The mapping as built-in types; a new copy at each access."""
        return self.root.to_builtins()

    def where(self, path: str, *, key: bool = False) -> Location:
        """Return the position of a value: of the value itself if it is a scalar, else of its key.

        Args:
            path: JSON path as in errors: ``$.callbacks[1].kind``. If it does not exist, the position of its nearest
                existing parent is returned.
            key: Always return the position of the key.
        """
        node, token = self.root, self.root.token
        try:
            parts = split_path(path)
        except ValueError:
            parts = ()
        for part in parts:
            if isinstance(node.content, dict) and part in node.content:
                token, node = node.content[str(part)]
            elif isinstance(node.content, tuple) and isinstance(part, int) and part < len(node.content):
                node = node.content[part]
                token = node.token
            else:
                return token.where(path)
        at_key = key or isinstance(node.content, dict | tuple) or node.token.width == 0
        return (token if at_key else node.token).where(path)


def read_document(path: str | Path, *, mistakes: list[DocumentError] | None = None) -> Document:
    """Read a file.

    Args:
        path: The file.
        mistakes: Gets the errors of single keys and values, as with `compose`; None to raise the first.

    Raises:
        DocumentError: The file cannot be read, is larger than `MAX_BYTES`, is not UTF-8 or not YAML, has something that
            `compose` refuses, or is not a mapping.
    """
    try:
        with Path(path).open("rb") as file:
            read = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        why = getattr(error, "strerror", None) or str(error)
        fix = "give the path of an experiment file that you may read"
        raise DocumentError("the file cannot be read", where=Location("$", str(path)), why=why, fix=fix) from None
    if len(read) > MAX_BYTES:
        what = f"the file is larger than {MAX_BYTES:,} bytes"
        raise DocumentError(
            what, where=Location("$", str(path)), fix="keep data in files of its own, and name them here"
        )
    try:
        text = read.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = read[: error.start].decode("utf-8", "replace")
        lines = tuple(before.splitlines() or ("",))
        where = Source(str(path), lines).where("$", len(lines) - 1, len(lines[-1]))
        what = f"the file is not UTF-8: byte 0x{read[error.start]:02X}"
        raise DocumentError(what, where=where, fix="save it as UTF-8") from None
    root = compose(text, str(path), mistakes=mistakes)
    if not isinstance(root.content, dict):
        what = f"an experiment file must hold a mapping, not {_type_name(root)}"
        raise DocumentError(what, where=root.token.where("$"), fix='begin it with a line like "name: my-experiment"')
    return Document(root)


def with_overrides(document: Document, overrides: Iterable[str]) -> Document:
    """Return the document with values replaced: ``["run.lr=1e-3", "callbacks[0].params.every=5"]``.

    The text after the ``=`` is parsed as YAML. The last key of a path may be new, and so may one mapping at the top
    level; all other parts of the path must exist. Overrides are applied in order.

    Raises:
        DocumentError: An override has another form, or its path does not exist; several as `ConfigErrors`.
    """
    root = document.root
    errors: list[ConfigError] = []
    for override in overrides:
        label = f"--set {override}"
        try:
            path, text = _split_override(override, label)
            value = compose(text, label, single_value=True)
            root = _set_value(root, path, value, Token(Source(label), 0, 0, 1), ())
        except DocumentError as error:
            errors.append(error)
    if errors:
        raise combine_errors(errors)
    return Document(root)


def _split_override(text: str, label: str) -> tuple[tuple[PathPart, ...], str]:
    """Split an override into path and value, at the first ``=`` after a valid path; quoted keys may contain ``=``."""
    position = text.find("=")
    while position > 0:
        try:
            path = text[:position]
            return split_path(f"${path}" if path.startswith("[") else f"$.{path}"), text[position + 1 :]
        except ValueError:
            position = text.find("=", position + 1)
    fix = "write it like --set run.lr=1e-3, --set callbacks[0].params.every=5 or --set 'runs[\"a.b\"].hidden=64'"
    raise DocumentError("this is not path=value", where=Location("$", label), fix=fix)


def _set_value(
    node: Node, path: tuple[PathPart, ...], value: Node, token: Token, parent_path: tuple[PathPart, ...]
) -> Node:
    if not path:
        return value
    part, rest, child_path = path[0], path[1:], (*parent_path, path[0])
    content = node.content
    if isinstance(part, int):
        if not isinstance(content, tuple):
            raise _path_error(
                f'"{display_path(parent_path)}" is {_type_name(node)}, not a list',
                child_path,
                token,
                f"its keys: {_key_list(node)}",
            )
        if part >= len(content):
            raise _path_error(
                f'"{display_path(parent_path)}" has {len(content)} items',
                child_path,
                token,
                f"they are counted from 0, the first is {display_path((*parent_path, 0))}",
            )
        return sequence_node(
            node.token,
            (*content[:part], _set_value(content[part], rest, value, token, child_path), *content[part + 1 :]),
        )
    if content is None:
        content = {}
    if not isinstance(content, dict):
        what = f'"{display_path(parent_path)}" is {_type_name(node)}, not a mapping'
        fix = (
            f'write "{display_path(parent_path)}[0]" for its first item'
            if isinstance(content, tuple)
            else "set it as a whole"
        )
        raise _path_error(what, child_path, token, fix)
    old = content.get(part)
    if old is None and rest and parent_path:
        hint = did_you_mean(part, content) or f'set "{display_path(child_path)}" as a whole'
        raise _path_error(f'"{display_path(parent_path)}" has no "{part}"', child_path, token, hint)
    child = Node(token, None) if old is None else old.node
    key = token if old is None or not rest else old.key
    return mapping_node(node.token, content | {part: Entry(key, _set_value(child, rest, value, token, child_path))})


def _path_error(what: str, path: tuple[PathPart, ...], token: Token, fix: str) -> DocumentError:
    return DocumentError(what, where=token.where(join_path("$", *path)), fix=fix)


def _key_list(node: Node) -> str:
    return ", ".join(node.content) if isinstance(node.content, dict) else "none"


def _type_name(node: Node) -> str:
    match node.content:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case tuple():
            return "a list"
        case str():
            return "text"
        case bool():
            return "true or false"
        case _:
            return "a number"
