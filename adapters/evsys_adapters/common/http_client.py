"""What adapters share that post to HTTP servers: aiohttp's session, and which responses mean: later."""

import asyncio
import importlib
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import aiohttp

_RETRIED: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_MAX_PAUSE_SECONDS: Final = 86_400.0
"""As couriers, which have the same limit: an adapter that waits longer by itself would refuse their next attempt."""


class HttpSession:
    """A session of aiohttp, which is imported and opened with the first request; proxies of the environment are used.

    Args:
        timeout_seconds: Timeout of one request, the connection included.
        max_connections: How many requests may run at once.
        headers: Sent with each request.
    """

    def __init__(
        self, timeout_seconds: float, *, max_connections: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        self.errors: tuple[type[Exception], ...] = ()
        """What a request may raise; TimeoutError is one of them."""
        self._timeout_seconds = timeout_seconds
        self._max_connections = max_connections
        self._headers = headers
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> "aiohttp.ClientSession":
        """Return the session."""
        if self._session is None:
            # On a thread: the loop may be the program's own, and the import takes a quarter of a second.
            aiohttp: Any = await asyncio.to_thread(importlib.import_module, "aiohttp")
            self.errors = (aiohttp.ClientError, OSError, ValueError)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                timeout=aiohttp.ClientTimeout(total=self._timeout_seconds),
                headers=self._headers,
                trust_env=True,
            )
        assert self._session is not None
        return self._session

    async def close(self) -> None:
        """Close the connections; a later request opens the session again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def is_temporary(status: int) -> bool:
    """Whether a request that was answered so may be repeated."""
    return status in _RETRIED or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def retry_after_seconds(text: str | None) -> float | None:
    """Parse a Retry-After header, seconds or a date; None if it is neither, a day at most."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(seconds, _MAX_PAUSE_SECONDS) if seconds > 0 else 0.0  # not above 0: also NaN
