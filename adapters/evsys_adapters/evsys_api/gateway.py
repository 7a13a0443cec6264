"""Client of EvSys' gateway: one operation per request, over persistent connections.

Responses are mapped as follows:

    2xx with ``{"result": …}``      success
    400, 404, 409, 422, …           `OperationRefusedError`: this operation is rejected permanently
    401, 403                        ParkedError: credentials
    413                             BatchTooLargeError: this operation at its size
    408, 425, 429, 5xx              RetryLaterError, after ``Retry-After`` if given
    2xx without JSON                RetryLaterError: a proxy, a login page
    a redirect                      followed as a POST on the same host; else ParkedError with the URL to set
    no response                     RetryLaterError: refused, reset or timeout

aiohttp is imported with the first connection.
"""

import os
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Final, cast
from urllib.parse import urljoin, urlsplit

import msgspec

from evsys_adapters.common.http_client import HttpSession, is_temporary, retry_after_seconds
from evsys_adapters.common.params import require_package
from evsys_bus.errors import BatchTooLargeError, ParkedError, RetryLaterError

PATH: Final = "/api/dashboard/api/sdk/data/"
DEFAULT_URL: Final = "http://localhost:8000"
_URL: Final = r"^https?://[^/@\s?#]+(/[^@\s?#]*)?$"
_MAX_REDIRECTS: Final = 5
_MAX_SHOWN_CHARS: Final = 300
"""Maximum number of characters of a response in error messages."""
_ERROR_BYTES: Final = 1 << 16
_REDIRECTS: Final = frozenset({301, 302, 307, 308})
_NO_SUCH_PAGE: Final = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.GONE})
_TRUE: Final = frozenset({"1", "true", "yes", "on"})


class EvsysLoggerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `EvsysLoggerCallback`. They are recorded, so the API key is not one of them."""

    project_id: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Default: ``EVSYS_PROJECT_ID``."""
    flush_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Rows of a run that are sent together, as in EvSys' client. None waits longer than a batch, half a second."""
    url: Annotated[str, msgspec.Meta(pattern=_URL, examples=[DEFAULT_URL])] | None = None
    """URL of the server. Default: ``EVSYS_API_URL``, or ``http://localhost:8000``."""
    api_key_env: Annotated[str, msgspec.Meta(min_length=1)] = "EVSYS_API_KEY"
    """The environment variable that holds the key."""
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0)] = 30.0
    """Timeout of one request."""
    in_flight: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    """Maximum number of concurrent requests for rows or predictions, where their order does not matter."""

    def __post_init__(self) -> None:
        require_package("evsys_logger", "aiohttp", "evsys")

    @staticmethod
    def from_environment() -> dict[str, str | None]:
        """Return the parameters set by the environment: the server and the project; never the key.

        None for an invalid URL, which `server_url` rejects.
        """
        found: dict[str, str | None] = {}
        if url := os.environ.get("EVSYS_API_URL", "").strip():
            found["url"] = url if re.match(_URL, url) else None
        if project := os.environ.get("EVSYS_PROJECT_ID"):
            found["project_id"] = project
        return found


def is_offline() -> bool:
    """Whether ``EVSYS_OFFLINE`` disables sending."""
    return os.environ.get("EVSYS_OFFLINE", "").strip().lower() in _TRUE


def server_url(config: EvsysLoggerConfig) -> str | None:
    """Return the server's URL from parameters or environment; None if it is not set.

    Raises:
        ParkedError: The URL in the environment is invalid.
    """
    found = config.url or os.environ.get("EVSYS_API_URL", "").strip() or None
    if found is not None and not re.match(_URL, found):
        fix = "set it to http://host:port or https://host, without user and password"
        raise ParkedError("EVSYS_API_URL is not the URL of a server", fix=fix)
    return None if found is None else found.rstrip("/")


def has_api_key(config: EvsysLoggerConfig) -> bool:
    """Whether the environment holds a key now."""
    return bool(os.environ.get(config.api_key_env, "").strip())


def api_key(config: EvsysLoggerConfig) -> str:
    """Return the API key that is in the environment now.

    Raises:
        ParkedError: There is none, or it is invalid.
    """
    name = config.api_key_env
    key = os.environ.get(name, "").strip()
    if not key:
        fix = (
            f"set {name}, then `evsys-bus sync` (or the next run) sends everything; "
            "EVSYS_OFFLINE=1 where nothing is to be sent"
        )
        raise ParkedError(f"{name} is not set, and EvSys requires a key", fix=fix)
    if not (key.isascii() and key.isprintable() and " " not in key):
        why = "spaces, line ends, letters beyond ASCII"
        raise ParkedError(f"{name} has characters that no key has: {why}", fix=f"set {name} to the key alone")
    return key


