"""`Ledger`: the progress of an experiment in ``experiment.json``, and the result of each run in its ``result.json``.

This module owns these files: writing them, handling failed writes, and reading them when an experiment is resumed.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from evsys_bus.codec import to_plain
from evsys_bus.context import ArmResult, ExperimentResult, Status
from evsys_bus.diagnostics import log
from evsys_bus.errors import TrainingError
from evsys_bus.files import DAMAGE, load_file, names_in, read_file, replace_file
from evsys_bus.training.error_file import ERROR
from evsys_bus.training.folder_lock import unwritable
from evsys_bus.training.plan import RunPlan

HORIZONS: Final = ("steps", "num_steps")
"""Parameters that may be raised on a resume; the run is then trained longer."""
LEDGER: Final = "experiment.json"
RESULT: Final = "result.json"


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


class Page(msgspec.Struct):
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


_decode: Final = msgspec.json.Decoder(Page).decode
MOST_PAGE_BYTES: Final = 1 << 40
"""No limit in practice, so that no run is ever lost."""


class Ledger:
    """Stores the progress of one experiment.

    Raises:
        TrainingError: The directory cannot be written; it holds an experiment and ``resume`` is false; or the
            experiment is resumed under another name, or with other parameters for a run that was started.
    """

    def __init__(
        self, folder: Path, name: str, plans: Iterable[RunPlan], *, resume: bool, hypothesis: str | None = None
    ) -> None:
        self.path = folder / LEDGER
        self.unwritten = 0
        """Number of failed writes of the experiment file or a result."""
        plans = [*plans]
        earlier = self._read(resume=resume)
        if earlier is None and resume:
            earlier = _rebuilt(folder, name, plans)
        if earlier is not None and not resume:
            raise TrainingError(
                f"{folder} holds an experiment already", fix="resume it (resume=True), or choose another output_dir"
            )
        page = earlier or Page(name, started=_now())
        if page.name != name:
            raise TrainingError(
                f'{folder} holds the experiment "{page.name}", not "{name}"', fix="choose another output_dir"
            )
        page.status, page.ended, page.hypothesis = "running", None, hypothesis
        for plan in plans:
            entry = page.runs.setdefault(plan.run_key, RunEntry(plan.arm, plan.seed, plan.stage, plan.group_name))
            _check_same(plan, entry, folder)
        self._page = page
        try:
            _replace(self.path, _encode_page(page))
        except OSError as error:
            raise unwritable(folder, "the experiment's directory", error) from error

    def finished(self, plan: RunPlan) -> ArmResult | None:
        """Return the result of a run that was completed up to its current horizon; None if it has to run (on)."""
        entry = self._page.runs[plan.run_key]
        if entry.status != "completed" or _raised(entry.run_config, _plain_config(plan)):
            return None
        return read_result(plan.run_dir)

    def others(self, run_keys: Collection[str]) -> dict[str, ArmResult]:
        """Return the results of all other runs: those of earlier sessions with other arms or seeds."""
        return {
            key: _as_on_record(entry, self.path.parent / key)
            for key, entry in self._page.runs.items()
            if key not in run_keys
        }

    def began(self, plan: RunPlan) -> None:
        """Record that a run was started."""
        entry = self._page.runs[plan.run_key]
        entry.status, entry.error, entry.run_config = "running", None, _plain_config(plan)
        self._write()

    def ended(self, plan: RunPlan, arm: ArmResult) -> None:
        """Record the result of a run that has ended, or will not be started."""
        entry = self._page.runs[plan.run_key]
        entry.status, entry.error = arm.status, arm.error
        entry.traceback = ERROR if arm.status == "failed" and (plan.run_dir / ERROR).exists() else None
        if entry.run_config:
            self._try(plan.run_dir / RESULT, _encode(arm))
        self._write()

    def close(self, result: ExperimentResult) -> None:
        """Record that the experiment has ended."""
        page = self._page
        page.status, page.ended, page.conclusion = result.status, _now(), result.conclusion
        page.best_arm, page.best_score = result.best_arm, result.best_score
        self._write()

    def _write(self) -> None:
        self._try(self.path, _encode_page(self._page))

    def _try(self, path: Path, content: bytes) -> None:
        """Write a file; an error is only logged and counted, because the next change writes the whole file again."""
        try:
            _replace(path, content)
        except OSError as error:
            self.unwritten += 1
            log().warning("ledger.unwritten", file=str(path), error=str(error))

    def _read(self, *, resume: bool) -> Page | None:
        folder = self.path.parent
        try:
            page = load_file(self.path, _decode, set_aside=resume, most_bytes=MOST_PAGE_BYTES)
        except NotADirectoryError:
            return None
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be read: {error}", fix="choose another output_dir") from error
        if page is None and not resume and self.path.exists():
            raise TrainingError(
                f"{folder} holds an experiment already, and its {LEDGER} is damaged",
                fix="resume it (resume=True), or choose another output_dir",
            )
        return page


def _rebuilt(folder: Path, name: str, plans: Iterable[RunPlan]) -> Page | None:
    """Rebuild a missing or damaged experiment file from the results of the runs; None if no run has ended."""
    page = Page(name, started=_now())
    for key in dict.fromkeys([*(plan.run_key for plan in plans), *names_in(folder)]):
        result = read_result(folder / key) if (folder / key / RESULT).is_file() else None
        if result is not None:
            said: Any = result.run_config
            config = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
            seed = config.get("seed")
            page.runs[key] = RunEntry(
                result.name,
                seed if isinstance(seed, int) else 0,
                config.get("stage"),
                result.group_name,
                result.status,
                result.error,
                config,
                ERROR if (folder / key / ERROR).exists() else None,
            )
    if page.runs:
        log().warning("ledger.rebuilt", file=str(folder / LEDGER), runs=len(page.runs))
    return page if page.runs else None


def read_result(run_dir: Path) -> ArmResult | None:
    """Read the result of the run in this directory; None if its ``result.json`` is missing or damaged."""
    try:
        plain: object = msgspec.json.decode(read_file(run_dir / RESULT, most_bytes=MOST_PAGE_BYTES))
        # Not strict: JSON has no NaN, so non-finite numbers are stored as text.
        return msgspec.convert(plain, ArmResult, strict=False)
    except (OSError, *DAMAGE) as error:
        log().warning("ledger.result_unreadable", file=str(run_dir / RESULT), error=str(error))
        return None


def _encode(arm: ArmResult) -> bytes:
    # Field by field, so that a field that has to be cut does not affect the others.
    fields = {name: to_plain(getattr(arm, name))[0] for name in arm.__struct_fields__}
    return msgspec.json.encode(_with_words(fields))


def _encode_page(page: Page) -> bytes:
    return msgspec.json.encode(to_plain(page, max_bytes=MOST_PAGE_BYTES)[0])


def _as_on_record(entry: RunEntry, run_dir: Path) -> ArmResult:
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


def _with_words(plain: object) -> object:
    """Replace NaN and infinities by text."""
    if isinstance(plain, dict):
        return {key: _with_words(value) for key, value in cast("dict[str, object]", plain).items()}
    if isinstance(plain, list):
        return [_with_words(value) for value in cast("list[object]", plain)]
    return str(plain) if isinstance(plain, float) and not math.isfinite(plain) else plain


def _plain_config(plan: RunPlan) -> dict[str, Any]:
    """Return the run config of a plan in the form in which it is read back from the experiment file."""
    return msgspec.json.decode(msgspec.json.encode(to_plain(plan.run_config)[0]), type=dict[str, Any])


def _check_same(plan: RunPlan, entry: RunEntry, folder: Path) -> None:
    now, then = _plain_config(plan), entry.run_config
    raised = _raised(then, now)
    changed = [key for key in {**then, **now} if now.get(key) != then.get(key) and key not in raised]
    if then and changed:
        said = ", ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise TrainingError(
            f"run {plan.run_key} in {folder} was started with other parameters: {said}",
            fix="resume with the parameters that it was started with, or choose another output_dir",
        )


def _raised(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the horizon parameters that have been raised."""
    both = [(key, then.get(key), now.get(key)) for key in HORIZONS]
    return [key for key, was, is_ in both if type(was) is int and type(is_) is int and is_ > was]


def _replace(path: Path, content: bytes) -> None:
    """Replace the file atomically."""
    replace_file(path, content + b"\n", mode=0o666)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
