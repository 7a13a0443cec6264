"""IDs created locally: UUIDv7, which contain their creation time.

An ID is stored in a small file beside the object that it identifies, so that resumed runs and experiments have the same
IDs:

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

IDS_FOLDER: Final = ".evsys_ids"
_VERSION: Final = 7 << 76
_VARIANT: Final = 2 << 62
_RANDOM: Final = ~(0xF << 76 | 3 << 62) & ((1 << 80) - 1)


def new_id() -> str:
    """Return a new UUIDv7."""
    return _uuid7(time.time(), os.urandom(10))


def derived_id(seconds: float, *parts: str) -> str:
    """Return a deterministic UUIDv7 of a time and some texts.

    Args:
        seconds: Seconds since the epoch; the ID's creation time.
        parts: Texts that distinguish it from other IDs of that time.
    """
    return _uuid7(seconds, hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=10).digest())


def id_time(text: str) -> float | None:
    """Return the creation time in the ID, in seconds since the epoch; None if it is not a UUIDv7."""
    try:
        found = uuid.UUID(text)
    except ValueError:
        return None
    return (found.int >> 80) / 1000 if found.version == 7 else None  # noqa: PLR2004


def persistent_id(folder: Path | None, name: str) -> str:
    """Return the ID stored in a folder under a name, or create and store a new one.

    If the disk refuses it, logs a WARNING; the ID is then valid for this process only.

    Args:
        folder: The folder of the experiment or the run; None if there is none.
        name: One path component.
    """
    fresh_id = new_id()
    if folder is None:
        return fresh_id
    path = folder / IDS_FOLDER / name
    try:
        stored_id = load_file(path, _id_of, quarantine=True)
        if stored_id is None and not create_file(path, f"{fresh_id}\n".encode(), mode=0o666):
            stored_id = load_file(path, _id_of, quarantine=False)  # created by another process meanwhile
    except OSError as error:
        fix = "make the folder writable; without the stored id, a resumed run is another run for EvSys"
        log().warning("evsys.id_not_kept", path=str(path), error=str(error), fix=fix)
        stored_id = None
    return stored_id or fresh_id


def _uuid7(seconds: float, random: bytes) -> str:
    milliseconds = max(0, int(seconds * 1000)) & ((1 << 48) - 1)
    low = int.from_bytes(random, "big") & _RANDOM
    return str(uuid.UUID(int=milliseconds << 80 | _VERSION | _VARIANT | low))


def _id_of(data: bytes) -> str:
    text = data.decode("ascii").strip()
    if id_time(text) is None:
        raise ValueError("it holds no id")
    return text
