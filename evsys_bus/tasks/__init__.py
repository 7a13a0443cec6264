"""Managed tasks: those that hooks spawn or create with ``asyncio.create_task``, and the drain that waits for them.

All tasks of the project are created in this package. It does not depend on events; a callback's name is passed in as
the ``owner`` of a task.
"""

from evsys_bus.deprecated import former_names
from evsys_bus.tasks.adoption import HOOK_FILENAME_PREFIX, AdoptionState, HookTaskAdopter, find_hook_frame, task_name
from evsys_bus.tasks.calls import (
    Deadline,
    Gate,
    Outcome,
    UninterruptibleCall,
    call_with_timeout,
    run_to_completion,
    start_thread,
)
from evsys_bus.tasks.loops import (
    STOP_SECONDS,
    LoopStopped,
    LoopThread,
    count_unfinished_calls,
    other_tasks,
    run_in_new_loop,
    run_on_loop,
    running_loop,
)
from evsys_bus.tasks.manager import CANCEL_GRACE_SECONDS, FinishedTask, Job, TaskManager
from evsys_bus.tasks.receipt import (
    DeliveryState,
    DeliveryStatus,
    DrainFuture,
    Receipt,
    TaskCounts,
    preload_wait_imports,
    wait_shielded,
)

__all__ = [
    "CANCEL_GRACE_SECONDS",
    "HOOK_FILENAME_PREFIX",
    "STOP_SECONDS",
    "AdoptionState",
    "Deadline",
    "DeliveryState",
    "DeliveryStatus",
    "DrainFuture",
    "FinishedTask",
    "Gate",
    "HookTaskAdopter",
    "Job",
    "LoopStopped",
    "LoopThread",
    "Outcome",
    "Receipt",
    "TaskCounts",
    "TaskManager",
    "UninterruptibleCall",
    "call_with_timeout",
    "count_unfinished_calls",
    "find_hook_frame",
    "other_tasks",
    "preload_wait_imports",
    "run_in_new_loop",
    "run_on_loop",
    "run_to_completion",
    "running_loop",
    "start_thread",
    "task_name",
    "wait_shielded",
]

__getattr__ = former_names(
    __name__,
    {
        "Delivery": "DeliveryStatus",
        "Draining": "DrainFuture",
        "Ending": "Outcome",
        "TaskOffice": "TaskManager",
        "call_bounded": "call_with_timeout",
        "run_alone": "run_in_new_loop",
        "see_through": "run_to_completion",
    },
)
