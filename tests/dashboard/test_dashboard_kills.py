"""Kills of a trainer, its courier and the dashboard at random moments."""

import dashboard_kills as kills
import pytest


@pytest.mark.long
@pytest.mark.timeout(240)
def test_eight_kills_of_a_trainer_its_courier_and_the_dashboard_lose_nothing_and_double_nothing(tmp_path):
    counts = kills.kill_repeatedly(8, seed=8, folder=tmp_path)
    assert counts["points"] > 0
