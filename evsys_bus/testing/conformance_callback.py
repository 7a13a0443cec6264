"""`CallbackConformance`: runs a callback's hooks inline and as its courier does, and compares what it wrote."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias

from evsys_bus.adapter import EventInfo
from evsys_bus.callback import Callback, attach, check_hooks, detach, find_hook
from evsys_bus.errors import HookError
from evsys_bus.events import Event, StepEnd
from evsys_bus.sink import Sink, check_marks
from evsys_bus.tasks import HOOK_FILENAME_PREFIX, HookTaskAdopter, find_hook_frame, task_name
from evsys_bus.testing.conformance_sink import NullPublisher, with_deadline
from evsys_bus.testing.failures import Failures
from evsys_bus.testing.folders import Contents, difference, empty_folder
from evsys_bus.testing.timeline import RUNS, STEPS, Timeline, as_envelopes, hostile_metrics, minimal_events

_Events: TypeAlias = Callable[[Path], Iterable[Iterable[Event]]]
"""The events of a trial, given its folder, in groups: tasks started by a group run at its end."""


class CallbackConformance:
    """Conformance checks of a callback, constructed anew for each check.

    Args:
        make: Constructs it, given a folder.
        contents: Reads what it wrote there.
        failures: Collects what is wrong.
    """

    def __init__(self, make: Callable[[Path], Callback | Sink], contents: Contents, failures: Failures) -> None:
        self._make = make
        self._contents = contents
        self._failures = failures

    def run(self, *, follow: bool) -> None:
        """Check every expectation of a callback."""
        failures = self._failures
        with empty_folder() as folder:
            try:
                check_hooks(adapter := self._make(folder))
                if follow:
                    check_marks(adapter)
            except HookError as error:
                failures.add(f"its hooks can be called as they are declared: {error}")
                return
        expected = self._feed_and_read(
            "a whole experiment, two runs at once", lambda folder: [Timeline(folder).all_events()]
        )
        expected_minimal = self._feed_and_read("objects that hold the least", lambda folder: [minimal_events(folder)])
        for run in RUNS:
            single_run = self._feed_and_read(
                "a run by itself", lambda folder, run=run: [Timeline(folder, [run]).all_events()]
            )
            own_files = {name: text for name, text in single_run.items() if run in name and name in expected}
            shared_files = {name: expected[name] for name in own_files}
            if shared_files != own_files:
                failures.add(f"a run beside another is as one by itself; {difference(own_files, shared_files)}")
        for label, metrics in hostile_metrics():
            self._feed(f"metrics with {label}", lambda folder, row=metrics: [_step_with_metrics(folder, row)])
        self._feed("late and repeated steps", _late_steps)
        repeated = self._feed_and_read("repeated start events", _repeated_starts)
        if repeated != expected:
            failures.add(f"repeated start events change nothing; {difference(expected, repeated)}")
        if follow:
            self._check_followed(expected, expected_minimal)

    def _check_followed(self, expected: Mapping[str, object], expected_minimal: Mapping[str, object]) -> None:
        followed = self._feed_and_read(
            "events read from a record", lambda folder: [_read_back(Timeline(folder).all_events())]
        )
        if followed != expected:
            self._failures.add(f"followed, it writes what it writes inline; {difference(expected, followed)}")
        followed_minimal = self._feed_and_read(
            "minimal events read from a record", lambda folder: [_read_back(minimal_events(folder))]
        )
        if followed_minimal != expected_minimal:
            self._failures.add(
                "followed, a loop by itself comes to the same as inline; "
                f"{difference(expected_minimal, followed_minimal)}"
            )
        self._feed(
            "steps of a run whose start was not seen", lambda folder: [_read_back(Timeline(folder).step_events(1))]
        )
        for label, metrics in hostile_metrics():
            label = f"metrics with {label}, read from a record"  # noqa: PLW2901
            self._feed(label, lambda folder, row=metrics: [_read_back(_step_with_metrics(folder, row))])
        with empty_folder() as folder:
            adapter = self._make(folder)
        if hasattr(adapter, "mark"):
            self._check_rewinding(expected)

    def _check_rewinding(self, expected: Mapping[str, object]) -> None:
        with empty_folder() as folder:
            timeline = Timeline(folder)
            events = [*_read_back(timeline.all_events())]
            middle = events.index(next(each for each in events if isinstance(each, StepEnd) and each.step_idx == 2))  # noqa: PLR2004
            starts = [*_read_back(timeline.start_events(2))]

            def crash_and_resume() -> None:
                before: Any = self._make(folder)  # has `mark`, which is not part of Callback
                self._call_hooks(before, events[:middle])
                mark = json.loads(json.dumps(before.mark()))
                self._call_hooks(before, events[middle:])
                after: Any = self._make(folder)
                after.rewind(mark)
                self._call_hooks(after, [*starts, *events[middle:]])
                self._close(after)

            if self._failures.check("it can be marked, and rewound to a mark that went through JSON", crash_and_resume):
                rewound = self._read_contents(folder)
                if rewound != expected:
                    self._failures.add(f"after a crash its files are as without; {difference(expected, rewound)}")

    def _feed(self, label: str, events: _Events) -> None:
        """Feed these events to one callback."""
        with empty_folder() as folder:
            self._feed_in(folder, label, events)

    def _feed_and_read(self, label: str, events: _Events) -> Mapping[str, object]:
        """Feed these events to one callback; return what it wrote."""
        with empty_folder() as folder:
            self._feed_in(folder, label, events)
            return self._read_contents(folder)

    def _feed_in(self, folder: Path, label: str, events: _Events) -> None:
        adapter = self._make(folder)
        for group in events(folder):
            self._call_hooks(adapter, group, label)
        self._close(adapter, label)

    def _read_contents(self, folder: Path) -> Mapping[str, object]:
        found: list[Mapping[str, object]] = []
        self._failures.check("`contents` can read what it wrote", lambda: found.append(self._contents(folder)))
        return found[0] if found else {}

    def _call_hooks(self, adapter: Callback | Sink, events: Iterable[Event], label: str = "what it writes") -> None:
        """Call the hooks inside an event loop, then run the tasks that they have started, bare or spawned."""
        asyncio.run(self._call_hooks_async(adapter, events, label))

    async def _call_hooks_async(self, adapter: Callback | Sink, events: Iterable[Event], label: str) -> None:
        collector = _TaskCollector()
        attach(adapter, collector)
        collector.bare_tasks.adopt_on_running_loop()
        for event in events:
            hook = find_hook(adapter, type(event))
            if hook is None:
                continue
            values = {name: getattr(event, name) for name in event.__struct_fields__}
            keyword_values = {name: values.pop(name) for name in event.keywords}
            self._failures.check(
                f"{event.hook} takes", partial(collector.call, hook, values.values(), keyword_values), label
            )
        for name, run in collector.tasks:
            await self._await_task(f"its task {name()} takes", run, label)
        collector.bare_tasks.close()
        detach(adapter, collector)

    async def _await_task(self, expectation: str, run: Callable[[], Awaitable[object]], label: str) -> None:
        error: Exception | None = None
        try:
            await with_deadline(run())
        except Exception as raised:  # the adapter's
            error = raised

        def reraise() -> None:
            if error is not None:
                raise error

        self._failures.check(expectation, reraise, label)

    def _close(self, adapter: Callback | Sink, label: str = "what it wrote") -> None:
        if isinstance(adapter, Callback) and type(adapter).close is not Callback.close:
            self._failures.check("it can be closed after", adapter.close, label)


def _late_steps(folder: Path) -> Iterator[Iterable[Event]]:
    timeline = Timeline(folder)
    yield timeline.start_events()
    for step in (0, 1, 1, 3, 2, 0):
        yield timeline.step_events(step)


def _repeated_starts(folder: Path) -> Iterator[Iterable[Event]]:
    timeline = Timeline(folder)
    yield timeline.start_events()
    yield timeline.start_events()
    for step in range(STEPS):
        yield timeline.step_events(step)
        yield timeline.start_events(step + 1)
    yield timeline.end_events()


def _step_with_metrics(folder: Path, row: dict[str, Any]) -> Iterator[Event]:
    """Return a step with these metrics, of runs that have started: a failure is then due to the metrics."""
    timeline = Timeline(folder)
    yield from timeline.start_events()
    yield from timeline.step_events(0, row)


def _read_back(events: Iterable[Event]) -> Iterator[Event]:
    for envelope in as_envelopes(events):
        assert isinstance(envelope.event, Event)
        yield envelope.event


class _TaskCollector(NullPublisher):
    """Collects the tasks of hooks, to run them after the hooks."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Callable[[], str], Callable[[], Awaitable[object]]]] = []
        """Name and coroutine function of each task."""
        self.bare_tasks: Final = HookTaskAdopter(lambda: True, self._owner_at, self._adopt)
        code = compile(
            "lambda hook, args, named: hook(*args, **named)", f"{HOOK_FILENAME_PREFIX}, conformance>", "eval"
        )
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
            self.tasks.append((lambda: name or getattr(fn, "__name__", "task"), lambda: fn(*args)))
        return True

    def _owner_at(self, frame: FrameType | None) -> str | None:
        call = find_hook_frame(frame)
        return "the adapter" if call is not None and call.f_globals.get("starts") is self else None

    def _adopt(self, task: "asyncio.Task[Any]", owner: str) -> None:
        del owner
        self.tasks.append((lambda: task_name(task), lambda: task))

    def current_event(self) -> EventInfo | None:
        """Return no event: the time is now."""
        return None

    def publishes_here(self) -> bool:
        """Return True: there is only this one."""
        return True
