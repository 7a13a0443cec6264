"""Adoption: a bare ``asyncio.create_task`` in a hook becomes a task of the bus or courier that called the hook.

A hook cannot hold on to a task, await it, or hear what it raises; left alone it is cancelled without a word when the
program ends. So each loop gets one task factory that calls the earlier one and then asks the buses and couriers on that
loop whether this very call comes from inside one of their hooks. The answer is read off the stack, not from a context
variable: that would leak into every task's descendants. Code that calls hooks is compiled under a filename that begins
with `HOOK_CALLS`. Tasks made by a task group, asyncio's or anyio's, stay with their group.
"""

import asyncio
import inspect
import os
import re
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Final, Literal, Protocol, cast

from evsys_bus.diagnostics import log
from evsys_bus.tasks.loops import running_loop

HOOK_CALLS: Final = "<evsys-bus publish"
"""What the filename of code that calls hooks begins with."""

TaskFactory = Callable[..., "asyncio.Task[Any] | asyncio.Future[Any]"]
"""As asyncio has it. Any: a task's result is its maker's business."""

AdoptionState = Literal["on", "off", "ended"]
"""``off``: no event loop runs where the bus was entered. ``ended``: the host set a task factory of its own since."""

_OWNED_ELSEWHERE: Final = frozenset({"asyncio.taskgroups", "anyio._backends._asyncio", "evsys_bus.tasks.office"})
"""Modules whose tasks have an owner already."""


class Adopter(Protocol):
    """A bus or a courier, as the task factory sees it."""

    def publishing(self) -> bool:
        """Whether some thread calls hooks now; a hint that costs nothing."""
        ...

    def adopt_from(self, frame: FrameType, task: "asyncio.Task[Any]") -> bool:
        """Take the task on, if this adopter called the hook in which this frame runs."""
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
                    if _DEFAULT_NAME.fullmatch(task.get_name()):  # a name that the hook gave is set behind this
                        task.set_name(getattr(coro, "__qualname__", None) or task.get_name())
                    break
        return task


def name_of(task: "asyncio.Task[Any]") -> str:
    """The name of a task; of an adopted one that was given none it is the name of its coroutine."""
    name = task.get_name()
    if name != "None":
        return name
    # Python 3.13.0 to 3.13.2 give a task that a factory has made the name "None". Where there is another name it must
    # not be asked for its coroutine: 3.12.0 and 3.12.1 crash if it ended eagerly.
    return getattr(task.get_coro(), "__qualname__", None) or name


def _make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Task[Any]":
    return asyncio.Task(coro, loop=loop, **options)


def hook_call(frame: FrameType | None) -> FrameType | None:
    """The innermost frame, from this one outward, that calls a hook; None outside hooks."""
    while frame is not None and not frame.f_code.co_filename.startswith(HOOK_CALLS):
        frame = frame.f_back
    return frame


def _made_bare(frame: FrameType | None) -> bool:
    """Whether no task group stands between the hook and the task; a hook's own publish ends the search."""
    while frame is not None and not frame.f_code.co_filename.startswith(HOOK_CALLS):
        if frame.f_globals.get("__name__") in _OWNED_ELSEWHERE:
            return False
        frame = frame.f_back
    return frame is not None


_DEFAULT_NAME: Final = re.compile(r"Task-\d+")

_lock = threading.RLock()  # a signal handler that publishes may come to `begin` in the middle of it
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
    """The bare tasks of the hooks that one bus or courier calls, on every loop where a hook may make them.

    Args:
        publishing: Whether some thread calls hooks now.
        owner_around: The name of the callback in whose hook a frame runs, if this bus or courier called that.
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
            self._loops.add(loop)  # first: a signal handler that publishes meanwhile must not begin it again
            begin(loop, self)
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
        for loop in tuple(self._loops):
            end(loop, self)


def _new_lock() -> None:
    """In a forked child: a lock that another thread held would stay held for ever."""
    global _lock  # noqa: PLW0603 # there is one lock for all loops
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)
