"""Adoption: a bare ``asyncio.create_task`` in a hook becomes a task of the bus.

A hook cannot hold on to a task, await it, or hear what it raises; left alone it is cancelled without a word when the
program ends. So each loop gets one task factory that calls the earlier one and then asks the buses on that loop whether
this very call comes from inside one of their hooks. The answer is read off the stack, not from a context variable: that
would leak into every task's descendants. Tasks made by a task group, asyncio's or anyio's, stay with their group.
"""

import asyncio
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Final, Literal, Protocol, cast

from evsys_bus.bus.compile import FILENAME
from evsys_bus.diagnostics import log
from evsys_bus.tasks import running_loop

TaskFactory = Callable[..., "asyncio.Task[Any] | asyncio.Future[Any]"]
"""As asyncio has it. Any: a task's result is its maker's business."""

AdoptionState = Literal["on", "off", "ended"]
"""``off``: no event loop runs where the bus was entered. ``ended``: the host set a task factory of its own since."""

_OWNED_ELSEWHERE: Final = frozenset({"asyncio.taskgroups", "anyio._backends._asyncio", "evsys_bus.tasks.office"})
"""Modules whose tasks have an owner already."""


class Adopter(Protocol):
    """A bus, as the task factory sees it."""

    def publishing(self) -> bool:
        """Whether some thread is inside a publish."""
        ...

    def adopt_from(self, frame: FrameType, task: "asyncio.Task[Any]") -> bool:
        """Take the task on, if this frame runs inside a hook that this bus called."""
        ...


class _Adoption:
    """The task factory of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.earlier: TaskFactory | None = loop.get_task_factory()
        self.adopters: tuple[Adopter, ...] = ()

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> "asyncio.Task[Any] | asyncio.Future[Any]":
        """Make the task as before, then see whose it is. Any: as asyncio has it."""
        if options.get("eager_start", ...) is None:
            del options["eager_start"]  # newer Pythons pass it to factories that were written before it existed
        make = self.earlier or _make_task
        task = make(loop, coro, **options)
        if isinstance(task, asyncio.Task):
            for adopter in self.adopters:
                frame = inspect.currentframe() if adopter.publishing() else None
                if frame is not None and _made_bare(frame) and adopter.adopt_from(frame, task):
                    break
        return task


def _make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Task[Any]":
    return asyncio.Task(coro, loop=loop, **options)


def _made_bare(frame: FrameType | None) -> bool:
    """Whether no task group stands between the hook and the task; a hook's own publish ends the search."""
    while frame is not None and not frame.f_code.co_filename.startswith(FILENAME):
        if frame.f_globals.get("__name__") in _OWNED_ELSEWHERE:
            return False
        frame = frame.f_back
    return frame is not None


_lock = threading.Lock()
_adoptions: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Adoption]" = weakref.WeakKeyDictionary()


def _factory_of(loop: asyncio.AbstractEventLoop) -> object:
    return loop.get_task_factory()


def begin(loop: asyncio.AbstractEventLoop, adopter: Adopter) -> None:
    """Have the loop's bare tasks offered to this adopter too."""
    with _lock:
        adoption = _adoptions.get(loop)
        if adoption is None or _factory_of(loop) is not adoption:
            adoption = _adoptions[loop] = _Adoption(loop)
            loop.set_task_factory(cast(Any, adoption))  # Any: typeshed's factory is generic in what nobody can know
        if adopter not in adoption.adopters:
            adoption.adopters += (adopter,)


def end(loop: asyncio.AbstractEventLoop, adopter: Adopter) -> None:
    """Undo `begin`; the last one gives the loop its earlier factory back, unless the host has set one since."""
    with _lock:
        adoption = _adoptions.get(loop)
        if adoption is None:
            return
        adoption.adopters = tuple(each for each in adoption.adopters if each is not adopter)
        if not adoption.adopters:
            del _adoptions[loop]
            if _factory_of(loop) is adoption:
                loop.set_task_factory(cast(Any, adoption.earlier))  # Any: as above


def in_force(loop: asyncio.AbstractEventLoop, adopter: Adopter) -> bool:
    """Whether the loop still asks this adopter: a factory that the host sets later ends it."""
    adoption = _adoptions.get(loop)
    return adoption is not None and _factory_of(loop) is adoption and adopter in adoption.adopters


class BareTasks:
    """The bare tasks of one bus's hooks, on every loop where a hook may make them.

    Args:
        publishing: Whether some thread is inside a publish.
        owner_around: The name of the callback in whose hook a frame runs, if it does.
        adopt: Takes a task on for an owner.
    """

    def __init__(
        self,
        publishing: Callable[[], bool],
        owner_around: Callable[[FrameType], str | None],
        adopt: Callable[["asyncio.Task[Any]", str], None],
    ) -> None:
        self.publishing = publishing
        self._owner_around = owner_around
        self._adopt = adopt
        self._loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
        self._ended = False

    @property
    def state(self) -> AdoptionState:
        """How it stands."""
        if not self._loops:
            return "off"
        return "ended" if self._ended else "on"

    def adopt_from(self, frame: FrameType, task: "asyncio.Task[Any]") -> bool:
        """As `Adopter`."""
        owner = self._owner_around(frame)
        if owner is not None:
            self._adopt(task, owner)
        return owner is not None

    def begin_here(self) -> None:
        """Adopt on the loop that runs on this thread, if one does, from here on."""
        loop = running_loop()
        if loop is not None and loop not in self._loops:
            begin(loop, self)
            self._loops.add(loop)
            for closed in [each for each in self._loops if each.is_closed()]:
                self._loops.discard(closed)

    def look_after(self) -> None:
        """Say so, once, when a factory that the host has set ended it."""
        if not self._ended and not all(in_force(loop, self) for loop in tuple(self._loops)):
            self._ended = True
            log().warning(
                "adoption.ended",
                why="the program set a task factory of its own after the bus was entered",
                fix="set it before, or use self.spawn in hooks; bare tasks are not waited for from here on",
            )

    def end(self) -> None:
        """Give every loop its earlier factory back."""
        for loop in self._loops:
            end(loop, self)


def _new_lock() -> None:
    """In a forked child: a lock that another thread held would stay held for ever."""
    global _lock  # noqa: PLW0603 # there is one lock for all loops
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
