"""What an experiment file says: the Structs that a YAML file, or a dict, decodes to.

How a file is read, and how errors find their line, is `document`'s business; what is done with it, `training`'s.
"""

from typing import Annotated, Any, Literal

import msgspec

Params = dict[str, Any]
"""Parameters of a run, as its recipe takes them. Any: the recipe says what they are."""


class SuccessMetric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides which arm is best: the mean over its seeds."""

    name: str
    """``<benchmark>/<metric>`` of an evaluation after training, or the name of a training metric's last value."""
    mode: Literal["max", "min"] = "max"


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of a continual run: it begins with the weights that the stage before it ended with."""

    name: str
    params: Params = {}
    """Over those of the arm."""


class ExperimentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An experiment: arms, seeds, and what to do with them.

    One arm is ``run`` alone. Several are ``runs`` (by name) or ``matrix`` (every combination), each over ``run``.
    """

    name: str
    recipe: str
    """``module:function``; it is given the parameters and the plan of a run, and returns what the loop needs."""
    output_dir: str | None = None
    """Default: ``runs/<name>``."""
    run: Params = {}
    """Parameters that all arms share."""
    runs: dict[str, Params] = {}
    """Arm -> its parameters, over those of ``run``."""
    matrix: dict[str, list[Any]] = {}
    """Parameter -> its values; an arm for every combination. Any: as `Params`."""
    continual: list[Stage] = []
    """Stages that every arm goes through, in order, each in a run of its own."""
    n_repeats: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Runs of each arm that differ only in their seed."""
    seeds: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    """The seeds of the repeats. Default: 0, 1, 2, …"""
    max_concurrent_runs: Annotated[int, msgspec.Meta(ge=1)] = 1
    success_metric: SuccessMetric | None = None
    metadata: dict[str, Any] = {}
    """``hypothesis``, ``tags`` and whatever else should stay with the experiment. Any: yours."""
    callbacks: list[Any] = []
    """Specs, as `evsys_bus.wiring.build_callbacks` takes them. Any: it checks them."""
    plugins: list[str] = []
    """Modules to import first, for the callbacks that they register."""
