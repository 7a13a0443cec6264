"""What passes the walls around runs and evaluators, and what stays behind them.

The walls themselves stand where the policy is: `arm_run` for a run, `loop` for an evaluator.
"""

import asyncio
from typing import Final

LEAVE: Final = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Wishes to leave the program, or the coroutine; they pass every wall."""


def passes(error: BaseException, *, cancelled: bool) -> bool:
    """Whether an error goes through a wall: a wish to leave, or a cancellation that is meant for us.

    Anything else stays behind it, whatever it inherits from: a panic of Rust code (tokenizers, polars) is no Exception.

    Args:
        error: What was raised behind the wall.
        cancelled: Whether the work is being cancelled; if not, the code behind the wall made that CancelledError up.
    """
    return isinstance(error, LEAVE) or (cancelled and isinstance(error, asyncio.CancelledError))
