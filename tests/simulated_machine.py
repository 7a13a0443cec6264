"""A simulated machine: virtual time, processes that are killed in a call, and disk faults, each of them counted.

All random choices are made here and in `simulation.py` by `random.Random`; nothing depends on real time, the order of
a set, or threads.
"""

import errno
import os
import random
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from types import SimpleNamespace

from evsys_bus.delivery import subscriptions
from evsys_bus.disk import replace_file
from evsys_bus.testing import MachineStopped, ManualClock, SimulatedDisk

ROOT = "/experiment"
JOURNAL = f"{ROOT}/journal"
NUMBER_FRACTION = 1 / 3
"""Added to the number of an event, so that its last bytes differ from the zeros of unwritten data."""
CODES = (errno.EIO, errno.EMFILE)
OPENING_CALLS = {"lock", "open_append", "open_new", "open_read", "open_file", "open_write"}


@contextmanager
def seeded_system(rng, clock):
    """Take random bytes from the seed, and make other data of the real machine that files contain constant.

    Names of streams and marks consist of random bytes. The size of files, which decides when a disk is full and where a
    write is torn, depends on the pid, the time, and the names of the host and of folders.
    """
    system = (
        (os, "urandom", rng.randbytes),
        (random, "_urandom", rng.randbytes),
        (os, "getpid", lambda: 4242),
        (os, "uname", lambda: SimpleNamespace(nodename="simulated")),
        (os, "getcwd", lambda: ROOT),
        (subscriptions, "import_path", lambda: (ROOT,)),
        (time, "time", clock.wall),
    )
    originals = [getattr(module, name) for module, name, _ in system]
    for module, name, simulated in system:
        setattr(module, name, simulated)
    try:
        yield
    finally:
        for (module, name, _), real in zip(system, originals, strict=True):
            setattr(module, name, real)


class Machine:
    """A disk, a clock, and their current faults.

    Attributes:
        faults: How many faults of each kind were injected.
        trace: What happened, line by line.
        failure_rate: The share of calls that fail with EIO or EMFILE.
        host: The number of the machine, which is part of its boot id.
    """

    def __init__(self, rng, *, traced=False):
        self.clock = ManualClock(1_800_000_000.0)
        self.disk = SimulatedDisk(self.clock)
        self.rng = rng
        self.faults = Counter()
        self.trace = []
        self.traced = traced
        self.failure_rate = 0.0
        self.host = 1

    def note(self, *what):
        """Add a line to the trace."""
        line = f"{self.clock.monotonic():.3f} {self.disk.calls} " + " ".join(map(str, what))
        self.trace.append(line)
        if self.traced:
            print(line, flush=True)

    def count_fault(self, kind, *what):
        """Count a fault of this kind."""
        self.faults[kind] += 1
        self.note("FAULT", kind, *what)

    def clear_faults(self):
        """End all faults."""
        self.failure_rate, self.disk.room = 0.0, None
        self.disk.unreadable.clear()

    def cut_power(self):
        """Cut the power: unsynced data survives, is lost, partly lost or zeroed; changes of folders survive or not."""
        disk = self.disk
        before = {path: bytes(disk.contents(path)) for path in disk.paths()}
        disk.restart("power", chance=self.rng)
        after = {path: bytes(disk.contents(path)) for path in disk.paths()}
        for path in sorted({*before, *after}):
            if before.get(path) != after.get(path):
                kind = "a file gone" if path not in after else "a file back" if path not in before else "a file torn"
                self.count_fault(f"power cut: {kind}", path)


class Process:
    """A process on the machine, and the `Disk` of the code that runs in it: its calls may fail or kill it.

    Args:
        machine: The machine.
        rng: The source of its random choices.
        max_calls: It is killed in the middle of this call; None for never.
        without_faults: Whether the faults of the machine do not apply to it.
    """

    def __init__(self, machine, rng, *, max_calls=None, without_faults=False):
        self.machine = machine
        self.alive = True
        self.calls = 0
        self.interrupt_at = None
        """Number of the call in which KeyboardInterrupt is raised."""
        self._rng = rng
        self._max_calls = max_calls
        self._without_faults = without_faults
        self._files = {}

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        call = self._call
        bound = lambda *args, **kwargs: call(name, *args, **kwargs)  # noqa: E731
        self.__dict__[name] = bound
        return bound

    def boot(self):
        return f"{self.machine.disk.boot()} host {self.machine.host}"

    def replace(self, path, data):
        replace_file(path, data, make_folder=False, disk=self)

    def kill(self):
        """End the process; the system closes its files."""
        if self.alive:
            self.alive = False
            for file in sorted(self._files):
                with suppress(OSError, MachineStopped):
                    self.machine.disk.close(file)

    def _call(self, name, *args, **kwargs):
        machine = self.machine
        if not self.alive:
            if name == "close":  # the system has closed its files
                return None
            raise MachineStopped
        self.calls += 1
        if self.calls == self._max_calls and name != "close":
            self._die(name, args, kwargs)
        if self.calls == self.interrupt_at and threading.current_thread() is threading.main_thread():
            machine.count_fault("interrupt", name)
            if self._rng.random() < 0.5:
                raise KeyboardInterrupt
            self._perform(name, args, kwargs)
            raise KeyboardInterrupt
        if machine.failure_rate and not self._without_faults and self._rng.random() < machine.failure_rate:
            self._fail(name, args)
        return self._perform(name, args, kwargs)

    def _die(self, name, args, kwargs):
        machine, rng = self.machine, self._rng
        machine.count_fault("killed in a call", name, args[0] if args else "")
        with suppress(OSError):
            if name == "write":
                machine.faults["killed in a write"] += 1
                machine.disk.write(args[0], bytes(args[1])[: rng.randint(0, len(args[1]))])
            elif rng.random() < 0.5:
                self._perform(name, args, kwargs)
        self.kill()
        raise MachineStopped

    def _fail(self, name, args):
        machine, rng = self.machine, self._rng
        if name == "close" or (name in OPENING_CALLS and str(args[0]).endswith((".lock", ".run"))):
            return  # a courier that cannot lock delivers all the same, which is not tested here
        if name == "write" and rng.random() < 0.5:
            machine.faults["short write"] += 1
            with suppress(OSError):
                machine.disk.write(args[0], bytes(args[1])[: rng.randrange(max(1, len(args[1])))])
        code = rng.choice(CODES)
        machine.count_fault(errno.errorcode[code], name, *args[:1])
        raise OSError(code, errno.errorcode[code])

    def _perform(self, name, args, kwargs):
        machine = self.machine
        try:
            result = getattr(machine.disk, name)(*args, **kwargs)
        except PermissionError:
            machine.faults["folder unreadable"] += 1
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                machine.faults["disk full"] += 1
            raise
        if name in OPENING_CALLS and result is not None:
            self._files[result] = None
        elif name == "close":
            self._files.pop(args[0], None)
        elif name == "names":
            return sorted(result)
        return result
