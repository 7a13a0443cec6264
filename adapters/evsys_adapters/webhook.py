"""`WebhookCallback`: posts alerts and the ends of runs to a URL, as JSON or in the form of Slack or Discord.

The body, with ``format: json``; fields that are not known are left out:

    {"event": "run_end", "id": "r0-000001-…/17", "time": "2026-01-31T12:00:00+00:00", "run": "ppo-7",
     "status": "failed", "error": "…", "seconds": 3605.2, "step": 999, "metrics": {"loss": 0.5}}
    {"event": "alert", "id": …, "time": …, "run": …, "level": "warning", "title": "…", "text": "…"}

What the receiver answers decides what happens:

    2xx                              delivered
    408, 425, 429, 5xx, no answer    tried again, after ``Retry-After`` if given
    another 4xx                      a dead letter: the receiver refuses this message
    a redirect                       parked: the message would go to another address than the configured one
"""

import asyncio
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Final, Literal
from urllib.parse import urlsplit

import msgspec

from evsys_adapters.common.hook_arguments import field, run_id, run_key, run_name, step_of
from evsys_adapters.common.http_client import HttpSession, is_temporary, retry_after_seconds
from evsys_adapters.common.logged_values import cut_text, text_of, values_of
from evsys_adapters.common.params import require_package, validate_params
from evsys_bus.adapter import Ranks
from evsys_bus.callback import Callback
from evsys_bus.codec.redact import redact_text
from evsys_bus.errors import DeliveryError, ParkedError, RejectedError, RetryLaterError
from evsys_bus.events import Alert, Envelope, Eval, RunEnd, RunStart, StepEnd, Summary, TrainEnd, TrainStart
from evsys_bus.sink import BatchResult, Sink

_URL: Final = r"^https?://[^/\s?#]+(/\S*)?$"
_MAX_ANSWER_BYTES: Final = 4096
_MAX_SHOWN: Final = 200
_MAX_ERROR: Final = 4000
_MAX_METRICS: Final = 50
_MAX_RUNS: Final = 1000
_MAX_SLACK_TITLE: Final = 150
_MAX_SLACK_TEXT: Final = 3000
_MAX_DISCORD_TEXT: Final = 2000
_LEVELS: Final = ("info", "warning", "error")

Message = dict[str, Any]
Level = Literal["info", "warning", "error"]


class WebhookConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of `WebhookCallback`."""

    webhook_url: Annotated[str, msgspec.Meta(pattern=_URL)] | None = None
    """Where to post. It is a secret: it is shown nowhere, and no file records it. A later ``evsys-bus sync`` therefore
    does not have it; ``url_env`` serves that too."""
    url_env: Annotated[str, msgspec.Meta(min_length=1)] = "EVSYS_WEBHOOK_URL"
    """The environment variable that has the URL if ``webhook_url`` is not set."""
    format: Literal["json", "slack", "discord"] = "json"
    """The form of the body: this library's, or that of an incoming webhook of Slack or Discord."""
    events: Annotated[tuple[Literal["alert", "run_start", "run_end"], ...], msgspec.Meta(min_length=1)] = (
        "alert",
        "run_end",
    )
    """What is posted."""
    min_level: Level = "info"
    """Alerts below this level are not posted."""
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0
    """Deadline of one request, the connection included."""

    def __post_init__(self) -> None:
        require_package("webhook", "aiohttp", "webhook")

    def __repr__(self) -> str:
        """Leave out the URL."""
        return f"{type(self).__name__}(format={self.format!r}, events={self.events!r})"


class _RunNotes(msgspec.Struct):
    """What the message about a run's end needs of earlier events."""

    started: float | None = None
    announced: bool = False
    """Whether it has a RunStart, and so will have a RunEnd."""
    step: int | None = None
    metrics: dict[str, Any] = {}


