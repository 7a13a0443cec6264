"""P2: what it costs to record a step in the journal before ``publish`` returns.

Back to back, the baseline is the least that any journal does: build the event, call K hooks, encode the record, frame
it with a checksum, and write it to a file. It encodes Structs made of the event's attributes with msgspec, without
copies, checks or limits, so a value that msgspec refuses, or a dict that another thread changes meanwhile, would make
it raise.

A `Run` records each call of ``log`` at once and the whole row once it is complete; its calls are compared with a
publish of the row alone.

At 1,000 steps a second, with cold caches after each millisecond of sleep, the bus is compared with that baseline at the
same pace and with other ways to write eight metrics to disk. Each runs in its own process, in interleaved rounds, and
only the calls are timed.
"""

import itertools
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
from evsys_bus.bench.dispatch import BATCH, METRICS, STATE, NoOp, publish
from evsys_bus.bench.loggers import (
    JSON_FLUSH,
    OURS,
    PACED,
    PACED_BASELINE,
    K,
    LogProcess,
    RawBatch,
    RawRecord,
    RawState,
    RawStep,
    loggers_in,
)
from evsys_bus.bench.suite import Budget, Candidate, Case, Row, Samples, Table, Target, TimedLoop, measure, rotate
from evsys_bus.bus import EventBus
from evsys_bus.events import StepEnd
from evsys_bus.journal import frame

BASELINE: Final = "bare loop, encode, CRC, os.write"
PUBLISH_RECORDED: Final = "EventBus.publish, journal"
PUBLISH_UNRECORDED: Final = "EventBus.publish, no journal"
MAX_RATIO_TO_BASELINE: Final = 1.35
MAX_RATIO_TO_PUBLISH: Final = 2.0
"""Of a call of `Run.log`."""
RATE: Final = 1_000
CALLS: Final = 500
_MAX_ROUNDS: Final = 25
"""Most rounds that start a process each; ``--rounds`` is meant for samples."""


