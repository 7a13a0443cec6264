"""Progress as lines for pipes, batch jobs and other programs: plain ``key=value``, or JSON.

A line for every eval, checkpoint and change of state; at intervals one for each active run and upload.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO, cast

import msgspec

from evsys_bus.cli.progress.run_state import ProgressUpdate, RunProgress, RunStateTracker
from evsys_bus.cli.progress.transfers import Facts, PollUploads, finished_facts, no_uploads, transfer_facts
from evsys_bus.cli.screen import printable
from evsys_bus.codec import json_line, to_builtins

PULSE_SECONDS: Final = 30.0
DRAIN_PULSE_SECONDS: Final = 10.0
"""Interval of lines during the drain at the end."""
SHORT_DRAIN_SECONDS: Final = 1.0
"""A shorter drain is not reported."""
_UNQUOTED: Final = re.compile(r"[^\s\"'=\\]+")


class LineView:
    """Writes new updates of the board and of the uploads on every tick."""

    def __init__(
        self,
        tracker: RunStateTracker,
        stream: TextIO,
        format_line: Callable[[Facts], str],
        *,
        pulse_seconds: float = PULSE_SECONDS,
        poll_uploads: PollUploads = no_uploads,
    ) -> None:
        self._tracker = tracker
        self._stream = stream
        self._format_line = format_line
        self._pulse_seconds = pulse_seconds
        self._last_pulse = tracker.clock()
        self._next_drain_line = SHORT_DRAIN_SECONDS
        self._dropped = 0
        self._poll_uploads = poll_uploads

    def tick(self) -> None:
        """Write new updates, and the periodic lines if they are due."""
        self._tick()

    def close(self) -> None:
        """Write the remaining updates."""
        self._tick(last=True)

    def _tick(self, *, last: bool = False) -> None:
        tracker = self._tracker
        lines: list[str] = []
        while tracker.updates:
            lines.append(self._format_line(_update_facts(tracker.updates.popleft())))
        if tracker.updates_dropped > self._dropped:
            dropped, self._dropped = tracker.updates_dropped - self._dropped, tracker.updates_dropped
            lines.append(
                self._format_line({"time": _format_time(time.time()), "event": "lines_dropped", "count": dropped})
            )
        uploads = self._poll_uploads(force=last)
        lines += [self._format_line(finished_facts(each)) for each in uploads.finished]
        if tracker.clock() - self._last_pulse >= self._pulse_seconds:
            self._last_pulse = tracker.clock()
            lines += [
                self._format_line(
                    {"time": _format_time(time.time()), "event": "progress"} | run_facts(run, tracker.clock())
                )
                for run in list(tracker.runs.values())
                if run.status == "running"
            ]
            lines += [self._format_line(transfer_facts("uploading", each)) for each in uploads.active]
        lines += self._drain_lines()
        if lines:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()

    def _drain_lines(self) -> list[str]:
        drain_status = self._tracker.drain_status
        if drain_status is None or drain_status.elapsed_seconds < self._next_drain_line:
            return []
        facts = drain_status.facts()
        if facts is None:
            return []
        self._next_drain_line = drain_status.elapsed_seconds + DRAIN_PULSE_SECONDS
        return [self._format_line({"time": _format_time(time.time())} | facts)]


def run_facts(run: RunProgress, now: float) -> Facts:
    """Return the progress of a run as facts of a line."""
    facts: Facts = {"run": run.key}
    if run.num_steps:
        facts["step"] = f"{run.step}/{run.num_steps}"
    facts["metrics"] = dict(run.metrics)
    rate = run.rate(now)
    if rate is not None:
        facts |= {"steps_per_second": round(rate, 2), "eta_seconds": round(run.eta(now) or 0)}
    return facts


def format_plain(facts: Facts) -> str:
    """Format facts as ``key=value`` pairs on one line; metrics are inlined under their own names."""
    flat: Facts = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {name: each for name, each in cast("Facts", value).items() if name not in flat}
        else:
            flat[key] = value
    return " ".join(f"{_quote(str(key))}={_quote(_format_value(value))}" for key, value in flat.items())


def format_json(facts: Facts) -> str:
    """Format facts as a JSON object; ``step`` and ``num_steps`` are numbers, metrics are a nested object."""
    numbers: Facts = {}
    for key, value in facts.items():
        if key == "step":
            numbers["step"], numbers["num_steps"] = map(int, value.split("/"))
        else:
            numbers[key] = value
    return json_line(numbers).decode()


def _update_facts(update: ProgressUpdate) -> Facts:
    facts: Facts = {"time": _format_time(update.time), "event": update.event}
    if update.run is not None:
        facts["run"] = update.run
    if update.num_steps:
        facts["step"] = f"{update.step}/{update.num_steps}"
    return facts | {key: value for key, value in update.facts.items() if value is not None}


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def _format_value(value: object) -> str:
    plain = to_builtins(value)[0]
    return f"{plain:.6g}" if isinstance(plain, float) else str(plain)


def _quote(text: str) -> str:
    """Quote the text if it contains a blank or another character that would split the pair."""
    if _UNQUOTED.fullmatch(text):
        return printable(text)
    return msgspec.json.encode(text).decode()
