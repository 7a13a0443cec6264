"""P6: how fast a courier catches up with a journal, P7: how much memory that takes, and P13: how fast a bus is left.

A courier reads a journal of ``STEPS_PER_ROUND`` steps per round (150,000 by default) and delivers to a receiver that
discards everything, so what is measured is reading, verifying, decoding and handing over. ``--rounds 5000`` makes it
10,000,000 steps. Beside it, a sink that discards everything, and one that is raw: without decoding.

Courier processes outlive their bus briefly and write to its journal: `wait_for_courier_exit` waits for them.
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from evsys_bus.bench.dispatch import BATCH, METRICS, publish_steps
from evsys_bus.bench.suite import Budget, Row, Spread, Table, TargetResult, growth_table, resident_megabytes, spread_of
from evsys_bus.bus import EventBus
from evsys_bus.config import CallbackSpec, build_callbacks
from evsys_bus.context import LoopState
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.receiver import ProblemHandler
from evsys_bus.delivery.status_files import read_status
from evsys_bus.delivery.subscription import DeliveryPolicy
from evsys_bus.events import Envelope, StepEnd
from evsys_bus.journal import OsDisk, layout
from evsys_bus.sink import BatchResult, Sink
from evsys_bus.tasks import run_in_new_loop

_EXIT_TIMEOUT_SECONDS: Final = 20.0


def wait_for_courier_exit(journal: Path) -> None:
    """Wait until no courier process of this journal runs; only then can its directory be removed."""
    deadline = time.monotonic() + _EXIT_TIMEOUT_SECONDS
    while any(map(_is_running, _courier_pids(journal))) and time.monotonic() < deadline:
        time.sleep(0.01)


def _courier_pids(journal: Path) -> set[int]:
    files = (journal / layout.COURIERS).glob("*.state.json")
    names = [layout.decode_adapter_name(file.name.removesuffix(".state.json")) for file in files]
    states = [read_status(OsDisk(), str(journal), name) for name in names]
    return {state.pid for state in states if state is not None} - {os.getpid()}


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


STEPS_PER_ROUND: Final = 1_000
MIN_EVENTS_PER_SECOND: Final = 200_000
"""Events per second."""
_MAX_ROUNDS: Final = 7
_MIN_STEPS: Final = 50_000


class _DiscardingReceiver:
    """A receiver that accepts every batch and discards it."""

    max_events = 512
    max_bytes = 1 << 20
    max_seconds = 0.0

    def __init__(self) -> None:
        self.received = 0

    async def open(self, on_problem: ProblemHandler) -> None:
        pass

    async def deliver(self, batch: Sequence[Envelope], sizes: Sequence[int]) -> BatchResult:
        del sizes
        self.received += len(batch)
        return BatchResult(len(batch))

    def interrupted_result(self) -> None:
        pass

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        pass

    def mark(self) -> Any:
        pass

    def rewind(self, mark: Any) -> None:
        pass

    async def close(self, deadline: float | None = None, *, confirm: bool = False) -> None:
        pass


class _DiscardingSink(Sink):
    """A sink that accepts every batch and discards it."""

    max_batch_events = _DiscardingReceiver.max_events
    max_batch_seconds = _DiscardingReceiver.max_seconds

    def __init__(self) -> None:
        self.received = 0

    async def write(self, batch: Sequence[Any]) -> None:
        self.received += len(batch)


class _DiscardingRawSink(_DiscardingSink):
    """The same, of raw records."""

    raw: ClassVar[bool] = True


class Throughput:
    """The suite ``couriers``."""

    name = "couriers"
    promise = "a courier that is behind catches up at 200,000 events a second, in memory that does not grow"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure the rate, then the memory."""
        steps = max(budget.rounds * STEPS_PER_ROUND, _MIN_STEPS)
        with tempfile.TemporaryDirectory() as directory:
            journal = Path(directory, "journal")
            with EventBus([], journal=journal) as bus:
                publish_steps(bus, steps)
            before = resident_megabytes()
            rounds = range(min(max(budget.process_rounds, 2), _MAX_ROUNDS))
            rates = [_measure_rate(journal, steps, _DiscardingReceiver()) for _ in rounds]
            after = resident_megabytes()
            decoded: list[float] = []
            raw: list[float] = []
            for _ in rounds:
                decoded.append(_measure_rate(journal, steps, _DiscardingSink()))
                raw.append(_measure_rate(journal, steps, _DiscardingRawSink()))
        rate = spread_of(rates)
        yield Table(
            title=f"{steps:,} events of 8 metrics, from disk to a receiver",
            unit="events/s",
            rows=[
                Row(name, Spread(*(float(round(each)) for each in (found.median, found.low, found.high))), ours=True)
                for name, found in (
                    ("courier", rate),
                    ("courier, sink", spread_of(decoded)),
                    ("courier, raw sink", spread_of(raw)),
                )
            ],
            target_results=[
                TargetResult(
                    f"at least {MIN_EVENTS_PER_SECOND:,} events/s",
                    rate.median,
                    rate.median >= MIN_EVENTS_PER_SECOND,
                    "events/s",
                )
            ],
        )
        if before is not None and after is not None:
            growths = {"courier": ("the courier's memory", after - before)}
            yield growth_table("memory that the courier's process has grown by", steps, growths)


