"""Checking the parameters of a callback that is constructed by hand as strictly as those that come from a config."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeVar

import msgspec

from evsys_bus.errors import SettingError, WrongParamError
from evsys_bus.where import local_path

_BRACES: Final = re.compile(r"\{[^{}]*\}|[{}]")

ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)


def checked(config: type[ConfigT], params: Mapping[str, object]) -> ConfigT:
    """The parameters as their ``Config``.

    Raises:
        WrongParamError: One of them has the wrong type or lies out of range.
    """
    try:
        return msgspec.convert(params, config)
    except msgspec.ValidationError as error:
        fields = ", ".join(config.__struct_fields__)
        raise WrongParamError(
            f"{config.__name__.removesuffix('Config')}: {error}",
            fix=f"see the docstrings of {config.__module__}.{config.__name__}; it has: {fields}",
        ) from None


def listed(names: Iterable[str] | None) -> object:
    """Names as a list, for `checked`, which takes no other sequence; one text alone stays one, and is refused there."""
    return names if names is None or isinstance(names, str | bytes) else list(names)


def check_placeholders(text: str, name: str, known: Sequence[str]) -> None:
    """Refuse braces that stand for nothing, in the ``__post_init__`` of a Config.

    Args:
        text: The value of the param.
        name: The param.
        known: The placeholders that it may have, with their braces.

    Raises:
        ValueError: There are others, or a single brace.
    """
    strange = [found for found in _BRACES.findall(text) if found not in known]
    if strange:
        what = f"{strange[0]} stands for nothing; the placeholders are {', '.join(known)}"
        raise ValueError(f"{what}, and other braces are not allowed{_at(name)}")


def check_local_path(text: str, name: str, known: Sequence[str] = (), *, whole: str | None = None) -> None:
    """Refuse what is no path on this machine, in the ``__post_init__`` of a Config; else as `check_placeholders`.

    Args:
        text: As there.
        name: As there.
        known: As there.
        whole: A placeholder that stands for an absolute path, where the text begins with it.

    Raises:
        ValueError: It is a URL, has an unknown placeholder, or names the home directory of nobody.
    """
    check_placeholders(text, name, known)
    if whole is None or not text.startswith(whole):
        try:
            local_path(text, name)
        except SettingError as error:
            raise ValueError(f"{error.why or error.what}: {error.fix}{_at(name)}") from error


def _at(name: str) -> str:
    """The place as msgspec writes it, so that an error in a file shows the line."""
    return f" - at `$.{name}`"