@contextmanager
def _baseline() -> Generator[TimedLoop, None, None]:
    hooks = [NoOp().on_step_end for _ in range(K)]
    pack = msgspec.msgpack.Encoder().encode
    with tempfile.TemporaryDirectory() as directory:
        file = os.open(Path(directory, "floor"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

        def run(operations: int) -> int:
            state, batch, metrics = STATE, BATCH, METRICS
            started = perf_counter_ns()
            for i in range(operations):
                now = time.time()
                event = StepEnd(state, i, batch, metrics)
                for hook in hooks:
                    hook(state, i, batch, metrics)
                loop_state, training_batch, folder = event.state, event.batch, str(event.state.output_dir)
                run_key = None if loop_state.ctx is None else loop_state.ctx.run_key
                step = RawStep(
                    RawState(
                        loop_state.step,
                        loop_state.num_steps,
                        folder,
                        loop_state.stop_requested,
                        loop_state.stop_reason,
                        None,
                        run_key,
                    ),
                    event.step_idx,
                    RawBatch(training_batch.loss_fn, training_batch.loss_fn_config, training_batch.metrics),
                    event.metrics,
                )
                payload = pack(RawRecord("r0-bench", i, now, run_key, 0, step))
                os.write(file, frame.pack(i, payload))
            return perf_counter_ns() - started

        try:
            yield run
        finally:
            os.close(file)


_BACK_TO_BACK: Final = Case(
    title=f"a step for {K} callbacks and the disk",
    candidates={
        BASELINE: Candidate(_baseline),
        PUBLISH_RECORDED: Candidate(partial(publish, K, recorded=True), ours=True),
        PUBLISH_UNRECORDED: Candidate(partial(publish, K), ours=True),
    },
    baseline=BASELINE,
    targets=(Target(candidate=PUBLISH_RECORDED, reference=BASELINE, at_most=MAX_RATIO_TO_BASELINE),),
)


@contextmanager
def _run_log(parts: int = 1, *, commit: bool = False, steps: bool = False) -> Generator[TimedLoop, None, None]:
    """Calls of `Run.log`, this many for each step; with ``steps``, one in each round of the loop of the run."""
    with (
        tempfile.TemporaryDirectory() as directory,
        EventBus([NoOp() for _ in range(K)], journal=Path(directory, "journal")) as bus,
        bus.run(Path(directory, "run"), environment=False, output=False) as run,
    ):
        calls, loop = itertools.count(), run.steps()

        def log_calls(operations: int) -> int:
            log, metrics = run.log, METRICS
            started = perf_counter_ns()
            for call in itertools.islice(calls, operations):
                log(metrics, call // parts, commit=commit)
            return perf_counter_ns() - started

        def log_steps(operations: int) -> int:
            log, metrics = run.log, METRICS
            started = perf_counter_ns()
            for _ in itertools.islice(loop, operations):
                log(metrics)
            return perf_counter_ns() - started

        timed = log_steps if steps else log_calls
        timed(100)  # the first rows are encoded in general, and a callback is added with the first part
        yield timed


_RUN_LOGS: Final = {
    "run.log, once a step": partial(_run_log),
    "run.log, five times a step, each": partial(_run_log, 5),
    "run.log, commit=True": partial(_run_log, commit=True),
}
_RUN_LOG: Final = Case(
    title=f"a call of run.log, {K} callbacks and the disk",
    candidates={
        PUBLISH_RECORDED: Candidate(partial(publish, K, recorded=True), ours=True),
        **{name: Candidate(opened, ours=True) for name, opened in _RUN_LOGS.items()},
        "for step in run.steps(): run.log": Candidate(partial(_run_log, steps=True), ours=True),
    },
    baseline=PUBLISH_RECORDED,
    targets=tuple(
        Target(candidate=name, reference=PUBLISH_RECORDED, at_most=MAX_RATIO_TO_PUBLISH) for name in _RUN_LOGS
    ),
)


@dataclass(frozen=True)
class JournalSuite:
    """The suite ``journal``."""

    modules: tuple[str, ...]
    """Modules with ``LOGGERS``: the loggers to compare with at 1,000 steps a second."""
    min_ratios: Mapping[str, float]
    """The least ratio of each logger's time to ours."""

    name = "journal"
    promise = "on record before publish returns, for about the cost of writing it"

    def measure_tables(self, budget: Budget) -> Iterator[Table]:
        """Measure back to back, then at 1,000 steps a second."""
        yield measure(_BACK_TO_BACK, budget)
        yield measure(_RUN_LOG, budget)
        yield self._measure_paced(min(budget.process_rounds, _MAX_ROUNDS))

    def _measure_paced(self, rounds: int) -> Table:
        found = dict(loggers_in(self.modules))
        absent: dict[str, str] = {}
        medians: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(rounds):
            for name in rotate(found, turn):
                module, logger = found[name]
                try:
                    medians[name].append(_median_call_ns(module, name))
                except ModuleNotFoundError as error:
                    if logger.package is None:
                        raise
                    absent[name] = f"needs {logger.package}: {error}"
                    del found[name], medians[name]
        samples = Samples(medians)
        targets = [Target(candidate=name, reference=OURS, at_least=ratio) for name, ratio in self.min_ratios.items()]
        targets.append(Target(candidate=PACED, reference=PACED_BASELINE, at_most=MAX_RATIO_TO_BASELINE))
        return Table(
            title=f"log 8 metrics, {RATE:,} times a second, the median call of a process",
            unit="ns",
            rows=[
                Row(name, samples.time(name), samples.ratio(name, OURS), logger.ours)
                for name, (_, logger) in found.items()
            ],
            baseline=OURS,
            target_results=[target.evaluate(samples) for target in targets],
            absent=absent,
        )


def _median_call_ns(module: str, name: str) -> float:
    with tempfile.TemporaryDirectory() as directory:
        return float(LogProcess(module, name, Path(directory), steps=CALLS, rate=RATE, end="time").wait())


MIN_RATIOS: Final = {JSON_FLUSH: 1}
JOURNAL: Final = JournalSuite((loggers.__name__,), MIN_RATIOS)
