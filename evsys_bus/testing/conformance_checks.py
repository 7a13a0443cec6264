"""The checks of `conformance`: a callback inline and followed, a sink as its courier delivers to it.

`CallbackConformance` compares what a callback writes inline, followed, and after a crash; `SinkConformance` opens,
writes to and closes a sink. `Failures` collects one sentence for each cause, however often it occurs.
"""

import asyncio
import json
import re
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias, cast

from evsys_bus.adapter import Adapter, EventInfo
from evsys_bus.callback import Callback, attach, check_hooks, detach, find_hook
from evsys_bus.codec import encode
from evsys_bus.errors import HookError, RejectedError
from evsys_bus.events import Envelope, Event, StepEnd, UnknownEvent
from evsys_bus.sink import BatchResult, RawRecord, Sink, check_marks, check_sink
from evsys_bus.tasks import HOOK_FILENAME_PREFIX, HookTaskAdopter, find_hook_frame, task_name
from evsys_bus.testing.timeline import RUNS, STEPS, Timeline, as_envelopes, hostile_metrics, minimal_events

_VARIABLE_PARTS: Final = re.compile(r"conformance-\w+|\d+")
"""What differs between errors of the same cause: temporary folders and numbers."""


class Failures:
    """Sentences, in the order in which their causes occurred first."""

    def __init__(self) -> None:
        self._sentences: dict[tuple[str, str], str] = {}  # by expectation and error
        self._tried_with: dict[tuple[str, str], list[str]] = {}

    def add(self, sentence: str) -> None:
        """Add something that is wrong."""
        self._sentences[sentence, ""] = f"- {sentence}"

    def check(self, expectation: str, call: Callable[[], object], tried_with: str = "") -> bool:
        """Call the adapter under test; return whether it raises nothing.

        Args:
            expectation: What should be true then, such as "on_eval takes".
            call: The call.
            tried_with: What it is tried with; calls that fail alike and differ only in this have the same cause.
        """
        try:
            call()
        except Exception as error:  # the adapter's
            error_text = f"{type(error).__name__}: {str(error)[:300]}"
            cause = expectation, _VARIABLE_PARTS.sub("#", error_text)
            self._sentences.setdefault(cause, f"- {f'{expectation} {tried_with}'.strip()}; it raised {error_text}")
            self._tried_with.setdefault(cause, []).append(tried_with)
            return False
        return True

    def sentences(self) -> list[str]:
        """Return all sentences as list items."""
        return [
            sentence + _repeat_suffix(self._tried_with.get(cause, [])) for cause, sentence in self._sentences.items()
        ]


def _repeat_suffix(tried_with: list[str]) -> str:
    """Return how often it occurred, and with what else than the first one."""
    if len(tried_with) < 2:  # noqa: PLR2004 # the sentence covers a single occurrence
        return ""
    others = [*dict.fromkeys(tried_with)][1:]
    also = f", also with {others[0]}" if others else ""
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f" ({len(tried_with)} times{also}{more})"


Contents: TypeAlias = Callable[[Path], Mapping[str, Any]]
"""Returns what an adapter wrote into a folder, as comparable values by name."""

AdapterFactory: TypeAlias = Callable[[Path], Callback | Sink]
"""Constructs the adapter, which should write into the folder."""


@contextmanager
def empty_folder() -> Generator[Path, None, None]:
    """Yield a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="conformance-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


def read_visible_files(folder: Path) -> dict[str, str]:
    """Return the contents of all files except hidden ones, without the folder's own name."""
    return {
        str(path.relative_to(folder)): path.read_bytes().decode(errors="replace").replace(str(folder), "")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def difference(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    """Describe the first difference."""
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name in expected else 'too many'}"
        lines = _lines(expected[name]), _lines(found[name])
        for number, (one, other) in enumerate(zip(*lines, strict=False), 1):
            if one != other:
                return f"line {number} of {name} is {other[:200]!r} and not {one[:200]!r}"
        if expected[name] != found[name]:
            same = len(lines[0]) == len(lines[1])
            return f"{name} differs" if same else f"{name} has {len(lines[1])} lines and not {len(lines[0])}"
    return "nothing differs"


def _lines(content: object) -> list[str]:
    """Return the lines of a text, the items of a list, or the repr of anything else."""
    if isinstance(content, str):
        return content.splitlines()
    if isinstance(content, list | tuple):
        return [str(each) for each in cast("Sequence[object]", content)]
    return [repr(content)]


DEADLINE_SECONDS: Final = 30.0
"""Timeout of one call of a sink, and of each task of a callback."""


class SinkConformance:
    """Conformance checks of a sink, which is constructed for each check.

    Args:
        make: Constructs it, given a folder.
        failures: Collects what is wrong.
        prefix: Prefix of the findings, for a sink that is a delivery half.
    """

    def __init__(self, make: AdapterFactory, failures: Failures, prefix: str = "") -> None:
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
            if sink.raw:
                damaged = RawRecord("conformance", 1, b"\xc1")
                self._check_delivery(folder, "a record that is not an envelope", [[damaged]], may_reject=True)
            self._check_delivery(folder, "no batch at all", [])

    def _check_delivery(
        self, folder: Path, label: str, batches: Sequence[Sequence[Envelope | RawRecord]], *, may_reject: bool = False
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

    async def _write(self, sink: Sink, batch: Sequence[Envelope | RawRecord], *, may_reject: bool) -> None:
        remaining = [_as_record(each) for each in batch] if sink.raw else batch
        while remaining:
            try:
                result: object = await with_deadline(sink.write(remaining))
            except RejectedError:
                if may_reject:
                    return
                raise
            if result is None:
                return
            handled: object = result.handled if isinstance(result, BatchResult) else result
            if type(handled) is not int or not 0 < handled <= len(remaining):
                message = f"write returns None or how many it took, 1 to {len(remaining)}; it returned {result!r}"
                self._failures.add(f"{self._prefix}{message}")
                return
            remaining = remaining[handled:]


def _as_record(item: Envelope | RawRecord) -> RawRecord:
    return item if isinstance(item, RawRecord) else RawRecord(item.stream, item.seq, encode(item))


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


_Events: TypeAlias = Callable[[Path], Iterable[Iterable[Event]]]
"""The events of a trial, given its folder, in groups: tasks started by a group run at its end."""


class CallbackConformance:
    """Conformance checks of a callback, which is constructed for each check.

    Args:
        make: Constructs it, given a folder.
        contents: Reads what it wrote there.
        failures: Collects what is wrong.
    """

    def __init__(self, make: AdapterFactory, contents: Contents, failures: Failures) -> None:
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
        self._feed("content, alerts and facts", lambda folder: [Timeline(folder).all_events(facts=True)])
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

    def may_call_hooks(self) -> bool:
        """Return True: the check calls them."""
        return True
