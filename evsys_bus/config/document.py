"""`Document`: a YAML or JSON file as a mapping with the position of each value.

Values given on the command line replace those in the file, and errors show where they came from. `load` validates the
values.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.config.spec import PathPart, combine_errors, join_path, split_path
from evsys_bus.config.yaml_composer import compose
from evsys_bus.config.yaml_nodes import Entry, Node, Source, Token, mapping_node, sequence_node
from evsys_bus.errors import ConfigError, DocumentError, Location, did_you_mean

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


def read_document(path: str | Path) -> Document:
    """Read a file.

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
    root = compose(text, str(path))
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
                f'"{_format_path(parent_path)}" is {_type_name(node)}, not a list',
                child_path,
                token,
                f"its keys: {_key_list(node)}",
            )
        if part >= len(content):
            raise _path_error(
                f'"{_format_path(parent_path)}" has {len(content)} items',
                child_path,
                token,
                f"they are counted from 0, the first is {_format_path((*parent_path, 0))}",
            )
        return sequence_node(
            node.token,
            (*content[:part], _set_value(content[part], rest, value, token, child_path), *content[part + 1 :]),
        )
    if content is None:
        content = {}
    if not isinstance(content, dict):
        what = f'"{_format_path(parent_path)}" is {_type_name(node)}, not a mapping'
        fix = (
            f'write "{_format_path(parent_path)}[0]" for its first item'
            if isinstance(content, tuple)
            else "set it as a whole"
        )
        raise _path_error(what, child_path, token, fix)
    old = content.get(part)
    if old is None and rest and parent_path:
        hint = did_you_mean(part, content) or f'set "{_format_path(child_path)}" as a whole'
        raise _path_error(f'"{_format_path(parent_path)}" has no "{part}"', child_path, token, hint)
    child = Node(token, None) if old is None else old.node
    key = token if old is None or not rest else old.key
    return mapping_node(node.token, content | {part: Entry(key, _set_value(child, rest, value, token, child_path))})


def _path_error(what: str, path: tuple[PathPart, ...], token: Token, fix: str) -> DocumentError:
    return DocumentError(what, where=token.where(join_path("$", *path)), fix=fix)


def _format_path(path: tuple[PathPart, ...]) -> str:
    return join_path("$", *path).removeprefix("$").removeprefix(".")


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
