"""`publish`, compiled for the callbacks of a bus.

There is one compiled unit per event type. It calls the hooks of that type one after another, each in a ``try`` that
costs nothing unless it catches. Callbacks that do not override the hook are not part of it. For the hot event type the
calls are inlined in `publish` itself, so that one publish is one Python frame around the hooks:

    take the token · count · call, call, call · record · run what hooks published meanwhile · return the token

The token serializes publishes (a lock costs five times as much). Counts are exact: `ticks` is an iterator that lasts
until the next call to be timed, and its remaining length gives the count. Times are sampled: the first call of a unit
and then every 64th goes through `timed`, which reads the clock between the hooks; every call once a hook was slow. The
names that the code uses are its globals, because a closure would copy each of them into every call's frame. The
watchdog and the adoption of tasks need no marker: the line number of the frame identifies the hook.
"""

import itertools
import linecache
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from operator import length_hint
from typing import Any, Final

from evsys_bus.bus.account import SLOW_NANOSECONDS, HookAccount
from evsys_bus.callback import check_returned, may_return
from evsys_bus.events import Event, step_field, with_whole_step
from evsys_bus.tasks import HOOK_CALLS

SAMPLE_EVERY: Final = 64

FILENAME: Final = HOOK_CALLS
"""Prefix of the filename of compiled code."""

_UNIT: Final = """\
def publish(event):
    global now
    try:
        tokens.pop()
    except IndexError:
        return contended(event)
    try:
        if type(event) is hot:
            {prepare}
            {enter}
            for _ in ticks:
                {calls}
                break
            else:
                before(event)
                timed(event)
            {leave}
        else:
            dispatch_of[type(event)](event)
        if queue:
            settle()
    except BaseException as error:
        settle(error)
    finally:
        tokens.append(None)

def dispatch(event, at=None):
    global now
    {prepare_in_dispatch}
    {enter_in_dispatch}
    before(event)
    for _ in ticks:
        {calls_in_dispatch}
        break
    else:
        timed(event)
    {leave}

def timed(event):
    global ticks
    ticks = renewed()
    t0 = clock()
    {timed_calls}
    sample(({times},))
"""

Dispatch = Callable[..., None]
"""Takes an event and optionally the time at which it was published; default: now."""

_CALL: Final = re.compile(r"\s+try: (?:check\d+\()?h(\d+)\(")
_numbers = itertools.count(1)


class Unit:
    """The compiled code of one event type, and the counters of the hooks that it calls."""

    publish: Callable[[Event], None]
    """Used for the hot event type only."""
    dispatch: Dispatch
    """Calls the hooks. The caller holds the token, and passes the publish time if that was earlier."""

    def __init__(
        self,
        event_type: type[Event],
        accounts: Sequence[HookAccount],
        *,
        hot: bool,
        prefix: str,
        record: Callable[[Event, float], None] | None = None,
        record_first: bool = False,
        failed: Callable[[HookAccount, BaseException], None],
        **parts: Any,
    ) -> None:
        """Compile. ``parts`` are further globals of the template, given by the publisher."""
        self.tag = str(event_type.__struct_config__.tag)
        self.record_first = record_first
        self.accounts = tuple(accounts)
        self.filename = f"{prefix}{next(_numbers)}>: {event_type.__name__}"
        self._stride = SAMPLE_EVERY
        # The event count when the ticks run out, and the ticks; one tuple, so that other threads read them together.
        self._progress: tuple[int, itertools.repeat[None]] = (0, itertools.repeat(None, 0))
        # Folded into the counters a few times a second, off the publishing thread. At a million publishes a second
        # some are overwritten before that, which is fine for samples.
        self._samples: deque[tuple[int, ...]] = deque(maxlen=1024)
        checked = [may_return(account.method) for account in self.accounts]
        source = _source(event_type, checked, recorded=record is not None, record_first=record_first)
        self.lines = {
            number: self.accounts[int(call[1])]
            for number, line in enumerate(source.splitlines(), start=1)
            if (call := _CALL.match(line))
        }
        self._space: dict[str, Any] = {
            "__name__": __name__,
            "__loader__": _Source(source),
            "hot": event_type if hot else None,
            "ticks": self._progress[1],
            "renewed": self._renewed,
            "failed": self._failed(failed),
            "sample": self._samples.append,
            "clock": time.perf_counter_ns,
            "wall": time.time,
            "record": record,
            "with_whole_step": with_whole_step,
            **{f"h{index}": account.method for index, account in enumerate(self.accounts)},
            **{
                f"check{index}": partial(check_returned, account.callback, account.hook)
                for index, account in enumerate(self.accounts)
            },
            **parts,
        }
        exec(compile(source, self.filename, "exec"), self._space)  # noqa: S102 # our own template, without outside input
        self.publish, self.dispatch = self._space["publish"], self._space["dispatch"]

    def event_time(self) -> float:
        """Return when the last dispatched event was published, in seconds since the epoch."""
        return self._space.get("now", 0.0)

    def count(self) -> int:
        """Return the exact number of dispatched events."""
        at_end, ticks = self._progress
        return at_end - length_hint(ticks)

    def _failed(self, failed: Callable[[HookAccount, BaseException], None]) -> Callable[[int, BaseException], None]:
        accounts = self.accounts
        return lambda index, error: failed(accounts[index], error)

    def _renewed(self) -> "itertools.repeat[None]":
        """Start a new sampling interval, because a call is being timed; return its ticks."""
        ticks = itertools.repeat(None, self._stride - 1)
        self._progress = (self._progress[0] + self._stride, ticks)
        return ticks

    def fold(self) -> None:
        """Move the samples into the counters."""
        while True:
            try:
                times = self._samples.popleft()
            except IndexError:
                return
            for account, began, ended in zip(self.accounts, times, times[1:], strict=False):
                account.took(ended - began)
                if ended - began >= SLOW_NANOSECONDS:
                    self._stride = 1

    def record_by(self, record: Callable[[Event, float], None]) -> None:
        """Replace the function that records events, if events are recorded at all."""
        if self._space["record"] is not None:
            self._space["record"] = record

    def forget(self) -> None:
        """Retire this code: move its counts into the counters; a `publish` that somebody stored uses the new code."""
        self._space["hot"] = None
        self.fold()
        for account in self.accounts:
            account.calls += self.count()
        linecache.cache.pop(self.filename, None)  # a traceback may have added it


