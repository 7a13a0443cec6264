"""A trainer, its courier and EvSys' server are killed: nothing is there twice, and no metric is lost."""

import evsys_kills as kills
import pytest

pytestmark = pytest.mark.long


@pytest.mark.servers
@pytest.mark.timeout(180)
def test_four_kills_leave_the_server_with_everything_once(tmp_path):
    counts = kills.kill_repeatedly(4, seed=12, folder=tmp_path)
    assert counts["points"] >= 500
    assert counts["trainers"] == 4
