"""Checking the parameters of a callback that is constructed by hand as strictly as those that come from a config."""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from evsys_bus.errors import WrongParamError

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
