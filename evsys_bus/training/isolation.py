"""Which errors propagate out of an isolated run or evaluator.

The errors are caught where the policy is: in `arm_run` for a run, in `loop` for an evaluator.
"""

import asyncio
from typing import Final

EXIT: Final = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""Requests to exit the program or the coroutine; they always propagate."""


def should_propagate(error: BaseException, *, cancelled: bool) -> bool:
    """Whether an error must propagate: a request to exit, or a cancellation of the work itself.

    All other errors are isolated, whatever they inherit from: a panic in Rust code (tokenizers, polars) is not an
    Exception.

    Args:
        error: The error that the isolated code raised.
        cancelled: Whether the work is being cancelled; if not, the isolated code raised a CancelledError by itself.
    """
    return isinstance(error, EXIT) or (cancelled and isinstance(error, asyncio.CancelledError))
