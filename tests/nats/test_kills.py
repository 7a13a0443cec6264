import nats_kills
import pytest


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("max_bytes", "dedupe_window"), [(-1, 120.0), (1 << 20, 0.2)])
def test_kills_of_relay_mirror_and_server_lose_nothing(tmp_path, max_bytes, dedupe_window):
    summary = nats_kills.run(tmp_path, 8, 40_000, 3, 4, max_bytes, dedupe_window)
    assert "none lost, doubled or out of order" in summary
