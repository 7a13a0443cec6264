"""Deliveries of a bus: which adapters couriers deliver to, where the couriers run, and how they start and finish.

An adapter works where its class declares, however it reached the bus. Followed adapters that can be rebuilt are
delivered to by a separate process; those that cannot, by threads of this one that work in short slices; the delivery
half of an inline adapter by a task on the program's own loop. Couriers and bus share the journal directory and nothing
else.
"""

import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec

from evsys_bus.attached import Adapter
from evsys_bus.bus.closing import Closing
from evsys_bus.bus.guard import Guard
from evsys_bus.bus.news import News
from evsys_bus.callback import Callback, callback_name
from evsys_bus.codec import error_text
from evsys_bus.delivery.followed import CarriedSink, Followed, Recipe, ranks_of
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import SettingError
from evsys_bus.journal import JournalWriter
from evsys_bus.sink import Sink, check_sink
from evsys_bus.tasks import Deadline, DeliveryStatus, Receipt, TaskOffice

if TYPE_CHECKING:  # at run time they are imported where something is followed
    from evsys_bus.delivery.accounts import Accounts
    from evsys_bus.delivery.crew import Crew
    from evsys_bus.delivery.process import CourierProcess
    from evsys_bus.delivery.roster import Posted

Couriers = Literal["process", "thread"]
"""Where couriers run: in a separate process, or on threads of this one."""
Place = Literal["process", "thread", "loop"]
"""Where the courier of one adapter runs; ``loop``: as a task on the program's own event loop."""
Placement = Literal["inline", "follow"]
"""Inside publish, or off the loop."""

SLICE_SECONDS: Final = 0.0002
"""How long a courier thread works before it yields to the loop's thread."""
REGISTER_SECONDS: Final = 1.0
"""Interval of retries to register an adapter on disk."""
LOOK_SECONDS: Final = 0.1
"""Interval of checks of the couriers while they finish."""
LOOP_POLL_SECONDS: Final = 0.05
"""How often a courier on the program's own loop polls the journal."""
_STUCK: Final = ("parked", "failed")
STOP_SECONDS: Final = 0.5
"""How long courier threads may take to end after the deadline; one that its adapter blocks is abandoned."""


