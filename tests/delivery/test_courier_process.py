"""The courier process, with real programs: it delivers beside them, outlives them, and is kept alive by them."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evsys_bus import Envelope, LoopState, StepEnd, TrainEnd, TrainingBatch, TrainStart, build_callbacks
from evsys_bus.codec import encode
from evsys_bus.delivery.subscription import AdapterRef, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.delivery.supervisor import Supervisor, courier_config
from evsys_bus.journal import CursorStore, JournalWriter
from support.couriers import courier_processes
from support.waiting import wait_until

PLUGIN = '''
    """Sinks that tell what they were given, in one line per event."""
    import asyncio, os, time
    from evsys_bus import Sink, register_sink
    from evsys_bus.errors import RetryLaterError

    @register_sink("seqs")
    class Seqs(Sink):
        def __init__(self, path):
            self.path = path

        async def write(self, batch):
            lines = "".join(f"{os.getpid()} {each.stream} {each.seq}\\n" for each in batch)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, lines.encode())
            os.close(file)

    @register_sink("hangs")
    class Hangs(Sink):
        def __init__(self, path):
            self.path = path

        async def write(self, batch):
            open(self.path, "w").close()
            time.sleep(1000)

    @register_sink("away")
    class Away(Sink):
        def __init__(self, path):
            self.path = path

        async def write(self, batch):
            open(self.path, "w").close()
            raise RetryLaterError("it is away")
'''

TRAINER = '''
    """What a program does that has a bus: a journal, and the process that delivers it."""
    import os, sys
    from evsys_bus import Envelope, LoopState, StepEnd, TrainingBatch
    from evsys_bus.codec import encode
    from evsys_bus.delivery.subscription import AdapterRef, Subscription
    from evsys_bus.delivery.subscriptions import register
    from evsys_bus.delivery.supervisor import Supervisor, courier_config
    from evsys_bus.journal import JournalWriter

    class Trainer:
        def __init__(self, *kinds, grace_seconds=10.0):
            self.writer = JournalWriter("journal").open()
            followed = [
                Subscription(kind, AdapterRef(kind, {name: kind}, ("plugin",)))
                for kind in kinds or ("seqs",)
                for name in ["out_path" if kind == "csv_metrics" else "path"]
            ]
            register("journal", followed)
            config = courier_config("journal", followed, grace_seconds=grace_seconds)
            self.couriers = Supervisor(config, restart_seconds=0.02)
            self.couriers.start()

        def publish(self, count):
            for _ in range(count):
                step = self.writer.next_sequence - 1
                state = LoopState(step=step, num_steps=9999, output_dir="run")
                self.append(StepEnd(state, step, TrainingBatch(), {"loss": 1.0}))

        def append(self, event):
            self.writer.append(encode(Envelope(self.writer.stream, self.writer.next_sequence, 0.0, event, "run")))

        def close(self, timeout_seconds=10.0):
            self.writer.close()
            self.couriers.finish()
            return self.couriers.wait(timeout_seconds)

    def say(*words):
        print(*words, flush=True)
'''


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the programs find their modules; courier processes that are left at the end of the test are killed."""
    for name, source in {"plugin": PLUGIN, "trainer": TRAINER}.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    yield tmp_path
    for pid in courier_processes(tmp_path / "journal"):
        os.kill(pid, signal.SIGKILL)


Program = subprocess.Popen[str]


