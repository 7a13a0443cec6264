"""Reserves stdout for JSON results: other output goes to stderr, as JSON if progress is JSON."""

import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout

from evsys_bus.cli.progress.capture import CapturedStream, LineRelay
from evsys_bus.codec import json_line


@contextmanager
def guard_stdout(*, result_is_json: bool, progress_is_json: bool) -> Generator[None]:
    """Redirect stdout to stderr within the block if the result is JSON."""
    if not result_is_json:
        yield
        return
    if not progress_is_json:
        with redirect_stdout(sys.stderr):
            yield
        return
    stream = CapturedStream(sys.stderr, LineRelay(_write_json_line))
    try:
        with redirect_stdout(stream):
            yield
    finally:
        stream.finish()


def _write_json_line(line: str) -> None:
    sys.stderr.write(json_line({"event": "printed", "text": line}).decode() + "\n")
    sys.stderr.flush()
