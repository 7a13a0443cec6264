"""What a follower of many streams costs while none of them has new events, in percent of a core.

    uv run python -m benchmarks.idle_streams 1000

The clock of the follower runs faster than the real one: each round is half a second after the previous one. So the
result is for streams that have been quiet for minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Final

from evsys_bus.delivery.source import Batch, EventSource
from evsys_bus.diagnostics import FaultLog
from evsys_bus.journal import Cursor, OsDisk, frame, layout

WARM_UP_ROUNDS: Final = 400
ROUNDS: Final = 200
ROUND_SECONDS: Final = 0.5


class SteppedClock:
    """A clock that moves only when it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self.now

    def wall(self) -> float:
        """Seconds since the epoch."""
        return self.now


def measure(streams: int) -> float:
    """Return the CPU time per second of the follower, as a share of a core."""
    disk, clock = OsDisk(), SteppedClock()
    with tempfile.TemporaryDirectory() as directory:
        locks: list[int | None] = []
        for rank in range(streams):
            folder = Path(directory, layout.new_stream_name(rank, time.time()))
            folder.mkdir()
            locks.append(disk.lock(f"{folder}/{layout.LOCK}"))  # as by a writer that has nothing to write
            (folder / "000001-1.seg").write_bytes(frame.pack_segment_header())
        source = EventSource(directory, Cursor(), ranks=None, disk=disk, clock=clock, faults=FaultLog())
        began = 0.0
        for number in range(WARM_UP_ROUNDS + ROUNDS):
            if number == WARM_UP_ROUNDS:
                began = time.process_time()
            clock.now += ROUND_SECONDS
            source.read_batch(Batch(), 500, 1 << 20)
        return (time.process_time() - began) / (ROUNDS * ROUND_SECONDS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", type=int, nargs="?", default=1000)
    count = parser.parse_args().streams
    print(f"{count} idle streams: {100 * measure(count):.2f} % of a core")
