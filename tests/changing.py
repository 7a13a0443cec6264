#!/usr/bin/env python3
"""Publish metrics while another thread changes them, many times.

usage: uv run python tests/changing.py --rows 10000000

A second thread adds keys to the metrics and removes them while they are published to a bus with a journal. In every
other journal it also changes a list in them, so that both the fast and the general encoder are tested. No publish may
raise, the process must not crash, and every row must be in the journal, decodable, and under its own step.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

from evsys_bus import EventBus, LoopState, StepEnd, TrainingBatch
from evsys_bus.codec import decode
from evsys_bus.journal import JournalReader, verify

ROWS_EACH = 250_000
"""Rows per journal; a journal is removed when all its rows were found."""


def mutate_metrics(metrics: dict, stop: threading.Event) -> None:
    """Change the metrics like a careless monitoring thread, a hundred thousand times a second."""
    rewards = metrics.get("rewards", [])
    for count in itertools.count():
        if stop.is_set():
            return
        metrics[f"late-{count % 3}"] = float(count)
        metrics.pop(f"late-{count % 5}", None)
        rewards.append(float(count) if count % 8 else [count])
        if count % 3 == 0:
            rewards.clear()
        time.sleep(0)  # releases the interpreter lock, and takes it again at any point of the publisher


def publish_all(rows: int, journal: Path, *, flat: bool) -> None:
    metrics = {"loss": 0.0} if flat else {"loss": 0.0, "rewards": []}
    state = LoopState(step=0, num_steps=rows, output_dir=journal.parent)
    stop = threading.Event()
    changing = threading.Thread(target=mutate_metrics, args=(metrics, stop))
    changing.start()
    try:
        with EventBus([], journal=journal) as bus:
            for step in range(rows):
                bus.publish(StepEnd(state, step, TrainingBatch(), metrics))
    finally:
        stop.set()
        changing.join()
    assert (bus.receipt.recorded, bus.receipt.unrecorded) == (rows, 0), bus.receipt


def count_changed_rows(rows: int, journal: Path) -> int:
    """Count the rows with values of the changing thread; raises if a row is missing or under the wrong step."""
    report = verify(journal)
    assert report.is_intact, report
    [stream] = report.streams
    assert stream.records == rows, stream
    changed = 0
    for step, record in enumerate(JournalReader(journal).read(stream.stream)):
        event = decode(record.payload).event
        assert (event.step_idx, event.metrics["loss"]) == (step, 0.0), event
        changed += any(name.startswith("late-") for name in event.metrics) or bool(event.metrics.get("rewards"))
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description="Publish metrics that another thread changes; see the file.")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where the journal goes; default: the system's temporary directory")
    args = parser.parse_args()
    sys.setswitchinterval(1e-5)  # switches threads a hundred times more often
    folder = Path(tempfile.mkdtemp(prefix="changing-", dir=args.folder))
    done = changed = 0
    while done < args.rows:
        rows = min(ROWS_EACH, max(args.rows // 2, 1), args.rows - done)
        publish_all(rows, folder / "journal", flat=done // rows % 2 == 1)
        changed += count_changed_rows(rows, folder / "journal")
        shutil.rmtree(folder / "journal")
        done += rows
        print(f"rows {done:,} changed meanwhile {changed:,} lost 0", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
