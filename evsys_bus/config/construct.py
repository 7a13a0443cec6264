"""Validate the params of one adapter and construct it; errors of the adapter's own code are wrapped."""

from typing import Any

from evsys_bus.callback import Callback
from evsys_bus.config.issue_report import callback_context, param_errors
from evsys_bus.config.registry import Registry
from evsys_bus.config.spec import AdapterClass, CallbackSpec, join_path
from evsys_bus.config.validate import check_params
from evsys_bus.errors import ConfigError, Location
from evsys_bus.sink import Sink


def check_arguments(
    cls: AdapterClass, spec: CallbackSpec, path: str, registry: Registry
) -> tuple[dict[str, Any], list[ConfigError]]:
    """Convert the params of a spec to keyword arguments; return them, and errors of params and missing packages.

    Raises:
        BrokenAdapterError: The adapter's Config raised (chained).
    """
    params_path = join_path(path, "params")
    try:
        arguments, issues = check_params(cls, spec.params)
        issue_errors: list[ConfigError] = []
        if issues:
            context = callback_context(spec.kind, cls)
            issue_errors = param_errors(context, spec.params, issues, lambda path: join_path(params_path, *path))
    except Exception as error:  # isolation: a Config may run its author's code, which may raise anything
        raise registry.broken_adapter_error(spec.kind, error, Location(params_path)) from error
    return arguments, [*_missing_package_errors(spec.kind, path, registry), *issue_errors]


def _missing_package_errors(kind: str, path: str, registry: Registry) -> list[ConfigError]:
    """Report missing packages of the kind now, before its constructor fails, perhaps in another process."""
    missing = registry.uninstalled_packages(kind)
    if not missing:
        return []
    cause = ModuleNotFoundError(f"{' and '.join(missing)} not installed", name=missing[0])
    error = registry.broken_adapter_error(kind, cause, Location(join_path(path, "kind")))
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
        raise registry.broken_adapter_error(kind, error, Location(path)) from error
    try:
        adapter.spec_name = label
    except AttributeError:
        pass  # slots or frozen: the name of its class is used
    return adapter