def _measure_rate(journal: Path, steps: int, receiver: _DiscardingReceiver | _DiscardingSink) -> float:
    courier = Courier(journal, "nothing", receiver, DeliveryPolicy(), persistent=False)
    courier.finish()
    started = time.perf_counter()
    run_in_new_loop(courier.run)
    elapsed = time.perf_counter() - started
    if receiver.received != steps:
        raise RuntimeError(f"the courier delivered {receiver.received:,} of {steps:,} events")
    return steps / elapsed


THROUGHPUT: Final = Throughput()


EXIT_STEPS: Final = 20
MAX_EXIT_SECONDS: Final = 1.0
_MAX_EXIT_ROUNDS: Final = 5
_DELIVERY_TIMEOUT_SECONDS: Final = 60.0
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
    promise = "a bus whose adapters are idle is left in under a second"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure each adapter alone, then all of them."""
        rounds = min(max(budget.process_rounds, 2), _MAX_EXIT_ROUNDS)
        kinds = {kind: package for kind, (_, package) in _KINDS.items()}
        installed = [kind for kind, package in kinds.items() if package is None or importlib.util.find_spec(package)]
        cases = {**{kind: [kind] for kind in installed}, "all of them": installed}
        rows: list[Row] = []
        target_results: list[TargetResult] = []
        for name, selected in cases.items():
            elapsed = spread_of([_time_exit(selected) for _ in range(rounds)])
            rows.append(Row(name, elapsed, ours=True))
            promise = f"{name}: left within {MAX_EXIT_SECONDS:g} s"
            target_results.append(
                TargetResult(promise, elapsed.median / 1e9, elapsed.median <= MAX_EXIT_SECONDS * 1e9, "s")
            )
        absent = {kind: f"needs {package}" for kind, package in kinds.items() if kind not in installed}
        yield Table(
            title="leave a bus with idle adapters", unit="ns", rows=rows, target_results=target_results, absent=absent
        )


def _time_exit(kinds: list[str]) -> float:
    """Return the nanoseconds from the end of the block to its receipt."""
    specs = [CallbackSpec(kind, _KINDS[kind][0], placement="follow") for kind in kinds]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        state = LoopState(0, EXIT_STEPS, Path(folder, "run"))
        bus = EventBus(build_callbacks(specs), journal=Path(folder, "journal"))
        with bus:
            for step in range(EXIT_STEPS):
                bus.publish(StepEnd(state, step, BATCH, METRICS))
            deadline = time.monotonic() + _DELIVERY_TIMEOUT_SECONDS
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
