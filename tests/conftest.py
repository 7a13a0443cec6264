"""What every test may use: both event loops, and real programs in processes of their own."""

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from evsys_bus import LoopState, StepEnd, TrainingBatch


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Async tests run once on asyncio's own loop and once on uvloop."""
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.fixture
def state(tmp_path: Path) -> LoopState:
    return LoopState(step=0, num_steps=10, output_dir=tmp_path)


@pytest.fixture
def step_end(state: LoopState) -> Callable[..., StepEnd]:
    def make(step_idx: int = 0, **metrics: float) -> StepEnd:
        return StepEnd(state, step_idx, TrainingBatch(), metrics)

    return make


Program = subprocess.Popen[str]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a Python program of its own; what still runs at the end of the test is killed."""
    started: list[Program] = []

    def start(source: str, *args: str, **environment: str) -> Program:
        script = tmp_path / f"program_{len(started)}.py"
        script.write_text(textwrap.dedent(source), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, str(script), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=os.environ | environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
