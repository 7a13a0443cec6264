"""The failure policy: an inline callback that stops a run whose deliveries fail beyond what their policy allows.

Only inline code ever stops a run. The hook reads one attribute; the watchdog's thread reads the files.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from evsys_bus.callback import Callback
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.delivery.subscription import Subscription
from evsys_bus.diagnostics import log

if TYPE_CHECKING:
    from evsys_bus.tasks import DeliveryStatus

CHECK_INTERVAL_SECONDS: Final = 1.0
"""Interval of checks of the deliveries."""


class FailurePolicy(Callback):
    """Stops the run when a required delivery has failed or lags too far behind."""

    spec_name = "delivery_guard"

    def __init__(self, watched: Sequence[Subscription]) -> None:
        self.watched: Final = {each.name: each.policy for each in watched}
        self.reason: str | None = None
        """Why the run must stop; None while it may continue."""
        self._next_check_at = 0.0
        self._failing_since: dict[str, float] = {}
        self._snapshots: dict[str, deque[tuple[float, int]]] = {}
        """Time of each check and the events recorded by then; removed once those events are delivered."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Request the stop, if there is a reason."""
        del step_idx, batch, metrics
        if self.reason is not None and not state.stop_requested:
            log().warning("delivery.stops_run", why=self.reason)
            state.request_stop(self.reason)
            state.stopped_early = True

    def is_due(self) -> bool:
        """Return whether it is time to check the deliveries again."""
        return bool(self.watched) and self.reason is None and time.monotonic() >= self._next_check_at

    def check(self, statuses: "Sequence[DeliveryStatus]", *, gave_up: bool) -> None:
        """Check the deliveries and set `reason` if the run must stop.

        Args:
            statuses: Their current statuses.
            gave_up: Whether the courier process has ended for good.
        """
        now = time.monotonic()
        self._next_check_at = now + CHECK_INTERVAL_SECONDS
        for status in statuses:
            # An unreadable status is unknown: it counts neither as failing nor as recovered.
            if status.name in self.watched and self.reason is None and status.is_known:
                self.reason = self._stop_reason(status, now, gave_up=gave_up)

    def _stop_reason(self, status: "DeliveryStatus", now: float, *, gave_up: bool) -> str | None:
        name, policy = status.name, self.watched[status.name]
        suffix = "" if status.error is None else f": {status.error}"
        blocked = status.owed > 0 and status.owed_fix is not None  # a person has to act
        stuck = gave_up or blocked or status.state in {"parked", "failed"}
        if policy.required and stuck:
            return f'"{name}" is required, and is not delivered to{suffix}'
        failing_seconds = self._failing_seconds(name, now, stuck or status.state == "retrying")
        if policy.stop_after_seconds is not None and failing_seconds > policy.stop_after_seconds:
            return f'"{name}" has failed for {failing_seconds:.0f} s{suffix}'
        stale_seconds = self._stale_seconds(status, now)
        if policy.max_staleness_seconds is not None and stale_seconds > policy.max_staleness_seconds:
            return f'"{name}" has not caught up for {stale_seconds:.0f} s ({status.pending:,} events pending){suffix}'
        return None

    def _failing_seconds(self, name: str, now: float, is_failing: bool) -> float:
        """Return for how many seconds it has failed, by our own clock: wall clocks may be set, and couriers restart."""
        if not is_failing:
            self._failing_since.pop(name, None)
            return 0.0
        return now - self._failing_since.setdefault(name, now)

    def _stale_seconds(self, status: "DeliveryStatus", now: float) -> float:
        """Return how many seconds ago all events delivered by now were recorded; 0 if nothing is pending."""
        snapshots = self._snapshots.setdefault(status.name, deque())
        done = status.delivered + status.dead
        while snapshots and snapshots[0][1] <= done:
            snapshots.popleft()
        if status.pending:
            snapshots.append((now, status.recorded))
        return now - snapshots[0][0] if snapshots else 0.0
