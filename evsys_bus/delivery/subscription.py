"""`Subscription`: an adapter that couriers deliver to, with the policy of its delivery."""

from collections.abc import Callable, Collection
from typing import Any, Final, Literal, cast

import msgspec

from evsys_bus.adapter import Ranks, Rewindable
from evsys_bus.callback import Callback
from evsys_bus.errors import SettingError
from evsys_bus.sink import Sink

OnFailure = Literal["count", "dead", "retry"]
"""What happens to an event when a followed hook raises: ``count`` the failure and continue, as inline (the event is
delivered); make the event a ``dead`` letter; or ``retry`` a few times with growing pauses before that."""


def normalize_ranks(ranks: Ranks | None, default: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Convert the setting to a tuple of ranks; None means all ranks.

    Args:
        ranks: The value in a class, an object or a spec.
        default: Returned if ``ranks`` is None.

    Raises:
        SettingError: The value is invalid.
    """
    if ranks is None:
        return default
    given = cast("object", ranks)  # user input: may be anything
    if isinstance(given, str) and given in _NAMED_RANKS:
        return _NAMED_RANKS[given]
    if isinstance(given, Collection) and not isinstance(given, str) and given:
        chosen = tuple(cast("Collection[object]", given))
        if all(type(each) is int and each >= 0 for each in chosen):
            return cast("tuple[int, ...]", chosen)
    raise SettingError(f"ranks is {ranks!r:.80}", fix='write "rank0", "all", or the ranks themselves: (0, 2)')


_NAMED_RANKS: Final[dict[str, tuple[int, ...] | None]] = {"rank0": (0,), "all": None}


class AdapterRef(msgspec.Struct, frozen=True, rename={"has_credentials": "private"}):
    """How to build an adapter again, in another process or at a later time."""

    kind: str
    """Name of the adapter's class in the registry."""
    params: dict[str, Any] = {}
    """Parameters, as the adapter's Config defines them."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, which register the kind."""
    half: Literal["whole", "delivery"] = "whole"
    """For an adapter with two halves, the courier builds the delivery half."""
    has_credentials: bool = False
    """Whether the params contain a credential from the program's code; then they are not written to any file."""
    environment: dict[str, Any] = {}
    """Params from the program's environment, for a process whose environment does not have them. No secrets."""


class DeliveryPolicy(msgspec.Struct, frozen=True):
    """The settings of one delivery."""

    ranks: tuple[int, ...] | None = (0,)
    """The ranks whose streams are delivered; None means all."""
    on_failure: OnFailure = "count"
    required: bool = False
    """Stop the run if the delivery fails for good or is parked."""
    stop_after_seconds: float | None = None
    """Stop the run once the delivery has been failing for this long."""
    max_staleness_seconds: float | None = None
    """Stop the run once the delivery has been behind for this long."""

    @property
    def can_stop_run(self) -> bool:
        """Whether the delivery can stop the run."""
        return self.required or self.stop_after_seconds is not None or self.max_staleness_seconds is not None


class Subscription(msgspec.Struct, frozen=True):
    """An adapter that is followed: rebuilt from a recipe in the courier process, or an object of this process."""

    name: str
    """Identifies its cursor, counts and lock."""
    adapter_ref: AdapterRef | None = None
    instance: Callback | Sink | None = None
    """The object itself, if there is no recipe or another process cannot use it."""
    build: Callable[[], Callback | Sink] | None = None
    """Builds the adapter from its recipe in this process, for a bus whose couriers are threads."""
    policy: DeliveryPolicy = DeliveryPolicy()
    on_program_loop: bool = False
    """Whether to deliver on the program's own event loop, in a task of the bus."""


class SinkCallback(Callback):
    """Wraps a sink for a list of callbacks: it has no hooks, and the bus delivers to the sink."""

    def __init__(self, sink: Sink) -> None:
        self.sink: Final = sink
        self.spec_name = sink.spec_name
        self.delivery = type(sink)  # pyright: ignore[reportAttributeAccessIssue] # a ClassVar, set per object here


def adapter_kind(adapter: object) -> str:
    """Identify the kind of an adapter: its registered name, or its class's name if it is `Rewindable`, or "".

    Distinguishes it from another adapter that had the same name in an earlier run.
    """
    kind: object = getattr(type(adapter), "name", None)
    if isinstance(kind, str) and kind:
        return kind
    return type(adapter).__name__ if isinstance(adapter, Rewindable) else ""
