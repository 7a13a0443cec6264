"""`Transfer`: the upload or download of a checkpoint, as text and as facts of a line."""

import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec

from evsys_bus.cli.output.formatting import format_duration, format_rate, format_size_progress, format_time

Facts = dict[str, Any]
"""The keys and values of one line."""

SILENT_SECONDS: Final = 15.0
"""After this long without a report, the silence is shown instead of the rate."""


class Transfer(msgspec.Struct, frozen=True, rename={"reported_at": "told"}):
    """The progress of one checkpoint's files as of the last report."""

    run: str
    checkpoint: str
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    eta_seconds: float | None
    reported_at: float
    """Seconds since the epoch."""

    @property
    def name(self) -> str:
        """``low/step-000199``."""
        return f"{self.run}/{self.checkpoint}"

    @property
    def fraction(self) -> float:
        """The transferred part of the bytes, from 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 1.0


class FinishedUpload(msgspec.Struct, frozen=True):
    """A finished upload."""

    event: Literal["uploaded", "conflict"]
    reported_at: float
    """Seconds since the epoch."""
    run: str
    checkpoint: str
    facts: Facts


class UploadSnapshot(NamedTuple):
    """The uploads at one point in time."""

    active: list[Transfer]
    finished: list[FinishedUpload]
    """Those that finished since the previous snapshot."""


class PollUploads(Protocol):
    """Returns the current uploads; calls in quick succession are cheap."""

    def __call__(self, *, force: bool = False) -> UploadSnapshot:
        """Return the uploads; ``force`` reads the journal even if it was read just now."""
        ...


def no_uploads(*, force: bool = False) -> UploadSnapshot:
    """Return no uploads."""
    del force
    return UploadSnapshot([], [])


def format_transfer(transfer: Transfer, now: float) -> list[str]:
    """Return ``212/400 MB``, ``53 MB/s`` and ``eta 0:04``; ``silent 0:32`` instead of the last two after a silence.

    Args:
        transfer: The transfer.
        now: Seconds since the epoch; the eta is reduced by the time since the last report.
    """
    done = format_size_progress(transfer.done_bytes, transfer.total_bytes)
    silence = now - transfer.reported_at
    if silence >= SILENT_SECONDS:
        return [done, f"silent {format_duration(silence)}"]
    eta = transfer.eta_seconds
    left = None if eta is None else max(0.0, eta - max(0.0, silence))
    return [done, format_rate(transfer.bytes_per_second), f"eta {format_duration(left)}"]


def line_facts(event: str, at: float | None = None, **facts: Any) -> Facts:
    """Return the facts of a line, beginning with the local time ``at``, in seconds since the epoch; None for now."""
    return {"time": format_time(time.time() if at is None else at), "event": event, **facts}


def transfer_facts(event: str, transfer: Transfer) -> Facts:
    """Return the facts of a transfer for a line."""
    eta = transfer.eta_seconds
    return line_facts(
        event,
        transfer.reported_at,
        run=transfer.run,
        checkpoint=transfer.checkpoint,
        done_bytes=transfer.done_bytes,
        total_bytes=transfer.total_bytes,
        bytes_per_second=round(transfer.bytes_per_second),
        **({} if eta is None else {"eta_seconds": round(eta)}),
    )


def finished_facts(upload: FinishedUpload) -> Facts:
    """Return the facts of a finished upload for a line."""
    return line_facts(upload.event, upload.reported_at, run=upload.run, checkpoint=upload.checkpoint, **upload.facts)


def make_byte_counter(run: str, checkpoint: str, on_transfer: Callable[[Transfer], None]) -> Callable[[int, int], None]:
    """Return a function of the transferred and the total bytes that reports a `Transfer` with its rate since now."""
    began = time.monotonic()

    def on_bytes(done: int, total: int) -> None:
        seconds = time.monotonic() - began
        pace = done / seconds if seconds > 0 else 0.0
        on_transfer(Transfer(run, checkpoint, done, total, pace, (total - done) / pace if pace else None, time.time()))

    return on_bytes
