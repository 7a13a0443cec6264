"""`EvsysSink`: the delivery half of `evsys_logger`: to a dashboard, or to the hosted service.

A dashboard is sent the events as they are (`dashboard`), the hosted service operations of its gateway (`hosted`).
Events go to the server at ``url``, which tells what it is; to the hosted service's default URL if there is a key and no
URL; and without both to the running dashboard of this user. While there is none, events are accepted and wait: the
dashboard imports them once it is there.
"""

import asyncio
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

import msgspec

from evsys_adapters.common.params import validate_params
from evsys_adapters.evsys_api.dashboard import (
    IDLE_SECONDS,
    IMPORT_POLL_SECONDS,
    LIVE_BATCH_SECONDS,
    DashboardDelivery,
    NotConnectedError,
    was_killed,
)
from evsys_adapters.evsys_api.gateway import (
    DEFAULT_URL,
    EvsysLoggerConfig,
    api_key,
    has_api_key,
    is_offline,
    server_url,
)
from evsys_adapters.evsys_api.hosted import EvsysRun, HostedDelivery
from evsys_bus.diagnostics import log
from evsys_bus.errors import DeliveryError, ParkedError, RetryLaterError
from evsys_bus.events import Envelope
from evsys_bus.sink import Sink

__all__ = ["EvsysRun", "EvsysSink"]


class Waiting(msgspec.Struct, frozen=True):
    """Events that were accepted without being sent, what they wait for, and the command that sends them."""

    events: int = 0
    why: str = ""
    fix: str | None = None


