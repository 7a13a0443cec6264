"""``evsys-bus dash``: starts, finds and stops the dashboard of this user, and imports runs into it."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

import click
import msgspec

from evsys_adapters.dashboard.state_file import (
    DashboardState,
    default_database,
    read_state,
    responds,
    state_path,
)
from evsys_bus.cli.output.formatting import format_duration, format_time
from evsys_bus.cli.output.screen import Screen, color_option, is_terminal, json_option
from evsys_bus.cli.records import find_journal
from evsys_bus.errors import DashboardError

LOG_NAME: Final = "dashboard.log"
"""The log of a dashboard in the background, beside its state file."""
STOP_COMMAND: Final = "evsys-bus dash --stop"
_PACKAGES: Final = ("starlette", "uvicorn", "numpy")
_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 15.0
_REQUEST_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.1
_LINE_SECONDS: Final = 2.0
_MAX_LOG_BYTES: Final = 1 << 20
_MAIN: Final = "from evsys_bus.cli import main; main()"


class _Database(click.Path):
    """The absolute path of a file, or the URL of a PostgreSQL database."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check the value, and return it. Raises click.BadParameter."""
        from evsys_adapters.dashboard.database import is_url

        return (
            str(value) if is_url(str(value)) else str(Path(os.fsdecode(super().convert(value, param, ctx))).absolute())
        )


@click.command("dash")
@click.option(
    "--db",
    type=_Database(dir_okay=False),
    help="Its database: a file, or postgresql://USER@HOST/NAME; default: the user's own.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port", type=click.IntRange(0, 65535), help="The port, 0 for any free one; default: 8420 or the next free one."
)
@click.option(
    "--import",
    "imports",
    multiple=True,
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Import a recorded run, an experiment or a journal; repeatable.",
)
@click.option("--browser/--no-browser", default=True, help="Open it in the browser; never without a display.")
@click.option(
    "--open-loopback",
    is_flag=True,
    help="Let EvSys' own client on this machine in with any key; see docs/dashboard.md.",
)
@click.option(
    "--keep-days",
    type=click.FloatRange(0, min_open=True),
    help="Remove experiments without an event for so many days; default: keep all.",
)
@click.option("--stop", is_flag=True, help="Stop the running dashboard.")
@click.option("--status", is_flag=True, help="Show whether one runs, and where; exit code 3 if none does.")
@json_option
@color_option
@click.pass_obj
def command(
    screen: Screen,
    db: str | None,
    host: str,
    port: int | None,
    imports: tuple[Path, ...],
    browser: bool,
    open_loopback: bool,
    keep_days: float | None,
    stop: bool,
    status: bool,
    as_json: bool,
) -> int:
    """Show runs in the browser: live and finished ones, from this machine, with no account and no other host.

    It runs until Ctrl-C, or until nobody has used it for 12 hours. The URL on stdout contains its token. If the
    dashboard of this user runs already, only its URL is shown.

    \b
    Examples:
      evsys-bus dash
      evsys-bus dash --import runs/sweep
      evsys-bus dash --stop
    """  # noqa: D301 # click reads the backspace as: do not wrap
    if stop:
        return _stop(screen)
    journals = [find_journal(each).directory for each in imports]
    state = running_dashboard()
    if status:
        return _show_status(state, screen, as_json=as_json)
    if state is not None:
        if db is not None and db != state.store:
            raise DashboardError(
                f"a dashboard runs already, at {state.url}, with the database {state.store}", fix=f"{STOP_COMMAND}"
            )
        _show_url(state, as_json=as_json)
        screen.note(f"it runs already; stop it with: {STOP_COMMAND}")
        import_journals(state, journals, screen)
        if browser and not journals:
            open_browser(state)
        return 0
    _require_extra()
    from evsys_adapters.dashboard.server import serve

    def on_ready(state: DashboardState) -> None:
        _show_url(state, as_json=as_json)
        screen.note("Ctrl-C ends it")
        if browser:
            open_browser(state)
        # On a thread: the loop that calls this has to answer the imports.
        threading.Thread(target=_import_noting_errors, args=(state, journals, screen), daemon=True).start()

    path = default_database() if db is None else db
    serve(path, host=host, port=port, open_loopback=open_loopback, keep_days=keep_days, on_ready=on_ready)
    return 0


