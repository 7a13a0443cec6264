"""The faults of `torture.py`: those during a life (`DURING`) and those between two lives (`BETWEEN`).

Each is a function of the scene that counts itself by its name. A fault during a life is undone before it returns.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

from support.couriers import courier_processes
from support.programs import EVSYS_BUS

DAY = 86_400
INJECTED = (
    ("fsync,fdatasync", ("EIO", "ENOSPC")),
    ("rename,renameat,renameat2", ("EIO", "ENOSPC", "ESTALE")),
    ("write,pwrite64", ("EIO", "ENOSPC")),
    ("openat", ("EIO", "ENOSPC", "ESTALE", "EMFILE")),
    ("ftruncate,unlink,unlinkat,mkdir", ("EIO", "ESTALE")),
    ("newfstatat,getdents64", ("EIO", "ESTALE")),
)
FOLDERS = ("journal", "journal/cursors", "journal/couriers", "out", "out/run", "store")


def choose_faults(scenario, kinds, numbers):
    """Choose some of these at random; only those that ``--only`` and ``--but`` allow."""
    allowed = [each for each in kinds if scenario.is_allowed(each.__name__)]
    return [scenario.rng.choice(allowed) for _ in range(scenario.rng.choice(numbers))] if allowed else []


def exchange_names(one, other):
    """Swap two names atomically, which two renames cannot do."""
    at_cwd, rename_exchange = -100, 2
    code = ctypes.CDLL(None, use_errno=True).renameat2(
        at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange
    )
    if code:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(one))


# -- during a life ----------------------------------------------------------------------------------------------------


def stop_trainer(scenario, life):
    seconds = scenario.rng.uniform(0.2, 3.0)
    scenario.note("stop_trainer")
    life.send(signal.SIGSTOP)
    time.sleep(seconds)
    life.send(signal.SIGCONT)
    life.stopped_seconds += seconds


def stop_courier(scenario, life):
    pids = courier_processes(scenario.directory)
    if not pids:
        return
    scenario.note("stop_courier")
    _signal(pids, signal.SIGSTOP)
    life.run_for(scenario.rng.uniform(0.2, 3.0))
    _signal(pids, signal.SIGCONT)


def kill_courier(scenario, life):
    scenario.note("kill_courier")
    scenario.kill_couriers()


def _signal(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def limit_size(scenario, life):
    """Limit the size of files for a while."""
    scenario.note("limit_size")
    _limit_for_a_while(scenario, life, resource.RLIMIT_FSIZE, scenario.rng.choice((0, 500, 5_000, 50_000)))


def limit_files(scenario, life):
    """Limit the number of open files for a while."""
    scenario.note("limit_files")
    _limit_for_a_while(scenario, life, resource.RLIMIT_NOFILE, scenario.rng.choice((3, 8, 12, 20)))


def _limit_for_a_while(scenario, life, what, soft):
    pids = [life.process.pid]
    if scenario.rng.random() >= 0.5:
        pids = courier_processes(scenario.directory) or pids
    before = resource.getrlimit(what)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, (soft, before[1]))
    life.run_for(scenario.rng.uniform(0.1, 1.5))
    pids = {*pids, life.process.pid, *courier_processes(scenario.directory)}  # one may have been started meanwhile
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


def disk_full(scenario, life):
    """Fill the disk, then free it."""
    if not scenario.disk:
        if not scenario.tools.mounts:
            scenario.count_skipped("disk_full")
        return
    scenario.note("disk_full")
    ballast = scenario.work / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    life.run_for(scenario.rng.uniform(0.1, 1.5))
    ballast.unlink(missing_ok=True)


def link_to_itself(scenario, life):
    """Replace a folder by a link to itself for a while."""
    path = _choose_folder(scenario)
    if path is not None:
        scenario.note("link_to_itself", str(path))
        _swap_for_a_while(scenario, life, path, lambda other: other.symlink_to(path.name))


def link_elsewhere(scenario, life):
    """Move a folder elsewhere for a while, with a link to it in its place."""
    path = _choose_folder(scenario)
    if path is not None:
        scenario.note("link_elsewhere", str(path))
        other = path.with_name(f"{path.name}.aside")
        _swap_for_a_while(scenario, life, path, lambda link: link.symlink_to(other.name))


def empty_elsewhere(scenario, life):
    """Replace a folder by an empty one for a while."""
    path = scenario.journal / scenario.rng.choice(("cursors", "couriers"))
    if path.is_dir() and not path.is_symlink():
        scenario.note("empty_elsewhere", str(path))
        _swap_for_a_while(scenario, life, path, Path.mkdir)


def _choose_folder(scenario):
    path = scenario.work / scenario.rng.choice(FOLDERS)
    return path if path.is_dir() and not path.is_symlink() else None


def _swap_for_a_while(scenario, life, path, make):
    other = path.with_name(f"{path.name}.aside")
    make(other)
    exchange_names(path, other)
    try:
        life.run_for(scenario.rng.uniform(0.1, 1.0))
    finally:
        exchange_names(path, other)
        if other.is_symlink():
            other.unlink()
        else:
            shutil.rmtree(other, ignore_errors=True)


def unreadable(scenario, life):
    """Take permissions from a folder for a while."""
    path = _choose_folder(scenario)
    if path is None:
        return
    if scenario.tools.unprivileged is None:
        scenario.count_skipped("unreadable")
        return
    scenario.note("unreadable", str(path))
    mode = path.stat().st_mode & 0o777
    path.chmod(scenario.rng.choice((0, 0o500, 0o300)))
    try:
        life.run_for(scenario.rng.uniform(0.1, 1.0))
    finally:
        path.chmod(mode)


def failing_calls(scenario, life):
    """Make system calls of the trainer or of a courier fail for a while."""
    if scenario.tools.strace is None:
        scenario.count_skipped("failing_calls")
        return
    calls, errors = scenario.rng.choice(INJECTED)
    if "write" in calls and (life.plan["entry"] == "uvloop" or life.plan["couriers"] == "thread"):
        calls, errors = INJECTED[0]  # libuv aborts if it cannot write to its wake-up pipe; courier threads use it too
    pids = courier_processes(scenario.directory)
    pid = scenario.rng.choice(pids) if pids and scenario.rng.random() < 0.6 else life.process.pid
    error, when = scenario.rng.choice(errors), scenario.rng.choice(("1+", "3+", "1+2", "2+7"))
    target = "trainer" if pid == life.process.pid else "courier"
    scenario.note("failing_calls", f"{target} {calls} {error} {when}")
    scenario.counts[f"failing_calls: {calls.partition(',')[0]} of the {target}"] += 1
    # Threads are traced (-f), but no child process that is cloned while strace detaches.
    command = ["strace", "-f", "-q", "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"]
    with subprocess.Popen(
        [*command, "-o", "/dev/null", "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as tracer:  # fmt: skip
        life.run_for(scenario.rng.uniform(0.2, 1.2))
        tracer.terminate()
        try:
            tracer.wait(10)
        except subprocess.TimeoutExpired:
            tracer.kill()


def clock_jumps(scenario, life):
    """Set the clock while processes run."""
    if scenario.tools.clock is None:
        scenario.count_skipped("clock_jumps")
        return
    scenario.note("clock_jumps")
    scenario.set_clock(_choose_offset(scenario))
    life.run_for(scenario.rng.uniform(0.0, 0.5))


def sink_away(scenario, life):
    scenario.note("sink_away")
    _with_file_for_a_while(scenario, life, scenario.work / "away")


def sink_slow(scenario, life):
    scenario.note("sink_slow")
    _with_file_for_a_while(scenario, life, scenario.work / "slow")


def _with_file_for_a_while(scenario, life, path):
    with contextlib.suppress(OSError):
        path.touch()
    life.run_for(scenario.rng.uniform(0.2, 1.5))
    path.unlink(missing_ok=True)


def sync_beside(scenario, life):
    """Run `evsys-bus sync` while the program runs; it may be killed."""
    scenario.note("sync_beside")
    _run_sync(scenario, scenario.rng.choice((None, 0.3, 0.8, 1.5)), "--timeout", "1")


DURING = (
    *(stop_trainer, stop_courier, kill_courier, limit_size, limit_files, disk_full, link_to_itself, link_elsewhere),
    *(empty_elsewhere, unreadable, failing_calls, failing_calls, clock_jumps, sink_away, sink_slow, sync_beside),
)


# -- between two lives ------------------------------------------------------------------------------------------------


def _run_sync(scenario, seconds, *arguments):
    """Run `sync`, and kill it after ``seconds`` or wait for it; it may fail, but must end without a traceback."""
    command = [EVSYS_BUS, "sync", str(scenario.journal), *arguments]
    log = scenario.notes / f"sync-{scenario.counts['syncs']}.txt"
    scenario.counts["syncs"] += 1
    with log.open("wb") as file, subprocess.Popen(
        [*scenario.prefix, *command], env=scenario.environment(), stdout=file, stderr=file, start_new_session=True
    ) as process:  # fmt: skip
        try:
            process.wait(90 if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if seconds is None:
                raise AssertionError(f"sync had not ended after 90 s: {log.read_text()}") from None
            scenario.counts["syncs killed"] += 1
    if process.returncode == 1:
        raise AssertionError(f"sync ended with a traceback: {log.read_text(errors='replace')[-3000:]}")


def sync_killed(scenario):
    scenario.note("sync_killed")
    _run_sync(scenario, scenario.rng.uniform(0.2, 2.0))


def two_syncs(scenario):
    """Run two `sync` commands at once; one of them may refuse because of the other."""
    scenario.note("two_syncs")
    command = [*scenario.prefix, EVSYS_BUS, "sync", str(scenario.journal)]
    processes = [
        subprocess.Popen(
            command, env=scenario.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        for _ in range(2)
    ]
    for process in processes:
        try:
            _, stderr = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError("one of two syncs had not ended after 90 s") from None
        if process.returncode == 1:
            raise AssertionError(f"one of two syncs ended with a traceback: {stderr[-3000:].decode()}")


def cursor_damaged(scenario):
    scenario.note("cursor_damaged", _damage_one(scenario, scenario.journal.glob("cursors/*.json")))


def spec_damaged(scenario):
    """Damage the file that describes how to build an adapter; only the next life can write it again, so require one."""
    names = {*scenario.subscriptions.values(), "checkpoint_upload"}
    paths = [path for name in names for path in scenario.journal.glob(f"couriers/{name}.spec.json")]
    scenario.note("spec_damaged", _damage_one(scenario, paths))
    scenario.unsubscribed.clear()
    scenario.needs_life = True


def state_damaged(scenario):
    scenario.note("state_damaged", _damage_one(scenario, scenario.journal.glob("couriers/*.state.json")))


def spool_damaged(scenario):
    scenario.note(
        "spool_damaged", _damage_one(scenario, (scenario.work / "out" / "run" / "spool").glob("*/*/entry.json"))
    )


def latest_damaged(scenario):
    """Damage ``latest.json`` in the store; the next checkpoint repairs it."""
    scenario.latest_damaged_at = scenario.life_number
    scenario.note("latest_damaged", _damage_one(scenario, (scenario.work / "store").glob("run/latest.json")))


def journal_file_damaged(scenario):
    """Damage ``journal.json``, which has the format version. (A later version is refused, and not tested here.)"""
    ways = ("cut", "empty", "remove", "zeros")
    scenario.note("journal_file_damaged", _damage_one(scenario, scenario.journal.glob("journal.json"), ways))


def owner_damaged(scenario):
    """Damage the small file that records the owner of a CSV file."""
    scenario.note(
        "owner_damaged", _damage_one(scenario, (scenario.work / "out").glob(".*.run"), ways=("cut", "empty", "remove"))
    )


def _damage_one(scenario, paths, ways=("cut", "empty", "remove", "folder", "link", "other", "zeros")):
    """Damage one of these small files; returns what was done."""
    paths = sorted(path for path in paths if path.is_file())
    if not paths:
        return "nothing there"
    path, way = scenario.rng.choice(paths), scenario.rng.choice(ways)
    content = path.read_bytes()
    if way in {"remove", "folder", "link"}:
        path.unlink()
    if way == "cut":
        path.write_bytes(content[: scenario.rng.randrange(len(content) + 1)])
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "zeros":
        path.write_bytes(bytes(len(content)))
    elif way == "other":
        path.write_bytes(b'{"version": 7, "of": ["a later", "release"]}')
    elif way == "folder":
        path.mkdir()
    elif way == "link":
        path.symlink_to(path.name)
    return f"{way} {path.relative_to(scenario.work)}"


def subscription_renamed(scenario):
    if scenario.needs_life:
        return  # a damaged spec under a name that is not used any more would stay damaged
    what = scenario.rng.choice(sorted(scenario.subscriptions))
    scenario.old_names.setdefault(what, []).append(scenario.subscriptions[what])
    scenario.subscriptions[what] = f"{what}-{scenario.life_number}"
    scenario.note("subscription_renamed", scenario.subscriptions[what])


def subscription_added(scenario):
    what = f"added{scenario.life_number}"
    if what not in scenario.subscriptions:
        scenario.subscriptions[what] = what
        scenario.note("subscription_added", what)


def subscription_removed(scenario):
    if scenario.needs_life:
        return  # for the same reason
    what = scenario.rng.choice(sorted(scenario.subscriptions))
    if what in scenario.unsubscribed:
        scenario.unsubscribed.discard(what)
        scenario.note("subscription_restored", what)
    else:
        scenario.unsubscribed.add(what)
        scenario.note("subscription_removed", what)


def output_removed(scenario):
    """Remove the output of an adapter, as a person might."""
    what = scenario.rng.choice(("table", "logs", "board"))
    out = scenario.work / "out"
    path = {"table": out / "metrics.csv", "logs": out / "run" / "logs", "board": out / "tensorboard"}[what]
    scenario.note("output_removed", what)
    scenario.output_since[what] = scenario.life_number + 1
    for _ in range(50):
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:  # a courier in its linger period writes into it
            time.sleep(0.02)
        else:
            break


def machine_restarted(scenario):
    """Make the stream locks look as if the machine had been restarted."""
    scenario.kill_couriers()
    for lock in scenario.journal.glob("[rc]*/lock"):
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads(lock.read_text().split("\n")[-1])
            with lock.open("a") as file:
                file.write("\n" + json.dumps(owner | {"boot": f"another-{scenario.life_number}"}))
    scenario.note("machine_restarted")


def clock_set(scenario):
    """Set the clock between two lives."""
    if scenario.tools.clock is None:
        scenario.count_skipped("clock_set")
        return
    scenario.note("clock_set")
    scenario.set_clock(_choose_offset(scenario))


def _choose_offset(scenario):
    return scenario.rng.choice((-7 * DAY, -DAY, -60, 0, 60, DAY, 7 * DAY))


BETWEEN = (
    *(sync_killed, two_syncs, cursor_damaged, cursor_damaged, spec_damaged, state_damaged, spool_damaged),
    *(
        latest_damaged,
        journal_file_damaged,
        owner_damaged,
        subscription_renamed,
        subscription_added,
        subscription_removed,
        subscription_removed,
    ),
    *(output_removed, machine_restarted, machine_restarted, clock_set, clock_set),
)
