"""P1: what it costs to dispatch a step event to K callbacks that do nothing.

All candidates call K methods of the same signature with the same four arguments. The baseline is a bare loop over bound
methods, without isolation or ordering. The bus builds the event each time, as a training loop does.
"""

import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any, Final

from evsys_bus.bench.suite import Candidate, Case, Target, TimedLoop, TimedSuite
from evsys_bus.bus import EventBus
from evsys_bus.callback import Callback, dispatch
from evsys_bus.context import LogContext, LoopState, TrainingBatch
from evsys_bus.diagnostics import log
from evsys_bus.events import StepEnd

STATE: Final = LoopState(step=0, num_steps=1_000, output_dir=Path("run"), ctx=LogContext(Path(), run_key="run"))
BATCH: Final = TrainingBatch(data=[1, 2, 3])
METRICS: Final = {f"metric_{i}": 0.1 * i for i in range(8)}

BARE: Final = "bare loop"
OURS: Final = "EventBus.publish"
REFERENCE: Final = "reference dispatch"


class NoOp(Callback):
    """A callback whose hook does nothing."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Do nothing."""


@contextmanager
def bare_loop(k: int) -> Generator[TimedLoop, None, None]:
    """The baseline: K calls and nothing else."""
    hooks = [NoOp().on_step_end for _ in range(k)]

    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            for hook in hooks:
                hook(state, i, batch, metrics)
        return perf_counter_ns() - started

    yield run


@contextmanager
def publish(k: int, callback: type[Callback] = NoOp, *, recorded: bool = False) -> Generator[TimedLoop, None, None]:
    """A bus with its default settings, without an event loop; the event is built each time."""
    with (
        tempfile.TemporaryDirectory() as directory,
        EventBus([callback() for _ in range(k)], journal=Path(directory, "journal") if recorded else None) as bus,
    ):
        yield partial(publish_steps, bus)


def publish_steps(bus: EventBus, steps: int, first: int = 0) -> int:
    """Publish this many steps, and return the nanoseconds taken."""
    state, batch, metrics = STATE, BATCH, METRICS
    started = perf_counter_ns()
    for step in range(first, first + steps):
        bus.publish(StepEnd(state, step, batch, metrics))
    return perf_counter_ns() - started


@contextmanager
def dispatch_function(k: int) -> Generator[TimedLoop, None, None]:
    """The function `evsys_bus.dispatch`, for programs without a bus."""
    yield _call_by_name(dispatch, k)


@contextmanager
def reference_dispatch(k: int) -> Generator[TimedLoop, None, None]:
    """The reference implementation: for every callback, look up the hook by name and call it in a ``try``."""

    def dispatch_by_name(callbacks: list[NoOp], hook: str, *args: Any, **kwargs: Any) -> None:
        for callback in callbacks:
            function = getattr(callback, hook, None)
            if function is None:
                continue
            try:
                function(*args, **kwargs)
            except Exception:
                log().warning("hook.failed", callback=callback, hook=hook, exc_info=True)

    yield _call_by_name(dispatch_by_name, k)


def _call_by_name(call: Callable[..., None], k: int) -> TimedLoop:
    callbacks = [NoOp() for _ in range(k)]

    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            call(callbacks, "on_step_end", state, i, batch, metrics)
        return perf_counter_ns() - started

    return run


@contextmanager
def pluggy_hook(k: int) -> Generator[TimedLoop, None, None]:
    """A hook call of pluggy, which takes keyword arguments only and collects the return values."""
    import pluggy

    class Spec:
        @pluggy.HookspecMarker("bench")
        def on_step_end(
            self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]
        ) -> None: ...

    class Plugin:
        @pluggy.HookimplMarker("bench")
        def on_step_end(
            self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]
        ) -> None: ...

    plugins = pluggy.PluginManager("bench")
    plugins.add_hookspecs(Spec)
    for _ in range(k):
        plugins.register(Plugin())

    def run(operations: int) -> int:
        hook = plugins.hook
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            hook.on_step_end(state=state, step_idx=i, batch=batch, metrics=metrics)
        return perf_counter_ns() - started

    yield run


@contextmanager
def blinker_signal(k: int) -> Generator[TimedLoop, None, None]:
    """A signal of blinker with weak references, its default; receivers also get the sender."""
    import blinker

    class Receiver:
        def on_step_end(
            self, sender: object, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]
        ) -> None: ...

    receivers = [Receiver() for _ in range(k)]
    signal = blinker.Signal("step_end")
    for receiver in receivers:
        signal.connect(receiver.on_step_end)

    def run(operations: int) -> int:
        sender = receivers
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            signal.send(sender, state=state, step_idx=i, batch=batch, metrics=metrics)
        return perf_counter_ns() - started

    yield run


@contextmanager
def pyee_emitter(k: int) -> Generator[TimedLoop, None, None]:
    """An emitter of pyee; a listener that raises stops the emit."""
    from pyee.base import EventEmitter

    emitter = EventEmitter()
    for _ in range(k):
        emitter.on("step_end", NoOp().on_step_end)

    def run(operations: int) -> int:
        state, batch, metrics = STATE, BATCH, METRICS
        started = perf_counter_ns()
        for i in range(operations):
            emitter.emit("step_end", state, i, batch, metrics)
        return perf_counter_ns() - started

    yield run


@dataclass(frozen=True)
class Peer:
    """The dispatch of another library."""

    open: Callable[[int], AbstractContextManager[TimedLoop]]
    """Called with K."""
    package: str


LIGHT_PEERS: Final = {
    "pluggy": Peer(pluggy_hook, "pluggy"),
    "blinker": Peer(blinker_signal, "blinker"),
    "pyee": Peer(pyee_emitter, "pyee"),
}


def dispatch_suite(peers: Mapping[str, Peer], min_ratios: Mapping[str, float]) -> TimedSuite:
    """Build the suite with these peers; ``min_ratios`` is the least ratio of each peer to ours at K = 8."""

    def case(k: int, *targets: Target, compared_peers: Mapping[str, Peer] = peers) -> Case:
        candidates = {
            BARE: Candidate(partial(bare_loop, k)),
            OURS: Candidate(partial(publish, k), ours=True),
            "dispatch()": Candidate(partial(dispatch_function, k), ours=True),
            REFERENCE: Candidate(partial(reference_dispatch, k)),
        }
        candidates |= {name: Candidate(partial(peer.open, k), peer.package) for name, peer in compared_peers.items()}
        return Case(title=f"K = {k}", candidates=candidates, baseline=BARE, targets=targets)

    below_reference = Target(candidate=OURS, reference=REFERENCE, at_most=1.0)
    return TimedSuite(
        name="dispatch",
        promise="a step event reaches K callbacks, isolated and counted, for about the cost of calling them",
        cases=(
            case(1, Target(candidate=OURS, reference=REFERENCE, at_most=1.2)),
            case(4, below_reference, compared_peers={}),
            case(
                8,
                Target(candidate=OURS, reference=BARE, at_most=1.6),
                below_reference,
                *(Target(candidate=peer, reference=OURS, at_least=ratio) for peer, ratio in min_ratios.items()),
            ),
            case(32, below_reference),
        ),
    )


DISPATCH: Final = dispatch_suite(LIGHT_PEERS, {"pluggy": 8})
