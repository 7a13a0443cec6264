"""Adoption: a bare ``asyncio.create_task`` in a hook becomes a task of the bus or courier that called the hook.

A hook cannot keep a reference to a task, await it, or handle its exception; unadopted, the task would be cancelled
silently when the program ends. So each loop gets one task factory, which calls the previous factory and then asks the
buses and couriers on that loop whether the call comes from inside one of their hooks. The stack decides that, not a
context variable, which every descendant of a task would inherit. Code that calls hooks is compiled under a filename
that starts with `HOOK_FILENAME_PREFIX`. Tasks created by a task group (asyncio's or anyio's) stay with their group.
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
from evsys_bus.weak_items import WeakItems

HOOK_FILENAME_PREFIX: Final = "<evsys-bus publish"
"""Prefix of the filename under which code that calls hooks is compiled."""

TaskFactory = Callable[..., "asyncio.Task[Any] | asyncio.Future[Any]"]
"""The signature that ``loop.set_task_factory`` expects."""

AdoptionState = Literal["on", "off", "ended"]
"""``off``: no event loop was running where the bus was entered. ``ended``: the host replaced the task factory."""

_OWNING_MODULES: Final = frozenset({"asyncio.taskgroups", "anyio._backends._asyncio", "evsys_bus.tasks.manager"})
"""Modules whose tasks already have an owner."""


class Adopter(Protocol):
    """A bus or a courier, as the task factory sees it."""

    def is_publishing(self) -> bool:
        """Whether some thread is calling hooks now; a cheap hint."""
        ...

    def adopt_from(self, frame: FrameType, task: "asyncio.Task[Any]") -> bool:
        """Adopt the task if this adopter called the hook that the frame runs in; return whether it did."""
        ...


class _AdoptingTaskFactory:
    """The task factory of one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.previous: TaskFactory | None = loop.get_task_factory()
        self.adopters: tuple[Adopter, ...] = ()

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> "asyncio.Task[Any] | asyncio.Future[Any]":
        """Create the task with the previous factory, then offer it to the adopters."""
        if options.get("eager_start", ...) is None:
            del options["eager_start"]  # newer Pythons pass it to factories that may not accept it
        make_task = self.previous or _make_task
        task = make_task(loop, coro, **options)
        if isinstance(task, asyncio.Task):
            for adopter in self.adopters:
                frame = inspect.currentframe() if adopter.is_publishing() else None
                if frame is not None and _is_unowned(frame) and adopter.adopt_from(frame, task):
                    if _DEFAULT_NAME.fullmatch(task.get_name()):  # asyncio sets a name that the hook gave after this
                        task.set_name(getattr(coro, "__qualname__", None) or task.get_name())
                    break
        return task


def task_name(task: "asyncio.Task[Any]") -> str:
    """The name of a task; for an adopted task without a name, the name of its coroutine."""
    name = task.get_name()
    if name != "None":
        return name
    # Python 3.13.0 to 3.13.2 name a task that a factory created "None". Only then call get_coro():
    # 3.12.0 and 3.12.1 crash in it for a task that finished eagerly.
    return getattr(task.get_coro(), "__qualname__", None) or name


def _make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Task[Any]":
    return asyncio.Task(coro, loop=loop, **options)