class EvsysSink(Sink):
    """Sends events to a dashboard or to EvSys. Its parameters are those of `EvsysLoggerConfig`."""

    name: ClassVar[str] = "evsys_logger"
    Config: ClassVar[type | None] = EvsysLoggerConfig
    with_payloads: ClassVar[bool] = True
    write_timeout_seconds: float = 86_400.0  # every request has its own timeout

    def __init__(self, project_id: str | None = None, flush_every: int = 1, **params: Any) -> None:
        """Validate the parameters against `EvsysLoggerConfig`."""
        self.config = validate_params(
            EvsysLoggerConfig, {"project_id": project_id, "flush_every": flush_every, **params}
        )
        self._offline = False
        self._requested_url: str | None = None
        self._stored_url: str | None = None
        self._target: Literal["dashboard", "hosted"] | None = None
        """Where events go; None until the server has been asked."""
        self._dashboard: DashboardDelivery | None = None
        self._stored_dashboard: dict[str, Any] = {}
        self._hosted = HostedDelivery(self.config, lambda: self._server_url() or DEFAULT_URL)
        self._delivered: dict[str, int] = {}
        """By stream, the sequence of the last event that was acknowledged, to whatever destination."""
        self._courier_events_due = 0.0
        self._waiting: Waiting | None = None
        """What was accepted without being sent, as there was no destination."""

    async def open(self) -> None:
        """Check that there is an API key, or that none is needed.

        Raises:
            ParkedError: There is no key, or the environment names an invalid server.
            RetryLaterError: The server does not answer, and without a key it matters which one it is.
        """
        self._offline = is_offline()
        if self._offline:
            log().info("evsys.offline", why="EVSYS_OFFLINE", fix=f"to send it later: {self._replay_command}")
            return
        self.idle_seconds = IDLE_SECONDS
        self._requested_url = server_url(self.config)
        has_key = has_api_key(self.config)
        if has_key:
            api_key(self.config)
        if self._requested_url is None:
            self._target = "hosted" if has_key else None
        elif not has_key and await self._find_target() == "hosted":
            api_key(self.config)

    async def write(self, batch: Sequence[Envelope]) -> int | None:
        """Send the batch, or as much of it as possible now."""
        if self._offline:
            self._add_waiting(batch, Waiting(fix=self._replay_command, why="EVSYS_OFFLINE is set"))
            return None
        if await self._find_target() == "dashboard":
            return await self._write_to_dashboard(batch)
        return await self._write_to_hosted(batch)

    async def on_idle(self) -> None:
        """Look for a dashboard, let it catch up, and send it what the couriers of the journal publish."""
        if self._offline:
            return
        try:
            if await self._find_target() != "dashboard":
                self.idle_seconds = None
                return
            dashboard = self._open_dashboard()
            if not dashboard.find():
                if not self._is_missed(dashboard):
                    self._set_waiting(self._no_dashboard())
                return
            await dashboard.catch_up()
            self._set_waiting(None)
            await dashboard.send_courier_events()
        except NotConnectedError:
            self._forget_target()
        except RetryLaterError as error:
            if error.waiting:
                self._set_waiting(Waiting(self._waiting_events, error.what))
        self.idle_seconds = IMPORT_POLL_SECONDS if self._is_importing else IDLE_SECONDS

    async def settle_owed(self, deadline: float) -> None:
        """Let a dashboard that is there by now import the events that wait for one."""
        while self._waiting_events and time.monotonic() < deadline:
            await self.on_idle()
            if not self._is_importing:
                return
            await asyncio.sleep(IMPORT_POLL_SECONDS)

    @property
    def _is_importing(self) -> bool:
        return self._dashboard is not None and self._dashboard.is_importing

    @property
    def _waiting_events(self) -> int:
        return 0 if self._waiting is None else self._waiting.events

    def _add_waiting(self, batch: Sequence[Envelope], waiting: "Waiting") -> None:
        """Accept a batch without sending it."""
        self._delivered |= {each.stream: each.seq for each in batch}
        self._set_waiting(msgspec.structs.replace(waiting, events=self._waiting_events + len(batch)))

    def _set_waiting(self, waiting: "Waiting | None") -> None:
        """Set what the events wait for that were accepted without being sent; None once they were sent."""
        self._waiting = waiting
        if waiting is None:
            self.report_waiting(None)
        else:
            self.report_waiting(waiting.why, waiting.events, waiting.fix)

    def _no_dashboard(self) -> "Waiting":
        return Waiting(self._waiting_events, "no dashboard is running", f"evsys-bus dash --import {self._run}")

    @property
    def _run(self) -> str:
        """The journal, as in a command."""
        return shlex.quote(getattr(self.evsys_attached, "directory", None) or "RUN")

    @property
    def _replay_command(self) -> str:
        return f"evsys-bus replay {self._run} --to {self.name}"

    async def _find_target(self) -> Literal["dashboard", "hosted"]:
        """Return where events go; asks the server once per connection.

        Raises:
            RetryLaterError: It does not answer.
        """
        if self._target is None:
            if self._server_url() is None:
                self._target = "hosted" if has_api_key(self.config) else "dashboard"
            else:
                self._target = "dashboard" if await self._open_dashboard().is_dashboard() else "hosted"
            if self._target == "dashboard":
                self.max_batch_seconds = LIVE_BATCH_SECONDS
                self.first_at_once = True
        return self._target

    def _forget_target(self) -> None:
        """Ask again which server is at the URL: the connection to it was lost."""
        if self._server_url() is not None:
            self._target = None

    def _open_dashboard(self) -> DashboardDelivery:
        if self._dashboard is None:
            token = api_key(self.config) if has_api_key(self.config) else None
            self._dashboard = DashboardDelivery(
                self._server_url(),
                token,
                journal=getattr(self.evsys_attached, "directory", None),
                delivered=self._delivered,
                timeout_seconds=self.config.timeout_seconds,
            )
            # Also what was accepted while EVSYS_OFFLINE was set.
            self._dashboard.is_import_due = bool(self._stored_dashboard.get("import_due") or self._waiting_events)
            self._dashboard.was_found = bool(self._stored_dashboard.get("found"))
            self._dashboard.database = self._stored_dashboard.get("database")
            self._dashboard.find()
        return self._dashboard

    async def _write_to_dashboard(self, batch: Sequence[Envelope]) -> int | None:
        dashboard = self._open_dashboard()
        if not dashboard.find():
            if dashboard.journal is None:
                raise ParkedError("no dashboard is running", fix="start one: evsys-bus dash")
            if self._is_missed(dashboard):
                raise RetryLaterError(
                    "the dashboard was killed; it goes on once `evsys-bus dash` runs again", after_seconds=IDLE_SECONDS
                )
            dashboard.is_import_due = True
            self._add_waiting(batch, self._no_dashboard())
            return None
        try:
            done = await dashboard.write(batch)
        except NotConnectedError:
            self._forget_target()
            raise
        self._set_waiting(None)
        now = time.monotonic()
        if now >= self._courier_events_due:
            self._courier_events_due = now + IDLE_SECONDS
            with suppress(DeliveryError, OSError):  # they are sent again with the next batch
                await dashboard.send_courier_events()
        return done

    @staticmethod
    def _is_missed(dashboard: DashboardDelivery) -> bool:
        """Whether the dashboard is expected back: it had taken events, and was killed."""
        return dashboard.was_found and was_killed()

    async def _write_to_hosted(self, batch: Sequence[Envelope]) -> int | None:
        try:
            done = await self._hosted.write(batch)
        except RetryLaterError:
            self._forget_target()
            raise
        self._delivered |= {each.stream: each.seq for each in batch[:done]}
        return done

    async def close(self) -> None:
        """Close the connections."""
        await self._hosted.close()
        if self._dashboard is not None:
            await self._dashboard.close()

    def mark(self) -> dict[str, Any]:
        """Return what was delivered, and the server's IDs of our objects, as plain data."""
        dashboard = self._dashboard
        if dashboard is not None:
            self._stored_dashboard = {
                "found": dashboard.was_found,
                "import_due": dashboard.is_import_due,
                "database": dashboard.database,
            }
        return {
            # A later process without a key must not take a dashboard instead of the hosted service.
            "url": self._server_url() or (DEFAULT_URL if self._target == "hosted" else None),
            **self._hosted.mark(),
            "delivered": dict(self._delivered),
            "dashboard": self._stored_dashboard,
            "waiting": None if self._waiting is None else msgspec.structs.asdict(self._waiting),
        }

    def rewind(self, mark: dict[str, Any]) -> None:
        """Restore what was delivered, and the server's IDs, from a mark."""
        self._stored_url = mark.get("url")
        self._delivered |= mark.get("delivered", {})
        self._stored_dashboard = mark.get("dashboard", {})
        waiting = mark.get("waiting")
        if waiting is not None:
            self._set_waiting(msgspec.convert(waiting, Waiting))
        requested = self._requested_url
        is_same = requested is None or self._stored_url is None or requested == self._stored_url
        if not is_same:
            log().warning(
                "evsys.other_server",
                before=self._stored_url,
                now=requested,
                why="ids of one server are unknown to another",
            )
        self._hosted.rewind(mark, has_known_ids=is_same)

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Remember the contexts of open runs, for runs that the hosted service has not created yet."""
        self._hosted.resume_runs(starts)

    def _server_url(self) -> str | None:
        return self._requested_url or self._stored_url
