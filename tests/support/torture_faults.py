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


def choose(scene, kinds, numbers):
    """Choose some of these at random; only those that ``--only`` and ``--but`` allow."""
    allowed = [each for each in kinds if scene.allows(each.__name__)]
    return [scene.chance.choice(allowed) for _ in range(scene.chance.choice(numbers))] if allowed else []


def exchange(one, other):
    """Swap two names atomically, which two renames cannot do."""
    at_cwd, rename_exchange = -100, 2
    code = ctypes.CDLL(None, use_errno=True).renameat2(
        at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange
    )
    if code:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), str(one))


# -- during a life ----------------------------------------------------------------------------------------------------


def stop_trainer(scene, life):
    seconds = scene.chance.uniform(0.2, 3.0)
    scene.note("stop_trainer")
    life.send(signal.SIGSTOP)
    time.sleep(seconds)
    life.send(signal.SIGCONT)
    life.stopped_seconds += seconds


def stop_courier(scene, life):
    pids = scene.courier_pids()
    if not pids:
        return
    scene.note("stop_courier")
    _signal(pids, signal.SIGSTOP)
    life.pause(scene.chance.uniform(0.2, 3.0))
    _signal(pids, signal.SIGCONT)


def kill_courier(scene, life):
    scene.note("kill_courier")
    scene.kill_couriers()


def _signal(pids, number):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def limit_size(scene, life):
    """Limit the size of files for a while."""
    scene.note("limit_size")
    _limit(scene, life, resource.RLIMIT_FSIZE, scene.chance.choice((0, 500, 5_000, 50_000)))


def limit_files(scene, life):
    """Limit the number of open files for a while."""
    scene.note("limit_files")
    _limit(scene, life, resource.RLIMIT_NOFILE, scene.chance.choice((3, 8, 12, 20)))


def _limit(scene, life, what, soft):
    pids = [life.process.pid] if scene.chance.random() < 0.5 else scene.courier_pids() or [life.process.pid]
    before = resource.getrlimit(what)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, (soft, before[1]))
    life.pause(scene.chance.uniform(0.1, 1.5))
    for pid in {*pids, life.process.pid, *scene.courier_pids()}:  # a courier may have been started meanwhile
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


def disk_full(scene, life):
    """Fill the disk, then free it."""
    if not scene.disk:
        if not scene.tools.mounts:
            scene.skip("disk_full")
        return
    scene.note("disk_full")
    ballast = scene.work / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    life.pause(scene.chance.uniform(0.1, 1.5))
    ballast.unlink(missing_ok=True)


def link_to_itself(scene, life):
    """Replace a folder by a link to itself for a while."""
    path = _folder(scene)
    if path is not None:
        scene.note("link_to_itself", str(path))
        _put_in_place(scene, life, path, lambda other: other.symlink_to(path.name))


def link_elsewhere(scene, life):
    """Move a folder elsewhere for a while, with a link to it in its place."""
    path = _folder(scene)
    if path is not None:
        scene.note("link_elsewhere", str(path))
        other = path.with_name(f"{path.name}.aside")
        _put_in_place(scene, life, path, lambda link: link.symlink_to(other.name))


def empty_elsewhere(scene, life):
    """Replace a folder by an empty one for a while."""
    path = scene.journal / scene.chance.choice(("cursors", "couriers"))
    if path.is_dir() and not path.is_symlink():
        scene.note("empty_elsewhere", str(path))
        _put_in_place(scene, life, path, Path.mkdir)


def _folder(scene):
    path = scene.work / scene.chance.choice(FOLDERS)
    return path if path.is_dir() and not path.is_symlink() else None


def _put_in_place(scene, life, path, make):
    other = path.with_name(f"{path.name}.aside")
    make(other)
    exchange(path, other)
    try:
        life.pause(scene.chance.uniform(0.1, 1.0))
    finally:
        exchange(path, other)
        if other.is_symlink():
            other.unlink()
        else:
            shutil.rmtree(other, ignore_errors=True)


def unreadable(scene, life):
    """Take permissions from a folder for a while."""
    path = _folder(scene)
    if path is None:
        return
    if scene.tools.unprivileged is None:
        scene.skip("unreadable")
        return
    scene.note("unreadable", str(path))
    mode = path.stat().st_mode & 0o777
    path.chmod(scene.chance.choice((0, 0o500, 0o300)))
    try:
        life.pause(scene.chance.uniform(0.1, 1.0))
    finally:
        path.chmod(mode)


