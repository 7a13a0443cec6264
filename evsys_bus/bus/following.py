"""The couriers of a bus: who is followed, started with the bus, asked to finish with it, and what came of it.

What can be built again is delivered to by a process of its own; what cannot, by threads of this one that work in
slices. The journal's directory is all that they and the bus have in common.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from evsys_bus.bus.guard import Guard
from evsys_bus.bus.news import News
from evsys_bus.callback import Callback, callback_name
from evsys_bus.delivery.followed import Followed, Recipe
from evsys_bus.diagnostics import log
from evsys_bus.errors import SettingError
from evsys_bus.sink import Sink, check_sink, sink_name
from evsys_bus.tasks import Delivery, Draining, Receipt

if TYPE_CHECKING:  # at run time they are imported where something is followed
    from evsys_bus.delivery.accounts import Account, Accounts
    from evsys_bus.delivery.crew import Crew
    from evsys_bus.delivery.process import CourierProcess
    from evsys_bus.delivery.roster import Posted

Couriers = Literal["process", "thread"]
"""Where couriers work: in a process of their own, or all of them on threads of this one."""

SLICE_SECONDS: Final = 0.0002
"""How long a courier's thread works before it lets the loop's go on."""
LOOK_SECONDS: Final = 0.1
"""Between two looks at how couriers fare, while they finish."""
_STUCK: Final = ("parked", "failed")
STOP_SECONDS: Final = 0.5
"""What couriers on threads get to end once the deadline has passed; one that an adapter blocks is left behind."""


class Following:
    """Those who are followed, of what a bus was given.

    Args:
        callbacks: As the bus was given them.
        sinks: Likewise.
        couriers: Where they work.
        linger_seconds: How long the courier process may go on once the bus is closed, or its process dead.

    Raises:
        SettingError: Two of them have the same name.
        SinkMethodError: A sink has a method that could never be called.
    """

    def __init__(
        self, callbacks: Iterable[object], sinks: Iterable[Sink | Followed], couriers: Couriers, linger_seconds: float
    ) -> None:
        given = tuple(callbacks)
        self._followed = tuple(map(_followed, (*(each for each in given if isinstance(each, Followed | Sink)), *sinks)))
        _check_names(self._followed)
        for each in given:
            tell_if_half_used(each, self._followed)
        self._couriers: Couriers = couriers
        self._linger_seconds = linger_seconds
        self._directory = ""
        self._temporary = False
        self._accounts: Accounts | None = None
        self._last: Callable[[], dict[str, int]] = dict[str, int]
        self._serving: tuple[Followed, ...] = ()
        self._posted: list[Posted] = []
        self._lock = threading.Lock()  # over the accounts
        self._process: CourierProcess | None = None
        self._crew: Crew | None = None
        self._news: News | None = None
        self._guard = Guard([each for each in self._followed if each.terms.stops])
        self.inline: Final[tuple[object, ...]] = (
            *(each for each in given if not isinstance(each, Followed | Sink)),
            *([self._guard] if self._guard.watched else []),
        )
        """The others, in their order, and the guard if one is needed."""

    def __bool__(self) -> bool:
        return bool(self._followed)

    def temporary_journal(self) -> str:
        """A directory for a journal that nobody asked for, but that followers need; it goes when all is delivered."""
        self._temporary = True
        directory = tempfile.mkdtemp(prefix="evsys-bus-")
        log().info("journal.temporary", directory=directory, why="something is followed, and no journal was given")
        return directory

    def start(self, directory: str, rank: int, last: Callable[[], dict[str, int]]) -> None:
        """Begin to deliver what is recorded there, if anybody is followed; and note who is not any more.

        Args:
            directory: The journal.
            rank: Of this process; who serves other ranks only is delivered to by theirs.
            last: The stream that this process writes, and the sequence of its last event; none where there are gaps.
        """
        from evsys_bus.delivery.roster import posted, strike_off

        strike_off(directory, {each.name for each in self._followed}, rank)
        if not self._followed:
            return
        from evsys_bus.delivery.accounts import Accounts

        self._directory = directory
        self._accounts = Accounts(directory)
        self._last = last
        self._serving = tuple(each for each in self._followed if each.terms.ranks is None or rank in each.terms.ranks)
        self._posted = posted(self._serving)
        places = self.places()
        apart = [each for each in self._serving if places[each.name] == "process"]
        here = [each for each in self._serving if places[each.name] == "thread"]
        if apart:
            from evsys_bus.delivery.process import CourierProcess

            self._process = CourierProcess(directory, apart, linger_seconds=self._linger_seconds)
            self._process.start()
            self._news = News(directory, [each.name for each in apart])
        if here:
            from evsys_bus.delivery.crew import Crew

            self._crew = Crew(directory, here, self._build, slice_seconds=SLICE_SECONDS)
            self._crew.start()

    def look_after(self) -> None:
        """Now and then, off every thread that matters: tell the log, and the guard, how the deliveries fare."""
        if self._news is not None:
            self._news.look()
        if self._guard.is_due() and self._accounts is not None:
            self._guard.judge(self._read(), gave_up=self._process is not None and self._process.gave_up)

    def places(self) -> dict[str, Couriers]:
        """Where each is delivered to."""
        places: dict[str, Couriers] = {}
        for each in self._followed:
            places[each.name] = "thread" if each.recipe is None or each.here else self._couriers
        return places

    def deliveries(self) -> tuple[Delivery, ...]:
        """How far each has got."""
        if self._accounts is None:
            return ()
        return tuple(
            Delivery(each.name, each.recorded, each.delivered, each.dead, each.pending, each.trouble)
            for each in self._read()
        )

    def _read(self) -> "list[Account]":
        assert self._accounts is not None
        names = {each.name for each in self._serving}
        with self._lock:
            found = [each for each in self._accounts.read(self._last()) if each.name in names]
            absent = [each for each in self._serving if each.name not in {known.name for known in found}]
            return found + [self._accounts.unbooked(each.name, each.terms) for each in absent]

    def finish(self, receipt: Receipt, seconds: float) -> Draining:
        """Have all that is recorded delivered, waiting at most so long; the receipt then says how far that got.

        What is pending then stays in the journal. The process goes on for as long as it lingers.
        """
        finishing = Draining()

        def finish() -> None:
            try:
                finishing.set_result(self._finish(receipt, seconds))
            except BaseException as error:  # a wall: whoever waits for the receipt is told
                finishing.set_exception(error)

        try:
            threading.Thread(target=finish, name="evsys-bus-finish", daemon=True).start()
        except RuntimeError:  # the program ends, and Python starts no thread any more: whoever leaves does it itself
            finish()
        return finishing

    def _finish(self, receipt: Receipt, seconds: float) -> Receipt:
        from evsys_bus.delivery.roster import post_again

        began = time.monotonic()
        if self._process is not None:
            self._process.finish(seconds)
        if self._crew is not None:
            self._crew.finish()
        while not (ended := self._have_ended(LOOK_SECONDS)) and time.monotonic() < began + seconds:
            if not self._some_may_yet_take_events():
                break
        if self._crew is not None and not ended:
            self._crew.stop()
            self._crew.join(STOP_SECONDS)
        post_again(self._directory, self._posted)
        if self._news is not None:
            self._news.look(last=True)
        told = self.told(receipt)
        if told.finish is not None:
            self._tell(told.deliveries, told.finish)
        elif self._temporary and ended and not any(each.dead for each in told.deliveries):
            shutil.rmtree(self._directory, ignore_errors=True)
        return msgspec.structs.replace(told, seconds=receipt.seconds + time.monotonic() - began)

    def told(self, receipt: Receipt) -> Receipt:
        """The receipt, with how far each delivery has got by now."""
        deliveries = self.deliveries()
        pending = any(each.pending for each in deliveries)
        finish = f"evsys-bus sync {self._directory}" if pending else None
        return msgspec.structs.replace(receipt, deliveries=deliveries, finish=finish)

    def _have_ended(self, wait_seconds: float) -> bool:
        """Whether all couriers have; waits a little for them."""
        process = self._process is None or self._process.wait(wait_seconds)
        return (self._crew is None or self._crew.join(0.0 if self._process is not None else wait_seconds)) and process

    def _some_may_yet_take_events(self) -> bool:
        """Whether waiting may help: not where all that is pending is parked, or for an adapter that cannot be built."""
        pending = [each for each in self._read() if each.pending]
        return not pending or any(each.state is None or each.state.state not in _STUCK for each in pending)

    def _tell(self, deliveries: tuple[Delivery, ...], command: str) -> None:
        pending = {each.name: each.pending for each in deliveries if each.pending}
        goes_on = self._linger_seconds if self._process is not None and self._process.alive else 0
        log().warning("delivery.pending", **pending, lingers_seconds=goes_on, fix=command)

    def _build(self, recipe: Recipe) -> Callback | Sink:
        """The adapter, in this process; whoever made the recipe gave a way."""
        build = next(each.build for each in self._followed if each.recipe is recipe)
        assert build is not None
        return build()


def tell_if_half_used(callback: object, followed: Iterable[Followed] = ()) -> None:
    """Log what a live callback does not do, because it was given to a bus as it is: what its class has off the loop.

    One that was built from a spec runs where that says, with its halves.

    Args:
        callback: Runs inline.
        followed: Among them its delivery half may be.
    """
    if not isinstance(callback, Callback) or callback.spec_name:
        return
    name = callback_name(callback)
    if callback.delivery is not None:
        if any(isinstance(each.live, callback.delivery) for each in followed):
            return
        half = callback.delivery.__name__
        fix = f"build it from a spec (build_callbacks), or give its half to the bus as well: sinks=[{half}(...)]"
        log().warning("callback.half_not_delivered", callback=name, half=half, fix=fix)
    elif callback.placement == "follow":
        fix = (
            "give follow(callback), or build it from a spec (build_callbacks); where inline is meant, say so: "
            'callback.placement = "inline"'
        )
        log().warning("callback.runs_inline", callback=name, why='its class says placement = "follow"', fix=fix)


def _followed(given: Followed | Sink) -> Followed:
    sink = given.live if isinstance(given, Followed) else given
    if isinstance(sink, Sink):
        check_sink(sink)
    return given if isinstance(given, Followed) else Followed(sink_name(given), live=given)


def _check_names(followed: tuple[Followed, ...]) -> None:
    names = [each.name for each in followed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(
            f'two followed adapters are called "{twice}"',
            why="the name keys an adapter's cursor and counts",
            fix='give one of them a name of its own: name="..."',
        )
