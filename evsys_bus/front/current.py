"""Finds the run that code without a handle belongs to: `current_run`."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Final

from evsys_bus.errors import TrainingError

if TYPE_CHECKING:
    from evsys_bus.front.run import Run

_active: Final[ContextVar["Run | None"]] = ContextVar("evsys_bus_run", default=None)
_open_runs: Final[dict[int, "Run"]] = {}


def current_run() -> "Run":
    """Return the run that this code belongs to: that of the enclosing ``with``, else the only one of the process.

    Raises:
        TrainingError: No run is open, or several are and none is active here.
    """
    active = _active.get()
    if active is not None and (active.is_open or active.is_forked):
        return active
    if len(_open_runs) == 1:
        return next(iter(_open_runs.values()))
    if not _open_runs:
        raise TrainingError("no run is open", fix='open one: `with evsys_bus.run("runs/my-run") as run:`')
    names = ", ".join(sorted(each.name for each in _open_runs.values()))
    raise TrainingError(
        f"{len(_open_runs)} runs are open here ({names:.200}), and none is active in this context",
        fix="log to the object itself, or choose one: `with run.activate():`",
    )


def add_open(run: "Run") -> None:
    """Make a run one of the open ones of this process."""
    _open_runs[id(run)] = run


def open_runs() -> list["Run"]:
    """Return the open runs of this process; in a forked child, those of its parent."""
    return [*_open_runs.values()]


def find_open(path: Path) -> "Run | None":
    """Return the open run in a directory."""
    return next((each for each in open_runs() if each.path == path and each.is_open), None)


def remove_open(run: "Run") -> None:
    """Undo `add_open`."""
    _open_runs.pop(id(run), None)


@contextmanager
def activated(run: "Run") -> Generator["Run"]:
    """Make a run the current one of this context, that is, of this thread or task and what it starts."""
    token = _active.set(run)
    try:
        yield run
    finally:
        try:
            _active.reset(token)
        except ValueError:  # left in another context than entered, as notebooks and generators do
            if _active.get() is run:
                _active.set(None)


def _mark_forked() -> None:
    for each in _open_runs.values():
        each.is_forked, each.is_open = True, False


os.register_at_fork(after_in_child=_mark_forked)
