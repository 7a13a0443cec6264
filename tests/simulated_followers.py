"""The adapters of `simulation.py`: how each is built in a process, what its files contain, and what they should."""

import asyncio
import csv
import functools
import json
import re
from random import Random

from simulated_machine import JOURNAL, ROOT, THIRD, Fault

from evsys_adapters.csv_metrics import CsvMetricsCallback
from evsys_adapters.local_logger import LocalLoggerCallback
from evsys_bus.delivery.courier import Courier
from evsys_bus.delivery.followed import Terms
from evsys_bus.disk import use_disk
from evsys_bus.errors import RetryLaterError
from evsys_bus.testing import MachineStopped

AGAIN_SECONDS = 5.0
"""Delay before a courier restarts after its hook raised `RetryLaterError`; the same as in `Crew`."""


def in_process(kind, process, *args, **params):
    """Make an adapter of this class that does all its work in this process."""

    class Placed(kind):
        def __getattribute__(self, name):
            found = super().__getattribute__(name)
            if not (name.startswith("on_") or name in {"mark", "rewind", "close"}) or not callable(found):
                return found

            @functools.wraps(found)
            def call(*args, **named):
                with use_disk(process):
                    return found(*args, **named)

            return call

    Placed.__name__ = Placed.__qualname__ = kind.__name__
    with use_disk(process):
        return Placed(*args, **params)


def rows_of(disk, path, number_in):
    """Return the event number of each row of a file; None for a line torn by a power cut.

    Args:
        disk: The disk of the file.
        path: The file.
        number_in: Returns the number in a complete line; raises ValueError or LookupError if there is none.
    """
    rows = []
    for line in bytes(disk.contents(path)).splitlines(keepends=True):
        try:
            value = float(number_in(line.decode()))
            if not line.endswith(b"\n") or int(value) + THIRD != value:
                raise ValueError(line)
        except (ValueError, LookupError):
            rows.append(None)
        else:
            rows.append(int(value))
    return rows


class CsvKind:
    """`csv_metrics`."""

    rows = ("step",)

    def __init__(self, number):
        self._label = f"csv{number}"

    def __call__(self, process):
        return in_process(CsvMetricsCallback, process, "{run_dir}/" + self._label + ".csv")

    def files(self, disk, run, rank):
        """Return the event numbers in each file of the run, by kind of row, then by path."""
        begin = f"{ROOT}/{run}/{self._label}"
        paths = [path for path in disk.paths() if path.startswith(begin) and path.endswith(".csv")]
        return {"step": {path: self._rows(disk, path) for path in paths}}

    def _rows(self, disk, path):
        columns = bytes(disk.contents(path)).partition(b"\n")[0].decode().split(",")
        return rows_of(disk, path, lambda line: next(csv.reader([line]))[columns.index("number")])[1:]


class JsonlKind:
    """`local_logger`."""

    rows = ("step", "eval")

    def __init__(self, number):
        del number

    def __call__(self, process):
        return in_process(LocalLoggerCallback, process, print_every=0)

    def files(self, disk, run, rank):
        """Return the event numbers in each file of the run, by kind of row, then by path."""
        folder = f"{ROOT}/{run}/rank{rank}" if rank else f"{ROOT}/{run}"
        found = {}
        for what, folder_name in (("step", "training"), ("eval", "validation")):
            of_this = re.compile(f"{folder}/logs(-[0-9]+)?/{folder_name}/[^.]+[.]jsonl")
            paths = [path for path in disk.paths() if of_this.fullmatch(path)]
            found[what] = {path: rows_of(disk, path, lambda line: json.loads(line)["number"]) for path in paths}
        return found


KINDS = {"csv": CsvKind, "jsonl": JsonlKind}


