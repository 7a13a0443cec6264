"""`ExperimentStore`: an experiment's progress in ``experiment.json``, each run's result in its ``result.json``.

This module owns these files: writing them, handling failed writes, and reading them when an experiment is resumed.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec import to_builtins
from evsys_bus.codec.redact import Redaction, redact
from evsys_bus.context import ArmResult, ExperimentResult, Status
from evsys_bus.diagnostics import log
from evsys_bus.errors import TrainingError
from evsys_bus.files import DECODE_ERRORS, list_folder, load_file, read_file, replace_file
from evsys_bus.run_files import ERROR_FILE, unwritable_error
from evsys_bus.training.plan import RunPlan

HORIZON_PARAMS: Final = ("steps", "num_steps")
"""Parameters that may be raised on a resume; the run is then trained longer."""
EXPERIMENT_FILE: Final = "experiment.json"
RESULT_FILE: Final = "result.json"


class RunEntry(msgspec.Struct):
    """The progress of one run."""

    arm: str
    seed: int
    stage: str | None = None
    group_name: str | None = None
    status: Status = "pending"
    error: str | None = None
    """Why it failed, or was not started."""
    run_config: dict[str, Any] = {}
    """The parameters it was started with; empty while it is pending."""
    traceback: str | None = None
    """The file in the run's directory that holds the traceback, if it failed."""


class StoredExperiment(msgspec.Struct):
    """The contents of ``experiment.json``."""

    name: str
    status: Status = "running"
    started: str = ""
    """Time of the first start: ISO 8601, UTC."""
    ended: str | None = None
    hypothesis: str | None = None
    best_arm: str | None = None
    best_score: float | None = None
    conclusion: str | None = None
    runs: dict[str, RunEntry] = {}
    """By run key, in the order in which they were planned."""


_decode: Final = msgspec.json.Decoder(StoredExperiment).decode
MAX_FILE_BYTES: Final = 1 << 40
"""No limit in practice, so that no run is ever lost."""


