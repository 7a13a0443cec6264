"""The adapter that a command line selects: ``--to KIND``, its params, and the plugin modules that register it."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click
import msgspec

if TYPE_CHECKING:
    from evsys_bus.callback import Callback
    from evsys_bus.config.yaml_nodes import Document
    from evsys_bus.delivery.subscription import Subscription
    from evsys_bus.sink import Sink

_CommandT = TypeVar("_CommandT", bound=Callable[..., Any])
_SPEC_PATH: Final = "$.callbacks[0]"


def adapter_options(command: _CommandT) -> _CommandT:
    """Add ``--to`` (argument ``kind``), ``--set`` (``sets``) and ``--plugin`` (``plugins``) to a command."""
    for option in (
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
    ):
        command = option(command)
    return command


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
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
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
