"""Opens runs: `run` with a bus of its own, `open_run` on a bus that the program has."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, get_args
from weakref import WeakKeyDictionary

from evsys_bus.bus import EventBus
from evsys_bus.bus.event_bus import TEST_VARIABLE
from evsys_bus.context import LogContext, LoopState
from evsys_bus.errors import SettingError, TrainingError
from evsys_bus.front.resume import Resume, choose_directory
from evsys_bus.front.run import Run
from evsys_bus.location import local_path
from evsys_bus.run_files import journal_directory

_paths: Final[WeakKeyDictionary[EventBus, dict[str, Path]]] = WeakKeyDictionary()
"""The directory of each run that a bus had, by its name."""


def run(
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    callbacks: Iterable[object] = (),
    tags: Iterable[str] = (),
    notes: str | None = None,
    num_steps: int | None = None,
    unit: str = "steps",
    first_step: int | None = None,
    resume: Resume = "auto",
    environment: bool = True,
    output: bool = True,
    **bus_options: Any,
) -> "Run":
    """Open a run with a bus of its own, which records into ``<path>/journal``.

        with evsys_bus.run("runs/ppo-7", config=cfg, callbacks=[...]) as run:
            for step in run.steps(1000):
                run.log({"loss": loss}, step=step)

    Use ``async with`` where an event loop runs. A program that was killed and is started again continues its run:
    `Run.steps` begins behind the newest checkpoint whose files exist. A run that is complete is left alone, and a new
    one starts beside it, as ``ppo-7-2``.

    Args:
        path: The run's directory; its last part is the name of the run.
        config: The configuration, of any type that holds settings; recorded without credentials.
        callbacks: Callbacks of the bus.
        tags: Short words to find the run by.
        notes: A text about the run.
        num_steps: How many steps the run is to have in all; None if that is not known.
        unit: What a step counts: ``steps``, ``env_steps``, ``tokens``, ``epochs``.
        first_step: Where the program begins, if it resumes by its own means; rows from there on are cut.
        resume: ``auto`` as above; ``must`` and ``never`` raise if there is nothing, or something, to go on with.
        environment: Record commit, command line, packages, host and GPUs.
        output: Copy what the program prints into ``<path>/output.log``; off in notebooks.
        bus_options: Further arguments of `EventBus`.

    Raises:
        TrainingError: The directory cannot be written or is in use, or ``resume`` forbids it.
        SettingError: The path is a URL.
    """
    return open_run(
        lambda run_dir: EventBus(callbacks, journal=journal_directory(run_dir), **bus_options),
        path,
        config=config,
        tags=tags,
        notes=notes,
        num_steps=num_steps,
        unit=unit,
        first_step=first_step,
        resume=resume,
        environment=environment,
        output=output,
    )


def open_run(
    bus: EventBus | Callable[[Path], EventBus],
    path: str | os.PathLike[str],
    *,
    config: Any = None,
    tags: Iterable[str] = (),
    notes: str | None = None,
    num_steps: int | None = None,
    unit: str = "steps",
    first_step: int | None = None,
    resume: Resume = "auto",
    environment: bool = True,
    output: bool = True,
) -> "Run":
    """Return a run on this bus, or on one that the function makes for the run's directory; see `run`."""
    if resume not in get_args(Resume):
        raise SettingError(f"resume is {resume!r:.40}", fix=f"give one of {', '.join(get_args(Resume))}")
    folder = local_path(path, "path") if os.fspath(path) else Path()
    if not folder.name:
        raise SettingError(f"path is {os.fspath(path)!r}, which names no run", fix='give a directory: "runs/my-run"')
    run_dir, previous = choose_directory(folder, resume)
    if isinstance(bus, EventBus):
        _check_name(bus, run_dir)
    extras: dict[str, Any] = {}
    if tags := [*tags]:
        extras["tags"] = tags
    if notes is not None:
        extras["notes"] = notes
    if unit != "steps":
        extras["unit"] = unit
    is_test = bool(os.environ.get(TEST_VARIABLE))
    ctx = LogContext(run_dir.parent, config=config, run_key=run_dir.name, run_config=config, extras=extras)
    state = LoopState(step=0, num_steps=num_steps, output_dir=run_dir, ctx=ctx)
    return Run(
        bus if isinstance(bus, EventBus) else bus(run_dir),
        state,
        owns_bus=not isinstance(bus, EventBus),
        first_step=first_step,
        environment=environment and not is_test,
        output=output and not is_test,
        previous=previous,
    )


def _check_name(bus: EventBus, run_dir: Path) -> None:
    """Raise if the bus had another run of that name: records, files and charts are found by the name."""
    earlier = _paths.setdefault(bus, {}).setdefault(run_dir.name, run_dir)
    if earlier != run_dir:
        raise TrainingError(
            f"this bus has a run named {run_dir.name!r} already, in {earlier}",
            why="rows and charts are found by the name of the run, which is the last part of its path",
            fix=f'choose another: "{run_dir.parent.name}-{run_dir.name}"',
        )
