"""Managed tasks: what hooks spawn, what they make bare, and the one drain at the end.

Tasks start in one file of this room, `office`, and nowhere else in the project. The room knows nothing of events; a
callback's name reaches it as the ``owner`` of a task.
"""

from evsys_bus.tasks.job import Job
from evsys_bus.tasks.loops import LoopThread, running_loop
from evsys_bus.tasks.office import TaskOffice
from evsys_bus.tasks.receipt import Draining, Receipt, TaskCounts, wait_shielded

__all__ = ["Draining", "Job", "LoopThread", "Receipt", "TaskCounts", "TaskOffice", "running_loop", "wait_shielded"]
