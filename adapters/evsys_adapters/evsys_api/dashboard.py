"""`DashboardDelivery`: sends events, as the journal holds them, to a dashboard of this package.

One request per stream of a batch, one at a time: the dashboard ignores what it has (a stream and a sequence identify an
event), so a repeated request changes nothing. Each request names the last event of its stream that was acknowledged
before. A dashboard that lacks events up to there, because its database is new or because it was not running, reads the
journal itself if it is on this machine, and delivery continues after that.

    200 with the sequence    delivered; without it, RetryLaterError: a proxy, a login page
    409                      the dashboard lacks earlier events: it imports the journal, else ParkedError with the fix
    401, 403                 the token of the running dashboard is read again; then ParkedError
    413                      BatchTooLargeError
    408, 425, 429, 5xx       RetryLaterError, after ``Retry-After`` if given
    no response              RetryLaterError
    400 and others           ParkedError: versions that do not fit

aiohttp is imported with the first connection.
"""

import asyncio
import importlib
import ipaddress
import os
import zlib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from urllib.parse import quote, urlsplit

import msgspec

from evsys_adapters.common.http_client import is_temporary, retry_after_seconds
from evsys_adapters.dashboard.state_file import SERVICE, read_state, state_path
from evsys_bus.codec import encode
from evsys_bus.diagnostics import log
from evsys_bus.errors import BatchTooLargeError, DeliveryError, ParkedError, RetryLaterError
from evsys_bus.events import Envelope
from evsys_bus.journal import JournalReader, TailReader

if TYPE_CHECKING:
    import aiohttp

PROTOCOL: Final = 1
"""The newest version of the dashboard's protocol that is spoken here."""
IDLE_SECONDS: Final = 2.0
"""How often a dashboard is looked for, and how often what couriers publish is sent."""
IMPORT_POLL_SECONDS: Final = 0.25
LIVE_BATCH_SECONDS: Final = 0.1
"""Between two batches, while events come faster: viewers see each within a third of a second."""
_COMPRESSED_FROM_BYTES: Final = 1024
_MAX_PART_BYTES: Final = 1 << 20
"""Size of a request with events of couriers."""
_READ_ATTEMPTS: Final = 8
"""How often an unreadable segment of a courier's stream is tried, `IDLE_SECONDS` apart, before it is skipped."""
_UNREACHABLE: Final = frozenset({HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT})


class Reply(NamedTuple):
    """A response: status, headers, and the JSON object in its body, empty if there is none."""

    status: int
    headers: Mapping[str, str]
    body: dict[str, Any]


