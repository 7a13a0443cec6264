#!/usr/bin/env python3
"""The training program of `torture.py`: one life of a run, described by the plan in a file.

It writes a line of JSON to a pipe after each `publish`, so that its parent knows what was acknowledged, and more lines
when it has entered the bus, when it starts to leave it, and when it has left it.
"""

import asyncio
import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import uvloop

from evsys_bus import (
    Callback,
    Checkpoint,
    EventBus,
    LogContext,
    LoopArtifacts,
    LoopState,
    ManifestRow,
    StepEnd,
    TrainEnd,
    TrainingBatch,
    TrainStart,
    build_callbacks,
)
from evsys_bus.errors import EvsysBusError
from evsys_bus.journal import JournalWriter, RetentionPolicy

NUM_STEPS_BASE = 1_000_000
"""``num_steps`` of a life is this plus the number of the life, which identifies it."""


def metric_value(life, step):
    """Return the metric of a step in a life; a 32-bit float represents it exactly."""
    return float(life * 1000 + step % 1000)


class InlineCounter(Callback):
    """An inline callback that counts steps."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, state, step_idx, batch, metrics):
        self.steps += 1


class Life:
    """One life of the run."""

    def __init__(self, plan, pipe):
        self.plan, self.pipe = plan, pipe
        self.work = Path(plan["work"])
        self.run_dir = self.work / "out" / "run"
        retain = None if plan["retain_bytes"] is None else RetentionPolicy(max_bytes=plan["retain_bytes"])
        self.writer = JournalWriter(
            self.work / "journal",
            segment_bytes=plan["segment_bytes"],
            flush=plan["flush"],
            flush_seconds=0.3,
            retain=retain,
        )
        self.step = plan["first"]
        context = LogContext(output_dir=self.run_dir.parent, run_key=self.run_dir.name)
        num_steps = NUM_STEPS_BASE + plan["life"]
        self.state = LoopState(step=self.step, num_steps=num_steps, output_dir=self.run_dir, ctx=context)
        self.bus = None

    def make_bus(self):
        plan = self.plan
        self.bus = EventBus(
            [InlineCounter(), *build_callbacks(plan["specs"])],
            journal=self.writer,
            linger_seconds=plan["linger_seconds"],
            drain_timeout=plan["drain_timeout"],
            couriers=plan["couriers"],
        )
        return self.bus

    def send(self, what, **facts):
        """Send a line to the parent; a write that fails by an injected fault is retried."""
        line = json.dumps({"what": what, **facts}).encode() + b"\n"
        for _ in range(100):
            try:
                os.write(self.pipe, line)
            except OSError as error:
                if error.errno == errno.EPIPE:
                    return
                time.sleep(0.02)
            else:
                return

    def publish(self, event, what, step, **facts):
        self.bus.publish(event)
        writer = self.writer
        position = {"stream": writer.stream, "seq": writer.next_sequence - 1}
        losses = {"unrecorded": writer.unrecorded, "lost": writer.lost}
        self.send(what, step=step, **position, **losses, **facts)

    def publish_start(self):
        self.publish(TrainStart(self.state), "start", self.step)

    def run_step(self):
        step = self.state.step = self.step
        metrics = {"value": metric_value(self.plan["life"], step), "life": float(self.plan["life"])}
        self.publish(StepEnd(self.state, step, TrainingBatch(), metrics), "step", step)
        self.step += 1
        if step % self.plan["save_every"] == self.plan["save_every"] - 1:
            self.save_checkpoint(step)
        if step % 20 == 0:
            self.bus.health()  # it never raises

    def save_checkpoint(self, step):
        """Save and publish a checkpoint, or skip it if the disk refuses to write it, as any program would."""
        name = f"life{self.plan['life']:03d}-{step:06d}"
        folder = self.run_dir / "checkpoints" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state.bin").write_bytes(os.urandom(3000))
            (folder / "notes.json").write_text(json.dumps({"step": step}))
        except OSError:
            return
        row = ManifestRow(name, batch=step, state_path=str(folder))
        self.publish(Checkpoint(self.state, row), "checkpoint", step, name=name)

    def publish_end(self):
        self.publish(TrainEnd(self.state, LoopArtifacts()), "end", self.state.step)

    def is_time_up(self):
        return time.monotonic() > self.end_time

    def start_run(self):
        self.end_time = time.monotonic() + self.plan["seconds"]
        self.send("entered", stream=self.writer.stream)
        self.publish_start()

    def report_exit(self):
        receipt = None if self.bus is None else self.bus.receipt
        facts = {} if receipt is None else {"unrecorded": receipt.unrecorded, "recorded": receipt.recorded}
        self.send("left", told=receipt is not None, **facts)

    async def run_async(self):
        try:
            async with self.make_bus():
                try:
                    self.start_run()
                    while not self.is_time_up():
                        self.run_step()
                        await asyncio.sleep(self.plan["pace_seconds"])
                    self.publish_end()
                finally:
                    self.send("leaving")
        finally:
            self.report_exit()

    def run_sync(self):
        try:
            with self.make_bus():
                try:
                    self.start_run()
                    while not self.is_time_up():
                        self.run_step()
                        time.sleep(self.plan["pace_seconds"])
                    self.publish_end()
                finally:
                    self.send("leaving")
        finally:
            self.report_exit()


def main():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    plan = json.loads(Path(sys.argv[1]).read_text())
    importlib.import_module("torture_sink")
    life = Life(plan, int(sys.argv[2]))
    try:
        if plan["entry"] == "sync":
            life.run_sync()
        else:
            factory = uvloop.new_event_loop if plan["entry"] == "uvloop" else asyncio.new_event_loop
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(life.run_async())
    except (EvsysBusError, OSError) as error:
        # The journal may refuse to open while its directory is missing: that is no failure of the test.
        entered = life.bus is not None and life.bus.receipt is not None
        life.send("raised", error=f"{type(error).__name__}: {error}", entered=entered, trace=traceback.format_exc())
        return 7
    except Exception:
        life.send("raised", error="", entered=True, trace=traceback.format_exc())
        raise
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(main())
    sys.exit(130)
