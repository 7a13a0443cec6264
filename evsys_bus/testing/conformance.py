"""`conformance`: whether an adapter keeps its side of the contract, as one test that needs no fixtures and no plugin.

It owns the expectations; what the adapter is tried with is in `evsys_bus.testing.timeline`.
"""

import asyncio
import json
import tempfile
import threading
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from evsys_bus.attached import RetryPolicy
from evsys_bus.callback import Callback, attach, check_hooks, detach, hook_of
from evsys_bus.errors import HookError, RejectedError
from evsys_bus.events import Envelope, Event, StepEnd, UnknownEvent
from evsys_bus.sink import Sink
from evsys_bus.testing.timeline import RUNS, STEPS, Timeline, enveloped, hostile, minimal

Make = Callable[[Path], Callback | Sink]
"""Makes the adapter; what it writes belongs into the folder."""

DEADLINE_SECONDS: Final = 30.0
"""For one call of a sink, and for all that a callback spawned."""


def conformance(make: Make, *, follow: bool = True) -> Callable[[], None]:
    """A test of the adapter: give it a name that begins with ``test``.

    Tried is: nothing happens before the first hook or `open`; every hook with full, minimal and detached objects;
    metrics that are no numbers; late and repeated steps; two runs at once; start events that a courier tells again; the
    same files from live objects and from a record; and, with ``mark`` and ``rewind``, the same files after a crash. For
    a sink: the same events in batches, once and again, opening after closing, and what `write` returns.

    Args:
        make: Called many times, each time with another empty folder, mostly outside an event loop. A sink needs a
            destination that is there.
        follow: Whether the adapter may be followed; False for one that needs live objects.

    Raises:
        AssertionError: From the test; one sentence for every expectation that was not met.

    Example:
        >>> from evsys_bus.testing import RecordingCallback
        >>> test_my_adapter = conformance(lambda folder: RecordingCallback())
        >>> test_my_adapter()
    """

    def test() -> None:
        trial = Trial(make)
        if trial.constructs_quietly():
            if trial.is_sink:
                trial.try_sink()
            else:
                trial.try_callback(follow=follow)
        if trial.broken:
            raise AssertionError("\n".join([f"{trial.name} does not conform:", *dict.fromkeys(trial.broken)]))

    return test