class Following:
    """Starts, observes and finishes the deliveries of one bus.

    Args:
        callbacks: The callbacks given to the bus.
        sinks: The sinks given to the bus.
        couriers: Where the couriers run.
        linger_seconds: How long the courier process may continue after the bus is closed or its process has died.
        rank: Rank of this process.

    Raises:
        SettingError: Two adapters have the same name.
        HookError: A hook, or a method of a sink, could never be called.
        BadSpecError: A callback that may stop the run is to be followed.
    """

    def __init__(
        self,
        callbacks: Iterable[object],
        sinks: Iterable[Sink | Followed],
        couriers: Couriers,
        linger_seconds: float,
        rank: int,
    ) -> None:
        given = tuple(callbacks)
        self._rank = rank
        self._followed: tuple[Followed, ...] = ()
        self._objects: list[object] = []
        """Live objects that are followed, or whose delivery half is."""
        inline = tuple(each for each in (*given, *sinks) if self._take(each, (*given, *sinks)))
        _check_names(self._followed)
        self._couriers: Couriers = couriers
        self._linger_seconds = linger_seconds
        self._directory = ""
        self._temporary = False
        self._accounts: Accounts | None = None
        self._last: Callable[[], dict[str, int]] = dict[str, int]
        self._serving: tuple[Followed, ...] = ()
        self._posted: list[Posted] = []
        self._faults = FaultLog(every_seconds=60.0)
        self._unregistered: tuple[Followed, ...] = ()
        """Subscriptions that the disk has not accepted yet."""
        self._register_due = 0.0
        self._lock = threading.Lock()  # guards reading the progress files
        self._reader = 0
        """Identifier of the thread that is reading them, or 0."""
        self._last_read: list[DeliveryStatus] = []
        self._owed: dict[str, DeliveryStatus] = {}
        """Status of inline callbacks with unconfirmed events."""
        self._earlier: dict[str, DeliveryStatus] = {}
        """Statuses found at the start: their failures are not counted for this bus."""
        self._process: CourierProcess | None = None
        self._crews: list[Crew] = []
        self._news: News | None = None
        self._guard = Guard([each for each in self._followed if each.terms.stops])
        self.inline: Final[tuple[object, ...]] = (*inline, *([self._guard] if self._guard.watched else []))
        """The inline callbacks in order, and the guard if one is needed."""

    def _take(self, given: object, beside: tuple[object, ...]) -> bool:
        """Subscribe the adapter or its delivery half; return whether its hooks run inline."""
        if isinstance(given, Followed):
            self._objects.append(given.live)
            self._followed += (_checked(given),)
            return False
        if isinstance(given, Sink | CarriedSink):
            self._subscribe(given)
            return False
        if not isinstance(given, Callback):
            return True
        half, placement = given.delivery, placement_of(given)
        if half is None and placement == "follow":
            self._subscribe(given)
            return False
        ranks = _ranks_of(given)
        if ranks is not None and self._rank not in ranks:
            log().info("callback.other_rank", callback=callback_name(given), ranks=ranks, rank=self._rank)
            return False
        if half is not None and not any(_is_live(each, half) for each in beside):
            self._subscribe(given)
        return True

    def _subscribe(self, adapter: Callback | Sink) -> None:
        self._objects.append(adapter.sink if isinstance(adapter, CarriedSink) else adapter)
        known: Followed | None = getattr(adapter, "evsys_subscription", None)
        if known is None:
            from evsys_bus.wiring.followed import subscription_of

            target = adapter.sink if isinstance(adapter, CarriedSink) else adapter
            known = subscription_of(target, self._name_for(target))
            try:
                adapter.spec_name = known.name  # its logs and tasks use the name of its deliveries
            except AttributeError:
                pass  # slots or frozen
        if isinstance(adapter, Callback) and adapter.delivery is not None and not isinstance(adapter, CarriedSink):
            known = msgspec.structs.replace(known, here=placement_of(adapter) == "inline")
        self._followed += (known,)

    def _name_for(self, adapter: Callback | Sink) -> str:
        """Return the kind, with a number if it is taken, or else the name of the class."""
        if adapter.spec_name or not adapter.name:
            return adapter.spec_name or type(adapter).__name__
        taken = {each.name for each in self._followed}
        names = itertools.chain([adapter.name], (f"{adapter.name}_{number}" for number in itertools.count(2)))
        return next(each for each in names if each not in taken)

    def delivers_to(self, given: object) -> bool:
        """Return whether this very object, or its delivery half, is delivered to."""
        return given is not None and any(each is given for each in self._objects)

    def __bool__(self) -> bool:
        return bool(self._followed)

    @property
    def uses_loop(self) -> bool:
        """Whether some courier is a task on the program's own loop."""
        return any(crew.on_program_loop for crew in self._crews)

    def temporary_journal(self) -> str:
        """Create a journal directory if something is followed but none was given; removed once all is delivered."""
        self._temporary = True
        self._directory = directory = tempfile.mkdtemp(prefix="evsys-bus-")
        log().info("journal.temporary", directory=directory, why="something is followed, and no journal was given")
        return directory

    def register(self, journal: JournalWriter) -> None:
        """Register the adapters on disk, and make retention wait for them, before the first event is published.

        If the disk refuses, `look_after` tries again once a second; retention waits all the same.

        Args:
            journal: The opened journal of the bus.
        """
        from evsys_bus.delivery.roster import strike_off

        directory = journal.directory
        strike_off(directory, {each.name for each in self._followed}, self._rank)
        if not self._followed:
            return
        self._directory = directory
        self._serving = tuple(
            each for each in self._followed if each.terms.ranks is None or self._rank in each.terms.ranks
        )
        for each in self._followed:
            if each not in self._serving:
                fix = "ranks: all (or a list that holds it) has it deliver the events of other ranks too"
                log().info("delivery.other_rank", adapter=each.name, ranks=each.terms.ranks, rank=self._rank, fix=fix)
        self._earlier = self._statuses_before()
        journal.wait_for(each.name for each in self._serving)
        self._unregistered = self._serving
        self._register()

    def _register(self) -> None:
        """Register the adapters that are not registered on disk yet."""
        from evsys_bus.delivery.roster import enlist

        refused = enlist(self._directory, self._unregistered)
        self._unregistered = tuple(each for each in self._unregistered if each.name in refused)
        self._register_due = time.monotonic() + REGISTER_SECONDS

    def start(self, last: Callable[[], dict[str, int]], office: TaskOffice) -> None:
        """Start the couriers, if anything is followed.

        Args:
            last: Returns the stream of this process and the sequence of its last event; empty if there are gaps.
            office: Runs couriers that are tasks on the program's loop.
        """
        if not self._followed:
            return
        from evsys_bus.delivery.accounts import Accounts
        from evsys_bus.delivery.roster import posted

        directory = self._directory
        self._accounts = Accounts(directory)
        self._last = last
        self._posted = posted(self._serving)
        places = self.places()
        at = {place: [each for each in self._serving if places[each.name] == place] for place in get_args(Place)}
        if at["process"]:
            from evsys_bus.delivery.process import CourierProcess

            self._news = News(directory, [each.name for each in at["process"]])
            self._process = CourierProcess(directory, at["process"], linger_seconds=self._linger_seconds)
            self._process.start(enlists=False)
        if at["thread"] or at["loop"]:
            from evsys_bus.delivery.crew import Crew

            crew = partial(Crew, directory, build=self._build, slice_seconds=SLICE_SECONDS)
            self._crews += [crew(at["thread"])] if at["thread"] else []
            self._crews += [crew(at["loop"], office=office, poll_seconds=LOOP_POLL_SECONDS)] if at["loop"] else []
            for each in self._crews:
                each.start(enlists=False)

    def _statuses_before(self) -> dict[str, DeliveryStatus]:
        from evsys_bus.delivery.states import read_state
        from evsys_bus.journal import OsDisk

        found = ((each.name, read_state(OsDisk(), self._directory, each.name)) for each in self._serving)
        return {name: status for name, status in found if status is not None}

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Record how many events an inline callback has unconfirmed; 0 clears the entry."""
        from evsys_bus.delivery.retry import owed_of

        name = callback_name(adapter)
        events, why, fix = owed_of(events, why, fix)
        if events:
            status = DeliveryStatus(name, recorded=events, delivered=events, owed=events)
            self._owed[name] = msgspec.structs.replace(status, error=why, fix=fix, owed_fix=fix)
        else:
            self._owed.pop(name, None)

    @property
    def owes(self) -> bool:
        """Whether an inline callback has unconfirmed events."""
        return bool(self._owed)

    def look_after(self) -> None:
        """Check the deliveries; called periodically on the watchdog's thread."""
        if self._unregistered and time.monotonic() >= self._register_due:
            self._try("delivery.not_registered", self._register)
        if self._news is not None:
            self._try("couriers.unreadable", self._news.look)
        self._try("delivery.not_judged", self._judge)

    def _judge(self) -> None:
        if self._guard.is_due() and self._accounts is not None:
            self._guard.judge(self._read(), gave_up=self._process is not None and self._process.gave_up)

    def places(self) -> dict[str, Place]:
        """Return where the courier of each adapter runs."""
        return {
            each.name: "loop" if each.here else "thread" if each.recipe is None else self._couriers
            for each in self._followed
        }

    def deliveries(self) -> tuple[DeliveryStatus, ...]:
        """Return the status of each delivery, then of inline callbacks with unconfirmed events."""
        elsewhere = [
            DeliveryStatus(each.name, state="other_rank", fix=f"rank {(each.terms.ranks or (0,))[0]} delivers to it")
            for each in self._followed
            if each not in self._serving and self._accounts is not None
        ]
        return (*(() if self._accounts is None else self._read()), *elsewhere, *tuple(self._owed.values()))

    def _read(self) -> "list[DeliveryStatus]":
        """Return the status of each delivery. Never raises: what cannot be read is reported as unknown."""
        assert self._accounts is not None
        if self._reader == threading.get_ident():  # in a signal handler that interrupted this read
            return self._last_read
        with self._lock:
            self._reader = threading.get_ident()
            try:
                self._last_read = self._read_now()
            except Exception as error:  # isolated: another program or a bad disk may have changed the files
                self._faults.warn("delivery.unknown", self._directory, error=error, journal=self._directory)
                refusal = error if isinstance(error, OSError) else OSError(error_text(error))
                self._last_read = [self._accounts.unknown(each.name, refusal) for each in self._serving]
            finally:
                self._reader = 0
            return self._last_read

    def _read_now(self) -> "list[DeliveryStatus]":
        assert self._accounts is not None
        names = {each.name for each in self._serving}
        found = [each for each in self._accounts.read(self._last()) if each.name in names]
        if (refusal := self._accounts.unreadable) is not None:
            self._faults.warn("delivery.unknown", self._directory, error=refusal, journal=self._directory)
            names -= {each.name for each in found}
            return [*found, *(self._accounts.unknown(name, refusal) for name in sorted(names))]
        absent = [each for each in self._serving if each.name not in {known.name for known in found}]
        found += [self._accounts.unbooked(each.name, each.terms) for each in absent]
        return [_since(each, self._earlier.get(each.name)) for each in found]

    def _try(self, phrase: str, act: Callable[[], object]) -> None:
        """Run the action; an exception is logged and suppressed."""
        try:
            act()
        except Exception as error:  # isolated: one failed check must not prevent the others
            self._faults.warn(phrase, self._directory, error=error, journal=self._directory)

    def finish(self, receipt: Receipt, deadline: Deadline, closing: Closing, *, loop_runs: bool) -> Receipt:
        """Close inline callbacks, finish the deliveries, and return the receipt with their status.

        What is pending then stays in the journal. The courier process may continue for its grace period.

        Args:
            receipt: The receipt so far.
            deadline: How long this may take.
            closing: Closes the inline callbacks.
            loop_runs: Whether the loop of the bus is running; otherwise no courier on it can finish.
        """
        if self._process is not None:
            self._process.finish(deadline.left())
        for crew in self._crews:
            crew.finish(deadline.at)
        closing.start(deadline)
        ended = self._wait_for_couriers(deadline, loop_runs=loop_runs)
        closing.join()
        if self._directory:
            from evsys_bus.delivery.roster import post_again

            self._try("delivery.not_posted", lambda: post_again(self._directory, self._posted))
        if self._news is not None:
            self._try("couriers.unreadable", partial(self._news.look, last=True))
        told = self.told(receipt)
        for each in told.deliveries if not ended else ():
            if each.is_known and each.busy and not each.pending and not each.owed:
                meaning = "all was delivered, but its shutdown has not finished"
                log().warning("delivery.not_ended", adapter=each.name, why=each.error, meaning=meaning)
        if told.finish is not None:
            self._tell(told.deliveries, told.finish)
        elif (
            self._temporary and ended and all(each.complete for each in told.deliveries if each.name not in self._owed)
        ):
            shutil.rmtree(self._directory, ignore_errors=True)
        self._faults.flush()
        return told

    def _wait_for_couriers(self, deadline: Deadline, *, loop_runs: bool) -> bool:
        """Wait until all couriers have ended, time is up, or no more progress is possible; return whether all ended."""
        crews = [crew for crew in self._crews if loop_runs or not crew.on_program_loop]
        while not (ended := self._have_ended(crews, LOOK_SECONDS)) and deadline.left():
            if not self._some_may_yet_take_events():
                break
        if not ended:
            for crew in self._crews:
                crew.stop()
            for crew in crews:
                crew.join(STOP_SECONDS)
        return ended and len(crews) == len(self._crews)

    def told(self, receipt: Receipt) -> Receipt:
        """Return the receipt with the current status of each delivery."""
        deliveries = self.deliveries()
        due = any(each.pending or each.owed or not each.is_known for each in deliveries if each.name not in self._owed)
        finish = f"evsys-bus sync {self._directory}" if due else None
        return msgspec.structs.replace(receipt, deliveries=deliveries, finish=finish)

    def _have_ended(self, crews: "Sequence[Crew]", wait_seconds: float) -> bool:
        """Wait briefly for the couriers; return whether all have ended."""
        end = time.monotonic() + wait_seconds
        process = self._process is None or self._process.wait(wait_seconds)
        return all([crew.join(max(0.0, end - time.monotonic())) for crew in crews]) and process  # noqa: C419 # each

    def _some_may_yet_take_events(self) -> bool:
        """Return False if everything pending is for parked adapters or for adapters that cannot be built."""
        pending = [each for each in self._read() if each.pending or not each.is_known]
        return not pending or any(each.state not in _STUCK for each in pending)

    def _tell(self, deliveries: tuple[DeliveryStatus, ...], command: str) -> None:
        pending: dict[str, int | str] = {each.name: each.pending for each in deliveries if each.pending}
        pending |= {each.name: "unknown" for each in deliveries if not each.is_known}
        owed = {f"{each.name}_owed": each.owed for each in deliveries if each.owed}
        goes_on = self._linger_seconds if self._process is not None and self._process.alive else 0
        log().warning("delivery.pending", **pending, **owed, lingers_seconds=goes_on, fix=command)

    def _build(self, recipe: Recipe) -> Callback | Sink:
        """Build an adapter in this process; its recipe was made together with a way to build it."""
        build = next(each.build for each in self._followed if each.recipe is recipe)
        assert build is not None
        return build()


