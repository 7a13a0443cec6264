"""Validation of parameters passed to a callback's constructor, as strict as validation of config files."""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Final, TypeVar

import msgspec

from evsys_bus.errors import SettingError, WrongParamError
from evsys_bus.location import local_path

_BRACES: Final = re.compile(r"\{[^{}]*\}|[{}]")

ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)


def validate_params(config: type[ConfigT], params: Mapping[str, object]) -> ConfigT:
    """Convert the parameters to their ``Config``.

    Raises:
        WrongParamError: A parameter has the wrong type or is out of range.
    """
    try:
        return msgspec.convert(params, config)
    except msgspec.ValidationError as error:
        fields = ", ".join(config.__struct_fields__)
        raise WrongParamError(
            f"{config.__name__.removesuffix('Config')}: {error}",
            fix=f"see the docstrings of {config.__module__}.{config.__name__}; it has: {fields}",
        ) from None


def require_package(adapter: str, package: str, extra: str) -> None:
    """Check that a package is installed, without importing it; ``extra`` is the extra of evsys-bus that has it.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if find_spec(package) is None:
        raise ModuleNotFoundError(f'{adapter} needs {package}; pip install "evsys-bus[{extra}]"', name=package)


def as_list(names: Iterable[str] | None) -> object:
    """Return names as a list for `validate_params`; a single string is returned unchanged, and is rejected there."""
    return names if names is None or isinstance(names, str | bytes) else list(names)


def check_placeholders(text: str, name: str, known: Sequence[str]) -> None:
    """Reject unknown placeholders and unmatched braces, in the ``__post_init__`` of a Config.

    Args:
        text: The value of the parameter.
        name: The parameter.
        known: The allowed placeholders, including their braces.

    Raises:
        ValueError: There is another placeholder, or a single brace.
    """
    unknown = [found for found in _BRACES.findall(text) if found not in known]
    if unknown:
        what = f"{unknown[0]} is not a placeholder; the placeholders are {', '.join(known)}"
        raise ValueError(f"{what}, and other braces are not allowed{_location(name)}")


def check_local_path(
    text: str, name: str, known: Sequence[str] = (), *, absolute_placeholder: str | None = None
) -> None:
    """Reject a text that is not a local path, in the ``__post_init__`` of a Config; includes `check_placeholders`.

    Args:
        text: The value of the parameter.
        name: The parameter.
        known: The allowed placeholders, including their braces.
        absolute_placeholder: A placeholder that expands to an absolute path when the text begins with it.

    Raises:
        ValueError: It is a URL, has an unknown placeholder, or names the home directory of an unknown user.
    """
    check_placeholders(text, name, known)
    if absolute_placeholder is None or not text.startswith(absolute_placeholder):
        try:
            local_path(text, name)
        except SettingError as error:
            raise ValueError(f"{error.why or error.what}: {error.fix}{_location(name)}") from error


def _location(name: str) -> str:
    """Format the location as msgspec does, so that an error in a file shows the line."""
    return f" - at `$.{name}`"
