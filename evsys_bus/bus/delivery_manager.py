"""Deliveries of a bus: which adapters couriers deliver to, where the couriers run, and how they start and finish.

An adapter works where its class declares, however it reached the bus. Followed adapters that can be rebuilt are
delivered to by a separate process; those that cannot, by threads of this one that work in short slices; the delivery
half of an inline adapter by a task on the program's own loop. Couriers and bus share the journal directory and nothing
else.
"""

import itertools
import math
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec

from evsys_bus.adapter import Adapter
from evsys_bus.bus.delivery_log import DeliveryLog
from evsys_bus.bus.health import CourierLocation, HookHealth
from evsys_bus.bus.lifecycle import CallbackCloser
from evsys_bus.callback import Callback, callback_name
from evsys_bus.codec import error_text
from evsys_bus.context import LoopState, TrainingBatch
from evsys_bus.delivery.subscription import AdapterRef, SinkCallback, Subscription, normalize_ranks
from evsys_bus.diagnostics import FaultLog, log
from evsys_bus.errors import SettingError
from evsys_bus.journal import JournalWriter
from evsys_bus.sink import Sink, check_sink
from evsys_bus.tasks import Deadline, DeliveryStatus, Receipt, TaskManager

if TYPE_CHECKING:  # at run time they are imported where something is followed
    from evsys_bus.delivery.courier_pool import CourierPool
    from evsys_bus.delivery.progress import ProgressReader
    from evsys_bus.delivery.supervisor import Supervisor

Couriers = Literal["process", "thread"]
"""Where couriers run: in a separate process, or on threads of this one."""
Placement = Literal["inline", "follow"]
"""Inside publish, or off the loop."""

SLICE_SECONDS: Final = 0.0002
"""How long a courier thread works before it yields to the loop's thread."""
REGISTER_RETRY_SECONDS: Final = 1.0
"""Interval of retries to register an adapter on disk."""
POLL_SECONDS: Final = 0.1
"""Interval of checks of the couriers while they finish."""
LOOP_POLL_SECONDS: Final = 0.05
"""How often a courier on the program's own loop polls the journal."""
_STUCK_STATES: Final = ("parked", "failed")
COURIER_STOP_SECONDS: Final = 0.5
"""How long courier threads may take to end after the deadline; one that its adapter blocks is abandoned."""
HOOK_TIMES_SECONDS: Final = 30.0
"""Interval at which the times of hooks are written, if they have changed."""
FIRST_HOOK_TIMES_SECONDS: Final = 5.0
"""The same for the first time."""
CHECK_INTERVAL_SECONDS: Final = 1.0
"""Interval of checks of the deliveries."""


