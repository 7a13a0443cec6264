"""Adapters that end their process: the others are delivered to all the same, and who did it is given up by name."""

import subprocess
import textwrap
from pathlib import Path

import pytest

from evsys_bus.delivery.progress import read_progress
from support.programs import EVSYS_BUS

PLUGIN = '''
    """Adapters that end their process, each in its own way, and one that counts."""
    import ctypes, os, signal, sys, time
    from pathlib import Path
    from evsys_bus import Callback, Event, Sink, register_callback, register_sink

    HERE = Path(__file__).parent
    ENDS = {
        "exits": lambda: os._exit(7),
        "exits_well": lambda: os._exit(0),
        "segfaults": lambda: ctypes.string_at(0),
        "is_killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }

    class Tick(Event, frozen=True):
        number: int

    @register_sink("counts")
    class Counts(Sink):
        async def write(self, batch):
            with (HERE / "counted").open("a") as file:
                file.writelines(f"{each.seq}\\n" for each in batch)

    @register_callback("ends")
    class Ends(Callback):
        placement = "follow"

        def __init__(self, how, at=3, once=False):
            self.how, self.at, self.once = how, at, once

        def on_tick(self, number):
            mark = HERE / "has_ended"
            if number == self.at and not (self.once and mark.exists()):
                mark.touch()
                ENDS[self.how]()

    @register_callback("ends_at_import")
    class EndsAtImport(Callback):
        placement = "follow"

        def __init__(self):
            if "pytest" not in sys.modules and sys.argv[0] == "-c":
                os._exit(9)

        def on_tick(self, number):
            pass
'''

PROGRAM = """
    import json, sys, time
    from plugin import Tick
    from evsys_bus import EventBus, build_callbacks

    specs = [{"kind": "counts"}, *json.loads(sys.argv[1])]
    bus = EventBus(build_callbacks(specs), journal="journal", drain_timeout=float(sys.argv[2]), linger_seconds=2)
    with bus:
        for number in range(100):
            bus.publish(Tick(number))
        if len(sys.argv) > 3:  # it goes on until the others have had all
            while any(each.pending for each in bus.health().deliveries if "ends" not in each.name):
                time.sleep(0.05)
            bus.publish(Tick(100))
    for each in bus.receipt.deliveries:
        print(each.name, each.recorded, each.delivered, each.dead, each.pending, each.last_error, sep="|")
"""


@pytest.fixture
def trainer(tmp_path, program):
    """Run the program with these adapters; what the receipt says of each, and what stands on stderr."""
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN))

    def run(specs: str, drain_timeout: float = 19, *more: str) -> tuple[dict[str, list[str]], str]:
        out, errors = program(PROGRAM, specs, str(drain_timeout), *more).communicate(timeout=20)
        rows = [line.split("|") for line in out.splitlines()]
        assert rows, errors
        return {name: facts for name, *facts in rows}, errors

    return run


def counted(folder: Path) -> list[int]:
    return sorted({int(line) for line in (folder / "counted").read_text().splitlines()})


def test_those_that_end_their_process_are_given_up_and_the_others_get_everything(tmp_path, trainer):
    ends = '[{"kind": "ends", "name": "%s", "params": {"how": "%s"}}, {"kind": "ends", "params": {"how": "%s"}}]'
    told, errors = trainer(ends % ("faulty", "segfaults", "exits_well"))
    assert told["counts"] == ["100", "100", "0", "0", "None"]
    assert counted(tmp_path) == [*range(1, 101)]
    for name, how in {"faulty": "SIGSEGV", "ends": "exit code 0"}.items():
        *numbers, trouble = told[name]
        recorded, delivered, dead, pending = map(int, numbers)
        assert recorded == 100 == delivered + dead + pending
        assert pending > 0
        assert trouble == f"its process has ended 5 times, the last time by {how}"
        (given_up,) = [each for each in read_progress(tmp_path / "journal") if each.name == name]
        assert given_up.state == "failed"
        assert "process.log" in given_up.fix
        assert f"evsys-bus sync {tmp_path}/journal --adapter {name}" in given_up.fix
    assert errors.count("couriers.parted") == 1
    assert errors.count("couriers.given_up") == 2
    assert "Segmentation fault" in (tmp_path / "journal" / "couriers" / "process.log").read_text()


@pytest.mark.long
def test_while_the_program_runs_the_others_go_on(tmp_path, trainer):
    told, _ = trainer('[{"kind": "ends_at_import"}]', 0.5, "goes on")
    assert told["counts"][:2] == ["101", "101"]
    assert told["ends_at_import"][3] == "101"
    assert counted(tmp_path) == [*range(1, 102)]


def test_one_that_dies_but_once_is_started_again_and_nobody_is_parted(tmp_path, trainer):
    told, errors = trainer('[{"kind": "ends", "params": {"how": "exits", "once": true}}]')
    assert told["counts"] == told["ends"] == ["100", "100", "0", "0", "None"]
    assert "couriers.died" in errors
    assert "couriers.parted" not in errors


@pytest.mark.long
def test_evsys_bus_sync_delivers_to_the_others_as_well(tmp_path, program):
    (tmp_path / "plugin.py").write_text(textwrap.dedent(PLUGIN))
    recorded = program("""
        from plugin import Tick
        from evsys_bus import EventBus, build_callbacks
        from evsys_bus.delivery.subscriptions import register

        built = build_callbacks([{"kind": "counts"}, {"kind": "ends", "params": {"how": "exits_well"}}])
        register("journal", [each.evsys_subscription for each in built])
        with EventBus([], journal="journal") as bus:
            for number in range(100):
                bus.publish(Tick(number))
    """)
    assert recorded.wait(10) == 0
    command = [EVSYS_BUS, "sync", tmp_path / "journal"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 4, done.stderr
    assert counted(tmp_path) == [*range(1, 101)]
    pending = {each.name: each.pending for each in read_progress(tmp_path / "journal")}
    assert (pending["counts"], pending["ends"] > 0) == (0, True)
