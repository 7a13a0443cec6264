"""Decides from a run's directory whether an earlier attempt continues, and from which checkpoint."""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.errors import TrainingError
from evsys_bus.files import load_file, replace_file
from evsys_bus.location import decode_json, encode_json
from evsys_bus.run_files import JOURNAL_DIR, RowFile, unwritable_error

Resume: TypeAlias = Literal["auto", "must", "never"]
RUN_FILE: Final = "run.json"
MANIFEST: Final = "checkpoints.jsonl"
FINISHED: Final = "completed"
_UNKNOWN: Final = "unknown"
"""Of a run that was made otherwise: by a `TrainingLoop`, an `Experiment` or an earlier version."""
_LEFT_ALONE: Final = (FINISHED, _UNKNOWN)


class RunFile(msgspec.Struct):
    """The file ``run.json``: the state of the newest attempt at a run."""

    status: str = "running"
    """``running``, also of a process that was killed; then the status of the RunEnd."""
    attempts: int = 1
    """How often the run was started."""
    started_at: float = 0.0
    """When it was first started, in seconds since the epoch."""
    ended_at: float | None = None

    @classmethod
    def load(cls, run_dir: Path) -> "RunFile | None":
        """Return what the directory has; None if it holds no run, or the file is damaged."""
        return load_file(str(run_dir / RUN_FILE), lambda data: decode_json(data, cls), quarantine=False)

    def save(self, run_dir: Path) -> None:
        """Replace the file; a disk that refuses it is logged, and costs only the knowledge whether the run ended."""
        try:
            replace_file(run_dir / RUN_FILE, encode_json(self))
        except OSError as error:
            log().warning("run.state_not_saved", file=str(run_dir / RUN_FILE), error=str(error))


def choose_directory(run_dir: Path, resume: Resume) -> tuple[Path, RunFile | None]:
    """Return the directory of the run, and the file of the attempt that is continued there; None if the run is new.

    Raises:
        TrainingError: ``must`` finds no run that could go on, ``never`` finds one, or the directory cannot be read.
    """
    found = _find(run_dir)
    if resume == "must" and found is None:
        raise TrainingError(f"{run_dir} holds no run to resume", fix="leave `resume` out to start one there")
    if resume == "never" and found is not None:
        raise TrainingError(
            f"{run_dir} holds a run already ({found.status})",
            fix="leave `resume` out, so that the run goes on, or choose another directory",
        )
    if found is None or found.status not in _LEFT_ALONE:
        return run_dir, found
    if resume == "must":
        what = "is complete" if found.status == FINISHED else "was not made by evsys_bus.run"
        raise TrainingError(f"the run in {run_dir} {what}", fix="leave `resume` out to start a new one beside it")
    number = 2
    while (earlier := _find(_numbered(run_dir, number))) is not None and earlier.status in _LEFT_ALONE:
        number += 1
    chosen = _numbered(run_dir, number)
    log().warning("run.starts_beside", run=str(chosen), complete=str(run_dir))
    return chosen, earlier


def _find(run_dir: Path) -> RunFile | None:
    """Return what is known of the run in a directory; None if there is none."""
    try:
        found = RunFile.load(run_dir)
    except OSError as error:  # not readable, or a file is where a directory should be
        raise unwritable_error(run_dir, "the run's directory", error) from error
    if found is None and _holds_records(run_dir):
        found = RunFile.load(run_dir)  # another rank may have started the run meanwhile
        # A damaged file belongs to a run that goes on: to start it again would remove its rows.
        return found or RunFile(status="running" if (run_dir / RUN_FILE).exists() else _UNKNOWN)
    return found


def _holds_records(run_dir: Path) -> bool:
    """Return whether a directory has records of a run, such as that of a `TrainingLoop`."""
    with suppress(OSError):  # not readable: opening it reports that
        return (run_dir / MANIFEST).exists() or any(run_dir.glob(f"{JOURNAL_DIR}/r0-*"))
    return False


def _numbered(run_dir: Path, number: int) -> Path:
    return run_dir.with_name(f"{run_dir.name}-{number}")


def newest_checkpoint(manifest: RowFile) -> ManifestRow | None:
    """Return the recorded checkpoint of the largest step whose files exist; one at a URL is taken to exist."""
    rows = [row for each in manifest.rows() if (row := _to_row(each)) is not None and _exists(row)]
    return max(reversed(rows), key=lambda row: row.batch, default=None)


def _to_row(row: dict[str, Any]) -> ManifestRow | None:
    try:
        return msgspec.convert(row, ManifestRow)
    except msgspec.ValidationError:
        return None


def _exists(row: ManifestRow) -> bool:
    path = row.state_path or row.sampler_path
    return path is not None and ("://" in path or Path(path).exists())


def now() -> float:
    """Return the time for the fields of `RunFile`."""
    return time.time()
