"""P13: how long the exit of a bus takes when its adapters have nothing left to do."""

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from evsys_bus.bench.couriers import wait_for_courier_exit
from evsys_bus.bench.dispatch import BATCH, METRICS
from evsys_bus.bench.harness import spread_of
from evsys_bus.bench.suite import Budget, Row, Table, TargetResult
from evsys_bus.bus import EventBus
from evsys_bus.config import CallbackSpec, build_callbacks
from evsys_bus.context import LoopState
from evsys_bus.events import StepEnd

STEPS: Final = 20
MAX_SECONDS: Final = 1.0
_MAX_ROUNDS: Final = 5
_TIMEOUT_SECONDS: Final = 60.0
_KINDS: Final[dict[str, tuple[dict[str, Any], str | None]]] = {
    "csv_metrics": ({"out_path": "{run_dir}/metrics.csv"}, None),
    "local_logger": ({"print_every": 1_000}, None),
    "tensorboard_logger": ({}, "tensorboardX"),
    "wandb_logger": ({"project": "bench", "mode": "offline"}, "wandb"),
}
"""Params and required package, by kind of adapter."""


class ExitLatency:
    """The suite ``leaving``."""

    name = "leaving"
    promise = "P13: a bus whose adapters are idle is left in under a second"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure each adapter alone, then all of them."""
        rounds = min(max(budget.process_rounds, 2), _MAX_ROUNDS)
        kinds = {kind: package for kind, (_, package) in _KINDS.items()}
        installed = [kind for kind, package in kinds.items() if package is None or importlib.util.find_spec(package)]
        cases = {**{kind: [kind] for kind in installed}, "all of them": installed}
        rows: list[Row] = []
        target_results: list[TargetResult] = []
        for name, selected in cases.items():
            elapsed = spread_of([_time_exit(selected) for _ in range(rounds)])
            rows.append(Row(name, elapsed, ours=True))
            promise = f"{name}: left within {MAX_SECONDS:g} s"
            target_results.append(TargetResult(promise, elapsed.median / 1e9, elapsed.median <= MAX_SECONDS * 1e9, "s"))
        absent = {kind: f"needs {package}" for kind, package in kinds.items() if kind not in installed}
        yield Table(
            title="leave a bus with idle adapters", unit="ns", rows=rows, target_results=target_results, absent=absent
        )


def _time_exit(kinds: list[str]) -> float:
    """Return the nanoseconds from the end of the block to its receipt."""
    specs = [CallbackSpec(kind, _KINDS[kind][0], placement="follow") for kind in kinds]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        state = LoopState(0, STEPS, Path(folder, "run"))
        bus = EventBus(build_callbacks(specs), journal=Path(folder, "journal"))
        with bus:
            for step in range(STEPS):
                bus.publish(StepEnd(state, step, BATCH, METRICS))
            deadline = time.monotonic() + _TIMEOUT_SECONDS
            while any(each.pending for each in bus.health().deliveries):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing is delivered to {kinds}")
                time.sleep(0.02)
            time.sleep(0.3)  # so that the couriers notice that they are idle
            started = time.perf_counter_ns()
        elapsed = time.perf_counter_ns() - started
        wait_for_courier_exit(Path(folder, "journal"))
    return elapsed


EXIT_LATENCY: Final = ExitLatency()
