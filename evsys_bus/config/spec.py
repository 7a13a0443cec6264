"""`CallbackSpec`, an entry in a list of callbacks, for callbacks and sinks; parsing of specs and of JSON paths.

This module does not check whether the kind exists and the params are valid.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, cast, get_args

import msgspec

from evsys_bus.adapter import Ranks
from evsys_bus.callback import Callback
from evsys_bus.delivery.subscription import DeliveryPolicy, OnFailure, normalize_ranks
from evsys_bus.errors import BadSpecError, ConfigError, ConfigErrors, Location, did_you_mean
from evsys_bus.sink import Sink

AdapterClass = type[Callback] | type[Sink]
"""The class of a kind."""

Placement = Literal["inline", "follow"]
"""Where a callback runs: ``inline`` in ``publish`` with live objects, ``follow`` off the loop, from the journal."""

PathPart = str | int
"""A key or an index; ``"..."`` is a key that the validator does not report."""

_EXAMPLE: Final = "{kind: print_progress, params: {every: 10}}"
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_][\w-]*")
_PATH_STEP: Final = re.compile(
    r"""\.(?P<key>[^.\[\]="\s]+)|\[(?P<index>[0-9]{1,9})\]|\[(?P<quoted>"(?:[^"\\]|\\.)*")\]|\[\.\.\.\]"""
)


class CallbackSpec(msgspec.Struct, frozen=True):
    """Describes a callback or a sink to build.

    Example:
        >>> CallbackSpec("print_progress", {"every": 10}).label
        'print_progress'
    """

    kind: str
    """Its name in the registry."""
    params: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    """Keyword arguments of the adapter, defined by its Config."""
    name: str | None = None
    """Key of its cursor and counters. Default: the kind, numbered if there are several."""
    placement: Placement | None = None
    """Where it runs. Default: the placement of its class."""
    ranks: Ranks | msgspec.UnsetType | None = msgspec.UNSET
    """Which ranks of a job it serves: ``rank0``, ``all`` (or null), or a list. Default: the ranks of its class."""
    on_failure: OnFailure = "count"
    """How an event is handled when a hook raises. This and the following fields are only for placement ``follow``."""
    required: bool = False
    """Stop the run if its delivery ends permanently, or is parked."""
    stop_after_seconds: float | None = None
    """Stop the run after its delivery has failed for this long."""
    max_staleness_seconds: float | None = None
    """Stop the run when the oldest pending event is this old."""

    @property
    def label(self) -> str:
        """The name, or the kind if there is no name."""
        return self.name or self.kind

    def delivery_policy(self, cls: AdapterClass) -> DeliveryPolicy:
        """Return the delivery policy for placement ``follow``."""
        ranks = (
            normalize_ranks(cls.ranks, (0,))
            if self.ranks is msgspec.UNSET
            else normalize_ranks(self.ranks or "all", None)
        )
        return DeliveryPolicy(
            ranks, self.on_failure, self.required, self.stop_after_seconds, self.max_staleness_seconds
        )


def join_path(path: str, *parts: PathPart) -> str:
    """Append parts to a JSON path: ``join("$.callbacks", 1, "kind")`` is ``$.callbacks[1].kind``."""
    for part in parts:
        if isinstance(part, int) or part == "...":
            path = f"{path}[{part}]"
        elif _PLAIN_KEY.fullmatch(part):
            path = f"{path}.{part}"
        else:
            path = f"{path}[{msgspec.json.encode(part).decode()}]"
    return path


def display_path(path: Iterable[PathPart]) -> str:
    """Return a path as errors show it: ``callbacks[1].kind``, without the leading ``$.``."""
    return join_path("$", *path).removeprefix("$").removeprefix(".")


def split_path(path: str) -> tuple[PathPart, ...]:
    """Split a JSON path into its parts; the inverse of `join_path`.

    Raises:
        ValueError: It is not a valid path.
    """
    parts: list[PathPart] = []
    position = 1
    while position < len(path):
        step = _PATH_STEP.match(path, position)
        if step is None:
            raise ValueError(f"{path!r:.100} is not a path: see character {position}")
        if step["index"] is not None:
            parts.append(int(step["index"]))
        elif step["quoted"] is not None:
            try:
                parts.append(msgspec.json.decode(step["quoted"], type=str))
            except msgspec.DecodeError as error:
                raise ValueError(f"{path!r:.100} is not a path: {error}") from None
        else:
            parts.append(step["key"] or "...")
        position = step.end()
    return tuple(parts)


def combine_errors(errors: list[ConfigError]) -> ConfigError:
    """Return a single error itself, and several errors as one `ConfigErrors`."""
    return errors[0] if len(errors) == 1 else ConfigErrors(errors)


def individual_errors(error: ConfigError) -> tuple[ConfigError, ...]:
    """Return the single errors of a `ConfigErrors`; the inverse of `combine_errors`."""
    return error.errors if isinstance(error, ConfigErrors) else (error,)


def read_spec(item: object, path: str) -> CallbackSpec:
    """Read a `CallbackSpec`, a mapping, or any object with ``kind`` (and ``params``, ``name``, ``placement``).

    Raises:
        BadSpecError: It is none of these, or has an unknown key; several as `ConfigErrors`.
    """
    known = CallbackSpec.__struct_fields__
    errors: list[ConfigError] = []
    if isinstance(item, Mapping):
        item = cast("Mapping[Any, Any]", item)  # checked below
        found = {str(key): value for key, value in item.items()}
        errors.extend(_unknown_key_error(key, path) for key in found if key not in known)
    else:
        found = {} if isinstance(item, type) else {key: getattr(item, key) for key in known if hasattr(item, key)}
    if "kind" not in found:
        errors.insert(0, _missing_kind_error(item, path))
        raise combine_errors(errors)

    for key in known:
        expected, is_valid = _CHECKS[key]
        if key in found and not is_valid(found[key]):
            what = f'"{key}" of a callback spec must be {expected}, not {type(found[key]).__name__} {found[key]!r:.60}'
            errors.append(BadSpecError(what, where=Location(join_path(path, key)), fix=f"write it like {_EXAMPLE}"))
    if errors:
        raise combine_errors(errors)
    fields = {key: found[key] for key in known if key in found}
    fields["params"] = dict(found.get("params") or {})
    if isinstance(found.get("ranks"), list):
        fields["ranks"] = tuple(found["ranks"])
    return CallbackSpec(**fields)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_ranks(value: object) -> bool:
    ranks = cast("list[object]", value)
    return value in (None, msgspec.UNSET, "rank0", "all") or (
        isinstance(value, list | tuple) and bool(ranks) and all(type(each) is int and each >= 0 for each in ranks)
    )


def _is_seconds(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0)


_CHECKS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "kind": ("a string that is not empty", _is_text),
    "params": ("a mapping", lambda value: isinstance(value or {}, Mapping)),
    "name": ("a string that is not empty", lambda value: value is None or _is_text(value)),
    "placement": ('"inline" or "follow"', lambda value: value is None or value in get_args(Placement)),
    "ranks": ('"rank0", "all" or a list of ranks, such as [0, 1]', _is_ranks),
    "on_failure": ('"count", "dead" or "retry"', lambda value: value in get_args(OnFailure)),
    "required": ("true or false", lambda value: isinstance(value, bool)),
    "stop_after_seconds": ("a number of seconds above 0", _is_seconds),
    "max_staleness_seconds": ("a number of seconds above 0", _is_seconds),
}
"""Key -> description of a valid value, and the check of a value."""


def _unknown_key_error(key: str, path: str) -> BadSpecError:
    hint = did_you_mean(key, CallbackSpec.__struct_fields__)
    fix = f"{hint}   the callback's own parameters go under params: {{{key}: ...}}"
    return BadSpecError(f'a callback spec has no key "{key}"', where=Location(join_path(path, key)), fix=fix)


def _missing_kind_error(item: object, path: str) -> BadSpecError:
    if isinstance(item, type):
        what, fix = f"{item.__name__} is a class, not a callback spec", f"give an instance, or a spec: {_EXAMPLE}"
    elif isinstance(item, Mapping):
        what, fix = 'a callback spec needs a "kind"', f"write it like {_EXAMPLE}   all kinds: evsys-bus adapters"
    else:
        what = f"{type(item).__name__} {item!r:.60} is not a callback spec"
        fix = f"give a spec ({_EXAMPLE}) or an instance of a subclass of Callback or Sink"
    return BadSpecError(what, where=Location(path), fix=fix)