def configured_project(config: EvsysLoggerConfig) -> str | None:
    """Return the project from parameters or environment."""
    return config.project_id or os.environ.get("EVSYS_PROJECT_ID") or None


class OperationRefusedError(Exception):
    """The server rejects this operation permanently."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Gateway:
    """Calls operations of one server.

    Args:
        config: The adapter's parameters.
        url: URL of the server, without a path.
    """

    def __init__(self, config: EvsysLoggerConfig, url: str) -> None:
        self.url: Final = url
        self._config: Final = config
        self._endpoint = f"{url}{PATH}"
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._session = HttpSession(config.timeout_seconds, max_connections=config.in_flight, headers=headers)
        self._has_answered = False
        self._paused_until = 0.0
        """End of the pause requested by the server; monotonic time."""

    async def call(self, op: str, args: Mapping[str, Any]) -> Any:
        """Execute one operation and return its result. Arguments that are None are omitted.

        Raises:
            RefusedError: The server rejects the operation.
            DeliveryError: See the module's table.
        """
        wait = self._paused_until - time.monotonic()
        if wait > 0:
            raise RetryLaterError(f"{self.url} asked to wait", after_seconds=wait)
        set_args = {name: value for name, value in args.items() if value is not None}
        body = msgspec.json.encode({"op": op, "args": set_args})
        url = self._endpoint
        for _ in range(_MAX_REDIRECTS):
            status, headers, data = await self._post(url, body)
            if status not in _REDIRECTS:
                if url != self._endpoint and status < HTTPStatus.BAD_REQUEST:
                    self._endpoint = url
                return self._result(op, status, headers, data)
            url = self._redirected(url, status, headers.get("Location"))
        raise RetryLaterError(f"{self._endpoint} has too many redirects")

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _post(self, url: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        authorized = {"Authorization": f"Bearer {api_key(self._config)}"}
        session = await self._session.open()
        try:
            async with session.post(url, data=body, headers=authorized, allow_redirects=False) as reply:
                failed = reply.status >= HTTPStatus.BAD_REQUEST
                data = await reply.content.read(_ERROR_BYTES) if failed else await reply.read()
                return reply.status, reply.headers, data
        except TimeoutError as error:
            raise RetryLaterError(f"{url} did not answer within {self._config.timeout_seconds:g} s") from error
        except self._session.errors as error:
            raise RetryLaterError(f"{url}: {type(error).__name__}: {error}") from error

    def _redirected(self, url: str, status: int, location: str | None) -> str:
        """Return the target of a redirect if the key may be sent there."""
        target = urljoin(url, location or "")
        before, after = urlsplit(url), urlsplit(target)
        same = (before.scheme, before.netloc) == (after.scheme, after.netloc)
        safer = (before.scheme, after.scheme) == ("http", "https") and before.hostname == after.hostname
        if location and (same or safer):
            return target
        fix = f"set url, or EVSYS_API_URL, to {after.scheme}://{after.netloc}" if location else "see its log"
        raise ParkedError(
            f"{url} redirects ({status}) to {target!r:.{_MAX_SHOWN_CHARS}}, where the key is not sent automatically",
            fix=fix,
        )

    def _result(self, op: str, status: int, headers: Mapping[str, str], data: bytes) -> Any:
        if status < HTTPStatus.MULTIPLE_CHOICES:
            self._has_answered = True
            try:
                answer: Any = msgspec.json.decode(data)
            except msgspec.DecodeError:
                kind = headers.get("Content-Type", "of no type")
                what = f"{self._endpoint} answers {status} with {kind} that is not JSON ({_text(data)})"
                raise RetryLaterError(f"{what}: a proxy or a login page may be in front of the API") from None
            return cast("dict[str, Any]", answer).get("result") if isinstance(answer, dict) else None
        what = f"{op}: {self._endpoint} answers {status}: {_text(data)}"
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            fix = f"check {self._config.api_key_env}, and that it is a key of this server; it is retried once a minute"
            raise ParkedError(what, fix=f"{fix}, and by `evsys-bus sync`")
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            raise BatchTooLargeError(what)
        if is_temporary(status):
            after = retry_after_seconds(headers.get("Retry-After"))
            if after is not None:
                self._paused_until = time.monotonic() + after
            raise RetryLaterError(what, after_seconds=after)
        if status in _NO_SUCH_PAGE and not self._has_answered:
            raise ParkedError(what, fix=f"this is not an EvSys API: check url, or EVSYS_API_URL, now {self.url}")
        if status < HTTPStatus.BAD_REQUEST:  # 303 and similar
            raise ParkedError(what, fix="this is not an API response: check url, or EVSYS_API_URL")
        raise OperationRefusedError(what)


def _text(data: bytes) -> str:
    return " ".join(data.decode("utf-8", "replace").split())[:_MAX_SHOWN_CHARS]
