"""`Checkpoints`: saves the checkpoints of a training, and lists them in ``checkpoints.jsonl``."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from evsys_bus.context import ManifestRow
from evsys_bus.diagnostics import log
from evsys_bus.run_files import Row, RowFile
from evsys_bus.training.protocols import Backend

FINAL: Final = "final"
"""Name of the checkpoint that every run ends with, unless it raised."""


class Checkpoints:
    """Saves and lists the checkpoints of one run."""

    def __init__(self, backend: Backend, manifest: Path) -> None:
        self.rows: list[ManifestRow] = []
        """The rows of the manifest, in the order in which the checkpoints were saved."""
        self._backend = backend
        self._file = RowFile(manifest)
        self._resumed_from: ManifestRow | None = None

    @property
    def manifest(self) -> Path:
        """The file that lists the checkpoints."""
        return self._file.path

    @property
    def stopped(self) -> str | None:
        """Why the run that was resumed had ended before its horizon, if it was stopped for good."""
        return None if self._resumed_from is None else self._resumed_from.stopped

    async def save(self, name: str, *, step_idx: int, epoch: int, stopped: str | None = None) -> ManifestRow:
        """Save the full state and the weights, and add a row to the manifest; for ``stopped`` see `ManifestRow`.

        Files of a listed checkpoint are never overwritten: a second ``final`` gets files of its own, and replaces the
        row of the first one once it is complete. The checkpoint that was resumed from is not saved again if no step
        has followed it.
        """
        resumed_from = self._resumed_from
        if resumed_from is not None and (resumed_from.name, resumed_from.batch) == (name, step_idx):
            return resumed_from if stopped is None else self._mark_stopped(resumed_from, stopped)
        is_recorded = any(row.name == name for row in self.rows)
        saved_as = f"{name}-{step_idx:06d}" if is_recorded else name
        row = ManifestRow(
            name=name,
            batch=step_idx,
            epoch=epoch,
            state_path=await self._backend.save_state(saved_as),
            sampler_path=await self._backend.save_weights_for_sampler(saved_as),
            stopped=stopped,
        )
        if is_recorded:
            self._remove(name)
        self._append_row(row)
        return row

    async def resume(self) -> int:
        """Load the last full state in the manifest, remove later rows, and return the first step to run.

        The ``final`` of a stopped run stays in the manifest until the next ``final`` replaces it: until then it may be
        the only checkpoint to resume from.

        Raises:
            Exception: Raised by the backend when it cannot load that state.
        """
        recorded = [row for row in map(_manifest_row, self._file.rows()) if row is not None]
        resumable = [row for row in recorded if row.state_path is not None]
        # Of two checkpoints of the same step take the later one: older ones may have been pruned.
        last = max(reversed(resumable), key=lambda row: row.batch, default=None)
        if last is not None and last.state_path is not None:
            await self._backend.load_state(last.state_path)
        first_step = 0 if last is None else last.batch + 1
        self._file.retain(lambda row: (checkpoint := _manifest_row(row)) is not None and checkpoint.batch < first_step)
        self.rows = [row for row in recorded if row.batch < first_step]
        self._resumed_from = last
        return first_step

    def flush(self) -> None:
        """Try once more to write the rows that the disk refused."""
        self._file.flush()

    def _append_row(self, row: ManifestRow) -> None:
        self.rows.append(row)
        fields = msgspec.structs.asdict(row)
        if row.stopped is None:
            del fields["stopped"]
        self._file.append(fields)

    def _mark_stopped(self, row: ManifestRow, stopped: str) -> ManifestRow:
        """Record that the run ends with this checkpoint, which was saved before the run was stopped."""
        if row.stopped is None:
            row = msgspec.structs.replace(row, stopped=stopped)
            self.rows = [each for each in self.rows if each.name != row.name]
            self._append_row(row)
            if not self._file.pending:  # else the file holds only the old row
                self._drop_rows(row.name, lambda each: each.get("name") != row.name or "stopped" in each)
        return row

    def _remove(self, name: str) -> None:
        self.rows = [row for row in self.rows if row.name != name]
        self._drop_rows(name, lambda row: row.get("name") != name)

    def _drop_rows(self, name: str, predicate: Callable[[Row], bool]) -> None:
        try:
            self._file.retain(predicate)
        except OSError as error:
            log().warning("checkpoints.stale_row", file=str(self.manifest), name=name, error=str(error))


def _manifest_row(row: Row) -> ManifestRow | None:
    try:
        return msgspec.convert(row, ManifestRow)
    except msgspec.ValidationError:
        return None
