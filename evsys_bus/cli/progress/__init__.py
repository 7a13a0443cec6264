"""How a run shows itself while it trains.

board          what happened so far, kept by a callback: state only, O(1) per event
figures        the arms of a board in figures
waiting        the wait for tasks and deliveries at the end
transfers      checkpoints on their way, up or down, and what is told of them
transfer_bar   one of them on a line of a terminal
lines          plain and JSON lines, for pipes and logs
live           a table that redraws itself, for terminals
capture        what others print meanwhile, kept from tearing that table
view           which of these it is, and the thread on whose timer they read the board
"""

from evsys_bus.cli.progress.board import Board, PlannedRun
from evsys_bus.cli.progress.view import ProgressMode, resolved, shown
from evsys_bus.cli.progress.waiting import Waiting

__all__ = ["Board", "PlannedRun", "ProgressMode", "Waiting", "resolved", "shown"]
