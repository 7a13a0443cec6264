"""``evsys-bus mirror``: writes journals that `nats_relay` sends to JetStream to a journal on this machine."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from evsys_adapters.common.params import require_package, validate_params
from evsys_adapters.jetstream.connection import ConnectionConfig
from evsys_adapters.jetstream.mirror import ACK_WAIT_SECONDS, Mirror
from evsys_bus.cli.output.formatting import pluralize
from evsys_bus.cli.output.screen import Screen, color_option, json_option

_LINE_SECONDS: Final = 10.0


@click.command("mirror")
@click.argument("servers", metavar="nats://HOST:PORT[,...]")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("--stream", default="EVSYS", show_default=True, help="The stream of JetStream.")
@click.option(
    "--subject",
    default="evsys.>",
    show_default=True,
    help="What to mirror: PREFIX.> of relays, or PREFIX.JOURNAL.>.",
)
@click.option("--consumer", metavar="NAME", help="The durable consumer to use; default: one made for DIR.")
@click.option("--once", is_flag=True, help="End when the server has no more messages.")
@click.option(
    "--ack-wait",
    type=click.FloatRange(0.5, 3600),
    default=ACK_WAIT_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="After which time the server sends a message again that a killed mirror had; for a new consumer.",
)
@click.option("--creds", "credentials_file", metavar="FILE", help="Credentials of the user (.creds).")
@click.option("--nkey", "nkey_file", metavar="FILE", help="Seed of the user's NKey.")
@click.option("--user", help="Name of the user; the password is in NATS_PASSWORD. A token: in NATS_TOKEN.")
@click.option("--tls-ca", "tls_ca_file", metavar="FILE", help="Certificates to trust.")
@click.option("--tls-cert", "tls_certificate_file", metavar="FILE", help="Certificate of this client.")
@click.option("--tls-key", "tls_key_file", metavar="FILE", help="Key of that certificate.")
@click.option("--inbox-prefix", default="_INBOX", show_default=True, help="Prefix of the subjects for answers.")
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    servers: str,
    directory: Path,
    stream: str,
    subject: str,
    consumer: str | None,
    once: bool,
    ack_wait: float,
    as_json: bool,
    **connection: str | None,
) -> int:
    """Write journals that nats_relay sends to DIR, an ordinary journal: follow, sync, tail and dash read it.

    It runs until Ctrl-C or SIGTERM, and continues where it was. A message is removed from the server when its events
    are synced to the disk here.

    \b
    Examples:
      evsys-bus mirror nats://broker:4222 mirrored --creds mirror.creds
      evsys-bus mirror nats://broker:4222 mirrored --once
    """  # noqa: D301 # click reads the backspace as: do not wrap
    require_package("mirror", "nats", "nats")
    config = validate_params(ConnectionConfig, {"servers": servers.split(","), **connection})
    mirror = Mirror(
        config,
        directory,
        stream=stream,
        subject=subject,
        consumer=consumer,
        ack_wait_seconds=ack_wait,
        note=lambda text: screen.note(f"warning: {text}"),
    )
    try:
        asyncio.run(_run(mirror, screen, once=once))
    finally:
        if as_json:
            click.echo(msgspec.json.encode(_summary(mirror)).decode())
        else:
            screen.note(_line(mirror))
    return 0


async def _run(mirror: Mirror, screen: Screen, *, once: bool) -> None:
    """Mirror until SIGINT or SIGTERM, with a line now and then while events arrive."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, mirror.stop)
    shown, shown_at = 0, time.monotonic()

    def show_progress() -> None:
        nonlocal shown, shown_at
        now = time.monotonic()
        if mirror.journal.events > shown:
            rate = (mirror.journal.events - shown) / (now - shown_at)
            screen.note(f"{_line(mirror)}, {rate:,.0f} a second")
        shown, shown_at = mirror.journal.events, now
        loop.call_later(_LINE_SECONDS, show_progress)

    timer = loop.call_later(_LINE_SECONDS, show_progress)
    try:
        await mirror.run(once=once)
    finally:
        timer.cancel()


def _line(mirror: Mirror) -> str:
    missing = sum(last - first + 1 for _, first, last in mirror.journal.missing)
    gaps = f", {pluralize(missing, 'event')} missing" if missing else ""
    return f"mirrored {pluralize(mirror.journal.events, 'event')} in {pluralize(mirror.messages, 'message')}{gaps}"


def _summary(mirror: Mirror) -> dict[str, Any]:
    missing = [{"stream": stream, "first": first, "last": last} for stream, first, last in mirror.journal.missing]
    return {"type": "mirrored", "events": mirror.journal.events, "messages": mirror.messages, "missing": missing}
