import pytest

from support.nats_server import NatsServer


@pytest.fixture
def server(tmp_path):
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
def nats_url(server):
    return server.url
