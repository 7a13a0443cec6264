"""What the questions `journal`, `kills` and `growth` stand on. Nothing here judges how fast anything is."""

import pytest

from evsys_bus.bench import loggers
from evsys_bus.bench.loggers import LogProcess, loggers_in
from evsys_bus.bench.memory_growth import MemoryGrowth
from evsys_bus.bench.suite import Budget

FOUND = loggers_in((loggers.__name__,))


def process(tmp_path, name, *, end, steps=100):
    module, _ = FOUND[name]
    return LogProcess(module, name, tmp_path, steps=steps, rate=1_000, end=end)


@pytest.mark.parametrize("name", [loggers.OURS, loggers.JSON_FLUSH])
def test_P5_a_step_that_was_written_survives_the_kill(tmp_path, name):
    process(tmp_path, name, end="die").wait()
    assert FOUND[name][1].count(tmp_path) == 100


def test_P5_a_step_in_a_buffer_does_not_and_is_counted_as_lost(tmp_path):
    process(tmp_path, loggers.JSON, end="die").wait()
    assert 0 < FOUND[loggers.JSON][1].count(tmp_path) < 100


def test_a_process_that_is_timed_tells_the_nanoseconds_of_its_median_call(tmp_path):
    assert 100 < float(process(tmp_path, loggers.OURS, end="time").wait()) < 1e8
    assert FOUND[loggers.OURS][1].count(tmp_path) == 100


def test_a_process_without_its_package_says_which(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="nobody_has_this"):
        LogProcess("nobody_has_this", "x", tmp_path, steps=1, rate=1, end="die").wait()


def test_a_process_that_fails_in_another_way_is_no_mere_absence(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError"):
        LogProcess(loggers.__name__, "nobody", tmp_path, steps=1, rate=1, end="die").wait()


def test_P7_growth_times_a_long_run_beside_a_new_one_and_tells_its_memory():
    times, memory = MemoryGrowth().measure_tables(Budget(rounds=3, process_rounds=2, sample_ns=100_000))
    assert [row.candidate for row in times.rows] == ["a bus at its first steps", "a bus after 6,000 steps"]
    assert memory.rows[0].value.median < 20
    assert memory.target_results[0].met is True
