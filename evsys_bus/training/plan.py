"""The runs of an experiment, and the parts of a run that a recipe returns.

Names and directories of runs are determined here, before anything starts; nothing is executed.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.config.experiment import ExperimentConfig, Params, expand_arms, expand_seeds
from evsys_bus.errors import ConfigError, Location, did_you_mean
from evsys_bus.location import short_digest
from evsys_bus.training.protocols import Backend, Evaluator, Scorer, StepBuilder

_MAX_NAME_CHARS: Final = 60
"""Of one name within a run key; a character may take four bytes, and a file name may have 255 bytes."""
_MAX_KEY_BYTES: Final = 200
"""Of a whole run key; names derived from it (files, locks, topics) are longer, and may have 255 bytes."""
_UNSAFE: Final = re.compile(r"[^\w=,.+@-]+")


class RunPlan(msgspec.Struct, frozen=True):
    """One planned run: one arm, one seed, one stage."""

    arm: str
    run_key: str
    """Key of the run: the name of its directory, and the ``run`` of an envelope."""
    seed: int
    stage: str | None
    """The stage of a continual experiment."""
    group_name: str | None
    """The stage if there are stages, else the arm if it has several seeds."""
    run_dir: Path
    params: Params
    """Parameters of the arm, overridden by those of the stage; not yet converted by the recipe's Config."""

    @property
    def run_config(self) -> dict[str, Any]:
        """The parameters together with ``arm``, ``seed`` and ``stage``, for loggers."""
        named = {"arm": self.arm, "seed": self.seed} | ({} if self.stage is None else {"stage": self.stage})
        return {**self.params, **named}


@dataclass(frozen=True, kw_only=True)
class RunComponents:
    """The parts of one run, returned by a recipe."""

    backend: Backend
    step_builder: StepBuilder
    num_steps: int
    evaluators: Sequence[Evaluator] = ()
    """Score the model during training."""
    benchmarks: Sequence[Scorer] = ()
    """Score the trained model; an error of one is logged, and the others still run."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only the final one."""
    steps_per_epoch: int | None = None
    close: Callable[[], Awaitable[object]] | None = None
    """Awaited when the run has ended, however it ended."""


RecipeFunction = Callable[[Any, RunPlan], RunComponents | Awaitable[RunComponents]]
"""``recipe(params, run)``; ``params`` has the annotated type of the first parameter, else it is a dict."""


def run_sequences(
    config: ExperimentConfig,
    output_dir: Path,
    *,
    only_arms: Collection[str] | None = None,
    only_seeds: Collection[int] | None = None,
) -> list[list[RunPlan]]:
    """Plan all runs, arm by arm and seed by seed; each sequence holds the consecutive stages of one arm and seed.

    Run keys do not depend on ``only_arms`` and ``only_seeds``.

    Raises:
        ConfigError: The experiment does not have a requested arm or seed.
    """
    arms, seeds = expand_arms(config), expand_seeds(config)
    _check_known("arm", only_arms, [arm.name for arm in arms])
    _check_known("seed", only_seeds, seeds)
    stages = [(stage.name, stage.params) for stage in config.continual] or [(None, Params())]
    sequences: list[list[RunPlan]] = []
    keys: set[str] = set()
    for arm in arms:
        for seed in seeds:
            sequence: list[RunPlan] = []
            for stage, params in stages:
                key = _run_key(arm.name, seed, stage, keys)
                group = stage if stage is not None else arm.name if len(seeds) > 1 else None
                sequence.append(RunPlan(arm.name, key, seed, stage, group, output_dir / key, {**arm.params, **params}))
            if (only_arms is None or arm.name in only_arms) and (only_seeds is None or seed in only_seeds):
                sequences.append(sequence)
    return sequences


def safe_folder_name(text: str) -> str:
    """Convert text to a safe name of one directory; a changed name gets a hash, so that different texts differ."""
    plain = _UNSAFE.sub("-", text).strip(".-")[:_MAX_NAME_CHARS].rstrip(".-")
    return plain if plain and plain == text else f"{plain}-{short_digest(text)}".lstrip("-")


def _run_key(arm: str, seed: int, stage: str | None, taken: set[str]) -> str:
    parts = [safe_folder_name(arm), f"s{seed}", *([] if stage is None else [safe_folder_name(stage)])]
    key = "-".join(parts)
    digest = short_digest(f"{arm}/{seed}/{stage}")
    if key.casefold() in taken:  # some file systems are case-insensitive
        key = f"{key}-{digest}"
    if len(key.encode()) > _MAX_KEY_BYTES:
        room = _MAX_KEY_BYTES - len(digest) - 1
        key = f"{key.encode()[:room].decode(errors='ignore').rstrip('.-')}-{digest}"
    taken.add(key.casefold())
    return key


def _check_known(what: str, requested: Collection[object] | None, known: Sequence[object]) -> None:
    for each in requested or ():
        if each not in known:
            hint = did_you_mean(str(each), map(str, known))
            raise ConfigError(f"the experiment has no {what} {each!r}", where=Location("$"), fix=hint)
