"""Ids that are made here, without asking anybody: UUIDv7, which hold the time at which they were made.

An id is kept in a small file beside what it names, so that a resumed run, and a resumed experiment, have the ids that
they had:

    <output_dir>/.evsys_ids/experiment
                            group-<name>-<digest>
    <output_dir>/<run_key>/.evsys_ids/run
"""

import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Final

from evsys_bus.diagnostics import log
from evsys_bus.files import create_file, load_file

FOLDER: Final = ".evsys_ids"
_VERSION: Final = 7 << 76
_VARIANT: Final = 2 << 62
_RANDOM: Final = ~(0xF << 76 | 3 << 62) & ((1 << 80) - 1)


def new_id() -> str:
    """A new UUIDv7."""
    return _uuid7(time.time(), os.urandom(10))


def derived_id(seconds: float, *parts: str) -> str:
    """The UUIDv7 of a time and some texts, the same each time.

    Args:
        seconds: Since the epoch; what the id says that it was made at.
        parts: What tells it from others of that time.
    """
    return _uuid7(seconds, hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=10).digest())


def made_at(text: str) -> float | None:
    """When the id was made, in seconds since the epoch; None where it is no UUIDv7."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        return None
    return (found.int >> 80) / 1000 if found.version == 7 else None  # noqa: PLR2004


def kept_id(folder: Path | None, name: str) -> str:
    """The id that is kept in a folder under a name; a new one, which is kept from now on, where there is none.

    What the disk refuses is a WARNING; the id is then good for this process.

    Args:
        folder: The experiment's, or the run's; None where there is none.
        name: One component of a path.
    """
    made = new_id()
    if folder is None:
        return made
    path = folder / FOLDER / name
    try:
        known = load_file(path, _id_of, set_aside=True)
        if known is None and not create_file(path, f"{made}\n".encode(), mode=0o666):
            known = load_file(path, _id_of, set_aside=False)  # of another process, which was quicker
    except OSError as error:
        fix = "a resume has another id, and is another run for EvSys: have the folder writable"
        log().warning("evsys.id_not_kept", path=str(path), error=str(error), fix=fix)
        known = None
    return known or made


def _uuid7(seconds: float, random: bytes) -> str:
    milliseconds = max(0, int(seconds * 1000)) & ((1 << 48) - 1)
    low = int.from_bytes(random, "big") & _RANDOM
    return str(uuid.UUID(int=milliseconds << 80 | _VERSION | _VARIANT | low))


def _id_of(data: bytes) -> str:
    text = data.decode("ascii").strip()
    if made_at(text) is None:
        raise ValueError("it holds no id")
    return text
