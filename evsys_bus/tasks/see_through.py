"""`see_through`: let work that was begun come to a good end when its caller is cancelled.

It owns the one task that a training loop starts, from its first step to its last event.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import anyio

GIVE_UP_SECONDS: Final = 1.0
"""How long work may take to end once it is cancelled itself."""

T = TypeVar("T")


async def see_through(work: Coroutine[Any, Any, T], *, on_cancel: Callable[[], object]) -> T:
    """Await ``work`` in a task of its own. Any: what a coroutine yields to its loop is the loop's business.

    The first cancellation of the caller calls ``on_cancel``, which should make the work end soon; it is raised once the
    work has ended. A second one cancels the work, and is raised after at most `GIVE_UP_SECONDS`.

    Raises:
        BaseException: What the work raised, KeyboardInterrupt and SystemExit included.
    """
    task = asyncio.get_running_loop().create_task(_captured(work), name="evsys-bus:training")
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        on_cancel()
        await _end_or_give_up(task)
        ended = task.result() if task.done() and not task.cancelled() else None
        if isinstance(ended, _Raised) and not isinstance(ended.error, asyncio.CancelledError):
            raise ended.error from None
        raise
    outcome = task.result()
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


class _Raised:
    """What the work raised, as a value: a task that raises KeyboardInterrupt throws it at the event loop itself."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _captured(work: Coroutine[Any, Any, T]) -> T | _Raised:
    try:
        return await work
    except BaseException as error:
        return _Raised(error)


async def _end_or_give_up(task: "asyncio.Task[Any]") -> None:
    # anyio cancels what is in a cancelled scope over and over, until it ends: under the shield that counts as once.
    # A bare task.cancel() goes through the shield, so a second one is noticed.
    with anyio.CancelScope(shield=True):
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task], timeout=GIVE_UP_SECONDS)
