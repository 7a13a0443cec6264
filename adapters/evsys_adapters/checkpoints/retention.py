"""Which checkpoints are kept: the rules, and nothing of files or buckets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from evsys_bus.context import ManifestRow
from evsys_bus.where import local_path

Scores = Mapping[int, float]
"""The value of the metric that counts, by the 0-based step."""


class Best(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By the evals at the step after which a checkpoint was saved, however late they come."""

    metric: Annotated[str, msgspec.Meta(min_length=1)]
    eval_name: str | None = None
    """Default: whichever eval has the metric; the last one counts."""
    mode: Literal["max", "min"] = "max"
    count: Annotated[int, msgspec.Meta(ge=1)] = 1


class Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept; a checkpoint that one of the rules names is. Without any rule everything is."""

    keep_last: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """The newest ones."""
    keep_every: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Those saved after every so many steps."""
    keep_best: Best | None = None
    """The best ones; and those behind the last eval, for theirs may be under way."""

    @property
    def has_rules(self) -> bool:
        """Whether anything is ever removed."""
        return (self.keep_last, self.keep_every, self.keep_best) != (None, None, None)


class LocalKeep(Keep, frozen=True, forbid_unknown_fields=True):
    """What is kept on this machine."""

    outside: list[str] = []
    """Folders besides those of the run and of its experiment in which checkpoints may be removed."""

    def __post_init__(self) -> None:
        for folder in self.outside:
            local_path(folder, "local.outside")

    @property
    def folders(self) -> list[Path]:
        """Those folders, as paths."""
        return [local_path(folder, "local.outside") for folder in self.outside]


def prunable(rows: Sequence[ManifestRow], keep: Keep, scores: Scores, verified: int) -> list[ManifestRow]:
    """What may be removed.

    Args:
        rows: All there are, the oldest first.
        keep: The rules.
        scores: For `Keep.keep_best`.
        verified: The index of the newest that is known to be where it should be; -1 for none. It stays, and so does
            everything newer.
    """
    if not keep.has_rules:
        return []
    kept = set(range(max(verified, 0), len(rows)))
    if keep.keep_last is not None:
        kept.update(range(max(0, len(rows) - keep.keep_last), len(rows)))
    if keep.keep_every is not None:
        kept.update(index for index, row in enumerate(rows) if (row.batch + 1) % keep.keep_every == 0)
    if keep.keep_best is not None:
        kept.update(_best(rows, keep.keep_best, scores))
    return [row for index, row in enumerate(rows) if index not in kept]


def _best(rows: Sequence[ManifestRow], best: Best, scores: Scores) -> list[int]:
    last = max(scores, default=-1)
    scored = [index for index, row in enumerate(rows) if row.batch in scores]
    sign = -1 if best.mode == "max" else 1
    ranked = sorted(scored, key=lambda index: (sign * scores[rows[index].batch], index))
    return [*ranked[: best.count], *(index for index, row in enumerate(rows) if row.batch > last)]