@pytest.fixture
def program(folder: Path) -> Iterator[Callable[[str], Program]]:
    """Start a program in the folder; what still runs at the end of the test is killed."""
    started: list[Program] = []

    def start(source: str) -> Program:
        script = folder / f"program_{len(started)}.py"
        script.write_text(textwrap.dedent(source))
        pipe = subprocess.PIPE
        command = [sys.executable, str(script)]
        started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=folder))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def is_gone(pid: int) -> bool:
    """Zombies count as gone: they wait for whoever adopted them."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not shown.strip() or "Z" in shown


def delivered(folder: Path) -> Counter[int]:
    """Sequence -> how often it was delivered."""
    try:
        return Counter(int(line.split()[2]) for line in (folder / "seqs").read_text().splitlines())
    except FileNotFoundError:
        return Counter()


def once(count: int) -> Counter[int]:
    return Counter(range(1, count + 1))


def process_log(folder: Path) -> str:
    return (folder / "journal" / "couriers" / "process.log").read_text()


def test_it_delivers_beside_the_program_and_ends_with_it(folder, program):
    trainer = program("""
        from trainer import *
        trainer = Trainer()
        trainer.publish(100)
        say(trainer.couriers.pid)
        input()
        trainer.publish(100)
        say(trainer.close(), trainer.couriers.is_alive)
    """)
    pid = int(trainer.stdout.readline())
    wait_until(lambda: delivered(folder) == once(100))
    assert courier_processes(folder / "journal") == [pid]
    assert trainer.communicate("go\n", timeout=15)[0].split() == ["True", "False"]
    assert delivered(folder) == once(200)
    assert is_gone(pid)
    assert "courier.failed" not in process_log(folder)


def test_what_it_is_told_is_for_the_owner_alone_and_not_on_its_command_line(folder, program):
    trainer = program("from trainer import *; trainer = Trainer(); say(trainer.couriers.pid); input()")
    pid = trainer.stdout.readline().strip()
    wait_until((folder / "journal" / "cursors" / "seqs.json").exists)
    shown = subprocess.run(["ps", "-o", "args=", "-ww", "-p", pid], capture_output=True, text=True, check=True).stdout
    assert str(folder / "journal") in shown
    assert "seqs" not in shown
    assert stat.S_IMODE((folder / "journal" / "couriers").stat().st_mode) == 0o700
    for each in (folder / "journal" / "couriers").iterdir():
        assert stat.S_IMODE(each.stat().st_mode) == 0o600, each


def test_it_finishes_when_the_program_is_killed_and_leaves_nothing_behind(folder, program):
    trainer = program("""
        from trainer import *
        trainer = Trainer()
        say(trainer.couriers.pid)
        trainer.publish(5000)
        os.kill(os.getpid(), 9)
    """)
    pid = int(trainer.stdout.readline())
    trainer.wait(10)
    wait_until(lambda: is_gone(pid))
    assert delivered(folder) == once(5000)
    assert courier_processes(folder / "journal") == []


def test_it_is_started_again_when_it_is_killed_and_goes_on(folder, program):
    trainer = program("""
        from trainer import *
        trainer = Trainer()
        trainer.publish(100)
        say(trainer.couriers.pid)
        input()
        trainer.publish(100)
        say("published")
        input()
        say(trainer.close())
    """)
    pid = int(trainer.stdout.readline())
    wait_until(lambda: delivered(folder) == once(100))
    os.kill(pid, signal.SIGKILL)
    trainer.stdin.write("go\n")
    trainer.stdin.flush()
    assert trainer.stdout.readline().strip() == "published"
    wait_until(lambda: len(delivered(folder)) == 200)
    assert pid not in courier_processes(folder / "journal")
    out, errors = trainer.communicate("go\n", timeout=15)
    assert out.strip() == "True"
    assert set(delivered(folder)) == set(once(200))
    assert "couriers.died" in errors
    assert "exit_code=-9" in errors
    assert "process.log" in errors


CSV = """
    from trainer import *
    from evsys_bus import TrainStart
    trainer = Trainer("csv_metrics")
    trainer.append(TrainStart(LoopState(step=0, num_steps=9999, output_dir="run")))
    for _ in range(4):
        trainer.publish(500)
        input()
    say(trainer.close())
"""


@pytest.mark.long
def test_a_table_has_every_row_once_however_often_it_is_killed(folder, program):
    trainer = program(CSV)
    table = folder / "csv_metrics"
    for rows in range(1, 2001, 500):
        wait_until(lambda rows=rows: table.exists() and table.read_bytes().count(b"\n") > rows)
        [pid] = courier_processes(folder / "journal")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: courier_processes(folder / "journal") not in ([], [pid]))
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
    assert trainer.stdout.readline().strip() == "True"
    lines = table.read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == [*range(1, 2001)]


def test_a_program_that_ends_just_when_it_was_killed_still_gets_all_delivered(folder, program):
    trainer = program("""
        from trainer import *
        trainer = Trainer()
        trainer.publish(100)
        os.kill(trainer.couriers.pid, 9)
        trainer.publish(100)
        say(trainer.close())
    """)
    assert trainer.communicate(timeout=15)[0].strip() == "True"
    assert set(delivered(folder)) == set(once(200))


def test_SIGTERM_lets_it_finish_and_the_next_one_takes_over(folder, program):
    trainer = program("""
        from trainer import *
        trainer = Trainer()
        trainer.publish(100)
        say(trainer.couriers.pid)
        input()
        trainer.publish(100)
        say(trainer.close())
    """)
    pid = int(trainer.stdout.readline())
    wait_until(lambda: delivered(folder) == once(100))
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: is_gone(pid))
    out, errors = trainer.communicate("go\n", timeout=15)
    assert out.strip() == "True"
    assert delivered(folder) == once(200)
    assert "exit_code=80" in errors


def test_ctrl_c_ends_the_program_and_not_the_deliveries(folder):
    source = """
        import signal
        from trainer import *
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
        trainer = Trainer()
        trainer.publish(100)
        say(trainer.couriers.pid)
        try:
            input()
        except KeyboardInterrupt:
            trainer.publish(100)
            say(trainer.close())
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    with trainer:
        pid = int(trainer.stdout.readline())
        wait_until(lambda: delivered(folder) == once(100))
        assert os.getsid(pid) == pid  # no terminal is its own
        os.kill(pid, signal.SIGINT)  # whoever sends it
        os.killpg(trainer.pid, signal.SIGINT)
        assert trainer.stdout.readline().strip() == "True"
        assert "couriers.died" not in trainer.stderr.read()
    assert delivered(folder) == once(200)


