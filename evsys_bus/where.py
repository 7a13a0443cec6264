"""`Where`: a place in a configuration, with the line and a caret under the token where the file is known."""

import msgspec


class Where(msgspec.Struct, frozen=True):
    """A place in a configuration."""

    path: str
    """JSON path, ``$`` being the whole: ``$.callbacks[1].kind``."""
    file: str | None = None
    """The file it was read from, if it was read from one; or the option of the command line."""
    line: int | None = None
    """1-based line in that file."""
    column: int | None = None
    """1-based column of the token."""
    text: str | None = None
    """The line itself, so that a caret can be drawn under the token."""
    width: int = 1
    """Length of the token in characters."""

    def __str__(self) -> str:
        if self.file is None:
            return f" --> {self.path}"
        if self.line is None or self.column is None:
            return f" --> {self.file}   {self.path}"
        head = f" --> {self.file}:{self.line}:{self.column}   {self.path}"
        if self.text is None:
            return head
        gutter = " " * len(str(self.line))
        caret = " " * (self.column - 1) + "^" * self.width
        return f"{head}\n{gutter} |\n{self.line} | {self.text}\n{gutter} | {caret}"
