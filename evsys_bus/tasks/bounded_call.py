"""`call_bounded`: await a stranger's coroutine function under a deadline that it cannot overrun.

``asyncio.timeout`` waits for what it cancels; here, a call that ignores its cancellation is left behind, and its caller
goes on.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import anyio


class Ending(NamedTuple):
    """How a call ended: with a value, or with an error."""

    value: Any = None
    """Any: whatever it returned."""
    error: Exception | None = None


async def call_bounded(
    fn: Callable[..., Awaitable[object]],
    *args: object,
    seconds: float,
    grace_seconds: float,
    name: str,
    unended: "set[asyncio.Task[Ending]]",
) -> Ending:
    """Await ``fn(*args)`` in a task of its own, for at most ``seconds``, then cancel it, and wait ``grace_seconds``.

    When the caller is cancelled the call is too; the caller goes on after at most ``grace_seconds``.

    Args:
        unended: Holds the task for as long as it runs, also when it is left behind.

    Returns:
        What it returned, or what it raised: a TimeoutError for a late one, whatever that did in the end; a
        RuntimeError for what is no Exception, KeyboardInterrupt, SystemExit and CancelledError included.
    """
    task = asyncio.get_running_loop().create_task(_captured(fn, args), name=name)
    unended.add(task)
    task.add_done_callback(unended.discard)
    try:
        await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        with anyio.CancelScope(shield=True):  # anyio cancels over and over; that counts as once
            await asyncio.wait([task], timeout=grace_seconds)
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=grace_seconds)
        left = "" if task.done() else "; it ignored its cancellation, and was left behind"
        return Ending(error=TimeoutError(f"it took longer than {seconds:g} s{left}"))
    # A task that cancels itself and returns has no result.
    return Ending(error=RuntimeError("it cancelled its own task")) if task.cancelled() else task.result()


async def _captured(fn: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> Ending:
    try:
        return Ending(await fn(*args))
    except Exception as error:
        return Ending(error=error)
    except BaseException as error:  # a task that raises KeyboardInterrupt throws it at the event loop itself
        outer = RuntimeError(f"it raised {type(error).__name__}")
        outer.__cause__ = error
        return Ending(error=outer)