def placement_of(callback: Callback) -> Placement:
    """Return where a callback, or its delivery half, works: as set on the object, else on its class.

    A delivery half is followed by default.

    Raises:
        SettingError: The value is neither of the two.
    """
    kinds = itertools.takewhile(lambda kind: kind is not Callback, type(callback).__mro__)
    declared = any("placement" in vars(each) for each in (callback, *kinds) if hasattr(each, "__dict__"))
    placement = callback.placement if declared or callback.delivery is None else "follow"
    if placement not in get_args(Placement):
        raise SettingError(
            f"placement of {callback_name(callback)} is {placement!r:.80}",
            fix='write "inline" (in publish, with live objects) or "follow" (off the loop, from the journal)',
        )
    return placement


def _ranks_of(callback: Callback) -> tuple[int, ...] | None:
    """Return the ranks on which its hooks run; None for all."""
    known: Followed | None = callback.evsys_subscription
    if callback.delivery is not None:  # both halves on the same ranks
        return ranks_of(callback.ranks, (0,)) if known is None else known.terms.ranks
    return ranks_of(callback.ranks, None)


def _is_live(given: object, half: type) -> bool:
    """Return whether this is a sink of that class that was given on its own."""
    return isinstance(given.live if isinstance(given, Followed) else given, half)


def _since(status: DeliveryStatus, earlier: DeliveryStatus | None) -> DeliveryStatus:
    """Return the status with only the failures that were added since an earlier one."""
    if earlier is None or not status.is_known:
        return status
    failures = {
        name: max(0, getattr(status, name) - getattr(earlier, name)) for name in ("hook_failures", "task_failures")
    }
    last = status.last_failure if any(failures.values()) else None
    return msgspec.structs.replace(status, **failures, last_failure=last)


def _checked(given: Followed) -> Followed:
    if isinstance(given.live, Sink):
        check_sink(given.live)
    return given


def _check_names(followed: tuple[Followed, ...]) -> None:
    names = [each.name for each in followed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(
            f'two followed adapters are called "{twice}"',
            why="the name keys an adapter's cursor and counts",
            fix='name one of them: name: ... in its spec, or follow(adapter, "..."); give one object once',
        )
