"""`publish`, compiled for the callbacks that a bus has.

One *unit* of code per event type: its hooks as local names, called one after another, each in a ``try`` that costs
nothing until it catches. A callback that does not override the hook is not in it. In the unit of the hot event type the
calls stand in `publish` itself, so that one publish is one Python frame around the hooks:

    take the token · count · call, call, call · record · run what hooks published meanwhile · give the token back

The token makes publishes take turns (a lock costs five times as much). Counts are exact. Time is sampled: the first
call of a unit and then every 64th goes through `timed`, which reads the clock between the hooks; with a hook that was
seen slow, every one. The watchdog and the adoption of tasks need no mark from here: the frame's line says which hook.
"""

import itertools
import linecache
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from evsys_bus.bus.account import SLOW_NANOSECONDS, HookAccount
from evsys_bus.events import Event

SAMPLE_EVERY: Final = 64

FILENAME: Final = "<evsys-bus publish"
"""What the filename of compiled code begins with."""

_UNIT: Final = """\
def unit(
    tokens, queue, contended, settle, dispatch_of, failed, before, record, hot, stride, sample, clock, wall, {names}
):
    calls = 0
    due = 1

    def publish(event):
        nonlocal calls
        try:
            tokens.pop()
        except IndexError:
            return contended(event)
        try:
            if type(event) is hot:
                {enter}
                calls += 1
                if calls >= due:
                    before(event)
                    timed(event)
                else:
                    {calls_in_publish}
                {leave}
            else:
                dispatch_of[type(event)](event)
            if queue:
                settle()
        finally:
            tokens.append(None)

    def dispatch(event):
        nonlocal calls
        {enter}
        before(event)
        calls += 1
        if calls >= due:
            timed(event)
        else:
            {calls_in_dispatch}
        {leave}

    def timed(event):
        nonlocal due
        due = calls + stride[0]
        t0 = clock()
        {timed_calls}
        sample(({times},))

    def count():
        return calls

    def retire():
        nonlocal hot
        hot = None

    return publish, dispatch, count, retire
"""

_numbers = itertools.count(1)


class Unit:
    """The compiled code of one event type, and the accounts of the hooks that it calls."""

    publish: Callable[[Event], None]
    """Of use in the unit of the hot event type only."""
    dispatch: Callable[[Event], None]
    """Calls the hooks; whoever calls it holds the token."""
    count: Callable[[], int]
    """How many events were dispatched, exactly."""
    retire: Callable[[], None]
    """Close the inlined path: a `publish` that somebody kept goes by the current units from here on."""

    def __init__(
        self,
        event_type: type[Event],
        accounts: Sequence[HookAccount],
        *,
        hot: bool,
        prefix: str,
        record: Callable[[Event, float], None] | None = None,
        record_first: bool = False,
        **parts: Any,
    ) -> None:
        """Compile. Any: ``parts`` are the names that the template takes, given by the publisher."""
        self.tag = str(event_type.__struct_config__.tag)
        self.accounts = tuple(accounts)
        self.filename = f"{prefix}{next(_numbers)}>: {event_type.__name__}"
        self._stride = [SAMPLE_EVERY]
        # Folded into the accounts a few times a second, off the publishing thread. At a million publishes a second
        # some are overwritten before that, which a sample can bear.
        self._samples: deque[tuple[int, ...]] = deque(maxlen=1024)
        source = _source(event_type, len(self.accounts), recorded=record is not None, record_first=record_first)
        lines = source.splitlines()
        self.lines = {
            number: self.accounts[int(line.split("(")[0].rpartition("h")[2])]
            for number, line in enumerate(lines, start=1)
            if line.lstrip().startswith("try: h")
        }
        space: dict[str, Any] = {"__name__": __name__, "__loader__": _Source(source)}
        exec(compile(source, self.filename, "exec"), space)  # noqa: S102 # our own template; no input gets into it
        self.publish, self.dispatch, self.count, self.retire = space["unit"](
            hot=event_type if hot else None,
            stride=self._stride,
            sample=self._samples.append,
            clock=time.perf_counter_ns,
            wall=time.time,
            record=record,
            **{f"h{index}": account.method for index, account in enumerate(self.accounts)},
            **{f"k{index}": account for index, account in enumerate(self.accounts)},
            **parts,
        )

    def fold(self) -> None:
        """Bring the samples into the accounts."""
        while self._samples:
            times = self._samples.popleft()
            for account, began, ended in zip(self.accounts, times, times[1:], strict=False):
                account.took(ended - began)
                if ended - began >= SLOW_NANOSECONDS:
                    self._stride[0] = 1

    def forget(self) -> None:
        """End: counts and samples go into the accounts."""
        self.retire()
        self.fold()
        for account in self.accounts:
            account.calls += self.count()
        linecache.cache.pop(self.filename, None)  # where a traceback put it


class _Source:
    """Shows the compiled code in tracebacks, for as long as the code itself lives."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, _: str) -> str:
        """What `linecache` asks a module's loader for."""
        return self._source


def _source(event_type: type[Event], hooks: int, *, recorded: bool, record_first: bool) -> str:
    fields = event_type.__struct_fields__
    locals_of = {name: f"a{index}" for index, name in enumerate(fields)}
    unpack = "; ".join(f"{local} = event.{name}" for name, local in locals_of.items())
    positional = [a for name, a in locals_of.items() if name not in event_type.keywords]
    named = [f"{name}={a}" for name, a in locals_of.items() if name in event_type.keywords]
    arguments = ", ".join(positional + named)
    calls = [unpack] if hooks and fields else []
    timed_calls = list(calls)
    for index in range(hooks):
        call = [f"try: h{index}({arguments})", f"except BaseException as error: failed(k{index}, error)"]
        calls += call
        timed_calls += [*call, f"t{index + 1} = clock()"]
    enter = "record(event, wall())" if record_first else "now = wall()"
    leave = "pass" if record_first else "record(event, now)"
    return _UNIT.format(
        enter=enter if recorded else "pass",
        leave=leave if recorded else "pass",
        names="*, " + ", ".join(f"h{index}, k{index}" for index in range(hooks)) if hooks else "*, _=None",
        calls_in_publish=_indented(calls, 20),
        calls_in_dispatch=_indented(calls, 12),
        timed_calls=_indented(timed_calls, 8),
        times=", ".join(f"t{index}" for index in range(hooks + 1)),
    )


def _indented(lines: Sequence[str], spaces: int) -> str:
    return ("\n" + " " * spaces).join(lines) if lines else "pass"
