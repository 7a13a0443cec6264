"""Validate the params of one adapter and construct it; errors of the adapter's own code are wrapped."""

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
    """Convert the params of a spec to keyword arguments; return them, and errors of params and missing packages.

    Raises:
        BrokenAdapterError: The adapter's Config raised (chained).
    """
    place = join(path, "params")
    try:
        arguments, findings = check_params(cls, spec.params)
        wrong: list[ConfigError] = []
        if findings:
            subject = callback_subject(spec.kind, cls)
            wrong = param_errors(subject, spec.params, findings, lambda path: join(place, *path))
    except Exception as error:  # isolation: a Config may run its author's code, which may raise anything
        raise registry.broken(spec.kind, error, Where(place)) from error
    return arguments, [*_lacking(spec.kind, path, registry), *wrong]


def _lacking(kind: str, path: str, registry: Registry) -> list[ConfigError]:
    """Report missing packages of the kind now, before its constructor fails, perhaps in another process."""
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
    """Construct an adapter and set its name to the label.

    Raises:
        BrokenAdapterError: Its constructor raised (chained).
    """
    try:
        adapter = cls(**arguments)
    except Exception as error:  # isolation: a constructor may raise anything
        raise registry.broken(kind, error, Where(path)) from error
    try:
        adapter.spec_name = label
    except AttributeError:
        pass  # slots or frozen: the name of its class is used
    return adapter
