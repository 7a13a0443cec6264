"""`CallbackTrial`: runs a callback's hooks inline and as its courier does, and compares what it wrote."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias

from evsys_bus.attached import EventInfo
from evsys_bus.callback import Callback, attach, check_hooks, detach, hook_of
from evsys_bus.errors import HookError
from evsys_bus.events import Event, StepEnd
from evsys_bus.sink import Sink, check_marks
from evsys_bus.tasks import HOOK_CALLS, BareTasks, hook_call, name_of
from evsys_bus.testing.findings import Findings
from evsys_bus.testing.folders import Contents, difference, empty_folder
from evsys_bus.testing.sink_trial import Unheard, bounded
from evsys_bus.testing.timeline import RUNS, STEPS, Timeline, enveloped, hostile, minimal

_Events: TypeAlias = Callable[[Path], Iterable[Iterable[Event]]]
"""The events of a trial, given its folder, in groups: tasks started by a group run at its end."""


class CallbackTrial:
    """Conformance checks of a callback, constructed anew for each check.

    Args:
        make: Constructs it, given a folder.
        contents: Reads what it wrote there.
        findings: Collects what is wrong.
    """

    def __init__(self, make: Callable[[Path], Callback | Sink], contents: Contents, findings: Findings) -> None:
        self._make = make
        self._contents = contents
        self._findings = findings

    def run(self, *, follow: bool) -> None:
        """Check every expectation of a callback."""
        findings = self._findings
        with empty_folder() as folder:
            try:
                check_hooks(adapter := self._make(folder))
                if follow:
                    check_marks(adapter)
            except HookError as error:
                findings.note(f"its hooks can be called as they are declared: {error}")
                return
        calm = self._after("a whole experiment, two runs at once", lambda folder: [Timeline(folder).whole()])
        least = self._after("objects that hold the least", lambda folder: [minimal(folder)])
        for run in RUNS:
            alone = self._after("a run by itself", lambda folder, run=run: [Timeline(folder, [run]).whole()])
            mine = {name: text for name, text in alone.items() if run in name and name in calm}
            beside = {name: calm[name] for name in mine}
            if beside != mine:
                findings.note(f"a run beside another is as one by itself; {difference(mine, beside)}")
        for what, metrics in hostile():
            self._give(f"metrics with {what}", lambda folder, row=metrics: [_row(folder, row)])
        self._give("late and repeated steps", _late)
        again = self._after("repeated start events", _told_again)
        if again != calm:
            findings.note(f"repeated start events change nothing; {difference(calm, again)}")
        if follow:
            self._try_followed(calm, least)

    def _try_followed(self, calm: Mapping[str, object], least: Mapping[str, object]) -> None:
        followed = self._after("events read from a record", lambda folder: [_read(Timeline(folder).whole())])
        if followed != calm:
            self._findings.note(f"followed, it writes what it writes inline; {difference(calm, followed)}")
        bare = self._after("minimal events read from a record", lambda folder: [_read(minimal(folder))])
        if bare != least:
            self._findings.note(f"followed, a loop by itself comes to the same as inline; {difference(least, bare)}")
        self._give("steps of a run whose start was not seen", lambda folder: [_read(Timeline(folder).step(1))])
        for what, metrics in hostile():
            what = f"metrics with {what}, read from a record"  # noqa: PLW2901
            self._give(what, lambda folder, row=metrics: [_read(_row(folder, row))])
        with empty_folder() as folder:
            adapter = self._make(folder)
        if hasattr(adapter, "mark"):
            self._try_rewinding(calm)

    def _try_rewinding(self, calm: Mapping[str, object]) -> None:
        with empty_folder() as folder:
            timeline = Timeline(folder)
            events = [*_read(timeline.whole())]
            middle = events.index(next(each for each in events if isinstance(each, StepEnd) and each.step_idx == 2))  # noqa: PLR2004
            starts = [*_read(timeline.starts(2))]

            def crash_and_go_on() -> None:
                before: Any = self._make(folder)  # has `mark`, which is not part of Callback
                self._call(before, events[:middle])
                mark = json.loads(json.dumps(before.mark()))
                self._call(before, events[middle:])
                after: Any = self._make(folder)
                after.rewind(mark)
                self._call(after, [*starts, *events[middle:]])
                self._close(after)

            if self._findings.met("it can be marked, and rewound to a mark that went through JSON", crash_and_go_on):
                rewound = self._written(folder)
                if rewound != calm:
                    self._findings.note(f"after a crash its files are as without; {difference(calm, rewound)}")

    def _give(self, what: str, events: _Events) -> None:
        """Feed these events to one callback."""
        with empty_folder() as folder:
            self._give_in(folder, what, events)

    def _after(self, what: str, events: _Events) -> Mapping[str, object]:
        """Feed these events to one callback; return what it wrote."""
        with empty_folder() as folder:
            self._give_in(folder, what, events)
            return self._written(folder)

    def _give_in(self, folder: Path, what: str, events: _Events) -> None:
        adapter = self._make(folder)
        for some in events(folder):
            self._call(adapter, some, what)
        self._close(adapter, what)

    def _written(self, folder: Path) -> Mapping[str, object]:
        found: list[Mapping[str, object]] = []
        self._findings.met("`contents` can read what it wrote", lambda: found.append(self._contents(folder)))
        return found[0] if found else {}

    def _call(self, adapter: Callback | Sink, events: Iterable[Event], what: str = "what it writes") -> None:
        """Call the hooks inside an event loop, then run the tasks that they have started, bare or spawned."""
        asyncio.run(self._called(adapter, events, what))

    async def _called(self, adapter: Callback | Sink, events: Iterable[Event], what: str) -> None:
        started = _Started()
        attach(adapter, started)
        started.bare_tasks.begin_here()
        for event in events:
            hook = hook_of(adapter, type(event))
            if hook is None:
                continue
            values = {name: getattr(event, name) for name in event.__struct_fields__}
            named = {name: values.pop(name) for name in event.keywords}
            self._findings.met(f"{event.hook} takes", partial(started.call, hook, values.values(), named), what)
        for name, run in started.taken:
            await self._await(f"its task {name()} takes", run, what)
        started.bare_tasks.end()
        detach(adapter, started)

    async def _await(self, expectation: str, run: Callable[[], Awaitable[object]], what: str) -> None:
        error: Exception | None = None
        try:
            await bounded(run())
        except Exception as raised:  # the adapter's
            error = raised

        def again() -> None:
            if error is not None:
                raise error

        self._findings.met(expectation, again, what)

    def _close(self, adapter: Callback | Sink, what: str = "what it wrote") -> None:
        if isinstance(adapter, Callback) and type(adapter).close is not Callback.close:
            self._findings.met("it can be closed after", adapter.close, what)


def _late(folder: Path) -> Iterator[Iterable[Event]]:
    timeline = Timeline(folder)
    yield timeline.starts()
    for step in (0, 1, 1, 3, 2, 0):
        yield timeline.step(step)


def _told_again(folder: Path) -> Iterator[Iterable[Event]]:
    timeline = Timeline(folder)
    yield timeline.starts()
    yield timeline.starts()
    for step in range(STEPS):
        yield timeline.step(step)
        yield timeline.starts(step + 1)
    yield timeline.ends()


def _row(folder: Path, row: dict[str, Any]) -> Iterator[Event]:
    """Return a step with these metrics, of runs that have started: a failure is then due to the metrics."""
    timeline = Timeline(folder)
    yield from timeline.starts()
    yield from timeline.step(0, row)


def _read(events: Iterable[Event]) -> Iterator[Event]:
    for envelope in enveloped(events):
        assert isinstance(envelope.event, Event)
        yield envelope.event


class _Started(Unheard):
    """Collects the tasks of hooks, to run them after the hooks."""

    def __init__(self) -> None:
        self.taken: list[tuple[Callable[[], str], Callable[[], Awaitable[object]]]] = []
        """Name and coroutine function of each task."""
        self.bare_tasks: Final = BareTasks(lambda: True, self._owner_around, self._adopt)
        code = compile("lambda hook, args, named: hook(*args, **named)", f"{HOOK_CALLS}, conformance>", "eval")
        self.call: Final[Callable[..., object]] = eval(code, {"starts": self})  # noqa: S307 - the literal above

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, object]],
        /,
        *args: Any,
        name: str | None = None,
        background: bool = False,
        **_: object,  # options of a real bus
    ) -> bool:
        """Collect the task; a background task would be cancelled at once."""
        if not background:
            self.taken.append((lambda: name or getattr(fn, "__name__", "task"), lambda: fn(*args)))
        return True

    def _owner_around(self, frame: FrameType | None) -> str | None:
        call = hook_call(frame)
        return "the adapter" if call is not None and call.f_globals.get("starts") is self else None

    def _adopt(self, task: "asyncio.Task[Any]", owner: str) -> None:
        del owner
        self.taken.append((lambda: name_of(task), lambda: task))

    def current_event(self) -> EventInfo | None:
        """Return no event: the time is now."""
        return None

    def publishes_here(self) -> bool:
        """Return True: there is only this one."""
        return True
