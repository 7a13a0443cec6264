"""`Waiting`: the wait for tasks and deliveries at the end, as it is told to whoever wonders why it does not end."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from evsys_bus.cli.screen import printable
from evsys_bus.cli.tables import counted
from evsys_bus.tasks import Delivery

LOOK_SECONDS: Final = 0.5
"""Between two looks: they read the journal's directory."""


class Left(NamedTuple):
    """What is not done yet."""

    tasks: int
    """Of callbacks."""
    deliveries: Iterable[Delivery]


class Waiting:
    """Begins now. For the thread of one view.

    Args:
        look: What is left to be done.
        seconds: How long the wait may take.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, look: Callable[[], Left], seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look: Final = look
        self._clock: Final = clock
        self._began: Final = clock()
        self._seconds: Final = seconds
        self._due = self._began
        self._tasks = 0
        self._pending: dict[str, int] = {}

    @property
    def lasted(self) -> float:
        """Seconds so far."""
        return self._clock() - self._began

    def text(self) -> str | None:
        """For people; None while nothing is waited for."""
        if not self._is_any():
            return None
        parts = [counted(self._tasks, "task")] if self._tasks else []
        parts += [f"{printable(name)}: {counted(count, 'event')}" for name, count in self._pending.items()]
        return f"waiting for {', '.join(parts)}, at most {self._seconds_left} s more; {self._hint}"

    def facts(self) -> dict[str, Any] | None:
        """For a line of a log. Any: as `Facts`."""
        if not self._is_any():
            return None
        tasks = {"tasks": self._tasks} if self._tasks else {}
        events = {"adapters": ",".join(self._pending), "events": sum(self._pending.values())} if self._pending else {}
        return {"event": "waiting", **tasks, **events, "at_most_seconds": self._seconds_left, "hint": self._hint}

    @property
    def _seconds_left(self) -> int:
        return max(0, round(self._seconds - self.lasted))

    @property
    def _hint(self) -> str:
        return "Ctrl-C twice ends it at once" if self._tasks else "Ctrl-C leaves them to sync"

    def _is_any(self) -> bool:
        if self._clock() >= self._due:
            self._due = self._clock() + LOOK_SECONDS
            self._tasks, deliveries = self._look()
            self._pending = {each.name: each.pending for each in deliveries if each.pending}
        return bool(self._tasks or self._pending)
