"""``error.txt`` in a run's folder: the traceback of what the run raised last, for as long as it has not ended well."""

import traceback
from pathlib import Path
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.files import replace_file

ERROR: Final = "error.txt"
MAX_CHARS: Final = 64_000
"""Of a longer text the beginning and, twice as long, the end are kept."""


def keep_error(run_dir: Path, error: BaseException) -> Path | None:
    """Write the traceback, whole or not at all; the path, or None where it could not be written, which is logged."""
    path = run_dir / ERROR
    try:
        replace_file(path, _bounded(_formatted(error)).encode(errors="backslashreplace"), mode=0o666)
    except (OSError, MemoryError) as refusal:
        log().warning("run.error_unwritten", file=str(path), error=str(refusal))
        return None
    return path


def drop_error(run_dir: Path) -> None:
    """Remove what an earlier attempt left there: the run has ended well."""
    try:
        (run_dir / ERROR).unlink(missing_ok=True)
    except OSError as error:
        log().warning("run.error_stale", file=str(run_dir / ERROR), error=str(error))


def _formatted(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as failure:  # the error's own code ran
        frames = "".join(traceback.format_tb(error.__traceback__))
        return f"{frames}{type(error).__name__}: <its text cannot be told: {type(failure).__name__}>\n"


def _bounded(text: str) -> str:
    if len(text) <= MAX_CHARS:
        return text
    head = MAX_CHARS // 3
    tail = MAX_CHARS - head
    return f"{text[:head]}\n... {len(text) - MAX_CHARS} characters are left out here ...\n{text[-tail:]}"
