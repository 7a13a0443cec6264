"""Retention rules for checkpoints, independent of files and buckets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from evsys_bus.context import ManifestRow
from evsys_bus.location import local_path

Scores = Mapping[int, float]
"""The metric's value by 0-based step."""


class BestCheckpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Selection by evals at the step after which a checkpoint was saved, even if they arrive late."""

    metric: Annotated[str, msgspec.Meta(min_length=1)]
    eval_name: str | None = None
    """Default: any eval with the metric; the last one counts."""
    mode: Literal["max", "min"] = "max"
    count: Annotated[int, msgspec.Meta(ge=1)] = 1


class RetentionRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rules for which checkpoints are retained: those that match any rule. Without rules all are."""

    keep_last: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """The newest ones."""
    keep_every: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Those saved after every this many steps."""
    keep_best: BestCheckpoints | None = None
    """The best ones, and those newer than the last eval, whose evals may be pending."""

    @property
    def has_rules(self) -> bool:
        """Whether any checkpoint is ever removed."""
        return (self.keep_last, self.keep_every, self.keep_best) != (None, None, None)


class LocalRetentionRules(RetentionRules, frozen=True, forbid_unknown_fields=True):
    """Rules for checkpoints on this machine."""

    outside: list[str] = []
    """Folders besides those of the run and its experiment from which checkpoints may be removed."""

    def __post_init__(self) -> None:
        for folder in self.outside:
            local_path(folder, "local.outside")

    @property
    def folders(self) -> list[Path]:
        """The folders in ``outside`` as paths."""
        return [local_path(folder, "local.outside") for folder in self.outside]


def prunable(rows: Sequence[ManifestRow], rules: RetentionRules, scores: Scores, verified: int) -> list[ManifestRow]:
    """Return the checkpoints that may be removed.

    Args:
        rows: All checkpoints, oldest first.
        rules: The rules.
        scores: For `RetentionRules.keep_best`.
        verified: Index of the newest verified checkpoint, -1 for none. It and everything newer are retained.
    """
    if not rules.has_rules:
        return []
    retained = set(range(max(verified, 0), len(rows)))
    if rules.keep_last is not None:
        retained.update(range(max(0, len(rows) - rules.keep_last), len(rows)))
    if rules.keep_every is not None:
        retained.update(index for index, row in enumerate(rows) if (row.batch + 1) % rules.keep_every == 0)
    if rules.keep_best is not None:
        retained.update(_best_indexes(rows, rules.keep_best, scores))
    return [row for index, row in enumerate(rows) if index not in retained]


def _best_indexes(rows: Sequence[ManifestRow], best: BestCheckpoints, scores: Scores) -> list[int]:
    last = max(scores, default=-1)
    scored = [index for index, row in enumerate(rows) if row.batch in scores]
    sign = -1 if best.mode == "max" else 1
    ranked = sorted(scored, key=lambda index: (sign * scores[rows[index].batch], index))
    return [*ranked[: best.count], *(index for index, row in enumerate(rows) if row.batch > last)]
