"""P2: what it costs to record a step in the journal before ``publish`` returns.

Back to back, the baseline is the least that any journal does: build the event, call K hooks, encode the record, frame
it with a checksum, and write it to a file. It encodes Structs made of the event's attributes with msgspec, without
copies, checks or limits, so a value that msgspec refuses, or a dict that another thread changes meanwhile, would make
it raise.

At 1,000 steps a second, with cold caches after each millisecond of sleep, the bus is compared with that baseline at the
same pace and with other ways to write eight metrics to disk. Each runs in its own process, in interleaved rounds, and
only the calls are timed.
"""

import os
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Final

import msgspec

from evsys_bus.bench import loggers
from evsys_bus.bench.dispatch import BATCH, METRICS, STATE, NoOp
from evsys_bus.bench.harness import Run, Samples
from evsys_bus.bench.log_process import LogProcess, loggers_in
from evsys_bus.bench.loggers import JSON_FLUSH, OURS, PACED, PACED_FLOOR, K, RawBatch, RawRecord, RawState, RawStep
from evsys_bus.bench.question import Case, Contender, Effort, Row, Table, Target, measure
from evsys_bus.bus import EventBus
from evsys_bus.events import StepEnd
from evsys_bus.journal import frame

FLOOR: Final = "bare loop, encode, CRC, os.write"
PUBLISH: Final = "EventBus.publish, journal"
UNRECORDED: Final = "EventBus.publish, no journal"
MOST_OF_FLOOR: Final = 1.35
RATE: Final = 1_000
CALLS: Final = 500
_MOST_ROUNDS: Final = 25
"""Most rounds that start a process each; ``--rounds`` is meant for samples."""


@contextmanager
def _floor() -> Generator[Run, None, None]:
    hooks = [NoOp().on_step_end for _ in range(K)]
    pack = msgspec.msgpack.Encoder().encode
    with tempfile.TemporaryDirectory() as directory:
        file = os.open(Path(directory, "floor"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

        def run(operations: int) -> int:
            state, batch, metrics = STATE, BATCH, METRICS
            begun = perf_counter_ns()
            for i in range(operations):
                now = time.time()
                event = StepEnd(state, i, batch, metrics)
                for hook in hooks:
                    hook(state, i, batch, metrics)
                at, of, folder = event.state, event.batch, str(event.state.output_dir)
                run = None if at.ctx is None else at.ctx.run_key
                step = RawStep(
                    RawState(at.step, at.num_steps, folder, at.stop_requested, at.stop_reason, None, run),
                    event.step_idx,
                    RawBatch(of.loss_fn, of.loss_fn_config, of.metrics),
                    event.metrics,
                )
                payload = pack(RawRecord("r0-bench", i, now, run, 0, step))
                os.write(file, frame.pack(i, payload))
            return perf_counter_ns() - begun

        try:
            yield run
        finally:
            os.close(file)


@contextmanager
def _publish(*, recorded: bool) -> Generator[Run, None, None]:
    with (
        tempfile.TemporaryDirectory() as directory,
        EventBus([NoOp() for _ in range(K)], journal=Path(directory, "journal") if recorded else None) as bus,
    ):

        def run(operations: int) -> int:
            state, batch, metrics = STATE, BATCH, METRICS
            begun = perf_counter_ns()
            for i in range(operations):
                bus.publish(StepEnd(state, i, batch, metrics))
            return perf_counter_ns() - begun

        yield run


_BACK_TO_BACK: Final = Case(
    title=f"a step for {K} callbacks and the disk",
    contenders={
        FLOOR: Contender(_floor),
        PUBLISH: Contender(partial(_publish, recorded=True), ours=True),
        UNRECORDED: Contender(partial(_publish, recorded=False), ours=True),
    },
    floor=FLOOR,
    targets=(Target(of=PUBLISH, to=FLOOR, at_most=MOST_OF_FLOOR),),
)


@dataclass(frozen=True)
class Journal:
    """The suite ``journal``."""

    modules: tuple[str, ...]
    """Modules with ``LOGGERS``: the loggers to compare with at 1,000 steps a second."""
    at_least: Mapping[str, float]
    """The least ratio of each logger's time to ours."""

    name = "journal"
    promise = "P2: on record before publish returns, for about the cost of writing it"

    def tables(self, effort: Effort) -> Iterator[Table]:
        """Measure back to back, then at 1,000 steps a second."""
        yield measure(_BACK_TO_BACK, effort)
        yield self._paced(min(effort.process_rounds, _MOST_ROUNDS))

    def _paced(self, rounds: int) -> Table:
        found = dict(loggers_in(self.modules))
        absent: dict[str, str] = {}
        medians: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(rounds):
            names = list(found)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                module, logger = found[name]
                try:
                    medians[name].append(_median_call(module, name))
                except ModuleNotFoundError as error:
                    if logger.package is None:
                        raise
                    absent[name] = f"needs {logger.package}: {error}"
                    del found[name], medians[name]
        samples = Samples(medians)
        targets = [Target(of=name, to=OURS, at_least=times) for name, times in self.at_least.items()]
        targets.append(Target(of=PACED, to=PACED_FLOOR, at_most=MOST_OF_FLOOR))
        return Table(
            title=f"log 8 metrics, {RATE:,} times a second, the median call of a process",
            unit="ns",
            rows=[
                Row(name, samples.time(name), samples.ratio(name, OURS), logger.ours)
                for name, (_, logger) in found.items()
            ],
            floor=OURS,
            verdicts=[target.judge(samples) for target in targets],
            absent=absent,
        )


def _median_call(module: str, name: str) -> float:
    with tempfile.TemporaryDirectory() as directory:
        return float(LogProcess(module, name, Path(directory), steps=CALLS, rate=RATE, end="time").wait())


AT_LEAST: Final = {JSON_FLUSH: 1}
JOURNAL: Final = Journal((loggers.__name__,), AT_LEAST)