def running_dashboard() -> DashboardState | None:
    """Return the dashboard of this user if it runs and answers."""
    state = read_state()
    return state if state is not None and responds(state.url) else None


def start_dashboard() -> DashboardState:
    """Return the running dashboard of this user; starts one in the background if there is none.

    It continues when this process ends; its log is beside its state file.

    Raises:
        DashboardError: It could not be started, or does not answer.
    """
    state = running_dashboard()
    if state is not None:
        return state
    _require_extra()
    log_path = state_path().with_name(LOG_NAME)
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open_log(log_path) as log_file:
        process = subprocess.Popen(  # noqa: S603 # our own interpreter, and nothing from outside
            [sys.executable, "-P", "-c", _MAIN, "dash", "--no-browser"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the URL with the token
            stderr=log_file,
            cwd="/",
            start_new_session=True,  # it outlives the terminal
        )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        exit_code = process.poll()
        state = running_dashboard()
        if state is not None:  # of another process, if two were started at the same time
            return state
        if exit_code is not None:
            break
        time.sleep(_POLL_SECONDS)
    last_lines = log_path.read_text(errors="replace").strip().splitlines()[-1:]
    why = last_lines[0] if last_lines else None
    raise DashboardError("the dashboard could not be started", why=why, fix=f"read {log_path}; or: evsys-bus dash")


def open_for_run(screen: Screen) -> DashboardState:
    """Find or start the dashboard for a run that begins, show where it is, and open it in the browser.

    Raises:
        DashboardError: It could not be started.
    """
    state = start_dashboard()
    # The log of a batch job may be read by others, so the token is shown on a terminal only.
    shown = state.browser_url if is_terminal(sys.stderr) else f"{state.url}   (with its token: evsys-bus dash --status)"
    screen.note(f"dashboard  {shown}\nit goes on after the run; stop it with: {STOP_COMMAND}")
    open_browser(state)
    return state


def open_browser(state: DashboardState) -> None:
    """Open the dashboard in the browser if there is a terminal and a display."""
    if is_terminal(sys.stderr) and _has_display():
        webbrowser.open(state.browser_url)


def import_journals(state: DashboardState, journals: Sequence[Path | str], screen: Screen) -> None:
    """Let the dashboard import journals, one after the other, and show the progress.

    Raises:
        DashboardError: It cannot be reached, or cannot import a journal.
    """
    for each in journals:
        journal = os.path.abspath(each)  # noqa: PTH100  # as text, as all of a journal
        began = noted_at = time.monotonic()
        number = _request(state, "POST", "/api/import", {"journal": journal}).get("import")
        while True:
            progress = _request(state, "GET", f"/api/import/{number}")
            events, total = progress.get("events") or 0, progress.get("of")
            if progress.get("error"):
                fix = f"evsys-bus journal verify {journal}"
                raise DashboardError(f"{journal} could not be imported", why=str(progress["error"]), fix=fix)
            if progress.get("state") not in {"waiting", "running"}:
                break
            if time.monotonic() - noted_at >= _LINE_SECONDS:
                noted_at = time.monotonic()
                screen.note(f"importing {journal}   {events:,} of {total or '?'} events")
            time.sleep(_POLL_SECONDS)
        seconds = time.monotonic() - began
        screen.note(f"imported {journal}   {events:,} events   {format_duration(seconds)}")
        _deliver_waiting(journal, screen)


def _import_noting_errors(state: DashboardState, journals: Sequence[Path | str], screen: Screen) -> None:
    """Import journals, and see to those that the dashboard imports by itself as it starts."""
    try:
        import_journals(state, journals, screen)
        while True:
            found: list[dict[str, Any]] = _request(state, "GET", "/api/import").get("imports") or []
            if not any(each["state"] in {"waiting", "running"} for each in found):
                break
            time.sleep(_POLL_SECONDS)
        for each in found:
            if each["state"] == "completed":
                _deliver_waiting(each["journal"], screen)
    except DashboardError as error:
        screen.note(str(error))


def _deliver_waiting(journal: str, screen: Screen) -> None:
    """Deliver the events of a journal that wait for a dashboard: it has them, but the status is still `waiting`."""
    rows = _sync(journal, "--dry-run", "--json").stdout.splitlines()
    waiting = [row["adapter"] for row in map(msgspec.json.decode, rows) if row.get("waiting")]
    if waiting:
        done = _sync(journal, *(word for name in waiting for word in ("--adapter", name)))
        if done.returncode:
            screen.note(done.stderr.strip())


def _sync(journal: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run ``evsys-bus sync``; in a process, because it handles signals, which only a main thread can."""
    command = [sys.executable, "-P", "-c", _MAIN, "sync", journal, *options]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603 # our own interpreter


def _request(state: DashboardState, method: str, path: str, body: object = None) -> dict[str, Any]:
    """Send a request and return the JSON object that the dashboard answers."""
    parts = urlsplit(state.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_REQUEST_SECONDS)
    headers = {"Authorization": f"Bearer {state.token}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else msgspec.json.encode(body), headers)
        reply = connection.getresponse()
        answer = msgspec.json.decode(reply.read(), type=dict[str, Any])
    except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
        raise DashboardError(f"{state.url} does not answer", why=str(error), fix="evsys-bus dash --status") from error
    finally:
        connection.close()
    if reply.status >= http.client.BAD_REQUEST:
        details = msgspec.convert(answer.get("error") or {}, dict[str, Any])
        fix = str(details.get("fix") or "evsys-bus dash --status")
        raise DashboardError(f"{state.url} refuses it: {details.get('message')}", fix=fix)
    return answer


def _stop(screen: Screen) -> int:
    state = read_state()
    if state is None:
        screen.note("no dashboard is running")
        return 0
    if not responds(state.url):
        raise DashboardError(
            f"the dashboard at {state.url} does not answer", fix=f"if process {state.pid} is it: kill {state.pid}"
        )
    os.kill(state.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while read_state() == state:
        if time.monotonic() >= deadline:
            raise DashboardError(f"process {state.pid} has not ended", fix=f"kill -9 {state.pid}; nothing is lost")
        time.sleep(_POLL_SECONDS)
    screen.note(f"stopped the dashboard at {state.url}")
    return 0


def _show_status(state: DashboardState | None, screen: Screen, *, as_json: bool) -> int:
    if state is None:
        screen.note("no dashboard is running; start it with: evsys-bus dash")
        return 3
    if as_json:
        click.echo(msgspec.json.encode({"type": "dashboard", **msgspec.structs.asdict(state)}).decode())
        return 0
    click.echo(state.browser_url)
    screen.note(f"process {state.pid}, since {format_time(state.started)}   database: {state.store}")
    screen.note(f"stop it with: {STOP_COMMAND}")
    return 0


def _show_url(state: DashboardState, *, as_json: bool) -> None:
    shown = msgspec.json.encode({"type": "dashboard", **msgspec.structs.asdict(state)}).decode()
    click.echo(shown if as_json else state.browser_url)


def _open_log(path: Path) -> IO[bytes]:
    """Open the log, readable by the owner only; it begins anew if it has become too large."""
    mode = "wb" if path.exists() and path.stat().st_size > _MAX_LOG_BYTES else "ab"
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))


def _has_display() -> bool:
    if os.environ.get("BROWSER"):
        return True
    if sys.platform.startswith("linux"):
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return not os.environ.get("SSH_CONNECTION")


def _require_extra() -> None:
    from importlib.util import find_spec

    missing = [each for each in _PACKAGES if find_spec(each) is None]
    if missing:
        fix = "pip install 'evsys-bus[dashboard]'   or   uv add 'evsys-bus[dashboard]'"
        error = DashboardError(f"the dashboard needs {', '.join(missing)}, which is not installed", fix=fix)
        raise error from ModuleNotFoundError(missing[0])
