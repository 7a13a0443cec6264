"""The guard: an inline callback that stops a run whose deliveries fare worse than their terms allow.

Only inline code ever stops a run. The guard's hook reads one attribute; the files are read by the watchdog's thread.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from evsys_bus.callback import Callback
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.delivery.followed import Followed
from evsys_bus.diagnostics import log

if TYPE_CHECKING:
    from evsys_bus.delivery.accounts import Account

LOOK_SECONDS: Final = 1.0
"""Between two looks at the deliveries."""


class Guard(Callback):
    """Stops the run when a delivery that it needs has failed, or lags too far behind."""

    spec_name = "delivery_guard"

    def __init__(self, watched: Sequence[Followed]) -> None:
        self.watched: Final = {each.name: each.terms for each in watched}
        self.reason: str | None = None
        """Why the run must stop; None as long as it need not."""
        self._due = 0.0
        self._caught_up: dict[str, float] = {}

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Ask for the stop."""
        del step_idx, batch, metrics
        if self.reason is not None and not state.stop_requested:
            log().warning("delivery.stops_run", why=self.reason)
            state.request_stop(self.reason)

    def is_due(self) -> bool:
        """Whether it is time to look at the deliveries again."""
        return bool(self.watched) and self.reason is None and time.monotonic() >= self._due

    def judge(self, accounts: "Sequence[Account]", *, gave_up: bool) -> None:
        """See how the deliveries fare. ``gave_up``: no courier process runs any more."""
        now = time.monotonic()
        self._due = now + LOOK_SECONDS
        for account in accounts:
            if account.name in self.watched and self.reason is None:
                self.reason = self._judged(account, now, gave_up=gave_up)

    def _judged(self, account: "Account", now: float, *, gave_up: bool) -> str | None:
        name, terms, state = account.name, self.watched[account.name], account.state
        caught_up = self._caught_up.setdefault(name, now)
        if not account.pending:
            self._caught_up[name] = now
        said = "" if state is None or state.error is None else f": {state.error}"
        if terms.required and (gave_up or (state is not None and state.state in {"parked", "failed"})):
            return f'"{name}" is required, and is not delivered to{said}'
        if terms.stop_after_seconds is not None and state is not None and state.failing_since is not None:
            failing = time.time() - state.failing_since
            if failing > terms.stop_after_seconds:
                return f'"{name}" has failed for {failing:.0f} s{said}'
        if terms.max_staleness_seconds is not None and account.pending:
            stale = now - caught_up
            if stale > terms.max_staleness_seconds:
                return f'"{name}" has not caught up for {stale:.0f} s ({account.pending:,} events pending){said}'
        return None
