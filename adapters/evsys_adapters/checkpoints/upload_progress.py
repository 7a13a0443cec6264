"""`ProgressReporter`: publishes the progress of one upload at intervals."""

import time
from collections.abc import Callable

from evsys_adapters.checkpoints.events import UploadProgress

_MIN_SECONDS = 1e-3


class ProgressReporter:
    """Counts the uploaded bytes of one checkpoint.

    Args:
        run: The run of the checkpoint.
        checkpoint: Its folder.
        total_bytes: The total to be uploaded.
        url: Its destination.
        every_seconds: Minimum interval between events.
        publish: Receives the events.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        run: str,
        checkpoint: str,
        total_bytes: int,
        *,
        url: str,
        every_seconds: float,
        publish: Callable[[UploadProgress], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._done_by_file: dict[str, int] = {}  # by file, so that a repeated transfer counts once
        self._run = run
        self._checkpoint = checkpoint
        self._total_bytes = total_bytes
        self._url = url
        self._every_seconds = every_seconds
        self._publish = publish
        self._clock = clock
        self._start_time = self._last_report = clock()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start_time

    def update(self, file: str, done_bytes: int) -> None:
        """Update the number of uploaded bytes of a file."""
        self._done_by_file[file] = done_bytes
        now = self._clock()
        if now - self._last_report < self._every_seconds:
            return
        self._last_report = now
        done = sum(self._done_by_file.values())
        rate = done / max(now - self._start_time, _MIN_SECONDS)
        remaining = max(0, self._total_bytes - done)
        eta = remaining / rate if rate > 0 else None
        self._publish(
            UploadProgress(self._run, self._checkpoint, done, self._total_bytes, round(rate, 1), eta, self._url)
        )
