"""Progress of an experiment while it trains.

board          the callback that tracks the state of every run, O(1) per event
figures        the rows of the table of arms
waiting        the drain of tasks and deliveries at the end
transfers      uploads and downloads of checkpoints, as text and as facts
transfer_bar   one transfer as a line of a terminal
lines          plain and JSON lines, for pipes and logs
live           a table that is redrawn in place, for terminals
capture        redirects output of other code, so that it does not corrupt the table
view           chooses the view, and refreshes it from a thread
"""

from evsys_bus.cli.progress.drain_status import DrainStatus
from evsys_bus.cli.progress.run_state import PlannedRun, RunStateTracker
from evsys_bus.cli.progress.view import ProgressMode, resolve_mode, show_progress

__all__ = ["DrainStatus", "PlannedRun", "ProgressMode", "RunStateTracker", "resolve_mode", "show_progress"]
