"""Statistics of one hook of one callback: exact counts and sampled times."""

from collections.abc import Callable
from typing import Final

import msgspec

SLOW_NANOSECONDS: Final = 1_000_000
"""A hook that was seen to take this long is timed on every later call."""


class HookHealth(msgspec.Struct, frozen=True):
    """Counts and times of one hook of one callback."""

    callback: str
    hook: str
    calls: int
    """Exact."""
    failures: int
    """Exact: calls that raised."""
    blocked: int
    """Calls that the watchdog reported as blocking."""
    mean_seconds: float
    """Mean of the sampled calls: the first, then 1 in 64; every call once the hook was seen to take 1 ms."""
    max_seconds: float
    """The longest of the sampled calls."""

    def merge(self, other: "HookHealth | None") -> "HookHealth":
        """Return the combined counts and times of both."""
        if other is None:
            return self
        calls = self.calls + other.calls
        seconds = self.mean_seconds * self.calls + other.mean_seconds * other.calls
        return HookHealth(
            callback=self.callback,
            hook=self.hook,
            calls=calls,
            failures=self.failures + other.failures,
            blocked=self.blocked + other.blocked,
            mean_seconds=seconds / max(calls, 1),
            max_seconds=max(self.max_seconds, other.max_seconds),
        )


class HookStats:
    """Live counters of one hook, held while its callback is attached."""

    __slots__ = (
        "blocked",
        "callback",
        "calls",
        "failures",
        "hook",
        "max_ns",
        "method",
        "owner",
        "sampled",
        "sampled_ns",
    )

    def __init__(self, callback: object, owner: str, hook: str, method: Callable[..., object]) -> None:
        self.callback = callback
        self.owner = owner
        self.hook = hook
        self.method = method
        self.calls = 0  # of retired compiled code only; the code in use has its own counter
        self.failures = 0
        self.blocked = 0
        self.sampled = 0
        self.sampled_ns = 0
        self.max_ns = 0

    def add_sample(self, nanoseconds: int) -> None:
        """Add one sampled call."""
        self.sampled += 1
        self.sampled_ns += nanoseconds
        self.max_ns = max(self.max_ns, nanoseconds)

    def health(self, current_calls: int) -> HookHealth:
        """Return the current values.

        Args:
            current_calls: Calls counted by the compiled code in use, which are not yet part of `calls`.
        """
        return HookHealth(
            callback=self.owner,
            hook=self.hook,
            calls=self.calls + current_calls,
            failures=self.failures,
            blocked=self.blocked,
            mean_seconds=self.sampled_ns / max(self.sampled, 1) / 1e9,
            max_seconds=self.max_ns / 1e9,
        )