class Trial:
    """One adapter and what was found out about it."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self.name = "the adapter"
        self.is_sink = False
        self.broken: list[str] = []
        """One sentence each."""

    def constructs_quietly(self) -> bool:
        """Whether it can be constructed at all; doing something there is noted too."""
        with _folder() as folder:
            threads = threading.active_count()
            made: list[Callback | Sink] = []
            if not self._met("it can be constructed outside an event loop", lambda: made.append(self._make(folder))):
                return False
            self.name, self.is_sink = type(made[0]).__name__, isinstance(made[0], Sink)
            if any(folder.iterdir()):
                self.broken.append("- it touches no file when it is constructed; there was one in the folder")
            if threading.active_count() > threads:
                self.broken.append("- it starts no thread when it is constructed; there was one more")
        return True

    # -- callbacks ----------------------------------------------------------------------------------------------------

    def try_callback(self, *, follow: bool) -> None:
        """Every expectation of a callback."""
        with _folder() as folder:
            try:
                check_hooks(self._make(folder))
            except HookError as error:
                self.broken.append(f"- its hooks can be called as they are declared: {error}")
                return
        calm = self._after("a whole experiment, two runs at once", lambda folder: [Timeline(folder).whole()])
        self._after("objects that hold the least", lambda folder: [minimal(folder)])
        for run in RUNS:
            alone = self._after("a run by itself", lambda folder, run=run: [Timeline(folder, [run]).whole()])
            mine = {name: text for name, text in alone.items() if run in name and name in calm}
            beside = {name: calm[name] for name in mine}
            if beside != mine:
                self.broken.append(f"- a run beside another is as one by itself; {_difference(mine, beside)}")
        for what, metrics in hostile():
            self._after(f"metrics with {what}", lambda folder, row=metrics: [Timeline(folder).step(0, row)])
        self._after("late and repeated steps", _late)
        again = self._after("start events that are told again", _told_again)
        if again != calm:
            self.broken.append(f"- start events that are told again change nothing; {_difference(calm, again)}")
        if follow:
            self._try_followed(calm)

    def _try_followed(self, calm: dict[str, str]) -> None:
        followed = self._after("events read from a record", lambda folder: [_read(Timeline(folder).whole())])
        if followed != calm:
            self.broken.append(f"- followed, it writes what it writes inline; {_difference(calm, followed)}")
        self._after("minimal events read from a record", lambda folder: [_read(minimal(folder))])
        self._after("steps of a run whose start was not seen", lambda folder: [_read(Timeline(folder).step(1))])
        for what, metrics in hostile():
            self._after(
                f"metrics with {what}, read from a record",
                lambda folder, row=metrics: [_read(Timeline(folder).step(0, row))],
            )
        with _folder() as folder:
            adapter = self._make(folder)
        if hasattr(adapter, "mark") or hasattr(adapter, "rewind"):
            self._try_rewinding(calm)

    def _try_rewinding(self, calm: dict[str, str]) -> None:
        with _folder() as folder:
            timeline = Timeline(folder)
            events = [*_read(timeline.whole())]
            middle = events.index(next(each for each in events if isinstance(each, StepEnd) and each.step_idx == 2))  # noqa: PLR2004
            starts = [*_read(timeline.starts(2))]

            def crash_and_go_on() -> None:
                before: Any = self._make(folder)  # Any: it has more than the contract asks for
                self._call(before, events[:middle])
                mark = json.loads(json.dumps(before.mark()))
                self._call(before, events[middle:])
                after: Any = self._make(folder)
                after.rewind(mark)
                self._call(after, [*starts, *events[middle:]])

            if self._met("it can be marked, and rewound to a mark that went through JSON", crash_and_go_on):
                rewound = _files(folder)
                if rewound != calm:
                    self.broken.append(f"- after a crash its files are as without; {_difference(calm, rewound)}")

    def _after(self, what: str, events: Callable[[Path], Iterable[Iterable[Event]]]) -> dict[str, str]:
        """What lies in the folder after one adapter was given these events."""
        with _folder() as folder:
            adapter = self._make(folder)
            for some in events(folder):
                self._call(adapter, some, what)
            return _files(folder)

    def _call(self, adapter: Callback | Sink, events: Iterable[Event], what: str = "what it writes") -> None:
        spawned = _Spawned()
        attach(adapter, spawned)
        for event in events:
            hook = hook_of(adapter, type(event))
            if hook is None:
                continue
            values = {name: getattr(event, name) for name in event.__struct_fields__}
            named = {name: values.pop(name) for name in event.keywords}
            self._met(f"{event.hook} takes {what}", partial(hook, *values.values(), **named))
        for name, run in spawned.taken:
            self._met(f"its task {name} takes {what}", lambda: asyncio.run(_bounded(run())))  # noqa: B023
        detach(adapter, spawned)

    # -- sinks --------------------------------------------------------------------------------------------------------

    def try_sink(self) -> None:
        """Every expectation of a sink."""
        with _folder() as folder:
            whole = [*enveloped(Timeline(folder).whole())]
            unknown = Envelope("conformance", len(whole) + 1, 1.7e9, UnknownEvent("of_tomorrow", {"x": [1, None]}))
            self._try_batches(folder, "a whole experiment", [[each] for each in whole[:3]] + [whole[3:]])
            self._try_batches(folder, "the same events again, opened anew", [whole])
            self._try_batches(folder, "events of a type that is not known here", [[unknown]])
            self._try_batches(folder, "objects that hold the least", [[*enveloped(minimal(folder))]])
            for what, metrics in hostile():
                batch = [*enveloped(Timeline(folder).step(0, metrics))]
                self._try_batches(folder, f"metrics with {what}", [batch], may_reject=True)
            self._try_batches(folder, "no batch at all", [])

    def _try_batches(
        self, folder: Path, what: str, batches: Sequence[Sequence[Envelope]], *, may_reject: bool = False
    ) -> None:
        async def deliver() -> None:
            sink = self._make(folder)
            assert isinstance(sink, Sink)
            sink.evsys_attached = _Unheard()
            await _bounded(sink.open())
            try:
                for batch in batches:
                    await self._write(sink, batch, may_reject=may_reject)
            finally:
                await _bounded(sink.close())

        self._met(f"open, write and close take {what}", lambda: asyncio.run(deliver()))

    async def _write(self, sink: Sink, batch: Sequence[Envelope], *, may_reject: bool) -> None:
        rest = batch
        while rest:
            try:
                done: object = await _bounded(sink.write(rest))
            except RejectedError:
                if may_reject:
                    return
                raise
            if done is None:
                return
            if type(done) is not int or not 0 < done <= len(rest):
                self.broken.append(f"- write returns None or how many it took, 1 to {len(rest)}; it returned {done!r}")
                return
            rest = rest[done:]

    # -----------------------------------------------------------------------------------------------------------------

    def _met(self, expectation: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # the adapter's
            self.broken.append(f"- {expectation}; it raised {type(error).__name__}: {str(error)[:300]}")
            return False
        return True


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


def _read(events: Iterable[Event]) -> Iterator[Event]:
    for envelope in enveloped(events):
        assert isinstance(envelope.event, Event)
        yield envelope.event


@contextmanager
def _folder() -> Generator[Path, None, None]:
    with tempfile.TemporaryDirectory(prefix="conformance-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


def _files(folder: Path) -> dict[str, str]:
    """What is in the files, but for hidden ones; the folder's own name is left out of it."""
    return {
        str(path.relative_to(folder)): path.read_bytes().decode(errors="replace").replace(str(folder), "")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def _difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """The first one, in words."""
    for name in sorted({*expected, *found}):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name in expected else 'too many'}"
        lines = expected[name].splitlines(), found[name].splitlines()
        for number, (one, other) in enumerate(zip(*lines, strict=False), 1):
            if one != other:
                return f"line {number} of {name} is {other[:200]!r} and not {one[:200]!r}"
        if expected[name] != found[name]:
            return f"{name} has {len(lines[1])} lines and not {len(lines[0])}"
    return "nothing differs"


async def _bounded(work: Coroutine[Any, Any, object]) -> object:
    """Any: as coroutines are typed."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await work


class _Unheard:
    def publish(self, event: Event) -> None:
        """Nobody asks."""


class _Spawned(_Unheard):
    """Takes the tasks of hooks, to run them when the hooks are done."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Callable[[], Coroutine[Any, Any, object]]]] = []
        """Any: as coroutines are typed."""

    def spawn(
        self,
        fn: Callable[..., Coroutine[Any, Any, object]],
        /,
        *args: Any,
        name: str | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        lane: str | None = None,
        owner: str | None = None,
    ) -> bool:
        """As `Callback.spawn`. Any: the arguments are those of ``fn``."""
        del timeout, retry, lane, owner
        self.taken.append((name or getattr(fn, "__name__", "task"), lambda: fn(*args)))
        return True

    def publishes_here(self) -> bool:
        """It does."""
        return True
