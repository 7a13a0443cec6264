"""`NatsRelay`: sends a journal to a stream of JetStream, from which ``evsys-bus mirror`` writes it again elsewhere.

A message is a batch of consecutive events of one stream; the next one of that stream is sent when the server has stored
it. What the server answers decides what happens:

    stored, or known by its id    delivered
    the stream is full            RetryLaterError; the journal is the queue
    no answer, no leader          RetryLaterError; a repeated message is recognized by its id, or by the mirror
    settings of the stream that
      would lose events           ParkedError
    credentials, permissions      ParkedError; see `evsys_adapters.jetstream.connection`
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Final, NamedTuple

import msgspec

from evsys_adapters.common.params import require_package, validate_params
from evsys_adapters.jetstream.connection import AnsweredError, ConnectionConfig, JetStreamConnection
from evsys_adapters.jetstream.messages import (
    HEADER_BYTES,
    Ending,
    Message,
    batch_messages,
    ending_message,
    split_into_messages,
)
from evsys_bus.adapter import Ranks
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError
from evsys_bus.journal import JournalReader
from evsys_bus.sink import RawRecord, Sink

_FULL: Final = frozenset({10077, 10023, 10028, 10047, 10122})
"""Codes of errors of a stream, a server or an account that has no room now."""
_NOT_FOUND: Final = 10059
_WRONG_STREAM: Final = 10060
_TOO_LARGE: Final = 10054
_NOT_ENABLED: Final = frozenset({10039, 10076})
_UNAVAILABLE: Final = 500
_MIN_BODY_BYTES: Final = 1024
_MIN_BATCH_SECONDS: Final = 0.1
_MAX_BATCH_SECONDS: Final = 10.0
_SECONDS_PER_STREAM: Final = 0.01
"""How much longer a batch waits with each stream that has events: a relay sends about 100 messages a second."""
_MAX_MESSAGE_BYTES: Final = 1 << 20
"""The largest message, also where the server takes larger ones."""
_MESSAGES_IN_STREAM: Final = 4
"""A message is at most this part of the stream's ``max_bytes``."""