def failing_calls(scene, life):
    """Make system calls of the trainer or of a courier fail for a while."""
    if scene.tools.strace is None:
        scene.skip("failing_calls")
        return
    calls, errors = scene.chance.choice(INJECTED)
    if "write" in calls and (life.plan["entry"] == "uvloop" or life.plan["couriers"] == "thread"):
        calls, errors = INJECTED[0]  # libuv aborts if it cannot write to its wake-up pipe; courier threads use it too
    pids = scene.courier_pids()
    pid = scene.chance.choice(pids) if pids and scene.chance.random() < 0.6 else life.process.pid
    error, when = scene.chance.choice(errors), scene.chance.choice(("1+", "3+", "1+2", "2+7"))
    whose = "trainer" if pid == life.process.pid else "courier"
    scene.note("failing_calls", f"{whose} {calls} {error} {when}")
    scene.counts[f"failing_calls: {calls.partition(',')[0]} of the {whose}"] += 1
    # Threads are traced (-f), but no child process that is cloned while strace detaches.
    line = ["strace", "-f", "-q", "-e", f"trace={calls}", "-e", f"inject={calls}:error={error}:when={when}"]
    with subprocess.Popen(
        [*line, "-o", "/dev/null", "-p", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as tracer:  # fmt: skip
        life.pause(scene.chance.uniform(0.2, 1.2))
        tracer.terminate()
        try:
            tracer.wait(10)
        except subprocess.TimeoutExpired:
            tracer.kill()


def clock_jumps(scene, life):
    """Set the clock while processes run."""
    if scene.tools.clock is None:
        scene.skip("clock_jumps")
        return
    scene.note("clock_jumps")
    scene.set_clock(_offset(scene))
    life.pause(scene.chance.uniform(0.0, 0.5))


def sink_away(scene, life):
    scene.note("sink_away")
    _while_there(scene, life, scene.work / "away")


def sink_slow(scene, life):
    scene.note("sink_slow")
    _while_there(scene, life, scene.work / "slow")


def _while_there(scene, life, path):
    with contextlib.suppress(OSError):
        path.touch()
    life.pause(scene.chance.uniform(0.2, 1.5))
    path.unlink(missing_ok=True)


def sync_beside(scene, life):
    """Run `evsys-bus sync` while the program runs; it may be killed."""
    scene.note("sync_beside")
    _sync(scene, scene.chance.choice((None, 0.3, 0.8, 1.5)), "--timeout", "1")


DURING = (
    *(stop_trainer, stop_courier, kill_courier, limit_size, limit_files, disk_full, link_to_itself, link_elsewhere),
    *(empty_elsewhere, unreadable, failing_calls, failing_calls, clock_jumps, sink_away, sink_slow, sync_beside),
)


# -- between two lives ------------------------------------------------------------------------------------------------


def _sync(scene, seconds, *arguments):
    """Run `sync`, and kill it after ``seconds`` or wait for it; it may fail, but must end without a traceback."""
    line = [EVSYS_BUS, "sync", str(scene.journal), *arguments]
    log = scene.notes / f"sync-{scene.counts['syncs']}.txt"
    scene.counts["syncs"] += 1
    with log.open("wb") as file, subprocess.Popen(
        [*scene.prefix, *line], env=scene.environment(), stdout=file, stderr=file, start_new_session=True
    ) as process:  # fmt: skip
        try:
            process.wait(90 if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if seconds is None:
                raise AssertionError(f"sync had not ended after 90 s: {log.read_text()}") from None
            scene.counts["syncs killed"] += 1
    if process.returncode == 1:
        raise AssertionError(f"sync ended with a traceback: {log.read_text(errors='replace')[-3000:]}")


def sync_killed(scene):
    scene.note("sync_killed")
    _sync(scene, scene.chance.uniform(0.2, 2.0))


def two_syncs(scene):
    """Run two `sync` commands at once; one of them may refuse because of the other."""
    scene.note("two_syncs")
    line = [*scene.prefix, EVSYS_BUS, "sync", str(scene.journal)]
    both = [
        subprocess.Popen(
            line, env=scene.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        for _ in range(2)
    ]
    for process in both:
        try:
            _, said = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError("one of two syncs had not ended after 90 s") from None
        if process.returncode == 1:
            raise AssertionError(f"one of two syncs ended with a traceback: {said[-3000:].decode()}")


def cursor_damaged(scene):
    scene.note("cursor_damaged", _damage(scene, scene.journal.glob("cursors/*.json")))


def spec_damaged(scene):
    """Damage the file that describes how to build an adapter; only the next life can write it again, so require one."""
    names = {*scene.followers.values(), "checkpoint_upload"}
    paths = [path for name in names for path in scene.journal.glob(f"couriers/{name}.spec.json")]
    scene.note("spec_damaged", _damage(scene, paths))
    scene.away.clear()
    scene.needs_life = True


def state_damaged(scene):
    scene.note("state_damaged", _damage(scene, scene.journal.glob("couriers/*.state.json")))


def spool_damaged(scene):
    scene.note("spool_damaged", _damage(scene, (scene.work / "out" / "run" / "spool").glob("*/*/entry.json")))


def latest_damaged(scene):
    """Damage ``latest.json`` in the store; the next checkpoint repairs it."""
    scene.latest_damaged_at = scene.life_number
    scene.note("latest_damaged", _damage(scene, (scene.work / "store").glob("run/latest.json")))


def journal_file_damaged(scene):
    """Damage ``journal.json``, which has the format version. (A later version is refused, and not tested here.)"""
    ways = ("cut", "empty", "remove", "zeros")
    scene.note("journal_file_damaged", _damage(scene, scene.journal.glob("journal.json"), ways))


def owner_damaged(scene):
    """Damage the small file that records the owner of a CSV file."""
    scene.note("owner_damaged", _damage(scene, (scene.work / "out").glob(".*.run"), ways=("cut", "empty", "remove")))


def _damage(scene, paths, ways=("cut", "empty", "remove", "folder", "link", "other", "zeros")):
    """Damage one of these small files; returns what was done."""
    paths = sorted(path for path in paths if path.is_file())
    if not paths:
        return "nothing there"
    path, way = scene.chance.choice(paths), scene.chance.choice(ways)
    content = path.read_bytes()
    if way in {"remove", "folder", "link"}:
        path.unlink()
    if way == "cut":
        path.write_bytes(content[: scene.chance.randrange(len(content) + 1)])
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
    return f"{way} {path.relative_to(scene.work)}"


def follower_renamed(scene):
    if scene.needs_life:
        return  # a damaged spec under a name that is not used any more would stay damaged
    what = scene.chance.choice(sorted(scene.followers))
    scene.old_names.setdefault(what, []).append(scene.followers[what])
    scene.followers[what] = f"{what}-{scene.life_number}"
    scene.note("subscription_renamed", scene.followers[what])


def follower_added(scene):
    what = f"added{scene.life_number}"
    if what not in scene.followers:
        scene.followers[what] = what
        scene.note("subscription_added", what)


def follower_removed(scene):
    if scene.needs_life:
        return  # for the same reason
    what = scene.chance.choice(sorted(scene.followers))
    if what in scene.away:
        scene.away.discard(what)
        scene.note("subscription_restored", what)
    else:
        scene.away.add(what)
        scene.note("subscription_removed", what)


def output_removed(scene):
    """Remove the output of an adapter, as a person might."""
    what = scene.chance.choice(("table", "logs", "board"))
    out = scene.work / "out"
    path = {"table": out / "metrics.csv", "logs": out / "run" / "logs", "board": out / "tensorboard"}[what]
    scene.note("output_removed", what)
    scene.emptied[what] = scene.life_number + 1
    for _ in range(50):
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError:  # a courier that lingers writes into it
            time.sleep(0.02)
        else:
            break


def machine_restarted(scene):
    """Make the stream locks look as if the machine had been restarted."""
    scene.kill_couriers()
    for lock in scene.journal.glob("[rc]*/lock"):
        with contextlib.suppress(OSError, ValueError):
            owner = json.loads(lock.read_text().split("\n")[-1])
            with lock.open("a") as file:
                file.write("\n" + json.dumps(owner | {"boot": f"another-{scene.life_number}"}))
    scene.note("machine_restarted")


def clock_set(scene):
    """Set the clock between two lives."""
    if scene.tools.clock is None:
        scene.skip("clock_set")
        return
    scene.note("clock_set")
    scene.set_clock(_offset(scene))


def _offset(scene):
    return scene.chance.choice((-7 * DAY, -DAY, -60, 0, 60, DAY, 7 * DAY))


BETWEEN = (
    *(sync_killed, two_syncs, cursor_damaged, cursor_damaged, spec_damaged, state_damaged, spool_damaged),
    *(
        latest_damaged,
        journal_file_damaged,
        owner_damaged,
        follower_renamed,
        follower_added,
        follower_removed,
        follower_removed,
    ),
    *(output_removed, machine_restarted, machine_restarted, clock_set, clock_set),
)
