"""`Job`: one spawned task, and the check of what may be spawned."""

import asyncio
import contextvars
import inspect
from collections.abc import Awaitable, Callable
from functools import partial

from evsys_bus.errors import SpawnError


class Job:
    """The arguments of one `spawn` call and the state of its task."""

    __slots__ = ("args", "attempts", "background", "context", "fn", "kind", "lane", "name", "owner", "retry", "timeout")

    def __init__(
        self,
        fn: Callable[..., Awaitable[object]],
        args: tuple[object, ...],
        *,
        owner: str,
        name: str | None,
        timeout: float | None,
        retry: Callable[..., Awaitable[object]] | None,
        lane: str | None,
        background: bool = False,
    ) -> None:
        _check_callable(fn)
        self.fn = fn
        self.args = args
        self.owner = owner
        self.kind = _function_name(fn)
        self.name = name or self.kind
        self.timeout = timeout
        self.retry = retry
        self.lane = None if lane is None else (owner, lane)
        self.context = contextvars.copy_context()
        self.background = background
        self.attempts = 0

    def __str__(self) -> str:
        return f"{self.owner}:{self.name}"

    async def run(self) -> None:
        """Run all attempts within the timeout.

        Raises:
            TimeoutError: They took longer.
            RuntimeError: The task called ``sys.exit``.
        """
        timeout_scope = asyncio.timeout(self.timeout)
        try:
            async with timeout_scope:
                await (self._attempt(*self.args) if self.retry is None else self.retry(self._attempt, *self.args))
        except TimeoutError:
            if not timeout_scope.expired():
                raise  # raised by the task itself
            raise TimeoutError(f"timed out after {self.timeout:g} s") from None
        except SystemExit as error:  # asyncio would propagate it out of the loop and end the program
            raise RuntimeError(f"the task called sys.exit({error.code!r})") from error

    async def _attempt(self, *args: object) -> object:
        self.attempts += 1
        awaitable = self.fn(*args)
        if not inspect.isawaitable(awaitable):
            raise _not_async(self.name)
        return await awaitable


def _check_callable(fn: object) -> None:
    if inspect.iscoroutine(fn):
        fn.close()
        raise SpawnError(
            f"spawn() was given the coroutine {fn.__qualname__}(...), not the function",
            fix="pass the function and its arguments: self.spawn(upload, path), not self.spawn(upload(path))",
        )
    # A wrapper without functools.wraps looks like an ordinary function here; `_attempt` checks what it returns.
    if not callable(fn) or inspect.isasyncgenfunction(fn) or inspect.isclass(fn) or inspect.isbuiltin(fn):
        raise _not_async(_function_name(fn))


def _not_async(name: str) -> SpawnError:
    return SpawnError(
        f"spawn() takes a coroutine function; {name} is not one",
        fix="define it with `async def`; blocking code: self.spawn(anyio.to_thread.run_sync, function, argument)",
    )


def _function_name(fn: object) -> str:
    while isinstance(fn, partial):
        fn = fn.func  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] # a partial of anything
    return getattr(fn, "__name__", None) or type(fn).__name__
