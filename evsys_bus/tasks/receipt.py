"""`Receipt`, the result of a drain; `DeliveryStatus`; and the functions that wait for a drain."""

import asyncio
import concurrent.futures
import html
import math
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any, ClassVar, Final, Literal, Protocol

import anyio
import msgspec

from evsys_bus.deprecated import Renamed
from evsys_bus.errors import BusError
from evsys_bus.printable import printable
from evsys_bus.tasks.loops import call_soon, running_loop

_CHECK_SECONDS: Final = 0.5


class TaskCounts(msgspec.Struct):
    """Counts of tasks: each accepted one ends as completed, failed or cancelled."""

    spawned: int = 0
    adopted: int = 0
    """Created by a bare ``asyncio.create_task`` in a hook."""
    retries: int = 0
    """Attempts after the first, made by a retry policy."""
    completed: int = 0
    failed: int = 0
    """Raised an exception or timed out."""
    cancelled: int = 0
    """Cancelled, at the drain's deadline or by other code, before or after they started."""
    refused: int = 0
    """Never accepted: too many tasks were queued, or the bus was closed."""


DeliveryState = Literal[
    "delivering", "idle", "waiting", "retrying", "parked", "ended", "failed", "other_rank", "unknown"
]
"""``idle``: every event was delivered. ``waiting``: the adapter waits for other work, or for a destination, for the
reason in ``error``; nothing is wrong. ``retrying``: an error that may pass. ``parked``: a person has to act; retried
once a minute. ``failed``: the adapter cannot be built or opened. ``other_rank``: another rank of the job delivers to
it. ``unknown``: its files cannot be read now, for the reason in ``error``, and the counts are not valid."""


class DeliveryStatus(msgspec.Struct, frozen=True):
    """Status of one delivery: the same struct in its state file, in ``health()``, receipts and ``evsys-bus status``.

    At any time ``recorded = delivered + dead + waiting + pending``, and ``owed <= delivered``.
    """

    name: str = ""
    """Name of the adapter."""
    recorded: int = 0
    """Events in the journal that are for this adapter."""
    delivered: int = 0
    """Events that the adapter has accepted."""
    dead: int = 0
    """Events that were rejected for good; they are in the dead-letter file, with the reason."""
    pending: int = 0
    """Events in the journal that are still to be delivered."""
    owed: int = 0
    """Delivered events that the destination has not confirmed yet (`Callback.report_owed`)."""
    owed_fix: str | None = None
    """What a person has to do before those can be confirmed; None if no action is needed."""
    hook_failures: int = 0
    """Hooks of a followed callback that raised."""
    task_failures: int = 0
    """Tasks started by those hooks that raised, timed out or were cancelled."""
    last_failure: str | None = None
    """The newest of these failures: the hook or task, and what it raised."""
    state: DeliveryState | None = None
    """The state that its courier last wrote; None before the first time."""
    error: str | None = None
    """The last error of the adapter or its destination, what it waits for, or why events are unconfirmed."""
    fix: str | None = None
    """What to do about the error."""
    failing_since: float | None = None
    """When it started to fail; seconds since the epoch."""
    attempts: int = 0
    """Attempts since it started to fail."""
    pid: int = 0
    """Process id of its courier."""
    at: float = 0.0
    """When the courier wrote this; seconds since the epoch."""
    busy: bool = False
    """Whether a courier is delivering to it now."""
    log: str | None = None
    """Path of the courier's log, which has the tracebacks, if the courier has a log of its own."""
    absent: int = 0
    """Events that were removed from the journal before this adapter could get them; not counted as recorded."""
    waiting: int = 0
    """Events whose destination was not there, which is no fault, and that it gets only once it is: see ``fix``."""

    trouble: ClassVar[Renamed] = Renamed("last_error")

    @property
    def last_error(self) -> str | None:
        """The error that prevents events from being delivered or confirmed; None if there is none."""
        if self.owed and self.error is not None:
            return self.error
        return None if self.state in {None, "delivering", "idle", "waiting", "other_rank"} else self.error

    @property
    def suggested_fix(self) -> str | None:
        """What to do about `last_error`: what confirms the unconfirmed events comes first."""
        return self.owed_fix or self.fix

    @property
    def is_known(self) -> bool:
        """Whether the counts are valid; False if the files could not be read."""
        return self.state != "unknown"

    @property
    def unfinished(self) -> bool:
        """Whether events are pending or unconfirmed; True where that is unknown."""
        return not self.is_known or bool(self.pending or self.owed)

    @property
    def complete(self) -> bool:
        """Whether every event was delivered and confirmed and nothing failed; False where that is unknown."""
        return not (self.unfinished or self.dead or self.waiting or self.failures)

    @property
    def failures(self) -> int:
        """Hooks and tasks of a followed callback that failed."""
        return self.hook_failures + self.task_failures

    @property
    def problem(self) -> str | None:
        """On one line: the error, what it waits for, or the newest failure, and what to do; None if it is complete."""
        if self.complete and self.last_error is None:
            return None
        why = self.last_error or (self.error if self.waiting or not self.is_known else None) or self.last_failure
        fix = self.suggested_fix
        parts = [why or "", f"fix: {fix}" if fix else ""]
        return "   ".join(" ".join(part.split()) for part in parts if part) or None


