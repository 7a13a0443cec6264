"""Managed tasks: those that hooks spawn or create with ``asyncio.create_task``, and the drain that waits for them.

All tasks of the project are created in this package. It does not depend on events; a callback's name is passed in as
the ``owner`` of a task.
"""

from evsys_bus.tasks.adoption import HOOK_CALLS, AdoptionState, BareTasks, hook_call, name_of
from evsys_bus.tasks.bounded_call import Ending, call_bounded
from evsys_bus.tasks.job import Job
from evsys_bus.tasks.loops import STOP_SECONDS, LoopThread, other_tasks, run_alone, run_on, running_loop, unended_calls
from evsys_bus.tasks.office import CANCEL_GRACE_SECONDS, Ended, TaskOffice
from evsys_bus.tasks.receipt import (
    DeliveryState,
    DeliveryStatus,
    Draining,
    Receipt,
    TaskCounts,
    prepare_to_wait,
    wait_shielded,
)
from evsys_bus.tasks.see_through import see_through
from evsys_bus.tasks.uninterrupted import Deadline, Gate, Uninterrupted, start_thread

__all__ = [
    "CANCEL_GRACE_SECONDS",
    "HOOK_CALLS",
    "STOP_SECONDS",
    "AdoptionState",
    "BareTasks",
    "Deadline",
    "DeliveryState",
    "DeliveryStatus",
    "Draining",
    "Ended",
    "Ending",
    "Gate",
    "Job",
    "LoopThread",
    "Receipt",
    "TaskCounts",
    "TaskOffice",
    "Uninterrupted",
    "call_bounded",
    "hook_call",
    "name_of",
    "other_tasks",
    "prepare_to_wait",
    "run_alone",
    "run_on",
    "running_loop",
    "see_through",
    "start_thread",
    "unended_calls",
    "wait_shielded",
]