def find_hook_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that calls a hook, searching outward from this one; None outside hooks."""
    while frame is not None and not frame.f_code.co_filename.startswith(HOOK_FILENAME_PREFIX):
        frame = frame.f_back
    return frame


def _is_unowned(frame: FrameType | None) -> bool:
    """Whether no task group is between the hook and the task; a publish inside a hook ends the search."""
    while frame is not None and not frame.f_code.co_filename.startswith(HOOK_FILENAME_PREFIX):
        if frame.f_globals.get("__name__") in _OWNING_MODULES:
            return False
        frame = frame.f_back
    return frame is not None


_DEFAULT_NAME: Final = re.compile(r"Task-\d+")

_lock = (
    threading.RLock()
)  # reentrant: a signal handler that publishes may interrupt `register_adopter` and call it again
_task_factories: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _AdoptingTaskFactory]" = (
    weakref.WeakKeyDictionary()
)


def _current_factory(loop: asyncio.AbstractEventLoop) -> object:
    return loop.get_task_factory()


def register_adopter(loop: asyncio.AbstractEventLoop, adopter: Adopter) -> None:
    """Offer the bare tasks of this loop to the adopter."""
    with _lock:
        task_factory = _task_factories.get(loop)
        if task_factory is None or _current_factory(loop) is not task_factory:
            task_factory = _task_factories[loop] = _AdoptingTaskFactory(loop)
            loop.set_task_factory(cast(Any, task_factory))  # typeshed's protocol is generic in the result of each task
        if adopter not in task_factory.adopters:
            task_factory.adopters += (adopter,)


def unregister_adopter(loop: asyncio.AbstractEventLoop, adopter: Adopter) -> None:
    """Undo `register_adopter`; the last adopter restores the previous factory, unless the host has set another."""
    with _lock:
        task_factory = _task_factories.get(loop)
        if task_factory is None:
            return
        task_factory.adopters = tuple(each for each in task_factory.adopters if each is not adopter)
        if not task_factory.adopters:
            del _task_factories[loop]
            if _current_factory(loop) is task_factory:
                loop.set_task_factory(cast(Any, task_factory.previous))


def is_registered(loop: asyncio.AbstractEventLoop, adopter: Adopter) -> bool:
    """Whether the loop still offers its tasks to this adopter: a factory that the host sets later ends that."""
    task_factory = _task_factories.get(loop)
    return task_factory is not None and _current_factory(loop) is task_factory and adopter in task_factory.adopters


class HookTaskAdopter:
    """Adopts bare tasks of the hooks that one bus or courier calls, on every loop where those hooks run.

    Args:
        is_publishing: Whether some thread is calling hooks now.
        find_owner: Returns the name of the callback whose hook a frame runs in, if this bus or courier called it.
        adopt: Adopts a task for an owner.
    """

    def __init__(
        self,
        is_publishing: Callable[[], bool],
        find_owner: Callable[[FrameType], str | None],
        adopt: Callable[["asyncio.Task[Any]", str], None],
    ) -> None:
        self.is_publishing = is_publishing
        self._find_owner = find_owner
        self._adopt = adopt
        self._loops: WeakItems[asyncio.AbstractEventLoop] = WeakItems()
        self._was_displaced = False

    @property
    def state(self) -> AdoptionState:
        """Whether bare tasks are adopted now."""
        if not self._loops:
            return "off"
        return "ended" if self._was_displaced else "on"

    def adopt_from(self, frame: FrameType, task: "asyncio.Task[Any]") -> bool:
        """See `Adopter.adopt_from`."""
        owner = self._find_owner(frame)
        if owner is not None:
            self._adopt(task, owner)
        return owner is not None

    def adopt_on_running_loop(self) -> None:
        """Adopt tasks on the loop that is running on this thread, if there is one."""
        loop = running_loop()
        if loop is not None and loop not in self._loops:
            self._loops.add(loop)  # first, so that a signal handler that publishes meanwhile does not register it again
            register_adopter(loop, self)
            for closed in [each for each in self._loops if each.is_closed()]:
                self._loops.discard(closed)

    def check_task_factories(self) -> None:
        """Warn once if the host has replaced the task factory."""
        if not self._was_displaced and not all(is_registered(loop, self) for loop in tuple(self._loops)):
            self._was_displaced = True
            log().warning(
                "adoption.ended",
                why="the program set a task factory of its own after the bus was entered",
                fix="set it before, or use self.spawn in hooks; bare tasks are not waited for from here on",
            )

    def close(self) -> None:
        """Restore the previous factory of every loop."""
        for loop in tuple(self._loops):
            unregister_adopter(loop, self)


def _replace_lock() -> None:
    """Replace the lock in a forked child, where one that another thread held would stay locked forever."""
    global _lock  # noqa: PLW0603 # one lock for all loops
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_replace_lock)