class WebhookSink(Sink):
    """Posts the messages. Its parameters are those of `WebhookConfig`."""

    name: ClassVar[str] = "webhook"
    Config: ClassVar[type | None] = WebhookConfig
    write_timeout_seconds: float = 86_400.0  # every request has its own timeout

    def __init__(self, webhook_url: str | None = None, **params: Any) -> None:
        """Validate the parameters against `WebhookConfig`."""
        self.config = validate_params(WebhookConfig, {"webhook_url": webhook_url, **params})
        self._notes: dict[str, _RunNotes] = {}
        self._session = HttpSession(self.config.timeout_seconds)

    async def open(self) -> None:
        """Check that there is a URL.

        Raises:
            ParkedError: There is none, or the environment has an invalid one.
        """
        self._url()

    async def write(self, batch: Sequence[Envelope]) -> BatchResult | None:
        """Post the messages of the batch, in order."""
        rejected: dict[int, str] = {}
        for index, envelope in enumerate(batch):
            message = self._message(envelope)
            try:
                if message is not None:
                    await self._post(message)
            except RejectedError as error:
                rejected[index] = error.reasons[0]
            except (DeliveryError, OSError, asyncio.CancelledError):
                if not index:
                    raise
                return BatchResult(index - len(rejected), rejected)  # what was posted is not posted again
            self._forget_ended(envelope)
        return BatchResult(len(batch) - len(rejected), rejected) if rejected else None

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    def mark(self) -> dict[str, Any]:
        """Return what is known of the running runs, as plain data."""
        return {run: msgspec.to_builtins(notes) for run, notes in self._notes.items()}

    def rewind(self, mark: dict[str, Any]) -> None:
        """Restore what was known at the mark."""
        self._notes = msgspec.convert(mark, dict[str, _RunNotes])

    def resume_runs(self, starts: Sequence[Envelope]) -> None:
        """Remember runs that are open; nothing is posted."""
        for each in starts:
            self._note(each)

    def _note(self, envelope: Envelope) -> _RunNotes | None:
        """Record what the event shows of its run, and return all that is known of it."""
        event = envelope.event
        handle = field(event, "state") or field(event, "ctx")
        if handle is None:
            return None
        run = run_id(handle)
        notes = self._notes.get(run)
        if notes is None:
            if len(self._notes) >= _MAX_RUNS:  # runs that never ended
                del self._notes[next(iter(self._notes))]
            notes = self._notes[run] = _RunNotes()
        if isinstance(event, RunStart | TrainStart) and notes.started is None:
            notes.started = envelope.time
        notes.announced = notes.announced or isinstance(event, RunStart)
        if isinstance(event, StepEnd | Eval):
            prefix = f"{event.eval_name}/" if isinstance(event, Eval) else ""
            notes.step = max(step_of(event.step_idx), notes.step or 0)
            notes.metrics |= {f"{prefix}{key}": each for key, each in _plain_metrics(event.metrics).items()}
        elif isinstance(event, Summary):
            notes.metrics |= {f"summary/{key}": each for key, each in _plain_metrics(event.values).items()}
        for key in list(notes.metrics)[:-_MAX_METRICS]:
            del notes.metrics[key]
        return notes

    def _forget_ended(self, envelope: Envelope) -> None:
        event = envelope.event
        if isinstance(event, RunEnd):
            self._notes.pop(run_id(event.ctx), None)
        elif isinstance(event, TrainEnd) and not self._is_announced(event):
            self._notes.pop(run_id(event.state), None)

    def _is_announced(self, event: TrainEnd) -> bool:
        notes = self._notes.get(run_id(event.state))
        return notes is not None and notes.announced

    def _message(self, envelope: Envelope) -> Message | None:
        """Return the message about an event, None for an event without one."""
        event, notes = envelope.event, self._note(envelope)
        name = _NAMES.get(type(event))
        if name is None or name not in self.config.events:
            return None
        if isinstance(event, TrainEnd) and self._is_announced(event):
            return None  # its RunEnd follows
        handle = field(event, "state") or field(event, "ctx")
        message: Message = {
            "event": name,
            "id": f"{envelope.stream}/{envelope.seq}",
            "time": datetime.fromtimestamp(envelope.time, UTC).isoformat(timespec="milliseconds"),
            "run": envelope.run or run_key(handle) or run_name(handle),
        }
        if isinstance(event, Alert):
            level = str(event.level)
            if level in _LEVELS and _LEVELS.index(level) < _LEVELS.index(self.config.min_level):
                return None
            return message | {"level": level, "title": redact_text(event.title), "text": redact_text(event.text)}
        if name == "run_end":
            message |= _end(event, notes, envelope.time)
        return {key: each for key, each in message.items() if each not in (None, {})}

    def _url(self) -> str:
        """Return the URL.

        Raises:
            ParkedError: There is none, or it is invalid.
        """
        name = self.config.url_env
        url = self.config.webhook_url or os.environ.get(name, "").strip()
        if not url:
            fix = f"set {name}, or webhook_url; then the next run, or `evsys-bus sync`, posts what is pending"
            raise ParkedError(f"the webhook has no URL: {name} is not set", fix=fix)
        if not re.match(_URL, url):
            raise ParkedError(f"{name} is not a URL", fix=f"set {name} to https://host/path")
        return url

    async def _post(self, message: Message) -> None:
        """Post one message; errors name the host alone, since the rest of the URL is a secret.

        Raises:
            RejectedError: The receiver refuses the message.
            ParkedError: The receiver redirects.
            RetryLaterError: It is busy, or does not answer.
        """
        url = self._url()
        host = f"the webhook at {urlsplit(url).hostname}"
        session = await self._session.open()
        body = msgspec.json.encode(_FORMATS[self.config.format](message))
        headers = {"Content-Type": "application/json", "X-Event-Id": message["id"]}
        try:
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as reply:
                status, after = reply.status, reply.headers.get("Retry-After")
                answer = await reply.content.read(_MAX_ANSWER_BYTES) if status >= HTTPStatus.BAD_REQUEST else b""
        except TimeoutError:
            what = f"{host} did not answer within {self.config.timeout_seconds:g} s"
            raise RetryLaterError(what) from None
        except self._session.errors as error:
            # Without the cause: its text may contain the URL.
            raise RetryLaterError(f"{host} cannot be reached: {type(error).__name__}") from None
        if status < HTTPStatus.MULTIPLE_CHOICES:
            return
        shown = " ".join(answer.decode("utf-8", "replace").split())[:_MAX_SHOWN].replace(url, "<redacted>")
        what = f"{host} answers {status}{f': {redact_text(shown)}' if shown else ''}"
        if is_temporary(status):
            raise RetryLaterError(what, after_seconds=retry_after_seconds(after))
        if status < HTTPStatus.BAD_REQUEST:
            raise ParkedError(what, fix=f"set {self.config.url_env}, or webhook_url, to the address it redirects to")
        raise RejectedError({0: f"{what}; {_fix(status, self.config)}"})