class DashboardDelivery:
    """Delivers the events of one journal to a dashboard.

    Args:
        url: URL of the dashboard, without a path; None for the running dashboard of this user.
        token: Its token, unless it is the running dashboard of this user.
        journal: The journal; None for a replay, whose events are sent and nothing else.
        delivered: By stream, the sequence of the last event that was acknowledged, here or to no destination; updated.
        timeout_seconds: Timeout of one request.
    """

    def __init__(
        self,
        url: str | None,
        token: str | None,
        *,
        journal: str | None,
        delivered: dict[str, int],
        timeout_seconds: float,
    ) -> None:
        self._configured_url: Final = url
        self._configured_token: Final = token
        self.journal: Final = None if journal is None else os.path.abspath(journal)  # noqa: PTH100  # as text
        self._delivered: Final = delivered
        self._timeout_seconds: Final = timeout_seconds
        self._session: aiohttp.ClientSession | None = None
        self._client_errors: tuple[type[Exception], ...] = ()
        self.url: str | None = url
        """URL of the dashboard; None while none is running."""
        self._token = token
        self._tails: Final[dict[str, TailReader]] = {}
        """What reads the couriers' streams."""
        self._finished_streams: Final[set[str]] = set()
        """Those that no writer continues, and that were sent."""
        self._import_id: str | None = None
        self._has_imported = False
        """Whether the dashboard has read the journal since the last delivered event."""
        self.is_import_due = False
        """Whether events were acknowledged that the dashboard lacks."""
        self.was_found = False
        """Whether a dashboard has accepted events of this journal."""
        self.database: str | None = None
        """The id of the database that accepted the last events; None if there were none."""

    def find(self) -> bool:
        """Look for the dashboard, without asking it; returns whether there is one."""
        state = read_state()
        if self._configured_url is None:
            self.url = None if state is None else state.url
        is_own = state is not None and is_same_server(state.url, self.url)
        self._token = state.token if state is not None and is_own else self._configured_token
        return self.url is not None

    @property
    def is_importing(self) -> bool:
        """Whether the dashboard reads the journal now."""
        return self._import_id is not None

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Send the batch; returns how many of its events were delivered, None for all.

        Raises:
            DeliveryError: See the module's table.
        """
        done = 0
        try:
            await self.catch_up()
            for stream, envelopes in groupby(batch, key=lambda each: each.stream):
                part = list(envelopes)
                last = self._delivered.get(stream, 0)
                fresh = [each for each in part if each.seq > last]
                if fresh:
                    await self._send(stream, [_payload(each) for each in fresh], fresh[-1].seq)
                done += len(part)
        except asyncio.CancelledError:
            if not done:
                raise
            return done
        except (DeliveryError, OSError):  # acknowledge first what was sent before it
            if not done:
                raise
            return done
        return None

    async def catch_up(self) -> None:
        """Let the dashboard import the journal if it lacks events that were acknowledged.

        Raises:
            RetryLaterError: The import has not ended yet.
            ParkedError: The dashboard cannot read the journal.
        """
        if self.is_import_due and self._import_id is None:
            await self._start_import()
        if self._import_id is not None:
            await self._check_import()

    async def send_courier_events(self) -> None:
        """Send what the couriers of the journal have published since the last call.

        Raises:
            DeliveryError: See the module's table.
        """
        if self.journal is None:
            return
        reader = JournalReader(self.journal)
        try:
            names = reader.streams("c")
        except OSError as error:
            raise RetryLaterError(f"the journal {self.journal} cannot be read: {error}") from error
        for stream in names:
            if stream in self._finished_streams:
                continue
            is_finished = stream != names[-1] and not reader.is_live(stream)  # checked before it is read
            tail = self._tails.pop(stream, None) or reader.tail(
                stream, self._delivered.get(stream, 0), patience=_READ_ATTEMPTS
            )
            await self._send_new(stream, tail)
            if is_finished:
                self._finished_streams.add(stream)
            else:
                self._tails[stream] = tail  # not after a failure: it is read again from the last acknowledged event

    async def _send_new(self, stream: str, tail: TailReader) -> None:
        """Send what a stream has from the tail's position on."""
        payloads: list[bytes] = []
        size = last = 0
        skipped = len(tail.unreadable_segments)
        runs = tail.poll_runs()
        failure: OSError | None = None
        while True:
            try:
                run = next(runs, None)
            except OSError as error:
                failure = error
                break
            if run is None:
                break
            for last, payload in enumerate(() if run.is_carried else run.payloads, run.first_sequence):
                payloads.append(bytes(payload))
                size += len(payload)
                if size > _MAX_PART_BYTES:
                    await self._send(stream, payloads, last)
                    payloads, size = [], 0
        if payloads:
            await self._send(stream, payloads, last)
        for segment, error in list(tail.unreadable_segments.items())[skipped:]:
            fix = f"make it readable, then import into a new database: evsys-bus dash --import {self.journal}"
            log().warning("dashboard.segment_unreadable", segment=segment, error=str(error), fix=fix)
        if failure is not None:
            self._tails[stream] = tail  # it counts the attempts; all that it has returned was sent
            raise RetryLaterError(f"the stream {stream} of the journal cannot be read: {failure}") from failure

    async def close(self) -> None:
        """Close the connection."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _send(self, stream: str, payloads: Sequence[bytes], last: int) -> None:
        """Send events of one stream, and wait until the dashboard has them."""
        query = f"stream={quote(stream)}&after={self._delivered.get(stream, 0)}"
        if self.journal is not None:
            query += f"&journal={quote(os.fsencode(self.journal))}"
        body = b"".join((_array_header(len(payloads)), *payloads))
        headers = {"Content-Type": "application/msgpack"}
        if len(body) >= _COMPRESSED_FROM_BYTES:
            compressor = zlib.compressobj(1, wbits=31)
            body = compressor.compress(body) + compressor.flush()
            headers["Content-Encoding"] = "gzip"
        reply = await self._request("POST", f"/api/ingest?{query}", body, headers)
        if reply.status == HTTPStatus.CONFLICT:
            await self._resolve_missing(stream, reply)
            return await self._send(stream, payloads, last)
        self._check(reply)
        sequence = reply.body.get("sequence")
        if type(sequence) is not int or sequence < last:
            raise RetryLaterError(f"{self.url} answers {reply.status} without confirming event {last} of {stream}")
        await self._note_database(reply.body.get("store"))
        self._delivered[stream] = last
        self.was_found = True
        self._has_imported = False
        return None

    async def _note_database(self, database: object) -> None:
        """Note which database has the events; a new one is to get the streams too that have no more of them."""
        previous = self.database
        if not isinstance(database, str) or database == previous:
            return
        self.database = database
        if previous is not None and not self._has_imported and is_local(self.url or ""):
            self.is_import_due = True
            await self.catch_up()

    async def _resolve_missing(self, stream: str, reply: Reply) -> None:
        """Let the dashboard read the events that it lacks; returns once nothing more of them can be read."""
        sequence = reply.body.get("sequence")
        watermark = sequence if type(sequence) is int else 0
        acknowledged = self._delivered.get(stream, 0)
        if watermark >= acknowledged:
            raise RetryLaterError(f"{self.url} answers 409 although it has {watermark} events of {stream}")
        if self.journal is None or self._has_imported:  # what it still lacks is not in the journal any more
            if self.journal is not None:
                missing, why = acknowledged - watermark, "they were removed from the journal"
                log().warning("evsys.events_absent", stream=stream, events=missing, why=why)
            self._delivered[stream] = watermark
            return
        self.is_import_due = True
        await self.catch_up()

    async def _start_import(self) -> None:
        if self.journal is None:
            self.is_import_due = False
            return
        fix = f"evsys-bus dash --import {self.journal}, on a machine with the dashboard and this directory"
        if not is_local(self.url or ""):
            raise ParkedError(f"{self.url} lacks earlier events of this journal, and is on another machine", fix=fix)
        body = msgspec.json.encode({"journal": self.journal})
        reply = await self._request("POST", "/api/import", body, {"Content-Type": "application/json"})
        if reply.status in {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.UNPROCESSABLE_ENTITY}:
            raise ParkedError(f"{self.url} cannot read the journal: {_message(reply)}", fix=fix)
        self._check(reply)
        self._import_id = str(reply.body.get("import"))

    async def _check_import(self) -> None:
        """Return once the import has ended."""
        assert self._import_id is not None
        reply = await self._request("GET", f"/api/import/{quote(self._import_id, safe='')}")
        if reply.status == HTTPStatus.NOT_FOUND:  # the dashboard was restarted meanwhile
            self._import_id = None
            raise RetryLaterError(f"{self.url} has forgotten the import", after_seconds=IMPORT_POLL_SECONDS)
        self._check(reply)
        state, events, total, error = (reply.body.get(name) for name in ("state", "events", "of", "error"))
        if error or state == "failed":
            self._import_id = None
            fix = f"evsys-bus journal verify {self.journal}; then: evsys-bus dash --import {self.journal}"
            raise ParkedError(f"{self.url} could not import the journal: {error}", fix=fix)
        if state in {"waiting", "running"}:
            what = f"{self.url} imports what it lacks: {events or 0} of {total or '?'} events"
            raise RetryLaterError(what, after_seconds=IMPORT_POLL_SECONDS, waiting=True)
        self._import_id = None
        self.is_import_due = False
        self._has_imported = True

    async def _request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send one request; after a refused token once more with that of the running dashboard."""
        token = self._token
        reply = await self._request_once(method, path, body, headers)
        if reply.status == HTTPStatus.UNAUTHORIZED and self.find() and token != self._token:
            reply = await self._request_once(method, path, body, headers)
        return reply

    async def _request_once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> Reply:
        if self.url is None:
            raise RetryLaterError("no dashboard is running", after_seconds=IDLE_SECONDS)
        sent = dict(headers or {})
        if self._token is not None and path != "/health":
            sent["Authorization"] = f"Bearer {self._token}"
        url = f"{self.url}{path}"
        session = await self._open_session()
        try:
            async with session.request(method, url, data=body, headers=sent, allow_redirects=False) as reply:
                return Reply(reply.status, reply.headers, _json_object(await reply.read()))
        except TimeoutError as error:
            what = f"{self.url} did not answer within {self._timeout_seconds:g} s"
            raise RetryLaterError(f"{what}; `evsys-bus dash --status` shows its process") from error
        except self._client_errors as error:
            raise NotConnectedError(f"{self.url}: {type(error).__name__}: {error}") from error

    async def _open_session(self) -> "aiohttp.ClientSession":
        if self._session is None:
            # On a thread: the loop may be the program's own, and the import takes a quarter of a second.
            aiohttp: Any = await asyncio.to_thread(importlib.import_module, "aiohttp")
            self._client_errors = (aiohttp.ClientError, OSError, ValueError)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1),
                timeout=aiohttp.ClientTimeout(total=self._timeout_seconds),
                headers={"Accept": "application/json"},
                trust_env=not is_local(self.url or ""),  # a proxy cannot reach this machine's loopback
            )
        assert self._session is not None
        return self._session

    def _check(self, reply: Reply) -> None:
        """Raise the error of a failed request."""
        if reply.status < HTTPStatus.MULTIPLE_CHOICES:
            return
        what = f"{self.url} answers {reply.status}: {_message(reply)}"
        if reply.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            fix = "set EVSYS_API_KEY to the token of that dashboard: `evsys-bus dash --status` on its machine shows it"
            raise ParkedError(what, fix=fix)
        if reply.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise BatchTooLargeError(what)
        if is_temporary(reply.status):
            after = retry_after_seconds(reply.headers.get("Retry-After"))
            raise RetryLaterError(what + _fix(reply), after_seconds=after)
        raise ParkedError(what, fix="use the same version of evsys-bus here and for the dashboard")

    async def is_dashboard(self) -> bool:
        """Ask the server whether it is a dashboard of this package.

        Raises:
            RetryLaterError: It does not answer.
            ParkedError: It is of a newer version.
        """
        reply = await self._request_once("GET", "/health", None, None)
        if reply.status in _UNREACHABLE:
            raise RetryLaterError(f"{self.url}/health answers {reply.status}")
        if reply.status != HTTPStatus.OK or reply.body.get("service") != SERVICE:
            return False
        protocol = reply.body.get("protocol")
        if type(protocol) is int and protocol > PROTOCOL:
            raise ParkedError(f"{self.url} speaks version {protocol} of the protocol", fix="update evsys-bus here")
        return True


