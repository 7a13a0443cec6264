"""What is known of one hook of one callback: exact counts, sampled times."""

from collections.abc import Callable
from typing import Final

import msgspec

SLOW_NANOSECONDS: Final = 1_000_000
"""A hook seen to take this long is timed every time from then on."""


class HookHealth(msgspec.Struct, frozen=True):
    """How one hook of one callback fares."""

    callback: str
    hook: str
    calls: int
    """Exact."""
    failures: int
    """Exact: calls that raised."""
    blocked: int
    """Calls that the watchdog found lasting too long."""
    mean_seconds: float
    """Over the sampled calls: the first, then 1 in 64, all of them once the hook was seen to take 1 ms."""
    max_seconds: float
    """The longest of the sampled calls."""

    def plus(self, other: "HookHealth | None") -> "HookHealth":
        """Both in one."""
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


class HookAccount:
    """The live account of one hook, kept while its callback is attached."""

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
        self.calls = 0  # of units that are gone; the unit in use counts by itself
        self.failures = 0
        self.blocked = 0
        self.sampled = 0
        self.sampled_ns = 0
        self.max_ns = 0

    def took(self, nanoseconds: int) -> None:
        """One sampled call."""
        self.sampled += 1
        self.sampled_ns += nanoseconds
        self.max_ns = max(self.max_ns, nanoseconds)

    def health(self, counting: int) -> HookHealth:
        """The account as it stands; ``counting`` is the count of the unit in use."""
        return HookHealth(
            callback=self.owner,
            hook=self.hook,
            calls=self.calls + counting,
            failures=self.failures,
            blocked=self.blocked,
            mean_seconds=self.sampled_ns / max(self.sampled, 1) / 1e9,
            max_seconds=self.max_ns / 1e9,
        )
