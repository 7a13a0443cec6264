"""`Transfer`: a checkpoint on its way, up or down, and what is told of it: in a line, or as facts."""

import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from evsys_bus.cli.amounts import duration, of_size, rate

Facts = dict[str, Any]
"""One line. Any: numbers and text."""

SILENT_SECONDS: Final = 15.0
"""After so long without news, that is what is told, and no rate."""


class Transfer(msgspec.Struct, frozen=True):
    """How far the files of one checkpoint are, as it was last told."""

    run: str
    checkpoint: str
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None
    told: float
    """Seconds since the epoch."""

    @property
    def name(self) -> str:
        """``low/step-000199``."""
        return f"{self.run}/{self.checkpoint}"

    @property
    def share(self) -> float:
        """Of its bytes, from 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 1.0

    def is_silent(self, now: float) -> bool:
        """Whether nothing was heard of it for long, so that the rate is one of the past."""
        return now - self.told >= SILENT_SECONDS


class Ended(msgspec.Struct, frozen=True):
    """What became of an upload."""

    event: Literal["uploaded", "conflict"]
    told: float
    """Seconds since the epoch."""
    run: str
    checkpoint: str
    facts: Facts


class Uploads(NamedTuple):
    """One look at them."""

    under_way: list[Transfer]
    ended: list[Ended]
    """Since the look before."""


class Look(Protocol):
    """Looks at the uploads; may be called as often as one likes."""

    def __call__(self, *, at_once: bool = False) -> Uploads:
        """What was seen lately; ``at_once``: what can be seen now."""
        ...


def no_uploads(*, at_once: bool = False) -> Uploads:
    """Where nothing is looked at."""
    del at_once
    return Uploads([], [])


def amounts(transfer: Transfer, now: float) -> list[str]:
    """``212/400 MB``, ``53 MB/s``, ``eta 0:04``; or, where nothing was heard of it for long, ``silent 0:32``.

    Args:
        transfer: As it was last told.
        now: Seconds since the epoch; until then the eta has run on.
    """
    done = of_size(transfer.done_bytes, transfer.total_bytes)
    if transfer.is_silent(now):
        return [done, f"silent {duration(now - transfer.told)}"]
    eta = transfer.eta_seconds
    left = None if eta is None else max(0.0, eta - max(0.0, now - transfer.told))
    return [done, rate(transfer.bytes_per_second), f"eta {duration(left)}"]


def facts(event: str, transfer: Transfer) -> Facts:
    """For a line of a log."""
    eta = transfer.eta_seconds
    return {
        **_named(event, transfer),
        "done_bytes": transfer.done_bytes,
        "total_bytes": transfer.total_bytes,
        "bytes_per_second": round(transfer.bytes_per_second),
        **({} if eta is None else {"eta_seconds": round(eta)}),
    }


def end_facts(end: Ended) -> Facts:
    """As `facts`."""
    return {**_named(end.event, end), **end.facts}


def _named(event: str, told: Transfer | Ended) -> Facts:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(told.told))
    return {"time": at, "event": event, "run": told.run, "checkpoint": told.checkpoint}


def metered(run: str, checkpoint: str, tell: Callable[[Transfer], None]) -> Callable[[int, int], None]:
    """To be called with the bytes that are done, and the bytes in all; tells of them with the rate since now."""
    began = time.monotonic()

    def see(done: int, total: int) -> None:
        seconds = time.monotonic() - began
        pace = done / seconds if seconds > 0 else 0.0
        tell(Transfer(run, checkpoint, done, total, pace, (total - done) / pace if pace else None, time.time()))

    return see
