"""Redact credentials in configurations before they are recorded."""

from typing import Any, Final, cast

REDACTED: Final = "<redacted>"

_ENDINGS: Final = frozenset(
    {"apikey", "auth", "credential", "credentials", "key", "passwd", "password", "secret", "token"}
)
_SURELY_SECRET: Final = (
    *("api_key", "apikey", "access_key", "secret_key", "private_key", "secret", "password", "passwd"),
    *("credential", "credentials", "token", "auth", "authorization"),
)
CONFIGS: Final = frozenset({"config", "run_config"})
"""Values under these keys are searched for credentials."""


def looks_secret(key: object, also: frozenset[str] = frozenset()) -> bool:
    """Whether a key, or its last word (``wandb_api_key``), names a credential."""
    name = str(key).lower()
    return name in also or name.replace("-", "_").rpartition("_")[2] in _ENDINGS


def holds_credential(params: object) -> bool:
    """Whether built-in data has a text under a key that can only be a credential's; ``sort_key`` is not one."""
    if isinstance(params, dict):
        return any(
            (isinstance(value, str) and str(key).lower().replace("-", "_").endswith(_SURELY_SECRET))
            or holds_credential(value)
            for key, value in cast("dict[str, object]", params).items()
        )
    return isinstance(params, list) and any(map(holds_credential, cast("list[object]", params)))


def has_config(plain: Any) -> bool:
    """Whether built-in data holds a configuration for `redact_configs` to search."""
    values = plain
    if type(plain) is dict:
        if not CONFIGS.isdisjoint(plain):  # pyright: ignore[reportUnknownArgumentType] - untyped
            return True
        values = cast("dict[str, Any]", plain).values()
    elif type(plain) is not list:
        return False
    return any((type(each) is dict or type(each) is list) and has_config(each) for each in values)


def redact_configs(plain: Any, also: frozenset[str] = frozenset()) -> dict[str, str]:
    """Redact the text under keys that name a credential, in place, in every ``config`` and ``run_config``.

    Args:
        plain: Built-in data without cycles, such as `evsys_bus.codec.to_plain` returns.
        also: Further keys, in lower case.

    Returns:
        Path -> reason, in the form that `to_plain` returns.
    """
    replaced: dict[str, str] = {}
    _search(plain, "", also, replaced, inside=False)
    return replaced


def _search(value: Any, path: str, also: frozenset[str], replaced: dict[str, str], *, inside: bool) -> None:
    if isinstance(value, list):
        for index, each in enumerate(cast("list[Any]", value)):
            _search(each, f"{path}[{index}]", also, replaced, inside=inside)
    elif isinstance(value, dict):
        entries = cast("dict[str, Any]", value)
        for key, each in entries.items():
            place = f"{path}.{key}" if path else key
            if inside and isinstance(each, str | bytes) and looks_secret(key, also):
                entries[key] = REDACTED
                replaced[place] = "it looks like a credential"
            else:
                _search(each, place, also, replaced, inside=inside or key in CONFIGS)