class ExperimentStore:
    """Stores the progress of one experiment.

    Raises:
        TrainingError: The directory cannot be written; it holds an experiment and ``resume`` is false; or the
            experiment is resumed under another name, or with other parameters for a run that was started.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        plans: Iterable[RunPlan],
        *,
        resume: bool,
        hypothesis: str | None = None,
        redaction: Redaction = Redaction(),  # noqa: B008 - frozen
    ) -> None:
        self._redaction = redaction
        self.path = folder / EXPERIMENT_FILE
        self.failed_writes = 0
        """Number of failed writes of the experiment file or a result."""
        plans = [*plans]
        existing = self._load(resume=resume)
        if existing is None and resume:
            existing = _rebuild(folder, name, plans)
        if existing is not None and not resume:
            raise TrainingError(
                f"{folder} holds an experiment already", fix="resume it (resume=True), or choose another output_dir"
            )
        stored = existing or StoredExperiment(name, started=_now())
        if stored.name != name:
            raise TrainingError(
                f'{folder} holds the experiment "{stored.name}", not "{name}"', fix="choose another output_dir"
            )
        stored.status, stored.ended, stored.hypothesis = "running", None, hypothesis
        for plan in plans:
            entry = stored.runs.setdefault(plan.run_key, RunEntry(plan.arm, plan.seed, plan.stage, plan.group_name))
            check_params_unchanged(plan, entry, folder, redaction)
        self._stored = stored
        try:
            _replace(self.path, _encode_experiment(stored, redaction))
        except OSError as error:
            raise unwritable_error(folder, "the experiment's directory", error) from error

    def completed_result(self, plan: RunPlan) -> ArmResult | None:
        """Return the result of a run that was completed up to its current horizon; None if it has to run (on)."""
        entry = self._stored.runs[plan.run_key]
        if entry.status != "completed" or _raised_horizons(entry.run_config, _json_run_config(plan, self._redaction)):
            return None
        return read_result(plan.run_dir)

    def other_results(self, run_keys: Collection[str]) -> dict[str, ArmResult]:
        """Return the results of all other runs: those of earlier sessions with other arms or seeds."""
        return {
            key: _recorded_result(entry, self.path.parent / key)
            for key, entry in self._stored.runs.items()
            if key not in run_keys
        }

    def mark_started(self, plan: RunPlan) -> None:
        """Record that a run was started."""
        entry = self._stored.runs[plan.run_key]
        entry.status, entry.error, entry.run_config = "running", None, _json_run_config(plan, self._redaction)
        self._write()

    def mark_ended(self, plan: RunPlan, arm: ArmResult) -> None:
        """Record the result of a run that has ended, or will not be started."""
        entry = self._stored.runs[plan.run_key]
        entry.status, entry.error = arm.status, arm.error
        entry.traceback = ERROR_FILE if arm.status == "failed" and (plan.run_dir / ERROR_FILE).exists() else None
        if entry.run_config:
            self._write_file(plan.run_dir / RESULT_FILE, _encode_result(arm, self._redaction))
        self._write()

    def mark_finished(self, result: ExperimentResult) -> None:
        """Record that the experiment has ended."""
        stored = self._stored
        stored.status, stored.ended, stored.conclusion = result.status, _now(), result.conclusion
        stored.best_arm, stored.best_score = result.best_arm, result.best_score
        self._write()

    def _write(self) -> None:
        self._write_file(self.path, _encode_experiment(self._stored, self._redaction))

    def _write_file(self, path: Path, content: bytes) -> None:
        """Write a file; an error is only logged and counted, because the next change writes the whole file again."""
        try:
            _replace(path, content)
        except OSError as error:
            self.failed_writes += 1
            log().warning("ledger.unwritten", file=str(path), error=str(error))

    def _load(self, *, resume: bool) -> StoredExperiment | None:
        folder = self.path.parent
        try:
            stored = load_file(self.path, _decode, quarantine=resume, max_bytes=MAX_FILE_BYTES)
        except NotADirectoryError:
            return None
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be read: {error}", fix="choose another output_dir") from error
        if stored is None and not resume and self.path.exists():
            raise TrainingError(
                f"{folder} holds an experiment already, and its {EXPERIMENT_FILE} is damaged",
                fix="resume it (resume=True), or choose another output_dir",
            )
        return stored


def _rebuild(folder: Path, name: str, plans: Iterable[RunPlan]) -> StoredExperiment | None:
    """Rebuild a missing or damaged experiment file from the results of the runs; None if no run has ended."""
    stored = StoredExperiment(name, started=_now())
    for key in dict.fromkeys([*(plan.run_key for plan in plans), *list_folder(folder)]):
        result = read_result(folder / key) if (folder / key / RESULT_FILE).is_file() else None
        if result is not None:
            run_config: Any = result.run_config
            config = cast("dict[str, Any]", run_config) if isinstance(run_config, dict) else {}
            seed = config.get("seed")
            stored.runs[key] = RunEntry(
                result.name,
                seed if isinstance(seed, int) else 0,
                config.get("stage"),
                result.group_name,
                result.status,
                result.error,
                config,
                ERROR_FILE if (folder / key / ERROR_FILE).exists() else None,
            )
    if stored.runs:
        log().warning("ledger.rebuilt", file=str(folder / EXPERIMENT_FILE), runs=len(stored.runs))
    return stored if stored.runs else None


def read_result(run_dir: Path) -> ArmResult | None:
    """Read the result of the run in this directory; None if its ``result.json`` is missing or damaged."""
    try:
        plain: object = msgspec.json.decode(read_file(run_dir / RESULT_FILE, max_bytes=MAX_FILE_BYTES))
        # Not strict: JSON has no NaN, so non-finite numbers are stored as text.
        return msgspec.convert(plain, ArmResult, strict=False)
    except (OSError, *DECODE_ERRORS) as error:
        log().warning("ledger.result_unreadable", file=str(run_dir / RESULT_FILE), error=str(error))
        return None


def _encode_result(arm: ArmResult, redaction: Redaction) -> bytes:
    # Field by field, so that a field that has to be cut does not affect the others.
    fields = {name: to_builtins(getattr(arm, name))[0] for name in arm.__struct_fields__}
    redact(fields, redaction)
    return msgspec.json.encode(_nonfinite_to_text(fields))


def _encode_experiment(stored: StoredExperiment, redaction: Redaction) -> bytes:
    plain, _ = to_builtins(stored, max_bytes=MAX_FILE_BYTES)
    redact(plain, redaction)
    return msgspec.json.encode(plain)


def _recorded_result(entry: RunEntry, run_dir: Path) -> ArmResult:
    result = read_result(run_dir) if entry.status in {"completed", "failed"} else None
    if result is not None and result.status == entry.status:
        return result
    named = {"arm": entry.arm, "seed": entry.seed} | ({} if entry.stage is None else {"stage": entry.stage})
    return ArmResult(
        entry.arm,
        run_config=entry.run_config or named,
        # A run that has not ended has no process any more that could complete it.
        status=entry.status if entry.status in {"completed", "failed"} else "cancelled",
        group_name=entry.group_name,
        error=entry.error or (None if entry.status == "completed" else "it has not run to its end"),
    )


def _nonfinite_to_text(plain: object) -> object:
    """Replace NaN and infinities by text."""
    if isinstance(plain, dict):
        return {key: _nonfinite_to_text(value) for key, value in cast("dict[str, object]", plain).items()}
    if isinstance(plain, list):
        return [_nonfinite_to_text(value) for value in cast("list[object]", plain)]
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain


def _json_run_config(plan: RunPlan, redaction: Redaction) -> dict[str, Any]:
    """Return the run config of a plan in the form in which it is read back from the experiment file."""
    plain, _ = to_builtins(plan.run_config)
    redact(plain, redaction, "run_config")
    return msgspec.json.decode(msgspec.json.encode(plain), type=dict[str, Any])


def check_params_unchanged(plan: RunPlan, entry: RunEntry, folder: Path, redaction: Redaction) -> None:
    """Check that a run may be resumed with the parameters of this plan; those of its horizon may be raised.

    Raises:
        TrainingError: It was started with other parameters.
    """
    current, previous = _json_run_config(plan, redaction), entry.run_config
    redact(previous, redaction, "run_config")  # an earlier version may have recorded more
    raised_horizons = _raised_horizons(previous, current)
    changed = [
        key for key in {**previous, **current} if current.get(key) != previous.get(key) and key not in raised_horizons
    ]
    if previous and changed:
        changes = ", ".join(f"{key} was {previous.get(key)!r}, now {current.get(key)!r}" for key in changed)
        raise TrainingError(
            f"run {plan.run_key} in {folder} was started with other parameters: {changes}",
            fix="resume with the parameters that it was started with, or choose another output_dir",
        )


def _raised_horizons(previous: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the horizon parameters that have been raised."""
    values = [(key, previous.get(key), current.get(key)) for key in HORIZON_PARAMS]
    return [key for key, before, after in values if type(before) is int and type(after) is int and after > before]


def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically."""
    replace_file(path, content + b"\n", mode=0o666)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
