"""`Followed`: an adapter that couriers deliver to, and how its delivery is meant to go."""

from collections.abc import Callable, Collection
from typing import Any, Final, Literal, cast

import msgspec

from evsys_bus.attached import Ranks
from evsys_bus.callback import Callback
from evsys_bus.delivery.receiver import Rewindable
from evsys_bus.errors import SettingError
from evsys_bus.sink import Sink

OnFailure = Literal["count", "dead", "retry"]
"""What a followed hook that raises means for its event: ``count`` it and go on, as inline (the event is delivered);
make it ``dead``, a dead letter; or ``retry`` it a few times with growing pauses, and make it a dead letter then."""


def ranks_of(ranks: Ranks | None, default: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The ranks as a tuple; None for all of them.

    Args:
        ranks: As a class, an object or a spec says.
        default: Where that is None.

    Raises:
        SettingError: It is something else.
    """
    if ranks is None:
        return default
    given = cast("object", ranks)  # people write what they like
    if isinstance(given, str) and given in _NAMED_RANKS:
        return _NAMED_RANKS[given]
    if isinstance(given, Collection) and not isinstance(given, str) and given:
        chosen = tuple(cast("Collection[object]", given))
        if all(type(each) is int and each >= 0 for each in chosen):
            return cast("tuple[int, ...]", chosen)
    raise SettingError(f"ranks is {ranks!r:.80}", fix='write "rank0", "all", or the ranks themselves: (0, 2)')


_NAMED_RANKS: Final[dict[str, tuple[int, ...] | None]] = {"rank0": (0,), "all": None}


class Recipe(msgspec.Struct, frozen=True):
    """How an adapter is built again, in another process or on another day."""

    kind: str
    """Its name in the registry."""
    params: dict[str, Any] = {}
    """Any: the adapter's Config says what they are."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, which register the kind."""
    half: Literal["whole", "delivery"] = "whole"
    """Of an adapter with two halves, the courier builds the delivery half."""
    private: bool = False
    """Whether its params hold a credential that a program gave in its code: then it stands in no file."""
    environment: dict[str, Any] = {}
    """Params that the environment of the program gave, for a process whose environment gives none. No secrets."""


class Terms(msgspec.Struct, frozen=True):
    """How a delivery is meant to go."""

    ranks: tuple[int, ...] | None = (0,)
    """Of which ranks' streams; None means all."""
    on_failure: OnFailure = "count"
    required: bool = False
    """Stop the run if its delivery ends for good, or is parked."""
    stop_after_seconds: float | None = None
    """Stop the run once its delivery has failed for so long."""
    max_staleness_seconds: float | None = None
    """Stop the run once the delivery has not caught up for so long."""

    @property
    def stops(self) -> bool:
        """Whether there is a case in which the run must stop."""
        return self.required or self.stop_after_seconds is not None or self.max_staleness_seconds is not None


class Followed(msgspec.Struct, frozen=True):
    """An adapter that is followed: built again from a recipe in the courier process, or live, on a thread."""

    name: str
    """Keys its cursor, its counts and its lock."""
    recipe: Recipe | None = None
    live: Callback | Sink | None = None
    """Where there is no recipe, or where it cannot be used from another process."""
    build: Callable[[], Callback | Sink] | None = None
    """Builds it by its recipe in this process, for a bus whose couriers are threads."""
    terms: Terms = Terms()
    here: bool = False
    """Deliver on the program's own event loop, by a task of the bus, wherever the others are delivered to."""


class CarriedSink(Callback):
    """A sink in a list of callbacks: it has no hooks, and a bus delivers to the sink."""

    def __init__(self, sink: Sink) -> None:
        self.sink: Final = sink
        self.spec_name = sink.spec_name
        self.delivery = type(sink)  # pyright: ignore[reportAttributeAccessIssue] # of a class it is; here of one object


def kind_of(adapter: object) -> str:
    """What tells it from another adapter of the same name: its kind, or, where it leaves marks, its class's name.

    Of a live object that leaves none nothing is told: its name says who it is.
    """
    kind: object = getattr(type(adapter), "name", None)
    if isinstance(kind, str) and kind:
        return kind
    return type(adapter).__name__ if isinstance(adapter, Rewindable) else ""