class FailurePolicy(Callback):
    """An inline callback that stops a run whose deliveries fail beyond what their policy allows.

    Only inline code ever stops a run. The hook reads one attribute; the watchdog's thread reads the files.
    """

    spec_name = "delivery_guard"

    def __init__(self, watched: Sequence[Subscription]) -> None:
        self.watched: Final = {each.name: each.policy for each in watched}
        self.reason: str | None = None
        """Why the run must stop; None while it may continue."""
        self._next_check_at = 0.0
        self._failing_since: dict[str, float] = {}
        self._snapshots: dict[str, deque[tuple[float, int]]] = {}
        """Time of each check and the events recorded by then; removed once those events are delivered."""

    def on_step_end(self, state: LoopState, step_idx: int, batch: TrainingBatch, metrics: dict[str, float]) -> None:
        """Request the stop, if there is a reason."""
        del step_idx, batch, metrics
        if self.reason is not None and not state.stop_requested:
            log().warning("delivery.stops_run", why=self.reason)
            state.request_stop(self.reason)
            state.stopped_early = True

    def is_due(self) -> bool:
        """Return whether it is time to check the deliveries again."""
        return bool(self.watched) and self.reason is None and time.monotonic() >= self._next_check_at

    def check(self, statuses: Sequence[DeliveryStatus], *, gave_up: bool) -> None:
        """Check the deliveries and set `reason` if the run must stop.

        Args:
            statuses: Their current statuses.
            gave_up: Whether the courier process has ended for good.
        """
        now = time.monotonic()
        self._next_check_at = now + CHECK_INTERVAL_SECONDS
        for status in statuses:
            # An unreadable status is unknown: it counts neither as failing nor as recovered.
            if status.name in self.watched and self.reason is None and status.is_known:
                self.reason = self._stop_reason(status, now, gave_up=gave_up)

    def _stop_reason(self, status: DeliveryStatus, now: float, *, gave_up: bool) -> str | None:
        name, policy = status.name, self.watched[status.name]
        suffix = "" if status.error is None else f": {status.error}"
        blocked = status.owed > 0 and status.owed_fix is not None  # a person has to act
        stuck = gave_up or blocked or status.state in {"parked", "failed"}
        if policy.required and stuck:
            return f'"{name}" is required, and is not delivered to{suffix}'
        failing_seconds = self._failing_seconds(name, now, stuck or status.state == "retrying")
        if policy.stop_after_seconds is not None and failing_seconds > policy.stop_after_seconds:
            return f'"{name}" has failed for {failing_seconds:.0f} s{suffix}'
        stale_seconds = self._stale_seconds(status, now)
        if policy.max_staleness_seconds is not None and stale_seconds > policy.max_staleness_seconds:
            return f'"{name}" has not caught up for {stale_seconds:.0f} s ({status.pending:,} events pending){suffix}'
        return None

    def _failing_seconds(self, name: str, now: float, is_failing: bool) -> float:
        """Return for how many seconds it has failed, by this process's clock: others may be set, or restart."""
        if not is_failing:
            self._failing_since.pop(name, None)
            return 0.0
        return now - self._failing_since.setdefault(name, now)

    def _stale_seconds(self, status: DeliveryStatus, now: float) -> float:
        """Return how many seconds ago all events delivered by now were recorded; 0 if nothing is pending."""
        snapshots = self._snapshots.setdefault(status.name, deque())
        done = status.delivered + status.dead
        while snapshots and snapshots[0][1] <= done:
            snapshots.popleft()
        if status.pending:
            snapshots.append((now, status.recorded))
        return now - snapshots[0][0] if snapshots else 0.0


