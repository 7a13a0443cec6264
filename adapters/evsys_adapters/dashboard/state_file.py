"""Where a running dashboard is found: its URL and its token, in a file that only its user can read.

The dashboard writes the file when it listens and removes it when it ends. A file that a killed dashboard has left, or
that belongs to another machine with the same home directory, is ignored by readers and replaced by the next dashboard.
"""

import http.client
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from evsys_bus.disk import replace_file
from evsys_bus.files import load_file

SERVICE: Final = "evsys-bus-dashboard"
"""What a dashboard answers at ``/health``, which distinguishes it from other servers."""

_MIN_TOKEN_CHARACTERS: Final = 32
_HEALTH_SECONDS: Final = 1.0
_MAX_HEALTH_BYTES: Final = 4096


class DashboardState(msgspec.Struct, frozen=True):
    """A running dashboard."""

    url: str
    """Without a path, such as ``http://127.0.0.1:8420``."""
    token: str
    """What clients send as ``Authorization: Bearer TOKEN``."""
    pid: int
    host: str
    """The name of its machine."""
    store: str
    """The absolute path of its database, or its URL."""
    started: float
    """Seconds since the epoch."""

    @property
    def browser_url(self) -> str:
        """The URL for a browser, with the token in the fragment, which browsers do not send to servers."""
        return f"{self.url}/#token={self.token}"


def state_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the state file: ``evsys-bus/dashboard.json`` in the user's state directory."""
    return _user_folder(environ, "XDG_STATE_HOME", ".local/state") / "dashboard.json"


def default_database(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the database where none is given: in the user's data directory."""
    return _user_folder(environ, "XDG_DATA_HOME", ".local/share") / "dashboard.sqlite"


def read_state(path: Path | None = None) -> DashboardState | None:
    """Return the dashboard that the state file names, or None if there is none or its process has ended.

    It only reads the file and looks for the process; `find_dashboard` also asks the server.
    """
    try:
        state = load_file(path or state_path(), _decode_state, quarantine=False)
    except OSError:
        return None
    if state is None or state.host != socket.gethostname() or not _is_running(state.pid):
        return None
    return state


def find_dashboard(path: Path | None = None) -> tuple[str, str] | None:
    """Return URL and token of the user's running dashboard, or None. Takes a second at most."""
    state = read_state(path)
    return (state.url, state.token) if state is not None and responds(state.url) else None


def responds(url: str, timeout: float = _HEALTH_SECONDS) -> bool:
    """Whether a dashboard of this package answers at a URL within ``timeout`` seconds."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        health = msgspec.json.decode(response.read(_MAX_HEALTH_BYTES), type=dict[str, object])
    except (OSError, http.client.HTTPException, msgspec.MsgspecError, ValueError):
        return False
    finally:
        connection.close()
    return response.status == http.client.OK and health.get("service") == SERVICE


def write_state(state: DashboardState, path: Path | None = None) -> None:
    """Write the state file, readable by its user only. Raises OSError."""
    path = path or state_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    replace_file(path, msgspec.json.encode(state) + b"\n", mode=0o600)


def remove_state(state: DashboardState, path: Path | None = None) -> None:
    """Remove the state file, unless another dashboard has replaced it meanwhile. Raises OSError."""
    path = path or state_path()
    if load_file(path, _decode_state, quarantine=False) == state:
        path.unlink(missing_ok=True)


def load_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the token of the user's dashboards, made at the first call; None if the file cannot be used.

    It is the same after a restart, so that open pages and clients continue. Removing the file makes a new one.
    """
    path = _user_folder(environ, "XDG_STATE_HOME", ".local/state") / "dashboard-token"
    try:
        known = load_file(path, _decode_token, quarantine=True)
        if known is None:
            known = secrets.token_urlsafe(32)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path, f"{known}\n".encode(), mode=0o600)
    except OSError:
        return None
    return known


def _decode_token(data: bytes) -> str:
    token = data.decode("ascii").strip()
    if len(token) < _MIN_TOKEN_CHARACTERS:
        raise ValueError("it has no token")
    return token


def _user_folder(environ: Mapping[str, str], variable: str, default: str) -> Path:
    base = environ.get(variable, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / default) / "evsys-bus"  # noqa: PTH117 # a string, may be ""


def _decode_state(data: bytes) -> DashboardState:
    return msgspec.json.decode(data, type=DashboardState)


def _is_running(pid: int) -> bool:
    if pid <= 0:  # a group of processes, or all
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
