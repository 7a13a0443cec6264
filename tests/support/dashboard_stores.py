"""Stores of the dashboard for tests: delivering events to one, and small experiments."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evsys_adapters.dashboard.open_series import SeriesInfo
from evsys_adapters.dashboard.store import Ingested, Store
from evsys_bus import (
    ArmResult,
    Eval,
    Event,
    LogContext,
    LoopState,
    RunEnd,
    RunResult,
    RunStart,
    StepEnd,
    TrainEnd,
    TrainStart,
)
from evsys_bus.codec import encode
from evsys_bus.events import Envelope
from support.database_places import location_in

START = 1_000.0
"""When the first event of a stream was published; the following ones come each second."""


class Delivery:
    """A process whose events arrive at a store, each a second after the one before."""

    def __init__(
        self, store: Store, stream: str = "r0-test", rank: int = 0, start: float = START, journal: str | None = None
    ) -> None:
        self.store = store
        self.journal = journal
        self.stream = stream
        self.rank = rank
        self.time = start
        self._sequences = itertools.count(1)

    def send(self, *events: Event, run: str | None = None) -> Ingested:
        """Deliver events in one batch."""
        payloads: list[bytes] = []
        first = None
        for event in events:
            seq = next(self._sequences)
            first = seq if first is None else first
            payloads.append(encode(Envelope(self.stream, seq, self.time, event, run or key_of(event), self.rank)))
            self.time += 1
        return self.store.ingest(self.stream, (first or 1) - 1, payloads, self.journal)


def key_of(event: Event) -> str | None:
    """Return the run key that a bus would record for an event."""
    state, ctx = getattr(event, "state", None), getattr(event, "ctx", None)
    return state.run_key if state is not None else ctx.run_key if ctx is not None else None


def open_store(folder: Path, **options: Any) -> Store:
    return Store.open(location_in(folder), **options)


def context(
    root: str = "/runs/lr", key: str | None = "a-s0", config: dict[str, Any] | None = None, **more: Any
) -> LogContext:
    return LogContext(root, run_key=key, run_config=config, **more)


def state_of(ctx: LogContext, step: int = 0, num_steps: int | None = 10) -> LoopState:
    return LoopState(step, num_steps, ctx.run_dir, ctx=ctx)


def train(
    delivery: Delivery,
    ctx: LogContext,
    losses: Iterable[float] = (3.0, 2.0, 1.0),
    *,
    first_step: int = 0,
    num_steps: int | None = 3,
    evals: dict[int, float] | None = None,
    status: str | None = "completed",
    error: str | None = None,
) -> None:
    """Deliver a run; ``status`` None leaves it open."""
    state = state_of(ctx, first_step, num_steps)
    delivery.send(RunStart(ctx), TrainStart(state))
    for step, loss in enumerate(losses, start=first_step):
        delivery.send(StepEnd(state, step, metrics={"loss": loss, "lr": 0.125}))
        if step in (evals or {}):
            delivery.send(Eval(state, step, "val", {"acc": (evals or {})[step]}))
    if status is not None:
        delivery.send(
            TrainEnd(state),
            RunEnd(ctx, RunResult(status=status, error=error), ArmResult("")),  # pyright: ignore[reportArgumentType] # a test's text
        )


def points(store: Store, run: int, name: str, rank: int = 0) -> dict[int, float]:
    """Return the points of a series; none if there is no such series."""
    found = [info for info in store.series.names(run) if (info.name, info.rank) == (name, rank)]
    if not found:
        return {}
    line = store.series.read([found[0].id], width=1).lines[0]
    return dict(zip(map(int, line.x), map(float, line.last), strict=True))


def only_run(store: Store) -> int:
    """Return the id of the only run."""
    (run,) = [
        run.id for record in store.catalogue.records.experiments() for run in store.catalogue.records.runs(record.id)
    ]
    return run


def series_names(store: Store, run: int) -> list[str]:
    infos: list[SeriesInfo] = store.series.names(run)
    return [info.name for info in infos]