class DeliveryManager:
    """Starts, observes and finishes the deliveries of one bus.

    Args:
        callbacks: The callbacks given to the bus.
        sinks: The sinks given to the bus.
        couriers: Where the couriers run.
        grace_seconds: How long the courier process may continue after the bus is closed or its process has died.
        rank: Rank of this process.

    Raises:
        SettingError: Two adapters have the same name.
        HookError: A hook, or a method of a sink, could never be called.
        BadSpecError: A callback that may stop the run is to be followed.
    """

    def __init__(
        self,
        callbacks: Iterable[object],
        sinks: Iterable[Sink | Subscription],
        couriers: Couriers,
        grace_seconds: float,
        rank: int,
    ) -> None:
        given = tuple(callbacks)
        self._rank = rank
        self._subscriptions: tuple[Subscription, ...] = ()
        self._live_objects: list[object] = []
        """Live objects that are followed, or whose delivery half is."""
        inline = tuple(each for each in (*given, *sinks) if self._accept(each, (*given, *sinks)))
        names = [each.name for each in self._subscriptions]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        if duplicate is not None:
            raise SettingError(
                f'two followed adapters are called "{duplicate}"',
                why="the name keys an adapter's cursor and counts",
                fix='name one of them: name: ... in its spec, or follow(adapter, "..."); give one object once',
            )
        self._couriers: Couriers = couriers
        self._grace_seconds = grace_seconds
        self._directory = ""
        self._is_temporary = False
        self._progress: ProgressReader | None = None
        self._last_sequences: Callable[[], dict[str, int]] = dict[str, int]
        self._rank_subscriptions: tuple[Subscription, ...] = ()
        self._faults = FaultLog(every_seconds=60.0)
        self._unregistered: tuple[Subscription, ...] = ()
        """Subscriptions that the disk has not accepted yet."""
        self._next_register_at = 0.0
        self._lock = threading.Lock()  # guards reading the progress files
        self._reading_thread = 0
        """Identifier of the thread that is reading them, or 0."""
        self._last_statuses: list[DeliveryStatus] = []
        self._unconfirmed: dict[str, DeliveryStatus] = {}
        """Status of inline callbacks with unconfirmed events."""
        self._previous_statuses: dict[str, DeliveryStatus] = {}
        """Statuses found at the start: their failures are not counted for this bus."""
        self._supervisor: Supervisor | None = None
        self._courier_pools: list[CourierPool] = []
        self._delivery_log: DeliveryLog | None = None
        self._hook_health: Callable[[], Sequence[HookHealth]] = tuple[HookHealth, ...]
        self._written_hooks: Sequence[HookHealth] = ()
        self._hook_times_due = math.inf
        self._failure_policy = FailurePolicy([each for each in self._subscriptions if each.policy.can_stop_run])
        self.inline: Final[tuple[object, ...]] = (
            *inline,
            *([self._failure_policy] if self._failure_policy.watched else []),
        )
        """The inline callbacks in order, and the guard if one is needed."""

    def _accept(self, adapter: object, all_given: tuple[object, ...]) -> bool:
        """Subscribe the adapter or its delivery half; return whether its hooks run inline."""
        if isinstance(adapter, Subscription):
            self._live_objects.append(adapter.instance)
            if isinstance(adapter.instance, Sink):
                check_sink(adapter.instance)
            self._subscriptions += (adapter,)
            return False
        if isinstance(adapter, Sink | SinkCallback):
            self._subscribe(adapter)
            return False
        if not isinstance(adapter, Callback):
            return True
        delivery_class, placement = adapter.delivery, placement_of(adapter)
        if delivery_class is None and placement == "follow":
            self._subscribe(adapter)
            return False
        ranks = _ranks_of(adapter)
        if ranks is not None and self._rank not in ranks:
            log().info("callback.other_rank", callback=callback_name(adapter), ranks=ranks, rank=self._rank)
            return False
        if delivery_class is not None and not any(_is_live_sink(each, delivery_class) for each in all_given):
            self._subscribe(adapter)
        return True

    def _subscribe(self, adapter: Callback | Sink) -> None:
        self._live_objects.append(adapter.sink if isinstance(adapter, SinkCallback) else adapter)
        subscription: Subscription | None = getattr(adapter, "evsys_subscription", None)
        if subscription is None:
            from evsys_bus.config.subscription_builder import subscription_for

            target = adapter.sink if isinstance(adapter, SinkCallback) else adapter
            subscription = subscription_for(target, self._choose_name(target))
            try:
                adapter.spec_name = subscription.name  # its logs and tasks use the name of its deliveries
            except AttributeError:
                pass  # slots or frozen
        if isinstance(adapter, Callback) and adapter.delivery is not None and not isinstance(adapter, SinkCallback):
            subscription = msgspec.structs.replace(subscription, on_program_loop=placement_of(adapter) == "inline")
        self._subscriptions += (subscription,)

    def _choose_name(self, adapter: Callback | Sink) -> str:
        """Return the kind, with a number if it is taken, or else the name of the class."""
        if adapter.spec_name or not adapter.name:
            return adapter.spec_name or type(adapter).__name__
        taken = {each.name for each in self._subscriptions}
        names = itertools.chain([adapter.name], (f"{adapter.name}_{number}" for number in itertools.count(2)))
        return next(each for each in names if each not in taken)

    def has_adapter(self, adapter: object) -> bool:
        """Return whether this very object, or its delivery half, is delivered to."""
        return adapter is not None and any(each is adapter for each in self._live_objects)

    def __bool__(self) -> bool:
        return bool(self._subscriptions)

    @property
    def has_loop_couriers(self) -> bool:
        """Whether some courier is a task on the program's own loop."""
        return any(pool.on_program_loop for pool in self._courier_pools)

    def create_temporary_journal(self) -> str:
        """Create a journal directory if something is followed but none was given; removed once all is delivered."""
        self._is_temporary = True
        self._directory = directory = tempfile.mkdtemp(prefix="evsys-bus-")
        log().info("journal.temporary", directory=directory, why="something is followed, and no journal was given")
        return directory

    def register(self, journal: JournalWriter) -> None:
        """Register the adapters on disk, and make retention wait for them, before the first event is published.

        If the disk refuses, `run_checks` tries again once a second; retention waits all the same.

        Args:
            journal: The opened journal of the bus.
        """
        from evsys_bus.delivery.subscriptions import deregister

        directory = journal.directory
        deregister(directory, {each.name for each in self._subscriptions}, self._rank)
        if not self._subscriptions:
            return
        self._directory = directory
        self._rank_subscriptions = tuple(
            each for each in self._subscriptions if each.policy.ranks is None or self._rank in each.policy.ranks
        )
        for each in self._subscriptions:
            if each not in self._rank_subscriptions:
                fix = "ranks: all (or a list that holds it) has it deliver the events of other ranks too"
                log().info("delivery.other_rank", adapter=each.name, ranks=each.policy.ranks, rank=self._rank, fix=fix)
        from evsys_bus.delivery.status_files import read_status
        from evsys_bus.journal import OsDisk

        found = ((each.name, read_status(OsDisk(), self._directory, each.name)) for each in self._rank_subscriptions)
        self._previous_statuses = {name: status for name, status in found if status is not None}
        journal.retain_for(each.name for each in self._rank_subscriptions)
        self._unregistered = self._rank_subscriptions
        self._register_pending()

    def _register_pending(self) -> None:
        """Register the adapters that are not registered on disk yet."""
        from evsys_bus.delivery.subscriptions import register

        refused = register(self._directory, self._unregistered)
        self._unregistered = tuple(each for each in self._unregistered if each.name in refused)
        self._next_register_at = time.monotonic() + REGISTER_RETRY_SECONDS

    def start(
        self,
        last_sequences: Callable[[], dict[str, int]],
        task_manager: TaskManager,
        hook_health: Callable[[], Sequence[HookHealth]],
    ) -> None:
        """Start the couriers, if anything is followed.

        Args:
            last_sequences: Returns the stream of this process and the sequence of its last event; empty if there are
                gaps.
            task_manager: Runs couriers that are tasks on the program's loop.
            hook_health: Returns counts and times of the hooks, for the couriers to record.
        """
        if not self._subscriptions:
            return
        from evsys_bus.delivery.progress import ProgressReader

        directory = self._directory
        self._progress = ProgressReader(directory)
        self._last_sequences = last_sequences
        self._hook_health = hook_health
        if self._rank_subscriptions and not self._rank:  # all ranks of a job have the same hooks
            self._hook_times_due = time.monotonic() + FIRST_HOOK_TIMES_SECONDS
        locations = self.courier_locations()
        by_location = {
            location: [each for each in self._rank_subscriptions if locations[each.name] == location]
            for location in get_args(CourierLocation)
        }
        if by_location["process"]:
            from evsys_bus.delivery.supervisor import Supervisor, courier_config

            self._delivery_log = DeliveryLog(directory, [each.name for each in by_location["process"]])
            config = courier_config(directory, by_location["process"], grace_seconds=self._grace_seconds)
            self._supervisor = Supervisor(config)
            self._supervisor.start()
        if by_location["thread"] or by_location["loop"]:
            from evsys_bus.delivery.courier_pool import CourierPool

            create_pool = partial(CourierPool, directory, build=self._build_adapter, slice_seconds=SLICE_SECONDS)
            self._courier_pools += [create_pool(by_location["thread"])] if by_location["thread"] else []
            self._courier_pools += (
                [create_pool(by_location["loop"], task_manager=task_manager, poll_seconds=LOOP_POLL_SECONDS)]
                if by_location["loop"]
                else []
            )
            for each in self._courier_pools:
                each.start(subscribe=False)

    def report_owed(self, adapter: Adapter, events: int, why: str | None, fix: str | None) -> None:
        """Record how many events an inline callback has unconfirmed; 0 clears the entry."""
        from evsys_bus.delivery.receiver import unconfirmed_status

        name = callback_name(adapter)
        status = unconfirmed_status(events, why, fix)
        if status.owed:
            owed = status.owed
            self._unconfirmed[name] = msgspec.structs.replace(status, name=name, recorded=owed, delivered=owed)
        else:
            self._unconfirmed.pop(name, None)

    @property
    def has_unconfirmed(self) -> bool:
        """Whether an inline callback has unconfirmed events."""
        return bool(self._unconfirmed)

    def run_checks(self) -> None:
        """Check the deliveries; called periodically on the watchdog's thread."""
        if self._unregistered and time.monotonic() >= self._next_register_at:
            self._run_guarded("delivery.not_registered", self._register_pending)
        if self._delivery_log is not None:
            self._run_guarded("couriers.unreadable", self._delivery_log.poll)
        self._run_guarded("delivery.not_judged", self._check_failure_policy)
        for each in self._courier_pools:
            each.record_status()
        if time.monotonic() >= self._hook_times_due:
            self._hook_times_due = time.monotonic() + HOOK_TIMES_SECONDS
            self._run_guarded("delivery.hook_times_not_written", self._write_hook_times)

    def _write_hook_times(self) -> None:
        """Write how long hooks take to the file that the couriers copy into the journal, if it has changed."""
        from evsys_bus.delivery.status_recorder import write_hook_times
        from evsys_bus.journal import OsDisk

        hooks = self._hook_health()
        if hooks != self._written_hooks:
            self._written_hooks = hooks
            write_hook_times(OsDisk(), self._directory, self._rank, hooks)

    def _check_failure_policy(self) -> None:
        if self._failure_policy.is_due() and self._progress is not None:
            self._failure_policy.check(
                self._read_statuses(), gave_up=self._supervisor is not None and self._supervisor.has_given_up
            )

    def courier_locations(self) -> dict[str, CourierLocation]:
        """Return where the courier of each adapter runs."""
        return {
            each.name: "loop" if each.on_program_loop else "thread" if each.adapter_ref is None else self._couriers
            for each in self._subscriptions
        }

    def deliveries(self) -> tuple[DeliveryStatus, ...]:
        """Return the status of each delivery, then of inline callbacks with unconfirmed events."""
        other_ranks = [
            DeliveryStatus(each.name, state="other_rank", fix=f"rank {(each.policy.ranks or (0,))[0]} delivers to it")
            for each in self._subscriptions
            if each not in self._rank_subscriptions and self._progress is not None
        ]
        return (
            *(() if self._progress is None else self._read_statuses()),
            *other_ranks,
            *tuple(self._unconfirmed.values()),
        )

    def _read_statuses(self) -> "list[DeliveryStatus]":
        """Return the status of each delivery. Never raises: what cannot be read is reported as unknown."""
        assert self._progress is not None
        if self._reading_thread == threading.get_ident():  # in a signal handler that interrupted this read
            return self._last_statuses
        with self._lock:
            self._reading_thread = threading.get_ident()
            try:
                self._last_statuses = self._read_statuses_now()
            except Exception as error:  # isolated: another program or a bad disk may have changed the files
                self._faults.warn("delivery.unknown", self._directory, error=error, journal=self._directory)
                read_error = error if isinstance(error, OSError) else OSError(error_text(error))
                self._last_statuses = [
                    self._progress.unknown_status(each.name, read_error) for each in self._rank_subscriptions
                ]
            finally:
                self._reading_thread = 0
            return self._last_statuses

    def _read_statuses_now(self) -> "list[DeliveryStatus]":
        assert self._progress is not None
        names = {each.name for each in self._rank_subscriptions}
        found = [each for each in self._progress.read(self._last_sequences()) if each.name in names]
        if (read_error := self._progress.read_error) is not None:
            self._faults.warn("delivery.unknown", self._directory, error=read_error, journal=self._directory)
            names -= {each.name for each in found}
            return [*found, *(self._progress.unknown_status(name, read_error) for name in sorted(names))]
        missing = [each for each in self._rank_subscriptions if each.name not in {status.name for status in found}]
        found += [self._progress.unregistered_status(each.name, each.policy) for each in missing]
        return [_failures_since(each, self._previous_statuses.get(each.name)) for each in found]

    def _run_guarded(self, log_event: str, action: Callable[[], object]) -> None:
        """Run the action; an exception is logged and suppressed."""
        try:
            action()
        except Exception as error:  # isolated: one failed check must not prevent the others
            self._faults.warn(log_event, self._directory, error=error, journal=self._directory)

    def finish(self, receipt: Receipt, deadline: Deadline, closer: CallbackCloser, *, is_loop_running: bool) -> Receipt:
        """Close inline callbacks, finish the deliveries, and return the receipt with their status.

        What is pending then stays in the journal. The courier process may continue for its grace period.

        Args:
            receipt: The receipt so far.
            deadline: How long this may take.
            closer: Closes the inline callbacks.
            is_loop_running: Whether the loop of the bus is running; otherwise no courier on it can finish.
        """
        if self._supervisor is not None:
            self._supervisor.finish(time.monotonic() + deadline.remaining())
        for pool in self._courier_pools:
            pool.finish(deadline.at)
        closer.start(deadline)
        ended = self._wait_for_couriers(deadline, is_loop_running=is_loop_running)
        closer.join()
        if self._delivery_log is not None:
            self._run_guarded("couriers.unreadable", partial(self._delivery_log.poll, final=True))
        final_receipt = self.add_deliveries(receipt)
        for each in final_receipt.deliveries:
            if each.waiting:
                log().info("delivery.waiting", **{each.name: each.waiting}, why=each.error, fix=each.fix)
        for each in final_receipt.deliveries if not ended else ():
            if each.is_known and each.busy and not each.pending and not each.owed:
                meaning = "all was delivered, but its shutdown has not finished"
                log().warning("delivery.not_ended", adapter=each.name, why=each.error, meaning=meaning)
        if final_receipt.resume_command is not None:
            pending: dict[str, int | str] = {
                each.name: each.pending for each in final_receipt.deliveries if each.pending
            }
            pending |= {each.name: "unknown" for each in final_receipt.deliveries if not each.is_known}
            unconfirmed = {f"{each.name}_owed": each.owed for each in final_receipt.deliveries if each.owed}
            grace_seconds = self._grace_seconds if self._supervisor is not None and self._supervisor.is_alive else 0
            log().warning(
                "delivery.pending",
                **pending,
                **unconfirmed,
                lingers_seconds=grace_seconds,
                fix=final_receipt.resume_command,
            )
        elif (
            self._is_temporary
            and ended
            and all(each.complete for each in final_receipt.deliveries if each.name not in self._unconfirmed)
        ):
            shutil.rmtree(self._directory, ignore_errors=True)
        self._faults.flush()
        return final_receipt

    def _wait_for_couriers(self, deadline: Deadline, *, is_loop_running: bool) -> bool:
        """Wait until all couriers have ended, time is up, or no more progress is possible; return whether all ended."""
        pools = [pool for pool in self._courier_pools if is_loop_running or not pool.on_program_loop]
        while not (ended := self._join_couriers(pools, POLL_SECONDS)) and deadline.remaining():
            if not self._can_make_progress():
                break
        if not ended:
            for pool in self._courier_pools:
                pool.stop()
            for pool in pools:
                pool.join(COURIER_STOP_SECONDS)
        return ended and len(pools) == len(self._courier_pools)

    def add_deliveries(self, receipt: Receipt) -> Receipt:
        """Return the receipt with the current status of each delivery."""
        deliveries = self.deliveries()
        has_pending = any(each.unfinished for each in deliveries if each.name not in self._unconfirmed)
        resume_command = f"evsys-bus sync {self._directory}" if has_pending else None
        return msgspec.structs.replace(receipt, deliveries=deliveries, resume_command=resume_command)

    def _join_couriers(self, pools: "Sequence[CourierPool]", wait_seconds: float) -> bool:
        """Wait briefly for the couriers; return whether all have ended."""
        end = time.monotonic() + wait_seconds
        process = self._supervisor is None or self._supervisor.wait(wait_seconds)
        return all([pool.join(max(0.0, end - time.monotonic())) for pool in pools]) and process  # noqa: C419 # each

    def _can_make_progress(self) -> bool:
        """Return False if all that has not ended are parked adapters, and adapters that cannot be built."""
        statuses = self._read_statuses()
        if not any(each.pending or not each.is_known for each in statuses):
            return True
        unfinished = [each for each in statuses if each.pending or each.busy or not each.is_known]
        return any(each.state not in _STUCK_STATES for each in unfinished)

    def _build_adapter(self, adapter_ref: AdapterRef) -> Callback | Sink:
        """Build an adapter in this process; its recipe was made together with a way to build it."""
        build = next(each.build for each in self._subscriptions if each.adapter_ref is adapter_ref)
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
    subscription: Subscription | None = callback.evsys_subscription
    if callback.delivery is not None:  # both halves on the same ranks
        return normalize_ranks(callback.ranks, (0,)) if subscription is None else subscription.policy.ranks
    return normalize_ranks(callback.ranks, None)


def _is_live_sink(adapter: object, sink_class: type) -> bool:
    """Return whether this is a sink of that class that was given on its own."""
    return isinstance(adapter.instance if isinstance(adapter, Subscription) else adapter, sink_class)


def _failures_since(status: DeliveryStatus, previous: DeliveryStatus | None) -> DeliveryStatus:
    """Return the status with only the failures that were added since an earlier one."""
    if previous is None or not status.is_known:
        return status
    failures = {
        name: max(0, getattr(status, name) - getattr(previous, name)) for name in ("hook_failures", "task_failures")
    }
    last = status.last_failure if any(failures.values()) else None
    return msgspec.structs.replace(status, **failures, last_failure=last)
