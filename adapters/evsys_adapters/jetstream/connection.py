"""`JetStreamConnection`: a connection to NATS whose errors are those of a delivery.

    wrong credentials, a refused permission, an unreadable file, TLS that does not fit      ParkedError, with the fix
    no server, no answer, a lost connection                                                 RetryLaterError

The client never connects again by itself: after a failure the connection is closed, and the next call of `open` makes
another one. The server reports a refused permission apart from the request, which then just gets no answer;
`JetStreamConnection.call` combines the two. nats-py is imported with the first connection.
"""

import asyncio
import importlib
import os
import re
import ssl
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec

from evsys_bus.codec.redact import redact_text
from evsys_bus.errors import ParkedError, RetryLaterError

_URL: Final = re.compile(r"^(nats|tls|ws|wss)://[^/\s?#@]+/?$")
_DENIED: Final = re.compile(r"permissions violation for (\w+) to \"?([^\s\"]+)", re.IGNORECASE)
_REFUSED: Final = re.compile(r"authorization violation|authentication|account (is )?disabled|nkey|jwt", re.IGNORECASE)
_MAX_SHOWN: Final = 300
_CLOSE_SECONDS: Final = 1.0

Result = TypeVar("Result")


class AnsweredError(Exception):
    """JetStream has answered a request with an error.

    Attributes:
        status: As in HTTP: 400 for a request that is wrong, 404, 503 if it may work later.
        code: The server's own number of the error.
    """

    def __init__(self, status: int, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.status = status
        self.code = code


class ConnectionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where NATS is, and how to prove who connects. Passwords and tokens come from the environment alone."""

    servers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("nats://127.0.0.1:4222",)
    """URLs of the servers of one cluster, without credentials: ``nats://host:port`` or ``tls://host:port``."""
    credentials_file: str | None = None
    """A ``.creds`` file, with the JWT and the seed of a user."""
    nkey_file: str | None = None
    """A file with the seed of an NKey."""
    user: str | None = None
    """The name of a user; its password is in the environment."""
    password_env: Annotated[str, msgspec.Meta(min_length=1)] = "NATS_PASSWORD"  # noqa: S105 # a name
    """The environment variable that has the password of ``user``."""
    token_env: Annotated[str, msgspec.Meta(min_length=1)] = "NATS_TOKEN"  # noqa: S105 # a name
    """The environment variable that has a token, if the server wants one."""
    tls_ca_file: str | None = None
    """Certificates to trust instead of the system's."""
    tls_certificate_file: str | None = None
    """The client's own certificate, for a server that verifies clients."""
    tls_key_file: str | None = None
    """The key of that certificate."""
    inbox_prefix: Annotated[str, msgspec.Meta(pattern=r"^[^\s*>]+$")] = "_INBOX"
    """Prefix of the subjects on which answers arrive; one of its own for a user who may not read those of others."""
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0
    """Deadline of one request, and of connecting."""

    def __post_init__(self) -> None:
        for url in self.servers:
            if not _URL.match(url):
                raise ValueError(
                    f"{redact_text(url)!r} is not a server: write nats://HOST:PORT, and give a user as `user`, with "
                    f"the password in {self.password_env}, or a token in {self.token_env} - at `$.servers`"
                )


class JetStreamConnection:
    """One connection at a time, to one of the servers.

    Args:
        config: Where they are.
        name: Shown in the monitoring of the server.
    """

    def __init__(self, config: ConnectionConfig, name: str) -> None:
        self._config: Final = config
        self._name: Final = name
        self._client: Any = None
        self._errors: tuple[type[Exception], ...] = (OSError,)
        self._last_error: Exception | None = None
        self._denied: str | None = None
        self._deadline: asyncio.Timeout | None = None
        self.is_stopped = False
        """Whether `stop` was called."""

    @property
    def is_open(self) -> bool:
        """Whether requests can be made."""
        return self._client is not None and bool(self._client.is_connected)

    @property
    def client(self) -> Any:
        """The client of nats-py."""
        return self._client

    @property
    def jetstream(self) -> Any:
        """The JetStream context of nats-py."""
        return self._client.jetstream(timeout=self._config.timeout_seconds)

    @property
    def where(self) -> str:
        """The servers, for messages."""
        return ", ".join(self._config.servers)

    async def open(self) -> None:
        """Connect, after closing a former connection.

        Raises:
            ParkedError: The server refuses the credentials, a file cannot be read, or TLS does not fit.
            RetryLaterError: No server answers.
        """
        await self.close()
        # On a thread: the loop may be the program's own, and the import takes a tenth of a second.
        nats: Any = await asyncio.to_thread(importlib.import_module, "nats")
        self._errors = (OSError, nats.errors.Error)
        options = await asyncio.to_thread(self._options)
        self._last_error = self._denied = None
        self._client = nats.NATS()
        is_connected = False
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                await self._client.connect(
                    servers=list(self._config.servers),
                    name=self._name,
                    error_cb=self._on_error,
                    closed_cb=self._on_closed,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # of each server, here: 0 would mean without end
                    reconnect_time_wait=0,
                    connect_timeout=self._config.timeout_seconds,
                    **options,
                )
                is_connected = True
        except self._errors as error:
            raise self._connect_error(error) from None
        finally:
            if not is_connected:  # the client leaves its socket open
                await self.close()

    def _options(self) -> dict[str, Any]:
        """Return the options of the client for credentials and TLS."""
        config = self._config
        options: dict[str, Any] = {"inbox_prefix": config.inbox_prefix.encode()}
        if config.credentials_file is not None:
            options["user_credentials"] = _readable(config.credentials_file, "credentials_file")
        if config.nkey_file is not None:
            options["nkeys_seed"] = _readable(config.nkey_file, "nkey_file")
        if config.user is not None:
            password = os.environ.get(config.password_env)
            if not password:
                fix = f"set {config.password_env}; then `evsys-bus sync`, or the next run, goes on"
                raise ParkedError(f"the user {config.user} has no password: {config.password_env} is not set", fix=fix)
            options |= {"user": config.user, "password": password}
        elif token := os.environ.get(config.token_env):
            options["token"] = token
        if config.tls_ca_file is not None or config.tls_certificate_file is not None:
            options["tls"] = self._tls_context()
        return options

    def _tls_context(self) -> ssl.SSLContext:
        config = self._config
        try:
            context = ssl.create_default_context(cafile=config.tls_ca_file)
            if config.tls_certificate_file is not None:
                context.load_cert_chain(config.tls_certificate_file, config.tls_key_file)
        except OSError as error:
            fix = "correct tls_ca_file, tls_certificate_file and tls_key_file"
            raise ParkedError(f"the TLS files cannot be used: {error}", fix=fix) from None
        return context

    def _connect_error(self, error: Exception) -> Exception:
        """Return the error of a delivery for one of the client's, which may have been reported apart."""
        cause = error if isinstance(error, ssl.SSLError) else self._last_error or error
        text = redact_text(str(cause) or type(cause).__name__)[:_MAX_SHOWN]
        if isinstance(cause, ssl.SSLError):
            fix = "set tls_ca_file to the certificates of the server's authority, or correct the server's name"
            return ParkedError(f"the connection to {self.where} is not trusted: {text}", fix=fix)
        if _REFUSED.search(text):
            fix = f"correct credentials_file, nkey_file, {self._config.token_env}, or user and "
            return ParkedError(f"{self.where} refuses the credentials: {text}", fix=f"{fix}{self._config.password_env}")
        return RetryLaterError(f"{self.where} cannot be reached: {type(cause).__name__}: {text}")

    async def call(self, request: Awaitable[Result], seconds: float | None = None) -> Result:
        """Wait for the result of a request of the client.

        Args:
            request: The request.
            seconds: How long to wait, by default as configured.

        Raises:
            ParkedError: The user has no permission for it.
            RetryLaterError: The connection was lost, or there was no answer in time.
            TimeoutError: `stop` was called.
            AnsweredError: JetStream has answered with an error.
        """
        try:
            async with asyncio.timeout(self._config.timeout_seconds if seconds is None else seconds) as self._deadline:
                if self._denied is not None:  # reported after an earlier request, which needed no answer
                    self._end_call()
                return await request
        except self._errors as error:
            code: object = getattr(error, "err_code", None)
            if isinstance(code, int):
                raise AnsweredError(
                    getattr(error, "code", None) or 0, code, str(getattr(error, "description", ""))
                ) from None
            if self.is_stopped:
                raise TimeoutError from None
            await self.close()
            if self._denied is not None:
                raise self._denied_error() from None
            cause = self._last_error if isinstance(error, TimeoutError) and self._last_error is not None else error
            text = redact_text(f"{type(cause).__name__} {cause}".strip())[:_MAX_SHOWN]
            raise RetryLaterError(f"{self.where} did not answer: {text}") from None
        finally:
            self._deadline = None

    def _denied_error(self) -> ParkedError:
        found = _DENIED.search(self._denied or "")
        verb = "subscribe" if found and found[1].lower().startswith("sub") else "publish"
        what = f"{verb} to {found[2]} (in lower case)" if found else self._denied  # so the client passes it on
        fix = f"allow the user to {what}; docs/scale.md lists the permissions of each role"
        return ParkedError(f"{self.where} does not permit this user to {what}", fix=fix)

    async def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond `stop`."""
        if self.is_stopped:
            return
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                await asyncio.Event().wait()
        except TimeoutError:
            pass
        finally:
            self._deadline = None

    def stop(self) -> None:
        """End the call that waits now."""
        self.is_stopped = True
        self._end_call()

    def _end_call(self) -> None:
        deadline = self._deadline
        if deadline is not None and not deadline.expired():
            deadline.reschedule(asyncio.get_running_loop().time())

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        if _DENIED.search(str(error)):
            self._denied = str(error)
            self._end_call()  # no answer will come

    async def _on_closed(self) -> None:
        self._end_call()

    async def close(self) -> None:
        """Send what is buffered, and disconnect."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(*self._errors, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await client.close()


def _readable(path: str, name: str) -> str:
    """Return the path of a file that can be read."""
    try:
        Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ParkedError(f"{path} cannot be read: {error.strerror}", fix=f"correct {name}") from None
    return str(Path(path).expanduser())