class Receipt(msgspec.Struct, frozen=True):
    """The result of a drain; ``print`` shows it on a few lines, and a notebook as a table.

    Example:
        >>> receipt = Receipt(TaskCounts(spawned=1, completed=1), {}, deliveries=(DeliveryStatus("csv", delivered=3),))
        >>> receipt
        <Receipt: everything was delivered>
        >>> print(receipt)
        everything was delivered
        csv   3 delivered
        tasks   1 completed
    """

    tasks: TaskCounts
    """Counts of all tasks."""
    tasks_by_owner: dict[str, TaskCounts]
    """The same counts for each callback."""
    unfinished: tuple[str, ...] = ()
    """Tasks that were unfinished at the deadline, as ``owner:name``."""
    seconds: float = 0.0
    """How long the drain took."""
    recorded: int = 0
    """Events that are in the journal and flushed to disk; 0 without a journal."""
    unrecorded: int = 0
    """Events that could not be written to the journal and are lost when the process ends."""
    dropped: int = 0
    """Events whose `publish` returned but that reached no hook and are not in the journal; the reason is in the log."""
    without_hooks: int = 0
    """Events that are in the journal but reached no hook: a hook on another thread blocked the bus until the end."""
    journal: str | None = None
    """Directory of the journal."""
    deliveries: tuple[DeliveryStatus, ...] = ()
    """One status for each followed adapter."""
    resume_command: str | None = None
    """The command that delivers pending and unconfirmed events; None if there are none."""

    total: ClassVar[Renamed] = Renamed("tasks")
    owners: ClassVar[Renamed] = Renamed("tasks_by_owner")
    left: ClassVar[Renamed] = Renamed("unfinished")
    refused: ClassVar[Renamed] = Renamed("dropped")
    finish: ClassVar[Renamed] = Renamed("resume_command")

    def __repr__(self) -> str:
        """Show the totals of all adapters and the command that delivers the rest."""
        command = f"; {printable(self.resume_command)}" if self.resume_command else ""
        return f"<{type(self).__name__}: {self._summary()}{command}>"

    def __str__(self) -> str:
        """Show what was delivered to each adapter, what was lost, the tasks, and the command that delivers the rest."""
        width = max((len(name) for name, _, _ in self._delivery_rows()), default=0)
        lines = [self._summary()]
        for name, counts, problem in self._delivery_rows():
            shown = ", ".join(f"{count:,} {word}" for word, count in counts.items() if count or word == "delivered")
            lines.append("   ".join([f"{name:<{width}}", shown or "not known", *([problem] if problem else [])]))
        lines += [f"{name}   {text}" for name, text in self._facts()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the same as a table; its colours are those of the page."""
        cell = "padding: 0.1em 0.8em; text-align: {}; border-bottom: 1px solid currentColor"
        words = [word for word in _COUNTS if word != "waiting" or any(each.waiting for each in self.deliveries)]
        rows = [["adapter", *words, ""]]
        for name, counts, problem in self._delivery_rows():
            rows.append([name, *(f"{counts[word]:,}" if word in counts else "-" for word in words), problem or ""])
        lines = [
            "<tr>"
            + "".join(
                f'<{tag} style="{cell.format("left" if column in {0, len(row) - 1} else "right")}">'
                f"{html.escape(text)}</{tag}>"
                for column, text in enumerate(row)
            )
            + "</tr>"
            for number, row in enumerate(rows)
            for tag in ["td" if number else "th"]
        ]
        table = f'<table style="border-collapse: collapse">{"".join(lines)}</table>' if self.deliveries else ""
        facts = "".join(
            f"<div>{name}: <code>{html.escape(text)}</code></div>"
            if name == "resume"
            else f"<div>{name}: {html.escape(text)}</div>"
            for name, text in self._facts()
        )
        return f"<div><b>{html.escape(self._summary())}</b></div>{table}{facts}"

    def _summary(self) -> str:
        """Return the totals of all adapters, without those that are 0."""
        known = [each for each in self.deliveries if each.is_known]
        totals = {word: sum(count(each) for each in known) for word, count in _COUNTS.items() if word != "delivered"}
        parts = [f"{count:,} {word}" for word, count in totals.items() if count]
        lost = self.unrecorded + self.dropped
        parts += [f"{lost:,} lost"] if lost else []
        unknown = len(self.deliveries) - len(known)
        parts += [f"{unknown} of {len(self.deliveries)} adapters not known"] if unknown else []
        if parts:
            return ", ".join(parts)
        return "everything was delivered" if self.deliveries else "no followed adapters"

    def _delivery_rows(self) -> list[tuple[str, dict[str, int], str | None]]:
        """Return for each adapter its name, its counts by word, none if they are not known, and its problem."""
        return [
            (
                " ".join(printable(each.name).split()),
                {word: count(each) for word, count in _COUNTS.items()} if each.is_known else {},
                None if each.problem is None else printable(each.problem),
            )
            for each in self.deliveries
        ]

    def _facts(self) -> list[tuple[str, str]]:
        """Return what was lost, the tasks, and the command that delivers the rest."""
        lost = ((self.unrecorded, "not written to the journal"), (self.dropped, "reached no hook and no journal"))
        tasks = [f"{count:,} {word}" for word in _TASK_COUNTS if (count := getattr(self.tasks, word))]
        tasks += [f"unfinished: {printable(', '.join(self.unfinished))}"] if self.unfinished else []
        return [
            *(("lost", f"{count:,} {what}") for count, what in lost if count),
            *([("tasks", ", ".join(tasks))] if tasks else []),
            *([("resume", printable(self.resume_command))] if self.resume_command else []),
        ]


_COUNTS: Final[Mapping[str, Callable[[DeliveryStatus], int]]] = {
    "delivered": lambda status: status.delivered,
    "waiting": lambda status: status.waiting,
    "pending": lambda status: status.pending,
    "owed": lambda status: status.owed,
    "dead": lambda status: status.dead,
    "failed": lambda status: status.failures,
}
"""The counts of a delivery that are shown, by their words."""
_TASK_COUNTS: Final = ("completed", "failed", "cancelled", "refused")


class DrainFuture(concurrent.futures.Future[Receipt]):
    """A drain in progress: ``await`` it, or call ``result()`` on a thread that does not run the bus's loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        super().__init__()
        self._loop = loop

    def __await__(self) -> Generator[Any, None, Receipt]:
        """Wait for the receipt on the running loop."""
        return asyncio.wrap_future(self).__await__()

    def result(self, timeout: float | None = None) -> Receipt:
        """Wait for the receipt.

        Raises:
            BusError: Called on the thread that has to run the tasks, which would deadlock.
            TimeoutError: The drain took longer than ``timeout`` seconds.
        """
        if not self.done() and self._loop is not None and running_loop() is self._loop:
            raise BusError(
                "drain().result() on the thread that runs the bus's tasks would wait for itself",
                fix="write `receipt = await bus.drain()`",
            )
        return super().result(timeout)


def preload_wait_imports() -> None:
    """Import what `wait_shielded` needs, which may be impossible later without free file descriptors."""
    anyio.CancelScope()


class Completable(Protocol):
    """Something that can be waited for: a `DrainFuture` or an `UninterruptibleCall`."""

    def done(self) -> bool:
        """Whether it has finished."""
        ...

    def add_done_callback(self, call: Callable[[Any], object], /) -> None:
        """Call the function with this object when it has finished, on any thread."""
        ...


async def wait_shielded(
    work: Completable,
    *,
    max_cancellations: float = math.inf,
    on_cancel: Callable[[int], object] | None = None,
    seconds: float = math.inf,
) -> BaseException | None:
    """Wait until the work has finished, deferring cancellations and interrupts.

    Args:
        work: The work to wait for.
        max_cancellations: How many cancellations or interrupts end the wait.
        on_cancel: Called with the number of them so far.
        seconds: Timeout of the wait: an interrupt may have broken the work, which would then never finish.

    Returns:
        The first cancellation or interrupt that arrived meanwhile, for the caller to raise; None without one.
    """
    count = 0
    first: BaseException | None = None
    loop = asyncio.get_running_loop()
    wakeup = loop.create_future()
    work.add_done_callback(lambda _: call_soon(loop, partial(_wake, wakeup)))
    deadline = time.monotonic() + seconds
    # The shield stops anyio from repeating a cancellation; the loop continues after a bare task.cancel().
    with anyio.CancelScope(shield=True):
        while not work.done() and (remaining := deadline - time.monotonic()) > 0.0 and count < max_cancellations:
            try:
                # In slices: an interrupt of the event loop may lose the wakeup.
                await asyncio.wait([wakeup], timeout=min(remaining, _CHECK_SECONDS))
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit) as error:
                count += 1
                first = first or error
                if on_cancel is not None:
                    on_cancel(count)
    return first


def _wake(wakeup: "asyncio.Future[None]") -> None:
    if not wakeup.done():
        wakeup.set_result(None)