class NatsRelayConfig(ConnectionConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Parameters of `NatsRelay`."""

    stream: Annotated[str, msgspec.Meta(pattern=r"^[^\s.*>/\\]+$")] = "EVSYS"
    """The stream of JetStream."""
    subject_prefix: Annotated[str, msgspec.Meta(pattern=r"^[^\s.*>]+(\.[^\s.*>]+)*$")] = "evsys"
    """Subjects are ``PREFIX.JOURNAL.STREAM``. Journals with the same prefix are mirrored into one; use a prefix for
    each job, or each tenant."""
    create: bool = True
    """Whether to create the stream if it does not exist, for all subjects with the first word of the prefix."""
    replicas: Annotated[int, msgspec.Meta(ge=1, le=5)] = 1
    """On how many servers a created stream is stored."""
    max_bytes: Annotated[int, msgspec.Meta(ge=1 << 16)] | None = None
    """The size of a created stream; beyond it the events wait in the journal. None for no limit of its own."""

    def __post_init__(self) -> None:
        ConnectionConfig.__post_init__(self)
        require_package("nats_relay", "nats", "nats")


class NatsRelay(Sink):
    """Sends all streams of the journal to JetStream, for ``evsys-bus mirror``; see `NatsRelayConfig`."""

    name: ClassVar[str] = "nats_relay"
    Config: ClassVar[type | None] = NatsRelayConfig
    raw: ClassVar[bool] = True
    ranks: ClassVar[Ranks | None] = "all"
    write_timeout_seconds: float = 86_400.0  # every request has its own timeout
    max_batch_events: int = 20_000
    max_batch_bytes: int = 8 << 20
    """Large, for many streams: each gets messages of its own, and a mirror syncs once for each message."""
    max_batch_seconds: float = _MIN_BATCH_SECONDS
    idle_seconds: float | None = 2.0

    def __init__(self, **params: Any) -> None:
        """Validate the parameters against `NatsRelayConfig`."""
        self.config = validate_params(NatsRelayConfig, params)
        self._connection = JetStreamConnection(self.config, "evsys-bus nats_relay")
        self._jetstream: Any = None
        self._max_body_bytes = _MIN_BODY_BYTES
        self._sent: dict[str, int] = {}
        """By stream, the sequence of the last event that the server has."""
        self._ended: dict[str, int] = {}
        """By stream whose end was announced, the sequence of its last event."""
        self._journal_id = ""

    async def open(self) -> None:
        """Connect, and check the stream, or create it.

        Raises:
            ParkedError: The stream has settings that would lose events, or a person has to do something else.
            RetryLaterError: The server does not answer.
        """
        await self._connection.open()
        self._jetstream = self._connection.jetstream
        directory = getattr(self.evsys_attached, "directory", None)
        self._journal_id = (await asyncio.to_thread(lambda: JournalReader(directory).id) if directory else "") or "0"
        config = await self._stream_config()
        _check_stream(self.config, config)
        limits = [_MAX_MESSAGE_BYTES, self._connection.client.max_payload]
        if (config.max_msg_size or -1) > 0:
            limits.append(config.max_msg_size)
        if (config.max_bytes or -1) > 0:
            limits.append(config.max_bytes // _MESSAGES_IN_STREAM)
        self._max_body_bytes = min(limits) - HEADER_BYTES
        if self._max_body_bytes < _MIN_BODY_BYTES:
            raise ParkedError(
                f"{self._where} takes messages of {min(limits)} bytes at most",
                fix=f"set max_payload, max_msg_size and max_bytes to {HEADER_BYTES + _MIN_BODY_BYTES} or more",
            )

    async def _stream_config(self) -> Any:
        """Return the settings of the stream, which is created if it is missing and may be."""
        config = self.config
        subjects = f"{config.subject_prefix.partition('.')[0]}.>"  # so that other jobs can use the stream
        try:
            return (await self._request(self._jetstream.stream_info(config.stream))).config
        except _NoStreamError:
            if not config.create:
                command = f"nats stream add {config.stream} --subjects '{subjects}' --retention work --discard new"
                raise ParkedError(f"{self._where} does not exist", fix=f"{command}; or create: true") from None
        settings = {
            "subjects": [subjects],
            "retention": "workqueue",
            "discard": "new",
            "storage": "file",
            "num_replicas": config.replicas,
            "max_bytes": config.max_bytes or -1,
        }
        return (await self._request(self._jetstream.add_stream(name=config.stream, **settings))).config

    async def write(self, batch: Sequence[RawRecord]) -> int | None:
        """Send the batch, one message of each stream at a time; returns how many of its events the server has."""
        by_stream: dict[str, list[RawRecord]] = {}
        for stream, records in groupby(batch, attrgetter("stream")):
            by_stream.setdefault(stream, []).extend(records)
        for stream, records in by_stream.items():
            sent = self._sent.get(stream, 0)
            if records[0].sequence <= sent:  # it was stored before there was an error of another stream
                by_stream[stream] = [each for each in records if each.sequence > sent]
        try:
            if not self._connection.is_open:
                await self.open()
            await self._send(by_stream)
        except (DeliveryError, OSError, asyncio.CancelledError):
            done = sum(1 for _ in takewhile(lambda each: each.sequence <= self._sent.get(each.stream, 0), batch))
            if not done:
                raise
            return done  # what was stored is not sent again
        self.max_batch_seconds = min(max(_MIN_BATCH_SECONDS, len(by_stream) * _SECONDS_PER_STREAM), _MAX_BATCH_SECONDS)
        return None

    async def _send(self, by_stream: Mapping[str, Sequence[RawRecord]]) -> None:
        """Send events of several streams, with one message of each under way."""
        remaining = {stream: self._messages_of(events) for stream, events in by_stream.items()}
        while remaining:
            next_messages: list[_StreamMessage] = []
            for stream, messages in list(remaining.items()):
                message = next(messages, None)
                if message is None:
                    del remaining[stream]
                else:
                    next_messages.append(message)
            if len(next_messages) == 1:
                [message] = next_messages
                await self._publish(message.stream, message.message)
                self._note_stored(message)
            elif next_messages:
                await self._publish_all(next_messages)

    def _messages_of(self, events: Sequence[RawRecord]) -> Iterator["_StreamMessage"]:
        """Yield the messages for events of one stream."""
        for each in split_into_messages(events, self._max_body_bytes):
            stream, first, last = each[0].stream, each[0].sequence, each[-1].sequence
            after = min(self._sent.get(stream, first - 1), first - 1)
            messages = list(batch_messages(each, after, self._max_body_bytes))
            for message in messages:
                yield _StreamMessage(stream, message, last if message is messages[-1] else None)

    async def _publish_all(self, messages: Sequence["_StreamMessage"]) -> None:
        """Publish messages of different streams, and wait until the server has answered all of them."""
        answers: list[asyncio.Future[object]] = [
            await self._request(
                self._jetstream.publish_async(
                    self._subject(each.stream),
                    each.message.body,
                    stream=self.config.stream,
                    headers=each.message.headers,
                )
            )
            for each in messages
        ]
        await self._request(asyncio.wait(answers))
        failed = [answer for answer in answers if answer.exception() is not None]
        for each, answer in zip(messages, answers, strict=True):
            if answer not in failed:
                self._note_stored(each)
        if failed:
            await self._request(failed[0])

    def _note_stored(self, message: "_StreamMessage") -> None:
        if message.last is not None:
            self._sent[message.stream] = message.last
            self._ended.pop(message.stream, None)

    async def on_idle(self) -> None:
        """Announce the streams that have ended."""
        await self._announce_endings()

    async def close(self) -> None:
        """Announce the streams that have ended, and disconnect."""
        try:
            if self._connection.is_open:
                await self._announce_endings()
        finally:
            await self._connection.close()

    def mark(self) -> dict[str, Any]:
        """Return what was sent, as plain data."""
        return {"sent": dict(self._sent), "ended": dict(self._ended)}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Restore what was sent from a mark."""
        self._sent = dict(mark.get("sent", {}))
        self._ended = dict(mark.get("ended", {}))

    async def _announce_endings(self) -> None:
        directory = getattr(self.evsys_attached, "directory", None)
        if directory is None:
            return
        candidates = {stream: last for stream, last in self._sent.items() if self._ended.get(stream) != last}
        for stream, last in candidates.items():
            ending = await asyncio.to_thread(_ending_of, directory, stream, last)
            if ending is not None:
                if not self._connection.is_open:
                    await self.open()
                await self._publish(stream, ending_message(stream, last, ending))
                self._ended[stream] = last

    async def _publish(self, stream: str, message: Message) -> None:
        """Publish one message, and wait until the server has stored it."""
        await self._request(
            self._jetstream.publish(
                self._subject(stream), message.body, stream=self.config.stream, headers=message.headers
            )
        )

    def _subject(self, stream: str) -> str:
        return f"{self.config.subject_prefix}.{self._journal_id}.{stream}"

    async def _request(self, request: Any) -> Any:
        """Wait for an answer of JetStream, and convert its errors."""
        try:
            return await self._connection.call(request)
        except AnsweredError as error:
            if error.code == _NOT_FOUND:
                raise _NoStreamError(f"{self._where} does not exist") from None
            raise self._delivery_error(error) from None

    def _delivery_error(self, error: AnsweredError) -> DeliveryError:
        code, text = error.code, str(error)
        if code in _FULL:
            return RetryLaterError(
                f"{self._where} is full: {text}; a mirror empties it, and events wait in the journal until then"
            )
        if code == _TOO_LARGE:
            return RetryLaterError(f"{self._where} takes smaller messages now: {text}")
        if code == _WRONG_STREAM:
            subject = f"{self.config.subject_prefix}.>"
            return ParkedError(
                f"{self._where} does not get {subject}: {text}",
                fix="give the stream that subject, or set stream and subject_prefix to those of one stream",
            )
        if code in _NOT_ENABLED:
            return ParkedError(f"{self._where}: {text}", fix="enable JetStream for the server and the account")
        if error.status >= _UNAVAILABLE:
            return RetryLaterError(f"{self._where}: {text}")
        return ParkedError(f"{self._where} refuses it: {text}", fix=f"nats stream info {self.config.stream}")

    @property
    def _where(self) -> str:
        return f"the stream {self.config.stream} at {self._connection.where}"


class _StreamMessage(NamedTuple):
    """A message of a stream."""

    stream: str
    message: Message
    last: int | None
    """The last event that the server has when it has this message; None for a part that others follow."""


class _NoStreamError(RetryLaterError):
    """The stream does not exist."""


def _check_stream(relay: NatsRelayConfig, config: Any) -> None:
    """Raise ParkedError if events would be lost with these settings of a stream, or not be taken."""
    name = relay.stream
    sample = f"{relay.subject_prefix}.journal.stream"
    if not any(_matches(each, sample) for each in config.subjects or ()):
        raise ParkedError(
            f"the stream {name} does not take {relay.subject_prefix}.>, but {', '.join(config.subjects or ())}",
            fix=f"nats stream edit {name} --subjects ...; or set stream and subject_prefix to those of one stream",
        )
    expected = {"discard": "new", "retention": "workqueue"}
    why = {
        "discard": "a full stream would drop its oldest messages, and a message larger than it at once",
        "retention": "messages must stay until a mirror has stored them, and be removed then",
    }
    for setting, value in expected.items():
        found = getattr(config, setting)
        found = getattr(found, "value", found)
        if found != value:
            flag = {"workqueue": "work"}.get(value, value)
            fix = f"nats stream edit {name} --discard {flag}"
            if setting == "retention":
                fix = f"remove the stream and create it with --retention {flag}, or set `stream` to another one"
            raise ParkedError(f"the stream {name} has {setting} {found}, not {value}: {why[setting]}", fix=fix)


def _matches(pattern: str, subject: str) -> bool:
    """Whether a subject is one of those of a pattern with wildcards."""
    words = subject.split(".")
    for index, each in enumerate(pattern.split(".")):
        if each == ">":
            return index < len(words)
        if index == len(words) or each not in {"*", words[index]}:
            return False
    return len(pattern.split(".")) == len(words)


def _ending_of(directory: str, stream: str, last: int) -> Ending | None:
    """Return how the writer of a stream has ended; None if it has not, or if there are events after the last one."""
    reader = JournalReader(directory)
    if reader.is_live(stream):
        return None
    tail = reader.tail(stream, last)
    if any(True for _ in tail.poll()):
        return None
    return "closed" if tail.is_closed else "gone"
