"""``sync``, ``follow``, ``replay`` and what ``status`` and ``run`` say of deliveries, in processes of their own.

``EVSYS_GOLDEN=write`` writes the golden files anew.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evsys_bus import Envelope, EventBus, LogContext, LoopState, StepEnd, TrainingBatch, follow
from evsys_bus.codec import encode
from evsys_bus.delivery.progress import read_progress
from evsys_bus.delivery.status_files import write_status
from evsys_bus.delivery.subscription import AdapterRef, Subscription
from evsys_bus.delivery.subscriptions import register
from evsys_bus.journal import JournalWriter, OsClock, OsDisk, layout
from evsys_bus.journal.stream_lock import read_owner, write_owner
from evsys_bus.tasks import DeliveryStatus
from evsys_bus.testing import RecordingSink
from support import GOLDEN
from support.files import parse_json_lines
from support.waiting import wait_until

CLI = "from evsys_bus.cli import main; main()"

DESTINATION = """\
import asyncio, os, time
from evsys_bus import Callback, Sink, register_callback, register_sink
from evsys_bus.errors import ParkedError, RejectedError, RetryLaterError

@register_sink("lines")
class Lines(Sink):
    max_batch_events = 5
    def __init__(self, path, mode="ok"):
        self.path, self.mode = path, mode
        apart = os.getsid(0) == os.getpid()  # in a process that delivers, and not in the program that describes it
        if mode == "wrong" or (mode == "broken" and apart):
            raise ValueError("no such bucket")
        if mode == "late" and apart:
            open("constructing", "w").close()
            while not os.path.exists("go"):
                time.sleep(0.01)
        self.taken = 0
    async def open(self):
        if self.mode == "owes" and os.path.exists("bill"):
            self.bill(int(open("bill").read()))
    async def settle_owed(self, deadline):
        self.bill(self.taken)
    def bill(self, count):
        self.taken = count
        with open("bill", "w") as file:
            file.write(str(count))
        if os.path.exists("paid"):
            self.report_owed(0)
        else:
            self.report_owed(count, "no key for board.example", "board login")
    async def write(self, batch):
        match self.mode:
            case "owes":
                self.bill(self.taken + len(batch))
            case "key" if not os.path.exists("key"):
                raise ParkedError("401 no key", fix="touch key")
            case "dies" if batch[0].seq > 1:
                os._exit(7)
            case "parked":
                raise ParkedError("401 wrong key", fix="export WANDB_API_KEY=...")
            case "down":
                raise RetryLaterError("503 busy")
            case "picky" if batch[0].seq == 1:
                raise RejectedError({0: "422 no such metric"})
            case "halves":
                batch = batch[: max(1, len(batch) // 2)]
            case "slow":
                await asyncio.sleep(0.05)
            case "blocks":
                open("blocked", "w").close()
                time.sleep(60)
        with open(self.path, "a") as file:
            file.writelines(f"{each.seq}\\n" for each in batch)
        return len(batch)

@register_callback("faulty")
class Faulty(Callback):
    def on_step_end(self, state, step_idx, batch, metrics):
        raise KeyError("missing")
"""


def step(folder, number, run="low"):
    state = LoopState(step=number, num_steps=100, output_dir=folder / run, ctx=LogContext(folder, run_key=run))
    return StepEnd(state, number, TrainingBatch(), {"loss": 1 / (number + 1)})


def journal(folder, events=12, run="low"):
    """A closed journal of steps."""
    with EventBus([], journal=folder / "journal") as bus:
        for number in range(events):
            bus.publish(step(folder, number, run))
    return folder / "journal"


def followed(folder, name="wandb", **params):
    """What a program that runs in ``folder`` writes down when it follows a sink that writes ``lines.txt`` there."""
    (folder / "destination.py").write_text(DESTINATION)
    recipe = AdapterRef("lines", {"path": "lines.txt", **params}, ("destination:Lines",))
    here = Path.cwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        register(str(folder / "journal"), [Subscription(name, recipe)])
    finally:
        sys.path.remove(str(folder))
        os.chdir(here)


def lines(path):
    return [int(line) for line in path.read_text().splitlines()]


@pytest.fixture
def command(tmp_path):
    """The command line as one starts it; ``start`` leaves it running."""
    (tmp_path / "destination.py").write_text(DESTINATION)
    started = []

    def start(*arguments, cwd=tmp_path):
        process = subprocess.Popen(
            [sys.executable, "-c", CLI, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
            | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])},
        )
        started.append(process)
        return process

    def run(*arguments, cwd=tmp_path):
        process = start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=20)
        return process.returncode, out, err

    run.start = start
    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def same_as_golden(name, text, tmp_path):
    text = text.replace(str(tmp_path), "<here>")
    text = re.sub(r"time=\S+ ", "", text)
    text = re.sub(r"process \d+ on \S+, since \S+,", "process <pid> on <host>, since <time>,", text)
    text = re.sub(r"\d+\.\ds\b", "<seconds>s", text)
    text = re.sub(r"r0-\d{6}-\d{8}T\d{6}-[0-9a-f]{8}", "<stream>", text)
    text = re.sub(r"\d+@\S+ since \S+", "<pid>@<host> since <time>", text)
    text = re.sub(r"\d+ s ago", "<age>", text)
    text = re.sub(r"\b[\d,.]+ kB\b", "<size>", text)
    text = re.sub(r" {3,}", "   ", text)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("EVSYS_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


# -- sync -------------------------------------------------------------------------------------------------------------


def test_sync_delivers_each_pending_event_once_to_where_it_was_meant_from_wherever_it_is_called(command, tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir()
    other.mkdir()
    journal(home)
    followed(home)
    code, out, err = command("sync", "../home", cwd=other)
    assert (code, out.split()[:9]) == (0, "wandb 12 events sent 12 dead 0 pending 0".split())
    assert "event=delivery adapter=wandb state=ended done=12 pending=0" in err
    assert lines(home / "lines.txt") == [*range(1, 13)]
    assert list(other.iterdir()) == []
    assert command("sync", home) == (0, "", "nothing is pending\n")
    assert lines(home / "lines.txt") == [*range(1, 13)]


@pytest.mark.parametrize("way", ["of another user", "writable by a group", "writable by all", "a link to either"])
def test_sync_runs_nothing_that_a_file_of_others_names_unless_it_is_trusted(command, tmp_path, way):
    journal(tmp_path)
    followed(tmp_path)
    spec = Path(layout.courier_path(str(tmp_path / "journal"), "wandb", "spec.json"))
    if way == "a link to either":
        spec.rename(tmp_path / "elsewhere.json")
        spec.symlink_to(tmp_path / "elsewhere.json")
    if way == "of another user" and os.geteuid() == 0:
        os.chown(spec, 65534, 65534)
    else:
        spec.chmod(0o664 if way == "writable by a group" else 0o666)
    (tmp_path / "destination.py").write_text("raise SystemExit('imported')\n" + DESTINATION)
    code, out, err = command("sync", tmp_path)
    assert (code, out) == (3, "")
    assert "EB906" in err
    assert f"evsys-bus sync {tmp_path / 'journal'} --adapter wandb --trust" in err.replace("\n", " ")
    assert "imported" not in err
    (tmp_path / "destination.py").write_text(DESTINATION)
    code, out, err = command("sync", tmp_path, "--trust")
    assert (code, out.split()[:9]) == (0, "wandb 12 events sent 12 dead 0 pending 0".split())


def test_sync_tells_in_json_what_became_of_each_adapter(command, tmp_path):
    journal(tmp_path)
    followed(tmp_path, "a")
    followed(tmp_path, "b", mode="picky")
    code, out, err = command("sync", tmp_path, "--json", "--progress", "json")
    a, b = map(json.loads, out.splitlines())
    assert (code, a["type"], a["adapter"], a["sent"], a["pending"]) == (0, "delivery", "a", 12, 0)
    assert (b["sent"], b["dead"], b["dead_letters"]) == (11, 1, str(tmp_path / "journal/couriers/b.dead.jsonl"))
    assert "b: 1 rejected; events and reasons are in " in err
    assert {json.loads(line)["event"] for line in err.splitlines()[:-1]} == {"delivery"}


def test_sync_exits_4_where_a_destination_refuses_and_says_what_to_mend(command, tmp_path):
    journal(tmp_path)
    followed(tmp_path, mode="parked")
    began = time.monotonic()
    code, out, err = command("sync", tmp_path, "--progress", "off")
    assert (code, out.split()[:9]) == (4, "wandb 12 events sent 0 dead 0 pending 12".split())
    same_as_golden("error_sync_parked", err, tmp_path)
    assert time.monotonic() - began < 10  # it is tried once a minute, and nobody waits for that
    [account] = read_progress(tmp_path / "journal")
    assert (account.pending, account.busy) == (12, False)


@pytest.mark.parametrize("mode", ["down", "blocks"])
def test_sync_gives_up_a_destination_that_takes_nothing_for_so_long_and_delivers_to_the_others(command, tmp_path, mode):
    journal(tmp_path)
    followed(tmp_path, "away", mode=mode)
    followed(tmp_path, "here")
    code, out, err = command("sync", tmp_path, "--timeout", "1", "--progress", "off")
    assert code == 4
    assert [line.split()[:9:2] for line in out.splitlines()] == [
        ["away", "events", "0", "0", "12"],
        ["here", "events", "12", "0", "0"],
    ]
    assert "error[EB901]: 12 of 12 events for away stay pending" in err
    assert lines(tmp_path / "lines.txt") == [*range(1, 13)]


@pytest.mark.long
def test_sync_ends_though_a_live_program_records_more_than_the_destination_takes(command, tmp_path):
    directory = journal(tmp_path)
    followed(tmp_path, mode="slow")  # takes 100 events a second
    process = command.start("sync", tmp_path, "--timeout", "1", "--progress", "off")
    deadline = time.monotonic() + 12
    with contextlib.closing(JournalWriter(directory).open()) as writer:  # a bus would deregister the adapter
        while process.poll() is None and time.monotonic() < deadline:
            writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1e9, step(tmp_path, 0), "low")))
            time.sleep(0.002)
        assert process.poll() == 0, process.communicate()
        [account] = read_progress(directory)
    _, err = process.communicate()
    assert account.delivered >= 12
    assert account.pending > 0
    assert "wandb: a program records more, which goes on; all that was there is delivered" in err
    assert lines(tmp_path / "lines.txt")[:12] == [*range(1, 13)]


@pytest.mark.long
def test_sync_leaves_an_adapter_alone_that_another_process_delivers_to_and_exits_3(command, tmp_path):
    directory = journal(tmp_path)
    followed(tmp_path, "busy")
    followed(tmp_path, "free")
    disk = OsDisk()
    lock = disk.lock(layout.courier_path(str(directory), "busy", "lock"))
    disk.write(lock, b'{"pid": 7, "host": "node3", "since": "2026-01-31T12:00:00Z"}')
    try:
        code, out, err = command("sync", tmp_path, "--progress", "off", "--timeout", "4")
    finally:
        disk.close(lock)
    assert (code, [line.split()[0] for line in out.splitlines()]) == (3, ["free"])
    same_as_golden("error_sync_busy", err, tmp_path)
    assert {each.name: each.pending for each in read_progress(directory)} == {"busy": 12, "free": 0}


def test_sync_delivers_what_another_process_has_left_that_ended_while_sync_delivered_to_others(command, tmp_path):
    directory = journal(tmp_path)
    followed(tmp_path, "busy", path="busy.txt")
    followed(tmp_path, "free", mode="late")
    disk = OsDisk()
    lock = disk.lock(layout.courier_path(str(directory), "busy", "lock"))
    try:
        process = command.start("sync", tmp_path, "--progress", "off")
        while not (tmp_path / "constructing").exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        disk.close(lock)
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert {line.split()[0] for line in out.splitlines()} == {"busy", "free"}
    assert {each.name: each.pending for each in read_progress(directory)} == {"busy": 0, "free": 0}


def test_sync_says_of_an_adapter_that_cannot_be_built_why_and_exits_3(command, tmp_path):
    journal(tmp_path)
    followed(tmp_path, mode="broken")
    code, _, err = command("sync", tmp_path, "--progress", "off")
    assert (code, err.startswith("error[EB106]: 12 of 12 events for wandb stay pending\nwhy: ")) == (3, True), err


def test_sync_says_of_a_live_object_that_only_its_program_has_it_and_exits_3(command, tmp_path):
    directory = journal(tmp_path)
    register(str(directory), [follow(RecordingSink(), "mine")])
    code, out, err = command("sync", tmp_path)
    assert (code, out) == (3, "")
    same_as_golden("error_sync_live_object", err, tmp_path)


@pytest.mark.long
def test_sync_without_a_run_takes_the_newest_with_something_pending_and_with_all_every_one(command, tmp_path):
    for age, name in enumerate(("new", "middle", "old")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        directory = journal(folder)
        for segment in directory.glob("*/*.seg"):
            os.utime(segment, (2e9 - age, 2e9 - age))
        if name != "new":
            followed(folder)
    code, out, err = command("sync", "--dry-run")
    assert (code, out, err) == (0, "wandb   12 events to send\n", f"{tmp_path}/runs/middle/journal\n")
    assert [each.pending for each in read_progress(tmp_path / "runs/middle/journal")] == [12]
    assert command("sync", "--all", "--progress", "off")[0] == 0
    assert [lines(tmp_path / "runs" / name / "lines.txt") for name in ("middle", "old")] == [[*range(1, 13)]] * 2
    assert command("sync", "--all") == (0, "", "nothing is pending\n")


def test_sync_of_an_adapter_that_is_not_there_is_told_with_the_nearest(command, tmp_path):
    journal(tmp_path)
    followed(tmp_path)
    code, _, err = command("sync", tmp_path, "--adapter", "wanbd")
    assert (code, 'did you mean "wandb"?' in err) == (2, True)


def test_sync_that_is_interrupted_ends_at_its_cursors_and_says_how_far_it_got(command, tmp_path):
    directory = journal(tmp_path, 200)
    followed(tmp_path, mode="slow")
    process = command.start("sync", tmp_path, "--progress", "off")
    wait_until((tmp_path / "lines.txt").exists, message="the first batch")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    sent, left = int(out.split()[4]), int(out.split()[8])
    assert (process.returncode, sent + left, left > 0, err[:11]) == (130, 200, True, "interrupted")
    assert [(each.delivered, each.pending, each.busy) for each in read_progress(directory)] == [(sent, left, False)]
    assert lines(tmp_path / "lines.txt") == [*range(1, sent + 1)]


@pytest.mark.parametrize("paid", [pytest.param(False, marks=pytest.mark.long), True])
def test_sync_has_what_is_owed_confirmed_or_says_what_to_do_before_that(command, tmp_path, paid):
    journal(tmp_path)
    followed(tmp_path, mode="owes")
    assert command("sync", tmp_path)[0] == 4
    owed = [(each.delivered, each.pending, each.owed) for each in read_progress(tmp_path / "journal")]
    assert owed == [(12, 0, 12)]
    if paid:
        (tmp_path / "paid").touch()
    dry = command("sync", tmp_path, "--dry-run")
    assert dry[:2] == (0, "wandb   0 events to send   12 to be confirmed\n")
    code, out, err = command("sync", tmp_path, "--progress", "off")
    row = json.loads(command("sync", tmp_path, "--json")[1] or "{}")
    assert lines(tmp_path / "lines.txt") == [*range(1, 13)], "no event again"
    assert err.startswith("wandb: 12 events delivered, but not confirmed by the destination: no key for board.example")
    if paid:
        assert (code, out.split()[5:9], out.split()[11:13], row) == (0, "dead 0 pending 0".split(), ["owed", "0"], {})
    else:
        assert (code, row["owed"], row["owed_fix"], row["pending"]) == (4, 12, "board login", 0)
        again = f"evsys-bus sync {tmp_path}/journal --adapter wandb"
        assert err.endswith(
            "error[EB902]: 12 events for wandb stay owed: delivered, but not confirmed by the destination\n"
            f"why: no key for board.example\nfix: board login   then: {again}\n"
        )


def test_sync_says_at_once_what_kept_the_events_from_being_delivered_before(command, tmp_path):
    directory = journal(tmp_path)
    followed(tmp_path, mode="blocks")
    known = DeliveryStatus(state="parked", pid=1, error="ParkedError: 402 over quota", fix="buy more")
    write_status(OsDisk(), str(directory), "wandb", known)
    process = command.start("sync", tmp_path, "--timeout", "60", "--progress", "off")
    assert process.stderr.readline() == "wandb: ParkedError: 402 over quota   fix: buy more\n"
    assert process.poll() is None
    wait_until((tmp_path / "blocked").exists, message="it delivers")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130


@pytest.mark.long
def test_sync_joins_couriers_that_began_a_moment_after_it_and_says_at_once_what_keeps_them(command, tmp_path):
    """As those of a program that died in its first second: they were still importing."""
    directory = journal(tmp_path)
    followed(tmp_path, mode="late")
    process = command.start("sync", tmp_path, "--timeout", "60")
    wait_until((tmp_path / "constructing").exists, message="its own courier is on its way")
    disk = OsDisk()
    lock = disk.lock(layout.courier_path(str(directory), "wandb", "lock"))
    write_owner(disk, OsClock(), lock)
    known = DeliveryStatus(state="parked", pid=os.getpid(), error="ParkedError: 402 over quota", fix="buy more")
    write_status(disk, str(directory), "wandb", known)
    (tmp_path / "go").touch()
    said = process.stderr.readline()
    disk.close(lock)
    assert 'state=parked done=0 pending=12 error="ParkedError: 402 over quota" fix="buy more"' in said
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out.split()[:9]) == (0, "wandb 12 events sent 12 dead 0 pending 0".split()), err
    assert lines(tmp_path / "lines.txt") == [*range(1, 13)]


def test_sync_says_how_its_process_ended_where_an_adapter_ends_it(command, tmp_path):
    journal(tmp_path)
    followed(tmp_path, mode="dies")
    code, _, err = command("sync", tmp_path, "--progress", "off")
    assert (code, "why: its process has ended by exit code 7\n" in err) == (4, True), err
    assert "fix: read " in err


PROGRAM = """\
import sys
from pathlib import Path
import destination
from evsys_bus import EventBus, LogContext, LoopState, StepEnd, TrainingBatch, build_callbacks

folder, mode, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
spec = {"kind": "lines", "name": "wandb", "params": {"path": str(folder / "lines.txt"), "mode": mode}}
with EventBus(build_callbacks([spec]), journal=folder / "journal", drain_timeout=0.2) as bus:
    for number in range(count):
        ctx = LogContext(folder, run_key="low")
        state = LoopState(step=number, num_steps=count, output_dir=folder / "low", ctx=ctx)
        bus.publish(StepEnd(state, number, TrainingBatch(), {"loss": 1.0}))
    print("published", flush=True)
    if "stay" in sys.argv:
        sys.stdin.readline()
"""


@pytest.fixture
def trainer(tmp_path):
    """A program that publishes steps, its couriers in a process of their own; it has left them, unless it stays."""
    (tmp_path / "destination.py").write_text(DESTINATION)
    started = []

    def start(mode, count, *stay):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), mode, str(count), *stay],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        started.append(process)
        assert process.stdout.readline() == "published\n"
        if not stay:
            process.communicate(timeout=20)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    for each in (tmp_path / "journal/couriers").glob("*.lock"):
        holder = read_owner(OsDisk(), str(each))
        if OsDisk().is_locked(str(each)) and holder.pid != os.getpid():
            os.kill(holder.pid, signal.SIGKILL)


def busy_accounts(tmp_path):
    return [each.name for each in read_progress(tmp_path / "journal") if each.busy]


@pytest.mark.long
def test_sync_right_after_the_program_joins_the_couriers_that_still_deliver(command, trainer, tmp_path):
    trainer("slow", 200)
    wait_until(lambda: busy_accounts(tmp_path) == ["wandb"], message="its couriers have begun")
    code, out, err = command("sync", tmp_path)
    assert code == 0, err
    assert (out.split()[0], out.split()[5:9]) == ("wandb", "dead 0 pending 0".split())
    assert int(out.split()[4]) > 0
    assert lines(tmp_path / "lines.txt") == [*range(1, 201)]
    assert "taking over" not in err


def test_sync_takes_over_from_couriers_of_a_dead_program_that_wait_for_a_person(command, trainer, tmp_path):
    trainer("key", 20)
    wait_until(
        lambda: [each.state for each in read_progress(tmp_path / "journal")] == ["parked"], message="it is parked"
    )
    (tmp_path / "key").touch()
    began = time.monotonic()
    code, _, err = command("sync", tmp_path)
    assert code == 0, err
    assert time.monotonic() - began < 15, "it does not wait until they end by themselves"
    assert err.startswith("wandb: ParkedError: 401 no key")
    assert "touch key" in err.splitlines()[0]
    assert "of a program that has ended is stuck; taking over from it" in err
    assert lines(tmp_path / "lines.txt") == [*range(1, 21)]
    assert busy_accounts(tmp_path) == []


@pytest.mark.long
def test_sync_takes_over_from_a_courier_process_of_a_dead_program_that_ignores_signals(command, trainer, tmp_path):
    trainer("key", 20)
    wait_until(
        lambda: [each.state for each in read_progress(tmp_path / "journal")] == ["parked"], message="it is parked"
    )
    [lock] = (tmp_path / "journal/couriers").glob("*.lock")
    os.kill(read_owner(OsDisk(), str(lock)).pid, signal.SIGSTOP)
    (tmp_path / "key").touch()
    code, _, err = command("sync", tmp_path, "--timeout", "12")
    assert code == 0, err
    assert lines(tmp_path / "lines.txt") == [*range(1, 21)]


def test_sync_leaves_the_couriers_of_a_live_program_alone_and_says_whose_they_are(command, trainer, tmp_path):
    process = trainer("key", 20, "stay")
    wait_until(
        lambda: [each.state for each in read_progress(tmp_path / "journal")] == ["parked"], message="it is parked"
    )
    code, _, err = command("sync", tmp_path, "--timeout", "1", "--progress", "off")
    assert code == 3
    assert f"wandb: its program, process {process.pid} on " in err
    assert "still runs and delivers by itself; waiting for it, 1 s at most" in err
    assert "error[EB905]" in err
    assert "why: wandb: ParkedError: 401 no key" in err
    assert busy_accounts(tmp_path) == ["wandb"]
    process.communicate("\n", timeout=20)


# -- follow -----------------------------------------------------------------------------------------------------------


FOLLOW = ["follow", "--to", "lines", "--set", "path=lines.txt", "--plugin", "destination"]


def test_follow_without_a_name_leaves_nothing_in_the_journal_however_it_ends(command, tmp_path):
    with EventBus([], journal=tmp_path / "journal") as bus:
        for number in range(7):
            bus.publish(step(tmp_path, number))
        process = command.start(*FOLLOW, tmp_path)
        wait_until(
            lambda: (tmp_path / "lines.txt").exists() and len(lines(tmp_path / "lines.txt")) == 7, message="the events"
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out.split()[:9]) == (130, "lines 7 events sent 7 dead 0 pending 0".split())
        assert "with --name it would continue" in err
        bus.publish(step(tmp_path, 7))
    assert read_progress(tmp_path / "journal") == []
    assert not (tmp_path / "journal/couriers").exists()
    (tmp_path / "lines.txt").unlink()
    assert command(*FOLLOW, tmp_path)[:2][0] == 0
    assert lines(tmp_path / "lines.txt") == [*range(1, 9)], "the first event on"
    assert "adapter" not in command("status", tmp_path)[1]


@pytest.mark.parametrize(("mode", "code"), [("parked", 4), ("wrong", 2), ("down", 4)])
def test_follow_without_a_name_tells_what_keeps_the_events_and_what_to_do(command, tmp_path, mode, code):
    journal(tmp_path)
    done = command(*FOLLOW, tmp_path, "--set", f"mode={mode}", "--timeout", "1", "--progress", "off")
    assert done[0] == code, done
    assert mode == "wrong" or "12 of 12 events for lines stay pending" in done[2]
    assert {"parked": "401 wrong key", "wrong": "no such bucket", "down": "503 busy"}[mode] in done[2]
    assert "sync" not in done[2]


@pytest.mark.long
def test_follow_without_a_name_leaves_an_adapter_alone_that_another_process_delivers_to(command, tmp_path):
    directory = journal(tmp_path)
    (tmp_path / "destination.py").write_text(DESTINATION)
    assert command(*FOLLOW, tmp_path, "--name", "mine")[0] == 0
    disk = OsDisk()
    lock = disk.lock(layout.courier_path(str(directory), "mine", "lock"))
    try:
        code, _, err = command(*FOLLOW, tmp_path)
    finally:
        disk.close(lock)
    assert (code, "error[EB905]" in err) == (3, True)


def test_follow_delivers_a_live_run_until_it_is_closed_and_no_event_again_on_the_next_day(command, tmp_path):
    arguments = [*FOLLOW, tmp_path, "--name", "lines"]
    with EventBus([], journal=tmp_path / "journal") as bus:
        bus.publish(step(tmp_path, 0))
        process = command.start(*arguments)
        wait_until((tmp_path / "lines.txt").exists, message="the first event")
        for number in range(1, 10):
            bus.publish(step(tmp_path, number))
        wait_until(lambda: len(lines(tmp_path / "lines.txt")) == 10, message="the others")
        assert process.poll() is None
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out.split()[:5]) == (0, "lines 10 events sent 10".split())
    assert command(*arguments)[1].split()[:5] == "lines 0 events sent 0".split()
    assert lines(tmp_path / "lines.txt") == [*range(1, 11)]
    assert command(*arguments, "--from-start")[1].split()[:5] == "lines 10 events sent 10".split()


def test_follow_that_is_interrupted_says_how_far_it_got_and_goes_on_there(command, tmp_path):
    arguments = [*FOLLOW, tmp_path, "--name", "lines"]
    with EventBus([], journal=tmp_path / "journal") as bus:
        for number in range(10):
            bus.publish(step(tmp_path, number))
        process = command.start(*arguments)
        wait_until(
            lambda: [each.delivered for each in read_progress(tmp_path / "journal")] == [10],
            message="the events are committed",
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
        assert (process.returncode, out.split()[:9]) == (130, "lines 10 events sent 10 dead 0 pending 0".split())
        assert "interrupted" in err
        bus.publish(step(tmp_path, 10))
    assert command(*arguments)[:1] == (0,)
    assert lines(tmp_path / "lines.txt") == [*range(1, 12)]


def test_follow_refuses_a_name_under_which_another_adapter_is_followed(command, tmp_path):
    journal(tmp_path)
    followed(tmp_path, "lines")
    line = ["follow", tmp_path, "--to", "lines", "--plugin", "destination", "--set", "path=elsewhere.txt"]
    code, _, err = command(*line, "--name", "lines")
    assert code == 2
    same_as_golden("error_follow_name", err, tmp_path)
    assert command(*line, "--name", "mine")[0] == 0
    assert len(lines(tmp_path / "elsewhere.txt")) == 12


# -- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_recorded_demo_run_replayed_into_csv_metrics_and_local_logger_equals_what_the_live_run_wrote(
    command, tmp_path
):
    short = ["--seed", "0", "--set", "run.steps=20", "--set", "run.eval_every=10"]
    code, _, err = command("demo", "--output-dir", "runs/demo", *short, "--progress", "off")
    assert code == 0, err
    folder = tmp_path / "runs" / "demo"
    written = [*folder.glob("*/metrics.csv"), *folder.glob("*/logs/**/[!.]*.*")]
    live = {path: path.read_bytes() for path in [*written, folder / "experiment.md"]}
    assert len(live) == 3 * 8 + 1, sorted(map(str, live))
    for path in live:
        path.unlink()
    before = {path: path.read_bytes() for path in (folder / "journal").rglob("*") if path.is_file()}
    for kind, param in (("csv_metrics", "out_path={run_dir}/metrics.csv"), ("local_logger", "print_every=0")):
        code, out, err = command("replay", "runs/demo", "--to", kind, "--set", param, "--progress", "off")
        assert (code, err) == (0, ""), out
    assert {path: path.read_bytes() for path in live if path.exists()} == live
    assert {path: path.read_bytes() for path in (folder / "journal").rglob("*") if path.is_file()} == before


def test_replay_pushes_the_events_of_one_run_of_some_types_from_a_sequence_on(command, tmp_path):
    journal(tmp_path / "sweep", 10, "low")
    journal(tmp_path / "sweep", 10, "high")
    (tmp_path / "sweep" / "high").mkdir()
    line = ["--to", "lines", "--plugin", "destination", "--progress", "off", "--json", "--set"]
    for first, count in ((5, 10), (14, 7)):  # the other run has 1 to 10, this one 11 to 20
        code, out, _ = command("replay", "sweep/high", *line, "path=high.txt", "--from-seq", first)
        assert (code, json.loads(out)["sent"]) == (0, {"step_end": count})
    assert lines(tmp_path / "high.txt") == [*range(11, 21), *range(14, 21)]
    code, out, err = command("replay", "sweep", *line, "path=none.txt", "--type", "evil")
    assert (code, json.loads(out)["sent"], "did you mean" in err) == (0, {}, True)
    code, out, _ = command("replay", "sweep", *line, "path=none.txt", "--dry-run")
    assert (json.loads(out)["sent"], (tmp_path / "none.txt").exists()) == ({"step_end": 20}, False)


def test_replay_at_a_speed_takes_as_long_as_the_run_did_divided_by_it(command, tmp_path):
    writer = JournalWriter(tmp_path / "journal").open()
    for number in range(4):
        event = step(tmp_path, number)
        writer.append(encode(Envelope(writer.stream, writer.next_sequence, 1e9 + 10 * number, event, "low")))
    writer.close()
    line = ["replay", tmp_path, "--to", "lines", "--plugin", "destination", "--set", "path=lines.txt", "--json"]
    seconds = json.loads(command(*line, "--speed", 20, "--timeout", 0.3)[1])["seconds"]
    assert 1.5 <= seconds < 10  # 30 s in all; and to wait for the next one is not to be stuck
    assert lines(tmp_path / "lines.txt") == [1, 2, 3, 4]


def test_replay_tells_what_was_refused_what_raised_and_where_it_got_stuck(command, tmp_path):
    journal(tmp_path)
    line = ["replay", tmp_path, "--plugin", "destination", "--progress", "off", "--timeout", 0.5, "--to"]
    code, out, err = command(*line, "lines", "--set", "path=x.txt", "--set", "mode=picky")
    assert (code, out.split()[:7], err) == (
        4,
        "lines 12 events sent 11 dead 1".split(),
        "rejected: 422 no such metric\n",
    )
    code, out, err = command(*line, "lines", "--set", "path=x.txt", "--set", "mode=down")
    assert (code, out.split()[:9]) == (4, "lines 0 events sent 0 dead 0 left 12".split())
    assert "error[EB901]: 12 events could not be delivered to lines" in err
    assert "RetryLaterError: 503 busy" in err
    code, out, _ = command(*line, "lines", "--set", "path=halves.txt", "--set", "mode=halves")
    assert (code, lines(tmp_path / "halves.txt")) == (0, [*range(1, 13)]), out
    code, _, err = command(*line, "faulty")
    assert (code, "hooks of faulty raised 12 times" in err) == (1, True)
    assert not (tmp_path / "journal" / "couriers").exists()


def test_replay_that_is_interrupted_says_where_to_go_on(command, tmp_path):
    journal(tmp_path, 200)
    line = [
        "replay",
        tmp_path,
        "--plugin",
        "destination",
        "--to",
        "lines",
        "--set",
        "path=lines.txt",
        "--progress",
        "off",
    ]
    process = command.start(*line, "--set", "mode=slow")
    wait_until((tmp_path / "lines.txt").exists, message="the first batch")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    sent, left = int(out.split()[1]), int(out.split()[8])
    assert (process.returncode, sent + left) == (130, 200)
    assert err == f"interrupted with {left} events left; continue with --from-seq {sent + 1}\n"
    assert command(*line, "--from-seq", sent + 1)[0] == 0
    assert lines(tmp_path / "lines.txt") == [*range(1, 201)]


def test_a_second_ctrl_c_ends_a_replay_whose_sink_blocks(command, tmp_path):
    journal(tmp_path)
    line = ["replay", tmp_path, "--plugin", "destination", "--to", "lines", "--set", "path=x", "--set", "mode=blocks"]
    process = command.start(*line, "--progress", "off")
    wait_until((tmp_path / "blocked").exists, message="it blocks")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


def test_a_value_that_is_no_yaml_is_text_for_paths_have_braces(command, tmp_path):
    journal(tmp_path)
    assert command("replay", tmp_path, "--to", "csv_metrics", "--set", "out_path={run}/metrics.csv")[0] == 0
    assert len((tmp_path / "low" / "metrics.csv").read_text().splitlines()) == 13


def test_a_param_that_does_not_fit_is_told_with_the_option_that_it_was_given_by(command, tmp_path):
    journal(tmp_path)
    line = ["replay", tmp_path, "--to", "csv_metrics"]
    code, _, err = command(*line, "--set", "out_pat=x.csv", "--set", "delimiter=5")
    assert code == 2
    missing = command(*line)[2]
    unknown = command("follow", tmp_path, "--to", "csv_metric")[2]
    same_as_golden("error_replay_params", f"{err}\n{missing}\n{unknown}", tmp_path)


# -- status, run ------------------------------------------------------------------------------------------------------


def test_status_tells_of_each_adapter_how_far_it_is_what_keeps_it_and_what_finishes_it(command, tmp_path):
    journal(tmp_path)
    for name, mode in (("csv", "ok"), ("s3", "picky"), ("wandb", "parked")):
        followed(tmp_path, name, mode=mode)
    assert command("sync", tmp_path, "--progress", "off")[0] == 4
    code, out, _ = command("status", tmp_path)
    assert code == 0
    same_as_golden("status_adapters", out, tmp_path)
    state = tmp_path / "journal/couriers/wandb.state.json"  # as a courier leaves it that is killed
    state.write_text(state.read_text().replace('"ended"', '"parked"'))
    rows = parse_json_lines(command("status", tmp_path, "--json")[1])
    assert [(row["adapter"], row["delivered"], row["dead"], row["pending"]) for row in rows[1:]] == [
        ("csv", 12, 0, 0),
        ("s3", 11, 1, 0),
        ("wandb", 0, 0, 12),
    ]
    assert (rows[3]["type"], rows[3]["state"], rows[3]["error"]) == (
        "adapter",
        "not running",
        "ParkedError: 401 wrong key",
    )


def test_status_shows_what_is_owed_and_what_failed_with_its_fix_and_where_more_is_written(command, tmp_path):
    directory = journal(tmp_path)
    for name in ("owing", "raising", "elsewhere"):
        followed(tmp_path, name)
        if name != "elsewhere":
            assert command("sync", tmp_path, "--adapter", name, "--progress", "off")[0] == 0
    write_status(
        OsDisk(),
        str(directory),
        "owing",
        DeliveryStatus(state="ended", owed=9, owed_fix="board login", error="no key", fix="board login"),
    )
    failures = DeliveryStatus(
        state="ended",
        hook_failures=4,
        task_failures=1,
        last_failure="on_eval: KeyError: 'acc'",
        log="/logs/process.log",
    )
    write_status(OsDisk(), str(directory), "raising", failures)
    write_status(OsDisk(), str(directory), "elsewhere", DeliveryStatus(state="other_rank"))
    _, out, _ = command("status", tmp_path)
    table = [line.split() for line in out.splitlines() if line.startswith(("owing", "raising", "elsewhere"))]
    assert table == [
        ["elsewhere", "served", "by", "rank", "0", "0", "0", "12", "0", "12", "events"],
        ["owing", "not", "running", "12", "9", "0", "0", "-"],
        ["raising", "not", "running", "12", "0", "0", "0", "-"],
    ]
    assert "  owing: 9 events delivered, but not confirmed by the destination: no key   fix: board login\n" in out
    assert (
        "  raising: its hooks raised 4 times, 1 task started by them failed; the last one: on_eval: KeyError: 'acc'"
        "   traceback: /logs/process.log\n"
    ) in out
    assert f"log of the couriers: {directory}/couriers/process.log\n" in out
    assert out.endswith(f"deliver what is pending or owed: evsys-bus sync {directory}\n")
    rows = parse_json_lines(command("status", tmp_path, "--json")[1])
    elsewhere, owing, raising = rows[1:]
    assert elsewhere["state"] == "other_rank"
    assert (owing["state"], owing["owed"], owing["owed_fix"]) == ("not running", 9, "board login")
    assert (raising["hook_failures"], raising["task_failures"]) == (4, 1)
    assert (raising["last_failure"], raising["log"]) == ("on_eval: KeyError: 'acc'", "/logs/process.log")
    of_0_1_0 = "adapter state delivered dead pending lag_seconds pid error fix failing_since hook_failures dead_letters"
    assert set(of_0_1_0.split()) <= set(owing)


EXPERIMENT = """\
name: sweep
recipe: toy_recipe:recipe
plugins: [destination]
run: {steps: 3}
runs: {low: {}}
callbacks:
  - {kind: lines, name: wandb, params: {path: lines.txt, mode: MODE}}
"""

RECIPE = """\
from evsys_bus import TrainingBatch
from evsys_bus.training.plan import RunComponents

class Nothing:
    async def forward_backward(self, batch):
        return {"loss": 1.0}
    async def optim_step(self):
        pass
    async def save_state(self, name):
        return f"mem:{name}"
    save_weights_for_sampler = load_state = save_state
    async def build_batch(self, step_idx):
        return TrainingBatch(data=[step_idx])

def recipe(params, run):
    return RunComponents(backend=Nothing(), step_builder=Nothing(), num_steps=params["steps"])
"""


def test_a_run_whose_events_were_not_delivered_ends_well_with_a_warning_and_with_strict_with_5(command, tmp_path):
    (tmp_path / "sweep.yaml").write_text(EXPERIMENT.replace("MODE", "broken"))
    (tmp_path / "toy_recipe.py").write_text(RECIPE)
    line = ["run", "sweep.yaml", "--progress", "off"]
    code, results, _ = command(*line, "--json", "--output-dir", "runs/json")
    strict, out, err = command(*line, "--strict")
    whole = command(*line, "--strict", "--set", "callbacks[0].params.mode=ok", "--output-dir", "runs/whole")
    assert (code, strict, whole[0]) == (0, 5, 0), whole
    assert re.search(r"^delivery +wandb \d+ pending$", out, re.MULTILINE)
    last = err.splitlines()[-1]
    assert re.fullmatch(
        rf"warning: events not delivered yet: wandb \d+; finish with: evsys-bus sync {tmp_path}/runs/sweep/journal",
        last,
    )
    rows = parse_json_lines(results)
    [delivery] = [row for row in rows if row["type"] == "delivery"]
    assert (delivery["name"], delivery["delivered"], delivery["pending"] > 0) == ("wandb", 0, True)
    assert rows[-1]["finish"] == f"evsys-bus sync {tmp_path}/runs/json/journal"
    assert re.search(r"^delivery +wandb ok$", whole[1], re.MULTILINE)


def run_with(command, tmp_path, mode, *options):
    """An experiment whose events go to a sink of this mode, started."""
    (tmp_path / "sweep.yaml").write_text(EXPERIMENT.replace("MODE", mode))
    (tmp_path / "toy_recipe.py").write_text(RECIPE)
    return command.start("run", "sweep.yaml", *options)


def test_what_keeps_events_from_their_destination_is_told_at_the_end_with_its_fix_and_in_colour(command, tmp_path):
    run = run_with(command, tmp_path, "parked", "--progress", "off", "--color", "always")
    _, err = run.communicate(timeout=15)
    assert run.returncode == 0
    assert "\\x1b" not in err
    [line] = [line for line in err.splitlines() if "wandb: ParkedError" in line]
    assert re.sub(r"\x1b\[\d+m", "", line) == (
        "warning: wandb: ParkedError: 401 wrong key   fix: export WANDB_API_KEY=..."
    )


def test_a_run_whose_adapter_owes_events_says_so_with_the_fix_and_with_strict_ends_with_5(command, tmp_path):
    run = run_with(command, tmp_path, "owes", "--strict", "--progress", "off")
    out, err = run.communicate(timeout=20)
    assert run.returncode == 5
    assert re.search(r"^delivery +wandb \d+ owed$", out, re.MULTILINE), out
    warned = "events delivered, but not confirmed by the destination: no key for board.example   fix: board login"
    assert re.search(rf"^warning: wandb: \d+ {warned}$", err, re.MULTILINE), err
    finish = rf"finish with: evsys-bus sync {tmp_path}/runs/sweep/journal"
    assert re.fullmatch(rf"warning: events not confirmed yet: wandb \d+ owed; {finish}", err.splitlines()[-1])
    run = run_with(command, tmp_path, "owes", "--json", "--progress", "off", "--output-dir", "runs/json")
    rows = parse_json_lines(run.communicate(timeout=20)[0])
    [delivery] = [row for row in rows if row["type"] == "delivery"]
    assert (delivery["owed"] > 0, delivery["pending"]) == (True, 0)
    assert (delivery["owed_fix"], delivery["trouble"]) == ("board login", "no key for board.example")
    assert rows[-1]["finish"] == f"evsys-bus sync {tmp_path}/runs/json/journal"


@pytest.mark.parametrize("placement", ["inline", "follow"])
def test_hooks_that_raise_count_for_strict_wherever_they_run(command, tmp_path, placement):
    experiment = EXPERIMENT.replace("MODE", "ok") + f"  - {{kind: faulty, placement: {placement}}}\n"
    (tmp_path / "sweep.yaml").write_text(experiment)
    (tmp_path / "toy_recipe.py").write_text(RECIPE)
    code, out, err = command("run", "sweep.yaml", "--progress", "off", "--strict")
    assert code == 5, err
    if placement == "follow":
        assert re.search(r"^delivery +faulty 3 hook failures +wandb ok$", out, re.MULTILINE), out
        assert "warning: faulty: its hooks raised 3 times" in err
    else:
        assert "warning: faulty.on_step_end raised in 3 of 3 calls" in err


AT_THE_END = """
from evsys_bus import Callback, Sink, register_callback, register_sink

@register_callback("unflushed")
class Unflushed(Callback):
    def on_step_end(self, *_): ...
    def close(self):
        raise OSError("no space left")

@register_sink("unflushed_sink")
class UnflushedSink(Sink):
    async def write(self, batch): ...
    async def close(self):
        raise OSError("no space left")

@register_callback("indebted")
class Indebted(Callback):
    def on_step_end(self, *_):
        self.report_owed(3, "no key", "board login")
"""


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("{kind: unflushed}", "unflushed.close raised in 1 of 1 calls"),
        ("{kind: unflushed, placement: follow}", "unflushed: its hooks raised 1 time; the last one: close: OSError"),
        ("{kind: unflushed_sink}", "unflushed_sink: its hooks raised 1 time; the last one: close: OSError"),
        ("{kind: indebted}", "indebted: 3 events delivered, but not confirmed by the destination: no key"),
    ],
)
def test_what_fails_when_the_bus_is_left_counts_for_strict_wherever_it_runs(command, tmp_path, added, said):
    experiment = EXPERIMENT.replace("MODE", "ok").replace("plugins: [", "plugins: [at_the_end, ") + f"  - {added}\n"
    (tmp_path / "sweep.yaml").write_text(experiment)
    (tmp_path / "at_the_end.py").write_text(AT_THE_END)
    (tmp_path / "toy_recipe.py").write_text(RECIPE)
    code, _, err = command("run", "sweep.yaml", "--progress", "off", "--strict")
    assert code == 5, err
    assert f"warning: {said}" in err
    assert "evsys-bus sync" not in err  # it would find nothing to do


@pytest.mark.long
def test_the_page_of_a_run_is_named_at_its_end_whoever_published_it(command, tmp_path):
    plugin = """
from evsys_bus import Callback, RunAnnotated, register_callback

@register_callback("page")
class Page(Callback):
    def on_run_start(self, ctx):
        self.publish(RunAnnotated(ctx.run_key, {"wandb_url": f"https://board.example/{ctx.run_key}"}))
"""
    (tmp_path / "paged.py").write_text(plugin)
    (tmp_path / "toy_recipe.py").write_text(RECIPE)
    for placement in ("inline", "follow"):
        experiment = EXPERIMENT.partition("callbacks:")[0].replace("destination", "paged")
        (tmp_path / "sweep.yaml").write_text(f"{experiment}callbacks: [{{kind: page, placement: {placement}}}]\n")
        line = ["run", "sweep.yaml", "--progress", "off", "--output-dir", f"runs/{placement}"]
        code, out, err = command(*line)
        assert code == 0, err
        assert re.search(r"View run at https://board.example/low\S*$", out, re.MULTILINE), out
        rows = parse_json_lines(command(*line[:-1], f"runs/{placement}-json", "--json")[1])
        assert rows[0]["page"].startswith("https://board.example/low")


@pytest.mark.parametrize(
    ("form", "number"), [("plain", signal.SIGINT), pytest.param("json", signal.SIGTERM, marks=pytest.mark.long)]
)
def test_the_wait_for_deliveries_is_told_and_one_signal_ends_it_with_the_result(command, tmp_path, form, number):
    run = run_with(command, tmp_path, "blocks", "--progress", form)
    began = time.monotonic()
    while not re.search(r'event=waiting |"event":"waiting"', line := run.stderr.readline()):
        assert line, "it ended"
    told = json.loads(line) if form == "json" else dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line))
    assert told["adapters"] == "wandb"
    assert int(told["events"]) > 3
    assert 15 <= int(told["at_most_seconds"]) <= 19
    assert "Ctrl-C leaves them to sync" in told["hint"]
    run.send_signal(number)
    out, err = run.communicate(timeout=15)
    assert time.monotonic() - began < 12
    assert run.returncode == 0
    assert "stopping" not in err
    assert "interrupted" not in err
    assert re.search(r"^delivery +wandb \d+ pending$", out, re.MULTILINE)
    assert f"finish with: evsys-bus sync {tmp_path}/runs/sweep/journal" in err.splitlines()[-1]


@pytest.mark.long
def test_a_run_that_was_interrupted_still_tells_that_it_waits_and_goes_on_by_resuming(command, tmp_path):
    run = run_with(command, tmp_path, "blocks", "--progress", "plain", "--set", "run.steps=1000000")
    while "event=run_started" not in run.stderr.readline():
        pass
    run.send_signal(signal.SIGINT)
    while "event=waiting " not in (line := run.stderr.readline()):
        assert line, "it ended"
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=15)
    assert run.returncode == 130
    assert err.splitlines()[-1].startswith("go on with: evsys-bus run sweep.yaml")


def test_status_that_watches_a_pipe_prints_what_has_changed_until_it_is_interrupted(command, tmp_path):
    directory = journal(tmp_path)
    followed(tmp_path)
    watching = command.start("status", "--watch", "--json", tmp_path)

    def next_pending():
        rows = iter(lambda: json.loads(watching.stdout.readline()), None)
        return next(row for row in rows if row["type"] == "adapter")["pending"]

    assert next_pending() == 12
    assert command("sync", directory)[0] == 0
    pending = 12
    while pending:  # what it has shown meanwhile depends on when it looked
        pending = next_pending()
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=10) == 0
    assert command("status", "--watch", "--verify", tmp_path)[0] == 2
