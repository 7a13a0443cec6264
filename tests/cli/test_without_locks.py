"""A project on a file system without locks: its journal is on a local disk, and every command finds it there."""

import os

from support.files import parse_json_lines
from support.programs import run_evsys_bus

PATCH = """
import errno, fcntl, os
real = fcntl.flock
def flock(file, operation):
    path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
    if path.startswith(os.environ["WITHOUT_LOCKS"]):
        raise OSError(errno.ENOLCK, "No locks available")
    return real(file, operation)
fcntl.flock = flock
"""


def test_runs_on_a_file_system_without_locks_are_recorded_on_a_local_disk_with_one_warning(tmp_path):
    network, state = tmp_path / "network", tmp_path / "state"
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(PATCH)
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "patch"),
        "WITHOUT_LOCKS": str(network),
        "XDG_STATE_HOME": str(state),
    }

    def command(*arguments):
        done = run_evsys_bus(*arguments, cwd=network, env=environment)
        assert done.returncode == 0, done.stderr
        return done

    network.mkdir()
    command("init")
    run = ["run", "experiment.yaml", "--progress", "off", "--strict", "--set", "run.steps=20"]
    done = command(*run, "--arm", "slow")
    assert done.stderr.count("journal.elsewhere") == 1
    [journal] = (state / "evsys-bus" / "journals").iterdir()
    assert str(journal) in done.stderr
    assert not (network / "runs" / "first-sweep" / "journal").exists()
    assert len((network / "runs" / "first-sweep" / "slow-s1" / "metrics.csv").read_text().splitlines()) == 21

    assert "journal.elsewhere" not in command(*run, "--resume").stderr, "it has been used before"
    assert [journal] == list((state / "evsys-bus" / "journals").iterdir())
    rows = parse_json_lines(command("tail", "runs/first-sweep", "--json", "-n", "1000").stdout)
    steps = [(row["run"], row["event"]["step_idx"]) for row in rows if row["event"]["type"] == "step_end"]
    assert sorted(steps) == sorted(
        (f"{arm}-s{seed}", step) for arm in ("slow", "fast") for seed in (0, 1) for step in range(20)
    )
    assert "fast-s0   run_end" in command("tail", "runs/first-sweep/fast-s0", "-n", "1").stdout
    assert str(journal) in command("status", "runs/first-sweep").stdout
    assert "nothing is pending" in command("sync", "runs/first-sweep").stderr
