"""Helpers of the tests of loggers: reading a journal, a run with calls like a loop's, and couriers that are killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time

from evsys_bus import LoopState, TrainingBatch, TrainStart
from evsys_bus.codec import decode
from evsys_bus.context import ArmResult, EvalResult, LogContext, LoopArtifacts, RunResult
from evsys_bus.front.media import store_content
from evsys_bus.journal import JournalReader

PROGRAM = """
    import importlib, os, sys
    import evsys_adapters
    from evsys_bus.delivery.courier import Courier
    from evsys_bus.delivery.subscription import DeliveryPolicy
    from evsys_bus.tasks import run_in_new_loop

    journal, package, adapter = sys.argv[1:]
    importlib.import_module(package)
    eval(f"evsys_adapters.{adapter}")
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            logger, policy = eval(f"evsys_adapters.{adapter}"), DeliveryPolicy()
            courier = Courier(journal, "logger", logger, policy, slice_seconds=0.002)
            courier.finish()
            run_in_new_loop(courier.run)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


def recorded_series(journal):
    """Return the points of the journal's steps and evals, by run, section and metric; re-run steps replace earlier."""
    reader, found = JournalReader(journal), {}
    for stream in reader.streams():
        for record in reader.read(stream):
            envelope = decode(record.payload)
            event = envelope.event
            if isinstance(event, TrainStart):
                for points in [
                    each for (run, _), series in found.items() if run == envelope.run for each in series.values()
                ]:
                    points[:] = [point for point in points if point[0] < event.state.step]
            section = {"StepEnd": "train", "Eval": f"eval/{getattr(event, 'eval_name', '')}"}.get(type(event).__name__)
            for key, value in event.metrics.items() if section else ():
                found.setdefault((envelope.run, section), {}).setdefault(key, []).append((event.step_idx, value))
    return found


class Run:
    """One run that calls the hooks of a logger as a loop would."""

    def __init__(self, logger, folder, key="run"):
        self.ctx = LogContext(
            folder,
            config={"metadata": {"hypothesis": "It learns."}, "api_key": "secret-1"},
            run_key=key,
            run_config={"lr": 0.1, "token": "secret-2"},
            group_name="arms",
        )
        self.logger = logger
        self.state = LoopState(step=0, num_steps=100, output_dir=folder / key, ctx=self.ctx)

    def start(self, step=0):
        self.state.step = step
        self.logger.on_run_start(self.ctx)
        self.logger.on_train_start(self.state)

    def step(self, step, **metrics):
        self.logger.on_step_end(self.state, step, TrainingBatch(), metrics)

    def eval(self, step, name="held out", **metrics):
        self.logger.on_eval(self.state, step, name, metrics)

    def benchmark(self, step, name="tasks", predictions=(), **metrics):
        result = EvalResult(name, metrics=metrics)
        self.logger.on_benchmark_eval(self.ctx, result, list(predictions), step=step)

    def content(self, kind, name, value, step=None, **options):
        item = store_content(self.ctx.run_dir, kind, name, value, **options)
        self.logger.on_content(self.state, step, item)
        return item

    def end(self):
        self.logger.on_train_end(self.state, LoopArtifacts())
        self.logger.on_run_end(self.ctx, RunResult(), ArmResult("run"))


def deliver_with_kills(journal, package, adapter, size, step_bytes):
    """Deliver the journal, killing three couriers before one finishes; all are forked from one process.

    Args:
        journal: The journal directory.
        package: A package that the adapter needs and that takes long to import.
        adapter: Source of a call that makes the adapter, without the prefix ``evsys_adapters.``.
        size: Returns how many bytes the output files have now.
        step_bytes: A courier is killed when it has written this many bytes.
    """
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(journal), package, adapter]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as program:

        def start_courier():
            program.stdin.write("go\n")
            return int(program.stdout.readline())

        for _ in range(3):
            before, courier = size(), start_courier()
            while size() < before + step_bytes:
                os.kill(courier, 0)  # raises if it has ended
                time.sleep(0.001)
            os.kill(courier, signal.SIGKILL)
            assert program.stdout.readline() == "9\n"
        start_courier()
        assert program.stdout.readline() == "0\n"
        program.stdin.close()
