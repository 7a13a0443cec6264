"""The failure policy: an inline callback that stops a run whose deliveries fail beyond what their policy allows.

Only inline code ever stops a run. The hook reads one attribute; the watchdog's thread reads the files.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from evsys_bus.callback import Callback
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.delivery.followed import Followed
from evsys_bus.diagnostics import log

if TYPE_CHECKING:
    from evsys_bus.tasks import DeliveryStatus

LOOK_SECONDS: Final = 1.0
"""Interval of checks of the deliveries."""


class Guard(Callback):
    """Stops the run when a required delivery has failed or lags too far behind."""

    spec_name = "delivery_guard"

    def __init__(self, watched: Sequence[Followed]) -> None:
        self.watched: Final = {each.name: each.terms for each in watched}
        self.reason: str | None = None
        """Why the run must stop; None while it may continue."""
        self._due = 0.0
        self._failing_since: dict[str, float] = {}
        self._notes: dict[str, deque[tuple[float, int]]] = {}
        """Time of each check and the events recorded by then; removed once those events are delivered."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Request the stop, if there is a reason."""
        del step_idx, batch, metrics
        if self.reason is not None and not state.stop_requested:
            log().warning("delivery.stops_run", why=self.reason)
            state.request_stop(self.reason)
            state.unfinished = True

    def is_due(self) -> bool:
        """Return whether it is time to check the deliveries again."""
        return bool(self.watched) and self.reason is None and time.monotonic() >= self._due

    def judge(self, accounts: "Sequence[DeliveryStatus]", *, gave_up: bool) -> None:
        """Check the deliveries and set `reason` if the run must stop.

        Args:
            accounts: Their current statuses.
            gave_up: Whether the courier process has ended for good.
        """
        now = time.monotonic()
        self._due = now + LOOK_SECONDS
        for account in accounts:
            # An unreadable status is unknown: it counts neither as failing nor as recovered.
            if account.name in self.watched and self.reason is None and account.is_known:
                self.reason = self._judged(account, now, gave_up=gave_up)

    def _judged(self, account: "DeliveryStatus", now: float, *, gave_up: bool) -> str | None:
        name, terms = account.name, self.watched[account.name]
        said = "" if account.error is None else f": {account.error}"
        blocked = account.owed > 0 and account.owed_fix is not None  # a person has to act
        stuck = gave_up or blocked or account.state in {"parked", "failed"}
        if terms.required and stuck:
            return f'"{name}" is required, and is not delivered to{said}'
        failing = self._failing(name, now, stuck or account.state == "retrying")
        if terms.stop_after_seconds is not None and failing > terms.stop_after_seconds:
            return f'"{name}" has failed for {failing:.0f} s{said}'
        stale = self._stale(account, now)
        if terms.max_staleness_seconds is not None and stale > terms.max_staleness_seconds:
            return f'"{name}" has not caught up for {stale:.0f} s ({account.pending:,} events pending){said}'
        return None

    def _failing(self, name: str, now: float, fails: bool) -> float:
        """Return for how many seconds it has failed, by our own clock: wall clocks may be set, and couriers restart."""
        if not fails:
            self._failing_since.pop(name, None)
            return 0.0
        return now - self._failing_since.setdefault(name, now)

    def _stale(self, account: "DeliveryStatus", now: float) -> float:
        """Return how many seconds ago all events delivered by now were recorded; 0 if nothing is pending."""
        notes = self._notes.setdefault(account.name, deque())
        done = account.delivered + account.dead
        while notes and notes[0][1] <= done:
            notes.popleft()
        if account.pending:
            notes.append((now, account.recorded))
        return now - notes[0][0] if notes else 0.0
