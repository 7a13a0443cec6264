"""`run_to_completion`: let work finish in an orderly way when its caller is cancelled.

It owns the task of a training loop, from the first step to the last event.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import anyio

GIVE_UP_SECONDS: Final = 1.0
"""How long the work may take to end once it was cancelled."""

T = TypeVar("T")


async def run_to_completion(work: Coroutine[Any, Any, T], *, on_cancel: Callable[[], object]) -> T:
    """Await ``work`` in a task of its own.

    The first cancellation of the caller calls ``on_cancel``, which should make the work end soon; it is raised once the
    work has ended. A second cancellation cancels the work and is raised after at most `GIVE_UP_SECONDS`.

    Raises:
        BaseException: What the work raised, including KeyboardInterrupt and SystemExit.
    """
    task = asyncio.get_running_loop().create_task(_capture_error(work), name="evsys-bus:training")
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        on_cancel()
        await _wait_or_give_up(task)
        result = task.result() if task.done() and not task.cancelled() else None
        if isinstance(result, _Raised) and not isinstance(result.error, asyncio.CancelledError):
            raise result.error from None
        raise
    outcome = task.result()
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


class _Raised:
    """An exception as a result: a task that raises KeyboardInterrupt would raise it in the event loop as well."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


async def _capture_error(work: Coroutine[Any, Any, T]) -> T | _Raised:
    try:
        return await work
    except BaseException as error:
        return _Raised(error)


async def _wait_or_give_up(task: "asyncio.Task[Any]") -> None:
    # anyio repeats the cancellation of a cancelled scope until it exits; the shield reduces that to one.
    # A bare task.cancel() passes the shield, so a second one is noticed.
    with anyio.CancelScope(shield=True):
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task], timeout=GIVE_UP_SECONDS)
