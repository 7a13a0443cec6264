"""Reserves stdout for JSON results: other output goes to stderr, as JSON if progress is JSON."""

import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout

from evsys_bus.cli.progress.capture import CapturedStream, Relayed
from evsys_bus.codec import json_line


@contextmanager
def printed_aside(*, result_is_json: bool, progress_is_json: bool) -> Generator[None]:
    """Redirect stdout to stderr within the block if the result is JSON."""
    if not result_is_json:
        yield
        return
    if not progress_is_json:
        with redirect_stdout(sys.stderr):
            yield
        return
    stream = CapturedStream(sys.stderr, Relayed(_tell))
    try:
        with redirect_stdout(stream):
            yield
    finally:
        stream.finish()


def _tell(line: str) -> None:
    sys.stderr.write(json_line({"event": "printed", "text": line}).decode() + "\n")
    sys.stderr.flush()