_NAMES: Final[Mapping[type, str]] = {Alert: "alert", RunStart: "run_start", RunEnd: "run_end", TrainEnd: "run_end"}


def _fix(status: int, config: WebhookConfig) -> str:
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
        return f"check the URL ({config.url_env}, or webhook_url): the receiver may have revoked it"
    return f"check that the receiver takes format {config.format!r}; json, slack and discord are available"


def _plain_metrics(metrics: object) -> dict[str, Any]:
    """Return the numbers and short texts of metrics; numbers that JSON does not have, as texts."""
    found: dict[str, Any] = {}
    for key, value in list(values_of(metrics).items())[-_MAX_METRICS:]:
        if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            found[key[:_MAX_SHOWN]] = value
        elif isinstance(value, float | str):
            found[key[:_MAX_SHOWN]] = str(value)[:_MAX_SHOWN]
    return found


def _end(event: object, notes: _RunNotes | None, time: float) -> Message:
    """Return how a run ended."""
    notes = notes or _RunNotes()
    result, arm, state = (field(event, name) for name in ("run_result", "arm", "state"))
    error = field(result, "error") or field(arm, "error") or field(state, "error")
    status = field(result, "status") or field(arm, "status")
    if state is not None:
        status = "failed" if error else "cancelled" if field(state, "stop_reason") == "cancelled" else "completed"
    final = _plain_metrics(field(result, "metrics")) or _plain_metrics(field(arm, "metrics"))
    return {
        "status": None if status is None else str(status),
        "error": redact_text(str(error))[:_MAX_ERROR] if error else None,
        "seconds": None if notes.started is None else round(max(0.0, time - notes.started), 3),
        "step": notes.step,
        "metrics": {**notes.metrics, **final},
    }


