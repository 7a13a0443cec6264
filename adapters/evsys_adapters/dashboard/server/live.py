"""Live views: each frame is computed once for all its viewers, and a viewer that reconnects continues where it was.

A topic is what a view shows: ``home``, ``e/ID`` (an experiment) or ``c/ID/LINES/WIDTH/METRIC`` (a chart). While it has
viewers, changes mark it, the next tick computes a frame, and the topic's ring keeps the last 300. All frames have
absolute values, so receiving one twice changes nothing. Frame numbers come from one counter of the server that also
counts changes and starts from the clock, so numbers of an earlier process are older than all of this one. A frame has
all changes up to its number.

A viewer that asks for the frames since a number gets them from the ring, or from the recent changes, or a frame of kind
``reset``: then it reads the view again by its ordinary route.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeAlias

import anyio
import msgspec

from evsys_adapters.dashboard.database import StoreError
from evsys_adapters.dashboard.open_series import Changes
from evsys_adapters.dashboard.server.answers import AnswerError
from evsys_adapters.dashboard.server.charts import Lines
from evsys_adapters.dashboard.server.columns import ColumnWriter
from evsys_adapters.dashboard.server.frames import (
    ChartFrame,
    Content,
    ExperimentFrame,
    FrameSource,
    HomeFrame,
    Places,
    Views,
)
from evsys_adapters.dashboard.server.store_thread import StoreThread
from evsys_adapters.dashboard.store import Store
from evsys_bus.diagnostics import log

MAX_TOPIC_BYTES: Final = 8192
_MAX_READ: Final = 256
"""Pages that were read and are not viewed yet, or any more."""
_MAX_JUMP: Final = 1 << 53
_TURN_SECONDS: Final = 0.05
"""How long frames may keep events and readers from the store's thread."""

Compute: TypeAlias = "Callable[[Store, ColumnWriter], Content]"


class LiveLimits(msgspec.Struct, frozen=True):
    """What live views may take."""

    max_clients: int = 200
    max_topics: int = 256
    """Of one client."""
    ring: int = 300
    """Frames that each topic keeps."""
    ring_bytes: int = 2 << 20
    """Of these frames together, besides the last one."""
    chart_seconds: float = 0.08
    """Between two frames of a chart; less than what clients leave between two batches, so that none waits for it."""
    page_seconds: float = 0.5
    """Between two frames of another topic."""
    refresh_seconds: float = 30.0
    """How often pages are computed without a change: a run that is silent becomes stalled."""
    poll_seconds: float = 30.0
    """How long a topic that is polled lives after the last request."""
    max_history: int = 100_000
    """Changed series and runs that are remembered for topics which have no viewers."""
    max_share: float = 0.3
    """Of the time that computing frames may take; what is expensive is computed less often."""


class Frame(NamedTuple):
    """A message to all viewers of a topic."""

    number: int
    data: bytes


class Topic:
    """A view with its viewers, what has changed since its last frame, and its last frames."""

    def __init__(self, name: str, source: FrameSource, floor: int, limits: LiveLimits) -> None:
        self.name: Final = name
        self.source: Final = source
        self.floor = floor
        """Frames after this number are in the ring, or will be computed."""
        self.frames: Final[deque[Frame]] = deque()
        self.viewers: Final[set[Viewer]] = set()
        self.polled_until = 0.0
        self.due = 0.0
        """When the next frame may be computed, on the clock of the hub."""
        self.refreshed = 0.0
        self.joined_at: int | None = None
        """A viewer has come who has all changes up to this number; those after it are marked by the next tick."""
        self._max_frames: Final = 1 if source.is_whole else limits.ring
        self._max_bytes: Final = limits.ring_bytes
        self._bytes = 0

    @property
    def last(self) -> int:
        """The number of the last frame."""
        return self.frames[-1].number if self.frames else self.floor

    def add(self, frame: Frame) -> None:
        """Append a frame; the oldest ones leave a full ring."""
        self._bytes += sum(len(each.data) for each in list(self.frames)[-1:])
        self.frames.append(frame)
        while len(self.frames) > 1 and (len(self.frames) > self._max_frames or self._bytes > self._max_bytes):
            removed = self.frames.popleft()
            self._bytes -= len(removed.data)
            self.floor = removed.number

    def since(self, number: int) -> list[Frame]:
        """Return the frames after a number; a ``reset`` if they are not all there."""
        if number < self.floor:
            return [reset_frame(self.name, self.last)]
        return [frame for frame in self.frames if frame.number > number]


