"""Options that select events of a journal."""

import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

import click

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _parse_time(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """Parse a duration before now, or a time, as seconds since the epoch."""
    before = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text or "")
    if text is None or before:
        return time.time() - float(before[1]) * _UNITS[before[2]] if before else None
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError):
        what = f"{text!r} is neither a duration (90s, 10m, 2h, 1d) nor a time (2026-01-31T12:00)"
        raise click.BadParameter(what, ctx, param) from None


def _compile_pattern(ctx: click.Context, param: click.Parameter, text: str | None) -> re.Pattern[str] | None:
    """Compile a regular expression."""
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise click.BadParameter(f"{text!r} is not a regular expression: {error}", ctx, param) from None


def _split_words(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Split comma-separated words, without duplicates, in order."""
    del ctx, param
    return tuple(dict.fromkeys(word.strip() for each in values for word in each.split(",") if word.strip()))


def event_options(command: _CommandT) -> _CommandT:
    """Add ``--type`` (argument ``types``) and ``--run`` (``run_key``) to a command."""
    for option in (
        click.option("--run", "run_key", metavar="KEY", help="Only events of this run."),
        click.option(
            "--type",
            "types",
            multiple=True,
            metavar="A,B",
            callback=_split_words,
            help="Only events of these types: --type eval,checkpoint.",
        ),
    ):
        command = option(command)
    return command


since_option: Final = click.option(
    "--since", metavar="TIME", callback=_parse_time, help="Only events since this time: 10m, 2h, 2026-01-31T12:00."
)
metric_option: Final = click.option(
    "--metric",
    metavar="REGEX",
    callback=_compile_pattern,
    help="Only events with a matching metric, and only those metrics.",
)


def no_match_message(types: tuple[str, ...]) -> str:
    """Return the message for an empty result, with suggestions for unknown types."""
    from evsys_bus.errors import did_you_mean
    from evsys_bus.events import declared_events

    known = declared_events()
    unknown = [each for each in types if each not in known]
    hints = [f'"{each}" is not a known type of event; {did_you_mean(each, known)}' for each in unknown]
    return "; ".join(["no event matches", *hints])
