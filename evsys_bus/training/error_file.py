"""``error.txt`` in a run's directory: the traceback of its last error, until the run completes."""

import traceback
from pathlib import Path
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.files import replace_file

ERROR_FILE: Final = "error.txt"
MAX_CHARS: Final = 64_000
"""A longer traceback is cut in the middle; the end gets twice as many characters as the beginning."""


def write_error_file(run_dir: Path, error: BaseException) -> Path | None:
    """Write the traceback atomically and return the path; if that fails, log a warning and return None."""
    path = run_dir / ERROR_FILE
    try:
        replace_file(path, _truncate(_format_traceback(error)).encode(errors="backslashreplace"), mode=0o666)
    except (OSError, MemoryError) as write_error:
        log().warning("run.error_unwritten", file=str(path), error=str(write_error))
        return None
    return path


def remove_error_file(run_dir: Path) -> None:
    """Remove the error file of an earlier attempt, after the run completed."""
    try:
        (run_dir / ERROR_FILE).unlink(missing_ok=True)
    except OSError as error:
        log().warning("run.error_stale", file=str(run_dir / ERROR_FILE), error=str(error))


def _format_traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as failure:  # raised by the error's own code
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"{frames}{type(error).__name__}: <no message: {type(failure).__name__} while formatting it>\n"


def _truncate(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    head = MAX_CHARS // 3
    tail = MAX_CHARS - head
    return f"{text[:head]}\n... {len(text) - MAX_CHARS} characters are left out here ...\n{text[-tail:]}"
