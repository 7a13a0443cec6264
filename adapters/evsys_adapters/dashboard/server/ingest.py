"""Receiving events: bodies are applied in slices, in the order of their stream, and slices that wait share a commit."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Final, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.store_thread import REPORT, StoreThread
from evsys_adapters.dashboard.store import BehindError, Ingested, Store
from evsys_bus.diagnostics import log

MAX_SLICE_EVENTS: Final = 500
MAX_SLICE_BYTES: Final = 1 << 20
_UPDATE: Final = "if a newer version of evsys-bus recorded them, update the dashboard's"


class Totals(NamedTuple):
    """What became of a body."""

    sequence: int
    """The stream's last stored sequence number."""
    events: int
    """Events that were new."""
    points: int
    unreadable: int = 0
    """Further events that were new and could not be read; they are skipped for good."""


_Result: TypeAlias = Ingested | BehindError | AnswerError


class _Slice(NamedTuple):
    stream: str
    after: int
    payloads: Sequence[bytes]
    journal: str | None
    applied: "asyncio.Future[_Result]"

    @property
    def bytes(self) -> int:
        return sum(map(len, self.payloads))


class Ingester:
    """Applies bodies to the store.

    Args:
        store: The store's thread.
        on_changes: Called on the loop with what a group of slices has changed.
    """

    def __init__(self, store: StoreThread, on_changes: Callable[[Changes], None]) -> None:
        self._store: Final = store
        self._on_changes: Final = on_changes
        self._streams: Final[WeakValueDictionary[str, asyncio.Lock]] = WeakValueDictionary()
        self._waiting: Final[deque[_Slice]] = deque()
        self._turn: Final = asyncio.Lock()
        """Held by the caller that applies a group, so that at most one waits for the store's thread."""

    async def ingest(self, stream: str, after: int, payloads: Sequence[bytes], journal: str | None = None) -> Totals:
        """Store the events of a body. Events that the store has already change nothing.

        Args:
            stream: Their stream.
            after: The last sequence number before them that the client believes to be stored.
            payloads: Encoded envelopes in the order of their sequence numbers.
            journal: Path of the journal that holds the stream; None if unknown.

        Raises:
            AnswerError: The store lacks earlier events (409), or cannot be used now (503). Slices before that are
                stored.
        """
        lock = self._streams.get(stream)
        if lock is None:
            lock = self._streams[stream] = asyncio.Lock()
        events = points = unreadable = 0
        async with lock:
            for part in slices(payloads):
                applied = await self._apply(stream, after, part, journal)
                after = applied.sequence
                events += applied.events
                points += applied.points
                unreadable += applied.unreadable
        if unreadable:
            log().warning("dashboard.events_unreadable", stream=stream, events=unreadable, fix=_UPDATE)
        return Totals(after, events, points, unreadable)

    async def _apply(self, stream: str, after: int, payloads: Sequence[bytes], journal: str | None) -> Ingested:
        part = _Slice(stream, after, payloads, journal, asyncio.get_running_loop().create_future())
        self._waiting.append(part)
        while not part.applied.done():
            async with self._turn:  # whoever comes first applies the slices of the others too
                if not part.applied.done():
                    await self._apply_group(self._take_group())
        applied = part.applied.result()
        if isinstance(applied, AnswerError):
            raise applied
        if isinstance(applied, BehindError):
            raise AnswerError(
                409,
                "behind",
                f"the stream is stored up to {applied.watermark} only",
                fix="send what follows that, or import the journal: `evsys-bus dash --import RUN`",
                extra={"sequence": applied.watermark},
            ) from applied
        return applied

    def _take_group(self) -> list[_Slice]:
        group = [self._waiting.popleft()]
        events, size = len(group[0].payloads), group[0].bytes
        while self._waiting:
            events += len(self._waiting[0].payloads)
            size += self._waiting[0].bytes
            if events > MAX_SLICE_EVENTS or size > MAX_SLICE_BYTES:
                break
            group.append(self._waiting.popleft())
        return group

    async def _apply_group(self, group: Sequence[_Slice]) -> None:
        results: list[_Result] = []
        try:
            results += await self._ingest_parts(group)
        finally:
            if not results:  # the server ends
                for part in group:
                    part.applied.cancel()
        for part, result in zip(group, results, strict=True):
            part.applied.set_result(result)

    async def _ingest_parts(self, parts: Sequence[_Slice]) -> list[_Result]:
        """Store slices, together if that succeeds, else each by itself; an event that cannot be stored is skipped."""
        try:
            results = await self._store.call(_ingest_group, parts)
        except AnswerError as error:
            return [error] * len(parts)
        except (MemoryError, OSError):  # of the machine, and not of an event
            log().error("dashboard.ingest_failed", exc_info=True)
            return [_fault(HTTPStatus.SERVICE_UNAVAILABLE)] * len(parts)
        except Exception as error:  # of one event, which must not keep the others out
            if len(parts) == 1:
                return [await self._ingest_halves(parts[0], error)]
            return [result for part in parts for result in await self._ingest_parts([part])]
        changes = Changes()
        for result in results:
            if isinstance(result, Ingested):
                changes.update(result.changed)
        self._on_changes(changes)
        return [*results]

    async def _ingest_halves(self, part: _Slice, error: Exception) -> _Result:
        """Store a slice that has failed as a whole, without the events that lead to the error."""
        middle = len(part.payloads) // 2
        if not middle:
            return await self._skip(part, error)
        [first] = await self._ingest_parts([part._replace(payloads=part.payloads[:middle])])
        if not isinstance(first, Ingested):
            return first
        [last] = await self._ingest_parts([part._replace(after=first.sequence, payloads=part.payloads[middle:])])
        if not isinstance(last, Ingested):
            return last
        return Ingested(
            last.sequence,
            first.events + last.events,
            first.points + last.points,
            Changes(),  # they are published
            first.unreadable + last.unreadable,
        )

    async def _skip(self, part: _Slice, error: Exception) -> _Result:
        """Count the only event of a slice as unreadable."""
        try:
            skipped = await self._store.call(Store.skip, part.stream, part.after, part.payloads)
        except AnswerError as refusal:
            return refusal
        except Exception as other:  # it is not of the event: nothing is skipped
            log().error("dashboard.ingest_failed", stream=part.stream, exc_info=other)
            return _fault(HTTPStatus.INTERNAL_SERVER_ERROR)
        log().error("dashboard.event_failed", stream=part.stream, sequence=skipped.sequence, exc_info=error, fix=REPORT)
        return skipped


def slices(payloads: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Split payloads so that no part keeps the store's thread for long."""
    start = size = 0
    for index, payload in enumerate(payloads):
        size += len(payload)
        if index > start and (size > MAX_SLICE_BYTES or index - start >= MAX_SLICE_EVENTS):
            yield payloads[start:index]
            start, size = index, len(payload)
    yield payloads[start:]


def _fault(status: HTTPStatus) -> AnswerError:
    return AnswerError(status, "fault", "the dashboard failed; its log has the cause", fix=REPORT)


def _ingest_group(store: Store, group: Sequence[_Slice]) -> list[Ingested | BehindError]:
    results: list[Ingested | BehindError] = []
    with store.transaction():
        for part in group:
            try:
                results.append(store.ingest(part.stream, part.after, part.payloads, part.journal))
            except BehindError as error:
                results.append(error)
    return results
