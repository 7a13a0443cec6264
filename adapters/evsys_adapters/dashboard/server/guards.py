"""Who may call the server: Host, Origin and token are checked before anything else, on WebSocket handshakes too.

Binding to loopback is no protection: every user of a login node can connect, and every page in the user's browser can
send requests to it. Therefore a request needs a Host of this server (a page whose name was pointed at 127.0.0.1 sends
its own), no Origin but this server's, and the token, except for ``/health`` and the page's own files.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evsys_adapters.dashboard.server.answers import AnswerError

API_PATH: Final = "/api/"
HOSTED_PATH: Final = "/api/dashboard/api/"
SUBPROTOCOL: Final = "evsys"
TOKEN_SUBPROTOCOL_PREFIX: Final = "token."  # noqa: S105 # no token, what precedes one
"""Browsers cannot set a header on a WebSocket; they offer ``token.TOKEN`` as a second subprotocol instead."""

_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_MAX_PEERS: Final = 1024

_HEADERS: Final = [
    (
        b"content-security-policy",
        b"; ".join(
            [
                b"default-src 'none'",
                b"script-src 'self'",
                b"style-src 'self'",
                b"img-src 'self' data: blob:",
                b"connect-src 'self'",
                b"base-uri 'none'",
                b"frame-ancestors 'none'",
                b"form-action 'none'",
            ]
        ),
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]


class GuessLimit:
    """Counts wrong tokens for each peer. A right token from the same address is never delayed."""

    def __init__(
        self, max_guesses: int = 20, seconds: float = 60.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_guesses = max_guesses
        self._seconds = seconds
        self._clock = clock
        self._peers: OrderedDict[str, tuple[float, int]] = OrderedDict()  # address -> when its minute began, guesses

    def count(self, peer: str) -> bool:
        """Count a wrong token. Returns whether the peer has sent too many."""
        now = self._clock()
        start, guesses = self._peers.pop(peer, (now, 0))
        if now - start >= self._seconds:
            start, guesses = now, 0
        self._peers[peer] = (start, guesses + 1)
        if len(self._peers) > _MAX_PEERS:
            self._peers.popitem(last=False)
        return guesses >= self._max_guesses


class Guard:
    """ASGI middleware that refuses strangers, and adds the security headers to every response.

    Args:
        app: What is behind it.
        token: What clients must send.
        allowed_hosts: Names besides those of loopback under which the server is reached, such as that of a proxy.
        open_loopback: Whether the routes of the hosted service accept any token from this machine.
        limit: Counts wrong tokens.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str,
        allowed_hosts: Iterable[str] = (),
        open_loopback: bool = False,
        limit: GuessLimit | None = None,
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self._open_loopback = open_loopback
        self._limit = limit or GuessLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request or a handshake, and pass it on."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]

        async def send_guarded(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                headers = list(message.get("headers", []))
                if path.startswith(API_PATH):
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers + _HEADERS}
            await send(message)

        try:
            self._check(scope, path)
        except AnswerError as refusal:
            await refusal.response()(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)

    def _check(self, scope: Scope, path: str) -> None:
        headers = _header_lists(scope)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or _host_name(hosts[0]) not in _LOOPBACK_NAMES | self._allowed_hosts:
            raise AnswerError(
                HTTPStatus.MISDIRECTED_REQUEST,
                "host",
                "the Host header does not name this server",
                fix="open it as http://127.0.0.1:PORT or http://localhost:PORT; for a proxy, allow its host name",
            )
        if not all(self._is_own_origin(origin, hosts[0]) for origin in headers.get(b"origin", [])):
            raise AnswerError(
                HTTPStatus.FORBIDDEN,
                "origin",
                "pages of other servers may not call this one",
                fix="open the page that this server serves",
            )
        if path.startswith(API_PATH):
            self._check_token(scope, path, headers)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        """Whether a page is this server's; a proxy with an allowed name may have replaced the Host."""
        try:
            found = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return found != "" and (found == host.lower() or _host_name(found) in self._allowed_hosts)

    def _check_token(self, scope: Scope, path: str, headers: dict[bytes, list[str]]) -> None:
        found = _token(scope, headers)
        if found and secrets.compare_digest(found.encode(), self._token):
            return
        client = scope.get("client")
        peer = client[0] if client else ""
        if found and self._open_loopback and path.startswith(HOSTED_PATH) and _is_loopback(peer):
            return
        if found and self._limit.count(peer):
            raise AnswerError(
                HTTPStatus.TOO_MANY_REQUESTS,
                "token",
                "too many wrong tokens from this address",
                fix="wait a minute, then open the URL that `evsys-bus dash --status` prints",
                headers={"retry-after": "60", "connection": "close"},
            )
        raise AnswerError(
            HTTPStatus.UNAUTHORIZED,
            "token",
            "the token is wrong" if found else "the token is missing",
            fix="open the URL that `evsys-bus dash --status` prints, or send `Authorization: Bearer TOKEN`",
            headers={"www-authenticate": "Bearer"},
        )


def _header_lists(scope: Scope) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, []).append(value.decode("latin-1").strip())
    return found


def _host_name(value: str) -> str:
    """Return the name of a Host header without the port: forwarding through ssh changes the port."""
    name, _, port = value.lower().rpartition(":")
    return name if name and port.isdigit() else value.lower()


def _token(scope: Scope, headers: dict[bytes, list[str]]) -> str | None:
    for value in headers.get(b"authorization", []):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return token.strip()
    if scope["type"] == "websocket":
        for offered in scope.get("subprotocols", []):
            if offered.startswith(TOKEN_SUBPROTOCOL_PREFIX):
                return offered.removeprefix(TOKEN_SUBPROTOCOL_PREFIX)
    return None


def _is_loopback(peer: str) -> bool:
    try:
        return ip_address(peer).is_loopback
    except ValueError:
        return False
