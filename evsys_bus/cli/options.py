"""Options shared by several commands, and what they select: events, an adapter, a way to show progress."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click
import msgspec

from evsys_bus.cli.output.screen import color_option, json_option

if TYPE_CHECKING:
    from evsys_bus.callback import Callback
    from evsys_bus.config.yaml_nodes import Document
    from evsys_bus.delivery.subscription import Subscription
    from evsys_bus.sink import Sink


_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])
PROGRESS_MODES: Final = ["auto", "live", "plain", "json", "off"]

set_option: Final = click.option(
    "--set", "sets", multiple=True, metavar="A.B=C", help="Override a value of the file: --set run.lr=1e-3; repeatable."
)
run_argument: Final = click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
optional_run_argument: Final = click.argument(
    "folder", metavar="[RUN]", required=False, type=click.Path(path_type=Path)
)
progress_option: Final = click.option(
    "--progress",
    type=click.Choice(PROGRESS_MODES),
    default="auto",
    show_default=True,
    help="How progress is shown on stderr. auto: live on a terminal, plain otherwise.",
)
timeout_option: Final = click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up on an adapter once it has accepted no events for this long.",
)
dry_run_option: Final = click.option(
    "--dry-run", is_flag=True, help="Show what would be delivered, and deliver nothing."
)
follow_option: Final = click.option("-f", "--follow", is_flag=True, help="Keep showing what is new, until Ctrl-C.")
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SPEC_PATH: Final = "$.callbacks[0]"


def _combine(*options: Callable[[Any], Any]) -> Callable[[_CommandT], _CommandT]:
    """Return a decorator that adds these options to a command; ``--help`` shows the last one first."""

    def add_options(command: _CommandT) -> _CommandT:
        for option in options:
            command = option(command)
        return command

    return add_options


running_options: Final = _combine(
    color_option,
    click.option(
        "-q",
        "--quiet",
        "log_level",
        flag_value=logging.ERROR,
        type=int,
        help="No progress and no warnings; errors are shown.",
    ),
    click.option(
        "-v",
        "--verbose",
        "log_level",
        flag_value=logging.INFO,
        type=int,
        help="Show log records from INFO on, not only warnings.",
    ),
    json_option,
    progress_option,
    click.option(
        "--strict",
        is_flag=True,
        help="Exit with 5 if an event was not delivered, or a callback's task did not finish.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Continue from the output directory, or from checkpoints that checkpoint_upload has uploaded.",
    ),
    set_option,
    click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, help="Only this seed; repeatable."),
    click.option("--arm", "arms", multiple=True, metavar="NAME", help="Only this arm; repeatable."),
)
"""The options of every command that starts an experiment."""


def adapters_option(help_text: str) -> Callable[[_CommandT], _CommandT]:
    """Return the option ``--adapter``, which can be repeated."""
    return click.option("--adapter", "adapters", multiple=True, metavar="NAME", help=f"{help_text}; repeatable.")


def count_option(help_text: str) -> Callable[[_CommandT], _CommandT]:
    """Return the option ``-n``, whose value is None by default."""
    return click.option("-n", "count", type=click.IntRange(min=0), metavar="N", help=help_text)


dash_option: Final = click.option(
    "--dash", is_flag=True, help="Show it in the dashboard, which is started if none runs, and which goes on after it."
)


def output_dir_option(help_text: str) -> Callable[[_CommandT], _CommandT]:
    """Return the option ``--output-dir``."""
    return click.option("--output-dir", type=click.Path(path_type=Path, file_okay=True), help=help_text)


def build_command_line(*words: object, **options: Any) -> list[str]:
    """Return the command line with these arguments and options."""
    line = ["evsys-bus", *map(str, words)]
    for name, value in options.items():
        values = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
        for each in values:
            if each is not None:
                line += [f"--{name.replace('_', '-')}", str(each)]
    return line


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


event_options: Final = _combine(
    click.option("--run", "run_key", metavar="KEY", help="Only events of this run."),
    click.option(
        "--type",
        "types",
        multiple=True,
        metavar="A,B",
        callback=_split_words,
        help="Only events of these types: --type eval,checkpoint.",
    ),
)
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


adapter_options: Final = _combine(
    click.option(
        "--plugin", "plugins", multiple=True, metavar="MODULE", help="Import this module first; it registers KIND."
    ),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="A param of the adapter, as YAML or text; repeatable.",
    ),
    click.option("--to", "kind", required=True, metavar="KIND", help="The adapter; all kinds: evsys-bus adapters."),
)


def add_current_folder_to_path() -> None:
    """Make modules of the current folder importable, before all others, as ``python -m`` does."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def resolve_subscription(
    kind: str, sets: Iterable[str], plugins: Iterable[str], name: str | None = None
) -> "Subscription":
    """Return the subscription that the options describe, validated without building the adapter.

    Raises:
        ConfigError: The kind is unknown, its params are invalid, or it does not support delivery by a courier.
    """
    from evsys_bus.config import CallbackSpec, build_callbacks, with_overrides
    from evsys_bus.config.experiment import import_module
    from evsys_bus.config.yaml_nodes import Document, compose
    from evsys_bus.errors import ConfigError, Location

    for plugin in plugins:
        add_current_folder_to_path()
        import_module(plugin, Location("$", f"--plugin {plugin}"), "plugin")
    params = with_overrides(Document(compose("{}", "--set")), map(_quote_non_yaml, sets))
    try:
        [callback] = build_callbacks([CallbackSpec(kind, params.value, name, placement="follow")], at="$.callbacks")
    except ConfigError as error:
        for each in getattr(error, "errors", (error,)):
            _point_to_option(each, params)
        raise
    return cast("Callback", callback).evsys_subscription  # an inline half works in a live run only


def load_adapter(subscription: "Subscription") -> "Callback | Sink":
    """Return the adapter of a subscription, built if it is not a live object.

    Raises:
        ConfigError: The adapter cannot be built.
    """
    from evsys_bus.config import build_adapter

    if subscription.instance is not None:
        return subscription.instance
    assert subscription.adapter_ref is not None
    return build_adapter(subscription.adapter_ref)


def _quote_non_yaml(text: str) -> str:
    """Quote a value that is not valid YAML, such as ``out_path={run_dir}/metrics.csv``."""
    from evsys_bus.config.yaml_nodes import compose
    from evsys_bus.errors import DocumentError

    key, _, value = text.partition("=")
    try:
        compose(value, "--set", single_value=True)
    except DocumentError:
        return f"{key}={msgspec.json.encode(value).decode()}"
    return text


def _point_to_option(error: Any, params: "Document") -> None:
    """Make a config error point to the command line option instead of a position in the generated spec."""
    from evsys_bus.errors import Location

    path = "" if error.where is None else error.where.path
    inside = path.startswith(f"{_SPEC_PATH}.params.")
    error.where = params.where(f"${path.removeprefix(f'{_SPEC_PATH}.params')}") if inside else None
    if isinstance(error.where, Location) and error.where.line is not None:
        error.where = None  # the param was not given, so there is no text to point to
    error.fix = re.sub(r"^add (\w+): ", r"add --set \1=", error.fix)
