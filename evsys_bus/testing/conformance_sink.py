"""`SinkConformance`: opens, writes to and closes a sink with everything that a courier may give it."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from evsys_bus.adapter import Adapter
from evsys_bus.callback import Callback
from evsys_bus.errors import HookError, RejectedError
from evsys_bus.events import Envelope, Event, UnknownEvent
from evsys_bus.sink import Sink, check_sink
from evsys_bus.testing.failures import Failures
from evsys_bus.testing.folders import empty_folder
from evsys_bus.testing.timeline import RUNS, Timeline, as_envelopes, hostile_metrics, minimal_events

DEADLINE_SECONDS: Final = 30.0
"""Timeout of one call of a sink, and of each task of a callback."""


class SinkConformance:
    """Conformance checks of a sink, constructed anew for each check.

    Args:
        make: Constructs it, given a folder.
        failures: Collects what is wrong.
        prefix: Prefix of the findings, for a sink that is a delivery half.
    """

    def __init__(self, make: Callable[[Path], Callback | Sink], failures: Failures, prefix: str = "") -> None:
        self._make = make
        self._failures = failures
        self._prefix = prefix

    def run(self) -> None:
        """Check every expectation of a sink."""
        with empty_folder() as folder:
            try:
                sink = self._make(folder)
                assert isinstance(sink, Sink), f"a sink is needed here, not a {type(sink).__name__}"
                check_sink(sink)
            except (HookError, AssertionError) as error:
                self._failures.add(f"{self._prefix}its methods can be called as they are declared: {error}")
                return
            for run in RUNS:  # the files that checkpoints name
                (folder / run).mkdir()
                (folder / run / "state").write_text("weights")
            all_envelopes = [*as_envelopes(Timeline(folder).all_events())]
            unknown = Envelope(
                "conformance", len(all_envelopes) + 1, 1.7e9, UnknownEvent("of_tomorrow", {"x": [1, None]})
            )
            self._check_delivery(
                folder, "a whole experiment", [[each] for each in all_envelopes[:3]] + [all_envelopes[3:]]
            )
            self._check_delivery(folder, "the same events again, opened anew", [all_envelopes])
            self._check_delivery(folder, "events of a type that is not known here", [[unknown]])
            self._check_delivery(folder, "objects that hold the least", [[*as_envelopes(minimal_events(folder))]])
            for label, metrics in hostile_metrics():
                timeline = Timeline(folder)
                batch = [*as_envelopes([*timeline.start_events(), *timeline.step_events(0, metrics)])]
                self._check_delivery(folder, f"metrics with {label}", [batch], may_reject=True)
            self._check_delivery(folder, "no batch at all", [])

    def _check_delivery(
        self, folder: Path, label: str, batches: Sequence[Sequence[Envelope]], *, may_reject: bool = False
    ) -> None:
        async def deliver() -> None:
            sink: Any = self._make(folder)  # may have `mark`, which is not part of Sink
            sink.evsys_attached = NullPublisher()
            await with_deadline(sink.open())
            try:
                for batch in batches:
                    await self._write(sink, batch, may_reject=may_reject)
                    if hasattr(sink, "mark"):
                        self._failures.check(
                            f"{self._prefix}its mark is plain data", partial(_check_json_round_trip, sink.mark())
                        )
            finally:
                await with_deadline(sink.close())

        self._failures.check(f"{self._prefix}open, write and close take", lambda: asyncio.run(deliver()), label)

    async def _write(self, sink: Sink, batch: Sequence[Envelope], *, may_reject: bool) -> None:
        remaining = batch
        while remaining:
            try:
                result: object = await with_deadline(sink.write(remaining))
            except RejectedError:
                if may_reject:
                    return
                raise
            if result is None:
                return
            if type(result) is not int or not 0 < result <= len(remaining):
                message = f"write returns None or how many it took, 1 to {len(remaining)}; it returned {result!r}"
                self._failures.add(f"{self._prefix}{message}")
                return
            remaining = remaining[result:]


def _check_json_round_trip(mark: object) -> None:
    decoded = json.loads(json.dumps(mark))
    assert decoded == mark, f"{mark!r} comes back as {decoded!r}"


async def with_deadline(work: Awaitable[object]) -> object:
    """Await the work with the timeout of the checks."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await work


class NullPublisher:
    """Discards what an adapter under test publishes or reports."""

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Do nothing."""

    def publish(self, event: Event) -> None:
        """Do nothing."""