class Follower:
    """One subscription by its name, and its couriers through all their lives."""

    def __init__(self, simulation, name, group):
        self.simulation, self.name, self.group = simulation, name, group
        self.chance = Random(f"{simulation.seed} {name}")
        self.terms = Terms(group.ranks)
        self.left = False
        self.asked = False
        """Whether the courier is to end."""
        self.task = self.courier = self.process = None

    def start(self, process):
        self.process, self.asked = process, False
        self.courier = self._new_courier()
        self.task = asyncio.get_running_loop().create_task(self._deliver())

    def finish(self):
        """End the courier when everything is delivered, without another restart."""
        self.asked = True
        self.courier.finish()

    def stop(self):
        """End the courier now."""
        self.asked = True
        self.courier.stop()

    async def _deliver(self):
        """Run couriers one after the other, each from the position of the previous one, as `Crew` does.

        Raises:
            RetryLaterError: A hook raised it while the courier was ending.
        """
        while True:
            try:
                return await self.courier.run()
            except RetryLaterError as error:
                self.simulation.machine.inject("courier restarted", self.name, error)
                self._look_at_failures()
                if self.asked:
                    raise
            await asyncio.sleep(AGAIN_SECONDS)
            if self.asked:
                return None
            self.courier = self._new_courier()

    def _new_courier(self):
        self.simulation.machine.note("courier starts", self.name)
        return self.courier_in(self.process, self.chance.choice((0.2, 1.0)))

    def courier_in(self, process, poll_seconds=1.0):
        """Make a courier in this process, as `Crew` does."""
        adapter = self.group.kind(process)
        adapter.spec_name = self.name
        clock = self.simulation.machine.clock
        return Courier(JOURNAL, self.name, adapter, self.terms, disk=process, clock=clock, poll_seconds=poll_seconds)

    def kill(self):
        if self.task is not None:
            self.process.kill()
            self.task.cancel()

    async def end(self):
        """Wait for the courier, and check that it ended without an unexpected error."""
        if self.task is None:
            return
        await asyncio.wait([self.task])
        task, self.task = self.task, None
        error = None if task.cancelled() else task.exception()
        self.simulation.machine.note("courier ended", self.name, repr(error))
        if error is not None and not isinstance(error, (MachineStopped, OSError, RetryLaterError)):
            raise Fault(f"the courier of {self.name} ended with {error!r}") from error
        self._look_at_failures()

    def _look_at_failures(self):
        receiver = self.courier._receiver
        if self.process.alive and (receiver.failures or receiver.task_failures):
            raise Fault(f"{self.name} failed: {receiver.last_failure}")


class Group:
    """The subscriptions that share an output: one, or several after a rename or a duplication."""

    def __init__(self, kind, number, ranks):
        self.kind = KINDS[kind](number)
        self.label = f"{kind}{number}"
        self.ranks = ranks
        self.excused = set()
        """Numbers of events that may be missing: pruned before the registration, or in a file that was removed."""
        self.enlisted = False
        """Whether one of its subscriptions was registered, so that retention waits for it."""
        self.beside = False
        """Whether rows may be in several files, after a rename, a duplication or the loss of a cursor."""

    def serves(self, one):
        """Return whether the event is for these subscriptions."""
        return self.ranks is None or one.rank in self.ranks


class Owed:
    """The expected rows of one output of one run and rank, by the rules of the README.

    Rows are in the order of publication. A start of training at a step removes the rows of that step and of later ones;
    a repeated eval replaces the earlier one.
    """

    def __init__(self, what):
        self._what = what
        self.rows = {}
        """Event number -> whether its row is required."""
        self._at = {}

    def take(self, one, must):
        if one.kind == "start":
            for number in [each for each, (_, step, _) in self._at.items() if step >= one.step]:
                if must:
                    self._drop(number)
                else:
                    self.rows[number] = False
        elif one.kind == self._what:
            key = (one.kind, one.step, one.name)
            if one.kind == "eval":
                for number in [each for each, at in self._at.items() if at == key]:
                    if must:
                        self._drop(number)
                    else:
                        self.rows[number] = False
            self.rows[one.number] = must
            self._at[one.number] = key

    def _drop(self, number):
        del self.rows[number], self._at[number]