class Viewer:
    """A client, and the number of the last frame of each topic that it has."""

    def __init__(self) -> None:
        self.positions: dict[Topic, int] = {}
        self.wakeup = anyio.Event()

    def wake(self) -> None:
        """Let the client's sender look for frames."""
        self.wakeup.set()

    async def next_frames(self) -> list[bytes]:
        """Wait for frames, and return them in order."""
        while True:
            found: list[bytes] = []
            for topic, position in list(self.positions.items()):
                frames = topic.since(position)
                if frames:
                    self.positions[topic] = max(position, frames[-1].number)
                    found += [frame.data for frame in frames]
            if found:
                return found
            await self.wakeup.wait()
            self.wakeup = anyio.Event()


class Subscription(msgspec.Struct, frozen=True):
    """A topic that a client views, and the last frame that it has; None: from now on."""

    topic: str
    frame: int | None = None


class LiveHub:
    """All topics of a server.

    Args:
        store: The store's thread.
        limits: Bounds and intervals.
        clock: Monotonic seconds.
    """

    def __init__(self, store: StoreThread, limits: LiveLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store: Final = store
        self._limits: Final = limits
        self._clock: Final = clock
        self._topics: Final[dict[str, Topic]] = {}
        self._history: Final[deque[tuple[int, Changes]]] = deque()
        self._history_size = 0
        self._number = int(time.time() * 1_000_000)
        self._history_floor = self._number
        self._read: Final[OrderedDict[str, tuple[int, dict[str, Any]]]] = OrderedDict()
        """By topic, the page that was read last, and the number of that answer."""
        self._places: Final = Places()
        self._pending: list[Changes] = []
        self._wakeup = anyio.Event()
        self._busy_seconds = 0.0
        """Taken on the store's thread since the last tick began."""
        self._turn: Final = anyio.Lock()
        """Held while marks are passed on and frames are computed."""
        self.clients = 0
        """Open WebSockets."""
        self.last_viewed = clock()
        """When the last client was there, on the clock."""

    @property
    def number(self) -> int:
        """The last number. A view that is read now has all changes up to it."""
        return self._number

    def publish(self, changes: Changes) -> None:
        """Note what a batch has changed. Call it on the loop, after the batch was applied."""
        self._number += 1
        self._history.append((self._number, changes))
        self._history_size += _size(changes)
        while self._history_size > self._limits.max_history and self._history:
            self._history_floor, oldest = self._history.popleft()
            self._history_size -= _size(oldest)
        if self._topics:
            self._pending.append(changes)
            self._wakeup.set()

    def note_read(self, topic: str, number: int, page: dict[str, Any]) -> None:
        """Note what a client has read of a page, and the number of that answer: its first frame is what differs."""
        known = self._read.get(topic)
        if known is None or known[0] != number:  # of several answers the first, which lacks most
            self._read[topic] = number, page
            self._read.move_to_end(topic)
            if len(self._read) > _MAX_READ:
                self._read.popitem(last=False)

    async def subscribe(self, viewer: Viewer, subscriptions: Sequence[Subscription]) -> None:
        """Replace what a client views.

        Raises:
            AnswerError: Too many topics, or one that does not exist.
        """
        if len(subscriptions) > self._limits.max_topics:
            raise AnswerError(
                400, "topics", f"more than {self._limits.max_topics} topics", fix="subscribe to what is visible"
            )
        # Sources first: one that is refused changes nothing.
        sources = [parse_topic(each.topic) for each in subscriptions]
        positions: dict[Topic, int] = {}
        for each, source in zip(subscriptions, sources, strict=True):
            topic, position = self._join(each, source)
            if topic in viewer.positions and each.frame is None:
                position = viewer.positions[topic]
            topic.viewers.add(viewer)
            positions[topic] = position
        for topic in set(viewer.positions) - set(positions):
            self._leave(viewer, topic)
        viewer.positions = positions
        viewer.wake()
        self._wakeup.set()

    def leave(self, viewer: Viewer) -> None:
        """Remove a client."""
        for topic in viewer.positions:
            self._leave(viewer, topic)
        viewer.positions = {}

    async def poll(self, subscriptions: Sequence[Subscription]) -> list[bytes]:
        """Return the frames that a client lacks which asks now and then, instead of receiving them."""
        viewer = Viewer()
        await self.subscribe(viewer, subscriptions)
        try:
            for topic in viewer.positions:
                topic.polled_until = self._clock() + self._limits.poll_seconds
            await self._compute_due(viewer.positions)
            return [frame.data for topic, position in viewer.positions.items() for frame in topic.since(position)]
        finally:
            self.leave(viewer)
            self.last_viewed = self._clock()

    async def run(self) -> None:
        """Compute frames until cancelled. It sleeps while nothing changes."""
        while True:
            with anyio.move_on_after(self._seconds_to_wait()):
                await self._wakeup.wait()
            self._wakeup = anyio.Event()
            self._busy_seconds = 0.0
            began = self._clock()
            try:
                await self._tick()
            except AnswerError as error:  # the database cannot be used now; the topics stay marked
                log().warning("dashboard.live_failed", error=error.message)
                await anyio.sleep(1.0)
            except Exception:  # the next round begins anew; without rounds, no view would be live any more
                log().error("dashboard.live_failed", exc_info=True)
                await anyio.sleep(1.0)
            # Batches that arrive together become one frame.
            seconds = self._busy_seconds
            left = began + self._limits.chart_seconds - self._clock()
            await anyio.sleep(max(0.0, left, seconds / self._limits.max_share - seconds))

    async def _tick(self) -> None:
        now = self._clock()
        for topic in list(self._topics.values()):
            if not topic.viewers and now > topic.polled_until:
                del self._topics[topic.name]
            elif topic.source.is_page and now - topic.refreshed > self._limits.refresh_seconds:
                topic.source.is_changed = True
        await self._compute_due(self._topics.values())

    def _seconds_to_wait(self) -> float | None:
        """Until the next topic is due; None if none is."""
        now = self._clock()
        times = [topic.due - now for topic in self._topics.values() if topic.source.is_changed]
        times += [
            topic.refreshed + self._limits.refresh_seconds - now
            for topic in self._topics.values()
            if topic.source.is_page
        ]
        times += [topic.polled_until - now for topic in self._topics.values() if not topic.viewers]
        return max(0.0, min(times)) if times else None

    def _join(self, subscription: Subscription, source: FrameSource) -> tuple[Topic, int]:
        """Return the topic, and the number after which the client gets its frames."""
        number = subscription.frame
        topic = self._topics.get(subscription.topic)
        if topic is None:
            topic = Topic(subscription.topic, source, self._number, self._limits)
            self._topics[topic.name] = topic
            topic.refreshed = self._clock()
            read = self._read.get(topic.name)
            if number is not None and read is not None and read[0] == number:
                source.start_from(read[1])
                source.is_changed = number < self._number
                topic.floor = number
                return topic, number
        is_known = number is not None and topic.floor <= number <= self._number
        if is_known:
            return topic, number or 0
        if topic.source.is_page:
            topic.source.mark_all()
            return topic, topic.last
        if number is None:
            return topic, topic.last
        if not self._history_floor <= number <= self._number:
            return topic, -1  # `since` answers with a reset
        topic.joined_at = number if topic.joined_at is None else min(number, topic.joined_at)
        return topic, topic.last

    def _leave(self, viewer: Viewer, topic: Topic) -> None:
        topic.viewers.discard(viewer)
        if not topic.viewers and self._clock() >= topic.polled_until:
            self._topics.pop(topic.name, None)

    async def _compute_due(self, topics: Iterable[Topic]) -> None:
        """Compute the next frames of those topics that have changed and are due."""
        async with self._turn:
            number = await self._mark()
            due = [topic for topic in topics if topic.source.is_changed and self._clock() >= topic.due]
            works = deque((topic, topic.source.take()) for topic in due)
            while works:
                await self._compute(works, number)

    async def _mark(self) -> int:
        """Pass what has changed to the topics. Returns the number of the frames to compute now.

        What is published from here on has a greater number: it is in later frames, even if these have it already.
        """
        number = self._number = self._number + 1
        pending, self._pending = self._pending, []
        topics = list(self._topics.values())
        joined = [(topic, topic.joined_at) for topic in topics if topic.joined_at is not None]
        for topic, _ in joined:
            topic.joined_at = None
        try:
            await self._mark_topics(topics, pending)
            for topic, joined_at in joined:
                await self._mark_topics([topic], [each for at, each in self._history if at > joined_at])
        except (AnswerError, anyio.get_cancelled_exc_class()):  # the next round marks them; twice does no harm
            self._pending = pending + self._pending
            for topic, joined_at in joined:
                topic.joined_at = joined_at if topic.joined_at is None else min(joined_at, topic.joined_at)
            self._wakeup.set()
            raise
        return number

    async def _mark_topics(self, topics: Sequence[Topic], changes: Sequence[Changes]) -> None:
        views = Views()
        for each in changes:
            self._places.check(self._store.times_opened)
            series, experiments = self._places.unknown(each)
            if series or experiments:
                await self._store.call(self._places.look_up, series, experiments)
            self._places.add(each, views)
        if changes:
            for topic in topics:
                topic.source.mark(views)

    async def _compute(self, works: "deque[tuple[Topic, Compute]]", number: int) -> None:
        """Compute frames of the first topics in the queue, which leave it, in one turn of the store's thread.

        While a client catches up, its events take turns with these: one turn for each topic would take long.
        """
        start = self._clock()
        try:
            done = await self._store.call(_encode_frames, [(compute, topic.name) for topic, compute in works], number)
        except AnswerError:
            for topic, _ in works:
                topic.source.mark_all()
            raise
        for encoded in done:
            topic, _ = works.popleft()
            interval = self._limits.page_seconds if topic.source.is_page else self._limits.chart_seconds
            topic.due = start + max(interval, encoded.seconds / self._limits.max_share)
            topic.refreshed = start
            self._busy_seconds += encoded.seconds
            if encoded.data is not None:
                topic.add(Frame(number, encoded.data))
                for viewer in topic.viewers:
                    viewer.wake()


def parse_topic(name: str) -> FrameSource:
    """Return what computes the frames of a topic. Raises AnswerError."""
    kind, _, rest = name.partition("/")
    if len(name) <= MAX_TOPIC_BYTES:
        if name == "home":
            return HomeFrame()
        if kind == "e" and rest and "/" not in rest:
            return ExperimentFrame(rest)
        parts = rest.split("/", 3)
        if kind == "c" and len(parts) == 4 and parts[1] in {"band", "members", "both"} and parts[3]:  # noqa: PLR2004 # named below
            experiment, lines, width, metric = parts
            if width.isascii() and width.isdecimal() and 0 < int(width[:20]) < _MAX_JUMP:
                return ChartFrame(experiment, msgspec.convert(lines, Lines), int(width), metric)
    raise AnswerError(
        400, "topic", f"no such topic: {name[:100]}", fix="subscribe to home, e/ID or c/ID/LINES/WIDTH/METRIC"
    )


def reset_frame(topic: str, number: int) -> Frame:
    """Return the frame by which a client reads its view again."""
    return Frame(number, ColumnWriter().encode({"topic": topic, "frame": number, "kind": "reset"}))


class _Encoded(NamedTuple):
    data: bytes | None
    seconds: float
    """CPU time of the store's thread: waiting for a busy machine is no work, after which views would pause longer."""


def _encode_frames(store: Store, works: Sequence[tuple[Compute, str]], number: int) -> list[_Encoded]:
    """Compute and encode frames, as many as fit into a turn; at least one."""
    done: list[_Encoded] = []
    started = time.monotonic()
    begin = time.thread_time()
    for compute, topic in works:
        writer = ColumnWriter()
        try:
            content = compute(store, writer)
        except StoreError:
            raise
        except Exception as error:  # a view that cannot be computed must not hold up the others
            if not (isinstance(error, AnswerError) and error.status == HTTPStatus.NOT_FOUND):
                log().error("dashboard.view_failed", topic=topic, exc_info=True)
            writer, content = ColumnWriter(), {"kind": "refetch"}
        data = None if content is None else writer.encode({"topic": topic, "frame": number, **content})
        end = time.thread_time()
        done.append(_Encoded(data, end - begin))
        begin = end
        if time.monotonic() - started > _TURN_SECONDS:
            break
    return done


def _size(changes: Changes) -> int:
    return 1 + len(changes.series) + len(changes.runs)
