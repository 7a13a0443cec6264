"""Redaction: what looks like a credential in a configuration never reaches a record."""

from typing import Any, Final, cast

from evsys_bus.codec.plain import Plain

REDACTED: Final = "<redacted>"

_ENDINGS: Final = frozenset(
    {"apikey", "auth", "credential", "credentials", "key", "passwd", "password", "secret", "token"}
)
_CONFIGS: Final = frozenset({"config", "run_config"})


def looks_secret(key: object, also: frozenset[str] = frozenset()) -> bool:
    """Whether a key's last word (``wandb_api_key``), or the key itself, is one of a credential."""
    name = str(key).lower()
    return name in also or name.replace("-", "_").rpartition("_")[2] in _ENDINGS


def redact_configs(plain: Plain, also: frozenset[str] = frozenset()) -> dict[str, str]:
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


def _search(value: Plain, path: str, also: frozenset[str], replaced: dict[str, str], *, inside: bool) -> None:
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
                _search(each, place, also, replaced, inside=inside or key in _CONFIGS)
