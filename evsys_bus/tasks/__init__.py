"""Managed tasks: what hooks spawn, what they make bare, and the one drain at the end.

Tasks start in this room and nowhere else in the project. It knows nothing of events; a callback's name reaches it as
the ``owner`` of a task.
"""

from evsys_bus.tasks.bounded_call import Ending, call_bounded
from evsys_bus.tasks.job import Job
from evsys_bus.tasks.loops import STOP_SECONDS, LoopThread, run_alone, running_loop
from evsys_bus.tasks.office import CANCEL_GRACE_SECONDS, TaskOffice
from evsys_bus.tasks.receipt import Delivery, Draining, Receipt, TaskCounts, wait_shielded
from evsys_bus.tasks.see_through import see_through

__all__ = [
    "CANCEL_GRACE_SECONDS",
    "STOP_SECONDS",
    "Delivery",
    "Draining",
    "Ending",
    "Job",
    "LoopThread",
    "Receipt",
    "TaskCounts",
    "TaskOffice",
    "call_bounded",
    "run_alone",
    "running_loop",
    "see_through",
    "wait_shielded",
]
