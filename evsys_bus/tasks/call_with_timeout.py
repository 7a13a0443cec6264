"""`call_with_timeout`: await an adapter's coroutine function with a timeout that it cannot overrun.

``asyncio.timeout`` waits for the task that it cancels; here, a call that ignores its cancellation is abandoned and the
caller continues.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import anyio


class Outcome(NamedTuple):
    """The result of a call: the value that it returned, or its error."""

    value: Any = None
    error: Exception | None = None


async def call_with_timeout(
    fn: Callable[..., Awaitable[object]],
    *args: object,
    seconds: float,
    grace_seconds: float,
    name: str,
    unfinished: "set[asyncio.Task[Outcome]]",
) -> Outcome:
    """Await ``fn(*args)`` in its own task for at most ``seconds``, then cancel it and wait ``grace_seconds``.

    Cancelling the caller cancels the call; the caller continues after at most ``grace_seconds``.

    Args:
        unfinished: Holds the task as long as it runs, also after it was abandoned.

    Returns:
        The returned value or the raised exception. The error is a TimeoutError for a late call, whatever the call did
        in the end, and a RuntimeError for anything that is not an Exception (KeyboardInterrupt, SystemExit,
        CancelledError).
    """
    task = asyncio.get_running_loop().create_task(_capture_outcome(fn, args), name=name)
    unfinished.add(task)
    task.add_done_callback(unfinished.discard)
    try:
        await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        task.cancel()
        with anyio.CancelScope(shield=True):  # anyio repeats a cancellation until the scope exits
            await asyncio.wait([task], timeout=grace_seconds)
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=grace_seconds)
        note = "" if task.done() else "; it ignored its cancellation and was abandoned"
        return Outcome(error=TimeoutError(f"it took longer than {seconds:g} s{note}"))
    # A task that cancels itself has no result, even if it returns.
    return Outcome(error=RuntimeError("it cancelled its own task")) if task.cancelled() else task.result()


async def _capture_outcome(fn: Callable[..., Awaitable[object]], args: tuple[object, ...]) -> Outcome:
    try:
        return Outcome(await fn(*args))
    except Exception as error:
        return Outcome(error=error)
    except BaseException as error:  # a task that raises KeyboardInterrupt raises it in the event loop as well
        wrapper = RuntimeError(f"it raised {type(error).__name__}")
        wrapper.__cause__ = error
        return Outcome(error=wrapper)
