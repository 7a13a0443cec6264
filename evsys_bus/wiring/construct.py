"""One adapter from its class and its params: checked, and constructed. Its author's code runs behind a wall."""

from typing import Any

from evsys_bus.callback import Callback
from evsys_bus.errors import ConfigError, Where
from evsys_bus.sink import Sink
from evsys_bus.wiring.params import check_params
from evsys_bus.wiring.registry import Registry
from evsys_bus.wiring.report import callback_subject, param_errors
from evsys_bus.wiring.spec import AdapterClass, CallbackSpec, join


def check_arguments(
    cls: AdapterClass, spec: CallbackSpec, path: str, registry: Registry
) -> tuple[dict[str, Any], list[ConfigError]]:
    """The keyword arguments that a spec's params become, or what is wrong with them, or missing for the adapter.

    Any: they are the adapter's own.

    Raises:
        BrokenAdapterError: Its Config raised (chained).
    """
    place = join(path, "params")
    try:
        arguments, findings = check_params(cls, spec.params)
        wrong: list[ConfigError] = []
        if findings:
            subject = callback_subject(spec.kind, cls)
            wrong = param_errors(subject, spec.params, findings, lambda path: join(place, *path))
    except Exception as error:  # a wall: a Config is its author's code, and may raise anything while it validates
        raise registry.broken(spec.kind, error, Where(place)) from error
    return arguments, [*_lacking(spec.kind, path, registry), *wrong]


def _lacking(kind: str, path: str, registry: Registry) -> list[ConfigError]:
    """What the kind needs and is not installed, before its constructor, in whichever process, would find out."""
    missing = registry.missing(kind)
    if not missing:
        return []
    cause = ModuleNotFoundError(f"{' and '.join(missing)} not installed", name=missing[0])
    error = registry.broken(kind, cause, Where(join(path, "kind")))
    error.__cause__ = cause
    return [error]


def construct(
    kind: str, cls: AdapterClass, arguments: dict[str, Any], label: str, path: str, registry: Registry
) -> Callback | Sink:
    """The adapter, called by its label. Any: the arguments are the adapter's own.

    Raises:
        BrokenAdapterError: Its constructor raised (chained).
    """
    try:
        adapter = cls(**arguments)
    except Exception as error:  # a wall: whatever a constructor raises is that adapter's fault
        raise registry.broken(kind, error, Where(path)) from error
    try:
        adapter.spec_name = label
    except AttributeError:
        pass  # slots or frozen: it is called by its class's name then
    return adapter
