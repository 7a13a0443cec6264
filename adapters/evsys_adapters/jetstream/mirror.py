"""`Mirror`: writes what `nats_relay` sends to an ordinary journal, in the same streams and under the same sequences.

One message is under way at a time: it is acknowledged after its events are synced to disk, and only then the server
sends the next one. With more of them a kill would let new messages overtake those that come again, and a journal
cannot be written backwards. A message that comes again changes nothing.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from evsys_adapters.jetstream.connection import AnsweredError, ConnectionConfig, JetStreamConnection
from evsys_adapters.jetstream.messages import ReceivedBatch, read_message
from evsys_bus.diagnostics import log
from evsys_bus.disk import OsDisk
from evsys_bus.errors import JournalOpenError, ParkedError, RetryLaterError, UnrecordedError
from evsys_bus.files import FileLock, write_into_place
from evsys_bus.journal import JournalReader, JournalWriter, layout

FOLDER: Final = "mirror"
"""In the journal's directory: the lock of the mirror, and parts of events that have not arrived completely."""
ACK_WAIT_SECONDS: Final = 10.0
_PULLED_MESSAGES: Final = 256
_PULL_SECONDS: Final = 30.0
_EMPTY_SECONDS: Final = 0.3
_LATE_SECONDS: Final = 5.0
_MAX_PAUSE_SECONDS: Final = 10.0
_FIRST_PAUSE_SECONDS: Final = 0.2
_DISK_PAUSE_SECONDS: Final = 1.0
_CLOSE_SECONDS: Final = 2.0
_MAINTENANCE_SECONDS: Final = 10.0
_NO_CONSUMER: Final = 10014
_NO_STREAM: Final = 10059
_TAKEN: Final = frozenset({10099, 10100})
_UNAVAILABLE: Final = 500
_REQUEST_OVER: Final = frozenset({"404", "408", "409"})
_HEARTBEAT: Final = "100"


