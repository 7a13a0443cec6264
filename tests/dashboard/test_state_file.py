"""The file by which clients find the user's dashboard."""

import os
import socket
import stat

import msgspec
import pytest

from evsys_adapters.dashboard.state_file import (
    DashboardState,
    default_database,
    find_dashboard,
    read_state,
    remove_state,
    state_path,
    write_state,
)


@pytest.fixture
def running(tmp_path):
    return DashboardState("http://127.0.0.1:1", "secret", os.getpid(), socket.gethostname(), str(tmp_path / "db"), 1.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "evsys-bus" / "dashboard.json"


def test_what_is_written_is_read_and_only_its_user_can_read_it(running, path):
    write_state(running, path)
    assert read_state(path) == running
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_token_is_in_the_fragment_of_the_browsers_url(running):
    assert running.browser_url == "http://127.0.0.1:1/#token=secret"


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"pid": -1}, {"pid": 0}, {"pid": 2**70}, {"host": "another"}])
def test_a_dashboard_whose_process_is_gone_or_elsewhere_is_not_found(running, path, change):
    write_state(msgspec.structs.replace(running, **change), path)
    assert read_state(path) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"url": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_as_none_and_is_replaced(running, path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert read_state(path) is None
    write_state(running, path)
    assert read_state(path) == running


def test_a_process_that_is_no_dashboard_is_not_found(running, path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        write_state(msgspec.structs.replace(running, url=f"http://127.0.0.1:{other.getsockname()[1]}"), path)
        assert find_dashboard(path) is None
    assert find_dashboard(path) is None  # nothing listens any more


def test_the_file_of_another_dashboard_stays(running, path):
    write_state(running, path)
    remove_state(msgspec.structs.replace(running, token="earlier"), path)
    assert read_state(path) == running
    remove_state(running, path)
    assert not path.exists()
    remove_state(running, path)


def test_the_places_follow_the_users_directories(tmp_path):
    places = {"XDG_STATE_HOME": str(tmp_path / "s"), "XDG_DATA_HOME": str(tmp_path / "d")}
    assert state_path(places) == tmp_path / "s/evsys-bus/dashboard.json"
    assert default_database(places) == tmp_path / "d/evsys-bus/dashboard.sqlite"
    assert state_path({"XDG_STATE_HOME": "relative"}).parts[-4:] == (".local", "state", "evsys-bus", "dashboard.json")
    assert default_database({}).parts[-4:] == (".local", "share", "evsys-bus", "dashboard.sqlite")