def _title(message: Message) -> str:
    """Return one line about the message."""
    if message["event"] == "alert":
        return f"{message['level'].upper()} {message['run']}: {message['title']}"
    return f"{message['run']} {'started' if message['event'] == 'run_start' else message.get('status', 'ended')}"


def _details(message: Message) -> list[str]:
    """Return the lines below the title."""
    lines = [str(message[key]) for key in ("text", "error") if message.get(key)]
    if "seconds" in message:
        hours, seconds = divmod(round(message["seconds"]), 3600)
        lines.append(f"after {hours}:{seconds // 60:02d}:{seconds % 60:02d}")
    if "step" in message:
        lines.append(f"last step {message['step']}")
    return [*lines, *(f"{key}: {_number(value)}" for key, value in message.get("metrics", {}).items())]


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else text_of(value)


def _slack(message: Message) -> Message:
    """Return Slack's form: a text for notifications, and blocks."""
    title, details = _title(message), "\n".join(_details(message))
    header = {"type": "plain_text", "text": cut_text(title, _MAX_SLACK_TITLE)}
    blocks: list[Message] = [{"type": "header", "text": header}]
    if details:
        text = cut_text(_escaped(details), _MAX_SLACK_TEXT)
        blocks.append({"type": "section", "text": {"type": "mrkdwn", "text": text}})
    blocks.append({"type": "context", "elements": [{"type": "mrkdwn", "text": _escaped(message["time"])}]})
    return {"text": cut_text(_escaped(title), _MAX_SLACK_TEXT), "blocks": blocks}


def _escaped(text: str) -> str:
    """Return the text so that Slack shows it as it is, without mentions."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _discord(message: Message) -> Message:
    """Return Discord's form, whose mentions notify no member."""
    content = cut_text("\n".join([f"**{_title(message)}**", *_details(message)]), _MAX_DISCORD_TEXT)
    return {"content": content, "allowed_mentions": {"parse": []}}


_FORMATS: Final = {"json": dict, "slack": _slack, "discord": _discord}


class WebhookCallback(Callback):
    """Posts alerts and the ends of runs to a URL, in a courier: the loop never waits for the receiver.

    A message is posted at least once: one whose answer was lost is posted again with the same ``id`` (also the header
    ``X-Event-Id``). Messages that the receiver refuses become dead letters; while it is away, they are pending, and
    ``evsys-bus sync`` or the next run posts them. A failed run's message has its error, duration and last metrics. A
    loop without RunStart is reported at its TrainEnd.

    Example:
        >>> WebhookCallback(url_env="SLACK_URL", format="slack").config.events
        ('alert', 'run_end')

    Raises:
        ModuleNotFoundError: aiohttp is not installed; `build_callbacks` makes a BrokenAdapterError of it.
    """

    name: ClassVar[str] = "webhook"
    Config: ClassVar[type | None] = WebhookConfig
    delivery: ClassVar[type | None] = WebhookSink
    ranks: ClassVar[Ranks | None] = "rank0"

    def __init__(self, webhook_url: str | None = None, **params: Any) -> None:
        """Validate the parameters against `WebhookConfig`."""
        self.config = validate_params(WebhookConfig, {"webhook_url": webhook_url, **params})
