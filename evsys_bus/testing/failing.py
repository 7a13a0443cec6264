"""A callback and a sink that fail by plan, and record everything else."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

from evsys_bus.events import Envelope, Event
from evsys_bus.testing.recording import RecordingCallback, RecordingSink

PlannedOutcome: TypeAlias = BaseException | int | Literal["hang", "deaf"] | None
"""Result of a call: an error to raise; the number of events taken from the batch; a wait that ends only when cancelled
(``hang``), or not even then (``deaf``); None takes the whole batch."""


class FailingCallback(RecordingCallback):
    """Raises by plan, with one entry for each call of a hook; after the end of the plan it records everything.

    Example:
        >>> from evsys_bus.callback import dispatch
        >>> callback = FailingCallback([None, ValueError("no")])
        >>> callback.on_group_start(None, "a")
        >>> callback.on_group_start(None, "b")
        Traceback (most recent call last):
        ValueError: no
        >>> callback.on_group_start(None, "c")
        >>> [event.group_name for event in callback.events]
        ['a', 'c']
    """

    def __init__(self, plan: Iterable[BaseException | None]) -> None:
        super().__init__()
        self._plan = iter(plan)
        self.calls = 0
        """Including those that failed."""

    def keep(self, event: Event) -> None:
        """Record the event, or raise as planned."""
        self.calls += 1
        error = next(self._plan, None)
        if error is not None:
            raise error
        super().keep(event)


class FailingSink(RecordingSink):
    """Fails by plan, with one entry for each `write`; after the end of the plan it records everything.

    Args:
        plan: For `write`.
        opening: For `open`.

    Example:
        >>> sink = FailingSink([OSError("away")])
        >>> asyncio.run(sink.write([]))
        Traceback (most recent call last):
        OSError: away
        >>> asyncio.run(sink.write([]))
        >>> sink.calls
        2
    """

    def __init__(self, plan: Iterable[PlannedOutcome] = (), *, opening: Iterable[PlannedOutcome] = ()) -> None:
        super().__init__()
        self._plan: Iterator[PlannedOutcome] = iter(plan)
        self._opening: Iterator[PlannedOutcome] = iter(opening)
        self._released = False
        self.calls = 0
        """Calls of `write`, including those that failed."""
        self.cancellations = 0
        """How often a hanging call was cancelled."""

    def release(self) -> None:
        """Let deaf calls return at their next cancellation or within 10 ms, so that a test can end."""
        self._released = True

    async def open(self) -> None:
        """Open, as planned."""
        await self._apply(next(self._opening, None))
        await super().open()

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Record the batch, as planned."""
        self.calls += 1
        outcome = next(self._plan, None)
        await self._apply(outcome)
        if isinstance(outcome, int):
            self.keep(batch[:outcome])
            return outcome
        self.keep(batch)
        return None

    async def _apply(self, outcome: PlannedOutcome) -> None:
        if isinstance(outcome, BaseException):
            raise outcome
        while outcome in {"hang", "deaf"} and not self._released:
            try:
                await asyncio.sleep(0.01)  # release() may come from another thread
            except asyncio.CancelledError:
                self.cancellations += 1
                if outcome == "hang":
                    raise
