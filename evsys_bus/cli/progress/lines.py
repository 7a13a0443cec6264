"""Progress as lines for pipes, batch jobs and other programs: plain ``key=value``, or JSON.

A line for every eval, checkpoint and change of state; at intervals one for each active run and upload.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Final, TextIO, cast

import msgspec

from evsys_bus.cli.progress.board import Board, News, RunProgress
from evsys_bus.cli.progress.transfers import Facts, Look, end_facts, facts, no_uploads
from evsys_bus.cli.screen import printable
from evsys_bus.codec import json_line, to_plain

PULSE_SECONDS: Final = 30.0
WAIT_PULSE_SECONDS: Final = 10.0
"""Interval of lines during the drain at the end."""
SHORT_WAIT_SECONDS: Final = 1.0
"""A shorter drain is not reported."""
_PLAIN: Final = re.compile(r"[^\s\"'=\\]+")


class LineView:
    """Writes new updates of the board and of the uploads on every tick."""

    def __init__(
        self,
        board: Board,
        stream: TextIO,
        form: Callable[[Facts], str],
        *,
        pulse_seconds: float = PULSE_SECONDS,
        uploads: Look = no_uploads,
    ) -> None:
        self._board = board
        self._stream = stream
        self._form = form
        self._pulse_seconds = pulse_seconds
        self._pulsed = board.clock()
        self._waited = SHORT_WAIT_SECONDS
        self._dropped = 0
        self._uploads = uploads

    def tick(self) -> None:
        """Write new updates, and the periodic lines if they are due."""
        self._tick()

    def close(self) -> None:
        """Write the remaining updates."""
        self._tick(last=True)

    def _tick(self, *, last: bool = False) -> None:
        board = self._board
        lines: list[str] = []
        while board.news:
            lines.append(self._form(_news_facts(board.news.popleft())))
        if board.news_dropped > self._dropped:
            dropped, self._dropped = board.news_dropped - self._dropped, board.news_dropped
            lines.append(self._form({"time": _now(time.time()), "event": "lines_dropped", "count": dropped}))
        uploads = self._uploads(at_once=last)
        lines += [self._form(end_facts(each)) for each in uploads.ended]
        if board.clock() - self._pulsed >= self._pulse_seconds:
            self._pulsed = board.clock()
            lines += [
                self._form({"time": _now(time.time()), "event": "progress"} | run_facts(run, board.clock()))
                for run in list(board.runs.values())
                if run.status == "running"
            ]
            lines += [self._form(facts("uploading", each)) for each in uploads.under_way]
        lines += self._wait()
        if lines:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()

    def _wait(self) -> list[str]:
        waiting = self._board.waiting
        if waiting is None or waiting.lasted < self._waited:
            return []
        facts = waiting.facts()
        if facts is None:
            return []
        self._waited = waiting.lasted + WAIT_PULSE_SECONDS
        return [self._form({"time": _now(time.time())} | facts)]


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


def plain(facts: Facts) -> str:
    """Format facts as ``key=value`` pairs on one line; metrics are inlined under their own names."""
    flat: Facts = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= {name: each for name, each in cast("Facts", value).items() if name not in flat}
        else:
            flat[key] = value
    return " ".join(f"{_word(str(key))}={_word(_text(value))}" for key, value in flat.items())


def as_json(facts: Facts) -> str:
    """Format facts as a JSON object; ``step`` and ``num_steps`` are numbers, metrics are a nested object."""
    numbers: Facts = {}
    for key, value in facts.items():
        if key == "step":
            numbers["step"], numbers["num_steps"] = map(int, value.split("/"))
        else:
            numbers[key] = value
    return json_line(numbers).decode()


def _news_facts(news: News) -> Facts:
    facts: Facts = {"time": _now(news.time), "event": news.event}
    if news.run is not None:
        facts["run"] = news.run
    if news.num_steps:
        facts["step"] = f"{news.step}/{news.num_steps}"
    return facts | {key: value for key, value in news.facts.items() if value is not None}


def _now(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def _text(value: object) -> str:
    plain = to_plain(value)[0]
    return f"{plain:.6g}" if isinstance(plain, float) else str(plain)


def _word(text: str) -> str:
    """Quote the text if it contains a blank or another character that would split the pair."""
    if _PLAIN.fullmatch(text):
        return printable(text)
    return msgspec.json.encode(text).decode()
