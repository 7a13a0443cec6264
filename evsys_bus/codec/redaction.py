"""Redaction: what looks like a credential in a configuration never reaches a record."""

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
"""What is under these keys is searched."""


def looks_secret(key: object, also: frozenset[str] = frozenset()) -> bool:
    """Whether a key's last word (``wandb_api_key``), or the key itself, is one of a credential."""
    name = str(key).lower()
    return name in also or name.replace("-", "_").rpartition("_")[2] in _ENDINGS


def holds_credential(params: object) -> bool:
    """Whether plain data has a text under a key that can only be a credential's; ``sort_key`` is none."""
    if isinstance(params, dict):
        return any(
            (isinstance(value, str) and str(key).lower().replace("-", "_").endswith(_SURELY_SECRET))
            or holds_credential(value)
            for key, value in cast("dict[str, object]", params).items()
        )
    return isinstance(params, list) and any(map(holds_credential, cast("list[object]", params)))


def has_config(plain: Any) -> bool:
    """Whether there is anything in plain data for `redact_configs` to search. Any: plain data."""
    values = plain
    if type(plain) is dict:
        if not CONFIGS.isdisjoint(plain):  # pyright: ignore[reportUnknownArgumentType] - as found
            return True
        values = cast("dict[str, Any]", plain).values()
    elif type(plain) is not list:
        return False
    return any((type(each) is dict or type(each) is list) and has_config(each) for each in values)


def redact_configs(plain: Any, also: frozenset[str] = frozenset()) -> dict[str, str]:
    """Replace the text under such keys, in place, in every ``config`` and ``run_config`` of plain data.

    Args:
        plain: As `evsys_bus.codec.to_plain` makes it; it ends somewhere.
        also: Further keys, in lower case.

    Returns:
        Path -> why, as `to_plain` returns it.
    """
    replaced: dict[str, str] = {}
    _search(plain, "", also, replaced, inside=False)
    return replaced


def _search(value: Any, path: str, also: frozenset[str], replaced: dict[str, str], *, inside: bool) -> None:
    if isinstance(value, list):
        for index, each in enumerate(cast("list[Any]", value)):  # Any: plain data
            _search(each, f"{path}[{index}]", also, replaced, inside=inside)
    elif isinstance(value, dict):
        entries = cast("dict[str, Any]", value)  # Any: as above
        for key, each in entries.items():
            place = f"{path}.{key}" if path else key
            if inside and isinstance(each, str | bytes) and looks_secret(key, also):
                entries[key] = REDACTED
                replaced[place] = "it looks like a credential"
            else:
                _search(each, place, also, replaced, inside=inside or key in CONFIGS)
