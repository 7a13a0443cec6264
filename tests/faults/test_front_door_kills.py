"""The short form of `front_door_kills.py`; the long form is its command."""

import random

import front_door_kills
import pytest


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # those of W&B's and TensorBoard's packages, and of forks
def test_all_receivers_have_what_killed_programs_logged_by_the_front_door(tmp_path):
    assert front_door_kills.run_histories(random.randrange(1_000_000), 10, tmp_path) == []