FORKS = """
    from trainer import *
    import time
    trainer = Trainer()
    trainer.publish(100)
    while not os.path.exists("seqs"):
        time.sleep(0.01)
    child = os.fork()
    if not child:
        trainer.couriers.finish()  # it is not the child's to end
        assert trainer.couriers.wait(0.0)
        assert not trainer.couriers.is_alive
        open("asked", "w").close()
        time.sleep(60)
        os._exit(0)
    while not os.path.exists("asked"):
        time.sleep(0.01)
    time.sleep(0.4)  # what the process would have taken to end
    say(trainer.couriers.pid, child)
    input()
    trainer.publish(100)
    say("ends")
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "say(trainer.close()); input()"])
def test_a_child_that_the_program_forked_does_not_keep_it(folder, program, end):
    trainer = program(FORKS + f"    {end}\n")
    pid, child = map(int, trainer.stdout.readline().split())
    try:
        wait_until(lambda: delivered(folder) == once(100))
        assert not is_gone(pid)
        trainer.stdin.write("go\n")
        trainer.stdin.flush()
        assert trainer.stdout.readline().strip() == "ends"
        wait_until(lambda: is_gone(pid))
        assert delivered(folder) == once(200)
        assert not is_gone(child)
    finally:
        os.kill(child, signal.SIGKILL)
    trainer.kill()
    assert "couriers.died" not in trainer.stderr.read()


@pytest.mark.parametrize("kind", [pytest.param("hangs", marks=pytest.mark.long), "away"])
def test_an_adapter_that_never_delivers_holds_it_for_the_linger_and_no_longer(folder, program, kind):
    trainer = program(f"""
        from trainer import *
        trainer = Trainer("seqs", {kind!r}, grace_seconds=0.5)
        trainer.publish(10)
        say(trainer.couriers.pid)
        input()
    """)
    pid = int(trainer.stdout.readline())
    wait_until(lambda: (folder / kind).exists() and delivered(folder) == once(10))
    trainer.kill()
    began = time.monotonic()
    wait_until(lambda: is_gone(pid))
    assert 0.4 < time.monotonic() - began < 5
    assert f"couriers.left adapters={kind} fix=evsys-bus sync" in process_log(folder)
    assert CursorStore(str(folder / "journal")).load(kind).streams == {}


def test_closing_returns_at_its_deadline_and_the_process_goes_on_for_the_linger(folder, program):
    trainer = program("""
        from trainer import *
        trainer = Trainer("away", grace_seconds=1.5)
        trainer.publish(10)
        say(trainer.couriers.pid)
        say(trainer.close(0.2), trainer.couriers.is_alive)
    """)
    out, errors = trainer.communicate(timeout=15)
    pid, *said = out.split()
    assert (said, errors) == (["False", "True"], "")
    assert not is_gone(int(pid))
    wait_until(lambda: is_gone(int(pid)))


@pytest.mark.long
def test_one_that_lingers_and_the_one_of_the_next_run_share_the_work(folder, program):
    source = "from trainer import *; trainer = Trainer('seqs', 'away', grace_seconds={}); trainer.publish(100); "
    first = program(source.format(2.0) + "say(trainer.couriers.pid); input()")
    pid = int(first.stdout.readline())
    wait_until(lambda: (folder / "away").exists() and delivered(folder) == once(100))
    first.kill()
    second = program(source.format(0.1) + "say(trainer.couriers.pid); input(); say(trainer.close())")
    second.stdout.readline()
    wait_until(lambda: delivered(folder).total() == 200)
    wait_until(lambda: is_gone(pid))
    assert second.communicate("go\n", timeout=15)[0].strip() == "True"
    assert delivered(folder) == once(200)  # the second run continued the stream of the first


WITHOUT_GUARD = "from trainer import *; trainer = Trainer(); trainer.publish(100); say(trainer.close())"


@pytest.mark.parametrize(
    ("command", "given"),
    [
        (["-"], WITHOUT_GUARD),
        (["-c", WITHOUT_GUARD], ""),
        (["-c", f"exec(compile({WITHOUT_GUARD!r}, '<cell 1>', 'exec'), {{'__name__': '__main__'}})"], ""),
    ],
)
def test_it_needs_no_main_guard_and_no_file(folder, command, given):
    done = subprocess.run(
        [sys.executable, *command], input=given, capture_output=True, text=True, cwd=folder, timeout=15, check=False
    )
    assert done.stdout.strip() == "True", done.stderr
    assert delivered(folder) == once(100)


def test_from_a_spec_to_a_file_beside_any_program_pytest_included(tmp_path):
    params = {"out_path": str(tmp_path / "metrics.csv")}
    [callback] = build_callbacks([{"kind": "csv_metrics", "placement": "follow", "params": params}])
    register(str(tmp_path / "journal"), [callback.evsys_subscription])
    couriers = Supervisor(courier_config(str(tmp_path / "journal"), [callback.evsys_subscription]))
    couriers.start()
    writer = JournalWriter(tmp_path / "journal").open()
    state = LoopState(step=0, num_steps=2, output_dir="run")
    for event in (TrainStart(state), StepEnd(state, 0, TrainingBatch(), {"loss": 0.5}), TrainEnd(state, None)):
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 0.0, event, "run")))
    writer.close()
    couriers.finish()
    assert couriers.wait(10)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n0,0.5\n"


def test_modules_are_found_where_the_program_found_them(folder, program):
    (folder / "elsewhere").mkdir()
    for each in ("plugin", "trainer"):
        (folder / f"{each}.py").rename(folder / "elsewhere" / f"{each}.py")
    trainer = program("import sys; sys.path.append('elsewhere')\n" + WITHOUT_GUARD)
    out, errors = trainer.communicate(timeout=15)
    assert out.strip() == "True", errors
    assert delivered(folder) == once(100)


def test_a_program_whose_folder_was_removed_has_one_all_the_same(folder, program):
    trainer = program("""
        from trainer import *
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        journal, seqs = (os.path.join(sys.path[0], each) for each in ("journal", "seqs"))
        seqs = Subscription("seqs", AdapterRef("seqs", {"path": seqs}, ("plugin",)))
        register(journal, [seqs])
        couriers = Supervisor(courier_config(journal, [seqs]))
        JournalWriter(journal).open().append(encode(Envelope("r", 1, 0.0, StepEnd(None, 0, TrainingBatch(), {}))))
        couriers.start()
        couriers.finish()
        say(couriers.wait(10))
    """)
    out, errors = trainer.communicate(timeout=15)
    assert out.strip() == "True", errors
    assert delivered(folder) == once(1)


@pytest.mark.parametrize("wrong", [{"main": "evsys_no_such_module:main"}, {"python": "/nowhere/python"}])
def test_one_that_dies_again_and_again_is_given_up_and_said_so(tmp_path, caplog, wrong):
    couriers = Supervisor(courier_config(str(tmp_path), []), restart_seconds=0.001, **wrong)
    couriers.start()
    assert couriers.wait(15)
    assert couriers.has_given_up
    assert [each.getMessage().split()[0] for each in caplog.records][-1] == "couriers.given_up"
    assert caplog.messages.count("couriers.given_up") <= 1
    assert "evsys-bus sync" in caplog.text
    couriers.finish()
    assert couriers.wait(0.0)


def test_one_that_cannot_be_told_what_to_do_is_given_up_and_said_so(tmp_path, caplog):
    couriers = Supervisor(courier_config(str(tmp_path), [Subscription("prints", AdapterRef("prints", {"to": print}))]))
    couriers.start()
    assert couriers.has_given_up
    assert "couriers.not_started" in caplog.text
    couriers.finish()
    assert couriers.wait(0.0)
    assert not couriers.is_alive


def test_the_log_keeps_a_bound(tmp_path):
    config = courier_config(str(tmp_path), [])
    couriers = Supervisor(config, main="evsys_no_such_module:main", restart_seconds=0.001)
    Path(config.log_path).parent.mkdir()
    Path(config.log_path).write_text("x" * (5 << 20))
    couriers.start()
    assert couriers.wait(15)
    assert Path(config.log_path).stat().st_size < 100_000
