"""The followers of `simulation.py`: how each is built in a process, what its files hold, by their bytes, and should."""

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
"""How long until a courier whose hook asked for it begins anew; as `Crew` has it."""


def in_process(kind, process, *args, **params):
    """An adapter of this class, all of whose work is done in this process."""

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
    """The number of the event of each row of a file; None for a line that a power cut has torn.

    Args:
        disk: Where it lies.
        path: The file.
        number_in: What stands for the number in a whole line; raises ValueError or LookupError where nothing does.
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
        """The rows of each file of the run, as the numbers of events: by what they are, then by path."""
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
        """As above."""
        folder = f"{ROOT}/{run}/rank{rank}" if rank else f"{ROOT}/{run}"
        found = {}
        for what, folder_name in (("step", "training"), ("eval", "validation")):
            of_this = re.compile(f"{folder}/logs(-[0-9]+)?/{folder_name}/[^.]+[.]jsonl")
            paths = [path for path in disk.paths() if of_this.fullmatch(path)]
            found[what] = {path: rows_of(disk, path, lambda line: json.loads(line)["number"]) for path in paths}
        return found


KINDS = {"csv": CsvKind, "jsonl": JsonlKind}


class Follower:
    """One follower by its name, and its couriers from life to life."""

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
        """Have it end when all is delivered, and begin anew no more."""
        self.asked = True
        self.courier.finish()

    def stop(self):
        """Have it end now."""
        self.asked = True
        self.courier.stop()

    async def _deliver(self):
        """Run couriers one after the other, each where the last one stood, as `Crew` does.

        Raises:
            RetryLaterError: A hook raised it, and the courier was to end.
        """
        while True:
            try:
                return await self.courier.run()
            except RetryLaterError as error:
                self.simulation.machine.inject("courier anew", self.name, error)
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
        """A courier for this follower in that process, made as `Crew` does."""
        adapter = self.group.kind(process)
        adapter.spec_name = self.name
        clock = self.simulation.machine.clock
        return Courier(JOURNAL, self.name, adapter, self.terms, disk=process, clock=clock, poll_seconds=poll_seconds)

    def kill(self):
        if self.task is not None:
            self.process.kill()
            self.task.cancel()

    async def end(self):
        """Wait for it, and have a look at what it ended with."""
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
    """The followers that share an output: one, or several that were renamed or doubled."""

    def __init__(self, kind, number, ranks):
        self.kind = KINDS[kind](number)
        self.label = f"{kind}{number}"
        self.ranks = ranks
        self.excused = set()
        """Numbers of events that may be missing: gone before it was registered, or with a file that was removed."""
        self.enlisted = False
        """Whether one of its followers was registered, so that retention waits for it."""
        self.beside = False
        """Whether rows may stand in several files: followers were renamed or doubled, or a cursor was lost."""

    def serves(self, one):
        """Whether the event is for these followers."""
        return self.ranks is None or one.rank in self.ranks


class Owed:
    """The rows of one output of one run and rank, by the rules of the README.

    Rows stand in the order in which they were published. A start of training at a step cuts the rows of that step and
    of later ones; an eval that comes again takes the place of the earlier one.
    """

    def __init__(self, what):
        self._what = what
        self.rows = {}
        """Number -> whether it must be there."""
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
