"""P13: how long the exit of a bus takes when its adapters have nothing left to do."""

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from evsys_bus.bench.couriers import wait_for_their_end
from evsys_bus.bench.dispatch import BATCH, METRICS
from evsys_bus.bench.harness import spread_of
from evsys_bus.bench.question import Effort, Row, Table, Verdict
from evsys_bus.bus import EventBus
from evsys_bus.context import LoopState
from evsys_bus.events import StepEnd
from evsys_bus.wiring import CallbackSpec, build_callbacks

STEPS: Final = 20
WITHIN_SECONDS: Final = 1.0
_MOST_ROUNDS: Final = 5
_PATIENCE_SECONDS: Final = 60.0
_KINDS: Final[dict[str, tuple[dict[str, Any], str | None]]] = {
    "csv_metrics": ({"out_path": "{run_dir}/metrics.csv"}, None),
    "local_logger": ({"print_every": 1_000}, None),
    "tensorboard_logger": ({}, "tensorboardX"),
    "wandb_logger": ({"project": "bench", "mode": "offline"}, "wandb"),
}
"""Params and required package, by kind of adapter."""


class Leaving:
    """The suite ``leaving``."""

    name = "leaving"
    promise = "P13: a bus whose adapters are idle is left in under a second"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure each adapter alone, then all of them."""
        rounds = min(max(effort.process_rounds, 2), _MOST_ROUNDS)
        kinds = {kind: needs for kind, (_, needs) in _KINDS.items()}
        there = [kind for kind, needs in kinds.items() if needs is None or importlib.util.find_spec(needs)]
        cases = {**{kind: [kind] for kind in there}, "all of them": there}
        rows: list[Row] = []
        verdicts: list[Verdict] = []
        for name, chosen in cases.items():
            taken = spread_of([_leave(chosen) for _ in range(rounds)])
            rows.append(Row(name, taken, ours=True))
            promise = f"{name}: left within {WITHIN_SECONDS:g} s"
            verdicts.append(Verdict(promise, taken.median / 1e9, taken.median <= WITHIN_SECONDS * 1e9, "s"))
        absent = {kind: f"needs {needs}" for kind, needs in kinds.items() if kind not in there}
        yield Table(title="leave a bus with idle adapters", unit="ns", rows=rows, verdicts=verdicts, absent=absent)


def _leave(kinds: list[str]) -> float:
    """Return the nanoseconds from the end of the block to its receipt."""
    specs = [CallbackSpec(kind, _KINDS[kind][0], placement="follow") for kind in kinds]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        state = LoopState(0, STEPS, Path(folder, "run"))
        bus = EventBus(build_callbacks(specs), journal=Path(folder, "journal"))
        with bus:
            for step in range(STEPS):
                bus.publish(StepEnd(state, step, BATCH, METRICS))
            until = time.monotonic() + _PATIENCE_SECONDS
            while any(each.pending for each in bus.health().deliveries):
                if time.monotonic() > until:
                    raise TimeoutError(f"nothing is delivered to {kinds}")
                time.sleep(0.02)
            time.sleep(0.3)  # so that the couriers notice that they are idle
            began = time.perf_counter_ns()
        taken = time.perf_counter_ns() - began
        wait_for_their_end(Path(folder, "journal"))
    return taken


LEAVING: Final = Leaving()
