"""What callbacks do changes nothing about what is learnt: the weights are the same to the last bit."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from evsys_bus import Callback, EventBus, StepEnd, TrainingLoop
from evsys_bus.callback import find_hook
from evsys_bus.demo.digits import DigitBatches, DigitBenchmark, DigitNetwork, load_split
from evsys_bus.events import Event, declared_events

SHIPPED = [event for event in declared_events().values() if event.__module__ == "evsys_bus.events"]


def in_every_hook(act) -> Callback:
    methods = {event.hook: lambda self, *args, **keywords: act(*args) for event in SHIPPED}
    return type("Everywhere", (Callback,), methods)()


async def train(directory: Path, callbacks: list[Callback]) -> tuple[dict[str, np.ndarray], EventBus]:
    split = load_split(0)
    network = DigitNetwork(directory / "weights", 0)
    bus = EventBus(callbacks, blocked_hook_seconds=0.1)
    with threadpool_limits(limits=1):
        async with bus:
            loop = TrainingLoop(
                network,
                DigitBatches(split.train, 0),
                num_steps=40,
                output_dir=directory,
                evaluators=[DigitBenchmark("val", split.val, tag="val", every=10)],
                bus=bus,
                save_every=20,
            )
            for callback in callbacks:
                callback.bus = bus
            await loop.run()
    return network.weights, bus


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    weights, _ = asyncio.run(train(tmp_path_factory.mktemp("undisturbed"), []))
    return weights


def assert_same_bits(weights, others):
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.tobytes() == others[name].tobytes(), name


async def test_a_callback_that_raises_in_every_hook(undisturbed, tmp_path):
    def fails(*_):
        raise RuntimeError("broken on purpose")

    callback = in_every_hook(fails)
    weights, bus = await train(tmp_path, [callback])
    assert_same_bits(weights, undisturbed)
    assert sum(hook.failures for hook in bus.health().hooks) == sum(bus.health().published.values()) > 40


async def test_a_callback_that_blocks(undisturbed, tmp_path, caplog):
    def blocks(*args):
        if len(args) == 4 and args[1] == 10:
            time.sleep(0.5)

    weights, bus = await train(tmp_path, [in_every_hook(blocks)])
    assert_same_bits(weights, undisturbed)
    assert any(hook.blocked for hook in bus.health().hooks)


async def test_a_callback_that_publishes_inside_itself(undisturbed, tmp_path):
    class Echoes(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.bus.publish(StepEnd(state, step_idx, batch, metrics))

    weights, bus = await train(tmp_path, [Echoes()])
    assert_same_bits(weights, undisturbed)
    assert bus.health().published["step_end"] > 40 * 1000


async def test_a_callback_that_spawns_failing_tasks_and_asks_for_what_is_not_there(undisturbed, tmp_path):
    async def fails():
        raise OSError("upload refused")

    class Busy(Callback):
        def on_step_end(self, state, step_idx, batch, metrics):
            self.spawn(fails)
            asyncio.create_task(fails())
            state.no_such_attribute  # noqa: B018 # it raises

    weights, bus = await train(tmp_path, [Busy()])
    assert_same_bits(weights, undisturbed)
    assert bus.receipt.tasks.failed == 80


def test_the_disturbing_callback_has_every_hook():
    callback = in_every_hook(lambda *_: None)
    assert len(SHIPPED) == 20
    assert all(issubclass(event, Event) and find_hook(callback, event) for event in SHIPPED)
