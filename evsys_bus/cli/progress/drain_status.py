"""`DrainStatus`: the status of the drain of tasks and deliveries at the end of an experiment."""

import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from evsys_bus.cli.deliveries import describe_counts
from evsys_bus.cli.screen import printable
from evsys_bus.cli.tables import pluralize
from evsys_bus.tasks import DeliveryStatus

POLL_SECONDS: Final = 0.5
"""Interval between two polls, which read the journal's directory."""


RemainingWork = tuple[int, Iterable[DeliveryStatus]]
"""The number of unfinished tasks of callbacks, and the deliveries."""


class DrainStatus:
    """The drain, which starts now. Used by the thread of one view.

    Args:
        poll: Returns the remaining work.
        seconds: The deadline of the drain.
        clock: Monotonic seconds.
    """

    def __init__(
        self, poll: Callable[[], RemainingWork], seconds: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._poll: Final = poll
        self._clock: Final = clock
        self._started_at: Final = clock()
        self._seconds: Final = seconds
        self._next_poll = self._started_at
        self._tasks = 0
        self._deliveries: list[DeliveryStatus] = []

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the drain started."""
        return self._clock() - self._started_at

    def text(self) -> str | None:
        """Return a sentence for users; None if nothing remains."""
        if not self._has_remaining():
            return None
        parts = [pluralize(self._tasks, "task")] if self._tasks else []
        parts += map(_format_delivery, self._unfinished)
        others = [each for each in self._deliveries if each not in self._unfinished and describe_counts(each)]
        failed = "".join(f"; {printable(each.name)}: {', '.join(describe_counts(each))}" for each in others)
        return f"waiting for {', '.join(parts)}, at most {self._seconds_left} s more; {self._hint}{failed}"

    def facts(self) -> dict[str, Any] | None:
        """Return the facts of a line; None if nothing remains."""
        if not self._has_remaining():
            return None
        facts: dict[str, Any] = {"event": "waiting"}
        if self._tasks:
            facts["tasks"] = self._tasks
        if self._unfinished:
            facts["adapters"] = ",".join(each.name for each in self._unfinished)
            facts["events"] = sum(each.pending for each in self._unfinished)
        for count in ("owed", "dead", "hook_failures", "task_failures"):
            if number := sum(getattr(each, count) for each in self._deliveries):
                facts[count] = number
        facts |= {"at_most_seconds": self._seconds_left, "hint": self._hint}
        for each in self._unfinished:
            if each.last_error is not None:
                fix = each.owed_fix or each.fix
                return facts | {"adapter": each.name, "why": each.last_error} | ({"fix": fix} if fix else {})
        return facts

    @property
    def _seconds_left(self) -> int:
        return max(0, round(self._seconds - self.elapsed_seconds))

    @property
    def _hint(self) -> str:
        return "Ctrl-C twice ends it at once" if self._tasks else "Ctrl-C leaves them to sync"

    @property
    def _unfinished(self) -> list[DeliveryStatus]:
        return [each for each in self._deliveries if each.pending or each.owed or not each.is_known]

    def _has_remaining(self) -> bool:
        if self._clock() >= self._next_poll:
            self._next_poll = self._clock() + POLL_SECONDS
            self._tasks, deliveries = self._poll()
            self._deliveries = list(deliveries)
        return bool(self._tasks or self._unfinished)


def _format_delivery(status: DeliveryStatus) -> str:
    """Return ``csv: 58 events`` or ``wandb: 120 owed (no key; fix: wandb login)``."""
    words = describe_counts(status)
    if status.pending:
        words[0] = pluralize(status.pending, "event")
    fix = status.owed_fix or status.fix
    why = "" if status.last_error is None else f" ({status.last_error}{f'; fix: {fix}' if fix else ''})"
    return printable(f"{status.name}: {', '.join(words)}{why}")