class _Source:
    """Shows the compiled code in tracebacks for as long as the code itself lives."""

    def __init__(self, source: str) -> None:
        self._source = source

    def get_source(self, _: str) -> str:
        """Return the source; `linecache` calls this on a module's loader."""
        return self._source


def _source(event_type: type[Event], checked: Sequence[bool], *, recorded: bool, record_first: bool) -> str:
    """Return the source code; ``checked`` says for each hook whether its return value must be checked."""
    fields = event_type.__struct_fields__
    locals_of = {name: f"a{index}" for index, name in enumerate(fields)}
    unpack = ["; ".join(f"{local} = event.{name}" for name, local in locals_of.items())] if checked and fields else []
    positional = [a for name, a in locals_of.items() if name not in event_type.keywords]
    named = [f"{name}={a}" for name, a in locals_of.items() if name in event_type.keywords]
    arguments = ", ".join(positional + named)
    calls: list[str] = []
    timed_calls = list(unpack)
    for index, is_checked in enumerate(checked):
        call = f"check{index}(h{index}({arguments}))" if is_checked else f"h{index}({arguments})"
        lines = [f"try: {call}", f"except BaseException as error: failed({index}, error)"]
        calls += lines
        timed_calls += [*lines, f"t{index + 1} = clock()"]
    prepare = list(unpack)
    step = step_field(event_type)
    if step is not None:  # the one user value that must be exact, because files are keyed by it
        given = locals_of[step] if unpack else f"event.{step}"
        # A recorded step must fit in 63 bits too; the shift catches every value that needs a check, also negative ones.
        fits = f" or {given} >> 62" if recorded else ""
        prepare += [
            f"if type({given}) is not int{fits}:",
            "    event = with_whole_step(event)" + (f"; {locals_of[step]} = event.{step}" if unpack else ""),
        ]
    enter = "now = {}wall(); record(event, now)" if record_first else "now = {}wall()"
    enter = enter if recorded else "pass"
    leave = "pass" if record_first else "record(event, now)"
    return _UNIT.format(
        prepare=_indented(prepare, 12),
        prepare_in_dispatch=_indented(prepare, 4),
        enter=enter.format(""),
        enter_in_dispatch=enter.format("at or "),
        leave=leave if recorded else "pass",
        calls=_indented(calls, 16),
        calls_in_dispatch=_indented(calls, 8),
        timed_calls=_indented(timed_calls, 4),
        times=", ".join(f"t{index}" for index in range(len(checked) + 1)),
    )


def _indented(lines: Sequence[str], spaces: int) -> str:
    return ("\n" + " " * spaces).join(lines) if lines else "pass"
