"""Which runs an experiment is made of, and what a recipe makes of one.

Names and folders are settled here, before anything starts; nothing here runs.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from evsys_bus.errors import ConfigError, Where, did_you_mean
from evsys_bus.training.protocols import Backend, Evaluator, Scorer, StepBuilder
from evsys_bus.wiring.arms import arms_of, seeds_of
from evsys_bus.wiring.experiment import ExperimentConfig, Params

_MAX_NAME_CHARS: Final = 60
"""Of one name within a run key; it may take four bytes each, and file systems take 255."""
_MAX_KEY_BYTES: Final = 200
"""Of a whole run key; what is made of it (files, locks, topics) adds to that, and 255 is all that a folder takes."""
_STRANGE: Final = re.compile(r"[^\w=,.+@-]+")


class RunPlan(msgspec.Struct, frozen=True):
    """One run to come: one arm, one seed, one stage."""

    arm: str
    run_key: str
    """Names the run: its folder, and the ``run`` of an envelope."""
    seed: int
    stage: str | None
    """The stage of a continual experiment."""
    group_name: str | None
    """The arm where it has several seeds, the stage where there are stages."""
    run_dir: Path
    params: Params
    """Of the arm, with those of the stage over them; as given, not yet what the recipe's Config makes of them."""

    @property
    def run_config(self) -> dict[str, Any]:
        """What loggers are told: the parameters, and ``arm``, ``seed`` and ``stage`` beside them. Any: as `Params`."""
        named = {"arm": self.arm, "seed": self.seed} | ({} if self.stage is None else {"stage": self.stage})
        return {**self.params, **named}


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """What a recipe returns: the pieces of one run."""

    backend: Backend
    step_builder: StepBuilder
    num_steps: int
    evaluators: Sequence[Evaluator] = ()
    """Score the model while it trains."""
    benchmarks: Sequence[Scorer] = ()
    """Score it once it is trained; what one raises is logged, and the others go on."""
    save_every: int = 0
    """A checkpoint is due after every so many steps; 0 for none but the final one."""
    steps_per_epoch: int | None = None
    close: Callable[[], Awaitable[object]] | None = None
    """Awaited when the run has ended, however it ended."""


RecipeFunction = Callable[[Any, RunPlan], RunParts | Awaitable[RunParts]]
"""``recipe(params, run)``. Any: params are what the annotation of the first parameter says, else a dict."""


def chains_of(
    config: ExperimentConfig,
    output_dir: Path,
    *,
    only_arms: Collection[str] | None = None,
    only_seeds: Collection[int] | None = None,
) -> list[list[RunPlan]]:
    """Every run, arm by arm and seed by seed; each chain holds the stages that follow on one another, mostly one.

    The keys of runs do not depend on ``only_arms`` and ``only_seeds``.

    Raises:
        ConfigError: An arm or a seed was asked for that the experiment does not have.
    """
    arms, seeds = arms_of(config), seeds_of(config)
    _check_known("arm", only_arms, [arm.name for arm in arms])
    _check_known("seed", only_seeds, seeds)
    stages = [(stage.name, stage.params) for stage in config.continual] or [(None, Params())]
    chains: list[list[RunPlan]] = []
    keys: set[str] = set()
    for arm in arms:
        for seed in seeds:
            chain: list[RunPlan] = []
            for stage, params in stages:
                key = _run_key(arm.name, seed, stage, keys)
                group = stage if stage is not None else arm.name if len(seeds) > 1 else None
                chain.append(RunPlan(arm.name, key, seed, stage, group, output_dir / key, {**arm.params, **params}))
            if (only_arms is None or arm.name in only_arms) and (only_seeds is None or seed in only_seeds):
                chains.append(chain)
    return chains


def folder_name(text: str) -> str:
    """``text`` as one component of a path that leads nowhere else; what had to change is told apart by a hash."""
    plain = _STRANGE.sub("-", text).strip(".-")[:_MAX_NAME_CHARS].rstrip(".-")
    return plain if plain and plain == text else f"{plain}-{_digest(text)}".lstrip("-")


def _run_key(arm: str, seed: int, stage: str | None, taken: set[str]) -> str:
    parts = [folder_name(arm), f"s{seed}", *([] if stage is None else [folder_name(stage)])]
    key = "-".join(parts)
    digest = _digest(f"{arm}/{seed}/{stage}")
    if key.casefold() in taken:  # some file systems do not tell A from a
        key = f"{key}-{digest}"
    if len(key.encode()) > _MAX_KEY_BYTES:
        room = _MAX_KEY_BYTES - len(digest) - 1
        key = f"{key.encode()[:room].decode(errors='ignore').rstrip('.-')}-{digest}"
    taken.add(key.casefold())
    return key


def _digest(text: str) -> str:
    return hashlib.blake2s(text.encode(errors="surrogatepass"), digest_size=4).hexdigest()


def _check_known(what: str, wanted: Collection[object] | None, known: Sequence[object]) -> None:
    for each in wanted or ():
        if each not in known:
            hint = did_you_mean(str(each), map(str, known))
            raise ConfigError(f"the experiment has no {what} {each!r}", where=Where("$"), fix=hint)