class JournalMirror:
    """The journal that is written. Its methods block, and only one of them may run at a time.

    Args:
        directory: The journal.
    """

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        self.events = 0
        """How many events were recorded."""
        self.missing: list[tuple[str, int, int]] = []
        """Gaps that were found: the stream, and the first and the last sequence that are missing."""
        self._folder: Final = directory / FOLDER
        self._lock: FileLock | None = None
        self._writers: dict[str, JournalWriter] = {}
        self.id = ""
        """The id of the journal."""

    def open(self) -> None:
        """Lock the directory for this mirror, and the streams in it whose originals are live.

        Raises:
            JournalOpenError: Another mirror writes it, or it cannot be written.
        """
        disk = OsDisk()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock.acquire_exclusive(self._folder / "lock")
            self.id = layout.mark_as_journal(disk, str(self.directory))
        except OSError as error:
            raise JournalOpenError(
                f"the mirror {self.directory} cannot be written: {error.strerror}", fix="give another directory"
            ) from None
        if self._lock is None:
            raise JournalOpenError(f"another mirror writes {self.directory}", fix="end it, or give another directory")
        for stream in JournalReader(self.directory).streams(*layout.DELIVERED_FAMILIES):
            owner = layout.read_owner(disk, f"{self.directory}/{stream}/{layout.LOCK}")
            if owner is not None and owner.is_live and not owner.boot:  # with a boot, a bus wrote it
                self._writer(stream)

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._writers)

    def record(self, batch: ReceivedBatch) -> tuple[int, int] | None:
        """Record a batch, and sync it. What the stream already has is skipped.

        Returns:
            The first and the last sequence that are missing before it; None if none are.

        Raises:
            UnrecordedError, OSError: The disk refuses it; give it again.
            JournalOpenError: The stream cannot be opened.
        """
        if batch.ending is not None:
            self._end(batch)
            return None
        writer = self._writer(batch.stream)
        known = writer.next_sequence - 1
        if batch.last <= known:
            self._remove_parts(batch)
            return None
        payloads = batch.payloads if batch.part is None else self._join_parts(batch, batch.part)
        if payloads is None:
            return None
        gap = (known + 1, batch.first - 1) if batch.first > known + 1 else None
        writer.append_batch(zip(range(batch.first, batch.last + 1), payloads, strict=True))
        writer.set_live(True)
        self.events += batch.last - max(known, batch.first - 1)
        self._remove_parts(batch)
        if gap is not None:
            self.missing.append((batch.stream, *gap))
        return gap

    def _writer(self, stream: str) -> JournalWriter:
        writer = self._writers.get(stream)
        if writer is None:
            writer = JournalWriter(
                self.directory, stream=stream, flush="never", flush_seconds=_MAINTENANCE_SECONDS, reserve_bytes=0
            ).open()
            self._writers[stream] = writer
        return writer

    def _end(self, batch: ReceivedBatch) -> None:
        """Declare that no process writes the original, and release the stream."""
        writer = self._writer(batch.stream)
        if writer.next_sequence - 1 > batch.last:
            return  # it comes again, and the stream was continued meanwhile
        writer.set_live(False)
        if batch.ending == "closed":
            writer.close()
        else:
            writer.abandon(_CLOSE_SECONDS)
        del self._writers[batch.stream]

    def _join_parts(self, batch: ReceivedBatch, part: tuple[int, int]) -> list[bytes] | None:
        """Store a part of an event; with the last one return the whole payload. None if a part is missing."""
        number, count = part
        if number < count:
            with write_into_place(self._part_path(batch, number, count), mode=0o600) as file:
                file.write(batch.payloads[0])
            return None
        try:
            parts = [self._part_path(batch, each, count).read_bytes() for each in range(1, count)]
        except FileNotFoundError:
            log().warning("mirror.part_missing", stream=batch.stream, sequence=batch.first)
            return None  # the next message has the gap
        return [b"".join((*parts, batch.payloads[0]))]

    def _part_path(self, batch: ReceivedBatch, number: int, count: int) -> Path:
        return self._folder / f"{batch.stream}.{batch.first}.{number}-{count}.part"

    def _remove_parts(self, batch: ReceivedBatch) -> None:
        if batch.part is not None:
            for path in self._folder.glob(f"{batch.stream}.{batch.first}.*.part"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release all streams. Everything is synced already; they stay as live, or not, as they were."""
        for writer in self._writers.values():
            writer.abandon(_CLOSE_SECONDS)
        self._writers.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None


class Mirror:
    """Takes messages from a stream of JetStream, and records them.

    Args:
        config: Where the servers are.
        directory: The journal.
        stream: The stream of JetStream.
        subject: Which messages to take, such as ``evsys.>``.
        consumer: The name of the durable consumer; by default one made of the journal's id.
        ack_wait_seconds: How long the server waits for the acknowledgement of a message before it sends it again.
        note: Called with each line about what happens.
    """

    def __init__(
        self,
        config: ConnectionConfig,
        directory: Path,
        *,
        stream: str,
        subject: str,
        consumer: str | None = None,
        ack_wait_seconds: float = ACK_WAIT_SECONDS,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.journal: Final = JournalMirror(directory)
        self.messages = 0
        """How many messages were acknowledged."""
        self._connection: Final = JetStreamConnection(config, "evsys-bus mirror")
        self._stream: Final = stream
        self._subject: Final = subject
        self._consumer = consumer or ""
        self._ack_wait_seconds: Final = ack_wait_seconds
        self._note: Final = note
        self._subscription: Any = None
        self._inbox = ""
        self._pulled = 0
        """How many messages of the last request may still come."""

    async def run(self, *, once: bool = False) -> None:
        """Mirror until `stop` is called.

        Args:
            once: End when the server has no more messages; then a server that does not answer is an error.

        Raises:
            ParkedError: A person has to do something: credentials, permissions, settings of the stream.
            RetryLaterError: The server does not answer; only with ``once``.
            JournalOpenError: The journal cannot be written, or another mirror writes it.
        """
        await asyncio.to_thread(self.journal.open)
        pause, shown = _FIRST_PAUSE_SECONDS, ""
        try:
            while not self._connection.is_stopped:
                before = self.messages
                try:
                    await self._mirror(once=once)
                except RetryLaterError as error:
                    if once:
                        raise
                    pause = _FIRST_PAUSE_SECONDS if self.messages > before else min(2 * pause, _MAX_PAUSE_SECONDS)
                    if error.what != shown or self.messages > before:
                        shown = error.what
                        self._note(f"{shown}; trying again")
                    await self._connection.sleep(pause)
                else:
                    return
        except TimeoutError:
            if not self._connection.is_stopped:
                raise
        finally:
            await self._connection.close()
            await asyncio.to_thread(self.journal.close)

    def stop(self) -> None:
        """End `run` after the message under way."""
        self._connection.stop()

    async def _mirror(self, *, once: bool) -> None:
        """Connect, and mirror until that fails or is stopped."""
        try:
            await self._open()
            await self._take_messages(once=once)
        except AnsweredError as error:
            raise self._delivery_error(error) from None

    async def _open(self) -> None:
        """Connect, and subscribe to the durable consumer, which is created if it is missing."""
        await self._connection.open()
        await self._find_consumer()
        client = self._connection.client
        self._inbox = client.new_inbox()
        self._subscription = await self._connection.call(client.subscribe(self._inbox))
        self._pulled = 0

    async def _find_consumer(self) -> None:
        jetstream = self._connection.jetstream
        if not self._consumer:
            self._consumer = f"mirror-{self.journal.id}"
        try:
            found = (await self._connection.call(jetstream.consumer_info(self._stream, self._consumer))).config
        except AnsweredError as error:
            if error.code != _NO_CONSUMER:
                raise
            settings = {
                "durable_name": self._consumer,
                "filter_subject": self._subject,
                "ack_policy": "explicit",
                "ack_wait": self._ack_wait_seconds,
                "max_ack_pending": 1,
            }
            found = (await self._connection.call(jetstream.add_consumer(self._stream, **settings))).config
        if found.max_ack_pending != 1 or getattr(found.ack_policy, "value", found.ack_policy) != "explicit":
            raise ParkedError(
                f"the consumer {self._consumer} allows {found.max_ack_pending} pending messages, so they could come "
                "out of order after a kill",
                fix=f"nats consumer edit {self._stream} {self._consumer} --max-pending 1; and --ack explicit",
            )

    async def _take_messages(self, *, once: bool) -> None:
        """Record and acknowledge messages until `stop`, or with ``once`` until there are none."""
        while not self._connection.is_stopped:
            message = await self._next_message(once=once)
            if message is None:
                if once and await self._is_empty():
                    return
                continue
            await self._record(message)
            await self._connection.call(message.ack())
            self.messages += 1

    async def _next_message(self, *, once: bool) -> Any:
        """Return the next message; None if a request for messages has ended without one."""
        expires = _EMPTY_SECONDS if once else _PULL_SECONDS
        if self._pulled <= 0:
            request = {"batch": _PULLED_MESSAGES, "expires": int(expires * 1e9)}
            if not once:
                request["idle_heartbeat"] = int(_LATE_SECONDS * 1e9)
            subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
            await self._connection.call(
                self._connection.client.publish(subject, json.dumps(request).encode(), self._inbox)
            )
            self._pulled = _PULLED_MESSAGES
        message = await self._connection.call(self._subscription.next_msg(timeout=None), 3 * _LATE_SECONDS)
        headers: dict[str, str] = message.headers or {}
        status = headers.get("Status")
        if status is None:
            self._pulled -= 1
            return message
        if status in _REQUEST_OVER:
            self._pulled = 0
        elif status != _HEARTBEAT:
            raise RetryLaterError(f"{self._connection.where} answers {status}: {headers.get('Description')}")
        return None

    async def _is_empty(self) -> bool:
        """Whether the server has no message for this mirror, and none that was sent and not acknowledged."""
        info = await self._connection.call(self._connection.jetstream.consumer_info(self._stream, self._consumer))
        return not info.num_pending and not info.num_ack_pending

    async def _record(self, message: Any) -> None:
        """Record a message; waits while the disk refuses it. One that is not of a relay is refused for good."""
        try:
            batch = read_message(message.subject, message.headers, message.data)
        except ValueError as error:
            log().warning("mirror.message_refused", why=str(error))
            self._note(f"refused: {error}")
            return
        while True:
            try:
                gap = await asyncio.to_thread(self.journal.record, batch)
            except (UnrecordedError, OSError) as error:
                if isinstance(error, JournalOpenError):
                    raise
                self._note(f"the disk does not take {batch.stream}: {error}; trying again")
                await self._connection.sleep(_DISK_PAUSE_SECONDS)
                await self._connection.call(message.in_progress())
                continue
            if gap is not None:
                first, last = gap
                why = "the original lacks them" if batch.after < first else "the server has lost or removed them"
                log().warning("mirror.gap", stream=batch.stream, first=first, last=last, why=why)
                self._note(f"{batch.stream}: events {first} to {last} are missing: {why}")
            return

    def _delivery_error(self, error: AnsweredError) -> RetryLaterError | ParkedError:
        where = f"the stream {self._stream} at {self._connection.where}"
        if error.code == _NO_STREAM:
            return RetryLaterError(f"{where} does not exist yet; nats_relay creates it")
        if error.code in _TAKEN:
            return ParkedError(
                f"{where} has another mirror for {self._subject}: {error}",
                fix=f"end that one: nats consumer rm {self._stream}; or continue as it: --consumer NAME",
            )
        if error.status >= _UNAVAILABLE:
            return RetryLaterError(f"{where}: {error}")
        return ParkedError(f"{where} refuses the mirror: {error}", fix=f"nats stream info {self._stream}")
