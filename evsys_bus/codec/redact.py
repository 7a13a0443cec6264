"""Redact credentials in configurations before they are recorded."""

from typing import Any, Final, cast

REDACTED: Final = "<redacted>"

_SECRET_WORDS: Final = frozenset(
    {"apikey", "auth", "credential", "credentials", "key", "passwd", "password", "secret", "token"}
)
_CREDENTIAL_ENDINGS: Final = (
    *("api_key", "apikey", "access_key", "secret_key", "private_key", "secret", "password", "passwd"),
    *("credential", "credentials", "token", "auth", "authorization"),
)
CONFIG_KEYS: Final = frozenset({"config", "run_config"})
"""Values under these keys are searched for credentials."""


def is_secret_key(key: object, extra_keys: frozenset[str] = frozenset()) -> bool:
    """Whether a key, or its last word (``wandb_api_key``), names a credential."""
    name = str(key).lower()
    return name in extra_keys or name.replace("-", "_").rpartition("_")[2] in _SECRET_WORDS


def has_credential(params: object) -> bool:
    """Whether built-in data has a text under a key that can only be a credential's; ``sort_key`` is not one."""
    if isinstance(params, dict):
        return any(
            (isinstance(value, str) and str(key).lower().replace("-", "_").endswith(_CREDENTIAL_ENDINGS))
            or has_credential(value)
            for key, value in cast("dict[str, object]", params).items()
        )
    return isinstance(params, list) and any(map(has_credential, cast("list[object]", params)))


def has_config(plain: Any) -> bool:
    """Whether built-in data holds a configuration for `redact_configs` to search."""
    values = plain
    if type(plain) is dict:
        if not CONFIG_KEYS.isdisjoint(plain):  # pyright: ignore[reportUnknownArgumentType] - untyped
            return True
        values = cast("dict[str, Any]", plain).values()
    elif type(plain) is not list:
        return False
    return any((type(each) is dict or type(each) is list) and has_config(each) for each in values)


def redact_configs(plain: Any, extra_keys: frozenset[str] = frozenset()) -> dict[str, str]:
    """Redact the text under keys that name a credential, in place, in every ``config`` and ``run_config``.

    Args:
        plain: Built-in data without cycles, such as `evsys_bus.codec.to_builtins` returns.
        extra_keys: Further keys, in lower case.

    Returns:
        Path -> reason, in the form that `to_builtins` returns.
    """
    replaced: dict[str, str] = {}
    _redact(plain, "", extra_keys, replaced, in_config=False)
    return replaced


def _redact(value: Any, path: str, extra_keys: frozenset[str], replaced: dict[str, str], *, in_config: bool) -> None:
    if isinstance(value, list):
        for index, item in enumerate(cast("list[Any]", value)):
            _redact(item, f"{path}[{index}]", extra_keys, replaced, in_config=in_config)
    elif isinstance(value, dict):
        entries = cast("dict[str, Any]", value)
        for key, item in entries.items():
            item_path = f"{path}.{key}" if path else key
            if in_config and isinstance(item, str | bytes) and is_secret_key(key, extra_keys):
                entries[key] = REDACTED
                replaced[item_path] = "it looks like a credential"
            else:
                _redact(item, item_path, extra_keys, replaced, in_config=in_config or key in CONFIG_KEYS)