class NotConnectedError(RetryLaterError):
    """There was no response; another server may answer next."""


def is_local(url: str) -> bool:
    """Whether the server of a URL is reached by the loopback interface."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def was_killed() -> bool:
    """Whether the last dashboard of this user has ended without removing its state file."""
    return read_state() is None and state_path().exists()


def is_same_server(first: str, second: str | None) -> bool:
    """Whether two URLs are of the same port of the same host; all names of the loopback interface are one."""
    if second is None:
        return False
    parts = [urlsplit(each) for each in (first, second)]
    both_local = all(map(is_local, (first, second)))
    return parts[0].port == parts[1].port and (both_local or parts[0].hostname == parts[1].hostname)


def _payload(envelope: Envelope) -> bytes:
    """Return the event as it is recorded; events of a replay are encoded again."""
    return getattr(envelope, "payload", None) or encode(envelope)


def _array_header(count: int) -> bytes:
    """Return the head of a msgpack array."""
    if count < 1 << 4:
        return bytes((0x90 | count,))
    return b"\xdc" + count.to_bytes(2, "big") if count < 1 << 16 else b"\xdd" + count.to_bytes(4, "big")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found: Any = msgspec.json.decode(data)
    except msgspec.DecodeError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _message(reply: Reply) -> str:
    error: Any = reply.body.get("error")
    if isinstance(error, dict):
        error = cast("dict[str, Any]", error).get("message")
    return str(error or "no reason given")[:300]


def _fix(reply: Reply) -> str:
    """Return the fix in the response, to be appended; empty if there is none."""
    error: Any = reply.body.get("error")
    fix: Any = cast("dict[str, Any]", error).get("fix") if isinstance(error, dict) else None
    return f"; {str(fix)[:300]}" if fix else ""
