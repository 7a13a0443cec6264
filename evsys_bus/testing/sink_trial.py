"""`SinkTrial`: opens, writes to and closes a sink with everything that a courier may give it."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from evsys_bus.attached import Adapter
from evsys_bus.callback import Callback
from evsys_bus.errors import HookError, RejectedError
from evsys_bus.events import Envelope, Event, UnknownEvent
from evsys_bus.sink import Sink, check_sink
from evsys_bus.testing.findings import Findings
from evsys_bus.testing.folders import empty_folder
from evsys_bus.testing.timeline import RUNS, Timeline, enveloped, hostile, minimal

DEADLINE_SECONDS: Final = 30.0
"""Timeout of one call of a sink, and of each task of a callback."""


class SinkTrial:
    """Conformance checks of a sink, constructed anew for each check.

    Args:
        make: Constructs it, given a folder.
        findings: Collects what is wrong.
        whose: Prefix of the findings, for a sink that is a delivery half.
    """

    def __init__(self, make: Callable[[Path], Callback | Sink], findings: Findings, whose: str = "") -> None:
        self._make = make
        self._findings = findings
        self._whose = whose

    def run(self) -> None:
        """Check every expectation of a sink."""
        with empty_folder() as folder:
            try:
                sink = self._make(folder)
                assert isinstance(sink, Sink), f"a sink is needed here, not a {type(sink).__name__}"
                check_sink(sink)
            except (HookError, AssertionError) as error:
                self._findings.note(f"{self._whose}its methods can be called as they are declared: {error}")
                return
            for run in RUNS:  # the files that checkpoints name
                (folder / run).mkdir()
                (folder / run / "state").write_text("weights")
            whole = [*enveloped(Timeline(folder).whole())]
            unknown = Envelope("conformance", len(whole) + 1, 1.7e9, UnknownEvent("of_tomorrow", {"x": [1, None]}))
            self._try(folder, "a whole experiment", [[each] for each in whole[:3]] + [whole[3:]])
            self._try(folder, "the same events again, opened anew", [whole])
            self._try(folder, "events of a type that is not known here", [[unknown]])
            self._try(folder, "objects that hold the least", [[*enveloped(minimal(folder))]])
            for what, metrics in hostile():
                timeline = Timeline(folder)
                batch = [*enveloped([*timeline.starts(), *timeline.step(0, metrics)])]
                self._try(folder, f"metrics with {what}", [batch], may_reject=True)
            self._try(folder, "no batch at all", [])

    def _try(self, folder: Path, what: str, batches: Sequence[Sequence[Envelope]], *, may_reject: bool = False) -> None:
        async def deliver() -> None:
            sink: Any = self._make(folder)  # may have `mark`, which is not part of Sink
            sink.evsys_attached = Unheard()
            await bounded(sink.open())
            try:
                for batch in batches:
                    await self._write(sink, batch, may_reject=may_reject)
                    if hasattr(sink, "mark"):
                        self._findings.met(f"{self._whose}its mark is plain data", partial(_through_json, sink.mark()))
            finally:
                await bounded(sink.close())

        self._findings.met(f"{self._whose}open, write and close take", lambda: asyncio.run(deliver()), what)

    async def _write(self, sink: Sink, batch: Sequence[Envelope], *, may_reject: bool) -> None:
        rest = batch
        while rest:
            try:
                done: object = await bounded(sink.write(rest))
            except RejectedError:
                if may_reject:
                    return
                raise
            if done is None:
                return
            if type(done) is not int or not 0 < done <= len(rest):
                said = f"write returns None or how many it took, 1 to {len(rest)}; it returned {done!r}"
                self._findings.note(f"{self._whose}{said}")
                return
            rest = rest[done:]


def _through_json(mark: object) -> None:
    again = json.loads(json.dumps(mark))
    assert again == mark, f"{mark!r} comes back as {again!r}"


async def bounded(work: Awaitable[object]) -> object:
    """Await the work with the timeout of the checks."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await work


class Unheard:
    """Discards what an adapter under test publishes or reports."""

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Do nothing."""

    def publish(self, event: Event) -> None:
        """Do nothing."""
