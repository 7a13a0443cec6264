"""The arms of an experiment, with their params, and its seeds."""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from typing import Final

import msgspec

from evsys_bus.config.experiment import ExperimentConfig, Params
from evsys_bus.config.schema import as_json
from evsys_bus.config.spec import join_path

SINGLE_ARM_NAME: Final = "run"
"""Name of the arm in an experiment with only one."""
_MAX_NAME_CHARS: Final = 80
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._=,+-]+")


class Arm(msgspec.Struct, frozen=True):
    """One configuration."""

    name: str
    """Key in ``runs``; for a ``matrix`` like ``lr=0.001,hidden=64``, safe as the name of a directory."""
    params: Params
    """The arm's own params and those of ``run`` that they do not override; mappings are not merged."""
    path: str
    """JSON path of what defines the arm."""
    param_paths: dict[str, str]
    """Param -> JSON path of its value."""


def expand_arms(config: ExperimentConfig) -> list[Arm]:
    """Return the arms: of ``matrix``, with the last key varying fastest; else of ``runs``, in order; else of ``run``.

    Example:
        >>> config = ExperimentConfig(name="x", recipe="m:f", run={"steps": 9}, matrix={"lr": [0.1, 0.2], "width": [8]})
        >>> [arm.name for arm in expand_arms(config)], expand_arms(config)[1].params
        (['lr=0.1,width=8', 'lr=0.2,width=8'], {'steps': 9, 'lr': 0.2, 'width': 8})
    """
    shared = {key: join_path("$.run", key) for key in config.run}
    if config.matrix:
        return list(_matrix_arms(config, shared))
    if not config.runs:
        return [Arm(SINGLE_ARM_NAME, dict(config.run), "$.run", shared)]
    return [
        Arm(name, config.run | params, path, shared | {key: join_path(path, key) for key in params})
        for name, params in config.runs.items()
        for path in [join_path("$.runs", name)]
    ]


def count_arms(config: ExperimentConfig) -> int:
    """Return the number of arms without building them."""
    return math.prod(map(len, config.matrix.values())) if config.matrix else max(1, len(config.runs))


def expand_seeds(config: ExperimentConfig) -> list[int]:
    """Return the seeds of every arm: the first ``n_repeats`` of ``seeds``, or 0, 1, 2 and so on."""
    return list(range(config.n_repeats)) if config.seeds is None else config.seeds[: config.n_repeats]


def _matrix_arms(config: ExperimentConfig, shared: dict[str, str]) -> Iterator[Arm]:
    keys = list(config.matrix)
    for combination in itertools.product(*(enumerate(values) for values in config.matrix.values())):
        params = {key: value for key, (_, value) in zip(keys, combination, strict=True)}
        param_paths = {
            key: join_path("$.matrix", key, index) for key, (index, _) in zip(keys, combination, strict=True)
        }
        yield Arm(_arm_name(params), config.run | params, "$.matrix", shared | param_paths)


def _arm_name(params: Params) -> str:
    """Name an arm by its params; unsafe characters are replaced, and then a digest keeps the name unique."""
    full_name = ",".join(
        f"{key}={value if isinstance(value, str) else as_json(value)}" for key, value in params.items()
    )
    safe = _UNSAFE.sub("_", full_name)
    if safe == full_name and len(full_name) <= _MAX_NAME_CHARS and not full_name.startswith("."):
        return full_name
    digest = hashlib.sha256(full_name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{safe[: _MAX_NAME_CHARS - 9].lstrip('.')}-{digest}"
