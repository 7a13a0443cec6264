"""Read the W&B files of runs with W&B's own Python reader, and compare them with the journal, value by value.

usage: uv run --no-sync --with 'wandb==0.24.*' python tests/wandb_datastore.py FOLDER …

FOLDER contains a journal and runs logged by wandb_logger. W&B 0.24 was the last version with that reader, `DataStore`;
for this command, `uv run --with` puts it before the W&B version of this project, which wrote the files.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore

from support import wandb_server


def read_history(file: Path) -> Iterator[dict[str, object]]:
    """Yield the history of a run; W&B's reader verifies every checksum."""
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record.FromString(data)
        if record.HasField("history"):
            yield {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def main(folder: Path) -> int:
    """Return how many series of the folder differ from the journal, in a value or in the time of a step."""
    [journal] = folder.glob("**/journal")
    files = {file.parents[2].name: file for file in wandb_server.wandb_files_of(folder)}
    logged = {run: list(read_history(file)) for run, file in files.items()}
    differing, values, nans = 0, 0, 0
    for (run, stream), metrics in wandb_server.loggers.recorded_series(journal).items():
        found = wandb_server.metric_series(logged[run], stream)
        for name, points in metrics.items():
            expected, actual = sorted(points, key=lambda point: point[0]), found.get(name, [])
            values += len(expected)
            nans += sum(value != value for _, value in expected)  # noqa: PLR0124 # NaN
            if not wandb_server.is_same_series(expected, actual):
                differing += 1
                print(
                    f"{run}: {stream}/{name} has {len(found.get(name, []))} points, "
                    f"the journal {len(expected)}, or others"
                )
    for run, times in wandb_server.step_times(journal).items():
        logged_times = {row["train/step"]: row["_timestamp"] for row in logged[run] if "train/step" in row}
        if logged_times != times:
            differing += 1
            print(f"{run}: the times of the steps are not the journal's")
    number = sum(map(len, logged.values()))
    print(f"W&B {wandb.__version__}: {number} rows; of the journal {values} values, {nans} of them NaN")
    print("every value is there exactly once" if not differing else f"{differing} series differ")
    return differing


if __name__ == "__main__":
    sys.exit(sum(main(Path(each)) for each in sys.argv[1:]))
